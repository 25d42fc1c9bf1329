//! What must hold, whatever the machines and the stores think. Checked after every step.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmfs_common::header::Update;
use vmfs_common::msg::ImageMsg;
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, Epoch, Head, Seq};
use vmfs_proto::{FlushError, OpError, OpOutcome};
use vmfs_store::{ForkInfo, Store};

use super::At;
use super::broken::Broken;
use super::check::Check;
use super::host::IMAGE;
use super::link::Packet;
use super::model::{BLOCKS, Effect, FIRST_BLOCK, Ix, size_bytes};
use super::tenure::{Acked, Served};
use super::world::World;

/// Packets remembered for replays.
const HEARD_MAX: usize = 64;

/// The record kept.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    pub(crate) asked: BTreeMap<u64, (Ix, bool)>,
    pub(crate) acked: Vec<Acked>,
    /// Owners that have served.
    pub(crate) served: BTreeMap<Epoch, Served>,
    /// What was ever durable at a host: the last update of each branch.
    pub(crate) ever_durable: BTreeMap<At, Vec<Ix>>,
    /// Some policy in the run allows acknowledged flushes to be lost with one host.
    pub(crate) lax_ever: bool,
    pub(crate) answers: BTreeMap<u64, Result<OpOutcome, OpError>>,
    pub(crate) flushed: BTreeMap<u64, Result<(), FlushError>>,
    /// A disk was lost or damaged: the number of copies cannot be relied on.
    pub(crate) wiped: bool,
    /// Fewer members with data are left than a flush needs copies: only an operator's force goes on.
    pub(crate) bereft: bool,
    /// Hosts that the operator knows not to be fit for promotion.
    pub(crate) unfit: std::collections::BTreeSet<At>,
    pub(crate) heard: Vec<(At, At, Packet)>,
    /// Of them, proposals and votes, which are rare and kept for longer.
    pub(crate) heard_votes: Vec<(At, At, Packet)>,
    pub(crate) proposals: BTreeMap<Digest, Epoch>,
    /// Flushes whose failure was kept back, where that is what is broken.
    pub(crate) kept_waiting: Vec<(At, u64)>,
}

impl World {
    /// An owner has made an update.
    pub(crate) fn made(&mut self, at: At, update: &Update, effect: Effect, forced: bool) {
        self.note(|| {
            let text: String = format!("{:?}", update.header.op).chars().take(60).collect();
            format!("{at} makes {} of {}: {text}", update.header.seq, update.header.epoch)
        });
        if self.hosts[at].liar {
            self.liar_made(at, update, &effect);
        }
        let members = self.hosts[at].machine().map_or(0, |m| m.state().members.len());
        self.note_policy(&update.header.op, members);
        self.make_a_second(update);
        let bent = self.bent_update(update);
        let update = bent.as_ref().unwrap_or(update);
        let beside = self.model.has_successor(update.header.parent, update.header.epoch);
        if beside && !self.hosts[at].liar && self.model.find(update.head()).is_none() {
            let what = format!("host {at} makes {:?} beside another one", update.head());
            self.fail(Check::MadeOneSuccessor, what);
        }
        match self.model.add(update.head(), update.header.parent, effect, update.header.time_ns, forced) {
            Ok(ix) if matches!(update.header.op, Op::EpochStart(_) | Op::Members(_) | Op::Policy(_)) => {
                self.hosts[at].known.rule_since = ix;
            }
            Ok(_) => {}
            Err((check, e)) => self.fail(check, format!("host {at}: {e}")),
        }
    }

    /// A copy has taken an update.
    pub(crate) fn taken(&mut self, at: At, update: &Update) {
        if self.model.find(update.head()).is_none() {
            let what = format!("host {at} has taken an update that no owner made: {:?}", update.head());
            self.fail(Check::TakenWasMade, what);
        }
    }

    pub(crate) fn head_ix(&mut self, at: At, head: Head) -> Option<Ix> {
        let ix = self.model.find(head);
        if ix.is_none() {
            self.fail(Check::HeadWasMade, format!("host {at} holds {head:?}, which no owner ever made"));
        }
        ix
    }

    /// Everything up to `head` is durable at a host, as its store says.
    pub(crate) fn durable(&mut self, at: At, head: Head) {
        if let Some(ix) = self.head_ix(at, head) {
            self.hosts[at].known.durable = ix;
            let model = &self.model;
            let ever = self.oracle.ever_durable.entry(at).or_default();
            ever.retain(|e| !model.contains(ix, *e));
            ever.push(ix);
        }
    }

    /// A copy is about to go to another head.
    pub(crate) fn cutting(&mut self, at: At, to: Head) {
        self.hosts[at].known.cutting = self.head_ix(at, to);
    }

    /// A copy went from one head to another that need not contain it. What its log, which began with `log_start`, held
    /// of the tail becomes a fork (content that was copied as blocks comes without updates, and cannot).
    pub(crate) fn cut(&mut self, at: At, from: Head, to: Head, fork: Option<&ForkInfo>, log_start: Seq) {
        let retained = log_start <= from.seq;
        let (Some(old), Some(new)) = (self.head_ix(at, from), self.head_ix(at, to)) else { return };
        self.hosts[at].known.durable = new;
        self.hosts[at].known.cutting = None;
        // What was copied as blocks came without updates: of it, only the part after it can be kept.
        let copied = self.hosts[at].known.copied;
        // Nor can a store tell where two histories part that one lying owner has signed.
        let whole =
            self.model.contains(new, copied) && !self.model.split_by_force(old, new) && !self.lying.beyond;
        // A copy that took one of two updates that a lying owner has signed need not know of the other.
        let unnoticed = fork.is_none() && self.lying.beyond;
        if !self.model.contains(new, old) && retained && !unnoticed {
            match fork {
                None => {
                    let what = format!("host {at} cut {from:?} down to {to:?} and kept no fork");
                    self.fail(Check::TailIsKept, what);
                }
                Some(f) if f.head != from => {
                    let what = format!("host {at} cut {from:?}, and the fork ends at {:?}", f.head);
                    self.fail(Check::ForkEndsAtTail, what);
                }
                // What was committed in a separate lineage alone may be gone from its log, and so may be what a
                // witness held of updates that no data member of a later election had.
                Some(f)
                    if whole
                        && f.ancestor.seq.next() != log_start
                        && self.model.find(f.ancestor).is_none_or(|a| !self.model.contains(new, a)) =>
                {
                    let (f, common) = (f.clone(), self.model.node(self.model.common(old, new)).head.seq);
                    let what = format!("the fork of host {at} does not begin at {common}: {f:?}");
                    self.fail(Check::ForkBeginsInCopy, what);
                }
                Some(_) => self.counts.forks += 1,
            }
        }
        if let Some(f) = fork {
            self.hosts[at].known.forks.insert(f.name.clone());
            self.check_forks(at);
        }
        self.check_copy(at, 0, BLOCKS);
    }

    /// Every fork that a tail was kept as is listed, and whole.
    pub(crate) fn check_forks(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let store = copy.store.clone();
        let listed = store.forks();
        let missing =
            self.hosts[at].known.forks.iter().find(|n| !listed.iter().any(|f| f.name == **n)).cloned();
        if let Some(name) = missing {
            return self.fail(Check::ForkIsListed, format!("host {at} no longer lists the fork {name}"));
        }
        for fork in listed {
            let Some(head) = self.head_ix(at, fork.head) else { return };
            let mut next = fork.ancestor.seq.next();
            while next <= fork.head.seq {
                let entries = match self.read_fork(&store, &fork, next) {
                    Ok(entries) if !entries.is_empty() => entries,
                    Ok(_) => {
                        let what = format!("fork {} of host {at} ends before {next}", fork.name);
                        return self.fail(Check::ForkIsWhole, what);
                    }
                    Err(e) => {
                        return self.store_error(at, &e, "reading a fork");
                    }
                };
                for e in entries {
                    let known = self.model.find(e.update.head());
                    if known.is_none_or(|ix| !self.model.contains(head, ix)) {
                        let what = format!("fork {} of host {at} holds a foreign update", fork.name);
                        return self.fail(Check::ForkIsPure, what);
                    }
                    next = e.update.header.seq.next();
                }
            }
        }
    }

    /// Reads blocks of a copy and compares them with the state after the update it claims to be at.
    pub(crate) fn check_copy(&mut self, at: At, first: usize, count: usize) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let store = copy.store.clone();
        let head = store.head();
        let Some(ix) = self.head_ix(at, head) else { return };
        let size = size_bytes(self.model.node(ix).blocks);
        if store.state().size_bytes != size {
            let what = format!("host {at} at {head:?} has {} bytes, not {size}", store.state().size_bytes);
            self.fail(Check::SizeIsRight, what);
        }
        if store.kind() == MemberRole::Witness {
            return;
        }
        let mut bytes = vec![0u8; count * BLOCK_BYTES];
        if let Err(e) = store.read(BlockIndex(FIRST_BLOCK + first as u64), &mut bytes) {
            return self.store_error(at, &e, "reading blocks");
        }
        self.counts.blocks_checked += count as u64;
        if let Err(e) = self.model.check(ix, first, &bytes) {
            self.fail(Check::BlocksAreRight, format!("host {at}: {e}"));
        }
    }

    /// Pins the present state, or checks the pinned one.
    pub(crate) fn check_pinned(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        if copy.store.kind() == MemberRole::Witness {
            return;
        }
        let Some((view, ix)) = copy.pinned.take() else {
            let view = copy.store.view();
            if let Some(ix) = self.head_ix(at, view.head())
                && let Some(copy) = self.hosts[at].copy_mut()
            {
                copy.pinned = Some((view, ix));
            }
            return;
        };
        let mut bytes = vec![0u8; BLOCKS * BLOCK_BYTES];
        let read = match self.hosts[at].copy() {
            Some(copy) if self.is_broken(Broken::ViewNotPinned) => {
                copy.store.read(BlockIndex(FIRST_BLOCK), &mut bytes)
            }
            _ => view.read(BlockIndex(FIRST_BLOCK), &mut bytes),
        };
        match read {
            Ok(()) => {
                if let Err(e) = self.model.check(ix, 0, &bytes) {
                    self.fail(Check::PinnedIsRight, format!("a pinned state of host {at}: {e}"));
                }
            }
            Err(e) => self.store_error(at, &e, "reading a pinned state"),
        }
    }

    /// A store was opened: what was durable is there, and nothing that nobody made.
    pub(crate) fn check_reopened(&mut self, at: At, store: &Arc<Store>) {
        let damaged = store.damaged();
        let bad_disk = self.hosts[at].bad_disk;
        if !damaged.is_empty() && bad_disk {
            // Found, and said: the operator replaces the disk.
            return self.replace_disk(at);
        }
        if !damaged.is_empty() && self.hosts[at].is_excused() {
            // An error of the disk keeps it from being opened; the next start tries again.
            return self.kill(at);
        }
        if !damaged.is_empty() {
            let what = format!("host {at} finds its image damaged after a restart: {damaged:?}");
            return self.fail(Check::ImageIsUndamaged, what);
        }
        let known = &self.hosts[at].known;
        let meta = store.get_meta(IMAGE).map(|m| m.to_vec());
        let good = meta == known.meta || (meta.is_some() && meta == known.meta_maybe);
        let durable = known.durable;
        if !good && bad_disk {
            self.hosts[at].known.vote = None;
        } else if !good {
            let what = format!("host {at} has lost its promises in a restart");
            return self.fail(Check::PromisesSurvive, what);
        }
        self.hosts[at].known.meta = meta;
        let Some(copy) = store.image(IMAGE) else {
            if durable != 0 && !bad_disk {
                self.fail(Check::CopySurvives, format!("host {at} has lost its copy in a restart"));
            }
            return;
        };
        let head = copy.head();
        let Some(ix) = self.head_ix(at, head) else { return };
        let cut = self.hosts[at].known.cutting.take().is_some_and(|to| self.model.contains(ix, to));
        let forked = copy
            .forks()
            .iter()
            .any(|f| self.model.find(f.head).is_some_and(|head| self.model.contains(head, durable)));
        if !self.model.contains(ix, durable) && !bad_disk && !(cut && (forked || copy.log_start() > head.seq))
        {
            let had = self.model.node(durable).head;
            let what = format!("host {at} had {had:?} durable and restarts with {head:?}");
            return self.fail(Check::DurableSurvives, what);
        }
        if copy.durable_head() != head {
            let what = format!("host {at} restarts with a head that is not durable");
            return self.fail(Check::RestartIsDurable, what);
        }
        self.hosts[at].known.durable = ix;
        let listed: Vec<String> = copy.forks().iter().map(|f| f.name.clone()).collect();
        let lost = self.hosts[at].known.forks.iter().find(|n| !listed.contains(n)).cloned();
        match lost {
            Some(_) if bad_disk => self.hosts[at].known.forks.retain(|n| listed.contains(n)),
            Some(name) => {
                let what = format!("host {at} has lost the fork {name} in a restart");
                self.fail(Check::ForkSurvives, what);
            }
            None => {}
        }
    }

    /// What a host says of itself: nothing before it is durable, no promise broken.
    pub(crate) fn check_said(&mut self, at: At, msg: &ImageMsg) {
        if let ImageMsg::Propose { proposal, .. } = msg {
            self.oracle.proposals.insert(proposal.digest(), proposal.ballot);
        }
        if self.hosts[at].bad_disk {
            return;
        }
        let known = &self.hosts[at].known;
        match msg {
            ImageMsg::Ack { head, .. } => {
                if self.model.find(*head).is_none_or(|ix| !self.model.contains(known.durable, ix)) {
                    let durable = self.model.node(known.durable).head;
                    let what = format!("host {at} acknowledges {head:?} with {durable:?} durable");
                    self.fail(Check::AckIsDurable, what);
                } else if let Some((ballot, _, _)) = known.vote
                    && head.epoch < ballot
                {
                    let what = format!("host {at} acknowledges {head:?} after a vote for {ballot}");
                    self.fail(Check::AckKeepsPromise, what);
                }
            }
            ImageMsg::Voted { vote, .. } => {
                let durable = self.model.node(known.durable).head;
                let wrong = match known.vote {
                    // Less than there is may be said: blocks may have been copied since the promise.
                    _ if vote.head.rank() > durable.rank() => {
                        Some((Check::VoteIsDurable, format!("with {durable:?} durable")))
                    }
                    Some((b, p, h)) if p == vote.proposal && h != vote.head => {
                        Some((Check::VoteIsFinal, format!("and had voted {h:?} for {b}")))
                    }
                    _ => None,
                };
                if let Some((check, wrong)) = wrong {
                    return self.fail(check, format!("host {at} votes {:?} {wrong}", vote.head));
                }
                // Whatever its form, the record that survives a power cut must hold this very vote.
                let record = known.meta.as_deref().unwrap_or_default();
                if !record.windows(vote.signature.0.len()).any(|w| w == vote.signature.0) {
                    let what = format!("host {at} votes {:?} before its promise is durable", vote.head);
                    return self.fail(Check::VoteIsOnDisk, what);
                }
                let Some(promised) = self.oracle.proposals.get(&vote.proposal).copied() else {
                    let what = format!("host {at} votes for a proposal that nobody made");
                    return self.fail(Check::VoteIsAskedFor, what);
                };
                if let Some((before, proposal, _)) = self.hosts[at].known.vote
                    && (promised < before || (promised == before && proposal != vote.proposal))
                {
                    let what = format!("host {at} votes for {promised} after {before}");
                    return self.fail(Check::VoteKeepsPromise, what);
                }
                self.hosts[at].known.vote = Some((promised, vote.proposal, vote.head));
            }
            _ => {}
        }
    }

    /// Remembers a packet, for replays.
    pub(crate) fn remember(&mut self, from: At, to: At, packet: &Packet) {
        keep(&mut self.oracle.heard, (from, to, packet.clone()));
        if is_of_an_election(packet) {
            keep(&mut self.oracle.heard_votes, (from, to, packet.clone()));
        }
    }
}

fn keep(heard: &mut Vec<(At, At, Packet)>, what: (At, At, Packet)) {
    if heard.len() == HEARD_MAX {
        heard.remove(0);
    }
    heard.push(what);
}

fn is_of_an_election(packet: &Packet) -> bool {
    let Packet::Control(bytes) = packet else { return false };
    let message = vmfs_common::msg::decode::<ImageMsg>(bytes);
    matches!(message, Ok(ImageMsg::Propose { .. } | ImageMsg::Voted { .. }))
}

/// Replays of what a host has said are harmless, except of acknowledgements and statements of what it
/// holds: those would be lies.
pub(crate) fn may_be_replayed(packet: &Packet) -> bool {
    match packet {
        Packet::Update(..) => true,
        Packet::Control(bytes) => matches!(
            vmfs_common::msg::decode::<ImageMsg>(bytes),
            Ok(ImageMsg::Offer { .. }
                | ImageMsg::Propose { .. }
                | ImageMsg::Voted { .. }
                | ImageMsg::Sync { .. }
                | ImageMsg::Headers { .. }
                | ImageMsg::FetchUpdates { .. }
                | ImageMsg::FetchHeaders { .. }
                | ImageMsg::WhoOwns { .. }
                | ImageMsg::VoteRefused { .. })
        ),
        _ => false,
    }
}
