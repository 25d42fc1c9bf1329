//! Planned change of owner: repeatedly, in both directions, with a short pause and nothing lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use integration::harness::cluster::Cluster;
use integration::harness::{bytes, until_true};

const IMAGE: &str = "disk.raw";
const HANDOVERS: u32 = 12;
/// The contract's limit for the pause of an idle image in sync.
const PAUSE_LIMIT: Duration = Duration::from_millis(100);

fn open(cluster: &Cluster, host: &str) -> File {
    let path = cluster.file(host, IMAGE);
    File::options().read(true).write(true).open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The pause as a client sees it: from the last write that the old owner took to the first one that the
/// new owner took, with both files open all the time, as a migrating VM has them.
fn pause_of_handover(cluster: &Cluster, from: &str, to: &str, round: u8) -> Duration {
    let (old, new) = (&open(cluster, from), &open(cluster, to));
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Numbered, so that the last one that was accepted can be told from the others; the first one before
        // anything else happens, so that there is something to hand over.
        let number = |n: u64| -> [u8; 512] { std::array::from_fn(|i| n.to_le_bytes()[i % 8]) };
        old.write_all_at(&number(1), 0).expect("the owner takes a write");
        let last = scope.spawn(move || {
            let (mut n, mut last) = (1, Instant::now());
            while !done.load(Ordering::SeqCst) && old.write_all_at(&number(n + 1), 0).is_ok() {
                (n, last) = (n + 1, Instant::now());
            }
            (n, last)
        });
        let first = scope.spawn(|| {
            let start = Instant::now();
            while new.write_all_at(&[round; 512], 4096).is_err() {
                assert!(start.elapsed() < Duration::from_secs(20), "{to} never became writable");
                std::thread::sleep(Duration::from_millis(1));
            }
            Instant::now()
        });
        let said = cluster.vmfs(from, &["handover", IMAGE, "--to", to]);
        let first = first.join().expect("the new owner takes a write");
        done.store(true, Ordering::SeqCst);
        let _ = said.ok();
        let (n, last) = last.join().expect("the old owner took a write");
        let mut block = [0; 512];
        open(cluster, to).read_exact_at(&mut block, 0).expect("the new owner serves reads");
        assert_eq!(block, number(n), "the last of {n} writes that {from} accepted is not the last at {to}");
        first.saturating_duration_since(last)
    })
}

#[test]
fn handover_in_both_directions_pauses_under_100_ms() {
    let cluster = Cluster::start("handover");
    let file = File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.write_all_at(&bytes::noise(1, 8 << 20), 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    cluster.wait_visible("b", IMAGE);
    let mut pauses = Vec::new();
    for round in 1..=HANDOVERS {
        cluster.wait_in_sync(IMAGE);
        let (from, to) = if round % 2 == 1 { ("a", "b") } else { ("b", "a") };
        let fill = u8::try_from(round).expect("invariant: few rounds");
        pauses.push(pause_of_handover(&cluster, from, to, fill));
        until_true("the roles have changed", Duration::from_secs(10), || {
            let role = |h: &str| cluster.image(h, IMAGE).map(|i| i.role);
            role(to).as_deref() == Some("owner") && role(from).as_deref() == Some("replica")
        });
        // What the new owner took is part of the image, and what the old one took was checked already.
        open(&cluster, to).sync_all().unwrap();
        let mut block = [0; 512];
        open(&cluster, to).read_exact_at(&mut block, 4096).unwrap();
        assert_eq!(block, [fill; 512], "what {to} took in round {round}");
        assert!(open(&cluster, from).write_all_at(&[0; 512], 0).is_err(), "{from} has handed over");
    }
    cluster.assert_copies_identical(IMAGE);
    pauses.sort();
    println!("pauses: {pauses:?}");
    let median = pauses[pauses.len() / 2];
    assert!(median < PAUSE_LIMIT, "half of the pauses were longer than {median:?}: {pauses:?}");
}

#[test]
fn handover_to_an_unknown_host_is_refused() {
    let cluster = Cluster::start("unknown");
    std::fs::write(cluster.file("a", IMAGE), bytes::noise(2, 65536)).unwrap();
    cluster.wait_in_sync(IMAGE);
    let _ = cluster.vmfs("a", &["handover", IMAGE, "--to", "nobody"]).refused(1);
    let _ = cluster.vmfs("a", &["handover", "no-such-image", "--to", "b"]).refused(1);
    open(&cluster, "a").write_all_at(&[1; 4096], 0).unwrap();
}

#[test]
fn handover_to_a_dead_host_leaves_a_working_owner() {
    let cluster = Cluster::start("dead-target");
    std::fs::write(cluster.file("a", IMAGE), bytes::noise(2, 65536)).unwrap();
    cluster.wait_in_sync(IMAGE);
    cluster.kill9("b");
    let said = cluster.vmfs("a", &["handover", IMAGE, "--to", "b"]);
    assert!(!said.status.success(), "{said}");
    until_true("a is writable", Duration::from_secs(20), || {
        let file = open(&cluster, "a");
        file.write_all_at(&[1; 4096], 0).and_then(|()| file.sync_all()).is_ok()
    });
}
