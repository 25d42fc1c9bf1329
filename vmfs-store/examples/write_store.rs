//! Writes the store that the test `formats` keeps of every released format version. A release that
//! changes the format runs this once, before the change is merged, and commits what it wrote:
//! `cargo run -p vmfs-store --example write_store -- vmfs-store/tests/formats/vN`.
//!
//! Small, deterministic, and with every structure: checkpoints, a roll-back and its fork, imported
//! blocks, a witness's headers, metadata, several segments, and a tail after the last checkpoint.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::sync::Arc;

use common::old::{COPIED, DATA, Expected, FORKED, HEADERS, META};
use common::{DATASTORE, HOST, Maker, STORE, append, block};
use vmfs_common::hash::block_digest;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Digest, ImageId, Seq};
use vmfs_store::disk::FileDisk;
use vmfs_store::{ImageStore, Store, StoreConfig};

const BLOCKS: u64 = 24;

struct Made {
    image: Arc<ImageStore>,
    maker: Maker,
    fills: Vec<u64>,
}

impl Made {
    fn new(store: &Store, id: ImageId, kind: MemberRole) -> Self {
        let image = store.create_image(id, kind).unwrap();
        let (maker, genesis) = Maker::genesis(id);
        append(&image, &genesis, &[]).unwrap();
        Self { image, maker, fills: vec![0; BLOCKS as usize] }
    }
    fn write(&mut self, start: u64, fills: &[u64]) {
        let data: Vec<u8> = fills.iter().zip(start..).flat_map(|(f, i)| block(i, *f)).collect();
        let (update, payload) = self.maker.write(start, &data, Seq::ZERO);
        append(&self.image, &update, &payload).unwrap();
        if self.image.kind() == MemberRole::Replica {
            self.fills[start as usize..][..fills.len()].copy_from_slice(fills);
        }
    }
    fn zero(&mut self, start: u64, count: u64) {
        let update = self.maker.zero(start, count, Seq::ZERO);
        append(&self.image, &update, &[]).unwrap();
        self.fills[start as usize..][..count as usize].fill(0);
    }
    fn expected(&self) -> Expected {
        let head = self.image.sync().unwrap();
        Expected {
            image: self.image.id(),
            kind: self.image.kind(),
            seq: head.seq.0,
            digest: head.digest,
            log_start: self.image.log_start().0,
            forks: self.image.forks().len(),
            fills: self.fills.clone(),
        }
    }
}

/// Writes, zeros, a resize, two checkpoints, and updates after the last one.
fn data(store: &Store) -> Expected {
    let mut m = Made::new(store, DATA, MemberRole::Replica);
    for i in 0..20 {
        m.write(i % BLOCKS, &[i + 1, 0, i + 3]);
    }
    m.image.checkpoint().unwrap();
    m.zero(3, 5);
    let update = m.maker.resize(20, Seq::ZERO);
    append(&m.image, &update, &[]).unwrap();
    m.fills[20..].fill(0);
    m.write(10, &[500, 501]);
    m.image.checkpoint().unwrap();
    m.write(5, &[77]);
    m.expected()
}

/// A tail that was rolled back and kept, and a new epoch after it.
fn forked(store: &Store) -> Expected {
    let mut m = Made::new(store, FORKED, MemberRole::Replica);
    m.write(0, &[1, 2, 3]);
    let to = m.image.sync().unwrap();
    let before = m.fills.clone();
    m.write(1, &[9, 9]);
    m.image.roll_back(to, true).unwrap();
    m.fills = before;
    let tip = m.image.state().tip;
    let start = m.maker.next_epoch(2, &tip);
    append(&m.image, &start, &[]).unwrap();
    m.write(2, &[33]);
    m.expected()
}

/// Blocks that came by a block-level sync.
fn copied(store: &Store) -> Expected {
    let mut m = Made::new(store, COPIED, MemberRole::Replica);
    m.write(0, &[4, 5]);
    m.image.sync().unwrap();
    let import = m.image.begin_import(true).unwrap();
    let new: Vec<u8> = (1..4).flat_map(|i| block(i, 60 + i)).collect();
    let digests: Vec<Digest> = new.chunks_exact(4096).map(block_digest).collect();
    import.write(BlockIndex(1), &digests, &new).unwrap();
    m.fills[1..4].copy_from_slice(&[61, 62, 63]);
    let mut state = (*m.image.state()).clone();
    let base = m.maker.next_epoch(3, &state.tip);
    state.apply(&base);
    import.finish(&base, state, false).unwrap();
    m.write(7, &[8]);
    m.expected()
}

fn headers(store: &Store) -> Expected {
    let mut m = Made::new(store, HEADERS, MemberRole::Witness);
    for i in 0..30 {
        m.write(i % 20, &[i + 1]);
    }
    m.fills.clear();
    m.expected()
}

fn main() {
    let dir = std::env::args().nth(1).expect("usage: write_store DIR");
    let dir = Path::new(&dir);
    let disk = Arc::new(FileDisk::open(&dir.join("store")).unwrap());
    let cfg = StoreConfig {
        segment_bytes_max: 128 << 10,
        reserve_bytes: 4096,
        pool_segments: 1,
        recovery_threads: 1,
        ..StoreConfig::default()
    };
    let store = Store::create(disk, DATASTORE, HOST, STORE, cfg).unwrap();
    store.put_meta(DATA, META).unwrap();
    let all = [data(&store), forked(&store), copied(&store), headers(&store)];
    drop(store);
    let lines: String = all.iter().map(Expected::line).collect();
    std::fs::write(dir.join("expected"), lines).unwrap();
}
