//! What a promotion says about lost flushes (promise 5). It never claims more than it can know.

use std::fmt;

use vmfs_common::Seq;
use vmfs_common::election::Vote;
use vmfs_common::ids::HostId;
use vmfs_common::policy::{Acks, MemberList, MemberRole, OnQuorumLoss};

use crate::machine::Machine;
use crate::meta::Rule;

/// The loss statement of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing acknowledged is missing.
    Nothing,
    /// Later updates are known to have been acknowledged.
    EndsAt {
        /// The last update held.
        seq: Seq,
        /// When the owner made it, nanoseconds since the Unix epoch.
        time_ns: u64,
        /// How many later updates are known to have been acknowledged, when that can be counted.
        later_updates: Option<u64>,
    },
    /// The old owner could acknowledge without anybody who took part in the promotion.
    UnknownAfter {
        /// The last update held.
        seq: Seq,
        /// When the old owner was last heard, nanoseconds since the Unix epoch; after a start without contact, when it
        /// made the last update held.
        time_ns: u64,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing acknowledged is missing"),
            Self::EndsAt { seq, later_updates: Some(n), .. } => {
                write!(f, "ends at update {seq}; {n} later updates had been acknowledged")
            }
            Self::EndsAt { seq, later_updates: None, .. } => {
                write!(f, "ends at update {seq}; later updates had been acknowledged")
            }
            Self::UnknownAfter { seq, .. } => {
                write!(f, "ends at update {seq}; unknown after the last contact with the old owner")
            }
        }
    }
}

/// What the candidate can say with these votes, about the copy it holds now.
pub(crate) fn state(m: &Machine, votes: &[Vote]) -> Loss {
    let head = m.state.head();
    let time_ns = m.state.tip.time_ns;
    let commit = votes.iter().map(|v| v.commit).chain([m.meta.commit]).max().unwrap_or_default();
    if commit > head.rank() {
        let later_updates = (commit.0 == head.epoch).then(|| commit.1.0.saturating_sub(head.seq.0));
        return Loss::EndsAt { seq: head.seq, time_ns, later_updates };
    }
    let voted = |h: HostId| h == m.id.host || votes.iter().any(|v| v.host == h);
    let took_part =
        |h: HostId| h == m.id.host || votes.iter().any(|v| v.host == h && v.head.rank() <= head.rank());
    // The owner's vote carries what it had acknowledged: nothing can be missing beyond it.
    if took_part(m.epoch().host) {
        return Loss::Nothing;
    }
    let rules = [Some(m.rule()), m.previous_rule().cloned()];
    if rules.iter().flatten().any(|r| could_acknowledge(r, m.epoch().host, &voted, &took_part)) {
        // Whoever made the last update was there then. Neither another owner's contact nor what was cut says more.
        let heard = m.owner_heard.filter(|(host, _)| *host == head.epoch.host);
        return Loss::UnknownAfter { seq: head.seq, time_ns: heard.map_or(time_ns, |(_, at_ns)| at_ns) };
    }
    Loss::Nothing
}

/// Could the owner have had a flush acknowledged without anybody who took part? `voted`: who knows of the election.
fn could_acknowledge(
    rule: &Rule,
    owner: HostId,
    voted: &dyn Fn(HostId) -> bool,
    took_part: &dyn Fn(HostId) -> bool,
) -> bool {
    let list: &MemberList = &rule.members;
    if rule.policy.acks == Acks::Local {
        return !took_part(owner);
    }
    // Half of the members can add one, remove one or change the policy, and go on without the others; a quorum would
    // have to hear of it.
    if list.all().iter().filter(|m| voted(m.host)).count() < list.quorum() {
        return true;
    }
    let absent = list.all().iter().filter(|m| !took_part(m.host));
    let (headers, data) =
        absent.fold((0, 0), |(h, d), m| (h + 1, d + usize::from(m.role == MemberRole::Replica)));
    let (need_headers, need_data) = quorum_of(rule, rule.policy.on_quorum_loss == OnQuorumLoss::Degrade);
    headers >= need_headers && data >= need_data
}

/// Headers and data copies that a commit needs; `degraded`: as few as the policy ever allows.
pub(crate) fn quorum_of(rule: &Rule, degraded: bool) -> (usize, usize) {
    let list = &rule.members;
    let data = list.data_members().count();
    let need_data = list.data_copies().min(data);
    match degraded {
        false => (list.quorum(), need_data),
        true if list.len() == 2 && data == 2 => (1, 1),
        true => (list.quorum(), 1),
    }
}
