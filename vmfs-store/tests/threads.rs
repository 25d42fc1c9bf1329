//! Everything at once: an appender, flushers, readers, a feeder, checkpoints.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{DATASTORE, HOST, IMAGE, Maker, STORE, append, block, small};
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, ImageId, Seq};
use vmfs_store::disk::FileDisk;
use vmfs_store::{ImageStore, Store, StoreConfig, StoreError};

const UPDATES: u64 = 6000;

/// Block i always holds (i, n) for an n that never falls: a reader can tell old from wrong.
fn read_once(image: &ImageStore, seen: &mut [u64]) {
    let view = image.view();
    let mut buf = vec![0u8; 64 * 4096];
    image.read(BlockIndex(0), &mut buf).unwrap();
    for (i, b) in buf.chunks_exact(4096).enumerate() {
        let v = u64::from_le_bytes(b[..8].try_into().unwrap());
        assert!(v == 0 || (v - i as u64 * 1_000_003).is_multiple_of(7919), "block {i}");
        assert!(v >= seen[i], "block {i} went back");
        seen[i] = v;
    }
    view.read(BlockIndex(0), &mut buf).unwrap();
    let digests = view.digests(BlockIndex(0), 64).unwrap();
    for (b, d) in buf.chunks_exact(4096).zip(digests) {
        assert_eq!(vmfs_common::hash::block_digest(b), d);
    }
}

fn feed_once(image: &ImageStore, next: &mut Seq) {
    match image.read_log(*next, 1 << 16) {
        Ok(entries) => {
            for e in entries {
                assert_eq!(e.update.header.seq, *next);
                *next = next.next();
            }
        }
        Err(StoreError::Trimmed { log_start }) => *next = log_start,
        Err(e) => panic!("{e} at {next}"),
    }
}

/// Compacts what is left.
fn settle(store: &Store, image: &ImageStore) {
    image.set_commit(image.head().seq);
    image.retain_from(image.head().seq);
    for _ in 0..200 {
        store.background(1 << 20).unwrap();
        store.compact(1 << 20).unwrap();
    }
    let space = image.space_use();
    println!("{space:?}");
    assert!(space.compacted_bytes > 0 && space.segment_bytes < 2 * space.live_bytes + (8 << 20), "{space:?}");
}

#[test]
fn readers_feeder_flushers_checkpoints_and_compaction_run_beside_appends() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let cfg = StoreConfig { retain_log_bytes_max: 1 << 20, segment_bytes_max: 1 << 20, ..small() };
    let store = Store::create(disk, DATASTORE, HOST, STORE, cfg.clone()).unwrap();
    let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
    let (mut maker, genesis) = Maker::genesis(IMAGE);
    append(&image, &genesis, &[]).unwrap();
    let done = AtomicBool::new(false);
    let flushed = AtomicU64::new(0);
    let stop = || done.load(Ordering::Acquire);
    std::thread::scope(|s| {
        s.spawn(|| {
            for n in 1..=UPDATES {
                let start = (n * 31) % 60;
                let data: Vec<u8> = (start..start + 3).flat_map(|i| block(i, n)).collect();
                let (u, payload) = maker.write(start, &data, Seq(flushed.load(Ordering::Acquire)));
                append(&image, &u, &payload).unwrap();
                if n % 8 == 0 {
                    // Written once: what makes segments sparse.
                    let (u, payload) =
                        maker.write(1000 + n, &block(1000 + n, n), Seq(flushed.load(Ordering::Acquire)));
                    append(&image, &u, &payload).unwrap();
                }
            }
            done.store(true, Ordering::Release);
        });
        for _ in 0..2 {
            s.spawn(|| {
                while !stop() {
                    let before = image.head();
                    let head = image.sync().unwrap();
                    assert!(head.seq >= before.seq);
                    flushed.fetch_max(head.seq.0, Ordering::AcqRel);
                }
            });
        }
        s.spawn(|| {
            while !stop() {
                image.set_commit(Seq(flushed.load(Ordering::Acquire)));
                image.retain_from(Seq(flushed.load(Ordering::Acquire)));
                store.background(1 << 20).unwrap();
                store.compact(1 << 20).unwrap();
                store.put_meta(IMAGE, b"x").unwrap();
            }
        });
        for _ in 0..2 {
            s.spawn(|| {
                let mut seen = vec![0u64; 64];
                while !stop() {
                    read_once(&image, &mut seen);
                }
            });
        }
        s.spawn(|| {
            let mut next = Seq(1);
            while !stop() {
                feed_once(&image, &mut next);
            }
        });
    });
    image.sync().unwrap();
    settle(&store, &image);
    let report = image.verify(&mut |_, _| {}).unwrap();
    assert!(report.bad_blocks.is_empty() && report.bad_updates.is_empty());
    let head = image.head();
    drop((image, store));
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let store = Store::open(disk, DATASTORE, HOST, cfg).unwrap();
    let image = store.image(IMAGE).unwrap();
    assert_eq!(image.head(), head);
    let mut buf = vec![0u8; 4096];
    for n in (8..=UPDATES).step_by(8) {
        image.read(BlockIndex(1000 + n), &mut buf).unwrap();
        assert!(buf == block(1000 + n, n), "block {}", 1000 + n);
    }
}

#[test]
fn promises_of_many_images_share_syncs() {
    let disk = vmfs_store::simdisk::SimDisk::new(1 << 26);
    let store = common::create(&disk, small()).unwrap();
    std::thread::scope(|s| {
        for n in 0..8u8 {
            let store = &store;
            s.spawn(move || {
                for i in 0..50u64 {
                    let key = ImageId::from_bytes([n; 16]);
                    store.put_meta(key, &i.to_le_bytes()).unwrap();
                    assert_eq!(**store.get_meta(key).unwrap(), i.to_le_bytes());
                }
            });
        }
    });
    let store = common::open(&disk.power_cut(1), small()).unwrap();
    for n in 0..8u8 {
        assert_eq!(**store.get_meta(ImageId::from_bytes([n; 16])).unwrap(), 49u64.to_le_bytes());
    }
}

#[test]
fn a_read_that_does_not_wait_says_so_and_begins_to_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let store = Store::create(disk, DATASTORE, HOST, STORE, small()).unwrap();
    let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
    let (mut maker, genesis) = Maker::genesis(IMAGE);
    append(&image, &genesis, &[]).unwrap();
    // Blocks from two places in the log, and a hole between them.
    for start in [0, 3] {
        let data = [block(start, 1), block(start + 1, 2)].concat();
        let (u, payload) = maker.write(start, &data, Seq::ZERO);
        append(&image, &u, &payload).unwrap();
    }
    image.sync().unwrap();
    let want = [block(0, 1), block(1, 2), vec![0; 4096], block(3, 1), block(4, 2)].concat();
    for file in std::fs::read_dir(dir.path().join("seg")).unwrap() {
        let file = std::fs::File::open(file.unwrap().path()).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    let mut got = vec![1; want.len()];
    // False at first, unless the file system is in memory altogether.
    if !image.read_soon(BlockIndex(0), &mut got).unwrap() {
        image.read(BlockIndex(0), &mut got).unwrap();
        assert!(got == want);
        got.fill(1);
        assert!(image.read_soon(BlockIndex(0), &mut got).unwrap(), "it has just been read");
    }
    assert!(got == want);
}
