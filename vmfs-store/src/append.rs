//! Appending and syncing: the hot path.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::header::{Update, UpdateHeader};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES, BlockCount, Head, Seq};

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::image::{ImageStore, Reservation, Space};
use crate::log::{ChainSegment, Tail};
use crate::map::overlay::Overlay;
use crate::map::{BLOCKS_MAX, Entry};
use crate::pool::{Pool, Spare};
use crate::segment::{Class, Kind, SegmentHeader, file_name};
use crate::writer::{RecordKind, SegmentWriter, pages_needed, record_bytes};

/// Most writes are of a few blocks: no need to fill in more.
const FEW_BLOCKS: usize = 16;

/// Room for `count` entries, all unset.
fn entries_for<'a>(
    count: usize,
    few: &'a mut [Entry; FEW_BLOCKS],
    many: &'a mut Vec<Entry>,
) -> &'a mut [Entry] {
    if count <= FEW_BLOCKS {
        return &mut few[..count];
    }
    many.resize(count, Entry::UNSET);
    many
}

/// What an update does to the map.
pub(crate) enum MapChange {
    None,
    /// Blocks from `start`; the entries are in the caller's buffer.
    Blocks {
        start: u64,
        count: usize,
    },
    Range {
        range: std::ops::Range<u64>,
        entry: Entry,
    },
}

/// Works out the entries of an update whose payload begins at `first_page` of segment `no`. `entries` has room for
/// as many as the update has digests.
pub(crate) fn map_change(
    header: &UpdateHeader,
    no: u32,
    first_page: u32,
    crcs: &[u32],
    entries: &mut [Entry],
) -> MapChange {
    match &header.op {
        Op::Write { .. } => {
            let mut pages = (first_page..).zip(crcs);
            for (entry, digest) in entries.iter_mut().zip(&header.digests) {
                *entry = match digest.is_zero() {
                    true => Entry::ZERO,
                    false => pages.next().map_or(Entry::ZERO, |(page, crc)| Entry::data(no, page, *crc)),
                };
            }
            MapChange::Blocks { start: header.start.0, count: header.digests.len() }
        }
        Op::Zero { .. } => {
            MapChange::Range { range: header.start.0..header.start.0 + header.count.0, entry: Entry::ZERO }
        }
        Op::Resize { size_bytes } => {
            MapChange::Range { range: BlockCount::covering(*size_bytes).0..BLOCKS_MAX, entry: Entry::ABSENT }
        }
        _ => MapChange::None,
    }
}

/// Applies a change to an overlay.
pub(crate) fn apply_change(overlay: &mut Overlay, change: &MapChange, entries: &[Entry]) {
    match change {
        MapChange::None => {}
        MapChange::Blocks { start, count } => overlay.set_each(*start, &entries[..*count]),
        MapChange::Range { range, entry } => overlay.set_range(range.clone(), *entry),
    }
}

impl ImageStore {
    /// Makes sure that an update with a header of `header_bytes` and `payload_blocks` non-zero
    /// blocks can be appended.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Latched`], or the disk's; nothing has changed.
    pub fn reserve(
        &self,
        header_bytes: usize,
        payload_blocks: usize,
        space: Space,
    ) -> Result<Reservation, StoreError> {
        self.check_latch()?;
        let blocks = if self.kind == MemberRole::Witness { 0 } else { payload_blocks };
        let pages = pages_needed(record_bytes(header_bytes, blocks), blocks)?;
        let mut tail = self.tail.lock();
        let tail = &mut *tail;
        if tail.spares.is_empty()
            && let Some(w) = &mut tail.current
        {
            if let Some(spare) = self.written_spare(w, pages)? {
                let promised = promise(&spare.reserved, pages);
                tail.spares.push_back(spare);
                return Ok(promised);
            }
            let end = w.virtual_end() + pages;
            if end <= w.seg.class.pages() {
                let class = w.seg.class;
                Pool::ensure_allocated(&self.shared, &*w.file, class, &mut w.alloc_pages, end, space)?;
                return Ok(promise(&w.reserved, pages));
            }
        }
        let full = tail.spares.back().is_none_or(|s| s.virtual_end() + pages > s.class.pages());
        if full {
            let class = Class::for_log(tail.log_bytes, self.shared.cfg.segment_bytes_max);
            tail.spares.push_back(self.shared.pool.take(&self.shared, pages, class, space)?);
        }
        let spare = tail.spares.back_mut().expect("invariant: one was just pushed");
        let end = spare.virtual_end() + pages;
        let class = spare.class;
        Pool::ensure_allocated(&self.shared, &*spare.file, class, &mut spare.alloc_pages, end, space)?;
        Ok(promise(&spare.reserved, pages))
    }

    /// A segment that every page was written of once, for a log that is flushed and whose segment is none: each
    /// sync would have the file system write down which pages hold data now, which takes as long as the sync does.
    fn written_spare(&self, w: &SegmentWriter, pages: u32) -> Result<Option<Spare>, StoreError> {
        let class = w.seg.class;
        // Those of the smallest class are never prewritten.
        let fits = class != Class::SMALLEST && Class::fitting(pages).is_some_and(|least| least <= class);
        if !fits || w.seg.prepared.load(Ordering::Acquire) || w.is_promised() || !self.shared.way.is_busy() {
            return Ok(None);
        }
        self.shared.pool.take_prepared(&self.shared, class)
    }

    /// Appends the update that extends the head. `payload` is its non-zero blocks in order, already
    /// checked against the digests (ignored by a witness). Visible to reads on return, not durable
    /// before [`ImageStore::sync`].
    ///
    /// # Errors
    /// [`StoreError::NotExtending`], [`StoreError::DigestMismatch`] (payload of the wrong length)
    /// and [`StoreError::Unsupported`] without effect; any other error latches the image.
    pub fn append(&self, r: Reservation, update: &Update, payload: &[u8]) -> Result<(), StoreError> {
        self.check_latch()?;
        let h = &update.header;
        let payload = if self.kind == MemberRole::Witness { &[] } else { payload };
        if self.kind == MemberRole::Replica && payload.len() != h.payload_blocks() * BLOCK_BYTES {
            return Err(StoreError::DigestMismatch);
        }
        if matches!(h.op, Op::Rewind { .. }) {
            return Err(StoreError::Unsupported("rewinding an image"));
        }
        let mut tail = self.tail.lock();
        let head = tail.head();
        if h.seq != head.seq.next() || h.parent != head.digest || h.image != self.id {
            return Err(StoreError::NotExtending { seq: h.seq, head: head.seq });
        }
        let result = self.append_checked(&mut tail, update, payload);
        drop(r);
        self.or_latch(result)
    }

    pub(crate) fn append_checked(
        &self,
        tail: &mut Tail,
        update: &Update,
        payload: &[u8],
    ) -> Result<(), StoreError> {
        let mut crcs = std::mem::take(&mut tail.crcs);
        crcs.clear();
        crcs.extend(payload.chunks_exact(BLOCK_BYTES).map(crc32c::crc32c));
        let record = record_bytes(update.bytes.len(), crcs.len());
        let pages = pages_needed(record, crcs.len())?;
        let written = tail.spares.front().is_some_and(|s| s.prepared);
        let leave =
            |w: &SegmentWriter| written && !w.seg.prepared.load(Ordering::Acquire) && !w.is_promised();
        if tail.current.as_ref().is_none_or(|w| !w.fits(pages) || leave(w)) {
            self.next_segment(tail, pages)?;
        }
        let writer = tail.current.as_mut().expect("invariant: a segment was just begun");
        let synced = self.durable_seq.load(Ordering::Acquire);
        let seq = update.header.seq;
        let page = writer.append(RecordKind::Update, seq.0, synced, payload, &crcs, &update.bytes)?;
        let no = writer.seg.no;
        let bytes = (record + payload.len()) as u64;
        tail.log_bytes += bytes;
        tail.bytes_since_checkpoint += bytes;
        if self.kind == MemberRole::Replica {
            self.change_map(&update.header, no, page, &crcs);
        }
        tail.crcs = crcs;
        Arc::make_mut(&mut tail.state).apply(update);
        Ok(())
    }

    /// Applies the update to the map. The caller holds the append lock.
    pub(crate) fn change_map(&self, header: &UpdateHeader, no: u32, page: u32, crcs: &[u32]) {
        let (mut few, mut many) = ([Entry::UNSET; FEW_BLOCKS], Vec::new());
        let entries = entries_for(header.digests.len(), &mut few, &mut many);
        let change = map_change(header, no, page, crcs, entries);
        // The old entries are looked up outside of the map's lock: it may read map pages, which the
        // next checkpoint needs anyway.
        let gone = self.data_replaced_by(&change).unwrap_or_else(|e| {
            // The update is in the log already; a damaged map page is the next checkpoint's trouble.
            tracing::warn!(image = %self.id, error = %e, "cannot count the blocks replaced");
            0
        });
        let mut map = self.map.write();
        let map = &mut *map;
        map.allocated += crcs.len() as u64;
        map.allocated = map.allocated.saturating_sub(gone);
        let before = map.content.overlay.bytes();
        apply_change(&mut map.content.overlay, &change, entries);
        let more = map.content.overlay.bytes().saturating_sub(before);
        self.shared.dirty_map_bytes.fetch_add(more as u64, Ordering::Relaxed);
    }

    /// Blocks with data that a change replaces.
    fn data_replaced_by(&self, change: &MapChange) -> Result<u64, StoreError> {
        match change {
            MapChange::None => Ok(0),
            MapChange::Range { range, .. } => {
                let content = self.map.read().content.clone();
                self.healing(|| content.count_data(&self.shared, range.clone()))
            }
            MapChange::Blocks { start, count } => {
                let (mut few, mut many) = ([Entry::UNSET; FEW_BLOCKS], Vec::new());
                let old = entries_for(*count, &mut few, &mut many);
                let base = {
                    let map = self.map.read();
                    map.content.recent(*start, old);
                    Arc::clone(&map.content.base)
                };
                self.healing(|| base.fill(&self.shared, *start, old))?;
                Ok(old.iter().filter(|e| e.is_data()).count() as u64)
            }
        }
    }

    /// Ends the current segment and begins the next, which has room for `pages`.
    pub(crate) fn next_segment(&self, tail: &mut Tail, pages: u32) -> Result<(), StoreError> {
        if let Some(mut old) = tail.current.take() {
            old.close();
            tail.closing.push(old);
        }
        let spare = loop {
            match tail.spares.pop_front() {
                Some(spare) if pages + 4 <= spare.class.pages() => break spare,
                Some(spare) => self.put_back(spare)?,
                None => {
                    let class = Class::for_log(tail.log_bytes, self.shared.cfg.segment_bytes_max);
                    break self.shared.pool.take(&self.shared, pages, class, Space::Control)?;
                }
            }
        };
        self.begin_segment(tail, spare)?;
        let w = tail.current.as_mut().expect("invariant: a segment was just begun");
        let end = w.next_page + pages;
        Pool::ensure_allocated(&self.shared, &*w.file, w.seg.class, &mut w.alloc_pages, end, Space::Control)
    }

    /// Begins `spare` as the log's next segment, after the head.
    pub(crate) fn begin_segment(&self, tail: &mut Tail, spare: Spare) -> Result<(), StoreError> {
        let previous = tail.chain.last();
        let ordinal = previous.map_or(1, |c| c.ordinal + 1);
        let head = tail.head();
        let header = SegmentHeader {
            kind: if tail.shadow { Kind::Shadow } else { Kind::Log },
            class: spare.class,
            store: self.shared.store,
            image: self.id,
            generation: self.shared.generations.next(),
            ordinal,
            prev_generation: previous.map_or(0, |c| c.seg.generation),
            link: head,
        };
        let writer = SegmentWriter::begin(spare, &header)?;
        let seg = Arc::clone(&writer.seg);
        Arc::make_mut(&mut tail.chain).push(ChainSegment {
            seg: Arc::clone(&seg),
            ordinal,
            start_seq: head.seq,
        });
        Arc::make_mut(&mut self.map.write().content.segments).insert(seg.no, seg);
        tail.current = Some(writer);
        tail.end = None;
        Ok(())
    }

    /// Returns a segment that was taken for a reservation and not used.
    pub(crate) fn put_back(&self, spare: Spare) -> Result<(), StoreError> {
        let Spare { no, class, prepared, file, .. } = spare;
        drop(file);
        self.shared.pool.give_back_no(&self.shared, no, class, prepared)
    }

    /// On return everything appended before the call is on stable storage. Concurrent calls share
    /// one device flush. Returns the durable head.
    ///
    /// # Errors
    /// Any error latches the image.
    pub fn sync(&self) -> Result<Head, StoreError> {
        let target = self.head();
        let mut s = self.syncing.lock();
        if s.durable.rank() < target.rank() {
            self.shared.way.flush();
        }
        loop {
            self.check_latch()?;
            if s.durable.rank() >= target.rank() {
                return Ok(s.durable);
            }
            if !s.running {
                break;
            }
            self.sync_done.wait(&mut s);
        }
        s.running = true;
        drop(s);
        let result = self.or_latch(self.sync_now());
        let mut s = self.syncing.lock();
        s.running = false;
        if let Ok(head) = &result {
            s.durable = *head;
            self.durable_seq.store(head.seq.0, Ordering::Release);
        }
        self.sync_done.notify_all();
        result
    }

    /// Syncs what is there now. The caller has set `running`, so there is no other.
    pub(crate) fn sync_now(&self) -> Result<Head, StoreError> {
        let synced = self.durable_seq.load(Ordering::Acquire);
        let mut files: Vec<(u32, Arc<dyn DiskFile>, bool)> = Vec::new();
        let mut name_no = 0;
        let head = {
            let mut tail = self.tail.lock();
            for w in tail.writers() {
                let dirty = w.prepare_sync(synced)?;
                name_no = name_no.max(w.name_no);
                files.push((w.seg.no, Arc::clone(&w.file), dirty));
            }
            tail.head()
        };
        for (no, file, _) in files.iter().filter(|(_, _, dirty)| *dirty) {
            let synced = file.sync().during(|| format!("syncing {}", file_name(*no)));
            if synced.is_err() {
                self.leave_mark();
            }
            synced?;
        }
        self.shared.pool.names.sync(&self.shared, name_no)?;
        let mut tail = self.tail.lock();
        let mut done = Vec::new();
        let count = files.len();
        for (i, w) in tail.writers().take(count).enumerate() {
            if w.finish_sync() {
                done.push(i);
            }
        }
        // Only closed segments are ever done, and those come first.
        for i in done.into_iter().rev() {
            tail.closing.remove(i).retire(&self.shared);
        }
        Ok(head)
    }

    /// On return every header page written so far has both its copies on stable storage, also a partial
    /// one, unless appends go on meanwhile: the loss of a page then takes nothing with it.
    pub(crate) fn sync_pairs(&self) -> Result<(), StoreError> {
        let alone = self.exclude_syncs();
        self.check_latch()?;
        for round in 0..2 {
            if round == 1 {
                self.tail.lock().writers().for_each(SegmentWriter::pair_partial_page);
            }
            let head = self.or_latch(self.sync_now())?;
            alone.set_durable(head);
        }
        Ok(())
    }

    /// Leaves a lasting sign that a sync has failed: the page cache can no longer be believed.
    pub(crate) fn leave_mark(&self) {
        let name = mark_name(self.id);
        let left = self.shared.disk.open(&name, true).and_then(|_| self.shared.disk.sync_names("mark"));
        if let Err(e) = left {
            tracing::error!(image = %self.id, error = %e, "cannot leave a mark of the failed sync");
        }
    }

    /// Keeps others from syncing until the guard is dropped.
    pub(crate) fn exclude_syncs(&self) -> SyncGuard<'_> {
        let mut s = self.syncing.lock();
        while s.running {
            self.sync_done.wait(&mut s);
        }
        s.running = true;
        SyncGuard(self)
    }
}

/// While it lives, its owner is the only one who syncs the image.
pub(crate) struct SyncGuard<'a>(&'a ImageStore);

impl SyncGuard<'_> {
    /// What is durable.
    pub(crate) fn durable(&self) -> Head {
        self.0.syncing.lock().durable
    }
    /// What counts as durable from here on.
    pub(crate) fn set_durable(&self, head: Head) {
        self.0.syncing.lock().durable = head;
        self.0.durable_seq.store(head.seq.0, Ordering::Release);
    }
}

impl Drop for SyncGuard<'_> {
    fn drop(&mut self) {
        self.0.syncing.lock().running = false;
        self.0.sync_done.notify_all();
    }
}

fn promise(counter: &Arc<std::sync::atomic::AtomicU32>, pages: u32) -> Reservation {
    counter.fetch_add(pages, Ordering::AcqRel);
    Reservation { counter: Arc::clone(counter), pages }
}

/// File whose presence says that a sync of the image has failed.
pub(crate) fn mark_name(image: vmfs_common::ImageId) -> String {
    format!("mark/{image}")
}

/// The last update of a chain that ends at `head`, for segment number `at`.
pub(crate) fn last_seq(chain: &[ChainSegment], at: usize, head: Seq) -> Seq {
    chain.get(at + 1).map_or(head, |n| n.start_seq)
}
