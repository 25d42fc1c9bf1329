//! Writing one segment: payload pages and the header pages that describe them, both allocated at
//! the tail, header pages in pairs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::page::{BODY, HeaderPage, Start};
use crate::pool::Spare;
use crate::segment::{FIRST_PAGE, PAGE, PAGE_U64, Segment, SegmentHeader, file_name};
use crate::shared::Shared;

/// Fixed part of a record.
pub(crate) const RECORD_FIXED: usize = 16;
/// Most blocks in one record.
pub(crate) const RECORD_BLOCKS_MAX: usize = 512;

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordKind {
    /// An update header.
    Update,
    /// Blocks of an import: indices and digests.
    Blocks,
}

impl RecordKind {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Update => 1,
            Self::Blocks => 2,
        }
    }
    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Update),
            2 => Some(Self::Blocks),
            _ => None,
        }
    }
}

/// A header page in which records start, for searches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) page: u16,
    pub(crate) index: u16,
    pub(crate) start: Start,
}

/// Where the next record of a log goes: what a checkpoint remembers of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogPos {
    pub(crate) generation: u64,
    pub(crate) page: u16,
    pub(crate) index: u16,
    pub(crate) offset: u16,
}

/// What of a segment is not on disk yet, while it is being written.
pub(crate) struct Live {
    pub(crate) open: HeaderPage,
    /// Full pages with a partial durable copy: written by the next sync.
    pub(crate) full: Vec<HeaderPage>,
    pub(crate) index: Vec<IndexEntry>,
    dirty: bool,
}

impl Live {
    /// The in-memory version of the pair at `page`, if the disk's is not current.
    pub(crate) fn page(&self, page: u16) -> Option<HeaderPage> {
        std::iter::once(&self.open).chain(&self.full).find(|p| p.page == page).cloned()
    }
}

/// Pages that a record of `record_bytes` with `blocks` payload blocks takes at most.
pub(crate) fn pages_needed(record_bytes: usize, blocks: usize) -> Result<u32, StoreError> {
    u32::try_from(blocks + 2 * (record_bytes / BODY + 2)).map_err(|_| StoreError::Full)
}

/// Bytes of the record of an update or of imported blocks.
pub(crate) const fn record_bytes(body_bytes: usize, blocks: usize) -> usize {
    RECORD_FIXED + 4 * blocks + body_bytes
}

/// A segment being written.
pub(crate) struct SegmentWriter {
    pub(crate) seg: Arc<Segment>,
    /// Held while there are unsynced writes, so that a failed write-back is not missed.
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) next_page: u32,
    /// Pages promised to reservations.
    pub(crate) reserved: Arc<AtomicU32>,
    /// Pages of the file that surely have space.
    pub(crate) alloc_pages: u32,
    /// Sync needs the file's name to be durable; see [`crate::pool::Names`].
    pub(crate) name_no: u64,
    unsynced: bool,
    closed: bool,
    mirror: Vec<HeaderPage>,
    mirror_next: Vec<HeaderPage>,
    /// Page and write number of the partial page that has its second copy.
    paired: (u16, u32),
}

impl SegmentWriter {
    /// Starts a segment by writing its header. Not synced.
    pub(crate) fn begin(spare: Spare, header: &SegmentHeader) -> Result<Self, StoreError> {
        header.write(spare.no, &*spare.file)?;
        let seg = Segment::new(spare.no, spare.class, header.generation, spare.prepared);
        let first = u16::try_from(FIRST_PAGE).expect("invariant: a small constant");
        *seg.live.lock() =
            Some(Live { open: HeaderPage::new(first, 0), full: Vec::new(), index: Vec::new(), dirty: false });
        Ok(Self {
            seg: Arc::new(seg),
            file: spare.file,
            next_page: FIRST_PAGE + 2,
            reserved: spare.reserved,
            alloc_pages: spare.alloc_pages,
            name_no: spare.name_no,
            unsynced: true,
            closed: false,
            mirror: Vec::new(),
            mirror_next: Vec::new(),
            paired: (0, 0),
        })
    }

    /// True while room in it is promised to somebody.
    pub(crate) fn is_promised(&self) -> bool {
        self.reserved.load(Ordering::Acquire) > 0
    }

    /// True when `pages` more fit, with space surely there.
    pub(crate) fn fits(&self, pages: u32) -> bool {
        self.next_page + pages <= self.alloc_pages.min(self.seg.class.pages())
    }

    fn context(&self) -> String {
        format!("writing {}", file_name(self.seg.no))
    }

    /// Writes a record and its payload; returns the first payload page. The caller has made sure
    /// that it fits. Header bytes, and small payload ([`crate::held`]), reach the disk with the next sync or
    /// when a header page is full.
    pub(crate) fn append(
        &mut self,
        kind: RecordKind,
        seq: u64,
        synced_seq: u64,
        payload: &[u8],
        crcs: &[u32],
        body: &[u8],
    ) -> Result<u32, StoreError> {
        debug_assert_eq!(payload.len(), crcs.len() * PAGE);
        let blocks = u32::try_from(crcs.len()).map_err(|_| StoreError::Full)?;
        let total = record_bytes(body.len(), crcs.len());
        assert!(self.fits(pages_needed(total, crcs.len())?), "invariant: the caller made room");
        let first_page = self.next_page;
        self.unsynced = true;
        if blocks > 0 {
            self.seg.held.put(&*self.file, first_page, payload).during(|| self.context())?;
            self.next_page += blocks;
        }
        let payload_page = u16::try_from(first_page).map_err(|_| StoreError::Full)?;
        let mut fixed = [0u8; RECORD_FIXED];
        fixed[4..8].copy_from_slice(&u32::try_from(total).map_err(|_| StoreError::Full)?.to_le_bytes());
        fixed[8] = kind.code();
        fixed[10..12].copy_from_slice(&payload_page.to_le_bytes());
        fixed[12..16].copy_from_slice(&blocks.to_le_bytes());
        let crc = crcs
            .iter()
            .fold(crc32c::crc32c(&fixed[4..]), |crc, c| crc32c::crc32c_append(crc, &c.to_le_bytes()));
        let crc = crc32c::crc32c_append(crc, body);
        fixed[..4].copy_from_slice(&crc.to_le_bytes());

        let seg = Arc::clone(&self.seg);
        let mut guard = seg.live.lock();
        let live = guard.as_mut().expect("invariant: a segment with a writer is live");
        if live.open.used() == BODY {
            self.turn_page(live, synced_seq)?;
        }
        if live.open.first.is_none() {
            let offset = u16::try_from(live.open.used()).expect("invariant: a page body is below 64 KiB");
            let start = Start { offset, seq, payload_page };
            live.open.first = Some(start);
            live.index.push(IndexEntry { page: live.open.page, index: live.open.index, start });
        }
        let mut put = |mut rest: &[u8]| {
            while !rest.is_empty() {
                if live.open.used() == BODY {
                    self.turn_page(live, synced_seq)?;
                }
                let n = live.open.push(rest);
                rest = &rest[n..];
            }
            Ok(())
        };
        put(&fixed)?;
        crcs.iter().try_for_each(|c| put(&c.to_le_bytes()))?;
        put(body)?;
        live.dirty = true;
        Ok(first_page)
    }

    /// Allocates the next header pair, links it, and writes the full page unless that would touch
    /// a pair with a durable copy.
    fn turn_page(&mut self, live: &mut Live, synced_seq: u64) -> Result<(), StoreError> {
        self.seg.held.write(&*self.file).during(|| self.context())?;
        let page = u16::try_from(self.next_page).map_err(|_| StoreError::Full)?;
        self.next_page += 2;
        live.open.next = page;
        let index = live.open.index + 1;
        let mut old = std::mem::replace(&mut live.open, HeaderPage::new(page, index));
        if old.write_no > 0 {
            live.full.push(old);
            return Ok(());
        }
        old.write_no = 1;
        let offset = u64::from(old.page) * PAGE_U64;
        let bytes = old.finish(self.seg.generation, synced_seq);
        let mut pair = [0u8; 2 * PAGE];
        pair[..PAGE].copy_from_slice(bytes);
        pair[PAGE..].copy_from_slice(bytes);
        self.file.write_at(&pair, offset).during(|| self.context())
    }

    /// Where the next record will begin.
    pub(crate) fn position(&self) -> LogPos {
        let guard = self.seg.live.lock();
        let live = guard.as_ref().expect("invariant: a segment with a writer is live");
        let offset = u16::try_from(live.open.used()).expect("invariant: a page body is below 64 KiB");
        LogPos { generation: self.seg.generation, page: live.open.page, index: live.open.index, offset }
    }

    /// Nothing more will be appended.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Writes what a sync has to make durable. The sync before this one has finished.
    /// True when the file has to be synced.
    pub(crate) fn prepare_sync(&mut self, synced_seq: u64) -> Result<bool, StoreError> {
        let seg = Arc::clone(&self.seg);
        let mut guard = seg.live.lock();
        let live = guard.as_mut().expect("invariant: a segment with a writer is live");
        seg.held.write_and_shrink(&*self.file).during(|| self.context())?;
        for mut page in self.mirror.drain(..) {
            let (offset, synced) = (page.other_slot_offset(), page.synced_seq);
            let bytes = page.finish(seg.generation, synced);
            self.file.write_at(bytes, offset).during(|| format!("writing {}", file_name(seg.no)))?;
            self.unsynced = true;
        }
        let open = live.dirty.then_some(&mut live.open);
        for page in live.full.iter_mut().chain(open) {
            page.write_no += 1;
            let offset = page.slot_offset();
            let bytes = page.finish(seg.generation, synced_seq);
            self.file.write_at(bytes, offset).during(|| format!("writing {}", file_name(seg.no)))?;
            self.unsynced = true;
        }
        live.dirty = false;
        self.mirror_next.append(&mut live.full);
        if self.closed && live.open.write_no > 0 {
            let done = std::mem::replace(&mut live.open, HeaderPage::new(0, 0));
            self.mirror_next.push(done);
        }
        Ok(std::mem::take(&mut self.unsynced))
    }

    /// Has the next sync write the second copy of the partial page too, where the version before it is.
    /// The sync before this one has finished, so the first copy is durable.
    pub(crate) fn pair_partial_page(&mut self) {
        let guard = self.seg.live.lock();
        let live = guard.as_ref().expect("invariant: a segment with a writer is live");
        let version = (live.open.page, live.open.write_no);
        if live.open.write_no > 0 && !live.dirty && version != self.paired {
            self.paired = version;
            self.mirror.push(live.open.clone());
        }
    }

    /// True when both copies of everything appended have been written and synced.
    pub(crate) fn is_paired(&self) -> bool {
        let guard = self.seg.live.lock();
        let live = guard.as_ref().expect("invariant: a segment with a writer is live");
        let open = live.open.write_no == 0 || self.paired == (live.open.page, live.open.write_no);
        let written = !live.dirty && live.full.is_empty() && !self.unsynced;
        open && written && self.mirror.is_empty() && self.mirror_next.is_empty()
    }

    /// Pages whose two copies are not both what they will be: they are in memory, too.
    pub(crate) fn unfinished_pages(&self) -> Vec<u16> {
        let guard = self.seg.live.lock();
        let live = guard.as_ref().expect("invariant: a segment with a writer is live");
        let pages = std::iter::once(&live.open).chain(&live.full);
        pages.chain(&self.mirror).chain(&self.mirror_next).map(|p| p.page).collect()
    }

    /// Writes a copy of the partial page again if it is damaged; returns where. The caller keeps others from
    /// appending and syncing.
    pub(crate) fn mend_partial_page(&mut self) -> Result<Option<u64>, StoreError> {
        let mut guard = self.seg.live.lock();
        let live = guard.as_mut().expect("invariant: a segment with a writer is live");
        if live.dirty || live.open.write_no == 0 || self.paired != (live.open.page, live.open.write_no) {
            return Ok(None);
        }
        let what = || format!("repairing {}", file_name(self.seg.no));
        let (page, index, synced) = (live.open.page, live.open.index, live.open.synced_seq);
        for copy in 0..2u64 {
            let offset = (u64::from(page) + copy) * PAGE_U64;
            let mut found = vec![0u8; PAGE];
            self.file.read_at(&mut found, offset).during(what)?;
            let whole = HeaderPage::parse(&found, page, index, self.seg.generation);
            if matches!(whole, Ok(Some(_))) {
                continue;
            }
            let bytes = live.open.finish(self.seg.generation, synced);
            self.file.write_at(bytes, offset).during(what)?;
            self.file.sync().during(what)?;
            return Ok(Some(offset / PAGE_U64));
        }
        Ok(None)
    }

    /// The sync that [`SegmentWriter::prepare_sync`] prepared has succeeded.
    /// True when the segment is closed and complete.
    pub(crate) fn finish_sync(&mut self) -> bool {
        self.mirror.append(&mut self.mirror_next);
        self.closed && self.mirror.is_empty() && !self.unsynced
    }

    /// Hands the index over and ends the writing.
    pub(crate) fn retire(self, shared: &Shared) {
        self.seg.written_pages.store(self.next_page, Ordering::Release);
        if let Some(live) = self.seg.live.lock().take() {
            shared.indexes.insert(&self.seg, Arc::new(live.index));
        }
    }

    /// Pages still free after what is written and reserved.
    pub(crate) fn virtual_end(&self) -> u32 {
        self.next_page + self.reserved.load(Ordering::Acquire)
    }
}
