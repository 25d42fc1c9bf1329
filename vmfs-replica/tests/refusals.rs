//! Every refusal of the chain, sent over a real connection by a host with a valid certificate, to a
//! real engine: it answers with the typed reason, counts it, and changes nothing.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Refusal, Tip};
use vmfs_common::config::Config;
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal};
use vmfs_common::hash::block_digest;
use vmfs_common::header::{FORMAT_LEVEL, Update, UpdateHeader};
use vmfs_common::identity::Signature;
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::{BlockCount, BlockIndex, Digest, Epoch, HostId, ImageId, Seq, StoreId};
use vmfs_net::pki::{init_datastore, invite};
use vmfs_net::{
    Answer, FrameReader, Handlers, HostIdentity, HostRole, NetConfig, NetEvent, Network, RequestHandler,
    StreamHandler, StreamSender,
};
use vmfs_replica::node::{self, Node};

struct Deaf;

impl StreamHandler for Deaf {
    fn on_stream(&self, _: HostId, _: u64, _: ImageId, mut frames: FrameReader) {
        tokio::spawn(async move { while let Ok(Some(_)) = frames.next().await {} });
    }
}

impl RequestHandler for Deaf {
    fn on_request(&self, _: HostId, _: Bytes) -> Answer {
        Box::pin(async { Err("nothing to say".to_owned()) })
    }
}

/// A host that speaks the protocol by hand.
struct ByHand {
    net: Network,
    identity: HostIdentity,
    store: StoreId,
    replica: HostId,
    replica_store: StoreId,
}

fn free_port() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

struct World {
    _dir: tempfile::TempDir,
    node: Node,
    owner: ByHand,
    stranger: ByHand,
}

async fn by_hand(dir: &std::path::Path, name: &str, listen: SocketAddr, n: u8) -> ByHand {
    let identity = HostIdentity::load(&dir.join(name)).unwrap();
    let store = StoreId::from_bytes([n; 16]);
    let (events_in, mut events) = mpsc::channel(64);
    let handlers = Handlers { streams: Arc::new(Deaf), requests: Arc::new(Deaf) };
    let again = HostIdentity::load(&dir.join(name)).unwrap();
    let net = Network::start(NetConfig::new(listen, store), again, handlers, events_in).await.unwrap();
    let replica = HostIdentity::load(&dir.join("replica")).unwrap().host();
    let replica_store = loop {
        match events.recv().await.unwrap() {
            NetEvent::PeerUp { host, store, .. } if host == replica => break store,
            _ => {}
        }
    };
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    ByHand { net, identity, store, replica, replica_store }
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let ca = path.join("ca");
    init_datastore(&ca).unwrap();
    let roles = [HostRole::Replica];
    let mut listens = Vec::new();
    for name in ["replica", "owner", "stranger"] {
        let listen = free_port();
        invite::join_local(&ca, name, &path.join(name), &listen.to_string(), &roles).unwrap();
        listens.push(listen);
    }
    // Whoever joined first learns of the later ones when they connect.
    let text = format!(
        "host = \"replica\"\n[store]\ndir = {:?}\n[identity]\ndir = {:?}\n[network]\nlisten = \"{}\"\n\
         [control]\nsocket = {:?}\n",
        path.join("store"),
        path.join("replica"),
        listens[0],
        path.join("sock"),
    );
    let node = node::start(Config::parse(&text).unwrap(), roles.to_vec()).await.unwrap();
    let owner = by_hand(path, "owner", listens[1], 7).await;
    let stranger = by_hand(path, "stranger", listens[2], 8).await;
    World { _dir: dir, node, owner, stranger }
}

const BLOCK: [u8; 4096] = [0x5a; 4096];

/// An image that the replica holds up to update 3, and the stream it came on.
struct Fed {
    id: ImageId,
    chain: OwnerChain,
    stream: StreamSender,
    first: Update,
}

fn genesis(owner: &ByHand, id: ImageId) -> (OwnerChain, Update) {
    let member = |host: HostId, store, key| Member { host, store, key, role: MemberRole::Replica };
    let replica_key = owner.net.directory().get(owner.replica).unwrap().public_key;
    let members = MemberList::new(vec![
        member(owner.identity.host(), owner.store, owner.identity.key().public()),
        member(owner.replica, owner.replica_store, replica_key),
    ])
    .unwrap();
    let secret = EpochSecret::from_bytes([9; 32]);
    let ballot = Epoch { number: 1, host: owner.identity.host() };
    let proposal = Proposal {
        datastore: owner.identity.datastore(),
        image: id,
        ballot,
        members: members.digest(),
        pub0: secret.first_public(id, ballot),
        secret_hash: secret.commitment(),
    };
    let policy = ImagePolicy::default();
    let mandate = Mandate::Genesis(Genesis { members, policy, attrs: Attrs::default(), level: FORMAT_LEVEL });
    let start = EpochStart { proposal, mandate, published: None, signature: Signature([0; 64]) };
    let start = start.signed(Seq(1), &Digest::default(), owner.identity.key());
    OwnerChain::begin(secret, &Tip::default(), start, 1)
}

fn write(chain: &mut OwnerChain, block: u64) -> Update {
    let draft = Draft {
        op: Op::Write { size_after_bytes: Some(1 << 20) },
        start: BlockIndex(block),
        count: BlockCount(1),
        digests: vec![block_digest(&BLOCK)],
        flags: 0,
    };
    chain.append(draft, 2, Seq(0), vec![])
}

async fn send(stream: &mut StreamSender, update: &Update, payload: &[u8]) {
    let header = Bytes::copy_from_slice(&update.bytes);
    let payload =
        if update.header.digests.is_empty() { vec![] } else { vec![Bytes::copy_from_slice(payload)] };
    stream.send_update(header, &payload).await.unwrap();
}

fn offer(chain: &OwnerChain, first: &Update) -> Bytes {
    let offer = ImageMsg::Offer {
        head: chain.tip().head,
        start: first.head(),
        log_start: Seq(1),
        certificate: first.bytes.to_vec(),
        role: MemberRole::Replica,
    };
    Bytes::from(msg::encode(&offer))
}

async fn fed(world: &World, n: u8) -> Fed {
    let id = ImageId::from_bytes([n; 16]);
    let (mut chain, first) = genesis(&world.owner, id);
    let mut stream = world.owner.net.open_stream(world.owner.replica, id).unwrap();
    stream.send_control(offer(&chain, &first)).await.unwrap();
    send(&mut stream, &first, &[]).await;
    for block in 0..2 {
        let update = write(&mut chain, block);
        send(&mut stream, &update, &BLOCK).await;
    }
    until("the replica has three updates", || world.head(id) == 3).await;
    Fed { id, chain, stream, first }
}

async fn until(what: &str, probe: impl Fn() -> bool) {
    for _ in 0..2000 {
        if probe() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("gave up waiting until {what}");
}

impl World {
    fn head(&self, id: ImageId) -> u64 {
        self.node.image(id).map_or(0, |i| i.state().head().seq.0)
    }
    fn count(&self, id: ImageId, why: Refusal) -> u64 {
        self.node.image(id).unwrap().status().refusals.get(&why).copied().unwrap_or(0)
    }
    fn content(&self, id: ImageId) -> Vec<u8> {
        let view = self.node.image(id).unwrap().view();
        let mut buf = vec![0; 8 * 4096];
        view.read(BlockIndex(0), &mut buf).unwrap();
        buf
    }
    /// Sends `update` as the owner and expects this refusal and no change.
    async fn refuses(&self, fed: &mut Fed, update: &Update, payload: &[u8], why: Refusal) {
        let (head, content) = (self.head(fed.id), self.content(fed.id));
        send(&mut fed.stream, update, payload).await;
        until(&format!("{why:?} is counted"), || self.count(fed.id, why) == 1).await;
        assert_eq!((self.head(fed.id), self.content(fed.id)), (head, content), "{why:?} changed something");
    }
}

fn altered(update: &Update, f: impl FnOnce(&mut UpdateHeader)) -> Update {
    let mut header = update.header.clone();
    f(&mut header);
    Update::from_header(header)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_refusal_is_typed_counted_and_changes_nothing() {
    let world = world().await;
    let w = &world;

    let mut f = fed(w, 1).await;
    let next = write(&mut f.chain, 2);
    let other = altered(&next, |h| h.image = ImageId::from_bytes([99; 16]));
    w.refuses(&mut f, &other, &BLOCK, Refusal::WrongImage).await;

    let mut f = fed(w, 2).await;
    let next = write(&mut f.chain, 2);
    let later = altered(&next, |h| h.epoch.number = 2);
    w.refuses(&mut f, &later, &BLOCK, Refusal::WrongEpoch).await;

    let mut f = fed(w, 3).await;
    let (_skipped, next) = (write(&mut f.chain, 2), write(&mut f.chain, 3));
    w.refuses(&mut f, &next, &BLOCK, Refusal::Gap).await;

    let mut f = fed(w, 4).await;
    let first = f.first.clone();
    w.refuses(&mut f, &altered(&first, |h| h.op = Op::Unlink), &[], Refusal::Replay).await;

    let mut f = fed(w, 5).await;
    let next = write(&mut f.chain, 2);
    w.refuses(&mut f, &next, &[0x5b; 4096], Refusal::AlteredPayload).await;

    let mut f = fed(w, 6).await;
    let next = write(&mut f.chain, 2);
    w.refuses(&mut f, &altered(&next, |h| h.parent = Digest::default()), &BLOCK, Refusal::WrongParent).await;

    let mut f = fed(w, 7).await;
    let next = write(&mut f.chain, 2);
    w.refuses(&mut f, &altered(&next, |h| h.reveal[3] ^= 1), &BLOCK, Refusal::WrongReveal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_header_is_malformed_and_a_forged_head_is_found_out_by_its_successor() {
    let world = world().await;
    let w = &world;

    let mut f = fed(w, 1).await;
    let next = write(&mut f.chain, 2);
    let mut bytes = next.bytes.to_vec();
    bytes[70] ^= 1;
    f.stream.send_update(Bytes::from(bytes), &[Bytes::copy_from_slice(&BLOCK)]).await.unwrap();
    until("malformed is counted", || w.count(f.id, Refusal::Malformed) == 1).await;
    assert_eq!(w.head(f.id), 3);

    // The tag of the head itself can only be judged by what the next update reveals.
    let mut f = fed(w, 2).await;
    let (forged, next) = (write(&mut f.chain, 2), write(&mut f.chain, 3));
    let forged = altered(&forged, |h| h.tag[0] ^= 1);
    send(&mut f.stream, &forged, &BLOCK).await;
    send(&mut f.stream, &next, &BLOCK).await;
    until("the head's wrong tag is counted", || w.count(f.id, Refusal::WrongHeadTag) == 1).await;
    assert!(w.head(f.id) <= 4, "nothing was built on the forged head");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_the_owner_can_send_updates_or_offer_its_epoch() {
    let world = world().await;
    let w = &world;
    let mut f = fed(w, 1).await;
    let before = (w.head(f.id), w.content(f.id));
    let next = write(&mut f.chain, 2);

    // Honest bytes, a valid certificate of the datastore, but not the owner's connection.
    let mut stream = w.stranger.net.open_stream(w.stranger.replica, f.id).unwrap();
    stream.send_control(offer(&f.chain, &f.first)).await.unwrap();
    until("the stranger's offer is refused", || w.count(f.id, Refusal::NotOwner) >= 1).await;
    send(&mut stream, &next, &BLOCK).await;
    until("the stranger's update is refused", || w.count(f.id, Refusal::NotOwner) >= 2).await;
    assert_eq!((w.head(f.id), w.content(f.id)), before);

    // The stranger's own epoch, without a single vote.
    let mut start = match &f.first.header.op {
        Op::EpochStart(start) => (**start).clone(),
        _ => unreachable!("the first update is an EpochStart"),
    };
    start.proposal.ballot = Epoch { number: 2, host: w.stranger.identity.host() };
    start.mandate = Mandate::Votes(vec![]);
    let secret = EpochSecret::from_bytes([1; 32]);
    start.proposal.secret_hash = secret.commitment();
    start.proposal.pub0 = secret.first_public(f.id, start.proposal.ballot);
    let tip = *f.chain.tip();
    let start = start.signed(tip.head.seq.next(), &tip.head.digest, w.stranger.identity.key());
    let (usurper, usurped) = OwnerChain::begin(secret, &tip, start, 3);
    stream.send_control(offer(&usurper, &usurped)).await.unwrap();
    until("the certificate without votes is refused", || w.count(f.id, Refusal::BadCertificate) >= 1).await;
    assert_eq!((w.head(f.id), w.content(f.id)), before);

    // And the owner goes on as if nothing had happened.
    send(&mut f.stream, &next, &BLOCK).await;
    until("the owner's next update is taken", || w.head(f.id) == 4).await;
}
