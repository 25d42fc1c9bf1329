//! Questions between hosts that are no part of an image's stream: block-level sync, repair,
//! comparison of copies, claims on names. One request, one answer, both bounded.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use vmfs_common::codec::CodecError;
use vmfs_common::msg;
use vmfs_common::op::SIZE_MAX_BYTES;
use vmfs_common::{BLOCK_BYTES_U64, BlockIndex, Digest, Head, ImageId, Seq};

/// Most blocks in one answer: 960 KiB of payload.
pub(crate) const BLOCKS_MAX: usize = 240;

/// No image has a block with this index or a higher one.
pub(crate) const BLOCK_INDEX_END: u64 = SIZE_MAX_BYTES / BLOCK_BYTES_U64;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Which paths do your own images claim, unless nothing changed since this version?
    Claims { known: u64 },
    /// Open (or go on opening) a frozen view of your image for me to copy.
    SyncOpen { image: ImageId, token: u64 },
    /// Children of a Merkle node of that view.
    SyncNode { token: u64, level: u32, index: u64 },
    /// These blocks of that view.
    SyncBlocks { token: u64, blocks: Vec<BlockIndex> },
    /// I am done with it.
    SyncClose { token: u64 },
    /// The present content of these blocks, where it has this digest.
    Fetch { image: ImageId, wanted: Vec<(BlockIndex, Digest)> },
    /// Does your mount show what is true of your images since this was first asked (0), or at this
    /// version?
    Settle { version: u64 },
    /// Keep the view after the next Seal you take.
    PinSeal { image: ImageId },
    /// Merkle root of the kept view, if it ends with this head.
    MerkleAt { image: ImageId, head: Head },
    /// The payload block of this update that has this digest, as your log has it.
    FetchPayload { image: ImageId, seq: Seq, digest: Digest },
}

/// An answer; some carry raw bytes after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Told {
    /// To [`Ask::Claims`]. Raw: 8-byte hashes of paths.
    Claims { version: u64 },
    /// Not yet: ask again.
    NotYet,
    /// To [`Ask::SyncOpen`]. Raw: the updates base, root and seal, then the state, with these lengths.
    SyncOpened { base_bytes: u32, root_bytes: u32, seal_bytes: u32, state_bytes: u32 },
    /// To [`Ask::SyncNode`]. Raw: 512 digests.
    Node,
    /// To [`Ask::SyncBlocks`]: digests in the order asked; raw: the non-zero blocks.
    Blocks { digests: Vec<Digest> },
    /// To [`Ask::Fetch`] and [`Ask::FetchPayload`]: which are here; raw: those.
    Fetched { here: Vec<bool> },
    /// Done.
    Done,
    /// To [`Ask::Settle`]: not yet; ask again with this version.
    Settling { version: u64 },
    /// To [`Ask::MerkleAt`].
    Merkle { head: Head, root: Digest },
    /// The view asked for is gone, or was never there.
    Gone,
}

/// The bytes of an answer.
pub(crate) fn encode_told(told: &Told, raw: &[u8]) -> Bytes {
    let head = msg::encode(told);
    let len = u32::try_from(head.len()).expect("invariant: answers are bounded");
    Bytes::from([&len.to_le_bytes()[..], &head, raw].concat())
}

/// An answer and its raw part.
pub(crate) fn decode_told(mut bytes: Bytes) -> Result<(Told, Bytes), CodecError> {
    let len =
        bytes.first_chunk::<4>().map(|l| u32::from_le_bytes(*l) as usize).ok_or(CodecError::Truncated)?;
    if len > bytes.len() - 4 {
        return Err(CodecError::Truncated);
    }
    let raw = bytes.split_off(4 + len);
    Ok((msg::decode(&bytes[4..])?, raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_keep_their_raw_part_and_refuse_lies_about_lengths() {
        let told = Told::Fetched { here: vec![true, false] };
        let bytes = encode_told(&told, &[1, 2, 3]);
        let (back, raw) = decode_told(bytes.clone()).unwrap();
        assert_eq!((back, &raw[..]), (told, &[1u8, 2, 3][..]));
        assert!(decode_told(Bytes::from_static(&[255, 255, 255, 255, 0])).is_err());
        assert!(decode_told(Bytes::from_static(&[1])).is_err());
        assert!(decode_told(bytes.slice(..6)).is_err());
    }
}
