//! Planned hand-over: drain, seal, make durable here and at the successor, let it propose, and
//! consent with our own vote. Any interruption leaves an ordinary election.

use vmfs_common::ids::{Epoch, HostId, Millis};
use vmfs_common::msg::ImageMsg;
use vmfs_common::policy::MemberRole;

use crate::api::{Env, Output, Token};
use crate::candidate::Stage;
use crate::machine::{Machine, RoleState, op_done, send};
use crate::ops::{OpError, OpOutcome};

/// The operator's request, until it is answered; survives the loss of the owner role.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandoverOp {
    pub(crate) token: Token,
    pub(crate) to: HostId,
    pub(crate) deadline: Millis,
    /// The successor's epoch, once its offer has come.
    pub(crate) taken: Option<Epoch>,
}

/// Writes wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draining {
    pub(super) to: HostId,
    /// The successor has been told to propose.
    pub(super) told: bool,
}

impl Machine {
    pub(crate) fn hand_over(&mut self, env: &mut Env<'_>, to: HostId, token: Token, out: &mut Vec<Output>) {
        let data = self.is_data_member(to);
        let RoleState::Owner(o) = &mut self.role else {
            op_done(out, token, Err(OpError::NotOwner));
            return;
        };
        let why = match o.links.get(&to) {
            _ if to == self.id.host => Some(OpError::AlreadyOwner),
            Some(l) if data && l.role == MemberRole::Replica => match () {
                () if o.change.is_some() || o.draining.is_some() || self.handover.is_some() => {
                    Some(OpError::Busy)
                }
                () if !o.open => Some(OpError::NotCommitted),
                () if !l.streaming => Some(OpError::NotConnected),
                () => None,
            },
            _ => Some(OpError::NotDataMember),
        };
        if let Some(why) = why {
            op_done(out, token, Err(why));
            return;
        }
        o.draining = Some(Draining { to, told: false });
        let deadline = env.now.plus(self.timing.promote_timeout_ms);
        self.handover = Some(HandoverOp { token, to, deadline, taken: None });
        self.append_own(env, None, out);
        self.sync_round(env, out);
    }

    /// True while this host, as the owner, lets `host` succeed it.
    pub(crate) fn hands_over_to(&self, host: HostId) -> bool {
        match &self.role {
            RoleState::Owner(o) => o.draining.as_ref().is_some_and(|d| d.to == host && d.told),
            _ => false,
        }
    }

    /// Everything is durable here and at the successor: it may propose.
    pub(crate) fn advance_draining(&mut self, _env: &mut Env<'_>, out: &mut Vec<Output>) {
        let head = self.state.head();
        let RoleState::Owner(o) = &mut self.role else { return };
        let Some(d) = &mut o.draining else { return };
        let there = o.links.get(&d.to).is_some_and(|l| l.streaming && l.acked == head.seq);
        if !d.told && there && self.durable == head {
            d.told = true;
            send(out, d.to, ImageMsg::Handover { head });
        }
    }

    /// The successor's answer.
    pub(crate) fn on_handover_done(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        done: bool,
        out: &mut Vec<Output>,
    ) {
        let Some(op) = self.handover.take_if(|h| h.to == from) else { return };
        if done {
            let epoch = op.taken.unwrap_or_else(|| self.epoch());
            op_done(out, op.token, Ok(OpOutcome::HandedOver { epoch }));
            return;
        }
        op_done(out, op.token, Err(OpError::Interrupted));
        self.resume(env, out);
    }

    /// A hand-over has come to nothing: go on as the owner, or bid to be it again.
    fn resume(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        match &mut self.role {
            RoleState::Owner(o) => o.draining = None,
            RoleState::Candidate(c) if matches!(c.stage, Stage::Backoff { .. }) => self.bid(env, out),
            _ => {}
        }
    }

    /// The successor's certified offer.
    pub(crate) fn handover_taken(&mut self, epoch: Epoch, _out: &mut Vec<Output>) {
        if let Some(op) = &mut self.handover
            && op.to == epoch.host
        {
            op.taken = Some(epoch);
        }
    }

    pub(crate) fn handover_tick(&mut self, env: &mut Env<'_>, out: &mut Vec<Output>) {
        let Some(op) = self.handover.take_if(|h| h.deadline <= env.now) else { return };
        match op.taken {
            Some(epoch) => op_done(out, op.token, Ok(OpOutcome::HandedOver { epoch })),
            None => {
                op_done(out, op.token, Err(OpError::Timeout));
                self.resume(env, out);
            }
        }
    }
}
