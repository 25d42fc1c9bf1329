//! What the tests of sequences share.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use vmfs_common::Seq;
use vmfs_common::msg::ImageMsg;
use vmfs_common::policy::MemberRole::Replica;
use vmfs_common::policy::{Acks, ImagePolicy, MemberRole, OnQuorumLoss};
use vmfs_proto::testing::{At, Cluster, Packet, member};
use vmfs_proto::{Input, OpError, OpOutcome};

pub const STALL: ImagePolicy = ImagePolicy { acks: Acks::Majority, on_quorum_loss: OnQuorumLoss::Stall };

pub fn cluster(roles: &[MemberRole]) -> Cluster {
    let mut c = Cluster::new(23, roles, STALL);
    c.run(200);
    c
}

pub fn promote(c: &mut Cluster, at: At) -> Result<OpOutcome, OpError> {
    let token = c.op(at, |token| Input::Promote { force: false, token });
    c.answer(token)
}

pub fn fetches(c: &Cluster) -> bool {
    c.nodes[1].machine.as_ref().unwrap().describe_role().starts_with("candidate Vouching")
}

/// Host 1 is a candidate, and asks host 2 for the headers of what it lacks. The owner, host 0, is gone.
pub fn fetching() -> Cluster {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.cut(0, 1);
    c.writes(0, 5);
    c.run(20);
    c.crash(0);
    c.run(1000);
    c.op(1, |token| Input::Promote { force: false, token });
    c.until("asks for headers", 1000, fetches);
    c
}

pub fn change(c: &mut Cluster, owner: At, at: At, add: bool) {
    let (id, kind) = (c.nodes[at].id.clone(), c.nodes[at].kind);
    let token = c.op(owner, |token| match add {
        true => Input::AddMember { member: member(&id, kind), token },
        false => Input::RemoveMember { host: id.host, token },
    });
    assert_eq!(c.answer(token), Ok(OpOutcome::Done), "{}", c.describe());
}

/// What an owner offers.
pub fn offer_of(c: &Cluster, owner: At) -> Packet {
    let node = &c.nodes[owner];
    let start = node.machine.as_ref().unwrap().state().epoch_start().unwrap().start;
    let certificate = node.log[usize::try_from(start.seq.0).unwrap() - 1].0.bytes.to_vec();
    let offer = ImageMsg::Offer { head: start, start, log_start: Seq(1), certificate, role: Replica };
    Packet::Msg(Box::new(offer))
}
