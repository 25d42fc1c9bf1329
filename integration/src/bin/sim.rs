//! Runs the simulator: `sim [--seed N] [--ticks M] [--runs K] [--jobs J]`.

use std::cell::Cell;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use integration::sim::{self, Tally};

const USAGE: &str = "usage: sim [--seed N] [--ticks M] [--runs K] [--jobs J]

Runs K random clusters (default 1000), from seed N on (default 1), with M actions each (default 200), J of
them at a time (default 1). Prints every seed that fails, with the events before it, and exits 1 if there
is one. Says every minute how far it is.";

/// Between two lines of progress.
const REPORT: Duration = Duration::from_secs(60);

thread_local! {
    /// The run under way on this thread.
    static SEED: Cell<u64> = const { Cell::new(0) };
}

#[derive(Clone, Copy)]
struct Args {
    seed: u64,
    ticks: u64,
    runs: u64,
    jobs: u64,
}

fn args() -> Result<Args, String> {
    let mut args = Args { seed: 1, ticks: 200, runs: 1000, jobs: 1 };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let slot = match name.as_str() {
            "--seed" => &mut args.seed,
            "--ticks" => &mut args.ticks,
            "--runs" => &mut args.runs,
            "--jobs" => &mut args.jobs,
            other => return Err(format!("unknown argument {other:?}")),
        };
        let value = given.next().ok_or_else(|| format!("{name} needs a number"))?;
        *slot = value.parse().map_err(|_| format!("{name} needs a number, not {value:?}"))?;
    }
    if args.jobs == 0 {
        return Err("--jobs needs a number above zero".into());
    }
    Ok(args)
}

/// What all jobs share.
struct Soak {
    args: Args,
    began: Instant,
    next: AtomicU64,
    /// Numbers of the runs that are done, seeds that failed, time of the last report.
    sum: Mutex<(Tally, Vec<u64>, Instant)>,
    done: AtomicU64,
}

impl Soak {
    fn work(&self) {
        let end = self.args.seed.saturating_add(self.args.runs);
        loop {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            SEED.set(seed);
            let result = sim::run(seed, self.args.ticks);
            let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
            let Ok(mut sum) = self.sum.lock() else { return };
            match result {
                Ok(tally) => sum.0.add(&tally),
                Err(failure) => {
                    sum.1.push(seed);
                    println!("{failure}");
                }
            }
            if sum.2.elapsed() >= REPORT {
                sum.2 = Instant::now();
                println!("{}", self.progress(done, sum.1.len()));
            }
        }
    }

    fn progress(&self, done: u64, failed: usize) -> String {
        let seconds = self.began.elapsed().as_secs_f64();
        format!(
            "{done} runs, {failed} failed, {:.1} runs/s, {seconds:.0} s on {} threads",
            done as f64 / seconds,
            self.args.jobs
        )
    }
}

fn main() -> ExitCode {
    let args = match args() {
        Ok(args) => args,
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // A panic is a failed run where it unwinds; where it aborts, it is reported here with its seed.
    std::panic::set_hook(Box::new(|panic| {
        if cfg!(panic = "abort") {
            println!("seed {} fails: {panic}", SEED.get());
            std::process::exit(1);
        }
    }));
    let began = Instant::now();
    let soak = Soak {
        args,
        began,
        next: AtomicU64::new(args.seed),
        sum: Mutex::new((Tally::default(), Vec::new(), began)),
        done: AtomicU64::new(0),
    };
    std::thread::scope(|s| (0..args.jobs).for_each(|_| drop(s.spawn(|| soak.work()))));
    let done = soak.done.load(Ordering::Relaxed);
    let (all, mut failed) = match soak.sum.lock() {
        Ok(sum) => (sum.0, sum.1.clone()),
        Err(_) => return ExitCode::FAILURE,
    };
    failed.sort_unstable();
    println!("{}", soak.progress(done, failed.len()));
    println!("{all:?}");
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed seeds: {failed:?}");
    ExitCode::FAILURE
}
