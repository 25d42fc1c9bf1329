//! What a promotion says about lost flushes (promise 5). It never claims more than it can know.

use std::fmt;

use vmfs_common::Seq;

/// The loss statement of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing acknowledged is missing.
    Nothing,
    /// Later updates are known to have been acknowledged.
    EndsAt {
        /// The last update held.
        seq: Seq,
        /// When the owner made it, nanoseconds since the Unix epoch.
        time_ns: u64,
        /// How many later updates are known to have been acknowledged, when that can be counted.
        later_updates: Option<u64>,
    },
    /// The old owner could acknowledge without anybody who took part in the promotion.
    UnknownAfter {
        /// The last update held.
        seq: Seq,
        /// When the old owner was last heard, nanoseconds since the Unix epoch.
        time_ns: u64,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing acknowledged is missing"),
            Self::EndsAt { seq, later_updates: Some(n), .. } => {
                write!(f, "ends at update {seq}; {n} later updates had been acknowledged")
            }
            Self::EndsAt { seq, later_updates: None, .. } => {
                write!(f, "ends at update {seq}; later updates had been acknowledged")
            }
            Self::UnknownAfter { seq, .. } => {
                write!(f, "ends at update {seq}; unknown after the last contact with the old owner")
            }
        }
    }
}
