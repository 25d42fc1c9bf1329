//! Building new content beside the present one (block-level sync).

use vmfs_common::header::Update;
use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, Digest};

use crate::error::StoreError;
use crate::fork::ForkInfo;

/// Content under construction. Dropped or crashed, it leaves no trace; the image keeps its old
/// content, head and log until [`Import::finish`].
pub struct Import {}

impl Import {
    /// Writes blocks: one digest per block of the range (zero for an all-zero block), `payload` the
    /// others in order. Checked against the digests.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Full`], or the disk's.
    pub fn write(&self, start: BlockIndex, digests: &[Digest], payload: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// Makes a range zeros.
    ///
    /// # Errors
    /// The disk's.
    pub fn zero(&self, start: BlockIndex, count: BlockCount) -> Result<(), StoreError> {
        todo!()
    }
    /// Digests of the content so far.
    ///
    /// # Errors
    /// As [`crate::View::digests`].
    pub fn digests(&self, start: BlockIndex, count: usize) -> Result<Vec<Digest>, StoreError> {
        todo!()
    }
    /// A Merkle node of the content so far.
    ///
    /// # Errors
    /// As [`crate::View::merkle`].
    pub fn merkle(&self, level: u32, index: u64) -> Result<Digest, StoreError> {
        todo!()
    }
    /// Children of a Merkle node of the content so far.
    ///
    /// # Errors
    /// As [`crate::View::merkle_children`].
    pub fn merkle_children(&self, level: u32, index: u64) -> Result<Vec<Digest>, StoreError> {
        todo!()
    }
    /// Replaces the image's content, state and head by this one: the content after `base`, whose
    /// state is `state`. Atomic, and durable on return. The log then begins after `base`. With
    /// `keep_fork`, the old log from its start, or from after the given head, stays as a fork.
    ///
    /// # Errors
    /// The disk's; the old content stays.
    pub fn finish(
        self,
        base: &Update,
        state: ImageState,
        keep_fork: bool,
    ) -> Result<Option<ForkInfo>, StoreError> {
        todo!()
    }
}
