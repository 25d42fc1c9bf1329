//! Sequences that random schedules found, each reduced to its core. Those about what is refused, about changes of members
//! and about forced lineages are in files of their own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{cluster, fetches, fetching, offer_of, promote};
use vmfs_common::chain::Refusal;
use vmfs_common::msg::{ImageMsg, Occasion};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole::Replica;
use vmfs_common::policy::{Acks, ImagePolicy, OnQuorumLoss};
use vmfs_common::{Epoch, Head, Seq};
use vmfs_proto::testing::{Cluster, Packet};
use vmfs_proto::{FlushError, Input, OpError};

#[test]
fn an_owner_whose_successor_vanishes_before_its_epoch_arrived_bids_again() {
    let mut c = cluster(&[Replica; 2]);
    let kept = c.write_and_flush(0);
    c.op(1, |token| Input::Promote { force: false, token });
    c.until("deposed", 2000, |c| {
        c.events.iter().any(|(at, e)| *at == 0 && matches!(e, vmfs_proto::Event::Deposed { .. }))
    });
    // The new owner's EpochStart is not on its disk yet.
    let before = c.nodes[1].log.len() - 1;
    c.crash(1);
    c.lose_log(1, before);
    c.restart(1);
    c.until("somebody owns it", 20_000, |c| c.owner().is_some());
    assert!(c.holds(c.owner().unwrap(), kept));
}

#[test]
fn block_level_sync_from_a_deposed_owner_is_not_put_in_place() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.crash(2);
    for _ in 0..10 {
        c.write_and_flush(0);
    }
    c.nodes[0].log_start = Seq(20);
    c.cut(1, 2);
    c.restart(2);
    c.cut(1, 2);
    c.until("copying", 2000, |c| c.nodes[2].is_importing());
    c.isolate(0);
    c.heal(1, 2);
    assert!(promote(&mut c, 1).is_ok());
    c.write_and_flush(1);
    c.run(2000);
    assert_eq!(c.nodes[2].head(), c.nodes[1].head());
}

#[test]
fn a_member_whose_part_of_the_log_is_damaged_is_given_the_blocks() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.cut(0, 2);
    for _ in 0..5 {
        c.write_and_flush(0);
    }
    let (bad, host) = (c.nodes[2].head().seq.next(), c.nodes[2].id.host);
    c.heal(0, 2);
    c.input(0, Input::LogUnreadable { to: host, seq: bad });
    c.until("copying", 3000, |c| c.nodes[2].is_importing());
    c.until("there", 5000, |c| c.nodes[2].head() == c.nodes[0].head());
}

/// Seed 32490 of the simulator: it waited until the copy was an owner again, of other content by then.
#[test]
fn a_flush_does_not_outlive_the_candidacy_in_which_it_was_asked() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.isolate(1);
    let promotion = c.op(1, |token| Input::Promote { force: false, token });
    let flush = c.flush(1);
    assert!(matches!(c.answer(promotion), Err(OpError::NoQuorum { .. })));
    assert_eq!(c.flush_answer(flush), Err(FlushError::NotOwner));
}

/// Seed 518779 of the simulator: a host that a candidate fetches from is an owner, too, and has to hear that its
/// epoch is over for the candidate.
#[test]
fn an_offer_that_is_refused_while_something_is_fetched_from_its_sender_is_answered() {
    let mut c = fetching();
    let epoch = Epoch { number: 1, host: c.nodes[2].id.host };
    let start = Head { epoch, ..c.nodes[2].head() };
    let offer = ImageMsg::Offer { head: start, start, log_start: Seq(1), certificate: vec![], role: Replica };
    c.receive(2, 1, Packet::Msg(Box::new(offer)));
    let told = |p: &Packet| matches!(p, Packet::Msg(m) if matches!(**m, ImageMsg::Refused { why: Refusal::Promised, .. }));
    assert!(c.under_way(1, 2).iter().any(told), "{}", c.describe());
    assert!(fetches(&c), "the fetch goes on: {}", c.describe());
    c.until("elected", 2000, |c| c.owner() == Some(1));
}

/// Seed 619998 of the simulator: the epoch that a member is about to vote for is offered to it before its vote is on
/// the disk, and then it is asked again.
#[test]
fn a_vote_that_is_not_on_the_disk_yet_is_not_said_when_it_is_asked_for_again() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.run(1000);
    c.cut(1, 2);
    c.run(1000);
    assert!(promote(&mut c, 1).is_ok());
    let begun = c.nodes[1].log.last().unwrap().0.clone();
    let Op::EpochStart(start) = &begun.header.op else { panic!("{begun:?}") };
    let (proposal, head) = (start.proposal.clone(), c.nodes[2].head());
    let propose =
        ImageMsg::Propose { proposal, occasion: Occasion::Operator, head, consent: None, role: Replica };
    let certificate = begun.bytes.to_vec();
    let offer = ImageMsg::Offer {
        head: begun.head(),
        start: begun.head(),
        log_start: Seq(1),
        certificate,
        role: Replica,
    };
    c.heal(1, 2);
    for msg in [propose.clone(), offer, propose] {
        c.receive(1, 2, Packet::Msg(Box::new(msg)));
    }
    let said = c.under_way(2, 1);
    let voted = |p: &Packet| matches!(p, Packet::Msg(m) if matches!(**m, ImageMsg::Voted { .. }));
    assert!(!said.is_empty() && !said.iter().any(voted), "{said:?}");
    c.run(1000);
    c.write_and_flush(1);
    assert_eq!(c.nodes[2].head().epoch, begun.header.epoch);
}

/// Seed 619867 of the simulator: an owner that degrades makes a Seal of its own, between the two updates that a
/// block-level sync begins with, and all three had to be stored in another order than they were made in.
#[test]
fn an_operation_and_the_seal_that_vouches_for_it_are_made_at_a_stroke() {
    let degrade = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Degrade };
    let mut c = Cluster::new(23, &[Replica; 2], degrade);
    c.write_and_flush(0);
    c.run(1000);
    c.isolate(1);
    c.run(500);
    // The clock goes on, and nothing has told the machine.
    c.now = c.now.plus(2 * c.timing.lease_ms);
    let (head, degraded) = (c.nodes[0].head(), c.status(0).degraded);
    c.vouch(0);
    assert!(!degraded && c.status(0).degraded);
    assert!(c.nodes[0].head().seq > Seq(head.seq.0 + 2), "a Seal of its own");
}

/// Seed 2010750 of the simulator: a member that followed the owner, without having anything of its epoch yet, was
/// ordered to bid, and what an owner before had sent long ago came meanwhile. It waited for that one for ever.
#[test]
fn a_candidate_that_gives_way_to_an_old_offer_asks_who_owns_the_image() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.isolate(2);
    for _ in 0..2 {
        c.kill(0);
        c.restart(0);
        c.isolate(2);
        c.until("elected again", 10_000, |c| c.owner() == Some(0));
    }
    let offer = offer_of(&c, 0);
    assert!(promote(&mut c, 1).is_ok());
    c.write_and_flush(1);
    c.nodes.iter_mut().for_each(|n| n.log_start = n.head().seq.max(Seq(1)));
    c.heal(1, 2);
    let role = |c: &Cluster| c.nodes[2].machine.as_ref().unwrap().describe_role();
    c.until("it follows", 5000, |c| {
        c.status(2).health == vmfs_proto::Health::CatchingUp && role(c).contains("Some(")
    });
    c.heal(0, 2);
    c.op(2, |token| Input::Promote { force: false, token });
    c.receive(0, 2, offer);
    c.until("it has the owner's blocks", 20_000, |c| c.nodes[2].head() == c.nodes[1].head());
}
