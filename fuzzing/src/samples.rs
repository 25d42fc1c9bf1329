//! Real encodings: what the corpus is made of.

use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Refusal, Share, Tip};
use vmfs_common::codec::Writer;
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal, Vote, encode_vote};
use vmfs_common::hash::block_digest;
use vmfs_common::header::{FLAG_FLUSH, FORMAT_LEVEL, Update};
use vmfs_common::identity::{HostKey, Signature};
use vmfs_common::msg::{self, EpochMark, ImageMsg, Join, Occasion, VoteRefusal};
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, ImageId, Seq, StoreId};
use vmfs_net::fuzzing::frame;
use vmfs_net::hello::Hello;

pub(crate) const DATASTORE: DatastoreId = DatastoreId::from_bytes([1; 16]);
pub(crate) const IMAGE: ImageId = ImageId::from_bytes([2; 16]);

/// The key of host `n`: 1 owns, 2 has a copy, 3 is a witness, 4 is a stranger.
pub(crate) fn key(n: u8) -> HostKey {
    HostKey::from_seed([n; 32])
}

pub(crate) fn member(n: u8) -> Member {
    Member {
        host: key(n).host_id(),
        store: StoreId::from_bytes([n; 16]),
        key: key(n).public(),
        role: if n == 3 { MemberRole::Witness } else { MemberRole::Replica },
    }
}

pub(crate) fn members() -> MemberList {
    MemberList::new((1..=3).map(member).collect()).expect("three members")
}

fn start(by: u8, mandate: Mandate, parent: &Tip, published: Option<[u8; 32]>) -> (EpochSecret, EpochStart) {
    let seq = parent.head.seq.next();
    let secret = EpochSecret::from_bytes([by + 6; 32]);
    let ballot = Epoch { number: parent.head.epoch.number + 1, host: key(by).host_id() };
    let proposal = Proposal {
        datastore: DATASTORE,
        image: IMAGE,
        ballot,
        members: members().digest(),
        pub0: secret.first_public(IMAGE, ballot),
        secret_hash: secret.commitment(),
    };
    let start = EpochStart { proposal, mandate, published, signature: Signature([0; 64]) };
    (secret, start.signed(seq, &parent.head.digest, &key(by)))
}

fn vote_of(n: u8, proposal: Digest, head: Head) -> Vote {
    Vote {
        proposal,
        host: key(n).host_id(),
        store: StoreId::from_bytes([n; 16]),
        head,
        commit: (head.epoch, Seq(1)),
        acked: (head.epoch, Seq(1)),
        degraded: false,
        members_since: Digest::from_bytes([5; 32]),
        signature: Signature([0; 64]),
    }
    .signed(&key(n))
}

/// A chain with an update of every kind; the second epoch is host 2's, by the votes of 2 and 3.
pub(crate) fn chain() -> (Vec<Update>, ImageState) {
    let genesis = Genesis {
        members: members(),
        policy: ImagePolicy::default(),
        attrs: Attrs { mode: 0o600, ..Attrs::default() },
        level: FORMAT_LEVEL,
    };
    let (secret, first) = start(1, Mandate::Genesis(genesis), &Tip::default(), None);
    let (mut chain, update) = OwnerChain::begin(secret, &Tip::default(), first, 5);
    let mut all = vec![update];
    let ops = [
        Op::Name { path: "vm/disk.img".to_owned() },
        Op::Resize { size_bytes: 1 << 20 },
        Op::Attr(Attrs { mode: 0o644, uid: 1, gid: 2, atime_ns: 3, mtime_ns: 4 }),
        Op::Xattr { name: "user.a".to_owned(), value: Some(vec![1, 2, 3]) },
        Op::Xattr { name: "user.b".to_owned(), value: None },
        Op::Members(members()),
        Op::Policy(ImagePolicy::default()),
        Op::Root { at: Seq(1), merkle: Digest::from_bytes([3; 32]), state: Digest::default() },
        Op::Snapshot { name: "s".to_owned() },
        Op::DropSnapshot { name: "t".to_owned() },
        Op::Rewind { to: Seq(1), digest: Digest::default() },
        Op::Unlink,
    ];
    for op in ops {
        all.push(chain.append(Draft::op(op), 6, Seq(1), vec![Seq(1); 3]));
    }
    all.push(chain.append(write(3, &[[0x11; 4096], [0; 4096]]), 8, Seq(3), vec![]));
    let zero = Draft {
        op: Op::Zero { size_after_bytes: None },
        start: BlockIndex(9),
        count: BlockCount(4),
        digests: Vec::new(),
        flags: FLAG_FLUSH,
    };
    all.push(chain.append(zero, 9, Seq(3), vec![]));
    all.push(chain.seal(&key(1), 10, Seq(4), vec![]));
    let head = chain.tip().head;
    let (_, unsigned) = start(2, Mandate::Votes(Vec::new()), chain.tip(), None);
    let digest = unsigned.proposal.digest();
    let votes = vec![vote_of(2, digest, head), vote_of(3, digest, head)];
    let (secret, next) = start(2, Mandate::Votes(votes), chain.tip(), Some(*chain.secret().expose()));
    all.push(OwnerChain::begin(secret, chain.tip(), next, 11).1);
    let mut state = ImageState::new(IMAGE);
    all.iter().for_each(|u| state.apply(u));
    (all, state)
}

pub(crate) fn write(start: u64, blocks: &[[u8; 4096]]) -> Draft {
    Draft {
        op: Op::Write { size_after_bytes: Some((start + blocks.len() as u64) << 12) },
        start: BlockIndex(start),
        count: BlockCount(blocks.len() as u64),
        digests: blocks.iter().map(|b| block_digest(b)).collect(),
        flags: FLAG_FLUSH,
    }
}

pub(crate) fn updates() -> Vec<Vec<u8>> {
    chain().0.iter().map(|u| u.bytes.to_vec()).collect()
}

pub(crate) fn states() -> Vec<Vec<u8>> {
    vec![chain().1.encode(), ImageState::new(IMAGE).encode()]
}

pub(crate) fn certificates() -> Vec<Vec<u8>> {
    let mut w = Writer::new();
    members().encode(&mut w);
    let list = w.finish();
    let starts = chain().0.into_iter().filter(|u| matches!(u.header.op, Op::EpochStart(_)));
    let mut all: Vec<_> = starts.map(|u| [&list[..], &u.header.op.encode_args()].concat()).collect();
    let (_, forced) = start(1, Mandate::Forced(members()), &Tip::default(), None);
    let mut w = Writer::new();
    forced.encode(&mut w);
    all.push([&list[..], &w.finish()].concat());
    let mut w = Writer::new();
    encode_vote(&mut w, &vote_of(2, Digest::from_bytes([4; 32]), Head::default()));
    all.push(w.finish());
    all
}

/// What may be said about the chain's image, one of each kind.
pub(crate) fn all_messages() -> Vec<ImageMsg> {
    let (updates, state) = chain();
    let (first, last) = (&updates[0], &updates[updates.len() - 1]);
    let epoch = first.header.epoch;
    let marks = state.epochs.iter().rev().map(|e| EpochMark { start: e.start, parent: e.parent }).collect();
    let store = StoreId::from_bytes([2; 16]);
    let join = Join { store, head: first.head(), durable: first.head(), marks, witness: false };
    let Op::EpochStart(started) = &last.header.op else { unreachable!("the last update is an EpochStart") };
    let proposal = started.proposal.clone();
    let vote = vote_of(2, proposal.digest(), last.head());
    let offer = |u: &Update| ImageMsg::Offer {
        head: last.head(),
        start: u.head(),
        log_start: Seq(1),
        certificate: u.bytes.to_vec(),
        role: MemberRole::Replica,
    };
    let headers = updates[1..4].iter().map(|u| u.bytes.to_vec()).collect();
    vec![
        ImageMsg::Propose {
            proposal,
            occasion: Occasion::Operator,
            head: last.head(),
            consent: Some(vote.clone()),
            role: MemberRole::Replica,
        },
        ImageMsg::Voted { vote, share: Some((epoch, Share::from_bytes(vec![1; 33]))) },
        ImageMsg::VoteRefused { ballot: epoch, why: VoteRefusal::Promised(epoch) },
        ImageMsg::FetchHeaders { join: join.clone(), upto: last.head(), after: Seq(0) },
        ImageMsg::Headers { parent: first.head(), headers, upto: last.head() },
        ImageMsg::FetchUpdates { after: Seq(1), upto: last.head(), witness: false },
        ImageMsg::FetchFailed { upto: last.head(), log_start: Seq(1) },
        offer(first),
        offer(last),
        ImageMsg::Join(join.clone()),
        ImageMsg::Behind { log_start: Seq(9) },
        ImageMsg::Sync { seq: Seq(3), commit: Seq(2) },
        ImageMsg::Ack { head: first.head(), store },
        ImageMsg::Refused { why: Refusal::Promised, seq: Seq(3), promised: last.header.epoch, join },
        ImageMsg::Share { epoch, share: Share::from_bytes(vec![1; 33]) },
        ImageMsg::Handover { head: last.head() },
        ImageMsg::HandoverDone { done: true },
        ImageMsg::WhoOwns { head: first.head() },
        ImageMsg::NotMember { head: first.head() },
    ]
}

pub(crate) fn messages() -> Vec<Vec<u8>> {
    all_messages().iter().map(msg::encode).collect()
}

pub(crate) fn questions() -> Vec<Vec<u8>> {
    vmfs_replica::fuzzing::question_seeds()
}

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        datastore: DATASTORE,
        store: StoreId::from_bytes([2; 16]),
        run: 77,
        software: "0.1.0".to_owned(),
    }
}

pub(crate) fn hellos() -> Vec<Vec<u8>> {
    let later = [&Hello { version_max: 2, ..hello() }.encode()[..], b"more"].concat();
    vec![hello().encode().to_vec(), later]
}

pub(crate) fn frames() -> Vec<Vec<u8>> {
    let update = &chain().0[0].bytes;
    let len = u32::try_from(update.len()).expect("a small header").to_le_bytes();
    let body = [&len[..], update, &[7; 64]].concat();
    let beat = [1u64.to_le_bytes(), 0u64.to_le_bytes()].concat();
    vec![
        [frame(0x01, &hello().encode()), frame(0x02, &[]), frame(0x03, &beat)].concat(),
        frame(0x04, br#"{"hosts":[],"removed":[]}"#),
        [frame(0x10, IMAGE.as_bytes()), frame(0x11, &messages()[0]), frame(0x12, &body)].concat(),
        [frame(0x20, &questions()[0]), frame(0x21, b"x"), frame(0x22, b"no")].concat(),
        [frame(0x30, &enrolment()[1]), frame(0x31, br#"{"refused":"no"}"#)].concat(),
    ]
}

pub(crate) fn enrolment() -> Vec<Vec<u8>> {
    let signature = "00".repeat(64);
    let said =
        format!(r#"{{"address":"h:1","roles":["mount","replica"],"version":9,"signature":"{signature}"}}"#);
    let entry = format!(
        r#"{{"name":"a","address":"h:1","roles":["witness"],"version":9,"certificate":"3000","signature":"{signature}"}}"#
    );
    let host = key(2).host_id();
    let gossip = format!(
        r#"{{"hosts":[{entry}],"removed":[{{"host":"{host}","at_ms":1,"signature":"{signature}"}}]}}"#
    );
    vec![
        gossip.clone().into_bytes(),
        format!(r#"{{"invite":"0011223344556677","csr":"3000","proof":"aa","announcement":{said}}}"#)
            .into_bytes(),
        said.into_bytes(),
        format!(r#"{{"admitted":{{"certificate":"3000","hosts":{gossip}}}}}"#).into_bytes(),
        br#"{"refused":"the invitation has been used already"}"#.to_vec(),
    ]
}

pub(crate) fn texts() -> Vec<Vec<u8>> {
    // An invitation of no datastore: its check sum is right, its secret opens nothing.
    let token = "vmfs1-invite-01010101010101010101010101010101020202020202020202020202020202020202020202020202\
                 0202020202020202030303030303030303030303030303030404040404040404050505050505050505050505050505\
                 05050505050505050505050505050505050000000000000000683a31";
    let body: String = token.replace(' ', "");
    let bytes = vmfs_common::ids::hex_decode(body.trim_start_matches("vmfs1-invite-")).unwrap_or_default();
    let sum = vmfs_net::fuzzing::sha256(&bytes);
    let token = format!("{body}{}", vmfs_common::ids::hex_encode(&sum[..4]));
    vec![
        include_bytes!("../../examples/vmfs.toml").to_vec(),
        b"host = \"a\"\n[store]\ndir = \"/s\"\n[identity]\ndir = \"/i\"\n[network]\nlisten = \"127.0.0.1:1\"\n".to_vec(),
        token.into_bytes(),
        b"vm/disk.img".to_vec(),
    ]
}

pub(crate) fn api_requests() -> Vec<Vec<u8>> {
    [
        r#"{"image":"vm/disk.img"}"#,
        r#"{"image":"a","force":true,"members":["b","c"]}"#,
        r#"{"image":"a","to":"b"}"#,
        r#"{"image":"a","host":"b","witness":true}"#,
        r#"{"image":"a","deep":true}"#,
        r#"{"image":"a","in_sync":true,"timeout_ms":1000}"#,
        r#"{"fork":"0011-1.aa-5-bb"}"#,
        r#"{"fork":"0011-1.aa-5-bb","file":"/tmp/x","onto":true}"#,
        r#"{"image":"a","acks":"all","on_quorum_loss":"degrade"}"#,
        r#"{"name":"b","valid_ms":5}"#,
        r#"{"progress":{"stage":"x","done":1,"total":2,"unit":"bytes"}}"#,
    ]
    .iter()
    .map(|s| s.as_bytes().to_vec())
    .collect()
}
