//! Making checkpoints, and deciding which segments are still needed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use vmfs_common::Seq;
use vmfs_common::state::ImageState;

use crate::append::last_seq;
use crate::checkpoint::{Body, SegmentRow, write_body, write_super};
use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::fork::Fork;
use crate::image::ImageStore;
use crate::log::ChainSegment;
use crate::map::Segments;
use crate::map::overlay::Overlay;
use crate::map::tree::{Base, FreePages, Merge};
use crate::segment::{PAGE_U64, Segment};
use crate::writer::LogPos;

/// Background rounds without an append after which an image is checkpointed: about ten seconds.
const REST_ROUNDS: u32 = 100;

/// A checkpoint that a superblock names.
#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) number: u64,
    pub(crate) state: Arc<ImageState>,
    pub(crate) base: Arc<Base>,
    /// Pages of its body in the map file.
    pub(crate) pages: Vec<u32>,
}

impl Slot {
    pub(crate) fn seq(&self) -> Seq {
        self.state.head().seq
    }
}

/// The moment a checkpoint is being made of.
#[derive(Clone)]
pub(crate) struct Moment {
    pub(crate) state: Arc<ImageState>,
    pub(crate) pos: Option<LogPos>,
    pub(crate) chain: Arc<Vec<ChainSegment>>,
    pub(crate) gen_mark: u64,
    pub(crate) log_start: Seq,
}

/// What compaction has done since a checkpoint.
#[derive(Default)]
pub(crate) struct Moves {
    /// Bytes of the segments filled; 0 when there were none.
    pub(crate) filled_bytes: u64,
    /// Bytes of blocks moved there.
    pub(crate) moved_bytes: u64,
    /// Bytes of the segments emptied.
    pub(crate) emptied_bytes: u64,
}

impl Moves {
    /// True when the map was changed.
    pub(crate) const fn any(&self) -> bool {
        self.filled_bytes > 0
    }
}

/// An image's checkpoints. Its lock is held while one is made.
#[derive(Default)]
pub(crate) struct Checkpoints {
    pub(crate) slots: [Option<Slot>; 2],
    /// Set while the map has a frozen overlay.
    pub(crate) frozen: Option<Moment>,
    /// Every map whose pages somebody may still read.
    pub(crate) roots: Vec<Weak<Base>>,
    /// Segments given up, once nobody reads them.
    pub(crate) limbo: Vec<Arc<Segment>>,
    /// What compaction has done to the map, and no checkpoint has yet.
    pub(crate) moves: Moves,
    /// Segments of the image that compaction has emptied, as far as it can.
    pub(crate) emptied: BTreeSet<u32>,
    /// Checkpoints until the segments that blocks were gathered from are let go of, as far as nothing is left in them.
    pub(crate) unsettled: u8,
    /// Grows when the map is replaced by another one.
    pub(crate) lineage: u64,
}

impl Checkpoints {
    /// The superblock to overwrite: never the newest at or below the commit point.
    fn victim(&self, commit: Seq) -> usize {
        match (&self.slots[0], &self.slots[1]) {
            (None, _) => 0,
            (_, None) => 1,
            (Some(a), Some(b)) => {
                let newest = usize::from(b.number > a.number);
                let seq = self.slots[newest].as_ref().map_or(Seq::ZERO, Slot::seq);
                if seq <= commit { 1 - newest } else { newest }
            }
        }
    }
    pub(crate) fn newest(&self) -> Option<&Slot> {
        self.slots.iter().flatten().max_by_key(|s| s.number)
    }
    /// True when only the older checkpoint keeps a segment that compaction has emptied.
    pub(crate) fn holds_emptied(&self) -> bool {
        self.newest().is_some_and(|s| self.emptied.iter().any(|no| !s.base.live.contains_key(no)))
    }
    pub(crate) fn number(&self) -> u64 {
        self.slots.iter().flatten().map(|s| s.number).max().unwrap_or(0)
    }
    pub(crate) fn register(&mut self, base: &Arc<Base>) {
        self.roots.retain(|w| w.strong_count() > 0);
        self.roots.push(Arc::downgrade(base));
    }
}

/// Everything a commit writes.
pub(crate) struct Commit<'a> {
    pub(crate) moment: &'a Moment,
    pub(crate) base: &'a Arc<Base>,
    pub(crate) forks: &'a [Fork],
    /// Superblocks to overwrite, in this order; empty: choose one.
    pub(crate) victims: Vec<usize>,
    pub(crate) segments: &'a Segments,
}

/// What a commit decided.
pub(crate) struct Committed {
    pub(crate) log_start: Seq,
    pub(crate) dropped: Vec<u32>,
}

impl ImageStore {
    /// Makes recovery start from here: writes the map and the state. Appends go on meanwhile.
    ///
    /// # Errors
    /// The disk's. The image stays usable unless its log or a superblock could not be synced.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        self.check_latch()?;
        let mut ck = self.checkpoints.lock();
        self.checkpoint_locked(&mut ck, false)
    }

    /// As [`ImageStore::checkpoint`]; with `force` also when no update is new.
    pub(crate) fn checkpoint_locked(&self, ck: &mut Checkpoints, force: bool) -> Result<(), StoreError> {
        if !self.freeze(ck, force || ck.moves.any()) {
            return Ok(());
        }
        let moment = ck.frozen.clone().expect("invariant: freeze has set it");
        self.sync_pairs()?;
        let (base, frozen) = {
            let map = self.map.read();
            (Arc::clone(&map.content.base), map.content.frozen.clone().unwrap_or_default())
        };
        let mut free = self.healing(|| self.free_pages(ck))?;
        let merged = Arc::new(self.healing(|| self.merge(&mut free, &base, &frozen))?);
        ck.register(&merged);
        let forks = self.forks.lock().clone();
        let segments = Arc::clone(&self.map.read().content.segments);
        let commit = Commit {
            moment: &moment,
            base: &merged,
            forks: &forks,
            victims: Vec::new(),
            segments: &segments,
        };
        let done = self.commit(ck, &mut free, &commit)?;
        drop(segments);
        drop(moment);
        ck.frozen = None;
        ck.moves = Moves::default();
        ck.unsettled = ck.unsettled.saturating_sub(1);
        {
            let mut map = self.map.write();
            map.content.base = merged;
            map.content.frozen = None;
            let freed = u64::try_from(frozen.bytes()).unwrap_or(0);
            let dirty = &self.shared.dirty_map_bytes;
            let _ =
                dirty.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |d| Some(d.saturating_sub(freed)));
        }
        self.let_go(ck, &done);
        self.recycle(ck)
    }

    /// Fixes the moment to checkpoint; false when there is nothing to do.
    fn freeze(&self, ck: &mut Checkpoints, force: bool) -> bool {
        if ck.frozen.is_some() {
            return true;
        }
        let mut tail = self.tail.lock();
        if !force && ck.newest().is_some_and(|s| s.state.head() == tail.head()) {
            return false;
        }
        let mut map = self.map.write();
        let overlay = std::mem::take(&mut map.content.overlay);
        map.content.frozen = Some(overlay);
        tail.bytes_since_checkpoint = 0;
        ck.frozen = Some(Moment {
            state: Arc::clone(&tail.state),
            pos: tail.position(),
            chain: Arc::clone(&tail.chain),
            gen_mark: self.shared.generations.peek(),
            log_start: tail.log_start,
        });
        true
    }

    /// A moment for a commit that is not made of the head.
    pub(crate) fn moment(
        &self,
        state: Arc<ImageState>,
        pos: Option<LogPos>,
        chain: Arc<Vec<ChainSegment>>,
        log_start: Seq,
    ) -> Moment {
        Moment { state, pos, chain, gen_mark: self.shared.generations.peek(), log_start }
    }

    /// Which pages of the map file may be overwritten: those that no superblock, reader or import
    /// can reach.
    pub(crate) fn free_pages(&self, ck: &Checkpoints) -> Result<FreePages, StoreError> {
        let mut free = FreePages::new();
        let mut seen = Vec::new();
        let present = self.map.read().content.base.root.0;
        for base in ck.roots.iter().filter_map(Weak::upgrade) {
            if seen.contains(&base.root.0) {
                continue;
            }
            match base.for_each_page(&self.shared, &mut |p| free.mark(p)) {
                // An older map does not tell its pages any more: until its checkpoint has been replaced, nothing
                // is given out that the file has now.
                Err(StoreError::BadMapPage { .. }) if base.root.0 != present => {
                    let pages =
                        self.shared.files.map(self.id)?.len_bytes().during(|| "measuring a map".into());
                    free.mark_below(pages?.div_ceil(PAGE_U64));
                }
                walked => walked?,
            }
            seen.push(base.root.0);
        }
        for page in ck.slots.iter().flatten().flat_map(|s| &s.pages) {
            free.mark(*page);
        }
        Ok(free)
    }

    /// Writes a new map made of `base` and `overlay`. Not synced.
    pub(crate) fn merge(
        &self,
        free: &mut FreePages,
        base: &Base,
        overlay: &Overlay,
    ) -> Result<Base, StoreError> {
        let file = self.shared.files.map(self.id)?;
        let sync = || self.sync_map(&*file);
        let mut merge =
            Merge { shared: &self.shared, file: &*file, free, image: self.id, sync: &sync, unsynced: 0 };
        merge.run(base, overlay)
    }

    /// Makes what was written to the map file durable. Pages of an import may be lost with it, so that a failure
    /// is not survived.
    pub(crate) fn sync_map(&self, file: &dyn DiskFile) -> Result<(), StoreError> {
        let synced = file.sync().during(|| format!("syncing the map of image {}", self.id));
        self.or_latch(synced.inspect_err(|_| self.leave_mark()))
    }

    /// Writes and syncs a checkpoint: map pages and body first, then the superblock.
    ///
    /// # Errors
    /// The disk's. A failing superblock latches the image: nobody knows which one is on the disk.
    pub(crate) fn commit(
        &self,
        ck: &mut Checkpoints,
        free: &mut FreePages,
        c: &Commit<'_>,
    ) -> Result<Committed, StoreError> {
        let commit_seq = Seq(self.commit.load(Ordering::Acquire));
        let victims = if c.victims.is_empty() { vec![ck.victim(commit_seq)] } else { c.victims.clone() };
        let kept: Vec<&Slot> =
            (0..2).filter(|i| !victims.contains(i)).filter_map(|i| ck.slots[i].as_ref()).collect();
        let (rows, done) = self.rows(c, &kept);
        let body = Body {
            kind: self.kind,
            gen_mark: c.moment.gen_mark,
            commit: commit_seq.min(c.moment.state.head().seq),
            log_start: done.log_start,
            pos: c.moment.pos,
            root: c.base.root,
            height: c.base.height,
            allocated: c.base.allocated,
            segments: rows,
            forks: c.forks.iter().map(Fork::row).collect(),
            state: Arc::clone(&c.moment.state),
        };
        let file = self.shared.files.map(self.id)?;
        let at = write_body(&self.shared, self.id, &*file, free, &body)?;
        if c.base.height > 1 {
            // A second copy that is lost is found by its checksum, and made again by the scrub.
            let copied =
                self.shared.files.map_copy(self.id).and_then(|f| f.sync().during(|| "syncing".into()));
            if let Err(e) = copied {
                tracing::warn!(image = %self.id, error = %e, "second copies of map pages may be missing");
            }
        }
        self.sync_map(&*file)?;
        for victim in victims {
            let number = ck.number() + 1;
            self.or_latch(write_super(self.shared.store, self.id, &*file, victim, number, &at))?;
            self.sync_map(&*file)?;
            ck.slots[victim] = Some(Slot {
                number,
                state: Arc::clone(&c.moment.state),
                base: Arc::clone(c.base),
                pages: at.pages.clone(),
            });
        }
        Ok(done)
    }

    /// The segment table: which segments the log, the maps and the forks still need.
    fn rows(&self, c: &Commit<'_>, kept: &[&Slot]) -> (Vec<SegmentRow>, Committed) {
        let chain = &c.moment.chain;
        let head = c.moment.state.head().seq;
        let replay_from = kept.iter().map(|s| s.seq()).min().unwrap_or(head).min(head);
        let retain = Seq(self.retain.load(Ordering::Acquire));
        let (catch_up, catch_up_bytes) = self.catch_up.lock().unwrap_or((head.next(), 0));
        let tight = self.shared.is_tight();
        let mut log_bytes = 0;
        let mut first = chain.len();
        while let Some(i) = first.checked_sub(1) {
            let last = last_seq(chain, i, head);
            log_bytes += chain[i].seg.class.bytes();
            let wanted = (last >= retain && log_bytes <= self.shared.cfg.retain_log_bytes_max)
                || (last >= catch_up && log_bytes <= catch_up_bytes);
            // The last one may still be written to.
            if last <= replay_from && (tight || !wanted) && first != chain.len() {
                break;
            }
            first = i;
        }
        let log_start = chain.get(first).map_or(head, |s| s.start_seq).next().max(c.moment.log_start);
        let in_chain: BTreeMap<u32, &ChainSegment> = chain[first..].iter().map(|s| (s.seg.no, s)).collect();
        let mut rows = Vec::new();
        let mut dropped = Vec::new();
        for (no, seg) in c.segments.iter() {
            if seg.generation >= c.moment.gen_mark {
                continue;
            }
            let part = in_chain.get(no);
            let live = c.base.live.get(no).copied().unwrap_or(0);
            let needed = part.is_some()
                || live > 0
                || kept.iter().any(|s| s.base.live.contains_key(no))
                || c.forks.iter().any(|f| f.chain.iter().any(|s| s.seg.no == *no));
            if !needed {
                dropped.push(*no);
                continue;
            }
            rows.push(SegmentRow {
                no: *no,
                class: seg.class,
                generation: seg.generation,
                ordinal: part.map_or(0, |p| p.ordinal),
                start_seq: part.map_or(Seq::ZERO, |p| p.start_seq),
                in_chain: part.is_some(),
                prepared: seg.prepared.load(Ordering::Acquire),
                live,
            });
        }
        (rows, Committed { log_start, dropped })
    }

    /// Forgets segments that the commit dropped.
    pub(crate) fn let_go(&self, ck: &mut Checkpoints, done: &Committed) {
        let mut tail = self.tail.lock();
        tail.log_start = tail.log_start.max(done.log_start);
        if tail.chain.iter().any(|s| done.dropped.contains(&s.seg.no) || s.start_seq < done.log_start.prev())
        {
            let chain = Arc::make_mut(&mut tail.chain);
            chain.retain(|s| s.start_seq >= done.log_start.prev());
        }
        let mut map = self.map.write();
        if !done.dropped.is_empty() {
            let segments = Arc::make_mut(&mut map.content.segments);
            ck.limbo.extend(done.dropped.iter().filter_map(|no| segments.remove(no)));
            ck.emptied.retain(|no| segments.contains_key(no));
        }
    }

    /// Gives segments in limbo back to the pool once nobody reads them.
    pub(crate) fn recycle(&self, ck: &mut Checkpoints) -> Result<(), StoreError> {
        let mut waiting = Vec::new();
        for seg in std::mem::take(&mut ck.limbo) {
            if Arc::strong_count(&seg) > 1 {
                waiting.push(seg);
            } else {
                self.shared.pool.give_back(&self.shared, &seg)?;
            }
        }
        ck.limbo = waiting;
        Ok(())
    }

    /// What the background may do for this image now; true when it did something.
    pub(crate) fn background(&self, dirty_map_full: bool) -> Result<bool, StoreError> {
        if self.latch.get().is_some() {
            return Ok(false);
        }
        let (head, bytes, parts, log_bytes) = {
            let tail = self.tail.lock();
            (tail.head().seq.0, tail.bytes_since_checkpoint, tail.chain.len(), tail.log_bytes)
        };
        self.note_quiet(log_bytes);
        let rest = match self.seen_seq.swap(head, Ordering::AcqRel) == head {
            true => self.rest_rounds.fetch_add(1, Ordering::AcqRel) + 1,
            false => {
                self.rest_rounds.store(0, Ordering::Release);
                0
            }
        };
        let map_bytes = self.map.read().content.overlay.bytes() as u64;
        // On a full disk the retained log is given up, once per head.
        let trim = parts > 1 && rest == 1 && self.shared.is_tight();
        let due = bytes >= self.shared.cfg.checkpoint_log_bytes
            || (dirty_map_full && map_bytes > 0)
            || (rest >= REST_ROUNDS && bytes > 0)
            || self.checkpoint_missing.load(Ordering::Acquire)
            || trim;
        let Some(mut ck) = self.checkpoints.try_lock() else { return Ok(false) };
        let compacted = self.compaction_waits(&ck);
        let due = due || compacted;
        if due {
            let missing = self.checkpoint_missing.load(Ordering::Acquire);
            self.checkpoint_locked(&mut ck, trim || missing || compacted)?;
            if missing {
                self.checkpoints_whole(&ck);
            }
        } else if !ck.limbo.is_empty() {
            self.recycle(&mut ck)?;
        }
        Ok(due)
    }
}
