//! What an append and a flush cost, beside a plain file on the same disk:
//! `cargo run --release -p vmfs-store --example append_bench [DIR]`.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{DATASTORE, HOST, IMAGE, Maker, STORE, append};
use vmfs_common::header::Update;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Seq};
use vmfs_store::disk::FileDisk;
use vmfs_store::{ImageStore, Store, StoreConfig};

const ROUNDS: u64 = 3000;
const BLOCKS: u64 = 1 << 18;

fn report(what: &str, each: &mut [Duration]) {
    each.sort_unstable();
    let mean = each.iter().sum::<Duration>() / u32::try_from(each.len()).unwrap();
    let us = |d: Duration| d.as_secs_f64() * 1e6;
    println!(
        "{what:<44} mean {:8.1} µs   median {:8.1} µs   p99 {:8.1} µs",
        us(mean),
        us(each[each.len() / 2]),
        us(each[each.len() * 99 / 100])
    );
}

fn time(n: u64, mut f: impl FnMut(u64)) -> Vec<Duration> {
    (0..n)
        .map(|i| {
            let t = Instant::now();
            f(i);
            t.elapsed()
        })
        .collect()
}

fn updates(maker: &mut Maker, n: u64, blocks: u64) -> Vec<(Update, Vec<u8>)> {
    let mut seed = 12345u64;
    (0..n)
        .map(|i| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let data: Vec<u8> = (0..blocks).flat_map(|b| common::block(b, 1 + i)).collect();
            maker.write((seed >> 33) % (BLOCKS / blocks) * blocks, &data, Seq(i))
        })
        .collect()
}

fn plain(dir: &std::path::Path, preallocated: bool) {
    let path = dir.join("plain");
    let file = std::fs::File::create(&path).unwrap();
    let data = common::block(1, 1);
    if preallocated {
        for i in 0..ROUNDS {
            file.write_all_at(&data, i * 4096).unwrap();
        }
        file.sync_all().unwrap();
    }
    let mut each = time(ROUNDS, |i| {
        file.write_all_at(&data, i * 4096).unwrap();
        file.sync_data().unwrap();
    });
    report(
        if preallocated {
            "plain file, written before: write + sync"
        } else {
            "plain file, growing: write + sync"
        },
        &mut each,
    );
    std::fs::remove_file(path).unwrap();
}

fn run(image: &ImageStore, what: &str, work: &[(Update, Vec<u8>)], sync: bool) {
    let mut each = time(work.len() as u64, |i| {
        let (u, p) = &work[i as usize];
        append(image, u, p).unwrap();
        if sync {
            image.sync().unwrap();
        }
    });
    report(what, &mut each);
    image.sync().unwrap();
}

fn main() {
    let dir =
        std::env::args().nth(1).map_or_else(|| std::env::temp_dir().join("vmfs-append-bench"), PathBuf::from);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    plain(&dir, false);
    plain(&dir, true);
    let disk = Arc::new(FileDisk::open(&dir.join("store")).unwrap());
    let store = Store::create(disk, DATASTORE, HOST, STORE, StoreConfig::default()).unwrap();
    let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
    let (mut maker, genesis) = Maker::genesis(IMAGE);
    append(&image, &genesis, &[]).unwrap();
    // Grows the log until large, prewritten segments are in use.
    for (u, p) in updates(&mut maker, 300, 512) {
        append(&image, &u, &p).unwrap();
    }
    image.sync().unwrap();
    for _ in 0..40 {
        store.background(64 << 20).unwrap();
    }
    // The segment begun before the pool was filled is not prewritten: leave it.
    for (u, p) in updates(&mut maker, 40, 512) {
        append(&image, &u, &p).unwrap();
    }
    image.sync().unwrap();
    run(&image, "store: 4 KiB append", &updates(&mut maker, ROUNDS, 1), false);
    run(&image, "store: 4 KiB append + sync", &updates(&mut maker, ROUNDS, 1), true);
    run(&image, "store: 1 MiB append", &updates(&mut maker, 100, 256), false);
    let mut buf = vec![0u8; 4096];
    let mut each = time(ROUNDS, |i| image.read(BlockIndex((i * 7919) % BLOCKS), &mut buf).unwrap());
    report("store: 4 KiB random read", &mut each);
    let t = Instant::now();
    image.checkpoint().unwrap();
    println!("checkpoint: {:?}", t.elapsed());
    let mut each = time(ROUNDS, |i| image.read(BlockIndex((i * 7919) % BLOCKS), &mut buf).unwrap());
    report("store: 4 KiB random read, checkpointed", &mut each);
    drop((image, store));
    std::fs::remove_dir_all(&dir).unwrap();
}
