//! What the segments of an image take stays in proportion to the image.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, seed, until_true};
use rand::Rng;

const MIB: u64 = 1 << 20;
const IMAGE_MIB: u64 = 192;
const BLOCKS: u64 = IMAGE_MIB * MIB / 4096;
/// How often each block is overwritten, on average.
const PASSES: u64 = 4;
/// What does not grow with the image: the log of two checkpoints (64 MiB each), segments that were emptied
/// until two more are made, and the segments being written.
const CONSTANT_MIB: u64 = 320;

/// Log that is kept for members that lag.
const LOG_RETAIN_MIB: u64 = 256;

/// A block's content: `n` is the number of the write that made it, from 1 on.
fn content(noise: &[u8], block: u64, n: u64) -> Vec<u8> {
    let mut data = noise.to_vec();
    data[..8].copy_from_slice(&block.to_le_bytes());
    data[8..16].copy_from_slice(&n.to_le_bytes());
    data
}

fn segments_mib(cluster: &Cluster, host: &str) -> u64 {
    cluster.image(host, "random").map_or(0, |i| i.segment_bytes / MIB)
}

/// What the directory of segments takes, unused ones too.
fn disk_mib(cluster: &Cluster, host: &str) -> u64 {
    let dir = std::fs::read_dir(cluster.store(host).join("seg")).unwrap();
    dir.filter_map(|e| Some(bytes::allocated_bytes(&e.ok()?.path()))).sum::<u64>() / MIB
}

#[test]
fn random_overwrites_leave_segments_of_about_twice_the_image() {
    let cluster = Cluster::start_with("space", 2, false);
    let path = cluster.file("a", "random");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let noise = bytes::noise(7, 4096);
    let mut latest: Vec<u64> = (0..BLOCKS).map(|_| 1).collect();
    for first in (0..BLOCKS).step_by(256) {
        let data: Vec<u8> = (first..first + 256).flat_map(|b| content(&noise, b, 1)).collect();
        file.write_all_at(&data, first * 4096).unwrap();
    }
    file.sync_all().unwrap();
    let (mut rng, mut most) = (seed::rng("space"), 0);
    let began = Instant::now();
    for n in 2..2 + PASSES * BLOCKS {
        let block = rng.random_range(0..BLOCKS);
        file.write_all_at(&content(&noise, block, n), block * 4096).unwrap();
        latest[usize::try_from(block).unwrap()] = n;
        if n % 8192 == 0 {
            file.sync_data().unwrap();
            most = most.max(segments_mib(&cluster, "a")).max(segments_mib(&cluster, "b"));
        }
    }
    file.sync_all().unwrap();
    println!("{PASSES} times {IMAGE_MIB} MiB in {:?}: at most {most} MiB of segments", began.elapsed());
    assert!(most < IMAGE_MIB * 22 / 10 + CONSTANT_MIB, "{most} MiB for {IMAGE_MIB} MiB");
    cluster.wait_in_sync("random");
    // An image at rest is checkpointed after ten seconds, and its log is let go. Replicas do not hear what the
    // others have, and keep what they may.
    for (host, log_mib) in [("a", 0), ("b", LOG_RETAIN_MIB)] {
        until_true("the segments at rest are about twice the image", secs(60), || {
            segments_mib(&cluster, host) < IMAGE_MIB * 22 / 10 + log_mib
        });
        println!(
            "{host} at rest: {} MiB, on disk {} MiB",
            segments_mib(&cluster, host),
            disk_mib(&cluster, host)
        );
    }
    let mut data = vec![0; 4096];
    for (block, n) in (0..).zip(&latest) {
        file.read_exact_at(&mut data, block * 4096).unwrap();
        assert!(data == content(&noise, block, *n), "block {block} is not what write {n} made it");
    }
    drop(file);
    cluster.assert_copies_identical("random");
    // What is on the disk is what was seen.
    for host in ["a", "b"] {
        cluster.kill9(host);
    }
    for host in ["a", "b"] {
        cluster.restart(host);
    }
    cluster.assert_copies_identical("random");
    let owner = cluster.file("a", "random");
    let file = File::open(owner).unwrap();
    for (block, n) in (0..).zip(&latest) {
        file.read_exact_at(&mut data, block * 4096).unwrap();
        assert!(
            data == content(&noise, block, *n),
            "block {block} after a restart is not what write {n} made it"
        );
    }
}
