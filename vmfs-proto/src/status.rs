//! What a machine tells about itself.

use std::collections::BTreeMap;

use vmfs_common::chain::Refusal;
use vmfs_common::policy::{ImagePolicy, MemberRole};
use vmfs_common::{Epoch, Head, HostId, Millis, Seq};

use crate::follower::BlockSync;
use crate::machine::{Machine, RoleState};
use crate::owner::flush::Shortage;

/// What this host is to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It owns it, or is being elected to.
    Owner,
    /// It holds a copy.
    Replica,
    /// It holds the headers.
    Witness,
}

/// How the image does, seen from here. Ordered from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    /// Flushes have their full number of copies; a replica follows its owner.
    Ok,
    /// A replica is behind and receiving.
    CatchingUp,
    /// A member is missing, or flushes have fewer data copies than they should.
    Degraded,
    /// Flushes (and perhaps reads and writes) wait for a quorum; a replica has no owner.
    Stalled,
    /// Ownership is elsewhere by a promise given here, or on a lineage that this copy does not follow.
    Fenced,
    /// The store has failed here.
    Failed,
}

/// A member as the owner sees it (a replica knows only itself and the list).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// The host.
    pub host: HostId,
    /// What it keeps.
    pub role: MemberRole,
    /// False while it is catching up before its admission: no vote, no ack.
    pub admitted: bool,
    /// A connection to it is up, and it has not been silent when it was asked for its vote (true for this
    /// host).
    pub connected: bool,
    /// How it does.
    pub health: Health,
    /// The last update sent to it (own head for this host).
    pub seq: Seq,
    /// The last update it has acknowledged as durable.
    pub durable_seq: Seq,
    /// Bytes of headers and payload after `durable_seq`; an upper bound is 0 when unknown.
    pub lag_bytes: u64,
}

/// A snapshot of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// What this host is to the image.
    pub role: Role,
    /// The owner of the latest epoch known; none before the first update.
    pub owner: Option<HostId>,
    /// The latest epoch known.
    pub epoch: Epoch,
    /// Head of this copy.
    pub head: Head,
    /// What of it is durable here.
    pub durable: Head,
    /// The last seq acknowledged by a flush (owner), or the highest commit point seen.
    pub flushed_seq: Seq,
    /// The commit point of this epoch; zero while there is none.
    pub commit: Seq,
    /// How the image does, seen from here.
    pub health: Health,
    /// Flushes are acknowledged with fewer data copies than the policy wants (or with the owner alone).
    pub degraded: bool,
    /// What flushes wait for, at the owner.
    pub shortage: Shortage,
    /// The latest epoch was forced: promises 1, 4 and 5 do not hold across it.
    pub forced: bool,
    /// Grows whenever updates that this copy has shown are cut off: handles opened under an older
    /// value answer EIO until reopened.
    pub lineage: u64,
    /// The policy in force.
    pub policy: ImagePolicy,
    /// The members in force, then those catching up.
    pub members: Vec<MemberStatus>,
    /// Updates refused, by reason.
    pub refusals: BTreeMap<Refusal, u64>,
    /// Flushes waiting.
    pub flushes_waiting: usize,
    /// Bytes appended and not committed (owner).
    pub uncommitted_bytes: u64,
}

impl Machine {
    /// The highest update known to be committed. The store keeps a checkpoint at or below it, so that the
    /// copy can be cut back to anything later.
    #[must_use]
    pub fn committed_seq(&self) -> Seq {
        match &self.role {
            RoleState::Owner(o) => o.commit,
            _ => self.meta.commit.1,
        }
    }

    /// What `vmfs status` shows.
    #[must_use]
    pub fn status(&self, now: Millis) -> Status {
        let (commit, flushed_seq, degraded, uncommitted_bytes) = match &self.role {
            RoleState::Owner(o) => (o.commit, o.flushed, o.degraded || o.reduced, o.uncommitted_bytes()),
            _ => (Seq::ZERO, self.meta.commit.1, false, 0),
        };
        let epoch = self.following.as_ref().map_or(self.epoch(), |f| f.start.epoch.max(self.epoch()));
        Status {
            role: match &self.role {
                RoleState::Owner(_) => Role::Owner,
                RoleState::Candidate(c) if c.persistent => Role::Owner,
                _ if self.kind == MemberRole::Witness => Role::Witness,
                _ => Role::Replica,
            },
            owner: (epoch.number > 0).then_some(epoch.host),
            epoch,
            head: self.state.head(),
            durable: self.durable,
            flushed_seq,
            commit,
            health: self.health(now),
            degraded,
            shortage: match &self.role {
                RoleState::Owner(o) => o.shortage,
                _ => Shortage::default(),
            },
            forced: self.meta.forced.is_some() && !self.meta.has_given_up(),
            lineage: self.meta.lineage,
            policy: self.state.policy,
            members: self.member_status(now),
            refusals: self.refusals.clone(),
            flushes_waiting: self.flushes.len(),
            uncommitted_bytes,
        }
    }

    fn health(&self, now: Millis) -> Health {
        match &self.role {
            RoleState::Failed => Health::Failed,
            RoleState::Candidate(_) => Health::Stalled,
            RoleState::Owner(o) => {
                let stalled = self.flushes.front().is_some_and(|f| now.since(f.since) > self.timing.lease_ms);
                let gate = self.may_write(now);
                let missing = o.links.values().any(|l| l.admitted && (!l.streaming || l.acked < o.commit));
                if gate != crate::api::Gate::Open || stalled || o.shortage.is_any() {
                    Health::Stalled
                } else if o.degraded || o.reduced || missing {
                    Health::Degraded
                } else {
                    Health::Ok
                }
            }
            RoleState::Follower => match &self.following {
                _ if matches!(self.block_sync, BlockSync::Running) => Health::CatchingUp,
                // An own bid that came to nothing promises nobody anything.
                None if self.promised() > self.epoch() && self.promised().host != self.id.host => {
                    Health::Fenced
                }
                None => Health::Stalled,
                Some(_) if self.forked.is_some() => Health::Fenced,
                Some(f) if f.start.epoch > self.epoch() => Health::CatchingUp,
                Some(_) if self.muted => Health::CatchingUp,
                Some(_) => Health::Ok,
            },
        }
    }

    fn member_status(&self, now: Millis) -> Vec<MemberStatus> {
        let head = self.state.head().seq;
        let row = |host: HostId, role: MemberRole, admitted: bool| {
            let mine = host == self.id.host;
            let link = match &self.role {
                RoleState::Owner(o) => o.links.get(&host).map(|l| (o, l)),
                _ => None,
            };
            let absent = link.is_some_and(|(_, l)| l.absent);
            let connected = mine || (self.connected.contains(&host) && !absent);
            let (health, seq, durable_seq, lag_bytes) = match link {
                _ if mine => (self.health(now), head, self.durable.seq, 0),
                Some((_, l)) if l.fenced => (Health::Fenced, l.sent, l.acked, 0),
                Some((o, l)) if l.streaming => {
                    let behind = l.acked < o.commit;
                    let health = if behind { Health::CatchingUp } else { Health::Ok };
                    (health, l.sent, l.acked, o.bytes_after(l.acked))
                }
                Some((o, l)) => {
                    let health = if connected { Health::CatchingUp } else { Health::Stalled };
                    (health, l.sent, l.acked, o.bytes_after(l.acked))
                }
                None => (if connected { Health::Ok } else { Health::Stalled }, Seq::ZERO, Seq::ZERO, 0),
            };
            MemberStatus { host, role, admitted, connected, health, seq, durable_seq, lag_bytes }
        };
        let mut rows: Vec<MemberStatus> =
            self.state.members.all().iter().map(|m| row(m.host, m.role, true)).collect();
        if let RoleState::Owner(o) = &self.role {
            let learners = o.links.iter().filter(|(h, _)| self.state.members.get(**h).is_none());
            rows.extend(learners.map(|(h, l)| row(*h, l.role, false)));
        }
        rows
    }
}
