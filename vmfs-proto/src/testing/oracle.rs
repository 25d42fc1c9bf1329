//! What must hold, whatever the machines think: flushed updates stay in every later owner's chain,
//! and no two owners have updates acknowledged that do not follow from each other.

use std::collections::{BTreeMap, BTreeSet};

use vmfs_common::{Digest, Epoch, Head};

use crate::api::Token;
use crate::machine::Machine;
use crate::testing::At;
use crate::testing::node::{Node, head_at};

/// The record kept.
#[derive(Debug, Default)]
pub struct Oracle {
    /// Promises are suspended (forced promotion, `acks = local`): nothing is checked.
    pub suspended: bool,
    /// `Sync` messages delivered.
    pub syncs: u64,
    asked: BTreeMap<Token, Head>,
    /// Acknowledged flush targets, and the epoch that acknowledged them (which is what committed
    /// them: they may be older).
    acknowledged: BTreeSet<(Epoch, Head)>,
    /// Epochs that have been served.
    served: BTreeSet<Epoch>,
}

impl Oracle {
    pub(super) fn flush_begins(&mut self, token: Token, target: Head) {
        self.asked.insert(token, target);
    }

    /// Flushes acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    pub(super) fn flush_done(&mut self, token: Token, nodes: &[Node], at: At) {
        let Some(target) = self.asked.get(&token).copied() else { return };
        if target.seq.0 == 0 || self.suspended {
            return;
        }
        assert_eq!(
            head_at(&nodes[at].log, target.seq),
            Some(target),
            "acknowledged, and not in the owner's chain"
        );
        let by = nodes[at].head().epoch;
        if self.acknowledged.insert((by, target)) {
            for n in nodes {
                check_node(n, by, &target);
            }
        }
    }

    /// After every step.
    pub(super) fn observe(&mut self, nodes: &[Node]) {
        if self.suspended {
            return;
        }
        for n in nodes.iter().filter(|n| n.machine.as_ref().is_some_and(Machine::is_open_owner)) {
            if self.served.insert(n.head().epoch) {
                for (_, target) in &self.acknowledged {
                    let held = head_at(&n.log, target.seq).map(|h| h.digest);
                    assert_eq!(
                        held,
                        Some(target.digest),
                        "a new owner lacks the acknowledged update {target:?}"
                    );
                }
            }
        }
    }

    /// At the end of a run: every copy of a later or equal rank holds every acknowledged update.
    pub fn check_all(&self, nodes: &[Node]) {
        for (by, target) in self.acknowledged.iter().filter(|_| !self.suspended) {
            for n in nodes {
                check_node(n, *by, target);
            }
        }
    }
}

/// A copy that ranks at or above an update acknowledged by an epoch contains it.
fn check_node(n: &Node, by: Epoch, target: &Head) {
    let head = n.head();
    if head.rank() >= (by, target.seq) {
        let held: Option<Digest> = head_at(&n.log, target.seq).map(|h| h.digest);
        assert_eq!(held, Some(target.digest), "a copy at {head:?} lacks the acknowledged update {target:?}");
    }
}
