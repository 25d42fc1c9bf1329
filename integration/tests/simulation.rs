//! Random clusters under random faults keep every promise, and converge when healed. A failing seed is
//! printed with the events before it; `VMFS_SEED=n` replays it, `VMFS_SEEDS=n` runs more of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use integration::sim::{self, Tally};

/// Actions in each run.
const TICKS: u64 = 200;
/// Runs without `VMFS_SEEDS`.
const SEEDS: u64 = 1_200;
/// Runs that break no promise and do not converge in time: open, each with what is known. 237: of four members
/// a witness was wiped and a replica does not vote, so that no quorum forms; to be found out whether that is
/// more than the fault model allows (then the simulator asks too much) or a wrong refusal.
const OPEN_LIVENESS: [u64; 1] = [237];
/// Runs go on these many threads; each run is single-threaded.
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|s| s.parse().expect("a number"))
}

#[test]
fn random_clusters_keep_the_promises_and_converge_when_healed() {
    let (first, count) = match number("VMFS_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("VMFS_SEEDS").unwrap_or(SEEDS)),
    };
    let next = AtomicU64::new(first);
    let (all, failures) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return;
            }
            match sim::run(seed, TICKS) {
                Ok(tally) => all.lock().unwrap().add(&tally),
                Err(failure) => failures.lock().unwrap().push(failure),
            }
        }
    };
    std::thread::scope(|s| (0..THREADS).for_each(|_| drop(s.spawn(work))));
    let (all, failures) = (all.into_inner().unwrap(), failures.into_inner().unwrap());
    for failure in &failures {
        println!("{failure}");
    }
    let is_open = |seed: u64, what: &str| OPEN_LIVENESS.contains(&seed) && what.contains("not converged");
    let unknown = failures.iter().filter(|f| !is_open(f.seed, &f.to_string()));
    let seeds: Vec<u64> = unknown.map(|f| f.seed).collect();
    assert!(seeds.is_empty(), "{} of {count} runs fail, see above; seeds {seeds:?}", seeds.len());
    println!("{count} runs: {all:?}");
    // The runs do test something: on average, several owners and crashes in each.
    assert!(count == 1 || (all.flushes > 10 * count && all.epochs > 2 * count && all.crashes > 2 * count));
    assert!(
        count < 100 || (all.forks > count / 20 && all.imports > count / 20 && all.operations > count / 2)
    );
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 7000..7010 {
        let (once, twice) = (sim::run(seed, TICKS), sim::run(seed, TICKS));
        assert_eq!(once.map_err(|f| f.to_string()), twice.map_err(|f| f.to_string()), "seed {seed}");
    }
}
