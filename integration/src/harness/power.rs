//! A cluster whose hosts can lose their power: under every store is a disk of [`crate::power`].

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use rustix::process::Signal;

use super::cluster::{Cluster, is_alive, signal};
use super::command::wait_within;
use super::wait::{secs, until_true};

/// Calls of a store that change something, up to which a cut armed by [`PoweredCluster::arm`] waits.
const CALLS_MAX: u64 = 400;

/// The process that serves one disk.
#[derive(Debug)]
struct Disk {
    child: Child,
    pipes: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
}

impl Disk {
    fn start(point: &Path, backing: &Path) -> Self {
        std::fs::create_dir(backing).expect("the scratch directory is ours");
        let mut command = Command::new(program());
        command.arg(point).arg(backing).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        let (send, receive) = (child.stdin.take(), child.stdout.take());
        let pipes = send.zip(receive.map(BufReader::new));
        let disk = Self { child, pipes: Mutex::new(pipes) };
        assert_eq!(disk.answer(), "mounted");
        disk
    }

    fn answer(&self) -> String {
        let mut pipes = self.pipes.lock().expect("invariant: nobody panics with the lock");
        read_line(&mut pipes.as_mut().expect("invariant: open until it is dropped").1)
    }

    fn call(&self, command: &str) -> String {
        let mut pipes = self.pipes.lock().expect("invariant: nobody panics with the lock");
        let (send, receive) = pipes.as_mut().expect("invariant: open until it is dropped");
        // Without it there is no answer either, and that says so.
        let _ = writeln!(send, "{command}");
        read_line(receive)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It ends with its input.
        if let Ok(mut pipes) = self.pipes.lock() {
            pipes.take();
        }
        if wait_within(&mut self.child, secs(10)).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// One answer; empty when the process has ended.
fn read_line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    // An error leaves the line empty, which no command answers.
    let _ = from.read_line(&mut line);
    line.trim_end().to_owned()
}

/// The program of the crate's `src/bin/power_disk.rs`, which cargo builds with the tests.
fn program() -> PathBuf {
    let test = std::env::current_exe().expect("a process knows its program");
    let built = test.ancestors().skip(1).take(2).map(|dir| dir.join("power_disk")).find(|p| p.exists());
    built.unwrap_or_else(|| panic!("no power_disk near {}: build the crate's binaries", test.display()))
}

/// A cluster of `vmfs up` whose stores are on disks with a power switch.
#[derive(Debug)]
pub struct PoweredCluster {
    /// The cluster. First: what runs in it ends before its disks do.
    pub cluster: Cluster,
    disks: BTreeMap<String, Disk>,
}

impl PoweredCluster {
    /// Three hosts: a, b and c.
    #[must_use]
    pub fn start(name: &str) -> Self {
        let mut cluster = Cluster::start(name);
        cluster.down();
        let mut disks = BTreeMap::new();
        for host in cluster.hosts() {
            let backing = cluster.scratch().join(format!("{host}.backing"));
            disks.insert(host.to_owned(), Disk::start(&cluster.store(host), &backing));
        }
        let _ = cluster.up();
        Self { cluster, disks }
    }

    /// Has `host`'s disk freeze by itself at a random one of its next calls: between two writes, before a
    /// sync or in the middle of a row of names.
    pub fn arm(&self, host: &str, rng: &mut StdRng) {
        // Few calls pass between two flushes: small numbers meet the interesting places.
        let limit = if rng.random() { CALLS_MAX } else { 16 };
        let calls = rng.random_range(0..limit);
        assert_eq!(self.disks[host].call(&format!("freeze-after {calls}")), "done");
    }

    /// Waits until the disk that was armed has frozen.
    pub fn wait_frozen(&self, host: &str, limit: Duration) {
        until_true(&format!("{host}'s store makes calls"), limit, || {
            self.disks[host].call("is-frozen") == "yes"
        });
    }

    /// Cuts the power of `hosts`, all at once: their disks freeze (unless they did so already), their
    /// daemons are killed, and what was not synced is lost as the seeds drawn from `rng` decide. Says what
    /// was at stake.
    pub fn cut(&self, hosts: &[&str], rng: &mut StdRng) {
        for host in hosts {
            assert_eq!(self.disks[*host].call("freeze"), "done");
        }
        let pids: Vec<u32> = hosts.iter().map(|host| self.cluster.pid(host)).collect();
        for &pid in &pids {
            signal(pid, Signal::KILL);
        }
        // A killed process ends when the calls that it waits for are answered.
        for host in hosts {
            assert_eq!(self.disks[*host].call("fail-waiting"), "done");
        }
        for pid in pids {
            until_true("the killed daemon is gone", secs(20), || !is_alive(pid));
        }
        for host in hosts {
            let said = self.disks[*host].call(&format!("cut {}", rng.random::<u64>()));
            println!("{host} lost its power: {said}");
            assert!(said.contains("not synced"), "{host}'s disk cannot be cut: {said}");
        }
    }
}

impl Drop for PoweredCluster {
    fn drop(&mut self) {
        // A test that failed in the middle of a cut leaves daemons behind that wait for an answer.
        for disk in self.disks.values() {
            disk.call("fail-waiting");
        }
    }
}
