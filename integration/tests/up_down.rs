//! `vmfs up` and `vmfs down`: the first five minutes of everybody.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use integration::harness::cluster::{READY_LIMIT, is_alive, signal};
use integration::harness::command::wait_within;
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, until};
use rustix::process::Signal;

#[test]
fn up_is_ready_within_five_seconds_and_comes_back_with_everything() {
    let mut cluster = Cluster::start("updown");
    std::fs::create_dir_all(cluster.mnt("a").join("d/e")).unwrap();
    std::fs::write(cluster.file("a", "d/e/one"), bytes::noise(1, 3 << 20)).unwrap();
    std::fs::write(cluster.file("b", "two"), bytes::noise(2, 1 << 20)).unwrap();
    std::os::unix::fs::symlink("d/e/one", cluster.file("a", "link")).unwrap();
    for image in ["d/e/one", "two"] {
        cluster.assert_copies_identical(image);
    }
    for _ in 0..2 {
        cluster.down();
        for host in cluster.hosts() {
            assert!(!cluster.socket(host).exists(), "{host}'s socket is left behind");
            assert_eq!(cluster.live_pid(host), None);
        }
        let start = Instant::now();
        let _ = cluster.up();
        assert!(start.elapsed() < READY_LIMIT, "`vmfs up` took {:?}", start.elapsed());
        // Ready means ready: no waiting here.
        for host in cluster.hosts() {
            assert!(bytes::is_mounted(&cluster.mnt(host)));
            let _ = cluster.status(host);
        }
        until("owners serve their images", secs(10), || {
            let ok = |host, image| {
                cluster.image(host, image).is_some_and(|i| i.role == "owner" && i.state == "ok")
            };
            (ok("a", "d/e/one") && ok("b", "two")).then_some(())
        });
        assert_eq!(std::fs::read(cluster.file("a", "link")).unwrap(), bytes::noise(1, 3 << 20));
        for image in ["d/e/one", "two"] {
            cluster.assert_copies_identical(image);
        }
    }
}

#[test]
fn up_comes_back_after_every_daemon_was_killed() {
    let mut cluster = Cluster::start("allkilled");
    let content = bytes::noise(3, 2 << 20);
    let file = std::fs::File::create_new(cluster.file("a", "x")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    for host in ["a", "b", "c"] {
        cluster.kill9(host);
    }
    let _ = cluster.up();
    until("the owner serves its image", secs(20), || {
        cluster.image("a", "x").filter(|i| i.role == "owner" && i.state == "ok")
    });
    assert_eq!(std::fs::read(cluster.file("a", "x")).unwrap(), content);
    cluster.assert_copies_identical("x");
}

#[test]
fn up_in_front_says_where_things_are_and_ends_cleanly_on_ctrl_c() {
    let cluster = Cluster::start("front");
    std::fs::write(cluster.file("a", "x"), bytes::noise(4, 65536)).unwrap();
    cluster.assert_copies_identical("x");
    cluster.down();
    let mut command = cluster.up_command();
    let args: Vec<_> = command.get_args().filter(|a| *a != "--detach").map(ToOwned::to_owned).collect();
    command = std::process::Command::new(command.get_program());
    let mut up = command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = Vec::new();
    let lines = BufReader::new(up.stdout.take().unwrap()).lines();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| _ = tell.send(line)));
    until("it says where every mount is", READY_LIMIT, || {
        said.extend(told.try_iter());
        cluster.hosts().iter().all(|h| said.iter().any(|l| l.contains(&format!("{h}/mnt")))).then_some(())
    });
    until("it is ready", READY_LIMIT, || {
        cluster.image("a", "x").filter(|i| i.role == "owner" && i.state == "ok")
    });
    let pids: Vec<u32> = cluster.hosts().iter().map(|h| cluster.pid(h)).collect();
    signal(up.id(), Signal::INT);
    let ended = wait_within(&mut up, secs(15)).expect("Ctrl-C ends it");
    assert!(ended.success(), "{ended:?}\n{}", said.join("\n"));
    assert!(pids.iter().all(|&p| !is_alive(p)), "daemons are left behind");
    for host in cluster.hosts() {
        assert!(!bytes::is_mounted(&cluster.mnt(host)), "{host}'s mount is left behind");
    }
}

#[test]
fn second_up_in_the_same_directory_is_refused_and_disturbs_nothing() {
    let cluster = Cluster::start("second");
    std::fs::write(cluster.file("a", "x"), bytes::noise(5, 65536)).unwrap();
    let pids: Vec<u32> = cluster.hosts().iter().map(|h| cluster.pid(h)).collect();
    let _ = integration::harness::try_run(cluster.up_command()).refused(1);
    assert_eq!(pids, cluster.hosts().iter().map(|h| cluster.pid(h)).collect::<Vec<_>>());
    cluster.assert_copies_identical("x");
}

#[test]
fn up_works_with_one_and_with_two_hosts() {
    for count in [1, 2] {
        let cluster = Cluster::start_with("few", count, false);
        std::fs::write(cluster.file("a", "x"), bytes::noise(6, 1 << 20)).unwrap();
        let file = std::fs::File::open(cluster.file("a", "x")).unwrap();
        file.sync_all().unwrap();
        cluster.assert_copies_identical("x");
    }
}

#[test]
fn a_host_stops_cleanly_on_sigterm() {
    let cluster = Cluster::start("sigterm");
    std::fs::write(cluster.file("a", "x"), bytes::noise(7, 1 << 20)).unwrap();
    cluster.wait_in_sync("x");
    let pid = cluster.pid("a");
    signal(pid, Signal::TERM);
    until("the daemon has stopped", secs(10), || (!is_alive(pid)).then_some(()));
    assert!(!bytes::is_mounted(&cluster.mnt("a")), "a stopped daemon leaves no mount");
    cluster.restart("a");
    until("the owner serves its image", secs(10), || {
        cluster.image("a", "x").filter(|i| i.role == "owner" && i.state == "ok")
    });
    cluster.assert_copies_identical("x");
}

#[test]
fn json_output_keeps_its_contract() {
    let cluster = Cluster::start("json");
    std::fs::write(cluster.file("a", "x"), bytes::noise(8, 100_000)).unwrap();
    std::fs::File::open(cluster.file("a", "x")).unwrap().sync_all().unwrap();
    cluster.wait_in_sync("x");
    let status = cluster.status("a");
    assert_eq!(status.host, "a");
    assert_eq!(status.mount.as_deref(), cluster.mnt("a").to_str());
    let image = status.image("x").unwrap();
    assert_eq!((image.size, image.role.as_str(), image.state.as_str()), (100_000, "owner", "ok"));
    assert_eq!(image.owner.as_deref(), Some("a"));
    assert!(image.flushed_seq <= image.seq && image.flushed_seq > 0);
    let members: Vec<_> = image.members.iter().map(|m| m.host.as_str()).collect();
    assert_eq!(members.len(), 3, "{members:?}");
    for member in &image.members {
        assert_eq!((member.state.as_str(), member.lag_bytes), ("in-sync", 0), "{member:?}");
        assert!(member.durable_seq <= member.seq);
    }
    assert_eq!(cluster.image("b", "x").unwrap().role, "replica");
    for args in [&["ls", "--json"][..], &["info", "x", "--json"]] {
        let said = cluster.vmfs("a", args).ok();
        let json: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        assert!(json.to_string().contains(&image.id), "{said}");
    }
    // For people: a table without control characters when it is piped.
    for args in
        [&["status"][..], &["ls"], &["info", "x"], &["host", "list"], &["policy", "show", "x"], &["forks"]]
    {
        let said = cluster.vmfs("a", args).ok();
        assert!(!said.stdout.contains('\u{1b}') && !said.stdout.contains('\r'), "{said}");
    }
    let _ = cluster.vmfs("a", &["policy", "set", "x", "--acks", "all"]).ok();
    assert!(cluster.vmfs("a", &["policy", "show", "x"]).ok().stdout.contains("all"));
    let waited = cluster.vmfs("a", &["wait", "x", "--in-sync", "--timeout", "20"]).ok();
    assert!(waited.took < Duration::from_secs(20));
}
