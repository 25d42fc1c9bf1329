//! The decoders of `vmfs-common`, of invitations and of the control API.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmfs_common::codec::{Reader, Writer};
use vmfs_common::config::Config;
use vmfs_common::election::{EpochStart, Mandate, adopted_head, decode_vote, encode_vote, verify_votes};
use vmfs_common::header::{HEADER_MAX_BYTES, Update, UpdateHeader};
use vmfs_common::ids::{Digest, Head, Seq};
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberList;
use vmfs_common::state::ImageState;
use vmfs_net::pki::invite::Invitation;
use vmfs_replica::api;

pub(crate) fn control_messages(data: &[u8]) -> bool {
    let Ok(message) = msg::decode::<ImageMsg>(data) else { return false };
    assert_eq!(msg::encode(&message), data, "a control message has one form");
    if let ImageMsg::Headers { headers, .. } = &message {
        headers.iter().for_each(|h| {
            updates(h);
        });
    }
    true
}

/// The header with the checksum that it should have.
fn summed(data: &[u8]) -> Vec<u8> {
    let mut b = data.to_vec();
    if b.len() >= 248 {
        b[240..244].fill(0);
        let crc = crc32c::crc32c(&b);
        b[240..244].copy_from_slice(&crc.to_le_bytes());
    }
    b
}

pub(crate) fn updates(data: &[u8]) -> bool {
    // A record's reader takes the length that the header states.
    let _ = UpdateHeader::stated_len(data);
    let _ = Update::decode(data);
    let bytes = summed(data);
    let Ok(update) = Update::decode(&bytes) else { return false };
    assert!(bytes.len() <= HEADER_MAX_BYTES);
    assert_eq!(update.header.encode(), bytes, "a header has one form");
    let code = update.header.op.code();
    assert_eq!(Op::decode(code, &update.header.op.encode_args()).as_ref(), Ok(&update.header.op));
    let mut state = ImageState::new(update.header.image);
    let _ = state.check_apply(&update);
    state.apply(&update);
    let _ = state.check_apply(&update);
    // Without a genesis before it there are no members, and no such state is ever stored.
    if !state.members.is_empty() {
        let again = ImageState::decode(&state.encode());
        assert_eq!(again.as_ref(), Ok(&state), "a state that an update made can be read again");
    }
    let tip = vmfs_common::chain::Tip::of(&update);
    let _ = vmfs_common::chain::check_extends(&tip, update.header.image, &update);
    true
}

/// A member list and the arguments of an `EpochStart`, or a vote, judged by it.
pub(crate) fn certificates(data: &[u8]) -> bool {
    let mut r = Reader::new(data);
    let Ok(list) = MemberList::decode(&mut r) else { return vote(data) };
    let list_bytes = data.len() - r.left();
    let mut w = Writer::new();
    list.encode(&mut w);
    assert_eq!(w.finish(), &data[..list_bytes], "a member list has one form");
    let Ok(start) = EpochStart::decode(&mut r) else { return true };
    let used = data.len() - r.left();
    let mut w = Writer::new();
    start.encode(&mut w);
    assert_eq!(w.finish(), &data[list_bytes..used], "an EpochStart has one form");
    let parent = match &start.mandate {
        Mandate::Votes(votes) => {
            let adopted = adopted_head(votes, &list);
            if let Ok(head) = &adopted {
                let _ = verify_votes(&start.proposal, votes, head, &list);
            }
            adopted.unwrap_or_default()
        }
        _ => Head::default(),
    };
    let _ = start.verify(parent.seq.next(), &parent, &list);
    let _ = start.verify(Seq(u64::MAX), &parent, &list);
    let _ = start.has_majority_of(&list);
    let _ = start.members_after(&list).is_one_change_from(&list);
    let _ = start.is_signed_by(Seq(1), &Digest::default(), &list.all()[0].key);
    true
}

fn vote(data: &[u8]) -> bool {
    let mut r = Reader::new(data);
    let Ok(vote) = decode_vote(&mut r) else { return false };
    let mut w = Writer::new();
    encode_vote(&mut w, &vote);
    assert_eq!(w.finish(), &data[..data.len() - r.left()], "a vote has one form");
    true
}

pub(crate) fn image_state(data: &[u8]) -> bool {
    let Ok(state) = ImageState::decode(data) else { return false };
    assert_eq!(state.encode(), data, "a state has one form");
    let _ = state.known_head_at(Seq(u64::MAX));
    true
}

/// Configurations, invitations, and what people type.
pub(crate) fn texts(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let mut taken = Config::parse(text).is_ok();
    if let Ok(invitation) = text.parse::<Invitation>() {
        let again = invitation.to_string();
        assert_eq!(again, text.trim().to_ascii_lowercase(), "an invitation has one form");
        taken = true;
    }
    taken |= api::server::image_path(text).is_ok_and(|path| {
        assert_eq!(api::server::image_path(&path).as_ref(), Ok(&path));
        true
    });
    taken
}

fn json<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(data: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<T>(data) else { return false };
    let text = serde_json::to_vec(&value).expect("plain structs of strings and numbers");
    assert_eq!(serde_json::from_slice::<T>(&text).expect("what was written is read"), value);
    true
}

pub(crate) fn api_requests(data: &[u8]) -> bool {
    json::<api::ImageRequest>(data)
        | json::<api::PromoteRequest>(data)
        | json::<api::HandoverRequest>(data)
        | json::<api::ReplicaAddRequest>(data)
        | json::<api::ReplicaRemoveRequest>(data)
        | json::<api::VerifyRequest>(data)
        | json::<api::WaitRequest>(data)
        | json::<api::ForkDropRequest>(data)
        | json::<api::PolicySetRequest>(data)
        | json::<api::InviteRequest>(data)
        | json::<api::HostRemoveRequest>(data)
        | json::<api::StatusReport>(data)
        | json::<api::StreamLine<BTreeMap<String, u64>>>(data)
}
