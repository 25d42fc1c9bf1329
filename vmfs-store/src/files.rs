//! A bounded set of open files.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use vmfs_common::ImageId;

use crate::disk::{Disk, DiskFile};
use crate::error::{IoContext as _, StoreError};
use crate::segment;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Key {
    Segment(u32),
    Map(ImageId),
    MapCopy(ImageId),
}

#[derive(Default)]
struct Inner {
    open: HashMap<Key, (Arc<dyn DiskFile>, u64)>,
    clock: u64,
}

/// Open segment and map files, least recently used closed first. Files that somebody holds (those
/// with unsynced writes, above all) stay open.
pub(crate) struct Files {
    disk: Arc<dyn Disk>,
    open_max: usize,
    inner: Mutex<Inner>,
}

/// The map file of an image.
pub(crate) fn map_name(image: ImageId) -> String {
    format!("map/{image}")
}

/// The second copies of pages of an image's map, each at the same place as in the map file.
pub(crate) fn map_copy_name(image: ImageId) -> String {
    format!("map/{image}.copy")
}

impl Files {
    pub(crate) fn new(disk: Arc<dyn Disk>, open_max: usize) -> Self {
        Self { disk, open_max: open_max.max(8), inner: Mutex::default() }
    }
    pub(crate) fn segment(&self, no: u32) -> Result<Arc<dyn DiskFile>, StoreError> {
        self.get(Key::Segment(no), || segment::file_name(no), false)
    }
    pub(crate) fn map(&self, image: ImageId) -> Result<Arc<dyn DiskFile>, StoreError> {
        self.get(Key::Map(image), || map_name(image), false)
    }
    /// Made when it is missing.
    pub(crate) fn map_copy(&self, image: ImageId) -> Result<Arc<dyn DiskFile>, StoreError> {
        self.get(Key::MapCopy(image), || map_copy_name(image), true)
    }
    /// A descriptor of its own for a repair. The system reports a failed sync once to each: through the one that the
    /// log or a checkpoint goes on with, that has to hear of it, too, since it may be what was lost.
    pub(crate) fn segment_apart(&self, no: u32) -> Result<Arc<dyn DiskFile>, StoreError> {
        let name = segment::file_name(no);
        self.disk.open(&name, false).during(|| format!("opening {name}"))
    }
    /// The same of a map.
    pub(crate) fn map_apart(&self, image: ImageId) -> Result<Arc<dyn DiskFile>, StoreError> {
        self.disk.open(&map_name(image), false).during(|| format!("opening the map of image {image}"))
    }
    pub(crate) fn forget_segment(&self, no: u32) {
        self.inner.lock().open.remove(&Key::Segment(no));
    }
    pub(crate) fn forget_map(&self, image: ImageId) {
        let mut inner = self.inner.lock();
        inner.open.remove(&Key::Map(image));
        inner.open.remove(&Key::MapCopy(image));
    }
    /// Takes over a file that was just created.
    pub(crate) fn adopt_segment(&self, no: u32, file: Arc<dyn DiskFile>) {
        self.insert(Key::Segment(no), file);
    }

    /// As [`Files::adopt_segment`].
    pub(crate) fn adopt_map(&self, image: ImageId, file: Arc<dyn DiskFile>) {
        self.insert(Key::Map(image), file);
    }

    fn get(
        &self,
        key: Key,
        name: impl Fn() -> String,
        create: bool,
    ) -> Result<Arc<dyn DiskFile>, StoreError> {
        {
            let mut inner = self.inner.lock();
            inner.clock += 1;
            let now = inner.clock;
            if let Some((file, used)) = inner.open.get_mut(&key) {
                *used = now;
                return Ok(Arc::clone(file));
            }
        }
        let file = self.disk.open(&name(), create).during(|| format!("opening {}", name()))?;
        self.insert(key, Arc::clone(&file));
        Ok(file)
    }
    fn insert(&self, key: Key, file: Arc<dyn DiskFile>) {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let now = inner.clock;
        if inner.open.len() >= self.open_max {
            let mut idle: Vec<_> = inner
                .open
                .iter()
                .filter(|(_, (f, _))| Arc::strong_count(f) == 1)
                .map(|(k, (_, t))| (*t, *k))
                .collect();
            idle.sort_unstable();
            for (_, k) in idle.into_iter().take(self.open_max / 8 + 1) {
                inner.open.remove(&k);
            }
        }
        inner.open.insert(key, (file, now));
    }
}
