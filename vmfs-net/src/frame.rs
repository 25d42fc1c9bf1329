//! Frames: what every byte on a stream belongs to.
//!
//! ```text
//! u32 LE  length of the body, without these five bytes
//! u8      kind
//! body
//! ```
//! The body of an update frame is `u32 LE length of the header ‖ header ‖ payload`. Each kind has a
//! hard limit on its length, checked before anything is allocated for the body; what a peer's unfinished
//! frames may occupy together is bounded, however it cuts them up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use quinn::RecvStream;

use crate::error::{NetError, Refusal};

/// Longest body of any frame.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
/// Longest body of a control frame, and longest update header.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Longest body of a request or of its answer.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Bytes in front of every body.
pub const PREFIX_BYTES: usize = 5;

/// Bytes that the unfinished frames of one peer may have, all of each counted from its first byte on.
/// An honest peer stays below twice [`SEND_BYTES_MAX`] (large frames being written now, and those that were when the
/// oldest byte under way was) plus its send window plus 16 KiB per stream.
pub(crate) const PARTIAL_BYTES_MAX: usize = 192 << 20;
/// Bytes of large frames that one side writes at a time, over all streams to one peer.
pub(crate) const SEND_BYTES_MAX: usize = 48 << 20;

/// Kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of both directions of the control stream.
    Hello = 0x01,
    /// From the lower HostId: this connection is the pair's.
    Accept = 0x02,
    /// Sent four times a second on the control stream.
    Beat = 0x03,
    /// Host entries and removals.
    Hosts = 0x04,
    /// First frame of an image stream: names the image.
    OpenImage = 0x10,
    /// A control message about the stream's image.
    Control = 0x11,
    /// An update: header and payload.
    Update = 0x12,
    /// A request, alone on its bidirectional stream.
    Request = 0x20,
    /// The answer to a request.
    Response = 0x21,
    /// The refusal of a request, in words.
    Decline = 0x22,
    /// A host asks for its certificate.
    Enrol = 0x30,
    /// The answer: a certificate and the known hosts.
    Enrolled = 0x31,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Hello,
        Self::Accept,
        Self::Beat,
        Self::Hosts,
        Self::OpenImage,
        Self::Control,
        Self::Update,
        Self::Request,
        Self::Response,
        Self::Decline,
        Self::Enrol,
        Self::Enrolled,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|k| *k as u8 == byte)
    }

    /// The longest body of this kind, in bytes.
    #[must_use]
    pub const fn max_bytes(self) -> usize {
        match self {
            Self::Hello => 1024,
            Self::Accept => 0,
            Self::Beat | Self::OpenImage => 64,
            Self::Hosts | Self::Enrolled => 1 << 20,
            Self::Control => CONTROL_BYTES_MAX,
            Self::Update => FRAME_BYTES_MAX,
            Self::Request | Self::Response => REQUEST_BYTES_MAX,
            Self::Decline => 4096,
            Self::Enrol => 16 << 10,
        }
    }

    /// Its name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Accept => "accept",
            Self::Beat => "beat",
            Self::Hosts => "hosts",
            Self::OpenImage => "open-image",
            Self::Control => "control",
            Self::Update => "update",
            Self::Request => "request",
            Self::Response => "response",
            Self::Decline => "decline",
            Self::Enrol => "enrol",
            Self::Enrolled => "enrolled",
        }
    }
}

/// A frame of an image stream, as handed to a [`crate::StreamHandler`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A control message.
    Control(Bytes),
    /// An update.
    Update {
        /// Canonical header bytes.
        header: Bytes,
        /// Whole blocks, one after the other.
        payload: Bytes,
    },
}

/// The five bytes in front of a body of `len` bytes.
///
/// # Errors
/// [`NetError::Oversize`] for a body longer than its kind allows.
pub(crate) fn prefix(kind: Kind, len: usize) -> Result<[u8; PREFIX_BYTES], NetError> {
    let too_long = || NetError::Oversize { kind: kind.name(), len_bytes: len, max_bytes: kind.max_bytes() };
    if len > kind.max_bytes() {
        return Err(too_long());
    }
    let l = u32::try_from(len).map_err(|_| too_long())?.to_le_bytes();
    Ok([l[0], l[1], l[2], l[3], kind as u8])
}

/// A whole frame in one buffer, for small ones.
pub(crate) fn encode(kind: Kind, body: &[u8]) -> Result<Bytes, NetError> {
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + body.len());
    out.put_slice(&prefix(kind, body.len())?);
    out.put_slice(body);
    Ok(out.freeze())
}

/// Reads a prefix: the kind, and the length of the body, both checked.
pub(crate) fn decode_prefix(bytes: [u8; PREFIX_BYTES]) -> Result<(Kind, usize), NetError> {
    let [l0, l1, l2, l3, k] = bytes;
    let kind =
        Kind::from_byte(k).ok_or_else(|| NetError::BadFrame(format!("unknown frame kind {k:#04x}")))?;
    let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    if len > kind.max_bytes() {
        return Err(NetError::Oversize { kind: kind.name(), len_bytes: len, max_bytes: kind.max_bytes() });
    }
    Ok((kind, len))
}

/// Splits the body of an update frame.
pub(crate) fn split_update(mut body: Bytes) -> Result<Frame, NetError> {
    if body.len() < 4 {
        return Err(NetError::BadFrame("an update frame without its header length".into()));
    }
    let len = usize::try_from(body.get_u32_le()).unwrap_or(usize::MAX);
    if len > body.len() || len > CONTROL_BYTES_MAX {
        return Err(NetError::BadFrame(format!("an update header of {len} bytes in {}", body.len())));
    }
    let header = body.split_to(len);
    Ok(Frame::Update { header, payload: body })
}

/// Bytes in unfinished frames of one connection.
#[derive(Debug, Default)]
pub(crate) struct PartialBudget(AtomicUsize);

/// What one reader holds of the budget; given back when dropped.
#[derive(Debug)]
struct Held {
    budget: Arc<PartialBudget>,
    bytes: usize,
}

impl Held {
    fn add(&mut self, bytes: usize) -> Result<(), NetError> {
        self.bytes += bytes;
        let total = self.budget.0.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if total <= PARTIAL_BYTES_MAX {
            return Ok(());
        }
        Err(NetError::Refused {
            peer: "peer".into(),
            refusal: Refusal::Flood,
            detail: format!("{total} bytes in unfinished frames"),
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Reads frames off a stream.
#[derive(Debug)]
pub(crate) struct RawReader {
    stream: RecvStream,
    budget: Arc<PartialBudget>,
    /// Received, not yet consumed.
    rest: Bytes,
}

impl RawReader {
    pub(crate) fn new(stream: RecvStream, budget: Arc<PartialBudget>) -> Self {
        Self { stream, budget, rest: Bytes::new() }
    }

    /// Tells the peer to stop sending.
    pub(crate) fn stop(&mut self, code: u32) {
        // An error only says that the stream has ended already.
        let _ = self.stream.stop(code.into());
    }

    /// The next frame; `None` when the peer finished the stream between two frames.
    ///
    /// Not cancel safe: after a cancelled call the reader is of no more use.
    pub(crate) async fn next(&mut self) -> Result<Option<(Kind, Bytes)>, NetError> {
        let mut head = [0; PREFIX_BYTES];
        let mut have = 0;
        while have < PREFIX_BYTES {
            if self.rest.is_empty() && !self.fill(64 << 10).await? {
                return if have == 0 { Ok(None) } else { Err(cut_off()) };
            }
            let n = self.rest.len().min(PREFIX_BYTES - have);
            self.rest.copy_to_slice(&mut head[have..have + n]);
            have += n;
        }
        let (kind, len) = decode_prefix(head)?;
        Ok(Some((kind, self.body(len).await?)))
    }

    /// The next frame, if all of it has been received already and lies in one piece.
    pub(crate) fn next_ready(&mut self) -> Result<Option<(Kind, Bytes)>, NetError> {
        let Some(head) = self.rest.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let (kind, len) = decode_prefix(*head)?;
        if self.rest.len() - PREFIX_BYTES < len {
            return Ok(None);
        }
        self.rest.advance(PREFIX_BYTES);
        Ok(Some((kind, self.rest.split_to(len))))
    }

    /// The next frame, which must be of this kind.
    pub(crate) async fn expect(&mut self, want: Kind) -> Result<Bytes, NetError> {
        match self.next().await? {
            Some((kind, body)) if kind == want => Ok(body),
            Some((kind, _)) => {
                Err(NetError::BadFrame(format!("{} where {} was due", kind.name(), want.name())))
            }
            None => Err(NetError::BadFrame(format!("the stream ended where {} was due", want.name()))),
        }
    }

    async fn fill(&mut self, max: usize) -> Result<bool, NetError> {
        match self.stream.read_chunk(max, true).await.map_err(NetError::from_read)? {
            Some(chunk) => {
                self.rest = chunk.bytes;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    async fn body(&mut self, len: usize) -> Result<Bytes, NetError> {
        if self.rest.len() >= len {
            return Ok(self.rest.split_to(len));
        }
        let mut held = Held { budget: Arc::clone(&self.budget), bytes: 0 };
        held.add(len)?;
        // Copied piece by piece: a piece keeps the datagram it came in, which may be much larger.
        let mut body = BytesMut::with_capacity(len);
        loop {
            body.put_slice(&std::mem::take(&mut self.rest));
            if body.len() == len {
                return Ok(body.freeze());
            }
            if !self.fill(len - body.len()).await? {
                return Err(cut_off());
            }
        }
    }
}

fn cut_off() -> NetError {
    NetError::BadFrame("the stream ended in the middle of a frame".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_length_then_kind() {
        assert_eq!(prefix(Kind::Update, 0x0001_0203).unwrap(), [3, 2, 1, 0, 0x12]);
        assert_eq!(&encode(Kind::Beat, b"xy").unwrap()[..], [2, 0, 0, 0, 3, b'x', b'y']);
        for kind in Kind::ALL {
            let p = prefix(kind, kind.max_bytes()).unwrap();
            assert_eq!(decode_prefix(p).unwrap(), (kind, kind.max_bytes()));
            assert!(prefix(kind, kind.max_bytes() + 1).is_err());
        }
    }

    #[test]
    fn a_claim_of_four_gigabytes_is_refused_from_its_prefix_alone() {
        let err = decode_prefix([0xff, 0xff, 0xff, 0xff, Kind::Update as u8]).unwrap_err();
        assert!(matches!(err, NetError::Oversize { len_bytes: 0xffff_ffff, .. }), "{err}");
        assert!(matches!(decode_prefix([1, 0, 0, 0, 0x77]), Err(NetError::BadFrame(_))));
    }

    #[test]
    fn an_update_splits_into_header_and_payload() {
        let got = split_update(Bytes::from_static(b"\x02\0\0\0hdpayload")).unwrap();
        let want =
            Frame::Update { header: Bytes::from_static(b"hd"), payload: Bytes::from_static(b"payload") };
        assert_eq!(got, want);
        assert!(split_update(Bytes::from_static(b"\x05\0\0\0hd")).is_err());
        assert!(split_update(Bytes::from_static(b"\x05\0")).is_err());
    }
}
