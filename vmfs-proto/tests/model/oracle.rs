//! What must hold, judged from outside: by what hosts have said and what their logs hold, never by
//! what the machines think.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmfs_common::msg::ImageMsg;
use vmfs_common::{Epoch, Head, Seq};
use vmfs_proto::testing::At;
use vmfs_proto::{Loss, Machine, OpError, OpOutcome};

use crate::host::Host;

#[derive(Debug, Clone, Default, Hash)]
pub(crate) struct Oracle {
    /// Flushes that wait: where, and for what.
    asked: BTreeMap<u64, (At, Head)>,
    /// Acknowledged flush targets, and the epoch that acknowledged them.
    pub(crate) acknowledged: BTreeSet<(Epoch, Head)>,
    /// The highest epoch that has been served.
    pub(crate) opened: Epoch,
    /// The first update that an epoch's owner made after a later epoch had been served.
    late: BTreeMap<Epoch, Seq>,
    /// Hand-overs and changes of members that were answered with success.
    pub(crate) handed_over: bool,
    pub(crate) changed: bool,
    /// The first thing that was wrong.
    pub(crate) violation: Option<&'static str>,
}

pub(crate) const FLUSH_LOST: &str = "a later owner lacks an acknowledged flush";
pub(crate) const TWO_OWNERS: &str = "two owners had flushes acknowledged at the same time";
const NOTHING_MISSING: &str = "a promotion said that nothing is missing, and an acknowledged flush is";
pub(crate) const BELOW_PROMISE: &str = "a member acknowledged an epoch below its promise";

impl Oracle {
    pub(crate) fn flush_begins(&mut self, token: u64, at: At, target: Head) {
        self.asked.insert(token, (at, target));
    }

    pub(crate) fn forget_flushes(&mut self, at: At) {
        self.asked.retain(|_, (who, _)| *who != at);
    }

    fn is_wrong(&mut self, what: &'static str) {
        self.violation.get_or_insert(what);
    }

    /// An owner has appended an update of its own.
    pub(crate) fn appended(&mut self, head: Head) {
        if head.epoch < self.opened {
            self.late.entry(head.epoch).or_insert(head.seq);
        }
    }

    /// A host says something.
    pub(crate) fn sent(&mut self, host: &mut Host, msg: &ImageMsg) {
        let promised = host.record.as_ref().map(|r| r.promised).unwrap_or_default();
        match msg {
            ImageMsg::Ack { head, .. } => {
                if head.epoch < host.said.voted {
                    self.is_wrong(BELOW_PROMISE);
                }
                if host
                    .log
                    .get(..host.synced)
                    .is_none_or(|l| crate::host::head_at(l, head.seq) != Some(*head))
                {
                    self.is_wrong("a member acknowledged what is not durable");
                }
            }
            ImageMsg::Voted { vote, .. } => {
                let ballot = host.machine.as_ref().map_or(promised, Machine::promised_ballot);
                if ballot < host.said.voted {
                    self.is_wrong("a member voted below its promise");
                }
                if host.log.get(..host.synced).is_none_or(|l| {
                    vote.head.seq > Seq::ZERO && crate::host::head_at(l, vote.head.seq) != Some(vote.head)
                }) {
                    self.is_wrong("a vote names a head that is not durable");
                }
                host.said.voted = host.said.voted.max(ballot);
            }
            ImageMsg::Propose { proposal, .. } => {
                let mine = (proposal.ballot, proposal.digest());
                let known = host.said.proposed.replace(mine);
                if known.is_some_and(|k| k.0 > mine.0 || (k.0 == mine.0 && k.1 != mine.1)) {
                    self.is_wrong("a ballot was used twice");
                }
                host.said.voted = host.said.voted.max(proposal.ballot);
            }
            _ => {}
        }
    }

    pub(crate) fn flush_done(&mut self, token: u64, good: bool, hosts: &[Arc<Host>], at: At) {
        let Some((_, target)) = self.asked.remove(&token) else { return };
        if !good || target.seq == Seq::ZERO {
            return;
        }
        let by = hosts[at].head().epoch;
        if !hosts[at].holds(&target) {
            self.is_wrong("a flush was acknowledged that the owner's chain does not hold");
        }
        if self.late.get(&by).is_some_and(|first| *first <= target.seq) {
            self.is_wrong(TWO_OWNERS);
        }
        self.acknowledged.insert((by, target));
    }

    pub(crate) fn op_done(&mut self, result: &Result<OpOutcome, OpError>, host: &Host) {
        match result {
            Ok(OpOutcome::HandedOver { .. }) => self.handed_over = true,
            Ok(OpOutcome::Done) => self.changed = true,
            // The answer may come after a later epoch has been served; it speaks of what was before its own.
            Ok(OpOutcome::Promoted { epoch, loss: Loss::Nothing, .. })
                if self.acknowledged.iter().any(|(by, h)| by < epoch && !host.holds(h)) =>
            {
                self.is_wrong(NOTHING_MISSING);
            }
            _ => {}
        }
    }

    /// After every step: copies of equal or higher rank hold what was acknowledged, and copies of equal
    /// rank are equal.
    pub(crate) fn observe(&mut self, hosts: &[Arc<Host>]) {
        for h in hosts {
            let head = h.head();
            for (by, target) in self.acknowledged.clone() {
                if head.rank() >= (by, target.seq) && !h.holds(&target) {
                    self.is_wrong(FLUSH_LOST);
                }
            }
            for o in hosts {
                if head.rank() == o.head().rank() && head != o.head() {
                    self.is_wrong("two updates of one epoch have the same number");
                }
            }
            if h.machine.as_ref().is_some_and(Machine::is_open_owner) {
                self.opened = self.opened.max(head.epoch);
            }
        }
    }
}

impl std::fmt::Display for Oracle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let acks: Vec<String> =
            self.acknowledged.iter().map(|(e, h)| format!("{} by epoch {}", h.seq, e.number)).collect();
        write!(f, "acknowledged: {}; {}", acks.join(", "), self.violation.unwrap_or("nothing wrong"))
    }
}
