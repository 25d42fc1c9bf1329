//! The real machines, explored exhaustively within bounds (`stateright`): every order in which packets
//! arrive, disks complete, timers fire, hosts crash and operators act. docs/testing.md states the
//! bounds, what is left out, and the numbers of states; the last test here explores bounds of one's own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bounds;
mod engine;
mod host;
mod oracle;
mod world;

use stateright::{Checker, Model};
use vmfs_common::weaken::Weakness;

use bounds::Bounds;
use world::{Step, World};

fn threads() -> usize {
    std::env::var("VMFS_MODEL_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Explores everything; what breaks a promise is the end of the test, and so is what is never reached.
fn explore(text: &str, reach: &[&'static str]) {
    let checker = Bounds::parse(text, None, reach).checker().threads(threads()).spawn_dfs().join();
    let (states, steps, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    println!("{text}: {states} states, {steps} steps, depth {depth}");
    if let Some(path) = checker.discovery("the promises hold") {
        panic!("{text}: {}", told(path.into_vec()));
    }
    for name in reach {
        assert!(checker.discovery(name).is_some(), "{text}: not reached: {name}");
    }
}

/// The same rules with one of them broken: there must be a way to `what`, which is told.
fn counterexample(text: &str, weakness: Weakness, what: &str) {
    let checker = Bounds::parse(text, Some(weakness), &[]).checker().threads(threads()).spawn_dfs().join();
    let path = checker.discovery("the promises hold").expect("a broken rule breaks a promise").into_vec();
    let broken = path.last().and_then(|(w, _)| w.oracle.violation);
    println!("{weakness:?}, found after {} states: {}", checker.unique_state_count(), told(path));
    assert_eq!(broken, Some(what));
}

fn told(path: Vec<(World, Option<Step>)>) -> String {
    let steps: Vec<String> = path.iter().filter_map(|(_, s)| s.map(|s| format!("{s:?}"))).collect();
    let last = path.last().map(|(w, _)| w.to_string()).unwrap_or_default();
    format!("{} steps:\n  {}\n{last}", steps.len(), steps.join("\n  "))
}

/// Every rule that is broken on purpose, the bounds within which that is found, and what comes of it.
const BROKEN: [(&str, Weakness, &str); 3] = [
    (
        "rrr fast=012 apart=01 promote=01 writes=2 flushes=1 promotions=2 soon=1",
        Weakness::HeadsByLength,
        oracle::FLUSH_LOST,
    ),
    (
        "rrr fast=012 apart=01 together=no promote=1 cut=02 guests=0 writes=1 flushes=1 promotions=2 cuts=1 soon=2",
        Weakness::OldEpochCommits,
        oracle::FLUSH_LOST,
    ),
    (
        "rrr fast=01 apart=01 promote=1 promotions=1 crashes=1",
        Weakness::PromiseNotDurable,
        oracle::BELOW_PROMISE,
    ),
];

#[test]
fn three_data_members_keep_the_promises_when_one_is_promoted() {
    explore(
        "rrr fast=012 promote=1 writes=1 flushes=1 promotions=1",
        &["a later owner's flush", "a fork kept"],
    );
}

#[test]
fn three_data_members_keep_the_promises_on_slow_disks() {
    explore("rrr promote=1 writes=1 promotions=1", &["a fork kept"]);
}

#[test]
fn three_data_members_keep_the_promises_when_one_crashes() {
    explore("rrr fast=012 promote=1 promotions=1 crashes=1", &["a restart"]);
}

#[test]
fn three_data_members_keep_the_promises_when_ownership_is_handed_over() {
    explore("rrr fast=012 writes=1 flushes=1 handovers=1", &["handed over", "a later owner's flush"]);
}

#[test]
fn two_data_members_and_a_witness_keep_the_promises_when_one_is_promoted() {
    explore("rrw fast=012 promote=1 writes=1 flushes=1 promotions=1", &["a later owner's flush"]);
}

#[test]
fn two_data_members_and_a_witness_keep_the_promises_on_slow_disks() {
    explore("rrw promote=1 writes=1 promotions=1", &["a fork kept"]);
}

#[test]
fn two_data_members_and_a_witness_keep_the_promises_when_one_crashes_in_a_hand_over() {
    explore("rrw fast=012 handovers=1 crashes=1", &["handed over", "a restart"]);
}

#[test]
fn members_are_added_and_removed_while_one_is_promoted() {
    explore("rrr fast=012 promote=1 promotions=1 changes=1", &["members changed"]);
    explore("rr+w fast=012 promote=1 promotions=1 writes=1 changes=1", &["members changed"]);
}

#[test]
fn two_candidates_at_once_and_a_slow_disk_keep_the_promises() {
    explore("rrr fast=012 apart=01 promote=01 promotions=2 soon=1", &[]);
    explore("rrr fast=01 guests=0 writes=1 flushes=1", &[]);
}

#[test]
fn a_vote_before_its_promise_is_durable_is_found_out() {
    let (text, weakness, what) = BROKEN[2];
    counterexample(text, weakness, what);
}

#[test]
fn heads_compared_by_length_are_found_out() {
    let (text, weakness, what) = BROKEN[0];
    counterexample(text, weakness, what);
}

#[test]
fn updates_of_an_older_epoch_counted_as_committed_are_found_out() {
    let (text, weakness, what) = BROKEN[1];
    counterexample(text, weakness, what);
}

/// The same bounds with the rules as they are: what the counterexamples break holds there.
#[test]
fn the_real_rules_hold_where_a_vote_before_its_promise_does_not() {
    explore(BROKEN[2].0, &["a restart"]);
}

#[test]
fn the_real_rules_hold_where_heads_compared_by_length_do_not() {
    explore(BROKEN[0].0, &["a later owner's flush"]);
}

/// The way to lose an acknowledged flush that the checker finds when older epochs count, taken with a rule
/// broken and with the rules as they are.
#[test]
fn the_way_that_loses_an_older_epochs_update_loses_nothing_by_the_real_rules() {
    use Step::{Cut, Deliver, Flush, Promote, Restore, Soon, Write};
    let d = |from, to| Deliver { from, to };
    let way = [
        [Promote(1), Write(0), Flush(0), d(1, 2), d(2, 1), Promote(1), d(2, 0), Soon(0), d(0, 2), d(2, 0)],
        [d(0, 2), d(2, 0), d(0, 2), d(2, 0), d(1, 2), d(2, 1), d(1, 2), d(1, 2), d(2, 1), Soon(1)],
        [d(0, 2), d(2, 0), d(0, 2), d(0, 2), Cut(0, 2), Restore(0, 2), d(0, 2), d(2, 0), d(1, 2), d(2, 1)],
    ];
    let (text, weakness, what) = BROKEN[1];
    for (weakness, broken) in [(Some(weakness), Some(what)), (None, None)] {
        let bounds = Bounds::parse(text, weakness, &[]);
        let mut world = bounds.init_states().pop().unwrap();
        for step in way.as_flattened() {
            let mut possible = Vec::new();
            bounds.actions(&world, &mut possible);
            assert!(possible.contains(step), "{step:?} is not possible with {weakness:?}\n{world}");
            world = bounds.next_state(&world, *step).unwrap();
        }
        assert_eq!(world.oracle.violation, broken, "{weakness:?}\n{world}");
    }
}

/// `VMFS_MODEL="rrr promote=12 writes=1 ..."`: see [`bounds`].
#[test]
#[ignore = "explores the bounds that VMFS_MODEL names"]
fn bounds_of_ones_own() {
    let text = std::env::var("VMFS_MODEL").expect("VMFS_MODEL names the bounds");
    explore(&text, &[]);
}
