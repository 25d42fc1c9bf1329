//! An offered epoch whose certificate counts by a member list that this copy does not know: the
//! members have changed since. The headers from the common ancestor on lead from a list known here
//! to that one; only then is anything cut, or an owner deposed.
//!
//! Headers from anybody could say that the members have changed to the sender's liking. So a change is
//! believed only when its owner vouches for it by a later Seal of the same epoch; or, when the epoch
//! ended before one, if its owner begins the next one, too, or a majority of the members before it have
//! voted for that.

use vmfs_common::chain::{Refusal, Tip, check_extends, check_seal};
use vmfs_common::election::{EpochStart, Mandate};
use vmfs_common::header::Update;
use vmfs_common::ids::{Head, HostId, Seq};
use vmfs_common::msg::{ImageMsg, Occasion};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberList;

use crate::api::{Env, Output};
use crate::candidate::Candidate;
use crate::follower::Following;
use crate::machine::{Machine, RoleState, send};

/// The walk along the offered chain.
#[cfg_attr(any(test, feature = "testing"), derive(Clone))]
#[derive(Debug)]
pub(crate) struct Walk {
    /// What is to be certified.
    pub(crate) offered: Following,
    /// The last update walked over; none before the common ancestor is known.
    pub(crate) last: Option<Head>,
    /// The same with what the next update must fit, once an update has been walked over.
    pub(crate) tip: Option<Tip>,
    /// Lists that may be in force at `last`. A copy's tail beyond the common ancestor was never
    /// committed, so it has at most one change of members: two lists to begin with.
    pub(crate) lists: Vec<MemberList>,
    /// Those before a change of members that nobody has vouched for yet.
    pub(crate) unvouched: Option<Vec<MemberList>>,
    /// A member known here has voted for it: it is followed also when the log no longer tells. More cannot
    /// be asked for: all others may have been replaced since.
    pub(crate) backed: bool,
}

impl Walk {
    pub(crate) const fn offered(&self) -> &Following {
        &self.offered
    }

    /// A change of members: one of them is added, removed or replaced.
    fn change_members(&mut self, list: &MemberList) -> bool {
        self.lists.retain(|l| l.is_one_change_from(list));
        let before = std::mem::replace(&mut self.lists, vec![list.clone()]);
        let known = !before.is_empty();
        self.unvouched.get_or_insert(before);
        known
    }

    /// A Seal: by the epoch's owner, whose key the list before any unvouched change has.
    fn is_sealed_by(&mut self, seal: &Update) -> bool {
        let owner = seal.header.epoch.host;
        let lists = self.unvouched.as_ref().unwrap_or(&self.lists);
        let mut keys = lists.iter().filter_map(|l| l.get(owner)).map(|m| &m.key);
        let good = keys.any(|k| check_seal(seal, k).is_ok());
        if good {
            self.unvouched = None;
        }
        // Without a change to vouch for, it is not needed: the owner may be known by a later list only.
        good || self.unvouched.is_none()
    }
}

impl Machine {
    /// Asks the offering host for the headers up to its `EpochStart`.
    pub(crate) fn start_walk(&mut self, offered: Following, backed: bool, out: &mut Vec<Output>) {
        let before = self.meta.previous.as_ref().map(|r| r.members.clone());
        let lists = [Some(self.state.members.clone()), before].into_iter().flatten().collect();
        let (to, upto) = (offered.host, offered.start);
        self.walk = Some(Walk { offered, last: None, tip: None, lists, unvouched: None, backed });
        let join = self.join();
        send(out, to, ImageMsg::FetchHeaders { join, upto, after: Seq::ZERO });
    }

    /// Headers for the walk; false when they are not.
    pub(crate) fn walk_headers(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        parent: Head,
        headers: &[Vec<u8>],
        upto: Head,
        out: &mut Vec<Output>,
    ) -> bool {
        let ours = parent == self.state.head() || (env.history)(parent.seq) == Some(parent);
        let keeps_commit = parent == self.state.head() || parent.seq >= self.meta.commit.1;
        let Some(mut walk) = self.walk.take_if(|w| w.offered.host == from && w.offered.start == upto) else {
            return false;
        };
        if walk.last.is_none() && ours && keeps_commit {
            walk.last = Some(parent);
            walk.tip = (parent == self.state.head() && parent.seq > Seq::ZERO).then_some(self.state.tip);
        }
        let good =
            headers.iter().all(|bytes| Update::decode(bytes).is_ok_and(|u| self.walk_over(&mut walk, &u)));
        match walk.last {
            Some(last) if good && last == upto => {
                let offered = Following { certified: true, ..walk.offered };
                self.follow(env, offered, out);
            }
            Some(last) if good && last.seq < upto.seq => self.walk = Some(walk),
            _ => self.refuse(env, from, None, Refusal::BadCertificate, out),
        }
        true
    }

    /// One step: the update follows the last, and if it begins an epoch, a known list allows it.
    fn walk_over(&self, walk: &mut Walk, update: &Update) -> bool {
        let h = &update.header;
        let Some(last) = walk.last else { return false };
        if h.image != self.image || h.seq != last.seq.next() || h.parent != last.digest {
            return false;
        }
        let fits = match (&h.op, &walk.tip) {
            (Op::EpochStart(start), _) => self.walk_into_epoch(walk, update, start, &last),
            // What an update reveals only the owner of the one before it knew.
            (_, Some(tip)) if check_extends(tip, self.image, update).is_err() => false,
            _ if h.epoch != last.epoch => false,
            (Op::Members(list), _) => walk.change_members(list),
            (Op::Seal(_), _) => walk.is_sealed_by(update),
            _ => true,
        };
        walk.last = Some(update.head());
        walk.tip = Some(Tip::of(update));
        fits && !walk.lists.is_empty()
    }

    fn walk_into_epoch(&self, walk: &mut Walk, update: &Update, start: &EpochStart, last: &Head) -> bool {
        let h = &update.header;
        let same = start.is_for(self.image, h.epoch, &h.public);
        walk.lists.retain(|l| same && start.verify(h.seq, last, l).is_ok());
        if let Mandate::Forced(list) = &start.mandate {
            // Its maker's word alone: no reason for a member of another lineage to leave that.
            walk.lists = if self.is_admitted() { Vec::new() } else { vec![list.clone()] };
        }
        // As with a Seal, its maker may vouch for the change: who goes on with it, and signs that.
        let maker = (h.epoch.host == last.epoch.host).then_some(h.epoch.host);
        let by_maker = |l: &MemberList| {
            let key = maker.and_then(|m| l.get(m)).map(|m| &m.key);
            key.is_some_and(|k| start.is_signed_by(h.seq, &last.digest, k))
        };
        walk.unvouched
            .take()
            .is_none_or(|lists| lists.iter().any(|l| start.has_majority_of(l) || by_maker(l)))
    }

    /// The offering host's log does not reach back. A follower joins, and will be sent the blocks, if a
    /// member that it knows has voted for that owner; so does a former owner that bids after a restart.
    /// Another one is deposed when a quorum of the members it knows say that another has owned the image
    /// since.
    pub(crate) fn walk_failed(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        upto: Head,
        out: &mut Vec<Output>,
    ) -> bool {
        let Some(walk) = self.walk.take_if(|w| w.offered.host == from && w.offered.start == upto) else {
            return false;
        };
        // Whoever is followed may have the content replaced, block by block. A copy that was given up by
        // order is to be replaced; the members it knows are those of its own lineage.
        let believed = walk.backed || !self.is_admitted() || self.meta.has_given_up();
        // One that only asks for its image back after a restart has nothing more to lose than a follower.
        let asks = |c: &Candidate| c.occasion == Occasion::Restart && !c.forcing;
        let idle = match &self.role {
            RoleState::Follower => true,
            RoleState::Candidate(c) => asks(c),
            _ => false,
        };
        if (idle && believed) || self.quorum_has_moved_on(from) {
            self.follow(env, walk.offered, out);
        } else {
            self.refuse(env, from, None, Refusal::BadCertificate, out);
        }
        true
    }
}
