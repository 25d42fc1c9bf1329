//! SHA-256 and HMAC-SHA256 with domain separation: every use names its label, and labels are
//! length-prefixed so that no label is a prefix of another's input.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

use crate::ids::{BLOCK_BYTES, Digest};

mod blocks;
#[cfg(target_arch = "x86_64")]
mod short;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use blocks::{block_digest, block_digests, block_digests_of};

const LABEL_PREFIX: &str = "vmfs1/";

fn label_head(label: &'static str) -> [u8; 32] {
    // Fixed 32 bytes: length, prefix, label, zeros. One SHA-256 block holds it and a digest.
    let mut head = [0u8; 32];
    let full = LABEL_PREFIX.len() + label.len();
    assert!(full < 32, "invariant: labels are short constants");
    #[expect(clippy::cast_possible_truncation, reason = "checked above to be below 32")]
    {
        head[0] = full as u8;
    }
    head[1..=LABEL_PREFIX.len()].copy_from_slice(LABEL_PREFIX.as_bytes());
    head[1 + LABEL_PREFIX.len()..=full].copy_from_slice(label.as_bytes());
    head
}

/// `H(label, parts)`: SHA-256 of the 32-byte label block followed by the parts, concatenated.
#[must_use]
pub fn hash(label: &'static str, parts: &[&[u8]]) -> Digest {
    let head = label_head(label);
    #[cfg(target_arch = "x86_64")]
    if let Some(digest) = short::hash(&head, parts) {
        return Digest::from_bytes(digest);
    }
    hash_any(&head, parts)
}

fn hash_any(head: &[u8; 32], parts: &[&[u8]]) -> Digest {
    let mut h = Sha256::new();
    h.update(head);
    for p in parts {
        h.update(p);
    }
    Digest::from_bytes(h.finalize().into())
}

/// `HMAC(key, label ‖ parts)` with the same label block.
#[must_use]
pub fn mac(key: &[u8; 32], label: &'static str, parts: &[&[u8]]) -> [u8; 32] {
    let head = label_head(label);
    #[cfg(target_arch = "x86_64")]
    if let Some(code) = short::mac(key, &head, parts) {
        return code;
    }
    mac_any(key, &head, parts)
}

fn mac_any(key: &[u8; 32], head: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut m = Hmac::<Sha256>::new_from_slice(key).expect("invariant: HMAC takes keys of any length");
    m.update(head);
    for p in parts {
        m.update(p);
    }
    m.finalize().into_bytes().into()
}

static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// True when every byte is zero. A comparison with zeros, which the C library does faster than any loop.
#[must_use]
pub fn is_zero(block: &[u8]) -> bool {
    block.chunks(BLOCK_BYTES).all(|c| *c == ZEROS[..c.len()])
}

/// Equality in constant time.
#[must_use]
pub fn same_secret(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0u8, |acc, (x, y)| acc | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_messages_in_any_parts_are_hashed_as_by_the_libraries() {
        let data: Vec<u8> = (0..700_u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
        let key = <[u8; 32]>::try_from(&data[600..632]).unwrap();
        let head = label_head("test");
        for len in 0..=600 {
            let (a, rest) = data[..len].split_at(len / 3);
            let (b, c) = rest.split_at(rest.len() / 2);
            assert_eq!(hash("test", &[a, b, c]), hash_any(&head, &[&data[..len]]), "{len} bytes");
            assert_eq!(mac(&key, "test", &[a, b, c]), mac_any(&key, &head, &[&data[..len]]), "{len} bytes");
        }
        assert_ne!(mac(&key, "test", &[]), mac(&[0; 32], "test", &[]));
        assert_ne!(hash("test", &[]), hash("test2", &[]));
    }
}
