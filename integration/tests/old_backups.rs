//! Stores put back from a backup: they have forgotten what they acknowledged, and cannot know it. One such
//! member is within what an image endures; here it is a majority of them at once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use integration::harness::wait::secs;
use integration::harness::{Cluster, run, until, until_true};
use rustix::fs::FallocateFlags;

const IMAGE: &str = "disk.img";
const MIB: usize = 1 << 20;

/// Ends the daemon and copies its store, as a backup of a stopped host does.
fn back_up(cluster: &Cluster, host: &str) -> PathBuf {
    let copy = cluster.scratch().join(format!("{host}.store"));
    cluster.signal(host, rustix::process::Signal::TERM);
    until_true("the daemon has ended", secs(20), || cluster.live_pid(host).is_none());
    copy_over(&cluster.store(host), &copy);
    copy
}

/// Kills `hosts`, and starts those with a backup again from it.
fn put_all_back(cluster: &Cluster, hosts: &[&str], backups: &[(&str, PathBuf)]) {
    hosts.iter().for_each(|host| cluster.kill9(host));
    for (host, backup) in backups {
        std::fs::remove_dir_all(cluster.store(host)).unwrap();
        copy_over(backup, &cluster.store(host));
        cluster.restart(host);
    }
}

fn copy_over(from: &Path, to: &Path) {
    let _ = run("cp", [Path::new("-a"), from, to]).ok();
}

/// An image of 2 MiB of ones in the backups of b and c; acknowledged since: its first MiB is of twos but for
/// a hole in its third block, and it has grown to 3 MiB.
fn with_old_backups(name: &str) -> (Cluster, File, Vec<(&'static str, PathBuf)>) {
    let cluster = Cluster::start(name);
    let file = File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.write_all_at(&old(), 0).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    // One after the other: the image goes on.
    let backups = ["b", "c"].map(|host| {
        let copy = back_up(&cluster, host);
        cluster.restart(host);
        cluster.wait_in_sync(IMAGE);
        (host, copy)
    });
    file.write_all_at(&[2; MIB], 0).unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 8192, 4096).unwrap();
    file.set_len(3 * MIB as u64).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    (cluster, file, backups.into())
}

fn old() -> Vec<u8> {
    vec![1; 2 * MIB]
}

/// The image with all that was acknowledged; or a file that has only what changed since the backups.
fn new(untouched: u8) -> Vec<u8> {
    let mut bytes = [vec![2; MIB], vec![untouched; MIB], vec![0; MIB]].concat();
    bytes[8192..12288].fill(0);
    bytes
}

fn content(cluster: &Cluster, host: &str) -> Vec<u8> {
    std::fs::read(cluster.file(host, IMAGE)).unwrap()
}

/// Both replicas are put back while the owner serves: it has everything, and brings them up to date.
#[test]
fn owner_outlives_a_majority_restored_from_old_backups_and_loses_nothing() {
    let (cluster, file, backups) = with_old_backups("oldbackup");
    put_all_back(&cluster, &["b", "c"], &backups);
    file.write_all_at(&[3; 4096], 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(cluster.owner(IMAGE).as_deref(), Some("a"));
    cluster.assert_copies_identical(IMAGE);
    let mut expected = new(1);
    expected[..4096].fill(3);
    assert!(content(&cluster, "b") == expected);
}

/// All hosts were down: the owner's copy is the only one with the last flush. It claims its image by itself,
/// and the old copies vote for the longer one.
#[test]
fn after_all_were_down_the_newest_copy_wins_over_a_majority_of_old_ones() {
    let (cluster, file, backups) = with_old_backups("oldquorum");
    drop(file);
    put_all_back(&cluster, &cluster.hosts(), &backups);
    cluster.restart("a");
    until_true("a owns its image again", secs(60), || cluster.owner(IMAGE).as_deref() == Some("a"));
    cluster.assert_copies_identical(IMAGE);
    assert!(content(&cluster, "c") == new(1), "the flushed content is there");
}

/// The old copies were promoted before the newest one was back: two of three members know no better. What
/// only the third has is not lost: it is a fork there, and can be read.
#[test]
fn content_newer_than_a_promoted_majority_of_old_copies_is_kept_as_a_fork() {
    let (cluster, file, backups) = with_old_backups("oldpromoted");
    drop(file);
    put_all_back(&cluster, &cluster.hosts(), &backups);
    let said = until("b is promoted", secs(60), || {
        let ran = cluster.vmfs("b", &["promote", IMAGE]);
        ran.status.success().then_some(ran.stdout)
    });
    println!("{said}");
    assert!(content(&cluster, "b") == old());
    cluster.restart("a");
    let forks = until("a lists what only it has", secs(60), || {
        let said = cluster.vmfs("a", &["forks", IMAGE]).ok().stdout;
        (!said.trim().is_empty()).then_some(said)
    });
    println!("{forks}");
    assert_eq!(cluster.owner(IMAGE).as_deref(), Some("b"));
    cluster.assert_copies_identical(IMAGE);
    read_fork(&cluster);
}

/// The fork as a file of its own, and over a copy of the image from before it.
fn read_fork(cluster: &Cluster) {
    let listed = cluster.vmfs("a", &["forks", IMAGE, "--json"]).ok().stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let fork = listed["forks"][0]["fork"].as_str().unwrap();
    let (alone, over) = (cluster.scratch().join("alone.img"), cluster.scratch().join("over.img"));
    let export = |file: &Path, more: &[&str]| {
        let args = [&["fork", "export", fork, file.to_str().unwrap()], more].concat();
        cluster.vmfs("a", &args)
    };
    let missing = export(&over, &["--onto"]).refused(1);
    assert!(missing.stderr.contains("over.img") && !over.exists(), "{missing}");
    println!("{}", export(&alone, &[]).ok());
    assert!(std::fs::read(&alone).unwrap() == new(0), "what the fork has changed, and nothing else");
    let there = export(&alone, &[]).refused(1);
    assert!(there.stderr.contains("exists"), "{there}");
    copy_over(&cluster.file("b", IMAGE), &over);
    let _ = export(&over, &["--onto"]).ok();
    assert!(std::fs::read(&over).unwrap() == new(1), "the image as the deposed owner had it");
    let unknown = cluster.vmfs("a", &["fork", "export", "nothing", "/x"]).refused(1);
    assert!(unknown.stderr.contains("no fork"), "{unknown}");
}
