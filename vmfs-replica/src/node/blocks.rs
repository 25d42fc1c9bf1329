//! From bytes to blocks: digests and payload of a write, before any lock is taken.

use bytes::Bytes;
use vmfs_common::hash::block_digest;
use vmfs_common::{BLOCK_BYTES, BlockCount, BlockIndex, Digest};

/// New content of a run of whole blocks.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    pub(crate) start: BlockIndex,
    /// One per block; zero for an all-zero block.
    pub(crate) digests: Vec<Digest>,
    /// The blocks that are not all zeros, one after the other.
    pub(crate) payload: Bytes,
}

impl Content {
    pub(crate) fn count(&self) -> BlockCount {
        BlockCount(self.digests.len() as u64)
    }
    pub(crate) fn is_all_zero(&self) -> bool {
        self.payload.is_empty()
    }
}

/// Hashes whole blocks and drops those that are all zeros.
pub(crate) fn hash_blocks(start: BlockIndex, data: &[u8]) -> Content {
    assert!(data.len().is_multiple_of(BLOCK_BYTES), "invariant: callers widen to whole blocks");
    let digests: Vec<Digest> = data.chunks_exact(BLOCK_BYTES).map(block_digest).collect();
    let zeros = digests.iter().filter(|d| d.is_zero()).count();
    let payload = if zeros == 0 {
        Bytes::copy_from_slice(data)
    } else {
        let mut v = Vec::with_capacity((digests.len() - zeros) * BLOCK_BYTES);
        let full = data.chunks_exact(BLOCK_BYTES).zip(&digests).filter(|(_, d)| !d.is_zero());
        full.for_each(|(b, _)| v.extend_from_slice(b));
        Bytes::from(v)
    };
    Content { start, digests, payload }
}

/// True when `payload` is exactly the blocks that the digests describe.
pub(crate) fn payload_matches(digests: &[Digest], payload: &[u8]) -> bool {
    let mut blocks = payload.chunks_exact(BLOCK_BYTES);
    let same =
        digests.iter().filter(|d| !d.is_zero()).all(|d| blocks.next().is_some_and(|b| block_digest(b) == *d));
    same && blocks.next().is_none() && blocks.remainder().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_have_no_payload_and_any_change_is_noticed() {
        let mut data = vec![0u8; 4 * BLOCK_BYTES];
        data[BLOCK_BYTES + 5] = 1;
        data[3 * BLOCK_BYTES] = 2;
        let c = hash_blocks(BlockIndex(9), &data);
        assert_eq!(c.digests.iter().map(Digest::is_zero).collect::<Vec<_>>(), [true, false, true, false]);
        assert_eq!(c.payload.len(), 2 * BLOCK_BYTES);
        assert!(payload_matches(&c.digests, &c.payload));
        let mut bad = c.payload.to_vec();
        bad[BLOCK_BYTES] ^= 1;
        assert!(!payload_matches(&c.digests, &bad));
        assert!(!payload_matches(&c.digests, &c.payload[..BLOCK_BYTES]));
        assert!(!payload_matches(&c.digests, &[&c.payload[..], &[0; BLOCK_BYTES]].concat()));
        assert!(!payload_matches(&c.digests, &[&c.payload[..], &[0; 1]].concat()));
    }
}
