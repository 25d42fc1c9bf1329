//! Connections coming and going, packets and pings.

use vmfs_common::Millis;
use vmfs_proto::Input;

use super::At;
use super::broken::Broken;
use super::link::{Packet, Us};
use super::world::{Event, World};

impl World {
    /// Puts a packet on the wire; returns how long the sender is busy with it.
    pub(crate) fn send(&mut self, from: At, to: At, packet: Packet) -> Us {
        if self.hosts[from].liar {
            let packets = self.bent(from, to, packet);
            return packets.into_iter().map(|p| self.put_on_wire(from, to, p)).sum();
        }
        self.put_on_wire(from, to, packet)
    }

    fn put_on_wire(&mut self, from: At, to: At, mut packet: Packet) -> Us {
        if let Packet::Control(bytes) = &mut packet
            && self.breaks(Broken::MessageCutShort, 50)
        {
            *bytes = bytes[..bytes.len() - 1].into();
        }
        let Some(session) = self.net.session(from, to) else { return 0 };
        let jitter = self.rng.below(200);
        let now = self.now;
        let way = self.net.way(from, to);
        if !way.open {
            way.held.push_back((session, packet));
            return 50;
        }
        let bytes = packet.len();
        let due = way.due(now, jitter, bytes);
        let busy = (bytes * 1000).checked_div(way.rate).unwrap_or(bytes / 100);
        self.after(due - now, Event::Deliver { from, to, session, packet });
        busy
    }

    pub(crate) fn deliver(&mut self, from: At, to: At, session: u64, packet: Packet) {
        if self.net.session(to, from) != Some(session) || self.hosts[to].running.is_none() {
            return;
        }
        let now = self.now;
        self.net.way(from, to).heard = now;
        self.mix(packet.len());
        match packet {
            Packet::Close => self.side_down(to, from, session),
            Packet::Beat { sent, echo } => {
                self.net.way(from, to).echo = Some(sent);
                let peer = self.host_id(from);
                let host = &mut self.hosts[to];
                let (local, echoed) = (host.now(now), echo.map(|t| host.now(t)));
                if let Some(running) = &mut host.running {
                    let contact = running.contacts.entry(peer).or_default();
                    contact.heard = Some(local);
                    contact.confirmed = contact.confirmed.max(echoed);
                }
            }
            packet => {
                self.remember(from, to, &packet);
                if self.false_vote(from, to, &packet) {
                    return;
                }
                self.receive(from, to, &packet);
            }
        }
    }

    /// A host hears another one about the image now.
    pub(crate) fn heard(&mut self, from: At, to: At) {
        let (peer, wall) = (self.host_id(from), self.hosts[to].wall_skew_ns + self.now * 1000);
        let last = self.hosts[to].known.heard_ns.entry(peer).or_default();
        *last = wall.max(*last);
    }

    pub(crate) fn beat(&mut self, at: At) {
        let life = self.life(at);
        let pause = self.timing.lease_ms * 1000 / 4;
        self.after(pause, Event::Beat { at, life });
        for peer in 0..self.hosts.len() {
            if peer != at && self.net.session(at, peer).is_some() {
                let (sent, echo) = (self.now, self.net.way(peer, at).echo);
                self.send(at, peer, Packet::Beat { sent, echo });
            }
        }
    }

    pub(crate) fn side_up(&mut self, at: At, peer: At, session: u64) {
        if self.hosts[at].running.is_none() || self.net.way(peer, at).up_due != self.now {
            return;
        }
        if let Some(old) = self.net.session(at, peer) {
            self.side_down(at, peer, old);
        }
        let now = self.now;
        let way = self.net.way(peer, at);
        (way.session, way.heard, way.echo) = (Some(session), now, None);
        self.note(|| format!("{at} is connected to {peer}"));
        let (host, local) = (self.host_id(peer), Millis(self.hosts[at].now(now).0));
        if let Some(running) = &mut self.hosts[at].running {
            running.contacts.entry(host).or_default().heard = Some(local);
        }
        self.input(at, Input::PeerUp { host });
    }

    pub(crate) fn side_down(&mut self, at: At, peer: At, session: u64) {
        if self.net.session(at, peer) != Some(session) {
            return;
        }
        self.net.way(peer, at).session = None;
        self.note(|| format!("{at} has lost {peer}"));
        let host = self.host_id(peer);
        if let Some(copy) = self.hosts[at].copy_mut() {
            copy.lines.remove(&peer);
        }
        self.input(at, Input::PeerDown { host });
    }

    /// Every now and then: dead connections are given up, missing ones are made.
    pub(crate) fn network(&mut self) {
        self.after(50_000, Event::Network);
        for a in 0..self.hosts.len() {
            for b in 0..a {
                for (at, peer) in [(a, b), (b, a)] {
                    let quiet = self.now.saturating_sub(self.net.way(peer, at).heard);
                    if let Some(session) = self.net.session(at, peer).filter(|_| quiet > self.idle_us) {
                        self.send(at, peer, Packet::Close);
                        self.side_down(at, peer, session);
                        self.settle(at);
                    }
                }
                let same = self.net.session(a, b) == self.net.session(b, a);
                let connected = self.net.session(a, b).is_some() && same;
                if !connected && self.rng.one_in(3) {
                    self.connect(a, b);
                }
            }
        }
    }

    /// A new connection, which replaces what there is.
    pub(crate) fn connect(&mut self, a: At, b: At) {
        let up = |at: At| self.hosts[at].running.is_some();
        let open = self.net.is_open(a, b) && self.net.is_open(b, a);
        if !up(a) || !up(b) || !open || a == b {
            return;
        }
        let session = self.net.new_session();
        for (at, peer) in [(a, b), (b, a)] {
            let way = self.net.way(peer, at);
            let delay = way.delay;
            let pause = delay + self.rng.below(5_000);
            self.net.way(peer, at).up_due = self.now + pause;
            self.after(pause, Event::SideUp { at, peer, session });
        }
    }

    /// A connection breaks: each end learns of it by itself, and what is under way may be lost.
    pub(crate) fn reset(&mut self, a: At, b: At) {
        for (at, peer) in [(a, b), (b, a)] {
            if let Some(session) = self.net.session(at, peer) {
                let pause = self.rng.below(50_000);
                self.after(pause, Event::SideDown { at, peer, session });
            }
        }
    }

    /// Cuts one direction, or opens it.
    pub(crate) fn set_open(&mut self, from: At, to: At, open: bool) {
        if from == to || std::mem::replace(&mut self.net.way(from, to).open, open) == open {
            return;
        }
        self.note(|| format!("the way from {from} to {to} is {}", if open { "open" } else { "cut" }));
        if !open {
            return;
        }
        let now = self.now;
        for (session, packet) in std::mem::take(&mut self.net.way(from, to).held) {
            let due = self.net.way(from, to).due(now, 0, packet.len());
            self.after(due - now, Event::Deliver { from, to, session, packet });
        }
    }
}
