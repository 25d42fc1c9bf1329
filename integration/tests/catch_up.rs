//! A replica that was away for longer than the owner's log reaches back copies blocks while the guest goes on
//! writing, and is done when it has copied them once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, seed, until, until_true};
use rand::Rng;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const IMAGE: &str = "busy";
const WRITE_BYTES: u64 = 64 << 10;

/// The hosts keep this much log and no more for a replica that is away.
fn keep_log(cluster: &Cluster, size: &str) {
    for host in cluster.hosts() {
        cluster.signal(host, Signal::TERM);
        until_true(&format!("{host} has stopped"), secs(20), || cluster.live_pid(host).is_none());
        let path = cluster.config(host);
        let text = std::fs::read_to_string(&path).unwrap();
        let changed = text.replace("[store]\n", &format!("[store]\nlog_retain = \"{size}\"\n"));
        assert_ne!(text, changed);
        std::fs::write(path, changed).unwrap();
        cluster.restart(host);
    }
}

/// A load of random writes.
struct Load<'a> {
    file: &'a File,
    image_bytes: u64,
    stop: AtomicBool,
    written: AtomicU64,
}

/// Between two writes: about 20 MiB a second.
const PAUSE: Duration = Duration::from_millis(3);
/// Writes between two flushes.
const FLUSH_EVERY: u64 = 16;

impl Load<'_> {
    fn run(&self) {
        let mut rng = seed::rng("catch_up");
        let mut data = bytes::noise(3, usize::try_from(WRITE_BYTES).unwrap());
        while !self.stop.load(Ordering::Relaxed) {
            let n = self.written.fetch_add(1, Ordering::Relaxed);
            data[..8].copy_from_slice(&n.to_le_bytes());
            let at = rng.random_range(0..self.image_bytes / WRITE_BYTES) * WRITE_BYTES;
            self.file.write_all_at(&data, at).unwrap();
            if n.is_multiple_of(FLUSH_EVERY) {
                self.file.sync_data().unwrap();
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn wait_written(&self, bytes: u64) {
        let end = self.written.load(Ordering::Relaxed) + bytes / WRITE_BYTES;
        until_true("the load goes on", secs(120), || self.written.load(Ordering::Relaxed) >= end);
    }
}

/// Runs `during` beside a load on a new image of `image_bytes`, all of it written before.
fn under_load(cluster: &Cluster, image_bytes: u64, during: impl FnOnce(&Load<'_>)) {
    let path = cluster.file("a", IMAGE);
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let data = bytes::noise(1, usize::try_from(MIB).unwrap());
    (0..image_bytes / MIB).for_each(|i| file.write_all_at(&data, i * MIB).unwrap());
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let load = Load { file: &file, image_bytes, stop, written };
    std::thread::scope(|s| {
        let running = s.spawn(|| load.run());
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| during(&load)));
        load.stop.store(true, Ordering::Relaxed);
        running.join().unwrap();
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    });
}

fn is_in_sync(cluster: &Cluster, host: &str) -> bool {
    let image = cluster.image("a", IMAGE);
    image.is_some_and(|i| i.members.iter().any(|m| m.host == host && m.state == "in-sync"))
}

fn copies_begun(cluster: &Cluster, host: &str) -> usize {
    cluster.log(host).matches("the log does not reach back: copying blocks").count()
}

#[test]
fn replica_away_for_longer_than_the_log_reaches_copies_once_under_load() {
    let cluster = Cluster::start("catch-up");
    keep_log(&cluster, "8MiB");
    under_load(&cluster, 96 * MIB, |load| {
        cluster.kill9("c");
        load.wait_written(160 * MIB);
        cluster.restart("c");
        until_true("c is in sync while the guest writes", secs(60), || is_in_sync(&cluster, "c"));
        // It stays so: it is fed like the others.
        load.wait_written(20 * MIB);
        until_true("c is in sync again", secs(10), || is_in_sync(&cluster, "c"));
    });
    assert_eq!(copies_begun(&cluster, "c"), 1, "{}", cluster.log("c"));
    cluster.wait_in_sync(IMAGE);
    cluster.assert_copies_identical(IMAGE);
    // What it had before is part of what it has now: nothing was discarded.
    let forks = until("c states its copy", secs(10), || Some(cluster.image("c", IMAGE)?.forks));
    assert_eq!(forks, 0, "{}", cluster.log("c"));
}
