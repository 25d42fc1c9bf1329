//! Runs the simulator: `sim --seed N [--ticks M] [--runs K]`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use integration::sim::{self, Tally};

const USAGE: &str = "usage: sim [--seed N] [--ticks M] [--runs K]

Runs K random clusters (default 1000), from seed N on (default 1), with M actions each (default 200).
Prints every seed that fails, with the events before it, and exits 1 if there is one.";

/// The run under way.
static SEED: AtomicU64 = AtomicU64::new(0);

struct Args {
    seed: u64,
    ticks: u64,
    runs: u64,
}

fn args() -> Result<Args, String> {
    let mut args = Args { seed: 1, ticks: 200, runs: 1000 };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let slot = match name.as_str() {
            "--seed" => &mut args.seed,
            "--ticks" => &mut args.ticks,
            "--runs" => &mut args.runs,
            other => return Err(format!("unknown argument {other:?}")),
        };
        let value = given.next().ok_or_else(|| format!("{name} needs a number"))?;
        *slot = value.parse().map_err(|_| format!("{name} needs a number, not {value:?}"))?;
    }
    Ok(args)
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
            println!("seed {} fails: {panic}", SEED.load(Ordering::Relaxed));
            std::process::exit(1);
        }
    }));
    let (mut all, mut failed, began) = (Tally::default(), 0u64, Instant::now());
    for seed in args.seed..args.seed.saturating_add(args.runs) {
        SEED.store(seed, Ordering::Relaxed);
        match sim::run(seed, args.ticks) {
            Ok(tally) => all.add(&tally),
            Err(failure) => {
                failed += 1;
                println!("{failure}");
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{} runs, {failed} failed, {:.1} runs/s, {:.0} s",
        args.runs,
        args.runs as f64 / seconds,
        seconds
    );
    println!("{all:?}");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
