//! What seeded bugs (integration/mutations) showed no other test to look at: rules whose absence takes a lying
//! member, or a power cut at one moment, to be seen.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use vmfs_common::chain::{EpochSecret, OwnerChain, Refusal};
use vmfs_common::election::{EpochStart, Mandate, Proposal, Vote};
use vmfs_common::header::Update;
use vmfs_common::identity::Signature;
use vmfs_common::msg::ImageMsg;
use vmfs_common::policy::MemberRole::{self, Replica};
use vmfs_common::policy::{Acks, ImagePolicy, MemberList, OnQuorumLoss};
use vmfs_common::{Digest, Epoch, Head, Seq, StoreId};
use vmfs_proto::Input;
use vmfs_proto::testing::{At, Cluster, Packet, identity, member};

const STALL: ImagePolicy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Stall };

fn cluster(seed: u64, roles: &[MemberRole], policy: ImagePolicy) -> Cluster {
    let mut c = Cluster::new(seed, roles, policy);
    c.run(200);
    c
}

fn say(c: &mut Cluster, from: At, to: At, msg: ImageMsg) {
    c.receive(from, to, Packet::Msg(Box::new(msg)));
}

/// The `EpochStart` of a candidate, on `parent`, with the votes of these hosts for these heads.
fn elected(
    c: &Cluster,
    by: At,
    number: u64,
    list: &MemberList,
    parent: Head,
    votes: &[(At, Head)],
) -> Update {
    let (id, secret) = (identity(by), EpochSecret::from_bytes([9; 32]));
    let ballot = Epoch { number, host: id.host };
    let proposal = Proposal {
        datastore: id.datastore,
        image: c.image,
        ballot,
        members: list.digest(),
        pub0: secret.first_public(c.image, ballot),
        secret_hash: secret.commitment(),
    };
    let vote = |(at, head): &(At, Head)| {
        let voter = identity(*at);
        let vote = Vote {
            proposal: proposal.digest(),
            host: voter.host,
            store: voter.store,
            head: *head,
            commit: (Epoch::default(), Seq::ZERO),
            acked: (Epoch::default(), Seq::ZERO),
            degraded: false,
            members_since: Digest::default(),
            signature: Signature([0; 64]),
        };
        vote.signed(&voter.key)
    };
    let mandate = Mandate::Votes(votes.iter().map(vote).collect());
    let start =
        EpochStart { proposal: proposal.clone(), mandate, published: None, signature: Signature([0; 64]) };
    let start = start.signed(parent.seq.next(), &parent.digest, &id.key);
    let tip = vmfs_common::chain::Tip { head: parent, ..vmfs_common::chain::Tip::default() };
    OwnerChain::begin(secret, &tip, start, 1).1
}

fn offer(start: &Update) -> ImageMsg {
    let (head, certificate) = (start.head(), start.bytes.to_vec());
    ImageMsg::Offer { head, start: head, log_start: Seq(1), certificate, role: Replica }
}

#[test]
fn an_acknowledgement_counts_only_if_epoch_digest_and_store_are_right() {
    let other = |n: u8| StoreId::from_bytes([n; 16]);
    type Alter = fn(&mut Head);
    let wrong: [(&str, Alter, StoreId); 3] = [
        ("store", |_| {}, other(0x77)),
        ("digest", |h| h.digest = Digest::from_bytes([7; 32]), identity(2).store),
        ("epoch", |h| h.epoch.number += 1, identity(2).store),
    ];
    for (what, alter, store) in wrong {
        let mut c = cluster(5, &[Replica; 3], STALL);
        c.write_and_flush(0);
        // Nothing gets through any more, which nobody has noticed yet.
        c.isolate(0);
        c.writes(0, 1);
        let token = c.flush(0);
        c.run(50);
        let head = c.nodes[0].head();
        let mut named = head;
        alter(&mut named);
        say(&mut c, 2, 0, ImageMsg::Ack { head: named, store });
        c.run(1);
        assert_eq!(c.flushed.get(&token), None, "wrong {what}");
        if what != "digest" {
            say(&mut c, 2, 0, ImageMsg::Ack { head, store: identity(2).store });
            assert_eq!(c.flushed.get(&token), Some(&Ok(())), "the right one counts");
        }
    }
}

#[test]
fn an_owner_that_acknowledges_alone_waits_for_its_epoch_to_begin_all_the_same() {
    let policy = ImagePolicy { acks: Acks::Local, ..STALL };
    let mut c = cluster(5, &[Replica; 3], policy);
    c.oracle.suspended = true;
    c.write_and_flush(0);
    c.run(500);
    c.kill(0);
    c.restart(0);
    let epoch = |c: &Cluster| c.nodes[0].head().epoch.number;
    c.until("its EpochStart is made", 5_000, |c| epoch(c) == 2);
    c.isolate(0);
    assert_eq!(c.owner(), None);
    let token = c.flush(0);
    c.run(200);
    assert_eq!(c.flushed.get(&token), None, "the EpochStart is on no quorum");
}

#[test]
fn an_offer_whose_votes_count_by_a_made_up_list_deposes_nobody_and_cuts_nothing() {
    let mut c = cluster(5, &[Replica; 3], STALL);
    c.write_and_flush(0);
    c.run(500);
    // Host 2 lies: by a list of its own, it was elected on the genesis alone.
    let first = c.nodes[2].log[0].0.head();
    let own = MemberList::new(vec![member(&identity(2), Replica)]).unwrap();
    let start = elected(&c, 2, 9, &own, first, &[(2, first)]);
    let before = (c.nodes[0].head(), c.nodes[1].head());
    say(&mut c, 2, 0, offer(&start));
    say(&mut c, 2, 1, offer(&start));
    assert_eq!(c.owner(), Some(0), "{}", c.describe());
    c.receive(2, 1, Packet::Update(Box::new(start)));
    c.run(1000);
    assert_eq!((c.nodes[0].head(), c.nodes[1].head()), before);
    c.write_and_flush(0);
}

#[test]
fn even_a_certified_epoch_does_not_cut_below_a_known_commit_point() {
    let mut c = cluster(5, &[Replica; 3], STALL);
    c.write_and_flush(0);
    c.run(1500);
    // Two of three lie about what they hold: more than the fault model allows, and still nothing goes.
    let first = c.nodes[1].log[0].0.head();
    let list = c.nodes[1].machine.as_ref().unwrap().state().members.clone();
    let start = elected(&c, 2, 9, &list, first, &[(0, first), (2, first)]);
    let before = c.nodes[1].head();
    say(&mut c, 2, 1, offer(&start));
    c.receive(2, 1, Packet::Update(Box::new(start)));
    assert_eq!(c.nodes[1].head(), before, "{}", c.describe());
    assert_eq!(c.status(1).refusals.get(&Refusal::Fork), Some(&1));
}

#[test]
fn the_old_members_are_remembered_before_a_removal_is_in_the_log() {
    // A power cut right after the append: whatever of the meta record was on its way may be lost.
    for seed in 0..12 {
        let mut c = cluster(seed, &[Replica; 2], STALL);
        c.write_and_flush(0);
        c.cut(0, 1);
        let host = c.nodes[1].id.host;
        c.op(0, |token| Input::RemoveMember { host, token });
        let members = |c: &Cluster| c.nodes[0].machine.as_ref().map_or(0, |m| m.state().members.len());
        c.until("the removal is appended", 1000, |c| members(c) == 1);
        c.kill(0);
        c.crash(1);
        c.restart(0);
        assert_eq!(members(&c), 1, "the log has it");
        c.run(5000);
        assert_eq!(c.owner(), None, "seed {seed}: it would be its own quorum");
    }
}

#[test]
fn what_a_later_owner_sends_of_an_ended_epoch_gets_no_vote_before_it_is_vouched_for() {
    let mut c = cluster(5, &[Replica; 3], STALL);
    c.write_and_flush(0);
    c.run(1500);
    let before = c.nodes[1].head();
    c.cut(0, 1);
    c.writes(0, 1);
    c.run(20);
    let late = c.nodes[2].log.last().unwrap().0.clone();
    c.isolate(0);
    c.op(2, |token| Input::Promote { force: false, token });
    c.until("elected", 5000, |c| c.nodes[2].head().epoch.number == 2);
    c.cut(1, 2);
    let start = c.nodes[2].log.last().unwrap().0.clone();
    say(&mut c, 2, 1, offer(&start));
    c.receive(2, 1, Packet::Update(Box::new(late.clone())));
    assert_eq!(c.nodes[1].head(), late.head(), "{}", c.describe());
    // Anybody could have made it by now. A promise cuts it off.
    c.op(1, |token| Input::Promote { force: false, token });
    assert_eq!(c.nodes[1].head(), before);
}

#[test]
fn a_ballot_below_the_promised_one_gets_no_vote_even_with_the_same_number() {
    let mut c = cluster(5, &[Replica; 3], STALL);
    c.write_and_flush(0);
    c.run(500);
    assert!(identity(1).host < identity(2).host, "so that its ballots are the lower ones");
    // Host 2 asks host 0 for epoch 2, and is gone.
    let list = c.nodes[0].machine.as_ref().unwrap().state().members.clone();
    let start = elected(&c, 2, 2, &list, c.nodes[2].head(), &[]);
    let vmfs_common::op::Op::EpochStart(start) = start.header.op else { panic!("an EpochStart") };
    let (proposal, head) = (start.proposal, c.nodes[2].head());
    let occasion = vmfs_common::msg::Occasion::Operator;
    say(&mut c, 2, 0, ImageMsg::Propose { proposal, occasion, head, consent: None, role: Replica });
    c.crash(2);
    let token = c.op(1, |token| Input::Promote { force: false, token });
    let answer = c.answer(token);
    c.run(3000);
    let mut updates = c.nodes.iter().flat_map(|n| &n.log);
    assert!(updates.all(|(u, _)| u.header.epoch.number != 2), "{answer:?}\n{}", c.describe());
}
