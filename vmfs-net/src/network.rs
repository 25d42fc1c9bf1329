//! [`Network`]: the crate's front door, and the state that its tasks share.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use vmfs_common::identity::PublicKey;
use vmfs_common::{HostId, ImageId, StoreId};

use crate::config::{Handlers, NetConfig, NetEvent};
use crate::directory::{Directory, HostEntry, check_address};
use crate::error::{NetError, Refusal};
use crate::frame::{Kind, REQUEST_BYTES_MAX};
use crate::hello::{Hello, VERSIONS};
use crate::hub::{self, HubMsg};
use crate::pki::invite::Invitation;
use crate::pki::{CaKey, HostIdentity, PkiError, invite, random};
use crate::session::{self, Session, too_slow};
use crate::stream::StreamSender;
use crate::transport::Transport;

/// Most (peer, reason) pairs that are remembered for logging once.
const LOGGED_MAX: usize = 1024;
/// Connections and errors waiting for the hub.
const HUB_QUEUE: usize = 64;

/// How often each reason refused a connection, in either direction, since the start.
pub type Counters = BTreeMap<&'static str, u64>;

/// What the network's tasks share.
pub(crate) struct Shared {
    pub(crate) cfg: NetConfig,
    pub(crate) identity: HostIdentity,
    pub(crate) directory: Directory,
    pub(crate) transport: Transport,
    pub(crate) handlers: Handlers,
    pub(crate) events: mpsc::Sender<NetEvent>,
    pub(crate) hub: mpsc::Sender<HubMsg>,
    /// Written by the hub alone.
    pub(crate) sessions: RwLock<HashMap<HostId, Arc<Session>>>,
    /// Counts changes of `sessions`.
    pub(crate) sessions_changed: watch::Sender<u64>,
    pub(crate) stop: watch::Sender<bool>,
    /// Serializes enrolments.
    pub(crate) enrolling: Mutex<()>,
    /// Random number of this run of the daemon.
    run: u64,
    counters: Mutex<Counters>,
    logged: Mutex<HashSet<(String, &'static str)>>,
    last_error: Mutex<HashMap<HostId, String>>,
}

impl Shared {
    pub(crate) fn hello(&self) -> Hello {
        Hello {
            version_min: VERSIONS.0,
            version_max: VERSIONS.1,
            datastore: self.identity.datastore(),
            store: self.cfg.store,
            run: self.run,
            software: self.cfg.software.clone(),
        }
    }

    /// True when this host, the lower of the two, decides which connection is the pair's.
    pub(crate) fn decides_for(&self, peer: HostId) -> bool {
        self.identity.host() < peer
    }

    pub(crate) fn session(&self, host: HostId) -> Option<Arc<Session>> {
        self.sessions.read().get(&host).cloned()
    }

    /// Resolves when the network stops.
    pub(crate) async fn stopped(&self) {
        let mut stop = self.stop.subscribe();
        // An error would mean that the sender, which is in `self`, is gone.
        let _ = stop.wait_for(|s| *s).await;
    }

    /// Records that no connection with `peer` came about or that it ended: counts refusals, logs
    /// each kind once per peer until [`Self::forget_errors`].
    pub(crate) fn note(&self, host: Option<HostId>, peer: &str, error: &NetError) {
        if let Some(host) = host {
            self.last_error.lock().insert(host, error.to_string());
        }
        let refusal = error.blame();
        if refusal.is_some_and(Refusal::is_routine) {
            tracing::debug!("{peer}: {error}");
            return;
        }
        let kind = refusal.map_or("unreachable", Refusal::name);
        if refusal.is_some() {
            *self.counters.lock().entry(kind).or_default() += 1;
        }
        let mut logged = self.logged.lock();
        if logged.len() < LOGGED_MAX && logged.insert((peer.to_owned(), kind)) {
            drop(logged);
            tracing::warn!("{peer}: {error}");
        } else {
            tracing::debug!("{peer}: {error}");
        }
    }

    /// Records a refused enrolment: logged once for each address and the like, as anybody can have one.
    pub(crate) fn note_enrolment(&self, address: &str, error: &PkiError) {
        *self.counters.lock().entry("enrolment").or_default() += 1;
        let mut logged = self.logged.lock();
        if logged.len() < LOGGED_MAX && logged.insert((address.to_owned(), "enrolment")) {
            drop(logged);
            tracing::warn!("enrolment from {address} refused: {error}");
        } else {
            tracing::debug!("enrolment from {address} refused: {error}");
        }
    }

    /// The peer is there: the next error is news again.
    pub(crate) fn forget_errors(&self, host: HostId, peer: &str) {
        self.last_error.lock().remove(&host);
        self.logged.lock().retain(|(p, _)| p != peer);
    }
}

/// A peer's state, for status.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// The peer's entry.
    pub entry: HostEntry,
    /// Its connection, if there is one.
    pub connection: Option<ConnectionStatus>,
    /// Why there is none.
    pub last_error: Option<String>,
}

/// A connection's state, for status.
#[derive(Debug, Clone)]
pub struct ConnectionStatus {
    /// The session number.
    pub session: u64,
    /// The peer's store.
    pub store: StoreId,
    /// The peer's software version.
    pub software: String,
    /// Where the peer is now.
    pub address: SocketAddr,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// How long the connection has been in use.
    pub age: Duration,
    /// Time since the last beat.
    pub last_beat: Option<Duration>,
    /// Bytes of control messages and updates sent.
    pub sent_bytes: u64,
    /// Bytes of control messages and updates received.
    pub received_bytes: u64,
}

/// This host's place in the network. Clones are the same network; it runs until
/// [`Network::shutdown`].
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("host", &self.shared.identity.name()).finish_non_exhaustive()
    }
}

impl Network {
    /// Binds the socket, announces this host's address and roles, and starts to connect to every
    /// known host. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A socket that cannot be had, an address that other hosts could not use, a host directory that
    /// cannot be read or written.
    #[expect(clippy::unused_async, reason = "needs a runtime, and may come to wait for the directory")]
    pub async fn start(
        cfg: NetConfig,
        identity: HostIdentity,
        handlers: Handlers,
        events: mpsc::Sender<NetEvent>,
    ) -> Result<Self, NetError> {
        let directory = Directory::open(identity.dir(), identity.trust())?;
        let transport = Transport::open(&cfg, &identity)?;
        let bound = transport.endpoint.local_addr();
        let bound = bound.map_err(|source| NetError::Bind { address: cfg.listen, source })?;
        let address = advertised(&cfg, bound, directory.get(identity.host()))?;
        directory.announce(&identity, &address, &cfg.roles)?;
        let (hub, queue) = mpsc::channel(HUB_QUEUE);
        let shared = Arc::new(Shared {
            cfg,
            directory,
            transport,
            handlers,
            events,
            hub,
            sessions: RwLock::default(),
            sessions_changed: watch::Sender::new(0),
            stop: watch::Sender::new(false),
            enrolling: Mutex::default(),
            run: u64::from_le_bytes(random()?),
            counters: Mutex::default(),
            logged: Mutex::default(),
            last_error: Mutex::default(),
            identity,
        });
        hub::start(&shared, queue);
        Ok(Self { shared })
    }

    /// This host.
    #[must_use]
    pub fn local_host(&self) -> HostId {
        self.shared.identity.host()
    }

    /// This host's identity.
    #[must_use]
    pub fn identity(&self) -> &HostIdentity {
        &self.shared.identity
    }

    /// The UDP address that is listened on.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.shared.transport.endpoint.local_addr()
    }

    /// Who exists, this host included.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostEntry> {
        self.shared.directory.hosts()
    }

    /// The directory behind [`Self::hosts`].
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.shared.directory
    }

    /// Whether the pair's connection is in use now.
    #[must_use]
    pub fn is_connected(&self, host: HostId) -> bool {
        self.shared.session(host).is_some()
    }

    /// The number of the connection in use.
    #[must_use]
    pub fn session(&self, host: HostId) -> Option<u64> {
        self.shared.session(host).map(|s| s.id)
    }

    /// The key of a host that is connected or known. A peer's certificate proves it from the first moment;
    /// its entry in the directory may still be on its way.
    #[must_use]
    pub fn public_key(&self, host: HostId) -> Option<PublicKey> {
        let connected = self.shared.session(host).map(|s| s.public_key);
        connected.or_else(|| self.shared.directory.get(host).map(|e| e.public_key))
    }

    /// Every other host with the state of its connection.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        let errors = self.shared.last_error.lock().clone();
        let mut entries = self.hosts();
        entries.retain(|e| e.host != self.local_host());
        entries
            .into_iter()
            .map(|entry| PeerStatus {
                connection: self.shared.session(entry.host).map(|s| connection_status(&s)),
                last_error: errors.get(&entry.host).cloned(),
                entry,
            })
            .collect()
    }

    /// Refusals by reason, in either direction.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counters.lock().clone()
    }

    /// A stream about `image` towards `to`, on the connection in use. Nothing is sent before its
    /// first frame.
    ///
    /// # Errors
    /// [`NetError::NotConnected`].
    pub fn open_stream(&self, to: HostId, image: ImageId) -> Result<StreamSender, NetError> {
        let s = self.shared.session(to).ok_or(NetError::NotConnected(to))?;
        Ok(StreamSender::new(s.connection.clone(), Arc::clone(&s.share), to, s.id, image))
    }

    /// Asks `to` and waits for its answer, both at most [`REQUEST_BYTES_MAX`].
    ///
    /// # Errors
    /// [`NetError::NotConnected`], [`NetError::Declined`], [`NetError::Timeout`], a lost connection.
    pub async fn request(&self, to: HostId, body: Bytes) -> Result<Bytes, NetError> {
        if body.len() > REQUEST_BYTES_MAX {
            let (len_bytes, max_bytes) = (body.len(), REQUEST_BYTES_MAX);
            return Err(NetError::Oversize { kind: Kind::Request.name(), len_bytes, max_bytes });
        }
        let s = self.shared.session(to).ok_or(NetError::NotConnected(to))?;
        let limit = self.shared.cfg.request_timeout;
        timeout(limit, session::request(&s, &body)).await.map_err(|_| too_slow(limit))?
    }

    /// Makes an invitation for the host `name`, to be used at this daemon within `ttl`. Blocks on
    /// the disk.
    ///
    /// # Errors
    /// As [`invite::create`].
    pub fn invite(&self, name: &str, ttl: Duration) -> Result<Invitation, NetError> {
        let shared = &self.shared;
        let own = shared.directory.get(self.local_host()).ok_or(NetError::UnknownHost(self.local_host()))?;
        Ok(invite::create(&shared.identity, &shared.directory, name, &own.address, ttl)?)
    }

    /// Removes a host from the datastore for ever: its connections end, and every host that hears of
    /// it refuses new ones. Needs the CA's key on this host. Blocks on the disk.
    ///
    /// # Errors
    /// [`crate::PkiError::NoCaKey`], [`NetError::UnknownHost`], or what cannot be written.
    pub fn remove_host(&self, host: HostId) -> Result<(), NetError> {
        let ca = CaKey::load(self.shared.identity.dir())?;
        if host == self.local_host() {
            return Err(PkiError::OwnHost(host).into());
        }
        if self.shared.directory.get(host).is_none() {
            return Err(NetError::UnknownHost(host));
        }
        Ok(self.shared.directory.remove(&ca, host)?)
    }

    /// Ends every connection; peers learn of it at once. The socket goes with the last clone, stream
    /// and reader.
    pub async fn shutdown(&self) {
        self.shared.stop.send_replace(true);
        let endpoint = &self.shared.transport.endpoint;
        endpoint.close(Refusal::Shutdown.code().into(), b"the daemon stops");
        // A peer that does not answer the farewell is not worth waiting for.
        let _ = timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
    }
}

fn connection_status(s: &Session) -> ConnectionStatus {
    let last_beat: Option<Instant> = *s.last_beat.lock();
    ConnectionStatus {
        session: s.id,
        store: s.store,
        software: s.software.clone(),
        address: s.connection.remote_address(),
        rtt: s.connection.rtt(),
        age: s.since.elapsed(),
        last_beat: last_beat.map(|at| at.elapsed()),
        sent_bytes: s.share.traffic.sent_bytes.load(Ordering::Relaxed),
        received_bytes: s.share.traffic.received_bytes.load(Ordering::Relaxed),
    }
}

/// The address that other hosts are told: the configured one; else the one bound, if it means anything
/// elsewhere; else the one they know already.
fn advertised(cfg: &NetConfig, bound: SocketAddr, known: Option<HostEntry>) -> Result<String, NetError> {
    let known = known.map(|k| k.address);
    let address = match &cfg.advertise {
        Some(address) => address.clone(),
        // A name in the directory was chosen by the operator at the join and stays.
        None if bound.ip().is_unspecified()
            || known.as_ref().is_some_and(|k| k.parse::<SocketAddr>().is_err()) =>
        {
            known.unwrap_or_else(|| bound.to_string())
        }
        None => bound.to_string(),
    };
    check_address(&address).map_err(|why| NetError::Resolve { address: address.clone(), why })?;
    Ok(address)
}
