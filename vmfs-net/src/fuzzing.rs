//! What the fuzz targets reach of this crate that nobody else does. See `docs/testing.md`.

use bytes::{BufMut as _, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::directory::{Announcement, Gossip};
use crate::frame::{self, Frame, Kind, PREFIX_BYTES};
use crate::hello::{Hello, VERSIONS};
use crate::pki::CertInfo;
use crate::pki::invite::{Admission, JoinRequest};

/// A stream of frames, as far as it is one. True when the first frame was taken.
///
/// # Panics
/// When something taken has another byte form.
pub fn frames(mut data: &[u8]) -> bool {
    let mut taken = false;
    while let Some((head, rest)) = data.split_first_chunk::<PREFIX_BYTES>() {
        let Ok((kind, len)) = frame::decode_prefix(*head) else { break };
        assert!(len <= kind.max_bytes());
        assert_eq!(frame::prefix(kind, len).expect("a length within its bound"), *head);
        let Some((body, next)) = rest.split_at_checked(len) else { break };
        taken |= body_of(kind, body);
        data = next;
    }
    taken
}

fn body_of(kind: Kind, body: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(body);
    match kind {
        Kind::Hello => hello(body),
        Kind::Update => match frame::split_update(bytes) {
            Ok(Frame::Update { header, payload }) => {
                let mut again = BytesMut::new();
                again.put_u32_le(u32::try_from(header.len()).expect("a bounded header"));
                again.put_slice(&header);
                again.put_slice(&payload);
                assert_eq!(&again[..], body);
                true
            }
            Ok(Frame::Control(_)) => panic!("an update was split into a control message"),
            Err(_) => false,
        },
        Kind::Hosts => json::<Gossip>(body),
        Kind::Enrol => json::<JoinRequest>(body),
        Kind::Enrolled => json::<crate::enrol::Answer>(body),
        Kind::Accept | Kind::Beat | Kind::OpenImage | Kind::Control => true,
        Kind::Request | Kind::Response | Kind::Decline => true,
    }
}

/// A hello: read, and written as it came.
///
/// # Panics
/// When something taken has another byte form.
pub fn hello(data: &[u8]) -> bool {
    let Ok(hello) = Hello::decode(Bytes::copy_from_slice(data)) else { return false };
    if hello.version_max <= VERSIONS.1 {
        assert_eq!(&hello.encode()[..], data, "a hello of a known version has one form");
    }
    true
}

/// What hosts and joining hosts send as JSON, and certificates.
///
/// # Panics
/// When something taken cannot be written and read again.
pub fn enrolment(data: &[u8]) -> bool {
    let _ = CertInfo::parse(data, &"input");
    json::<Gossip>(data)
        | json::<JoinRequest>(data)
        | json::<Announcement>(data)
        | json::<Admission>(data)
        | json::<crate::enrol::Answer>(data)
}

fn json<T: DeserializeOwned + Serialize>(data: &[u8]) -> bool {
    let mut reader = serde_json::Deserializer::from_slice(data);
    let Ok(value) = T::deserialize(&mut reader) else { return false };
    if reader.end().is_err() {
        return false;
    }
    let text = serde_json::to_vec(&value).expect("plain structs of strings and numbers");
    let again: T = serde_json::from_slice(&text).expect("what was written is read");
    assert_eq!(serde_json::to_vec(&again).expect("as before"), text);
    true
}

/// A frame of this kind, for seeds.
///
/// # Panics
/// When there is no such kind, or the body is too long for it.
#[must_use]
pub fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).expect("a short body").to_le_bytes();
    [&len[..], &[kind], body].concat()
}

/// SHA-256, for seeds with a checksum.
#[must_use]
pub fn sha256(data: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(data).into()
}
