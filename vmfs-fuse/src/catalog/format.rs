//! The bytes of a catalog file.
//!
//! ```text
//! header (32 bytes)                     record (24 bytes + payload, padded to 8)
//!   0  magic "VMFSCAT\0"                  0  payload length, u32
//!   8  version, u32 = 1                   4  crc32c, u32, over generation, 0..4, 8..24, payload
//!  12  zero, u32                          8  seq, u64: one more than the record before
//!  16  generation, u64                   16  durable, u64: bytes of the file that were known
//!  24  crc32c of 0..24, u32                  to be on stable storage when this was written
//!  28  zero, u32                         24  payload: tag u8, then changes
//! ```
//!
//! The second copy of the file, `.copy` after its name, has the same bytes, or fewer.
//!
//! A file starts with a snapshot (records with tag `ROWS`), ended by one `COMPLETE` record;
//! then comes one `TXN` record per transaction. The `durable` field tells a torn tail (to be
//! cut) from damage in the middle (to be refused): a bad record below what a later, valid record
//! knew to be durable is damage.

use vmfs_common::codec::{CodecError, Reader, Writer};

use super::row::Change;

/// Version of the format that this release writes and reads.
pub const VERSION: u32 = 1;
/// Bytes of the file header.
pub(super) const HEADER_BYTES: usize = 32;
/// Bytes of a record before its payload.
pub(super) const RECORD_BYTES: usize = 24;
/// Most bytes of one record's payload.
pub(super) const PAYLOAD_MAX_BYTES: usize = 64 << 20;
const MAGIC: &[u8; 8] = b"VMFSCAT\0";

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    /// A part of the snapshot at the file's start.
    Rows = 1,
    /// The snapshot is complete.
    Complete = 2,
    /// A transaction.
    Txn = 3,
}

/// What a file's header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A file of this version, of that generation.
    Good(u64),
    /// A file of another version.
    Version(u32),
    /// Not a header.
    Bad,
}

pub(super) fn encode_header(generation: u64) -> Vec<u8> {
    let mut w = Writer::with_capacity(HEADER_BYTES);
    w.bytes(MAGIC);
    w.u32(VERSION);
    w.u32(0);
    w.u64(generation);
    let mut bytes = w.finish();
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

pub(super) fn decode_header(bytes: &[u8]) -> Header {
    fn fields(bytes: &[u8]) -> Result<(u32, u64, u32), CodecError> {
        let mut r = Reader::new(bytes);
        if r.take(8)? != MAGIC {
            return Err(CodecError::Invalid("magic"));
        }
        let version = r.u32()?;
        r.u32()?;
        Ok((version, r.u64()?, r.u32()?))
    }
    match fields(bytes) {
        Ok((version, _, _)) if version != VERSION => Header::Version(version),
        Ok((_, generation, crc)) if crc == crc32c::crc32c(&bytes[..24]) => Header::Good(generation),
        _ => Header::Bad,
    }
}

/// A record that was found valid.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) seq: u64,
    pub(super) tag: u8,
    pub(super) changes: Vec<Change>,
    /// Bytes it takes in the file.
    pub(super) len: usize,
}

fn record_crc(generation: u64, bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&generation.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &bytes[..4]);
    crc32c::crc32c_append(crc, &bytes[8..])
}

/// The bytes of one record. `None` when the transaction is too large.
pub(super) fn encode_record(
    generation: u64,
    seq: u64,
    durable: u64,
    tag: Tag,
    changes: &[Change],
) -> Option<Vec<u8>> {
    let mut payload = Writer::new();
    payload.u8(tag as u8);
    payload.count(changes.len());
    for change in changes {
        change.encode(&mut payload);
    }
    let payload = payload.finish();
    if payload.len() > PAYLOAD_MAX_BYTES {
        return None;
    }
    let mut w = Writer::with_capacity(RECORD_BYTES + payload.len() + 8);
    w.count(payload.len());
    w.u32(0);
    w.u64(seq);
    w.u64(durable);
    w.bytes(&payload);
    let mut bytes = w.finish();
    let crc = record_crc(generation, &bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    Some(bytes)
}

/// The record at the start of `bytes`; `None` when there is no valid one.
pub(super) fn decode_record(generation: u64, bytes: &[u8]) -> Option<Record> {
    let mut r = Reader::new(bytes);
    let payload_len = r.count(PAYLOAD_MAX_BYTES).ok()?;
    let crc = r.u32().ok()?;
    let seq = r.u64().ok()?;
    r.u64().ok()?;
    let payload = r.take(payload_len).ok()?;
    if payload_len == 0 || crc != record_crc(generation, &bytes[..RECORD_BYTES + payload_len]) {
        return None;
    }
    let mut r = Reader::new(payload);
    let tag = r.u8().ok()?;
    let count = r.count(PAYLOAD_MAX_BYTES).ok()?;
    let changes = (0..count).map(|_| Change::decode(&mut r)).collect::<Result<Vec<_>, _>>().ok()?;
    r.end().ok()?;
    Some(Record { seq, tag, changes, len: (RECORD_BYTES + payload_len).next_multiple_of(8) })
}

/// The record at the start of `bytes` with the checksum it should have.
pub(super) fn with_checksum(generation: u64, bytes: &[u8]) -> Vec<u8> {
    let mut fixed = bytes.to_vec();
    let len = fixed.first_chunk::<4>().map(|l| u32::from_le_bytes(*l) as usize);
    if let Some(record) = len.and_then(|len| bytes.get(..RECORD_BYTES.checked_add(len)?)) {
        let crc = record_crc(generation, record);
        fixed[4..8].copy_from_slice(&crc.to_le_bytes());
    }
    fixed
}
