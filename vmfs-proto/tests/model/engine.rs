//! The engine's part, as the contract in [`vmfs_proto::api`] says: calling machines, and doing what they
//! ask for.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use vmfs_common::chain::Refusal;
use vmfs_common::header::Update;
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::policy::MemberRole;
use vmfs_common::{HostId, ImageId, Millis, Seq};
use vmfs_proto::api::Take;
use vmfs_proto::testing::{At, Packet};
use vmfs_proto::{Contact, Env, Input, Machine, Output};

use crate::host::{Record, SOON_MS, Stream, head_at};
use crate::world::{IMAGE, Sent, World, timing};

impl World {
    /// Calls a machine; what it wants done is handed back.
    pub(crate) fn call<R>(
        &mut self,
        at: At,
        f: impl FnOnce(&mut Machine, &mut Env<'_>, &mut Vec<Output>) -> R,
    ) -> Option<(R, Vec<Output>)> {
        let mut machine = self.host(at).machine.take()?;
        let before = machine.known_commit();
        let (result, out) = self.in_env(at, |env, out| f(&mut machine, env, out));
        if machine.known_commit() < before {
            self.oracle.violation = Some("a commit point moved back");
        }
        self.host(at).machine = Some(machine);
        Some((result, out))
    }

    fn in_env<R>(&self, at: At, f: impl FnOnce(&mut Env<'_>, &mut Vec<Output>) -> R) -> (R, Vec<Output>) {
        let host = &self.hosts[at];
        let contact = |h: HostId| {
            let near = self.hosts.iter().position(|o| o.id.host == h);
            let heard = near.filter(|b| *b != at && self.connected[self.pair(at, *b)]).map(|_| host.now);
            Contact { heard, confirmed: heard }
        };
        let byte = u8::try_from(at + 1).expect("few hosts");
        let mut env = Env {
            now: host.now,
            time_ns: 1,
            entropy: &mut |b: &mut [u8]| b.fill(byte),
            contact: &contact,
            history: &|s| head_at(&host.log, s),
            log_start: Seq(1),
        };
        let mut out = Vec::new();
        let result = f(&mut env, &mut out);
        (result, out)
    }

    pub(crate) fn make(&mut self, at: At, make: impl FnOnce(&mut Env<'_>, &mut Vec<Output>) -> Machine) {
        let (machine, out) = self.in_env(at, make);
        self.host(at).machine = Some(machine);
        self.execute(at, out);
        self.after(at);
        for other in (0..self.hosts.len()).filter(|b| *b != at) {
            if self.connected[self.pair(at, other)] {
                let host = self.hosts[other].id.host;
                self.input(at, Input::PeerUp { host });
            }
        }
    }

    pub(crate) fn input(&mut self, at: At, input: Input) {
        if let Some(((), out)) = self.call(at, |m, env, out| m.handle(env, input, out)) {
            self.execute(at, out);
            self.after(at);
        }
    }

    /// Feeds the streams; a fast disk has done by now what it was asked for.
    pub(crate) fn after(&mut self, at: At) {
        for (to, packet) in self.host(at).ready() {
            self.send(at, to, packet);
        }
        if !self.fast[at] || !self.hosts[at].up {
            return;
        }
        if self.hosts[at].syncing.is_some() {
            self.synced(at);
        } else if !self.hosts[at].writing.is_empty() {
            self.persisted(at);
        }
    }

    pub(crate) fn synced(&mut self, at: At) {
        let h = self.host(at);
        let Some((len, valid)) = h.syncing.take() else { return };
        let entry = len.checked_sub(1).and_then(|i| h.log.get(i)).filter(|_| valid);
        let head = entry.map(|e| e.update.head()).unwrap_or_default();
        if valid {
            h.synced = h.synced.max(len);
        }
        self.input(at, Input::Synced { head });
    }

    pub(crate) fn persisted(&mut self, at: At) {
        let h = self.host(at);
        let Some((version, record)) = h.writing.pop() else { return };
        h.writing.clear();
        h.record = Some(record);
        self.input(at, Input::MetaPersisted { version });
    }

    pub(crate) fn tick(&mut self, at: At, ms: u64) {
        if ms == SOON_MS {
            self.left.soon -= 1
        } else {
            self.left.long -= 1
        }
        let h = self.host(at);
        h.now = Millis(h.now.0 + ms);
        self.input(at, Input::Tick);
    }

    pub(crate) fn store_own(&mut self, at: At, update: &Update) {
        self.host(at).store(update);
        self.oracle.appended(update.head());
    }

    fn send(&mut self, from: At, to: At, packet: Packet) {
        if let Packet::Msg(msg) = &packet {
            let mut oracle = std::mem::take(&mut self.oracle);
            oracle.sent(self.host(from), msg);
            self.oracle = oracle;
        }
        if !self.connected[self.pair(from, to)] {
            return;
        }
        let n = self.hosts.len();
        self.outgoing[from * n + to].push(packet);
        if !self.together {
            self.flush_outgoing(from * n + to);
        }
    }

    /// What has been sent is on its way.
    pub(crate) fn flush_outgoing(&mut self, link: usize) {
        let packets = std::mem::take(&mut self.outgoing[link]);
        if packets.is_empty() {
            return;
        }
        let mut h = DefaultHasher::new();
        for packet in &packets {
            match packet {
                Packet::Msg(m) => msg::encode(&**m).hash(&mut h),
                Packet::Update(u) => u.bytes.hash(&mut h),
            }
        }
        self.queues[link].push_back(Arc::new(Sent { packets, print: h.finish() }));
    }

    pub(crate) fn receive(&mut self, from: At, to: At, packet: &Packet) {
        let host = self.hosts[from].id.host;
        match packet {
            Packet::Msg(msg) => {
                if self.hosts[to].machine.is_none()
                    && let ImageMsg::Offer { role, .. } | ImageMsg::Propose { role, .. } = &**msg
                {
                    let (id, role) = (self.hosts[to].id.clone(), *role);
                    self.make(to, |env, out| {
                        Machine::blank(env, id, timing(), ImageId::from_bytes(IMAGE), role, out)
                    });
                }
                self.input(to, Input::Msg { from: host, msg: msg.clone() });
            }
            Packet::Update(update) => {
                // A witness has no payload to send.
                let bare = self.hosts[from].kind == MemberRole::Witness && update.header.payload_blocks() > 0;
                if bare && self.hosts[to].kind == MemberRole::Replica {
                    let why = Refusal::AlteredPayload;
                    if let Some(((), out)) =
                        self.call(to, |m, env, out| m.refuse(env, host, Some(update), why, out))
                    {
                        self.execute(to, out);
                    }
                } else {
                    self.take(host, to, update);
                }
                self.after(to);
            }
        }
    }

    fn take(&mut self, from: HostId, to: At, update: &Update) {
        loop {
            let Some((verdict, out)) = self.call(to, |m, env, out| m.check_update(env, from, update, out))
            else {
                return;
            };
            self.execute(to, out);
            match verdict {
                Ok(Take::Append) => break,
                Ok(Take::RollBack { to: head }) => self.roll_back(to, head.seq),
                Ok(Take::Ignore) | Err(_) => return,
            }
        }
        self.host(to).store(update);
        if let Some(((), out)) = self.call(to, |m, env, out| m.took(env, update, out)) {
            self.execute(to, out);
        }
    }

    fn roll_back(&mut self, at: At, to: Seq) {
        let state = self.host(at).roll_back(to, ImageId::from_bytes(IMAGE));
        if let Some(((), out)) = self.call(at, |m, env, out| m.rolled_back(env, state, out)) {
            self.execute(at, out);
        }
    }

    pub(crate) fn execute(&mut self, at: At, outputs: Vec<Output>) {
        for output in outputs {
            self.execute_one(at, output);
        }
    }

    fn execute_one(&mut self, at: At, output: Output) {
        match output {
            Output::Send { to, msg } => self.send(at, self.at(to), Packet::Msg(msg)),
            Output::Stream { to, after, headers_only: _ } => {
                let to = self.at(to);
                self.host(at).streams.insert(to, Stream { sent: after, pending: None });
            }
            Output::StopStream { to } => {
                let to = self.at(to);
                self.host(at).streams.remove(&to);
            }
            Output::RequestSync { to, seq, commit } => {
                let to = self.at(to);
                if let Some(s) = self.host(at).streams.get_mut(&to) {
                    let (low, high) = s.pending.map_or((seq, seq), |(l, h, _)| (l.min(seq), h.max(seq)));
                    s.pending = Some((low, high, commit));
                }
            }
            Output::LocalSync => {
                let h = self.host(at);
                assert!(h.syncing.is_none(), "two local syncs at once");
                h.syncing = Some((h.log.len(), true));
            }
            Output::AppendLocal(update) => self.store_own(at, &update),
            Output::PersistMeta { version, bytes } => {
                self.host(at).writing.push((version, Record::new(bytes)));
            }
            Output::RollBack { to, keep_fork: _ } => self.roll_back(at, to.seq),
            Output::FlushDone { token, result } => {
                let mut oracle = std::mem::take(&mut self.oracle);
                oracle.flush_done(token, result.is_ok(), &self.hosts, at);
                self.oracle = oracle;
            }
            Output::OpDone { token: _, result } => {
                let mut oracle = std::mem::take(&mut self.oracle);
                oracle.op_done(&result, &self.hosts[at]);
                self.oracle = oracle;
            }
            Output::ReadHeaders { to, after, upto } => {
                let msg = self.hosts[at].headers(after, upto);
                self.send(at, self.at(to), Packet::Msg(Box::new(msg)));
            }
            Output::ServeUpdates { to, after, upto, headers_only: _ } => {
                for update in self.hosts[at].updates(after, upto) {
                    self.send(at, self.at(to), Packet::Update(Box::new(update)));
                }
            }
            Output::StartBlockSync { .. } => panic!("the model's logs are never trimmed"),
            Output::Report(_) | Output::GateChanged | Output::FailWaiting => {}
        }
    }
}
