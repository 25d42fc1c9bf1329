//! Requests of guests and operators, and how they end.

use std::fmt;

use vmfs_common::election::Rank;
use vmfs_common::ids::{Epoch, HostId, Seq};
use vmfs_common::msg::VoteRefusal;

use crate::loss::Loss;

/// Why a flush failed (EIO at the guest).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FlushError {
    /// This host does not own the image, or no longer.
    #[error("another host owns the image")]
    NotOwner,
    /// The local store failed.
    #[error("the store has failed")]
    StoreFailed,
    /// Waited for `stall_timeout_ms`.
    #[error("no quorum within the stall timeout")]
    Timeout,
    /// The operator said `fail`.
    #[error("given up by the operator while waiting for a quorum")]
    GivenUp,
}

/// A successful operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpOutcome {
    /// Done.
    Done,
    /// This host owns the image now.
    Promoted {
        /// Its tenure.
        epoch: Epoch,
        /// What is, or may be, lost.
        loss: Loss,
        /// True when a separate lineage was started.
        forced: bool,
    },
    /// The successor owns the image.
    HandedOver {
        /// Its tenure.
        epoch: Epoch,
    },
}

/// What a member answered to a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It voted.
    Voted,
    /// It voted, but lost what it had acknowledged: not counted.
    Amnesia,
    /// It refused.
    Refused(VoteRefusal),
    /// Connected, no answer yet.
    Silent,
    /// Not connected.
    Unreachable,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Voted => f.write_str("voted"),
            Self::Amnesia => f.write_str("has lost updates it acknowledged"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Silent => f.write_str("no answer"),
            Self::Unreachable => f.write_str("unreachable"),
        }
    }
}

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// Fewer votes than a quorum (exit code 3).
    #[error("no quorum: {votes} of the {need} votes needed")]
    NoQuorum {
        /// Valid votes.
        votes: usize,
        /// Votes needed.
        need: usize,
        /// What each member said.
        answers: Vec<(HostId, Answer)>,
    },
    /// The head to adopt is known, its data is not reachable.
    #[error("update {need} is known to exist, but no reachable member has the data after {have}")]
    DataMissing {
        /// The last update that this host holds.
        have: Seq,
        /// The one that has to be adopted.
        need: Seq,
    },
    /// A committed update is missing on every voter.
    #[error("update {} was committed, and no voter has it", .commit.1)]
    BelowCommit {
        /// The commit point.
        commit: Rank,
    },
    /// The votes do not make a certificate.
    #[error("the votes do not make a certificate: {0}")]
    Certificate(#[from] vmfs_common::election::CertificateError),
    /// Two voted heads of equal rank differ.
    #[error("fork evidence: two different updates {0} of one epoch")]
    Fork(Seq),
    /// This host owns the image already.
    #[error("this host owns the image already")]
    AlreadyOwner,
    /// Another host owns it, or no longer this one.
    #[error("this host does not own the image")]
    NotOwner,
    /// This host, or the one named, is no member with data.
    #[error("not a member with data")]
    NotDataMember,
    /// The host named is no member.
    #[error("not a member")]
    NotMember,
    /// The host named is a member already; a new store or role is remove, then add.
    #[error("a member already")]
    AlreadyMember,
    /// The owner, or the last data copy, cannot be removed.
    #[error("the owner cannot be removed: hand over first")]
    RemoveOwner,
    /// The host named has a copy on another lineage, which it does not leave by itself.
    #[error("its copy is on another lineage: drop it there first (vmfs abandon IMAGE --discard)")]
    OtherLineage,
    /// The member list would not be valid (too many members, none with data).
    #[error("not a valid member list")]
    BadMembers,
    /// The host named is not connected.
    #[error("the host is not connected")]
    NotConnected,
    /// Another operation on the image is under way.
    #[error("another operation on this image is under way")]
    Busy,
    /// The current epoch or an earlier change is not committed yet.
    #[error("an earlier change is not committed yet")]
    NotCommitted,
    /// It took too long; ownership has not moved.
    #[error("timed out; ownership has not moved")]
    Timeout,
    /// Elected, but the `EpochStart` is not yet durable on a quorum; served as soon as it is.
    #[error("elected, but not yet durable on a quorum; the image is served as soon as it is")]
    Uncommitted,
    /// Ownership was contested meanwhile; the change may still take effect.
    #[error("interrupted by an election; the change may still take effect")]
    Interrupted,
    /// Another host was elected meanwhile.
    #[error("another host was elected meanwhile: epoch {0}")]
    Overtaken(Epoch),
    /// The image's store has failed here.
    #[error("the store has failed")]
    StoreFailed,
    /// Not in a separate lineage.
    #[error("the image is not on a forced lineage")]
    NotForced,
}
