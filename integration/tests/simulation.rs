//! Random clusters under random faults keep every promise, and converge when healed. A failing seed is
//! printed with the events before it; `VMFS_SEED=n` replays it, `VMFS_SEEDS=n` runs more of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use integration::sim::{self, Tally};

/// Actions in each run.
const TICKS: u64 = 200;
/// Runs without `VMFS_SEEDS`, and those of them in which owners expect flushes, and hosts scrub while they work, too.
const SEEDS: u64 = 1_500;
const FORESEEN: u64 = 300;
const SCRUBBED: u64 = 300;
/// Runs go on these many threads; each run is single-threaded.
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|s| s.parse().expect("a number"))
}

#[test]
fn random_clusters_keep_the_promises_and_converge_when_healed() {
    let seeds: Vec<u64> = match (number("VMFS_SEED"), number("VMFS_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(count)) => (1..=count).collect(),
        (None, None) => {
            let foreseen = sim::FORESEEN_FROM..sim::FORESEEN_FROM + FORESEEN;
            let scrubbed = sim::SCRUBBED_FROM..sim::SCRUBBED_FROM + SCRUBBED;
            (1..=SEEDS - FORESEEN - SCRUBBED).chain(foreseen).chain(scrubbed).collect()
        }
    };
    let count = seeds.len() as u64;
    let next = AtomicUsize::new(0);
    let (all, failures) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)).copied() else { return };
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
    let seeds: Vec<u64> = failures.iter().map(|f| f.seed).collect();
    assert!(seeds.is_empty(), "{} of {count} runs fail, see above; seeds {seeds:?}", seeds.len());
    println!("{count} runs: {all:?}");
    // The runs do test something: on average, several owners and crashes in each.
    assert!(count == 1 || (all.flushes > 10 * count && all.epochs > 2 * count && all.crashes > 2 * count));
    assert!(
        count < 100 || (all.forks > count / 20 && all.imports > count / 20 && all.operations > count / 2)
    );
    assert!(count < 100 || (all.statements > count / 4 && all.lies > count / 2 && all.rotten > count / 10));
    assert!(count < 1000 || all.scrubbed > count);
    // A lie or a lying disk excuses few of them from coming together again.
    assert!(count < 100 || all.evident < count / 20);
}

/// Seeds that found bugs: a vote that stated a head which was cut for a certified owner while the vote was being
/// made durable; flushes that outlived the content they were asked for, which copied blocks had replaced; "nothing
/// is missing" from a member that had been removed without hearing of it; a segment of the log that a superblock older
/// than the torn one still listed as another's; leases that members kept alive who had been wiped, whose store had
/// failed, who had promised themselves to a later owner; a damaged copy that could not be replaced, since its log could
/// not be read to be kept as a fork; a loss statement that left out a voter; two that took an update of another owner,
/// or one that was cut, for the last contact; a damaged page of the older map in a cut; an offer that was refused in
/// silence; pages of a failed sync that were believed; an owner's own Seal between a Root and its Seal; a vote that was
/// said before it was on the disk; a member that waited for an owner that was none any more; a repair that was not
/// read back; a removal without its Seal, which its own voters refused; a candidate that gave way to an old offer; acknowledgements
/// read by another member list; segments without a header, or with that of an earlier use, that were taken for others.
#[test]
fn seeds_that_found_bugs_stay_clean() {
    let seeds = [
        30_120, 32_490, 35_590, 50_864, 71_871, 200_889, 201_549, 209_282, 211_317, 211_904, 214_394,
        220_975, 223_140, 300_953, 415_319, 518_779, 521_378, 538_595, 609_800, 610_209, 617_294, 619_867,
        619_998, 627_753, 628_142, 634_326, 800_474, 2_005_713, 2_010_750, 2_019_481, 6_013_740, 7_030_053,
    ];
    for seed in seeds {
        if let Err(failure) = sim::run(seed, TICKS) {
            panic!("{failure}");
        }
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 7000..7010 {
        let (once, twice) = (sim::run(seed, TICKS), sim::run(seed, TICKS));
        assert_eq!(once.map_err(|f| f.to_string()), twice.map_err(|f| f.to_string()), "seed {seed}");
    }
}
