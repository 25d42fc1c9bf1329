//! Known answers: a chain from fixed keys, whose bytes were recomputed from `docs/protocol.md` alone with
//! another implementation of SHA-256 and HMAC (Python's hashlib and hmac).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Tip, public_id};
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal};
use vmfs_common::hash::{block_digest, hash, mac};
use vmfs_common::header::{FORMAT_LEVEL, Update};
use vmfs_common::identity::{HostKey, Signature};
use vmfs_common::ids::hex_encode;
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::{BlockCount, BlockIndex, DatastoreId, Digest, Epoch, ImageId, Seq, StoreId};

const IMAGE: ImageId = ImageId::from_bytes([0x11; 16]);

const HASH_PUB_ABC: &str = "0209320d47ecdbbf70de7a429572652c0d0e82e71df4b79a2c5c0c9736120fa6";
const MAC_TAG_ABC: &str = "542d6553201f81bc71b577f12b4cf0bb80c6d543e7ac189cc09cc9f4b8e240bc";
const FIRST_DIGEST: &str = "eee5d8665fd7b4f9fa6aecda78487360b351b9e18340a611ac671822ed2cf979";
const SECOND_BODY: &str = "02ef299075844e27ced3b28fa4f9c2f8d5c685510c9cff86f5d34fd2c4088836";
const SECOND_DIGEST: &str = "c721a549faf853c2adaa9d3cd95abe774745c7eceed2c1f99cd8e85a0dc37697";
const SECOND_TAG: &str = "a7ae6daee2b32620fa875a1a6a6d54b19ab161bf128a7b6d145e31212e469ab2";
const THIRD_DIGEST: &str = "f7a598f622c2e1e71ccf7235ceecae8e9d000c929fa105d46f3a8d9860c6a5f8";
const SECOND_BYTES: &str = concat!(
    "564d55310100020148010000080000000200000001000000111111111111111111111111111111110100000000000000",
    "833bb2fb9eb3a8916de7894ab07c303b0200000000000000eee5d8665fd7b4f9fa6aecda78487360b351b9e18340a611",
    "ac671822ed2cf97980841e00000000000000000000000000020000000000000001000000000000000100000000000000",
    "fbbe876af188811d18f9b936bf752c235f7b947426adbc0a026726e36c5817ae7abcee910cc3340b371149fae109ec9f",
    "5062c05566064611986425fda125df60a7ae6daee2b32620fa875a1a6a6d54b19ab161bf128a7b6d145e31212e469ab2",
    "c93704ed0000000000200000000000000100000000000000095b746c3a23191ffd7c7bab6057206f1ea49a6422f41416",
    "111b6360c7e4134f0000000000000000000000000000000000000000000000000000000000000000",
);

fn chain() -> (Update, Update, Update) {
    let key = HostKey::from_seed([0x22; 32]);
    let host = key.public().host_id();
    let member =
        Member { host, store: StoreId::from_bytes([0x33; 16]), key: key.public(), role: MemberRole::Replica };
    let members = MemberList::new(vec![member]).unwrap();
    let secret = EpochSecret::from_bytes([0x44; 32]);
    let ballot = Epoch { number: 1, host };
    let proposal = Proposal {
        datastore: DatastoreId::from_bytes([0x55; 16]),
        image: IMAGE,
        ballot,
        members: members.digest(),
        pub0: secret.first_public(IMAGE, ballot),
        secret_hash: secret.commitment(),
    };
    let attrs = Attrs { mode: 0o600, uid: 1, gid: 2, atime_ns: 3, mtime_ns: 4 };
    let genesis = Genesis { members, policy: ImagePolicy::default(), attrs, level: FORMAT_LEVEL };
    let mandate = Mandate::Genesis(genesis);
    let start = EpochStart { proposal, mandate, published: None, signature: Signature([0; 64]) };
    let start = start.signed(Seq(1), &Digest::default(), &key);
    let (mut chain, first) = OwnerChain::begin(secret, &Tip::default(), start, 1_000_000);
    let write = Draft {
        op: Op::Write { size_after_bytes: Some(8192) },
        start: BlockIndex(0),
        count: BlockCount(2),
        digests: vec![block_digest(&[0x66; 4096]), Digest::default()],
        flags: 1,
    };
    let second = chain.append(write, 2_000_000, Seq(1), vec![Seq(1)]);
    let third = chain.seal(&key, 3_000_000, Seq(2), vec![Seq(2)]);
    (first, second, third)
}

#[test]
fn hashes_and_macs_have_their_labels() {
    assert_eq!(hash("pub", &[b"abc"]).to_string(), HASH_PUB_ABC);
    assert_eq!(hex_encode(&mac(&[7; 32], "tag", &[b"abc"])), MAC_TAG_ABC);
    assert_eq!(public_id(&[9; 32]), hash("pub", &[&[9; 32]]));
}

#[test]
fn three_updates_have_their_known_bytes() {
    let (first, second, third) = chain();
    assert_eq!(first.digest.to_string(), FIRST_DIGEST);
    assert_eq!(second.body.to_string(), SECOND_BODY);
    assert_eq!(second.digest.to_string(), SECOND_DIGEST);
    assert_eq!(hex_encode(&second.header.tag), SECOND_TAG);
    assert_eq!(third.digest.to_string(), THIRD_DIGEST);
    assert_eq!(hex_encode(&second.bytes), SECOND_BYTES);
}
