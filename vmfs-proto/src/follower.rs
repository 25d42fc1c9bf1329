//! Following an owner: its offer, our head, the stream, and block-level sync.

use vmfs_common::chain::Refusal;
use vmfs_common::election::{EpochStart, Mandate, Vote};
use vmfs_common::header::Update;
use vmfs_common::ids::{Head, HostId, Millis, Seq};
use vmfs_common::msg::{ImageMsg, Join};
use vmfs_common::op::Op;
use vmfs_common::policy::{MemberList, MemberRole};
use vmfs_common::state::ImageState;

use crate::api::{Env, Event, Output};
use crate::lineage::marks;
use crate::machine::{Machine, RoleState, send};
use crate::ops::{FlushError, OpError};

/// The owner that this copy follows, as it has stated itself on the present connection.
#[derive(Debug, Clone)]
pub(crate) struct Following {
    pub(crate) host: HostId,
    /// Its `EpochStart`.
    pub(crate) start: Head,
    /// What that was put on, as its certificate says.
    pub(crate) parent: Head,
    /// The certificate holds under a member list that this copy knows to have been in force: a
    /// diverging tail may be cut for it, and an owner be deposed.
    pub(crate) certified: bool,
    /// There was nothing here when it was taken up: what is here is its chain and no other, so that no
    /// lineage is left by following it through a forced promotion.
    pub(crate) from_nothing: bool,
}

/// Block-level sync.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum BlockSync {
    /// None.
    #[default]
    Idle,
    /// The engine copies.
    Running,
    /// To be asked for again.
    Retry(Millis),
}

impl Machine {
    /// What this copy holds.
    pub(crate) fn join(&self) -> Join {
        Join {
            store: self.id.store,
            head: self.state.head(),
            durable: self.durable,
            marks: marks(&self.state),
            witness: self.kind == MemberRole::Witness,
        }
    }

    pub(crate) fn send_join(&mut self, out: &mut Vec<Output>) {
        let Some(f) = &self.following else { return };
        if f.start.epoch < self.promised() {
            // A join says that this copy backs the owner.
            self.send_refused(f.host, Refusal::Promised, Seq::ZERO, out);
            return;
        }
        self.muted = false;
        send(out, f.host, ImageMsg::Join(self.join()));
    }

    pub(crate) fn on_offer(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        start: Head,
        certificate: &[u8],
        out: &mut Vec<Output>,
    ) {
        if start.epoch.host != from {
            self.refuse(env, from, None, Refusal::NotOwner, out);
            return;
        }
        let current = self.epoch();
        let bound = current.max(self.bound());
        if self.meta.forced.is_some() && !self.meta.has_given_up() && start.epoch != current {
            // A lineage that an operator has split off meets the other one: both are kept.
            self.note_foreign(start, out);
            self.refuse(env, from, None, Refusal::Fork, out);
            return;
        }
        if start.epoch < bound {
            self.refuse(env, from, None, Refusal::Promised, out);
            return;
        }
        // A later epoch that is only claimed so far is looked into first: whoever loses offers again.
        let claimed = |f: &Following| f.start.epoch > start.epoch && f.host != from && !f.certified;
        // But not instead of the owner this copy has: anybody could claim.
        let known = start.epoch == current && self.state.epoch_start().is_some_and(|e| e.start == start);
        if !known
            && (self.following.as_ref().is_some_and(claimed)
                || self.walk.as_ref().is_some_and(|w| claimed(w.offered())))
        {
            self.send_refused(from, Refusal::WrongEpoch, Seq::ZERO, out);
            return;
        }
        // Offered again before its EpochStart has come: by what is here so far it could not be judged any more.
        let began_with = self.began_with.clone().filter(|f| f.start == start && start.epoch > current);
        if let Some(again) = began_with {
            self.follow(env, again, out);
            return;
        }
        let (parent, certified, backed) = if start.epoch == current {
            let own = *self.state.epoch_start().expect("invariant: a current epoch has a start");
            if own.start != start {
                self.note_foreign(start, out);
                self.refuse(env, from, None, Refusal::Fork, out);
                return;
            }
            (own.parent, true, true)
        } else {
            match self.check_certificate(start, certificate) {
                Ok(known) => known,
                Err(why) => {
                    if why == Refusal::Fork {
                        self.note_foreign(start, out);
                    }
                    self.refuse(env, from, None, why, out);
                    return;
                }
            }
        };
        let from_nothing = self.state.head().seq == Seq::ZERO;
        let offered = Following { host: from, start, parent, certified, from_nothing };
        if certified || from_nothing {
            self.follow(env, offered, out);
        } else {
            self.start_walk(offered, backed, out);
        }
    }

    /// Takes up an owner: whatever this host was to the image is over.
    pub(crate) fn follow(&mut self, env: &mut Env<'_>, offered: Following, out: &mut Vec<Output>) {
        let epoch = offered.start.epoch;
        if epoch < self.epoch().max(self.promised()) {
            // Promised away while the certificate was being checked.
            self.refuse(env, epoch.host, None, Refusal::Promised, out);
            return;
        }
        let bid = matches!(self.role, RoleState::Candidate(_));
        if !matches!(self.role, RoleState::Follower) {
            self.become_follower(env, Some(epoch), out);
        }
        if offered.certified && offered.start.epoch > self.epoch() {
            self.walk = None;
        } else {
            // A later epoch may go on being looked into while its predecessor's owner is followed.
            self.walk.take_if(|w| w.offered().start.epoch <= epoch || w.offered().host == epoch.host);
        }
        self.began_with = offered.from_nothing.then(|| offered.clone());
        self.following = Some(offered);
        self.owner_heard = Some((epoch.host, env.time_ns));
        if self.epoch().host == epoch.host || self.bound() > self.epoch() {
            self.ack_due = None;
        }
        self.send_join(out);
        if bid {
            self.ask_who_owns(out);
        }
        self.handover_taken(epoch, out);
    }

    /// The parent of the offered `EpochStart`; whether its certificate holds under a member list known here
    /// (the one at the head, or the one before a change that may not be committed); and, for another list,
    /// whether a member known here has voted for it.
    fn check_certificate(&self, start: Head, certificate: &[u8]) -> Result<(Head, bool, bool), Refusal> {
        let update = Update::decode(certificate).map_err(|_| Refusal::Malformed)?;
        let h = &update.header;
        let Op::EpochStart(args) = &h.op else { return Err(Refusal::BadCertificate) };
        let p = &args.proposal;
        let same = update.head() == start && p.image == h.image && p.ballot == h.epoch && p.pub0 == h.public;
        if !same || h.image != self.image || p.datastore != self.id.datastore {
            return Err(Refusal::BadCertificate);
        }
        let parent = match &args.mandate {
            // Which of the voted heads is the parent follows from the header; that it is the right
            // one, from the member list.
            Mandate::Votes(votes) => {
                let named = |v: &&Vote| v.head.digest == h.parent && v.head.seq.next() == h.seq;
                votes.iter().find(named).map(|v| v.head).ok_or(Refusal::BadCertificate)?
            }
            Mandate::Forced(_) => {
                if self.is_admitted() {
                    return Err(Refusal::Fork);
                }
                let parent = Head { digest: h.parent, seq: h.seq.prev(), ..Head::default() };
                return Ok((parent, false, false));
            }
            Mandate::Genesis(_) if self.state.head().seq > Seq::ZERO => return Err(Refusal::Fork),
            Mandate::Genesis(_) => return Ok((Head::default(), false, false)),
        };
        let lists = [Some(&self.state.members), self.meta.previous.as_ref().map(|r| &r.members)];
        let holds = |l: &MemberList| !l.is_empty() && l.digest() == args.proposal.members;
        match lists.into_iter().flatten().find(|l| holds(l)) {
            Some(list) => verify(args, h.seq, &parent, list).map(|()| (parent, true, true)),
            // Another list, not known here yet: the updates that lead to it will tell.
            None => {
                let backs = |l: &MemberList| !l.is_empty() && args.votes_of(l) > 0;
                Ok((parent, false, lists.into_iter().flatten().any(backs)))
            }
        }
    }

    /// Gives up candidacy or ownership: to the certified epoch `by`, or because an election came to
    /// nothing.
    pub(crate) fn become_follower(
        &mut self,
        env: &mut Env<'_>,
        by: Option<vmfs_common::Epoch>,
        out: &mut Vec<Output>,
    ) {
        if let Some(by) = by {
            let why = match self.role {
                RoleState::Candidate(_) => OpError::Overtaken(by),
                _ => OpError::NotOwner,
            };
            self.fail_ops(&why, out);
            if self.epoch().host == self.id.host {
                out.push(Output::Report(Event::Deposed { by }));
            }
        }
        self.stop_streams(out);
        self.role = RoleState::Follower;
        self.promise = self.promise.take().filter(|p| p.from != self.id.host);
        self.fail_flushes(FlushError::NotOwner, out);
        self.settle(env, out);
    }

    pub(crate) fn on_behind(&mut self, from: HostId, out: &mut Vec<Output>) {
        let mine = self.following.as_ref().is_some_and(|f| f.host == from);
        if mine && matches!(self.block_sync, BlockSync::Idle) && matches!(self.role, RoleState::Follower) {
            self.block_sync = BlockSync::Running;
            out.push(Output::StartBlockSync { from });
        }
    }

    /// Block-level sync has put another state in place, durably.
    pub(crate) fn imported(&mut self, env: &mut Env<'_>, state: ImageState, out: &mut Vec<Output>) {
        self.block_sync = BlockSync::Idle;
        let (before, after) = (self.state.head(), state.head());
        if before.seq > Seq::ZERO {
            self.meta.lineage += 1;
            if !self.is_part_of(&state) {
                out.push(Output::Report(Event::RolledBack { from: before, to: after }));
            }
            // As every handle of the lineage that ends here.
            self.fail_flushes(FlushError::NotOwner, out);
        }
        self.state = state;
        self.durable = after;
        self.sync.stale = self.sync.in_flight;
        self.meta.acked_seen = crate::meta::AckedSeen::default();
        self.meta.floor = None;
        self.forked = None;
        self.meta.forced = self.meta.forced.filter(|_| !self.meta.has_given_up());
        self.meta.previous = None;
        self.meta.acked = self.meta.acked.min(after.rank());
        self.persist(out);
        self.send_join(out);
        self.settle(env, out);
    }

    pub(crate) fn on_not_member(&mut self, from: HostId, out: &mut Vec<Output>) {
        let owner = self.following.as_ref().is_some_and(|f| f.host == from) || self.epoch().host == from;
        if owner && matches!(self.role, RoleState::Follower) {
            self.following = None;
            out.push(Output::Report(Event::Removed { by: from }));
        }
    }
}

fn verify(args: &EpochStart, seq: Seq, parent: &Head, list: &MemberList) -> Result<(), Refusal> {
    args.verify(seq, parent, list).map_err(|_| Refusal::BadCertificate)
}
