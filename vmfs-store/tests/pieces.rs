//! Background work gives the disk little at a time: a flush waits for all that the disk was given before it.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex};

use common::{DATASTORE, HOST, IMAGE, Maker, STORE, append, block};
use vmfs_common::ImageId;
use vmfs_common::policy::MemberRole;
use vmfs_store::disk::{Disk, DiskFile};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Store, StoreConfig};

/// What the disk was given at once, in bytes.
#[derive(Default)]
struct Most {
    unsynced: HashMap<String, u64>,
    written: u64,
    read: u64,
    freed: u64,
    removed: usize,
    /// Pages of each file that were written once.
    pages: HashMap<String, HashSet<u64>>,
    /// Syncs of segments of which some page never was.
    unwritten_syncs: usize,
}

/// A disk that is watched.
#[derive(Clone)]
struct Watched(SimDisk, Arc<Mutex<Most>>);

struct WatchedFile(Arc<dyn DiskFile>, String, Arc<Mutex<Most>>);

impl Watched {
    fn most<T>(&self, f: impl FnOnce(&mut Most) -> T) -> T {
        f(&mut self.1.lock().unwrap())
    }
}

impl Disk for Watched {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(WatchedFile(self.0.open(name, create)?, name.into(), self.1.clone())))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        if name.starts_with("seg/") {
            let len = self.0.open(name, false)?.len_bytes()?;
            self.most(|m| {
                m.freed = m.freed.max(len);
                m.removed += 1;
            });
        }
        self.most(|m| m.pages.remove(name));
        self.0.remove(name)
    }
    fn sync_names(&self, dir: &str) -> io::Result<()> {
        self.0.sync_names(dir)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }
}

impl DiskFile for WatchedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut most = self.2.lock().unwrap();
        most.read = most.read.max(buf.len() as u64);
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut most = self.2.lock().unwrap();
        let unsynced = most.unsynced.entry(self.1.clone()).or_default();
        *unsynced += buf.len() as u64;
        let unsynced = *unsynced;
        most.written = most.written.max(unsynced);
        let pages = offset / 4096..(offset + buf.len() as u64).div_ceil(4096);
        most.pages.entry(self.1.clone()).or_default().extend(pages);
        self.0.write_at(buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        let len = self.0.len_bytes()?;
        let mut most = self.2.lock().unwrap();
        most.unsynced.remove(&self.1);
        let written = most.pages.get(&self.1).map_or(0, HashSet::len) as u64;
        most.unwritten_syncs += usize::from(self.1.starts_with("seg/") && written < len / 4096);
        drop(most);
        self.0.sync()
    }
    fn forget(&self, pages: std::ops::Range<u64>) -> io::Result<()> {
        self.0.forget(pages)
    }
    fn len_bytes(&self) -> io::Result<u64> {
        self.0.len_bytes()
    }
    fn allocate(&self, len_bytes: u64) -> io::Result<()> {
        self.0.allocate(len_bytes)
    }
    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        let mut most = self.2.lock().unwrap();
        most.freed = most.freed.max(self.0.len_bytes()?.saturating_sub(len_bytes));
        self.0.set_len(len_bytes)
    }
}

/// Blocks of the part of the image that is overwritten. Beside it, one block in each of many map pages.
const BLOCKS: u64 = 4096;
const SCATTERED: u64 = 300;

fn config() -> StoreConfig {
    StoreConfig {
        segment_bytes_max: 8 << 20,
        checkpoint_log_bytes: 32 << 20,
        retain_log_bytes_max: 0,
        pool_segments: 1,
        idle_bytes_max: 0,
        recovery_threads: 1,
        ..StoreConfig::default()
    }
}

struct Host {
    disk: Watched,
    store: Arc<Store>,
    image: Arc<ImageStore>,
    maker: Maker,
    last: HashMap<u64, u64>,
    random: u64,
}

impl Host {
    fn new() -> Self {
        Self::with(config())
    }
    fn with(cfg: StoreConfig) -> Self {
        let disk = Watched(SimDisk::new(4 << 30), Arc::default());
        let store = Store::create(Arc::new(disk.clone()), DATASTORE, HOST, STORE, cfg).unwrap();
        let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
        let (maker, genesis) = Maker::genesis(IMAGE);
        append(&image, &genesis, &[]).unwrap();
        Self { disk, store, image, maker, last: HashMap::new(), random: 1 }
    }
    fn write(&mut self, start: u64, count: u64, fill: u64) {
        let data: Vec<u8> = (start..start + count).flat_map(|i| block(i, fill)).collect();
        self.last.extend((start..start + count).map(|i| (i, fill)));
        let (update, payload) = self.maker.write(start, &data, self.image.head().seq);
        append(&self.image, &update, &payload).unwrap();
    }
    fn flush(&self) {
        self.image.set_commit(self.image.sync().unwrap().seq);
        self.image.retain_from(self.image.head().seq.next());
    }
    fn overwrite(&mut self, bytes: u64) {
        for fill in 0..bytes / (64 * 4096) {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            self.write((self.random >> 33) % (BLOCKS / 64) * 64, 48, 2 + fill);
        }
        self.flush();
    }
    /// All the background work that there is, while somebody flushes. Says how many segments it deleted.
    fn look_after(&mut self) -> usize {
        let before = self.disk.most(|m| m.removed);
        for fill in 0..40 {
            self.write(0, 1, 2 + fill);
            self.flush();
            self.store.background(8 << 20).unwrap();
            self.write(1, 1, 2 + fill);
            self.flush();
            self.store.compact(8 << 20).unwrap();
        }
        self.disk.most(|m| m.removed) - before
    }
    fn check(&self, image: &ImageStore) {
        let mut data = vec![0; 4096];
        for (i, fill) in &self.last {
            image.read(vmfs_common::BlockIndex(*i), &mut data).unwrap();
            assert_eq!(data, block(*i, *fill), "block {i}");
        }
    }
}

#[test]
fn background_work_gives_the_disk_little_at_a_time() {
    let mut host = Host::new();
    (0..BLOCKS / 64).for_each(|i| host.write(i * 64, 64, 1));
    (0..SCATTERED).for_each(|i| host.write(100_000 + i * 512, 1, 1));
    host.flush();
    let mut removed = 0;
    for _ in 0..4 {
        host.overwrite(64 << 20);
        host.disk.most(|m| (m.written, m.read, m.freed) = (0, 0, 0));
        removed += host.look_after();
        let (written, read, freed) = host.disk.most(|m| (m.written, m.read, m.freed));
        assert!((128 << 10..=512 << 10).contains(&written), "{written} bytes written before a sync");
        assert!(read <= 256 << 10, "{read} bytes read at once");
        assert!(freed <= 1 << 20, "{freed} bytes freed at once");
    }
    assert!(host.image.space_use().compacted_bytes > 0, "nothing was compacted");
    assert!(removed > 0, "nothing was deleted");
    host.check(&host.image);
}

#[test]
fn segments_that_nobody_uses_wait_for_the_next_burst_and_are_deleted_at_rest() {
    let mut host = Host::with(StoreConfig { idle_bytes_max: 256 << 20, ..config() });
    (0..BLOCKS / 64).for_each(|i| host.write(i * 64, 64, 1));
    let segments = |host: &Host| host.disk.list("seg").unwrap().len();
    let mut most = 0;
    for round in 0..6 {
        host.overwrite(64 << 20);
        assert_eq!(host.look_after(), 0, "nothing is deleted that the next burst can use");
        assert!(round < 4 || segments(&host) <= most, "they are used again");
        most = most.max(segments(&host));
    }
    // A tiny image that is flushed all the time takes none of these.
    let id = ImageId::from_bytes([9; 16]);
    let tiny = host.store.create_image(id, MemberRole::Replica).unwrap();
    let (mut maker, genesis) = Maker::genesis(id);
    append(&tiny, &genesis, &[]).unwrap();
    for round in 0..700 {
        for fill in (0..2).filter(|_| round % 100 == 0) {
            let (update, payload) = maker.write(0, &block(0, fill), tiny.head().seq);
            append(&tiny, &update, &payload).unwrap();
            tiny.sync().unwrap();
        }
        host.store.background(8 << 20).unwrap();
    }
    assert!(segments(&host) + 8 <= most, "{} of {most} are left", segments(&host));
    host.check(&host.image);
}

#[test]
fn a_flushed_log_does_not_stay_in_a_segment_that_was_not_written_before() {
    let mut host = Host::new();
    // A burst, which leaves the log in a new segment of the largest class.
    (0..BLOCKS / 64).for_each(|i| host.write(i * 64, 64, 1));
    host.overwrite(36 << 20);
    host.look_after();
    host.disk.most(|m| m.unwritten_syncs = 0);
    for fill in 0..40 {
        host.write(0, 1, 100 + fill);
        host.flush();
    }
    assert_eq!(host.disk.most(|m| m.unwritten_syncs), 0);
    host.check(&host.image);
}

#[test]
fn a_power_cut_while_segments_are_deleted_loses_nothing() {
    for cut in 0..3 {
        let mut host = Host::new();
        (0..BLOCKS / 64).for_each(|i| host.write(i * 64, 64, 1));
        host.overwrite(128 << 20);
        host.store.background(0).unwrap();
        host.overwrite(16 << 20);
        // Somewhere in the second checkpoint, and in the deletions after it.
        let calls = host.disk.0.calls();
        host.disk.0.stop_at_call(Some(calls + 20 + 50 * cut));
        for _ in 0..3 {
            let _ = host.store.background(8 << 20);
        }
        let disk = host.disk.0.power_cut(cut);
        let store = Store::open(Arc::new(disk), DATASTORE, HOST, config()).unwrap();
        let image = store.image(IMAGE).unwrap();
        host.check(&image);
        // What was half deleted is used again as if it had never been written.
        host.image = image;
        host.store = store;
        host.overwrite(32 << 20);
        host.look_after();
        host.check(&host.image);
    }
}
