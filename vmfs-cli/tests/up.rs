//! `vmfs up` and `vmfs down` with real daemons. Needs root and `/dev/fuse`.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const VMFS: &str = env!("CARGO_BIN_EXE_vmfs");

/// A cluster directory; stopped and removed at the end, whatever happened.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount: run them as root");
        // Short: there are Unix sockets below it.
        Self(tempfile::Builder::new().prefix("vmfs-up").tempdir().unwrap())
    }
    fn dir(&self) -> PathBuf {
        self.0.path().join("vs")
    }
    fn vmfs(&self, args: &[&str]) -> Output {
        Command::new(VMFS).args(args).current_dir(self.0.path()).env_remove("VMFS_SOCKET").output().unwrap()
    }
    /// Succeeds and gives what was said.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.vmfs(args);
        assert!(output.status.success(), "{args:?}: {output:?}\n{}", self.logs());
        String::from_utf8(output.stdout).unwrap()
    }
    /// Fails with exit code 1 and one line, which it gives.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.vmfs(args);
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    }
    fn front(&self) -> Child {
        let out = std::fs::File::create(self.0.path().join("front.log")).unwrap();
        let mut command = Command::new(VMFS);
        command.args(["up", "vs", "--hosts", "2"]).current_dir(self.0.path());
        let child = command.stdout(out).stderr(Stdio::piped()).spawn().unwrap();
        eventually("the hosts are ready", || self.said_in_front().contains("hosts are ready"));
        child
    }
    fn said_in_front(&self) -> String {
        std::fs::read_to_string(self.0.path().join("front.log")).unwrap_or_default()
    }
    fn pid(&self, host: &str) -> Option<u32> {
        vmfs_replica::pid_file::running(&self.dir().join(host).join("vmfs.pid")).unwrap()
    }
    fn kill(&self, host: &str) {
        signal(self.pid(host).unwrap(), Signal::KILL);
        eventually("the daemon is gone", || self.pid(host).is_none());
    }
    fn is_mounted(&self, host: &str) -> bool {
        let point = self.dir().join(host).join("mnt");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().any(|l| l.split(' ').nth(4) == point.to_str())
    }
    fn assert_nothing_left(&self) {
        for host in ["a", "b", "c"] {
            assert!(!self.is_mounted(host) && self.pid(host).is_none(), "{host}");
        }
    }
    fn logs(&self) -> String {
        let log = |h: &str| std::fs::read_to_string(self.dir().join(h).join("vmfs.log")).unwrap_or_default();
        ["a", "b", "c"].map(log).join("\n---\n")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.vmfs(&["down", "vs"]);
    }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn listen(dir: &Path, host: &str) -> std::net::SocketAddr {
    vmfs_replica::config_file::load(&dir.join(host).join("vmfs.toml")).unwrap().network.listen
}

#[test]
fn detached_cluster_comes_back_with_its_data() {
    let place = Place::new();
    let said = place.ok(&["up", "vs", "--detach"]);
    assert!(said.starts_with("3 hosts are ready in "), "{said}");
    let file = place.dir().join("a/mnt/x.img");
    std::fs::write(&file, vec![7; 10_000]).unwrap();
    std::fs::File::open(&file).unwrap().sync_all().unwrap();
    let again = place.refused(&["up", "vs", "--detach"]);
    assert!(again.contains("is up already"), "{again}");
    assert!(place.refused(&["up", "vs", "--detach", "--hosts", "2"]).contains("has 3 hosts, not 2"));
    assert_eq!(place.ok(&["down", "vs"]), "stopped a, b, c\n");
    place.assert_nothing_left();
    assert_eq!(place.ok(&["down", "vs"]), "nothing was running\n");
    place.ok(&["up", "vs", "--detach"]);
    assert_eq!(std::fs::read(&file).unwrap(), vec![7; 10_000]);
    place.ok(&["down", "vs"]);
}

#[test]
fn killed_hosts_leave_nothing_behind_and_are_started_again() {
    let place = Place::new();
    place.ok(&["up", "vs", "--detach"]);
    let b = place.pid("b");
    place.kill("a");
    assert!(place.is_mounted("a"), "a killed daemon leaves a dead mount");
    place.ok(&["up", "vs", "--detach"]);
    assert!(place.pid("a").is_some() && place.is_mounted("a"));
    assert_eq!(place.pid("b"), b, "the others go on");
    place.kill("a");
    place.kill("c");
    assert_eq!(place.ok(&["down", "vs"]), "stopped b\n");
    place.assert_nothing_left();
}

#[test]
fn hosts_killed_a_moment_ago_are_not_taken_for_running() {
    let place = Place::new();
    place.ok(&["up", "vs", "--detach"]);
    // Something to take apart when it dies.
    std::fs::write(place.dir().join("a/mnt/x.img"), vec![7; 32 << 20]).unwrap();
    let ports = ["a", "b", "c"].map(|h| listen(&place.dir(), h));
    for round in 0..4 {
        let hosts: &[&str] = if round % 2 == 0 { &["a"] } else { &["a", "b", "c"] };
        let killed: Vec<u32> = hosts.iter().map(|h| place.pid(h).unwrap()).collect();
        killed.iter().for_each(|pid| signal(*pid, Signal::KILL));
        // At once: no waiting here.
        place.ok(&["up", "vs", "--detach"]);
        for (host, old) in hosts.iter().zip(killed) {
            assert!(place.pid(host).is_some_and(|new| new != old) && place.is_mounted(host), "{host}");
        }
        assert_eq!(
            ["a", "b", "c"].map(|h| listen(&place.dir(), h)),
            ports,
            "a dying daemon's port is its own"
        );
    }
    signal(place.pid("b").unwrap(), Signal::KILL);
    place.ok(&["down", "vs"]);
    place.assert_nothing_left();
}

#[test]
fn launcher_killed_a_moment_ago_is_not_taken_for_running() {
    let place = Place::new();
    let mut front = place.front();
    for host in ["a", "b"] {
        signal(place.pid(host).unwrap(), Signal::KILL);
    }
    signal(front.id(), Signal::KILL);
    let mut second = place.front();
    front.wait().unwrap();
    for host in ["a", "b"] {
        assert!(place.pid(host).is_some() && place.is_mounted(host), "{host}");
    }
    signal(second.id(), Signal::INT);
    assert_eq!(second.wait().unwrap().code(), Some(0));
    place.assert_nothing_left();
}

#[test]
fn launcher_in_front_stops_on_interrupt_and_for_down() {
    let place = Place::new();
    let mut front = place.front();
    let second = place.refused(&["up", "vs"]);
    assert!(second.contains(&format!("another vmfs up (process {})", front.id())), "{second}");
    signal(front.id(), Signal::INT);
    assert_eq!(front.wait().unwrap().code(), Some(0));
    place.assert_nothing_left();
    let mut front = place.front();
    place.kill("b");
    eventually("the death is shown", || place.said_in_front().contains("host b: not running (signal: 9"));
    assert_eq!(place.ok(&["down", "vs"]), "stopped vmfs up and its hosts\n");
    assert_eq!(front.wait().unwrap().code(), Some(0));
    place.assert_nothing_left();
}

#[test]
fn interrupt_at_any_moment_of_the_start_leaves_no_daemon() {
    let place = Place::new();
    for delay_ms in [0, 2, 5, 10, 20, 40, 80, 160, 320] {
        let mut command = Command::new(VMFS);
        command.args(["up", "vs", "--hosts", "3"]).current_dir(place.0.path());
        let mut up = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        signal(up.id(), Signal::INT);
        // By the signal itself when it had not got far enough to handle it.
        up.wait().unwrap();
        let mark = format!("{}/", place.dir().display());
        let is_ours = |pid: &std::fs::DirEntry| {
            let line = std::fs::read(pid.path().join("cmdline")).unwrap_or_default();
            line.starts_with(b"vmfs-fuse") && String::from_utf8_lossy(&line).contains(&mark)
        };
        let left = std::fs::read_dir("/proc").unwrap().map(Result::unwrap).filter(is_ours).count();
        assert_eq!(left, 0, "daemons are left behind after {delay_ms} ms");
        place.assert_nothing_left();
    }
    place.ok(&["up", "vs", "--detach"]);
    place.ok(&["down", "vs"]);
}

#[test]
fn down_works_after_the_launcher_was_killed() {
    let place = Place::new();
    let mut front = place.front();
    signal(front.id(), Signal::KILL);
    front.wait().unwrap();
    assert!(place.pid("a").is_some(), "the hosts outlive it");
    assert_eq!(place.ok(&["down", "vs"]), "stopped a, b\n");
    place.assert_nothing_left();
}

#[test]
fn port_that_was_taken_meanwhile_is_replaced() {
    let place = Place::new();
    place.ok(&["up", "vs", "--detach", "--hosts", "2"]);
    place.ok(&["down", "vs"]);
    let ports = ["a", "b"].map(|h| listen(&place.dir(), h));
    // Both, so that neither host can learn the other's new address from its old one.
    let taken = ports.map(|p| UdpSocket::bind(p).unwrap());
    place.ok(&["up", "vs", "--detach"]);
    assert!(["a", "b"].iter().zip(ports).all(|(h, old)| listen(&place.dir(), h) != old));
    drop(taken);
    eventually("the hosts find each other", || {
        let status = place.ok(&["--socket", "vs/a/vmfs.sock", "status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["peers"][0]["connected"] == true
    });
    place.ok(&["down", "vs"]);
}

#[test]
fn host_that_cannot_start_is_named_and_the_others_are_stopped() {
    let place = Place::new();
    place.ok(&["up", "vs", "--detach", "--hosts", "2"]);
    place.ok(&["down", "vs"]);
    let config = place.dir().join("b/vmfs.toml");
    let good = std::fs::read_to_string(&config).unwrap();
    std::fs::write(place.dir().join("b/mnt/in-the-way"), "x").unwrap();
    let said = place.refused(&["up", "vs", "--detach"]);
    assert!(said.contains("host b ended while starting"), "{said}");
    place.assert_nothing_left();
    std::fs::remove_file(place.dir().join("b/mnt/in-the-way")).unwrap();
    std::fs::write(&config, format!("colour = 1\n{good}")).unwrap();
    let said = place.refused(&["up", "vs", "--detach"]);
    assert!(said.contains("b/vmfs.toml: line 1, column 1: unknown field `colour`"), "{said}");
    std::fs::write(&config, good).unwrap();
    place.ok(&["up", "vs", "--detach"]);
    place.ok(&["down", "vs"]);
}
