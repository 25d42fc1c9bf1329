//! The machine's front: construction, the calls of the hot path, dispatch and timers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use vmfs_common::chain::{Draft, Refusal};
use vmfs_common::codec::CodecError;
use vmfs_common::election::Genesis;
use vmfs_common::header::Update;
use vmfs_common::ids::{Epoch, Head, HostId, ImageId, Millis, Seq};
use vmfs_common::msg::ImageMsg;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;

use crate::api::{Env, Gate, Identity, Input, Output, Refused, Timing, Token, Wait};
use crate::candidate::Candidate;
use crate::certify::Walk;
use crate::follower::{BlockSync, Following};
use crate::meta::Meta;
use crate::ops::{FlushError, OpError};
use crate::owner::Owner;
use crate::owner::handover::HandoverOp;
use crate::voter::Promise;

/// What this host is to the image at the moment.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) enum RoleState {
    /// Holds a copy; follows whoever owns the image.
    Follower,
    /// Is being elected, or waits to be.
    Candidate(Box<Candidate>),
    /// Owns the image (its `EpochStart` may not be committed yet).
    Owner(Box<Owner>),
    /// The store has failed: takes part in nothing.
    Failed,
}

/// A flush that waits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiting {
    pub(crate) token: Token,
    /// Everything up to here.
    pub(crate) target: Head,
    pub(crate) since: Millis,
}

/// The one local sync that may be under way.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SyncState {
    pub(crate) in_flight: bool,
    /// More was appended or asked for since it began.
    pub(crate) again: bool,
    /// The copy was rolled back since it began: what it reports is void.
    pub(crate) stale: bool,
}

/// One image on one host. See [`crate::api`] for the contract with the engine.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub struct Machine {
    pub(crate) id: Arc<Identity>,
    pub(crate) timing: Timing,
    pub(crate) image: ImageId,
    pub(crate) kind: MemberRole,
    pub(crate) state: ImageState,
    pub(crate) durable: Head,
    pub(crate) meta: Meta,
    pub(crate) meta_version: u64,
    pub(crate) meta_persisted: u64,
    /// The first meta record that has the vote in it.
    pub(crate) vote_version: u64,
    pub(crate) meta_due: Option<Millis>,
    pub(crate) connected: BTreeSet<HostId>,
    pub(crate) refusals: BTreeMap<Refusal, u64>,
    pub(crate) booted: Millis,
    pub(crate) role: RoleState,
    pub(crate) following: Option<Following>,
    /// Who was followed from nothing, as long as nobody else has been since and this host has not bid: all that is
    /// here is that chain's.
    pub(crate) began_with: Option<Following>,
    /// An offer whose certificate is being checked along its chain.
    pub(crate) walk: Option<Walk>,
    /// Refusals by promise do not make this owner bid again before, while it has a quorum.
    pub(crate) rebid_after: Millis,
    pub(crate) rebids: u32,
    /// When to bid as the owner of the last epoch in the chain, if nobody owns a later one by then.
    pub(crate) reclaim_at: Option<Millis>,
    pub(crate) promise: Option<Promise>,
    pub(crate) sync: SyncState,
    /// The owner waits for acknowledgements: of the lowest and the highest of these.
    pub(crate) ack_due: Option<(Seq, Seq)>,
    /// A stream was refused: what is left of it is dropped until the owner offers again.
    pub(crate) muted: bool,
    /// What the first update of a stream did not follow, although it should; see [`Machine::refuse`].
    pub(crate) suspect: Option<Head>,
    /// The head, when the one after it was dropped: it is the owner's.
    pub(crate) confirmed: Option<Head>,
    /// The other one of two updates that an owner made with one parent, when this copy holds one of them.
    pub(crate) forked: Option<Head>,
    pub(crate) flushes: VecDeque<Waiting>,
    pub(crate) handover: Option<HandoverOp>,
    pub(crate) block_sync: BlockSync,
    /// Which owner was last heard since the start, and when, for loss statements.
    pub(crate) owner_heard: Option<(HostId, u64)>,
    pub(crate) last_gates: Option<(Gate, Gate)>,
}

impl Machine {
    #[expect(clippy::too_many_arguments, reason = "the three constructors share it")]
    fn new(
        env: &Env<'_>,
        id: Arc<Identity>,
        timing: Timing,
        kind: MemberRole,
        state: ImageState,
        durable: Head,
        meta: Meta,
        booted: Millis,
    ) -> Self {
        Self {
            id,
            timing,
            image: state.image,
            kind,
            owner_heard: None,
            state,
            durable,
            meta_version: 0,
            meta_persisted: 0,
            vote_version: 0,
            meta_due: None,
            connected: BTreeSet::new(),
            refusals: BTreeMap::new(),
            booted,
            role: RoleState::Follower,
            following: None,
            began_with: None,
            walk: None,
            rebid_after: env.now,
            rebids: 0,
            reclaim_at: None,
            promise: None,
            sync: SyncState::default(),
            ack_due: None,
            muted: false,
            suspect: None,
            confirmed: None,
            forked: None,
            flushes: VecDeque::new(),
            handover: None,
            block_sync: BlockSync::default(),
            meta,
            last_gates: None,
        }
    }

    /// Creates the image here: this host owns it. Outputs the genesis `EpochStart`
    /// ([`Output::AppendLocal`]) and the first meta record. The image takes buffered writes at
    /// once; flushes wait for the quorum.
    ///
    /// # Panics
    /// When this host with this store is not a data member in `genesis`.
    pub fn genesis(
        env: &mut Env<'_>,
        identity: Arc<Identity>,
        timing: Timing,
        image: ImageId,
        genesis: Genesis,
        out: &mut Vec<Output>,
    ) -> Self {
        let me = genesis.members.get(identity.host).expect("invariant: the creator is a member");
        assert!(
            me.role == MemberRole::Replica && me.store == identity.store,
            "invariant: the creator holds data"
        );
        let state = ImageState::new(image);
        let mut m = Self::new(
            env,
            identity,
            timing,
            MemberRole::Replica,
            state,
            Head::default(),
            Meta::default(),
            env.now,
        );
        m.begin_genesis(env, genesis, out);
        m.settle(env, out);
        m
    }

    /// Takes up an image found in the store; all of it is durable after the store's recovery. `cut_off` is
    /// the head of the tail that the store keeps as a fork after `state.head()`, if there is one (the highest):
    /// a roll-back may have taken effect there before this machine's record of it did. When this host owned
    /// the last epoch it starts a restart election.
    ///
    /// # Errors
    /// The meta record is damaged or of another version: the image must not take part.
    #[expect(clippy::too_many_arguments, reason = "called in one place")]
    pub fn recover(
        env: &mut Env<'_>,
        identity: Arc<Identity>,
        timing: Timing,
        kind: MemberRole,
        state: ImageState,
        cut_off: Option<Head>,
        meta: Option<&[u8]>,
        out: &mut Vec<Output>,
    ) -> Result<Self, CodecError> {
        let mut meta = meta.map(Meta::decode).transpose()?.unwrap_or_default();
        let durable = state.head();
        meta.forgive(durable.rank(), cut_off);
        let mut m = Self::new(env, identity, timing, kind, state, durable, meta, env.now);
        let (head, rule) = (m.state.head().seq, m.rule());
        m.meta.previous = m.meta.previous.take().and_then(|p| p.cut_to(head, &rule));
        let elsewhere = |f: Head| (env.history)(f.seq).is_some_and(|h| h != f);
        if m.meta.floor.is_some_and(|f| f.seq >= m.state.head().seq || elsewhere(f)) {
            // What was not vouched for has not survived.
            m.meta.floor = None;
        }
        if m.meta.forced.is_some_and(|f| !m.has_begun(f)) {
            // The separate lineage was decided on, and never begun.
            m.meta.forced = None;
        }
        // The record may be older than the log: an `EpochStart` above the floor has vouched for it.
        let vouched = m.state.epoch_start().map_or(Seq::ZERO, |e| e.start.seq);
        m.meta.floor = m.meta.floor.filter(|f| f.seq >= vouched);
        m.persist(out);
        let mine = m.epoch().host == m.id.host && m.is_admitted() && !m.meta.has_given_up();
        if mine && kind == MemberRole::Replica {
            m.bid_after_restart(env, out);
        }
        m.settle(env, out);
        Ok(m)
    }

    /// An image this store knows nothing of, on its first `Offer` or `Propose` (whose `role` says what
    /// to keep). From its first meta record on the image is in the store, also while it has no
    /// updates: it may hold a promise, and is taken up by [`Machine::recover`] after a restart.
    pub fn blank(
        env: &mut Env<'_>,
        identity: Arc<Identity>,
        timing: Timing,
        image: ImageId,
        kind: MemberRole,
        out: &mut Vec<Output>,
    ) -> Self {
        let state = ImageState::new(image);
        let mut m = Self::new(env, identity, timing, kind, state, Head::default(), Meta::default(), env.now);
        m.persist(out);
        m.settle(env, out);
        m
    }

    /// The state after the head.
    #[must_use]
    pub const fn state(&self) -> &ImageState {
        &self.state
    }

    /// May a guest write now?
    #[must_use]
    pub fn may_write(&self, now: Millis) -> Gate {
        match &self.role {
            RoleState::Failed => Gate::Refused(Refused::Failed),
            RoleState::Follower => Gate::Refused(Refused::NotOwner),
            RoleState::Candidate(_) => Gate::Wait(Wait::Election),
            RoleState::Owner(o) => o.write_gate(now, &self.state, &self.timing),
        }
    }

    /// May a guest read now? A replica may always be read: what it shows is a prefix.
    #[must_use]
    pub fn may_read(&self, now: Millis) -> Gate {
        match &self.role {
            RoleState::Failed => Gate::Refused(Refused::Failed),
            _ if self.kind == MemberRole::Witness => Gate::Refused(Refused::NoData),
            RoleState::Follower => Gate::Open,
            RoleState::Candidate(_) => Gate::Wait(Wait::Election),
            RoleState::Owner(o) => o.read_gate(now, &self.state),
        }
    }

    /// Until when (inclusive) [`Machine::may_read`] says that reads are open if nothing happens meanwhile;
    /// `None`: not now.
    #[must_use]
    pub fn readable_until(&self) -> Option<Millis> {
        match &self.role {
            RoleState::Failed | RoleState::Candidate(_) => None,
            _ if self.kind == MemberRole::Witness => None,
            RoleState::Follower => Some(Millis(u64::MAX)),
            RoleState::Owner(o) => o.readable_until(&self.state),
        }
    }

    /// True while this host makes the image's updates, also before its `EpochStart` is committed: what
    /// block-level sync rests on (a `Root` and a Seal) may be appended. Without it an owner whose
    /// members all need that sync would never be committed.
    #[must_use]
    pub fn may_vouch(&self) -> bool {
        matches!(&self.role, RoleState::Owner(o) if !o.is_draining())
    }

    /// Makes the next update. The caller has asked [`Machine::may_write`] under the same lock and
    /// reserved the space; the update is part of the chain from here on and must be stored, and
    /// only then the outputs executed: they may append another ([`Output::AppendLocal`]).
    ///
    /// # Panics
    /// When this host is not the owner.
    pub fn append(&mut self, env: &mut Env<'_>, draft: Draft, out: &mut Vec<Output>) -> Update {
        let update = self.make_update(env, Some(draft), out);
        self.settle(env, out);
        update
    }

    /// Appends an operation and a Seal over it. As [`Machine::append`]; both updates are to be stored before anything
    /// of `out` is carried out, which may be an update of the machine's own.
    ///
    /// # Panics
    /// When this host is not the owner.
    pub fn append_vouched(
        &mut self,
        env: &mut Env<'_>,
        draft: Draft,
        out: &mut Vec<Output>,
    ) -> (Update, Update) {
        let update = self.make_update(env, Some(draft), out);
        let seal = self.seal(env, out);
        self.settle(env, out);
        (update, seal)
    }

    /// Appends a Seal over the present head now, beside those the machine makes by itself: block-level
    /// sync and comparisons of copies rest on it. The caller has asked [`Machine::may_write`] under the
    /// same lock and stores the update.
    ///
    /// # Panics
    /// When this host is not the owner.
    pub fn seal(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) -> Update {
        let seal = self.make_update(env, None, out);
        self.sync_round(env, out);
        seal
    }

    /// Everything else.
    pub fn handle(&mut self, env: &mut Env<'_>, input: Input, out: &mut Vec<Output>) {
        if matches!(self.role, RoleState::Failed) {
            self.handle_failed(input, out);
            return;
        }
        match input {
            Input::Tick => self.tick(env, out),
            Input::PeerUp { host } => self.peer_up(env, host, out),
            Input::PeerDown { host } => self.peer_down(env, host, out),
            Input::Msg { from, msg } => self.message(env, from, *msg, out),
            Input::Flush { token } => self.flush(env, token, out),
            Input::Synced { head } => self.synced(env, head, out),
            Input::MetaPersisted { version } => {
                self.meta_persisted = self.meta_persisted.max(version);
                self.meta_was_persisted(env, out);
            }
            Input::StoreFailed => self.store_failed(out),
            Input::Imported { state } => self.imported(env, *state, out),
            Input::ImportFailed => self.block_sync = BlockSync::Retry(env.now.plus(4 * self.timing.retry_ms)),
            Input::StreamProgress { to, seq } => self.stream_progress(to, seq),
            Input::LogUnreadable { to, seq } => self.log_unreadable(env, to, seq, out),
            Input::Promote { force, token } => self.promote(env, force, token, out),
            Input::Handover { to, token } => self.hand_over(env, to, token, out),
            Input::AddMember { member, token } => self.add_member(env, member, token, out),
            Input::RemoveMember { host, token } => self.remove_member(env, host, token, out),
            Input::SetPolicy { policy, token } => self.set_policy(env, policy, token, out),
            Input::Fail { token } => {
                self.fail_flushes(FlushError::GivenUp, out);
                out.push(Output::FailWaiting);
                op_done(out, token, Ok(crate::ops::OpOutcome::Done));
            }
            Input::AbandonForced { token } => self.abandon_forced(env, token, out),
        }
        self.settle(env, out);
    }

    fn message(&mut self, env: &mut Env<'_>, from: HostId, msg: ImageMsg, out: &mut Vec<Output>) {
        if let RoleState::Owner(o) = &mut self.role
            && let Some(link) = o.links.get_mut(&from)
        {
            link.absent = false;
            link.backs &= promise_in(&msg) <= o.start.epoch;
        }
        match msg {
            ImageMsg::Propose { proposal, occasion, head, consent, role: _ } => {
                self.on_propose(env, from, proposal, occasion, head, consent, out);
            }
            ImageMsg::Voted { vote, share } => self.on_voted(env, from, vote, share, out),
            ImageMsg::VoteRefused { ballot, why } => self.on_vote_refused(env, from, ballot, why, out),
            ImageMsg::FetchHeaders { join, upto, after: _ } => {
                self.on_fetch_headers(env, from, &join, upto, out)
            }
            ImageMsg::Headers { parent, headers, upto } => {
                self.on_headers(env, from, parent, &headers, upto, out)
            }
            ImageMsg::FetchUpdates { after, upto, witness } => {
                if self.may_fetch(from) {
                    out.push(Output::ServeUpdates { to: from, after, upto, headers_only: witness });
                } else {
                    self.refuse(env, from, None, Refusal::NotAllowed, out);
                    send(out, from, ImageMsg::FetchFailed { upto, log_start: env.log_start });
                }
            }
            ImageMsg::FetchFailed { upto, log_start } => {
                self.on_fetch_failed(env, from, upto, log_start, out)
            }
            ImageMsg::Offer { head: _, start, log_start: _, certificate, role: _ } => {
                self.on_offer(env, from, start, &certificate, out);
            }
            ImageMsg::Join(join) => self.on_join(env, from, &join, out),
            ImageMsg::Behind { .. } => self.on_behind(from, out),
            ImageMsg::Sync { seq, commit } => self.on_sync(env, from, seq, commit, out),
            ImageMsg::Ack { head, store } => self.on_ack(env, from, head, store, out),
            ImageMsg::Refused { why, seq, promised, join: _ } => {
                self.on_refused(env, from, why, seq, promised, out);
            }
            ImageMsg::Share { epoch, share } => self.on_share(env, from, epoch, share),
            ImageMsg::Handover { head } => self.on_handover(env, from, head, out),
            ImageMsg::HandoverDone { done } => self.on_handover_done(env, from, done, out),
            ImageMsg::WhoOwns { .. } => self.on_who_owns(env, from, out),
            ImageMsg::NotMember { .. } => self.on_not_member(from, out),
        }
    }

    fn peer_up(&mut self, env: &mut Env<'_>, host: HostId, out: &mut Vec<Output>) {
        self.connected.insert(host);
        self.owner_peer_up(env, host, out);
        self.candidate_peer_up(env, host, out);
    }

    fn peer_down(&mut self, env: &mut Env<'_>, host: HostId, out: &mut Vec<Output>) {
        self.connected.remove(&host);
        if self.following.as_ref().is_some_and(|f| f.host == host) {
            self.following = None;
            self.ack_due = None;
        }
        self.walk.take_if(|w| w.offered().host == host);
        self.owner_peer_down(env, host);
        self.candidate_peer_down(env, host, out);
    }

    fn tick(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        if self.meta_due.is_some_and(|t| t <= env.now) {
            self.persist(out);
        }
        if matches!(self.block_sync, BlockSync::Retry(t) if t <= env.now) {
            self.block_sync = BlockSync::Idle;
            self.send_join(out);
        }
        if self.reclaim_at.is_some_and(|t| t <= env.now) {
            self.reclaim_at = None;
            self.bid_after_restart(env, out);
        }
        self.handover_tick(env, out);
        self.candidate_tick(env, out);
        self.owner_tick(env, out);
        if let Some(limit) = self.timing.stall_timeout_ms {
            while self.flushes.front().is_some_and(|f| env.now.since(f.since) >= limit) {
                let f = self.flushes.pop_front().expect("invariant: just looked at");
                out.push(Output::FlushDone { token: f.token, result: Err(FlushError::Timeout) });
            }
        }
    }

    /// When to call again with [`Input::Tick`]; `None`: nothing is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        if matches!(self.role, RoleState::Failed) {
            // It does nothing any more: what had been due would be due for ever.
            return None;
        }
        let stall =
            self.timing.stall_timeout_ms.and_then(|ms| self.flushes.front().map(|f| f.since.plus(ms)));
        let sync = match self.block_sync {
            BlockSync::Retry(t) => Some(t),
            _ => None,
        };
        let role = match &self.role {
            RoleState::Candidate(c) => c.deadline(&self.timing),
            RoleState::Owner(o) => o.deadline(&self.timing),
            RoleState::Follower | RoleState::Failed => None,
        };
        let handover = self.handover.as_ref().map(|h| h.deadline);
        [self.meta_due, stall, sync, role, handover, self.reclaim_at].into_iter().flatten().min()
    }

    /// After every call: what follows from whatever has just changed.
    pub(crate) fn settle(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        self.advance_promise(env, out);
        self.advance_owner(env, out);
        // Deposed by an owner that vanished before its epoch reached this copy: nobody else bids.
        let idle = matches!(self.role, RoleState::Follower) && self.following.is_none();
        let mine = self.epoch().host == self.id.host
            && self.kind == MemberRole::Replica
            && self.is_admitted()
            && !self.meta.has_given_up();
        if !idle || !mine {
            self.reclaim_at = None;
        } else if self.reclaim_at.is_none() {
            self.reclaim_at = Some(env.now.plus(self.timing.lease_ms));
        }
        let gates = (self.may_read(env.now), self.may_write(env.now));
        if self.last_gates.replace(gates).is_some_and(|before| before != gates) {
            out.push(Output::GateChanged);
        }
    }

    /// This host owns the image, and its `EpochStart` is committed.
    #[must_use]
    pub fn is_open_owner(&self) -> bool {
        matches!(&self.role, RoleState::Owner(o) if o.is_open())
    }

    /// Where the machine stands, for logs and failed tests.
    #[must_use]
    pub fn describe_role(&self) -> String {
        let promised = self.promised();
        match &self.role {
            RoleState::Candidate(c) => {
                format!(
                    "candidate {:?} votes {:?} {:?} promised {promised}",
                    c.stage,
                    c.votes.keys(),
                    c.problem
                )
            }
            RoleState::Owner(o) => {
                format!("owner open {} commit {} promised {promised}", o.is_open(), o.commit)
            }
            RoleState::Follower => format!("follower of {:?} promised {promised}", self.following),
            RoleState::Failed => "failed".to_owned(),
        }
    }

    // --- what all roles use ---

    /// The latest epoch of this copy's chain.
    pub(crate) fn epoch(&self) -> Epoch {
        self.state.epoch_start().map(|e| e.epoch).unwrap_or_default()
    }

    /// The highest ballot promised, durably or about to be.
    pub(crate) fn promised(&self) -> Epoch {
        self.promise.as_ref().map_or(self.meta.promised, |p| p.proposal.ballot.max(self.meta.promised))
    }

    /// Nobody below this is taken up: the highest ballot promised, or the certified epoch followed.
    pub(crate) fn bound(&self) -> Epoch {
        self.promised().max(self.certified())
    }

    /// The epoch of the owner that is followed, when its certificate holds.
    pub(crate) fn certified(&self) -> Epoch {
        self.following.as_ref().filter(|f| f.certified).map(|f| f.start.epoch).unwrap_or_default()
    }

    /// True when this host with this store is in the member list of its own copy.
    pub(crate) fn is_admitted(&self) -> bool {
        self.state.members.get(self.id.host).is_some_and(|m| m.store == self.id.store)
    }

    /// Persists the meta record now; returns its version.
    pub(crate) fn persist(&mut self, out: &mut Vec<Output>) -> u64 {
        self.meta_version += 1;
        self.meta_due = None;
        out.push(Output::PersistMeta { version: self.meta_version, bytes: self.meta.encode() });
        self.meta_version
    }

    /// Persists the meta record before long.
    pub(crate) fn persist_later(&mut self, now: Millis) {
        if self.meta_due.is_none() {
            self.meta_due = Some(now.plus(self.timing.meta_interval_ms));
        }
    }

    /// Sees to it that everything appended by now becomes durable.
    pub(crate) fn want_sync(&mut self, out: &mut Vec<Output>) {
        if self.sync.in_flight {
            self.sync.again = true;
        } else if self.durable != self.state.head() {
            self.sync.in_flight = true;
            out.push(Output::LocalSync);
        }
    }

    fn synced(&mut self, env: &mut Env<'_>, head: Head, out: &mut Vec<Output>) {
        let stale = std::mem::take(&mut self.sync.stale);
        self.sync.in_flight = false;
        let first = self.durable.seq == Seq::ZERO;
        if !stale && head.seq >= self.durable.seq && head.seq <= self.state.head().seq {
            self.durable = head;
        }
        if first && matches!(self.role, RoleState::Owner(_)) {
            for host in self.connected.clone() {
                self.offer(env, host, out);
            }
        }
        if std::mem::take(&mut self.sync.again) || stale {
            self.want_sync(out);
        }
        self.ack_if_due(env, out);
    }

    fn meta_was_persisted(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        self.ack_if_due(env, out);
        self.change_persisted(env, out);
    }
}

/// What a message says that its sender has promised, at least.
fn promise_in(msg: &ImageMsg) -> Epoch {
    match msg {
        ImageMsg::Refused { promised, .. } => *promised,
        ImageMsg::Propose { proposal, .. } => proposal.ballot,
        ImageMsg::Offer { start, .. } => start.epoch,
        _ => Epoch::default(),
    }
}

/// Queues a message.
pub(crate) fn send(out: &mut Vec<Output>, to: HostId, msg: ImageMsg) {
    out.push(Output::Send { to, msg: Box::new(msg) });
}

/// Answers an operation.
pub(crate) fn op_done(out: &mut Vec<Output>, token: Token, result: Result<crate::ops::OpOutcome, OpError>) {
    out.push(Output::OpDone { token, result });
}
