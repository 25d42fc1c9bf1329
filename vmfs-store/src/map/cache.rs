//! Map pages in memory, bounded for the whole store, with a second chance for used ones.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use vmfs_common::ImageId;

use super::tree::ENTRIES;

/// A map page: 512 little-endian words.
pub(crate) type MapPage = Arc<[u64; ENTRIES]>;

type Key = (ImageId, u32);

struct Slot {
    key: Key,
    page: MapPage,
    used: AtomicBool,
}

#[derive(Default)]
struct Inner {
    by_key: HashMap<Key, usize>,
    slots: Vec<Slot>,
    hand: usize,
}

/// The cache.
pub(crate) struct PageCache {
    slots_max: usize,
    inner: Mutex<Inner>,
}

impl PageCache {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let slots_max = usize::try_from(bytes_max / 4096).unwrap_or(usize::MAX).max(64);
        Self { slots_max, inner: Mutex::default() }
    }
    pub(crate) fn get(&self, image: ImageId, page: u32) -> Option<MapPage> {
        let inner = self.inner.lock();
        let slot = &inner.slots[*inner.by_key.get(&(image, page))?];
        slot.used.store(true, Ordering::Relaxed);
        Some(Arc::clone(&slot.page))
    }
    /// Forgets an image's pages.
    pub(crate) fn purge(&self, image: ImageId) {
        let mut inner = self.inner.lock();
        inner.slots.retain(|s| s.key.0 != image);
        inner.by_key = inner.slots.iter().enumerate().map(|(i, s)| (s.key, i)).collect();
        inner.hand = 0;
    }
    /// Adds or replaces a page.
    pub(crate) fn put(&self, image: ImageId, no: u32, page: MapPage) {
        let key = (image, no);
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        if let Some(i) = inner.by_key.get(&key) {
            inner.slots[*i].page = page;
            return;
        }
        let slot = Slot { key, page, used: AtomicBool::new(false) };
        if inner.slots.len() < self.slots_max {
            inner.by_key.insert(key, inner.slots.len());
            inner.slots.push(slot);
            return;
        }
        while inner.slots[inner.hand].used.swap(false, Ordering::Relaxed) {
            inner.hand = (inner.hand + 1) % inner.slots.len();
        }
        let old = std::mem::replace(&mut inner.slots[inner.hand], slot);
        inner.by_key.remove(&old.key);
        inner.by_key.insert(key, inner.hand);
        inner.hand = (inner.hand + 1) % inner.slots.len();
    }
}
