//! The machine's own durable record: promises above all. Encoded here, stored by the engine.

use vmfs_common::chain::{EpochSecret, Share};
use vmfs_common::codec::{CodecError, Reader, Writer};
use vmfs_common::election::{Rank, Vote, decode_head, decode_vote, encode_head, encode_vote};
use vmfs_common::ids::{Digest, Epoch, Head, HostId, Seq};
use vmfs_common::policy::{Acks, ImagePolicy, MEMBERS_MAX, MemberList, OnQuorumLoss};
use vmfs_common::state::ImageState;

const MAGIC: [u8; 4] = *b"VMM1";
const VERSION: u32 = 2;
/// The oldest that is read: it does not say of which members [`AckedSeen`] is.
const VERSION_MIN: u32 = 1;
/// Epochs whose shares are kept.
const SHARES_MAX: usize = 4;
const SHARE_MAX_BYTES: usize = 64;
/// More than the longest record.
const ENCODED_BYTES_MAX: usize = 4096;

/// The members and policy that commits are counted by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) members: MemberList,
    pub(crate) policy: ImagePolicy,
    /// The update that replaced it; zero while that is about to be appended.
    pub(crate) changed_at: Seq,
}

/// The members' acknowledgements as a header stated them, in the order of the list in force there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct AckedSeen {
    /// The header. After a loss of power the copy may end before it.
    pub(crate) at: Rank,
    /// Digest of that list; zero in a record of version 1, where only its length tells.
    pub(crate) members: Digest,
    pub(crate) acked: Vec<Seq>,
}

impl AckedSeen {
    /// What the header `at` says, which `state`'s copy has applied.
    pub(crate) fn note(&mut self, state: &ImageState, at: Rank, acked: &[Seq]) {
        // The digest is taken when it may be another one, not for each update: what was noted before may be of a list
        // changed since, of a tail that was lost, or of another chain.
        let goes_on = at.0 == self.at.0 && at.1 > self.at.1 && self.at.1 > state.config_seq;
        if !goes_on || self.members == Digest::default() {
            self.members = state.members.digest();
        }
        self.at = at;
        acked.clone_into(&mut self.acked);
    }

    /// What a member of `state`'s list has acknowledged, if this was stated of that list.
    pub(crate) fn of(&self, host: HostId, state: &ImageState) -> Option<Rank> {
        let members = state.members.all();
        let same = match self.members == Digest::default() {
            true => self.acked.len() == members.len(),
            false => self.members == state.members.digest(),
        };
        let place = members.iter().position(|m| m.host == host).filter(|_| same)?;
        let seq = self.acked.get(place).filter(|s| **s > Seq::ZERO && self.at.1 > state.config_seq)?;
        Some((self.at.0, *seq))
    }
}

impl Rule {
    /// What is left of it when the copy ends at `to` with the rule `now` in force there: nothing when
    /// the change that replaced it is not part of the copy. A change whose number is not known, because
    /// its maker died before that was durable, counts as the copy's last update.
    pub(crate) fn cut_to(self, to: Seq, now: &Self) -> Option<Self> {
        if self.changed_at > Seq::ZERO && self.changed_at <= to {
            return Some(self);
        }
        let undone = self.members == now.members && self.policy == now.policy;
        (!undone && to > Seq::ZERO).then_some(Self { changed_at: to, ..self })
    }

    /// True when flushes under the new rule could do without somebody that this one asks.
    pub(crate) fn is_weakened_by(&self, members: &MemberList, policy: ImagePolicy) -> bool {
        let acks = |a| match a {
            Acks::Local => 0,
            Acks::Majority => 1,
            Acks::All => 2,
        };
        self.members.all().iter().any(|m| members.get(m.host).is_none())
            || acks(policy.acks) < acks(self.policy.acks)
            || (policy.on_quorum_loss == OnQuorumLoss::Degrade
                && self.policy.on_quorum_loss == OnQuorumLoss::Stall)
    }
}

/// Everything a machine must remember beside the chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Meta {
    /// Highest ballot promised, its own included. Updates of lower epochs are refused for ever.
    /// Durable before the vote is sent, and before the own proposal is.
    pub(crate) promised: Epoch,
    /// The vote that went with it: a retry of the same proposal gets the same vote.
    pub(crate) vote: Option<Vote>,
    /// Secret of the last epoch this host began: published in the next `EpochStart`.
    pub(crate) begun: Option<(Epoch, EpochSecret)>,
    /// Secret of the epoch this host is bidding for. Durable before the proposal is sent.
    pub(crate) bid: Option<(Epoch, EpochSecret)>,
    /// Shares of other owners' secrets, oldest epoch first.
    pub(crate) shares: Vec<(Epoch, Share)>,
    /// Highest commit point seen. Persisted lazily, and with every vote.
    pub(crate) commit: Rank,
    /// Highest head acknowledged to an owner. Persisted lazily; lowered only by a roll-back.
    pub(crate) acked: Rank,
    /// While set, everything above it came from a later owner than it belongs to and is not vouched
    /// for yet: votes name this head, and cut the rest.
    pub(crate) floor: Option<Head>,
    /// The separate lineage this host was forced to start. It votes for no other. Without a host: it was given
    /// up, and the copy waits to be brought back to the quorum's chain.
    pub(crate) forced: Option<Epoch>,
    /// See [`crate::Status::lineage`].
    pub(crate) lineage: u64,
    /// Commitment to the secret of the latest epoch in the chain, to check what shares rebuild.
    pub(crate) secret_hash: (Epoch, Digest),
    /// The rule before the latest change of members or policy, until that is known to be committed.
    /// Until then a weakening counts by both (so this is durable before the owner appends one), and
    /// another chain's certificates may count by this one.
    pub(crate) previous: Option<Rule>,
    /// See [`AckedSeen`]. Persisted with whatever else is.
    pub(crate) acked_seen: AckedSeen,
}

fn put_epoch(w: &mut Writer, e: Epoch) {
    w.u64(e.number);
    w.bytes(e.host.as_bytes());
}
fn get_epoch(r: &mut Reader<'_>) -> Result<Epoch, CodecError> {
    Ok(Epoch { number: r.u64()?, host: HostId::from_bytes(r.array()?) })
}
fn put_secret(w: &mut Writer, s: Option<&(Epoch, EpochSecret)>) {
    w.u8(u8::from(s.is_some()));
    if let Some((e, s)) = s {
        put_epoch(w, *e);
        w.bytes(s.expose());
    }
}
fn get_secret(r: &mut Reader<'_>) -> Result<Option<(Epoch, EpochSecret)>, CodecError> {
    Ok(if r.flag()? { Some((get_epoch(r)?, EpochSecret::from_bytes(r.array()?))) } else { None })
}

impl Meta {
    /// True while the copy is still on a separate lineage that the operator has given up.
    pub(crate) fn has_given_up(&self) -> bool {
        self.forced.is_some_and(|f| f.host == HostId::default())
    }

    /// What was acknowledged beyond `head` was given up on purpose, if all of it is part of the tail that was
    /// cut off there: no data was lost.
    pub(crate) fn forgive(&mut self, head: Rank, cut_off: Option<Head>) {
        if cut_off.is_some_and(|c| c.rank() >= self.acked && c.rank() >= self.acked_seen.at) {
            self.acked = self.acked.min(head);
            if self.acked_seen.at > head {
                self.acked_seen = AckedSeen::default();
            }
        }
    }

    /// Keeps the share of an epoch, and of few epochs before it.
    pub(crate) fn keep_share(&mut self, epoch: Epoch, share: Share) {
        self.shares.retain(|(e, _)| *e != epoch);
        self.shares.push((epoch, share));
        self.shares.sort();
        if self.shares.len() > SHARES_MAX {
            self.shares.remove(0);
        }
    }

    /// Magic, version, fields, CRC-32C of everything before it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // With room for all of it: a vector that grows leaves copies of secrets behind.
        let mut w = Writer::with_capacity(ENCODED_BYTES_MAX);
        w.bytes(&MAGIC);
        w.u32(VERSION);
        put_epoch(&mut w, self.promised);
        w.u8(u8::from(self.vote.is_some()));
        if let Some(v) = &self.vote {
            encode_vote(&mut w, v);
        }
        put_secret(&mut w, self.begun.as_ref());
        put_secret(&mut w, self.bid.as_ref());
        w.count(self.shares.len());
        for (e, s) in &self.shares {
            put_epoch(&mut w, *e);
            w.var(s.expose());
        }
        for (e, s) in [self.commit, self.acked] {
            put_epoch(&mut w, e);
            w.u64(s.0);
        }
        w.u8(u8::from(self.floor.is_some()));
        encode_head(&mut w, &self.floor.unwrap_or_default());
        w.u8(u8::from(self.forced.is_some()));
        put_epoch(&mut w, self.forced.unwrap_or_default());
        w.u64(self.lineage);
        put_epoch(&mut w, self.secret_hash.0);
        w.bytes(self.secret_hash.1.as_bytes());
        w.u8(u8::from(self.previous.is_some()));
        if let Some(rule) = &self.previous {
            rule.members.encode(&mut w);
            rule.policy.encode(&mut w);
            w.u64(rule.changed_at.0);
        }
        put_epoch(&mut w, self.acked_seen.at.0);
        w.u64(self.acked_seen.at.1.0);
        w.bytes(self.acked_seen.members.as_bytes());
        w.count(self.acked_seen.acked.len());
        self.acked_seen.acked.iter().for_each(|s| w.u64(s.0));
        let mut bytes = w.finish();
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads it back.
    ///
    /// # Errors
    /// Damaged, or of another version.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or(CodecError::Truncated)?;
        let mut r = Reader::new(body);
        if r.array::<4>()? != MAGIC {
            return Err(CodecError::Invalid("meta magic"));
        }
        let got = r.u32()?;
        if !(VERSION_MIN..=VERSION).contains(&got) {
            return Err(CodecError::Version { got, known: VERSION });
        }
        if crc32c::crc32c(body).to_le_bytes() != *crc {
            return Err(CodecError::Invalid("meta checksum"));
        }
        let promised = get_epoch(&mut r)?;
        let vote = if r.flag()? { Some(decode_vote(&mut r)?) } else { None };
        let (begun, bid) = (get_secret(&mut r)?, get_secret(&mut r)?);
        let mut shares = Vec::new();
        for _ in 0..r.count(SHARES_MAX)? {
            shares.push((get_epoch(&mut r)?, Share::from_bytes(r.var(SHARE_MAX_BYTES)?.to_vec())));
        }
        let commit = (get_epoch(&mut r)?, Seq(r.u64()?));
        let acked = (get_epoch(&mut r)?, Seq(r.u64()?));
        let (floored, floor) = (r.flag()?, decode_head(&mut r)?);
        let (is_forced, forced) = (r.flag()?, get_epoch(&mut r)?);
        if (!floored && floor != Head::default()) || (!is_forced && forced != Epoch::default()) {
            return Err(CodecError::Invalid("meta record"));
        }
        let lineage = r.u64()?;
        let secret_hash = (get_epoch(&mut r)?, Digest::from_bytes(r.array()?));
        let previous = if r.flag()? {
            Some(Rule {
                members: MemberList::decode(&mut r)?,
                policy: ImagePolicy::decode(&mut r)?,
                changed_at: Seq(r.u64()?),
            })
        } else {
            None
        };
        let acked_at = (get_epoch(&mut r)?, Seq(r.u64()?));
        let acked_of = if got > VERSION_MIN { Digest::from_bytes(r.array()?) } else { Digest::default() };
        let acked_len = r.count(MEMBERS_MAX)?;
        let seen = (0..acked_len).map(|_| r.u64().map(Seq)).collect::<Result<_, _>>()?;
        r.end()?;
        Ok(Self {
            acked_seen: AckedSeen { at: acked_at, members: acked_of, acked: seen },
            promised,
            vote,
            begun,
            bid,
            shares,
            commit,
            acked,
            floor: floored.then_some(floor),
            forced: is_forced.then_some(forced),
            lineage,
            secret_hash,
            previous,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmfs_common::identity::{HostKey, Signature};
    use vmfs_common::ids::StoreId;
    use vmfs_common::policy::{Member, MemberRole};

    /// Seed 3207 of the simulator: the power failed between a roll-back and the record of it, and the copy was
    /// taken for one that had lost data, and counted in no election.
    #[test]
    fn what_was_cut_off_on_purpose_is_not_taken_for_lost() {
        let e = |number| Epoch { number, ..Epoch::default() };
        let (kept, acked) = ((e(1), Seq(5)), (e(1), Seq(9)));
        let before = Meta {
            acked,
            acked_seen: AckedSeen { at: acked, acked: vec![Seq(9)], ..AckedSeen::default() },
            ..Meta::default()
        };
        let tail = |seq| Some(Head { epoch: e(1), seq: Seq(seq), digest: Digest::default() });
        let mut cut = before.clone();
        cut.forgive(kept, tail(12));
        assert_eq!((cut.acked, cut.acked_seen), (kept, AckedSeen::default()));
        for other in [None, tail(8)] {
            let mut lost = before.clone();
            lost.forgive(kept, other);
            assert_eq!(lost, before, "nobody knows where the rest of it is: {other:?}");
        }
    }

    #[test]
    fn the_meta_record_round_trips_and_damage_is_noticed() {
        let e = |n| Epoch { number: n, host: HostId::from_bytes([u8::try_from(n).unwrap(); 16]) };
        let head = Head { epoch: e(2), seq: Seq(9), digest: Digest::from_bytes([3; 32]) };
        let mut m = Meta {
            promised: e(4),
            vote: Some(Vote {
                proposal: Digest::from_bytes([1; 32]),
                host: HostId::from_bytes([1; 16]),
                store: StoreId::from_bytes([2; 16]),
                head,
                commit: (e(2), Seq(8)),
                acked: (e(2), Seq(9)),
                degraded: true,
                members_since: Digest::from_bytes([6; 32]),
                signature: Signature([7; 64]),
            }),
            begun: Some((e(1), EpochSecret::from_bytes([5; 32]))),
            bid: None,
            commit: (e(2), Seq(8)),
            acked: (e(2), Seq(9)),
            floor: Some(head),
            forced: Some(e(3)),
            lineage: 6,
            acked_seen: AckedSeen {
                at: (e(2), Seq(9)),
                members: Digest::from_bytes([9; 32]),
                acked: vec![Seq(7), Seq(0)],
            },
            secret_hash: (e(2), Digest::from_bytes([8; 32])),
            ..Meta::default()
        };
        for n in 1..8 {
            m.keep_share(e(n), Share::from_bytes(vec![u8::try_from(n).unwrap(); 33]));
        }
        assert_eq!(m.shares.len(), SHARES_MAX);
        let bytes = m.encode();
        assert_eq!(bytes.capacity(), ENCODED_BYTES_MAX, "it never grew");
        let shown = format!("{m:?}");
        assert!(!shown.contains("5, 5, 5") && !shown.contains("7, 7, 7"), "{shown}");
        assert_eq!(Meta::decode(&bytes), Ok(m));
        for i in 0..bytes.len() {
            let mut bent = bytes.clone();
            bent[i] ^= 0x40;
            assert!(Meta::decode(&bent).is_err(), "byte {i}");
        }
        assert!(Meta::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(Meta::decode(&[]).is_err());
        assert_eq!(Meta::decode(&Meta::default().encode()), Ok(Meta::default()));
    }

    fn state(members: std::ops::RangeInclusive<u8>) -> ImageState {
        let member = |n: u8| {
            let (key, store) = (HostKey::from_seed([n; 32]), StoreId::from_bytes([n; 16]));
            Member { host: key.host_id(), store, key: key.public(), role: MemberRole::Replica }
        };
        ImageState {
            members: MemberList::new(members.map(member).collect()).unwrap(),
            ..ImageState::default()
        }
    }

    #[test]
    fn what_was_noted_of_a_lost_chain_says_nothing_of_the_list_of_another() {
        let e = |number| Epoch { number, ..Epoch::default() };
        let changed_at = |state: ImageState, seq| ImageState { config_seq: Seq(seq), ..state };
        let (lost, kept) = (changed_at(state(1..=2), 5), changed_at(state(2..=3), 6));
        let mut seen = AckedSeen::default();
        seen.note(&lost, (e(1), Seq(9)), &[Seq(8), Seq(9)]);
        assert_eq!(seen.of(kept.members.all()[0].host, &kept), None);
        // The other chain has gone on beyond it, by a list that was changed before.
        seen.note(&kept, (e(2), Seq(12)), &[Seq(11), Seq(12)]);
        assert_eq!(seen.of(kept.members.all()[0].host, &kept), Some((e(2), Seq(11))));
        assert_eq!(seen.of(lost.members.all()[0].host, &lost), None);
    }

    /// One that lacks the digest of the members is taken by their number.
    #[test]
    fn a_record_of_version_1_is_read() {
        let e = Epoch { number: 2, ..Epoch::default() };
        let acked_seen = AckedSeen { at: (e, Seq(9)), acked: vec![Seq(7), Seq(8)], ..AckedSeen::default() };
        let new = Meta { acked: (e, Seq(8)), acked_seen, ..Meta::default() };
        let mut old = new.encode();
        old.truncate(old.len() - 4);
        old[4..8].copy_from_slice(&1_u32.to_le_bytes());
        let list = size_of::<u32>() + 2 * size_of::<u64>();
        let digest = old.len() - list - Digest::LEN..old.len() - list;
        assert!(old[digest.clone()].iter().all(|b| *b == 0));
        old.drain(digest);
        let crc = crc32c::crc32c(&old);
        old.extend_from_slice(&crc.to_le_bytes());
        assert_eq!(Meta::decode(&old).as_ref(), Ok(&new));
        let of = |state: &ImageState| new.acked_seen.of(state.members.all()[1].host, state);
        assert_eq!((of(&state(1..=2)), of(&state(1..=3))), (Some((e, Seq(8))), None));
    }
}
