//! A deterministic cluster in memory: real machines on virtual time, over links that fail and disks
//! that lose what was not synced. One seed, one run. The checks in [`oracle`] look at the chains
//! from outside and know nothing of the machines' reasoning.
//!
//! This is the engine's contract ([`crate::api`]) in its smallest form.

mod execute;
pub mod fingerprint;
pub mod node;
pub mod oracle;
mod schedule;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vmfs_common::chain::Draft;
use vmfs_common::election::Genesis;
use vmfs_common::header::{FORMAT_LEVEL, Update};
use vmfs_common::identity::HostKey;
use vmfs_common::msg::ImageMsg;
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::{BlockCount, BlockIndex, DatastoreId, Digest, Head, HostId, ImageId, Millis, Seq, StoreId};

use crate::api::{Event, Gate, Identity, Input, Timing, Token};
use crate::machine::Machine;
use crate::ops::{FlushError, OpError, OpOutcome};
use crate::status::Status;

use node::{Done, Node};
use oracle::Oracle;
pub use schedule::random_run;

/// Index of a host in its cluster.
pub type At = usize;

/// A small deterministic generator (splitmix64): the tests' only source of chance.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n.max(1)
    }
    /// An index below `n`.
    pub fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).expect("invariant: below a usize")
    }
    /// Random bytes.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let bytes = self.draw().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// What travels on a link.
#[derive(Debug, Clone)]
pub enum Packet {
    /// A control message.
    Msg(Box<ImageMsg>),
    /// An update frame.
    Update(Box<Update>),
}

/// The state of the path between two hosts.
#[derive(Debug, Default)]
struct Path {
    /// Packets get through.
    open: bool,
    /// Both ends believe in the connection.
    connected: bool,
    /// When packets last got through.
    last_open: Option<Millis>,
    cut_at: Option<Millis>,
    /// In order, by direction (from the lower index, from the higher).
    queues: [VecDeque<(Millis, Packet)>; 2],
}

/// How long after a cut both ends notice.
const NOTICE_MS: u64 = 400;

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Virtual time.
    pub now: Millis,
    /// All hosts; the first `size` of them are members of the image.
    pub nodes: Vec<Node>,
    /// Checks from outside.
    pub oracle: Oracle,
    /// Chance.
    pub rng: Rng,
    /// The image.
    pub image: ImageId,
    /// Delays of the machines.
    pub timing: Timing,
    /// Answers to operations.
    pub ops: BTreeMap<Token, Result<OpOutcome, OpError>>,
    /// Answers to flushes.
    pub flushed: BTreeMap<Token, Result<(), FlushError>>,
    /// Everything reported, by host.
    pub events: Vec<(At, Event)>,
    /// Print what the machines want done, to follow one seed.
    pub trace: bool,
    paths: BTreeMap<(At, At), Path>,
    next_token: Token,
}

/// A host of a test: key, ids and names follow from its index.
#[must_use]
pub fn identity(at: At) -> Arc<Identity> {
    let byte = u8::try_from(at + 1).expect("invariant: few hosts");
    let key = HostKey::from_seed([byte; 32]);
    Arc::new(Identity {
        datastore: DatastoreId::from_bytes([0xdd; 16]),
        host: key.host_id(),
        store: StoreId::from_bytes([byte; 16]),
        key,
    })
}

/// A member of a test.
#[must_use]
pub fn member(id: &Identity, role: MemberRole) -> Member {
    Member { host: id.host, store: id.store, key: id.key.public(), role }
}

impl Cluster {
    /// Hosts with these roles as members, all connected, and the image created at host 0.
    #[must_use]
    pub fn new(seed: u64, roles: &[MemberRole], policy: ImagePolicy) -> Self {
        Self::with_timing(seed, roles, policy, |_| {})
    }

    /// The same, with other delays.
    #[must_use]
    pub fn with_timing(
        seed: u64,
        roles: &[MemberRole],
        policy: ImagePolicy,
        set: impl FnOnce(&mut Timing),
    ) -> Self {
        let mut timing = Timing::default();
        set(&mut timing);
        let mut c = Self {
            now: Millis(10_000),
            nodes: roles.iter().enumerate().map(|(at, role)| Node::new(identity(at), *role)).collect(),
            oracle: Oracle::default(),
            rng: Rng(seed),
            image: ImageId::from_bytes([0x11; 16]),
            timing,
            ops: BTreeMap::new(),
            flushed: BTreeMap::new(),
            events: Vec::new(),
            trace: std::env::var_os("VMFS_TRACE").is_some(),
            paths: BTreeMap::new(),
            next_token: 1,
        };
        let members = c.nodes.iter().map(|n| member(&n.id, n.kind)).collect();
        let members = MemberList::new(members).expect("invariant: distinct test hosts");
        c.connect_new(0..c.nodes.len());
        let genesis = Genesis { members, policy, attrs: Attrs::default(), level: FORMAT_LEVEL };
        let (id, timing, image) = (c.nodes[0].id.clone(), c.timing.clone(), c.image);
        c.make(0, |env, out| Machine::genesis(env, id, timing, image, genesis, out));
        c
    }

    /// One more host, connected to all, that is no member yet.
    pub fn add_host(&mut self, role: MemberRole) -> At {
        let at = self.nodes.len();
        self.nodes.push(Node::new(identity(at), role));
        self.connect_new(at..at + 1);
        let host = self.nodes[at].id.host;
        let up = |c: &Self, b: At| c.nodes[b].up;
        (0..at).filter(|b| up(self, *b)).collect::<Vec<_>>().into_iter().for_each(|b| {
            self.input(b, Input::PeerUp { host });
        });
        at
    }

    fn connect_new(&mut self, new: std::ops::Range<At>) {
        for b in new {
            for a in 0..b {
                let up = self.nodes[a].up;
                let path = Path { open: up, connected: up, last_open: Some(self.now), ..Path::default() };
                self.paths.insert((a, b), path);
            }
        }
    }

    /// The index of a host.
    #[must_use]
    pub fn at(&self, host: HostId) -> At {
        self.nodes.iter().position(|n| n.id.host == host).expect("invariant: a host of this cluster")
    }

    /// What a machine tells of itself.
    #[must_use]
    pub fn status(&self, at: At) -> Status {
        self.nodes[at].machine.as_ref().expect("the machine runs").status(self.now)
    }

    /// The host that owns the image and serves it.
    #[must_use]
    pub fn owner(&self) -> Option<At> {
        let open = |n: &Node| n.machine.as_ref().is_some_and(Machine::is_open_owner);
        let best = self.nodes.iter().enumerate().filter(|(_, n)| open(n));
        best.max_by_key(|(_, n)| n.head().epoch).map(|(at, _)| at)
    }

    // --- faults ---

    /// Cuts the path between two hosts; they notice after a while.
    pub fn cut(&mut self, a: At, b: At) {
        let path = self.paths.get_mut(&(a.min(b), a.max(b))).expect("invariant: a path for each pair");
        if path.open {
            path.open = false;
            path.cut_at = Some(self.now);
            path.queues.iter_mut().for_each(VecDeque::clear);
        }
    }

    /// What is on its way from one host to another.
    #[must_use]
    pub fn under_way(&self, from: At, to: At) -> Vec<Packet> {
        let path = &self.paths[&(from.min(to), from.max(to))];
        path.queues[usize::from(from > to)].iter().map(|(_, p)| p.clone()).collect()
    }

    /// Cuts a host off from all others.
    pub fn isolate(&mut self, at: At) {
        (0..self.nodes.len()).filter(|b| *b != at).for_each(|b| self.cut(at, b));
    }

    /// Restores the path between two hosts.
    pub fn heal(&mut self, a: At, b: At) {
        let key = (a.min(b), a.max(b));
        if self.paths.get(&key).is_some_and(|p| p.open) || !self.nodes[a].up || !self.nodes[b].up {
            return;
        }
        self.disconnect(key);
        let now = self.now;
        let path = self.paths.get_mut(&key).expect("invariant: a path for each pair");
        *path = Path { open: true, connected: true, last_open: Some(now), ..Path::default() };
        for (me, peer) in [(a, b), (b, a)] {
            let host = self.nodes[peer].id.host;
            self.input(me, Input::PeerUp { host });
        }
    }

    /// Restores everything.
    pub fn heal_all(&mut self) {
        for at in 0..self.nodes.len() {
            self.restart(at);
        }
        for b in 0..self.nodes.len() {
            (0..b).for_each(|a| self.heal(a, b));
        }
    }

    fn disconnect(&mut self, key: (At, At)) {
        let path = self.paths.get_mut(&key).expect("invariant: a path for each pair");
        path.queues.iter_mut().for_each(VecDeque::clear);
        if std::mem::take(&mut path.connected) {
            for (me, peer) in [key, (key.1, key.0)] {
                let host = self.nodes[peer].id.host;
                self.nodes[me].streams.remove(&peer);
                self.input(me, Input::PeerDown { host });
            }
        }
    }

    /// The host's power fails: what was not synced may be lost, some of it may have reached the disk.
    pub fn crash(&mut self, at: At) {
        if !self.nodes[at].up {
            return;
        }
        let keep = self.rng.draw();
        self.nodes[at].crash(keep);
        for b in (0..self.nodes.len()).filter(|b| *b != at) {
            self.cut(at, b);
        }
    }

    /// The daemon is killed: what it has written is in the page cache, and survives.
    pub fn kill(&mut self, at: At) {
        self.nodes[at].synced = self.nodes[at].log.len();
        self.crash(at);
    }

    /// A host that is down loses everything after its first `keep` updates, synced or not.
    pub fn lose_log(&mut self, at: At, keep: usize) {
        assert!(!self.nodes[at].up, "only a host that is down");
        self.nodes[at].log.truncate(keep);
        self.nodes[at].synced = self.nodes[at].log.len();
    }

    /// An operator has a host that is down drop its copy.
    pub fn discard(&mut self, at: At) {
        self.lose_log(at, 0);
        self.nodes[at].discard();
    }

    /// A host that is down comes back with an empty store directory.
    pub fn wipe(&mut self, at: At) {
        self.lose_log(at, 0);
        self.nodes[at].wipe();
    }

    /// The host starts again from what its disk holds.
    pub fn restart(&mut self, at: At) {
        if self.nodes[at].up {
            return;
        }
        self.nodes[at].up = true;
        if let Some((state, meta)) = self.nodes[at].recover(self.image) {
            let (id, timing, kind) = (self.nodes[at].id.clone(), self.timing.clone(), self.nodes[at].kind);
            self.make(at, |env, out| {
                Machine::recover(env, id, timing, kind, state, None, meta.as_deref(), out)
                    .expect("own meta record")
            });
        }
        for b in (0..self.nodes.len()).filter(|b| *b != at) {
            self.heal(at, b);
        }
    }

    // --- guests and operators ---

    /// A token for a request.
    pub fn token(&mut self) -> Token {
        self.next_token += 1;
        self.next_token
    }

    /// A guest writes at a host, if its gate is open.
    pub fn write(&mut self, at: At) -> bool {
        let now = self.now;
        if self.nodes[at].machine.as_ref().is_none_or(|m| m.may_write(now) != Gate::Open) {
            return false;
        }
        let mut block = [1; 32];
        self.rng.fill(&mut block[1..]);
        let draft = Draft {
            op: Op::Write { size_after_bytes: None },
            start: BlockIndex(self.rng.below(1 << 20)),
            count: BlockCount(1),
            digests: vec![Digest::from_bytes(block)],
            flags: 0,
        };
        let update = self.with(at, |m, env, out| m.append(env, draft, out)).expect("the machine runs");
        let node = &mut self.nodes[at];
        // `with` has executed the outputs; the guest's own update comes before anything they appended.
        node.store(&update);
        self.pump(at);
        true
    }

    /// Appends an operation and a Seal over it, as the engine does for a block-level sync.
    pub fn vouch(&mut self, at: At) {
        let draft = Draft::op(Op::Resize { size_bytes: 1 << 20 });
        let made = self.with(at, |m, env, out| m.append_vouched(env, draft, out)).expect("the machine runs");
        self.nodes[at].store_together(&<[Update; 2]>::from(made));
        self.pump(at);
    }

    /// Writes `n` times; panics when the gate is shut.
    ///
    /// # Panics
    /// See above.
    pub fn writes(&mut self, at: At, n: usize) {
        for _ in 0..n {
            assert!(self.write(at), "host {at} takes writes\n{}", self.describe());
        }
    }

    /// Writes, flushes, and expects the answer within 5 s.
    ///
    /// # Panics
    /// When it does not come, or is an error.
    pub fn write_and_flush(&mut self, at: At) -> Head {
        self.writes(at, 3);
        let head = self.nodes[at].head();
        let token = self.flush(at);
        assert_eq!(self.flush_answer(token), Ok(()), "{}", self.describe());
        head
    }

    /// True when the copy at a host holds this update.
    #[must_use]
    pub fn holds(&self, at: At, head: Head) -> bool {
        node::head_at(&self.nodes[at].log, head.seq) == Some(head)
    }

    /// A guest flushes at a host. The answer will be in `flushed`.
    pub fn flush(&mut self, at: At) -> Token {
        let token = self.token();
        self.oracle.flush_begins(token, self.nodes[at].head());
        self.input(at, Input::Flush { token });
        token
    }

    /// An operator's order. The answer will be in `ops`.
    pub fn op(&mut self, at: At, input: impl FnOnce(Token) -> Input) -> Token {
        let token = self.token();
        self.input(at, input(token));
        token
    }

    // --- running ---

    /// Lets `ms` pass.
    pub fn run(&mut self, ms: u64) {
        let end = self.now.plus(ms);
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until `done`; panics after `ms`.
    ///
    /// # Panics
    /// When it does not happen.
    pub fn until(&mut self, what: &str, ms: u64, done: impl Fn(&Self) -> bool) {
        let end = self.now.plus(ms);
        while !done(self) {
            assert!(self.step(end), "not within {ms} ms: {what}\n{}", self.describe());
        }
    }

    /// Runs until an operation is answered.
    ///
    /// # Panics
    /// When it is not within 20 s.
    pub fn answer(&mut self, token: Token) -> Result<OpOutcome, OpError> {
        self.until("an answer to an operation", 20_000, |c| c.ops.contains_key(&token));
        self.ops[&token].clone()
    }

    /// Runs until a flush is answered.
    ///
    /// # Panics
    /// When it is not within 20 s.
    pub fn flush_answer(&mut self, token: Token) -> Result<(), FlushError> {
        self.until("an answer to a flush", 20_000, |c| c.flushed.contains_key(&token));
        self.flushed[&token]
    }

    /// The next event not after `end`; false when there is none.
    fn step(&mut self, end: Millis) -> bool {
        let disks = self.nodes.iter().enumerate().filter_map(|(at, n)| n.next_done().map(|t| (t, 0, at, 0)));
        let timers = self.nodes.iter().enumerate().filter_map(|(at, n)| n.deadline().map(|t| (t, 1, at, 0)));
        let packets = self.paths.iter().flat_map(|((a, b), p)| {
            let cut = p.cut_at.filter(|_| p.connected).map(|t| (t.plus(NOTICE_MS), 2, *a, *b));
            let first = p.queues[0].front().map(|q| (q.0, 3, *a, *b));
            let second = p.queues[1].front().map(|q| (q.0, 3, *b, *a));
            [cut, first, second].into_iter().flatten()
        });
        let Some((t, kind, a, b)) = disks.chain(timers).chain(packets).min() else { return false };
        if t > end {
            return false;
        }
        self.now = self.now.max(t);
        match kind {
            0 => self.disk_done(a),
            1 => self.input(a, Input::Tick),
            2 => self.disconnect((a, b)),
            _ => self.deliver(a, b),
        }
        true
    }

    fn disk_done(&mut self, at: At) {
        match self.nodes[at].finish_one() {
            Some(Done::Sync(head)) => self.input(at, Input::Synced { head }),
            Some(Done::Meta(version)) => self.input(at, Input::MetaPersisted { version }),
            Some(Done::Import(from)) => self.import(at, from),
            None => {}
        }
    }

    fn import(&mut self, at: At, from: At) {
        let served = self.nodes[from].log.last().filter(|_| self.nodes[from].up).map(|(_, s)| s.clone());
        let host = self.nodes[from].id.host;
        match served.filter(|s| self.nodes[at].machine.as_mut().is_some_and(|m| m.may_import(host, s))) {
            Some(state) => {
                let state = Box::new(state);
                let log = self.nodes[from].log.clone();
                self.nodes[at].replace(log);
                self.input(at, Input::Imported { state });
            }
            None => self.input(at, Input::ImportFailed),
        }
    }

    fn deliver(&mut self, from: At, to: At) {
        let key = (from.min(to), from.max(to));
        let path = self.paths.get_mut(&key).expect("invariant: a path for each pair");
        let (_, packet) = path.queues[usize::from(from > to)].pop_front().expect("invariant: just looked at");
        path.last_open = Some(self.now);
        self.receive(from, to, packet);
    }

    /// A packet arrives. Public, so that tests can send what no machine would.
    pub fn receive(&mut self, from: At, to: At, packet: Packet) {
        let host = self.nodes[from].id.host;
        if !self.nodes[to].up {
            return;
        }
        match packet {
            Packet::Msg(msg) => {
                if self.nodes[to].machine.is_none()
                    && let ImageMsg::Offer { role, .. } | ImageMsg::Propose { role, .. } = &*msg
                {
                    let (id, timing, image, role) =
                        (self.nodes[to].id.clone(), self.timing.clone(), self.image, *role);
                    self.make(to, |env, out| Machine::blank(env, id, timing, image, role, out));
                }
                if let ImageMsg::Sync { .. } = &*msg {
                    self.oracle.syncs += 1;
                }
                self.input(to, Input::Msg { from: host, msg });
            }
            Packet::Update(update) => {
                // A witness has no payload to send.
                let bare = self.nodes[from].kind == MemberRole::Witness && update.header.payload_blocks() > 0;
                if bare && self.nodes[to].kind == MemberRole::Replica {
                    let why = vmfs_common::chain::Refusal::AlteredPayload;
                    self.with(to, |m, env, out| m.refuse(env, host, Some(&update), why, out));
                    return;
                }
                self.take(host, to, &update);
            }
        }
    }

    fn take(&mut self, from: HostId, to: At, update: &Update) {
        use crate::api::Take;
        loop {
            match self.with(to, |m, env, out| m.check_update(env, from, update, out)) {
                Some(Ok(Take::Append)) => break,
                Some(Ok(Take::RollBack { to: head })) => self.roll_back(to, head.seq),
                _ => return,
            }
        }
        self.nodes[to].store(update);
        self.with(to, |m, env, out| m.took(env, update, out));
        self.pump(to);
    }

    fn roll_back(&mut self, at: At, to: Seq) {
        let state = self.nodes[at].roll_back(to, self.image);
        self.with(at, |m, env, out| m.rolled_back(env, state, out));
    }

    /// Feeds a machine, and executes what it wants done.
    pub fn input(&mut self, at: At, input: Input) {
        self.with(at, |m, env, out| m.handle(env, input, out));
        self.pump(at);
    }

    /// For messages of failed tests.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!("at {} ms\n", self.now.0);
        for (at, n) in self.nodes.iter().enumerate() {
            let what = n.machine.as_ref().map(|m| (m.status(self.now).health, m.describe_role()));
            text += &format!("{at} up={} head={:?} {what:?}\n", n.up, n.head());
        }
        for e in self.events.iter().rev().take(60).rev() {
            text += &format!("{e:?}\n");
        }
        text
    }
}
