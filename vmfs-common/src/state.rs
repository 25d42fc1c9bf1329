//! Everything about an image that is not blocks, as its updates make it. Part of every checkpoint.

use std::collections::BTreeMap;

use crate::chain::{Refusal, Tip};
use crate::codec::{CodecError, Reader, Writer};
use crate::election::{Mandate, decode_head, encode_head};
use crate::hash::hash;
use crate::header::Update;
use crate::ids::{Digest, Epoch, Head, ImageId, Seq};
use crate::op::{Attrs, NAME_MAX_BYTES, Op, PATH_MAX_BYTES, XATTR_MAX_BYTES, checked_name, checked_path};
use crate::policy::{ImagePolicy, MemberList};

/// Most extended attributes an image may have.
pub const XATTRS_MAX: usize = 256;
/// Most snapshots an image may have.
pub const SNAPSHOTS_MAX: usize = 4096;
/// Most recent epochs remembered; older ones are only in the log.
pub const EPOCHS_MAX: usize = 1024;

const STATE_VERSION: u32 = 1;

/// One epoch of the image's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochEntry {
    /// Which.
    pub epoch: Epoch,
    /// Its `EpochStart` update, as a head.
    pub start: Head,
    /// The head it was put on: the last update of the epoch before.
    pub parent: Head,
}

/// The state after some update. `ImageState::default()` with an image id is the state before any.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageState {
    /// The image.
    pub image: ImageId,
    /// The last update applied.
    pub tip: Tip,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Path inside the mount, as last named.
    pub path: Option<String>,
    /// Set once the name has been given up.
    pub unlinked: bool,
    /// Attributes; `mtime_ns` follows writes.
    pub attrs: Attrs,
    /// Time of the last update that changed content, name or attributes, nanoseconds since the Unix epoch.
    pub ctime_ns: u64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Members in force.
    pub members: MemberList,
    /// Policy in force.
    pub policy: ImagePolicy,
    /// Update that last changed the members or began the epoch: must be committed before the next change.
    pub config_seq: Seq,
    /// Digest of the update that last changed which members hold data, or how many copies flushes need:
    /// two copies that agree on it have had the same ones since it.
    pub members_since: Digest,
    /// The latest epochs, oldest first.
    pub epochs: Vec<EpochEntry>,
    /// Snapshots: name to the update whose content they keep.
    pub snapshots: BTreeMap<String, Head>,
}

impl ImageState {
    /// The state of an image that has no updates yet.
    #[must_use]
    pub fn new(image: ImageId) -> Self {
        Self { image, ..Self::default() }
    }
    /// The last update applied.
    #[must_use]
    pub const fn head(&self) -> Head {
        self.tip.head
    }
    /// Head of this state's chain at `seq`, when it ends an epoch, begins one, or is the tip.
    #[must_use]
    pub fn known_head_at(&self, seq: Seq) -> Option<Head> {
        let ends = self.epochs.iter().flat_map(|e| [e.start, e.parent]);
        ends.chain([self.tip.head]).find(|h| h.seq == seq)
    }
    /// `EpochStart` of the current epoch.
    #[must_use]
    pub fn epoch_start(&self) -> Option<&EpochEntry> {
        self.epochs.last()
    }
    /// True when `update` may be applied to this state as far as limits go; chain rules are
    /// [`crate::chain`]'s business.
    ///
    /// # Errors
    /// [`Refusal::NotAllowed`] for updates that exceed a bound or change nothing they may.
    pub fn check_apply(&self, update: &Update) -> Result<(), Refusal> {
        let ok = match &update.header.op {
            Op::Xattr { name, value: Some(_) } => {
                self.xattrs.contains_key(name) || self.xattrs.len() < XATTRS_MAX
            }
            Op::Snapshot { name } => {
                !self.snapshots.contains_key(name) && self.snapshots.len() < SNAPSHOTS_MAX
            }
            Op::Rewind { to, .. } => *to < update.header.seq,
            Op::Root { at, .. } => *at < update.header.seq,
            _ => true,
        };
        if ok { Ok(()) } else { Err(Refusal::NotAllowed) }
    }
    /// Applies an update that has been checked. Total: never fails, so that replay cannot diverge.
    pub fn apply(&mut self, update: &Update) {
        let h = &update.header;
        let before = self.tip.head;
        self.tip = Tip::of(update);
        let mut touched = true;
        match &h.op {
            Op::EpochStart(start) => {
                if !matches!(start.mandate, Mandate::Votes(_)) {
                    self.members_since = update.digest;
                }
                if let Mandate::Genesis(g) = &start.mandate {
                    self.policy = g.policy;
                    self.attrs = g.attrs;
                } else {
                    touched = false;
                }
                self.members = start.members_after(&self.members);
                self.config_seq = h.seq;
                if self.epochs.len() == EPOCHS_MAX {
                    self.epochs.remove(0);
                }
                self.epochs.push(EpochEntry { epoch: h.epoch, start: self.tip.head, parent: before });
            }
            Op::Write { size_after_bytes } | Op::Zero { size_after_bytes } => {
                self.size_bytes = size_after_bytes.map_or(self.size_bytes, |n| n.max(self.size_bytes));
                self.attrs.mtime_ns = h.time_ns;
            }
            Op::Resize { size_bytes } => {
                self.size_bytes = *size_bytes;
                self.attrs.mtime_ns = h.time_ns;
            }
            Op::Name { path } => {
                self.path = Some(path.clone());
                self.unlinked = false;
            }
            Op::Unlink => self.unlinked = true,
            Op::Attr(a) => self.attrs = *a,
            Op::Xattr { name, value: Some(v) } => {
                self.xattrs.insert(name.clone(), v.clone());
            }
            Op::Xattr { name, value: None } => {
                self.xattrs.remove(name);
            }
            Op::Members(m) => {
                if !m.has_data_like(&self.members) {
                    self.members_since = update.digest;
                }
                self.members = m.clone();
                self.config_seq = h.seq;
                touched = false;
            }
            Op::Policy(p) => {
                self.policy = *p;
                touched = false;
            }
            Op::Snapshot { name } => {
                self.snapshots.insert(name.clone(), before);
                touched = false;
            }
            Op::DropSnapshot { name } => {
                self.snapshots.remove(name);
                touched = false;
            }
            Op::Seal(_) | Op::Root { .. } => touched = false,
            Op::Rewind { .. } => self.attrs.mtime_ns = h.time_ns,
        }
        if touched {
            self.ctime_ns = h.time_ns;
        }
    }

    /// What a `Root` update vouches for beside the blocks: the state without its tip's secrets.
    #[must_use]
    pub fn digest(&self) -> Digest {
        hash("state", &[&self.encode()])
    }
    /// The canonical form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(STATE_VERSION);
        w.bytes(self.image.as_bytes());
        encode_head(&mut w, &self.tip.head);
        w.bytes(self.tip.public.as_bytes());
        w.bytes(&self.tip.tag);
        w.u64(self.tip.time_ns);
        w.u8(self.tip.flags);
        w.u64(self.size_bytes);
        w.u8(u8::from(self.path.is_some()));
        w.var(self.path.as_deref().unwrap_or_default().as_bytes());
        w.u8(u8::from(self.unlinked));
        self.attrs.encode(&mut w);
        w.u64(self.ctime_ns);
        w.count(self.xattrs.len());
        for (k, v) in &self.xattrs {
            w.var(k.as_bytes());
            w.var(v);
        }
        self.members.encode(&mut w);
        self.policy.encode(&mut w);
        w.u64(self.config_seq.0);
        w.bytes(self.members_since.as_bytes());
        w.count(self.epochs.len());
        for e in &self.epochs {
            encode_head(&mut w, &e.start);
            encode_head(&mut w, &e.parent);
        }
        w.count(self.snapshots.len());
        for (k, v) in &self.snapshots {
            w.var(k.as_bytes());
            encode_head(&mut w, v);
        }
        w.finish()
    }
    /// Reads the canonical form.
    ///
    /// # Errors
    /// Another version, or bytes that are not canonical.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader::new(bytes);
        let got = r.u32()?;
        if got != STATE_VERSION {
            return Err(CodecError::Version { got, known: STATE_VERSION });
        }
        let image = ImageId::from_bytes(r.array()?);
        let tip = Tip {
            head: decode_head(&mut r)?,
            public: Digest::from_bytes(r.array()?),
            tag: r.array()?,
            time_ns: r.u64()?,
            flags: r.u8()?,
        };
        let size_bytes = r.u64()?;
        let named = r.flag()?;
        let path = r.text(PATH_MAX_BYTES)?;
        let path = match named {
            true => Some(checked_path(path)?),
            false if path.is_empty() => None,
            false => return Err(CodecError::Invalid("path")),
        };
        let unlinked = r.flag()?;
        let attrs = Attrs::decode(&mut r)?;
        let ctime_ns = r.u64()?;
        let mut xattrs = BTreeMap::new();
        for _ in 0..r.count(XATTRS_MAX)? {
            let k = r.text(NAME_MAX_BYTES)?;
            in_order(&xattrs, &k)?;
            xattrs.insert(k, r.var(XATTR_MAX_BYTES)?.to_vec());
        }
        let members =
            if tip.head.seq == Seq::ZERO { skip_empty_members(&mut r)? } else { MemberList::decode(&mut r)? };
        let policy = ImagePolicy::decode(&mut r)?;
        let config_seq = Seq(r.u64()?);
        let members_since = Digest::from_bytes(r.array()?);
        let mut epochs = Vec::new();
        for _ in 0..r.count(EPOCHS_MAX)? {
            let start = decode_head(&mut r)?;
            epochs.push(EpochEntry { epoch: start.epoch, start, parent: decode_head(&mut r)? });
        }
        let mut snapshots = BTreeMap::new();
        for _ in 0..r.count(SNAPSHOTS_MAX)? {
            let k = checked_name(r.text(NAME_MAX_BYTES)?)?;
            in_order(&snapshots, &k)?;
            snapshots.insert(k, decode_head(&mut r)?);
        }
        r.end()?;
        Ok(Self {
            image,
            tip,
            size_bytes,
            path,
            unlinked,
            attrs,
            ctime_ns,
            xattrs,
            members,
            policy,
            config_seq,
            members_since,
            epochs,
            snapshots,
        })
    }
}

/// The canonical form has every key once, in order.
fn in_order<V>(map: &BTreeMap<String, V>, next: &String) -> Result<(), CodecError> {
    match map.last_key_value() {
        Some((last, _)) if last >= next => Err(CodecError::Invalid("order of keys")),
        _ => Ok(()),
    }
}

fn skip_empty_members(r: &mut Reader<'_>) -> Result<MemberList, CodecError> {
    r.count(0)?;
    Ok(MemberList::default())
}
