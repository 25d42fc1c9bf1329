//! Bidding for ownership: ballots, proposals, and the collecting of votes. What happens with a
//! quorum of them is in [`crate::adopt`].

use std::collections::{BTreeMap, BTreeSet};

use vmfs_common::chain::{EpochSecret, Share};
use vmfs_common::election::{Proposal, Vote};
use vmfs_common::ids::{Digest, Epoch, Head, HostId, Millis, Seq};
use vmfs_common::msg::{ImageMsg, Occasion, VoteRefusal};
use vmfs_common::policy::{Member, MemberList, MemberRole};

use crate::api::{Env, Event, Output, Timing, Token};
use crate::loss::Loss;
use crate::machine::{Machine, RoleState, op_done, send};
use crate::ops::{Answer, FlushError, OpError};

/// Where a candidacy stands.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) enum Stage {
    /// Waiting to bid (again).
    Backoff { until: Millis },
    /// The own promise and the epoch secret are on their way to the disk.
    Promising,
    /// Proposals are out.
    Collecting,
    /// The headers up to the adopted head are being fetched and hashed forward.
    Vouching(crate::adopt::Vouching),
    /// The updates named by those headers are being fetched.
    Fetching(crate::adopt::Fetching),
}

/// A host that wants to own the image.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) occasion: Occasion,
    /// The operator's request to answer, and until when.
    pub(crate) token: Option<Token>,
    pub(crate) give_up_at: Option<Millis>,
    /// This host owned the last epoch it knows: it goes on bidding for ever.
    pub(crate) persistent: bool,
    /// Without a quorum, a separate lineage is to be started.
    pub(crate) force: bool,
    /// The bid under way is for the separate lineage.
    pub(crate) forcing: bool,
    /// The owner that hands over: asked first, and its vote shown to the others.
    pub(crate) predecessor: Option<HostId>,
    pub(crate) proposal: Option<Proposal>,
    pub(crate) stage: Stage,
    pub(crate) votes: BTreeMap<HostId, Vote>,
    pub(crate) shares: Vec<(Epoch, Share)>,
    pub(crate) answers: BTreeMap<HostId, Answer>,
    /// Voters whose headers or updates could not be had.
    pub(crate) bad_sources: BTreeSet<HostId>,
    /// Voters that, asked again and again, cannot show the head they have voted with although their log reaches
    /// back far enough: the others' votes decide, as if these had not come.
    pub(crate) unshown: BTreeSet<HostId>,
    /// Why votes alone do not suffice, at the moment.
    pub(crate) problem: Option<OpError>,
    /// Highest ballot or epoch heard of.
    pub(crate) outbid_by: Epoch,
    pub(crate) attempts: u32,
    pub(crate) ask_again_at: Millis,
    pub(crate) asked: u32,
    /// There has been a quorum of votes for this ballot.
    pub(crate) quorum_seen: bool,
    /// Until when the votes of other connected members are waited for.
    pub(crate) grace_until: Option<Millis>,
    /// What is known to be lost by starting a separate lineage.
    pub(crate) forced_loss: Option<Loss>,
}

impl Candidate {
    pub(crate) fn new(occasion: Occasion, until: Millis) -> Self {
        Self {
            occasion,
            token: None,
            give_up_at: None,
            persistent: occasion == Occasion::Restart,
            force: false,
            forcing: false,
            predecessor: None,
            proposal: None,
            stage: Stage::Backoff { until },
            votes: BTreeMap::new(),
            shares: Vec::new(),
            answers: BTreeMap::new(),
            bad_sources: BTreeSet::new(),
            unshown: BTreeSet::new(),
            problem: None,
            outbid_by: Epoch::default(),
            attempts: 0,
            ask_again_at: until,
            asked: 0,
            quorum_seen: false,
            grace_until: None,
            forced_loss: None,
        }
    }

    pub(crate) fn deadline(&self, timing: &Timing) -> Option<Millis> {
        let stage = match &self.stage {
            Stage::Backoff { until } => Some(*until),
            Stage::Promising => None,
            Stage::Collecting => {
                Some(self.grace_until.map_or(self.ask_again_at, |g| g.min(self.ask_again_at)))
            }
            Stage::Vouching(v) => Some(v.since.plus(8 * timing.retry_ms)),
            Stage::Fetching(f) => Some(f.since.plus(8 * timing.retry_ms)),
        };
        [stage, self.give_up_at].into_iter().flatten().min()
    }

    /// The votes that an election may rest on.
    pub(crate) fn shown(&self) -> impl Iterator<Item = (&HostId, &Vote)> {
        self.votes.iter().filter(|(h, _)| !self.unshown.contains(h))
    }

    fn counts(&self, host: HostId) -> bool {
        self.votes.contains_key(&host) && !self.unshown.contains(&host)
    }

    fn ballot(&self) -> Epoch {
        self.proposal.as_ref().map_or(Epoch::default(), |p| p.ballot)
    }
}

impl Machine {
    /// A daemon start, and this host owned the last epoch: a restart is an election.
    pub(crate) fn bid_after_restart(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        self.role = RoleState::Candidate(Box::new(Candidate::new(Occasion::Restart, env.now)));
        self.bid(env, out);
    }

    /// The operator's order.
    pub(crate) fn promote(&mut self, env: &mut Env<'_>, force: bool, token: Token, out: &mut Vec<Output>) {
        let refuse = |why, out: &mut Vec<Output>| op_done(out, token, Err(why));
        if self.kind == MemberRole::Witness
            || ((!self.is_admitted() || self.meta.has_given_up()) && !force)
            || self.state.head().seq == Seq::ZERO
        {
            return refuse(OpError::NotDataMember, out);
        }
        let mut persistent = false;
        match &mut self.role {
            RoleState::Owner(o) if o.is_open() && !force => return refuse(OpError::AlreadyOwner, out),
            RoleState::Candidate(c) if c.token.is_some() => return refuse(OpError::Busy, out),
            RoleState::Candidate(c) => persistent = c.persistent,
            RoleState::Owner(_) => {
                self.fail_ops(&OpError::Interrupted, out);
                self.stop_streams(out);
                persistent = true;
            }
            RoleState::Follower | RoleState::Failed => {}
        }
        let mut c = Candidate::new(Occasion::Operator, env.now);
        c.token = Some(token);
        c.persistent = persistent;
        c.force = force;
        c.give_up_at = Some(env.now.plus(self.timing.promote_timeout_ms));
        self.following = None;
        self.role = RoleState::Candidate(Box::new(c));
        self.bid(env, out);
    }

    /// The owner hands over to this host.
    pub(crate) fn on_handover(&mut self, env: &mut Env<'_>, from: HostId, head: Head, out: &mut Vec<Output>) {
        let fit = matches!(self.role, RoleState::Follower)
            && self.authority(from) == Some(self.epoch())
            && self.kind == MemberRole::Replica
            && self.is_admitted()
            && self.state.head() == head
            && self.promised() <= self.epoch();
        if !fit {
            send(out, from, ImageMsg::HandoverDone { done: false });
            return;
        }
        let mut c = Candidate::new(Occasion::Handover, env.now);
        c.predecessor = Some(from);
        c.give_up_at = Some(env.now.plus(self.timing.promote_timeout_ms));
        self.role = RoleState::Candidate(Box::new(c));
        self.bid(env, out);
    }

    /// Takes a new ballot, higher than any known, and makes it durable together with the new epoch's
    /// secret and the own vote; the proposals go out when that is done.
    pub(crate) fn bid(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let (promised, current) = (self.promised(), self.epoch());
        let RoleState::Candidate(c) = &mut self.role else { return };
        let number = promised.number.max(current.number).max(c.outbid_by.number).saturating_add(1);
        let ballot = Epoch { number, host: self.id.host };
        let secret = EpochSecret::random(env.entropy);
        let members = if c.forcing { forced_list(&self.id).digest() } else { self.state.members.digest() };
        let proposal = Proposal {
            datastore: self.id.datastore,
            image: self.image,
            ballot,
            members,
            pub0: secret.first_public(self.image, ballot),
            secret_hash: secret.commitment(),
        };
        c.proposal = Some(proposal.clone());
        c.stage = Stage::Promising;
        c.votes.clear();
        c.shares.clear();
        c.answers.clear();
        c.bad_sources.clear();
        c.unshown.clear();
        c.quorum_seen = false;
        c.grace_until = None;
        c.asked = 0;
        c.problem = None;
        c.attempts += 1;
        if c.forcing {
            // Out of one that was split off before, it is still that one which would have to be abandoned.
            let earlier = self.meta.forced.filter(|f| !self.meta.has_given_up() && self.has_begun(*f));
            self.meta.forced = Some(earlier.unwrap_or(ballot));
        }
        self.meta.bid = Some((ballot, secret));
        // What comes of it may be another chain than the one that this copy began with.
        self.began_with = None;
        out.push(Output::Report(Event::Bidding { ballot }));
        self.promise_to(env, self.id.host, proposal, out);
    }

    /// Own promise and ballot are durable: ask the others.
    pub(crate) fn own_promise_durable(&mut self, env: &mut Env<'_>, vote: Vote, out: &mut Vec<Output>) {
        let RoleState::Candidate(c) = &mut self.role else { return };
        if c.ballot() != self.meta.promised || !matches!(c.stage, Stage::Promising) {
            return;
        }
        c.answers.insert(self.id.host, Answer::Voted);
        c.stage = Stage::Collecting;
        c.ask_again_at = env.now.plus(self.timing.retry_ms);
        if let Some(share) = self.meta.shares.iter().find(|(e, _)| *e == vote.head.epoch) {
            c.shares.push(share.clone());
        }
        c.votes.insert(self.id.host, vote);
        if c.forcing {
            self.begin(env, out);
            return;
        }
        self.ask(out);
        self.try_adopt(env, out);
    }

    /// Proposes to every connected member that has not voted, or not with what it can show.
    fn ask(&self, out: &mut Vec<Output>) {
        for host in &self.connected {
            self.ask_one(*host, out);
        }
    }

    fn ask_one(&self, host: HostId, out: &mut Vec<Output>) {
        let RoleState::Candidate(c) = &self.role else { return };
        let Some(proposal) = &c.proposal else { return };
        let asking = !matches!(c.stage, Stage::Backoff { .. } | Stage::Promising) && !c.forcing;
        let known = self.connected.contains(&host) && host != self.id.host && !c.counts(host);
        if !asking || !known || self.elector(host).is_none() {
            return;
        }
        let agrees = match c.answers.get(&host) {
            // It hears the last owner that it knows of, which has voted for this: shown that, it need not wait for it.
            Some(Answer::Refused(VoteRefusal::OwnerAlive(epoch))) => Some(epoch.host),
            _ => c.predecessor,
        };
        let consent = agrees.and_then(|h| c.votes.get(&h)).cloned();
        if c.predecessor.is_some_and(|p| p != host) && consent.is_none() {
            return;
        }
        let head = self.state.head();
        let (proposal, occasion) = (proposal.clone(), c.occasion);
        let role = self.elector(host).map(|m| m.role).unwrap_or_default();
        send(out, host, ImageMsg::Propose { proposal, occasion, head, consent, role });
    }

    pub(crate) fn on_voted(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        vote: Vote,
        share: Option<(Epoch, Share)>,
        out: &mut Vec<Output>,
    ) {
        let member = self.elector(from).cloned();
        let amnesia = member.as_ref().is_some_and(|m| self.has_amnesia(m, &vote));
        let RoleState::Candidate(c) = &mut self.role else { return };
        let Some(proposal) = &c.proposal else { return };
        let valid = |m: &Member| vote.host == from && vote.store == m.store && vote.is_signed_by(&m.key);
        let asked = !matches!(c.stage, Stage::Backoff { .. } | Stage::Promising) && !c.forcing;
        if !asked || vote.proposal != proposal.digest() || !member.as_ref().is_some_and(valid) {
            return;
        }
        if amnesia {
            if c.answers.insert(from, Answer::Amnesia) != Some(Answer::Amnesia) {
                out.push(Output::Report(Event::Amnesia { host: from }));
            }
            return;
        }
        c.answers.insert(from, Answer::Voted);
        c.shares.extend(share);
        let consent = c.predecessor == Some(from) && !c.votes.contains_key(&from);
        c.votes.insert(from, vote);
        c.unshown.remove(&from);
        if !matches!(c.stage, Stage::Vouching(_) | Stage::Fetching(_)) {
            c.stage = Stage::Collecting;
        }
        if consent {
            self.ask(out);
        }
        self.vote_while_fetching(&from);
        self.try_adopt(env, out);
    }

    /// A voter below what it has acknowledged, by its own word or by what the chain's headers say
    /// of it, has lost data: its vote would let a committed update vanish.
    fn has_amnesia(&self, member: &Member, vote: &Vote) -> bool {
        let seen = self.meta.acked_seen.of(member.host, &self.state);
        !vote.counts() || seen.is_some_and(|rank| vote.head.rank() < rank)
    }

    pub(crate) fn on_vote_refused(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        ballot: Epoch,
        why: VoteRefusal,
        out: &mut Vec<Output>,
    ) {
        let (jitter, quorum) = (self.jitter(env), self.has_quorum());
        if self.elector(from).is_none() || matches!(why, VoteRefusal::Promised(p) if !self.is_near(p)) {
            return;
        }
        let RoleState::Candidate(c) = &mut self.role else { return };
        if c.ballot() != ballot || c.counts(from) {
            return;
        }
        c.answers.insert(from, Answer::Refused(why));
        if c.predecessor == Some(from) {
            self.give_up(env, out);
            return;
        }
        if let VoteRefusal::Promised(higher) = why {
            c.outbid_by = c.outbid_by.max(higher);
            if matches!(c.stage, Stage::Collecting) && (!quorum || c.problem.is_some()) {
                c.stage = Stage::Backoff { until: env.now.plus(jitter) };
            }
        }
    }

    /// Somebody else's ballot was promised here: a bid or tenure of this host is over, or waits.
    pub(crate) fn outbid(&mut self, env: &mut Env<'_>, to: HostId, out: &mut Vec<Output>) {
        let until = env.now.plus(self.jitter(env));
        match &mut self.role {
            RoleState::Owner(_) => self.pause(env, to, out),
            RoleState::Candidate(c) => {
                c.stage = Stage::Backoff { until };
                c.votes.clear();
            }
            RoleState::Follower | RoleState::Failed => {}
        }
    }

    /// Random delay before the next bid: one to two times `rebid_ms`, doubling with the attempts.
    pub(crate) fn jitter(&self, env: &mut Env<'_>) -> u64 {
        let attempts = match &self.role {
            RoleState::Candidate(c) => c.attempts,
            _ => 0,
        };
        let mut byte = [0; 2];
        (env.entropy)(&mut byte);
        let base = self.timing.rebid_ms << attempts.min(4);
        base + base * u64::from(u16::from_le_bytes(byte)) / 65_536
    }

    pub(crate) fn candidate_peer_up(&mut self, env: &mut Env<'_>, host: HostId, out: &mut Vec<Output>) {
        self.ask_one(host, out);
        if let RoleState::Candidate(c) = &mut self.role {
            c.bad_sources.remove(&host);
        }
        self.try_adopt(env, out);
    }

    pub(crate) fn candidate_peer_down(&mut self, env: &mut Env<'_>, host: HostId, out: &mut Vec<Output>) {
        if self.fetch_source() == Some(host) {
            self.fetch_refused(env, out);
        }
        if matches!(&self.role, RoleState::Candidate(c) if c.predecessor == Some(host) && !c.votes.contains_key(&host))
        {
            self.give_up(env, out);
        }
    }

    pub(crate) fn candidate_tick(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Candidate(c) = &mut self.role else { return };
        if c.give_up_at.is_some_and(|t| t <= env.now) {
            self.give_up(env, out);
            return;
        }
        match &c.stage {
            Stage::Backoff { until } if *until <= env.now => self.bid(env, out),
            Stage::Vouching(v) if v.since.plus(8 * self.timing.retry_ms) <= env.now => {
                self.fetch_refused(env, out)
            }
            Stage::Fetching(f) if f.since.plus(8 * self.timing.retry_ms) <= env.now => {
                self.fetch_refused(env, out)
            }
            Stage::Collecting => {
                if c.ask_again_at <= env.now {
                    c.asked += 1;
                    c.ask_again_at = env.now.plus(self.timing.retry_ms << c.asked.min(4));
                    c.bad_sources.clear();
                    let hopeless = c.asked > 1 && c.token.is_some() && !c.quorum_seen;
                    if hopeless && self.all_answered() {
                        self.give_up(env, out);
                        return;
                    }
                    self.ask(out);
                }
                self.try_adopt(env, out);
            }
            _ => {}
        }
    }

    /// The time for an ordered promotion or hand-over is up, or nobody is left to ask.
    pub(crate) fn give_up(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let answers = self.answers();
        let need = self.state.members.quorum();
        let RoleState::Candidate(c) = &mut self.role else { return };
        if c.force && !c.forcing {
            c.forcing = true;
            c.give_up_at = None;
            self.force(env, out);
            return;
        }
        let votes = c.votes.len();
        let why = c.problem.clone().unwrap_or(OpError::NoQuorum { votes, need, answers });
        let (token, predecessor, persistent) = (c.token.take(), c.predecessor, c.persistent);
        if let Some(token) = token {
            op_done(out, token, Err(why));
        }
        if persistent {
            c.give_up_at = None;
            c.occasion = Occasion::Restart;
            c.stage = Stage::Backoff { until: env.now.plus(self.timing.rebid_ms) };
            return;
        }
        if let Some(host) = predecessor {
            send(out, host, ImageMsg::HandoverDone { done: false });
        }
        self.role = RoleState::Follower;
        self.promise = self.promise.take().filter(|p| p.from != self.id.host);
        // As any that is asked of a follower.
        self.fail_flushes(FlushError::NotOwner, out);
        self.ask_who_owns(out);
    }

    /// Whoever is followed no longer, or was not while this host bid, offers once per connection: asked, again.
    pub(crate) fn ask_who_owns(&self, out: &mut Vec<Output>) {
        let followed = self.following.as_ref().map(|f| f.host);
        for host in self.connected.iter().filter(|h| Some(**h) != followed) {
            send(out, *host, ImageMsg::WhoOwns { head: self.state.head() });
        }
    }

    pub(crate) fn answers(&self) -> Vec<(HostId, Answer)> {
        let RoleState::Candidate(c) = &self.role else { return Vec::new() };
        let of = |host: HostId| match c.answers.get(&host) {
            Some(a) => *a,
            None if self.connected.contains(&host) => Answer::Silent,
            None => Answer::Unreachable,
        };
        self.state.members.all().iter().map(|m| (m.host, of(m.host))).collect()
    }

    /// Members that have said nothing to a bid that the operator ordered. His word stands for the lease
    /// that would have to pass before they are given up: copies of data are at stake, never votes.
    pub(crate) fn absent_from_election(&self) -> BTreeSet<HostId> {
        let ordered = matches!(&self.role, RoleState::Candidate(c) if c.occasion == Occasion::Operator);
        let answers = if ordered { self.answers() } else { Vec::new() };
        let mute = |a: &Answer| matches!(a, Answer::Silent | Answer::Unreachable);
        answers.iter().filter(|(_, a)| mute(a)).map(|(h, _)| *h).collect()
    }

    /// Enough votes, by the list at the head and by the one before a weakening that may not be committed.
    pub(crate) fn has_quorum(&self) -> bool {
        let RoleState::Candidate(c) = &self.role else { return false };
        let voted =
            |list: &MemberList| list.all().iter().filter(|m| c.counts(m.host)).count() >= list.quorum();
        voted(&self.state.members) && self.previous_rule().is_none_or(|r| voted(&r.members))
    }

    /// A quorum of the members known here, the offering host among them, follow a later owner.
    pub(crate) fn quorum_has_moved_on(&self, offering: HostId) -> bool {
        let RoleState::Candidate(c) = &self.role else { return false };
        let gone = |h: HostId| {
            h == offering || matches!(c.answers.get(&h), Some(Answer::Refused(VoteRefusal::NotOwner(_))))
        };
        // A change of members that is not known to be committed may be in this copy alone.
        let before = self.meta.previous.as_ref().map(|r| &r.members);
        let lists = [Some(&self.state.members), before].into_iter().flatten();
        lists.into_iter().any(|l| l.all().iter().filter(|m| gone(m.host)).count() >= l.quorum())
    }

    /// True when no member that might still vote has yet to answer.
    pub(crate) fn all_answered(&self) -> bool {
        self.answers().iter().all(|(_, a)| *a != Answer::Silent)
    }

    /// The share and secret that make the ended epoch auditable.
    pub(crate) fn ended_secret(&self, ended: Epoch) -> Option<[u8; 32]> {
        let RoleState::Candidate(c) = &self.role else { return None };
        if let Some((_, s)) = self.meta.begun.as_ref().filter(|(e, _)| *e == ended) {
            return Some(*s.expose());
        }
        let commitment: Digest = (self.meta.secret_hash.0 == ended).then_some(self.meta.secret_hash.1)?;
        crate::shares::rebuild(&c.shares, ended, commitment).map(|s| *s.expose())
    }
}

/// The member list of a separate lineage: this host alone.
pub(crate) fn forced_list(id: &crate::api::Identity) -> MemberList {
    let me = Member { host: id.host, store: id.store, key: id.key.public(), role: MemberRole::Replica };
    MemberList::new(vec![me]).expect("invariant: one data member is a list")
}
