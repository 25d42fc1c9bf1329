//! Changes of members and policy: one at a time, each an update, each after the one before it is
//! committed. A weakening counts by the old rule too until it is committed.

use vmfs_common::chain::Draft;
use vmfs_common::ids::{HostId, Seq};
use vmfs_common::msg::ImageMsg;
use vmfs_common::op::Op;
use vmfs_common::policy::{ImagePolicy, Member, MemberList};

use crate::api::{Env, Output, Token};
use crate::machine::{Machine, RoleState, op_done, send};
use crate::ops::{OpError, OpOutcome};
use crate::owner::stream::Link;

/// What is to change.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    Add(Member),
    Remove(HostId),
    Policy(ImagePolicy),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// A new member is catching up.
    CatchingUp,
    /// The old rule is on its way to the disk, in this version of the meta record.
    Remembering(u64),
    /// The update is appended and waits to be committed.
    Committing(Seq),
    /// Committed; that the old rule is over is on its way to the disk.
    Forgetting(u64),
}

/// The one change under way.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) token: Token,
    pub(super) kind: Kind,
    pub(super) step: Step,
}

impl Machine {
    fn may_change(&self) -> Result<(), OpError> {
        match &self.role {
            RoleState::Owner(o) if o.change.is_some() || o.draining.is_some() => Err(OpError::Busy),
            // The `EpochStart` on a quorum, and the change before this one committed.
            RoleState::Owner(o) if !o.open || self.meta.previous.is_some() => Err(OpError::NotCommitted),
            RoleState::Owner(_) => Ok(()),
            _ => Err(OpError::NotOwner),
        }
    }

    pub(crate) fn add_member(
        &mut self,
        env: &mut Env<'_>,
        member: Member,
        token: Token,
        out: &mut Vec<Output>,
    ) {
        let known = self.state.members.get(member.host).is_some();
        let valid = member.key.host_id() == member.host && self.state.members.with(member.clone()).is_ok();
        let allowed = self.may_change().and(match (known, valid) {
            (true, _) => Err(OpError::AlreadyMember),
            (false, false) => Err(OpError::BadMembers),
            (false, true) => Ok(()),
        });
        if let Err(why) = allowed {
            op_done(out, token, Err(why));
            return;
        }
        let host = member.host;
        if let RoleState::Owner(o) = &mut self.role {
            o.links.insert(host, Link::new(&member, false));
            o.change = Some(Change { token, kind: Kind::Add(member), step: Step::CatchingUp });
        }
        self.offer(env, host, out);
    }

    pub(crate) fn remove_member(
        &mut self,
        env: &mut Env<'_>,
        host: HostId,
        token: Token,
        out: &mut Vec<Output>,
    ) {
        if self.cancel_add(host, OpError::Interrupted, out) {
            op_done(out, token, Ok(OpOutcome::Done));
            return;
        }
        let allowed = match self.state.members.get(host) {
            _ if host == self.id.host => Err(OpError::RemoveOwner),
            None => Err(OpError::NotMember),
            Some(_) => self.may_change(),
        };
        let list = self.state.members.without(host).map_err(|_| OpError::BadMembers);
        match allowed.and(list) {
            Err(why) => op_done(out, token, Err(why)),
            Ok(list) => self.start_change(env, token, Kind::Remove(host), &list, self.state.policy, out),
        }
    }

    pub(crate) fn set_policy(
        &mut self,
        env: &mut Env<'_>,
        policy: ImagePolicy,
        token: Token,
        out: &mut Vec<Output>,
    ) {
        match self.may_change() {
            Err(why) => op_done(out, token, Err(why)),
            Ok(()) if policy == self.state.policy => op_done(out, token, Ok(OpOutcome::Done)),
            Ok(()) => {
                let list = self.state.members.clone();
                self.start_change(env, token, Kind::Policy(policy), &list, policy, out);
            }
        }
    }

    /// Stops the catching up of a member that is not admitted yet.
    pub(crate) fn cancel_add(&mut self, host: HostId, why: OpError, out: &mut Vec<Output>) -> bool {
        let head = self.state.head();
        let RoleState::Owner(o) = &mut self.role else { return false };
        let catching_up =
            |c: &Change| matches!((&c.kind, c.step), (Kind::Add(m), Step::CatchingUp) if m.host == host);
        if !o.change.as_ref().is_some_and(catching_up) {
            return false;
        }
        let change = o.change.take().expect("invariant: just looked at");
        o.links.remove(&host);
        op_done(out, change.token, Err(why));
        out.push(Output::StopStream { to: host });
        send(out, host, ImageMsg::NotMember { head });
        true
    }

    /// Remembers the old rule durably if the new one is weaker, then appends.
    fn start_change(
        &mut self,
        env: &mut Env<'_>,
        token: Token,
        kind: Kind,
        list: &MemberList,
        policy: ImagePolicy,
        out: &mut Vec<Output>,
    ) {
        let rule = self.rule();
        let weaker = rule.is_weakened_by(list, policy);
        if weaker {
            self.meta.previous = Some(rule);
        }
        let version = if weaker { self.persist(out) } else { 0 };
        if let RoleState::Owner(o) = &mut self.role {
            o.change = Some(Change { token, kind, step: Step::Remembering(version) });
        }
        self.change_persisted(env, out);
    }

    /// The meta record has reached the disk: go on with a change that waited for it.
    pub(crate) fn change_persisted(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &mut self.role else { return };
        let step = o.change.as_ref().map(|c| c.step);
        match step {
            Some(Step::Remembering(v)) if self.meta_persisted >= v => self.append_change(env, out),
            Some(Step::Forgetting(v)) if self.meta_persisted >= v => {
                let Some(change) = o.change.take() else { return };
                op_done(out, change.token, Ok(OpOutcome::Done));
                self.dismiss_former_members(out);
            }
            _ => {}
        }
    }

    fn append_change(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &self.role else { return };
        let Some(change) = &o.change else { return };
        let op = match &change.kind {
            Kind::Add(m) => self.state.members.with(m.clone()).map(Op::Members),
            Kind::Remove(h) => self.state.members.without(*h).map(Op::Members),
            Kind::Policy(p) => Ok(Op::Policy(*p)),
        };
        let op = op.expect("invariant: the list was checked, and there is one change at a time");
        self.stop_streams(out);
        let members = matches!(op, Op::Members(_));
        let seq = self.append_own(env, Some(Draft::op(op)), out);
        // A change of members goes nowhere without its owner's signature: who was away believes no other.
        let vouched = if members { self.append_own(env, None, out) } else { seq };
        if let RoleState::Owner(o) = &mut self.role
            && let Some(change) = &mut o.change
        {
            change.step = Step::Committing(seq);
            o.hold = Some(vouched);
            o.links.values_mut().for_each(|l| l.streaming = false);
            if let Kind::Add(m) = &change.kind
                && let Some(link) = o.links.get_mut(&m.host)
            {
                link.admitted = true;
                // Nobody can have had its vote before there is a list with it.
                link.contact = env.now;
            }
        }
        self.check_lease(env, out);
        self.sync_round(env, out);
    }

    /// The change is durable here: everybody may hear of it.
    pub(crate) fn end_hold(&mut self, env: &Env<'_>, out: &mut Vec<Output>) {
        let durable = self.durable;
        let RoleState::Owner(o) = &mut self.role else { return };
        if o.hold.take_if(|seq| durable.epoch == o.start.epoch && durable.seq >= *seq).is_some() {
            for host in self.connected.clone() {
                self.offer(env, host, out);
            }
        }
    }

    /// After acknowledgements: a new member that has caught up is admitted, a committed change done.
    pub(crate) fn advance_change(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let RoleState::Owner(o) = &mut self.role else { return };
        let Some(change) = &o.change else { return };
        match (change.step, &change.kind) {
            (Step::CatchingUp, Kind::Add(m)) => {
                let caught_up = |l: &Link| l.streaming && l.acked >= o.commit && l.acked >= o.start.seq;
                if o.open && o.links.get(&m.host).is_some_and(caught_up) {
                    self.append_change(env, out);
                }
            }
            (Step::Committing(seq), _) if o.commit >= seq => {
                self.meta.previous = None;
                let version = self.persist(out);
                if let RoleState::Owner(o) = &mut self.role
                    && let Some(change) = &mut o.change
                {
                    change.step = Step::Forgetting(version);
                }
            }
            _ => {}
        }
    }

    /// Lets go of hosts that are no members any more, once the change that removed them is committed
    /// and the rule before it durably forgotten.
    pub(crate) fn dismiss_former_members(&mut self, out: &mut Vec<Output>) {
        let head = self.state.head();
        if self.meta_due.is_some() {
            self.persist(out);
        }
        let RoleState::Owner(o) = &mut self.role else { return };
        if o.change.is_some() {
            return;
        }
        let former: Vec<HostId> =
            o.links.keys().copied().filter(|h| self.state.members.get(*h).is_none()).collect();
        for host in former {
            o.links.remove(&host);
            out.push(Output::StopStream { to: host });
            send(out, host, ImageMsg::NotMember { head });
        }
    }
}
