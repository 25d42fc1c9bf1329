//! Live migration, first form: the guest moves from a to b while it runs, with a hand-over between the two
//! QEMUs, and its journal is whole.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use integration::harness::guest::{self, GuestSpec, Journal};
use integration::harness::reaper::Reaper;
use integration::harness::wait::secs;
use integration::harness::{Cluster, until_true};
use serde_json::json;

const IMAGE: &str = "vm.raw";

/// The guest goes around all hosts while it writes; `hand_over(from, to)` is called while it is paused
/// between two QEMUs. Returns the last record that was acknowledged anywhere.
fn migrate_around(
    scratch: &Path,
    image: impl Fn(&str) -> PathBuf,
    before: impl Fn(),
    hand_over: impl Fn(&str, &str),
) -> i64 {
    let spec_on = |host: &str| {
        let mut spec = GuestSpec::new(image(host), Journal::Raw);
        spec.sleep_ms = 2;
        spec
    };
    let mut running = spec_on("a").boot(scratch, "host-a-0");
    running.wait_acked(100);
    let mut acked = 0;
    for (round, (from, to)) in [("a", "b"), ("b", "c"), ("c", "a")].into_iter().enumerate() {
        before();
        let mut target = spec_on(to);
        target.incoming = true;
        let mut moved = target.boot(scratch, &format!("host-{to}-{}", round + 1));
        let uri = format!("unix:{}", scratch.join(format!("channel-{round}")).display());
        let (mut source, mut sink) = (running.qmp(), moved.qmp());
        for qmp in [&mut source, &mut sink] {
            let pause = json!([{ "capability": "pause-before-switchover", "state": true }]);
            let _ = qmp.call("migrate-set-capabilities", json!({ "capabilities": pause }));
        }
        let _ = sink.call("migrate-incoming", json!({ "uri": uri }));
        let _ = source.call("migrate", json!({ "uri": uri }));
        until_true("the guest is paused before the switch", secs(120), || {
            source.migration_state() == "pre-switchover"
        });
        let paused = Instant::now();
        hand_over(from, to);
        let _ = source.call("migrate-continue", json!({ "state": "pre-switchover" }));
        until_true("the guest has moved", secs(60), || source.migration_state() == "completed");
        until_true("the guest runs", secs(30), || sink.run_state() == "running");
        println!("{from} to {to}: paused for {:?}", paused.elapsed());
        running.kill9();
        acked = acked.max(running.acked());
        moved.wait_acked(acked + 100);
        moved.assert_no_errors();
        running = moved;
    }
    running.kill9();
    running.acked()
}

#[test]
fn running_guest_migrates_with_a_hand_over_and_keeps_its_journal() {
    let cluster = Cluster::start("migration");
    let scratch = cluster.scratch();
    guest::make_disk(&cluster.file("a", IMAGE), Journal::Raw, 64 << 20);
    let acked = migrate_around(
        &scratch,
        |host| cluster.file(host, IMAGE),
        || cluster.wait_in_sync(IMAGE),
        |from, to| _ = cluster.vmfs(from, &["handover", IMAGE, "--to", to]).ok(),
    );
    cluster.assert_copies_identical(IMAGE);
    for host in cluster.hosts() {
        GuestSpec::new(cluster.file(host, IMAGE), Journal::Raw).assert_journal(&scratch, acked);
    }
}

/// The control: the same on a plain file that all "hosts" share, so that a failure above is not QEMU's.
#[test]
fn running_guest_migrates_on_a_plain_file() {
    let reaper = Reaper::new("plain-migration");
    let image = reaper.dir().join(IMAGE);
    guest::make_disk(&image, Journal::Raw, 64 << 20);
    let acked = migrate_around(reaper.dir(), |_| image.clone(), || {}, |_, _| {});
    GuestSpec::new(&image, Journal::Raw).assert_journal(reaper.dir(), acked);
}
