//! The network: one connection at a time per pair of hosts, in order in each direction, that is lost as
//! a whole. Either direction can be cut or slow; a connection that hears nothing for a while dies, at
//! each end by itself; a new one replaces the old at either end.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use super::At;

/// Microseconds of virtual time.
pub(crate) type Us = u64;

/// What travels.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// An encoded control message.
    Control(Rc<[u8]>),
    /// An update frame: header bytes and payload.
    Update(Rc<[u8]>, Rc<[u8]>),
    /// A ping; echoes the time of the last one received.
    Beat { sent: Us, echo: Option<Us> },
    /// The other end has given the connection up.
    Close,
}

impl Packet {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Control(b) => b.len() as u64 + 40,
            Self::Update(h, p) => (h.len() + p.len()) as u64 + 40,
            Self::Beat { .. } | Self::Close => 60,
        }
    }
}

/// One direction of a pair.
#[derive(Debug)]
pub(crate) struct Direction {
    pub(crate) open: bool,
    pub(crate) delay: Us,
    /// Bytes per millisecond; 0: unlimited.
    pub(crate) rate: u64,
    /// When the last packet sent will arrive.
    last_due: Us,
    /// Waiting for the direction to open, with their connections.
    pub(crate) held: VecDeque<(u64, Packet)>,
    /// The receiver's connection, and since when.
    pub(crate) session: Option<u64>,
    pub(crate) up_due: Us,
    /// When the receiver last heard anything.
    pub(crate) heard: Us,
    /// The receiver's last ping received.
    pub(crate) echo: Option<Us>,
}

impl Direction {
    fn new(delay: Us) -> Self {
        Self {
            open: true,
            delay,
            rate: 0,
            last_due: 0,
            held: VecDeque::new(),
            session: None,
            up_due: 0,
            heard: 0,
            echo: None,
        }
    }
    /// When a packet sent now arrives, after everything sent before.
    pub(crate) fn due(&mut self, now: Us, jitter: Us, bytes: u64) -> Us {
        let wire = (bytes * 1000).checked_div(self.rate).unwrap_or(0);
        let due = (now + self.delay + jitter).max(self.last_due + wire + 1).max(self.up_due + 1);
        self.last_due = due;
        due
    }
}

/// All directions, by (from, to).
#[derive(Debug, Default)]
pub(crate) struct Net {
    ways: BTreeMap<(At, At), Direction>,
    next_session: u64,
}

impl Net {
    /// One more host.
    pub(crate) fn add(&mut self, at: At, delays: impl Iterator<Item = Us>) {
        for (other, delay) in (0..at).zip(delays) {
            self.ways.insert((at, other), Direction::new(delay));
            self.ways.insert((other, at), Direction::new(delay));
        }
    }
    pub(crate) fn way(&mut self, from: At, to: At) -> &mut Direction {
        self.ways.get_mut(&(from, to)).expect("invariant: two directions for each pair of hosts")
    }
    /// The connection that `at` has to `peer`.
    pub(crate) fn session(&self, at: At, peer: At) -> Option<u64> {
        self.ways.get(&(peer, at)).and_then(|w| w.session)
    }
    pub(crate) fn is_open(&self, from: At, to: At) -> bool {
        self.ways.get(&(from, to)).is_some_and(|w| w.open)
    }
    pub(crate) fn new_session(&mut self) -> u64 {
        self.next_session += 1;
        self.next_session
    }
}
