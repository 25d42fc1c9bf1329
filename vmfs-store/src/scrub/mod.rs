//! Reading everything an image has on the disk, a little at a time, and repairing what can be repaired
//! from this disk alone. What cannot (payload, above all) is handed to the caller, who knows other copies.

mod described;
pub(crate) mod segments;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::hash::block_digest;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, Seq};

use crate::checkpoint::{is_slot_blank, read_slot};
use crate::error::{IoContext as _, StoreError};
use crate::image::ImageStore;
use crate::log::ChainSegment;
use crate::map::tree::{Base, PageAt, read_copy, read_page};
use crate::map::{Content, Entry};
use crate::records::{Next, Record, Records};
use crate::recover::checkpoint_name;
use crate::rot::Rot;
use crate::scrub::described::{Reach, Reached};
use crate::segment::{FIRST_PAGE, PAGE, PAGE_U64, Segment};
use crate::writer::{LogPos, RecordKind};

/// A payload block whose bytes are not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadPayload {
    /// The block of the image that it is, when the content still shows it.
    pub block: Option<BlockIndex>,
    /// The update whose payload it is part of, when the log still has that.
    pub update: Option<Seq>,
    /// What its SHA-256 must be.
    pub digest: Digest,
    crc: u32,
    segment_no: u32,
    generation: u64,
    page: u32,
}

impl BadPayload {
    /// What it is, in words.
    #[must_use]
    pub fn name(&self) -> String {
        match (self.block, self.update) {
            (Some(block), _) => format!("block {}", block.0),
            (None, Some(seq)) => format!("payload of update {seq} (page {} of its segment)", self.page),
            (None, None) => format!("payload of a fork (page {} of segment {})", self.page, self.segment_no),
        }
    }
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubProgress {
    /// Of what is to be looked at, how much was.
    pub done_bytes: u64,
    /// What is to be looked at, roughly: it changes while the image is written.
    pub total_bytes: u64,
    /// Bytes read from the disk.
    pub read_bytes: u64,
    /// True when the scrub is over.
    pub finished: bool,
}

enum Stage {
    Checkpoints,
    /// Pages still to be looked at, and the maps they are of, so that nobody overwrites them.
    Map(VecDeque<PageAt>, Vec<Arc<Base>>),
    /// Segments, by generation.
    Segments,
    /// In the middle of one.
    Records(Walk),
    /// The blocks of the content from this one on: whether records describe them.
    Described(u64),
    Done,
}

/// How far a segment has been read.
#[derive(Clone)]
struct Walk {
    seg: Arc<Segment>,
    pos: LogPos,
    /// The last update met.
    last: Option<Seq>,
    reach: Reach,
}

/// A look at everything an image has on the disk. Between two steps it pins one segment at most.
pub struct Scrub {
    image: Arc<ImageStore>,
    stage: Stage,
    /// Generation of the last segment looked at.
    after: u64,
    /// Segments begun later are not looked at.
    upto: u64,
    progress: ScrubProgress,
    bad: Vec<BadPayload>,
    reached: Reached,
}

impl std::fmt::Debug for Scrub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scrub").field("progress", &self.progress).finish_non_exhaustive()
    }
}

impl ImageStore {
    /// Damage found in this image since the store was opened.
    #[must_use]
    pub fn rot(&self) -> Rot {
        self.shared.rot.get(Some(self.id))
    }
    /// Notes damage that a read has met.
    pub fn note_damage(&self, what: &str) {
        self.shared.rot.found(Some(self.id), what);
    }
    /// Notes that it was repaired.
    pub fn note_repair(&self, what: &str, how: &str) {
        self.shared.rot.repaired(Some(self.id), what, how);
    }

    /// Begins a scrub.
    #[must_use]
    pub fn begin_scrub(self: &Arc<Self>) -> Scrub {
        self.shared.rot.begin_pass(Some(self.id));
        let upto = self.shared.generations.peek();
        let total_bytes = self.map.read().content.segments.values().map(|s| s.class.bytes()).sum();
        let progress = ScrubProgress { total_bytes, ..ScrubProgress::default() };
        Scrub {
            image: Arc::clone(self),
            stage: Stage::Checkpoints,
            after: 0,
            upto,
            progress,
            bad: Vec::new(),
            reached: Reached::default(),
        }
    }

    /// Puts a damaged payload block's right bytes back. Durable on return. False when its place is no
    /// longer in use.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Corrupt`] when the disk does not keep them, or the disk's.
    pub fn repair(&self, bad: &BadPayload, data: &[u8]) -> Result<bool, StoreError> {
        let right = data.len() == BLOCK_BYTES && block_digest(data) == bad.digest;
        if !right || crc32c::crc32c(data) != bad.crc {
            return Err(StoreError::DigestMismatch);
        }
        // The segment is not used for anything else while it is held.
        let seg = self.map.read().content.segments.get(&bad.segment_no).map(Arc::clone);
        let Some(seg) = seg.filter(|s| s.generation == bad.generation) else { return Ok(false) };
        self.write_again(&seg, bad.page, data)?;
        Ok(true)
    }

    /// The payload block of update `seq` that has this digest, if the log here has it whole.
    ///
    /// # Errors
    /// As [`ImageStore::read_log`].
    pub fn payload_of(&self, seq: Seq, digest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let entries = self.read_log(seq, 0)?;
        let Some(entry) = entries.first().filter(|e| e.update.header.seq == seq) else { return Ok(None) };
        let block = entry.payload.chunks_exact(BLOCK_BYTES).find(|b| block_digest(b) == *digest);
        Ok(block.map(<[u8]>::to_vec))
    }

    /// Both checkpoints are there again.
    pub(crate) fn checkpoints_whole(&self, ck: &crate::checkpointing::Checkpoints) {
        if ck.slots.iter().all(Option::is_some) {
            self.checkpoint_missing.store(false, Ordering::Release);
            for slot in 0..2 {
                self.shared.rot.settle(self.id, &checkpoint_name(slot), "a new one was made");
            }
        }
    }

    /// Reads both checkpoints back and makes new ones in place of damaged ones. Returns the bytes read.
    fn scrub_checkpoints(&self) -> Result<u64, StoreError> {
        let mut ck = self.checkpoints.lock();
        let file = self.shared.files.map(self.id)?;
        let mut bytes = 0;
        let mut lost = 0;
        for i in 0..2 {
            let Some(known) = ck.slots[i].as_ref() else {
                lost += 1;
                continue;
            };
            bytes += (1 + known.pages.len() as u64) * PAGE_U64;
            let found = read_slot(self.shared.store, self.id, &*file, i)?;
            if found.is_some_and(|f| f.number == known.number) {
                continue;
            }
            debug_assert!(!is_slot_blank(self.id, &*file, i)?);
            self.shared.rot.found(Some(self.id), &checkpoint_name(i));
            // What is in memory is right, and what is on the disk is not: the next one goes there.
            ck.slots[i] = None;
            lost += 1;
        }
        for _ in 0..lost {
            self.checkpoint_locked(&mut ck, true)?;
        }
        self.checkpoints_whole(&ck);
        Ok(bytes)
    }

    /// Every page of the maps in use, each once.
    fn map_pages(&self) -> Result<(VecDeque<PageAt>, Vec<Arc<Base>>), StoreError> {
        let mut bases: Vec<Arc<Base>> = {
            let ck = self.checkpoints.lock();
            ck.slots.iter().flatten().map(|s| Arc::clone(&s.base)).collect()
        };
        bases.push(Arc::clone(&self.map.read().content.base));
        let (mut seen, mut pages) = (HashSet::new(), VecDeque::new());
        for base in &bases {
            let segments = Arc::clone(&self.map.read().content.segments);
            let mut walk = || {
                base.for_each_ref(&self.shared, &mut |at| {
                    if seen.insert(at.page.page()) {
                        pages.push_back(at);
                    }
                })
            };
            match walk() {
                // An inner page in neither copy: what is above it has been seen.
                Err(StoreError::BadMapPage { .. }) => {}
                other => other?,
            }
            drop(segments);
        }
        Ok((pages, bases))
    }

    /// Looks at one page of the map and at its second copy.
    fn scrub_map_page(&self, at: PageAt, base: &Arc<Base>) -> Result<(), StoreError> {
        let segments = Arc::clone(&self.map.read().content.segments);
        let bytes = match read_page(&self.shared, self.id, at.page)? {
            Some(bytes) => bytes,
            None => match self.heal_page(base, &segments, at) {
                Ok(()) => match read_page(&self.shared, self.id, at.page)? {
                    Some(bytes) => bytes,
                    None => return Ok(()),
                },
                // Noted; only another copy of the image helps.
                Err(StoreError::BadMapPage { .. }) => return Ok(()),
                Err(e) => return Err(e),
            },
        };
        if read_copy(&self.shared, self.id, at.page)?.is_none() {
            let offset = u64::from(at.page.page()) * PAGE_U64;
            let copy = self.shared.files.map_copy(self.id)?;
            copy.write_at(&bytes, offset).during(|| format!("copying the map of image {}", self.id))?;
        }
        Ok(())
    }
}

impl Scrub {
    /// Goes on until about `budget_bytes` more have been read, or everything was.
    ///
    /// # Errors
    /// The disk's, or another format version. The scrub may be gone on with.
    pub fn step(&mut self, budget_bytes: u64) -> Result<ScrubProgress, StoreError> {
        let until = self.progress.read_bytes.saturating_add(budget_bytes.max(1));
        while self.progress.read_bytes < until && !self.progress.finished {
            self.image.check_latch()?;
            match std::mem::replace(&mut self.stage, Stage::Done) {
                Stage::Checkpoints => {
                    self.progress.read_bytes += self.image.scrub_checkpoints()?;
                    let (pages, bases) = self.image.map_pages()?;
                    self.progress.total_bytes += pages.len() as u64 * PAGE_U64;
                    self.stage = Stage::Map(pages, bases);
                }
                Stage::Map(mut pages, bases) => {
                    if let (Some(at), Some(base)) = (pages.pop_front(), bases.first()) {
                        self.image.scrub_map_page(at, base)?;
                        self.progress.read_bytes += 2 * PAGE_U64;
                        self.progress.done_bytes += PAGE_U64;
                        self.stage = Stage::Map(pages, bases);
                    } else {
                        let copy = self.image.shared.files.map_copy(self.image.id)?;
                        copy.sync().during(|| format!("syncing the map of image {}", self.image.id))?;
                        self.stage = Stage::Segments;
                    }
                }
                Stage::Segments => self.next_segment()?,
                Stage::Records(walk) => self.records(walk, until)?,
                Stage::Described(from) => self.described(from, until)?,
                Stage::Done => {
                    self.image.shared.rot.end_pass(Some(self.image.id));
                    self.progress.done_bytes = self.progress.total_bytes;
                    self.progress.finished = true;
                }
            }
        }
        Ok(self.progress)
    }

    /// Damaged payload found since the last call.
    pub fn take_bad(&mut self) -> Vec<BadPayload> {
        std::mem::take(&mut self.bad)
    }

    fn next_segment(&mut self) -> Result<(), StoreError> {
        self.stage = Stage::Described(0);
        let segments = Arc::clone(&self.image.map.read().content.segments);
        let ahead = segments.values().filter(|s| s.generation > self.after && s.generation < self.upto);
        let Some(seg) = ahead.min_by_key(|s| s.generation).map(Arc::clone) else { return Ok(()) };
        drop(segments);
        self.stage = Stage::Segments;
        self.progress.read_bytes += self.image.scrub_segment_header(&seg)?;
        self.progress.read_bytes += self.image.scrub_header_pages(&seg)?;
        let page = u16::try_from(FIRST_PAGE).expect("invariant: a small constant");
        let pos = LogPos { generation: seg.generation, page, index: 0, offset: 0 };
        let reach = self.image.reach_of(&seg);
        self.stage = Stage::Records(Walk { seg, pos, last: None, reach });
        Ok(())
    }

    /// Goes on in one segment until the read bytes reach `until`.
    fn records(&mut self, mut walk: Walk, until: u64) -> Result<(), StoreError> {
        let image = Arc::clone(&self.image);
        let seg = Arc::clone(&walk.seg);
        // Before the first record is read: what is appended meanwhile is not missed.
        let kept = Kept::of(&image, &seg);
        // Where it goes on if this fails.
        self.stage = Stage::Records(walk.clone());
        let mut records = Records::from_pos(&image.shared, &seg, walk.pos)?;
        loop {
            if self.progress.read_bytes >= until {
                self.stage = Stage::Records(walk);
                return Ok(());
            }
            let Next::Record(record) = records.next()? else { break };
            self.progress.read_bytes += check_record(&image, &seg, &record, &kept, &mut self.bad)?;
            walk.last = record.seq().or(walk.last);
            walk.reach.met(&record);
            let Some(next) = records.position() else { break };
            walk.pos = next;
        }
        kept.note_missing(&image, &seg, walk.last);
        self.reached.insert(&seg, walk.reach);
        self.after = seg.generation;
        self.progress.done_bytes =
            (self.progress.done_bytes + seg.class.bytes()).min(self.progress.total_bytes);
        self.stage = Stage::Segments;
        Ok(())
    }
}

/// What of a segment's updates is kept for its own sake.
struct Kept {
    content: Content,
    /// Updates after the first and up to the second number are part of the log.
    log: Option<(Seq, Seq)>,
    /// The same, of forks.
    forks: Vec<(Seq, Seq)>,
}

impl Kept {
    fn of(image: &ImageStore, seg: &Segment) -> Self {
        let part = |chain: &[ChainSegment], head: Seq| {
            let i = chain.iter().position(|c| c.seg.generation == seg.generation)?;
            Some((chain[i].start_seq, chain.get(i + 1).map_or(head, |n| n.start_seq)))
        };
        let log = {
            let tail = image.tail.lock();
            part(&tail.chain, tail.head().seq).map(|(a, b)| (a.max(tail.log_start.prev()), b))
        };
        let all = image.forks.lock().clone();
        let forks = all
            .iter()
            .filter_map(|f| part(&f.chain, f.info.head.seq).map(|(a, b)| (a.max(f.info.ancestor.seq), b)));
        let forks = forks.collect();
        Self { content: image.map.read().content.clone(), log, forks }
    }
    fn has(&self, seq: Seq) -> (bool, bool) {
        let within = |&(after, last): &(Seq, Seq)| seq > after && seq <= last;
        (self.log.as_ref().is_some_and(within), self.forks.iter().any(within))
    }
}

/// Reads a record's payload, as far as somebody wants it, and checks it. Returns the bytes read.
fn check_record(
    image: &ImageStore,
    seg: &Arc<Segment>,
    record: &Record,
    kept: &Kept,
    bad: &mut Vec<BadPayload>,
) -> Result<u64, StoreError> {
    if record.crcs.is_empty() {
        return Ok(0);
    }
    let shared = &image.shared;
    let (seq, blocks) = described(record)?;
    let (in_log, in_fork) = seq.map_or((false, false), |s| kept.has(s));
    let mut shown = Vec::with_capacity(record.crcs.len());
    for (i, ((block, _), crc)) in (0u32..).zip(blocks.iter().zip(&record.crcs)) {
        let entry = Entry::data(seg.no, record.payload_page + i, *crc);
        shown.push(match image.healing(|| kept.content.shows(shared, *block, entry)) {
            // The page is noted as damaged; the block is looked at when it is whole again.
            Err(StoreError::BadMapPage { .. }) => false,
            other => other?,
        });
    }
    if !in_log && !in_fork && !shown.contains(&true) {
        return Ok(0);
    }
    let mut payload = vec![0u8; record.crcs.len() * PAGE];
    seg.read_payload(&shared.files, record.payload_page, &mut payload, false)?;
    let all = payload.chunks_exact(PAGE).zip(&record.crcs).zip(blocks).zip(shown);
    for (page, (((data, crc), (block, digest)), shown)) in (record.payload_page..).zip(all) {
        let whole = crc32c::crc32c(data) == *crc && block_digest(data) == digest;
        if whole || !(shown || in_log || in_fork) {
            continue;
        }
        let damaged = BadPayload {
            block: shown.then_some(BlockIndex(block)),
            update: seq.filter(|_| in_log),
            digest,
            crc: *crc,
            segment_no: seg.no,
            generation: seg.generation,
            page,
        };
        shared.rot.found(Some(image.id), &damaged.name());
        bad.push(damaged);
    }
    Ok(payload.len() as u64)
}

/// An update's number, if it is one, and index and digest of every payload block.
pub(crate) type Described = (Option<Seq>, Vec<(u64, Digest)>);

pub(crate) fn described(record: &Record) -> Result<Described, StoreError> {
    if record.kind == RecordKind::Blocks {
        let indices = record.block_indices();
        let digests = (0..indices.len()).map(|i| record.digest_of(i).unwrap_or_default());
        return Ok((None, indices.iter().copied().zip(digests).collect()));
    }
    let update = record.update()?;
    let h = &update.header;
    let blocks = (h.start.0..).zip(h.digests.iter().copied()).filter(|(_, d)| !d.is_zero());
    Ok((Some(h.seq), blocks.collect()))
}
