//! Scenarios that random runs have found to break something, each by its name. Where the moment matters,
//! many are tried.

use vmfs_common::policy::MemberRole::{Replica, Witness};
use vmfs_common::policy::{Acks, ImagePolicy, MemberRole, OnQuorumLoss};
use vmfs_proto::Input;

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
    if let Some(what) = w.violation.take() {
        panic!("{what}\n{}", w.take_trace(60).join("\n"));
    }
}

fn isolate(w: &mut World, at: At) {
    for other in (0..w.hosts.len()).filter(|o| *o != at) {
        w.set_open(at, other, false);
        w.set_open(other, at, false);
    }
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
