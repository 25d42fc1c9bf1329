//! SHA-256 and HMAC of short messages: headers and what the chain makes of them, more than ten for each update
//! at each end. A hasher that takes bytes as they come has to keep them until a step is full, and an HMAC
//! prepares its key's two states one after the other; here a message is put together on the stack and
//! hashed in one go, and both states of a key are made at once, which takes no longer than one of them.
//! Source of the algorithms: FIPS 180-4, RFC 2104.

use super::x86::{self, STEP_BYTES};

/// Longest message, with what is put before it and its padding, in bytes.
const MESSAGE_BYTES_MAX: usize = 8 * STEP_BYTES;

/// A message in whole steps.
struct Message {
    bytes: [u8; MESSAGE_BYTES_MAX],
    len_bytes: usize,
}

impl Message {
    /// `head` and the parts, padded as what follows `before_bytes` of whole steps; `None` when that is too long.
    #[inline]
    fn new(before_bytes: usize, head: &[u8; 32], parts: &[&[u8]]) -> Option<Self> {
        let text_bytes = head.len() + parts.iter().map(|p| p.len()).sum::<usize>();
        let len_bytes = (text_bytes + 9).next_multiple_of(STEP_BYTES);
        if len_bytes > MESSAGE_BYTES_MAX {
            return None;
        }
        let mut bytes = [0; MESSAGE_BYTES_MAX];
        bytes[..head.len()].copy_from_slice(head);
        let mut at = head.len();
        for part in parts {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        bytes[at] = 0x80;
        let bits = 8 * (before_bytes + text_bytes) as u64;
        bytes[len_bytes - 8..len_bytes].copy_from_slice(&bits.to_be_bytes());
        Some(Self { bytes, len_bytes })
    }

    #[inline]
    fn steps(&self) -> &[u8] {
        &self.bytes[..self.len_bytes]
    }
}

/// SHA-256 of `head` and the parts; `None` when that is too long, or the processor has no instructions for it.
pub(super) fn hash(head: &[u8; 32], parts: &[&[u8]]) -> Option<[u8; 32]> {
    let message = Message::new(0, head, parts).filter(|_| x86::is_available())?;
    // SAFETY: the processor has every feature that the function is compiled for.
    Some(unsafe { hash_message(&message) })
}

/// HMAC-SHA256 of `head` and the parts; `None` as for [`hash`].
pub(super) fn mac(key: &[u8; 32], head: &[u8; 32], parts: &[&[u8]]) -> Option<[u8; 32]> {
    let message = Message::new(STEP_BYTES, head, parts).filter(|_| x86::is_available())?;
    // SAFETY: the processor has every feature that the function is compiled for.
    Some(unsafe { mac_message(key, &message) })
}

#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn hash_message(message: &Message) -> [u8; 32] {
    let mut state = x86::begin::<1>();
    x86::absorb(&mut state, [message.steps()]);
    x86::finish(&state, 0)
}

#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn mac_message(key: &[u8; 32], message: &Message) -> [u8; 32] {
    let (mut inner, mut outer) = ([0x36; STEP_BYTES], [0x5c; STEP_BYTES]);
    for ((i, o), k) in inner.iter_mut().zip(&mut outer).zip(key) {
        *i ^= k;
        *o ^= k;
    }
    let mut keyed = x86::begin::<2>();
    x86::absorb(&mut keyed, [&inner, &outer]);
    let mut state = x86::one(&keyed, 0);
    x86::absorb(&mut state, [message.steps()]);
    // The inner digest, which ends 96 bytes: 0x300 bits.
    let mut last = [0; STEP_BYTES];
    last[..32].copy_from_slice(&x86::finish(&state, 0));
    last[32] = 0x80;
    last[STEP_BYTES - 2] = 0x03;
    let mut state = x86::one(&keyed, 1);
    x86::absorb(&mut state, [&last[..]]);
    x86::finish(&state, 0)
}
