//! Bounded memory: idle images cost little, and a full-speed write load has a limit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use integration::harness::{Cluster, bytes, until};

const IDLE_LIMIT_MIB: u64 = 200;
const LOAD_LIMIT_MIB: u64 = 512;

/// `VmRSS` or `VmHWM` (peak) of a process.
fn memory_mib(pid: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn hundred_idle_images_of_100_gib_stay_under_200_mib() {
    let cluster = Cluster::start("idle");
    for i in 0..100 {
        let file = File::create_new(cluster.file("a", &format!("idle-{i}"))).unwrap();
        file.set_len(100 << 30).unwrap();
        for piece in 0..8 {
            file.write_all_at(&bytes::noise(i * 8 + piece, 65536), piece * (12 << 30)).unwrap();
        }
        file.sync_all().unwrap();
    }
    for i in 0..100 {
        cluster.wait_in_sync(&format!("idle-{i}"));
    }
    for host in cluster.hosts() {
        let mib = memory_mib(cluster.pid(host), "VmRSS");
        println!("{host}: {mib} MiB");
        assert!(mib < IDLE_LIMIT_MIB, "{host} holds {mib} MiB with 100 idle images");
    }
    let threads = std::fs::read_dir(format!("/proc/{}/task", cluster.pid("a"))).unwrap().count();
    assert!(threads < 100, "{threads} threads for 100 images: no thread per image");
}

#[test]
fn full_speed_writing_stays_under_512_mib() {
    let cluster = Cluster::start("load");
    let file = File::create_new(cluster.file("a", "busy")).unwrap();
    file.set_len(512 << 20).unwrap();
    let noise = bytes::noise(1, 8 << 20);
    let start = Instant::now();
    let mut written = 0_u64;
    while start.elapsed() < Duration::from_secs(20) {
        for part in noise.chunks(1 << 20) {
            file.write_all_at(part, written % (512 << 20)).unwrap();
            written += 1 << 20;
        }
    }
    file.sync_all().unwrap();
    println!("{} MiB written", written >> 20);
    cluster.assert_copies_identical("busy");
    for host in cluster.hosts() {
        let mib = memory_mib(cluster.pid(host), "VmHWM");
        println!("{host}: peak {mib} MiB");
        assert!(mib < LOAD_LIMIT_MIB, "{host} needed {mib} MiB");
    }
}

/// The memory for updates on their way is one budget, however many images write; and it goes back afterwards.
#[test]
fn full_speed_writing_of_many_images_stays_under_512_mib_and_gives_memory_back() {
    let cluster = Cluster::start("many");
    let names: Vec<String> = (0..16).map(|i| format!("busy-{i}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            let path = cluster.file("a", name);
            scope.spawn(move || {
                let file = File::create_new(path).unwrap();
                let noise = bytes::noise(1, 4 << 20);
                let (start, mut written) = (Instant::now(), 0_u64);
                while start.elapsed() < Duration::from_secs(15) {
                    for part in noise.chunks(1 << 20) {
                        file.write_all_at(part, written % (32 << 20)).unwrap();
                        written += 1 << 20;
                    }
                }
                file.sync_all().unwrap();
            });
        }
    });
    names.iter().for_each(|name| cluster.wait_in_sync(name));
    for host in cluster.hosts() {
        let mib = memory_mib(cluster.pid(host), "VmHWM");
        println!("{host}: peak {mib} MiB");
        assert!(mib < LOAD_LIMIT_MIB, "{host} needed {mib} MiB");
        until("the memory of the load is given back", Duration::from_secs(30), || {
            let mib = memory_mib(cluster.pid(host), "VmRSS");
            (mib < IDLE_LIMIT_MIB).then(|| println!("{host}: {mib} MiB afterwards"))
        });
    }
}

/// Overwriting the same data does not fill the disk: segments whose every block is superseded are recycled.
#[test]
fn overwriting_the_same_data_does_not_fill_the_disk() {
    let cluster = Cluster::start("recycle");
    let file = File::create_new(cluster.file("a", "hot")).unwrap();
    let data = 64 << 20;
    for round in 0..40 {
        for at in (0..data).step_by(1 << 20) {
            file.write_all_at(&bytes::noise(round * 64 + (at >> 20), 1 << 20), at).unwrap();
        }
        file.sync_data().unwrap();
    }
    cluster.wait_in_sync("hot");
    for host in cluster.hosts() {
        let du = integration::harness::run("du", ["-sm", cluster.store(host).to_str().unwrap()]).stdout;
        let mib: u64 = du.split_whitespace().next().unwrap().parse().unwrap();
        println!("{host}: {mib} MiB for 64 MiB of data, overwritten 40 times");
        // The retained log for catch-up (256 MiB by default), ready segments, and the data itself.
        assert!(mib < 768, "{host}'s store holds {mib} MiB after 2560 MiB of overwrites of 64 MiB");
    }
    cluster.assert_copies_identical("hot");
}
