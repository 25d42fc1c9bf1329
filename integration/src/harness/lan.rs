//! Hosts in network namespaces of their own, with a network between them that can be slow, lossy, narrow or
//! cut in one direction.
//!
//! Every namespace has one TUN device. What a host sends is delayed by a relay in this process, which hands
//! it to the device of the host that it is addressed to; loss and cuts are nftables rules in the sender's
//! namespace, and rates are a token bucket (`tc tbf`) on its device: the kernel's own tools, where it has
//! them (network emulation is not built into every kernel).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::command::{bash, run};
use super::reaper::Reaper;

/// The device in every namespace.
const DEVICE: &str = "lan0";
/// Largest packet; 1500 is what networks have.
const MTU_BYTES: usize = 1500;
/// Bytes on their way from one host to another beyond which the relay drops.
const QUEUE_BYTES_MAX: u64 = 16 << 20;
/// The UDP port of every daemon.
const PORT: u16 = 4410;

/// What is between two hosts, in one direction.
#[derive(Debug, Default)]
struct Wire {
    delay_us: AtomicU64,
    queued_bytes: AtomicU64,
    dropped: AtomicU64,
}

/// What nftables does to packets from one host to another.
#[derive(Debug, Clone, Copy, Default)]
struct Rule {
    loss_permille: u32,
    cut: bool,
}

/// The network of some hosts; gone with its [`Reaper`].
#[derive(Debug)]
pub struct Lan {
    hosts: Vec<String>,
    /// Of the namespaces.
    prefix: String,
    wires: BTreeMap<(usize, usize), Arc<Wire>>,
    rules: BTreeMap<(usize, usize), Rule>,
    ended: Arc<AtomicBool>,
}

impl Lan {
    /// Makes the namespaces and connects them, without delay or loss.
    #[must_use]
    pub fn new(reaper: &mut Reaper, hosts: &[String]) -> Self {
        let unique = reaper.dir().file_name().expect("invariant: the reaper's directory has a name");
        let prefix = unique.to_string_lossy().into_owned();
        let mut lan = Self {
            hosts: hosts.to_vec(),
            prefix,
            wires: BTreeMap::new(),
            rules: BTreeMap::new(),
            ended: Arc::default(),
        };
        let mut devices = Vec::new();
        for (i, host) in hosts.iter().enumerate() {
            let name = lan.namespace(host);
            run("ip", ["netns", "add", &name]);
            reaper.at_end(&format!("ip netns del {name}"));
            run("ip", ["-n", &name, "link", "set", "lo", "up"]);
            devices.push(open_device(Path::new("/run/netns").join(&name).as_path()));
            let address = format!("{}/24", address(i));
            run("ip", ["-n", &name, "addr", "add", &address, "dev", DEVICE]);
            let mtu = MTU_BYTES.to_string();
            run("ip", ["-n", &name, "link", "set", DEVICE, "mtu", &mtu, "txqueuelen", "1000", "up"]);
        }
        lan.connect(&devices);
        lan
    }

    /// Starts the relay: a thread that reads for every host, and one that writes for every pair.
    fn connect(&mut self, devices: &[File]) {
        for (from, device) in devices.iter().enumerate() {
            let mut lines = BTreeMap::new();
            for to in (0..devices.len()).filter(|&to| to != from) {
                let wire = Arc::new(Wire::default());
                self.wires.insert((from, to), Arc::clone(&wire));
                let (send, receive) = channel();
                let out = devices[to].try_clone().expect("a device can be shared");
                let carried = Arc::clone(&wire);
                std::thread::spawn(move || carry(&receive, out, &carried));
                lines.insert(to, (wire, send));
            }
            let device = device.try_clone().expect("a device can be shared");
            let ended = Arc::clone(&self.ended);
            std::thread::spawn(move || read_packets(device, &lines, &ended));
        }
    }

    fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn number(&self, host: &str) -> usize {
        self.hosts.iter().position(|h| h == host).unwrap_or_else(|| panic!("no host {host} in this network"))
    }

    /// Address and port of `host`'s daemon.
    #[must_use]
    pub fn listen(&self, host: &str) -> String {
        format!("{}:{PORT}", address(self.number(host)))
    }

    /// The words that run a command in `host`'s namespace (its mounts stay those of the test).
    #[must_use]
    pub fn launcher(&self, host: &str) -> Vec<String> {
        vec!["nsenter".into(), format!("--net=/run/netns/{}", self.namespace(host))]
    }

    /// How long every packet takes from now on; packets never overtake each other.
    pub fn set_delay(&self, delay: Duration) {
        let us = u64::try_from(delay.as_micros()).expect("no delay is that long");
        for wire in self.wires.values() {
            wire.delay_us.store(us, Ordering::Relaxed);
        }
    }

    /// Loses `permille` of a thousand packets, at random, in every direction.
    pub fn set_loss(&mut self, permille: u32) {
        for pair in self.wires.keys() {
            self.rules.entry(*pair).or_default().loss_permille = permille;
        }
        self.apply_rules();
    }

    /// Drops everything from `from` to `to`; the other direction stays as it is.
    pub fn cut(&mut self, from: &str, to: &str) {
        let pair = (self.number(from), self.number(to));
        self.rules.entry(pair).or_default().cut = true;
        self.apply_rules();
    }

    /// Drops everything from and to `host`.
    pub fn isolate(&mut self, host: &str) {
        let number = self.number(host);
        for pair in self.wires.keys().filter(|(from, to)| *from == number || *to == number) {
            self.rules.entry(*pair).or_default().cut = true;
        }
        self.apply_rules();
    }

    /// Lets everything through again, at once and at any rate.
    pub fn heal(&mut self) {
        self.rules.clear();
        self.apply_rules();
        self.set_delay(Duration::ZERO);
        self.set_rate(None);
    }

    /// Limits what every host sends to `mbit` megabits a second.
    pub fn set_rate(&self, mbit: Option<u32>) {
        for host in &self.hosts {
            let name = self.namespace(host);
            // There may be none to remove.
            bash(r#"tc -n "$1" qdisc del dev "$2" root 2>/dev/null || true"#, [&name, DEVICE]);
            if let Some(mbit) = mbit {
                let rate = format!("{mbit}mbit");
                let args = ["root", "tbf", "rate", &rate, "burst", "32kb", "latency", "100ms"];
                run("tc", ["-n", &name, "qdisc", "add", "dev", DEVICE].into_iter().chain(args));
            }
        }
    }

    /// Packets that the relay dropped because too many were on their way.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.wires.values().map(|w| w.dropped.load(Ordering::Relaxed)).sum()
    }

    fn apply_rules(&self) {
        for (i, host) in self.hosts.iter().enumerate() {
            let mut text = String::from("add table inet lan\ndelete table inet lan\ntable inet lan {\n");
            text += " chain out { type filter hook output priority 0;\n";
            for ((_, to), rule) in self.rules.iter().filter(|((from, _), _)| *from == i) {
                let to = address(*to);
                if rule.cut {
                    text += &format!("  ip daddr {to} drop\n");
                } else if rule.loss_permille > 0 {
                    text +=
                        &format!("  ip daddr {to} numgen random mod 1000 < {} drop\n", rule.loss_permille);
                }
            }
            text += " }\n}\n";
            bash(r#"ip netns exec "$1" nft -f - <<<"$2""#, [&self.namespace(host), &text]);
        }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        // The threads end with the devices, which end with the namespaces.
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn address(number: usize) -> String {
    format!("10.77.0.{}", number + 1)
}

/// A new TUN device in the namespace `path`.
fn open_device(path: &Path) -> File {
    let path = path.to_owned();
    // A thread of its own: it does not come back from that namespace.
    let opened = std::thread::spawn(move || {
        let namespace = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let device = File::options().read(true).write(true).open("/dev/net/tun");
        let device = device.unwrap_or_else(|e| panic!("/dev/net/tun: {e}"));
        // `struct ifreq`: a name of 16 bytes, then the flags.
        let mut request = [0_u8; 40];
        request[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
        let flags =
            u16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).expect("invariant: the flags have 16 bits");
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `struct ifreq`, for which
        // `request` has room.
        let made = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert!(made == 0, "TUN device in {}: {}", path.display(), std::io::Error::last_os_error());
        device
    });
    opened.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
}

type Packet = (Instant, Vec<u8>);

/// Gives what one host sends to the wire that it is addressed to.
fn read_packets(mut device: File, lines: &BTreeMap<usize, (Arc<Wire>, Sender<Packet>)>, ended: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match device.read(&mut buffer) {
            Ok(n) => n,
            // The namespace is gone, or about to go.
            Err(_) if ended.load(Ordering::Relaxed) => return,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let packet = &buffer[..n];
        // IPv4 with a destination in the network; everything else (IPv6 router solicitations) is noise.
        if n < 20 || packet[0] >> 4 != 4 || packet[16..19] != [10, 77, 0] {
            continue;
        }
        let Some((wire, line)) = usize::from(packet[19]).checked_sub(1).and_then(|to| lines.get(&to)) else {
            continue;
        };
        if wire.queued_bytes.load(Ordering::Relaxed) > QUEUE_BYTES_MAX {
            wire.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        wire.queued_bytes.fetch_add(n as u64, Ordering::Relaxed);
        let due = Instant::now() + Duration::from_micros(wire.delay_us.load(Ordering::Relaxed));
        if line.send((due, packet.to_vec())).is_err() {
            return;
        }
    }
}

/// Delivers the packets of one wire when they are due.
fn carry(packets: &Receiver<Packet>, mut device: File, wire: &Wire) {
    // Else sleeps end 50 us late.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    for (due, packet) in packets {
        let now = Instant::now();
        if due > now {
            std::thread::sleep(due - now);
        }
        wire.queued_bytes.fetch_sub(packet.len() as u64, Ordering::Relaxed);
        // A device that is down loses packets, as any does.
        let _ = device.write(&packet);
    }
}
