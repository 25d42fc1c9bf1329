//! The chain's promises: an honest chain is accepted whole; every alteration is refused by its name.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

use vmfs_common::chain::{
    Draft, EpochAudit, EpochSecret, OwnerChain, Refusal, Tip, check_extends, check_seal,
};
use vmfs_common::election::{
    CertificateError, EpochStart, Genesis, Mandate, Proposal, Vote, adopted_head, verify_votes,
};
use vmfs_common::header::{FORMAT_LEVEL, Update, UpdateHeader};
use vmfs_common::identity::{HostKey, Signature};
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, ImageId, Seq, StoreId};

const DS: DatastoreId = DatastoreId::from_bytes([1; 16]);
const IMAGE: ImageId = ImageId::from_bytes([2; 16]);

fn key(n: u8) -> HostKey {
    HostKey::from_seed([n; 32])
}

fn members(n: u8) -> MemberList {
    let m = |i: u8| Member {
        host: key(i).public().host_id(),
        store: StoreId::from_bytes([i; 16]),
        key: key(i).public(),
        role: MemberRole::Replica,
    };
    MemberList::new((1..=n).map(m).collect()).unwrap()
}

fn proposal(secret: &EpochSecret, ballot: Epoch, list: &MemberList) -> Proposal {
    Proposal {
        datastore: DS,
        image: IMAGE,
        ballot,
        members: list.digest(),
        pub0: secret.first_public(IMAGE, ballot),
        secret_hash: secret.commitment(),
    }
}

fn genesis() -> (OwnerChain, Update, MemberList) {
    let list = members(3);
    let secret = EpochSecret::from_bytes([7; 32]);
    let ballot = Epoch { number: 1, host: key(1).public().host_id() };
    let mandate = Mandate::Genesis(Genesis {
        members: list.clone(),
        policy: ImagePolicy::default(),
        attrs: Attrs::default(),
        level: FORMAT_LEVEL,
    });
    let start = EpochStart {
        proposal: proposal(&secret, ballot, &list),
        mandate,
        published: None,
        signature: Signature([0; 64]),
    }
    .signed(Seq(1), &Digest::default(), &key(1));
    let (chain, update) = OwnerChain::begin(secret, &Tip::default(), start, 1000);
    (chain, update, list)
}

fn write(chain: &mut OwnerChain, n: u8) -> Update {
    let draft = Draft {
        op: Op::Write { size_after_bytes: Some(4096 * 4) },
        start: BlockIndex(u64::from(n)),
        count: BlockCount(2),
        digests: vec![Digest::from_bytes([n; 32]), Digest::default()],
        flags: 0,
    };
    chain.append(draft, 2000 + u64::from(n), Seq(1), vec![Seq(1), Seq(0), Seq(0)])
}

#[test]
fn an_honest_chain_is_accepted_audited_and_survives_encoding() {
    let (mut chain, first, list) = genesis();
    let Op::EpochStart(args) = &first.header.op else { panic!() };
    assert_eq!(args.verify(Seq(1), &Head::default(), &MemberList::default()), Ok(()));
    let mut state = ImageState::new(IMAGE);
    state.apply(&first);
    assert_eq!(state.members, list);
    let mut audit = EpochAudit::begin(EpochSecret::from_bytes([7; 32]), &first).unwrap();
    for n in 1..20 {
        let u = if n % 5 == 0 { chain.seal(&key(1), 0, Seq(0), vec![]) } else { write(&mut chain, n) };
        let again = Update::decode(&u.bytes).unwrap();
        assert_eq!(again, u);
        assert_eq!(check_extends(&state.tip, IMAGE, &u), Ok(()));
        audit.next(&u).unwrap();
        if n % 5 == 0 {
            assert_eq!(check_seal(&u, &key(1).public()), Ok(()));
            assert_eq!(check_seal(&u, &key(2).public()), Err(Refusal::BadSeal));
        }
        assert!(u.header.time_ns >= state.tip.time_ns, "time is monotone even when the clock is not");
        state.apply(&u);
        assert_eq!(ImageState::decode(&state.encode()).unwrap(), state);
    }
    assert_eq!(state.size_bytes, 16384);
}

#[test]
fn every_altered_field_of_a_header_breaks_the_chain() {
    let (mut chain, first, _) = genesis();
    let tip = Tip::of(&first);
    let u = write(&mut chain, 1);
    let next = write(&mut chain, 2);
    assert_eq!(check_extends(&tip, IMAGE, &u), Ok(()));
    let alter = |f: &dyn Fn(&mut UpdateHeader)| {
        let mut h = u.header.clone();
        f(&mut h);
        Update::from_header(h)
    };
    let refused = |f: &dyn Fn(&mut UpdateHeader)| check_extends(&tip, IMAGE, &alter(f)).unwrap_err();
    assert_eq!(refused(&|h| h.image = ImageId::default()), Refusal::WrongImage);
    assert_eq!(refused(&|h| h.epoch.number = 2), Refusal::WrongEpoch);
    assert_eq!(refused(&|h| h.seq = Seq(3)), Refusal::Gap);
    assert_eq!(refused(&|h| h.seq = Seq(1)), Refusal::Replay);
    assert_eq!(refused(&|h| h.parent = Digest::default()), Refusal::WrongParent);
    assert_eq!(refused(&|h| h.reveal[0] ^= 1), Refusal::WrongReveal);
    // What an altered content field does not break at once, it breaks at the next update: the copy's
    // head is then not what the owner made, and says so by name.
    let contents: &[&dyn Fn(&mut UpdateHeader)] = &[
        &|h| h.flags = 1,
        &|h| h.time_ns += 1,
        &|h| h.start = BlockIndex(77),
        &|h| h.commit = Seq(0),
        &|h| h.acked[2] = Seq(1),
        &|h| h.digests[0] = Digest::from_bytes([9; 32]),
        &|h| h.op = Op::Write { size_after_bytes: None },
        &|h| h.public = Digest::from_bytes([9; 32]),
    ];
    for f in contents {
        let forged = alter(f);
        let err = check_extends(&Tip::of(&forged), IMAGE, &next).unwrap_err();
        assert!(matches!(err, Refusal::WrongParent | Refusal::WrongReveal), "{err:?}");
    }
    let retagged = alter(&|h| h.tag[5] ^= 1);
    assert_eq!(check_extends(&Tip::of(&retagged), IMAGE, &next), Err(Refusal::WrongHeadTag));
}

#[test]
fn every_flipped_bit_and_every_truncation_of_a_header_is_refused() {
    let (mut chain, _, _) = genesis();
    let u = write(&mut chain, 1);
    for i in 0..u.bytes.len() {
        let mut b = u.bytes.to_vec();
        b[i] ^= 1 << (i % 8);
        assert!(Update::decode(&b).is_err(), "bit in byte {i}");
        assert!(Update::decode(&u.bytes[..i]).is_err(), "cut at {i}");
    }
    assert!(Update::decode(&[&u.bytes[..], &[0]].concat()).is_err());
}

fn head(epoch: u64, owner: u8, seq: u64, digest: u8) -> Head {
    let host = key(owner).public().host_id();
    Head { epoch: Epoch { number: epoch, host }, seq: Seq(seq), digest: Digest::from_bytes([digest; 32]) }
}

fn vote(p: &Proposal, voter: u8, head: Head) -> Vote {
    let v = Vote {
        proposal: p.digest(),
        host: key(voter).public().host_id(),
        store: StoreId::from_bytes([voter; 16]),
        head,
        commit: (Epoch::default(), Seq(0)),
        acked: (Epoch::default(), Seq(0)),
        degraded: false,
        members_since: Digest::default(),
        signature: Signature([0; 64]),
    };
    v.signed(&key(voter))
}

#[test]
fn a_certificate_needs_a_quorum_of_honest_votes_for_the_highest_head() {
    let list = members(3);
    let secret = EpochSecret::from_bytes([8; 32]);
    let ballot = Epoch { number: 5, host: key(2).public().host_id() };
    let p = proposal(&secret, ballot, &list);
    let (long_old, short_new) = (head(3, 1, 900, 1), head(4, 1, 5, 2));
    let votes = vec![vote(&p, 2, short_new), vote(&p, 3, long_old)];
    assert_eq!(adopted_head(&votes, &list), Ok(short_new), "never by length");
    assert_eq!(verify_votes(&p, &votes, &short_new, &list), Ok(()));
    assert_eq!(verify_votes(&p, &votes, &long_old, &list), Err(CertificateError::NotHighest));
    assert_eq!(verify_votes(&p, &votes[..1], &short_new, &list), Err(CertificateError::NoQuorum));
    let twice = vec![votes[0].clone(), votes[0].clone()];
    assert_eq!(verify_votes(&p, &twice, &short_new, &list), Err(CertificateError::BadVote));
    let other = proposal(&secret, Epoch { number: 6, ..ballot }, &list);
    let stale = vec![votes[0].clone(), vote(&other, 3, long_old)];
    assert_eq!(verify_votes(&p, &stale, &short_new, &list), Err(CertificateError::BadVote), "replay");
    let mut tampered = votes.clone();
    tampered[1].head = short_new;
    assert_eq!(verify_votes(&p, &tampered, &short_new, &list), Err(CertificateError::BadVote));
    let mut wiped = votes[1].clone();
    wiped.acked = (long_old.epoch, Seq(901));
    let wiped = wiped.signed(&key(3));
    let lost = vec![votes[0].clone(), wiped];
    assert_eq!(verify_votes(&p, &lost, &short_new, &list), Err(CertificateError::BadVote), "amnesia");
    let mut seen = votes[1].clone();
    seen.commit = (short_new.epoch, Seq(6));
    let below = vec![votes[0].clone(), seen.signed(&key(3))];
    assert_eq!(verify_votes(&p, &below, &short_new, &list), Err(CertificateError::BelowCommit));
    let forked = vec![votes[0].clone(), vote(&p, 3, head(4, 1, 5, 99))];
    assert_eq!(verify_votes(&p, &forked, &short_new, &list), Err(CertificateError::Fork));
    let ahead = vec![votes[0].clone(), vote(&p, 3, head(5, 2, 1, 3))];
    let top = head(5, 2, 1, 3);
    assert_eq!(verify_votes(&p, &ahead, &top, &list), Err(CertificateError::OldBallot));
}

#[test]
fn more_than_half_of_the_members_are_a_quorum() {
    for (n, quorum) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4)] {
        assert_eq!(members(n).quorum(), quorum, "of {n}");
    }
}

#[test]
fn no_epoch_begins_on_top_of_one_as_high_not_even_a_forced_one() {
    let list = members(3);
    let secret = EpochSecret::from_bytes([8; 32]);
    let proposal = proposal(&secret, Epoch { number: 5, host: key(2).public().host_id() }, &list);
    let mandate = Mandate::Forced(list.clone());
    let start = EpochStart { proposal, mandate, published: None, signature: Signature([0; 64]) };
    let verified = |parent: &Head| {
        let start = start.clone().signed(Seq(10), &parent.digest, &key(2));
        start.verify(Seq(10), parent, &list)
    };
    assert_eq!(verified(&head(4, 3, 9, 1)), Ok(()));
    assert_eq!(verified(&head(5, 2, 9, 1)), Err(CertificateError::OldBallot));
    assert_eq!(verified(&head(6, 1, 9, 1)), Err(CertificateError::OldBallot));
}
