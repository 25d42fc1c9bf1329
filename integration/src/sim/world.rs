//! The clock, the events, and hosts going up and down.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use vmfs_common::policy::MemberRole;
use vmfs_common::{Head, HostId, Seq};
use vmfs_proto::{Input, Machine, Timing};
use vmfs_store::Store;
use vmfs_store::simdisk::SimDisk;

use super::broken::Broken;
use super::check::Check;
use super::host::{self, Copy, DATASTORE, Host, IMAGE, Running, store_config};
use super::liar::Lying;
use super::link::{Net, Packet, Us};
use super::model::Model;
use super::oracle::Oracle;
use super::rng::Rng;
use super::{At, Tally};

/// What happens at some time.
#[derive(Debug)]
pub(crate) enum Event {
    Deliver { from: At, to: At, session: u64, packet: Packet },
    SideUp { at: At, peer: At, session: u64 },
    SideDown { at: At, peer: At, session: u64 },
    Tick { at: At, life: u64 },
    SlowTick { at: At, life: u64 },
    Background { at: At, life: u64 },
    Beat { at: At, life: u64 },
    SyncRun { at: At, life: u64 },
    SyncDone { at: At, life: u64, head: Head },
    MetaRun { at: At, life: u64 },
    MetaDone { at: At, life: u64, version: u64 },
    Pump { at: At, life: u64, peer: At },
    ReadHeaders { at: At, life: u64, to: HostId, after: Head, upto: Head },
    Serve { at: At, life: u64, to: HostId, after: Seq, upto: Head, headers_only: bool },
    Pull { at: At, life: u64 },
    Boot { at: At, life: u64 },
    Network,
}

struct Due {
    at: Us,
    no: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.no == other.no
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.no).cmp(&(other.at, other.no))
    }
}

/// Runs with a lower seed go as they did before owners could expect flushes, so that the seeds that once found
/// something go on to mean it.
pub const FORESEEN_FROM: u64 = 400_000;

/// The same, before hosts scrubbed while they worked.
pub const SCRUBBED_FROM: u64 = 800_000;

/// A cluster and everything around it.
pub(crate) struct World {
    pub(crate) now: Us,
    pub(crate) rng: Rng,
    pub(crate) hosts: Vec<Host>,
    pub(crate) net: Net,
    pub(crate) model: Model,
    pub(crate) oracle: Oracle,
    pub(crate) timing: Timing,
    /// A connection that hears nothing for this long is given up.
    pub(crate) idle_us: Us,
    /// Disk latency, in microseconds, at most.
    pub(crate) disk_us: Us,
    pub(crate) violation: Option<(Check, String)>,
    /// What is broken on purpose.
    pub(crate) broken: Option<Broken>,
    pub(crate) lying: Lying,
    /// Owners expect flushes, and have logs made durable before they are asked to.
    pub(crate) foresees: bool,
    /// Hosts scrub while they work.
    pub(crate) scrubs: bool,
    pub(crate) counts: Tally,
    pub(crate) next_token: u64,
    queue: BinaryHeap<Reverse<Due>>,
    next_no: u64,
    trace: Option<VecDeque<String>>,
}

impl World {
    pub(crate) fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5ee1);
        let timing = Timing { lease_ms: 500 << rng.below(3), max_lag_bytes: 1 << 20, ..Timing::default() };
        let mut world = Self {
            now: 1_000_000,
            idle_us: timing.lease_ms * 1000 * rng.between(1, 3),
            disk_us: [300, 3_000, 30_000][rng.index(3)],
            rng,
            hosts: Vec::new(),
            net: Net::default(),
            model: Model::new(),
            oracle: Oracle::default(),
            timing,
            violation: None,
            broken: None,
            lying: Lying::default(),
            foresees: seed >= FORESEEN_FROM,
            scrubs: seed >= SCRUBBED_FROM,
            counts: Tally::default(),
            next_token: 0,
            queue: BinaryHeap::new(),
            next_no: 0,
            trace: trace.then(VecDeque::new),
        };
        world.after(1000, Event::Network);
        world
    }

    pub(crate) fn tally(&self) -> Tally {
        let mut t = self.counts;
        t.updates = self.model.updates() as u64;
        t.virtual_ms = self.now / 1000;
        t
    }
    pub(crate) fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }
    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.trace {
            lines.push_back(format!("{:>10.3} {}", self.now as f64 / 1000.0, text()));
            if lines.len() > 200_000 {
                lines.pop_front();
            }
        }
    }
    pub(crate) fn take_trace(&mut self, lines: usize) -> Vec<String> {
        let mut all: Vec<String> = self.trace.take().unwrap_or_default().into();
        let keep = std::env::var("VMFS_SIM_TRACE").ok().and_then(|n| n.parse().ok()).unwrap_or(lines);
        all.drain(..all.len().saturating_sub(keep));
        all
    }
    pub(crate) fn fail(&mut self, check: Check, what: String) {
        self.note(|| format!("VIOLATION {check:?}: {what}"));
        self.violation.get_or_insert((check, what));
    }
    pub(crate) fn mix(&mut self, x: u64) {
        let f = self.counts.fingerprint.rotate_left(5) ^ x;
        self.counts.fingerprint = f.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    pub(crate) fn after(&mut self, us: Us, event: Event) {
        self.next_no += 1;
        self.queue.push(Reverse(Due { at: self.now + us, no: self.next_no, event }));
    }
    /// A delay of some disk operation.
    pub(crate) fn disk_delay(&mut self) -> Us {
        let limit = self.disk_us;
        100 + if self.rng.one_in(20) { self.rng.below(4 * limit) } else { self.rng.below(limit) }
    }
    pub(crate) fn at(&self, host: HostId) -> Option<At> {
        self.hosts.iter().position(|h| h.id.host == host)
    }
    pub(crate) fn host_id(&self, at: At) -> HostId {
        self.hosts[at].id.host
    }
    pub(crate) fn life(&self, at: At) -> u64 {
        self.hosts[at].life
    }

    /// One more host, up and empty.
    pub(crate) fn add_host(&mut self, role: MemberRole) -> At {
        let at = self.hosts.len();
        let offset = 1_000_000 + self.rng.below(1_000_000_000);
        self.hosts.push(Host::new(at, role, offset));
        let mut rng = Rng(self.rng.next());
        let slow = [300, 3_000, 20_000][rng.index(3)];
        self.net.add(at, std::iter::repeat_with(move || 50 + rng.below(slow)));
        self.boot(at);
        at
    }

    // --- running ---

    /// Lets time pass, or stops at a violation.
    pub(crate) fn run(&mut self, us: Us) {
        let end = self.now + us;
        while self.violation.is_none() && self.queue.peek().is_some_and(|d| d.0.at <= end) {
            let Reverse(due) = self.queue.pop().expect("invariant: just looked at");
            self.now = due.at;
            self.mix(due.at);
            self.happen(due.event);
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        let at = match &event {
            Event::Deliver { to, .. } => Some(*to),
            Event::SideUp { at, .. } | Event::SideDown { at, .. } => Some(*at),
            Event::Tick { at, life }
            | Event::SlowTick { at, life }
            | Event::Background { at, life }
            | Event::Beat { at, life }
            | Event::SyncRun { at, life }
            | Event::SyncDone { at, life, .. }
            | Event::MetaRun { at, life }
            | Event::MetaDone { at, life, .. }
            | Event::Pump { at, life, .. }
            | Event::ReadHeaders { at, life, .. }
            | Event::Serve { at, life, .. }
            | Event::Pull { at, life }
            | Event::Boot { at, life } => {
                if self.hosts[*at].life != *life {
                    return;
                }
                Some(*at)
            }
            Event::Network => None,
        };
        match event {
            Event::Deliver { from, to, session, packet } => self.deliver(from, to, session, packet),
            Event::SideUp { at, peer, session } => self.side_up(at, peer, session),
            Event::SideDown { at, peer, session } => self.side_down(at, peer, session),
            Event::Tick { at, .. } => self.tick(at),
            Event::SlowTick { at, .. } => self.slow_tick(at),
            Event::Background { at, .. } => self.background(at),
            Event::Beat { at, .. } => self.beat(at),
            Event::SyncRun { at, .. } => self.sync_run(at),
            Event::SyncDone { at, head, .. } => self.input(at, Input::Synced { head }),
            Event::MetaRun { at, .. } => self.meta_run(at),
            Event::MetaDone { at, version, .. } => self.input(at, Input::MetaPersisted { version }),
            Event::Pump { at, peer, .. } => self.pump(at, peer),
            Event::ReadHeaders { at, to, after, upto, .. } => self.read_headers(at, to, after, upto),
            Event::Serve { at, to, after, upto, headers_only, .. } => {
                self.serve(at, to, after, upto, headers_only);
            }
            Event::Pull { at, .. } => self.pull_step(at),
            Event::Boot { at, .. } => self.boot(at),
            Event::Network => self.network(),
        }
        if let Some(at) = at {
            self.settle(at);
        }
    }

    /// After everything that may have changed a host.
    pub(crate) fn settle(&mut self, at: At) {
        if self.hosts[at].has_stopped() && self.hosts[at].running.is_some() {
            self.power_cut(at);
            return;
        }
        let now = self.now;
        let host = &mut self.hosts[at];
        let (offset, life) = (host.clock_offset_ms, host.life);
        if let Some(copy) = host.copy_mut() {
            let due = copy.machine.as_ref().and_then(Machine::next_deadline);
            let due = due.map(|d| (d.0.saturating_sub(offset) * 1000).max(now));
            if let Some(due) = due.filter(|d| copy.tick_at.is_none_or(|t| *d < t)) {
                copy.tick_at = Some(due);
                self.after(due - now + 1 + due % 997, Event::Tick { at, life });
            }
        }
        self.observe(at);
    }

    fn tick(&mut self, at: At) {
        let now = self.hosts[at].now(self.now);
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        copy.tick_at = None;
        if copy.machine.as_ref().and_then(Machine::next_deadline).is_some_and(|d| d <= now) {
            self.input(at, Input::Tick);
        }
    }

    fn slow_tick(&mut self, at: At) {
        let life = self.life(at);
        self.after(250_000, Event::SlowTick { at, life });
        let now = self.hosts[at].now(self.now);
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        let progress: Vec<_> =
            copy.lines.iter_mut().filter_map(|(to, l)| Some((*to, l.sent.take()?))).collect();
        for (to, seq) in progress {
            let to = self.host_id(to);
            self.input(at, Input::StreamProgress { to, seq });
        }
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        let Some(machine) = &copy.machine else { return };
        let status = machine.status(now);
        copy.store.set_commit(machine.committed_seq());
        if let Some(seq) = status.members.iter().map(|m| m.durable_seq).min() {
            copy.store.retain_from(seq.next());
        }
    }

    fn background(&mut self, at: At) {
        let life = self.life(at);
        let pause = self.rng.between(100_000, 400_000);
        self.after(pause, Event::Background { at, life });
        let budget = self.rng.between(1, 512 << 10);
        let Some(running) = &self.hosts[at].running else { return };
        let moved = |r: &Running| r.copy.as_ref().map_or(0, |c| c.store.space_use().compacted_bytes);
        let before = moved(running);
        let done = running.store.background(1 << 20).and_then(|_| running.store.compact(budget));
        self.counts.compacted += moved(running).saturating_sub(before);
        if let Err(e) = done {
            self.note(|| format!("{at} background: {e}"));
            if !self.hosts[at].is_excused() && self.hosts[at].stop_call.is_none() {
                let what = format!("background work of host {at} failed on a healthy disk: {e}");
                self.fail(Check::BackgroundWorks, what);
            }
        }
        self.scrub_on(at);
    }

    // --- up and down ---

    /// Starts a host from what its disk holds.
    pub(crate) fn boot(&mut self, at: At) {
        if self.hosts[at].running.is_some() {
            return;
        }
        let host = &mut self.hosts[at];
        host.life += 1;
        let life = host.life;
        let disk = Arc::new(host.disk.clone());
        let id = host.id.clone();
        let opened = match Store::exists(&*disk) {
            Ok(true) => Store::open(disk, DATASTORE, id.host, store_config()),
            Ok(false) => Store::create(disk, DATASTORE, id.host, id.store, store_config()),
            Err(e) => Err(e),
        };
        let store = match opened {
            Ok(store) => store,
            Err(e) => return self.boot_failed(at, &e),
        };
        self.note(|| format!("{at} boots"));
        self.hosts[at].running =
            Some(Running { store: store.clone(), contacts: Default::default(), copy: None });
        let _ = self.show_unsynced(at, &store);
        self.check_reopened(at, &store);
        if self.hosts[at].running.is_none() {
            return;
        }
        for (pause, event) in [
            (250_000, Event::SlowTick { at, life }),
            (self.rng.between(1, 200_000), Event::Background { at, life }),
            (self.rng.below(10_000), Event::Beat { at, life }),
        ] {
            self.after(pause, event);
        }
        if self.violation.is_none() {
            self.take_up(at, &store);
        }
        self.settle(at);
    }

    fn boot_failed(&mut self, at: At, e: &vmfs_store::StoreError) {
        self.note(|| format!("{at} does not boot: {e}"));
        let host = &mut self.hosts[at];
        let excused = host.is_excused();
        if host.has_stopped() {
            let seed = self.rng.next();
            let host = &mut self.hosts[at];
            host.disk = host.disk.power_cut(seed);
            host.stop_call = None;
        }
        if self.hosts[at].bad_disk && !self.hosts[at].faulty {
            return self.replace_disk(at);
        }
        if !excused {
            let what = format!("the store of host {at} does not open on a healthy disk: {e}");
            return self.fail(Check::StoreOpens, what);
        }
        let life = self.life(at);
        let pause = self.rng.between(50_000, 500_000);
        self.after(pause, Event::Boot { at, life });
    }

    /// As the engine takes up images at its start.
    fn take_up(&mut self, at: At, store: &Arc<Store>) {
        let Some(copy) = store.image(IMAGE) else { return };
        let meta = store.get_meta(IMAGE);
        if copy.head().seq == Seq::ZERO && meta.is_none() {
            // The power was cut before its first update was durable.
            if let Err(e) = store.remove_image(IMAGE) {
                self.note(|| format!("{at} cannot remove the empty image: {e}"));
            }
            return;
        }
        let (kind, state, cut_off) = (copy.kind(), (*copy.state()).clone(), copy.cut_off());
        let (id, timing) = (self.hosts[at].id.clone(), self.timing.clone());
        let meta: Option<Vec<u8>> = meta.map(|m| m.to_vec());
        self.admit(at, copy, |env, out| {
            Machine::recover(env, id, timing, kind, state, cut_off, meta.as_deref(), out)
                .map_err(|e| format!("the promises cannot be read: {e}"))
        });
    }

    /// Makes the machine of a copy and carries out its first outputs.
    pub(crate) fn admit(
        &mut self,
        at: At,
        store: Arc<vmfs_store::ImageStore>,
        make: impl FnOnce(&mut vmfs_proto::Env<'_>, &mut Vec<vmfs_proto::Output>) -> Result<Machine, String>,
    ) {
        let copy = Copy {
            store,
            machine: None,
            lines: Default::default(),
            meta_next: None,
            meta_writing: false,
            pull: None,
            tick_at: None,
            scrub: None,
            pinned: None,
        };
        self.hosts[at].running.as_mut().expect("invariant: the host is up").copy = Some(copy);
        let mut out = Vec::new();
        match self.env(at, |env| make(env, &mut out)) {
            Ok(machine) => self.unlock(at, machine, out),
            Err(e) => return self.fail(Check::PromisesAreReadable, format!("host {at}: {e}")),
        }
        for peer in 0..self.hosts.len() {
            if peer != at && self.net.session(at, peer).is_some() {
                let host = self.host_id(peer);
                self.input(at, Input::PeerUp { host });
            }
        }
    }

    /// The power fails: any part of what was not synced may be lost.
    pub(crate) fn power_cut(&mut self, at: At) {
        self.stop(at, "loses power");
        let seed = self.rng.next();
        let host = &mut self.hosts[at];
        host.disk = host.disk.power_cut(seed);
        host.stop_call = None;
    }

    /// The process dies; the page cache survives.
    pub(crate) fn kill(&mut self, at: At) {
        self.stop(at, "is killed");
        let host = &mut self.hosts[at];
        host.disk = host.disk.kill();
        host.stop_call = None;
    }

    fn stop(&mut self, at: At, how: &'static str) {
        if self.hosts[at].running.is_none() {
            return;
        }
        self.note(|| format!("{at} {how}"));
        self.counts.crashes += 1;
        let host = &mut self.hosts[at];
        host.running = None;
        host.life += 1;
        for peer in 0..self.hosts.len() {
            if peer != at {
                self.net.way(peer, at).session = None;
            }
        }
        let pause = self.rng.between(1_000, 2_000_000);
        let life = self.life(at);
        self.after(pause, Event::Boot { at, life });
    }

    /// The disk is replaced by an empty one: the host is a stranger from now on.
    pub(crate) fn wipe(&mut self, at: At) {
        self.stop(at, "loses its disk");
        let wipes = self.hosts[at].id.store.as_bytes()[0] + 1;
        let host = &mut self.hosts[at];
        host.disk = SimDisk::new(1 << 30);
        host.id = host::identity(at, wipes);
        host.stop_call = None;
        (host.faulty, host.full) = (false, false);
        host.known = Default::default();
        if host.running.is_none() {
            let life = host.life;
            self.after(100_000, Event::Boot { at, life });
        }
    }
}
