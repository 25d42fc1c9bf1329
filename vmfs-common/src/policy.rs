//! Who holds an image, and what its flushes wait for. All of it lives in the chain.

use serde::{Deserialize, Serialize};

use crate::codec::{CodecError, Reader, Writer};
use crate::hash::hash;
use crate::identity::PublicKey;
use crate::ids::{Digest, HostId, StoreId};

/// Most members an image may have.
pub const MEMBERS_MAX: usize = 16;

/// What a flush waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acks {
    /// Headers durable on a majority of the members, data on f + 1 of them.
    #[default]
    Majority,
    /// The owner's own disk only: a failover may lose acknowledged writes.
    Local,
    /// Every member.
    All,
}

/// What happens to flushes while no quorum can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnQuorumLoss {
    /// They wait until the quorum is back.
    #[default]
    Stall,
    /// Fewer data copies are accepted, loudly; never fewer headers than a majority,
    /// except for two members without a witness.
    Degrade,
}

/// What a member keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberRole {
    /// Headers and data: may become owner.
    #[default]
    Replica,
    /// Headers only: votes.
    Witness,
}

/// The rules of one image, in its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ImagePolicy {
    /// What a flush waits for.
    pub acks: Acks,
    /// What a flush does without a quorum.
    pub on_quorum_loss: OnQuorumLoss,
}

impl ImagePolicy {
    /// Appends the canonical form.
    pub fn encode(&self, w: &mut Writer) {
        w.u8(match self.acks {
            Acks::Majority => 1,
            Acks::Local => 2,
            Acks::All => 3,
        });
        w.u8(match self.on_quorum_loss {
            OnQuorumLoss::Stall => 1,
            OnQuorumLoss::Degrade => 2,
        });
    }
    /// Reads the canonical form.
    ///
    /// # Errors
    /// When a code is unknown or bytes are missing.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let acks = match r.u8()? {
            1 => Acks::Majority,
            2 => Acks::Local,
            3 => Acks::All,
            _ => return Err(CodecError::Invalid("acks")),
        };
        let on_quorum_loss = match r.u8()? {
            1 => OnQuorumLoss::Stall,
            2 => OnQuorumLoss::Degrade,
            _ => return Err(CodecError::Invalid("on_quorum_loss")),
        };
        Ok(Self { acks, on_quorum_loss })
    }
}

/// One member of an image: a host *and* its store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The host.
    pub host: HostId,
    /// The store directory it was admitted with.
    pub store: StoreId,
    /// The host's key, pinned: votes are verified with it whatever its certificate says later.
    pub key: PublicKey,
    /// What it keeps.
    pub role: MemberRole,
}

/// The members of an image, ordered by host, each host at most once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct MemberList(Vec<Member>);

impl MemberList {
    /// Orders and checks a list.
    ///
    /// # Errors
    /// A host twice, no or too many members, or no data member.
    pub fn new(mut members: Vec<Member>) -> Result<Self, CodecError> {
        members.sort_by_key(|m| m.host);
        let twice = members.windows(2).any(|w| w[0].host == w[1].host);
        let data = members.iter().any(|m| m.role == MemberRole::Replica);
        if twice || !data || members.len() > MEMBERS_MAX {
            return Err(CodecError::Invalid("member list"));
        }
        Ok(Self(members))
    }
    /// All of them, ordered by host.
    #[must_use]
    pub fn all(&self) -> &[Member] {
        &self.0
    }
    /// The member that is `host`.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<&Member> {
        self.0.iter().find(|m| m.host == host)
    }
    /// Number of members.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// True before the genesis.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// Members that make a majority.
    #[must_use]
    pub fn quorum(&self) -> usize {
        #[cfg(feature = "testing")]
        if crate::weaken::is(crate::weaken::Weakness::QuorumOfHalf) {
            return self.0.len().div_ceil(2);
        }
        self.0.len() / 2 + 1
    }
    /// Data copies a majority flush needs: f + 1 with f = floor((n-1)/2).
    #[must_use]
    pub fn data_copies(&self) -> usize {
        self.0.len().saturating_sub(1) / 2 + 1
    }
    /// Members that hold data.
    pub fn data_members(&self) -> impl Iterator<Item = &Member> {
        self.0.iter().filter(|m| m.role == MemberRole::Replica)
    }
    /// True when the same members hold data in both lists, and flushes need as many copies of it: who
    /// may hold an acknowledged update's data is then the same under both.
    #[must_use]
    pub fn has_data_like(&self, other: &Self) -> bool {
        let copies = |l: &Self| l.data_copies().min(l.data_members().count());
        self.data_members().eq(other.data_members()) && copies(self) == copies(other)
    }
    /// The list with `member` added or replaced.
    ///
    /// # Errors
    /// As [`MemberList::new`].
    pub fn with(&self, member: Member) -> Result<Self, CodecError> {
        let mut v: Vec<_> = self.0.iter().filter(|m| m.host != member.host).cloned().collect();
        v.push(member);
        Self::new(v)
    }
    /// The list without `host`.
    ///
    /// # Errors
    /// As [`MemberList::new`].
    pub fn without(&self, host: HostId) -> Result<Self, CodecError> {
        Self::new(self.0.iter().filter(|m| m.host != host).cloned().collect())
    }
    /// True when `next` follows by adding, removing or replacing one member, or none.
    #[must_use]
    pub fn is_one_change_from(&self, next: &Self) -> bool {
        let changed = |a: &Self, b: &Self| a.0.iter().filter(|m| b.get(m.host) != Some(m)).count();
        let (gone, new) = (changed(self, next), changed(next, self));
        gone <= 1 && new <= 1 && (gone + new <= 1 || self.len() == next.len())
    }
    /// What proposals name the list by.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut w = Writer::new();
        self.encode(&mut w);
        hash("members", &[&w.finish()])
    }
    /// Appends the canonical form.
    pub fn encode(&self, w: &mut Writer) {
        w.count(self.0.len());
        for m in &self.0 {
            w.bytes(m.host.as_bytes());
            w.bytes(m.store.as_bytes());
            w.bytes(&m.key.0);
            w.u8(match m.role {
                MemberRole::Replica => 1,
                MemberRole::Witness => 2,
            });
        }
    }
    /// Reads the canonical form.
    ///
    /// # Errors
    /// When it is not canonical: unordered, a host twice, unknown codes, too many.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, CodecError> {
        let n = r.count(MEMBERS_MAX)?;
        let mut v = Vec::with_capacity(n);
        for _ in 0..n {
            let host = HostId::from_bytes(r.array()?);
            let store = StoreId::from_bytes(r.array()?);
            let key = PublicKey(r.array()?);
            let role = match r.u8()? {
                1 => MemberRole::Replica,
                2 => MemberRole::Witness,
                _ => return Err(CodecError::Invalid("member role")),
            };
            v.push(Member { host, store, key, role });
        }
        let list = Self::new(v.clone())?;
        if list.0 != v || v.iter().any(|m| m.key.host_id() != m.host) {
            return Err(CodecError::Invalid("member list"));
        }
        Ok(list)
    }
}
