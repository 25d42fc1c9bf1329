//! What the fuzz targets reach of this crate that nobody else does. See `docs/testing.md`.

use bytes::Bytes;
use vmfs_common::{BlockIndex, Digest, Head, ImageId, msg};

use crate::node::{Ask, Told, decode_told, encode_told};

/// A question of another host, and an answer.
///
/// # Panics
/// When something taken has another byte form.
pub fn questions(data: &[u8]) -> bool {
    let mut taken = false;
    if let Ok(ask) = msg::decode::<Ask>(data) {
        assert_eq!(msg::encode(&ask), data, "a question has one form");
        taken = true;
    }
    if let Ok((told, raw)) = decode_told(Bytes::copy_from_slice(data)) {
        assert_eq!(&encode_told(&told, &raw)[..], data, "an answer has one form");
        taken = true;
    }
    taken
}

/// One of each.
#[must_use]
pub fn question_seeds() -> Vec<Vec<u8>> {
    let image = ImageId::from_bytes([7; 16]);
    let digest = Digest::from_bytes([8; 32]);
    let asks = [
        Ask::Claims { known: 3 },
        Ask::SyncOpen { image, token: 9 },
        Ask::SyncNode { token: 9, level: 5, index: 0 },
        Ask::SyncBlocks { token: 9, blocks: vec![BlockIndex(1), BlockIndex(77)] },
        Ask::SyncClose { token: 9 },
        Ask::Fetch { image, wanted: vec![(BlockIndex(1), digest)] },
        Ask::Settle { version: 4 },
        Ask::PinSeal { image },
        Ask::MerkleAt { image, head: Head::default() },
    ];
    let tolds = [
        (Told::Claims { version: 1 }, &[1, 2, 3, 4, 5, 6, 7, 8][..]),
        (Told::NotYet, &[]),
        (Told::SyncOpened { base_bytes: 1, root_bytes: 1, seal_bytes: 1, state_bytes: 1 }, &[1, 2, 3, 4]),
        (Told::Node, &[0; 64]),
        (Told::Blocks { digests: vec![digest] }, &[9; 32]),
        (Told::Fetched { here: vec![true, false] }, &[]),
        (Told::Merkle { head: Head::default(), root: digest }, &[]),
    ];
    let answers = tolds.iter().map(|(told, raw)| encode_told(told, raw).to_vec());
    asks.iter().map(msg::encode).chain(answers).collect()
}
