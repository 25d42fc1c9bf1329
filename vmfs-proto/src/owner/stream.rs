//! Offers, joins and streams: bringing every member to the owner's chain and keeping it there.

use vmfs_common::chain::Refusal;
use vmfs_common::ids::{Epoch, HostId, Millis, Seq, StoreId};
use vmfs_common::msg::{ImageMsg, Join};
use vmfs_common::policy::{Member, MemberRole};

use crate::api::{Env, Event, Output, Timing};
use crate::lineage::common;
use crate::machine::{Machine, RoleState, send};
use crate::ops::OpError;
use crate::owner::flush::old_epochs_count;

/// What the owner knows of one member (or of one that is catching up before its admission).
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) store: StoreId,
    pub(crate) role: MemberRole,
    /// In the member list. Others do not count.
    pub(crate) admitted: bool,
    /// It did not answer the election that an operator ordered, and has said nothing since: nobody waits
    /// for it.
    pub(crate) absent: bool,
    /// A stream to it is open, from a point its head was said to be at.
    pub(crate) streaming: bool,
    /// It has joined on this connection with the store that was admitted, and has not said since that a later
    /// epoch has its promise: its contact keeps the lease.
    pub(crate) backs: bool,
    /// The last ping that it is known to have answered while it backed this owner.
    pub(crate) contact: Millis,
    /// Its copy cannot be brought to this chain (another store, another lineage).
    pub(crate) fenced: bool,
    /// The last update handed to its connection.
    pub(crate) sent: Seq,
    /// The last update of this epoch that it has acknowledged.
    pub(crate) acked: Seq,
    /// The last update it was asked to make durable.
    pub(crate) sync_asked: Seq,
    /// Since when an acknowledgement has been outstanding.
    pub(crate) waiting_since: Option<Millis>,
    /// When to offer again after a refusal.
    pub(crate) offer_at: Option<Millis>,
    pub(crate) refusals: u32,
    /// Up to here it cannot be fed from the log, which is damaged there.
    pub(crate) unreadable: Seq,
}

impl Link {
    pub(crate) fn new(m: &Member, admitted: bool) -> Self {
        Self {
            store: m.store,
            role: m.role,
            admitted,
            absent: false,
            streaming: false,
            backs: false,
            contact: Millis::default(),
            fenced: false,
            sent: Seq::ZERO,
            acked: Seq::ZERO,
            sync_asked: Seq::ZERO,
            waiting_since: None,
            offer_at: None,
            refusals: 0,
            unreadable: Seq::ZERO,
        }
    }

    /// Takes down how far its contact keeps the lease. What it answers before it has joined, or after it has
    /// promised itself away, keeps nothing; what it answered earlier stays.
    pub(crate) fn note_contact(&mut self, confirmed: Option<Millis>) {
        if self.backs {
            self.contact = self.contact.max(confirmed.unwrap_or_default());
        }
    }

    /// Ends the stream, and offers again after a while that doubles with the refusals.
    pub(crate) fn restart(&mut self, now: Millis, timing: &Timing) {
        self.streaming = false;
        self.offer_at = Some(now.plus(timing.restart_ms << self.refusals.min(6)));
        self.refusals += 1;
    }
}

impl Machine {
    /// States the epoch to a member, with its certificate; it answers with its head.
    pub(crate) fn offer(&mut self, env: &Env<'_>, host: HostId, out: &mut Vec<Output>) {
        let head = self.state.head();
        let RoleState::Owner(o) = &mut self.role else { return };
        let Some(link) = o.links.get_mut(&host) else { return };
        link.offer_at = None;
        link.streaming = false;
        // An image whose genesis may still vanish with a power cut is nobody else's business yet.
        if !self.connected.contains(&host) || self.durable.seq == Seq::ZERO || o.hold.is_some() {
            return;
        }
        let certificate = o.certificate.to_vec();
        let offer =
            ImageMsg::Offer { head, start: o.start, log_start: env.log_start, certificate, role: link.role };
        send(out, host, offer);
        let share = o.shares.get(&host).filter(|_| link.admitted).cloned();
        if let Some(share) = share {
            send(out, host, ImageMsg::Share { epoch: o.start.epoch, share });
        }
    }

    /// A member states its head: stream from the common point, or send it to block-level sync.
    pub(crate) fn on_join(&mut self, env: &mut Env<'_>, from: HostId, join: &Join, out: &mut Vec<Output>) {
        let head = self.state.head();
        if !matches!(&self.role, RoleState::Owner(o) if o.links.contains_key(&from)) {
            return;
        }
        let common = common(&self.state, join);
        let RoleState::Owner(o) = &mut self.role else { return };
        let Some(link) = o.links.get_mut(&from) else { return };
        let headers_only = link.role == MemberRole::Witness;
        let stranger = join.store != link.store || join.witness != headers_only;
        link.backs = !stranger;
        if o.hold.is_some() {
            // It will be offered the chain again in a moment.
            return;
        }
        link.offer_at = None;
        link.streaming = false;
        link.fenced = stranger;
        if stranger {
            // A wiped, restored or foreign store: not the member that was admitted, and what that had
            // acknowledged is gone.
            link.acked = Seq::ZERO;
            send(out, from, ImageMsg::NotMember { head });
            return;
        }
        let Some(after) = common else {
            link.fenced = true;
            out.push(Output::Report(Event::Fork { ours: head, theirs: join.head }));
            return;
        };
        if after.next() < env.log_start || after < link.unreadable {
            send(out, from, ImageMsg::Behind { log_start: env.log_start });
            return;
        }
        link.streaming = true;
        link.sent = after;
        // What it acknowledged before counts only as far as it still states it.
        link.acked = if old_epochs_count() { after } else { link.acked.min(after) };
        link.sync_asked = head.seq;
        link.waiting_since = Some(env.now);
        out.push(Output::Stream { to: from, after, headers_only });
        out.push(Output::RequestSync { to: from, seq: head.seq, commit: o.commit });
    }

    /// A member has not taken something.
    pub(crate) fn on_refused(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        why: Refusal,
        _seq: Seq,
        promised: Epoch,
        out: &mut Vec<Output>,
    ) {
        // It will say so again and again: only an operator can drop what it has.
        let hopeless = matches!(why, Refusal::Fork | Refusal::BadCertificate | Refusal::NotAllowed);
        if hopeless && self.cancel_add(from, OpError::OtherLineage, out) {
            return;
        }
        let near = self.is_near(promised);
        let RoleState::Owner(o) = &mut self.role else { return };
        let Some(link) = o.links.get_mut(&from) else { return };
        // Whatever it refuses: with a later promise it is lost to this epoch. What is hopeless is another lineage's.
        if !hopeless && near && link.admitted && promised > o.start.epoch {
            let serving = o.links.values().filter(|l| l.admitted && l.streaming).count();
            let quorum = self.state.members.quorum();
            let without = serving + 1 - usize::from(o.links.get(&from).is_some_and(|l| l.streaming));
            if o.open && without >= quorum && env.now < self.rebid_after {
                // Candidates that fail again and again must not stop a healthy image: they can wait.
                if let Some(link) = o.links.get_mut(&from) {
                    link.streaming = false;
                    link.offer_at = Some(self.rebid_after);
                }
                out.push(Output::StopStream { to: from });
                return;
            }
            let calm = env.now.since(self.rebid_after) > 64 * self.timing.rebid_ms;
            self.rebids = if calm { 0 } else { (self.rebids + 1).min(8) };
            self.rebid_after = env.now.plus((4 * self.timing.rebid_ms) << self.rebids);
            self.pause(env, from, out);
            if let RoleState::Candidate(c) = &mut self.role {
                c.outbid_by = promised;
            }
            return;
        }
        // Until it joins.
        link.fenced |= why == Refusal::Fork;
        if link.offer_at.is_none() {
            link.restart(env.now, &self.timing);
            out.push(Output::StopStream { to: from });
        }
    }

    pub(crate) fn on_who_owns(&mut self, env: &Env<'_>, from: HostId, out: &mut Vec<Output>) {
        self.offer(env, from, out);
    }

    /// The log is damaged where this member would go on: at its next join it is sent to block-level sync.
    pub(crate) fn log_unreadable(&mut self, env: &Env<'_>, to: HostId, seq: Seq, out: &mut Vec<Output>) {
        if let RoleState::Owner(o) = &mut self.role
            && let Some(link) = o.links.get_mut(&to)
        {
            link.unreadable = link.unreadable.max(seq);
            link.restart(env.now, &self.timing);
            out.push(Output::StopStream { to });
        }
    }

    pub(crate) fn stream_progress(&mut self, to: HostId, seq: Seq) {
        if let RoleState::Owner(o) = &mut self.role
            && let Some(link) = o.links.get_mut(&to)
            && link.streaming
        {
            link.sent = link.sent.max(seq);
        }
    }

    pub(crate) fn owner_peer_up(&mut self, env: &Env<'_>, host: HostId, out: &mut Vec<Output>) {
        if let RoleState::Owner(o) = &mut self.role
            && let Some(link) = o.links.get_mut(&host)
        {
            // It may be another store, or have promised in the meantime: until it joins nobody knows.
            link.backs = false;
        }
        self.offer(env, host, out);
    }

    pub(crate) fn owner_peer_down(&mut self, env: &Env<'_>, host: HostId) {
        if let Some(op) = self.handover.as_mut().filter(|h| h.to == host && h.taken.is_none()) {
            // Settled at the next tick, which is due now.
            op.deadline = op.deadline.min(env.now);
        }
        if let RoleState::Owner(o) = &mut self.role
            && let Some(link) = o.links.get_mut(&host)
        {
            link.note_contact((env.contact)(host).confirmed);
            link.backs = false;
            link.streaming = false;
            link.offer_at = None;
            link.waiting_since = None;
        }
    }

    /// Ends every stream: this host is not, or perhaps no longer, the owner.
    pub(crate) fn stop_streams(&self, out: &mut Vec<Output>) {
        if let RoleState::Owner(o) = &self.role {
            let streaming = o.links.iter().filter(|(_, l)| l.streaming);
            out.extend(streaming.map(|(host, _)| Output::StopStream { to: *host }));
        }
    }
}
