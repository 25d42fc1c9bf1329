//! Real hosts on loopback.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use vmfs_common::{HostId, ImageId, StoreId};
use vmfs_net::pki::{init_datastore, invite};
use vmfs_net::{
    Answer, Frame, FrameReader, Handlers, HostIdentity, HostRole, NetConfig, NetError, NetEvent, Network,
    RequestHandler, StreamHandler,
};

pub const PATIENCE: Duration = Duration::from_secs(10);

/// Streams of this image are not read at first.
pub const SLOW_IMAGE: ImageId = ImageId::from_bytes([0xee; 16]);
/// That is, for so long.
pub const SLOW_READER: Duration = Duration::from_millis(1500);

/// What arrived on a stream: the image, then frames, then how it ended.
#[derive(Debug)]
pub enum Got {
    Opened(HostId, ImageId),
    Frame(ImageId, Frame),
    Ended(ImageId, Option<NetError>),
}

struct Sink(mpsc::UnboundedSender<Got>);

impl StreamHandler for Sink {
    fn on_stream(&self, from: HostId, _session: u64, image: ImageId, mut frames: FrameReader) {
        let out = self.0.clone();
        tokio::spawn(async move {
            let _ = out.send(Got::Opened(from, image));
            if image == SLOW_IMAGE {
                tokio::time::sleep(SLOW_READER).await;
            }
            loop {
                match frames.next().await {
                    Ok(Some(frame)) => drop(out.send(Got::Frame(image, frame))),
                    Ok(None) => return drop(out.send(Got::Ended(image, None))),
                    Err(e) => return drop(out.send(Got::Ended(image, Some(e)))),
                }
            }
        });
    }
}

/// Answers with what it was asked, except for "no" and "sleep".
struct Echo;

impl RequestHandler for Echo {
    fn on_request(&self, _: HostId, body: Bytes) -> Answer {
        Box::pin(async move {
            match &body[..] {
                b"no" => Err("it said no".into()),
                b"sleep" => {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    Ok(body)
                }
                _ => Ok(body),
            }
        })
    }
}

/// A running host.
pub struct Host {
    pub net: Network,
    pub events: mpsc::Receiver<NetEvent>,
    pub got: mpsc::UnboundedReceiver<Got>,
}

/// A UDP port that nobody uses at the moment.
pub fn free_address() -> String {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

pub fn store(n: u8) -> StoreId {
    StoreId::from_bytes([n; 16])
}

pub fn image(n: u8) -> ImageId {
    ImageId::from_bytes([n; 16])
}

pub fn config(listen: &str) -> NetConfig {
    NetConfig { request_timeout: Duration::from_secs(2), ..NetConfig::new(listen.parse().unwrap(), store(1)) }
}

pub async fn start(cfg: NetConfig, identity: HostIdentity) -> Result<Host, NetError> {
    let (events_in, events) = mpsc::channel(1024);
    let (got_in, got) = mpsc::unbounded_channel();
    let handlers = Handlers { streams: Arc::new(Sink(got_in)), requests: Arc::new(Echo) };
    let net = Network::start(cfg, identity, handlers, events_in).await?;
    Ok(Host { net, events, got })
}

/// Starts a host whose former run may be about to let go of the socket.
pub async fn start_again(cfg: NetConfig, identity: HostIdentity) -> Host {
    let attempt = async {
        loop {
            match start(cfg.clone(), identity.clone()).await {
                Ok(host) => return host,
                Err(NetError::Bind { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(e) => panic!("{e}"),
            }
        }
    };
    timeout(PATIENCE, attempt).await.expect("the socket is free in the end")
}

impl Host {
    /// Says farewell and goes.
    pub async fn stop(self) {
        self.net.shutdown().await;
    }

    /// The next event that is no beat.
    pub async fn event(&mut self) -> NetEvent {
        timeout(PATIENCE, async {
            loop {
                match self.events.recv().await.expect("the network lives") {
                    NetEvent::Beat { .. } => {}
                    other => return other,
                }
            }
        })
        .await
        .expect("an event")
    }

    pub async fn up(&mut self) -> (HostId, u64) {
        match self.event().await {
            NetEvent::PeerUp { host, session, .. } => (host, session),
            other => panic!("{other:?}"),
        }
    }

    pub async fn down(&mut self) -> (HostId, u64) {
        match self.event().await {
            NetEvent::PeerDown { host, session } => (host, session),
            other => panic!("{other:?}"),
        }
    }

    pub async fn next(&mut self) -> Got {
        timeout(PATIENCE, self.got.recv()).await.expect("a frame in time").expect("the sink lives")
    }

    pub fn id(&self) -> HostId {
        self.net.local_host()
    }

    /// Waits until a refusal was counted this often.
    pub async fn refused(&self, reason: &str, at_least: u64) {
        eventually(&format!("{at_least} x {reason}"), || {
            self.net.counters().get(reason).copied().unwrap_or(0) >= at_least
        })
        .await;
    }
}

/// Waits for a condition.
pub async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let wait = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "never: {what}");
}

/// Identity directories of a datastore; the first host has the CA.
pub struct Datastore {
    pub tmp: TempDir,
    pub addresses: Vec<String>,
}

impl Datastore {
    pub fn new(hosts: usize) -> Self {
        let mut ds = Self { tmp: TempDir::new().unwrap(), addresses: Vec::new() };
        init_datastore(&ds.dir(0)).unwrap();
        for n in 0..hosts {
            ds.add(n);
        }
        ds
    }

    fn add(&mut self, n: usize) {
        let address = free_address();
        let (ca, dir) = (self.dir(0), self.dir(n));
        invite::join_local(&ca, &format!("host{n}"), &dir, &address, &[HostRole::Replica]).unwrap();
        self.addresses.push(address);
    }

    pub fn dir(&self, n: usize) -> PathBuf {
        self.tmp.path().join(n.to_string())
    }

    pub fn identity(&self, n: usize) -> HostIdentity {
        HostIdentity::load(&self.dir(n)).unwrap()
    }

    pub fn config(&self, n: usize) -> NetConfig {
        config(&self.addresses[n])
    }

    pub async fn start(&self, n: usize) -> Host {
        start_again(self.config(n), self.identity(n)).await
    }

    pub fn address(&self, n: usize) -> SocketAddr {
        self.addresses[n].parse().unwrap()
    }
}

/// Two hosts that are connected.
pub async fn pair() -> (Datastore, Host, Host) {
    let ds = Datastore::new(2);
    let (mut a, mut b) = (ds.start(0).await, ds.start(1).await);
    assert_eq!(a.up().await.0, b.id());
    assert_eq!(b.up().await.0, a.id());
    (ds, a, b)
}

/// Permission bits of a file.
pub fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}
