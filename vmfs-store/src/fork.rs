//! Tails that were rolled back, kept under a name until dropped.

use vmfs_common::Head;

/// A tail of updates that is no longer part of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkInfo {
    /// Unique among the image's forks; made from the tail's epoch, seq and digest.
    pub name: String,
    /// The last update it shares with the image.
    pub ancestor: Head,
    /// Its own last update.
    pub head: Head,
    /// How many updates it holds.
    pub updates: u64,
    /// Payload bytes it holds.
    pub bytes: u64,
    /// Time of its last update, nanoseconds since the Unix epoch.
    pub time_ns: u64,
}
