//! A real engine, and hosts with valid certificates of its datastore that speak the protocol by hand.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "shared by several test binaries"
)]

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
use vmfs_common::{BlockCount, BlockIndex, Digest, Epoch, Head, HostId, ImageId, Seq, StoreId};
use vmfs_net::pki::{init_datastore, invite};
use vmfs_net::{
    Answer, Frame, FrameReader, Handlers, HostIdentity, HostRole, NetConfig, NetEvent, Network,
    RequestHandler, StreamHandler, StreamSender,
};
use vmfs_replica::node::{self, Node};

/// What the engine says on its image streams, message by message; updates are not kept.
struct Ears(mpsc::UnboundedSender<ImageMsg>);

impl StreamHandler for Ears {
    fn on_stream(&self, _: HostId, _: u64, _: ImageId, mut frames: FrameReader) {
        let heard = self.0.clone();
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.next().await {
                if let Frame::Control(body) = frame {
                    // The test may have heard enough.
                    let _ = heard.send(msg::decode(&body).unwrap());
                }
            }
        });
    }
}

struct Mute;

impl RequestHandler for Mute {
    fn on_request(&self, _: HostId, _: Bytes) -> Answer {
        Box::pin(async { Err("nothing to say".to_owned()) })
    }
}

/// A host that speaks the protocol by hand.
pub struct ByHand {
    pub net: Network,
    pub identity: HostIdentity,
    pub store: StoreId,
    pub replica: HostId,
    pub replica_store: StoreId,
    heard: mpsc::UnboundedReceiver<ImageMsg>,
}

impl ByHand {
    /// As a member list names it.
    pub fn member(&self, role: MemberRole) -> Member {
        Member { host: self.identity.host(), store: self.store, key: self.identity.key().public(), role }
    }
    /// The engine, as a member list names it.
    pub fn replica_member(&self) -> Member {
        let key = self.net.directory().get(self.replica).unwrap().public_key;
        Member { host: self.replica, store: self.replica_store, key, role: MemberRole::Replica }
    }
    /// The next thing that the engine says to this host.
    pub async fn heard(&mut self) -> ImageMsg {
        tokio::time::timeout(Duration::from_secs(10), self.heard.recv()).await.expect("in time").unwrap()
    }
}

pub fn free_port() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub struct World {
    pub dir: tempfile::TempDir,
    pub node: Node,
    pub owner: ByHand,
    pub stranger: ByHand,
}

pub async fn by_hand(dir: &std::path::Path, name: &str, listen: SocketAddr, n: u8) -> ByHand {
    let identity = HostIdentity::load(&dir.join(name)).unwrap();
    let store = StoreId::from_bytes([n; 16]);
    let (events_in, mut events) = mpsc::channel(64);
    let (say, heard) = mpsc::unbounded_channel();
    let handlers = Handlers { streams: Arc::new(Ears(say)), requests: Arc::new(Mute) };
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
    ByHand { net, identity, store, replica, replica_store, heard }
}

pub async fn world() -> World {
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
    World { dir, node, owner, stranger }
}

pub const BLOCK: [u8; 4096] = [0x5a; 4096];

/// An image that the replica holds up to update 3, and the stream it came on.
pub struct Fed {
    pub id: ImageId,
    pub chain: OwnerChain,
    pub stream: StreamSender,
    pub first: Update,
}

/// An image of `others` and the engine, owned by `owner`.
pub fn genesis(owner: &ByHand, id: ImageId, others: &[Member]) -> (OwnerChain, Update) {
    let members = others.iter().cloned().chain([owner.replica_member()]).collect();
    let members = MemberList::new(members).unwrap();
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

pub fn write(chain: &mut OwnerChain, block: u64) -> Update {
    let draft = Draft {
        op: Op::Write { size_after_bytes: Some(1 << 20) },
        start: BlockIndex(block),
        count: BlockCount(1),
        digests: vec![block_digest(&BLOCK)],
        flags: 0,
    };
    chain.append(draft, 2, Seq(0), vec![])
}

pub async fn send(stream: &mut StreamSender, update: &Update, payload: &[u8]) {
    let header = Bytes::copy_from_slice(&update.bytes);
    let payload =
        if update.header.digests.is_empty() { vec![] } else { vec![Bytes::copy_from_slice(payload)] };
    stream.send_update(header, &payload).await.unwrap();
}

pub fn offer(chain: &OwnerChain, first: &Update) -> Bytes {
    let offer = ImageMsg::Offer {
        head: chain.tip().head,
        start: first.head(),
        log_start: Seq(1),
        certificate: first.bytes.to_vec(),
        role: MemberRole::Replica,
    };
    Bytes::from(msg::encode(&offer))
}

/// An image of the owner and the engine.
pub async fn fed(world: &World, n: u8) -> Fed {
    fed_with(world, n, &[world.owner.member(MemberRole::Replica)]).await
}

/// An image of `others` and the engine.
pub async fn fed_with(world: &World, n: u8, others: &[Member]) -> Fed {
    let id = ImageId::from_bytes([n; 16]);
    let (mut chain, first) = genesis(&world.owner, id, others);
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

pub async fn until(what: &str, probe: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if probe() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("gave up waiting until {what}");
}

impl World {
    pub fn head(&self, id: ImageId) -> u64 {
        self.node.image(id).map_or(0, |i| i.state().head().seq.0)
    }
    pub fn full_head(&self, id: ImageId) -> Head {
        self.node.image(id).unwrap().state().head()
    }
    pub fn count(&self, id: ImageId, why: Refusal) -> u64 {
        self.node.image(id).unwrap().status().refusals.get(&why).copied().unwrap_or(0)
    }
    pub fn content(&self, id: ImageId) -> Vec<u8> {
        let view = self.node.image(id).unwrap().view();
        let mut buf = vec![0; 8 * 4096];
        view.read(BlockIndex(0), &mut buf).unwrap();
        buf
    }
    /// Sends `update` as the owner and expects this refusal and no change.
    pub async fn refuses(&self, fed: &mut Fed, update: &Update, payload: &[u8], why: Refusal) {
        let (head, content) = (self.head(fed.id), self.content(fed.id));
        send(&mut fed.stream, update, payload).await;
        until(&format!("{why:?} is counted"), || self.count(fed.id, why) == 1).await;
        assert_eq!((self.head(fed.id), self.content(fed.id)), (head, content), "{why:?} changed something");
    }
}

pub fn altered(update: &Update, f: impl FnOnce(&mut UpdateHeader)) -> Update {
    let mut header = update.header.clone();
    f(&mut header);
    Update::from_header(header)
}
