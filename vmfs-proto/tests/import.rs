//! When a block-level sync may take effect.

use vmfs_common::policy::{ImagePolicy, MemberRole};
use vmfs_proto::Input;
use vmfs_proto::testing::Cluster;

/// Found by the simulator: a sync that was begun under one owner ended when the copy had followed the
/// next one for a while, and took it back to the older state.
#[test]
fn a_block_level_sync_of_an_earlier_owner_does_not_take_a_copy_back() {
    let mut c = Cluster::new(7, &[MemberRole::Replica; 3], ImagePolicy::default());
    c.run(1_000);
    assert!(c.write(0));
    let token = c.flush(0);
    c.flush_answer(token).expect("flushed");
    let (first, old) = (c.nodes[0].id.host, c.nodes[0].machine.as_ref().expect("runs").state().clone());
    let may = |c: &Cluster, from, state| c.nodes[2].machine.as_ref().expect("runs").may_import(from, state);
    assert!(!may(&c, first, &old), "nothing new");
    c.isolate(2);
    c.run(1_000);
    assert!(c.write(0));
    let ahead = c.nodes[0].machine.as_ref().expect("runs").state().clone();
    assert!(!may(&c, first, &ahead), "it follows nobody");
    c.heal(0, 2);
    c.heal(1, 2);
    c.run(1_000);
    assert!(c.write(0));
    let ahead = c.nodes[0].machine.as_ref().expect("runs").state().clone();
    assert!(may(&c, first, &ahead), "newer, from the owner it follows");

    let token = c.op(1, |token| Input::Promote { force: false, token });
    c.answer(token).expect("promoted");
    c.run(2_000);
    assert!(c.write(1));
    let (second, now) = (c.nodes[1].id.host, c.nodes[1].machine.as_ref().expect("runs").state().clone());
    assert!(!may(&c, first, &ahead), "its owner is not followed any more");
    assert!(!may(&c, second, &ahead), "the state is of another owner");
    assert!(may(&c, second, &now));
}
