//! Every decoder of untrusted bytes: no panic, and what is accepted is the one canonical form. Random
//! bytes, and valid bytes with random damage. A failing case is printed by proptest with its seed.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

use proptest::prelude::*;
use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Tip};
use vmfs_common::config::Config;
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal, Vote};
use vmfs_common::header::{FORMAT_LEVEL, HEADER_MAX_BYTES, Update, UpdateHeader};
use vmfs_common::identity::{HostKey, Signature};
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, ImageId, Seq, StoreId};

fn key(n: u8) -> HostKey {
    HostKey::from_seed([n; 32])
}

fn members() -> MemberList {
    let m = |i: u8| Member {
        host: key(i).public().host_id(),
        store: StoreId::from_bytes([i; 16]),
        key: key(i).public(),
        role: if i == 3 { MemberRole::Witness } else { MemberRole::Replica },
    };
    MemberList::new((1..=3).map(m).collect()).unwrap()
}

fn start(mandate: Mandate, seq: Seq) -> (EpochSecret, EpochStart) {
    let secret = EpochSecret::from_bytes([7; 32]);
    let image = ImageId::from_bytes([2; 16]);
    let ballot = Epoch { number: seq.0, host: key(1).public().host_id() };
    let proposal = Proposal {
        datastore: DatastoreId::from_bytes([1; 16]),
        image,
        ballot,
        members: members().digest(),
        pub0: secret.first_public(image, ballot),
        secret_hash: secret.commitment(),
    };
    let start = EpochStart { proposal, mandate, published: Some([9; 32]), signature: Signature([0; 64]) };
    (secret, start.signed(seq, &Digest::default(), &key(1)))
}

/// One update of every kind, and the state they make.
fn samples() -> (Vec<Update>, ImageState) {
    let genesis = Genesis {
        members: members(),
        policy: ImagePolicy::default(),
        attrs: Attrs::default(),
        level: FORMAT_LEVEL,
    };
    let (secret, first) = start(Mandate::Genesis(genesis), Seq(1));
    let (mut chain, update) = OwnerChain::begin(secret, &Tip::default(), first, 5);
    let mut all = vec![update];
    let vote = Vote {
        proposal: Digest::from_bytes([4; 32]),
        host: key(2).public().host_id(),
        store: StoreId::from_bytes([2; 16]),
        head: Head::default(),
        commit: (Epoch::default(), Seq(0)),
        acked: (Epoch::default(), Seq(0)),
        degraded: false,
        members_since: Digest::default(),
        signature: Signature([0; 64]),
    }
    .signed(&key(2));
    let ops = [
        Op::Resize { size_bytes: 77 },
        Op::Name { path: "vm/disk.img".into() },
        Op::Unlink,
        Op::Attr(Attrs { mode: 0o644, ..Attrs::default() }),
        Op::Xattr { name: "user.a".into(), value: Some(vec![1, 2, 3]) },
        Op::Members(members()),
        Op::Policy(ImagePolicy::default()),
        Op::Root { at: Seq(1), merkle: Digest::from_bytes([3; 32]), state: Digest::default() },
        Op::Snapshot { name: "s".into() },
        Op::Rewind { to: Seq(1), digest: Digest::default() },
    ];
    for op in ops {
        all.push(chain.append(Draft::op(op), 6, Seq(1), vec![Seq(1); 3]));
    }
    all.push(chain.seal(&key(1), 7, Seq(2), vec![]));
    let write = Draft {
        op: Op::Write { size_after_bytes: Some(8192) },
        start: BlockIndex(3),
        count: BlockCount(2),
        digests: vec![Digest::from_bytes([5; 32]), Digest::default()],
        flags: 1,
    };
    all.push(chain.append(write, 8, Seq(3), vec![]));
    let (secret, voted) = start(Mandate::Votes(vec![vote]), Seq(2));
    all.push(OwnerChain::begin(secret, chain.tip(), voted, 9).1);
    let mut state = ImageState::new(ImageId::from_bytes([2; 16]));
    all.iter().for_each(|u| state.apply(u));
    (all, state)
}

fn messages() -> Vec<Vec<u8>> {
    let sync = ImageMsg::Sync { seq: Seq(7), commit: Seq(5) };
    let ack = ImageMsg::Ack { head: Head::default(), store: StoreId::default() };
    let share = ImageMsg::Share {
        epoch: Epoch::default(),
        share: vmfs_common::chain::Share::from_bytes(vec![1; 40]),
    };
    [sync, ack, share].iter().map(msg::encode).collect()
}

/// Damage: bytes overwritten, cut off, inserted.
fn damaged(valid: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 0..6);
    (proptest::sample::select(valid), edits).prop_map(|(mut b, edits)| {
        for (at, byte, how) in edits {
            if b.is_empty() {
                break;
            }
            let i = at.index(b.len());
            match how {
                0 => b.truncate(i),
                1 => b.insert(i, byte),
                _ => b[i] = byte,
            }
        }
        b
    })
}

/// Damage that keeps the header's checksum right, so that what is behind it is reached.
fn resummed(mut b: Vec<u8>) -> Vec<u8> {
    if b.len() >= 248 {
        b[240..244].fill(0);
        let crc = crc32c::crc32c(&b);
        b[240..244].copy_from_slice(&crc.to_le_bytes());
    }
    b
}

fn check_update(bytes: &[u8]) {
    let _ = UpdateHeader::stated_len(bytes);
    if let Ok(update) = Update::decode(bytes) {
        assert!(bytes.len() <= HEADER_MAX_BYTES);
        assert_eq!(update.header.encode(), bytes, "accepted bytes are canonical");
        let mut state = ImageState::new(update.header.image);
        state.apply(&update);
        let _ = state.check_apply(&update);
    }
}

fn check_state(bytes: &[u8]) {
    if let Ok(state) = ImageState::decode(bytes) {
        assert_eq!(state.encode(), bytes, "accepted bytes are canonical");
    }
}

fn check_message(bytes: &[u8]) {
    if let Ok(m) = msg::decode::<ImageMsg>(bytes) {
        assert_eq!(msg::encode(&m), bytes, "accepted bytes are canonical");
    }
}

#[test]
fn samples_are_accepted() {
    let (updates, state) = samples();
    assert!(updates.iter().all(|u| Update::decode(&u.bytes).as_ref() == Ok(u)));
    assert_eq!(ImageState::decode(&state.encode()), Ok(state));
    assert!(messages().iter().all(|m| msg::decode::<ImageMsg>(m).is_ok()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn random_bytes_are_refused_or_canonical(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        check_update(&bytes);
        check_update(&resummed(bytes.clone()));
        check_state(&bytes);
        check_message(&bytes);
        let _ = std::str::from_utf8(&bytes).map(Config::parse);
    }

    #[test]
    fn damaged_updates_are_refused_or_canonical(
        bytes in damaged(samples().0.iter().map(|u| u.bytes.to_vec()).collect()),
    ) {
        check_update(&bytes);
        check_update(&resummed(bytes));
    }

    #[test]
    fn damaged_states_are_refused_or_canonical(bytes in damaged(vec![samples().1.encode()])) {
        check_state(&bytes);
    }

    #[test]
    fn damaged_messages_are_refused_or_canonical(bytes in damaged(messages())) {
        check_message(&bytes);
    }
}
