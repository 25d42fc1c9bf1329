//! Lineages that an operator has forced.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{change, cluster, offer_of};
use vmfs_common::policy::MemberRole::Replica;
use vmfs_proto::testing::{Cluster, member};
use vmfs_proto::{Input, OpOutcome, Role, Token};

/// Seed 671671 of the simulator: abandoning the second of two lineages that a host was made to start, one out of the
/// other, went back to the first, which nobody knew for one any more.
#[test]
fn abandoning_a_lineage_that_was_split_off_twice_ends_both() {
    let mut c = cluster(&[Replica; 3]);
    let flushed = c.write_and_flush(0);
    c.run(1000);
    c.isolate(2);
    c.run(1000);
    c.oracle.suspended = true;
    for second in [false, true] {
        if second {
            // Its only other member is away.
            let new = c.add_host(Replica);
            c.cut(0, new);
            c.cut(1, new);
            change(&mut c, 2, new, true);
            c.write_and_flush(2);
            c.crash(new);
            c.run(1000);
        }
        let token = c.op(2, |token| Input::Promote { force: true, token });
        let forced = matches!(c.answer(token), Ok(OpOutcome::Promoted { forced: true, .. }));
        assert!(forced, "{}", c.describe());
        c.write_and_flush(2);
    }
    assert!(c.status(2).forced);
    c.write_and_flush(0);
    let token = c.op(2, |token| Input::AbandonForced { token });
    assert_eq!(c.answer(token), Ok(OpOutcome::Done));
    c.run(2 * c.timing.lease_ms);
    assert_eq!(c.nodes[2].head().epoch, flushed.epoch, "{}", c.describe());
    c.heal_all();
    c.until("one lineage", 20_000, |c| c.nodes[2].head() == c.nodes[0].head());
    assert!(c.holds(2, flushed));
    c.run(1000);
    c.write_and_flush(0);
}

/// Host 1 was made to start a lineage of its own, and host 0, whose copy was dropped, is being added to that: it has
/// some of the updates before the split. Says what answers the order.
fn joining_a_forced_lineage() -> (Cluster, Token) {
    let mut c = cluster(&[Replica; 3]);
    c.write_and_flush(0);
    c.writes(0, 20);
    c.run(1000);
    c.crash(0);
    c.crash(2);
    c.run(1000);
    c.oracle.suspended = true;
    let token = c.op(1, |token| Input::Promote { force: true, token });
    assert!(matches!(c.answer(token), Ok(OpOutcome::Promoted { forced: true, .. })), "{}", c.describe());
    c.discard(0);
    c.restart(0);
    let (id, kind) = (c.nodes[0].id.clone(), c.nodes[0].kind);
    let token = c.op(1, |token| Input::AddMember { member: member(&id, kind), token });
    c.until("it has some of it", 5000, |c| c.nodes[0].log.len() > 3);
    assert!(c.nodes[0].head().epoch < c.nodes[1].head().epoch, "{}", c.describe());
    (c, token)
}

/// Seen with real daemons, one time in ten on a slow machine: by the updates before the split alone, the copy is a
/// member of the other lineage.
#[test]
fn a_copy_that_joins_a_forced_lineage_from_nothing_may_be_offered_it_twice() {
    let (mut c, token) = joining_a_forced_lineage();
    let offer = offer_of(&c, 1);
    c.receive(1, 0, offer);
    assert_eq!(c.answer(token), Ok(OpOutcome::Done), "{}", c.describe());
    c.write_and_flush(1);
}

/// With what it has, it may come to own the image: it must not be led away from that.
#[test]
fn a_copy_that_bids_is_no_longer_bound_to_the_forced_lineage_it_began_with() {
    let (mut c, _) = joining_a_forced_lineage();
    c.isolate(0);
    c.run(2 * c.timing.lease_ms);
    c.restart(2);
    c.isolate(1);
    c.run(2 * c.timing.lease_ms);
    // It is the last owner that its chain tells of, and bids for itself.
    c.until("it owns the image", 5000, |c| c.status(0).role == Role::Owner);
    let flushed = c.write_and_flush(0);
    assert!(flushed.epoch < c.nodes[1].head().epoch);
    let offer = offer_of(&c, 1);
    c.receive(1, 0, offer);
    assert_eq!(c.status(0).role, Role::Owner, "{}", c.describe());
    c.write_and_flush(0);
}
