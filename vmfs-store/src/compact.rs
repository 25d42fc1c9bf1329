//! Compaction: what is left of sparse segments is copied together, and they are given back.
//!
//! A segment that neither the log nor a fork needs lives on for the blocks of the map in it alone. When more
//! than half of what such segments take is dead, the blocks of the sparsest ones are copied into a shadow
//! segment, checked against their digests on the way. That is synced, then each map entry is changed if it
//! still names the old place, then a checkpoint is made. A crash before it leaves the old map and the old
//! segments. The old segments are dropped as any others: by a checkpoint that nothing keeping them is left
//! in, and a checkpoint at or below the commit point always stays.
//!
//! One job runs at a time, and empties segments into one other. Several may share a checkpoint, since that
//! writes map pages for blocks from all over the image. Segments that one of them has filled or emptied are no
//! choice for the next, so the numbers of live blocks in the last checkpoint are never too small.
//!
//! Jobs of the other kind put the blocks of an image in order: [`crate::gather`].
//!
//! A block whose bytes are damaged, or cannot be read, stays where it is, for the scrub to find and repair.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::hash::block_digests;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES, BLOCK_BYTES_U64, Digest, Seq};

use crate::checkpointing::Checkpoints;
use crate::error::{IoContext as _, StoreError};
use crate::gather::{Gather, Windows};
use crate::image::{ImageStore, Space};
use crate::map::Entry;
use crate::page::BODY;
use crate::pool::Pool;
use crate::records::{Next, Records};
use crate::scrub::described;
use crate::segment::{Class, FIRST_PAGE, PAGE, PAGE_U64, Segment, file_name};
use crate::shadow::{self, BlocksRecord, Origin};
use crate::shared::Shared;
use crate::view::{Wait, read_entries};
use crate::way::PIECE_BYTES;
use crate::writer::{RECORD_BLOCKS_MAX, RECORD_FIXED, SegmentWriter};

/// Bytes that one block takes in a record: checksum, index, digest.
const RECORD_BYTES_PER_BLOCK: usize = 4 + 8 + Digest::LEN;
/// Blocks looked at, and moved as far as they are alive, at a time: a piece.
pub(crate) const LOOK_BLOCKS: usize = 64;
const _: () =
    assert!(LOOK_BLOCKS <= RECORD_BLOCKS_MAX && LOOK_BLOCKS as u64 * BLOCK_BYTES_U64 <= PIECE_BYTES);
/// Looking at them counts as so many bytes even when none is alive.
pub(crate) const LOOK_BYTES: u64 = 32 << 10;
/// The one that has the new places, and one more in place of that with the old ones.
const CHECKPOINTS_TO_LET_GO: u8 = 2;
/// Map entries changed while readers wait.
const CHANGES_MAX: usize = 256;

/// How much of the disk an image takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpaceUse {
    /// Bytes of the segments that belong to it.
    pub segment_bytes: u64,
    /// Bytes of blocks that hold data.
    pub live_bytes: u64,
    /// Bytes that compaction has moved since the store was opened.
    pub compacted_bytes: u64,
}

/// Segments of an image may take this much more than twice its data before compaction hurries: a quarter of its
/// data, up to the first, and the second: two checkpoints' log.
const BLOAT_MAX_BYTES: u64 = 1 << 30;
const BLOAT_MIN_BYTES: u64 = 128 << 20;

impl SpaceUse {
    pub(crate) fn is_bloated(&self) -> bool {
        let bloat = (self.live_bytes / 4).min(BLOAT_MAX_BYTES) + BLOAT_MIN_BYTES;
        self.segment_bytes > 2 * self.live_bytes + bloat
    }
}

/// What compaction knows of an image between two calls.
#[derive(Default)]
pub(crate) struct Compaction {
    pub(crate) job: Option<Job>,
    /// There was nothing to begin when that was last tried.
    pub(crate) idle: bool,
    /// Number of the checkpoint after which there was nothing to gain.
    seen: u64,
    pub(crate) gather: Gather,
}

/// A payload block that may be moved.
pub(crate) struct Held {
    pub(crate) block: u64,
    pub(crate) entry: Entry,
    pub(crate) crc: u32,
    pub(crate) digest: Digest,
}

/// A block copied from one place to another.
struct Moved {
    block: u64,
    from: Entry,
    to: Entry,
}

/// Segments being emptied into another, or parts of the image being gathered there.
pub(crate) struct Job {
    /// Still to be read. While they are held, their numbers are not used again.
    ahead: VecDeque<Arc<Segment>>,
    /// Still to be gathered.
    windows: Option<Windows>,
    /// Payload blocks of the segment or window being read, from the next one on.
    held: VecDeque<Held>,
    read: Vec<Arc<Segment>>,
    writer: SegmentWriter,
    records: u64,
    moved: Vec<Moved>,
    lineage: u64,
}

impl Job {
    fn new(plan: Plan, writer: SegmentWriter, lineage: u64) -> Self {
        Self {
            ahead: plan.victims.into(),
            windows: None,
            held: VecDeque::new(),
            read: Vec::new(),
            writer,
            records: 0,
            moved: Vec::new(),
            lineage,
        }
    }
    /// Of blocks that are scattered.
    pub(crate) fn gathering(windows: Windows, writer: SegmentWriter, lineage: u64) -> Self {
        let plan = Plan { victims: Vec::new(), pages: 0 };
        Self { windows: Some(windows), ..Self::new(plan, writer, lineage) }
    }
    fn is_done(&self) -> bool {
        let gathered = self.windows.as_ref().is_none_or(|w| w.ahead.is_empty());
        self.ahead.is_empty() && self.held.is_empty() && gathered
    }
    /// There is no room for the rest, which stays where it is.
    fn cut_short(&mut self) {
        self.held.clear();
        self.ahead.clear();
        if let Some(windows) = &mut self.windows {
            windows.ahead.clear();
        }
    }
    /// Makes what was copied so far durable: what is left for the end is little.
    fn sync(&self) -> Result<(), StoreError> {
        let SegmentWriter { seg, file, .. } = &self.writer;
        let written = seg.held.write(&**file);
        written.and_then(|()| file.sync()).during(|| format!("syncing {}", file_name(seg.no)))
    }
    /// The segment that was being filled.
    pub(crate) fn into_target(self) -> Arc<Segment> {
        self.writer.seg
    }
}

/// Fetches a segment a piece at a time, ahead of who looks at it here and there: that keeps the disk from others for
/// less time than as many small reads. It reads more, so only while somebody flushes.
#[derive(Default)]
struct Ahead {
    /// Fetched up to here.
    page: u32,
    scratch: Vec<u8>,
}

impl Ahead {
    /// Makes sure that the piece with `page` in it is on its way.
    fn reach(&mut self, shared: &Shared, seg: &Segment, page: u32) -> Result<(), StoreError> {
        let piece_pages = u32::try_from(PIECE_BYTES / PAGE_U64).expect("invariant: a small constant");
        if !shared.way.is_busy() {
            // What was passed meanwhile is not fetched later.
            self.page = self.page.max(page);
            return Ok(());
        }
        while self.page <= page {
            let pages = piece_pages.min(seg.class.pages() - self.page);
            if pages == 0 {
                return Ok(());
            }
            self.scratch.resize(pages as usize * PAGE, 0);
            let file = seg.file(&shared.files)?;
            let fetched = file.read_soon(&mut self.scratch, u64::from(self.page) * PAGE_U64);
            fetched.during(|| format!("reading {}", file_name(seg.no)))?;
            self.page += pages;
            shared.way.rest();
        }
        Ok(())
    }
}

/// Which segments to empty, and how much that is.
struct Plan {
    victims: Vec<Arc<Segment>>,
    pages: u32,
}

/// Pages that `blocks` blocks in so many records take at most, besides what any segment has.
pub(crate) fn pages_to_move(blocks: usize, records: usize) -> u32 {
    let bytes = blocks * RECORD_BYTES_PER_BLOCK + records * RECORD_FIXED;
    // What the writer wants to be free for the last record.
    let last = RECORD_FIXED + RECORD_BLOCKS_MAX * RECORD_BYTES_PER_BLOCK;
    let headers = 2 * (bytes / BODY + 1) + 2 * (last.min(bytes) / BODY + 2);
    u32::try_from(blocks + headers).unwrap_or(u32::MAX)
}

impl ImageStore {
    /// How much of the disk it takes.
    #[must_use]
    pub fn space_use(&self) -> SpaceUse {
        let (segment_bytes, live) = {
            let map = self.map.read();
            (map.content.segments.values().map(|s| s.class.bytes()).sum(), map.allocated)
        };
        let compacted_bytes = self.compacted_bytes.load(Ordering::Relaxed);
        SpaceUse { segment_bytes, live_bytes: live * BLOCK_BYTES_U64, compacted_bytes }
    }

    /// Goes on with compaction until about `budget_bytes` more have been copied. Returns how much of the budget
    /// was used; 0 when there is nothing to do now.
    ///
    /// # Errors
    /// The disk's. The map and the segments are as before.
    pub(crate) fn compact(&self, budget_bytes: u64) -> Result<u64, StoreError> {
        if !self.may_move() {
            return Ok(0);
        }
        let mut state = self.compaction.lock();
        let job = match state.job.take() {
            Some(job) => Some(job),
            None => self.begin_job(&mut state)?,
        };
        state.idle = job.is_none();
        match job {
            Some(job) => self.run_job(&mut state, job, budget_bytes),
            None => Ok(0),
        }
    }

    /// There are blocks, and nothing else replaces the map.
    pub(crate) fn may_move(&self) -> bool {
        self.kind != MemberRole::Witness
            && !self.importing.load(Ordering::Acquire)
            && self.latch.get().is_none()
    }

    /// Goes on with a job until the budget is used, and ends it when nothing is left. Returns how much was used.
    pub(crate) fn run_job(
        &self,
        state: &mut Compaction,
        mut job: Job,
        budget_bytes: u64,
    ) -> Result<u64, StoreError> {
        match self.copy_some(&mut job, budget_bytes) {
            Ok(n) if !job.is_done() => {
                state.job = Some(job);
                Ok(n)
            }
            Ok(n) => self.end_job(job).map(|()| n),
            Err(e) => {
                self.give_up(job.writer);
                Err(e)
            }
        }
    }

    /// Chooses what to compact; `None` when there is nothing, or no space for it now.
    fn begin_job(&self, state: &mut Compaction) -> Result<Option<Job>, StoreError> {
        let Some(ck) = self.checkpoints.try_lock() else { return Ok(None) };
        if !self.may_compact(&ck) || ck.number() == state.seen {
            return Ok(None);
        }
        let Some(plan) = self.choose(&ck, u64::MAX) else {
            state.seen = ck.number();
            return Ok(None);
        };
        match self.begin_target(plan.pages, Space::Data) {
            Ok(writer) => Ok(Some(Job::new(plan, writer, ck.lineage))),
            // On a full disk it goes on with half of the reserve, while nothing waits to be given back.
            Err(StoreError::Full) if !ck.holds_emptied() && !ck.moves.any() => {
                let Some(plan) = self.choose(&ck, self.shared.cfg.reserve_bytes / 2) else { return Ok(None) };
                match self.begin_target(plan.pages, Space::Control) {
                    Ok(writer) => Ok(Some(Job::new(plan, writer, ck.lineage))),
                    Err(StoreError::Full) => Ok(None),
                    Err(e) => Err(e),
                }
            }
            Err(StoreError::Full) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Begins a segment that moved blocks go to, with room for so many pages of them.
    pub(crate) fn begin_target(&self, pages: u32, space: Space) -> Result<SegmentWriter, StoreError> {
        let shared = &self.shared;
        let mut spare = shared.pool.take_unprepared(shared, pages, space)?;
        // The blocks moved are older than all that is appended from here on.
        let before = self.tail.lock().chain.last().map_or(0, |c| c.seg.generation);
        let (no, class, prepared, file) = (spare.no, spare.class, spare.prepared, Arc::clone(&spare.file));
        let end = spare.virtual_end() + pages;
        let begun = Pool::ensure_allocated(shared, &*file, class, &mut spare.alloc_pages, end, space)
            .and_then(|()| shadow::begin(shared, self.id, spare, Origin::Moved { before }));
        if begun.is_err() {
            drop(file);
            shared.pool.give_back_no(shared, no, class, prepared)?;
        }
        begun
    }

    /// True when emptied segments can be given back after two more checkpoints, because the newest one can no
    /// longer be rolled back, and there are not many of them yet.
    pub(crate) fn may_compact(&self, ck: &Checkpoints) -> bool {
        let commit = Seq(self.commit.load(Ordering::Acquire));
        !self.is_checkpoint_full(ck) && ck.frozen.is_none() && ck.newest().is_some_and(|s| s.seq() <= commit)
    }

    /// A checkpoint is due for what was compacted since the last one, as it is for so much log.
    fn is_checkpoint_full(&self, ck: &Checkpoints) -> bool {
        ck.moves.emptied_bytes >= self.shared.cfg.checkpoint_log_bytes
    }

    /// The sparsest segments that nothing but their live blocks keeps, as many as one of at most `bytes_max`
    /// takes the live blocks of; `None` when half of such segments is alive, or nothing would be gained.
    fn choose(&self, ck: &Checkpoints, bytes_max: u64) -> Option<Plan> {
        let busy = self.busy_segments();
        let (segments, base) = {
            let map = self.map.read();
            (Arc::clone(&map.content.segments), Arc::clone(&map.content.base))
        };
        let idle = |s: &&Arc<Segment>| {
            !busy.contains(&s.no) && !ck.emptied.contains(&s.no) && s.live.lock().is_none()
        };
        // Without live blocks, or filled since: not counted in the checkpoint.
        let live = |s: &Arc<Segment>| Some((base.live.get(&s.no).copied()?, Arc::clone(s)));
        let mut idle: Vec<(u32, Arc<Segment>)> = segments.values().filter(idle).filter_map(live).collect();
        drop(segments);
        let bytes: u64 = idle.iter().map(|(_, s)| s.class.bytes()).sum();
        let live_bytes: u64 = idle.iter().map(|(n, _)| u64::from(*n) * BLOCK_BYTES_U64).sum();
        if 2 * (live_bytes + ck.moves.moved_bytes) >= bytes + ck.moves.filled_bytes {
            return None;
        }
        idle.sort_by_key(|(n, s)| (u64::from(*n) << 32) / s.class.bytes());
        // Those begun when the configured size was larger may need one as large.
        let class_max = idle.iter().map(|(_, s)| s.class).max()?;
        let class_max = class_max.max(Class::at_most(self.shared.cfg.segment_bytes_max));
        let class_max = class_max.min(Class::at_most(bytes_max));
        let (mut blocks, mut records, mut bytes, mut best) = (0, 0, 0, None);
        for (i, (n, seg)) in idle.iter().enumerate() {
            bytes += seg.class.bytes();
            blocks += *n as usize;
            records += seg.class.pages() as usize / LOOK_BLOCKS + 1;
            let pages = pages_to_move(blocks, records);
            let Some(class) = Class::fitting(pages).filter(|c| *c <= class_max) else { break };
            if 2 * class.bytes() <= bytes {
                best = Some((i + 1, pages));
            }
        }
        let (count, pages) = best?;
        Some(Plan { victims: idle.into_iter().take(count).map(|(_, s)| s).collect(), pages })
    }

    /// Copies blocks until the budget is used or nothing is left to copy. What is copied is synced. Returns
    /// how much of the budget was used.
    fn copy_some(&self, job: &mut Job, budget_bytes: u64) -> Result<u64, StoreError> {
        let (mut spent, mut unsynced) = (0, 0);
        while spent < budget_bytes {
            if job.held.is_empty() {
                if let Some(seg) = job.ahead.pop_front() {
                    job.held = self.blocks_in(&seg);
                    job.read.push(seg);
                } else if let Some(windows) = job.windows.as_mut().filter(|w| !w.ahead.is_empty()) {
                    job.held = self.blocks_of_window(windows)?;
                    spent += LOOK_BYTES;
                    self.shared.way.rest();
                } else {
                    break;
                }
                continue;
            }
            let batch: Vec<Held> = job.held.drain(..job.held.len().min(LOOK_BLOCKS)).collect();
            let n = self.copy_batch(job, batch)?;
            unsynced += n;
            spent += n.max(LOOK_BYTES);
            if unsynced >= PIECE_BYTES / 2 && self.shared.way.is_busy() {
                job.sync()?;
                unsynced = 0;
            }
            self.shared.way.rest();
        }
        if unsynced > 0 {
            job.sync()?;
        }
        Ok(spent)
    }

    /// The payload blocks of a segment, dead ones too, as far as its records are whole.
    fn blocks_in(&self, seg: &Segment) -> VecDeque<Held> {
        let mut held = VecDeque::new();
        let mut read = || {
            let mut ahead = Ahead::default();
            ahead.reach(&self.shared, seg, FIRST_PAGE)?;
            let mut records = Records::from_start(&self.shared, seg)?;
            while let Next::Record(record) = records.next()? {
                ahead.reach(&self.shared, seg, record.payload_page)?;
                let (_, blocks) = described(&record)?;
                for ((block, digest), (page, crc)) in
                    blocks.into_iter().zip((record.payload_page..).zip(&record.crcs))
                {
                    held.push_back(Held { block, entry: Entry::data(seg.no, page, *crc), crc: *crc, digest });
                }
            }
            Ok::<_, StoreError>(())
        };
        if let Err(e) = read() {
            // What is not read stays where it is.
            tracing::warn!(image = %self.id, error = %e, "cannot compact the whole of {}", file_name(seg.no));
        }
        held
    }

    /// Copies those blocks that the map still shows and whose bytes are right. Returns their bytes.
    fn copy_batch(&self, job: &mut Job, batch: Vec<Held>) -> Result<u64, StoreError> {
        let (alive, data) = match self.read_alive(batch) {
            Ok(read) => read,
            Err(e) => {
                tracing::warn!(image = %self.id, error = %e, "some blocks cannot be moved");
                return Ok(0);
            }
        };
        let digests = block_digests(&data);
        let mut good: Vec<(&Held, &[u8])> = Vec::with_capacity(alive.len());
        for ((held, bytes), digest) in alive.iter().zip(data.chunks_exact(BLOCK_BYTES)).zip(digests) {
            if digest == held.digest && crc32c::crc32c(bytes) == held.crc {
                good.push((held, bytes));
            } else {
                self.shared.rot.found(Some(self.id), &format!("block {}", held.block));
            }
        }
        // A window with a damaged block in it would seem scattered again.
        if good.is_empty() || (job.windows.is_some() && good.len() < alive.len()) {
            return Ok(0);
        }
        // In the order of the image, as a reader will want them.
        good.sort_by_key(|(held, _)| held.block);
        let payload = good.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>().concat();
        let record = BlocksRecord::new(good.iter().map(|(h, _)| (h.block, h.digest)), &payload);
        if !job.writer.fits(record.pages()?) {
            // More is alive than the checkpoint said: a roll-back came between, and the job is void.
            job.cut_short();
            return Ok(0);
        }
        job.records += 1;
        let first = record.append(&mut job.writer, job.records, &payload)?;
        let no = job.writer.seg.no;
        let moved = good.iter().zip(first..);
        job.moved.extend(moved.map(|((held, _), page)| Moved {
            block: held.block,
            from: held.entry,
            to: Entry::data(no, page, held.crc),
        }));
        Ok(payload.len() as u64)
    }

    /// Those blocks of a batch that the map shows and the disk reads, and their bytes.
    fn read_alive(&self, mut batch: Vec<Held>) -> Result<(Vec<Held>, Vec<u8>), StoreError> {
        let content = self.map.read().content.clone();
        let mut failed = None;
        batch.retain(|h| {
            let shown = self.healing(|| content.shows(&self.shared, h.block, h.entry));
            shown.unwrap_or_else(|e| {
                failed.get_or_insert(e);
                false
            })
        });
        if let Some(e) = failed {
            return Err(e);
        }
        let mut data = vec![0u8; batch.len() * BLOCK_BYTES];
        let entries: Vec<Entry> = batch.iter().map(|h| h.entry).collect();
        if read_entries(&self.shared, &content.segments, 0, &entries, &mut data, Wait::ForDisk).is_err() {
            // One by one: those that cannot be read, or are not what the map says, fail the check of digests.
            for (entry, piece) in entries.iter().zip(data.chunks_exact_mut(BLOCK_BYTES)) {
                if read_entries(&self.shared, &content.segments, 0, &[*entry], piece, Wait::ForDisk).is_err()
                {
                    piece.fill(0);
                }
            }
        }
        Ok((batch, data))
    }

    /// Makes the copies complete and durable, and the map refer to them.
    fn end_job(&self, job: Job) -> Result<(), StoreError> {
        let Job { read, windows, writer, mut moved, lineage, .. } = job;
        let target = Arc::clone(&writer.seg);
        let closed = shadow::close(&self.shared, writer);
        let mut ck = self.checkpoints.lock();
        let applied = closed.and_then(|()| {
            // A checkpoint that failed half-way has fixed what is new after it, and this is not.
            if ck.frozen.is_some() {
                self.checkpoint_locked(&mut ck, false)?;
            }
            if ck.lineage != lineage || moved.is_empty() {
                return Ok(0);
            }
            moved.sort_unstable_by_key(|m| m.block);
            self.repoint(&target, &moved)
        });
        match applied {
            Ok(n) if ck.lineage == lineage => {
                // Also without a change: then nothing in them is alive, or it stays for the scrub.
                ck.emptied.extend(read.iter().map(|s| s.no));
                self.compacted_bytes.fetch_add(n * BLOCK_BYTES_U64, Ordering::Relaxed);
                if n == 0 {
                    ck.limbo.push(target);
                    return Ok(());
                }
                ck.moves.filled_bytes += target.class.bytes();
                ck.moves.moved_bytes += n * BLOCK_BYTES_U64;
                ck.moves.emptied_bytes += read.iter().map(|s| s.class.bytes()).sum::<u64>();
                if windows.is_some() {
                    ck.moves.emptied_bytes += target.class.bytes();
                    ck.unsettled = CHECKPOINTS_TO_LET_GO;
                }
                Ok(())
            }
            Ok(_) => {
                ck.limbo.push(target);
                Ok(())
            }
            Err(e) => {
                if self.latch.get().is_none() {
                    ck.limbo.push(target);
                }
                Err(e)
            }
        }
    }

    /// Has the map name the new places of blocks that it still shows at the old ones. Returns how many. The
    /// caller holds the checkpoint lock, and nothing is frozen, so that no checkpoint has a part of this.
    fn repoint(&self, target: &Arc<Segment>, moved: &[Moved]) -> Result<u64, StoreError> {
        let base = Arc::clone(&self.map.read().content.base);
        let mut checkpointed = Vec::with_capacity(moved.len());
        for m in moved {
            let mut entry = [Entry::UNSET];
            self.healing(|| base.fill(&self.shared, m.block, &mut entry))?;
            checkpointed.extend(entry);
        }
        let mut count = 0;
        for (moved, checkpointed) in moved.chunks(CHANGES_MAX).zip(checkpointed.chunks(CHANGES_MAX)) {
            let mut map = self.map.write();
            let content = &mut map.content;
            let before = content.overlay.bytes();
            for (m, checkpointed) in moved.iter().zip(checkpointed) {
                let mut entry = [Entry::UNSET];
                content.overlay.fill(m.block, &mut entry);
                let [recent] = entry;
                let now = if recent == Entry::UNSET { *checkpointed } else { recent };
                if now == m.from {
                    if count == 0 {
                        Arc::make_mut(&mut content.segments).insert(target.no, Arc::clone(target));
                    }
                    content.overlay.set_each(m.block, &[m.to]);
                    count += 1;
                }
            }
            let more = content.overlay.bytes().saturating_sub(before);
            self.shared.dirty_map_bytes.fetch_add(more as u64, Ordering::Relaxed);
        }
        Ok(count)
    }

    /// Gives back a segment that nothing refers to.
    fn give_up(&self, writer: SegmentWriter) {
        if self.latch.get().is_none() {
            let seg = Arc::clone(&writer.seg);
            drop(writer);
            self.checkpoints.lock().limbo.push(seg);
        }
    }

    /// True when a checkpoint is wanted for the sake of compaction: to make its changes durable, or to let go
    /// of segments that only the older one of the two checkpoints keeps.
    pub(crate) fn compaction_waits(&self, ck: &Checkpoints) -> bool {
        let commit = Seq(self.commit.load(Ordering::Acquire));
        let frees =
            (ck.holds_emptied() || ck.unsettled > 0) && ck.newest().is_some_and(|s| s.seq() <= commit);
        // While there is more to compact, its checkpoint will do.
        self.is_checkpoint_full(ck)
            || ((ck.moves.any() || frees) && self.compaction.try_lock().is_some_and(|c| c.idle))
    }
}
