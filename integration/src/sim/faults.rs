//! What fate and operators do to a cluster while it runs.

use vmfs_common::BLOCK_BYTES_U64;
use vmfs_common::header::{Update, UpdateHeader};
use vmfs_common::op::Op;
use vmfs_common::policy::{Acks, ImagePolicy, Member, MemberRole, OnQuorumLoss};
use vmfs_proto::Input;

use super::At;
use super::link::Packet;
use super::world::World;

/// Most hosts of a run.
const HOSTS_MAX: usize = 7;

/// Which kinds of trouble a run has: most runs have some, so that each is met alone and together.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    crashes: bool,
    disk: bool,
    full: bool,
    network: bool,
    slow: bool,
    promotions: bool,
    members: bool,
    wipes: bool,
    forced: bool,
    replays: bool,
    /// One member's disk alters, misplaces and loses what was written.
    rot: bool,
    /// One member lies.
    liar: bool,
}

impl Plan {
    pub(crate) fn new(w: &mut World) -> Self {
        let none = std::env::var_os("VMFS_SIM_CALM").is_some();
        let mut some = |n: u64| w.rng.below(10) < n && !none;
        let plan = Self {
            crashes: some(7),
            disk: some(3),
            full: some(2),
            network: some(7),
            slow: some(3),
            promotions: some(7),
            members: some(4),
            wipes: some(2),
            forced: some(2),
            replays: some(3),
            rot: some(2),
            liar: some(2),
        };
        w.note(|| format!("{plan:?}"));
        plan
    }

    /// The member whose disk is not to be trusted, or the one that lies. The promises bear a minority of them
    /// where a flush never rests on one copy, and where nobody else is lost.
    pub(crate) fn choose_the_unsound(&mut self, w: &mut World, roles: &[MemberRole], policy: ImagePolicy) {
        let data = roles.iter().filter(|r| **r == MemberRole::Replica).count();
        let strict = policy.acks != Acks::Local && policy.on_quorum_loss == OnQuorumLoss::Stall;
        self.liar &= strict && roles.len() > 2 && data > 1;
        self.rot &= strict && roles.len() > 2 && data > 1 && !self.liar;
        if !self.liar && !self.rot {
            return;
        }
        (self.members, self.wipes, self.forced) = (false, false, false);
        let at = w.rng.index(roles.len());
        (w.hosts[at].liar, w.hosts[at].bad_disk) = (self.liar, self.rot);
        let what = if self.liar { "lies" } else { "has a bad disk" };
        w.note(|| format!("{at} {what}"));
    }
}

impl World {
    /// An operator does something, or two do.
    pub(crate) fn operator(&mut self, plan: &Plan, at: At) {
        let other = self.rng.index(self.hosts.len());
        match self.rng.below(8) {
            0 if plan.promotions => {
                self.order(at, |token| Input::Promote { force: false, token });
                if self.rng.one_in(3) && other != at {
                    self.order(other, |token| Input::Promote { force: false, token });
                }
            }
            1 if plan.promotions => {
                let to = self.host_id(other);
                let from = self.owner().unwrap_or(at);
                self.order(from, |token| Input::Handover { to, token });
            }
            2 | 3 if plan.members => self.change_members(),
            4 if plan.forced && self.rng.one_in(3) => {
                self.order(at, |token| Input::Promote { force: true, token });
            }
            5 if self.rng.one_in(10) => {
                self.order(at, |token| Input::Fail { token });
            }
            6 if plan.promotions && plan.network && self.rng.one_in(3) => self.take_turns(at),
            // Not where members and policy change: what a forced promotion says then is not always so.
            7 if plan.forced && self.rng.one_in(2) => self.force_one_that_lags(at),
            _ => {}
        }
    }

    /// Two halves of the members run the image in turn: the owner is cut off while its guest writes, another host
    /// is promoted and acknowledges something, then that one is cut off, and the first half goes on.
    fn take_turns(&mut self, next: At) {
        let Some(first) = self.owner().filter(|owner| *owner != next) else { return };
        self.isolate(first, true);
        for _ in 0..self.rng.below(12) {
            self.write(first);
        }
        self.order(next, |token| Input::Promote { force: false, token });
        self.flush_soon(next);
        if self.rng.one_in(2) {
            self.write(next);
            let pause = self.rng.below(200_000);
            self.run(pause);
        }
        self.isolate(first, false);
        self.isolate(next, true);
        let pause = self.rng.below(1_000_000);
        self.run(pause);
        let again = self.rng.index(self.hosts.len());
        self.order(again, |token| Input::Promote { force: false, token });
        let patience = self.rng.below(3_000_000);
        self.run(patience);
    }

    /// A guest flushes as soon as a host owns the image, and nothing happens before it has its answer.
    fn flush_soon(&mut self, at: At) {
        let mut asked = None;
        for _ in 0..self.rng.between(50, 600) {
            self.run(5_000);
            let owns = self.hosts[at].machine().is_some_and(|m| m.describe_role().starts_with("owner"));
            match asked {
                None if owns => asked = Some(self.flush(at)),
                Some(token) if self.oracle.flushed.contains_key(&token) => return,
                _ => {}
            }
        }
    }

    /// Only a member that lags behind is left, and an operator forces it: the owner's guest flushes while that
    /// member is cut off, and the owner is cut off when it is back.
    fn force_one_that_lags(&mut self, at: At) {
        let Some(owner) = self.owner().filter(|owner| *owner != at) else { return };
        self.isolate(at, true);
        for _ in 0..self.rng.between(1, 3) {
            self.write(owner);
            self.flush(owner);
            let pause = self.rng.between(100_000, 3_000_000);
            self.run(pause);
        }
        self.isolate(at, false);
        self.isolate(owner, true);
        let pause = self.rng.below(2_000_000);
        self.run(pause);
        self.order(at, |token| Input::Promote { force: true, token });
        let patience = self.rng.between(1_000_000, 20_000_000);
        self.run(patience);
    }

    /// Cuts all ways to and from a host, or opens them.
    pub(crate) fn isolate(&mut self, at: At, cut: bool) {
        for other in 0..self.hosts.len() {
            self.set_open(at, other, !cut);
            self.set_open(other, at, !cut);
        }
    }

    fn change_members(&mut self) {
        let Some(owner) = self.owner() else { return };
        let state = self.hosts[owner].machine().expect("invariant: it serves").state().clone();
        let host = self.rng.index(self.hosts.len());
        let store_of = |m: &Member| self.hosts.iter().find(|h| h.id.host == m.host).map(|h| h.id.store);
        if let Some(gone) = state.members.all().iter().find(|m| store_of(m) != Some(m.store)) {
            // Whoever removes another one now has no quorum left.
            let host = gone.host;
            self.order(owner, |token| Input::RemoveMember { host, token });
            return;
        }
        match self.rng.below(5) {
            0 if self.hosts.len() < HOSTS_MAX => {
                let role = if self.rng.one_in(3) { MemberRole::Witness } else { MemberRole::Replica };
                let at = self.add_host(role);
                let member = self.hosts[at].member();
                self.order(owner, |token| Input::AddMember { member, token });
            }
            0 | 1 => {
                let member = self.hosts[host].member();
                self.order(owner, |token| Input::AddMember { member, token });
            }
            2 if state.members.len() > 2 => {
                let host = self.host_id(host);
                self.order(owner, |token| Input::RemoveMember { host, token });
            }
            _ => {
                let policy = ImagePolicy {
                    acks: [Acks::Majority, Acks::Majority, Acks::All, Acks::Local][self.rng.index(4)],
                    on_quorum_loss: if self.rng.one_in(2) {
                        OnQuorumLoss::Degrade
                    } else {
                        OnQuorumLoss::Stall
                    },
                };
                self.order(owner, |token| Input::SetPolicy { policy, token });
            }
        }
    }

    /// Fate strikes.
    pub(crate) fn fault(&mut self, plan: &Plan) {
        let n = self.hosts.len();
        let (a, b) = (self.rng.index(n), self.rng.index(n));
        if plan.rot && self.rng.one_in(4) {
            return self.rot();
        }
        if plan.liar && self.rng.one_in(2) {
            return self.lie();
        }
        match self.rng.below(24) {
            0 if plan.crashes => {
                self.power_cut(a);
            }
            1 | 2 if plan.crashes && self.hosts[a].stop_call.is_none() => {
                // At some disk call before long.
                let call = self.hosts[a].disk.calls() + self.rng.below(40);
                self.hosts[a].disk.stop_at_call(Some(call));
                self.hosts[a].stop_call = Some(call);
                self.note(|| format!("{a} will lose power at disk call {call}"));
            }
            3 if plan.crashes => self.kill(a),
            4 if plan.crashes && self.rng.one_in(6) => (0..n).for_each(|at| self.power_cut(at)),
            5 if plan.network && a != b => self.reset(a, b),
            6 if plan.network && a != b => self.connect(a, b),
            7 if plan.network => self.set_open(a, b, false),
            8 if plan.network => {
                self.set_open(a, b, false);
                self.set_open(b, a, false);
            }
            9 if plan.network => self.isolate(a, true),
            10..=12 => {
                self.set_open(a, b, true);
                self.set_open(b, a, true);
            }
            13 => self.isolate(a, false),
            14 if plan.slow && a != b => {
                let (delay, rate) = (self.rng.below(80_000), [0, 20, 200][self.rng.index(3)]);
                let way = self.net.way(a, b);
                (way.delay, way.rate) = (delay, rate);
            }
            15 if plan.disk => self.break_disk(a),
            16 => self.mend_disk(a),
            17 if plan.full => self.fill_disk(a),
            18 if plan.wipes && self.rng.one_in(4) => self.wipe_a_minority(a),
            19 | 20 if plan.replays => self.replay(),
            22 | 23 if plan.replays => self.forge(None),
            21 if self.rng.one_in(4) => {
                // The wall clock jumps.
                self.hosts[a].wall_skew_ns = 1_600_000_000_000_000_000 + (self.rng.next() >> 4);
            }
            _ => {}
        }
    }

    fn break_disk(&mut self, at: At) {
        self.hosts[at].faulty = true;
        if self.rng.one_in(2) {
            self.note(|| format!("syncs of {at} fail"));
            self.hosts[at].disk.fail_syncs(true);
        } else {
            let call = self.hosts[at].disk.calls() + self.rng.below(30);
            self.note(|| format!("disk call {call} of {at} will fail"));
            self.hosts[at].disk.fail_call(Some(call));
        }
    }

    fn fill_disk(&mut self, at: At) {
        let room = self.rng.below(1 << 20);
        let host = &mut self.hosts[at];
        host.full = true;
        host.disk.set_capacity_bytes(host.disk.used_bytes() + room);
        self.note(|| format!("the disk of {at} has {room} bytes left"));
    }

    /// The disk works again; an image that has stopped over it is taken up anew.
    pub(crate) fn mend_disk(&mut self, at: At) {
        let host = &mut self.hosts[at];
        if !host.faulty && !host.full {
            return;
        }
        host.disk.fail_syncs(false);
        host.disk.fail_call(None);
        host.disk.set_capacity_bytes(1 << 30);
        self.note(|| format!("the disk of {at} works"));
        if self.rng.one_in(2) {
            self.power_cut(at);
        } else {
            self.kill(at);
        }
        (self.hosts[at].faulty, self.hosts[at].full) = (false, false);
    }

    /// A disk is lost, if that is no more than the members can bear.
    fn wipe_a_minority(&mut self, at: At) {
        let Some(owner) = self.owner() else { return };
        let machine = self.hosts[owner].machine().expect("invariant: it serves");
        let now = self.hosts[owner].now(self.now);
        let (state, status) = (machine.state(), machine.status(now));
        let strict =
            state.policy == ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Stall };
        let settled = status.commit >= state.config_seq && !status.degraded && !status.forced;
        let gone = |m: &vmfs_common::policy::Member| {
            let host = self.hosts.iter().find(|h| h.id.host == m.host);
            host.is_none_or(|h| h.id.store != m.store)
        };
        let lost = state.members.all().iter().filter(|m| gone(m)).count();
        let bearable = state.members.len().saturating_sub(1) / 2;
        let data = state.members.data_members().filter(|m| !gone(m)).count();
        if !strict || !settled || at == owner || self.oracle.wiped || lost + 1 > bearable {
            return;
        }
        // With fewer data members than a flush needs copies of, only force goes on under `stall`.
        if data <= state.members.data_copies() {
            return;
        }
        self.oracle.wiped = true;
        self.wipe(at);
    }

    /// Somebody sends an update that the owner never made, or a bent one.
    pub(crate) fn forge(&mut self, by: Option<At>) {
        let updates: Vec<_> =
            self.oracle.heard.iter().filter(|(_, _, p)| matches!(p, Packet::Update(..))).cloned().collect();
        if updates.is_empty() {
            return;
        }
        let (mut from, to, packet) = updates[self.rng.index(updates.len())].clone();
        let Packet::Update(header, mut payload) = packet else { return };
        let (Some(copy), Ok(update)) = (self.hosts[to].copy(), Update::decode(&header)) else { return };
        let head = copy.store.head();
        if self.rng.one_in(3) {
            from = self.rng.index(self.hosts.len());
        }
        from = by.unwrap_or(from);
        // From its owner, or the later one that the copy follows, to a copy that has the update before it (and may be cut
        // back to that), another one would be as good as the true one until the next: a lying owner's are made elsewhere,
        // and nobody else speaks on its connection.
        let before = copy.store.head_at(update.header.seq.prev()).ok().flatten().unwrap_or(head);
        let now = self.hosts[to].now(self.now);
        let owner = self.hosts[to].machine().and_then(|m| m.status(now).owner);
        let speaks = [Some(update.header.epoch.host), owner].contains(&Some(self.host_id(from)));
        let is_next = update.header.parent == before.digest && speaks;
        let (mut h, digest) = (update.header, update.digest);
        match self.rng.below(6) {
            0 if !payload.is_empty() => {
                let mut bytes = payload.to_vec();
                let at = self.rng.index(bytes.len());
                bytes[at] ^= 1 << self.rng.below(8);
                payload = bytes.into();
            }
            1 => h.time_ns += 1,
            2 => self.bend_field(&mut h),
            3 => {
                (h.seq, h.parent, h.epoch) = (head.seq.next(), head.digest, head.epoch);
                self.bend_field(&mut h);
            }
            4 => (h.seq, h.parent, h.epoch) = (head.seq.next(), head.digest, head.epoch),
            _ => {
                (h.seq, h.parent, h.epoch) = (head.seq.next(), head.digest, head.epoch);
                h.epoch.number += 1;
                h.epoch.host = self.host_id(from);
            }
        }
        if from == to || self.net.session(to, from).is_none() {
            return;
        }
        let forged = Update::from_header(h);
        if is_next && forged.digest != digest {
            return;
        }
        self.note(|| {
            format!("{from} forges update {} of {} to {to}", forged.header.seq, forged.header.epoch)
        });
        self.receive(from, to, &Packet::Update((*forged.bytes).into(), payload));
        self.settle(to);
    }

    fn bend_field(&mut self, h: &mut UpdateHeader) {
        let bit = 1u8 << self.rng.below(8);
        match self.rng.below(8) {
            0 => h.commit = h.commit.next(),
            1 => h.reveal[self.rng.index(32)] ^= bit,
            2 => h.tag[self.rng.index(32)] ^= bit,
            3 => h.flags ^= 1,
            4 => h.start = vmfs_common::BlockIndex(h.start.0 + 1),
            5 => h.acked.iter_mut().for_each(|s| *s = s.next()),
            6 => h.public = vmfs_common::Digest::from_bytes([bit; 32]),
            _ => h.op = Op::Resize { size_bytes: BLOCK_BYTES_U64 },
        }
    }

    /// Something that was said before is said again, by the same host.
    fn replay(&mut self) {
        if self.oracle.heard.is_empty() {
            return;
        }
        let votes = !self.oracle.heard_votes.is_empty() && self.rng.one_in(3);
        let heard = if votes { &self.oracle.heard_votes } else { &self.oracle.heard };
        let (from, to, packet) = heard[self.rng.index(heard.len())].clone();
        if !super::oracle::may_be_replayed(&packet) || self.net.session(to, from).is_none() {
            return;
        }
        self.note(|| format!("{from} says something again to {to}"));
        self.receive(from, to, &packet);
        self.settle(to);
    }
}
