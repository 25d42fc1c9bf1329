//! Random schedules. A failing seed is printed and becomes a named test.
use vmfs_proto::testing::random_run;

#[test]
fn any_schedule_keeps_the_promises_and_converges_when_healed() {
    let (first, count) = range();
    for seed in first..first + count {
        let run = std::panic::catch_unwind(|| random_run(seed, 60));
        assert!(run.is_ok(), "seed {seed} fails: VMFS_SEED={seed} replays it");
    }
}

fn range() -> (u64, u64) {
    match std::env::var("VMFS_SEED") {
        Ok(seed) => (seed.parse().expect("VMFS_SEED is a number"), 1),
        Err(_) => (1, 600),
    }
}
