//! Promise 1 with one machine's crash: what fsync confirmed is there after SIGKILL and restart.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use integration::harness::model::{BLOCK, NumberedWrites};
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, seed, until};
use rand::Rng;

const BLOCKS: u64 = 2048;
const IMAGE: &str = "disk.raw";

fn open(cluster: &Cluster, host: &str) -> File {
    let path = cluster.file(host, IMAGE);
    File::options().read(true).write(true).open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn make(cluster: &Cluster) -> File {
    let file = File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.set_len(BLOCKS * BLOCK as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    open(cluster, "a")
}

/// Waits until the restarted owner serves its image again, and opens it.
fn reopened(cluster: &Cluster) -> File {
    until("a owns its image again", secs(20), || {
        cluster.image("a", IMAGE).filter(|i| i.role == "owner" && i.state == "ok")
    });
    open(cluster, "a")
}

#[test]
fn flushed_writes_survive_kill_minus_9() {
    let cluster = Cluster::start("flush");
    let mut writes = NumberedWrites::new(BLOCKS, seed::rng("flushed_writes_survive_kill_minus_9"));
    let file = make(&cluster);
    while writes.begun() < 10_000 {
        writes.write(&file).unwrap();
        if writes.chance(50) {
            writes.flush(&file).unwrap();
        }
    }
    cluster.kill9("a");
    drop(file);
    cluster.restart("a");
    let file = reopened(&cluster);
    let kept = writes.assert_prefix(&file);
    println!("{} begun, {} flushed, {kept} kept", writes.begun(), writes.flushed());
    let _ = cluster.vmfs("a", &["verify", IMAGE]).ok();
    cluster.assert_copies_identical(IMAGE);

    // It is a disk like any other after that.
    writes.write(&file).unwrap();
    writes.flush(&file).unwrap();
    writes.assert_prefix(&file);
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn kill_in_the_middle_of_writing_keeps_a_prefix_with_every_flush() {
    let cluster = Cluster::start("midwrite");
    let mut rng = seed::rng("kill_in_the_middle_of_writing_keeps_a_prefix_with_every_flush");
    let mut file = make(&cluster);
    let mut writes = NumberedWrites::new(BLOCKS, rand::SeedableRng::seed_from_u64(rng.random()));
    for round in 0..5 {
        let moment = Duration::from_millis(rng.random_range(50..800));
        let go = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The moment of the crash is what is random here; nothing is waited for.
                std::thread::sleep(moment);
                cluster.kill9("a");
                go.store(false, Ordering::SeqCst);
            });
            while go.load(Ordering::SeqCst) {
                let wrote = writes.write(&file);
                let flushed = if writes.chance(20) { writes.flush(&file) } else { Ok(()) };
                if wrote.and(flushed).is_err() {
                    break;
                }
            }
        });
        drop(file);
        cluster.restart("a");
        file = reopened(&cluster);
        let kept = writes.assert_prefix(&file);
        println!("round {round}: killed after {moment:?}, {} flushed, {kept} kept", writes.flushed());
    }
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn replicas_show_a_prefix_while_the_owner_writes() {
    let cluster = Cluster::start("prefix");
    let mut writes = NumberedWrites::new(64, seed::rng("replicas_show_a_prefix_while_the_owner_writes"));
    let file = File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.set_len(64 * BLOCK as u64).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    cluster.wait_visible("b", IMAGE);
    let mut flushed_before = 0;
    for _ in 0..200 {
        for _ in 0..20 {
            writes.write(&file).unwrap();
        }
        // Opening pins one state. It may lag behind the flushes, but is one moment of the history, and
        // moments only move forward.
        let replica = File::open(cluster.file("b", IMAGE)).unwrap();
        let k = writes.assert_some_prefix(&replica);
        assert!(k >= flushed_before, "the replica went back from write {flushed_before} to {k}");
        flushed_before = k;
        if writes.chance(4) {
            writes.flush(&file).unwrap();
        }
    }
    cluster.assert_copies_identical(IMAGE);
    let replica = File::open(cluster.file("b", IMAGE)).unwrap();
    assert_eq!(writes.assert_some_prefix(&replica), writes.begun());
    bytes::assert_same(&cluster.file("a", IMAGE), &cluster.file("b", IMAGE));
}
