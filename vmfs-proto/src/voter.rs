//! Promises and votes: what a member answers to a candidate (DESIGN.md section 7, point 2).

use vmfs_common::chain::{Refusal, Share};
use vmfs_common::election::{Proposal, Vote};
use vmfs_common::header::FLAG_DEGRADED;
use vmfs_common::identity::Signature;
use vmfs_common::ids::{Epoch, Head, HostId, Seq};
use vmfs_common::msg::{ImageMsg, Occasion, VoteRefusal};
use vmfs_common::policy::MemberRole;

use crate::api::{Env, Event, Gate, Output};
use crate::machine::{Machine, RoleState, send};

/// How far above everything a copy knows of a ballot may be. Honest ones are at most a few bids
/// above; without a bound a single lie would use up all numbers, and nobody could be elected again.
pub(crate) const BALLOT_LEAP_MAX: u64 = 1 << 32;

/// A promise on its way to the disk: first everything appended is made durable, then the meta
/// record with the promise and the vote, and only then the vote is sent. From the moment it exists,
/// updates of lower epochs are refused and nothing of them is acknowledged, so no append and no
/// acknowledgement can slip in between.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) struct Promise {
    /// Who asked; this host for its own proposal.
    pub(crate) from: HostId,
    pub(crate) proposal: Proposal,
    /// The meta record that carries it, once written.
    pub(crate) version: Option<u64>,
}

impl Machine {
    #[expect(clippy::too_many_arguments, reason = "the fields of the message")]
    pub(crate) fn on_propose(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        proposal: Proposal,
        occasion: Occasion,
        head: Head,
        consent: Option<Vote>,
        out: &mut Vec<Output>,
    ) {
        let ballot = proposal.ballot;
        if ballot.host != from || proposal.image != self.image || proposal.datastore != self.id.datastore {
            return;
        }
        let digest = proposal.digest();
        if self.promise.as_ref().is_some_and(|p| p.proposal.digest() == digest) {
            return;
        }
        if let Some(vote) =
            self.meta.vote.clone().filter(|v| v.proposal == digest && v.head == self.state.head())
            && self.promise.is_none()
            && self.meta.promised == ballot
            && self.is_persisted(self.vote_version)
        {
            self.send_vote(from, vote, out);
            return;
        }
        match self.may_promise(env, from, &proposal, occasion, head, consent.as_ref()) {
            Err(why) => send(out, from, ImageMsg::VoteRefused { ballot, why }),
            Ok(()) => self.promise_to(env, from, proposal, out),
        }
    }

    fn may_promise(
        &self,
        env: &Env<'_>,
        from: HostId,
        proposal: &Proposal,
        occasion: Occasion,
        head: Head,
        consent: Option<&Vote>,
    ) -> Result<(), VoteRefusal> {
        if self.meta.forced.is_some_and(|_| from != self.id.host) {
            return Err(VoteRefusal::OtherLineage);
        }
        let nothing_vouched = self.meta.floor.is_some_and(|f| f.seq == Seq::ZERO);
        let admitted = self.elector(self.id.host).is_some_and(|m| m.store == self.id.store);
        // The update that admits us, or the genesis, may not have reached us: the candidate's newer list
        // decides. It checks that the list has our store, and by the headers' acknowledgements that
        // we have not lost anything.
        let by_a_newer_list = head.rank() > self.state.head().rank() && occasion != Occasion::Handover;
        if (!admitted && !by_a_newer_list) || nothing_vouched {
            return Err(VoteRefusal::NotMember);
        }
        let epoch = self.epoch().max(self.following.as_ref().map_or(Epoch::default(), |f| f.start.epoch));
        // The owner of the last epoch known here, or of a later one that has not reached us. Said before
        // anything about ballots: a former owner learns from it that it is one.
        let last_owner = epoch.host == from || (head.epoch.host == from && head.epoch > epoch);
        if occasion == Occasion::Restart && !last_owner {
            return Err(VoteRefusal::NotOwner(epoch));
        }
        let highest = self.promised().max(epoch);
        if proposal.ballot <= highest && !lower_ballots_count() {
            return Err(VoteRefusal::Promised(highest));
        }
        if !self.is_near(proposal.ballot) {
            return Err(VoteRefusal::OtherMembers);
        }
        let data = self.state.members.get(from).is_some_and(|m| m.role == MemberRole::Replica);
        if !data && head.rank() <= self.state.head().rank() {
            return Err(VoteRefusal::OtherMembers);
        }
        let agreed = consent.is_some_and(|v| self.is_consent(v, proposal, epoch.host));
        if !data && epoch.host != from && self.hears_owner(env, epoch) && !agreed {
            // A newer list, if there is one, comes from the owner. The candidate's word alone, that it has
            // owned a later epoch as well, must not stop an image it may have nothing to do with.
            return Err(VoteRefusal::OwnerAlive(epoch));
        }
        match occasion {
            Occasion::Operator | Occasion::Restart => Ok(()),
            Occasion::Handover => {
                if agreed || self.hands_over_to(from) {
                    return Ok(());
                }
                if epoch.host == self.id.host || self.hears_owner(env, epoch) {
                    return Err(VoteRefusal::OwnerAlive(epoch));
                }
                if env.now.since(self.booted) < self.timing.lease_ms {
                    Err(VoteRefusal::Lease)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// The host of `epoch` was heard within one lease, or is this one and serves the image.
    fn hears_owner(&self, env: &Env<'_>, epoch: Epoch) -> bool {
        if epoch.host == self.id.host {
            return matches!(self.role, RoleState::Owner(_)) && self.may_read(env.now) == Gate::Open;
        }
        let heard = (env.contact)(epoch.host).heard;
        heard.is_some_and(|t| env.now.since(t) < self.timing.lease_ms)
    }

    /// A ballot that honest bidding can have led to. See [`BALLOT_LEAP_MAX`].
    pub(crate) fn is_near(&self, ballot: Epoch) -> bool {
        let known = self.promised().max(self.epoch()).max(self.bound());
        ballot.number <= known.number.saturating_add(BALLOT_LEAP_MAX)
    }

    /// A vote was given, or is about to be: the copy must not be forgotten.
    #[must_use]
    pub fn has_promised(&self) -> bool {
        self.promised() > Epoch::default()
    }

    /// The present owner's own vote for exactly this proposal.
    fn is_consent(&self, vote: &Vote, proposal: &Proposal, owner: HostId) -> bool {
        let member = self.state.members.get(owner);
        vote.host == owner
            && vote.proposal == proposal.digest()
            && member.is_some_and(|m| m.store == vote.store && vote.is_signed_by(&m.key))
    }

    /// Starts the promise: from here on the lower epochs are over for this copy.
    pub(crate) fn promise_to(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        proposal: Proposal,
        out: &mut Vec<Output>,
    ) {
        let ballot = proposal.ballot;
        if let Some(other) = self.promise.take()
            && other.from != self.id.host
        {
            let why = VoteRefusal::Promised(ballot);
            send(out, other.from, ImageMsg::VoteRefused { ballot: other.proposal.ballot, why });
        }
        self.ack_due = None;
        self.promise = Some(Promise { from, proposal, version: None });
        if from != self.id.host {
            self.outbid(env, from, out);
            self.tell_owner_of_promise(from, out);
        }
        if let Some(to) = self.meta.floor {
            out.push(Output::RollBack { to, keep_fork: true });
        }
        self.advance_promise(env, out);
    }

    /// The owner learns at once that this member is lost to it, so that it pauses and bids again
    /// instead of serving an image that may be owned elsewhere in a moment: the one that is followed, of whose epoch
    /// nothing may have come yet, and the one of the chain's last epoch.
    fn tell_owner_of_promise(&self, candidate: HostId, out: &mut Vec<Output>) {
        let followed = self.following.as_ref().map(|f| f.host);
        let last = Some(self.epoch().host).filter(|h| followed != Some(*h));
        for owner in followed.into_iter().chain(last) {
            if owner != self.id.host && owner != candidate && self.connected.contains(&owner) {
                self.send_refused(owner, Refusal::Promised, Seq::ZERO, out);
            }
        }
    }

    /// Takes a promise as far as the disk has got.
    pub(crate) fn advance_promise(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let Some(p) = &self.promise else { return };
        let taken_up = self.epoch().max(self.certified());
        if taken_up >= p.proposal.ballot {
            // A certified epoch as high has been taken up meanwhile: the head that the vote states may have been
            // cut for it.
            let (from, ballot) = (p.from, p.proposal.ballot);
            self.promise = None;
            if from != self.id.host {
                let why = VoteRefusal::Promised(taken_up);
                send(out, from, ImageMsg::VoteRefused { ballot, why });
            }
            return;
        }
        match p.version {
            None if self.meta.floor.is_some() => {}
            None if self.durable != self.state.head() => self.want_sync(out),
            None => {
                let (ballot, digest) = (p.proposal.ballot, p.proposal.digest());
                self.meta.promised = self.meta.promised.max(ballot);
                self.meta.vote = Some(self.vote_for(digest));
                let version = self.persist(out);
                self.vote_version = version;
                if let Some(p) = &mut self.promise {
                    p.version = Some(version);
                }
            }
            Some(version) if self.is_persisted(version) => {
                let from = p.from;
                self.promise = None;
                let vote = self.meta.vote.clone().expect("invariant: persisted with the promise");
                if from == self.id.host {
                    self.own_promise_durable(env, vote, out);
                } else {
                    self.send_vote(from, vote, out);
                }
            }
            Some(_) => {}
        }
    }

    fn is_persisted(&self, version: u64) -> bool {
        #[cfg(any(test, feature = "testing"))]
        if vmfs_common::weaken::is(vmfs_common::weaken::Weakness::PromiseNotDurable) {
            return true;
        }
        self.meta_persisted >= version
    }

    fn vote_for(&self, proposal: vmfs_common::Digest) -> Vote {
        let seen = self.meta.acked_seen.of(self.id.host, &self.state);
        Vote {
            proposal,
            host: self.id.host,
            store: self.id.store,
            head: self.durable,
            commit: self.meta.commit,
            acked: self.meta.acked.max(seen.unwrap_or_default()),
            degraded: self.state.tip.flags & FLAG_DEGRADED != 0,
            members_since: self.state.members_since,
            signature: Signature([0; 64]),
        }
        .signed(&self.id.key)
    }

    fn send_vote(&self, to: HostId, vote: Vote, out: &mut Vec<Output>) {
        let epoch = vote.head.epoch;
        let share = self.meta.shares.iter().find(|(e, _)| *e == epoch).cloned();
        send(out, to, ImageMsg::Voted { vote, share });
    }

    /// The owner's share of its secret for this member: kept until the epoch has ended.
    pub(crate) fn on_share(&mut self, env: &Env<'_>, from: HostId, epoch: Epoch, share: Share) {
        if from == epoch.host
            && self.authority(from) == Some(epoch)
            && share.expose().len() == crate::shares::SHARE_BYTES
        {
            self.meta.keep_share(epoch, share);
            self.persist_later(env.now);
        }
    }

    /// The operator gives up the lineage that this host was forced to start.
    pub(crate) fn abandon_forced(
        &mut self,
        env: &mut Env<'_>,
        token: crate::api::Token,
        out: &mut Vec<Output>,
    ) {
        let Some(forced) = self.meta.forced.filter(|_| !self.meta.has_given_up()) else {
            crate::machine::op_done(out, token, Err(crate::ops::OpError::NotForced));
            return;
        };
        self.meta.forced = Some(Epoch { host: HostId::default(), ..forced });
        self.persist(out);
        if !matches!(self.role, RoleState::Follower) {
            self.become_follower(env, None, out);
        }
        // Where the log was trimmed beyond it, the copy stays until the quorum's owner sends the blocks.
        if let Some(entry) = self.state.epochs.iter().find(|e| e.epoch == forced) {
            out.push(Output::RollBack { to: entry.parent, keep_fork: true });
        }
        self.ask_who_owns(out);
        crate::machine::op_done(out, token, Ok(crate::ops::OpOutcome::Done));
    }

    /// The separate lineage named in the meta record is part of this copy.
    pub(crate) fn has_begun(&self, forced: Epoch) -> bool {
        let begun =
            Epoch { host: if self.meta.has_given_up() { self.id.host } else { forced.host }, ..forced };
        self.state.epochs.iter().any(|e| e.epoch == begun)
    }

    pub(crate) fn note_foreign(&self, theirs: Head, out: &mut Vec<Output>) {
        out.push(Output::Report(Event::Fork { ours: self.state.head(), theirs }));
    }
}

/// Always false outside of tests: a ballot below the promise gets no vote.
fn lower_ballots_count() -> bool {
    #[cfg(any(test, feature = "testing"))]
    if vmfs_common::weaken::is(vmfs_common::weaken::Weakness::LowerBallotAccepted) {
        return true;
    }
    false
}
