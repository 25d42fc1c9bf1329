//! The update header: the bytes that are hashed, stored and sent. Layout in `docs/protocol.md`.

use std::sync::Arc;

use crate::codec::{CodecError, Reader, Writer};
use crate::hash::hash;
use crate::ids::{BlockCount, BlockIndex, Digest, Epoch, Head, HostId, ImageId, Seq};
use crate::op::Op;
use crate::policy::MEMBERS_MAX;

/// First four bytes of every header.
pub const MAGIC: [u8; 4] = *b"VMU1";
/// The format level this release writes, and the newest it reads.
pub const FORMAT_LEVEL: u16 = 1;
/// Fixed part of a header, in bytes.
pub const FIXED_BYTES: usize = 248;
/// Most blocks in one update that carries data.
pub const UPDATE_BLOCKS_MAX: usize = 512;
/// Longest arguments, in bytes.
pub const ARGS_MAX_BYTES: usize = 80 << 10;
/// Longest header, in bytes.
pub const HEADER_MAX_BYTES: usize =
    FIXED_BYTES + ARGS_MAX_BYTES + 8 * MEMBERS_MAX + Digest::LEN * UPDATE_BLOCKS_MAX;

/// Flag: the guest asked for durability at this point.
pub const FLAG_FLUSH: u8 = 1;
/// Flag: flushes up to here may have been acknowledged with fewer data copies than the policy wants
/// (`on_quorum_loss = "degrade"`). Set on every update from the entry into that state to the return
/// from it, and inherited by the `EpochStart` of the next owner.
pub const FLAG_DEGRADED: u8 = 2;

/// A decoded header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateHeader {
    /// Format level of the chain.
    pub level: u16,
    /// [`FLAG_FLUSH`] and [`FLAG_DEGRADED`], or 0.
    pub flags: u8,
    /// The image.
    pub image: ImageId,
    /// The owner's tenure.
    pub epoch: Epoch,
    /// This update's number.
    pub seq: Seq,
    /// Digest of update seq - 1; zero for the first.
    pub parent: Digest,
    /// Nanoseconds since the Unix epoch, never smaller than the parent's.
    pub time_ns: u64,
    /// First block of the range; 0 without one.
    pub start: BlockIndex,
    /// Blocks in the range; 0 without one.
    pub count: BlockCount,
    /// The owner's commit point when it made the update; zero when there is none in this epoch.
    pub commit: Seq,
    /// `priv` of the parent, known to the owner alone until now; zero in an `EpochStart`.
    pub reveal: [u8; 32],
    /// Commitment to this update's `priv`.
    pub public: Digest,
    /// Binds the content to `priv`.
    pub tag: [u8; 32],
    /// Last acknowledged seq of each member, in the member list's order.
    pub acked: Vec<Seq>,
    /// One digest per block of a write; zero for an all-zero block, which has no payload.
    pub digests: Vec<Digest>,
    /// The operation.
    pub op: Op,
}

/// A header and its bytes, which are the same on every disk and wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// Decoded.
    pub header: UpdateHeader,
    /// Encoded.
    pub bytes: Arc<[u8]>,
    /// `B`, the hash of everything but reveal, public id and tag.
    pub body: Digest,
    /// `D`, the digest that the next update names as its parent.
    pub digest: Digest,
}

/// Offsets of the fixed part, used by the encoder, the decoder and the body hash.
mod at {
    pub(super) const BODY_END: usize = 144;
    pub(super) const REVEAL: usize = BODY_END;
    pub(super) const PUBLIC: usize = REVEAL + 32;
    pub(super) const TAG: usize = PUBLIC + 32;
    pub(super) const CRC: usize = TAG + 32;
}

impl UpdateHeader {
    /// Blocks that have payload.
    #[must_use]
    pub fn payload_blocks(&self) -> usize {
        self.digests.iter().filter(|d| !d.is_zero()).count()
    }

    fn encode_unsealed(&self) -> Vec<u8> {
        let args = self.op.encode_args();
        let len = FIXED_BYTES + args.len() + 8 * self.acked.len() + Digest::LEN * self.digests.len();
        let mut w = Writer::with_capacity(len);
        w.bytes(&MAGIC);
        w.u16(self.level);
        w.u8(self.op.code());
        w.u8(self.flags);
        w.count(len);
        w.count(args.len());
        w.count(self.digests.len());
        w.count(self.acked.len());
        w.bytes(self.image.as_bytes());
        w.u64(self.epoch.number);
        w.bytes(self.epoch.host.as_bytes());
        w.u64(self.seq.0);
        w.bytes(self.parent.as_bytes());
        w.u64(self.time_ns);
        w.u64(self.start.0);
        w.u64(self.count.0);
        w.count(self.payload_blocks());
        w.u32(0);
        w.u64(self.commit.0);
        debug_assert_eq!(w.len(), at::BODY_END);
        w.bytes(&self.reveal);
        w.bytes(self.public.as_bytes());
        w.bytes(&self.tag);
        w.u64(0); // crc and reserved
        w.bytes(&args);
        self.acked.iter().for_each(|s| w.u64(s.0));
        self.digests.iter().for_each(|d| w.bytes(d.as_bytes()));
        w.finish()
    }

    /// `B`: the body hash over everything but reveal, public id and tag.
    #[must_use]
    pub fn body(&self) -> Digest {
        body_of(&self.encode_unsealed())
    }

    /// Encodes, with the structural checksum.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut b = self.encode_unsealed();
        put_checksum(&mut b);
        b
    }

    /// Length in bytes of the header that starts with these bytes, as it says itself: for readers
    /// that find headers in a stream. Checked against [`HEADER_MAX_BYTES`].
    ///
    /// # Errors
    /// Not a header, or a length out of bounds.
    pub fn stated_len(fixed: &[u8]) -> Result<usize, CodecError> {
        let mut r = Reader::new(fixed);
        if r.array::<4>()? != MAGIC {
            return Err(CodecError::Invalid("update magic"));
        }
        r.take(4)?;
        let len = r.count(HEADER_MAX_BYTES)?;
        if len < FIXED_BYTES { Err(CodecError::Invalid("header length")) } else { Ok(len) }
    }

    fn decode(b: &[u8]) -> Result<Self, CodecError> {
        if Self::stated_len(b)? != b.len() {
            return Err(CodecError::Invalid("header length"));
        }
        let mut zeroed = [0u8; FIXED_BYTES];
        zeroed.copy_from_slice(&b[..FIXED_BYTES]);
        zeroed[at::CRC..at::CRC + 4].fill(0);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&zeroed), &b[FIXED_BYTES..]);
        if crc.to_le_bytes() != b[at::CRC..at::CRC + 4] {
            return Err(CodecError::Invalid("header checksum"));
        }
        let mut r = Reader::new(&b[4..]);
        let level = r.u16()?;
        if level == 0 || level > FORMAT_LEVEL {
            return Err(CodecError::Version { got: u32::from(level), known: u32::from(FORMAT_LEVEL) });
        }
        let (code, flags) = (r.u8()?, r.u8()?);
        r.u32()?;
        let args_len = r.count(ARGS_MAX_BYTES)?;
        let digests_len = r.count(UPDATE_BLOCKS_MAX)?;
        let acked_len = r.count(MEMBERS_MAX)?;
        let image = ImageId::from_bytes(r.array()?);
        let epoch = Epoch { number: r.u64()?, host: HostId::from_bytes(r.array()?) };
        let seq = Seq(r.u64()?);
        let parent = Digest::from_bytes(r.array()?);
        let time_ns = r.u64()?;
        let (start, count) = (BlockIndex(r.u64()?), BlockCount(r.u64()?));
        let payload_blocks = r.u32()? as usize;
        if r.u32()? != 0 {
            return Err(CodecError::Invalid("reserved field"));
        }
        let commit = Seq(r.u64()?);
        let (reveal, public, tag) = (r.array()?, Digest::from_bytes(r.array()?), r.array()?);
        r.u32()?;
        if r.u32()? != 0 {
            return Err(CodecError::Invalid("reserved field"));
        }
        let op = Op::decode(code, r.take(args_len)?)?;
        let acked = (0..acked_len).map(|_| r.u64().map(Seq)).collect::<Result<_, _>>()?;
        let digests =
            (0..digests_len).map(|_| r.array().map(Digest::from_bytes)).collect::<Result<_, _>>()?;
        r.end()?;
        let h = Self {
            level,
            flags,
            image,
            epoch,
            seq,
            parent,
            time_ns,
            start,
            count,
            commit,
            reveal,
            public,
            tag,
            acked,
            digests,
            op,
        };
        h.check_shape(payload_blocks)?;
        Ok(h)
    }

    fn check_shape(&self, payload_blocks: usize) -> Result<(), CodecError> {
        let bad = |what| Err(CodecError::Invalid(what));
        if self.flags & !(FLAG_FLUSH | FLAG_DEGRADED) != 0 {
            return bad("flags");
        }
        if self.seq == Seq::ZERO || self.epoch.number == 0 {
            return bad("seq or epoch");
        }
        if payload_blocks != self.payload_blocks() {
            return bad("payload count");
        }
        let end = self.start.0.checked_add(self.count.0);
        if end.is_none_or(|e| e > crate::op::SIZE_MAX_BYTES / crate::ids::BLOCK_BYTES_U64) {
            return bad("range");
        }
        let digests = self.digests.len() as u64;
        match &self.op {
            Op::Write { .. } if self.count.0 == digests && digests > 0 => Ok(()),
            Op::Zero { .. } if self.count.0 > 0 && digests == 0 => Ok(()),
            Op::Write { .. } | Op::Zero { .. } => bad("range"),
            _ if self.count.0 == 0 && self.start.0 == 0 && digests == 0 => Ok(()),
            _ => bad("range"),
        }
    }
}

fn body_of(b: &[u8]) -> Digest {
    let u32_at =
        |o: usize| u32::from_le_bytes(b[o..o + 4].try_into().expect("invariant: fixed part")) as usize;
    let digests_at = b.len() - u32_at(16) * Digest::LEN;
    let digests = hash("digests", &[&b[digests_at..]]);
    hash("body", &[&b[..at::BODY_END], &b[FIXED_BYTES..digests_at], digests.as_bytes()])
}

/// `D = H("update", B ‖ reveal ‖ pub)`.
#[must_use]
pub fn update_digest(body: &Digest, reveal: &[u8; 32], public: &Digest) -> Digest {
    hash("update", &[body.as_bytes(), reveal, public.as_bytes()])
}

/// A header that lacks its public id and its tag, which depend on its body: encoded and hashed once, since this
/// is done for every write.
pub(crate) struct Unsealed {
    header: UpdateHeader,
    bytes: Vec<u8>,
    body: Digest,
}

impl Unsealed {
    /// Whatever `header` says as public id and tag does not count.
    pub(crate) fn new(header: UpdateHeader) -> Self {
        let bytes = header.encode_unsealed();
        let body = body_of(&bytes);
        Self { header, bytes, body }
    }
    /// `B`.
    pub(crate) const fn body(&self) -> &Digest {
        &self.body
    }
    /// The update with this public id, and the tag that `tag` makes of its digest.
    pub(crate) fn seal(self, public: Digest, tag: impl FnOnce(&Digest) -> [u8; 32]) -> Update {
        let Self { mut header, mut bytes, body } = self;
        let digest = update_digest(&body, &header.reveal, &public);
        (header.public, header.tag) = (public, tag(&digest));
        bytes[at::PUBLIC..at::TAG].copy_from_slice(header.public.as_bytes());
        bytes[at::TAG..at::CRC].copy_from_slice(&header.tag);
        put_checksum(&mut bytes);
        Update { header, bytes: bytes.into(), body, digest }
    }
}

/// Fills in the structural checksum, over a field of zeros.
fn put_checksum(b: &mut [u8]) {
    b[at::CRC..at::CRC + 4].fill(0);
    let crc = crc32c::crc32c(b);
    b[at::CRC..at::CRC + 4].copy_from_slice(&crc.to_le_bytes());
}

impl Update {
    /// Encodes a complete header.
    #[must_use]
    pub fn from_header(header: UpdateHeader) -> Self {
        let bytes: Arc<[u8]> = header.encode().into();
        let body = body_of(&bytes);
        let digest = update_digest(&body, &header.reveal, &header.public);
        Self { header, bytes, body, digest }
    }
    /// Decodes the exact bytes of one header. Checks form and checksum, not the chain.
    ///
    /// # Errors
    /// When they are not a canonical header of a known format level.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let header = UpdateHeader::decode(bytes)?;
        let body = body_of(bytes);
        let digest = update_digest(&body, &header.reveal, &header.public);
        Ok(Self { header, bytes: bytes.into(), body, digest })
    }
    /// The copy that ends with this update.
    #[must_use]
    pub const fn head(&self) -> Head {
        Head { epoch: self.header.epoch, seq: self.header.seq, digest: self.digest }
    }
}
