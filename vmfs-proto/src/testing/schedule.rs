//! Random schedules: faults first, then heal everything and demand progress.

use vmfs_common::policy::{Acks, ImagePolicy, MemberRole, OnQuorumLoss};

use crate::api::Input;
use crate::testing::{Cluster, oracle};

/// One random run.
///
/// # Panics
/// When a promise is broken; the seed is in the message of the caller.
pub fn random_run(seed: u64, steps: usize) -> Cluster {
    use MemberRole::{Replica, Witness};
    let layouts: [&[MemberRole]; 5] = [
        &[Replica, Replica, Replica],
        &[Replica, Replica, Witness],
        &[Replica, Replica],
        &[Replica],
        &[Replica; 5],
    ];
    let mut pick = crate::testing::Rng(seed ^ 0xa5a5);
    let roles = layouts[pick.index(layouts.len())];
    let witness = roles.contains(&Witness);
    // Two members that degrade without a witness give up promise 4, and say so.
    let degrade = (roles.len() > 2 || witness) && pick.below(3) == 0;
    let policy = ImagePolicy {
        acks: if pick.below(5) == 0 { Acks::All } else { Acks::Majority },
        on_quorum_loss: if degrade { OnQuorumLoss::Degrade } else { OnQuorumLoss::Stall },
    };
    let mut c = Cluster::new(seed, roles, policy);
    for _ in 0..steps {
        act(&mut c);
    }
    converge(&mut c);
    c
}

fn act(c: &mut Cluster) {
    let n = c.nodes.len();
    let (a, b) = (c.rng.index(n), c.rng.index(n));
    match c.rng.below(40) {
        0..=15 => {
            for at in 0..n {
                c.write(at);
            }
        }
        16..=23 => {
            c.flush(a);
        }
        24..=25 => c.crash(a),
        26..=29 => c.restart(a),
        30..=31 if a != b => c.cut(a, b),
        32 => c.isolate(a),
        33..=35 if a != b => c.heal(a, b),
        36 if c.nodes[a].machine.is_some() => {
            c.op(a, |token| Input::Promote { force: false, token });
        }
        37 if a != b && c.nodes[a].machine.is_some() => {
            let to = c.nodes[b].id.host;
            c.op(a, |token| Input::Handover { to, token });
        }
        _ => {
            let ms = c.rng.below(3_000);
            c.run(ms);
        }
    }
    let ms = c.rng.below(40);
    c.run(ms);
}

/// Heals everything and demands an owner, an acknowledged flush, and identical copies.
fn converge(c: &mut Cluster) {
    c.heal_all();
    if c.nodes.iter().all(|n| n.head().seq.0 == 0) {
        // The power failed before the image's first update was on any disk.
        return;
    }
    c.until("an owner that serves", 60_000, |c| c.owner().is_some());
    c.run(12_000);
    let owner = c.owner().expect("an owner serves");
    assert!(c.write(owner), "the owner takes writes\n{}", c.describe());
    let token = c.flush(owner);
    assert_eq!(c.flush_answer(token), Ok(()), "{}", c.describe());
    c.until("all copies at the owner's head", 60_000, |c| {
        let head = c.nodes[c.owner().unwrap_or(0)].head();
        c.nodes.iter().all(|n| n.head() == head)
    });
    oracle::assert_same(&c.nodes);
    c.oracle.check_all(&c.nodes);
}
