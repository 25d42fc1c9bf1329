//! The engine's part: calling a machine, and doing what it asks for.

use std::collections::{BTreeMap, BTreeSet};

use vmfs_common::{HostId, Millis};

use crate::api::{Contact, Env, Input, Output};
use crate::machine::Machine;
use crate::testing::{At, Cluster, Packet, Rng, node};

impl Cluster {
    pub(super) fn make(&mut self, at: At, make: impl FnOnce(&mut Env<'_>, &mut Vec<Output>) -> Machine) {
        let mut out = Vec::new();
        let contacts = self.contacts(at);
        let contact = |h: HostId| contacts.get(&h).copied().unwrap_or_default();
        let log = &self.nodes[at].log;
        let mut rng = Rng(self.rng.draw());
        let mut env = Env {
            now: self.now,
            time_ns: self.now.0 * 1_000_000,
            entropy: &mut |b: &mut [u8]| rng.fill(b),
            contact: &contact,
            history: &|s| node::head_at(log, s),
            log_start: self.nodes[at].log_start,
        };
        let machine = make(&mut env, &mut out);
        self.nodes[at].machine = Some(machine);
        self.execute(at, out);
        let peers: BTreeSet<At> = (0..self.nodes.len()).filter(|b| self.is_connected(at, *b)).collect();
        for b in peers {
            let host = self.nodes[b].id.host;
            self.input(at, Input::PeerUp { host });
        }
        self.pump(at);
    }

    pub(super) fn is_connected(&self, a: At, b: At) -> bool {
        a != b && self.paths[&(a.min(b), a.max(b))].connected
    }

    pub(super) fn contacts(&self, at: At) -> BTreeMap<HostId, Contact> {
        let mut all = BTreeMap::new();
        for (b, n) in self.nodes.iter().enumerate().filter(|(b, _)| *b != at) {
            let path = &self.paths[&(at.min(b), at.max(b))];
            let last = if path.open { Some(self.now) } else { path.cut_at.or(path.last_open) };
            let ping = last.map(|t| Millis(t.0.saturating_sub(5)));
            all.insert(n.id.host, Contact { heard: last, confirmed: ping });
        }
        all
    }

    pub(super) fn with<R>(
        &mut self,
        at: At,
        f: impl FnOnce(&mut Machine, &mut Env<'_>, &mut Vec<Output>) -> R,
    ) -> Option<R> {
        let mut machine = self.nodes[at].machine.take()?;
        let mut out = Vec::new();
        let contacts = self.contacts(at);
        let contact = |h: HostId| contacts.get(&h).copied().unwrap_or_default();
        let log = &self.nodes[at].log;
        let mut rng = Rng(self.rng.draw());
        let mut env = Env {
            now: self.now,
            time_ns: self.now.0 * 1_000_000,
            entropy: &mut |b: &mut [u8]| rng.fill(b),
            contact: &contact,
            history: &|s| node::head_at(log, s),
            log_start: self.nodes[at].log_start,
        };
        let result = f(&mut machine, &mut env, &mut out);
        self.nodes[at].machine = Some(machine);
        self.execute(at, out);
        Some(result)
    }

    pub(super) fn send(&mut self, from: At, to: At, packet: Packet) {
        let delay = 1 + self.rng.below(3);
        let now = self.now;
        let path =
            self.paths.get_mut(&(from.min(to), from.max(to))).expect("invariant: a path for each pair");
        if path.open && path.connected {
            let queue = &mut path.queues[usize::from(from > to)];
            let at = queue.back().map_or(now.plus(delay), |(t, _)| (*t).max(now.plus(delay)));
            queue.push_back((at, packet));
        }
    }

    pub(super) fn execute(&mut self, at: At, outputs: Vec<Output>) {
        for output in outputs {
            self.execute_one(at, output);
        }
        self.oracle.observe(&self.nodes);
    }

    pub(super) fn execute_one(&mut self, at: At, output: Output) {
        if self.trace {
            match &output {
                Output::PersistMeta { version, .. } => eprintln!("{} {at}: meta {version}", self.now.0),
                Output::AppendLocal(u) => {
                    eprintln!("{} {at}: own {:?} {:?}", self.now.0, u.head(), u.header.op)
                }
                Output::Send { to, msg } => eprintln!("{} {at} to {}: {msg:?}", self.now.0, self.at(*to)),
                other => eprintln!("{} {at}: {other:?}", self.now.0),
            }
        }
        match output {
            Output::Send { to, msg } => {
                let to = self.at(to);
                self.send(at, to, Packet::Msg(msg));
            }
            Output::Stream { to, after, headers_only: _ } => {
                let to = self.at(to);
                self.nodes[at].streams.insert(to, node::Stream::new(after));
            }
            Output::StopStream { to } => {
                let to = self.at(to);
                self.nodes[at].streams.remove(&to);
            }
            Output::RequestSync { to, seq, commit } => {
                let to = self.at(to);
                if let Some(s) = self.nodes[at].streams.get_mut(&to) {
                    s.request(seq, commit);
                }
            }
            Output::LocalSync => {
                let due = self.now.plus(1 + self.rng.below(4));
                self.nodes[at].start_sync(due);
            }
            Output::AppendLocal(update) => self.nodes[at].store_own(&update),
            Output::PersistMeta { version, bytes } => {
                let due = self.now.plus(1 + self.rng.below(4));
                self.nodes[at].start_meta(due, version, bytes);
            }
            Output::RollBack { to, keep_fork: _ } => self.roll_back(at, to.seq),
            Output::FlushDone { token, result } => {
                if result.is_ok() {
                    self.oracle.flush_done(token, &self.nodes, at);
                }
                self.flushed.insert(token, result);
            }
            Output::OpDone { token, result } => {
                self.ops.insert(token, result);
            }
            Output::ReadHeaders { to, after, upto } => {
                let to = self.at(to);
                for msg in self.nodes[at].headers(after, upto) {
                    self.send(at, to, Packet::Msg(Box::new(msg)));
                }
            }
            Output::ServeUpdates { to, after, upto, headers_only: _ } => {
                let to = self.at(to);
                for update in self.nodes[at].updates(after, upto) {
                    self.send(at, to, Packet::Update(Box::new(update)));
                }
            }
            Output::StartBlockSync { from } => {
                let (due, from) = (self.now.plus(50), self.at(from));
                self.nodes[at].start_import(due, from);
            }
            Output::Report(event) => self.events.push((at, event)),
            Output::GateChanged | Output::FailWaiting => {}
        }
    }

    /// Sends what the streams of a host have to send.
    pub(super) fn pump(&mut self, at: At) {
        let ready = self.nodes[at].ready();
        for (to, packet) in ready {
            self.send(at, to, packet);
        }
    }
}
