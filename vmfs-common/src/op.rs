//! What an update does: the operations and their canonical arguments.

use serde::{Deserialize, Serialize};

use crate::codec::{CodecError, Reader, Writer};
use crate::election::EpochStart;
use crate::identity::Signature;
use crate::ids::{Digest, Seq};
use crate::policy::{ImagePolicy, MemberList};

/// Longest path of an image inside the mount, in bytes.
pub const PATH_MAX_BYTES: usize = 4096;
/// Longest name of an extended attribute or a snapshot, in bytes.
pub const NAME_MAX_BYTES: usize = 255;
/// Largest value of an extended attribute, in bytes.
pub const XATTR_MAX_BYTES: usize = 64 << 10;
/// Largest image, in bytes (2^52: 4 PiB, beyond which offsets stop fitting block numbers of 40 bits).
pub const SIZE_MAX_BYTES: u64 = 1 << 52;

/// Owner, mode and times of an image, as `stat` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Attrs {
    /// Permission bits (12 bits; the file type is always "regular").
    pub mode: u32,
    /// Owning user.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
    /// Last access, nanoseconds since the Unix epoch.
    pub atime_ns: u64,
    /// Last modification, nanoseconds since the Unix epoch.
    pub mtime_ns: u64,
}

impl Attrs {
    /// Appends the canonical form.
    pub fn encode(&self, w: &mut Writer) {
        w.u32(self.mode);
        w.u32(self.uid);
        w.u32(self.gid);
        w.u64(self.atime_ns);
        w.u64(self.mtime_ns);
    }
    /// Reads the canonical form.
    ///
    /// # Errors
    /// Truncated, or bits outside 0o7777.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let a = Self { mode: r.u32()?, uid: r.u32()?, gid: r.u32()?, atime_ns: r.u64()?, mtime_ns: r.u64()? };
        if a.mode > 0o7777 { Err(CodecError::Invalid("mode")) } else { Ok(a) }
    }
}

/// One operation. Block ranges and digests are in the header itself; everything else is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Ownership begins (the genesis too). Ends the epoch before.
    EpochStart(Box<EpochStart>),
    /// New content for the header's range.
    Write {
        /// The image's size afterwards, when the write extends it.
        size_after_bytes: Option<u64>,
    },
    /// Zeros for the header's range (discard, punch hole, zero range).
    Zero {
        /// The image's size afterwards, when it grows.
        size_after_bytes: Option<u64>,
    },
    /// New size; blocks wholly beyond it are dropped.
    Resize {
        /// Bytes.
        size_bytes: u64,
    },
    /// The image's path inside the mount.
    Name {
        /// Without a leading slash, components separated by one slash.
        path: String,
    },
    /// The name is gone; the content follows after the undelete window.
    Unlink,
    /// New attributes.
    Attr(Attrs),
    /// An extended attribute is set, or removed.
    Xattr {
        /// Name with its namespace, e.g. `user.comment`.
        name: String,
        /// The value; `None` removes it.
        value: Option<Vec<u8>>,
    },
    /// The member list from here on.
    Members(MemberList),
    /// The policy from here on.
    Policy(ImagePolicy),
    /// Nothing but the owner's signature over the parent digest: what comes before authenticates itself.
    Seal(Signature),
    /// Merkle root of the content after update `at`.
    Root {
        /// Whose content.
        at: Seq,
        /// Root over the block digests.
        merkle: Digest,
        /// Digest of the image's state (everything that is not blocks).
        state: Digest,
    },
    /// The state before this update is kept under a name.
    Snapshot {
        /// Unique among the image's snapshots.
        name: String,
    },
    /// A snapshot is given up.
    DropSnapshot {
        /// Its name.
        name: String,
    },
    /// The content goes back to what it was after update `to`.
    Rewind {
        /// Number of that update.
        to: Seq,
        /// Its digest.
        digest: Digest,
    },
}

fn size_flag(w: &mut Writer, size: Option<u64>) {
    // 0 cannot be a size after growing, so it stands for "unchanged".
    w.u64(size.unwrap_or(0));
}

fn size_opt(r: &mut Reader<'_>) -> Result<Option<u64>, CodecError> {
    match r.u64()? {
        0 => Ok(None),
        n if n > SIZE_MAX_BYTES => Err(CodecError::Invalid("size")),
        n => Ok(Some(n)),
    }
}

fn is_component(c: &str) -> bool {
    !c.is_empty() && c != "." && c != ".." && c.len() <= NAME_MAX_BYTES && !c.contains('\0')
}

/// A path inside the mount, as it came from elsewhere.
pub(crate) fn checked_path(path: String) -> Result<String, CodecError> {
    if path.split('/').all(is_component) { Ok(path) } else { Err(CodecError::Invalid("path")) }
}

/// A snapshot's name: it is shown as a path component.
pub(crate) fn checked_name(name: String) -> Result<String, CodecError> {
    if is_component(&name) && !name.contains('/') { Ok(name) } else { Err(CodecError::Invalid("name")) }
}

impl Op {
    /// The code in the header.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Self::EpochStart(_) => 1,
            Self::Write { .. } => 2,
            Self::Zero { .. } => 3,
            Self::Resize { .. } => 4,
            Self::Name { .. } => 5,
            Self::Unlink => 6,
            Self::Attr(_) => 7,
            Self::Xattr { .. } => 8,
            Self::Members(_) => 9,
            Self::Policy(_) => 10,
            Self::Seal(_) => 11,
            Self::Root { .. } => 12,
            Self::Snapshot { .. } => 13,
            Self::DropSnapshot { .. } => 14,
            Self::Rewind { .. } => 15,
        }
    }
    /// True when the header has a block range.
    #[must_use]
    pub const fn has_range(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }
    /// The canonical arguments.
    #[must_use]
    pub fn encode_args(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Self::EpochStart(e) => e.encode(&mut w),
            Self::Write { size_after_bytes } | Self::Zero { size_after_bytes } => {
                size_flag(&mut w, *size_after_bytes);
            }
            Self::Resize { size_bytes } => w.u64(*size_bytes),
            Self::Name { path } => w.var(path.as_bytes()),
            Self::Unlink => {}
            Self::Attr(a) => a.encode(&mut w),
            Self::Xattr { name, value } => {
                w.var(name.as_bytes());
                w.u8(u8::from(value.is_some()));
                w.var(value.as_deref().unwrap_or_default());
            }
            Self::Members(m) => m.encode(&mut w),
            Self::Policy(p) => p.encode(&mut w),
            Self::Seal(s) => w.bytes(&s.0),
            Self::Root { at, merkle, state } => {
                w.u64(at.0);
                w.bytes(merkle.as_bytes());
                w.bytes(state.as_bytes());
            }
            Self::Snapshot { name } | Self::DropSnapshot { name } => w.var(name.as_bytes()),
            Self::Rewind { to, digest } => {
                w.u64(to.0);
                w.bytes(digest.as_bytes());
            }
        }
        w.finish()
    }
    /// The operation that `code` and `args` spell.
    ///
    /// # Errors
    /// Unknown code, or arguments that are not canonical.
    pub fn decode(code: u8, args: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader::new(args);
        let op = match code {
            1 => Self::EpochStart(Box::new(EpochStart::decode(&mut r)?)),
            2 => Self::Write { size_after_bytes: size_opt(&mut r)? },
            3 => Self::Zero { size_after_bytes: size_opt(&mut r)? },
            4 => match r.u64()? {
                n if n > SIZE_MAX_BYTES => return Err(CodecError::Invalid("size")),
                size_bytes => Self::Resize { size_bytes },
            },
            5 => Self::Name { path: checked_path(r.text(PATH_MAX_BYTES)?)? },
            6 => Self::Unlink,
            7 => Self::Attr(Attrs::decode(&mut r)?),
            8 => {
                let name = r.text(NAME_MAX_BYTES)?;
                let present = r.flag()?;
                let value = r.var(XATTR_MAX_BYTES)?.to_vec();
                if !present && !value.is_empty() {
                    return Err(CodecError::Invalid("xattr"));
                }
                Self::Xattr { name, value: present.then_some(value) }
            }
            9 => Self::Members(MemberList::decode(&mut r)?),
            10 => Self::Policy(ImagePolicy::decode(&mut r)?),
            11 => Self::Seal(Signature(r.array()?)),
            12 => Self::Root {
                at: Seq(r.u64()?),
                merkle: Digest::from_bytes(r.array()?),
                state: Digest::from_bytes(r.array()?),
            },
            13 => Self::Snapshot { name: checked_name(r.text(NAME_MAX_BYTES)?)? },
            14 => Self::DropSnapshot { name: checked_name(r.text(NAME_MAX_BYTES)?)? },
            15 => Self::Rewind { to: Seq(r.u64()?), digest: Digest::from_bytes(r.array()?) },
            _ => return Err(CodecError::Invalid("op")),
        };
        r.end()?;
        Ok(op)
    }
}
