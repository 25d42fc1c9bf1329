//! What an owner's behaviour depends on, for the model checker. See [`crate::testing::fingerprint`].

use std::hash::{Hash, Hasher};

use crate::owner::Owner;
use crate::owner::handover::Draining;
use crate::owner::members::{Change, Kind, Step};
use crate::owner::stream::Link;
use crate::testing::fingerprint::Clock;

impl Owner {
    pub(crate) fn fingerprint(&self, clock: &Clock, meta_version: u64, h: &mut impl Hasher) {
        // Everything that is left out follows from the chain, or is about time that never comes: the
        // model's leases do not end, and it seals at hand-overs only.
        let Self {
            chain,
            start,
            certificate: _,
            open,
            ring: _,
            ring_start: _,
            bytes_total: _,
            commit,
            flushed,
            links,
            shares: _,
            lease_until: _,
            lease_from: _,
            lease_check_at: _,
            frozen,
            degraded,
            mark,
            reduced,
            shortage,
            last_append: _,
            unsealed_since: _,
            synced_bytes: _,
            change,
            hold,
            draining,
            election,
        } = self;
        chain.tip().head.digest.hash(h);
        (start.digest, open, commit, flushed, frozen, degraded, mark, reduced, shortage, hold).hash(h);
        for (host, link) in links {
            host.hash(h);
            link.fingerprint(clock, h);
        }
        change.is_some().hash(h);
        if let Some(Change { token, kind, step }) = change {
            token.hash(h);
            match kind {
                Kind::Add(m) => (1, m).hash(h),
                Kind::Remove(host) => (2, host).hash(h),
                Kind::Policy(p) => (3, format!("{p:?}")).hash(h),
            }
            match step {
                Step::CatchingUp => 1.hash(h),
                Step::Remembering(v) => (2, meta_version - v).hash(h),
                Step::Committing(seq) => (3, seq).hash(h),
                Step::Forgetting(v) => (4, meta_version - v).hash(h),
            }
        }
        draining.map(|Draining { to, told }| (to, told)).hash(h);
        election.is_some().hash(h);
        if let Some(e) = election {
            (e.token, clock.class_of(e.give_up_at), e.predecessor, e.forced).hash(h);
            format!("{:?}", e.loss).hash(h);
        }
    }
}

impl Link {
    fn fingerprint(&self, clock: &Clock, h: &mut impl Hasher) {
        let Self {
            store,
            role,
            admitted,
            absent,
            streaming,
            backs,
            contact: _,
            fenced,
            sent,
            acked,
            sync_asked,
            waiting_since,
            offer_at,
            // How long until the next offer.
            refusals: _,
            unreadable,
        } = self;
        let place = (sent, acked, sync_asked, unreadable);
        (store, role, admitted, absent, streaming, backs, fenced, place).hash(h);
        (waiting_since.is_some(), clock.class_of(*offer_at)).hash(h);
    }
}
