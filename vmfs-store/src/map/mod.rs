//! The block map: block index -> place of its newest data. Recent changes are in memory
//! ([`overlay`]), the rest in checkpointed pages ([`tree`]) read through a bounded cache
//! ([`cache`]). Both are persistent structures: a snapshot is a reference.

pub(crate) mod cache;
pub(crate) mod overlay;
pub(crate) mod tree;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::StoreError;
use crate::segment::{PAGE_BITS, Segment};
use crate::shared::Shared;
use overlay::Overlay;
use tree::{Base, ENTRIES};

/// Blocks an image can have: indices are below this.
pub(crate) const BLOCKS_MAX: u64 = 1 << 40;

/// One block's entry: a place (40 bits) and the low 24 bits of the block's CRC-32C, or a special.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(pub(crate) u64);

impl Entry {
    /// Never written here: the parent layer's, else zeros.
    pub(crate) const ABSENT: Self = Self(0);
    /// Zeros, whatever a parent has.
    pub(crate) const ZERO: Self = Self(1);
    /// In an overlay: look further down. Never on disk.
    pub(crate) const UNSET: Self = Self(2);

    pub(crate) fn data(segment_no: u32, page: u32, crc: u32) -> Self {
        let place = u64::from(segment_no) << PAGE_BITS | u64::from(page);
        Self(place << 24 | u64::from(crc & 0xff_ffff))
    }
    pub(crate) const fn is_data(self) -> bool {
        self.0 >> 24 != 0
    }
    pub(crate) fn segment_no(self) -> u32 {
        u32::try_from(self.0 >> (24 + PAGE_BITS)).expect("invariant: 26 bits are left")
    }
    pub(crate) fn page(self) -> u32 {
        u32::try_from(self.0 >> 24 & ((1 << PAGE_BITS) - 1)).expect("invariant: 14 bits are left")
    }
    pub(crate) fn matches(self, crc: u32) -> bool {
        self.0 & 0xff_ffff == u64::from(crc & 0xff_ffff)
    }
}

/// The segments something may refer to, by number.
pub(crate) type Segments = Arc<BTreeMap<u32, Arc<Segment>>>;

/// A whole content at one moment: recent changes over a checkpoint.
#[derive(Clone)]
pub(crate) struct Content {
    /// Newest changes.
    pub(crate) overlay: Overlay,
    /// Changes that a checkpoint is being made of.
    pub(crate) frozen: Option<Overlay>,
    pub(crate) base: Arc<Base>,
    pub(crate) segments: Segments,
}

impl Content {
    pub(crate) fn empty(base: Arc<Base>) -> Self {
        Self { overlay: Overlay::default(), frozen: None, base, segments: Segments::default() }
    }
    /// Entries from memory only; blocks that only the base knows stay [`Entry::UNSET`].
    pub(crate) fn recent(&self, start: u64, out: &mut [Entry]) {
        out.fill(Entry::UNSET);
        self.overlay.fill(start, out);
        if let Some(f) = &self.frozen {
            f.fill(start, out);
        }
    }
    /// Entries of the blocks from `start`.
    pub(crate) fn entries(&self, shared: &Shared, start: u64, out: &mut [Entry]) -> Result<(), StoreError> {
        self.recent(start, out);
        self.base.fill(shared, start, out)
    }
    /// A run of blocks from `at` that surely have one and the same special entry, without looking
    /// at each: its entry and length; `None` when blocks must be looked at.
    fn uniform(&self, shared: &Shared, at: u64) -> Result<(Option<Entry>, u64), StoreError> {
        let (mut entry, mut len) = self.overlay.uniform(at);
        if entry == Some(Entry::UNSET)
            && let Some(f) = &self.frozen
        {
            let (e, n) = f.uniform(at);
            (entry, len) = (e, len.min(n));
        }
        if entry == Some(Entry::UNSET) {
            let (e, n) = self.base.uniform(shared, at)?;
            (entry, len) = (e, len.min(n));
        }
        Ok((entry, len))
    }
    /// Calls `f(start, entries)` for every piece of `start..end` that is not uniformly without
    /// data; pieces do not cross multiples of 512. `f` returns false to stop.
    pub(crate) fn for_each(
        &self,
        shared: &Shared,
        range: std::ops::Range<u64>,
        mut f: impl FnMut(u64, &[Entry]) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let mut at = range.start;
        let mut buf = [Entry::UNSET; ENTRIES];
        while at < range.end {
            let piece = (ENTRIES as u64 - at % ENTRIES as u64).min(range.end - at);
            let (entry, len) = self.uniform(shared, at)?;
            if entry.is_some() && len >= piece {
                at += len.min(range.end - at);
                continue;
            }
            let n = usize::try_from(piece).expect("invariant: at most 512");
            self.entries(shared, at, &mut buf[..n])?;
            if !f(at, &buf[..n])? {
                return Ok(());
            }
            at += piece;
        }
        Ok(())
    }
    /// Blocks of the range that hold data.
    pub(crate) fn count_data(&self, shared: &Shared, range: std::ops::Range<u64>) -> Result<u64, StoreError> {
        let mut n = 0;
        self.for_each(shared, range, |_, entries| {
            n += entries.iter().filter(|e| e.is_data()).count() as u64;
            Ok(true)
        })?;
        Ok(n)
    }
    /// The first block at or after `from` with data.
    pub(crate) fn next_data(&self, shared: &Shared, from: u64) -> Result<Option<u64>, StoreError> {
        self.next_data_before(shared, from, BLOCKS_MAX)
    }
    /// The first block of `from..end` with data.
    pub(crate) fn next_data_before(
        &self,
        shared: &Shared,
        from: u64,
        end: u64,
    ) -> Result<Option<u64>, StoreError> {
        let mut found = None;
        self.for_each(shared, from..end.min(BLOCKS_MAX), |at, entries| {
            found = entries.iter().position(|e| e.is_data()).map(|i| at + i as u64);
            Ok(found.is_none())
        })?;
        Ok(found)
    }
    /// The first block at or after `from` without data.
    pub(crate) fn next_hole(&self, shared: &Shared, from: u64) -> Result<u64, StoreError> {
        let mut at = from;
        self.for_each(shared, from..BLOCKS_MAX, |start, entries| {
            if start > at {
                return Ok(false);
            }
            match entries.iter().position(|e| !e.is_data()) {
                Some(i) => at = start + i as u64,
                None => {
                    at = start + entries.len() as u64;
                    return Ok(true);
                }
            }
            Ok(false)
        })?;
        Ok(at)
    }
}
