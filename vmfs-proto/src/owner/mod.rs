//! Owning an image: making updates, and the gates before reads and writes.
//!
//! - [`flush`]: the commit point, flushes, degrading and freezing
//! - [`stream`]: offers, joins and streams to the members
//! - [`members`]: changes of members and policy
//! - [`handover`]: giving ownership to another host

#[cfg(any(test, feature = "testing"))]
mod fingerprint;
pub(crate) mod flush;
pub(crate) mod handover;
pub(crate) mod members;
pub(crate) mod stream;

use std::collections::{BTreeMap, VecDeque};

use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Share};
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal};
use vmfs_common::header::Update;
use vmfs_common::identity::Signature;
use vmfs_common::ids::{BLOCK_BYTES_U64, Digest, Epoch, Head, HostId, Millis, Seq};
use vmfs_common::msg::Occasion;
use vmfs_common::op::Op;
use vmfs_common::policy::{Acks, Member, MemberRole, OnQuorumLoss};
use vmfs_common::state::ImageState;

use crate::api::{Env, Gate, Output, Timing, Token, Wait};
use crate::candidate::Candidate;
use crate::loss::Loss;
use crate::machine::{Machine, RoleState};
use crate::ops::OpError;
use crate::owner::flush::Shortage;
use crate::owner::handover::Draining;
use crate::owner::members::Change;
use crate::owner::stream::Link;

/// Recent updates whose acknowledgements can be checked. More than this uncommitted, and writes wait.
const RING_MAX: usize = 65_536;
/// Committed updates kept in the ring, for the lag of slow members.
const RING_KEEP: u64 = 1_024;

/// One recent update.
#[derive(Debug, Clone, Copy)]
struct Recent {
    digest: Digest,
    /// Bytes of headers and payload of this epoch, up to and including it.
    bytes_to: u64,
}

/// How an election ended, to be told when its `EpochStart` is committed.
#[derive(Debug, Clone)]
pub(crate) struct Election {
    pub(crate) token: Option<Token>,
    pub(crate) give_up_at: Option<Millis>,
    pub(crate) predecessor: Option<HostId>,
    pub(crate) loss: Loss,
    pub(crate) forced: bool,
}

/// One tenure.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) struct Owner {
    chain: OwnerChain,
    /// The `EpochStart`, as a head.
    pub(crate) start: Head,
    /// The `EpochStart`'s bytes: the certificate in offers.
    certificate: std::sync::Arc<[u8]>,
    /// `EpochStart` is durable on a quorum (or it is the genesis): requests are served.
    open: bool,
    ring: VecDeque<Recent>,
    /// Seq of the ring's first entry.
    ring_start: Seq,
    bytes_total: u64,
    /// Highest seq durable on a quorum in this epoch; zero while there is none.
    pub(crate) commit: Seq,
    /// Highest seq up to which flushes are acknowledged.
    pub(crate) flushed: Seq,
    pub(crate) links: BTreeMap<HostId, Link>,
    /// One share of the epoch's secret for each member at its start.
    shares: BTreeMap<HostId, Share>,
    /// Contact with a quorum lasts until here at least.
    lease_until: Millis,
    /// When the `EpochStart` was made: the lease runs from here when there was no contact yet.
    lease_from: Millis,
    lease_check_at: Millis,
    frozen: bool,
    /// Updates are flagged: flushes may have been acknowledged with fewer data copies.
    pub(crate) degraded: bool,
    /// The first flagged update of this epoch: acknowledgements with fewer copies need it on a
    /// majority of the members.
    mark: Option<Seq>,
    /// See `Points::reduced`.
    pub(crate) reduced: bool,
    /// What flushes wait for that nobody who can be expected to acknowledge provides.
    pub(crate) shortage: Shortage,
    last_append: Millis,
    unsealed_since: Option<Millis>,
    /// Bytes at the last round of syncs.
    synced_bytes: u64,
    change: Option<Change>,
    /// A change of members up to here is made durable before anybody else hears of it: a witness that
    /// knew of one that its maker lost could not be outvoted.
    hold: Option<Seq>,
    draining: Option<Draining>,
    election: Option<Election>,
}

impl Owner {
    pub(crate) const fn is_open(&self) -> bool {
        self.open
    }

    pub(crate) const fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    fn is_frozen(&self, now: Millis, state: &ImageState) -> bool {
        now > self.frozen_after(state)
    }

    fn frozen_after(&self, state: &ImageState) -> Millis {
        #[cfg(any(test, feature = "testing"))]
        if vmfs_common::weaken::is(vmfs_common::weaken::Weakness::OwnerNeverFreezes) {
            return Millis(u64::MAX);
        }
        let p = state.policy;
        let freezes = p.on_quorum_loss == OnQuorumLoss::Stall && p.acks != Acks::Local;
        if freezes { self.lease_until } else { Millis(u64::MAX) }
    }

    pub(crate) fn readable_until(&self, state: &ImageState) -> Option<Millis> {
        self.open.then(|| self.frozen_after(state))
    }

    pub(crate) fn read_gate(&self, now: Millis, state: &ImageState) -> Gate {
        if !self.open {
            Gate::Wait(Wait::Election)
        } else if self.is_frozen(now, state) {
            Gate::Wait(Wait::Frozen)
        } else {
            Gate::Open
        }
    }

    pub(crate) fn write_gate(&self, now: Millis, state: &ImageState, timing: &Timing) -> Gate {
        let gate = self.read_gate(now, state);
        if gate != Gate::Open {
            return gate;
        }
        if self.draining.is_some() {
            return Gate::Wait(Wait::Handover);
        }
        let bounded = state.policy.acks != Acks::Local;
        let full = self.uncommitted_updates(state) >= RING_MAX as u64;
        if bounded && (self.uncommitted_bytes() > timing.max_lag_bytes || full) {
            return Gate::Wait(Wait::MaxLag);
        }
        Gate::Open
    }

    fn uncommitted_updates(&self, state: &ImageState) -> u64 {
        state.head().seq.0.saturating_sub(self.commit.0.max(self.start.seq.prev().0))
    }

    /// Bytes appended in this epoch and not committed.
    pub(crate) fn uncommitted_bytes(&self) -> u64 {
        self.bytes_after(self.commit)
    }

    /// Bytes of this epoch's updates after `seq`; of all remembered ones when that is long ago.
    pub(crate) fn bytes_after(&self, seq: Seq) -> u64 {
        if seq < self.ring_start {
            return self.bytes_total;
        }
        self.recent(seq).map_or(0, |r| self.bytes_total - r.bytes_to)
    }

    fn recent(&self, seq: Seq) -> Option<&Recent> {
        let at = seq.0.checked_sub(self.ring_start.0)?;
        self.ring.get(usize::try_from(at).ok()?)
    }

    fn push(&mut self, update: &Update) {
        let payload = update.header.payload_blocks() as u64 * BLOCK_BYTES_U64;
        self.bytes_total += update.bytes.len() as u64 + payload;
        self.ring.push_back(Recent { digest: update.digest, bytes_to: self.bytes_total });
        let keep_from = self.commit.0.saturating_sub(RING_KEEP);
        while self.ring.len() > RING_MAX + usize::try_from(RING_KEEP).unwrap_or(RING_MAX)
            || (self.ring_start.0 < keep_from && self.ring.len() > 1)
        {
            self.ring.pop_front();
            self.ring_start = self.ring_start.next();
        }
    }

    pub(crate) fn deadline(&self, timing: &Timing) -> Option<Millis> {
        let seal = self
            .unsealed_since
            .filter(|_| self.open)
            .map(|t| self.last_append.plus(timing.seal_idle_ms).min(t.plus(timing.seal_interval_ms)));
        let links = self.links.values().filter_map(|l| l.offer_at).min();
        let election = self.election.as_ref().and_then(|e| e.give_up_at);
        let lease = (!self.links.is_empty()).then_some(self.lease_check_at);
        [seal, links, election, lease].into_iter().flatten().min()
    }

    /// Operations to be answered with an error now.
    pub(crate) fn take_tokens(&mut self) -> Vec<Token> {
        let election = self.election.as_mut().and_then(|e| e.token.take());
        let change = self.change.take().map(|c| c.token);
        election.into_iter().chain(change).collect()
    }
}

impl Machine {
    pub(crate) fn begin_genesis(&mut self, env: &mut Env<'_>, genesis: Genesis, out: &mut Vec<Output>) {
        let ballot = Epoch { number: 1, host: self.id.host };
        let secret = EpochSecret::random(env.entropy);
        let kept = secret.clone();
        let proposal = Proposal {
            datastore: self.id.datastore,
            image: self.image,
            ballot,
            members: genesis.members.digest(),
            pub0: secret.first_public(self.image, ballot),
            secret_hash: secret.commitment(),
        };
        let mandate = Mandate::Genesis(genesis);
        let start = EpochStart { proposal, mandate, published: None, signature: Signature([0; 64]) };
        let start = start.signed(Seq(1), &Digest::default(), &self.id.key);
        let (chain, update) = OwnerChain::begin(secret, &self.state.tip, start, env.time_ns);
        self.meta.promised = ballot;
        self.meta.begun = Some((ballot, kept));
        self.become_owner(env, chain, &update, None, out);
    }

    /// The `EpochStart` is made: it is appended, offered to everybody, and open when committed.
    pub(crate) fn become_owner(
        &mut self,
        env: &mut Env<'_>,
        chain: OwnerChain,
        update: &Update,
        election: Option<(Loss, bool)>,
        out: &mut Vec<Output>,
    ) {
        let (token, give_up_at, predecessor) = match &mut self.role {
            RoleState::Candidate(c) => (c.token.take(), c.give_up_at, c.predecessor),
            _ => (None, None, None),
        };
        let absent = self.absent_from_election();
        self.apply(env, update, out);
        self.following = None;
        self.ack_due = None;
        let members = &self.state.members;
        let shares = crate::shares::split(chain.secret(), members.quorum(), members.len(), env.entropy);
        let shares: BTreeMap<_, _> = members.all().iter().map(|m| m.host).zip(shares).collect();
        if let Some(own) = shares.get(&self.id.host) {
            self.meta.keep_share(update.header.epoch, own.clone());
        }
        // Members that a change not known to be committed leaves out still count.
        let before = self.previous_rule().map(|r| r.members.all().to_vec()).unwrap_or_default();
        let others = before.iter().chain(members.all()).filter(|m| m.host != self.id.host);
        let link = |m: &Member| Link { absent: absent.contains(&m.host), ..Link::new(m, true) };
        let links = others.map(|m| (m.host, link(m))).collect();
        let degraded = chain.is_degraded();
        let mut owner = Owner {
            chain,
            start: update.head(),
            certificate: update.bytes.clone(),
            open: election.is_none(),
            ring: VecDeque::new(),
            ring_start: update.header.seq,
            bytes_total: 0,
            commit: Seq::ZERO,
            flushed: Seq::ZERO,
            links,
            shares,
            lease_until: env.now.plus(self.timing.lease_ms),
            lease_from: env.now,
            lease_check_at: env.now.plus(self.timing.lease_ms / 4),
            frozen: false,
            degraded,
            mark: degraded.then_some(update.header.seq),
            reduced: false,
            shortage: Shortage::default(),
            last_append: env.now,
            unsealed_since: None,
            synced_bytes: 0,
            change: None,
            hold: None,
            draining: None,
            election: election.map(|(loss, forced)| Election {
                token,
                give_up_at,
                predecessor,
                loss,
                forced,
            }),
        };
        owner.push(update);
        self.role = RoleState::Owner(Box::new(owner));
        self.persist(out);
        out.push(Output::AppendLocal(Box::new(update.clone())));
        self.check_lease(env, out);
        for host in self.connected.clone() {
            self.offer(env, host, out);
        }
        self.sync_round(env, out);
    }

    /// Numbers, chains and applies the next update; `None` makes a Seal.
    pub(crate) fn make_update(
        &mut self,
        env: &mut Env<'_>,
        draft: Option<Draft>,
        out: &mut Vec<Output>,
    ) -> Update {
        let acked = self.acked_of_members();
        let RoleState::Owner(o) = &mut self.role else {
            panic!("invariant: only an owner appends: the gate was asked under the same lock")
        };
        let update = match draft {
            Some(draft) => o.chain.append(draft, env.time_ns, o.commit, acked),
            None => o.chain.seal(&self.id.key, env.time_ns, o.commit, acked),
        };
        o.push(&update);
        o.last_append = env.now;
        if matches!(update.header.op, Op::Seal(_)) {
            o.unsealed_since = None;
        } else if o.unsealed_since.is_none() {
            o.unsealed_since = Some(env.now);
        }
        let due = o.bytes_total - o.synced_bytes > self.timing.max_lag_bytes / 8
            || o.uncommitted_updates(&self.state) % (RING_MAX as u64 / 8) == RING_MAX as u64 / 8 - 1;
        self.apply(env, &update, out);
        if due {
            self.sync_round(env, out);
        }
        update
    }

    /// Makes an update of the machine's own and has it stored.
    pub(crate) fn append_own(
        &mut self,
        env: &mut Env<'_>,
        draft: Option<Draft>,
        out: &mut Vec<Output>,
    ) -> Seq {
        let update = self.make_update(env, draft, out);
        let seq = update.header.seq;
        out.push(Output::AppendLocal(Box::new(update)));
        seq
    }

    /// A higher ballot was promised, here or elsewhere: the epoch may be over. Reads and writes wait,
    /// and this host bids again unless a certified `EpochStart` comes first.
    pub(crate) fn pause(&mut self, env: &mut Env<'_>, promised_to: HostId, out: &mut Vec<Output>) {
        let delay =
            if self.hands_over_to(promised_to) { self.timing.promote_timeout_ms } else { self.jitter(env) };
        self.fail_ops(&OpError::Interrupted, out);
        self.stop_streams(out);
        let until = env.now.plus(delay);
        self.role = RoleState::Candidate(Box::new(Candidate::new(Occasion::Restart, until)));
    }

    pub(crate) fn owner_tick(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &mut self.role else { return };
        if let Some(e) = &mut o.election
            && e.give_up_at.is_some_and(|t| t <= env.now)
        {
            e.give_up_at = None;
            if let Some(token) = e.token.take() {
                crate::machine::op_done(out, token, Err(OpError::Uncommitted));
            }
        }
        let seal = o.open
            && o.unsealed_since.is_some_and(|t| {
                env.now.since(o.last_append) >= self.timing.seal_idle_ms
                    || env.now.since(t) >= self.timing.seal_interval_ms
            });
        let lease = o.lease_check_at <= env.now;
        let offers: Vec<HostId> = o
            .links
            .iter()
            .filter(|(_, l)| l.offer_at.is_some_and(|t| t <= env.now))
            .map(|(h, _)| *h)
            .collect();
        if lease {
            self.check_lease(env, out);
        }
        for host in offers {
            self.offer(env, host, out);
        }
        if seal {
            self.append_own(env, None, out);
            self.sync_round(env, out);
        }
    }

    /// True when `host` may follow as a data member.
    pub(crate) fn is_data_member(&self, host: HostId) -> bool {
        self.state.members.get(host).is_some_and(|m| m.role == MemberRole::Replica)
    }
}
