//! Random schedules. A failing seed is printed and becomes a named test.
use vmfs_proto::testing::random_run;

#[test]
fn any_schedule_keeps_the_promises_and_converges_when_healed() {
    let (first, count) = range();
    let (mut acknowledged, mut epochs) = (0, 0);
    for seed in first..first + count {
        let run = std::panic::catch_unwind(|| random_run(seed, 140));
        let Ok(run) = run else { panic!("seed {seed} fails: VMFS_SEED={seed} replays it") };
        acknowledged += run.oracle.acknowledged();
        epochs += run.nodes.iter().map(|n| n.head().epoch.number).max().unwrap_or(0);
    }
    println!("{acknowledged} flush targets acknowledged, {epochs} epochs in {count} runs");
    // The schedules do test something: several owners and flushes in every run, on average.
    assert!(count == 1 || (acknowledged as u64 > 4 * count && epochs > 3 * count));
}

fn range() -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok().map(|s| s.parse().expect("a number"));
    match number("VMFS_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("VMFS_SEEDS").unwrap_or(600)),
    }
}
