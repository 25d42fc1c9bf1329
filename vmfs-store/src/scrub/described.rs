//! Whether everything that belongs into a segment is described in it. A header page whose last version never
//! reached the disk looks like the end of the segment: what came after it can be told only by who wants it. So can
//! segments that are not there at all.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmfs_common::Seq;

use super::{Kept, Scrub, Stage};
use crate::error::StoreError;
use crate::image::ImageStore;
use crate::map::{BLOCKS_MAX, Entry};
use crate::records::Record;
use crate::segment::{PAGE_U64, Segment, file_name};

/// How far the records of a segment reach. They describe its payload pages in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    /// The records that were met describe payload below this page.
    end: u32,
    /// What is written from this page on, was written since the walk began.
    upto: u32,
}

impl Reach {
    pub(super) fn met(&mut self, record: &Record) {
        let end = record.payload_page + u32::try_from(record.crcs.len()).unwrap_or(u32::MAX);
        self.end = self.end.max(end);
    }
    const fn lacks(self, page: u32) -> bool {
        page >= self.end && page < self.upto
    }
}

/// Of every segment that a scrub has walked through, by number: its generation, and how far its records reach.
#[derive(Debug, Default)]
pub(super) struct Reached(BTreeMap<u32, (u64, Reach)>);

impl Reached {
    pub(super) fn insert(&mut self, seg: &Segment, reach: Reach) {
        self.0.insert(seg.no, (seg.generation, reach));
    }
}

impl ImageStore {
    /// Before any record of the segment is read.
    pub(super) fn reach_of(&self, seg: &Segment) -> Reach {
        let mut tail = self.tail.lock();
        let writer = tail.writers().find(|w| w.seg.generation == seg.generation);
        Reach { end: 0, upto: writer.map_or(u32::MAX, |w| w.next_page) }
    }
}

impl Kept {
    /// Notes the updates that are kept in the segment and were not met in it: those after `last`.
    pub(super) fn note_missing(&self, image: &ImageStore, seg: &Segment, last: Option<Seq>) {
        for &(after, end) in self.log.iter().chain(&self.forks) {
            let first = after.max(last.unwrap_or(after)).next();
            if first <= end {
                let what = format!("updates {first} to {end} of {}", file_name(seg.no));
                image.shared.rot.found(Some(image.id), &what);
            }
        }
    }
}

impl Scrub {
    /// Goes on through the content until the read bytes reach `until`: is every block that it shows described
    /// by a record of its segment, and is there such a segment?
    pub(super) fn described(&mut self, from: u64, until: u64) -> Result<(), StoreError> {
        let image = Arc::clone(&self.image);
        self.stage = Stage::Described(from);
        let content = image.map.read().content.clone();
        let missed = |entry: &Entry| {
            let Some(seg) = content.segments.get(&entry.segment_no()) else {
                return Some(format!("blocks in {}, which is missing", file_name(entry.segment_no())));
            };
            let (_, reach) = self.reached.0.get(&seg.no).filter(|(g, _)| *g == seg.generation)?;
            reach.lacks(entry.page()).then(|| format!("description of blocks in {}", file_name(seg.no)))
        };
        let (mut read, mut stopped) = (0, None);
        let walked = content.for_each(&image.shared, from..BLOCKS_MAX, |start, entries| {
            if self.progress.read_bytes + read >= until {
                stopped = Some(start);
                return Ok(false);
            }
            read += PAGE_U64;
            for what in entries.iter().filter(|e| e.is_data()).filter_map(missed) {
                image.shared.rot.found(Some(image.id), &what);
            }
            Ok(true)
        });
        self.progress.read_bytes += read;
        self.stage = match walked {
            Ok(()) => stopped.map_or(Stage::Done, Stage::Described),
            // A page of the map in no copy: noted when it was looked at. What it hides is looked at when it is whole.
            Err(StoreError::BadMapPage { .. }) => Stage::Done,
            Err(e) => return Err(e),
        };
        Ok(())
    }
}
