//! Rolling back, and the tails kept under a name until dropped.

use std::sync::Arc;

use parking_lot::MutexGuard;
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES_U64, Head, Seq};

use crate::append::{SyncGuard, apply_change, map_change};
use crate::checkpoint::{ForkRow, SegmentRow, read_slot, write_body, write_super};
use crate::checkpointing::{Checkpoints, Commit, Moves, Slot};
use crate::error::StoreError;
use crate::image::{ImageStore, Space};
use crate::log::{ChainSegment, Tail, walk};
use crate::map::overlay::Overlay;
use crate::map::tree::{Base, FreePages};
use crate::map::{Entry, Segments};
use crate::segment::Class;
use crate::writer::RECORD_BLOCKS_MAX;

/// A tail of updates that is no longer part of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkInfo {
    /// Unique among the image's forks; made from the tail's epoch, seq and digest.
    pub name: String,
    /// The last update it shares with the image. Epoch and digest are zero where the log's first update, which
    /// names them, cannot be read.
    pub ancestor: Head,
    /// Its own last update.
    pub head: Head,
    /// How many updates it holds, also those that can no longer be read.
    pub updates: u64,
    /// Payload bytes it holds, of the updates that can be read.
    pub bytes: u64,
    /// Time of its last update, nanoseconds since the Unix epoch.
    pub time_ns: u64,
}

/// A fork and the segments that hold it.
#[derive(Clone)]
pub(crate) struct Fork {
    pub(crate) info: ForkInfo,
    pub(crate) chain: Arc<Vec<ChainSegment>>,
}

impl Fork {
    pub(crate) fn row(&self) -> ForkRow {
        let row = |c: &ChainSegment| SegmentRow {
            no: c.seg.no,
            class: c.seg.class,
            generation: c.seg.generation,
            ordinal: c.ordinal,
            start_seq: c.start_seq,
            in_chain: true,
            prepared: false,
            live: 0,
        };
        ForkRow { info: self.info.clone(), chain: self.chain.iter().map(row).collect() }
    }
}

impl ImageStore {
    /// Describes the log after `ancestor` as a fork. Damaged parts belong to it: whatever can be read stays.
    pub(crate) fn make_fork(&self, tail: &Tail, ancestor: Head) -> Result<Fork, StoreError> {
        let head = tail.head();
        let first = tail.chain.partition_point(|c| c.start_seq < ancestor.seq.next()).saturating_sub(1);
        let chain: Vec<ChainSegment> = tail.chain[first..].to_vec();
        let payload_blocks = self.readable_blocks(&chain, ancestor.seq.next(), head.seq)?;
        let name =
            format!("{}.{}-{}-{}", head.epoch.number, head.epoch.host.short(), head.seq, head.digest.short());
        let info = ForkInfo {
            name,
            ancestor,
            head,
            updates: head.seq.0 - ancestor.seq.0,
            bytes: payload_blocks * BLOCK_BYTES_U64,
            time_ns: tail.state.tip.time_ns,
        };
        Ok(Fork { info, chain: Arc::new(chain) })
    }

    /// Blocks of payload that the updates `from..=end` describe, up to the first damage in each segment.
    fn readable_blocks(&self, chain: &[ChainSegment], from: Seq, end: Seq) -> Result<u64, StoreError> {
        let mut blocks = 0u64;
        for (i, part) in chain.iter().enumerate() {
            let last = chain.get(i + 1).map_or(end, |n| n.start_seq.min(end));
            let first = from.max(part.start_seq.next());
            let counted = walk(&self.shared, std::slice::from_ref(part), first, last, |_, record, _| {
                blocks += record.crcs.len() as u64;
                Ok(true)
            });
            match counted {
                Err(e) if e.is_damage() => {
                    tracing::error!(image = %self.id, error = %e, "a tail that is kept as a fork cannot be read whole");
                }
                counted => counted?,
            }
        }
        Ok(blocks)
    }

    /// Goes back to the content and state after `to`. Durable on return. The tail is kept as a fork
    /// when asked for; `None` when there was no tail.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`], [`StoreError::CannotRollBack`] (the log does not reach back, or is damaged: a
    /// block-level sync is needed), or the disk's.
    pub fn roll_back(&self, to: Head, keep_fork: bool) -> Result<Option<ForkInfo>, StoreError> {
        self.check_latch()?;
        let mut ck = self.checkpoints.lock();
        if self.head() == to {
            self.sync()?;
            return Ok(None);
        }
        if to.seq > self.head().seq {
            return Err(StoreError::NotInHistory(to));
        }
        let unreadable = |e: StoreError| match e {
            e if e.is_damage() => {
                tracing::error!(image = %self.id, error = %e, "cannot be rolled back to update {}", to.seq);
                StoreError::CannotRollBack { to: to.seq }
            }
            e => e,
        };
        match self.head_at(to.seq).map_err(unreadable)? {
            Some(head) if head == to => {}
            Some(_) => return Err(StoreError::NotInHistory(to)),
            // Before the log: whether it was ever here is no longer known.
            None => return Err(StoreError::CannotRollBack { to: to.seq }),
        }
        // What stays must be durable before the cut is, and a fork's tail is kept whole.
        let (excluded, mut tail) = self.synced_and_alone()?;
        let (state, base, overlay) = self.rebuild(&ck, &tail, to).map_err(unreadable)?;
        let fork = if keep_fork { Some(self.make_fork(&tail, to)?) } else { None };
        // Space for the segment that cuts the log is taken before anything changes.
        let spare = self.shared.pool.take(&self.shared, 1, Class::SMALLEST, Space::Control)?;
        let mut free = self.free_pages(&ck)?;
        // Reads the older map: a page of it may be damaged. Nothing has changed so far.
        let base = match self.merge(&mut free, &base, &overlay) {
            Ok(base) => Arc::new(base),
            Err(e) => {
                self.put_back(spare)?;
                return Err(unreadable(e));
            }
        };
        ck.register(&base);
        let mut chain = (*tail.chain).clone();
        chain.retain(|c| c.start_seq < to.seq);
        let chain = Arc::new(chain);
        let mut forks = self.forks.lock().clone();
        forks.extend(fork.clone());
        let log_start = tail.log_start.min(to.seq.next());
        let moment = self.moment(state, None, Arc::clone(&chain), log_start);
        let segments = Arc::clone(&self.map.read().content.segments);
        let above = |s: &Option<Slot>| s.as_ref().is_some_and(|s| s.state.head().seq > to.seq);
        let victims: Vec<usize> = (0..2).filter(|i| above(&ck.slots[*i])).collect();
        let commit = Commit { moment: &moment, base: &base, forks: &forks, victims, segments: &segments };
        let done = self.commit(&mut ck, &mut free, &commit)?;
        if let Some(fork) = &fork
            && let Err(e) = self.list_in_both(&mut ck, &mut free, fork)
        {
            // The cut has taken effect, and the newer checkpoint lists it.
            tracing::warn!(image = %self.id, error = %e, "only one checkpoint lists the fork {}", fork.info.name);
        }
        tail.log_start = log_start;
        *self.forks.lock() = forks;
        let state = Arc::clone(&moment.state);
        drop(moment);
        self.install(&mut ck, &mut tail, state, chain, base, segments);
        // Cuts the log also for a recovery that has to start from the other superblock.
        let cut = self.begin_segment(&mut tail, spare);
        drop(tail);
        self.or_latch(cut)?;
        let synced = self.sync_now();
        let head = self.or_latch(synced)?;
        excluded.set_durable(head);
        drop(excluded);
        self.let_go(&mut ck, &done);
        self.recycle(&mut ck)?;
        Ok(fork.map(|f| f.info))
    }

    /// Has the checkpoint that a cut did not replace list the fork as well. The next checkpoint may take the place of
    /// the newer one: when the power fails then, the older one is what there is.
    fn list_in_both(
        &self,
        ck: &mut Checkpoints,
        free: &mut FreePages,
        fork: &Fork,
    ) -> Result<(), StoreError> {
        let file = self.shared.files.map(self.id)?;
        for (i, slot) in ck.slots.iter_mut().enumerate() {
            let Some(slot) = slot else { continue };
            let Some(found) = read_slot(self.shared.store, self.id, &*file, i)? else { continue };
            let mut body = found.body;
            if body.forks.iter().any(|f| f.info.name == fork.info.name) {
                continue;
            }
            body.forks.push(fork.row());
            let at = write_body(&self.shared, self.id, &*file, free, &body)?;
            self.sync_map(&*file)?;
            self.or_latch(write_super(self.shared.store, self.id, &*file, i, found.number, &at))?;
            slot.pages = at.pages;
            self.sync_map(&*file)?;
        }
        Ok(())
    }

    /// Syncs everything, second copies too, and keeps others from appending and syncing.
    pub(crate) fn synced_and_alone(&self) -> Result<(SyncGuard<'_>, MutexGuard<'_, Tail>), StoreError> {
        loop {
            self.sync_pairs()?;
            let excluded = self.exclude_syncs();
            let mut tail = self.tail.lock();
            if excluded.durable() == tail.head() && tail.writers().all(|w| w.is_paired()) {
                return Ok((excluded, tail));
            }
        }
    }

    /// Makes a committed moment the present.
    pub(crate) fn install(
        &self,
        ck: &mut Checkpoints,
        tail: &mut Tail,
        state: Arc<ImageState>,
        chain: Arc<Vec<ChainSegment>>,
        base: Arc<Base>,
        segments: Segments,
    ) {
        tail.state = state;
        tail.chain = chain;
        for w in tail.closing.drain(..).chain(tail.current.take()) {
            // What is not on disk is part of what was cut off.
            w.seg.live.lock().take();
        }
        tail.end = None;
        tail.bytes_since_checkpoint = 0;
        ck.frozen = None;
        ck.moves = Moves::default();
        ck.emptied.clear();
        ck.lineage += 1;
        let mut map = self.map.write();
        map.allocated = base.allocated;
        map.content.overlay = Overlay::default();
        map.content.frozen = None;
        map.content.base = base;
        map.content.segments = segments;
    }

    /// Content and state after `to`: the newest checkpoint at or below it, and a replay.
    fn rebuild(
        &self,
        ck: &Checkpoints,
        tail: &Tail,
        to: Head,
    ) -> Result<(Arc<ImageState>, Arc<Base>, Overlay), StoreError> {
        let below = ck.slots.iter().flatten().filter(|s| s.state.head().seq <= to.seq);
        let (mut state, base) = match below.max_by_key(|s| s.state.head().seq) {
            Some(s) => (Arc::clone(&s.state), Arc::clone(&s.base)),
            None => (Arc::new(ImageState::new(self.id)), Arc::new(Base::empty(self.id))),
        };
        let from = state.head().seq.next();
        if from < tail.log_start && from <= to.seq {
            return Err(StoreError::CannotRollBack { to: to.seq });
        }
        let mut overlay = Overlay::default();
        let mut entries = [Entry::UNSET; RECORD_BLOCKS_MAX];
        walk(&self.shared, &tail.chain, from, to.seq, |seg, record, update| {
            let change = map_change(&update.header, seg.no, record.payload_page, &record.crcs, &mut entries);
            if self.check_data().is_ok() {
                apply_change(&mut overlay, &change, &entries);
            }
            Arc::make_mut(&mut state).apply(&update);
            Ok(true)
        })?;
        if state.head() != to {
            return Err(StoreError::NotInHistory(to));
        }
        Ok((state, base, overlay))
    }

    /// Gives up a fork. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::NoFork`], or the disk's.
    pub fn drop_fork(&self, name: &str) -> Result<(), StoreError> {
        self.check_latch()?;
        let mut ck = self.checkpoints.lock();
        let before = self.forks.lock().clone();
        let after: Vec<Fork> = before.iter().filter(|f| f.info.name != name).cloned().collect();
        if after.len() == before.len() {
            return Err(StoreError::NoFork(name.to_owned()));
        }
        *self.forks.lock() = after;
        let dropped = self.checkpoint_locked(&mut ck, true);
        if dropped.is_err() {
            *self.forks.lock() = before;
        }
        dropped
    }
}
