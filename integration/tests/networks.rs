//! Hosts on networks that are slow, lossy, narrow or cut, also in one direction: writers only ever wait, and
//! when the network is well again every copy is the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use integration::harness::guest::{self, GuestSpec, Journal, Kit};
use integration::harness::model::{BLOCK, NumberedWrites};
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, seed, until};
use rand::Rng;

const IMAGE: &str = "disk.raw";
const BLOCKS: u64 = 1024;
const MIB: usize = 1 << 20;

fn make(cluster: &Cluster, size: u64) -> File {
    let path = cluster.file("a", IMAGE);
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(size).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    file
}

/// The owner's epoch: it changes with every election.
fn epoch(cluster: &Cluster) -> serde_json::Value {
    cluster.image("a", IMAGE).expect("a knows its image").epoch
}

/// How often `host` has connected to a peer so far.
fn connections(cluster: &Cluster, host: &str) -> usize {
    cluster.log(host).lines().filter(|l| l.contains("connected to ")).count()
}

/// Nobody has elected anybody or connected again since `before`.
fn assert_calm(cluster: &Cluster, before: &(serde_json::Value, usize)) {
    assert!(before.1 > 0, "the log does not say who is connected");
    let now = (epoch(cluster), connections(cluster, "a"));
    assert_eq!(&now, before, "an election, or a lost connection");
}

/// Median time of `count` writes of 4 KiB with an fsync each.
fn flush_median(file: &File, count: usize) -> Duration {
    let mut took: Vec<Duration> = (0..count)
        .map(|i| {
            let start = Instant::now();
            file.write_all_at(&bytes::noise(i as u64, BLOCK), (i * BLOCK) as u64).unwrap();
            file.sync_data().unwrap();
            start.elapsed()
        })
        .collect();
    took.sort();
    took[count / 2]
}

#[test]
fn a_flush_takes_one_round_trip_on_a_distant_network() {
    let mut cluster = Cluster::start_on_lan("delay", 3);
    let file = make(&cluster, 16 << 20);
    let before = (epoch(&cluster), connections(&cluster, "a"));
    for delay_ms in [1, 10, 50] {
        cluster.lan().set_delay(Duration::from_millis(delay_ms));
        let _ = flush_median(&file, 5);
        let median = flush_median(&file, 21);
        let round_trip = Duration::from_millis(2 * delay_ms);
        println!("{delay_ms} ms one way: a flush takes {median:?}");
        assert!(median >= round_trip, "nobody can have acknowledged that");
        assert!(median < round_trip + round_trip / 2 + Duration::from_millis(20), "more than one round trip");
    }
    assert_calm(&cluster, &before);
    cluster.lan().heal();
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

/// What the link carries is what the writer gets, with loss as with a long way, and nobody takes a full link
/// for a dead host.
#[test]
fn a_narrow_link_is_filled_and_never_taken_for_a_dead_host() {
    let mut cluster = Cluster::start_on_lan("narrow", 2);
    let file = make(&cluster, 64 << 20);
    let before = (epoch(&cluster), connections(&cluster, "a"));
    for (mbit, delay_ms, loss_permille, share) in [(10, 10, 0, 0.7), (10, 50, 0, 0.5), (10, 10, 10, 0.4)] {
        cluster.lan().set_rate(Some(mbit));
        cluster.lan().set_delay(Duration::from_millis(delay_ms));
        cluster.lan().set_loss(loss_permille);
        let start = Instant::now();
        let count = 6;
        for i in 0..count {
            file.write_all_at(&bytes::noise(1000 * delay_ms + i as u64, MIB), (i * MIB) as u64).unwrap();
        }
        file.sync_data().unwrap();
        let rate = (count * MIB * 8) as f64 / 1e6 / start.elapsed().as_secs_f64();
        println!("{mbit} Mbit/s, {delay_ms} ms, {loss_permille} permille lost: {rate:.1} Mbit/s");
        assert!(rate > share * f64::from(mbit), "only {rate:.1} of {mbit} Mbit/s");
        cluster.lan().heal();
    }
    assert_calm(&cluster, &before);
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

/// What is under way at first is 2 MiB, which would be 20 MiB/s here (docs/decisions/0017).
#[test]
fn a_distant_replica_is_sent_what_the_way_there_takes() {
    const COUNT: usize = 192;
    let mut cluster = Cluster::start_on_lan("distant", 2);
    let file = make(&cluster, (COUNT * MIB) as u64);
    let before = (epoch(&cluster), connections(&cluster, "a"));
    let delay = Duration::from_millis(50);
    cluster.lan().set_delay(delay);
    let _ = flush_median(&file, 11);
    let start = Instant::now();
    for i in 0..COUNT {
        file.write_all_at(&bytes::noise(i as u64, MIB), (i * MIB) as u64).unwrap();
    }
    file.sync_data().unwrap();
    let rate = COUNT as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.1} MiB/s over {delay:?} each way");
    let small_window = 2.0 / (2 * delay).as_secs_f64();
    assert!(rate > 1.25 * small_window, "only {rate:.1} MiB/s");
    assert_calm(&cluster, &before);
    cluster.lan().heal();
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn guest_only_waits_on_lossy_slow_narrow_and_cut_networks() {
    println!("guest kit: {}", Kit::get().work_dir().display());
    let mut cluster = Cluster::start_on_lan("guestnet", 3);
    let scratch = cluster.scratch();
    guest::make_disk(&cluster.file("a", IMAGE), Journal::Raw, 64 << 20);
    cluster.wait_in_sync(IMAGE);
    let spec = GuestSpec::new(cluster.file("a", IMAGE), Journal::Raw);
    let mut running = spec.boot(&scratch, "net");
    running.wait_acked(1);
    let before = epoch(&cluster);
    for (delay_ms, loss_permille, mbit) in [(1, 10, None), (20, 50, None), (50, 10, None), (10, 0, Some(10))]
    {
        cluster.lan().set_delay(Duration::from_millis(delay_ms));
        cluster.lan().set_loss(loss_permille);
        cluster.lan().set_rate(mbit);
        let start = Instant::now();
        running.wait_more(100);
        let took = start.elapsed();
        println!("{delay_ms} ms, {loss_permille} permille lost, {mbit:?} Mbit/s: 25 flushes in {took:?}");
        cluster.lan().heal();
    }
    // One direction is as good as none, and the other replica is enough.
    for (from, to) in [("a", "b"), ("b", "a"), ("c", "a")] {
        cluster.lan().cut(from, to);
        running.wait_more(50);
        cluster.lan().heal();
    }
    // Nobody to confirm anything, for longer than the lease.
    cluster.lan().isolate("a");
    std::thread::sleep(secs(5));
    let stalled = running.acked();
    std::thread::sleep(secs(2));
    assert_eq!(running.acked(), stalled, "acknowledged without a quorum");
    running.assert_no_errors();
    cluster.lan().heal();
    running.wait_more(50);
    assert_eq!(epoch(&cluster), before, "nobody asked for an election");
    running.kill9();
    spec.assert_journal(&scratch, running.acked());
    cluster.assert_copies_identical(IMAGE);
}

/// Somebody always lacks the newest update of an image that is written: that is not what is waited for.
#[test]
fn wait_in_sync_ends_while_the_image_is_written() {
    let mut cluster = Cluster::start_on_lan("waitnet", 3);
    let file = make(&cluster, BLOCKS * BLOCK as u64);
    cluster.lan().set_delay(Duration::from_millis(20));
    let mut writes = NumberedWrites::new(BLOCKS, seed::rng("wait_in_sync_ends_while_the_image_is_written"));
    let took = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| cluster.vmfs("a", &["wait", IMAGE, "--in-sync", "--timeout", "20"]));
        while !waiting.is_finished() {
            writes.write(&file).unwrap();
            if writes.chance(100) {
                writes.flush(&file).unwrap();
            }
        }
        waiting.join().unwrap().ok().took
    });
    println!("in sync after {took:?}, {} writes", writes.begun());
}

#[test]
fn random_faults_of_the_network_lose_nothing_and_every_copy_ends_the_same() {
    const ROUNDS: usize = 15;
    let mut cluster = Cluster::start_on_lan("faults", 3);
    let mut rng = seed::rng("random_faults_of_the_network_lose_nothing_and_every_copy_ends_the_same");
    let mut writes = NumberedWrites::new(BLOCKS, rand::SeedableRng::seed_from_u64(rng.random()));
    let file = make(&cluster, BLOCKS * BLOCK as u64);
    let go = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let (writes, go, file) = (&mut writes, &go, &file);
        let writer = scope.spawn(move || {
            while go.load(Ordering::SeqCst) {
                writes.write(file).expect("a write only waits");
                if writes.chance(10) {
                    writes.flush(file).expect("a flush only waits");
                }
            }
        });
        for round in 0..ROUNDS {
            disturb(&mut cluster, &mut rng);
            // What is random here is how long it lasts; nothing is waited for.
            std::thread::sleep(Duration::from_millis(rng.random_range(200..3000)));
            if round % 3 == 2 {
                cluster.lan().heal();
            }
            if writer.is_finished() {
                break;
            }
        }
        cluster.lan().heal();
        go.store(false, Ordering::SeqCst);
    });
    writes.flush(&file).unwrap();
    assert_eq!(writes.assert_prefix(&file), writes.begun());
    println!("{} writes", writes.begun());
    cluster.assert_copies_identical(IMAGE);
    for host in ["b", "c"] {
        let copy =
            until(&format!("{host} shows it"), secs(20), || File::open(cluster.file(host, IMAGE)).ok());
        assert_eq!(writes.assert_some_prefix(&copy), writes.begun());
    }
}

/// One more fault, on top of those there are.
fn disturb(cluster: &mut Cluster, rng: &mut impl Rng) {
    let hosts = ["a", "b", "c"];
    let lan = cluster.lan();
    match rng.random_range(0..7) {
        0 => lan.set_delay(Duration::from_millis(rng.random_range(1..50))),
        1 => lan.set_loss([10, 50, 200][rng.random_range(0..3)]),
        2 => lan.set_rate(Some([1, 10, 100][rng.random_range(0..3)])),
        3 | 4 => {
            let from = rng.random_range(0..3);
            lan.cut(hosts[from], hosts[(from + rng.random_range(1..3)) % 3]);
        }
        5 => lan.isolate(hosts[rng.random_range(0..3)]),
        _ => lan.heal(),
    }
}
