//! Liveness: faults stop, everything is healed, and the cluster must come to identical copies.

use vmfs_common::chain::Refusal;
use vmfs_common::policy::MemberRole;
use vmfs_proto::{Input, OpError};

use super::At;
use super::check::Check;
use super::model::BLOCKS;
use super::world::World;

/// A damaged disk that keeps the copies from becoming identical is replaced after this.
const DISK_PATIENCE_MS: u64 = 60_000;

/// Virtual time within which an owner must serve, and copies must be identical, after the healing. A
/// member whose own failed bids stand above a serving owner's epoch waits for that owner's next bid,
/// which it puts off for up to 410 s (`4 * rebid_ms << 8`) while it has a quorum without that member.
const BOUND_MS: u64 = 600_000;

impl World {
    /// Heals everything and demands an owner, an acknowledged flush, and identical copies.
    pub(crate) fn converge(&mut self) {
        self.heal();
        let deadline = self.now + BOUND_MS * 1000;
        if self.model.updates() == 0
            || (0..self.hosts.len()).all(|at| self.known_seq(at) == 0 && self.is_empty(at))
        {
            return;
        }
        let mut ordered = None;
        let mut checked = self.now;
        while self.violation.is_none() && !(self.is_settled() && self.is_clean()) {
            if self.now > checked + DISK_PATIENCE_MS * 1000 {
                checked = self.now;
                self.is_clean();
            }
            if self.now > deadline && self.is_evident() {
                self.counts.evident += 1;
                break;
            }
            if self.now > deadline {
                let roles = self.describe();
                let what = format!("not converged {BOUND_MS} ms after the last fault\n{roles}");
                return self.fail(Check::Converges, what);
            }
            ordered = self.tend(ordered);
            self.run(250_000);
        }
        for at in 0..self.hosts.len() {
            self.check_copy(at, 0, BLOCKS);
            self.check_pinned(at);
            self.check_pinned(at);
            self.check_forks(at);
            self.scrub(at);
            self.verify(at);
        }
    }

    /// The bad disk holds nothing damaged any more; when it cannot be repaired, the operator replaces it.
    fn is_clean(&mut self) -> bool {
        let Some(at) = self.hosts.iter().position(|h| h.bad_disk && h.copy().is_some()) else { return true };
        let clean = self.scrub(at);
        if !clean {
            self.replace_disk(at);
        }
        clean
    }

    /// A lie, or a disk that lost what was acknowledged, has led to histories that cannot be brought together,
    /// and the machines say so: an operator has to choose.
    fn is_evident(&self) -> bool {
        if self.oracle.bereft {
            return true;
        }
        if self.hosts.iter().all(super::host::Host::is_sound) {
            return false;
        }
        let says = |m: &vmfs_proto::Machine, now| m.status(now).refusals.contains_key(&Refusal::Fork);
        self.hosts.iter().any(|h| h.machine().is_some_and(|m| says(m, h.now(self.now))))
            || self.oracle.answers.values().any(|a| {
                matches!(a, Err(OpError::Fork(_) | OpError::BelowCommit { .. } | OpError::DataMissing { .. }))
            })
    }

    fn known_seq(&self, at: At) -> u64 {
        self.model.node(self.hosts[at].known.durable).head.seq.0
    }
    fn is_empty(&self, at: At) -> bool {
        self.hosts[at].copy().is_none_or(|c| c.store.head().seq.0 == 0)
    }

    fn heal(&mut self) {
        self.note(|| "everything is healed".to_owned());
        let n = self.hosts.len();
        self.reform();
        for at in 0..n {
            for peer in 0..n {
                self.set_open(at, peer, true);
                if at != peer {
                    let delay = 100 + self.rng.below(1000);
                    let way = self.net.way(at, peer);
                    (way.delay, way.rate) = (delay, 0);
                }
            }
            if self.hosts[at].stop_call.is_some() {
                self.power_cut(at);
            }
            self.hosts[at].disk.stop_at_call(None);
            self.hosts[at].stop_call = None;
            self.mend_disk(at);
        }
        self.run(3_000_000);
        for at in 0..n {
            if self.hosts[at].machine().is_some_and(|m| m.describe_role() == "failed") {
                self.kill(at);
            }
        }
        self.run(3_000_000);
    }

    /// What an operator does to get the image going again.
    fn tend(&mut self, ordered: Option<u64>) -> Option<u64> {
        let waiting = ordered.is_some_and(|t| !self.oracle.answers.contains_key(&t));
        if waiting && self.rng.below(20) > 0 {
            return ordered;
        }
        let n = self.hosts.len();
        let now = self.now;
        // Separate lineages are given up, unless nothing else is left.
        let forced =
            |w: &Self, at: At| w.hosts[at].machine().is_some_and(|m| m.status(w.hosts[at].now(now)).forced);
        let unforced = (0..n)
            .any(|at| self.hosts[at].role == MemberRole::Replica && !forced(self, at) && !self.is_empty(at));
        if let Some(at) = (0..n).find(|at| forced(self, *at)).filter(|_| unforced) {
            return self.order(at, |token| Input::AbandonForced { token });
        }
        match self.owner() {
            Some(owner) => self.tend_members(owner),
            None => {
                // The data member with the highest head is promoted.
                let best = (0..n)
                    .filter(|at| {
                        let copy = self.hosts[*at].copy();
                        !self.oracle.unfit.contains(at)
                            && copy.is_some_and(|c| c.store.kind() == MemberRole::Replica)
                    })
                    .max_by_key(|at| self.hosts[*at].machine().map(|m| m.state().head().rank()))?;
                let bidding = (0..n).any(|at| {
                    self.hosts[at].machine().is_some_and(|m| m.describe_role().starts_with("candidate"))
                });
                if bidding && self.rng.below(40) > 0 {
                    return None;
                }
                let token = self.order(best, |token| Input::Promote { force: false, token })?;
                if self.oracle.answers.get(&token) == Some(&Err(OpError::NotDataMember)) {
                    // Its copy is higher, and on a lineage that was given up.
                    self.oracle.unfit.insert(best);
                }
                Some(token)
            }
        }
    }

    /// Members whose disk was replaced are removed and added.
    fn tend_members(&mut self, owner: At) -> Option<u64> {
        let members = self.hosts[owner].machine()?.state().members.clone();
        for m in members.all() {
            let at = self.at(m.host)?;
            if self.hosts[at].id.store != m.store {
                let host = m.host;
                return self.order(owner, |token| Input::RemoveMember { host, token });
            }
        }
        None
    }

    /// One owner serves, everything is flushed, and every member has it.
    fn is_settled(&mut self) -> bool {
        let Some(owner) = self.owner() else { return false };
        let state = self.hosts[owner].machine().expect("invariant: it serves").state().clone();
        if self.settled_at(owner, &state) {
            return true;
        }
        // Something new to spread, every now and then.
        if self.rng.one_in(8) {
            self.write(owner);
            self.flush(owner);
        }
        false
    }

    fn settled_at(&self, owner: At, state: &vmfs_common::state::ImageState) -> bool {
        let head = state.head();
        let flushed = self.oracle.acked_seq(head.epoch);
        let status = self.hosts[owner].machine().map(|m| m.status(self.hosts[owner].now(self.now)));
        let quiet = status.is_some_and(|s| s.commit == head.seq && s.flushes_waiting == 0);
        quiet
            && flushed
            && state.members.all().iter().all(|m| {
                let host = self.hosts.iter().find(|h| h.id.host == m.host && h.id.store == m.store);
                host.and_then(super::host::Host::copy).is_some_and(|c| {
                    c.store.durable_head() == head && c.store.head() == head && c.pull.is_none()
                })
            })
    }

    fn verify(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let store = copy.store.clone();
        match store.verify(&mut |_, _| {}) {
            // Damage to the log beside the content lasts until the log is trimmed.
            Ok(r) if r.bad_blocks.is_empty() && (r.bad_updates.is_empty() || self.hosts[at].bad_disk) => {}
            Ok(r) => self.fail(Check::CopyVerifies, format!("host {at} does not verify: {r:?}")),
            Err(e) => self.store_error(at, &e, "verifying"),
        }
    }

    fn describe(&self) -> String {
        let mut text = String::new();
        for (at, h) in self.hosts.iter().enumerate() {
            let head = h.copy().map(|c| c.store.head());
            let latched = h.copy().and_then(|c| c.store.latched());
            let role = h.machine().map(|m| (m.status(h.now(self.now)).health, m.describe_role()));
            text +=
                &format!("    {at} {:?} up {} {head:?} {latched:?} {role:?}\n", h.role, h.running.is_some());
        }
        text
    }
}
