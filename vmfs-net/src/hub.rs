//! Which connection is a pair's: one task that owns the answer, and the tasks that feed it.
//!
//! Both hosts of a pair dial while they are not connected, so two connections may come up at once.
//! The host with the lower HostId decides: it takes the first that is complete, says so on it with an
//! `Accept` frame, and closes any other; the higher one uses what was accepted. So both always agree,
//! and nothing flaps. The lower one replaces its connection when the peer has been restarted (another
//! run number in its hello), or comes back with a new one although the old one has been in use for
//! longer than any handshake takes: then the peer has lost it.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Incoming};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use vmfs_common::HostId;

use crate::config::NetEvent;
use crate::directory::HostEntry;
use crate::enrol;
use crate::error::{NetError, Refusal};
use crate::frame::Kind;
use crate::network::Shared;
use crate::pki::{self, CertInfo, PkiError};
use crate::session::{self, Candidate, REQUESTS_MAX, Session, too_slow};
use crate::{tls, transport};

/// Connections being set up by others at a time.
const INCOMING_MAX: usize = 64;
/// Above this many, a stranger first has to show that its address is its own.
const INCOMING_EASY: usize = 16;
/// Of those, how many may come from one address.
const INCOMING_PER_ADDRESS: usize = 32;
/// A peer may change its connection this often at once, and then once in [`CHANGE_PACE`]: every change
/// is work for every image.
const CHANGES_BURST: u32 = 16;
const CHANGE_PACE: Duration = Duration::from_secs(1);
/// First pause after a failed attempt.
const REDIAL_MIN: Duration = Duration::from_millis(50);
/// A connection that lasted this long was a good one: the next attempt does not wait.
const LASTING: Duration = Duration::from_secs(2);

/// What the hub is told.
pub(crate) enum HubMsg {
    /// A connection is ready (for the higher host: and accepted).
    Offer(Box<Candidate>),
    /// A session is over.
    Ended {
        /// Its peer.
        host: HostId,
        /// Which one.
        session: u64,
        /// Why.
        error: NetError,
    },
}

/// Starts the hub and the accept loop.
pub(crate) fn start(shared: &Arc<Shared>, queue: mpsc::Receiver<HubMsg>) {
    let hub =
        Hub { shared: Arc::clone(shared), dialled: HashSet::new(), sessions: 0, changes: HashMap::new() };
    tokio::spawn(hub.run(queue));
    tokio::spawn(accept_loop(Arc::clone(shared)));
}

struct Hub {
    shared: Arc<Shared>,
    /// Hosts that have a dial loop.
    dialled: HashSet<HostId>,
    /// Number of the last session.
    sessions: u64,
    /// Changes of connection that each host has left, and since when.
    changes: HashMap<HostId, (u32, Instant)>,
}

impl Hub {
    async fn run(mut self, mut queue: mpsc::Receiver<HubMsg>) {
        let shared = Arc::clone(&self.shared);
        let mut news = shared.directory.watch();
        self.follow_directory();
        loop {
            tokio::select! {
                () = shared.stopped() => break,
                _ = news.changed() => self.follow_directory(),
                msg = queue.recv() => match msg {
                    Some(HubMsg::Offer(candidate)) => self.offer(*candidate).await,
                    Some(HubMsg::Ended { host, session, error }) => self.ended(host, session, &error).await,
                    None => break,
                },
            }
        }
        let all: Vec<_> = shared.sessions.write().drain().collect();
        for (host, session) in all {
            self.tell(NetEvent::PeerDown { host, session: session.id }).await;
        }
    }

    /// A dial loop for every host, no connection for removed ones.
    fn follow_directory(&mut self) {
        let shared = &self.shared;
        for entry in shared.directory.hosts() {
            if entry.host != shared.identity.host() && self.dialled.insert(entry.host) {
                tokio::spawn(dial_loop(Arc::clone(shared), entry.host));
            }
        }
        if shared.directory.is_removed(shared.identity.host()) {
            tracing::error!("this host was removed from its datastore");
        }
        for session in shared.sessions.read().values() {
            if shared.directory.is_removed(session.host) {
                session.connection.close(Refusal::Removed.code().into(), b"removed from the datastore");
            }
        }
    }

    async fn offer(&mut self, candidate: Candidate) {
        let shared = Arc::clone(&self.shared);
        let peer = candidate.peer.host;
        if shared.directory.is_removed(peer) {
            candidate.connection.close(Refusal::Removed.code().into(), b"removed from the datastore");
            return;
        }
        if let Some(old) = shared.session(peer) {
            let fresh = old.since.elapsed() < shared.cfg.handshake_timeout;
            let alive = old.connection.close_reason().is_none();
            if shared.decides_for(peer) && alive && fresh && old.run == candidate.hello.run {
                let code = Refusal::Duplicate.code().into();
                candidate.connection.close(code, b"another connection is in use");
                return;
            }
        }
        if !self.may_change(peer) {
            candidate.connection.close(Refusal::Busy.code().into(), b"too many new connections");
            let detail = "too many new connections".to_owned();
            let e = NetError::Refused { peer: candidate.peer.name.clone(), refusal: Refusal::Busy, detail };
            shared.note(Some(peer), &candidate.peer.name, &e);
            return;
        }
        if let Some(old) = shared.session(peer) {
            old.connection.close(Refusal::Replaced.code().into(), b"a newer connection is in use");
            self.drop_session(&old).await;
        }
        self.adopt(candidate).await;
    }

    /// Takes one of the changes of connection that `peer` has left.
    fn may_change(&mut self, peer: HostId) -> bool {
        let now = Instant::now();
        let (left, since) = self.changes.entry(peer).or_insert((CHANGES_BURST, now));
        let earned = u32::try_from(now.duration_since(*since).as_secs() / CHANGE_PACE.as_secs());
        let earned = earned.unwrap_or(CHANGES_BURST);
        if earned > 0 {
            *left = left.saturating_add(earned).min(CHANGES_BURST);
            *since = now;
        }
        let may = *left > 0;
        *left = left.saturating_sub(1);
        may
    }

    async fn adopt(&mut self, candidate: Candidate) {
        let shared = Arc::clone(&self.shared);
        let Candidate {
            connection,
            peer: CertInfo { host: peer, name, public_key, .. },
            hello,
            send,
            recv,
            share,
            partial,
        } = candidate;
        self.sessions += 1;
        let session = Arc::new(Session {
            id: self.sessions,
            host: peer,
            name,
            public_key,
            store: hello.store,
            run: hello.run,
            software: hello.software,
            connection,
            share,
            partial,
            since: Instant::now(),
            last_beat: parking_lot::Mutex::new(None),
        });
        transport::admit_peer(&shared.cfg, &session.connection, REQUESTS_MAX);
        shared.forget_errors(peer, &session.name);
        shared.sessions.write().insert(peer, Arc::clone(&session));
        shared.sessions_changed.send_modify(|n| *n += 1);
        tracing::info!("connected to {} at {}", session.name, session.connection.remote_address());
        self.tell(NetEvent::PeerUp { host: peer, store: session.store, session: session.id }).await;
        tokio::spawn(async move {
            let error = session::run(Arc::clone(&shared), Arc::clone(&session), send, recv).await;
            let ended = HubMsg::Ended { host: session.host, session: session.id, error };
            // The hub is gone only when the network stops.
            let _ = shared.hub.send(ended).await;
        });
    }

    async fn ended(&mut self, host: HostId, session: u64, error: &NetError) {
        let Some(current) = self.shared.session(host).filter(|s| s.id == session) else {
            return;
        };
        self.shared.note(Some(host), &current.name, error);
        self.drop_session(&current).await;
    }

    async fn drop_session(&self, session: &Session) {
        self.shared.sessions.write().remove(&session.host);
        self.shared.sessions_changed.send_modify(|n| *n += 1);
        self.tell(NetEvent::PeerDown { host: session.host, session: session.id }).await;
    }

    /// Waits while the channel is full, for these events must not be lost; but not while the network
    /// stops, when nobody may be reading any more.
    async fn tell(&self, event: NetEvent) {
        tokio::select! {
            biased;
            // A closed channel means that nobody wants to know.
            _ = self.shared.events.send(event) => {}
            () = self.shared.stopped() => {}
        }
    }
}

/// Hands a greeted connection to the hub: at once where this host decides, after the `Accept` where
/// the peer does.
async fn settle(shared: &Shared, mut candidate: Candidate) -> Result<(), NetError> {
    if !shared.decides_for(candidate.peer.host) {
        candidate.recv.expect(Kind::Accept).await?;
    }
    shared.hub.send(HubMsg::Offer(Box::new(candidate))).await.map_err(|_| NetError::Shutdown)
}

/// Keeps one host connected until it is removed or the network stops.
async fn dial_loop(shared: Arc<Shared>, host: HostId) {
    let mut pause = REDIAL_MIN;
    let mut changed = shared.sessions_changed.subscribe();
    loop {
        let since = Instant::now();
        tokio::select! {
            () = shared.stopped() => return,
            // An error would mean that the sender, which is in `shared`, is gone.
            _ = changed.wait_for(|_| shared.session(host).is_none()) => {}
        }
        if since.elapsed() > LASTING {
            pause = REDIAL_MIN;
        }
        let Some(entry) = shared.directory.get(host) else {
            return;
        };
        tokio::select! {
            () = shared.stopped() => return,
            result = dial(&shared, &entry) => if let Err(e) = result {
                shared.note(Some(host), &entry.name, &e);
            },
        }
        // Also after success: the hub may prefer another connection, and one that breaks at once
        // is no better than none.
        tokio::select! {
            () = shared.stopped() => return,
            () = sleep(jitter(pause)) => {}
        }
        pause = (pause * 2).min(shared.cfg.redial_max);
    }
}

/// Between half and the whole of `pause`, so that hosts do not try in step.
fn jitter(pause: Duration) -> Duration {
    let random = pki::random::<1>().map_or(128, |[b]| b);
    pause / 2 + pause * u32::from(random) / 512
}

/// One attempt at every address of a host.
async fn dial(shared: &Shared, entry: &HostEntry) -> Result<(), NetError> {
    let v6 = shared.transport.endpoint.local_addr().is_ok_and(|a| a.is_ipv6());
    let mut result = Err(unresolved(entry, "no address that this host's socket could use"));
    for address in resolve(shared.cfg.addresses.get(&entry.name).unwrap_or(&entry.address)).await? {
        if address.is_ipv6() && !v6 {
            continue;
        }
        result = dial_address(shared, entry, address).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

fn unresolved(entry: &HostEntry, why: &str) -> NetError {
    NetError::Resolve { address: entry.address.clone(), why: why.to_owned() }
}

/// Looks an address up, now.
pub(crate) async fn resolve(address: &str) -> Result<Vec<SocketAddr>, NetError> {
    let found = timeout(Duration::from_secs(5), tokio::net::lookup_host(address)).await;
    let err = |why: String| NetError::Resolve { address: address.to_owned(), why };
    let found = found.map_err(|_| err("no answer from the resolver".into()))?;
    Ok(found.map_err(|e| err(e.to_string()))?.take(8).collect())
}

async fn dial_address(shared: &Shared, entry: &HostEntry, address: SocketAddr) -> Result<(), NetError> {
    let limit = shared.cfg.handshake_timeout;
    let attempt = async {
        let config = shared.transport.client_for(address);
        let name = pki::dns_name(entry.host);
        let connecting = shared.transport.endpoint.connect_with(config, address, &name);
        let connecting = connecting.map_err(|e| unresolved(entry, &e.to_string()))?;
        let connection = connecting
            .await
            .map_err(|e| NetError::from_connection(&format!("{} at {address}", entry.name), &e))?;
        set_up(shared, connection, true).await
    };
    timeout(limit, attempt).await.map_err(|_| too_slow(limit))?
}

/// Everything between TLS and the hub. Closes the connection when it comes to nothing.
async fn set_up(shared: &Shared, connection: Connection, dialled: bool) -> Result<(), NetError> {
    let result = async {
        let info = identify(shared, &connection)?;
        let candidate = session::greet(shared, connection.clone(), dialled, info).await?;
        settle(shared, candidate).await
    }
    .await;
    if let Err(e) = &result {
        let refusal = e.blame().unwrap_or(Refusal::Timeout);
        connection.close(refusal.code().into(), e.to_string().as_bytes());
    }
    result
}

/// Who is at the other end, by its certificate.
fn identify(shared: &Shared, connection: &Connection) -> Result<CertInfo, NetError> {
    let peer = connection.remote_address().to_string();
    let refused = |refusal, detail: String| NetError::Refused { peer: peer.clone(), refusal, detail };
    let chain =
        connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let certificate = chain.as_ref().and_then(|c| c.first());
    let certificate = certificate.ok_or_else(|| refused(Refusal::Untrusted, "no certificate".into()))?;
    let place = format!("certificate of {peer}");
    let now_s = i64::try_from(pki::unix_ms() / 1000).unwrap_or(i64::MAX);
    let info = shared.identity.trust().check_host(certificate, now_s, &place).map_err(|e| {
        let refusal = match e {
            PkiError::Expired { .. } | PkiError::NotYetValid { .. } => Refusal::Expired,
            PkiError::OtherDatastore { .. } => Refusal::OtherDatastore,
            _ => Refusal::Untrusted,
        };
        refused(refusal, e.to_string())
    })?;
    if shared.directory.is_removed(info.host) {
        return Err(refused(Refusal::Removed, format!("{} was removed from the datastore", info.name)));
    }
    if info.host == shared.identity.host() {
        return Err(refused(Refusal::SameIdentity, "it has this host's own identity".into()));
    }
    Ok(info)
}

async fn accept_loop(shared: Arc<Shared>) {
    let slots = Arc::new(Semaphore::new(INCOMING_MAX));
    let by_address: Arc<Mutex<HashMap<IpAddr, usize>>> = Arc::default();
    while let Some(incoming) = shared.transport.endpoint.accept().await {
        let address = incoming.remote_address().ip();
        let crowded = by_address.lock().get(&address).is_some_and(|n| *n >= INCOMING_PER_ADDRESS);
        let slot = Arc::clone(&slots).try_acquire_owned();
        let (Ok(slot), false) = (slot, crowded) else {
            incoming.refuse();
            continue;
        };
        let busy = slots.available_permits() < INCOMING_MAX - INCOMING_EASY;
        if busy && !incoming.remote_address_validated() && incoming.may_retry() {
            // The error hands back what cannot be retried, which `may_retry` has excluded.
            let _ = incoming.retry();
            continue;
        }
        let (shared, by_address) = (Arc::clone(&shared), Arc::clone(&by_address));
        *by_address.lock().entry(address).or_default() += 1;
        tokio::spawn(async move {
            let peer = address.to_string();
            let limit = shared.cfg.handshake_timeout;
            let result = timeout(limit, accept(&shared, incoming)).await;
            if let Err(e) = result.unwrap_or_else(|_| Err(too_slow(limit))) {
                shared.note(None, &peer, &e);
            }
            let mut by_address = by_address.lock();
            if let Some(n) = by_address.get_mut(&address) {
                *n -= 1;
                if *n == 0 {
                    by_address.remove(&address);
                }
            }
            drop(by_address);
            drop(slot);
        });
    }
}

async fn accept(shared: &Arc<Shared>, incoming: Incoming) -> Result<(), NetError> {
    let peer = incoming.remote_address().to_string();
    let lost = |e| NetError::from_connection(&peer, &e);
    let config = shared.transport.server_for(incoming.remote_address());
    let connection = incoming.accept_with(config).map_err(lost)?.await.map_err(lost)?;
    let alpn = connection
        .handshake_data()
        .and_then(|any| any.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol);
    if alpn.as_deref() == Some(tls::ALPN_ENROL) {
        enrol::serve(shared, connection).await
    } else {
        set_up(shared, connection, false).await
    }
}
