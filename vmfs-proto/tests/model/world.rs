//! The state that is explored: hosts, what is under way between them, what may still happen, and what
//! the oracle has to remember. [`World::step`] takes one action; what the machines want
//! done is in [`crate::engine`].

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use vmfs_common::chain::Draft;
use vmfs_common::election::Genesis;
use vmfs_common::header::FORMAT_LEVEL;
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{Acks, ImagePolicy, MemberList, MemberRole, OnQuorumLoss};
use vmfs_common::{BlockCount, BlockIndex, Digest, HostId, ImageId};
use vmfs_proto::testing::{At, Packet, identity, member};
use vmfs_proto::{Gate, Input, Machine, Timing};

use crate::host::{Host, NEVER_MS, SOON_MS};
use crate::oracle::Oracle;

/// How often what may still happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub(crate) writes: u8,
    pub(crate) flushes: u8,
    pub(crate) promotions: u8,
    pub(crate) handovers: u8,
    pub(crate) changes: u8,
    pub(crate) cuts: u8,
    pub(crate) crashes: u8,
    /// Timers that come soon (another bid, another offer), and after long (giving up).
    pub(crate) soon: u8,
    pub(crate) long: u8,
}

/// What the exploration starts from, and its bounds.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) roles: Vec<MemberRole>,
    /// The first hosts are the members at the beginning.
    pub(crate) members: usize,
    /// Hosts whose disk completes at once.
    pub(crate) fast: Vec<At>,
    /// Packets sent in one step arrive in one.
    pub(crate) together: bool,
    /// Pairs that cannot reach each other.
    pub(crate) apart: Vec<(At, At)>,
    /// Pairs whose connection may be lost; all when empty.
    pub(crate) weak_links: Vec<(At, At)>,
    /// Hosts that an operator may promote.
    pub(crate) promote: Vec<At>,
    /// Hosts with guests, which write and flush; all when empty.
    pub(crate) guests: Vec<At>,
    /// Hosts that may crash; all when empty.
    pub(crate) crash: Vec<At>,
    pub(crate) left: Budget,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// The first packet under way arrives.
    Deliver {
        from: At,
        to: At,
    },
    /// The disk has done what it was asked for.
    Synced(At),
    Persisted(At),
    /// A timer that comes soon, or after long.
    Soon(At),
    Long(At),
    Write(At),
    Flush(At),
    Promote(At),
    HandOver {
        from: At,
        to: At,
    },
    Add {
        owner: At,
        host: At,
    },
    Remove {
        owner: At,
        host: At,
    },
    /// The connection is lost, both ends notice, nothing gets through until it is restored.
    Cut(At, At),
    Restore(At, At),
    /// Power fails; how much of what was not synced has survived.
    Crash {
        at: At,
        entries: usize,
        records: usize,
    },
    Restart(At),
}

/// Packets that arrive one after the other without anything between, with their fingerprint.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) packets: Vec<Packet>,
    pub(crate) print: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) hosts: Vec<Arc<Host>>,
    /// By from * n + to, in order.
    pub(crate) queues: Vec<VecDeque<Arc<Sent>>>,
    /// By lower * n + higher.
    pub(crate) connected: Vec<bool>,
    pub(crate) cut: Vec<bool>,
    pub(crate) left: Budget,
    pub(crate) oracle: Oracle,
    /// Hosts whose disk completes at once.
    pub(crate) fast: Vec<bool>,
    /// Packets sent in one step arrive in one.
    pub(crate) together: bool,
    /// Pairs that cannot reach each other.
    apart: Vec<bool>,
    pub(crate) changed: Vec<bool>,
    /// What this step has sent, by from * n + to.
    pub(crate) outgoing: Vec<Vec<Packet>>,
}

impl Hash for World {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.hosts.iter().for_each(|n| n.print.hash(h));
        for q in &self.queues {
            q.len().hash(h);
            q.iter().for_each(|s| s.print.hash(h));
        }
        (&self.connected, &self.cut, self.left, &self.oracle).hash(h);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        let print = |w: &Self| {
            let mut h = DefaultHasher::new();
            w.hash(&mut h);
            h.finish()
        };
        print(self) == print(other)
    }
}

pub(crate) const IMAGE: [u8; 16] = [0x11; 16];

/// Delays in the spans of the model's clock.
pub(crate) fn timing() -> Timing {
    Timing {
        lease_ms: NEVER_MS,
        retry_ms: NEVER_MS,
        promote_timeout_ms: 1 << 30,
        adopt_grace_ms: 0,
        rebid_ms: 1,
        seal_idle_ms: NEVER_MS,
        seal_interval_ms: NEVER_MS,
        restart_ms: 1,
        stall_timeout_ms: None,
        meta_interval_ms: NEVER_MS,
        ..Timing::default()
    }
}

impl World {
    /// Host 0 has created the image, and every member has taken it up.
    pub(crate) fn new(setting: &Setting) -> Self {
        let roles = &setting.roles;
        let n = roles.len();
        let hosts: Vec<_> =
            roles.iter().enumerate().map(|(at, role)| Arc::new(Host::new(identity(at), *role))).collect();
        let list = hosts.iter().take(setting.members).map(|h| member(&h.id, h.kind)).collect();
        let mut w = Self {
            hosts,
            queues: vec![VecDeque::new(); n * n],
            connected: vec![true; n * n],
            cut: vec![false; n * n],
            left: Budget::default(),
            oracle: Oracle::default(),
            fast: vec![true; n],
            together: setting.together,
            apart: vec![false; n * n],
            changed: vec![true; n],
            outgoing: vec![Vec::new(); n * n],
        };
        let policy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Stall };
        let members = MemberList::new(list).expect("distinct hosts");
        let genesis = Genesis { members, policy, attrs: Attrs::default(), level: FORMAT_LEVEL };
        let id = w.hosts[0].id.clone();
        w.make(0, |env, out| Machine::genesis(env, id, timing(), ImageId::from_bytes(IMAGE), genesis, out));
        // A first tick: the owner offers what has become durable.
        w.finish();
        while let Some(step) = w.deliveries().first().copied() {
            w.step(step);
        }
        for (a, b) in setting.apart.iter().copied() {
            let i = w.pair(a, b);
            w.apart[i] = true;
            w.cut[i] = true;
            w.disconnect(a, b);
        }
        w.left = setting.left;
        w.fast = (0..n).map(|at| setting.fast.contains(&at)).collect();
        w.finish();
        w
    }

    // --- what may happen ---

    fn deliveries(&self) -> Vec<Step> {
        let n = self.hosts.len();
        let some = (0..n * n).filter(|i| !self.queues[*i].is_empty());
        some.map(|i| Step::Deliver { from: i / n, to: i % n }).collect()
    }

    pub(crate) fn steps(&self, setting: &Setting, steps: &mut Vec<Step>) {
        if self.oracle.violation.is_some() {
            return;
        }
        steps.extend(self.deliveries());
        for (at, h) in self.hosts.iter().enumerate() {
            self.steps_of(at, h, setting, steps);
        }
        for b in 0..self.hosts.len() {
            for a in 0..b {
                let i = self.pair(a, b);
                let weak = setting.weak_links.is_empty() || setting.weak_links.contains(&(a, b));
                if self.connected[i] && self.left.cuts > 0 && weak {
                    steps.push(Step::Cut(a, b));
                }
                if self.cut[i] && !self.apart[i] && self.hosts[a].up && self.hosts[b].up {
                    steps.push(Step::Restore(a, b));
                }
            }
        }
    }

    fn steps_of(&self, at: At, h: &Host, setting: &Setting, steps: &mut Vec<Step>) {
        let named = |list: &[At]| list.is_empty() || list.contains(&at);
        if !h.up {
            steps.push(Step::Restart(at));
            return;
        }
        if self.left.crashes > 0 && named(&setting.crash) {
            for entries in 0..=h.unsynced() {
                steps.extend((0..=h.writing.len()).map(|records| Step::Crash { at, entries, records }));
            }
        }
        let Some(m) = &h.machine else { return };
        if h.syncing.is_some() {
            steps.push(Step::Synced(at));
        }
        if !h.writing.is_empty() {
            steps.push(Step::Persisted(at));
        }
        match m.next_deadline().map(|t| h.clock().class(t)) {
            Some(0 | 1) if self.left.soon > 0 => steps.push(Step::Soon(at)),
            Some(2) if self.left.long > 0 => steps.push(Step::Long(at)),
            _ => {}
        }
        let gate = m.may_write(h.now);
        if gate == Gate::Open && self.left.writes > 0 && named(&setting.guests) {
            steps.push(Step::Write(at));
        }
        if !matches!(gate, Gate::Refused(_)) && self.left.flushes > 0 && named(&setting.guests) {
            steps.push(Step::Flush(at));
        }
        if setting.promote.contains(&at) && self.left.promotions > 0 && !m.is_open_owner() {
            steps.push(Step::Promote(at));
        }
        if !m.is_open_owner() {
            return;
        }
        for (other, o) in self.hosts.iter().enumerate().filter(|(b, _)| *b != at) {
            if self.left.handovers > 0 && o.kind == MemberRole::Replica {
                steps.push(Step::HandOver { from: at, to: other });
            }
            let listed = m.state().members.get(o.id.host).is_some();
            match listed {
                _ if self.left.changes == 0 => {}
                true => steps.push(Step::Remove { owner: at, host: other }),
                false => steps.push(Step::Add { owner: at, host: other }),
            }
        }
    }

    // --- taking a step ---

    pub(crate) fn step(&mut self, step: Step) {
        match step {
            Step::Deliver { from, to } => {
                let n = self.hosts.len();
                let sent = self.queues[from * n + to].pop_front().expect("a packet under way");
                sent.packets.iter().for_each(|p| self.receive(from, to, p));
            }
            Step::Synced(at) => self.synced(at),
            Step::Persisted(at) => self.persisted(at),
            Step::Soon(at) => self.tick(at, SOON_MS),
            Step::Long(at) => self.tick(at, 1 << 31),
            Step::Write(at) => self.write(at),
            Step::Flush(at) => {
                self.left.flushes -= 1;
                let token = u64::from(self.left.flushes);
                self.oracle.flush_begins(token, at, self.hosts[at].head());
                self.input(at, Input::Flush { token });
            }
            Step::Promote(at) => {
                self.left.promotions -= 1;
                let token = 100 + u64::from(self.left.promotions);
                self.input(at, Input::Promote { force: false, token });
            }
            Step::HandOver { from, to } => {
                self.left.handovers -= 1;
                let (token, to) = (200 + u64::from(self.left.handovers), self.hosts[to].id.host);
                self.input(from, Input::Handover { to, token });
            }
            Step::Add { owner, host } => {
                self.left.changes -= 1;
                let token = 300 + u64::from(self.left.changes);
                let member = member(&self.hosts[host].id, self.hosts[host].kind);
                self.input(owner, Input::AddMember { member, token });
            }
            Step::Remove { owner, host } => {
                self.left.changes -= 1;
                let (token, host) = (300 + u64::from(self.left.changes), self.hosts[host].id.host);
                self.input(owner, Input::RemoveMember { host, token });
            }
            Step::Cut(a, b) => {
                self.left.cuts -= 1;
                let i = self.pair(a, b);
                self.cut[i] = true;
                self.disconnect(a, b);
            }
            Step::Restore(a, b) => {
                let i = self.pair(a, b);
                self.cut[i] = false;
                self.connect(a, b);
            }
            Step::Crash { at, entries, records } => self.crash(at, entries, records),
            Step::Restart(at) => self.restart(at),
        }
        self.finish();
    }

    pub(crate) fn finish(&mut self) {
        (0..self.outgoing.len()).for_each(|link| self.flush_outgoing(link));
        for at in 0..self.hosts.len() {
            if std::mem::take(&mut self.changed[at]) {
                let h = Arc::make_mut(&mut self.hosts[at]);
                h.print = h.fingerprint();
            }
        }
        let mut oracle = std::mem::take(&mut self.oracle);
        oracle.observe(&self.hosts);
        self.oracle = oracle;
    }

    pub(crate) fn host(&mut self, at: At) -> &mut Host {
        self.changed[at] = true;
        Arc::make_mut(&mut self.hosts[at])
    }

    pub(crate) fn at(&self, host: HostId) -> At {
        self.hosts.iter().position(|h| h.id.host == host).expect("a host of this model")
    }

    pub(crate) fn pair(&self, a: At, b: At) -> usize {
        a.min(b) * self.hosts.len() + a.max(b)
    }

    fn write(&mut self, at: At) {
        self.left.writes -= 1;
        let draft = Draft {
            op: Op::Write { size_after_bytes: None },
            start: BlockIndex(0),
            count: BlockCount(1),
            digests: vec![Digest::from_bytes([self.left.writes + 1; 32])],
            flags: 0,
        };
        let Some((update, out)) = self.call(at, |m, env, out| m.append(env, draft, out)) else { return };
        self.store_own(at, &update);
        self.execute(at, out);
        self.after(at);
    }

    fn crash(&mut self, at: At, entries: usize, records: usize) {
        self.left.crashes -= 1;
        self.host(at).crash(entries, records);
        self.oracle.forget_flushes(at);
        for other in (0..self.hosts.len()).filter(|b| *b != at) {
            self.disconnect(at, other);
        }
    }

    fn restart(&mut self, at: At) {
        let image = ImageId::from_bytes(IMAGE);
        let (id, kind) = (self.hosts[at].id.clone(), self.hosts[at].kind);
        self.host(at).up = true;
        if let Some((state, meta)) = self.host(at).recover(image) {
            self.make(at, |env, out| {
                Machine::recover(env, id, timing(), kind, state, None, meta.as_deref(), out)
                    .expect("own meta record")
            });
        }
        for other in (0..self.hosts.len()).filter(|b| *b != at) {
            if self.hosts[other].up && !self.cut[self.pair(at, other)] {
                self.connect(at, other);
            }
        }
    }

    fn connect(&mut self, a: At, b: At) {
        let i = self.pair(a, b);
        self.connected[i] = true;
        for (me, peer) in [(a, b), (b, a)] {
            let host = self.hosts[peer].id.host;
            self.input(me, Input::PeerUp { host });
        }
    }

    fn disconnect(&mut self, a: At, b: At) {
        let (i, n) = (self.pair(a, b), self.hosts.len());
        if !std::mem::take(&mut self.connected[i]) {
            return;
        }
        for (me, peer) in [(a, b), (b, a)] {
            self.queues[me * n + peer].clear();
            self.outgoing[me * n + peer].clear();
            self.host(me).streams.remove(&peer);
        }
        for (me, peer) in [(a, b), (b, a)] {
            let host = self.hosts[peer].id.host;
            self.input(me, Input::PeerDown { host });
        }
    }
}

/// Where everything stands, for counterexamples.
impl std::fmt::Display for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut names = BTreeMap::new();
        for (at, h) in self.hosts.iter().enumerate() {
            names.insert(h.id.host, at);
        }
        for (at, h) in self.hosts.iter().enumerate() {
            let log: Vec<String> = h
                .log
                .iter()
                .map(|e| {
                    let head = e.update.head();
                    format!("{}.{}@{}", head.epoch.number, names[&head.epoch.host], head.seq)
                })
                .collect();
            let role = h.machine.as_ref().map_or_else(|| "down".to_owned(), Machine::describe_role);
            let role: String = role.chars().take(100).collect();
            writeln!(f, "  {at}: {} durable {} | {role}", log.join(" "), h.synced)?;
        }
        write!(f, "  {}", self.oracle)
    }
}
