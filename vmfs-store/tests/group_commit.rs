//! What is appended while a flush is under way: the flush does not answer for it.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{DATASTORE, HOST, IMAGE, Maker, STORE, append, block, small};
use vmfs_common::policy::MemberRole;
use vmfs_common::{Head, Seq};
use vmfs_store::disk::{Disk, DiskFile};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Store};

type Hook = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Does something once, after the next sync of a file is done and before it is reported.
struct SlowSync {
    disk: SimDisk,
    hook: Hook,
}

struct SlowFile {
    file: Arc<dyn DiskFile>,
    hook: Hook,
}

impl Disk for SlowSync {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let (file, hook) = (self.disk.open(name, create)?, Arc::clone(&self.hook));
        Ok(Arc::new(SlowFile { file, hook }))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }
    fn sync_names(&self, dir: &str) -> io::Result<()> {
        self.disk.sync_names(dir)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }
}

impl DiskFile for SlowFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        let synced = self.file.sync();
        let hook = self.hook.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        synced
    }
    fn forget(&self, pages: std::ops::Range<u64>) -> io::Result<()> {
        self.file.forget(pages)
    }
    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }
    fn allocate(&self, len_bytes: u64) -> io::Result<()> {
        self.file.allocate(len_bytes)
    }
    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.file.set_len(len_bytes)
    }
}

struct Slow {
    disk: SimDisk,
    hook: Hook,
    image: Arc<ImageStore>,
    maker: Mutex<Maker>,
    _store: Arc<Store>,
}

impl Slow {
    fn new() -> Arc<Self> {
        let (disk, hook) = (SimDisk::new(1 << 26), Hook::default());
        let slow = Arc::new(SlowSync { disk: disk.clone(), hook: Arc::clone(&hook) });
        let store = Store::create(slow, DATASTORE, HOST, STORE, small()).unwrap();
        let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
        let (maker, genesis) = Maker::genesis(IMAGE);
        append(&image, &genesis, &[]).unwrap();
        let this = Arc::new(Self { disk, hook, image, maker: Mutex::new(maker), _store: store });
        this.write(1);
        this
    }
    fn write(&self, n: u64) {
        let (u, payload) = self.maker.lock().unwrap().write(n, &block(n, n), Seq::ZERO);
        append(&self.image, &u, &payload).unwrap();
    }
    /// Whatever a power cut leaves, `acknowledged` is in it.
    fn assert_survives(&self, acknowledged: Head) {
        for seed in 0..64 {
            let store = common::open(&self.disk.power_cut(seed), small()).unwrap();
            let head = store.image(IMAGE).unwrap().head();
            assert!(head.rank() >= acknowledged.rank(), "seed {seed}: {head:?} after {acknowledged:?}");
        }
    }
}

#[test]
fn what_is_appended_during_a_sync_is_not_acknowledged_by_it() {
    let slow = Slow::new();
    let writer = Arc::clone(&slow);
    *slow.hook.lock().unwrap() = Some(Box::new(move || writer.write(2)));
    let acknowledged = slow.image.sync().unwrap();
    assert_eq!(slow.image.head().seq, Seq(3), "the hook has run");
    assert_eq!(slow.image.durable_head(), acknowledged);
    slow.assert_survives(acknowledged);
    let acknowledged = slow.image.sync().unwrap();
    assert_eq!(acknowledged.seq, Seq(3));
    slow.assert_survives(acknowledged);
}

#[test]
fn a_flush_that_meets_a_sync_under_way_waits_for_one_that_covers_it() {
    let slow = Slow::new();
    let is_under_way = Arc::new(AtomicBool::new(false));
    let has_joined = Arc::new(AtomicBool::new(false));
    let (begun, joined) = (Arc::clone(&is_under_way), Arc::clone(&has_joined));
    *slow.hook.lock().unwrap() = Some(Box::new(move || {
        begun.store(true, Ordering::Release);
        while !joined.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        // Time for the other one to come from its call to its wait; without it less is tested.
        std::thread::sleep(Duration::from_millis(50));
    }));
    std::thread::scope(|s| {
        s.spawn(|| slow.image.sync().unwrap());
        while !is_under_way.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        slow.write(2);
        has_joined.store(true, Ordering::Release);
        let acknowledged = slow.image.sync().unwrap();
        assert_eq!(acknowledged.seq, Seq(3));
        slow.assert_survives(acknowledged);
    });
}
