//! The Merkle tree over an image's block digests.

use std::collections::BTreeMap;

use vmfs_common::hash::hash;
use vmfs_common::{BlockIndex, Digest};

use crate::error::StoreError;
use crate::map::{BLOCKS_MAX, Content};
use crate::shared::Shared;
use crate::view::digests;

/// Children of one node of the Merkle tree.
pub const MERKLE_FANOUT: u64 = 512;
/// [`MERKLE_FANOUT`], as the number of blocks that a node of level 1 covers: 2 MiB.
pub const MERKLE_LEAF_BLOCKS: usize = 512;
/// Level of the Merkle root: 512^5 blocks are more than an image can have.
pub const MERKLE_ROOT_LEVEL: u32 = 5;

/// The Merkle tree over the block digests of some content.
///
/// Level 0 are the digests (zero for blocks without data), which are not kept here; a node of level n + 1
/// covers 512 nodes of level n and is zero when they all are, else `H("merkle", level ‖ children)`; the root
/// is node 0 of [`MERKLE_ROOT_LEVEL`]. It keeps the nodes of level 1 that are not zero: 48 bytes or so for each
/// 2 MiB that hold data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MerkleTree {
    leaves: BTreeMap<u64, Digest>,
}

impl MerkleTree {
    /// The root.
    #[must_use]
    pub fn root(&self) -> Digest {
        self.node(MERKLE_ROOT_LEVEL, 0)
    }

    /// A node of level 1 or more; zero also for one beyond the root.
    #[must_use]
    pub fn node(&self, level: u32, index: u64) -> Digest {
        if level <= 1 {
            return self.leaves.get(&index).copied().unwrap_or_default();
        }
        if level > MERKLE_ROOT_LEVEL || !self.has_leaves(level, index) {
            return Digest::default();
        }
        let children: Vec<u8> = self.children(level, index).iter().flat_map(|d| *d.as_bytes()).collect();
        hash("merkle", &[&level.to_le_bytes(), &children])
    }

    /// The [`MERKLE_FANOUT`] children of a node of level 2 or more.
    #[must_use]
    pub fn children(&self, level: u32, index: u64) -> Vec<Digest> {
        if level < 2 || !self.has_leaves(level, index) {
            return vec![Digest::default(); MERKLE_LEAF_BLOCKS];
        }
        let first = index * MERKLE_FANOUT;
        (first..first + MERKLE_FANOUT).map(|i| self.node(level - 1, i)).collect()
    }

    /// Takes the digests of the [`MERKLE_FANOUT`] blocks that a node of level 1 covers.
    pub fn set(&mut self, index: u64, digests: &[Digest]) {
        if digests.iter().all(Digest::is_zero) {
            self.leaves.remove(&index);
            return;
        }
        let bytes: Vec<u8> = digests.iter().flat_map(|d| *d.as_bytes()).collect();
        self.leaves.insert(index, hash("merkle", &[&1u32.to_le_bytes(), &bytes]));
    }

    fn has_leaves(&self, level: u32, index: u64) -> bool {
        let span = MERKLE_FANOUT.pow(level.saturating_sub(1).min(MERKLE_ROOT_LEVEL));
        let Some(first) = index.checked_mul(span) else { return false };
        self.leaves.range(first..first.saturating_add(span)).next().is_some()
    }
}

/// Reads the digests of all data once.
pub(crate) fn merkle_tree(shared: &Shared, content: &Content) -> Result<MerkleTree, StoreError> {
    let mut tree = MerkleTree::default();
    let mut from = 0;
    while let Some(at) = content.next_data_before(shared, from, BLOCKS_MAX)? {
        let leaf = at / MERKLE_FANOUT;
        tree.set(leaf, &leaf_digests(shared, content, leaf)?);
        from = (leaf + 1) * MERKLE_FANOUT;
    }
    Ok(tree)
}

/// The digests of the blocks that a node of level 1 covers.
pub(crate) fn leaf_digests(
    shared: &Shared,
    content: &Content,
    index: u64,
) -> Result<Vec<Digest>, StoreError> {
    match index.checked_mul(MERKLE_FANOUT).filter(|first| *first < BLOCKS_MAX) {
        Some(first) => digests(shared, content, BlockIndex(first).0, MERKLE_LEAF_BLOCKS),
        None => Ok(vec![Digest::default(); MERKLE_LEAF_BLOCKS]),
    }
}
