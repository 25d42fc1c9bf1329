//! Digests of 4 KiB blocks, two at a time: the one hash that every byte of guest data goes through at
//! both ends.
//!
//! A processor's SHA-256 instructions have a latency of about twice what they need to be issued, so one
//! message alone leaves half of the unit idle. Two independent blocks, interleaved, fill it. Where the
//! processor has no such instructions `sha2` does the work. Source of the algorithm: FIPS 180-4.

use sha2::{Digest as _, Sha256};

use super::is_zero;
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::ids::{BLOCK_BYTES, Digest};

type Block = [u8; BLOCK_BYTES];

/// Digest of one 4 KiB block: plain SHA-256 of its bytes. An all-zero block has the all-zero
/// digest, which stands for "no payload".
///
/// # Panics
/// When `block` is not exactly 4 KiB.
#[must_use]
pub fn block_digest(block: &[u8]) -> Digest {
    let block = as_block(block);
    if is_zero(block) { Digest::default() } else { Digest::from_bytes(sha256([block])[0]) }
}

/// [`block_digest`] of every block of `data`, in order.
///
/// # Panics
/// When `data` is not whole blocks.
#[must_use]
pub fn block_digests(data: &[u8]) -> Vec<Digest> {
    assert!(data.len().is_multiple_of(BLOCK_BYTES), "invariant: payload is whole blocks");
    block_digests_of(data.chunks_exact(BLOCK_BYTES))
}

/// [`block_digest`] of every one of `blocks`, in order.
///
/// # Panics
/// When one of them is not exactly 4 KiB.
#[must_use]
pub fn block_digests_of<'a>(blocks: impl Iterator<Item = &'a [u8]>) -> Vec<Digest> {
    let mut out = Vec::with_capacity(blocks.size_hint().0);
    // A block that waits for a second one.
    let mut waiting: Option<(usize, &Block)> = None;
    for block in blocks.map(as_block) {
        out.push(Digest::default());
        if is_zero(block) {
            continue;
        }
        let at = out.len() - 1;
        match waiting.take() {
            None => waiting = Some((at, block)),
            Some((first_at, first)) => {
                let [a, b] = sha256([first, block]);
                out[first_at] = Digest::from_bytes(a);
                out[at] = Digest::from_bytes(b);
            }
        }
    }
    if let Some((at, block)) = waiting {
        out[at] = Digest::from_bytes(sha256([block])[0]);
    }
    out
}

fn as_block(block: &[u8]) -> &Block {
    block.try_into().expect("invariant: payload is whole blocks")
}

fn sha256<const N: usize>(blocks: [&Block; N]) -> [[u8; 32]; N] {
    #[cfg(target_arch = "x86_64")]
    if x86::is_available() {
        // SAFETY: the processor has every feature that the function is compiled for.
        return unsafe { x86::sha256(blocks) };
    }
    blocks.map(|b| Sha256::digest(b).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks that differ in every byte position and in their zeros.
    fn blocks(count: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut data = Vec::new();
        for i in 0..count {
            for _ in 0..BLOCK_BYTES / 8 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                data.extend(if i % 5 == 3 { [0; 8] } else { state.to_le_bytes() });
            }
        }
        data
    }

    fn expected(data: &[u8]) -> Vec<Digest> {
        let one = |b: &[u8]| match b.iter().all(|x| *x == 0) {
            true => Digest::default(),
            false => Digest::from_bytes(Sha256::digest(b).into()),
        };
        data.chunks_exact(BLOCK_BYTES).map(one).collect()
    }

    #[test]
    fn any_number_of_blocks_has_the_digests_that_sha2_gives() {
        let data = blocks(23);
        for count in 0..=23 {
            let part = &data[..count * BLOCK_BYTES];
            assert_eq!(block_digests(part), expected(part), "{count} blocks");
        }
        let singly: Vec<Digest> = data.chunks_exact(BLOCK_BYTES).map(block_digest).collect();
        assert_eq!(singly, expected(&data));
    }

    #[test]
    fn every_bit_of_either_of_two_blocks_counts_in_its_own_digest_alone() {
        let data = blocks(2);
        let plain = block_digests(&data);
        for at in (0..2 * BLOCK_BYTES).step_by(61) {
            let mut other = data.clone();
            other[at] ^= 1 << (at % 8);
            let (digests, changed) = (block_digests(&other), at / BLOCK_BYTES);
            assert_ne!(digests[changed], plain[changed]);
            assert_eq!(digests[1 - changed], plain[1 - changed]);
        }
    }
}
