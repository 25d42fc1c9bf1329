//! Promise 7 and the ends of all roads of section 8: a replica that was killed, frozen, cut off, or added
//! late ends byte-identical by itself, and the guest does not notice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use integration::harness::guest::{self, Guest, GuestSpec, Journal};
use integration::harness::wait::secs;
use integration::harness::{Cluster, until, until_true};
use rustix::process::Signal;

const IMAGE: &str = "guest.raw";
/// A guest that is stuck for longer than this has noticed.
const HICCUP_LIMIT: Duration = secs(3);

struct Running {
    guest: Guest,
    spec: GuestSpec,
}

fn start(cluster: &Cluster) -> Running {
    guest::make_disk(&cluster.file("a", IMAGE), Journal::Raw, 64 << 20);
    let mut spec = GuestSpec::new(cluster.file("a", IMAGE), Journal::Raw);
    spec.sleep_ms = 2;
    let mut guest = spec.boot(&cluster.scratch(), "replicas");
    guest.wait_acked(20);
    Running { guest, spec }
}

impl Running {
    /// The guest gets on with its work during the next `span`, without a pause it would notice.
    fn assert_goes_on(&mut self, span: Duration) {
        let start = Instant::now();
        while start.elapsed() < span {
            let round = Instant::now();
            self.guest.wait_more(4);
            assert!(round.elapsed() < HICCUP_LIMIT, "the guest was stuck for {:?}", round.elapsed());
        }
    }

    /// The guest stops; all copies are identical and hold everything it was told.
    fn assert_end(mut self, cluster: &Cluster) {
        self.guest.assert_no_errors();
        self.guest.kill9();
        let acked = self.guest.acked();
        cluster.assert_copies_identical(IMAGE);
        for host in cluster.hosts() {
            self.spec.image = cluster.file(host, IMAGE);
            self.spec.assert_journal(&cluster.scratch(), acked);
        }
    }
}

/// Waits until `host` has everything again although the guest goes on writing.
fn assert_catches_up(cluster: &Cluster, host: &str) {
    until(&format!("{host} has caught up"), secs(60), || {
        let image = cluster.image("a", IMAGE)?;
        image.members.iter().find(|m| m.host == host && m.state == "in-sync").map(drop)
    });
}

#[test]
fn replica_killed_under_load_ends_identical() {
    let cluster = Cluster::start("killed");
    let mut running = start(&cluster);
    for host in ["c", "b", "c"] {
        cluster.kill9(host);
        running.assert_goes_on(secs(2));
        cluster.restart(host);
        running.assert_goes_on(secs(1));
        assert_catches_up(&cluster, host);
    }
    running.assert_end(&cluster);
}

#[test]
fn frozen_replica_does_not_hold_up_the_guest() {
    let cluster = Cluster::start("frozen");
    let mut running = start(&cluster);
    cluster.signal("c", Signal::STOP);
    running.assert_goes_on(secs(5));
    cluster.signal("c", Signal::CONT);
    assert_catches_up(&cluster, "c");
    running.assert_end(&cluster);
}

#[test]
fn replica_cut_off_under_load_ends_identical() {
    let cluster = Cluster::start_in_own_network("cutoff");
    let mut running = start(&cluster);
    for _ in 0..2 {
        cluster.network().cut(cluster.pid("b"));
        running.assert_goes_on(secs(4));
        cluster.network().heal();
        running.assert_goes_on(secs(1));
        assert_catches_up(&cluster, "b");
    }
    running.assert_end(&cluster);
}

#[test]
fn replica_that_joins_late_ends_identical() {
    let cluster = Cluster::start("late");
    let mut running = start(&cluster);
    let _ = cluster.vmfs("a", &["replica", "remove", IMAGE, "c"]).ok();
    until_true("c is no member any more", secs(20), || {
        cluster.image("a", IMAGE).is_some_and(|i| i.members.iter().all(|m| m.host != "c"))
    });
    running.assert_goes_on(secs(2));
    let _ = cluster.vmfs("a", &["replica", "add", IMAGE, "c"]).ok();
    running.assert_goes_on(secs(1));
    assert_catches_up(&cluster, "c");
    running.assert_end(&cluster);
}

#[test]
fn replica_that_was_down_at_creation_ends_identical() {
    let cluster = Cluster::start("absent");
    cluster.kill9("c");
    let mut running = start(&cluster);
    running.assert_goes_on(secs(1));
    cluster.restart("c");
    assert_catches_up(&cluster, "c");
    running.assert_end(&cluster);
}

#[test]
fn flush_waits_for_the_quorum_and_resumes_by_itself() {
    let cluster = Cluster::start("stall");
    let mut running = start(&cluster);
    cluster.signal("b", Signal::STOP);
    running.assert_goes_on(secs(1));
    cluster.signal("c", Signal::STOP);
    let stuck_at = until("no more flush is acknowledged", secs(20), || {
        let before = running.guest.acked();
        // One second without a single acknowledgement: with 2 ms between them that is no accident.
        std::thread::sleep(secs(1));
        (running.guest.acked() == before).then_some(before)
    });
    cluster.signal("b", Signal::CONT);
    until_true("the guest goes on", secs(30), || running.guest.acked() > stuck_at + 10);
    cluster.signal("c", Signal::CONT);
    assert_catches_up(&cluster, "c");
    running.assert_end(&cluster);
}
