//! What all images of a store share.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vmfs_common::StoreId;

use crate::config::StoreConfig;
use crate::disk::Disk;
use crate::error::{IoContext as _, StoreError};
use crate::files::Files;
use crate::image::Space;
use crate::map::cache::PageCache;
use crate::pool::{Pool, Reserve};
use crate::rot::Ledger;
use crate::segment::Segment;
use crate::way::Way;
use crate::writer::IndexEntry;

/// Indexes of closed segments kept in memory.
const INDEXES_MAX: usize = 512;

/// Generation numbers: unique in the store for ever, taken from a durable limit.
pub(crate) struct Generations(AtomicU64);

impl Generations {
    pub(crate) const fn starting(at: u64) -> Self {
        Self(AtomicU64::new(at))
    }
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::AcqRel)
    }
    /// The next one, without taking it.
    pub(crate) fn peek(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// Indexes of segments that are no longer written, bounded, least recently used dropped first.
#[derive(Default)]
pub(crate) struct Indexes(Mutex<IndexesInner>);

#[derive(Default)]
struct IndexesInner {
    by_generation: HashMap<u64, (Arc<Vec<IndexEntry>>, u64)>,
    clock: u64,
}

impl Indexes {
    pub(crate) fn get(&self, seg: &Segment) -> Option<Arc<Vec<IndexEntry>>> {
        let mut inner = self.0.lock();
        inner.clock += 1;
        let now = inner.clock;
        let (index, used) = inner.by_generation.get_mut(&seg.generation)?;
        *used = now;
        Some(Arc::clone(index))
    }
    pub(crate) fn insert(&self, seg: &Segment, index: Arc<Vec<IndexEntry>>) {
        let mut inner = self.0.lock();
        inner.clock += 1;
        let now = inner.clock;
        if inner.by_generation.len() >= INDEXES_MAX {
            let mut by_age: Vec<_> = inner.by_generation.iter().map(|(g, (_, t))| (*t, *g)).collect();
            by_age.sort_unstable();
            for (_, g) in by_age.into_iter().take(INDEXES_MAX / 8) {
                inner.by_generation.remove(&g);
            }
        }
        inner.by_generation.insert(seg.generation, (index, now));
    }
}

/// Shared by the images of a store.
pub(crate) struct Shared {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) cfg: StoreConfig,
    pub(crate) store: StoreId,
    pub(crate) files: Files,
    pub(crate) pool: Pool,
    pub(crate) reserve: Reserve,
    pub(crate) pages: PageCache,
    pub(crate) indexes: Indexes,
    pub(crate) generations: Generations,
    pub(crate) rot: Ledger,
    /// Bytes of map changes not yet in a checkpoint, over all images.
    pub(crate) dirty_map_bytes: AtomicU64,
    pub(crate) way: Way,
}

impl Shared {
    /// Refuses data when taking `bytes` would leave less than the reserve.
    pub(crate) fn check_space(&self, bytes: u64, space: Space) -> Result<(), StoreError> {
        if space == Space::Control {
            return Ok(());
        }
        let free = self.disk.free_bytes().during(|| "asking for free space".into())?;
        if free < bytes.saturating_add(self.cfg.reserve_bytes / 4) { Err(StoreError::Full) } else { Ok(()) }
    }
    /// True when so little space is left that logs are kept only as far as recovery needs them.
    pub(crate) fn is_tight(&self) -> bool {
        let free = self.disk.free_bytes().unwrap_or(0);
        free < self.cfg.reserve_bytes.saturating_add(self.cfg.segment_bytes_max)
    }
    /// Runs `f`; when it finds no space and is for control, gives up reserve and tries again.
    pub(crate) fn with_reserve<T>(
        &self,
        space: Space,
        f: impl Fn() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            match f() {
                Err(StoreError::Full) if space == Space::Control && self.reserve.release(self)? => {}
                other => return other,
            }
        }
    }
}
