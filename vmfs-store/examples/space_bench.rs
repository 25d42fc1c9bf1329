//! What random overwrites leave on the disk, with and without compaction, and what compaction costs the
//! flushes beside it: `cargo run --release -p vmfs-store --example space_bench [DIR [IMAGE_MIB [TIMES]]]`.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_precision_loss)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{DATASTORE, HOST, IMAGE, Maker, STORE, append, block};
use vmfs_common::policy::MemberRole;
use vmfs_store::disk::FileDisk;
use vmfs_store::{ImageStore, Store, StoreConfig};

/// As the daemon is configured by default.
const RATE_BYTES_PER_S: u64 = 64 << 20;
const SEGMENT_BYTES: u64 = 16 << 20;
/// Writes between two flushes.
const FLUSH_EVERY: u64 = 64;

/// The daemon's background work, every tenth of a second, until `done`.
fn maintain(store: &Store, image: &ImageStore, rate: u64, done: &AtomicBool, most: &AtomicU64) {
    let mut balance = 0i64;
    while !done.load(Ordering::Acquire) {
        let t = Instant::now();
        store.background(8 << 20).unwrap();
        if balance > 0 {
            balance -= store.compact(balance as u64).unwrap() as i64;
        }
        most.fetch_max(image.space_use().segment_bytes, Ordering::AcqRel);
        std::thread::sleep(Duration::from_millis(100).saturating_sub(t.elapsed()));
        balance = (balance + (rate / 1000 * t.elapsed().as_millis() as u64) as i64).min(rate as i64 / 8);
    }
}

/// Fills the image in order, then overwrites single blocks. Returns how long each flush took.
fn work(image: &ImageStore, blocks: u64, times: u64) -> Vec<Duration> {
    let (mut maker, genesis) = Maker::genesis(IMAGE);
    append(image, &genesis, &[]).unwrap();
    let mut data = block(1, 1);
    let mut flushes = Vec::new();
    let mut seed = 12345u64;
    for n in 0..blocks * (1 + times) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = if n < blocks { n } else { (seed >> 33) % blocks };
        data[..8].copy_from_slice(&(n + 1).to_le_bytes());
        let (u, payload) = maker.write(at, &data, image.durable_head().seq);
        append(image, &u, &payload).unwrap();
        if n % FLUSH_EVERY == 0 {
            let t = Instant::now();
            let head = image.sync().unwrap();
            if n >= blocks {
                flushes.push(t.elapsed());
            }
            image.set_commit(head.seq);
            image.retain_from(head.seq.next());
        }
    }
    image.set_commit(image.sync().unwrap().seq);
    flushes
}

fn run(dir: &Path, blocks: u64, times: u64, rate: u64) {
    let _ = std::fs::remove_dir_all(dir);
    let disk = Arc::new(FileDisk::open(dir).unwrap());
    let cfg = StoreConfig { segment_bytes_max: SEGMENT_BYTES, ..StoreConfig::default() };
    let store = Store::create(disk, DATASTORE, HOST, STORE, cfg).unwrap();
    let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let began = Instant::now();
    let mut flushes = std::thread::scope(|s| {
        s.spawn(|| maintain(&store, &image, rate, &done, &most));
        let flushes = work(&image, blocks, times);
        done.store(true, Ordering::Release);
        flushes
    });
    let took = began.elapsed().as_secs_f64();
    flushes.sort_unstable();
    let us = |part: usize| flushes[flushes.len() * part / 1000].as_micros();
    let space = image.space_use();
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "compaction at {:2} MiB/s: at most {:5} MiB of segments ({:.1} x the image), {:5} MiB moved; {:5.0} MiB/s; \
         flush of {FLUSH_EVERY} writes p50 {} p99 {} p99.9 {} µs",
        mib(rate),
        mib(most.load(Ordering::Acquire)),
        most.load(Ordering::Acquire) as f64 / space.live_bytes as f64,
        mib(space.compacted_bytes),
        (blocks * (1 + times) * 4096) as f64 / took / f64::from(1 << 20),
        us(500),
        us(990),
        us(999),
    );
    drop((image, store));
    std::fs::remove_dir_all(dir).unwrap();
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().map_or_else(|| std::env::temp_dir().join("vmfs-space-bench"), PathBuf::from);
    let mut number = |default: u64| args.next().map_or(default, |n| n.parse().unwrap());
    let (image_mib, times) = (number(1024), number(6));
    println!("{image_mib} MiB, written in order and then {times} times at random, 4 KiB at a time");
    for rate in [0, RATE_BYTES_PER_S] {
        run(&dir, (image_mib << 20) / 4096, times, rate);
    }
}
