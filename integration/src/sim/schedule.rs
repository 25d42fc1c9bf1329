//! What guests and operators do, and the course of a run.

use vmfs_common::chain::Draft;
use vmfs_common::election::Genesis;
use vmfs_common::hash::block_digest;
use vmfs_common::header::FORMAT_LEVEL;
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{Acks, ImagePolicy, MemberList, MemberRole, OnQuorumLoss};
use vmfs_common::{BLOCK_BYTES, BlockCount, BlockIndex};
use vmfs_proto::{Gate, Input, Machine, Wait};
use vmfs_store::Space;

use super::At;
use super::broken::Broken;
use super::faults::Plan;
use super::host::IMAGE;
use super::model::{BLOCKS, Effect, FIRST_BLOCK, Fills, block_bytes, size_bytes};
use super::world::World;

/// One whole run: `ticks` actions under faults, then convergence.
pub(crate) fn run(w: &mut World, ticks: u64) {
    let plan = start(w);
    for _ in 0..ticks {
        if w.violation.is_some() {
            return;
        }
        act(w, &plan);
        w.break_something();
    }
    if w.violation.is_none() {
        w.converge();
    }
}

/// A cluster with an image.
fn start(w: &mut World) -> Plan {
    use MemberRole::{Replica, Witness};
    let layouts: [&[MemberRole]; 9] = [
        &[Replica, Replica, Replica],
        &[Replica, Replica, Replica],
        &[Replica, Replica, Witness],
        &[Replica, Replica, Witness],
        &[Replica, Replica],
        &[Replica],
        &[Replica, Witness, Witness],
        &[Replica, Replica, Replica, Witness],
        &[Replica; 5],
    ];
    let roles = layouts[w.rng.index(layouts.len())];
    let policy = ImagePolicy {
        acks: match w.rng.below(12) {
            0 => Acks::Local,
            1 | 2 => Acks::All,
            _ => Acks::Majority,
        },
        on_quorum_loss: if w.rng.one_in(3) { OnQuorumLoss::Degrade } else { OnQuorumLoss::Stall },
    };
    let mut plan = Plan::new(w);
    create(w, roles, policy);
    plan.choose_the_unsound(w, roles, policy);
    plan
}

/// Hosts with these roles, connected, and an image that the first one owns.
pub(crate) fn create(w: &mut World, roles: &[MemberRole], policy: ImagePolicy) {
    w.note(|| format!("members {roles:?}, {policy:?}"));
    w.note_policy(&Op::Policy(policy), roles.len());
    for role in roles {
        w.add_host(*role);
    }
    w.run(300_000);
    let members = w.hosts.iter().map(super::host::Host::member).collect();
    let members = MemberList::new(members).expect("invariant: distinct hosts, one with data");
    let genesis = Genesis { members, policy, attrs: Attrs::default(), level: FORMAT_LEVEL };
    let (id, timing) = (w.hosts[0].id.clone(), w.timing.clone());
    let store = w.hosts[0].running.as_ref().expect("invariant: no fault so far").store.clone();
    let copy = store.create_image(IMAGE, MemberRole::Replica).expect("invariant: a healthy disk");
    w.admit(0, copy, |env, out| Ok(Machine::genesis(env, id, timing, IMAGE, genesis, out)));
    w.settle(0);
}

fn act(w: &mut World, plan: &Plan) {
    let at = w.rng.index(w.hosts.len());
    match w.rng.below(100) {
        0..=54 => w.guest(at),
        55..=64 => w.check_some(at),
        65..=74 => w.operator(plan, at),
        _ => w.fault(plan),
    }
    let us = if w.rng.one_in(12) { w.rng.below(1_500_000) } else { w.rng.below(40_000) };
    w.run(us);
}

impl World {
    /// Guests run wherever the image can be written.
    fn guest(&mut self, _at: At) {
        let writers: Vec<At> = (0..self.hosts.len())
            .filter(|at| {
                let now = self.hosts[*at].now(self.now);
                self.hosts[*at].machine().is_some_and(|m| !matches!(m.may_write(now), Gate::Refused(_)))
            })
            .collect();
        for at in writers {
            for _ in 0..=self.rng.below(4) {
                self.write(at);
            }
            if self.rng.one_in(3) {
                self.flush(at);
            }
        }
    }

    fn random_change(&mut self) -> (Effect, Draft, Vec<u8>) {
        let op = |op, start: usize, count: usize| Draft {
            op,
            start: BlockIndex(FIRST_BLOCK + start as u64),
            count: BlockCount(count as u64),
            digests: Vec::new(),
            flags: 0,
        };
        let start = self.rng.index(BLOCKS);
        let longest = if self.rng.one_in(8) { 40 } else { 4 };
        let count = 1 + self.rng.index(longest.min(BLOCKS - start));
        match self.rng.below(20) {
            0 => {
                let blocks = self.rng.index(BLOCKS + 1);
                let size_bytes = size_bytes(blocks);
                (Effect::Resize { blocks }, Draft::op(Op::Resize { size_bytes }), Vec::new())
            }
            1 | 2 => {
                let size_after_bytes = Some(size_bytes(start + count));
                let draft = op(Op::Zero { size_after_bytes }, start, count);
                (Effect::Zero { start, count }, draft, Vec::new())
            }
            _ => {
                let fresh = u32::try_from(self.next_token & 0xff_ffff).expect("invariant: 24 bits") + 1;
                self.next_token += 1;
                let mut fills: Fills = vec![fresh; count];
                if count > 1 && self.rng.one_in(4) {
                    fills[0] = 0;
                }
                let mut payload = Vec::with_capacity(count * BLOCK_BYTES);
                let mut block = [0u8; BLOCK_BYTES];
                let mut digests = Vec::with_capacity(count);
                for (i, fill) in fills.iter().enumerate() {
                    block_bytes(*fill, start + i, &mut block);
                    digests.push(block_digest(&block));
                    if *fill != 0 {
                        payload.extend_from_slice(&block);
                    }
                }
                let says = !self.is_broken(Broken::GrowthUnsaid);
                let size_after_bytes = says.then(|| size_bytes(start + count));
                let place = start + usize::from(self.is_broken(Broken::WriteMisplaced));
                let draft = Draft { digests, ..op(Op::Write { size_after_bytes }, place, count) };
                (Effect::Write { start, fills }, draft, payload)
            }
        }
    }

    /// A guest's write, as the engine's `append_checked`.
    pub(crate) fn write(&mut self, at: At) -> bool {
        let (effect, draft, payload) = self.random_change();
        let now = self.hosts[at].now(self.now);
        let Some(copy) = self.hosts[at].copy() else { return false };
        let store = copy.store.clone();
        let Some(mut machine) = self.lock(at) else { return false };
        let mut out = Vec::new();
        let mut written = false;
        if machine.may_write(now) == Gate::Open {
            let header_bytes = 248 + 8 + 8 * 16 + 32 * draft.digests.len();
            match store.reserve(header_bytes, payload.len() / BLOCK_BYTES, Space::Data) {
                Ok(reserved) => {
                    let update = self.env(at, |env| machine.append(env, draft, &mut out));
                    self.made(at, &update, effect, false);
                    match store.append(reserved, &update, &payload) {
                        Ok(()) => {
                            written = true;
                            self.wake_lines(at);
                            // As the engine does where flushes are a habit.
                            if self.foresees && self.rng.one_in(3) {
                                self.env(at, |env| machine.sync_members(env, &mut out));
                                if self.rng.one_in(2) {
                                    machine.sync_local(&mut out);
                                }
                            }
                        }
                        Err(e) => {
                            self.store_error(at, &e, "appending a guest's write");
                            self.env(at, |env| machine.handle(env, Input::StoreFailed, &mut out));
                        }
                    }
                }
                Err(e) => self.store_error(at, &e, "making room for a guest's write"),
            }
        }
        self.unlock(at, machine, out);
        self.settle(at);
        written
    }

    /// A guest's flush.
    pub(crate) fn flush(&mut self, at: At) -> u64 {
        let token = self.token();
        self.flush_begins(at, token);
        self.note(|| format!("{at} is asked for flush {token}"));
        self.input(at, Input::Flush { token });
        self.settle(at);
        token
    }

    /// Reads somewhere and compares; pins a state now and then.
    fn check_some(&mut self, at: At) {
        if self.rng.one_in(3) {
            self.check_pinned(at);
            return;
        }
        let now = self.hosts[at].now(self.now);
        let Some(machine) = self.hosts[at].machine() else { return };
        if machine.may_read(now) != Gate::Open {
            return;
        }
        let first = self.rng.index(BLOCKS);
        let count = 1 + self.rng.index((BLOCKS - first).min(32));
        self.check_copy(at, first, count);
    }

    /// An order to a host's machine.
    pub(crate) fn order(&mut self, at: At, input: impl FnOnce(u64) -> Input) -> Option<u64> {
        self.hosts[at].machine()?;
        let token = self.token();
        let input = input(token);
        self.note(|| format!("{at} is ordered {:?}", input));
        self.input(at, input);
        self.settle(at);
        Some(token)
    }

    /// The host that serves the newest epoch.
    pub(crate) fn owner(&self) -> Option<At> {
        let open = |at: &At| {
            let now = self.hosts[*at].now(self.now);
            self.hosts[*at].machine().is_some_and(|m| {
                m.is_open_owner() && matches!(m.may_write(now), Gate::Open | Gate::Wait(Wait::MaxLag))
            })
        };
        let owners = (0..self.hosts.len()).filter(open);
        owners.max_by_key(|at| self.hosts[*at].machine().map(|m| m.state().head().epoch))
    }
}
