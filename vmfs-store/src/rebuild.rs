//! Making a damaged leaf page of the block map again, from the records of the log.
//!
//! The map is a cache of the log, so a leaf is what the retained records say, applied in the order they
//! were written, up to some checkpoint. Which one does not matter: the reference to the page has its
//! checksum, and a page is taken only when it has exactly that. So a record that is no longer there (its
//! segment was given back) makes a page impossible to rebuild, never wrong.
//!
//! Blocks that compaction has moved changed their places at some moment while the log went on. What was
//! appended to the log's segment of that moment, and later, is newer than they are; what is in the segments
//! before it is older. So they count as what comes just before that segment.

use std::sync::Arc;

use crate::append::{MapChange, map_change};
use crate::error::StoreError;
use crate::image::ImageStore;
use crate::map::tree::{Base, ENTRIES, PageAt, bytes_of, page_name, put_back, read_copy, read_page};
use crate::map::{Content, Entry, Segments};
use crate::records::{Next, Record, Records};
use crate::segment::{Kind, Segment, SegmentHeader};
use crate::shadow::Origin;
use crate::shared::Shared;
use crate::writer::{RECORD_BLOCKS_MAX, RecordKind};

/// Damaged pages met by one operation before it is given up.
const HEALS_MAX: usize = 64;
/// Segments of moved blocks that may be newer than the checkpoint whose page it is: so many are tried.
const MOVES_AHEAD_MAX: usize = 8;

/// What one record did to the blocks of the page.
struct Event {
    /// Number of the update; 0 for imported blocks, which no roll-back cuts off.
    seq: u64,
    /// Generation of the segment of moved blocks that it is from; 0 for others.
    moved: u64,
    /// First word changed.
    at: usize,
    entries: Vec<Entry>,
}

impl ImageStore {
    /// Runs `f`; when it meets a damaged map page, makes that again and runs it once more.
    pub(crate) fn healing<T>(&self, mut f: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        for _ in 0..HEALS_MAX {
            match f() {
                Err(StoreError::BadMapPage { page, .. }) => self.heal_map_page(page)?,
                other => return other,
            }
        }
        f()
    }

    /// Makes a damaged page of the present map whole. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::BadMapPage`] when the log no longer says what was in it, or the disk's.
    pub fn heal_map_page(&self, page: u32) -> Result<(), StoreError> {
        let content = self.map.read().content.clone();
        let mut found = None;
        let walked = content.base.for_each_ref(&self.shared, &mut |at| {
            if at.page.page() == page {
                found = Some(at);
            }
        });
        match found {
            Some(at) => self.heal_page(&content.base, &content.segments, at),
            None => walked.and(Err(StoreError::BadMapPage { image: self.id, page })),
        }
    }

    /// As [`ImageStore::heal_map_page`], for a page of `base`, whose holder the caller is.
    pub(crate) fn heal_page(
        &self,
        _held: &Arc<Base>,
        segments: &Segments,
        at: PageAt,
    ) -> Result<(), StoreError> {
        let (shared, page) = (&self.shared, at.page.page());
        if read_page(shared, self.id, at.page)?.is_some() {
            return Ok(());
        }
        let what = page_name(page);
        shared.rot.found(Some(self.id), &what);
        let cached = shared.pages.get(self.id, page).map(|words| bytes_of(&words));
        let cached = cached.filter(|b| crc32c::crc32c(b) == at.page.crc());
        let (bytes, how) = if let Some(bytes) = cached {
            (Some(bytes), "from memory")
        } else if let Some(bytes) = read_copy(shared, self.id, at.page)? {
            (Some(bytes), "from its second copy")
        } else if at.height == 1 {
            (rebuild_leaf(shared, segments, at)?, "made again from the log")
        } else {
            (None, "")
        };
        let bytes = bytes.ok_or(StoreError::BadMapPage { image: self.id, page })?;
        put_back(shared, self.id, at.page, &bytes)?;
        shared.rot.repaired(Some(self.id), &what, how);
        Ok(())
    }
}

/// The leaf page's bytes, when the records that are left tell them.
fn rebuild_leaf(
    shared: &Shared,
    segments: &Segments,
    at: PageAt,
) -> Result<Option<[u8; ENTRIES * 8]>, StoreError> {
    // A roll-back cuts updates off; a block-level sync makes what was cut off count again.
    for cut in [true, false] {
        let events = events(shared, segments, at.start, cut)?;
        let mut moves: Vec<u64> = events.iter().map(|e| e.moved).filter(|g| *g > 0).collect();
        moves.sort_unstable();
        moves.dedup();
        // The newest moves may have come after the checkpoint whose page it is.
        for ahead in 0..=moves.len().min(MOVES_AHEAD_MAX) {
            let upto = moves.len().checked_sub(ahead + 1).map_or(0, |last| moves[last]);
            let events = || events.iter().filter(|e| e.moved <= upto);
            let page = [Entry::ABSENT, Entry::ZERO].into_iter().find_map(|blank| replay(events(), blank, at));
            if page.is_some() {
                return Ok(page);
            }
        }
    }
    Ok(None)
}

/// The page after the event that gives it the right checksum, if one does.
fn replay<'a>(
    events: impl Iterator<Item = &'a Event>,
    blank: Entry,
    at: PageAt,
) -> Option<[u8; ENTRIES * 8]> {
    let mut words = [blank.0; ENTRIES];
    for event in events {
        let changed = words[event.at..].iter_mut().zip(&event.entries);
        for (word, entry) in changed.filter(|(_, e)| **e != Entry::UNSET) {
            *word = entry.0;
        }
        let bytes = bytes_of(&words);
        if crc32c::crc32c(&bytes) == at.page.crc() {
            return Some(bytes);
        }
    }
    None
}

/// What the records of all segments did to the 512 blocks from `start`, oldest first. With `cut`,
/// without the updates that the beginning of a later segment cut off.
fn events(shared: &Shared, segments: &Segments, start: u64, cut: bool) -> Result<Vec<Event>, StoreError> {
    let mut by_age = Vec::new();
    for seg in segments.values() {
        let header = SegmentHeader::read(seg.no, &*seg.file(&shared.files)?)?;
        let header = header.filter(|h| h.generation == seg.generation);
        let origin = header.as_ref().map_or(Origin::Import, Origin::of);
        let age = match origin {
            Origin::Moved { before } if before > 0 => (before, false, seg.generation),
            _ => (seg.generation, true, seg.generation),
        };
        by_age.push((age, seg, header, origin));
    }
    by_age.sort_by_key(|(age, ..)| *age);
    let mut events: Vec<Event> = Vec::new();
    for (_, seg, header, origin) in by_age {
        let log = header.filter(|h| h.kind == Kind::Log || h.link.seq.0 > 0);
        if let Some(h) = log.filter(|_| cut) {
            events.retain(|e| e.seq <= h.link.seq.0);
        }
        let mut records = Records::from_start(shared, seg)?;
        while let Next::Record(record) = records.next()? {
            let event = match record.kind {
                RecordKind::Update => update_event(&record, seg.no, start)?,
                RecordKind::Blocks if origin == Origin::Import => blocks_event(&record, seg.no, start),
                RecordKind::Blocks => moved_event(&record, seg, start),
            };
            events.extend(event);
        }
    }
    Ok(events)
}

fn update_event(record: &Record, no: u32, start: u64) -> Result<Option<Event>, StoreError> {
    let update = record.update()?;
    let seq = update.header.seq.0;
    let mut entries = [Entry::UNSET; RECORD_BLOCKS_MAX];
    let range = start..start + ENTRIES as u64;
    let (from, entries) =
        match map_change(&update.header, no, record.payload_page, &record.crcs, &mut entries) {
            MapChange::None => return Ok(None),
            MapChange::Blocks { start: first, count } => {
                let (from, to) = (first.max(range.start), (first + count as u64).min(range.end));
                if from >= to {
                    return Ok(None);
                }
                (from, entries[index(from - first)..index(to - first)].to_vec())
            }
            MapChange::Range { range: changed, entry } => {
                let (from, to) = (changed.start.max(range.start), changed.end.min(range.end));
                if from >= to {
                    return Ok(None);
                }
                (from, vec![entry; index(to - from)])
            }
        };
    Ok(Some(Event { seq, moved: 0, at: index(from - start), entries }))
}

/// Imported blocks of one record are a run, with gaps where blocks are zeros.
fn blocks_event(record: &Record, no: u32, start: u64) -> Option<Event> {
    let indices = record.block_indices();
    let (first, last) = (*indices.first()?, *indices.last()?);
    let (from, to) = (first.max(start), (last + 1).min(start + ENTRIES as u64));
    if from >= to || last < first || last - first >= RECORD_BLOCKS_MAX as u64 {
        return None;
    }
    let mut entries = vec![Entry::ZERO; index(last + 1 - first)];
    for (i, (at, crc)) in (0u32..).zip(indices.iter().zip(&record.crcs)) {
        *entries.get_mut(index(at.checked_sub(first)?))? = Entry::data(no, record.payload_page + i, *crc);
    }
    let entries = entries[index(from - first)..index(to - first)].to_vec();
    Some(Event { seq: 0, moved: 0, at: index(from - start), entries })
}

/// Moved blocks of one record may be from anywhere; nothing is known of those between them.
fn moved_event(record: &Record, seg: &Segment, start: u64) -> Option<Event> {
    let mut entries = vec![Entry::UNSET; ENTRIES];
    let mut any = false;
    for (page, (block, crc)) in (record.payload_page..).zip(record.block_indices().iter().zip(&record.crcs)) {
        let Some(entry) = block.checked_sub(start).and_then(|at| entries.get_mut(usize::try_from(at).ok()?))
        else {
            continue;
        };
        *entry = Entry::data(seg.no, page, *crc);
        any = true;
    }
    any.then_some(Event { seq: 0, moved: seg.generation, at: 0, entries })
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("invariant: within a record or a page")
}

impl Content {
    /// True when `entry` is what the content has at `block`.
    pub(crate) fn shows(&self, shared: &Shared, block: u64, entry: Entry) -> Result<bool, StoreError> {
        let mut found = [Entry::UNSET];
        self.entries(shared, block, &mut found)?;
        Ok(found == [entry])
    }
}
