//! Checking everything an image holds against its digests.

use vmfs_common::{BlockIndex, Seq};

/// What [`crate::ImageStore::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Updates of the retained log that were checked.
    pub updates: u64,
    /// Blocks of the content that were checked.
    pub blocks: u64,
    /// Blocks of the content that are damaged.
    pub bad_blocks: Vec<BlockIndex>,
    /// Updates of the log whose header or payload is damaged.
    pub bad_updates: Vec<Seq>,
}
