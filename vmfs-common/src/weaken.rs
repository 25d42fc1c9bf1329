//! Rules that a test may weaken, to show that its checks notice. Only in builds with the feature
//! `testing`, which no shipped binary has; off unless the calling thread has asked for it.

use std::cell::Cell;

/// A rule of DESIGN.md, broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Weakness {
    /// Votes are compared by the length of their chains instead of by (epoch, seq).
    HeadsByLength,
    /// Copies of updates of ended epochs count for the commit point before the new epoch's
    /// `EpochStart` is committed.
    OldEpochCommits,
    /// Votes are sent before the promise they carry is durable.
    PromiseNotDurable,
    /// An update is taken though nothing shows that the owner made it: rules 3 and 4 of the chain.
    OriginUnchecked,
    /// Updates of an epoch below the promise are acknowledged.
    AckBelowPromise,
    /// Ballots below the promise are voted for.
    LowerBallotAccepted,
    /// Half of the members make a quorum.
    QuorumOfHalf,
    /// An owner that has lost its quorum goes on.
    OwnerNeverFreezes,
}

impl Weakness {
    /// Every one of them.
    pub const ALL: &[Self] = &[
        Self::HeadsByLength,
        Self::OldEpochCommits,
        Self::PromiseNotDurable,
        Self::OriginUnchecked,
        Self::AckBelowPromise,
        Self::LowerBallotAccepted,
        Self::QuorumOfHalf,
        Self::OwnerNeverFreezes,
    ];
}

/// `.ci/run` looks for this in the release binaries, where it must not be.
#[used]
static MARK: &str = "the rules of this build can be weakened";

thread_local! {
    static NOW: Cell<Option<Weakness>> = const { Cell::new(None) };
}

/// Sets what is weakened on this thread from now on.
pub fn set(weakness: Option<Weakness>) {
    NOW.set(weakness);
}

/// Is this rule weakened on this thread?
#[must_use]
pub fn is(weakness: Weakness) -> bool {
    NOW.get() == Some(weakness)
}
