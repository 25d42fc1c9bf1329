//! Golden bytes of what is stored and sent: every byte of a short chain (`EpochStart`, write, name,
//! Seal), the digest of the state after it, and a vote's signature. Digests, tags and signatures were
//! recomputed from `docs/protocol.md` with another implementation (Python's hashlib, hmac and
//! cryptography). A change here is a change of the format: raise `FORMAT_LEVEL`, and keep reading the
//! old one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Tip};
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal, Vote};
use vmfs_common::hash::block_digest;
use vmfs_common::header::{FLAG_FLUSH, FORMAT_LEVEL, Update};
use vmfs_common::identity::{HostKey, Signature};
use vmfs_common::ids::hex_encode;
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, ImageId, Seq, StoreId};

const SECRET: [u8; 32] = [7; 32];
const IMAGE: ImageId = ImageId::from_bytes([2; 16]);

fn key() -> HostKey {
    HostKey::from_seed([1; 32])
}

fn chain() -> (OwnerChain, Vec<Update>) {
    let secret = EpochSecret::from_bytes(SECRET);
    let ballot = Epoch { number: 1, host: key().host_id() };
    let me = Member {
        host: key().host_id(),
        store: StoreId::from_bytes([3; 16]),
        key: key().public(),
        role: MemberRole::Replica,
    };
    let members = MemberList::new(vec![me]).unwrap();
    let proposal = Proposal {
        datastore: DatastoreId::from_bytes([1; 16]),
        image: IMAGE,
        ballot,
        members: members.digest(),
        pub0: secret.first_public(IMAGE, ballot),
        secret_hash: secret.commitment(),
    };
    let attrs = Attrs { mode: 0o600, uid: 1000, gid: 100, atime_ns: 5, mtime_ns: 6 };
    let genesis = Genesis { members, policy: ImagePolicy::default(), attrs, level: FORMAT_LEVEL };
    let start = EpochStart {
        proposal,
        mandate: Mandate::Genesis(genesis),
        published: None,
        signature: Signature([0; 64]),
    };
    let start = start.signed(Seq(1), &Digest::default(), &key());
    let (mut chain, first) = OwnerChain::begin(secret, &Tip::default(), start, 1_000);
    let write = Draft {
        op: Op::Write { size_after_bytes: Some(8192) },
        start: BlockIndex(0),
        count: BlockCount(2),
        digests: vec![block_digest(&[0xab; 4096]), Digest::default()],
        flags: FLAG_FLUSH,
    };
    let second = chain.append(write, 2_000, Seq(1), vec![Seq(1)]);
    let third =
        chain.append(Draft::op(Op::Name { path: "vm/a.img".to_owned() }), 1_500, Seq(2), vec![Seq(2)]);
    let fourth = chain.seal(&key(), 3_000, Seq(3), vec![Seq(3)]);
    (chain, vec![first, second, third, fourth])
}

#[test]
fn the_chain_has_its_golden_bytes() {
    let (_, updates) = chain();
    let golden = [
        (
            "564d553101000100570200005f010000000000000000000002020202020202020202020202020202
             010000000000000063c7d827005f08e77a7d365a2c87503501000000000000000000000000000000
             000000000000000000000000000000000000000000000000e8030000000000000000000000000000
             00000000000000000000000000000000000000000000000000000000000000000000000000000000
             0000000000000000000000000000000033efddeea9b8352fd0a848188cf3a724dfed8c2930cef24f
             4b107461001bb8ea268b10627e5f88cac9999fc326a1f7477b65157e54cf0de488f18171864558da
             536df032000000000101010101010101010101010101010102020202020202020202020202020202
             010000000000000063c7d827005f08e77a7d365a2c8750359b623089ae52d0d90759717a05896a2c
             6732c9149f0fba7a9d4400d922bd9de033efddeea9b8352fd0a848188cf3a724dfed8c2930cef24f
             4b107461001bb8eaadd7ed5cbddf97818d9ef5b3cad062bdb7afe6d2f5c3220d16acd90a5f45d974
             010100000063c7d827005f08e77a7d365a2c875035030303030303030303030303030303038a88e3
             dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c01010180010000e8030000
             64000000050000000000000006000000000000000100000000000000000000000000000000000000
             000000000000000000000000000000fee7762b1fd928fed7cc8031d5583af4a1bccb44020344fafb
             60a9cf9522e69b7b4fd7b8f852432b32e5f17dfbc62f149d25656476af66134217fd0790233209",
            "76b4c6c9543835f58746f6a81815598dd700739036d0855decac8b4d6a3b467a",
            "b1413e7bbef826f2a16faa8bdd6d8da701d3cca386a4b85b2850f96829ad1c30",
        ),
        (
            "564d5531010002014801000008000000020000000100000002020202020202020202020202020202
             010000000000000063c7d827005f08e77a7d365a2c8750350200000000000000b1413e7bbef826f2
             a16faa8bdd6d8da701d3cca386a4b85b2850f96829ad1c30d0070000000000000000000000000000
             0200000000000000010000000000000001000000000000004608482f5e28a5cbe18cbcfe0fb400ae
             2e684aa3352ed5c4f43f42359db3d02caf3772fb15d8af6c93284c2da0f9abdf91e9d130431be5c0
             a46123d9bf000a0502997666513ac221ca2c62978f0286559774dc103aa6c3c17292eaffb48c2267
             65a2e97d00000000002000000000000001000000000000008166470a6833d390ca63c4171241090e
             a15de8a28fd47551b01af9602d136934000000000000000000000000000000000000000000000000
             0000000000000000",
            "7a9f144a81d7529df0e253d3fa9145cd6f2d6c47c636e79ab0e610993874d32e",
            "a9d3c9c54e0b3282a4842b6139bbb33fe955991621d21b4d1a23177cc4ead431",
        ),
        (
            "564d5531010005000c0100000c000000000000000100000002020202020202020202020202020202
             010000000000000063c7d827005f08e77a7d365a2c8750350300000000000000a9d3c9c54e0b3282
             a4842b6139bbb33fe955991621d21b4d1a23177cc4ead431d0070000000000000000000000000000
             00000000000000000000000000000000020000000000000014e06d107f11255892d7ec56ee242761
             73ee3b45ad0666ef04e057268f4c11c93527073bad1607782a0aeba83e9a97026153461efe9eb3dd
             823aea7435b378019fe94eeaefc0402889f7be8151b7599f5c6dedf3d0b9bbf3a57b1918efd3147c
             7a29a5810000000008000000766d2f612e696d670200000000000000",
            "3ac2d4615061326144c9f0bd338e7760a11925fcb50b9a5863c9dd871c35ef60",
            "fa334fe113221f355711e901d6844e9b8c7d4da409a9a599e9e48e383f3a8d58",
        ),
        (
            "564d553101000b004001000040000000000000000100000002020202020202020202020202020202
             010000000000000063c7d827005f08e77a7d365a2c8750350400000000000000fa334fe113221f35
             5711e901d6844e9b8c7d4da409a9a599e9e48e383f3a8d58b80b0000000000000000000000000000
             00000000000000000000000000000000030000000000000002c897670994cc4c7b1e8ccadfd18648
             9673972abfac1c3854c287ca5e21f9bf6330797be8502b21de3a4003a81c050266caeb7881897e4f
             f0b508fccc3330ac79e8ffcd78f5b72bbc74431d66764ba5506646696ae198940addad868eecbd68
             30f0b1b400000000fe18aaa27629f798de437b98250e2555bfe406bfda40afcee75869b2608756b5
             abee94647abd69dd064f1d5b75802d5503b9c5c68931ce39093fbbc7806de4030300000000000000",
            "e95bd86ca7241afba9e3930c081f4890d8e2c64a206eb54e2e1ae45ea5dd3e80",
            "ea6aa1773adcf0ced66a606871fb51aaeaeb4d2460013852034a9c130c555263",
        ),
    ];
    for (u, (bytes, body, digest)) in updates.iter().zip(golden) {
        assert_eq!(hex_encode(&u.bytes), bytes.replace(['\n', ' '], ""), "update {}", u.header.seq);
        assert_eq!((u.body.to_string().as_str(), u.digest.to_string().as_str()), (body, digest));
    }
}

#[test]
fn the_state_after_it_has_its_golden_digest() {
    let (_, updates) = chain();
    let mut state = ImageState::new(IMAGE);
    updates.iter().for_each(|u| state.apply(u));
    assert_eq!(state.size_bytes, 8192);
    assert_eq!(state.tip.time_ns, 3_000);
    assert_eq!(
        state.digest().to_string(),
        "2e4b1e87ef54464589d92280dc5963f0db36d802eb84585dcf89218bbee67ff3"
    );
}

#[test]
fn a_vote_is_signed_over_its_documented_bytes() {
    let vote = Vote {
        proposal: Digest::from_bytes([5; 32]),
        host: key().host_id(),
        store: StoreId::from_bytes([3; 16]),
        head: Head {
            epoch: Epoch { number: 1, host: key().host_id() },
            seq: Seq(4),
            digest: Digest::from_bytes([6; 32]),
        },
        commit: (Epoch { number: 1, host: key().host_id() }, Seq(3)),
        acked: (Epoch::default(), Seq::ZERO),
        degraded: false,
        members_since: Digest::from_bytes([8; 32]),
        signature: Signature([0; 64]),
    }
    .signed(&key());
    assert_eq!(
        vote.signature.to_string(),
        "1cc1a557a277876ba62c5b0633b32146ddd08f7865a54cead8f4a85b299d2e528ef4044712fae35813be02e21cee460a9bcefa1016f62bc83bbf5f289fe11f09"
    );
    assert!(vote.is_signed_by(&key().public()));
}
