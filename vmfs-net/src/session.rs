//! One connection in use: its control stream, and the streams and requests that come in on it.
//!
//! The control stream is the dialler's first bidirectional stream. After the hellos, the lower
//! HostId's `Accept` says that this connection is the pair's; then both sides send beats (and host
//! entries when there is news) for as long as it lives.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use quinn::{Connection, RecvStream, SendStream};
use tokio::time::timeout;
use vmfs_common::identity::PublicKey;
use vmfs_common::{HostId, ImageId, StoreId};

use crate::config::NetEvent;
use crate::error::{NetError, Refusal};
use crate::frame::{self, Kind, PartialBudget, RawReader};
use crate::hello::Hello;
use crate::network::Shared;
use crate::pki::CertInfo;
use crate::stream::{Fault, FrameReader, SendShare};
use crate::transport;
use crate::window::SendWindow;

/// Requests of one peer that run at a time.
pub(crate) const REQUESTS_MAX: u32 = 64;
/// Above the streams of images (0), so that a beat never queues behind data.
const CONTROL_PRIORITY: i32 = 10;
/// Beats whose time of sending is remembered; older echoes count as none.
const BEATS_KEPT: usize = 256;
/// Control frames of one peer are read at most this often, after as many more at once: an honest one
/// sends four beats a second, and hosts when there is news.
const CONTROL_PACE: Duration = Duration::from_millis(20);
const CONTROL_BURST: u32 = 50;
/// A host list costs as much as this many beats: signatures are checked.
const HOSTS_COST: u32 = 5;

/// A connection whose two ends have greeted each other.
pub(crate) struct Candidate {
    pub(crate) connection: Connection,
    pub(crate) peer: CertInfo,
    pub(crate) hello: Hello,
    pub(crate) send: SendStream,
    pub(crate) recv: RawReader,
    pub(crate) share: Arc<SendShare>,
    pub(crate) partial: Arc<PartialBudget>,
}

/// The connection of a pair of hosts that is in use.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) host: HostId,
    pub(crate) name: String,
    /// Its certificate's.
    pub(crate) public_key: PublicKey,
    pub(crate) store: StoreId,
    pub(crate) run: u64,
    pub(crate) software: String,
    pub(crate) connection: Connection,
    pub(crate) share: Arc<SendShare>,
    pub(crate) partial: Arc<PartialBudget>,
    pub(crate) since: Instant,
    pub(crate) last_beat: parking_lot::Mutex<Option<Instant>>,
}

/// Greets the other end of a fresh connection: `dialled` says who opens the control stream.
pub(crate) async fn greet(
    shared: &Shared,
    connection: Connection,
    dialled: bool,
    peer: CertInfo,
) -> Result<Candidate, NetError> {
    let lost = |e| NetError::from_connection(&peer.name, &e);
    let partial = Arc::new(PartialBudget::default());
    let (mut send, recv): (SendStream, RecvStream) = if dialled {
        connection.open_bi().await.map_err(lost)?
    } else {
        connection.accept_bi().await.map_err(lost)?
    };
    let mut recv = RawReader::new(recv, Arc::clone(&partial));
    // Fails only when the stream is closed, which the next call reports.
    let _ = send.set_priority(CONTROL_PRIORITY);
    let ours = shared.hello();
    let frame = frame::encode(Kind::Hello, &ours.encode())?;
    if dialled {
        send.write_chunk(frame.clone()).await.map_err(NetError::from_write)?;
    }
    let hello = Hello::decode(recv.expect(Kind::Hello).await?)?;
    hello.agree(&ours, &peer.name)?;
    if !dialled {
        send.write_chunk(frame).await.map_err(NetError::from_write)?;
    }
    let share = Arc::new(SendShare::new());
    Ok(Candidate { connection, peer, hello, send, recv, share, partial })
}

/// Runs a session until its connection ends; says why it did.
pub(crate) async fn run(
    shared: Arc<Shared>,
    session: Arc<Session>,
    mut send: SendStream,
    recv: RawReader,
) -> NetError {
    let beats = Beats::default();
    let write = async {
        if shared.decides_for(session.host) {
            accept(&mut send).await?;
        }
        write_control(&shared, &session.connection, &beats, send).await
    };
    let result = tokio::select! {
        e = write => e,
        e = read_control(&shared, &session, &beats, recv) => e,
        e = accept_streams(&shared, &session) => e,
        e = accept_requests(&shared, &session) => e,
    };
    let error = result.err().unwrap_or_else(|| NetError::Lost("the control stream ended".into()));
    let error = match session.share.take_fault() {
        Some(Fault { refusal, detail }) => NetError::Refused { peer: session.name.clone(), refusal, detail },
        None => error,
    };
    let refusal = error.blame().unwrap_or(Refusal::Shutdown);
    session.connection.close(refusal.code().into(), error.to_string().as_bytes());
    error
}

/// The beats of a session: body `u64 LE own number ‖ u64 LE highest number heard from the other`.
#[derive(Debug, Default)]
struct Beats(parking_lot::Mutex<BeatState>);

#[derive(Debug, Default)]
struct BeatState {
    sent: u64,
    sent_at: VecDeque<(u64, Instant)>,
    heard: u64,
    echoed: Option<Instant>,
}

impl Beats {
    fn next(&self) -> Bytes {
        let mut s = self.0.lock();
        s.sent += 1;
        if s.sent_at.len() == BEATS_KEPT {
            s.sent_at.pop_front();
        }
        let sent = s.sent;
        s.sent_at.push_back((sent, Instant::now()));
        Bytes::from([s.sent.to_le_bytes(), s.heard.to_le_bytes()].concat())
    }

    /// Takes a beat of the peer's; gives the age of our newest beat that it has heard.
    fn hear(&self, mut body: Bytes) -> Result<Option<u64>, NetError> {
        if body.len() != 16 {
            return Err(NetError::BadFrame(format!("a beat of {} bytes", body.len())));
        }
        let (number, echo) = (body.get_u64_le(), body.get_u64_le());
        let mut s = self.0.lock();
        if number <= s.heard || echo > s.sent {
            return Err(NetError::BadFrame("a beat out of order".into()));
        }
        s.heard = number;
        while s.sent_at.front().is_some_and(|(n, _)| *n <= echo) {
            s.echoed = s.sent_at.pop_front().map(|(_, at)| at);
        }
        Ok(s.echoed.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)))
    }
}

/// Keeps a peer that says too much from having the others' beats lost, or this host's time: its
/// control stream is read more slowly, which delays nobody else.
#[derive(Debug)]
struct Pace {
    tokens: u32,
    since: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        Self { tokens: CONTROL_BURST, since: Instant::now() }
    }
}

impl Pace {
    async fn wait(&mut self, cost: u32) {
        loop {
            let earned = self.since.elapsed().as_nanos() / CONTROL_PACE.as_nanos();
            let earned = u32::try_from(earned).unwrap_or(CONTROL_BURST).min(CONTROL_BURST);
            if earned > 0 {
                self.tokens = (self.tokens + earned).min(CONTROL_BURST);
                self.since = Instant::now();
            }
            if self.tokens >= cost {
                self.tokens -= cost;
                return;
            }
            tokio::time::sleep(CONTROL_PACE).await;
        }
    }
}

/// Tells the higher HostId that this connection is the pair's.
async fn accept(send: &mut SendStream) -> Result<(), NetError> {
    let frame = frame::encode(Kind::Accept, &[])?;
    send.write_chunk(frame).await.map_err(NetError::from_write)
}

async fn write_control(
    shared: &Shared,
    connection: &Connection,
    beats: &Beats,
    mut send: SendStream,
) -> Result<(), NetError> {
    let mut window = SendWindow::new(u64::from(shared.cfg.send_window_bytes), Instant::now());
    let mut news = shared.directory.watch();
    news.mark_changed();
    let mut tick = tokio::time::interval(shared.cfg.beat);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let frame = tokio::select! {
            _ = tick.tick() => frame::encode(Kind::Beat, &beats.next())?,
            _ = news.changed() => frame::encode(Kind::Hosts, &shared.directory.gossip_bytes())?,
        };
        send.write_chunk(frame).await.map_err(NetError::from_write)?;
        if !transport::is_near(connection.remote_address()) {
            let carried = connection.stats();
            let sent_bytes = carried.udp_tx.bytes.saturating_sub(carried.path.lost_bytes);
            if let Some(bytes) = window.measure(Instant::now(), connection.rtt(), sent_bytes) {
                tracing::debug!("{bytes} bytes may be on their way to {}", connection.remote_address());
                connection.set_send_window(bytes);
            }
        }
    }
}

async fn read_control(
    shared: &Arc<Shared>,
    session: &Session,
    beats: &Beats,
    mut recv: RawReader,
) -> Result<(), NetError> {
    let (host, id) = (session.host, session.id);
    let mut pace = Pace::default();
    while let Some((kind, body)) = recv.next().await? {
        pace.wait(if kind == Kind::Hosts { HOSTS_COST } else { 1 }).await;
        match kind {
            Kind::Beat => {
                let echo_age_ms = beats.hear(body)?;
                *session.last_beat.lock() = Some(Instant::now());
                // A full channel means that its owner is behind; the next beat is soon.
                let _ = shared.events.try_send(NetEvent::Beat { host, session: id, echo_age_ms });
            }
            Kind::Hosts => {
                let gossip =
                    serde_json::from_slice(&body).map_err(|e| NetError::BadFrame(format!("hosts: {e}")))?;
                let (shared, from) = (Arc::clone(shared), session.name.clone());
                let merge = move || shared.directory.merge(gossip, &from);
                match tokio::task::spawn_blocking(merge).await {
                    Ok(Ok(problems)) => problems.iter().for_each(|p| tracing::warn!("{p}")),
                    Ok(Err(e)) => tracing::error!("host directory: {e}"),
                    Err(e) => tracing::error!("host directory: {e}"),
                }
            }
            other => {
                return Err(NetError::BadFrame(format!("{} on the control stream", other.name())));
            }
        }
    }
    Err(NetError::Lost("the peer ended the control stream".into()))
}

async fn accept_streams(shared: &Arc<Shared>, session: &Arc<Session>) -> Result<(), NetError> {
    loop {
        let stream = session.connection.accept_uni().await;
        let stream = stream.map_err(|e| NetError::from_connection(&session.name, &e))?;
        let (shared, session) = (Arc::clone(shared), Arc::clone(session));
        tokio::spawn(async move {
            let mut reader = RawReader::new(stream, Arc::clone(&session.partial));
            match open_image(&mut reader, shared.cfg.handshake_timeout).await {
                Ok(image) => {
                    let (connection, share) = (session.connection.clone(), Arc::clone(&session.share));
                    let frames = FrameReader::new(reader, connection, share);
                    shared.handlers.streams.on_stream(session.host, session.id, image, frames);
                }
                Err(e) => session.share.fault(&session.connection, &e),
            }
        });
    }
}

async fn open_image(reader: &mut RawReader, limit: Duration) -> Result<ImageId, NetError> {
    let body = timeout(limit, reader.expect(Kind::OpenImage)).await.map_err(|_| too_slow(limit))??;
    let id = <[u8; 16]>::try_from(&body[..]);
    id.map(ImageId::from_bytes).map_err(|_| NetError::BadFrame("an image id of another length".into()))
}

pub(crate) fn too_slow(limit: Duration) -> NetError {
    NetError::Timeout(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))
}

async fn accept_requests(shared: &Arc<Shared>, session: &Arc<Session>) -> Result<(), NetError> {
    loop {
        let stream = session.connection.accept_bi().await;
        let (send, recv) = stream.map_err(|e| NetError::from_connection(&session.name, &e))?;
        let (shared, session) = (Arc::clone(shared), Arc::clone(session));
        tokio::spawn(async move {
            let reader = RawReader::new(recv, Arc::clone(&session.partial));
            let limit = shared.cfg.request_timeout;
            match timeout(limit, answer(&shared, session.host, send, reader)).await {
                Ok(Ok(())) => {}
                // Dropping the streams tells the peer; only bytes that are no request are a fault.
                Ok(Err(e)) => session.share.fault(&session.connection, &e),
                Err(_) => tracing::debug!("{}: a request took longer than {limit:?}", session.name),
            }
        });
    }
}

async fn answer(
    shared: &Shared,
    from: HostId,
    mut send: SendStream,
    mut recv: RawReader,
) -> Result<(), NetError> {
    let body = recv.expect(Kind::Request).await?;
    let answer = match shared.handlers.requests.on_request(from, body).await {
        Ok(body) => frame::encode(Kind::Response, &body),
        // Cut in the middle of a character at worst: the reader takes it lossily.
        Err(why) => frame::encode(Kind::Decline, &why.as_bytes()[..why.len().min(Kind::Decline.max_bytes())]),
    };
    let frame = match answer {
        Ok(frame) => frame,
        Err(e) => frame::encode(Kind::Decline, e.to_string().as_bytes())?,
    };
    send.write_chunk(frame).await.map_err(NetError::from_write)?;
    // An error only says that the peer has left.
    let _ = send.finish();
    Ok(())
}

/// The asking side of [`answer`].
pub(crate) async fn request(session: &Session, body: &[u8]) -> Result<Bytes, NetError> {
    let frame = frame::encode(Kind::Request, body)?;
    let stream = session.connection.open_bi().await;
    let (mut send, recv) = stream.map_err(|e| NetError::from_connection(&session.name, &e))?;
    send.write_chunk(frame).await.map_err(NetError::from_write)?;
    // An error only says that the peer has left, which the read reports better.
    let _ = send.finish();
    let mut recv = RawReader::new(recv, Arc::clone(&session.partial));
    match recv.next().await? {
        Some((Kind::Response, body)) => Ok(body),
        Some((Kind::Decline, why)) => Err(NetError::Declined(String::from_utf8_lossy(&why).into_owned())),
        Some((kind, _)) => Err(NetError::BadFrame(format!("{} for an answer", kind.name()))),
        None => Err(NetError::Lost("the peer gave no answer".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_echo_each_other_and_refuse_nonsense() {
        let (a, b) = (Beats::default(), Beats::default());
        assert_eq!(b.hear(a.next()).unwrap(), None);
        assert!(a.hear(b.next()).unwrap().is_some(), "b has heard a's first beat");
        assert!(a.hear(Bytes::from([9_u64.to_le_bytes(), 99_u64.to_le_bytes()].concat())).is_err());
        let again = b.next();
        assert!(a.hear(again.clone()).is_ok());
        assert!(a.hear(again).is_err(), "the same beat twice");
        assert!(a.hear(Bytes::from_static(b"short")).is_err());
    }
}
