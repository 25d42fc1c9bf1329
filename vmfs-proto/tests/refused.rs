//! What a copy is sent that it must not take, or not believe: altered, forged, claimed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{cluster, fetching, promote};
use vmfs_common::chain::Refusal;
use vmfs_common::election::{Proposal, Vote};
use vmfs_common::header::Update;
use vmfs_common::identity::Signature;
use vmfs_common::msg::{ImageMsg, Join, Occasion};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole::Replica;
use vmfs_common::{Digest, Epoch, Head, Seq};
use vmfs_proto::Input;
use vmfs_proto::testing::{At, Cluster, Packet};

fn refused(c: &Cluster, at: At, why: Refusal) -> u64 {
    c.status(at).refusals.get(&why).copied().unwrap_or(0)
}

/// The owner's next update, altered; the copy must refuse it by its name and stay as it is.
fn refuses(alter: impl FnOnce(&mut vmfs_common::header::UpdateHeader), from: At, why: Refusal) {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.run(500);
    c.cut(0, 1);
    c.writes(0, 1);
    let mut header = c.nodes[0].log.last().unwrap().0.header.clone();
    alter(&mut header);
    let before = c.nodes[1].head();
    c.receive(from, 1, Packet::Update(Box::new(Update::from_header(header))));
    assert_eq!((refused(&c, 1, why), c.nodes[1].head()), (1, before), "{:?}", c.status(1).refusals);
    c.heal(0, 1);
    c.until("it goes on", 2000, |c| c.nodes[1].head() == c.nodes[0].head());
}

#[test]
fn every_bad_update_is_refused_by_its_name_and_changes_nothing() {
    refuses(|h| h.image = vmfs_common::ImageId::from_bytes([9; 16]), 0, Refusal::WrongImage);
    refuses(|h| h.epoch.number += 1, 0, Refusal::WrongEpoch);
    refuses(|h| h.seq = h.seq.next(), 0, Refusal::Gap);
    refuses(|h| h.seq = h.seq.prev(), 0, Refusal::Replay);
    refuses(|h| h.parent = Digest::from_bytes([9; 32]), 0, Refusal::WrongParent);
    refuses(|h| h.reveal[3] ^= 1, 0, Refusal::WrongReveal);
    refuses(|_| {}, 2, Refusal::NotOwner);
}

#[test]
fn a_head_that_fails_its_confirmation_is_replaced_from_the_owner() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.run(500);
    c.cut(0, 1);
    c.writes(0, 1);
    let mut forged = c.nodes[0].log.last().unwrap().0.header.clone();
    forged.tag[0] ^= 1;
    forged.digests[0] = Digest::from_bytes([0xee; 32]);
    let forged = Update::from_header(forged);
    c.receive(0, 1, Packet::Update(Box::new(forged.clone())));
    assert_eq!(c.nodes[1].head(), forged.head(), "nothing about it is wrong until the next update comes");
    c.heal(0, 1);
    c.writes(0, 1);
    c.until("the owner's own", 5000, |c| c.nodes[1].head() == c.nodes[0].head());
    assert!(c.nodes[1].forks.iter().flatten().any(|u| u.head() == forged.head()), "kept as evidence");
}

#[test]
fn a_wrong_tag_is_found_by_the_next_update() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.run(500);
    c.cut(0, 1);
    c.writes(0, 2);
    let log = &c.nodes[0].log;
    let (first, second) = (log[log.len() - 2].0.clone(), log[log.len() - 1].0.clone());
    let mut bent = first.header.clone();
    bent.tag[5] ^= 1;
    let bent = Update::from_header(bent);
    assert_eq!(bent.digest, first.digest, "the tag is not part of the digest");
    c.receive(0, 1, Packet::Update(Box::new(bent)));
    c.receive(0, 1, Packet::Update(Box::new(second)));
    assert_eq!(refused(&c, 1, Refusal::WrongHeadTag), 1);
    assert_eq!(c.nodes[1].head().seq, first.header.seq.prev(), "dropped");
    c.heal(0, 1);
    c.until("replaced", 2000, |c| c.nodes[1].head() == c.nodes[0].head());
}

#[test]
fn a_voters_suffix_that_does_not_reach_its_voted_head_is_refused() {
    let mut c = fetching();
    let before = c.nodes[1].head();
    // Host 2 sends headers that chain, but are not those it voted for.
    let upto = c.nodes[2].head();
    let mut forged = c.nodes[2].log[usize::try_from(before.seq.0).unwrap()].0.header.clone();
    let mut headers = Vec::new();
    let mut parent = before.digest;
    for seq in before.seq.0 + 1..=upto.seq.0 {
        (forged.seq, forged.parent) = (Seq(seq), parent);
        let update = Update::from_header(forged.clone());
        parent = update.digest;
        headers.push(update.bytes.to_vec());
    }
    c.receive(2, 1, Packet::Msg(Box::new(ImageMsg::Headers { parent: before, headers, upto })));
    assert_eq!((refused(&c, 1, Refusal::Unvouched), c.nodes[1].head()), (1, before), "nothing cut or taken");
    let _: Head = upto;
}

/// Seed 237 of the simulator: what a later owner sends of an ended epoch is not vouched for before its next
/// Seal, and so are its claims of commit points: the copy may have to be cut back below them.
#[test]
fn commit_points_claimed_by_updates_that_nobody_vouches_for_do_not_count_yet() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.isolate(2);
    c.run(1000);
    let start = c.nodes[2].head();
    for _ in 0..5 {
        c.write_and_flush(0);
    }
    assert!(promote(&mut c, 1).is_ok());
    // Host 2 hears of the new owner, and gets the ended epoch's updates one by one.
    let log: Vec<Update> = c.nodes[1].log.iter().map(|(u, _)| u.clone()).collect();
    let begun = log.iter().rfind(|u| matches!(u.header.op, Op::EpochStart(_))).unwrap();
    let (head, certificate) = (c.nodes[1].head(), begun.bytes.to_vec());
    let offer = ImageMsg::Offer { head, start: begun.head(), log_start: Seq(1), certificate, role: Replica };
    c.receive(1, 2, Packet::Msg(Box::new(offer)));
    let commit = |c: &Cluster| c.nodes[2].machine.as_ref().unwrap().committed_seq();
    let (mut claimed, mut vouched) = (0, start.seq);
    for update in log.iter().filter(|u| u.header.seq > start.seq && u.header.epoch == start.epoch) {
        c.receive(1, 2, Packet::Update(Box::new(update.clone())));
        assert_eq!(c.nodes[2].head(), update.head());
        if matches!(update.header.op, Op::Seal(_)) {
            vouched = update.header.seq;
        } else {
            assert!(commit(&c) <= vouched, "{} is only claimed", commit(&c));
            claimed += usize::from(update.header.commit > vouched);
        }
    }
    assert!(claimed > 0, "nothing was claimed before a Seal");
    c.receive(1, 2, Packet::Update(Box::new(begun.clone())));
    c.heal(1, 2);
    c.write_and_flush(1);
    c.run(2000);
    assert!(commit(&c) > begun.header.seq, "vouched for by now");
}

/// Seeds 65, 83 and 114 of the simulator with lying hosts: one proposal with the highest ballot there is, and
/// nobody could be elected any more.
#[test]
fn an_absurd_ballot_does_not_use_up_the_numbers() {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    let (state, id) = (c.nodes[1].machine.as_ref().unwrap().state().clone(), c.nodes[2].id.clone());
    let ballot = Epoch { number: u64::MAX, host: id.host };
    let (pub0, secret_hash) = (Digest::default(), Digest::default());
    let members = state.members.digest();
    let proposal =
        Proposal { datastore: id.datastore, image: state.image, ballot, members, pub0, secret_hash };
    let head = c.nodes[2].head();
    let ask =
        ImageMsg::Propose { proposal, occasion: Occasion::Operator, head, consent: None, role: Replica };
    c.receive(2, 0, Packet::Msg(Box::new(ask.clone())));
    c.receive(2, 1, Packet::Msg(Box::new(ask)));
    let join = Join { store: id.store, head, durable: head, marks: Vec::new(), witness: false };
    let lie = ImageMsg::Refused { why: Refusal::Promised, seq: Seq(1), promised: ballot, join };
    c.receive(2, 0, Packet::Msg(Box::new(lie)));
    c.run(2000);
    c.write_and_flush(0);
    assert!(promote(&mut c, 1).is_ok(), "{}", c.describe());
    assert!(c.status(1).epoch.number < 100);
    c.write_and_flush(1);
}

/// Seed 518779, too: a vote with a head that its voter does not have kept a candidate waiting for ever.
#[test]
fn a_vote_whose_head_its_voter_cannot_show_does_not_stop_an_election() {
    // The other voters suffice; or the liar is needed, and votes honestly when it is asked again.
    for members in [5, 3] {
        let mut c = cluster(&vec![Replica; members]);
        let flushed = c.write_and_flush(0);
        c.run(2000);
        c.crash(0);
        c.run(1000);
        let token = c.op(1, |token| Input::Promote { force: false, token });
        let proposed = |c: &Cluster| {
            c.under_way(1, 2).into_iter().find_map(|p| match p {
                Packet::Msg(m) => match *m {
                    ImageMsg::Propose { proposal, .. } => Some(proposal.digest()),
                    _ => None,
                },
                Packet::Update(_) => None,
            })
        };
        c.until("proposes", 1000, |c| proposed(c).is_some());
        let (id, state) = (c.nodes[2].id.clone(), c.nodes[2].machine.as_ref().unwrap().state().clone());
        let vote = Vote {
            proposal: proposed(&c).unwrap(),
            host: id.host,
            store: id.store,
            head: Head {
                seq: Seq(state.head().seq.0 + 3),
                digest: Digest::from_bytes([9; 32]),
                ..state.head()
            },
            commit: Default::default(),
            acked: Default::default(),
            degraded: false,
            members_since: state.members_since,
            signature: Signature([0; 64]),
        };
        let vote = vote.signed(&id.key);
        c.receive(2, 1, Packet::Msg(Box::new(ImageMsg::Voted { vote, share: None })));
        // The proposal itself does not arrive.
        c.cut(1, 2);
        c.heal(1, 2);
        assert!(c.answer(token).is_ok(), "{}", c.describe());
        assert!(c.holds(1, flushed));
        c.write_and_flush(1);
    }
}
