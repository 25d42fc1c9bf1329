//! Control messages between hosts. The only user of bincode: pinned (all versions are unmaintained),
//! confined to [`encode`] and [`decode`], with size limits and exact lengths, so that it can be
//! replaced here alone. Update headers and payload never pass through it.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::chain::{Refusal, Share};
use crate::codec::CodecError;
use crate::election::{Proposal, Vote};
use crate::ids::{Epoch, Head, Seq, StoreId};
use crate::policy::MemberRole;

/// Longest control message, in bytes.
pub const MESSAGE_MAX_BYTES: usize = 256 << 10;
/// Most epoch marks in a [`Join`].
pub const MARKS_MAX: usize = 128;
/// Most headers in one [`ImageMsg::Headers`].
pub const HEADERS_MAX: usize = 1024;
/// Most bytes of headers in one [`ImageMsg::Headers`] (always room for one).
pub const HEADERS_MAX_BYTES: usize = 128 << 10;

const fn bincode_config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<MESSAGE_MAX_BYTES>()
}

/// The bytes of a control message.
///
/// # Panics
/// When it is longer than [`MESSAGE_MAX_BYTES`]: its own bounds keep it below.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, bincode_config())
        .expect("invariant: control messages are bounded and of plain types")
}

/// The message that exactly `bytes` spell.
///
/// # Errors
/// Too long, not decodable, or with trailing bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > MESSAGE_MAX_BYTES {
        return Err(CodecError::TooLong { got: bytes.len(), limit: MESSAGE_MAX_BYTES });
    }
    let (message, used) = bincode::serde::decode_from_slice(bytes, bincode_config())
        .map_err(|_| CodecError::Invalid("control message"))?;
    if used == bytes.len() { Ok(message) } else { Err(CodecError::Trailing(bytes.len() - used)) }
}

/// Why a candidate asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Occasion {
    /// The owner's daemon has restarted, or re-bids after a higher promise.
    Restart,
    /// The present owner hands over; its own vote is enclosed as consent once it is there.
    Handover,
    /// An operator, or failover tooling in his name, has ordered it.
    Operator,
}

/// Why a member does not vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum VoteRefusal {
    /// It has promised this ballot or a higher one to somebody else.
    #[error("a ballot as high is promised to another candidate")]
    Promised(Epoch),
    /// It hears from the present owner.
    #[error("in contact with the present owner")]
    OwnerAlive(Epoch),
    /// It has restarted and waits one lease.
    #[error("restarted less than a lease ago")]
    Lease,
    /// It is not a member, or with another store, or has not caught up since it was wiped.
    #[error("not an admitted member")]
    NotMember,
    /// The candidate counts by a member list the voter knows to be superseded.
    #[error("another member list is in force")]
    OtherMembers,
    /// Its store has failed.
    #[error("its store has failed")]
    StoreFailed,
    /// The candidate restarts, but a later epoch has another owner: only an operator may move it.
    #[error("another host has owned the image since")]
    NotOwner(Epoch),
    /// Its copy is on a separate lineage that an operator forced.
    #[error("its copy is on a forced lineage")]
    OtherLineage,
}

/// One epoch in a [`Join`]: where it began and on what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochMark {
    /// Its `EpochStart`.
    pub start: Head,
    /// That update's parent.
    pub parent: Head,
}

/// A copy states what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The store that holds it.
    pub store: StoreId,
    /// Its head (seq 0: nothing yet).
    pub head: Head,
    /// What of it is durable.
    pub durable: Head,
    /// Its latest epochs, newest first, at most [`MARKS_MAX`].
    pub marks: Vec<EpochMark>,
    /// True when it wants headers only.
    pub witness: bool,
}

/// What one host says to another about one image, on the stream it has opened for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageMsg {
    /// Candidate to member.
    Propose {
        /// What is asked.
        proposal: Proposal,
        /// Why.
        occasion: Occasion,
        /// The candidate's head.
        head: Head,
        /// The present owner's vote for this proposal, on a hand-over.
        consent: Option<Vote>,
        /// What the candidate's list says the member keeps: a member that was named in the genesis
        /// and has received nothing yet votes with an empty copy.
        role: MemberRole,
    },
    /// Member to candidate: promised, durably.
    Voted {
        /// The vote.
        vote: Vote,
        /// The voter's share of the secret of `share_epoch`, the epoch of its head.
        share: Option<(Epoch, Share)>,
    },
    /// Member to candidate.
    VoteRefused {
        /// Ballot of the proposal refused.
        ballot: Epoch,
        /// Why.
        why: VoteRefusal,
    },
    /// Candidate to the voter with the highest head: the digests after the common ancestor, please.
    FetchHeaders {
        /// What the candidate has.
        join: Join,
        /// The voted head to reach.
        upto: Head,
        /// Continue after this seq; zero: find the common ancestor first.
        after: Seq,
    },
    /// Complete headers of consecutive updates after `parent`: the candidate hashes them forward.
    Headers {
        /// The update before the first: common to both, in the first message of an answer.
        parent: Head,
        /// At least one and at most [`HEADERS_MAX`], [`HEADERS_MAX_BYTES`] together.
        headers: Vec<Vec<u8>>,
        /// The head asked for.
        upto: Head,
    },
    /// The updates after `after` up to `upto` with their payload, please: they follow as update frames.
    FetchUpdates {
        /// The update before the first.
        after: Seq,
        /// The head to reach.
        upto: Head,
        /// Headers only.
        witness: bool,
    },
    /// The asked-for part of the log is not there.
    FetchFailed {
        /// The head asked for.
        upto: Head,
        /// Where the log starts.
        log_start: Seq,
    },
    /// Owner to member: this epoch is mine, state your head.
    Offer {
        /// The owner's head.
        head: Head,
        /// The epoch's `EpochStart`.
        start: Head,
        /// Where the owner's log starts.
        log_start: Seq,
        /// The `EpochStart` update's header: its certificate is checked before anything is rolled back.
        certificate: Vec<u8>,
        /// What the member is to keep.
        role: MemberRole,
    },
    /// Member to owner.
    Join(Join),
    /// Owner to member: the log no longer reaches back to your head; copy the blocks.
    Behind {
        /// Where the owner's log starts.
        log_start: Seq,
    },
    /// Owner to member: make everything up to `seq` durable and say so.
    Sync {
        /// An update already sent.
        seq: Seq,
        /// The owner's commit point (zero: none in this epoch yet).
        commit: Seq,
    },
    /// Member to owner: durable.
    Ack {
        /// The head that is durable.
        head: Head,
        /// The store that holds it.
        store: StoreId,
    },
    /// Member to owner or peer: not taken.
    Refused {
        /// Why.
        why: Refusal,
        /// Number of the update refused.
        seq: Seq,
        /// The highest ballot promised, when that is why.
        promised: Epoch,
        /// The member's head, so that the sender can start over from it.
        join: Join,
    },
    /// Owner to member: your share of my epoch's secret.
    Share {
        /// The epoch.
        epoch: Epoch,
        /// The share.
        share: Share,
    },
    /// Owner to its successor: drained, sealed; propose.
    Handover {
        /// The owner's head, durable here.
        head: Head,
    },
    /// Successor to owner: taken over, or given up.
    HandoverDone {
        /// True when its `EpochStart` is durable on a quorum.
        done: bool,
    },
    /// A member without a live owner asks whoever owns the image to offer it.
    WhoOwns {
        /// What it has.
        head: Head,
    },
    /// You are no member of this image any more.
    NotMember {
        /// The sender's head.
        head: Head,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_have_one_byte_form() {
        let m = ImageMsg::Sync { seq: Seq(7), commit: Seq(5) };
        let bytes = encode(&m);
        // Golden: variant index (u32 LE), then two u64.
        assert_eq!(bytes, [&[10u8, 0, 0, 0][..], &7u64.to_le_bytes(), &5u64.to_le_bytes()].concat());
        assert_eq!(decode::<ImageMsg>(&bytes), Ok(m));
        let mut long = bytes.clone();
        long.push(0);
        assert_eq!(decode::<ImageMsg>(&long), Err(CodecError::Trailing(1)));
        assert!(decode::<ImageMsg>(&bytes[..bytes.len() - 1]).is_err());
        assert!(decode::<ImageMsg>(&[0xff; 64]).is_err());
    }
}
