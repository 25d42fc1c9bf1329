//! What must hold of flushes, owners and promotions, over the whole cluster.

use vmfs_common::op::Op;
use vmfs_common::policy::{Acks, OnQuorumLoss};
use vmfs_common::state::ImageState;
use vmfs_common::{Epoch, HostId, Seq};
use vmfs_proto::{FlushError, Gate, Loss, Machine, OpError, OpOutcome};

use super::At;
use super::check::Check;
use super::link::Us;
use super::model::{Ix, is_lax};
use super::oracle::Oracle;
use super::world::World;

/// More than half of so many members.
const fn majority(members: usize) -> usize {
    members / 2 + 1
}

/// A check that fails, and what is wrong.
type Wrong = (Check, String);

/// An acknowledged flush.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Acked {
    target: Ix,
    /// Where the owner was when it acknowledged it: what a separate lineage acknowledges, no other one owes.
    by: Ix,
    epoch: Epoch,
    /// The policy in force allows it to be lost with one host.
    lax: bool,
    /// So few sound members hold it that those who lie, or whose disks do, can make up a quorum without.
    excused: bool,
}

/// An owner that has served.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Served {
    /// Its `EpochStart`.
    start: Ix,
    since: Us,
    forced: bool,
}

impl World {
    /// A guest asks for a flush of what it has written.
    pub(crate) fn flush_begins(&mut self, at: At, token: u64) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let head = copy.store.head();
        let lax = copy.machine.as_ref().is_some_and(|m| is_lax_at(m.state()));
        if let Some(ix) = self.head_ix(at, head) {
            self.oracle.asked.insert(token, (ix, lax));
        }
    }

    pub(crate) fn flush_done(&mut self, at: At, m: &Machine, token: u64, result: Result<(), FlushError>) {
        self.oracle.flushed.insert(token, result);
        self.note(|| format!("{at} answers flush {token}: {result:?}"));
        let asked = self.oracle.asked.remove(&token).filter(|_| result.is_ok());
        let Some((target, was_lax)) = asked else { return };
        self.counts.flushes += 1;
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        let Some(own) = self.head_ix(at, store.head()) else { return };
        if !self.model.contains(own, target) {
            let head = self.model.node(target).head;
            let what = format!("host {at} acknowledges a flush of {head:?}, which it has lost");
            return self.fail(Check::FlushIsHeld, what);
        }
        // What was written under one policy, and asked for then, need not meet a stricter one that came after it.
        let lax = was_lax || is_lax_at(m.state());
        self.check_copies(at, m, target, lax);
        let epoch = m.state().head().epoch;
        let acked = Acked { target, by: own, epoch, lax, excused: !self.is_owed(m, target) };
        let mut wrong = None;
        for (later, s) in self.oracle.served.range(epoch..).filter(|(e, _)| **e > epoch) {
            let without = !self.model.contains(s.start, target) && !self.model.split_by_force(s.start, own);
            if !lax && !acked.excused && without {
                wrong = Some(*later);
            }
        }
        if let Some(later) = wrong {
            let head = self.model.node(target).head;
            let what =
                format!("host {at} acknowledges a flush of {head:?}, and {later} has served without it");
            return self.fail(Check::FlushIsNotOutlived, what);
        }
        let model = &self.model;
        let weaker = |a: &Acked| (lax && !a.lax) || (acked.excused && !a.excused);
        self.oracle.acked.retain(|a| !model.contains(target, a.target) || weaker(a));
        self.oracle.acked.push(acked);
    }

    /// True when every quorum has a sound member with data that holds `target`: with n members, q of them a
    /// quorum, and any number that lie or whose disks do, at least n - q + 1 sound ones must hold it. A witness
    /// does not count: it knows of updates, and believes data members that have lost theirs without noticing.
    fn is_owed(&self, m: &Machine, target: Ix) -> bool {
        if self.hosts.iter().all(super::host::Host::is_sound) {
            return true;
        }
        let members = &m.state().members;
        let holds = |h: HostId| {
            let host = self.hosts.iter().find(|x| x.id.host == h).filter(|x| x.is_sound());
            host.is_some_and(|x| self.model.contains(x.known.durable, target))
        };
        let sound = members.data_members().filter(|x| holds(x.host)).count();
        sound > members.len() - majority(members.len())
    }

    /// The copies that an acknowledged flush claims to have.
    fn check_copies(&mut self, at: At, m: &Machine, target: Ix, lax: bool) {
        // What came before the last change of the rule may go by the rule before.
        let before = !self.model.contains(target, self.hosts[at].known.rule_since);
        if lax || self.oracle.wiped || before {
            return;
        }
        let (state, degraded) = (m.state(), m.status(self.hosts[at].now(self.now)).degraded);
        let holds = |h: HostId| {
            let host = self.hosts.iter().find(|x| x.id.host == h);
            host.is_some_and(|x| !x.is_sound() || self.model.contains(x.known.durable, target))
        };
        let headers = state.members.all().iter().filter(|x| holds(x.host)).count();
        let data = state.members.data_members().filter(|x| holds(x.host)).count();
        let may_degrade = state.policy.on_quorum_loss == OnQuorumLoss::Degrade;
        let all = state.policy.acks == Acks::All && !may_degrade;
        let need = if all { state.members.len() } else { majority(state.members.len()) };
        let copies = if degraded || may_degrade { 1 } else { state.members.len().saturating_sub(1) / 2 + 1 };
        let copies = copies.min(state.members.data_members().count());
        if headers < need || data < copies {
            let head = self.model.node(target).head;
            let what = format!(
                "host {at} acknowledges a flush of {head:?} with {headers} of {need} headers and {data} of \
                 {copies} copies durable"
            );
            self.fail(Check::FlushHasCopies, what);
        }
    }

    pub(crate) fn op_done(&mut self, at: At, token: u64, result: Result<OpOutcome, OpError>) {
        self.note(|| format!("{at} answers operation {token}: {result:?}"));
        if result.is_ok() {
            self.counts.operations += 1;
        }
        if let Ok(OpOutcome::Promoted { loss, epoch, forced }) = &result {
            self.check_loss(at, *loss, *epoch, *forced);
        }
        self.oracle.answers.insert(token, result);
    }

    /// A promotion's statement is true, and as much as can be known.
    fn check_loss(&mut self, at: At, loss: Loss, epoch: Epoch, forced: bool) {
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        let Some(own) = self.head_ix(at, store.head()) else { return };
        if self.model.node(own).head.epoch != epoch {
            return;
        }
        // The last update of the epoch before: what the statement is about.
        let end = self.model.end_of_previous(own);
        let wrong = match loss {
            Loss::Nothing => self.missing_flush(own, end),
            Loss::EndsAt { seq, time_ns, later_updates } => self.bad_end(end, seq, time_ns, later_updates),
            Loss::UnknownAfter { seq, time_ns } => self.bad_contact(at, end, seq, time_ns),
        };
        if let Some((check, wrong)) = wrong {
            return self.fail(check, format!("host {at} is promoted, says {loss:?}, and {wrong}"));
        }
        self.counts.statements += 1;
        // Where one host's loss never costs a flush, a quorum's votes leave nothing unknown.
        let certain = !forced && !self.oracle.lax_ever && !self.oracle.wiped;
        if certain && loss != Loss::Nothing && self.hosts.iter().all(super::host::Host::is_sound) {
            let what = format!("host {at} is promoted by a quorum and does not know what is lost: {loss:?}");
            self.fail(Check::QuorumKnows, what);
        }
    }

    /// "Nothing acknowledged is missing": an acknowledged flush that is. What an earlier promotion has lost,
    /// that one has said.
    fn missing_flush(&self, own: Ix, end: Ix) -> Option<Wrong> {
        let ended = self.model.node(end).head.epoch;
        let missing = |a: &&Acked| {
            !a.excused
                && a.epoch == ended
                && !self.model.contains(own, a.target)
                && !self.forced_away(own, a.by)
        };
        let head = self.oracle.acked.iter().find(missing).map(|a| self.model.node(a.target).head)?;
        Some((Check::NothingIsMissing, format!("lacks the acknowledged {head:?}")))
    }

    /// "Ends at update `seq`; so many later ones had been acknowledged."
    fn bad_end(&self, end: Ix, seq: Seq, time_ns: u64, later: Option<u64>) -> Option<Wrong> {
        let last = self.model.node(end);
        if last.head.seq != seq || last.time_ns != time_ns {
            return Some((Check::EndIsRight, format!("ends at {:?} of {}", last.head, last.time_ns)));
        }
        let later = later?;
        // The update named must exist, and have been durable somewhere; by a quorum, where one is needed. A copy
        // that has gone on into a later epoch holds it, too.
        let named = |ix: Ix| {
            let upto = seq.0 + later;
            let at = (self.model.node(ix).head.seq.0 >= upto).then(|| self.model.ancestor_at(ix, upto));
            at.is_some_and(|at| {
                self.model.node(at).head.epoch == last.head.epoch && self.model.contains(at, end)
            })
        };
        let holders = self.oracle.ever_durable.values().filter(|all| all.iter().any(|ix| named(*ix))).count();
        let need = if self.oracle.lax_ever { 1 } else { 2 };
        (later == 0 || holders < need)
            .then(|| (Check::LaterDidExist, format!("{holders} hosts ever held {later} later updates")))
    }

    /// "Ends at update `seq`; unknown after the last contact with the old owner."
    fn bad_contact(&self, at: At, end: Ix, seq: Seq, time_ns: u64) -> Option<Wrong> {
        let last = self.model.node(end);
        if last.head.seq != seq {
            return Some((Check::ContactEndIsRight, format!("ends at {:?}", last.head)));
        }
        let heard = self.hosts[at].known.heard_ns.get(&last.head.epoch.host).copied().unwrap_or(0);
        (time_ns > heard.max(last.time_ns))
            .then(|| (Check::ContactDidHappen, format!("heard the old owner at {heard} at the latest")))
    }

    /// True when `target` belongs to a separate lineage that `own` never was part of.
    fn forced_away(&self, own: Ix, target: Ix) -> bool {
        let at = self.model.common(own, target);
        self.model.node(target).forced > self.model.node(at).forced
    }

    /// After every event at a host.
    pub(crate) fn observe(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let Some(machine) = &copy.machine else { return };
        let (head, stored) = (machine.state().head(), copy.store.head());
        let failed = copy.store.latched().is_some();
        if head != stored && !failed && !machine.describe_role().starts_with("failed") {
            let what = format!("host {at}: the machine is at {head:?}, the store at {stored:?}");
            return self.fail(Check::MachineIsAtStore, what);
        }
        if !machine.is_open_owner() {
            return;
        }
        if self.oracle.served.contains_key(&head.epoch) {
            return self.check_alone(at);
        }
        let forced = machine.status(self.hosts[at].now(self.now)).forced;
        let Some(start) = machine.state().epoch_start().map(|e| e.start) else { return };
        let Some(own) = self.head_ix(at, start) else { return };
        self.note(|| format!("{at} serves as the owner of {}", head.epoch));
        self.counts.epochs += 1;
        self.oracle.served.insert(head.epoch, Served { start: own, since: self.now, forced });
        let lost = |a: &&Acked| {
            !a.lax
                && !a.excused
                && a.epoch < head.epoch
                && !self.model.contains(own, a.target)
                && !self.model.split_by_force(own, a.by)
        };
        let lost = self.oracle.acked.iter().find(lost).map(|a| self.model.node(a.target).head);
        if let Some(lost) = lost {
            let what = format!("host {at} serves {} without the acknowledged {lost:?}", head.epoch);
            self.fail(Check::OwnerHasFlushes, what);
        }
    }

    /// Two guests never both run on live data: with `stall`, an owner lets reads and writes through for no
    /// longer than its lease after a later owner began to serve.
    fn check_alone(&mut self, at: At) {
        let Some(machine) = self.hosts[at].machine() else { return };
        let (state, now) = (machine.state(), self.hosts[at].now(self.now));
        let policy = state.policy;
        if policy.on_quorum_loss != OnQuorumLoss::Stall || policy.acks == Acks::Local {
            return;
        }
        let epoch = state.head().epoch;
        let Some((later, s)) = self.oracle.served.last_key_value().map(|(e, s)| (*e, *s)) else { return };
        // The lease runs from the sending of a ping: its answer may be on a slow way for a while.
        let lease = self.timing.lease_ms * 1000;
        let over = self.now > s.since + lease + lease / 4;
        if later <= epoch || !over || s.forced || machine.may_read(now) != Gate::Open {
            return;
        }
        let own = self.oracle.served.get(&epoch).map(|s| s.start).unwrap_or_default();
        if self.model.split_by_force(own, s.start) || !self.hosts.iter().all(super::host::Host::is_sound) {
            return;
        }
        self.fail(
            Check::OwnerIsAlone,
            format!("host {at} still serves {epoch}, long after {later} began to"),
        );
    }

    /// A policy that an owner puts in force.
    pub(crate) fn note_policy(&mut self, op: &Op, members: usize) {
        if let Op::Policy(p) = op {
            self.oracle.lax_ever |= p.acks == Acks::Local || p.on_quorum_loss == OnQuorumLoss::Degrade;
            self.oracle.lax_ever |= is_lax(p.acks, p.on_quorum_loss, members);
        }
    }
}

/// As [`is_lax`], for the state at the head of a copy.
fn is_lax_at(state: &ImageState) -> bool {
    is_lax(state.policy.acks, state.policy.on_quorum_loss, state.members.len())
}

impl Oracle {
    /// True when a flush of this epoch was acknowledged.
    pub(crate) fn acked_seq(&self, epoch: Epoch) -> bool {
        self.acked.iter().any(|a| a.epoch == epoch)
    }
}
