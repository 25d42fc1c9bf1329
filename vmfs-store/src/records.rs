//! Reading the records of a segment, also of one that is being written.

use std::sync::Arc;

use vmfs_common::header::{HEADER_MAX_BYTES, Update};
use vmfs_common::{Digest, Seq};

use crate::error::{IoContext as _, StoreError};
use crate::page::{HeaderPage, OtherVersion};
use crate::segment::{FIRST_PAGE, PAGE, PAGE_U64, Segment, file_name};
use crate::shared::Shared;
use crate::writer::{IndexEntry, LogPos, RECORD_BLOCKS_MAX, RECORD_FIXED, RecordKind};

/// Longest record.
const RECORD_BYTES_MAX: usize = RECORD_FIXED + RECORD_BLOCKS_MAX * 4 + HEADER_MAX_BYTES;

/// One record.
pub(crate) struct Record {
    pub(crate) kind: RecordKind,
    pub(crate) payload_page: u32,
    pub(crate) crcs: Vec<u32>,
    pub(crate) body: Vec<u8>,
}

impl Record {
    /// The update header it holds.
    pub(crate) fn update(&self) -> Result<Update, StoreError> {
        Update::decode(&self.body).map_err(|_| StoreError::corrupt("an update in the log"))
    }
    /// Number of the update it holds, if it is one.
    pub(crate) fn seq(&self) -> Option<Seq> {
        let bytes = self.body.get(64..72).filter(|_| self.kind == RecordKind::Update)?;
        Some(Seq(u64::from_le_bytes(bytes.try_into().ok()?)))
    }
    /// Digest of payload block number `at`.
    pub(crate) fn digest_of(&self, at: usize) -> Option<Digest> {
        let digest = |b: &[u8]| b.try_into().ok().map(Digest::from_bytes);
        match self.kind {
            RecordKind::Update => {
                let n = u32::from_le_bytes(self.body.get(16..20)?.try_into().ok()?) as usize;
                let digests = self.body.get(self.body.len().checked_sub(n * Digest::LEN)?..)?;
                digests
                    .chunks_exact(Digest::LEN)
                    .filter(|d| d.iter().any(|b| *b != 0))
                    .nth(at)
                    .and_then(digest)
            }
            RecordKind::Blocks => {
                let digests = self.body.get(8 * self.crcs.len()..)?;
                digests.chunks_exact(Digest::LEN).nth(at).and_then(digest)
            }
        }
    }
    /// Block indices of imported blocks, one per payload block.
    pub(crate) fn block_indices(&self) -> Vec<u64> {
        let words = self.body.chunks_exact(8).take(self.crcs.len());
        words.map(|c| c.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))).collect()
    }
    /// Reads its payload and checks it against the checksums; `None` when it is damaged.
    pub(crate) fn payload(&self, shared: &Shared, seg: &Segment) -> Result<Option<Vec<u8>>, StoreError> {
        let mut payload = vec![0u8; self.crcs.len() * PAGE];
        if payload.is_empty() {
            return Ok(Some(payload));
        }
        seg.read_payload(&shared.files, self.payload_page, &mut payload, false)?;
        let good = payload.chunks_exact(PAGE).zip(&self.crcs).all(|(b, crc)| crc32c::crc32c(b) == *crc);
        Ok(good.then_some(payload))
    }
}

/// What comes next in a segment.
pub(crate) enum Next {
    /// A record.
    Record(Record),
    /// Nothing was ever written here.
    End,
    /// Something was, and it is not whole.
    Torn,
}

/// Reads records one after the other.
pub(crate) struct Records<'a> {
    shared: &'a Shared,
    seg: &'a Segment,
    page: Option<HeaderPage>,
    offset: usize,
    /// The segment was begun and nothing was ever written to it, as far as one can tell.
    empty: bool,
    /// Highest "known durable" mark seen.
    pub(crate) synced_seq: u64,
}

/// Reads a header pair, from memory if the disk's is behind. `None` when it is damaged.
fn read_page(
    shared: &Shared,
    seg: &Segment,
    page: u16,
    index: u16,
) -> Result<Option<HeaderPage>, StoreError> {
    if let Some(live) = &*seg.live.lock()
        && let Some(p) = live.page(page)
    {
        return Ok(Some(p));
    }
    let mut pair = [0u8; 2 * PAGE];
    let file = seg.file(&shared.files)?;
    file.read_at(&mut pair, u64::from(page) * PAGE_U64)
        .during(|| format!("reading {}", file_name(seg.no)))?;
    HeaderPage::parse_pair(&pair, page, index, seg.generation).map_err(|v| other_version(seg, page, v))
}

pub(crate) fn other_version(seg: &Segment, page: u16, v: OtherVersion) -> StoreError {
    let what = format!("page {page} of {}", file_name(seg.no));
    StoreError::Version { what, found: v.found, known: v.known }
}

impl<'a> Records<'a> {
    /// From the segment's first record.
    pub(crate) fn from_start(shared: &'a Shared, seg: &'a Segment) -> Result<Self, StoreError> {
        let page = u16::try_from(FIRST_PAGE).expect("invariant: a small constant");
        Self::at(shared, seg, page, 0, 0)
    }
    /// From a remembered position.
    pub(crate) fn from_pos(shared: &'a Shared, seg: &'a Segment, pos: LogPos) -> Result<Self, StoreError> {
        Self::at(shared, seg, pos.page, pos.index, pos.offset)
    }
    /// From the last indexed record at or before the one that `before` accepts last.
    pub(crate) fn from_index(
        shared: &'a Shared,
        seg: &'a Segment,
        before: impl Fn(&IndexEntry) -> bool,
    ) -> Result<Option<Self>, StoreError> {
        let pick = |index: &[IndexEntry]| {
            let n = index.partition_point(|e| before(e));
            n.checked_sub(1).map(|i| index[i])
        };
        let live = seg.live.lock().as_ref().map(|l| pick(&l.index));
        let found = match live {
            Some(found) => found,
            None => pick(&index_of(shared, seg)?),
        };
        let Some(e) = found else { return Ok(None) };
        Self::at(shared, seg, e.page, e.index, e.start.offset).map(Some)
    }
    fn at(
        shared: &'a Shared,
        seg: &'a Segment,
        page: u16,
        index: u16,
        offset: u16,
    ) -> Result<Self, StoreError> {
        let page = read_page(shared, seg, page, index)?;
        let synced_seq = page.as_ref().map_or(0, |p| p.synced_seq);
        let empty = page.is_none() && index == 0 && offset == 0;
        Ok(Self { shared, seg, page, offset: usize::from(offset), empty, synced_seq })
    }

    /// Where the next record begins; `None` when the stream is damaged here.
    pub(crate) fn position(&self) -> Option<LogPos> {
        let p = self.page.as_ref()?;
        let offset = u16::try_from(self.offset).ok()?;
        Some(LogPos { generation: self.seg.generation, page: p.page, index: p.index, offset })
    }

    /// Copies the next bytes of the stream; false when they are not there.
    fn take(&mut self, out: &mut [u8]) -> Result<bool, StoreError> {
        let mut done = 0;
        while done < out.len() {
            let Some(page) = &self.page else { return Ok(false) };
            let here = &page.body()[self.offset.min(page.used())..];
            if here.is_empty() {
                if !self.turn()? {
                    return Ok(false);
                }
                continue;
            }
            let n = here.len().min(out.len() - done);
            out[done..done + n].copy_from_slice(&here[..n]);
            self.offset += n;
            done += n;
        }
        Ok(true)
    }
    /// Goes to the next page; false when there is none or it is damaged.
    fn turn(&mut self) -> Result<bool, StoreError> {
        let Some(page) = &self.page else { return Ok(false) };
        let next = page.next;
        if next == 0 {
            return Ok(false);
        }
        if u32::from(next) + 2 > self.seg.class.pages() {
            self.page = None;
            return Ok(false);
        }
        self.page = read_page(self.shared, self.seg, next, page.index + 1)?;
        self.offset = 0;
        if let Some(p) = &self.page {
            self.synced_seq = self.synced_seq.max(p.synced_seq);
        }
        Ok(self.page.is_some())
    }

    /// The next record.
    pub(crate) fn next(&mut self) -> Result<Next, StoreError> {
        match &self.page {
            None if self.empty => return Ok(Next::End),
            None => return Ok(Next::Torn),
            Some(p) if self.offset >= p.used() && p.next == 0 => {
                return Ok(if self.offset > p.used() { Next::Torn } else { Next::End });
            }
            Some(_) => {}
        }
        let mut fixed = [0u8; RECORD_FIXED];
        // A page may have been linked and never filled: then nothing begins there.
        while let Some(p) = &self.page
            && self.offset >= p.used()
        {
            if p.next == 0 {
                return Ok(Next::End);
            }
            if !self.turn()? {
                return Ok(Next::Torn);
            }
        }
        if !self.take(&mut fixed)? {
            return Ok(Next::Torn);
        }
        let u32_at = |o: usize| u32::from_le_bytes([fixed[o], fixed[o + 1], fixed[o + 2], fixed[o + 3]]);
        let (total, blocks) = (u32_at(4) as usize, u32_at(12) as usize);
        let payload_page = u32::from(u16::from_le_bytes([fixed[10], fixed[11]]));
        let Some(kind) = RecordKind::from_code(fixed[8]) else { return Ok(Next::Torn) };
        if blocks > RECORD_BLOCKS_MAX || !(RECORD_FIXED + 4 * blocks..=RECORD_BYTES_MAX).contains(&total) {
            return Ok(Next::Torn);
        }
        if payload_page as usize + blocks > self.seg.class.pages() as usize {
            return Ok(Next::Torn);
        }
        let mut rest = vec![0u8; total - RECORD_FIXED];
        if !self.take(&mut rest)? {
            return Ok(Next::Torn);
        }
        if crc32c::crc32c_append(crc32c::crc32c(&fixed[4..]), &rest) != u32_at(0) {
            return Ok(Next::Torn);
        }
        let body = rest.split_off(4 * blocks);
        let crcs = rest.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        Ok(Next::Record(Record { kind, payload_page, crcs, body }))
    }
}

/// The index of a segment that is not being written, rebuilt from its pages when it is not cached.
fn index_of(shared: &Shared, seg: &Segment) -> Result<Arc<Vec<IndexEntry>>, StoreError> {
    if let Some(index) = shared.indexes.get(seg) {
        return Ok(index);
    }
    let mut index = Vec::new();
    let (mut page, mut number) = (u16::try_from(FIRST_PAGE).expect("invariant: a small constant"), 0u16);
    while u32::from(page) + 2 <= seg.class.pages() {
        let Some(p) = read_page(shared, seg, page, number)? else { break };
        if let Some(start) = p.first {
            index.push(IndexEntry { page, index: number, start });
        }
        if p.next <= page {
            break;
        }
        (page, number) = (p.next, number + 1);
    }
    let index = Arc::new(index);
    shared.indexes.insert(seg, Arc::clone(&index));
    Ok(index)
}

/// The record that holds the payload in `page`, and which of its blocks that is.
pub(crate) fn record_of_payload(
    shared: &Shared,
    seg: &Segment,
    page: u32,
) -> Result<Option<(Record, usize)>, StoreError> {
    let found = Records::from_index(shared, seg, |e| u32::from(e.start.payload_page) <= page)?;
    let Some(mut records) = found else { return Ok(None) };
    while let Next::Record(r) = records.next()? {
        if r.payload_page > page {
            return Ok(None);
        }
        if page < r.payload_page + u32::try_from(r.crcs.len()).unwrap_or(0) {
            let at = (page - r.payload_page) as usize;
            return Ok(Some((r, at)));
        }
    }
    Ok(None)
}
