//! Gathering: scattered blocks of an image at rest are put in order again.
//!
//! A log has blocks in the order they were written, so after random overwrites a sequential read asks the disk for
//! each block by itself, and a disk does only so many reads a second. When little of an image was written for a
//! while, a pass goes over its map in order. Windows whose blocks are in many places are copied together, as many as
//! a segment takes, each as one record: one run. The rest is as in [`crate::compact`]: digests are checked, the
//! segment is synced, the map is changed where it still names the old place, a checkpoint is made. What is
//! left of the old segments is compaction's, which goes first.
//!
//! What has been gathered counts as in one place until it is overwritten, so a pass over an image that was not written
//! since does nothing. A window is copied again only when so much of it was overwritten that it is scattered again: at
//! most 6.5 blocks are copied for one overwritten (5.4 in a full window). Passes are as far apart as a part of the
//! image is overwritten, which also bounds how often the map is read.
//!
//! The log's own segments, and those of forks, are left alone: they stay as they are whatever is copied out of them,
//! and moved blocks have to be older than the log.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering;

use vmfs_common::{BLOCK_BYTES_U64, Seq};

use crate::compact::{Compaction, Held, Job, LOOK_BLOCKS, LOOK_BYTES, pages_to_move};
use crate::error::StoreError;
use crate::image::{ImageStore, Space};
use crate::map::tree::ENTRIES;
use crate::map::{BLOCKS_MAX, Entry, Segments};
use crate::segment::{Class, FIRST_PAGE};
use crate::view::DigestReader;

/// A window, which becomes one record, is as many blocks as are looked at together.
const _: () = assert!(ENTRIES.is_multiple_of(LOOK_BLOCKS));
/// A window in fewer places is never scattered: sparse ones would be copied for nothing.
const PLACES_MIN: usize = 4;
/// Segments of at least this size are used, whatever the log's are: a window has to fit.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// A pass is worth its while when this part of the image was written since the last one.
const WRITTEN_PART: u64 = 16;
/// And at least what fills half of the smallest segment.
const WRITTEN_MIN: u64 = Class::SMALLEST.bytes() / 2;
/// At rest is an image while no more than this part of what makes a checkpoint due is appended: a guest that does
/// nothing still writes something now and then.
const QUIET_PART: u64 = 64;
/// As much as this many segments has to be free.
const FREE_SEGMENTS: u64 = 4;

/// What gathering knows of an image between two calls.
#[derive(Default)]
pub(crate) struct Gather {
    pass: Option<Pass>,
    /// How things were when the last pass began.
    last: Option<Moment>,
    /// The next pass waits until both checkpoints have this update: then the log's older segments are let go of.
    next: Option<Seq>,
}

/// What tells whether another pass is worth its while.
#[derive(Clone, Copy)]
struct Moment {
    /// Bytes of log written so far.
    log_bytes: u64,
    /// Segments that the log had: they are left alone.
    log_segments: usize,
}

/// One walk over the map.
struct Pass {
    /// The next block to look at.
    at: u64,
    ended: bool,
    /// Scattered windows, by their first block, and how many blocks of each can be moved.
    found: VecDeque<(u64, usize)>,
    blocks: usize,
}

/// Windows still to be gathered by a job.
pub(crate) struct Windows {
    pub(crate) ahead: VecDeque<u64>,
    sources: Sources,
}

/// Which segments blocks can be moved out of.
struct Sources {
    busy: BTreeSet<u32>,
    /// Only older ones.
    before: u64,
    /// The last one asked about: neighbours are often in the same one.
    last: (u32, bool),
}

impl Sources {
    const fn new(busy: BTreeSet<u32>, before: u64) -> Self {
        Self { busy, before, last: (u32::MAX, false) }
    }
    fn has(&mut self, segments: &Segments, entry: Entry) -> bool {
        if !entry.is_data() {
            return false;
        }
        let no = entry.segment_no();
        if self.last.0 != no {
            let seg = segments.get(&no).filter(|s| s.generation < self.before && !self.busy.contains(&no));
            self.last = (no, seg.is_some_and(|s| s.live.lock().is_none()));
        }
        self.last.1
    }
}

/// Blocks of a window that can be moved, and how many places they are in. Holes between them do not part what is
/// in one place.
fn count(entries: &[Entry], mut movable: impl FnMut(Entry) -> bool) -> (usize, usize) {
    let (mut blocks, mut places) = (0, 0);
    let mut before: Option<(usize, Entry)> = None;
    for (i, entry) in entries.iter().enumerate().filter(|(_, e)| movable(**e)) {
        let follows = before.is_some_and(|(j, b)| {
            let pages = entry.page().checked_sub(b.page()).map_or(0, |n| n as usize);
            b.segment_no() == entry.segment_no() && (pages == 1 || pages == i - j)
        });
        blocks += 1;
        places += usize::from(!follows);
        before = Some((i, *entry));
    }
    (blocks, places)
}

const fn is_scattered(blocks: usize, places: usize) -> bool {
    places >= PLACES_MIN && 8 * places > 3 * blocks
}

/// How many of the first windows go into one segment of at most `max`, and the pages they take; `None` while they
/// do not fill one. With `all`, no more are to come: half of one will do.
fn fill(found: &VecDeque<(u64, usize)>, max: Class, all: bool) -> Option<(usize, u32)> {
    for class in Class::ALL.into_iter().rev().filter(|c| *c <= max) {
        let (mut blocks, mut taken) = (0, (0, 0));
        for (i, (_, n)) in found.iter().enumerate() {
            blocks += n;
            let pages = pages_to_move(blocks, i + 1);
            if pages + FIRST_PAGE + 2 > class.pages() {
                break;
            }
            taken = (i + 1, pages);
        }
        let is_full = taken.0 < found.len() || all;
        if is_full && 2 * taken.1 >= class.pages() {
            return Some(taken);
        }
        if !all {
            return None;
        }
    }
    None
}

impl ImageStore {
    /// Goes on with putting the image in order, when it is at rest, until about `budget_bytes` were copied. To be
    /// called when no image has anything to compact. Returns how much of the budget was used; 0 when
    /// there is nothing to do now.
    ///
    /// # Errors
    /// The disk's. The map and the segments are as before.
    pub(crate) fn gather(&self, budget_bytes: u64) -> Result<u64, StoreError> {
        if !self.may_move() || !self.is_at_rest() {
            return Ok(0);
        }
        let mut state = self.compaction.lock();
        if state.job.is_some() {
            return Ok(0);
        }
        if state.gather.pass.is_some() && !self.has_room() {
            return Ok(0);
        }
        let used = self.look_for_scattered(&mut state, budget_bytes)?;
        let job = self.begin_gathering(&mut state)?;
        // What was moved waits for a checkpoint until there is enough of it, or the pass has ended.
        state.idle &= state.gather.pass.is_none() && job.is_none();
        match job {
            Some(job) => self.run_job(&mut state, job, budget_bytes.saturating_sub(used)).map(|n| n + used),
            None => Ok(used),
        }
    }

    /// Counts a background round in which little was appended.
    pub(crate) fn note_quiet(&self, log_bytes: u64) {
        let from = self.quiet_from.load(Ordering::Acquire);
        if from.abs_diff(log_bytes) <= self.shared.cfg.checkpoint_log_bytes / QUIET_PART {
            self.quiet_rounds.fetch_add(1, Ordering::AcqRel);
        } else {
            self.quiet_from.store(log_bytes, Ordering::Release);
            self.quiet_rounds.store(0, Ordering::Release);
        }
    }

    /// Little was appended for a while, and all of it is committed.
    fn is_at_rest(&self) -> bool {
        self.quiet_rounds.load(Ordering::Acquire) >= self.shared.cfg.gather_after_rounds
            && self.head().seq.0 <= self.commit.load(Ordering::Acquire)
    }

    /// Segments that keep their blocks.
    pub(crate) fn busy_segments(&self) -> BTreeSet<u32> {
        let mut busy: BTreeSet<u32> = self.tail.lock().chain.iter().map(|c| c.seg.no).collect();
        busy.extend(self.forks.lock().iter().flat_map(|f| f.chain.iter().map(|c| c.seg.no)));
        busy
    }

    /// The largest segment to gather blocks into.
    fn class_max(&self) -> Class {
        Class::at_most(self.shared.cfg.segment_bytes_max.max(SEGMENT_BYTES_MIN))
    }

    /// Never on a disk that is nearly full: what blocks are copied from is free only later.
    fn has_room(&self) -> bool {
        let wanted = self.shared.cfg.reserve_bytes + FREE_SEGMENTS * self.class_max().bytes();
        self.shared.disk.free_bytes().is_ok_and(|free| free >= wanted)
    }

    /// Begins a pass if one is due, and goes on with it until there is enough for a segment.
    fn look_for_scattered(&self, state: &mut Compaction, budget_bytes: u64) -> Result<u64, StoreError> {
        let gather = &mut state.gather;
        let mut used = 0;
        if gather.pass.is_none() {
            used = self.begin_pass(gather)?;
        }
        let Some(pass) = &mut gather.pass else { return Ok(used) };
        let max = self.class_max();
        let content = self.map.read().content.clone();
        let mut sources = Sources::new(self.busy_segments(), u64::MAX);
        while used < budget_bytes && !pass.ended && pages_to_move(pass.blocks, pass.found.len()) < max.pages()
        {
            let mut looked = false;
            self.healing(|| {
                content.for_each(&self.shared, pass.at..BLOCKS_MAX, |start, entries| {
                    for (window, entries) in (start..).step_by(LOOK_BLOCKS).zip(entries.chunks(LOOK_BLOCKS)) {
                        let (blocks, places) = count(entries, |e| sources.has(&content.segments, e));
                        if is_scattered(blocks, places) {
                            pass.found.push_back((window, blocks));
                            pass.blocks += blocks;
                        }
                    }
                    pass.at = start + entries.len() as u64;
                    looked = true;
                    Ok(false)
                })
            })?;
            pass.ended = !looked;
            used += LOOK_BYTES;
            self.shared.way.rest();
        }
        Ok(used)
    }

    /// Begins a pass when one is due, once two checkpoints have let go of the log's older segments.
    fn begin_pass(&self, gather: &mut Gather) -> Result<u64, StoreError> {
        let (head, now) = {
            let tail = self.tail.lock();
            (tail.head().seq, Moment { log_bytes: tail.log_bytes, log_segments: tail.chain.len() })
        };
        let image_bytes = self.allocated_blocks().0 * BLOCK_BYTES_U64;
        let due = gather.last.is_none_or(|last| {
            // Fewer after a roll-back, which begins a new chain.
            now.log_bytes.abs_diff(last.log_bytes) >= (image_bytes / WRITTEN_PART).max(WRITTEN_MIN)
                || 2 * now.log_segments < last.log_segments
        });
        if !due || image_bytes < WRITTEN_MIN || !self.has_room() {
            return Ok(0);
        }
        let Some(mut ck) = self.checkpoints.try_lock() else { return Ok(0) };
        let next = *gather.next.get_or_insert(head);
        let behind = head >= next && ck.slots.iter().flatten().any(|s| s.seq() < next);
        if behind && now.log_segments > 1 {
            self.checkpoint_locked(&mut ck, true)?;
            return Ok(LOOK_BYTES);
        }
        drop(ck);
        gather.next = None;
        gather.last = Some(now);
        gather.pass = Some(Pass { at: 0, ended: false, found: VecDeque::new(), blocks: 0 });
        Ok(0)
    }

    /// Begins to copy what was found, when it fills a segment.
    fn begin_gathering(&self, state: &mut Compaction) -> Result<Option<Job>, StoreError> {
        let Some(pass) = &mut state.gather.pass else { return Ok(None) };
        let Some((count, pages)) = fill(&pass.found, self.class_max(), pass.ended) else {
            if pass.ended {
                state.gather.pass = None;
            }
            return Ok(None);
        };
        let Some(ck) = self.checkpoints.try_lock() else { return Ok(None) };
        if !self.may_compact(&ck) {
            return Ok(None);
        }
        let busy = self.busy_segments();
        let writer = match self.begin_target(pages, Space::Data) {
            Ok(writer) => writer,
            Err(StoreError::Full) => return Ok(None),
            Err(e) => return Err(e),
        };
        let taken = pass.found.drain(..count);
        let ahead = taken
            .map(|(window, blocks)| {
                pass.blocks -= blocks;
                window
            })
            .collect();
        let windows = Windows { ahead, sources: Sources::new(busy, writer.seg.generation) };
        Ok(Some(Job::gathering(windows, writer, ck.lineage)))
    }

    /// The blocks of the next window that can be moved; none when it cannot be said of each of them what it is: then
    /// the scrub has something to do first.
    pub(crate) fn blocks_of_window(&self, windows: &mut Windows) -> Result<VecDeque<Held>, StoreError> {
        let Windows { ahead, sources } = windows;
        let Some(window) = ahead.pop_front() else { return Ok(VecDeque::new()) };
        let content = self.map.read().content.clone();
        let mut entries = [Entry::UNSET; LOOK_BLOCKS];
        self.healing(|| content.entries(&self.shared, window, &mut entries))?;
        let mut reader = DigestReader::new(&self.shared);
        let mut held = VecDeque::new();
        for (block, entry) in (window..).zip(entries) {
            if !sources.has(&content.segments, entry) {
                continue;
            }
            match reader.described(&content.segments, entry)? {
                Some((crc, digest)) if entry.matches(crc) => {
                    held.push_back(Held { block, entry, crc, digest });
                }
                _ => {
                    self.shared.rot.found(Some(self.id), &format!("block {block}"));
                    return Ok(VecDeque::new());
                }
            }
        }
        Ok(held)
    }
}
