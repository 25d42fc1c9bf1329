//! Promise 8: a full disk fails writes cleanly, loses nothing, and heals when space returns.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use integration::harness::command::{bash, run};
use integration::harness::guest::{GuestSpec, Journal, make_disk};
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, until, until_true};

const MIB: usize = 1 << 20;
const DISK_MIB: usize = 640;
/// What else may lie on such a disk.
const BALLAST_MIB: usize = 300;

/// Moves `host`'s store to a filesystem of its own of 640 MiB.
fn give_small_disk(cluster: &mut Cluster, host: &str) {
    cluster.down();
    let disk = cluster.scratch().join(format!("{host}.disk"));
    let store = cluster.store(host);
    let (disk, store) = (disk.to_str().unwrap(), store.to_str().unwrap());
    let _ = bash(
        r#"truncate -s "$3M" "$1"; mkfs.ext4 -q -m 0 -F "$1"; mkdir "$1.mnt"; mount -o loop "$1" "$1.mnt"
           rmdir "$1.mnt/lost+found"; cp -a "$2/." "$1.mnt/"; chmod --reference="$2" "$1.mnt"
           umount "$1.mnt"; mount -o loop "$1" "$2""#,
        [disk, store, &DISK_MIB.to_string()],
    );
    let _ = cluster.up();
}

/// Writes noise, one flushed MiB after the other, until the disk is full. Returns how many were flushed.
fn fill(file: &File, seed: u64) -> usize {
    for i in 0..2 * DISK_MIB {
        let wrote = file
            .write_all_at(&bytes::noise(seed + i as u64, MIB), (i * MIB) as u64)
            .and_then(|()| file.sync_data());
        if let Err(e) = wrote {
            assert_eq!(e.kind(), ErrorKind::StorageFull, "after {i} MiB: {e}");
            return i;
        }
    }
    panic!("{} MiB of noise went into {DISK_MIB} MiB", 2 * DISK_MIB);
}

fn assert_content(file: &File, seed: u64, count: usize) {
    let mut block = vec![0; MIB];
    for i in 0..count {
        file.read_exact_at(&mut block, (i * MIB) as u64).unwrap();
        assert!(block == bytes::noise(seed + i as u64, MIB), "MiB {i} changed");
    }
}

#[test]
fn full_disk_at_the_owner_fails_the_write_cleanly_and_loses_nothing() {
    let mut cluster = Cluster::start("fullowner");
    give_small_disk(&mut cluster, "a");
    let pid = cluster.pid("a");
    let keep =
        File::options().read(true).write(true).create_new(true).open(cluster.file("a", "keep")).unwrap();
    keep.write_all_at(&bytes::noise(1, 8 * MIB), 0).unwrap();
    keep.sync_all().unwrap();
    let big = File::options().read(true).write(true).create_new(true).open(cluster.file("a", "big")).unwrap();
    let flushed = fill(&big, 1000);
    println!("full after {flushed} MiB");
    assert!(flushed > DISK_MIB / 2, "full after only {flushed} of {DISK_MIB} MiB");
    assert_eq!(cluster.pid("a"), pid);
    assert_content(&big, 1000, flushed);
    cluster.assert_copies_identical("keep");
    drop(big);

    // Deleting works on a full disk, and makes room again, also for the image that was hit.
    std::fs::remove_file(cluster.file("a", "big")).unwrap();
    until("there is room again", secs(60), || {
        keep.write_all_at(&bytes::noise(2, 8 * MIB), 0).and_then(|()| keep.sync_all()).ok()
    });
    let again = File::create_new(cluster.file("a", "again")).unwrap();
    until("new images fit again", secs(60), || {
        again.write_all_at(&bytes::noise(3, 16 * MIB), 0).and_then(|()| again.sync_all()).ok()
    });
    cluster.assert_copies_identical("keep");
    cluster.assert_copies_identical("again");
    // A full disk is no reason for a restart to fail.
    cluster.kill9("a");
    cluster.restart("a");
    cluster.assert_copies_identical("again");
}

#[test]
fn guest_pauses_when_the_owners_disk_is_full_and_goes_on_with_its_journal_intact() {
    let mut cluster = Cluster::start("fullguest");
    give_small_disk(&mut cluster, "a");
    let disk = cluster.file("a", "guest.img");
    make_disk(&disk, Journal::Raw, 256 << 20);
    let spec = GuestSpec { span: "128M", ..GuestSpec::new(&disk, Journal::Raw) };
    let mut guest = spec.boot(&cluster.scratch(), "full");
    guest.wait_acked(20);
    // Somebody else on the same host takes all the space there is.
    let big = File::options().read(true).write(true).create_new(true).open(cluster.file("a", "big")).unwrap();
    let flushed = fill(&big, 1000);
    let mut qmp = guest.qmp();
    until("QEMU pauses the guest", secs(180), || (qmp.run_state() == "io-error").then_some(()));
    println!("full after {flushed} MiB, guest paused at record {}", guest.acked());
    guest.assert_no_errors();
    drop(big);
    std::fs::remove_file(cluster.file("a", "big")).unwrap();
    let paused_at = guest.acked();
    // As an administrator does, until the space is really there.
    until("the guest goes on", secs(120), || {
        if qmp.run_state() == "io-error" {
            let _ = qmp.call("cont", serde_json::json!({}));
        }
        (guest.acked() > paused_at + 20).then_some(())
    });
    guest.assert_no_errors();
    let acked = guest.acked();
    guest.kill9();
    spec.assert_journal(&cluster.scratch(), acked);
    cluster.assert_copies_identical("guest.img");
}

#[test]
fn full_disk_at_a_replica_parks_it_visibly_until_space_returns() {
    let mut cluster = Cluster::start("fullreplica");
    give_small_disk(&mut cluster, "c");
    let ballast = cluster.store("c").join("ballast");
    let _ = run("fallocate", ["-l", &format!("{BALLAST_MIB}M"), ballast.to_str().unwrap()]);
    let file =
        File::options().read(true).write(true).create_new(true).open(cluster.file("a", "big")).unwrap();
    let count = DISK_MIB - BALLAST_MIB + 64;
    for i in 0..count {
        file.write_all_at(&bytes::noise(1000 + i as u64, MIB), (i * MIB) as u64).unwrap();
        if i % 16 == 0 {
            file.sync_data().unwrap();
        }
    }
    file.sync_all().unwrap();
    let parked = until("the owner shows that c is behind", secs(60), || {
        let image = cluster.image("a", "big")?;
        image.members.into_iter().find(|m| m.host == "c" && m.state != "in-sync")
    });
    println!("{parked:?}");
    assert!(parked.lag_bytes > 0);
    assert_content(&file, 1000, count);
    // Space returns: half of the image goes, and so does what else lay on c's disk.
    file.set_len((200 * MIB) as u64).unwrap();
    file.sync_all().unwrap();
    std::fs::remove_file(ballast).unwrap();
    until("c has caught up", secs(120), || {
        let image = cluster.image("a", "big")?;
        image.members.into_iter().find(|m| m.host == "c" && m.state == "in-sync")
    });
    cluster.assert_copies_identical("big");
}

/// The log on a full disk: what cannot be logged is lost, and nothing else. (The daemon ended at the first line
/// that it could not write: seen when a disk with stores and logs ran full.)
#[test]
fn daemon_goes_on_when_its_log_cannot_be_written() {
    use std::os::unix::process::CommandExt as _;
    let cluster = Cluster::start("fulllog");
    let pid = cluster.pid("b");
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let words = line.split(|b| *b == 0).filter(|w| !w.is_empty());
    let words: Vec<_> = words.map(|w| String::from_utf8(w.to_vec()).unwrap()).collect();
    cluster.kill9("b");
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut daemon = std::process::Command::new(program)
        .arg0(&words[0])
        .args(&words[1..])
        .stdin(std::process::Stdio::null())
        .stdout(full.try_clone().unwrap())
        .stderr(full)
        .spawn()
        .unwrap();
    until_true("b answers", secs(20), || {
        daemon.try_wait().unwrap().is_some() || cluster.vmfs("b", &["status"]).status.success()
    });
    let file = std::fs::File::create_new(cluster.file("a", "logged")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 1 << 20], 0).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync("logged");
    let ended = daemon.try_wait().unwrap();
    assert!(ended.is_none(), "it ended: {ended:?}");
    daemon.kill().unwrap();
    let _ = daemon.wait().unwrap();
    cluster.restart("b");
}
