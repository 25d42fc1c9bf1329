//! What every role is first of all: a copy that takes updates only if they chain (DESIGN.md
//! section 4), acknowledges what is durable, and rolls back only for a certified epoch.

use vmfs_common::chain::{Refusal, check_extends, check_seal};
use vmfs_common::election::Mandate;
use vmfs_common::header::Update;
use vmfs_common::ids::{Epoch, Head, HostId, Seq};
use vmfs_common::msg::ImageMsg;
use vmfs_common::op::Op;
use vmfs_common::policy::Member;
use vmfs_common::state::ImageState;

use crate::api::{Env, Event, Output, Take};
use crate::lineage::is_prefix_of;
use crate::machine::{Machine, RoleState, send};
use crate::meta::{AckedSeen, Rule};
use crate::ops::FlushError;

impl Machine {
    /// Judges an update frame. The payload has been checked against the digests before (see
    /// [`Machine::refuse`]). Changes nothing but counters and answers.
    ///
    /// # Errors
    /// The reason, which has been counted and told to the sender.
    pub fn check_update(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        update: &Update,
        out: &mut Vec<Output>,
    ) -> Result<Take, Refusal> {
        let verdict = self.judge(env, from, update, out);
        if let Err(why) = verdict {
            self.refuse(env, from, Some(update), why, out);
        }
        verdict
    }

    /// Counts and answers a refusal, also one that the engine found (malformed frame, altered
    /// payload).
    pub fn refuse(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        update: Option<&Update>,
        why: Refusal,
        out: &mut Vec<Output>,
    ) {
        let seq = update.map_or(Seq::ZERO, |u| u.header.seq);
        let count = self.refusals.entry(why).or_insert(0);
        *count += 1;
        if *count == 1 {
            out.push(Output::Report(Event::Refused { from, why, seq }));
        }
        // Not an offer, say, of the host that is fetched from: its sender has to know of it.
        let fetched = update.is_some() || matches!(why, Refusal::Unvouched | Refusal::Malformed);
        if fetched && self.fetch_source() == Some(from) {
            self.fetch_refused(env, out);
            return;
        }
        let first = !self.muted;
        if self.authority(from).is_some() {
            if self.muted && why == Refusal::Gap {
                return;
            }
            self.muted = true;
        }
        self.send_refused(from, why, seq, out);
        if why == Refusal::WrongHeadTag {
            self.drop_unconfirmed_head(env, out);
        } else if let Some(u) = update.filter(|_| why == Refusal::WrongParent && first) {
            self.parted(env, from, u, out);
        }
    }

    /// The first update of a stream does not follow what this copy holds before it. A single frame may be bad;
    /// twice, with a new stream in between, it is the head that is not the owner's; and when that is
    /// confirmed, or a certified later owner's chain leaves it too, somebody has made two.
    fn parted(&mut self, env: &mut Env<'_>, from: HostId, update: &Update, out: &mut Vec<Output>) {
        let (head, h) = (self.state.head(), &update.header);
        let own = if h.seq == head.seq.next() { Some(head) } else { (env.history)(h.seq.prev()) };
        let live = own == Some(head) && self.epoch().host == from && self.authority(from) == Some(head.epoch);
        let later = self
            .following
            .as_ref()
            .is_some_and(|f| f.host == from && f.certified && f.start.epoch > head.epoch);
        let Some(own) = own.filter(|o| (live || later) && o.seq > Seq::ZERO) else { return };
        if self.suspect.replace(own) != Some(own) {
            return;
        }
        if live && self.confirmed != Some(head) {
            self.drop_unconfirmed_head(env, out);
        } else {
            self.found_fork(Head { digest: h.parent, ..own }, out);
        }
    }

    /// Evidence that an owner has made two updates with one parent: kept, reported once for each head, never
    /// resolved by guessing.
    fn found_fork(&mut self, theirs: Head, out: &mut Vec<Output>) {
        if self.forked.replace(theirs) != Some(theirs) {
            *self.refusals.entry(Refusal::Fork).or_insert(0) += 1;
            self.note_foreign(theirs, out);
        }
    }

    pub(crate) fn send_refused(&self, to: HostId, why: Refusal, seq: Seq, out: &mut Vec<Output>) {
        send(
            out,
            to,
            ImageMsg::Refused { why, seq, promised: self.bound().max(self.epoch()), join: self.join() },
        );
    }

    /// The head is not what its owner made: it goes (the store keeps it as evidence) and comes
    /// again. Never below a commit point.
    fn drop_unconfirmed_head(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let head = self.state.head();
        // The update that a dropped head had followed was confirmed by it.
        if self.meta.commit.1 >= head.seq || self.confirmed == Some(head) {
            return;
        }
        if let Some(to) = (env.history)(head.seq.prev()).filter(|_| head.seq > Seq(1)) {
            self.confirmed = Some(to);
            self.suspect = None;
            out.push(Output::RollBack { to, keep_fork: true });
        }
    }

    /// The epoch under which `from` may send updates: what it has offered, or the epoch it owns in
    /// this copy's own chain.
    pub(crate) fn authority(&self, from: HostId) -> Option<Epoch> {
        match &self.following {
            Some(f) if f.host == from => Some(f.start.epoch),
            _ => Some(self.epoch()).filter(|e| e.host == from && e.number > 0),
        }
    }

    fn judge(
        &self,
        env: &mut Env<'_>,
        from: HostId,
        update: &Update,
        _out: &mut Vec<Output>,
    ) -> Result<Take, Refusal> {
        let h = &update.header;
        if h.image != self.image {
            return Err(Refusal::WrongImage);
        }
        let head = self.state.head();
        if self.fetch_source() == Some(from) {
            return self.judge_fetched(update);
        }
        let authority = match &self.role {
            RoleState::Failed => return Err(Refusal::NotAllowed),
            RoleState::Owner(_) => return Err(Refusal::NotOwner),
            RoleState::Follower | RoleState::Candidate(_) => self.authority(from).ok_or(Refusal::NotOwner)?,
        };
        if authority < self.promised() {
            return Err(Refusal::Promised);
        }
        if matches!(self.role, RoleState::Candidate(_)) {
            return Err(Refusal::NotOwner);
        }
        if self.muted && h.seq > head.seq.next() {
            return Ok(Take::Ignore);
        }
        if h.epoch > authority || (authority == head.epoch && h.epoch != authority) {
            return Err(Refusal::WrongEpoch);
        }
        if h.seq > head.seq.next() {
            return Err(Refusal::Gap);
        }
        if h.seq <= head.seq || (h.parent != head.digest && authority > head.epoch) {
            return self.judge_fork(env, update, authority);
        }
        self.check_next(update).map(|()| Take::Append)
    }

    /// An update at or below the head, or beside it: seen already, or the first of a chain that
    /// leaves this copy's. Only a certified epoch above the head's may cut the tail.
    fn judge_fork(&self, env: &mut Env<'_>, update: &Update, authority: Epoch) -> Result<Take, Refusal> {
        let h = &update.header;
        let head = self.state.head();
        let seen = h.seq <= head.seq && (env.history)(h.seq).is_some_and(|own| own.digest == update.digest);
        if seen || authority <= head.epoch {
            return Err(Refusal::Replay);
        }
        let Some(f) = self.following.as_ref().filter(|f| f.certified) else {
            return Err(Refusal::BadCertificate);
        };
        if is_prefix_of(&head, &f.parent) {
            // The certified chain contains this copy: what is offered beside it cannot be that chain.
            return Err(if h.seq > head.seq { Refusal::WrongParent } else { Refusal::Replay });
        }
        let prev = h.seq.prev();
        let to = if h.seq == Seq(1) { Some(Head::default()) } else { (env.history)(prev) };
        let to = match to {
            // This copy's log was trimmed beyond it: the roll-back will find that the blocks are needed.
            None if prev < env.log_start => Head { epoch: Epoch::default(), seq: prev, digest: h.parent },
            other => other.filter(|to| to.digest == h.parent).ok_or(Refusal::WrongParent)?,
        };
        if to.seq < self.meta.commit.1 || to.seq >= head.seq {
            return Err(Refusal::Fork);
        }
        Ok(Take::RollBack { to })
    }

    /// Rules 2 to 4 and the certificate of an `EpochStart`, for the update after the head.
    pub(crate) fn check_next(&self, update: &Update) -> Result<(), Refusal> {
        let h = &update.header;
        let head = self.state.head();
        match &h.op {
            Op::EpochStart(start) => {
                if h.parent != head.digest {
                    return Err(Refusal::WrongParent);
                }
                let p = &start.proposal;
                let same = p.image == h.image && p.ballot == h.epoch && p.pub0 == h.public;
                if !same || p.datastore != self.id.datastore {
                    return Err(Refusal::BadCertificate);
                }
                start.verify(h.seq, &head, &self.state.members).map_err(|_| Refusal::BadCertificate)?;
                // Nobody follows a separate lineage out of the one it is a member of, whatever that names as
                // its members: it has its maker's word alone. A blank copy that joined it goes on with it.
                let its_own = self.following.as_ref().is_some_and(|f| f.from_nothing);
                if matches!(start.mandate, Mandate::Forced(_)) && self.is_admitted() && !its_own {
                    return Err(Refusal::NotAllowed);
                }
                if h.time_ns < self.state.tip.time_ns {
                    return Err(Refusal::Malformed);
                }
            }
            _ => check_extends(&self.state.tip, self.image, update)?,
        }
        if matches!(h.op, Op::Seal(_)) {
            let owner = self.state.members.get(h.epoch.host).ok_or(Refusal::BadSeal)?;
            check_seal(update, &owner.key)?;
        }
        self.state.check_apply(update)
    }

    /// The store has appended an update that [`Machine::check_update`] found good.
    pub fn took(&mut self, env: &mut Env<'_>, update: &Update, out: &mut Vec<Output>) {
        let fetched = self.fetch_source().is_some();
        let live = self.following.as_ref().is_none_or(|f| f.start.epoch == update.header.epoch);
        if !fetched {
            self.move_floor(env, update, live, out);
            let streamed_by = self.following.as_ref().map_or(update.header.epoch, |f| f.start.epoch);
            self.owner_heard = Some((streamed_by.host, env.time_ns));
        }
        self.suspect = None;
        self.forked = None;
        self.apply(env, update, out);
        if fetched {
            self.fetch_took(env, out);
        }
        self.settle(env, out);
    }

    /// Updates of an ended epoch, sent by a later owner, are not vouched for before the next Seal or
    /// `EpochStart`: until then votes name the head before them.
    fn move_floor(&mut self, env: &Env<'_>, update: &Update, live: bool, out: &mut Vec<Output>) {
        let vouched = live || matches!(update.header.op, Op::Seal(_) | Op::EpochStart(_));
        if vouched && self.meta.floor.take().is_some() {
            self.persist_later(env.now);
        } else if !vouched && self.meta.floor.is_none() {
            self.meta.floor = Some(self.state.head());
            self.persist(out);
        }
    }

    /// Makes `update` the head: the state, and what is remembered beside it.
    pub(crate) fn apply(&mut self, env: &Env<'_>, update: &Update, out: &mut Vec<Output>) {
        let h = &update.header;
        let before = matches!(h.op, Op::Members(_) | Op::Policy(_)).then(|| self.rule());
        self.state.apply(update);
        // What is not vouched for may have to be cut again: its claims count once a Seal has confirmed them.
        let vouched = self.meta.floor.is_none();
        if h.commit > Seq::ZERO && vouched {
            self.note_commit(env, h.epoch, h.commit);
        }
        if let Op::EpochStart(start) = &h.op {
            self.meta.secret_hash = (h.epoch, start.proposal.secret_hash);
            if matches!(start.mandate, Mandate::Forced(_)) {
                self.meta.previous = None;
            }
            self.persist_later(env.now);
        }
        if h.acked.len() == self.state.members.len() && vouched {
            self.meta.acked_seen.note(&self.state, (h.epoch, h.seq), &h.acked);
        }
        if let Some(mut rule) = before {
            rule.changed_at = h.seq;
            let known = self.meta.previous.replace(rule.clone());
            if known.is_none_or(|k| k != rule) {
                self.persist(out);
            }
        }
    }

    /// The rule in force at the head.
    pub(crate) fn rule(&self) -> Rule {
        Rule { members: self.state.members.clone(), policy: self.state.policy, changed_at: Seq::ZERO }
    }

    /// A commit point of `epoch`, which this copy's chain contains.
    pub(crate) fn note_commit(&mut self, env: &Env<'_>, epoch: Epoch, commit: Seq) {
        if (epoch, commit) > self.meta.commit {
            self.meta.commit = (epoch, commit);
            if self.meta.previous.as_ref().is_some_and(|p| p.changed_at > Seq::ZERO && p.changed_at <= commit)
            {
                self.meta.previous = None;
            }
            self.persist_later(env.now);
        }
    }

    /// The rule before a weakening that may not be committed: it still counts.
    pub(crate) fn previous_rule(&self) -> Option<&Rule> {
        self.meta.previous.as_ref().filter(|r| r.is_weakened_by(&self.state.members, self.state.policy))
    }

    /// A member under the list at the head, or under the one before a change that may not be
    /// committed: its vote is asked for.
    pub(crate) fn elector(&self, host: HostId) -> Option<&Member> {
        let before = self.previous_rule().and_then(|r| r.members.get(host));
        self.state.members.get(host).or(before)
    }

    /// The store has rolled back, durably.
    pub fn rolled_back(&mut self, env: &mut Env<'_>, state: ImageState, out: &mut Vec<Output>) {
        let (from, to) = (self.state.head(), state.head());
        out.push(Output::Report(Event::RolledBack { from, to }));
        self.state = state;
        self.durable = to;
        self.sync.stale = self.sync.in_flight;
        self.meta.acked_seen = AckedSeen::default();
        self.meta.lineage += 1;
        self.meta.acked = self.meta.acked.min(to.rank());
        self.meta.commit = self.meta.commit.min(to.rank());
        if self.meta.floor.is_some_and(|f| to.seq <= f.seq) {
            self.meta.floor = None;
        }
        if self.meta.has_given_up() && self.meta.forced.is_some_and(|f| !self.has_begun(f)) {
            self.meta.forced = None;
        }
        let rule = self.rule();
        self.meta.previous = self.meta.previous.take().and_then(|p| p.cut_to(to.seq, &rule));
        self.persist(out);
        let lost: Vec<_> = self.flushes.iter().filter(|f| f.target.seq > to.seq).map(|f| f.token).collect();
        self.flushes.retain(|f| f.target.seq <= to.seq);
        for token in lost {
            out.push(Output::FlushDone { token, result: Err(FlushError::NotOwner) });
        }
        if self.muted {
            self.send_join(out);
        }
        self.settle(env, out);
    }

    // --- acknowledgements ---

    /// The owner asks for durability up to `seq`.
    pub(crate) fn on_sync(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        seq: Seq,
        commit: Seq,
        out: &mut Vec<Output>,
    ) {
        let current = self.epoch();
        if !matches!(self.role, RoleState::Follower)
            || self.authority(from) != Some(current)
            || current.host != from
        {
            return;
        }
        self.owner_heard = Some((from, env.time_ns));
        if current < self.promised() && !acks_go_on() {
            self.refuse(env, from, None, Refusal::Promised, out);
            return;
        }
        if commit > Seq::ZERO && commit <= self.state.head().seq {
            self.note_commit(env, current, commit);
        }
        self.ack_due = Some(self.ack_due.map_or((seq, seq), |(low, high)| (low.min(seq), high.max(seq))));
        self.want_sync(out);
        self.ack_if_due(env, out);
    }

    /// Acknowledges what is durable when the owner of the head's epoch waits for it. Nothing is
    /// acknowledged before the first meta record is durable: a promise must find its place.
    pub(crate) fn ack_if_due(&mut self, env: &Env<'_>, out: &mut Vec<Output>) {
        let Some((low, high)) = self.ack_due else { return };
        let head = self.durable;
        let owner = self.epoch();
        let mine = matches!(self.role, RoleState::Follower) && self.meta_persisted > 0 && head.epoch == owner;
        let promised = owner < self.promised() && !acks_go_on();
        if !mine || promised {
            return;
        }
        if head.seq < low {
            self.want_sync(out);
            return;
        }
        self.ack_due = (head.seq < high).then_some((head.seq.next(), high));
        if head.rank() > self.meta.acked {
            self.meta.acked = head.rank();
            self.persist_later(env.now);
        }
        send(out, owner.host, ImageMsg::Ack { head, store: self.id.store });
    }
}

/// Always false outside of tests: nothing below the promise is acknowledged.
fn acks_go_on() -> bool {
    #[cfg(any(test, feature = "testing"))]
    if vmfs_common::weaken::is(vmfs_common::weaken::Weakness::AckBelowPromise) {
        return true;
    }
    false
}
