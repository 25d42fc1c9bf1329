//! Random schedules: faults first, then heal everything and demand progress.

use vmfs_common::Seq;
use vmfs_common::policy::{Acks, ImagePolicy, MemberRole, OnQuorumLoss};

use crate::api::Input;
use crate::testing::{At, Cluster, member};

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
    match c.rng.below(42) {
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
        38 => change_members(c),
        39 => {
            let ms = c.rng.below(5_000);
            c.run(ms);
        }
        _ => trim_log(c, a),
    }
    let ms = c.rng.below(40);
    c.run(ms);
}

/// Adds, removes or replaces somebody, or sets another policy, at whoever owns the image.
fn change_members(c: &mut Cluster) {
    let Some(owner) = c.owner() else { return };
    let state = c.nodes[owner].machine.as_ref().expect("the owner runs").state().clone();
    let host = c.rng.index(c.nodes.len());
    match c.rng.below(3) {
        0 if c.nodes.len() < 6 => {
            let role = if c.rng.below(3) == 0 { MemberRole::Witness } else { MemberRole::Replica };
            let at = c.add_host(role);
            let member = member(&c.nodes[at].id.clone(), role);
            c.op(owner, |token| Input::AddMember { member, token });
        }
        0 => {
            let member = member(&c.nodes[host].id.clone(), c.nodes[host].kind);
            c.op(owner, |token| Input::AddMember { member, token });
        }
        1 if state.members.len() > 2 => {
            let host = c.nodes[host].id.host;
            c.op(owner, |token| Input::RemoveMember { host, token });
        }
        _ => {
            let degrade = c.rng.below(2) == 0 && state.members.len() > 2;
            let on_quorum_loss = if degrade { OnQuorumLoss::Degrade } else { OnQuorumLoss::Stall };
            let policy = ImagePolicy { acks: Acks::Majority, on_quorum_loss };
            c.op(owner, |token| Input::SetPolicy { policy, token });
        }
    }
}

/// The log of a copy no longer reaches back to the beginning.
fn trim_log(c: &mut Cluster, at: At) {
    let commit = c.nodes[at].machine.as_ref().map_or(Seq(1), |m| m.status(c.now).commit);
    let n = &mut c.nodes[at];
    n.log_start = n.log_start.max(Seq(commit.0.saturating_sub(2).max(1)));
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
        let Some(owner) = c.owner() else { return false };
        let state = c.nodes[owner].machine.as_ref().expect("the owner runs").state();
        let members = state.members.all().iter().map(|m| c.at(m.host));
        members.into_iter().all(|at| c.nodes[at].head() == state.head())
    });
    c.oracle.check_all(&c.nodes);
}
