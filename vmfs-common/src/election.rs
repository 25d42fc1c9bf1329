//! How ownership changes: proposals, votes, and the certificate inside an `EpochStart`.

use serde::{Deserialize, Serialize};

use crate::codec::{CodecError, Reader, Writer};
use crate::hash::hash;
use crate::identity::{HostKey, PublicKey, Signature};
use crate::ids::{DatastoreId, Digest, Epoch, Head, HostId, ImageId, Seq, StoreId};
use crate::op::Attrs;
use crate::policy::{ImagePolicy, MEMBERS_MAX, MemberList, MemberRole};

/// What a candidate asks the members to agree to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Proposal {
    /// The datastore.
    pub datastore: DatastoreId,
    /// The image.
    pub image: ImageId,
    /// The epoch asked for; its host is the candidate.
    pub ballot: Epoch,
    /// The member list the candidate counts by.
    pub members: Digest,
    /// Public id of the new epoch's `EpochStart`.
    pub pub0: Digest,
    /// Commitment to the new epoch's secret.
    pub secret_hash: Digest,
}

impl Proposal {
    /// What votes name it by.
    #[must_use]
    pub fn digest(&self) -> Digest {
        hash(
            "proposal",
            &[
                self.datastore.as_bytes(),
                self.image.as_bytes(),
                &self.ballot.number.to_le_bytes(),
                self.ballot.host.as_bytes(),
                self.members.as_bytes(),
                self.pub0.as_bytes(),
                self.secret_hash.as_bytes(),
            ],
        )
    }
}

/// A position: epoch and number, without a digest.
pub type Rank = (Epoch, Seq);

/// A member's durable promise to refuse every epoch below the ballot, and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vote {
    /// Digest of the proposal voted for.
    pub proposal: Digest,
    /// The voter.
    pub host: HostId,
    /// Its store.
    pub store: StoreId,
    /// Its durable head.
    pub head: Head,
    /// The highest commit point it has seen.
    pub commit: Rank,
    /// The highest seq it has acknowledged itself.
    pub acked: Rank,
    /// Its head carries [`crate::header::FLAG_DEGRADED`]: flushes below it may have been
    /// acknowledged with a single copy of the data.
    pub degraded: bool,
    /// [`crate::state::ImageState::members_since`] at its head.
    pub members_since: Digest,
    /// Over all of it.
    pub signature: Signature,
}

const VOTE_LABEL: &str = "vmfs1/vote";

impl Vote {
    fn signed_bytes(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.bytes(self.proposal.as_bytes());
        w.bytes(self.host.as_bytes());
        w.bytes(self.store.as_bytes());
        encode_head(&mut w, &self.head);
        encode_rank(&mut w, self.commit);
        encode_rank(&mut w, self.acked);
        w.u8(u8::from(self.degraded));
        w.bytes(self.members_since.as_bytes());
        w.finish()
    }
    /// Fills in the signature.
    #[must_use]
    pub fn signed(mut self, key: &HostKey) -> Self {
        self.signature = key.sign(VOTE_LABEL, &self.signed_bytes());
        self
    }
    /// True when `key` signed exactly this vote.
    #[must_use]
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        key.verify(VOTE_LABEL, &self.signed_bytes(), &self.signature).is_ok()
    }
    /// A voter whose head is below what it acknowledged has lost data and is not counted.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.head.rank() >= self.acked
    }
    fn encode(&self, w: &mut Writer) {
        w.bytes(&self.signed_bytes());
        w.bytes(&self.signature.0);
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        Ok(Self {
            proposal: Digest::from_bytes(r.array()?),
            host: HostId::from_bytes(r.array()?),
            store: StoreId::from_bytes(r.array()?),
            head: decode_head(r)?,
            commit: decode_rank(r)?,
            acked: decode_rank(r)?,
            degraded: r.flag()?,
            members_since: Digest::from_bytes(r.array()?),
            signature: Signature(r.array()?),
        })
    }
}

/// Appends a vote's canonical form.
pub fn encode_vote(w: &mut Writer, v: &Vote) {
    v.encode(w);
}
/// Reads a vote's canonical form.
///
/// # Errors
/// Truncated.
pub fn decode_vote(r: &mut Reader<'_>) -> Result<Vote, CodecError> {
    Vote::decode(r)
}

fn encode_epoch(w: &mut Writer, e: Epoch) {
    w.u64(e.number);
    w.bytes(e.host.as_bytes());
}
fn decode_epoch(r: &mut Reader<'_>) -> Result<Epoch, CodecError> {
    Ok(Epoch { number: r.u64()?, host: HostId::from_bytes(r.array()?) })
}
fn encode_rank(w: &mut Writer, (e, s): Rank) {
    encode_epoch(w, e);
    w.u64(s.0);
}
fn decode_rank(r: &mut Reader<'_>) -> Result<Rank, CodecError> {
    Ok((decode_epoch(r)?, Seq(r.u64()?)))
}
/// Appends a head's canonical form.
pub fn encode_head(w: &mut Writer, h: &Head) {
    encode_rank(w, h.rank());
    w.bytes(h.digest.as_bytes());
}
/// Reads a head's canonical form.
///
/// # Errors
/// Truncated.
pub fn decode_head(r: &mut Reader<'_>) -> Result<Head, CodecError> {
    let (epoch, seq) = decode_rank(r)?;
    Ok(Head { epoch, seq, digest: Digest::from_bytes(r.array()?) })
}

/// What an image starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Genesis {
    /// Its members.
    pub members: MemberList,
    /// Its policy.
    pub policy: ImagePolicy,
    /// Its attributes.
    pub attrs: Attrs,
    /// Format level of the whole chain until raised.
    pub level: u16,
}

/// By what right an epoch begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mandate {
    /// The image's first update.
    Genesis(Genesis),
    /// A quorum's votes.
    Votes(Vec<Vote>),
    /// The operator's word, without a quorum: a separate lineage with its own members.
    Forced(MemberList),
}

/// Arguments of an `EpochStart` update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochStart {
    /// What was asked.
    pub proposal: Proposal,
    /// By what right.
    pub mandate: Mandate,
    /// The ended epoch's secret, when it could be rebuilt; else its head is confirmed by signatures only.
    pub published: Option<[u8; 32]>,
    /// The new owner's signature over all of the above and the parent.
    pub signature: Signature,
}

const EPOCH_START_LABEL: &str = "vmfs1/epoch-start";

/// Why an `EpochStart` is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CertificateError {
    /// The header's image, epoch or public id is not the proposal's.
    #[error("the header is not the one proposed")]
    WrongHeader,
    /// The proposal counts by another member list than the one in force at the parent.
    #[error("votes counted by another member list")]
    WrongMembers,
    /// The new owner is not a data member.
    #[error("the new owner is not a member with data")]
    NotMember,
    /// The owner's signature does not verify.
    #[error("the owner's signature is wrong")]
    OwnerSignature,
    /// A vote is for something else, from a stranger, twice, or badly signed.
    #[error("a vote is not valid")]
    BadVote,
    /// Too few votes.
    #[error("no quorum of votes")]
    NoQuorum,
    /// The parent is not the highest voted head.
    #[error("the parent is not the highest voted head")]
    NotHighest,
    /// Two voted heads of equal rank differ.
    #[error("two voted heads of equal rank differ")]
    Fork,
    /// The parent is below a known commit point.
    #[error("the parent is below a commit point")]
    BelowCommit,
    /// The ballot is not above the voted heads' epochs.
    #[error("the ballot is not above the voted heads")]
    OldBallot,
    /// A genesis with a parent, or none without one.
    #[error("a genesis must be the first update, and only it")]
    Genesis,
}

impl EpochStart {
    fn signed_bytes(&self, seq: Seq, parent: &Digest) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(seq.0);
        w.bytes(parent.as_bytes());
        self.encode_unsigned(&mut w);
        w.finish()
    }
    /// Fills in the new owner's signature.
    #[must_use]
    pub fn signed(mut self, seq: Seq, parent: &Digest, key: &HostKey) -> Self {
        self.signature = key.sign(EPOCH_START_LABEL, &self.signed_bytes(seq, parent));
        self
    }
    /// True when `key` signed it for this place in the chain.
    #[must_use]
    pub fn is_signed_by(&self, seq: Seq, parent: &Digest, key: &PublicKey) -> bool {
        key.verify(EPOCH_START_LABEL, &self.signed_bytes(seq, parent), &self.signature).is_ok()
    }
    fn encode_unsigned(&self, w: &mut Writer) {
        let p = &self.proposal;
        w.bytes(p.datastore.as_bytes());
        w.bytes(p.image.as_bytes());
        encode_epoch(w, p.ballot);
        w.bytes(p.members.as_bytes());
        w.bytes(p.pub0.as_bytes());
        w.bytes(p.secret_hash.as_bytes());
        match &self.mandate {
            Mandate::Genesis(g) => {
                w.u8(1);
                g.members.encode(w);
                g.policy.encode(w);
                g.attrs.encode(w);
                w.u16(g.level);
            }
            Mandate::Votes(votes) => {
                w.u8(2);
                w.count(votes.len());
                votes.iter().for_each(|v| v.encode(w));
            }
            Mandate::Forced(members) => {
                w.u8(3);
                members.encode(w);
            }
        }
        w.u8(u8::from(self.published.is_some()));
        w.bytes(&self.published.unwrap_or_default());
    }
    /// Appends the canonical form.
    pub fn encode(&self, w: &mut Writer) {
        self.encode_unsigned(w);
        w.bytes(&self.signature.0);
    }
    /// Reads the canonical form.
    ///
    /// # Errors
    /// When it is not canonical.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let proposal = Proposal {
            datastore: DatastoreId::from_bytes(r.array()?),
            image: ImageId::from_bytes(r.array()?),
            ballot: decode_epoch(r)?,
            members: Digest::from_bytes(r.array()?),
            pub0: Digest::from_bytes(r.array()?),
            secret_hash: Digest::from_bytes(r.array()?),
        };
        let mandate = match r.u8()? {
            1 => Mandate::Genesis(Genesis {
                members: MemberList::decode(r)?,
                policy: ImagePolicy::decode(r)?,
                attrs: Attrs::decode(r)?,
                level: r.u16()?,
            }),
            2 => {
                let n = r.count(MEMBERS_MAX)?;
                Mandate::Votes((0..n).map(|_| Vote::decode(r)).collect::<Result<_, _>>()?)
            }
            3 => Mandate::Forced(MemberList::decode(r)?),
            _ => return Err(CodecError::Invalid("mandate")),
        };
        let present = r.flag()?;
        let secret: [u8; 32] = r.array()?;
        if !present && secret != [0; 32] {
            return Err(CodecError::Invalid("published secret"));
        }
        let signature = Signature(r.array()?);
        Ok(Self { proposal, mandate, published: present.then_some(secret), signature })
    }

    /// True when it is the proposal of this image, epoch and public id.
    #[must_use]
    pub fn is_for(&self, image: ImageId, epoch: Epoch, public: &Digest) -> bool {
        let p = &self.proposal;
        p.image == image && p.ballot == epoch && p.pub0 == *public
    }

    /// True when a majority of `list` have signed votes for it.
    #[must_use]
    pub fn has_majority_of(&self, list: &MemberList) -> bool {
        self.votes_of(list) >= list.quorum()
    }
    /// How many of `list` have signed votes for exactly this proposal, whatever list it counts by.
    #[must_use]
    pub fn votes_of(&self, list: &MemberList) -> usize {
        let Mandate::Votes(votes) = &self.mandate else { return 0 };
        let proposal = self.proposal.digest();
        let valid = |m: &crate::policy::Member| {
            let by = |v: &&Vote| v.host == m.host && v.store == m.store && v.proposal == proposal;
            votes.iter().find(by).is_some_and(|v| v.is_signed_by(&m.key))
        };
        list.all().iter().filter(|m| valid(m)).count()
    }

    /// True when a voter's head says that flushes may have been acknowledged with fewer data copies.
    #[must_use]
    pub fn follows_degraded(&self) -> bool {
        matches!(&self.mandate, Mandate::Votes(votes) if votes.iter().any(|v| v.degraded))
    }

    /// The member list that this epoch begins with, given the one in force at its parent.
    #[must_use]
    pub fn members_after(&self, before: &MemberList) -> MemberList {
        match &self.mandate {
            Mandate::Genesis(g) => g.members.clone(),
            Mandate::Votes(_) => before.clone(),
            Mandate::Forced(m) => m.clone(),
        }
    }

    /// Verifies the certificate of update `seq` whose parent is `parent`, where `before` is the
    /// member list in force at the parent. Certificates' validity dates play no part.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn verify(&self, seq: Seq, parent: &Head, before: &MemberList) -> Result<(), CertificateError> {
        let after = self.members_after(before);
        let owner = after.get(self.proposal.ballot.host).ok_or(CertificateError::NotMember)?;
        if owner.role != MemberRole::Replica {
            return Err(CertificateError::NotMember);
        }
        if matches!(self.mandate, Mandate::Genesis(_)) != (seq == Seq(1)) {
            return Err(CertificateError::Genesis);
        }
        if self.proposal.members != after.digest() {
            return Err(CertificateError::WrongMembers);
        }
        if self.proposal.ballot <= parent.epoch {
            return Err(CertificateError::OldBallot);
        }
        let signed = self.signed_bytes(seq, &parent.digest);
        if owner.key.verify(EPOCH_START_LABEL, &signed, &self.signature).is_err() {
            return Err(CertificateError::OwnerSignature);
        }
        match &self.mandate {
            Mandate::Votes(votes) => verify_votes(&self.proposal, votes, parent, before),
            Mandate::Genesis(_) | Mandate::Forced(_) => Ok(()),
        }
    }
}

/// Checks that `votes` entitle the proposal's candidate to extend `parent`. Those of others than `members` are left
/// out: they are there for whoever knows the list before a change that may not be committed
/// ([`EpochStart::has_majority_of`]).
///
/// # Errors
/// See [`CertificateError`].
pub fn verify_votes(
    proposal: &Proposal,
    votes: &[Vote],
    parent: &Head,
    members: &MemberList,
) -> Result<(), CertificateError> {
    let digest = proposal.digest();
    let mut counted: Vec<Vote> = Vec::new();
    for v in votes {
        let Some(m) = members.get(v.host) else { continue };
        let valid = m.store == v.store && v.proposal == digest && v.counts() && v.is_signed_by(&m.key);
        if !valid || counted.iter().any(|c| c.host == v.host) {
            return Err(CertificateError::BadVote);
        }
        counted.push(v.clone());
    }
    if counted.len() < members.quorum() {
        return Err(CertificateError::NoQuorum);
    }
    adopted_head(&counted, members).map_err(|_| CertificateError::Fork).and_then(|best| {
        if best != *parent {
            Err(CertificateError::NotHighest)
        } else if counted.iter().any(|v| v.commit > parent.rank()) {
            Err(CertificateError::BelowCommit)
        } else if counted.iter().any(|v| v.head.epoch >= proposal.ballot) {
            Err(CertificateError::OldBallot)
        } else {
            Ok(())
        }
    })
}

/// The head to adopt: the highest voted one by (epoch, seq).
///
/// A witness may hold headers of updates whose data is nowhere any more: the owner lost power before
/// it synced, or died before the data members had them. Such a head does not count when the update
/// cannot have been acknowledged, which is so if
/// - fewer data members are missing from the votes than the data copies that a flush needs: f + 1, or
///   one once any voter's head is flagged degraded (a degraded acknowledgement needs the flagged
///   header on a majority of the members, so every quorum knows of it), and
/// - the members with data have not changed between the highest head of a data member and the witness's, so
///   that no copy can be at a member that is not asked.
///
/// # Errors
/// The two heads, when the highest rank was voted with two digests: fork evidence.
pub fn adopted_head(votes: &[Vote], members: &MemberList) -> Result<Head, Box<(Head, Head)>> {
    let holds_data = |h: HostId| members.get(h).is_some_and(|m| m.role == MemberRole::Replica);
    let voted = |h: HostId| votes.iter().any(|v| v.host == h);
    let data = members.data_members().count();
    let absent = members.data_members().filter(|m| !voted(m.host)).count();
    let copies = if votes.iter().any(|v| v.degraded) { 1 } else { members.data_copies().min(data) };
    let with_data = votes.iter().filter(|v| holds_data(v.host)).max_by_key(|v| weight(&v.head));
    let vain = |v: &Vote| {
        let since = with_data.map(|d| d.members_since);
        !holds_data(v.host) && absent < copies && since == Some(v.members_since)
    };
    let counted = |v: &&Vote| !vain(v);
    let best = votes.iter().filter(counted).map(|v| v.head).max_by_key(weight).unwrap_or_default();
    let other = |v: &&Vote| v.head.rank() == best.rank() && v.head.digest != best.digest;
    match votes.iter().filter(counted).find(other) {
        Some(v) => Err(Box::new((best, v.head))),
        None => Ok(best),
    }
}

/// What voted heads are compared by: never by length alone.
fn weight(head: &Head) -> Rank {
    #[cfg(feature = "testing")]
    if crate::weaken::is(crate::weaken::Weakness::HeadsByLength) {
        return (Epoch::default(), head.seq);
    }
    head.rank()
}
