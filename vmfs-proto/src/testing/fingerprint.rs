//! Fingerprints of machines for the model checker: two machines with the same fingerprint behave the
//! same from here on, as far as the checker's bounds reach. Every field is named, so that a new one
//! has to be decided on.
//!
//! Times count by class only (see [`Clock`]), versions of the meta record relative to the latest, and
//! counters that are only shown do not count.

use std::hash::{DefaultHasher, Hash, Hasher};

use vmfs_common::Millis;
use vmfs_common::election::Rank;

use crate::candidate::{Candidate, Stage};
use crate::certify::Walk;
use crate::follower::{BlockSync, Following};
use crate::machine::{Machine, RoleState, SyncState, Waiting};
use crate::meta::Meta;
use crate::owner::handover::HandoverOp;
use crate::voter::Promise;

/// One host's time, in three spans: a deadline is due, comes soon, after a long time, or never. The
/// delays of the machine ([`crate::Timing`]) must lie well within their spans.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// Now.
    pub now: Millis,
    /// Deadlines less than this away come soon.
    pub soon_ms: u64,
    /// Deadlines less than this away come after a long time.
    pub long_ms: u64,
}

impl Clock {
    /// 0 due, 1 soon, 2 long, 3 never.
    #[must_use]
    pub const fn class(&self, at: Millis) -> u8 {
        if at.0 <= self.now.0 {
            0
        } else if at.0 < self.now.0 + self.soon_ms {
            1
        } else if at.0 < self.now.0 + self.long_ms {
            2
        } else {
            3
        }
    }

    pub(crate) fn class_of(&self, at: Option<Millis>) -> Option<u8> {
        at.map(|t| self.class(t))
    }
}

/// Fingerprint of an encoded meta record.
///
/// # Panics
/// When it is not one.
#[must_use]
pub fn meta_fingerprint(bytes: &[u8]) -> u64 {
    fingerprint_of(&Meta::decode(bytes).expect("a machine's own record"))
}

fn fingerprint_of(meta: &Meta) -> u64 {
    let mut h = DefaultHasher::new();
    Meta { lineage: 0, ..meta.clone() }.encode().hash(&mut h);
    h.finish()
}

/// The highest ballot promised in an encoded meta record.
///
/// # Panics
/// When it is not one.
#[must_use]
pub fn promised_in(bytes: &[u8]) -> vmfs_common::Epoch {
    Meta::decode(bytes).expect("a machine's own record").promised
}

impl Machine {
    /// The highest commit point this copy knows of.
    #[must_use]
    pub fn known_commit(&self) -> Rank {
        self.meta.commit
    }

    /// The highest ballot promised, as the meta record has it.
    #[must_use]
    pub fn promised_ballot(&self) -> vmfs_common::Epoch {
        self.meta.promised
    }

    /// See the module.
    pub fn fingerprint(&self, clock: &Clock, h: &mut impl Hasher) {
        let Self {
            id: _,
            timing: _,
            image: _,
            kind,
            state,
            durable,
            meta,
            meta_version,
            meta_persisted,
            vote_version,
            meta_due,
            connected,
            refusals: _,
            booted: _,
            role,
            following,
            began_with,
            walk,
            rebid_after,
            rebids: _,
            reclaim_at,
            promise,
            sync,
            ack_due,
            muted,
            suspect,
            confirmed,
            forked,
            flushes,
            handover,
            block_sync,
            owner_heard: _,
            last_gates: _,
        } = self;
        (kind, state.head().digest, durable.digest, fingerprint_of(meta)).hash(h);
        // The first record is waited for by itself.
        (meta_version - meta_persisted, *meta_persisted > 0, clock.class_of(*meta_due)).hash(h);
        vote_version.saturating_sub(*meta_persisted).hash(h);
        (connected, clock.class(*rebid_after) > 0, clock.class_of(*reclaim_at)).hash(h);
        let SyncState { in_flight, again, stale } = sync;
        (in_flight, again, stale, ack_due, muted, suspect, confirmed, forked).hash(h);
        following.as_ref().map(of_following).hash(h);
        began_with.as_ref().map(of_following).hash(h);
        walk.is_some().hash(h);
        if let Some(Walk { offered, last, tip, lists, unvouched, backed }) = walk {
            (of_following(offered), last, lists).hash(h);
            (tip.is_some(), unvouched, backed).hash(h);
        }
        promise.is_some().hash(h);
        if let Some(Promise { from, proposal, version }) = promise {
            (from, proposal, version.map(|v| meta_version - v)).hash(h);
        }
        for Waiting { token, target, since: _ } in flushes {
            (token, target).hash(h);
        }
        handover.is_some().hash(h);
        if let Some(HandoverOp { token, to, deadline, taken }) = handover {
            (token, to, clock.class(*deadline), taken).hash(h);
        }
        match block_sync {
            BlockSync::Idle => 0,
            BlockSync::Running => 1,
            BlockSync::Retry(t) => 2 + clock.class(*t),
        }
        .hash(h);
        match role {
            RoleState::Follower => 1.hash(h),
            RoleState::Candidate(c) => {
                2.hash(h);
                of_candidate(c, clock, h);
            }
            RoleState::Owner(o) => {
                3.hash(h);
                o.fingerprint(clock, *meta_version, h);
            }
            RoleState::Failed => 4.hash(h),
        }
    }
}

fn of_following(f: &Following) -> impl Hash {
    let Following { host, start, parent, certified, from_nothing } = f;
    (*host, start.digest, *parent, *certified, *from_nothing)
}

fn of_candidate(c: &Candidate, clock: &Clock, h: &mut impl Hasher) {
    let Candidate {
        occasion,
        token,
        give_up_at,
        persistent,
        force,
        forcing,
        predecessor,
        proposal,
        stage,
        votes,
        shares,
        answers,
        bad_sources,
        unshown,
        problem,
        outbid_by,
        // How long until the next bid.
        attempts: _,
        ask_again_at,
        asked,
        quorum_seen,
        grace_until,
        forced_loss,
    } = c;
    format!("{occasion:?} {answers:?} {problem:?} {forced_loss:?}").hash(h);
    (token, clock.class_of(*give_up_at), persistent, force, forcing, predecessor, proposal).hash(h);
    (votes, bad_sources, unshown, outbid_by, clock.class(*ask_again_at), (*asked).min(2)).hash(h);
    (quorum_seen, clock.class_of(*grace_until)).hash(h);
    let mut shares: Vec<_> = shares.iter().map(|(epoch, share)| (epoch, share.expose())).collect();
    shares.sort();
    shares.dedup();
    shares.hash(h);
    match stage {
        Stage::Backoff { until } => (1, clock.class(*until)).hash(h),
        Stage::Promising => 2.hash(h),
        Stage::Collecting => 3.hash(h),
        Stage::Vouching(v) => (4, v.source, v.upto, v.base, v.last, &v.digests).hash(h),
        Stage::Fetching(f) => (5, f.source, f.base, &f.digests).hash(h),
    }
}
