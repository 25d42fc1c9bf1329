//! An offered epoch whose certificate counts by a member list that this copy does not know: the
//! members have changed since. The headers from the common ancestor on lead from a list known here
//! to that one; only then is anything cut, or an owner deposed.

use vmfs_common::chain::Refusal;
use vmfs_common::election::Mandate;
use vmfs_common::header::Update;
use vmfs_common::ids::{Head, HostId, Seq};
use vmfs_common::msg::ImageMsg;
use vmfs_common::op::Op;
use vmfs_common::policy::MemberList;

use crate::api::{Env, Output};
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
    /// Lists that may be in force at `last`. A copy's tail beyond the common ancestor was never
    /// committed, so it has at most one change of members: two lists to begin with.
    pub(crate) lists: Vec<MemberList>,
}

impl Walk {
    pub(crate) const fn offered(&self) -> &Following {
        &self.offered
    }
}

impl Machine {
    /// Asks the offering host for the headers up to its `EpochStart`.
    pub(crate) fn start_walk(&mut self, offered: Following, out: &mut Vec<Output>) {
        let before = self.meta.previous.as_ref().map(|r| r.members.clone());
        let lists = [Some(self.state.members.clone()), before].into_iter().flatten().collect();
        let (to, upto) = (offered.host, offered.start);
        self.walk = Some(Walk { offered, last: None, lists });
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
        match &h.op {
            Op::EpochStart(start) => {
                let p = &start.proposal;
                let same = p.image == h.image && p.ballot == h.epoch && p.pub0 == h.public;
                walk.lists.retain(|l| same && start.verify(h.seq, &last, l).is_ok());
                if let Mandate::Forced(list) = &start.mandate {
                    walk.lists.retain(|l| l.get(self.id.host).is_none() || list.get(self.id.host).is_some());
                    if !walk.lists.is_empty() {
                        walk.lists = vec![list.clone()];
                    }
                }
            }
            Op::Members(list) => walk.lists = vec![list.clone()],
            _ if h.epoch != last.epoch => return false,
            _ => {}
        }
        walk.last = Some(update.head());
        !walk.lists.is_empty()
    }

    /// The offering host's log does not reach back. A follower joins, and will be sent the blocks. A
    /// former owner that bids is deposed when a quorum of the members it knows say that another has
    /// owned the image since.
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
        if matches!(self.role, RoleState::Follower) || self.quorum_has_moved_on(from) {
            self.follow(env, walk.offered, out);
        } else {
            self.refuse(env, from, None, Refusal::BadCertificate, out);
        }
        true
    }
}
