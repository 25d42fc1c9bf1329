//! Promotion with and without a quorum, and what the command line says about it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use integration::harness::cluster::SYNC_LIMIT;
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, until};

const IMAGE: &str = "vm/disk.raw";

fn cluster_with_image(name: &str) -> Cluster {
    let cluster = Cluster::start(name);
    std::fs::create_dir(cluster.mnt("a").join("vm")).unwrap();
    let file = File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.write_all_at(&bytes::noise(1, 4 << 20), 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    cluster.wait_in_sync(IMAGE);
    cluster
}

fn write(cluster: &Cluster, host: &str, fill: u8) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(cluster.file(host, IMAGE))?;
    file.write_all_at(&[fill; 8192], 4096)?;
    file.sync_all()
}

fn first_byte(cluster: &Cluster, host: &str) -> u8 {
    let mut byte = [0];
    File::open(cluster.file(host, IMAGE)).unwrap().read_exact_at(&mut byte, 4096).unwrap();
    byte[0]
}

#[test]
fn promote_in_sync_says_that_nothing_is_missing_and_is_writable_at_once() {
    let cluster = cluster_with_image("promote");
    cluster.kill9("a");
    let start = Instant::now();
    let said = cluster.vmfs("b", &["promote", IMAGE]).ok();
    let took = start.elapsed();
    write(&cluster, "b", 7).unwrap();
    println!("{took:?}: {}", said.stdout.trim());
    assert!(said.stdout.contains("nothing acknowledged is missing"), "{said}");
    assert!(took < secs(1), "promotion took {took:?}");
    cluster.restart("a");
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn promote_of_a_large_image_takes_no_longer() {
    let cluster = cluster_with_image("large");
    let large = File::create_new(cluster.file("a", "large.raw")).unwrap();
    large.set_len(100 << 30).unwrap();
    for gib in 0..100 {
        large.write_all_at(&bytes::noise(gib, 65536), gib << 30).unwrap();
    }
    large.sync_all().unwrap();
    drop(large);
    cluster.wait_in_sync("large.raw");
    cluster.kill9("a");
    let start = Instant::now();
    let _ = cluster.vmfs("c", &["promote", "large.raw"]).ok();
    assert!(start.elapsed() < secs(1), "promotion took {:?}", start.elapsed());
    let promoted = File::open(cluster.file("c", "large.raw")).unwrap();
    assert_eq!(promoted.metadata().unwrap().len(), 100 << 30);
    let mut block = vec![0; 65536];
    promoted.read_exact_at(&mut block, 57 << 30).unwrap();
    assert_eq!(block, bytes::noise(57, 65536));
}

#[test]
fn promote_without_quorum_is_refused_with_exit_code_3() {
    let cluster = cluster_with_image("noquorum");
    cluster.kill9("a");
    cluster.kill9("c");
    let before = cluster.image("b", IMAGE).unwrap();
    let refused = cluster.vmfs("b", &["promote", IMAGE]).refused(3);
    println!("{}", refused.stderr);
    let after = cluster.image("b", IMAGE).unwrap();
    assert_eq!(after.role, "replica");
    assert_eq!((after.seq, &after.owner), (before.seq, &before.owner), "a refusal changes nothing");
    assert!(write(&cluster, "b", 9).is_err(), "a refused promotion must not make the image writable");
    // With the quorum back, the same command works.
    cluster.restart("c");
    until("b can be promoted with c", secs(20), || {
        cluster.vmfs("b", &["promote", IMAGE]).status.success().then_some(())
    });
    write(&cluster, "b", 9).unwrap();
}

#[test]
fn forced_promotion_works_and_says_what_may_be_lost() {
    let cluster = cluster_with_image("forced");
    write(&cluster, "a", 1).unwrap();
    cluster.wait_in_sync(IMAGE);
    cluster.kill9("a");
    cluster.kill9("c");
    let _ = cluster.vmfs("b", &["promote", IMAGE]).refused(3);
    let said = cluster.vmfs("b", &["promote", IMAGE, "--force"]).ok();
    println!("{}{}", said.stdout, said.stderr);
    assert!(
        !said.stdout.contains("nothing acknowledged is missing"),
        "without a quorum nobody can know that: {said}"
    );
    assert!(!said.stdout.trim().is_empty(), "a forced promotion says what may be lost: {said}");
    write(&cluster, "b", 2).unwrap();
    assert_eq!(first_byte(&cluster, "b"), 2);

    // The separate lineages meet: nobody follows or rolls back by itself.
    cluster.restart("a");
    cluster.restart("c");
    until("a serves its own lineage again", SYNC_LIMIT, || cluster.image("a", IMAGE));
    assert_eq!(first_byte(&cluster, "b"), 2, "b's lineage is kept");
    assert_eq!(cluster.image("b", IMAGE).unwrap().role, "owner", "b's lineage stays b's");
    until("a's lineage is kept too", SYNC_LIMIT, || (first_byte(&cluster, "a") == 1).then_some(()));
}

/// b goes on alone with 2 where a and c have 1, and all are back.
fn two_lineages(name: &str) -> Cluster {
    let cluster = cluster_with_image(name);
    write(&cluster, "a", 1).unwrap();
    cluster.wait_in_sync(IMAGE);
    cluster.kill9("a");
    cluster.kill9("c");
    let _ = cluster.vmfs("b", &["promote", IMAGE, "--force"]).ok();
    write(&cluster, "b", 2).unwrap();
    cluster.restart("a");
    cluster.restart("c");
    until("a serves its own lineage again", SYNC_LIMIT, || {
        cluster.image("a", IMAGE).filter(|i| i.role == "owner" && i.state != "stalled")
    });
    cluster
}

#[test]
fn an_operator_chooses_the_lineage_of_the_quorum() {
    let cluster = two_lineages("choosequorum");
    // Only the host of the forced promotion has a separate lineage to give up.
    let _ = cluster.vmfs("a", &["abandon", IMAGE]).refused(1);
    let _ = cluster.vmfs("b", &["abandon", IMAGE]).ok();
    cluster.assert_copies_identical(IMAGE);
    assert_eq!((first_byte(&cluster, "a"), first_byte(&cluster, "b")), (1, 1));
    let forks = cluster.vmfs("b", &["forks", IMAGE]).ok().stdout;
    assert!(forks.contains(IMAGE), "what b alone had is kept: {forks}");
    assert_eq!(cluster.image("b", IMAGE).unwrap().role, "replica");
    write(&cluster, "a", 3).unwrap();
}

#[test]
fn an_operator_chooses_the_forced_lineage() {
    let cluster = two_lineages("chooseforced");
    for host in ["a", "c"] {
        let _ = cluster.vmfs(host, &["abandon", IMAGE, "--discard"]).ok();
    }
    for host in ["a", "c"] {
        let _ = cluster.vmfs("b", &["replica", "add", IMAGE, host]).ok();
    }
    cluster.assert_copies_identical(IMAGE);
    for host in ["a", "b", "c"] {
        assert_eq!(first_byte(&cluster, host), 2, "{host}");
    }
    // A datastore like before: whoever is promoted has it all.
    write(&cluster, "b", 4).unwrap();
    cluster.kill9("b");
    let said = cluster.vmfs("a", &["promote", IMAGE]).ok();
    assert!(said.stdout.contains("nothing acknowledged is missing"), "{said}");
    assert_eq!(first_byte(&cluster, "a"), 4);
}

#[test]
fn promote_on_the_owner_itself_changes_nothing() {
    let cluster = cluster_with_image("self");
    let before = cluster.image("a", IMAGE).unwrap();
    let _ = cluster.vmfs("a", &["promote", IMAGE]).refused(1);
    let after = cluster.image("a", IMAGE).unwrap();
    assert_eq!(after.epoch, before.epoch);
    write(&cluster, "a", 3).unwrap();
}

#[test]
fn promotion_beside_a_living_owner_deposes_it_cleanly() {
    let cluster = cluster_with_image("deposed");
    write(&cluster, "a", 1).unwrap();
    let old = File::options().read(true).write(true).open(cluster.file("a", IMAGE)).unwrap();
    let _ = cluster.vmfs("b", &["promote", IMAGE]).ok();
    write(&cluster, "b", 2).unwrap();
    until("a knows that it was deposed", secs(20), || {
        cluster.image("a", IMAGE).filter(|i| i.role == "replica")
    });
    let wrote = old.write_all_at(&[3; 4096], 4096).and_then(|()| old.sync_all());
    assert!(wrote.is_err(), "a handle of the old ownership must not write");
    drop(old);
    cluster.assert_copies_identical(IMAGE);
    assert_eq!(first_byte(&cluster, "a"), 2);
}
