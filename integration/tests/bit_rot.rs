//! Promise 6 on real daemons: flipped bytes in a store's files are found, repaired from another copy,
//! reported, and never handed out; without a good copy the read fails and the status says so.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use integration::harness::command::{Ran, try_run};
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, until, until_true};
use serde_json::Value;

const IMAGE: &str = "disk.raw";
const BLOCK: usize = 4096;
/// Blocks written before the rot.
const BLOCKS: usize = 512;

fn block(i: usize) -> Vec<u8> {
    bytes::noise(7_000 + i as u64, BLOCK)
}

/// An image of 8 MiB: its first quarter holds known blocks, flushed and everywhere.
fn make(cluster: &Cluster) -> File {
    let file =
        File::options().read(true).write(true).create_new(true).open(cluster.file("a", IMAGE)).unwrap();
    for i in 0..BLOCKS {
        file.write_all_at(&block(i), (i * BLOCK) as u64).unwrap();
    }
    file.set_len(8 << 20).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    file
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

/// Flips a bit of the byte at `offset`.
fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 0x40;
    file.write_all_at(&byte, offset).unwrap();
    file.sync_data().unwrap();
}

/// Where `host`'s store has known block `i`.
fn place(cluster: &Cluster, host: &str, i: usize) -> (PathBuf, u64) {
    let wanted = block(i);
    for path in files_below(&cluster.store(host).join("seg")) {
        let content = std::fs::read(&path).unwrap();
        if let Some(page) = content.chunks_exact(BLOCK).position(|p| p == wanted) {
            return (path, (page * BLOCK) as u64);
        }
    }
    panic!("{host} has no block {i}");
}

fn rot(cluster: &Cluster, host: &str, i: usize) {
    let (path, offset) = place(cluster, host, i);
    flip(&path, offset + 1234);
}

/// Reads one block past the kernel's cache of the mount.
fn direct_read(cluster: &Cluster, host: &str, i: usize, to: &Path) -> Ran {
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", cluster.file(host, IMAGE).display())).arg(format!("of={}", to.display()));
    dd.args(["bs=4096", "count=1", "iflag=direct", "status=none"]).arg(format!("skip={i}"));
    try_run(dd)
}

fn json(ran: &Ran) -> Value {
    serde_json::from_str(ran.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {ran}"))
}

fn scrub(cluster: &Cluster, host: &str) -> Ran {
    cluster.vmfs(host, &["scrub", IMAGE, "--rate", "1GiB", "--json"])
}

/// What `host` says of the image, in full.
fn info(cluster: &Cluster, host: &str) -> Value {
    json(&cluster.vmfs(host, &["info", IMAGE, "--json"]).ok())
}

/// Scrubs and wants everything that is found repaired. Returns how much that was.
#[track_caller]
fn assert_repairs(cluster: &Cluster, host: &str) -> u64 {
    let report = json(&scrub(cluster, host).ok());
    let image = &report["images"][0];
    assert_eq!(
        (&report["ok"], &image["found"]),
        (&Value::Bool(true), &image["repaired"]),
        "{host}: {report}"
    );
    image["found"].as_u64().unwrap()
}

#[test]
fn rot_at_the_owner_and_at_a_replica_is_found_and_repaired_while_a_guest_writes() {
    let cluster = Cluster::start("rot");
    let file = make(&cluster);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let round = rounds.fetch_add(1, Ordering::Relaxed);
                let at = (4 << 20) + (round % 256) * BLOCK as u64;
                file.write_all_at(&bytes::noise(round, BLOCK), at).unwrap();
                file.sync_data().unwrap();
            }
        });
        until_true("the guest writes", secs(20), || rounds.load(Ordering::Relaxed) > 20);
        for (host, blocks) in [("a", [3, 77, 300]), ("c", [5, 78, 301])] {
            blocks.iter().for_each(|i| rot(&cluster, host, *i));
            let header = files_below(&cluster.store(host).join("seg"))[0].clone();
            flip(&header, 100);
            flip(&cluster.store(host).join("store"), 40);
        }
        // The read that meets a damaged block gets the right one.
        let out = cluster.scratch().join("out");
        let _ = direct_read(&cluster, "a", 77, &out).ok();
        assert!(std::fs::read(&out).unwrap() == block(77));
        assert!(info(&cluster, "a")["damage"]["repaired"].as_u64().unwrap() >= 1);
        for host in ["a", "c"] {
            let found = assert_repairs(&cluster, host);
            let said = info(&cluster, host);
            println!("{host}: {found} found, {}", said["damage"]);
            // The three blocks and the segment's header, by whoever met them first.
            assert!(said["damage"]["found"].as_u64().unwrap() >= 4, "{}", said["damage"]);
            assert_eq!(said["damage"]["found"], said["damage"]["repaired"]);
            assert!(said["scrub"]["finished_ms"].as_u64().is_some());
            let status = json(&cluster.vmfs(host, &["status", "--json"]).ok());
            assert_eq!((&status["damage"]["found"], &status["damage"]["repaired"]), (&1.into(), &1.into()));
            assert_eq!(assert_repairs(&cluster, host), 0, "{host} again");
        }
        let before = rounds.load(Ordering::Relaxed);
        until_true("the guest goes on", secs(20), || rounds.load(Ordering::Relaxed) > before + 5);
        stop.store(true, Ordering::Relaxed);
    });
    cluster.assert_copies_identical(IMAGE);
    let text = cluster.vmfs("a", &["status"]).ok().stdout;
    assert!(text.contains("damaged places found") && text.contains("store: 1 damaged place found"), "{text}");
    let metrics = Command::new("curl")
        .args(["-sS", "--unix-socket"])
        .arg(cluster.socket("a"))
        .arg("http://vmfs/metrics")
        .output()
        .unwrap();
    let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
    assert!(metrics.contains("vmfs_image_damage_open{image=\"disk.raw\"} 0"), "{metrics}");
}

#[test]
fn block_without_a_good_copy_fails_with_eio_and_heals_when_one_comes_back() {
    let cluster = Cluster::start("rotall");
    drop(make(&cluster));
    for host in cluster.hosts() {
        rot(&cluster, host, 9);
    }
    let out = cluster.scratch().join("out");
    let read = direct_read(&cluster, "a", 9, &out);
    assert!(!read.status.success() && read.stderr.contains("Input/output error"), "{read}");
    let said = info(&cluster, "a");
    assert_eq!(said["state"], "degraded", "{said}");
    assert!(said["reason"].as_str().unwrap().contains("block 9"), "{said}");
    assert_eq!(said["damage"]["open"][0], "block 9", "{said}");
    // Its neighbours are not affected.
    let _ = direct_read(&cluster, "a", 10, &out).ok();
    assert!(std::fs::read(&out).unwrap() == block(10));
    let scrubbed = scrub(&cluster, "a").refused(1);
    assert_eq!(json(&scrubbed)["images"][0]["open"][0], "block 9", "{scrubbed}");
    assert!(!cluster.vmfs("a", &["verify", IMAGE, "--deep"]).status.success());
    // One copy comes back: on its host the byte is as it was. Nobody has to ask for the repair.
    let content = block(9);
    for path in files_below(&cluster.store("b").join("seg")) {
        let bytes = std::fs::read(&path).unwrap();
        let same = |p: &[u8]| p.iter().zip(&content).filter(|(a, b)| a != b).count() == 1;
        if let Some(page) = bytes.chunks_exact(BLOCK).position(same) {
            flip(&path, (page * BLOCK + 1234) as u64);
        }
    }
    until("the block is whole again", secs(60), || {
        let said = info(&cluster, "a");
        (said["state"] == "ok" && said["damage"]["open"].as_array().unwrap().is_empty()).then_some(())
    });
    let _ = direct_read(&cluster, "a", 9, &out).ok();
    assert!(std::fs::read(&out).unwrap() == block(9));
    assert_repairs(&cluster, "c");
    assert_repairs(&cluster, "b");
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn rot_in_every_kind_of_file_while_the_hosts_were_down_is_repaired() {
    let mut cluster = Cluster::start("rotdown");
    drop(make(&cluster));
    cluster.down();
    for host in ["a", "b", "c"] {
        let store = cluster.store(host);
        rot(&cluster, host, 100 + usize::from(host.as_bytes()[0]));
        flip(&store.join("store"), 50);
        // The number of the first group.
        flip(&store.join("meta"), 10);
        let catalog = files_below(&store.join("catalog/catalog"));
        flip(catalog.iter().find(|p| p.extension().is_some_and(|e| e == "cat")).unwrap(), 70);
        for map in files_below(&store.join("map")).iter().filter(|p| p.extension().is_none()) {
            // A superblock; elsewhere the first page after both, which is a body or a page of the map.
            flip(map, if host == "a" { 60 } else { 2 * 4096 + 100 });
        }
        for segment in files_below(&store.join("seg")) {
            // A copy of its header, and one of its first header page.
            flip(&segment, 4096 + 33);
            flip(&segment, 2 * 4096 + 80);
        }
    }
    let _ = cluster.up();
    cluster.wait_in_sync(IMAGE);
    for host in ["a", "b", "c"] {
        let _ = assert_repairs(&cluster, host);
        let damage = &info(&cluster, host)["damage"];
        println!("{host}: {damage}");
        assert!(damage["found"].as_u64().unwrap() >= 3 && damage["found"] == damage["repaired"], "{damage}");
        let store = &json(&cluster.vmfs(host, &["status", "--json"]).ok())["damage"];
        assert!(store["found"].as_u64().unwrap() >= 3 && store["found"] == store["repaired"], "{store}");
    }
    let file = File::open(cluster.file("a", IMAGE)).unwrap();
    let mut buf = vec![0; BLOCK];
    for i in 0..BLOCKS {
        file.read_exact_at(&mut buf, (i * BLOCK) as u64).unwrap();
        assert!(buf == block(i), "block {i}");
    }
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn copy_whose_checkpoints_are_lost_is_shown_and_comes_anew_from_the_owner() {
    let cluster = Cluster::start("rotmap");
    drop(make(&cluster));
    let id = cluster.image("c", IMAGE).unwrap().id;
    cluster.kill9("c");
    let map = cluster.store("c").join("map").join(&id);
    flip(&map, 70);
    flip(&map, 4096 + 70);
    cluster.restart("c");
    let status = json(&cluster.vmfs("c", &["status", "--json"]).ok());
    assert_eq!(status["unopened"][0]["id"], id.as_str(), "{status}");
    assert!(status["unopened"][0]["reason"].as_str().unwrap().contains("is damaged"), "{status}");
    let text = cluster.vmfs("c", &["status"]).ok().stdout;
    assert!(text.contains("cannot be opened here"), "{text}");
    // The others go on without it.
    let file = File::options().write(true).open(cluster.file("a", IMAGE)).unwrap();
    file.write_all_at(&bytes::noise(1, BLOCK), 5 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    // As docs/operations.md says.
    cluster.kill9("c");
    let aside = cluster.scratch();
    std::fs::rename(&map, aside.join("map")).unwrap();
    let _ = std::fs::rename(map.with_extension("copy"), aside.join("copy"));
    cluster.restart("c");
    cluster.assert_copies_identical(IMAGE);
    let status = json(&cluster.vmfs("c", &["status", "--json"]).ok());
    assert!(status["unopened"].as_array().unwrap().is_empty(), "{status}");
}
