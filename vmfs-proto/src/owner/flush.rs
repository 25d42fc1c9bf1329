//! The commit point, and what flushes wait for (promise 1).

use vmfs_common::election::Rank;
use vmfs_common::ids::{Head, HostId, Millis, Seq, StoreId};
use vmfs_common::policy::{Acks, MemberRole, OnQuorumLoss};

use crate::api::{Env, Event, Output, Token};
use crate::loss::quorum_of;
use crate::machine::{Machine, RoleState, Waiting, op_done, send};
use crate::meta::Rule;
use crate::ops::{FlushError, OpOutcome};
use crate::owner::Owner;

/// What is missing before a flush can be acknowledged: of members that can be expected to answer, beyond
/// what the policy lets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Shortage {
    /// Members of any kind.
    pub votes: usize,
    /// Members with data.
    pub copies: usize,
}

impl Shortage {
    /// True when flushes wait for somebody to come back.
    #[must_use]
    pub const fn is_any(&self) -> bool {
        self.votes > 0 || self.copies > 0
    }

    fn max(self, other: Self) -> Self {
        Self { votes: self.votes.max(other.votes), copies: self.copies.max(other.copies) }
    }
}

/// What the acknowledgements add up to under one rule.
struct Points {
    /// Durable on a quorum, with the full number of data copies.
    full: Seq,
    /// Headers durable on a majority, data at least here: what opens an epoch.
    headers: Seq,
    /// As far as the rule lets commits go now: `full`, or more while degraded.
    commit: Seq,
    /// Flushes are answered up to here.
    flush: Seq,
    /// Too few members can be expected to acknowledge, and the policy allows fewer copies.
    wants_degrade: bool,
    /// `acks = "all"`, but somebody is not waited for.
    reduced: bool,
    shortage: Shortage,
}

impl Points {
    /// While the change at `changed_at` is not committed. A weakening takes effect when it is
    /// committed under the rule that it weakens too. Otherwise the new rule decides about the change
    /// and what follows it, and once that is committed about everything; until then, what came before
    /// the change goes by the old rule: nobody who does not know of the change knows where else the
    /// data is.
    fn under_both(self, old: Self, weakened: bool, changed_at: Seq) -> Self {
        let last = changed_at.prev();
        let both = |new: Seq, old: Seq| match weakened {
            true => new.min(old),
            false if new >= changed_at => new,
            false => old.min(last),
        };
        Self {
            full: both(self.full, old.full),
            headers: both(self.headers, old.headers),
            commit: both(self.commit, old.commit),
            flush: both(self.flush, old.flush),
            wants_degrade: self.wants_degrade || (weakened && old.wants_degrade),
            reduced: self.reduced,
            shortage: self.shortage.max(if weakened { old.shortage } else { Shortage::default() }),
        }
    }
}

impl Owner {
    /// `durable`: this host's. `reachable`: members that can be expected to acknowledge.
    fn points(&self, rule: &Rule, me: HostId, durable: Seq, reachable: &dyn Fn(HostId) -> bool) -> Points {
        let acked =
            |h: HostId| if h == me { durable } else { self.links.get(&h).map_or(Seq::ZERO, |l| l.acked) };
        let list = &rule.members;
        let mut headers: Vec<Seq> = list.all().iter().map(|m| acked(m.host)).collect();
        let mut data: Vec<Seq> = list.data_members().map(|m| acked(m.host)).collect();
        headers.sort_by(|a, b| b.cmp(a));
        data.sort_by(|a, b| b.cmp(a));
        let there = |h: HostId| h == me || (reachable(h) && (!self.degraded || acked(h) >= self.flushed));
        let here = |role: Option<MemberRole>| {
            let all = list.all().iter().filter(|m| role.is_none_or(|r| r == m.role));
            all.filter(|m| there(m.host)).count()
        };
        let may_degrade = rule.policy.on_quorum_loss == OnQuorumLoss::Degrade;
        let (need, least) = (quorum_of(rule, false), quorum_of(rule, true));
        let (everybody, with_data) = (here(None), here(Some(MemberRole::Replica)));
        let wants_degrade = may_degrade && (with_data < need.1 || (least.0 < need.0 && everybody < need.0));
        let at = |headers_needed: usize, copies: usize| headers[headers_needed - 1].min(data[copies - 1]);
        let full = at(need.0, need.1);
        // Fewer copies count only above the mark that a majority of the members knows of.
        let relaxed = if wants_degrade { at(least.0, need.1.min(with_data).max(least.1)) } else { Seq::ZERO };
        let marked = self.mark.is_some_and(|mark| relaxed >= mark);
        let commit = if marked { relaxed.max(full) } else { full };
        let headers_here = headers[need.0 - 1].min(durable).max(commit);
        let reduced = rule.policy.acks == Acks::All && may_degrade && everybody < list.len();
        let flush = match rule.policy.acks {
            Acks::Local => durable,
            Acks::All if !reduced => headers.last().copied().unwrap_or_default().min(commit),
            Acks::Majority | Acks::All => commit,
        };
        let shortage = shortage(rule, &|h| h == me || reachable(h));
        Points { full, headers: headers_here, commit, flush, wants_degrade, reduced, shortage }
    }
}

fn shortage(rule: &Rule, there: &dyn Fn(HostId) -> bool) -> Shortage {
    let may_degrade = rule.policy.on_quorum_loss == OnQuorumLoss::Degrade;
    let everybody = rule.members.all().iter().filter(|m| there(m.host)).count();
    let with_data = rule.members.data_members().filter(|m| there(m.host)).count();
    let (votes, copies) = match rule.policy.acks {
        Acks::Local => (0, 0),
        Acks::All if !may_degrade => (rule.members.len(), rule.members.data_members().count()),
        Acks::Majority | Acks::All => quorum_of(rule, may_degrade),
    };
    Shortage { votes: votes.saturating_sub(everybody), copies: copies.saturating_sub(with_data) }
}

impl Machine {
    /// A guest's flush.
    pub(crate) fn flush(&mut self, env: &mut Env<'_>, token: Token, out: &mut Vec<Output>) {
        let target = self.state.head();
        let done = match &self.role {
            RoleState::Follower => Some(Err(FlushError::NotOwner)),
            RoleState::Failed => Some(Err(FlushError::StoreFailed)),
            RoleState::Owner(o) if o.open && o.flushed >= target.seq => Some(Ok(())),
            RoleState::Owner(_) | RoleState::Candidate(_) => None,
        };
        if let Some(result) = done {
            out.push(Output::FlushDone { token, result });
            return;
        }
        self.flushes.push_back(Waiting { token, target, since: env.now });
        self.sync_round(env, out);
    }

    /// Makes everything appended so far durable here and at every member that streams.
    pub(crate) fn sync_round(&mut self, env: &Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &mut self.role else { return };
        o.synced_bytes = o.bytes_total;
        self.sync_members(env, out);
        self.want_sync(out);
    }

    /// Asks every member that streams to make everything appended so far durable: what a flush would ask
    /// first, for a caller that expects one. Nothing is promised by it.
    pub fn sync_members(&mut self, env: &Env<'_>, out: &mut Vec<Output>) {
        let seq = self.state.head().seq;
        let RoleState::Owner(o) = &mut self.role else { return };
        for (host, link) in o.links.iter_mut().filter(|(_, l)| l.streaming && l.sync_asked < seq) {
            link.sync_asked = seq;
            link.waiting_since.get_or_insert(env.now);
            out.push(Output::RequestSync { to: *host, seq, commit: o.commit });
        }
    }

    /// The same for this host's own log.
    pub fn sync_local(&mut self, out: &mut Vec<Output>) {
        if matches!(self.role, RoleState::Owner(_)) {
            self.want_sync(out);
        }
    }

    /// An acknowledgement counts only if epoch, seq, digest and store all match this chain.
    pub(crate) fn on_ack(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        head: Head,
        store: StoreId,
        out: &mut Vec<Output>,
    ) {
        let RoleState::Owner(o) = &mut self.role else { return };
        let own = o.recent(head.seq).map(|r| r.digest);
        let Some(link) = o.links.get_mut(&from) else { return };
        if head.epoch != o.start.epoch || store != link.store || !link.streaming {
            return;
        }
        match own {
            Some(digest) if digest != head.digest => {
                let ours = Head { digest, ..head };
                out.push(Output::Report(Event::Fork { ours, theirs: head }));
                link.restart(env.now, &self.timing);
                out.push(Output::StopStream { to: from });
            }
            Some(_) => {
                link.acked = link.acked.max(head.seq);
                link.sent = link.sent.max(head.seq);
                link.waiting_since = (link.acked < link.sync_asked).then_some(env.now);
                link.refusals = 0;
            }
            // Too long ago to be checked: says nothing about this epoch's recent updates.
            None => link.waiting_since = (link.acked < link.sync_asked).then_some(env.now),
        }
    }

    /// Moves the commit point and answers what waited for it.
    pub(crate) fn advance_owner(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let me = self.id.host;
        let rule = self.rule();
        let previous = self.meta.previous.clone();
        let weakened = self.previous_rule().is_some();
        let RoleState::Owner(o) = &mut self.role else { return };
        let old_epochs = old_epochs_count();
        let durable =
            if self.durable.epoch == o.start.epoch || old_epochs { self.durable.seq } else { Seq::ZERO };
        let (connected, lease) = (&self.connected, self.timing.lease_ms);
        let reachable = |h: HostId| {
            let stuck =
                o.links.get(&h).and_then(|l| l.waiting_since).is_some_and(|t| env.now.since(t) > lease);
            let heard = (env.contact)(h).confirmed.is_some_and(|t| env.now.since(t) <= lease);
            let absent = o.links.get(&h).is_some_and(|l| l.absent);
            !absent && !stuck && (connected.contains(&h) || heard)
        };
        let mut points = o.points(&rule, me, durable, &reachable);
        if let Some(rule) = &previous {
            points = points.under_both(o.points(rule, me, durable, &reachable), weakened, rule.changed_at);
        }
        o.reduced = points.reduced;
        o.shortage = points.shortage;
        let advanced = points.commit > o.commit && (points.commit >= o.start.seq || old_epochs);
        if advanced {
            o.commit = points.commit;
        }
        let opened = !o.open && points.headers >= o.start.seq;
        o.open |= opened;
        if o.open || old_epochs {
            o.flushed = o.flushed.max(points.flush);
        }
        let (epoch, commit, flushed) = (o.start.epoch, o.commit, o.flushed);
        // Not what was flushed: with `acks = "local"` a later owner's chain may lack it, and is followed.
        if commit > Seq::ZERO {
            self.note_commit(env, epoch, commit);
        }
        if opened {
            self.opened(env, out);
        }
        if previous.is_some() && self.meta.previous.is_none() {
            self.dismiss_former_members(out);
        }
        while self.flushes.front().is_some_and(|f| f.target.seq <= flushed) {
            let f = self.flushes.pop_front().expect("invariant: just looked at");
            out.push(Output::FlushDone { token: f.token, result: Ok(()) });
        }
        self.end_hold(env, out);
        self.advance_degraded(env, points.wants_degrade, points.full, out);
        self.advance_change(env, out);
        self.advance_draining(env, out);
    }

    /// Enters the degraded state with a mark in the chain, and leaves it when everything that was
    /// acknowledged in it has its full number of copies.
    fn advance_degraded(&mut self, env: &mut Env<'_>, wanted: bool, full: Seq, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &mut self.role else { return };
        if wanted && o.mark.is_none() {
            o.degraded = true;
            o.chain.set_degraded(true);
            out.push(Output::Report(Event::Degraded));
            let mark = self.append_own(env, None, out);
            if let RoleState::Owner(o) = &mut self.role {
                o.mark = Some(mark);
            }
            self.sync_round(env, out);
        } else if !wanted && o.degraded && full >= o.flushed.max(o.start.seq) {
            o.degraded = false;
            o.mark = None;
            o.chain.set_degraded(false);
            out.push(Output::Report(Event::Restored));
        }
    }

    /// The `EpochStart` is durable on a quorum.
    fn opened(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &mut self.role else { return };
        let election = o.election.take();
        self.check_lease(env, out);
        let RoleState::Owner(o) = &mut self.role else { return };
        let Some(e) = election else { return };
        if let Some(token) = e.token {
            let done = OpOutcome::Promoted { epoch: o.start.epoch, loss: e.loss, forced: e.forced };
            op_done(out, token, Ok(done));
        }
        if let Some(host) = e.predecessor {
            send(out, host, vmfs_common::msg::ImageMsg::HandoverDone { done: true });
        }
        if !self.flushes.is_empty() {
            self.sync_round(env, out);
        }
    }

    /// The owner's lease: how long a quorum that backs it is known to have been in contact, both ways. A later
    /// epoch needs the promises of a majority, and so of somebody in that quorum, who counts no more from then on.
    pub(crate) fn check_lease(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let me = self.id.host;
        let RoleState::Owner(o) = &mut self.role else { return };
        o.links.iter_mut().for_each(|(h, l)| l.note_contact((env.contact)(*h).confirmed));
        let contact = |h: HostId| match o.links.get(&h) {
            _ if h == me => env.now,
            // A quorum has acknowledged the `EpochStart` since, or the epoch is not open.
            link => link.map_or(o.lease_from, |l| l.contact.max(o.lease_from)),
        };
        let mut times: Vec<Millis> = self.state.members.all().iter().map(|m| contact(m.host)).collect();
        times.sort_by(|a, b| b.cmp(a));
        let quorum = times[self.state.members.quorum() - 1];
        // An owner that is its own quorum cannot lose it.
        let alone = self.state.members.quorum() == 1;
        o.lease_until = if alone { Millis(u64::MAX) } else { quorum.plus(self.timing.lease_ms) };
        let next = env.now.plus(self.timing.lease_ms / 4);
        o.lease_check_at = if o.lease_until > env.now { next.min(o.lease_until.plus(1)) } else { next };
        let frozen = o.is_frozen(env.now, &self.state);
        if frozen != o.frozen {
            o.frozen = frozen;
            out.push(Output::Report(if frozen { Event::Frozen } else { Event::Thawed }));
        }
    }

    /// What each member has acknowledged, in the list's order: part of every header, so that a
    /// member that loses data can be told by the others.
    pub(crate) fn acked_of_members(&self) -> Vec<Seq> {
        let RoleState::Owner(o) = &self.role else { return Vec::new() };
        let rank: Rank = (o.start.epoch, Seq::ZERO);
        let own = if self.durable.epoch == rank.0 { self.durable.seq } else { Seq::ZERO };
        let of =
            |h: HostId| if h == self.id.host { own } else { o.links.get(&h).map_or(Seq::ZERO, |l| l.acked) };
        self.state.members.all().iter().map(|m| of(m.host)).collect()
    }
}

/// Always false outside of tests: an update of an ended epoch is committed by what comes after it.
pub(crate) fn old_epochs_count() -> bool {
    #[cfg(any(test, feature = "testing"))]
    if vmfs_common::weaken::is(vmfs_common::weaken::Weakness::OldEpochCommits) {
        return true;
    }
    false
}
