//! The update chain (DESIGN.md section 4): how an owner extends it, and when a copy accepts.
//!
//! For update *i* of an epoch with secret `S`:
//! `priv_i = HMAC(S, "priv" ‖ priv_{i-1} ‖ B_i)`, `pub_i = H("pub", priv_i)`,
//! `D_i = H("update", B_i ‖ priv_{i-1} ‖ pub_i)`, `tag_i = HMAC(priv_i, "tag" ‖ D_i)`.
//! An `EpochStart` has `priv_0 = HMAC(S, "priv0" ‖ image ‖ epoch)` and reveals nothing.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::hash::{hash, mac, same_secret};
use crate::header::{FLAG_DEGRADED, FORMAT_LEVEL, Unsealed, Update, UpdateHeader};
use crate::identity::{HostKey, PublicKey};
use crate::ids::{BlockCount, BlockIndex, Digest, Epoch, Head, ImageId, Seq};
use crate::op::Op;

const SEAL_LABEL: &str = "vmfs1/seal";

/// Why a copy does not take an update. Counted by kind in status.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, thiserror::Error,
)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// Not a canonical header.
    #[error("malformed header")]
    Malformed,
    /// For another image.
    #[error("wrong image")]
    WrongImage,
    /// For another epoch than the copy's current one.
    #[error("wrong epoch")]
    WrongEpoch,
    /// The sender does not own the epoch.
    #[error("the sender is not the owner")]
    NotOwner,
    /// Updates are missing before it.
    #[error("gap")]
    Gap,
    /// At or below the head.
    #[error("replay")]
    Replay,
    /// The parent is not the copy's head.
    #[error("the parent is not the head")]
    WrongParent,
    /// The revealed id does not match the head's public id.
    #[error("wrong revealed id")]
    WrongReveal,
    /// The head's tag does not verify: the head is not what the owner made.
    #[error("wrong tag on the head")]
    WrongHeadTag,
    /// The payload does not match the digests.
    #[error("altered payload")]
    AlteredPayload,
    /// The `EpochStart` certificate does not verify.
    #[error("bad certificate")]
    BadCertificate,
    /// A higher ballot has been promised.
    #[error("a higher ballot is promised")]
    Promised,
    /// A suffix from a peer that reaches neither a Seal nor a vouched head.
    #[error("unvouched suffix")]
    Unvouched,
    /// A Seal's signature is wrong.
    #[error("bad seal")]
    BadSeal,
    /// Two valid updates with one parent.
    #[error("fork evidence")]
    Fork,
    /// The operation is not allowed here.
    #[error("operation not allowed")]
    NotAllowed,
    /// The copy's store has no space for it: tried again later.
    #[error("no space")]
    NoSpace,
}

/// What a copy must remember of its head to judge the next update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tip {
    /// The head.
    pub head: Head,
    /// Its public id.
    pub public: Digest,
    /// Its tag.
    pub tag: [u8; 32],
    /// Its time, for the monotone clock.
    pub time_ns: u64,
    /// Its flags: [`FLAG_DEGRADED`] tells how votes are to be counted.
    pub flags: u8,
}

impl Tip {
    /// The tip that `update` makes.
    #[must_use]
    pub const fn of(update: &Update) -> Self {
        let h = &update.header;
        Self { head: update.head(), public: h.public, tag: h.tag, time_ns: h.time_ns, flags: h.flags }
    }
}

/// Rules 2 to 4 for an update that is not an `EpochStart`: it extends `tip` and confirms it.
///
/// # Errors
/// The first rule broken.
pub fn check_extends(tip: &Tip, image: ImageId, update: &Update) -> Result<(), Refusal> {
    let h = &update.header;
    if h.image != image {
        return Err(Refusal::WrongImage);
    }
    if matches!(h.op, Op::EpochStart(_)) {
        return Err(Refusal::NotAllowed);
    }
    if h.epoch != tip.head.epoch {
        return Err(Refusal::WrongEpoch);
    }
    if h.seq <= tip.head.seq {
        return Err(Refusal::Replay);
    }
    if h.seq != tip.head.seq.next() {
        return Err(Refusal::Gap);
    }
    if h.parent != tip.head.digest {
        return Err(Refusal::WrongParent);
    }
    #[cfg(feature = "testing")]
    if crate::weaken::is(crate::weaken::Weakness::OriginUnchecked) {
        return Ok(());
    }
    if public_id(&h.reveal) != tip.public {
        return Err(Refusal::WrongReveal);
    }
    if !same_secret(&tag(&h.reveal, &tip.head.digest), &tip.tag) {
        return Err(Refusal::WrongHeadTag);
    }
    if h.time_ns < tip.time_ns {
        return Err(Refusal::Malformed);
    }
    Ok(())
}

/// Checks a Seal's signature with the epoch owner's key.
///
/// # Errors
/// [`Refusal::BadSeal`]; [`Refusal::NotAllowed`] when `update` is no Seal.
pub fn check_seal(update: &Update, owner: &PublicKey) -> Result<(), Refusal> {
    let h = &update.header;
    let Op::Seal(signature) = &h.op else { return Err(Refusal::NotAllowed) };
    owner
        .verify(SEAL_LABEL, &seal_bytes(h.image, h.epoch, h.seq, &h.parent), signature)
        .map_err(|_| Refusal::BadSeal)
}

fn seal_bytes(image: ImageId, epoch: Epoch, seq: Seq, parent: &Digest) -> Vec<u8> {
    [
        image.as_bytes().as_slice(),
        &epoch.number.to_le_bytes(),
        epoch.host.as_bytes(),
        &seq.0.to_le_bytes(),
        parent.as_bytes(),
    ]
    .concat()
}

/// `pub = H("pub", priv)`.
#[must_use]
pub fn public_id(private: &[u8; 32]) -> Digest {
    hash("pub", &[private])
}

fn tag(private: &[u8; 32], digest: &Digest) -> [u8; 32] {
    mac(private, "tag", &[digest.as_bytes()])
}

/// An epoch's secret. Zeroized when dropped, never shown.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct EpochSecret([u8; 32]);

impl std::fmt::Debug for EpochSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EpochSecret(..)")
    }
}

impl EpochSecret {
    /// From 32 random bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    /// From a source of secure random bytes.
    pub fn random(fill: &mut dyn FnMut(&mut [u8])) -> Self {
        let mut secret = Self([0; 32]);
        fill(&mut secret.0);
        secret
    }
    /// The bytes, for the store (mode 0600), the shares, and publication when the epoch has ended.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }
    /// The commitment in the proposal.
    #[must_use]
    pub fn commitment(&self) -> Digest {
        hash("secret", &[&self.0])
    }
    fn first_private(&self, image: ImageId, epoch: Epoch) -> [u8; 32] {
        mac(&self.0, "priv0", &[image.as_bytes(), &epoch.number.to_le_bytes(), epoch.host.as_bytes()])
    }
    fn next_private(&self, previous: &[u8; 32], body: &Digest) -> [u8; 32] {
        mac(&self.0, "priv", &[previous, body.as_bytes()])
    }
    /// Public id of the epoch's `EpochStart`: part of the proposal, before the parent is known.
    #[must_use]
    pub fn first_public(&self, image: ImageId, epoch: Epoch) -> Digest {
        public_id(&self.first_private(image, epoch))
    }
}

/// A member's share of an epoch's secret. Zeroized when dropped, never shown.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct Share(Vec<u8>);

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Share(..)")
    }
}

impl Share {
    /// From its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
    /// The bytes, for the store, and for putting the secret together.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

/// What an update is to say, before it gets its number and place in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// The operation.
    pub op: Op,
    /// First block of the range (writes, zeros), else 0.
    pub start: BlockIndex,
    /// Blocks of the range, else 0.
    pub count: BlockCount,
    /// One digest per block of a write.
    pub digests: Vec<Digest>,
    /// [`crate::header::FLAG_FLUSH`] or 0.
    pub flags: u8,
}

impl Draft {
    /// An operation without a range.
    #[must_use]
    pub const fn op(op: Op) -> Self {
        Self { op, start: BlockIndex(0), count: BlockCount(0), digests: Vec::new(), flags: 0 }
    }
}

/// The owner's end of the chain: makes updates. Lives only in the owner's memory; a restart is an
/// election with a new secret.
#[cfg_attr(feature = "testing", derive(Clone))]
pub struct OwnerChain {
    secret: EpochSecret,
    image: ImageId,
    private: [u8; 32],
    tip: Tip,
    degraded: bool,
}

impl std::fmt::Debug for OwnerChain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnerChain")
            .field("image", &self.image)
            .field("tip", &self.tip)
            .finish_non_exhaustive()
    }
}

impl OwnerChain {
    /// Begins the epoch: makes its `EpochStart` update on `parent` from the signed arguments.
    ///
    /// # Panics
    /// When the arguments' proposal was not made from `secret`.
    #[must_use]
    pub fn begin(
        secret: EpochSecret,
        parent: &Tip,
        start: crate::election::EpochStart,
        time_ns: u64,
    ) -> (Self, Update) {
        let p = &start.proposal;
        let (image, epoch) = (p.image, p.ballot);
        assert_eq!(p.secret_hash, secret.commitment(), "invariant: the proposal commits to this secret");
        let private = secret.first_private(image, epoch);
        let degraded = parent.flags & FLAG_DEGRADED != 0 || start.follows_degraded();
        let header = UpdateHeader {
            level: FORMAT_LEVEL,
            flags: if degraded { FLAG_DEGRADED } else { 0 },
            image,
            epoch,
            seq: parent.head.seq.next(),
            parent: parent.head.digest,
            time_ns: time_ns.max(parent.time_ns),
            start: BlockIndex(0),
            count: BlockCount(0),
            commit: Seq::ZERO,
            reveal: [0; 32],
            public: public_id(&private),
            tag: [0; 32],
            acked: Vec::new(),
            digests: Vec::new(),
            op: Op::EpochStart(Box::new(start)),
        };
        let public = header.public;
        let update = Unsealed::new(header).seal(public, |digest| tag(&private, digest));
        let tip = Tip::of(&update);
        (Self { secret, image, private, tip, degraded }, update)
    }

    /// Whether updates carry [`FLAG_DEGRADED`]. True from the beginning when the chain below does.
    #[must_use]
    pub const fn is_degraded(&self) -> bool {
        self.degraded
    }

    /// Sets [`FLAG_DEGRADED`] on the updates to come, or ends it.
    pub const fn set_degraded(&mut self, degraded: bool) {
        self.degraded = degraded;
    }

    /// Where the chain stands.
    #[must_use]
    pub const fn tip(&self) -> &Tip {
        &self.tip
    }

    /// The epoch's secret, for its shares.
    #[must_use]
    pub const fn secret(&self) -> &EpochSecret {
        &self.secret
    }

    /// The next update. The caller has reserved its space: from here on it is part of the chain.
    /// `time_ns` is clamped to the parent's.
    pub fn append(&mut self, draft: Draft, time_ns: u64, commit: Seq, acked: Vec<Seq>) -> Update {
        let Draft { op, start, count, digests, flags } = draft;
        let flags = flags | if self.degraded { FLAG_DEGRADED } else { 0 };
        let header = UpdateHeader {
            level: FORMAT_LEVEL,
            flags,
            image: self.image,
            epoch: self.tip.head.epoch,
            seq: self.tip.head.seq.next(),
            parent: self.tip.head.digest,
            time_ns: time_ns.max(self.tip.time_ns),
            start,
            count,
            commit,
            reveal: self.private,
            public: Digest::default(),
            tag: [0; 32],
            acked,
            digests,
            op,
        };
        let header = Unsealed::new(header);
        let private = self.secret.next_private(&self.private, header.body());
        let update = header.seal(public_id(&private), |digest| tag(&private, digest));
        self.private.zeroize();
        self.private = private;
        self.tip = Tip::of(&update);
        update
    }

    /// The next update as a Seal over the present tip.
    pub fn seal(&mut self, key: &HostKey, time_ns: u64, commit: Seq, acked: Vec<Seq>) -> Update {
        let h = &self.tip.head;
        let signature = key.sign(SEAL_LABEL, &seal_bytes(self.image, h.epoch, h.seq.next(), &h.digest));
        self.append(Draft::op(Op::Seal(signature)), time_ns, commit, acked)
    }
}

impl Drop for OwnerChain {
    fn drop(&mut self) {
        self.private.zeroize();
    }
}

/// Follows an ended epoch with its published secret: every update must be the one the owner made.
#[derive(Debug)]
pub struct EpochAudit {
    secret: EpochSecret,
    private: [u8; 32],
}

impl EpochAudit {
    /// Starts at the epoch's `EpochStart`.
    ///
    /// # Errors
    /// [`Refusal::BadCertificate`] when the secret is not the one committed to,
    /// [`Refusal::WrongHeadTag`] when the update's public id or tag does not follow from it.
    pub fn begin(secret: EpochSecret, start: &Update) -> Result<Self, Refusal> {
        let Op::EpochStart(args) = &start.header.op else { return Err(Refusal::NotAllowed) };
        if args.proposal.secret_hash != secret.commitment() {
            return Err(Refusal::BadCertificate);
        }
        let private = secret.first_private(start.header.image, start.header.epoch);
        let audit = Self { secret, private };
        audit.check(start)?;
        Ok(audit)
    }
    /// Checks the next update of the epoch.
    ///
    /// # Errors
    /// [`Refusal::WrongReveal`] or [`Refusal::WrongHeadTag`].
    pub fn next(&mut self, update: &Update) -> Result<(), Refusal> {
        if !same_secret(&update.header.reveal, &self.private) {
            return Err(Refusal::WrongReveal);
        }
        self.private = self.secret.next_private(&self.private, &update.body);
        self.check(update)
    }
    fn check(&self, update: &Update) -> Result<(), Refusal> {
        let good = public_id(&self.private) == update.header.public
            && same_secret(&tag(&self.private, &update.digest), &update.header.tag);
        if good { Ok(()) } else { Err(Refusal::WrongHeadTag) }
    }
}
