//! An unchanging content and state of an image.

use std::sync::Arc;

use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, Digest, Head};

use crate::error::StoreError;

/// Children of one node of the Merkle tree over block digests.
pub const MERKLE_FANOUT: u64 = 512;
/// Level of the Merkle root: 512^5 blocks are more than an image can have.
pub const MERKLE_ROOT_LEVEL: u32 = 5;

/// Content and state after one update. Segments it needs stay until it is dropped.
///
/// Merkle tree: level 0 are block digests (zero for blocks without data); a node of level n + 1
/// covers 512 nodes of level n and is zero when they all are, else
/// `H("merkle", level ‖ children)`; the root is node 0 of [`MERKLE_ROOT_LEVEL`].
#[derive(Clone)]
pub struct View {}

impl View {
    /// The state.
    #[must_use]
    pub fn state(&self) -> &Arc<ImageState> {
        todo!()
    }
    /// The last update it contains.
    #[must_use]
    pub fn head(&self) -> Head {
        todo!()
    }
    /// As [`crate::ImageStore::read`].
    ///
    /// # Errors
    /// The same.
    pub fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// Blocks that hold data; exact.
    ///
    /// # Errors
    /// The disk's.
    pub fn allocated_blocks(&self) -> Result<BlockCount, StoreError> {
        todo!()
    }
    /// The first block at or after `from` that holds data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_data(&self, from: BlockIndex) -> Result<Option<BlockIndex>, StoreError> {
        todo!()
    }
    /// The first block at or after `from` that holds no data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_hole(&self, from: BlockIndex) -> Result<BlockIndex, StoreError> {
        todo!()
    }
    /// Digests of `count` blocks from `start`, from the log, without reading data; zero for blocks
    /// without data.
    ///
    /// # Errors
    /// The disk's, or [`StoreError::Corrupt`].
    pub fn digests(&self, start: BlockIndex, count: usize) -> Result<Vec<Digest>, StoreError> {
        todo!()
    }
    /// One node of the Merkle tree.
    ///
    /// # Errors
    /// As [`View::digests`].
    pub fn merkle(&self, level: u32, index: u64) -> Result<Digest, StoreError> {
        todo!()
    }
    /// The [`MERKLE_FANOUT`] children of a node of level 1 or more.
    ///
    /// # Errors
    /// As [`View::digests`].
    pub fn merkle_children(&self, level: u32, index: u64) -> Result<Vec<Digest>, StoreError> {
        todo!()
    }
}
