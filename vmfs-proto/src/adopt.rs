//! From a quorum of votes to an `EpochStart`: choose the highest voted head, fetch and verify what
//! is missing up to it, and begin.

use std::collections::VecDeque;

use vmfs_common::chain::{OwnerChain, Refusal};
use vmfs_common::election::{EpochStart, Mandate, Vote, adopted_head, verify_votes};
use vmfs_common::header::Update;
use vmfs_common::identity::Signature;
use vmfs_common::ids::{Digest, Head, HostId, Millis, Seq};
use vmfs_common::msg::{ImageMsg, Join, Occasion};
use vmfs_common::policy::{MemberList, MemberRole};

use crate::api::{Env, Event, Output, Take};
use crate::candidate::{Candidate, Stage, forced_list};
use crate::lineage::common;
use crate::loss;
use crate::machine::{Machine, RoleState, send};
use crate::ops::OpError;

/// Longest suffix, in updates, that a candidate fetches from a voter (32 bytes of memory each).
const SUFFIX_MAX: usize = 1 << 20;

/// Headers are hashed forward before anything is cut or appended: a voter that lies about its head
/// changes nothing here.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) struct Vouching {
    pub(crate) source: HostId,
    pub(crate) upto: Head,
    /// The common ancestor, once the voter has named it.
    pub(crate) base: Option<Head>,
    pub(crate) last: (Seq, Digest),
    pub(crate) digests: VecDeque<Digest>,
    pub(crate) since: Millis,
}

/// Exactly these updates are taken from the voter.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) struct Fetching {
    pub(crate) source: HostId,
    pub(crate) base: Head,
    pub(crate) digests: VecDeque<Digest>,
    pub(crate) since: Millis,
}

/// Rounds of asking after which a voter that cannot show its head is done without: what it holds is worth a wait.
const UNSHOWN_AFTER: u32 = 2;

impl Machine {
    /// With a quorum of votes: adopt the highest head, or say what is in the way.
    pub(crate) fn try_adopt(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let everybody = self.all_answered();
        let quorum = self.has_quorum();
        let RoleState::Candidate(c) = &mut self.role else { return };
        if !matches!(c.stage, Stage::Collecting) || c.forcing {
            return;
        }
        if !quorum {
            if c.force && everybody {
                self.give_up(env, out);
            }
            return;
        }
        if !c.quorum_seen {
            c.quorum_seen = true;
            c.grace_until = Some(env.now.plus(self.timing.adopt_grace_ms));
        }
        let in_no_hurry = c.occasion != Occasion::Handover;
        if in_no_hurry && !everybody && c.grace_until.is_some_and(|t| t > env.now) {
            return;
        }
        c.grace_until = None;
        let votes: Vec<Vote> = c.shown().map(|(_, v)| v.clone()).collect();
        let adopted = match adopted_head(&votes, &self.state.members) {
            Ok(head) => head,
            Err(heads) => {
                let (a, b) = *heads;
                c.problem = Some(OpError::Fork(a.seq));
                out.push(Output::Report(Event::Fork { ours: a, theirs: b }));
                return;
            }
        };
        if let Some(commit) = c.votes.values().map(|v| v.commit).max().filter(|c| *c > adopted.rank()) {
            c.problem = Some(OpError::BelowCommit { commit });
            return;
        }
        let own = self.state.head();
        if adopted == own {
            self.begin(env, out);
            return;
        }
        let data = |h: &HostId| self.state.members.get(*h).is_some_and(|m| m.role == MemberRole::Replica);
        let holds = |h: &HostId, v: &Vote| {
            v.head == adopted && self.connected.contains(h) && !c.bad_sources.contains(h)
        };
        let sources = || c.shown().filter(|(h, v)| holds(h, v)).map(|(h, _)| *h);
        // A witness has all there is of updates without payload; others are refused, and it is no source.
        let Some(source) = sources().find(data).or_else(|| sources().next()) else {
            c.problem = Some(OpError::DataMissing { have: own.seq, need: adopted.seq });
            return;
        };
        c.problem = None;
        c.stage = Stage::Vouching(Vouching {
            source,
            upto: adopted,
            base: None,
            last: Default::default(),
            digests: VecDeque::new(),
            since: env.now,
        });
        let join = self.join();
        send(out, source, ImageMsg::FetchHeaders { join, upto: adopted, after: Seq::ZERO });
    }

    /// The voter being fetched from.
    pub(crate) fn fetch_source(&self) -> Option<HostId> {
        match &self.role {
            RoleState::Candidate(c) => match &c.stage {
                Stage::Vouching(v) => Some(v.source),
                Stage::Fetching(f) => Some(f.source),
                _ => None,
            },
            _ => None,
        }
    }

    /// A vote that comes late may name a higher head than the one being fetched.
    pub(crate) fn vote_while_fetching(&mut self, from: &HostId) {
        let RoleState::Candidate(c) = &mut self.role else { return };
        let Some(voted) = c.votes.get(from).map(|v| v.head.rank()) else { return };
        let source = match &c.stage {
            Stage::Vouching(v) => v.source,
            Stage::Fetching(f) => f.source,
            _ => return,
        };
        let target = c.votes.get(&source).map(|v| v.head.rank());
        if target.is_none_or(|t| voted > t) {
            c.stage = Stage::Collecting;
        }
    }

    /// The source has failed or left: its vote stands, another source is looked for.
    pub(crate) fn fetch_refused(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let Some(source) = self.fetch_source() else { return };
        let RoleState::Candidate(c) = &mut self.role else { return };
        c.bad_sources.insert(source);
        c.stage = Stage::Collecting;
        self.try_adopt(env, out);
    }

    pub(crate) fn on_fetch_failed(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        upto: Head,
        log_start: Seq,
        out: &mut Vec<Output>,
    ) {
        if self.walk_failed(env, from, upto, out) {
            return;
        }
        let wanted = self.fetch_source() == Some(from);
        // What is committed here is part of the voter's chain, whatever else that is. Where its log is shorter than
        // that, it may hold what it cannot show.
        let reaches_back = log_start <= self.meta.commit.1.next();
        let have = self.state.head().seq;
        let RoleState::Candidate(c) = &mut self.role else { return };
        let voted = c.votes.get(&from).is_some_and(|v| v.head == upto);
        if !wanted || !voted {
            return;
        }
        if reaches_back && c.asked >= UNSHOWN_AFTER {
            c.unshown.insert(from);
            c.problem = Some(OpError::DataMissing { have, need: upto.seq });
        }
        self.fetch_refused(env, out);
    }

    /// The content of an image is for its members, for who is about to become one, and for the candidate
    /// that this copy has voted for: its list may be newer.
    pub(crate) fn may_fetch(&self, from: HostId) -> bool {
        let linked = matches!(&self.role, RoleState::Owner(o) if o.links.contains_key(&from));
        linked || self.elector(from).is_some() || self.meta.promised.host == from
    }

    /// Somebody who may vote wants to hash our headers forward to the head we have voted with.
    pub(crate) fn on_fetch_headers(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        join: &Join,
        upto: Head,
        out: &mut Vec<Output>,
    ) {
        if !self.may_fetch(from) {
            self.refuse(env, from, None, Refusal::NotAllowed, out);
            // For a candidate whose ballot has been outbid here meanwhile: it looks elsewhere.
            send(out, from, ImageMsg::FetchFailed { upto, log_start: env.log_start });
            return;
        }
        let at = |seq: Seq| if seq == Seq::ZERO { Some(Head::default()) } else { (env.history)(seq) };
        let held = upto == self.state.head() || at(upto.seq) == Some(upto);
        let after =
            common(&self.state, join).filter(|s| *s < upto.seq && s.next() >= env.log_start).and_then(at);
        match after {
            Some(after) if held => out.push(Output::ReadHeaders { to: from, after, upto }),
            _ => send(out, from, ImageMsg::FetchFailed { upto, log_start: env.log_start }),
        }
    }

    pub(crate) fn on_headers(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        parent: Head,
        headers: &[Vec<u8>],
        upto: Head,
        out: &mut Vec<Output>,
    ) {
        if self.walk_headers(env, from, parent, headers, upto, out) {
            return;
        }
        let known = parent == Head::default()
            || parent == self.state.head()
            || (env.history)(parent.seq) == Some(parent);
        let keeps_commit = parent == self.state.head() || parent.seq >= self.meta.commit.1;
        let image = self.image;
        let RoleState::Candidate(c) = &mut self.role else { return };
        let Stage::Vouching(v) = &mut c.stage else { return };
        if v.source != from || v.upto != upto {
            return;
        }
        v.since = env.now;
        if v.base.is_none() && known && keeps_commit {
            v.base = Some(parent);
            v.last = (parent.seq, parent.digest);
        }
        let good = v.base.is_some()
            && headers.iter().all(|bytes| {
                let Ok(u) = Update::decode(bytes) else { return false };
                let next = u.header.image == image
                    && u.header.seq == v.last.0.next()
                    && u.header.parent == v.last.1
                    && u.header.seq <= upto.seq
                    && v.digests.len() < SUFFIX_MAX;
                v.last = (u.header.seq, u.digest);
                v.digests.push_back(u.digest);
                next
            });
        if !good || (v.last.0 == upto.seq && v.last.1 != upto.digest) {
            self.unvouched(env, from, out);
            return;
        }
        if v.last.0 == upto.seq {
            let base = v.base.expect("invariant: checked above");
            let digests = std::mem::take(&mut v.digests);
            c.stage = Stage::Fetching(Fetching { source: from, base, digests, since: env.now });
            send(out, from, ImageMsg::FetchUpdates { after: base.seq, upto, witness: false });
        }
    }

    /// The voter's headers do not lead to the head it voted with: the vote is worth nothing.
    fn unvouched(&mut self, env: &mut Env<'_>, from: HostId, out: &mut Vec<Output>) {
        if let RoleState::Candidate(c) = &mut self.role {
            c.votes.remove(&from);
        }
        self.refuse(env, from, None, Refusal::Unvouched, out);
    }

    pub(crate) fn judge_fetched(&self, update: &Update) -> Result<Take, Refusal> {
        let RoleState::Candidate(c) = &self.role else { return Err(Refusal::NotOwner) };
        let Stage::Fetching(f) = &c.stage else { return Err(Refusal::Unvouched) };
        if f.digests.front() != Some(&update.digest) {
            return Err(Refusal::Unvouched);
        }
        let head = self.state.head();
        if update.header.parent == head.digest && update.header.seq == head.seq.next() {
            return self.check_next(update).map(|()| Take::Append);
        }
        if update.header.parent == f.base.digest && head.seq >= f.base.seq {
            return Ok(Take::RollBack { to: f.base });
        }
        Err(Refusal::WrongParent)
    }

    /// A fetched update has been appended; after the last one the epoch begins.
    pub(crate) fn fetch_took(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Candidate(c) = &mut self.role else { return };
        let Stage::Fetching(f) = &mut c.stage else { return };
        f.digests.pop_front();
        f.since = env.now;
        if f.digests.is_empty() {
            c.stage = Stage::Collecting;
            self.try_adopt(env, out);
        }
    }

    /// The operator's word instead of a quorum: a bid of one.
    pub(crate) fn force(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Candidate(c) = &mut self.role else { return };
        // What the others have said is lost with the bid, but not for the loss statement.
        let votes: Vec<Vote> = c.votes.values().cloned().collect();
        let loss = loss::state(self, &votes);
        let RoleState::Candidate(c) = &mut self.role else { return };
        c.forced_loss = Some(loss);
        self.bid(env, out);
    }

    /// All votes are in, the adopted head is ours: the `EpochStart`.
    pub(crate) fn begin(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let head = self.state.head();
        let members = self.state.members.clone();
        let before = self.meta.previous.as_ref().map(|r| r.members.clone());
        let RoleState::Candidate(c) = &mut self.role else { return };
        let Some(proposal) = c.proposal.clone() else { return };
        let bid = self.meta.bid.as_ref().filter(|(e, _)| *e == proposal.ballot);
        let Some((_, secret)) = bid.cloned() else { return };
        let after = if c.forcing { forced_list(&self.id) } else { members.clone() };
        if proposal.members != after.digest() {
            // The adopted chain has another member list: a quorum of that one is needed.
            self.bid(env, out);
            return;
        }
        // The loss statement needs also what members have said that a change not yet committed leaves out.
        let votes: Vec<Vote> = c.votes.values().cloned().collect();
        let mandate = if c.forcing {
            Mandate::Forced(after)
        } else {
            Mandate::Votes(certificate(c, &members, before.as_ref()))
        };
        if let Mandate::Votes(votes) = &mandate
            && let Err(why) = verify_votes(&proposal, votes, &head, &members)
        {
            if c.votes.get(&self.id.host).is_some_and(|own| own.head != head) {
                // The head came from a member that a change not yet committed leaves out: its vote is
                // no part of the certificate. Ours will name that head the next time.
                self.bid(env, out);
                return;
            }
            c.problem.get_or_insert(OpError::Certificate(why));
            return;
        }
        let forced = c.forcing;
        let loss = c.forced_loss.unwrap_or_else(|| loss::state(self, &votes));
        let published = self.ended_secret(head.epoch);
        let start = EpochStart { proposal, mandate, published, signature: Signature([0; 64]) };
        let start = start.signed(head.seq.next(), &head.digest, &self.id.key);
        let (chain, update) = OwnerChain::begin(secret, &self.state.tip, start, env.time_ns);
        self.meta.begun = self.meta.bid.take();
        let epoch = update.header.epoch;
        out.push(Output::Report(Event::Elected { epoch, parent: head, confirmed: published.is_some() }));
        self.become_owner(env, chain, &update, Some((loss, forced)), out);
    }
}

/// The votes that an `EpochStart` names: those of the members, and where these are no majority of the list before a
/// change that may not be committed, also those of that list, for whoever knows no other.
fn certificate(c: &Candidate, members: &MemberList, before: Option<&MemberList>) -> Vec<Vote> {
    let is_in = |list: &MemberList, v: &Vote| list.get(v.host).is_some_and(|m| m.store == v.store);
    let of_member = |v: &&Vote| members.get(v.host).is_some();
    let all = || c.shown().map(|(_, v)| v);
    let count = |list: &MemberList| all().filter(of_member).filter(|v| is_in(list, v)).count();
    match before.filter(|l| count(l) < l.quorum()) {
        Some(l) => all().filter(|v| of_member(v) || is_in(l, v)).cloned().collect(),
        None => all().filter(of_member).cloned().collect(),
    }
}
