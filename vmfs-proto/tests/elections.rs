//! Each rule of DESIGN.md section 7 came from a sequence that loses data without it. These are the
//! sequences.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use vmfs_common::chain::Refusal;
use vmfs_common::header::FLAG_DEGRADED;
use vmfs_common::msg::{ImageMsg, Occasion, VoteRefusal};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole::{self, Replica, Witness};
use vmfs_common::policy::{Acks, ImagePolicy, OnQuorumLoss};
use vmfs_common::{Epoch, Seq};
use vmfs_proto::testing::{At, Cluster, Packet};
use vmfs_proto::{Answer, Event, Gate, Health, Input, Loss, OpError, OpOutcome};
use vmfs_proto::{Refused, Role, Shortage, Wait};

const STALL: ImagePolicy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Stall };
const DEGRADE: ImagePolicy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Degrade };

fn cluster(roles: &[MemberRole], policy: ImagePolicy) -> Cluster {
    let mut c = Cluster::new(7, roles, policy);
    c.run(200);
    c
}

fn promote(c: &mut Cluster, at: At) -> Result<OpOutcome, OpError> {
    let token = c.op(at, |token| Input::Promote { force: false, token });
    c.answer(token)
}

fn force(c: &mut Cluster, at: At) -> Result<OpOutcome, OpError> {
    let token = c.op(at, |token| Input::Promote { force: true, token });
    c.answer(token)
}

fn refusals(c: &Cluster, at: At, why: Refusal) -> u64 {
    c.status(at).refusals.get(&why).copied().unwrap_or(0)
}

fn msg(m: ImageMsg) -> Packet {
    Packet::Msg(Box::new(m))
}

#[test]
fn copies_compare_by_epoch_and_seq_never_by_length() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.isolate(0);
    c.writes(0, 40);
    let long_old = c.nodes[0].head();
    assert!(matches!(promote(&mut c, 1), Ok(OpOutcome::Promoted { loss: Loss::Nothing, .. })));
    let short_new = c.write_and_flush(1);
    assert!(long_old.seq > short_new.seq && long_old.epoch < short_new.epoch);
    c.crash(1);
    c.heal(0, 2);
    c.run(1000);
    assert!(promote(&mut c, 0).is_ok());
    assert!(c.holds(0, short_new), "the flushed update of the later, shorter chain survives");
    assert!(!c.holds(0, long_old));
    assert!(c.nodes[0].forks.iter().flatten().any(|u| u.head() == long_old), "the tail is kept as a fork");
}

#[test]
fn a_witness_acknowledges_headers_and_never_stands_for_data() {
    let mut c = cluster(&[Replica, Replica, Witness], STALL);
    c.write_and_flush(0);
    c.isolate(1);
    c.writes(0, 3);
    let token = c.flush(0);
    c.run(1500);
    assert_eq!(c.flushed.get(&token), None, "owner and witness are a majority, and hold the data once");
    c.heal(0, 1);
    assert_eq!(c.flush_answer(token), Ok(()));
    assert_eq!(c.nodes[1].head(), c.nodes[0].head());
}

#[test]
fn an_older_epochs_update_is_not_committed_by_counting_copies() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.writes(0, 5);
    c.run(20);
    let old = c.nodes[2].head();
    c.crash(0);
    c.run(1000);
    let token = c.op(1, |token| Input::Promote { force: false, token });
    c.until("elected", 2000, |c| {
        c.events.iter().any(|(at, e)| *at == 1 && matches!(e, Event::Elected { .. }))
    });
    c.isolate(1);
    c.run(10);
    // The copy of the old epoch's update at host 2 is durable, and says so.
    let store = c.nodes[2].id.store;
    c.receive(2, 1, msg(ImageMsg::Ack { head: old, store }));
    let status = c.status(1);
    assert_eq!(
        (status.role, status.commit),
        (Role::Owner, Seq::ZERO),
        "nothing of this epoch is acknowledged"
    );
    let now = c.now;
    let gate = c.nodes[1].machine.as_ref().unwrap().may_read(now);
    assert_eq!(gate, Gate::Wait(Wait::Election), "nothing is served before the EpochStart is on a quorum");
    assert!(!c.ops.contains_key(&token));
    c.heal(1, 2);
    assert!(c.answer(token).is_ok());
}

#[test]
fn a_promise_and_an_append_cannot_pass_each_other() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.cut(0, 1);
    c.writes(0, 1);
    let late = c.nodes[0].log.last().unwrap().0.clone();
    let before = c.nodes[1].head();
    c.op(2, |token| Input::Promote { force: false, token });
    c.until("asked", 100, |c| c.nodes[1].machine.as_ref().unwrap().describe_role().contains("promised 2"));
    // Its promise is still on its way to the disk when the old owner's update arrives.
    c.receive(0, 1, Packet::Update(Box::new(late)));
    assert_eq!(refusals(&c, 1, Refusal::Promised), 1);
    assert_eq!(c.nodes[1].head(), before, "the head it votes with is the head it has");
    c.until("an owner", 2000, |c| c.owner() == Some(2));
}

#[test]
fn a_restart_is_an_election_and_publishes_the_ended_epochs_secret() {
    let mut c = cluster(&[Replica; 3], STALL);
    let kept = c.write_and_flush(0);
    let first = c.nodes[0].head().epoch;
    c.crash(0);
    c.restart(0);
    assert_eq!(c.nodes[0].machine.as_ref().unwrap().may_write(c.now), Gate::Wait(Wait::Election));
    c.until("serving again", 1000, |c| c.owner() == Some(0));
    let entry = *c.nodes[0].machine.as_ref().unwrap().state().epoch_start().unwrap();
    assert!(entry.epoch > first && entry.epoch.host == first.host);
    assert!(c.holds(0, kept));
    let start = &c.nodes[0].log[usize::try_from(entry.start.seq.0).unwrap() - 1].0;
    let Op::EpochStart(args) = &start.header.op else { panic!("not an EpochStart") };
    assert!(args.published.is_some(), "its own secret is in its store");
    // What the old epoch signed is refused from now on, by everybody.
    let (mut old, _) = c.nodes[0].log[1].clone();
    old.header.seq = c.nodes[1].head().seq.next();
    c.run(100);
    c.receive(0, 1, Packet::Update(Box::new(old)));
    assert_eq!(refusals(&c, 1, Refusal::WrongEpoch), 1);
}

#[test]
fn a_single_host_restarts_without_asking_anybody() {
    let mut c = cluster(&[Replica], STALL);
    let kept = c.write_and_flush(0);
    c.kill(0);
    c.restart(0);
    c.until("serving again", 100, |c| c.owner() == Some(0));
    assert!(c.holds(0, kept));
    c.write_and_flush(0);
}

#[test]
fn a_degraded_acknowledgement_is_known_to_every_quorum() {
    let mut c = cluster(&[Replica, Replica, Witness], DEGRADE);
    c.write_and_flush(0);
    c.isolate(1);
    c.writes(0, 3);
    let kept = c.nodes[0].head();
    let token = c.flush(0);
    assert_eq!(c.flush_answer(token), Ok(()), "one copy of the data, headers on a majority");
    assert!(c.status(0).degraded);
    assert_ne!(c.nodes[2].log.last().unwrap().0.header.flags & FLAG_DEGRADED, 0);
    c.crash(0);
    c.heal(1, 2);
    c.run(1000);
    let answer = promote(&mut c, 1);
    assert!(matches!(answer, Err(OpError::DataMissing { .. })), "{answer:?}");
    c.restart(0);
    c.heal(0, 1);
    c.until("an owner", 10_000, |c| c.owner().is_some());
    let owner = c.owner().unwrap();
    assert!(c.holds(owner, kept));
    c.until("full copies again", 10_000, |c| !c.status(c.owner().unwrap_or(0)).degraded);
    c.until("at the other replica", 5000, |c| c.holds(1, kept));
}

#[test]
fn an_ordered_promotion_does_not_wait_a_lease_for_the_data_member_that_died() {
    for silent in [false, true] {
        let mut c = cluster(&[Replica, Replica, Witness], DEGRADE);
        let before = c.write_and_flush(0);
        // At once: neither end of any connection has noticed.
        if silent {
            c.isolate(0)
        } else {
            c.kill(0)
        }
        let begun = c.now;
        let answer = promote(&mut c, 1);
        assert!(matches!(answer, Ok(OpOutcome::Promoted { loss: Loss::Nothing, .. })), "{answer:?}");
        let after = c.write_and_flush(1);
        let took = c.now.since(begun);
        assert!(took < 400 && took < c.timing.lease_ms, "{took} ms, silent {silent}");
        assert!(c.status(1).degraded && !c.status(1).shortage.is_any());
        assert_ne!(c.nodes[2].log.last().unwrap().0.header.flags & FLAG_DEGRADED, 0, "a quorum knows of it");
        // The old owner may live on the other side: nothing of its is acknowledged.
        if silent {
            c.writes(0, 1);
            let token = c.flush(0);
            c.run(c.timing.lease_ms);
            assert_eq!(c.flushed.get(&token), None);
        }
        c.heal_all();
        c.until("full copies again", 10_000, |c| c.holds(0, after) && !c.status(1).degraded);
        assert!(c.holds(0, before) && c.owner() == Some(1));
    }
}

#[test]
fn a_promotion_without_a_second_copy_says_at_once_that_flushes_wait() {
    let mut c = cluster(&[Replica, Replica, Witness], STALL);
    c.write_and_flush(0);
    c.isolate(0);
    assert!(promote(&mut c, 1).is_ok());
    let status = c.status(1);
    assert_eq!((status.health, status.shortage), (Health::Stalled, Shortage { votes: 0, copies: 1 }));
    c.writes(1, 1);
    let token = c.flush(1);
    c.run(10_000);
    assert_eq!((c.flushed.get(&token), c.status(1).health), (None, Health::Stalled));
    c.heal_all();
    assert_eq!(c.flush_answer(token), Ok(()));
    c.until("nothing is short", 5000, |c| c.status(1).health == Health::Ok && !c.status(1).shortage.is_any());
}

#[test]
fn headers_that_only_a_witness_holds_do_not_block_a_promotion() {
    let mut c = cluster(&[Replica, Replica, Witness], STALL);
    let kept = c.write_and_flush(0);
    c.cut(0, 1);
    c.writes(0, 9);
    c.run(300);
    assert!(c.nodes[2].head().seq > c.nodes[1].head().seq, "the witness is ahead");
    c.crash(0);
    c.run(1000);
    let answer = promote(&mut c, 1);
    assert!(matches!(answer, Ok(OpOutcome::Promoted { loss: Loss::Nothing, .. })), "{answer:?}");
    assert!(c.holds(1, kept));
    c.writes(1, 3);
    let token = c.flush(1);
    c.until("the witness follows", 1000, |c| c.nodes[2].head() == c.nodes[1].head());
    c.run(1000);
    assert_eq!(c.flushed.get(&token), None, "a flush still needs two copies of the data");
    c.restart(0);
    assert_eq!(c.flush_answer(token), Ok(()));
    assert!(c.holds(0, kept));
}

#[test]
fn a_forced_lineage_is_followed_by_nobody_and_both_are_kept() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.isolate(2);
    c.run(1000);
    let token = c.op(2, |token| Input::Promote { force: true, token });
    c.oracle.suspended = true;
    let Ok(OpOutcome::Promoted { forced: true, loss, .. }) = c.answer(token) else {
        panic!("{}", c.describe())
    };
    assert!(matches!(loss, Loss::UnknownAfter { .. }), "the others could acknowledge without it: {loss:?}");
    let here = c.write_and_flush(2);
    let there = c.write_and_flush(0);
    c.heal_all();
    c.run(5000);
    assert!(c.holds(2, here) && c.holds(0, there) && c.holds(1, there), "both lineages are kept");
    assert!(c.status(2).forced && !c.status(0).forced);
    let stranger = c.status(0).members.into_iter().find(|m| m.host == c.nodes[2].id.host).unwrap();
    assert_eq!((stranger.connected, stranger.health), (true, Health::Fenced));
    assert_eq!(c.owner().map(|at| c.status(at).epoch.host), Some(c.nodes[2].id.host), "it serves its own");
    assert!(c.events.iter().any(|(at, e)| *at == 2 && matches!(e, Event::Fork { .. })));
    // It votes for nobody in the other lineage.
    let (r, w) = (c.status(0).epoch, c.status(2).epoch);
    assert!(r < w, "its epoch is higher, and would win if it voted");
    c.crash(0);
    c.restart(0);
    c.until("the quorum's owner", 5000, |c| c.nodes[0].machine.as_ref().unwrap().is_open_owner());
    assert!(c.holds(0, there) && !c.holds(0, here));
    // The operator chooses.
    let token = c.op(2, |token| Input::AbandonForced { token });
    assert_eq!(c.answer(token), Ok(OpOutcome::Done));
    c.until("it follows", 20_000, |c| c.holds(2, there) && c.nodes[2].head() == c.nodes[0].head());
    assert!(c.nodes[2].forks.iter().flatten().any(|u| u.head() == here), "its tail is a fork");
}

#[test]
fn hosts_whose_copies_an_operator_dropped_are_added_to_a_forced_lineage() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.crash(0);
    c.crash(1);
    c.run(1000);
    c.oracle.suspended = true;
    assert!(matches!(force(&mut c, 2), Ok(OpOutcome::Promoted { forced: true, .. })));
    let here = c.write_and_flush(2);
    // An election in the forced lineage on top.
    c.kill(2);
    c.restart(2);
    c.until("it serves its lineage again", 5000, |c| c.owner() == Some(2));
    let add = |c: &mut Cluster, at: At| {
        let member = vmfs_proto::testing::member(&c.nodes[at].id.clone(), Replica);
        let token = c.op(2, |token| Input::AddMember { member, token });
        c.answer(token)
    };
    c.restart(0);
    c.run(2000);
    assert_eq!(add(&mut c, 0), Err(OpError::OtherLineage), "it does not leave its own by itself");
    for at in [0, 1] {
        c.crash(at);
        c.discard(at);
        c.restart(at);
        c.run(2000);
        assert_eq!(add(&mut c, at), Ok(OpOutcome::Done), "{}", c.describe());
    }
    c.until("all have it", 5000, |c| c.holds(0, here) && c.holds(1, here));
    let kept = c.write_and_flush(2);
    c.kill(2);
    assert!(promote(&mut c, 1).is_ok());
    assert!(c.holds(1, here) && c.holds(1, kept));
}

#[test]
fn a_member_that_lost_what_it_acknowledged_does_not_vote() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.cut(0, 2);
    c.cut(1, 2);
    let kept = c.write_and_flush(0);
    c.run(1500);
    c.heal(0, 2);
    c.run(500);
    c.crash(1);
    c.crash(0);
    c.lose_log(1, 1);
    c.restart(1);
    c.heal(1, 2);
    c.run(100);
    // Host 2 knows from the headers what host 1 had acknowledged.
    let Err(OpError::NoQuorum { votes: 1, need: 2, answers }) = promote(&mut c, 2) else {
        panic!("{}", c.describe())
    };
    let lost = c.nodes[1].id.host;
    assert!(answers.contains(&(lost, Answer::Amnesia)), "{answers:?}");
    c.restart(0);
    c.until("the owner is back", 5000, |c| c.owner() == Some(0));
    c.until("it has caught up", 5000, |c| c.holds(1, kept));
}

#[test]
fn an_old_certificate_is_inert() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    assert!(promote(&mut c, 1).is_ok());
    c.write_and_flush(1);
    c.run(500);
    let before = c.nodes[2].head();
    let first = c.nodes[0].log[0].0.clone();
    let offer = |certificate: &[u8], epoch: Epoch| ImageMsg::Offer {
        head: first.head(),
        start: vmfs_common::Head { epoch, ..first.head() },
        log_start: Seq(1),
        certificate: certificate.to_vec(),
        role: Replica,
    };
    c.receive(0, 2, msg(offer(&first.bytes, first.header.epoch)));
    assert_eq!(refusals(&c, 2, Refusal::Promised), 1, "its epoch is over");
    let higher = Epoch { number: 9, ..first.header.epoch };
    c.receive(0, 2, msg(offer(&first.bytes, higher)));
    assert_eq!(refusals(&c, 2, Refusal::BadCertificate), 1, "not a certificate of that epoch");
    c.receive(1, 2, msg(offer(&first.bytes, higher)));
    assert_eq!(refusals(&c, 2, Refusal::NotOwner), 1, "offered by another host");
    // A certified start of a later epoch, with other votes than it was signed with.
    let at = usize::try_from(c.status(1).epoch.number).unwrap();
    assert!(at > 1);
    let start = c.nodes[1].machine.as_ref().unwrap().state().epoch_start().unwrap().start;
    let mut bent = c.nodes[1].log[usize::try_from(start.seq.0).unwrap() - 1].0.header.clone();
    let Op::EpochStart(args) = &mut bent.op else { panic!("not an EpochStart") };
    args.proposal.ballot.number += 5;
    bent.epoch.number += 5;
    let bent = vmfs_common::header::Update::from_header(bent);
    let forged = ImageMsg::Offer {
        head: bent.head(),
        start: bent.head(),
        log_start: Seq(1),
        certificate: bent.bytes.to_vec(),
        role: Replica,
    };
    c.receive(1, 2, msg(forged));
    assert_eq!(refusals(&c, 2, Refusal::BadCertificate), 2);
    c.run(500);
    assert_eq!(c.nodes[2].head(), before);
    c.write_and_flush(1);
    assert_eq!(c.nodes[2].head().epoch, c.nodes[1].head().epoch);
}

#[test]
fn handles_of_a_cut_lineage_are_told_and_others_are_not_disturbed() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    let lineage = |c: &Cluster, at: At| c.status(at).lineage;
    for (from, to) in [(0, 1), (1, 0), (0, 1), (1, 0)] {
        let host = c.nodes[to].id.host;
        let token = c.op(from, |token| Input::Handover { to: host, token });
        assert!(c.answer(token).is_ok());
        c.until("taken over", 100, |c| c.owner() == Some(to));
    }
    assert_eq!((lineage(&c, 0), lineage(&c, 1)), (0, 0), "nothing was cut");
    c.isolate(0);
    c.writes(0, 2);
    assert!(promote(&mut c, 1).is_ok());
    c.heal_all();
    c.until("it follows", 5000, |c| c.nodes[0].head() == c.nodes[1].head());
    assert_eq!((lineage(&c, 0), lineage(&c, 1)), (1, 0), "what the old owner had shown is gone");
    let now = c.now;
    assert_eq!(c.nodes[0].machine.as_ref().unwrap().may_write(now), Gate::Refused(Refused::NotOwner));
    assert!(promote(&mut c, 0).is_ok());
    assert_eq!(lineage(&c, 0), 1, "and stays gone when ownership returns");
}

#[test]
fn what_recovery_reports_from_the_page_cache_is_durable() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.writes(0, 4);
    c.run(20);
    let tail = c.nodes[1].head();
    assert!(c.nodes[1].synced < c.nodes[1].log.len(), "the tail is in the page cache and nowhere else");
    c.kill(1);
    c.restart(1);
    c.crash(0);
    c.run(1000);
    assert!(promote(&mut c, 1).is_ok());
    assert!(c.holds(1, tail), "it votes with the tail");
    c.crash(1);
    assert!(c.holds(1, tail), "so the tail survives a power cut right after");
}

#[test]
fn promotion_without_a_quorum_refuses_soon_and_says_what_everybody_said() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    c.crash(0);
    c.crash(1);
    c.run(1000);
    let begun = c.now;
    let Err(OpError::NoQuorum { votes, need, answers }) = promote(&mut c, 2) else {
        panic!("{}", c.describe())
    };
    assert_eq!((votes, need), (1, 2));
    assert_eq!(answers.iter().filter(|(_, a)| *a == Answer::Unreachable).count(), 2);
    assert!(c.now.since(begun) <= c.timing.promote_timeout_ms);
    c.oracle.suspended = true;
    let Ok(OpOutcome::Promoted { loss, forced: true, .. }) = force(&mut c, 2) else {
        panic!("{}", c.describe())
    };
    assert!(matches!(loss, Loss::UnknownAfter { .. }));
}

#[test]
fn voters_in_contact_with_the_owner_move_only_for_the_operator() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    let id = c.nodes[2].id.clone();
    let proposal = vmfs_common::election::Proposal {
        datastore: id.datastore,
        image: c.image,
        ballot: Epoch { number: 5, host: id.host },
        members: c.nodes[2].machine.as_ref().unwrap().state().members.digest(),
        pub0: Default::default(),
        secret_hash: Default::default(),
    };
    let head = c.nodes[2].head();
    for occasion in [Occasion::Restart, Occasion::Handover] {
        let ask =
            ImageMsg::Propose { proposal: proposal.clone(), occasion, head, consent: None, role: Replica };
        c.receive(2, 1, msg(ask));
    }
    c.run(100);
    assert!(c.nodes[1].machine.as_ref().unwrap().describe_role().contains("promised 0"), "{}", c.describe());
    let begun = c.now;
    assert!(promote(&mut c, 2).is_ok());
    assert!(c.now.since(begun) < 1000, "an image in sync is promoted within a second");
    let _: Option<VoteRefusal> = None;
}

#[test]
fn a_failed_candidate_does_not_kill_a_healthy_owner() {
    let mut c = cluster(&[Replica; 3], STALL);
    c.write_and_flush(0);
    // It reaches only one member, which votes; then it is cut off before it has made use of it.
    c.op(2, |token| Input::Promote { force: false, token });
    c.until("promised", 200, |c| c.nodes[1].machine.as_ref().unwrap().describe_role().contains("promised 2"));
    c.isolate(2);
    c.until("the owner is back", 10_000, |c| c.owner() == Some(0));
    let kept = c.write_and_flush(0);
    c.heal_all();
    c.until("all follow", 20_000, |c| c.holds(2, kept) && c.nodes[2].head() == c.nodes[0].head());
    assert_eq!(c.status(2).health, Health::Ok);
}
