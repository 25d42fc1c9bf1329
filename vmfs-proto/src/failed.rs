//! The end of an image on this host: its store has failed. It votes for nobody, acknowledges nothing,
//! and answers every request with an error.

use vmfs_common::msg::{ImageMsg, VoteRefusal};

use crate::api::{Input, Output, Token};
use crate::machine::{Machine, RoleState, op_done, send};
use crate::ops::{FlushError, OpError, OpOutcome};

impl Machine {
    pub(crate) fn handle_failed(&mut self, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Flush { token } => {
                out.push(Output::FlushDone { token, result: Err(FlushError::StoreFailed) });
            }
            Input::Promote { token, .. }
            | Input::Handover { token, .. }
            | Input::AddMember { token, .. }
            | Input::RemoveMember { token, .. }
            | Input::SetPolicy { token, .. }
            | Input::AbandonForced { token } => op_done(out, token, Err(OpError::StoreFailed)),
            Input::Fail { token } => op_done(out, token, Ok(OpOutcome::Done)),
            Input::PeerUp { host } => {
                self.connected.insert(host);
            }
            Input::PeerDown { host } => {
                self.connected.remove(&host);
            }
            Input::Msg { from, msg } => {
                if let ImageMsg::Propose { proposal, .. } = *msg {
                    let why = VoteRefusal::StoreFailed;
                    send(out, from, ImageMsg::VoteRefused { ballot: proposal.ballot, why });
                }
            }
            _ => {}
        }
    }

    pub(crate) fn store_failed(&mut self, out: &mut Vec<Output>) {
        self.fail_flushes(FlushError::StoreFailed, out);
        self.fail_ops(&OpError::StoreFailed, out);
        for host in &self.connected {
            out.push(Output::StopStream { to: *host });
        }
        self.role = RoleState::Failed;
        self.promise = None;
        out.push(Output::GateChanged);
    }

    pub(crate) fn fail_flushes(&mut self, why: FlushError, out: &mut Vec<Output>) {
        for f in self.flushes.drain(..) {
            out.push(Output::FlushDone { token: f.token, result: Err(why) });
        }
    }

    /// Answers every operation that is under way with `why`.
    pub(crate) fn fail_ops(&mut self, why: &OpError, out: &mut Vec<Output>) {
        let tokens: Vec<Token> = match &mut self.role {
            RoleState::Candidate(c) => c.token.take().into_iter().collect(),
            RoleState::Owner(o) => o.take_tokens(),
            RoleState::Follower | RoleState::Failed => Vec::new(),
        };
        for token in tokens {
            op_done(out, token, Err(why.clone()));
        }
    }
}
