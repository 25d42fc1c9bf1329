//! Settings of the transport, and the handlers that receive what peers send.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vmfs_common::{HostId, ImageId, StoreId};

use crate::directory::HostRole;
use crate::stream::FrameReader;

/// Settings of a [`crate::Network`]. [`NetConfig::new`] has the defaults.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// UDP address to listen on, and to dial from.
    pub listen: SocketAddr,
    /// Address (`host:port`) that other hosts shall use. `None`: what the directory says already,
    /// else the address listened on.
    pub advertise: Option<String>,
    /// Addresses (`host:port`) to dial hosts at, by name, in place of those in the directory.
    pub addresses: BTreeMap<String, String>,
    /// What this host does in the datastore.
    pub roles: Vec<HostRole>,
    /// This host's store.
    pub store: StoreId,
    /// Version of the software, told to peers for people to read.
    pub software: String,
    /// Interval of the beats.
    pub beat: Duration,
    /// A connection on which nothing arrives for this long is dead.
    pub idle_timeout: Duration,
    /// Limit on TLS and hello together.
    pub handshake_timeout: Duration,
    /// Limit on [`crate::Network::request`].
    pub request_timeout: Duration,
    /// Longest pause between two attempts to reach a host.
    pub redial_max: Duration,
    /// Image streams that one peer may have open towards this host.
    pub streams_max: u32,
    /// Bytes of one stream that a peer may send ahead of the handler; on loopback a quarter.
    pub stream_window_bytes: u32,
    /// Bytes of all streams together that a peer may send ahead of the handlers.
    pub receive_window_bytes: u32,
    /// Bytes that may be on their way to one peer, written and not yet acknowledged; more where the way is long,
    /// except on loopback. Whatever is ahead of a flush in this window is part of its latency.
    pub send_window_bytes: u32,
    /// Tuning of congestion control and packet sizes.
    pub tuning: Tuning,
}

/// What `examples/quic_throughput` compares.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// Congestion controller.
    pub congestion: Congestion,
    /// Its first window, in bytes.
    pub initial_window_bytes: u64,
    /// Largest UDP payload tried on loopback; elsewhere it is 6500.
    pub loopback_mtu_max: u16,
    /// Packets that the receiver may leave unacknowledged (at most 4 on loopback, where they are
    /// large); 0 leaves quinn's default.
    pub ack_every: u32,
    /// Use the kernel's segmentation offload, where packets are not too large for it.
    pub gso: bool,
    /// Prefer AES-128-GCM over AES-256-GCM.
    pub aes128: bool,
}

/// Congestion controllers of quinn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Congestion {
    /// RFC 8312.
    Cubic,
    /// RFC 6582.
    NewReno,
    /// BBR version 1.
    Bbr,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            congestion: Congestion::Cubic,
            initial_window_bytes: 1 << 20,
            loopback_mtu_max: 65_507,
            ack_every: 10,
            gso: true,
            aes128: true,
        }
    }
}

impl NetConfig {
    /// The defaults, for a host that listens on `listen` and has the store `store`.
    #[must_use]
    pub fn new(listen: SocketAddr, store: StoreId) -> Self {
        Self {
            listen,
            advertise: None,
            addresses: BTreeMap::new(),
            roles: vec![HostRole::Replica],
            store,
            software: env!("CARGO_PKG_VERSION").to_owned(),
            beat: Duration::from_millis(250),
            idle_timeout: Duration::from_secs(2),
            handshake_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
            redial_max: Duration::from_secs(2),
            streams_max: 4096,
            stream_window_bytes: 16 << 20,
            receive_window_bytes: 64 << 20,
            send_window_bytes: 2 << 20,
            tuning: Tuning::default(),
        }
    }
}

/// Receives the image streams that peers open.
///
/// All streams of a peer share one receive window: a handler keeps calling
/// [`FrameReader::next`], or drops the reader, which tells the peer to stop; it does not keep a
/// reader without reading.
pub trait StreamHandler: Send + Sync + 'static {
    /// A peer has opened a stream about `image`. Called inside the network's runtime; returns at
    /// once (spawns a task for the reading).
    fn on_stream(&self, from: HostId, session: u64, image: ImageId, frames: FrameReader);
}

/// The answer to a request: a body, or a refusal in words (at most 4096 bytes).
pub type Answer = Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send>>;

/// Receives the requests of peers.
pub trait RequestHandler: Send + Sync + 'static {
    /// Answers `body` (at most [`crate::frame::REQUEST_BYTES_MAX`]). At most 64 requests of one peer
    /// run at a time, and each is dropped after the request timeout.
    fn on_request(&self, from: HostId, body: Bytes) -> Answer;
}

/// Where incoming streams and requests go.
#[derive(Clone)]
pub struct Handlers {
    /// For image streams.
    pub streams: Arc<dyn StreamHandler>,
    /// For requests.
    pub requests: Arc<dyn RequestHandler>,
}

/// What a network tells its owner. Per host, `PeerUp` and `PeerDown` alternate, and both name the
/// session, a number that grows with every connection of this run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetEvent {
    /// The pair's connection is in use.
    PeerUp {
        /// The peer.
        host: HostId,
        /// Its store.
        store: StoreId,
        /// This connection.
        session: u64,
    },
    /// It is gone; its streams fail or have failed.
    PeerDown {
        /// The peer.
        host: HostId,
        /// The connection that ended.
        session: u64,
    },
    /// A beat arrived. Dropped when the channel is full.
    Beat {
        /// The peer.
        host: HostId,
        /// The connection.
        session: u64,
        /// Age of the newest of our own beats that the peer had heard when it sent this one: contact
        /// in *both* directions is at least this fresh. `None` before the first echo.
        echo_age_ms: Option<u64>,
    },
}
