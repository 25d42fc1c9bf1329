//! A copy's state machine under messages of a hostile host: whatever decodes is fed to it, from members
//! and strangers. It never panics, never takes an update that does not chain, and asks for a bounded
//! number of things for each message.

use std::sync::Arc;

use vmfs_common::header::Update;
use vmfs_common::ids::{Head, Millis, Seq};
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_proto::{Contact, Env, Identity, Input, Machine, Output, Take, Timing};

use crate::samples::{self, DATASTORE, IMAGE, key, member};

/// Most outputs of one input: what it sends is bounded by the members, not by what it is told.
const OUTPUTS_MAX: usize = 256;
/// Inputs of one run.
const STEPS_MAX: usize = 64;

struct World {
    machine: Machine,
    heads: Vec<Head>,
    now: Millis,
}

impl World {
    fn new(me: u8, upto: usize) -> Self {
        let (updates, _) = samples::chain();
        let mut state = ImageState::new(IMAGE);
        let heads: Vec<Head> = updates[..upto].iter().map(Update::head).collect();
        updates[..upto].iter().for_each(|u| state.apply(u));
        let identity = Arc::new(Identity {
            datastore: DATASTORE,
            host: key(me).host_id(),
            store: member(me).store,
            key: key(me),
        });
        let mut out = Vec::new();
        let kind = if me == 3 { MemberRole::Witness } else { MemberRole::Replica };
        let now = Millis(1_000_000);
        let machine = with_env(&heads, now, |env| {
            let durable = state.head();
            Machine::recover(env, identity, Timing::default(), kind, state, Some(durable), None, &mut out)
        });
        let machine = machine.expect("no meta record is a good one");
        let mut world = Self { machine, heads, now };
        for n in 1..=4 {
            world.input(Input::PeerUp { host: key(n).host_id() });
        }
        // Everything that was asked of the disk is done.
        for version in 1..4 {
            world.input(Input::MetaPersisted { version });
        }
        world
    }

    fn call(&mut self, f: impl FnOnce(&mut Machine, &mut Env<'_>, &mut Vec<Output>)) {
        let mut out = Vec::new();
        let machine = &mut self.machine;
        with_env(&self.heads, self.now, |env| f(machine, env, &mut out));
        assert!(out.len() <= OUTPUTS_MAX, "{} outputs of one input", out.len());
        self.carry_out(out);
    }

    /// The disk obeys at once; what is sent is lost.
    fn carry_out(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::PersistMeta { version, .. } => self.input(Input::MetaPersisted { version }),
                Output::AppendLocal(update) => self.heads.push(update.head()),
                Output::LocalSync => {
                    let head = self.machine.state().head();
                    self.input(Input::Synced { head });
                }
                Output::RollBack { .. } => self.input(Input::StoreFailed),
                Output::StartBlockSync { .. } => self.input(Input::ImportFailed),
                _ => {}
            }
        }
    }

    fn input(&mut self, input: Input) {
        self.call(|machine, env, out| machine.handle(env, input, out));
    }

    fn update(&mut self, from: vmfs_common::HostId, update: &Update) {
        let before = self.machine.state().head();
        let tip = self.machine.state().tip;
        self.call(|machine, env, out| {
            if let Ok(Take::Append) = machine.check_update(env, from, update, out) {
                assert_eq!(update.header.parent, before.digest, "taken without chaining");
                let starts = matches!(update.header.op, vmfs_common::op::Op::EpochStart(_));
                let extends = vmfs_common::chain::check_extends(&tip, IMAGE, update);
                assert!(starts || extends.is_ok(), "taken without its owner's secret");
            }
        });
    }
}

fn with_env<R>(heads: &[Head], now: Millis, f: impl FnOnce(&mut Env<'_>) -> R) -> R {
    let mut n = 0u8;
    let mut entropy =
        |b: &mut [u8]| b.iter_mut().for_each(|x| (n = n.wrapping_mul(5).wrapping_add(3), *x = n).0);
    let heard = Some(now);
    let contact = |_| Contact { heard, confirmed: heard };
    let history = |seq: Seq| heads.iter().find(|h| h.seq == seq).copied();
    let mut env = Env {
        now,
        time_ns: 1,
        entropy: &mut entropy,
        contact: &contact,
        history: &history,
        log_start: Seq(1),
    };
    f(&mut env)
}

/// The input: who the machine is and how much of the chain it has; then, again and again: who speaks, how
/// many bytes (2), and a message or an update.
pub(crate) fn machine(data: &[u8]) -> bool {
    let Some(([me, upto], mut rest)) = data.split_first_chunk::<2>() else { return false };
    let all = samples::chain().0.len();
    let mut world = World::new(1 + me % 3, 1 + usize::from(*upto) % all);
    let mut heard = false;
    for _ in 0..STEPS_MAX {
        let Some(([from, l0, l1], next)) = rest.split_first_chunk::<3>() else { break };
        let len = usize::from(u16::from_le_bytes([*l0, *l1])).min(next.len());
        let (body, next) = next.split_at(len);
        rest = next;
        let host = key(1 + from % 4).host_id();
        if let Ok(message) = msg::decode::<ImageMsg>(body) {
            world.input(Input::Msg { from: host, msg: Box::new(message) });
            heard = true;
        } else if let Ok(update) = Update::decode(body) {
            world.update(host, &update);
            heard = true;
        } else {
            world.now = world.now.plus(u64::from(*l0) * 16);
            world.input(Input::Tick);
        }
    }
    heard
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let say = |from: u8, body: &[u8]| {
        let len = u16::try_from(body.len()).expect("a short message").to_le_bytes();
        [&[from][..], &len, body].concat()
    };
    let messages = samples::messages();
    let updates = samples::updates();
    let mut seeds = Vec::new();
    for me in 0..3u8 {
        for from in 0..4 {
            let mut seed = vec![me, 3];
            seed.extend(messages.iter().flat_map(|m| say(from, m)));
            seeds.push(seed);
        }
        let mut fed = vec![me, 0];
        fed.extend(say(0, &messages[7]));
        fed.extend(updates[1..].iter().flat_map(|u| say(0, u)));
        seeds.push(fed);
    }
    seeds
}

pub(crate) fn meta_seeds() -> Vec<Vec<u8>> {
    // The records that a machine asks to be written, as it comes up and as it votes.
    let mut seeds = Vec::new();
    for me in [1, 2] {
        let mut world = World::new(me, 3);
        let (from, propose) = (key(2).host_id(), samples::all_messages().swap_remove(0));
        let mut out = Vec::new();
        let machine = &mut world.machine;
        with_env(&world.heads, world.now, |env| {
            machine.handle(env, Input::Msg { from, msg: Box::new(propose) }, &mut out);
            machine.handle(env, Input::Promote { force: false, token: 1 }, &mut out);
        });
        seeds.extend(out.into_iter().filter_map(|o| match o {
            Output::PersistMeta { bytes, .. } => Some(bytes.to_vec()),
            _ => None,
        }));
    }
    seeds
}
