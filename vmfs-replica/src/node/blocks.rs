//! From bytes to blocks: digests and payload of a write, before any lock is taken.

use bytes::Bytes;
use vmfs_common::hash::{block_digests, block_digests_of};
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
    let digests: Vec<Digest> = block_digests(data);
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

/// For each pair of digests and payload: is the payload exactly the blocks that the digests describe?
pub(crate) fn payloads_match<'a>(pairs: impl Iterator<Item = (&'a [Digest], &'a [u8])> + Clone) -> Vec<bool> {
    let blocks = pairs.clone().flat_map(|(_, payload)| payload.chunks_exact(BLOCK_BYTES));
    let mut found = block_digests_of(blocks).into_iter();
    let matches = |(digests, payload): (&[Digest], &[u8])| {
        let count = payload.len() / BLOCK_BYTES;
        let ours: Vec<Digest> = found.by_ref().take(count).collect();
        let stored = digests.iter().filter(|d| !d.is_zero());
        payload.len().is_multiple_of(BLOCK_BYTES) && ours.iter().eq(stored)
    };
    pairs.map(matches).collect()
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
        let mut bad = c.payload.to_vec();
        bad[BLOCK_BYTES] ^= 1;
        let (block, byte) =
            ([&c.payload[..], &[0; BLOCK_BYTES]].concat(), [&c.payload[..], &[0; 1]].concat());
        let cases: [(&[u8], bool); 7] = [
            (&c.payload, true),
            (&bad, false),
            (&c.payload, true),
            (&c.payload[..BLOCK_BYTES], false),
            (&block, false),
            (&byte, false),
            (&c.payload, true),
        ];
        // Whatever came before in a batch, each is judged by itself.
        for n in 0..=cases.len() {
            let pairs = cases[..n].iter().map(|(payload, _)| (&c.digests[..], *payload));
            assert_eq!(payloads_match(pairs), cases[..n].iter().map(|c| c.1).collect::<Vec<_>>());
        }
    }
}
