//! The first frame of a connection, in both directions of the control stream.
//!
//! ```text
//! 8   magic "VMFSHELO"
//! 2   lowest protocol version spoken   u16 LE
//! 2   highest                          u16 LE
//! 16  datastore id
//! 16  store id
//! 8   number of this run of the daemon, random
//! 1   length of the software version, then its text (UTF-8)
//! ```
//! These fields stay where they are for ever. A later version may append fields; a reader ignores
//! them when the sender's highest version is above its own, and refuses them otherwise.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use vmfs_common::{DatastoreId, StoreId};

use crate::error::{NetError, Refusal};

const MAGIC: &[u8; 8] = b"VMFSHELO";
/// Lowest and highest protocol version that this program speaks.
pub const VERSIONS: (u16, u16) = (1, 1);

/// What a host says of itself before anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest protocol version spoken.
    pub version_min: u16,
    /// Highest protocol version spoken.
    pub version_max: u16,
    /// The datastore it belongs to.
    pub datastore: DatastoreId,
    /// Its store.
    pub store: StoreId,
    /// Random number of this run of the daemon.
    pub run: u64,
    /// Version of the software, for people.
    pub software: String,
}

impl Hello {
    /// The body of the hello frame.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut end = self.software.len().min(255);
        while !self.software.is_char_boundary(end) {
            end -= 1;
        }
        let mut out = BytesMut::with_capacity(64 + end);
        out.put_slice(MAGIC);
        out.put_u16_le(self.version_min);
        out.put_u16_le(self.version_max);
        out.put_slice(self.datastore.as_bytes());
        out.put_slice(self.store.as_bytes());
        out.put_u64_le(self.run);
        out.put_u8(u8::try_from(end).expect("invariant: cut to 255 bytes above"));
        out.put_slice(&self.software.as_bytes()[..end]);
        out.freeze()
    }

    /// Reads the body of a hello frame.
    ///
    /// # Errors
    /// [`NetError::BadFrame`].
    pub fn decode(mut body: Bytes) -> Result<Self, NetError> {
        let bad = |what: &str| NetError::BadFrame(format!("hello: {what}"));
        if body.len() < 53 || body[..8] != MAGIC[..] {
            return Err(bad("not one"));
        }
        body.advance(8);
        let (version_min, version_max) = (body.get_u16_le(), body.get_u16_le());
        if version_min > version_max {
            return Err(bad("lowest version above the highest"));
        }
        let mut id = || {
            let mut bytes = [0; 16];
            body.copy_to_slice(&mut bytes);
            bytes
        };
        let (datastore, store) = (DatastoreId::from_bytes(id()), StoreId::from_bytes(id()));
        let run = body.get_u64_le();
        let len = usize::from(body.get_u8());
        if len > body.len() {
            return Err(bad("cut off"));
        }
        let software = std::str::from_utf8(&body.split_to(len)).map_err(|_| bad("not UTF-8"))?.to_owned();
        if !body.is_empty() && version_max <= VERSIONS.1 {
            return Err(bad("bytes after its end"));
        }
        Ok(Self { version_min, version_max, datastore, store, run, software })
    }

    /// The highest version that both speak.
    ///
    /// # Errors
    /// [`NetError::Refused`] with [`Refusal::Version`] or [`Refusal::OtherDatastore`].
    pub fn agree(&self, ours: &Self, peer: &str) -> Result<u16, NetError> {
        let refused = |refusal, detail| Err(NetError::Refused { peer: peer.to_owned(), refusal, detail });
        if self.datastore != ours.datastore {
            let detail = format!("it is of datastore {}, this host of {}", self.datastore, ours.datastore);
            return refused(Refusal::OtherDatastore, detail);
        }
        let version = self.version_max.min(ours.version_max);
        if version < self.version_min.max(ours.version_min) {
            let detail = format!(
                "it speaks protocol {}..{} (software {:?}), this host {}..{}",
                self.version_min, self.version_max, self.software, ours.version_min, ours.version_max
            );
            return refused(Refusal::Version, detail);
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            version_min: 1,
            version_max: 1,
            datastore: DatastoreId::from_bytes([0xd5; 16]),
            store: StoreId::from_bytes([0x57; 16]),
            run: 0x0102_0304_0506_0708,
            software: "0.1.0".into(),
        }
    }

    #[test]
    fn the_bytes_of_the_hello_are_these_for_ever() {
        let golden = "564d465348454c4f01000100\
                      d5d5d5d5d5d5d5d5d5d5d5d5d5d5d5d557575757575757575757575757575757\
                      080706050403020105302e312e30";
        assert_eq!(vmfs_common::ids::hex_encode(&hello().encode()), golden);
        assert_eq!(Hello::decode(hello().encode()).unwrap(), hello());
    }

    #[test]
    fn cut_or_bent_hellos_are_refused_and_later_versions_may_append() {
        let bytes = hello().encode();
        for cut in 0..bytes.len() {
            assert!(Hello::decode(bytes.slice(..cut)).is_err(), "cut at {cut}");
        }
        let longer = |h: &Hello| Bytes::from([&h.encode()[..], b"more"].concat());
        assert!(Hello::decode(longer(&hello())).is_err());
        let later = Hello { version_max: VERSIONS.1 + 1, ..hello() };
        assert_eq!(Hello::decode(longer(&later)).unwrap(), later);
    }

    #[test]
    fn hosts_agree_on_the_highest_common_version_or_say_why_not() {
        let range = |a, b| Hello { version_min: a, version_max: b, ..hello() };
        assert_eq!(range(1, 5).agree(&range(3, 9), "p").unwrap(), 5);
        let err = range(4, 5).agree(&range(1, 3), "p").unwrap_err();
        assert_eq!(err.blame(), Some(Refusal::Version));
        let other = Hello { datastore: DatastoreId::from_bytes([1; 16]), ..hello() };
        assert_eq!(other.agree(&hello(), "p").unwrap_err().blame(), Some(Refusal::OtherDatastore));
    }
}
