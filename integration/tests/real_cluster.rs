//! A datastore made by hand: two hosts and a witness, enrolled with invitations, run as services.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use integration::harness::cluster::{is_alive, signal, vmfs_binary};
use integration::harness::command::{Ran, bash, try_run};
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, until_true};
use rustix::process::Signal;

/// Runs `vmfs` without a daemon.
fn vmfs(args: &[&str]) -> Ran {
    let mut command = std::process::Command::new(vmfs_binary());
    command.args(args);
    try_run(command)
}

/// The options that put a host's files where the harness looks for them.
fn place(dir: &Path, port: u16, with_mount: bool) -> Vec<String> {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let address = format!("127.0.0.1:{port}");
    let mut words = vec!["--address".into(), address.clone(), "--listen".into(), address];
    for (option, name) in [("--config", "vmfs.toml"), ("--identity", "identity"), ("--store", "store")] {
        words.extend([option.into(), path(name)]);
    }
    if with_mount {
        std::fs::create_dir_all(dir.join("mnt")).unwrap();
        words.extend(["--mount".into(), path("mnt")]);
    }
    words
}

/// Several hosts on one machine need a control socket and a pid file each.
fn give_own_control(dir: &Path) {
    let path = dir.join("vmfs.toml");
    let mut config: toml::Table = toml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let control =
        config.entry("control").or_insert_with(|| toml::Table::new().into()).as_table_mut().unwrap();
    control.insert("socket".into(), dir.join("vmfs.sock").to_str().unwrap().into());
    control.insert("pid_file".into(), dir.join("vmfs.pid").to_str().unwrap().into());
    std::fs::write(&path, toml::to_string(&config).unwrap()).unwrap();
}

/// The rule of `examples/two-hosts-and-witness`: who holds the data beside this host, and who votes.
fn give_policy(dir: &Path, other: &str) {
    let path = dir.join("vmfs.toml");
    let mut text = std::fs::read_to_string(&path).unwrap();
    text += &format!(
        "\n[[policy]]\npattern = \"**\"\nreplicas = [\"{other}\"]\nwitnesses = [\"w\"]\n\
         acks = \"majority\"\non_quorum_loss = \"degrade\"\n"
    );
    std::fs::write(&path, text).unwrap();
}

/// Hosts a and b with mounts, w as a witness, all running.
fn two_hosts_and_a_witness(name: &str) -> Cluster {
    let mut cluster = Cluster::empty(name, &["a", "b", "w"], &["w"], true);
    let dir = |host: &str| cluster.dir().join(host);
    let (a, b, w) = (dir("a"), dir("b"), dir("w"));
    for dir in [&a, &b, &w] {
        std::fs::create_dir_all(dir).unwrap();
    }
    let words = place(&a, 4410, true);
    let mut args = vec!["datastore", "init", "--host", "a"];
    args.extend(words.iter().map(String::as_str));
    let _ = vmfs(&args).ok();
    give_own_control(&a);
    give_policy(&a, "b");
    // A second datastore must not overwrite the first one's CA.
    let _ = vmfs(&args).refused(1);
    cluster.run_daemon("a", "vmfs-fuse");

    for (host, dir, port, program) in [("b", &b, 4411, "vmfs-fuse"), ("w", &w, 4412, "vmfs-replica")] {
        let invitation = dir.join("invitation");
        let invitation = invitation.to_str().unwrap();
        let _ = cluster.vmfs("a", &["host", "invite", host, "--output", invitation]).ok();
        let mode = std::fs::metadata(invitation).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "an invitation is a secret");
        let words = place(dir, port, host == "b");
        let mut args = cluster.network().launcher();
        args.push(vmfs_binary().to_str().unwrap().to_owned());
        args.extend(["host", "join", invitation].map(str::to_owned));
        args.extend(words);
        if host == "w" {
            args.push("--witness".into());
        }
        let mut join = std::process::Command::new(&args[0]);
        join.args(&args[1..]);
        let _ = try_run(join).ok();
        give_own_control(dir);
        if host == "b" {
            give_policy(dir, "a");
        }
        cluster.run_daemon(host, program);

        // Single use: the same invitation makes no second host.
        let elsewhere = cluster.scratch().join(format!("again-{host}"));
        std::fs::create_dir_all(&elsewhere).unwrap();
        let mut again = std::process::Command::new(&args[0]);
        let head = args.iter().position(|w| w == invitation).unwrap();
        again.args(&args[1..=head]).args(place(&elsewhere, port + 10, false));
        let _ = try_run(again).refused(1);
        assert!(!elsewhere.join("identity/host.crt").exists());
    }
    cluster
}

/// Promotes on b, whose only other copy has just gone, and uses the image: no lease is waited for.
fn take_over_at_once(cluster: &Cluster) {
    let start = Instant::now();
    let said = cluster.vmfs("b", &["promote", "disk.raw"]).ok();
    let promoted = start.elapsed();
    let file = std::fs::File::options().write(true).open(cluster.file("b", "disk.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 4096], 16 << 20).unwrap();
    file.sync_all().unwrap();
    let flushed = start.elapsed();
    println!("{promoted:?}, with a flush {flushed:?}: {}", said.stdout.trim());
    assert!(promoted < secs(1), "promotion took {promoted:?}");
    assert!(flushed < secs(1) + promoted, "the first flush was over after {flushed:?}");
    assert!(said.stdout.contains("nothing acknowledged is missing"), "{said}");
    assert!(said.stdout.contains("not connected: a"), "the lack of a copy is said: {said}");
    assert_eq!(cluster.image("b", "disk.raw").unwrap().state, "degraded");
}

#[test]
fn a_silent_death_of_the_owner_costs_no_lease_either() {
    let cluster = two_hosts_and_a_witness("silent");
    let file = std::fs::File::create_new(cluster.file("a", "disk.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes::noise(1, 1 << 20), 0).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync("disk.raw");
    // Not a packet from it or to it any more, and nobody has been told.
    cluster.network().cut(cluster.pid("a"));
    take_over_at_once(&cluster);
    cluster.network().heal();
    drop(file);
    until_true("a follows", secs(30), || cluster.image("a", "disk.raw").is_some_and(|i| i.role == "replica"));
    cluster.assert_copies_identical("disk.raw");
}

#[test]
fn with_stall_a_survivor_says_that_flushes_wait_for_a_second_copy() {
    let cluster = two_hosts_and_a_witness("stall");
    let file = std::fs::File::create_new(cluster.file("a", "disk.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes::noise(1, 1 << 20), 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    cluster.wait_in_sync("disk.raw");
    let _ = cluster.vmfs("a", &["policy", "set", "disk.raw", "--on-quorum-loss", "stall"]).ok();
    cluster.wait_in_sync("disk.raw");
    cluster.kill9("a");
    let start = Instant::now();
    let said = cluster.vmfs("b", &["promote", "disk.raw"]).ok();
    assert!(start.elapsed() < secs(1), "promotion took {:?}", start.elapsed());
    let waits = "flushes wait for one more copy of the data; not connected: a";
    assert!(said.stdout.contains(waits), "{said}");
    let image = cluster.image("b", "disk.raw").unwrap();
    assert_eq!(image.state, "stalled");
    let status = cluster.vmfs("b", &["status"]).ok().stdout;
    assert!(status.contains("stalled") && status.contains(waits), "{status}");
    // Reading and writing go on; a flush waits, and is over when the copy is back.
    let file = std::fs::File::options().read(true).write(true).open(cluster.file("b", "disk.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 4096], 0).unwrap();
    let flush = std::thread::spawn(move || file.sync_all());
    std::thread::sleep(secs(4));
    assert!(!flush.is_finished(), "nothing is acknowledged with one copy");
    cluster.restart("a");
    flush.join().unwrap().unwrap();
    cluster.assert_copies_identical("disk.raw");
    assert_eq!(cluster.image("b", "disk.raw").unwrap().state, "ok");
}

#[test]
fn two_hosts_and_a_witness_survive_the_owner() {
    let cluster = two_hosts_and_a_witness("twoplus");
    let hosts = cluster.vmfs("a", &["host", "list"]).ok().stdout;
    for host in ["a", "b", "w"] {
        assert!(hosts.lines().any(|l| l.split_whitespace().any(|word| word == host)), "{host}:\n{hosts}");
    }
    // Private keys never travel, and are nobody else's to read.
    let keys = bash("find \"$1\" -name '*.key' -printf '%m\\n' | sort -u", [cluster.dir()]).stdout;
    assert_eq!(keys.trim(), "600");
    let count =
        bash("find \"$1\" -name host.key -exec sha256sum {} + | sort -u -k1,1 | wc -l", [cluster.dir()]);
    assert_eq!(count.stdout.trim(), "3", "each host has a key of its own");

    let content = bytes::noise(1, 4 << 20);
    let file = std::fs::File::create_new(cluster.file("a", "disk.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    cluster.assert_copies_identical("disk.raw");
    let image = cluster.image("a", "disk.raw").unwrap();
    let mut roles: Vec<_> = image.members.iter().map(|m| (m.host.as_str(), m.role.as_str())).collect();
    roles.sort_unstable();
    assert_eq!(roles, [("a", "owner"), ("b", "replica"), ("w", "witness")]);
    assert_eq!(cluster.image("w", "disk.raw").unwrap().role, "witness");

    cluster.kill9("a");
    take_over_at_once(&cluster);
    assert_eq!(std::fs::read(cluster.file("b", "disk.raw")).unwrap()[..content.len()], content);
    // A witness holds no data: with it alone nobody can become owner.
    let _ = cluster.vmfs("w", &["promote", "disk.raw"]).refused(1);
    cluster.restart("a");
    cluster.assert_copies_identical("disk.raw");

    // Clean stop on SIGTERM, of either kind of daemon.
    for host in ["w", "b"] {
        let pid = cluster.pid(host);
        signal(pid, Signal::TERM);
        until_true("the daemon has stopped", secs(10), || !is_alive(pid));
        assert!(!cluster.socket(host).exists() && !bytes::is_mounted(&cluster.mnt(host)));
    }
}

#[test]
fn members_are_replaced_while_the_image_is_in_use() {
    let cluster = two_hosts_and_a_witness("members");
    let file = std::fs::File::create_new(cluster.file("a", "disk.raw")).unwrap();
    let write = |seed: u64| {
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes::noise(seed, 1 << 20), (seed % 8) << 20)
            .and_then(|()| file.sync_all())
            .unwrap();
    };
    write(1);
    cluster.wait_in_sync("disk.raw");
    for round in 0..3 {
        let _ = cluster.vmfs("a", &["replica", "remove", "disk.raw", "w"]).ok();
        write(2 + round);
        let _ = cluster.vmfs("a", &["replica", "remove", "disk.raw", "b"]).ok();
        write(12 + round);
        let _ = cluster.vmfs("a", &["replica", "add", "disk.raw", "b"]).ok();
        write(22 + round);
        let _ = cluster.vmfs("a", &["replica", "add", "disk.raw", "w", "--witness"]).ok();
        write(32 + round);
    }
    cluster.assert_copies_identical("disk.raw");
    let image = cluster.image("a", "disk.raw").unwrap();
    assert_eq!(image.members.len(), 3);
}
