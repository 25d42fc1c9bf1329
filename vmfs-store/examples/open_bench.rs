//! How long a store takes to open after a kill, and the memory it then takes:
//! `cargo run --release -p vmfs-store --example open_bench [DIR] [IMAGES] [BLOCKS]`.
//! Each image is 100 GiB with BLOCKS blocks scattered over it, a quarter of them after its checkpoint.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use common::{DATASTORE, HOST, Maker, STORE, append, block};
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, ImageId, Seq};
use vmfs_store::disk::FileDisk;
use vmfs_store::{Store, StoreConfig};

const IMAGE_BLOCKS: u64 = (100 << 30) / 4096;

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

fn id(n: u64) -> ImageId {
    ImageId::from_bytes([n.to_le_bytes(), [1; 8]].concat().try_into().unwrap())
}

fn main() {
    let arg = |n: usize| std::env::args().nth(n);
    let dir = arg(1).map_or_else(|| std::env::temp_dir().join("vmfs-open-bench"), PathBuf::from);
    let images: u64 = arg(2).map_or(100, |a| a.parse().unwrap());
    let blocks: u64 = arg(3).map_or(2000, |a| a.parse().unwrap());
    if arg(4).is_none() {
        let _ = std::fs::remove_dir_all(&dir);
        let disk = Arc::new(FileDisk::open(&dir).unwrap());
        let store = Store::create(disk, DATASTORE, HOST, STORE, StoreConfig::default()).unwrap();
        for n in 0..images {
            let image = store.create_image(id(n), MemberRole::Replica).unwrap();
            let (mut maker, genesis) = Maker::genesis(id(n));
            append(&image, &genesis, &[]).unwrap();
            for i in 0..blocks {
                let at = i * (IMAGE_BLOCKS / blocks);
                let (u, payload) = maker.write(at, &block(at, 1), Seq::ZERO);
                append(&image, &u, &payload).unwrap();
                if i == blocks * 3 / 4 {
                    image.checkpoint().unwrap();
                }
            }
            image.sync().unwrap();
        }
        // A fresh process opens it: nothing of the building is left in memory.
        drop(store);
        let me = std::env::current_exe().unwrap();
        let args = [dir.display().to_string(), images.to_string(), blocks.to_string(), "open".into()];
        std::process::Command::new(me).args(args).status().unwrap();
        if arg(1).is_none() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        return;
    }
    let t = Instant::now();
    let disk = Arc::new(FileDisk::open(&dir).unwrap());
    let store = Store::open(disk, DATASTORE, HOST, StoreConfig::default()).unwrap();
    println!(
        "{images} images of {blocks} blocks: opened in {:?}, {} MiB resident",
        t.elapsed(),
        resident_mib()
    );
    let mut buf = vec![0u8; 4096];
    for n in 0..images {
        let image = store.image(id(n)).unwrap();
        for i in 0..blocks {
            image.read(BlockIndex(i * (IMAGE_BLOCKS / blocks)), &mut buf).unwrap();
        }
    }
    println!("every block read: {} MiB resident", resident_mib());
    let t = Instant::now();
    for n in 0..images {
        store.image(id(n)).unwrap().checkpoint().unwrap();
    }
    println!("checkpoints in {:?}, {} MiB resident", t.elapsed(), resident_mib());
}
