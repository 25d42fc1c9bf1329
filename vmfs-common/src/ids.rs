//! Identifiers and units. Each is its own type, so that a block is never taken for a byte, nor a
//! store for a host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes in one block, the unit of the map, of digests and of payload.
pub const BLOCK_BYTES: usize = 4096;
/// [`BLOCK_BYTES`] as the type of sizes and offsets.
pub const BLOCK_BYTES_U64: u64 = 4096;

/// Text that is not an identifier of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {kind} ({want} hexadecimal digits)")]
pub struct IdError {
    text: String,
    kind: &'static str,
    want: usize,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name([u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;
            /// Wraps raw bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; $len]) -> Self { Self(bytes) }
            /// The raw bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; $len] { &self.0 }
            /// True when every byte is zero, which no random identifier is.
            #[must_use]
            pub fn is_zero(&self) -> bool { self.0.iter().all(|b| *b == 0) }
            /// The first eight hexadecimal digits, for people.
            #[must_use]
            pub fn short(&self) -> String { hex_encode(&self.0[..4]) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&hex_encode(&self.0)) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.short())
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let bad = || IdError { text: text.chars().take(80).collect(), kind: $kind, want: 2 * $len };
                let bytes = hex_decode(text).ok_or_else(bad)?;
                Ok(Self(bytes.try_into().map_err(|_| bad())?))
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    Ok(Self(<[u8; $len]>::deserialize(d)?))
                }
            }
        }
    };
}

id!(
    /// A host: the first 16 bytes of the domain-separated hash of its Ed25519 public key.
    HostId, 16, "a host id"
);
id!(
    /// One store directory. Random at creation, so that a wiped or restored store is a stranger.
    StoreId, 16, "a store id"
);
id!(
    /// One image for ever: 128 random bits, never reused.
    ImageId, 16, "an image id"
);
id!(
    /// The hosts that trust one CA: 128 random bits made with the CA.
    DatastoreId, 16, "a datastore id"
);
id!(
    /// A SHA-256 value.
    Digest, 32, "a digest"
);

/// Lower-case hexadecimal.
#[must_use]
pub fn hex_encode(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// The bytes that `text` spells in hexadecimal, or `None` when it does not.
#[must_use]
pub fn hex_decode(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()).collect()
}

/// Number of an update in its image's chain. The first update (the genesis `EpochStart`) is 1;
/// 0 means "before any update".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Seq(pub u64);

impl Seq {
    /// Before any update.
    pub const ZERO: Self = Self(0);
    /// The number of the update after this one. The highest number stays what it is: peers may state
    /// it, and no chain gets there.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
    /// The number of the update before this one; zero stays zero.
    #[must_use]
    pub const fn prev(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One owner's tenure of an image, and the ballot that won it: compared by number, then host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch {
    /// Grows at every change and every restart of ownership; 0 is "none".
    pub number: u64,
    /// The owner of this tenure.
    pub host: HostId,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.number, self.host.short())
    }
}

/// The last update of a copy. Copies compare by (epoch of the last update, seq), never by length
/// alone; the derived order compares the digest last, which only distinguishes forks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Head {
    /// Epoch of the last update.
    pub epoch: Epoch,
    /// Its number.
    pub seq: Seq,
    /// Its digest `D`.
    pub digest: Digest,
}

impl Head {
    /// What copies are compared by.
    #[must_use]
    pub const fn rank(&self) -> (Epoch, Seq) {
        (self.epoch, self.seq)
    }
}

/// Index of a 4 KiB block in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct BlockIndex(pub u64);

/// A number of 4 KiB blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct BlockCount(pub u64);

impl BlockIndex {
    /// The block that holds byte `offset`.
    #[must_use]
    pub const fn containing(offset_bytes: u64) -> Self {
        Self(offset_bytes / BLOCK_BYTES_U64)
    }
    /// Offset in bytes of the block's first byte.
    #[must_use]
    pub const fn offset_bytes(self) -> u64 {
        self.0 * BLOCK_BYTES_U64
    }
    /// The block `count` further on.
    #[must_use]
    pub const fn plus(self, count: BlockCount) -> Self {
        Self(self.0 + count.0)
    }
}

impl BlockCount {
    /// Blocks needed to hold `bytes`.
    #[must_use]
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(BLOCK_BYTES_U64))
    }
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 * BLOCK_BYTES_U64
    }
}

/// Milliseconds on a monotonic clock that starts anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub u64);

impl Millis {
    /// This long after `earlier`; zero when `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// This many milliseconds later.
    #[must_use]
    pub const fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_as_text_and_refuse_anything_else() {
        let id = ImageId::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<ImageId>(), Ok(id));
        for bad in ["", "00", "zz", &"0".repeat(31), &"0".repeat(33), "é".repeat(16).as_str()] {
            assert!(bad.parse::<ImageId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn epochs_compare_by_number_then_host_and_heads_never_by_length() {
        let host = |b| HostId::from_bytes([b; 16]);
        let e = |number, h| Epoch { number, host: host(h) };
        assert!(e(1, 9) < e(2, 1) && e(2, 1) < e(2, 2));
        let long_old = Head { epoch: e(1, 1), seq: Seq(900), digest: Digest::default() };
        let short_new = Head { epoch: e(2, 1), seq: Seq(5), digest: Digest::default() };
        assert!(long_old.rank() < short_new.rank());
    }
}
