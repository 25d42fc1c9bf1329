//! What the digests of blocks cost: `cargo run --release -p vmfs-common --example hash_bench`.

use std::hint::black_box;
use std::time::Instant;

use vmfs_common::BLOCK_BYTES;
use vmfs_common::hash::{block_digest, block_digests};

const BLOCKS: usize = 256;
const ROUNDS: usize = 400;

fn gib_s(name: &str, work: impl Fn()) {
    let best = (0..ROUNDS).map(|_| {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    });
    let best = best.fold(f64::MAX, f64::min);
    println!("{name}: {:.2} GiB/s", (BLOCKS * BLOCK_BYTES) as f64 / best / f64::from(1 << 30));
}

fn main() {
    let data: Vec<u8> = (0..BLOCKS * BLOCK_BYTES).map(|i| (i * 31 + i / 4096).to_le_bytes()[0] | 1).collect();
    gib_s("one block at a time", || {
        data.chunks_exact(BLOCK_BYTES).for_each(|b| _ = black_box(block_digest(b)))
    });
    gib_s("all blocks of a write", || _ = black_box(block_digests(&data)));
}
