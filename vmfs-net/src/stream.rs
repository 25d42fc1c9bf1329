//! Image streams: [`StreamSender`] on the side that opened one, [`FrameReader`] on the other.
//!
//! A stream is unidirectional, belongs to one image, and keeps its frames in order. Streams of
//! different images do not wait for each other, except for the bandwidth.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use quinn::{Connection, SendStream};
use tokio::sync::Semaphore;
use vmfs_common::{HostId, ImageId};

use crate::error::{NetError, Refusal};
use crate::frame::{self, Frame, Kind, RawReader, SEND_BYTES_MAX};

/// Frames longer than this are written under the connection's permits.
const LARGE_BYTES: usize = 16 << 10;

/// Bytes that went through a connection's streams, for status.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
}

/// Why a connection was closed because of its peer.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) refusal: Refusal,
    pub(crate) detail: String,
}

/// What the streams of one connection share.
#[derive(Debug)]
pub(crate) struct SendShare {
    /// One permit per KiB of [`SEND_BYTES_MAX`].
    permits: Semaphore,
    pub(crate) traffic: Traffic,
    /// What the peer did wrong on one of the streams.
    fault: Mutex<Option<Fault>>,
}

impl SendShare {
    pub(crate) fn new() -> Self {
        let permits = Semaphore::new(SEND_BYTES_MAX >> 10);
        Self { permits, traffic: Traffic::default(), fault: Mutex::new(None) }
    }

    /// Closes the connection when the peer is to blame for `error`.
    pub(crate) fn fault(&self, connection: &Connection, error: &NetError) {
        let Some(refusal) = error.blame() else { return };
        // After the connection has ended it is its end that is told here, which is nobody's fault.
        if connection.close_reason().is_some() {
            return;
        }
        let detail = error.to_string();
        connection.close(refusal.code().into(), detail.as_bytes());
        self.fault.lock().get_or_insert(Fault { refusal, detail });
    }

    /// The fault that ended the connection, if one did.
    pub(crate) fn take_fault(&self) -> Option<Fault> {
        self.fault.lock().take()
    }
}

/// The sending side of an image stream. Opened lazily with the first frame. Dropping it finishes the
/// stream after the last whole frame; a send that fails or is cancelled half-way resets it.
#[derive(Debug)]
pub struct StreamSender {
    connection: Connection,
    share: Arc<SendShare>,
    to: HostId,
    session: u64,
    image: ImageId,
    stream: Option<SendStream>,
    /// True from the first byte of a frame to its last.
    inside_frame: bool,
}

impl StreamSender {
    pub(crate) const fn new(
        connection: Connection,
        share: Arc<SendShare>,
        to: HostId,
        session: u64,
        image: ImageId,
    ) -> Self {
        Self { connection, share, to, session, image, stream: None, inside_frame: false }
    }

    /// The peer.
    #[must_use]
    pub const fn to(&self) -> HostId {
        self.to
    }

    /// The connection that this stream lives and dies with.
    #[must_use]
    pub const fn session(&self) -> u64 {
        self.session
    }

    /// The image that this stream is about.
    #[must_use]
    pub const fn image(&self) -> ImageId {
        self.image
    }

    /// Sends a control message. Returns when it is in the send buffer, which says nothing about its
    /// arrival; waits while the peer or the network is slower than the sender.
    ///
    /// # Errors
    /// When the stream or the connection is gone, or `body` exceeds
    /// [`frame::CONTROL_BYTES_MAX`]; only the latter leaves the stream usable.
    pub async fn send_control(&mut self, body: Bytes) -> Result<(), NetError> {
        let prefix = frame::prefix(Kind::Control, body.len())?;
        self.send(vec![Bytes::copy_from_slice(&prefix), body]).await
    }

    /// Sends an update: its canonical header, and its payload in one or more pieces, none of which is
    /// copied into a common buffer.
    ///
    /// # Errors
    /// As [`Self::send_control`], with the limit [`frame::FRAME_BYTES_MAX`].
    pub async fn send_update(&mut self, header: Bytes, payload: &[Bytes]) -> Result<(), NetError> {
        let mut bufs = Vec::with_capacity(payload.len() + 2);
        push_update(&mut bufs, &header, payload)?;
        self.send(bufs).await
    }

    /// Sends several updates (header and payload), as [`Self::send_update`] one after the other, at less
    /// cost. One that is too long is an error before anything is sent.
    ///
    /// # Errors
    /// As [`Self::send_update`].
    pub async fn send_updates(&mut self, updates: &[(Bytes, Bytes)]) -> Result<(), NetError> {
        let mut bufs = Vec::with_capacity(2 * updates.len() + 1);
        for (header, payload) in updates {
            push_update(&mut bufs, header, std::slice::from_ref(payload))?;
        }
        self.send(bufs).await
    }

    /// Gives the stream up: the peer's reader fails, and what it has not read is discarded.
    pub fn reset(mut self) {
        self.inside_frame = true;
    }

    /// Waits until the peer stops reading or the connection ends. At once when nothing was sent yet.
    pub async fn closed(&self) {
        if let Some(stream) = &self.stream {
            // Either way there is no reader any more.
            let _ = stream.stopped().await;
        }
    }

    /// Sends whole frames.
    async fn send(&mut self, mut bufs: Vec<Bytes>) -> Result<(), NetError> {
        if self.inside_frame {
            return Err(NetError::Broken);
        }
        let len = bufs.iter().map(Bytes::len).sum::<usize>();
        if self.stream.is_none() {
            let open = frame::encode(Kind::OpenImage, self.image.as_bytes())?;
            let stream = self.connection.open_uni().await;
            self.stream = Some(stream.map_err(|e| NetError::from_connection("peer", &e))?);
            bufs.insert(0, open);
        }
        let stream = self.stream.as_mut().expect("invariant: opened above");
        let _permit = if len > LARGE_BYTES {
            let kib =
                u32::try_from(len.min(SEND_BYTES_MAX).div_ceil(1024)).expect("invariant: at most 48 MiB");
            let permit = self.share.permits.acquire_many(kib).await;
            Some(permit.expect("invariant: this semaphore is never closed"))
        } else {
            None
        };
        // Stays set when the write fails or this future is dropped.
        self.inside_frame = true;
        stream.write_all_chunks(&mut bufs).await.map_err(NetError::from_write)?;
        self.inside_frame = false;
        let sent = u64::try_from(len).unwrap_or(u64::MAX);
        self.share.traffic.sent_bytes.fetch_add(sent, Ordering::Relaxed);
        Ok(())
    }
}

/// Appends an update frame's pieces.
fn push_update(bufs: &mut Vec<Bytes>, header: &[u8], payload: &[Bytes]) -> Result<(), NetError> {
    let max_bytes = frame::CONTROL_BYTES_MAX;
    let len = u32::try_from(header.len())
        .ok()
        .filter(|_| header.len() <= max_bytes)
        .ok_or(NetError::Oversize { kind: "update header", len_bytes: header.len(), max_bytes })?;
    let payload_bytes = payload.iter().map(Bytes::len).sum::<usize>();
    let prefix = frame::prefix(Kind::Update, 4 + header.len() + payload_bytes)?;
    let mut lead = BytesMut::with_capacity(prefix.len() + 4 + header.len());
    lead.extend_from_slice(&prefix);
    lead.extend_from_slice(&len.to_le_bytes());
    lead.extend_from_slice(header);
    bufs.push(lead.freeze());
    bufs.extend(payload.iter().filter(|p| !p.is_empty()).cloned());
    Ok(())
}

impl Drop for StreamSender {
    fn drop(&mut self) {
        if self.inside_frame
            && let Some(stream) = &mut self.stream
        {
            // An error only says that the stream is closed already.
            let _ = stream.reset(0_u32.into());
        }
    }
}

/// The receiving side of an image stream. Dropping it tells the peer to stop.
#[derive(Debug)]
pub struct FrameReader {
    reader: RawReader,
    connection: Connection,
    share: Arc<SendShare>,
}

impl FrameReader {
    pub(crate) const fn new(reader: RawReader, connection: Connection, share: Arc<SendShare>) -> Self {
        Self { reader, connection, share }
    }

    /// The next frame; `None` when the peer has finished the stream. Not cancel safe.
    ///
    /// # Errors
    /// When the stream or the connection is gone. Bytes that are no frame of an image stream, or one
    /// of more than [`frame::FRAME_BYTES_MAX`], close the connection.
    pub async fn next(&mut self) -> Result<Option<Frame>, NetError> {
        let got = self.reader.next().await;
        self.frame(got)
    }

    /// The next frame, if all of it is here already; `None` says nothing about the stream's end.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn next_ready(&mut self) -> Result<Option<Frame>, NetError> {
        let got = self.reader.next_ready();
        self.frame(got)
    }

    fn frame(&self, got: Result<Option<(Kind, Bytes)>, NetError>) -> Result<Option<Frame>, NetError> {
        let got = match got {
            Ok(Some((Kind::Control, body))) => Ok(Some(Frame::Control(body))),
            Ok(Some((Kind::Update, body))) => frame::split_update(body).map(Some),
            Ok(Some((kind, _))) => Err(NetError::BadFrame(format!("{} on an image stream", kind.name()))),
            Ok(None) => Ok(None),
            Err(e) => Err(e),
        };
        match &got {
            Ok(Some(Frame::Control(body))) => self.count(body.len()),
            Ok(Some(Frame::Update { header, payload })) => self.count(header.len() + payload.len()),
            Ok(None) => {}
            Err(_) => {}
        }
        got.inspect_err(|e| self.share.fault(&self.connection, e))
    }

    /// Tells the peer to stop, with a code of the caller's that arrives as [`NetError::Stopped`].
    pub fn stop(mut self, code: u32) {
        self.reader.stop(code);
    }

    fn count(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.share.traffic.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
