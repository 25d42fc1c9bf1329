//! Rules that a test may weaken, to show that its checks notice. Only in builds with the feature
//! `testing`, which no shipped binary has; off unless the calling thread has asked for it.

use std::cell::Cell;

/// A rule of DESIGN.md, broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Weakness {
    /// Votes are compared by the length of their chains instead of by (epoch, seq).
    HeadsByLength,
    /// Copies of updates of ended epochs count for the commit point before the new epoch's
    /// `EpochStart` is committed.
    OldEpochCommits,
    /// Votes are sent before the promise they carry is durable.
    PromiseNotDurable,
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
