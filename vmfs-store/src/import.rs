//! Building new content beside the present one (block-level sync).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use vmfs_common::hash::block_digests_of;
use vmfs_common::header::Update;
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BlockCount, BlockIndex, Digest, Head};

use crate::checkpointing::Commit;
use crate::error::StoreError;
use crate::fork::ForkInfo;
use crate::image::{ImageStore, Space};
use crate::map::tree::Base;
use crate::map::{BLOCKS_MAX, Content, Entry};
use crate::merkle::{MerkleTree, merkle_tree};
use crate::pool::Pool;
use crate::segment::Class;
use crate::shadow::{self, BlocksRecord, Origin};
use crate::view::digests;
use crate::writer::{RECORD_BLOCKS_MAX, SegmentWriter};

/// Map changes held in memory before they are written out.
const OVERLAY_BYTES_MAX: usize = 8 << 20;

struct Inner {
    content: Content,
    writer: Option<SegmentWriter>,
    records: u64,
    bytes: u64,
    /// Segments of this import alone.
    own: BTreeMap<u32, Class>,
}

/// Content under construction. Dropped or crashed, it leaves no trace; the image keeps its old
/// content, head and log until [`Import::finish`].
pub struct Import {
    image: Arc<ImageStore>,
    inner: Mutex<Inner>,
    finished: bool,
}

impl std::fmt::Debug for Import {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Import").field("image", &self.image.id).finish_non_exhaustive()
    }
}

impl ImageStore {
    /// Starts building new content beside the present one, from nothing or from a copy of it.
    ///
    /// # Errors
    /// [`StoreError::Importing`], [`StoreError::Latched`].
    pub fn begin_import(self: &Arc<Self>, from_copy: bool) -> Result<Import, StoreError> {
        self.check_latch()?;
        if self.importing.swap(true, Ordering::AcqRel) {
            return Err(StoreError::Importing(self.id));
        }
        let content = self.import_base(from_copy);
        let content = content.inspect_err(|_| self.importing.store(false, Ordering::Release))?;
        let inner = Inner { content, writer: None, records: 0, bytes: 0, own: BTreeMap::new() };
        Ok(Import { image: Arc::clone(self), inner: Mutex::new(inner), finished: false })
    }

    fn import_base(&self, from_copy: bool) -> Result<Content, StoreError> {
        let mut ck = self.checkpoints.lock();
        if from_copy {
            self.checkpoint_locked(&mut ck, false)?;
            // Holding the checkpoint lock, nothing is frozen now.
            return Ok(self.map.read().content.clone());
        }
        let base = Arc::new(Base::empty(self.id));
        ck.register(&base);
        Ok(Content::empty(base))
    }
}

impl Import {
    /// Writes blocks: one digest per block of the range (zero for an all-zero block), `payload` the
    /// others in order. Checked against the digests.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Full`], or the disk's.
    pub fn write(&self, start: BlockIndex, digests: &[Digest], payload: &[u8]) -> Result<(), StoreError> {
        self.image.check_data()?;
        self.image.check_latch()?;
        let stored = digests.iter().filter(|d| !d.is_zero());
        if !payload.len().is_multiple_of(BLOCK_BYTES)
            || start.0.checked_add(digests.len() as u64).is_none_or(|end| end > BLOCKS_MAX)
            || !block_digests_of(payload.chunks_exact(BLOCK_BYTES)).iter().eq(stored)
        {
            return Err(StoreError::DigestMismatch);
        }
        let mut inner = self.inner.lock();
        let (mut at, mut rest) = (start.0, payload);
        for piece in digests.chunks(RECORD_BLOCKS_MAX) {
            let n = piece.iter().filter(|d| !d.is_zero()).count() * BLOCK_BYTES;
            let (now, later) = rest.split_at(n);
            self.write_record(&mut inner, at, piece, now)?;
            rest = later;
            at += piece.len() as u64;
        }
        self.flush_overlay(&mut inner, OVERLAY_BYTES_MAX)
    }

    fn write_record(
        &self,
        inner: &mut Inner,
        start: u64,
        digests: &[Digest],
        payload: &[u8],
    ) -> Result<(), StoreError> {
        let stored = (start..).zip(digests.iter().copied()).filter(|(_, d)| !d.is_zero());
        let record = BlocksRecord::new(stored, payload);
        let mut entries = vec![Entry::ZERO; digests.len()];
        if !record.crcs.is_empty() {
            self.make_room(inner, record.pages()?)?;
            inner.records += 1;
            let number = inner.records;
            let writer = inner.writer.as_mut().expect("invariant: make_room begins a segment");
            let first = record.append(writer, number, payload)?;
            let no = writer.seg.no;
            let mut pages = (first..).zip(&record.crcs);
            for (entry, _) in entries.iter_mut().zip(digests).filter(|(_, d)| !d.is_zero()) {
                let (page, crc) = pages.next().expect("invariant: a page for every stored block");
                *entry = Entry::data(no, page, *crc);
            }
            inner.bytes += payload.len() as u64;
        }
        inner.content.overlay.set_each(start, &entries);
        Ok(())
    }

    fn make_room(&self, inner: &mut Inner, pages: u32) -> Result<(), StoreError> {
        let shared = &self.image.shared;
        if let Some(w) = &mut inner.writer {
            let end = w.next_page + pages;
            if end <= w.seg.class.pages() {
                let class = w.seg.class;
                return Pool::ensure_allocated(shared, &*w.file, class, &mut w.alloc_pages, end, Space::Data);
            }
        }
        self.close_segment(inner)?;
        let class = Class::for_log(inner.bytes, shared.cfg.segment_bytes_max);
        let mut spare = shared.pool.take(shared, pages, class, Space::Data)?;
        let end = spare.virtual_end() + pages;
        Pool::ensure_allocated(shared, &*spare.file, spare.class, &mut spare.alloc_pages, end, Space::Data)?;
        inner.own.insert(spare.no, spare.class);
        let writer = shadow::begin(shared, self.image.id, spare, Origin::Import)?;
        let seg = Arc::clone(&writer.seg);
        Arc::make_mut(&mut inner.content.segments).insert(seg.no, seg);
        inner.writer = Some(writer);
        Ok(())
    }

    /// Makes the segment being written complete and durable.
    fn close_segment(&self, inner: &mut Inner) -> Result<(), StoreError> {
        match inner.writer.take() {
            Some(w) => shadow::close(&self.image.shared, w),
            None => Ok(()),
        }
    }

    /// Writes map changes out when they take more than `bytes_max`.
    fn flush_overlay(&self, inner: &mut Inner, bytes_max: usize) -> Result<(), StoreError> {
        let overlay = &inner.content.overlay;
        if overlay.is_empty() || (bytes_max > 0 && overlay.bytes() <= bytes_max) {
            return Ok(());
        }
        let mut ck = self.image.checkpoints.lock();
        let image = &self.image;
        let mut free = image.healing(|| image.free_pages(&ck))?;
        let merge = || image.merge(&mut free, &inner.content.base, &inner.content.overlay);
        let base = Arc::new(image.healing(merge)?);
        ck.register(&base);
        inner.content.base = base;
        inner.content.overlay = crate::map::overlay::Overlay::default();
        Ok(())
    }

    /// Makes a range zeros.
    ///
    /// # Errors
    /// The disk's.
    pub fn zero(&self, start: BlockIndex, count: BlockCount) -> Result<(), StoreError> {
        let end = start.0.saturating_add(count.0).min(BLOCKS_MAX);
        let mut inner = self.inner.lock();
        inner.content.overlay.set_range(start.0..end, Entry::ZERO);
        self.flush_overlay(&mut inner, OVERLAY_BYTES_MAX)
    }
    /// Digests of the content so far.
    ///
    /// # Errors
    /// As [`crate::View::digests`].
    pub fn digests(&self, start: BlockIndex, count: usize) -> Result<Vec<Digest>, StoreError> {
        let content = self.inner.lock().content.clone();
        self.image.healing(|| digests(&self.image.shared, &content, start.0, count))
    }
    /// The Merkle tree of the content so far.
    ///
    /// # Errors
    /// As [`crate::View::merkle_tree`].
    pub fn merkle_tree(&self) -> Result<MerkleTree, StoreError> {
        let content = self.inner.lock().content.clone();
        self.image.healing(|| merkle_tree(&self.image.shared, &content))
    }

    /// Replaces the image's content, state and head by this one: the content after `base`, whose
    /// state is `state`. Atomic, and durable on return. The log then begins after `base`. With
    /// `keep_fork` the old log stays as a fork, as far as it was retained.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`] when `state` is not the one after `base`, or the disk's; the old
    /// content stays.
    pub fn finish(
        mut self,
        base: &Update,
        state: ImageState,
        keep_fork: bool,
    ) -> Result<Option<ForkInfo>, StoreError> {
        let image = Arc::clone(&self.image);
        if state.head() != base.head() || state.image != image.id || base.header.image != image.id {
            return Err(StoreError::NotInHistory(base.head()));
        }
        let fork = {
            let mut inner = self.inner.lock();
            self.close_segment(&mut inner)?;
            self.flush_overlay(&mut inner, 0)?;
            image.adopt(&inner.content, state, keep_fork)?
        };
        self.finished = true;
        Ok(fork)
    }
}

impl ImageStore {
    /// Makes imported content the image's own.
    fn adopt(
        &self,
        content: &Content,
        state: ImageState,
        keep_fork: bool,
    ) -> Result<Option<ForkInfo>, StoreError> {
        let mut ck = self.checkpoints.lock();
        let (excluded, mut tail) = self.synced_and_alone()?;
        let fork = if keep_fork && tail.log_start <= tail.head().seq {
            let ancestor = self.ancestor_of_log(&tail)?;
            Some(self.make_fork(&tail, ancestor)?)
        } else {
            None
        };
        let mut forks = self.forks.lock().clone();
        forks.extend(fork.clone());
        // The present segments stay listed until the commit has decided which are needed.
        let mut segments = (*content.segments).clone();
        for (no, seg) in self.map.read().content.segments.iter() {
            segments.entry(*no).or_insert_with(|| Arc::clone(seg));
        }
        let segments = Arc::new(segments);
        let state = Arc::new(state);
        let head = state.head();
        let chain = Arc::default();
        let moment = self.moment(state, None, Arc::clone(&chain), head.seq.next());
        let mut free = self.healing(|| self.free_pages(&ck))?;
        let base = Arc::clone(&content.base);
        // Both superblocks: the old lineage must not come back.
        let newest =
            usize::from(ck.slots[1].as_ref().map(|s| s.number) > ck.slots[0].as_ref().map(|s| s.number));
        let victims = vec![1 - newest, newest];
        let commit = Commit { moment: &moment, base: &base, forks: &forks, victims, segments: &segments };
        let done = self.commit(&mut ck, &mut free, &commit)?;
        *self.forks.lock() = forks;
        tail.log_start = head.seq.next();
        tail.log_bytes = 0;
        let state = Arc::clone(&moment.state);
        drop(moment);
        self.install(&mut ck, &mut tail, state, chain, base, segments);
        drop(tail);
        excluded.set_durable(head);
        drop(excluded);
        self.let_go(&mut ck, &done);
        self.recycle(&mut ck)?;
        Ok(fork.map(|f| f.info))
    }

    /// The head before the first update of the retained log.
    fn ancestor_of_log(&self, tail: &crate::log::Tail) -> Result<Head, StoreError> {
        let before = tail.log_start.prev();
        if before == vmfs_common::Seq::ZERO {
            return Ok(Head::default());
        }
        if let Some(head) = tail.state.known_head_at(before) {
            return Ok(head);
        }
        let mut parent = Digest::default();
        let mut epoch = tail.head().epoch;
        let named = crate::log::walk(&self.shared, &tail.chain, tail.log_start, tail.log_start, |_, _, u| {
            // Not the start of an epoch, else the state would know the head before it.
            (parent, epoch) = (u.header.parent, u.header.epoch);
            Ok(false)
        });
        match named {
            // A copy that is replaced because it is damaged.
            Err(e) if e.is_damage() => Ok(Head { seq: before, ..Head::default() }),
            named => named.map(|()| Head { epoch, seq: before, digest: parent }),
        }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        self.image.importing.store(false, Ordering::Release);
        if self.finished {
            return;
        }
        if self.image.latch.get().is_some() {
            // What is on the disk is not known: nothing may be used again before the next recovery.
            return;
        }
        let inner = self.inner.get_mut();
        inner.writer = None;
        let mut ck = self.image.checkpoints.lock();
        let segments = std::mem::take(&mut inner.content.segments);
        ck.limbo
            .extend(segments.iter().filter(|(no, _)| inner.own.contains_key(no)).map(|(_, s)| Arc::clone(s)));
    }
}
