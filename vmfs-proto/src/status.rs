//! What a machine tells about itself.

use std::collections::BTreeMap;

use vmfs_common::chain::Refusal;
use vmfs_common::policy::{ImagePolicy, MemberRole};
use vmfs_common::{Epoch, Head, HostId, Seq};

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
    /// A connection to it is up (true for this host).
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
