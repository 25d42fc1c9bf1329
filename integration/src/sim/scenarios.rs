//! Scenarios that random runs have found to break something, each by its name. Where the moment matters,
//! many are tried.

use vmfs_common::chain::Refusal;
use vmfs_common::policy::MemberRole::{Replica, Witness};
use vmfs_common::policy::{Acks, ImagePolicy, MemberRole, OnQuorumLoss};
use vmfs_proto::{Health, Input, Loss, OpError, OpOutcome};

use super::At;
use super::schedule::create;
use super::world::World;

const STRICT: ImagePolicy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Stall };
const DEGRADE: ImagePolicy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Degrade };

fn cluster(seed: u64, roles: &[MemberRole], policy: ImagePolicy) -> World {
    let mut w = World::new(seed, true);
    create(&mut w, roles, policy);
    w.run(1_000_000);
    check(&mut w);
    w
}

fn check(w: &mut World) {
    if let Some((_, what)) = w.violation.take() {
        panic!("{what}\n{}", w.take_trace(60).join("\n"));
    }
}

fn isolate(w: &mut World, at: At) {
    w.isolate(at, true);
}

/// Writes far more than a log retains.
fn write_much(w: &mut World, at: At) {
    for _ in 0..150 {
        for _ in 0..4 {
            w.write(at);
        }
        w.flush(at);
        w.run(60_000);
    }
    check(w);
}

fn converge(mut w: World) -> World {
    w.converge();
    check(&mut w);
    w
}

#[test]
fn a_witness_behind_the_trimmed_log_catches_up() {
    let mut w = cluster(1, &[Replica, Replica, Witness], STRICT);
    isolate(&mut w, 2);
    write_much(&mut w, 0);
    let w = converge(w);
    assert!(w.counts.imports > 0, "the log still reached back");
}

#[test]
fn an_owner_whose_members_all_need_block_level_sync_is_committed() {
    let mut w = cluster(2, &[Replica, Replica], DEGRADE);
    isolate(&mut w, 1);
    write_much(&mut w, 0);
    w.power_cut(0);
    let w = converge(w);
    assert!(w.counts.imports > 0, "the log still reached back");
}

#[test]
fn a_power_cut_while_an_ended_epoch_is_received_leaves_a_voter() {
    for ms in 0..60 {
        let mut w = cluster(3 + ms, &[Replica, Replica, Replica], STRICT);
        isolate(&mut w, 2);
        w.run(100_000);
        for _ in 0..8 {
            w.write(0);
        }
        w.run(200_000);
        w.order(1, |token| Input::Promote { force: false, token });
        w.run(1_000_000);
        for other in 0..2 {
            w.set_open(2, other, true);
            w.set_open(other, 2, true);
        }
        // The updates of the epoch before reach host 2 some time now.
        w.connect(1, 2);
        w.run(4_000 + ms * 1_000);
        w.power_cut(2);
        w.run(3_000_000);
        w.order(1, |token| Input::Promote { force: false, token });
        w.run(1_000_000);
        isolate(&mut w, 0);
        w.order(2, |token| Input::Promote { force: false, token });
        w.run(2_000_000);
        check(&mut w);
        converge(w);
    }
}

#[test]
fn a_change_of_policy_cut_short_by_a_restart_does_not_block_the_next() {
    for ms in 0..40 {
        let mut w = cluster(100 + ms, &[Replica, Replica, Replica], STRICT);
        let policy = ImagePolicy { acks: Acks::Local, ..STRICT };
        w.order(0, |token| Input::SetPolicy { policy, token });
        w.run(ms * 500);
        w.power_cut(0);
        let mut w = converge(w);
        let owner = w.owner().expect("an owner serves");
        let token = w.order(owner, |token| Input::SetPolicy { policy: DEGRADE, token }).expect("it runs");
        w.run(3_000_000);
        check(&mut w);
        let answer = w.oracle.answers.get(&token);
        assert!(matches!(answer, Some(Ok(_))), "{answer:?} after a restart {ms} half-milliseconds later");
    }
}

#[test]
fn a_new_member_known_to_the_witness_alone_does_not_block_elections() {
    for ms in 0..40 {
        let mut w = cluster(200 + ms, &[Replica, Replica, Witness], STRICT);
        let at = w.add_host(Replica);
        w.run(500_000);
        let member = w.hosts[at].member();
        // Data reaches the second replica late, so that the witness is ahead of it.
        w.net.way(0, 1).delay = 400_000;
        w.order(0, |token| Input::AddMember { member, token });
        w.run(ms * 4_000);
        w.power_cut(0);
        converge(w);
    }
}

fn promote(w: &mut World, at: At) -> Option<Result<OpOutcome, OpError>> {
    let token = w.order(at, |token| Input::Promote { force: false, token }).expect("it runs");
    w.run(3_000_000);
    check(w);
    w.oracle.answers.get(&token).cloned()
}

fn join_again(w: &mut World, a: At, b: At) {
    w.set_open(a, b, true);
    w.set_open(b, a, true);
    w.connect(a, b);
}

/// Seed 237 of the first simulator: the commit points in updates that nobody had vouched for yet made the
/// store give up the checkpoint that the copy had to be cut back to for its vote, and it never voted.
#[test]
fn an_ended_epoch_half_received_can_be_cut_back_for_a_vote() {
    for step in 0..20 {
        let mut w = cluster(300 + step, &[Replica, Replica, Replica], STRICT);
        isolate(&mut w, 2);
        for _ in 0..16 {
            w.write(0);
            w.write(0);
            w.flush(0);
            w.run(20_000);
        }
        assert!(matches!(promote(&mut w, 1), Some(Ok(_))));
        isolate(&mut w, 0);
        w.net.way(1, 2).rate = 200;
        join_again(&mut w, 1, 2);
        w.run(200_000 + step * 100_000);
        w.power_cut(2);
        w.power_cut(1);
        w.run(15_000_000);
        check(&mut w);
        assert_eq!(w.owner(), Some(1), "{} steps of 100 ms into the stream", step);
        converge(w);
    }
}

#[test]
fn an_owner_whose_flushes_were_its_own_keeps_them_as_a_fork_and_follows() {
    let mut w = cluster(500, &[Replica, Replica, Replica], ImagePolicy { acks: Acks::Local, ..STRICT });
    isolate(&mut w, 0);
    w.write(0);
    let flush = w.flush(0);
    w.run(200_000);
    assert_eq!(w.oracle.flushed.get(&flush), Some(&Ok(())));
    let Some(Ok(OpOutcome::Promoted { loss, .. })) = promote(&mut w, 1) else { panic!("not promoted") };
    assert!(matches!(loss, Loss::UnknownAfter { .. }), "{loss:?}");
    let w = converge(w);
    assert_eq!(w.hosts[0].copy().map_or(0, |c| c.store.forks().len()), 1);
}

/// Seed 135 of the second simulator: a witness that was ahead of the only data member left had trimmed its log
/// beyond the point where that one goes on, refused it for ever, and no quorum formed.
#[test]
fn a_witness_whose_log_was_trimmed_beyond_the_new_owners_start_takes_its_state() {
    let mut w = cluster(510, &[Replica, Replica, Witness], STRICT);
    isolate(&mut w, 2);
    write_much(&mut w, 0);
    isolate(&mut w, 1);
    for _ in 0..10 {
        w.write(0);
        w.run(20_000);
    }
    join_again(&mut w, 0, 2);
    w.run(20_000_000);
    let held = w.hosts[1].machine().expect("it runs").state().head().seq;
    let kept = w.hosts[2].copy().expect("it runs").store.log_start();
    assert!(kept > held.next(), "the witness still holds everything after {held}: from {kept} on");
    isolate(&mut w, 0);
    join_again(&mut w, 1, 2);
    w.run(1_000_000);
    assert!(matches!(promote(&mut w, 1), Some(Ok(_))), "{:?}", w.oracle.answers);
    converge(w);
}

/// Seed 2143: given up, but not cut back, the lineage went on, and nobody could see that it was forced.
#[test]
fn a_separate_lineage_whose_log_was_trimmed_can_be_given_up() {
    let mut w = cluster(530, &[Replica, Replica, Replica], STRICT);
    isolate(&mut w, 2);
    w.order(2, |token| Input::Promote { force: true, token });
    w.run(8_000_000);
    assert!(w.hosts[2].machine().is_some_and(vmfs_proto::Machine::is_open_owner));
    write_much(&mut w, 2);
    for other in 0..2 {
        join_again(&mut w, other, 2);
    }
    w.run(1_000_000);
    w.order(2, |token| Input::AbandonForced { token });
    w.run(5_000_000);
    let w = converge(w);
    let status = w.hosts[2].machine().map(|m| m.status(w.hosts[2].now(w.now))).expect("it runs");
    assert!(!status.forced && status.owner != Some(w.hosts[2].id.host), "{status:?}");
    assert!(w.counts.imports > 0, "the log still reached back");
}

/// Found by lying owners: a copy that held one of two updates with one parent went on as "catching up" for
/// ever, and nobody was told.
#[test]
fn two_updates_with_one_parent_are_reported_and_the_copy_that_holds_one_is_fenced() {
    let mut w = cluster(520, &[Replica, Replica, Replica], STRICT);
    w.hosts[0].liar = true;
    w.power_cut(0);
    w.run(5_000_000);
    assert_eq!(w.owner(), Some(0));
    w.lying.depth = 2;
    for _ in 0..20 {
        w.write(0);
        w.flush(0);
        w.run(100_000);
    }
    w.reform();
    w.run(6_000_000);
    check(&mut w);
    let says = |w: &World, at: At| {
        let now = w.hosts[at].now(w.now);
        let status = w.hosts[at].machine().map(|m| m.status(now)).expect("it runs");
        status.refusals.contains_key(&Refusal::Fork) && status.health == Health::Fenced
    };
    assert!((1..3).any(|at| says(&w, at)), "nobody is fenced");
    // The blocks of a later certified owner bring it back, and what it had is kept.
    let w = converge(w);
    assert!((1..3).any(|at| w.hosts[at].copy().is_some_and(|c| !c.store.forks().is_empty())));
}
