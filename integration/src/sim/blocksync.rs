//! Block-level sync, in steps that other events come between: as `node/sync.rs` of the engine, with
//! calls instead of requests.

use vmfs_common::chain::{Draft, check_seal};
use vmfs_common::header::{FIXED_BYTES, Update};
use vmfs_common::op::Op;
use vmfs_common::policy::{MEMBERS_MAX, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BlockIndex};
use vmfs_proto::{Env, Input, Machine};
use vmfs_store::{
    Import, MERKLE_FANOUT, MERKLE_LEAF_BLOCKS, MERKLE_ROOT_LEVEL, MerkleTree, Space, StoreError, View,
};

use super::At;
use super::broken::Broken;
use super::check::Check;
use super::model::{BLOCKS, Effect};
use super::world::{Event, World};

/// Times that one question is asked before the sync is given up.
const TRIES_MAX: u32 = 12;
/// Merkle nodes or blocks handled in one step.
const STEP: usize = 24;

/// What the owner vouches for.
struct Vouched {
    base: Update,
    merkle: MerkleTree,
    state: ImageState,
    view: View,
    /// The owner's life: a restarted owner has given the view up.
    life: u64,
}

/// A member's side of one sync.
pub(crate) struct Pull {
    owner: At,
    tries: u32,
    vouched: Option<Vouched>,
    /// What is built, and the Merkle tree of what it began with.
    import: Option<(Import, MerkleTree)>,
    todo: Vec<(u32, u64)>,
    wanted: Vec<BlockIndex>,
}

impl Pull {
    pub(crate) const fn new(owner: At) -> Self {
        Self { owner, tries: 0, vouched: None, import: None, todo: Vec::new(), wanted: Vec::new() }
    }
}

enum Step {
    Again(u64),
    Installed,
    Failed(String),
}

impl World {
    pub(crate) fn pull_step(&mut self, at: At) {
        let Some(mut pull) = self.hosts[at].copy_mut().and_then(|c| c.pull.take()) else { return };
        let life = self.life(at);
        let step = self.step(at, &mut pull);
        match step {
            Step::Again(us) => {
                self.after(us, Event::Pull { at, life });
                self.put_back(at, pull);
            }
            Step::Installed => {}
            Step::Failed(why) => {
                self.note(|| format!("{at} gives the copying of blocks up: {why}"));
                drop(pull);
                self.input(at, Input::ImportFailed);
            }
        }
    }

    fn put_back(&mut self, at: At, pull: Pull) {
        if let Some(copy) = self.hosts[at].copy_mut() {
            copy.pull = Some(pull);
        }
    }

    fn step(&mut self, at: At, pull: &mut Pull) -> Step {
        let owner = pull.owner;
        let connected = self.net.session(at, owner).is_some()
            && self.net.session(at, owner) == self.net.session(owner, at)
            && self.hosts[owner].copy().is_some();
        if !connected {
            return self.once_more(pull, "not connected");
        }
        let Some(vouched) = &pull.vouched else {
            return match self.freeze(owner) {
                Ok(vouched) => {
                    self.note(|| format!("{owner} lets {at} copy the state at {}", vouched.base.header.seq));
                    pull.vouched = Some(vouched);
                    pull.todo = vec![(MERKLE_ROOT_LEVEL, 0)];
                    pull.tries = 0;
                    Step::Again(self.rng.between(500, 20_000))
                }
                Err(why) => self.once_more(pull, &why),
            };
        };
        if self.life(owner) != vouched.life {
            return Step::Failed("the owner gave up the view".into());
        }
        if pull.import.is_none() {
            let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
            let blank = store.head().seq.0 == 0;
            match store.begin_import(!blank) {
                Ok(import) => match import.merkle_tree() {
                    Ok(tree) => pull.import = Some((import, tree)),
                    Err(e) => return self.import_error(at, &e),
                },
                Err(e) => return self.import_error(at, &e),
            }
        }
        let import = pull.import.as_ref().expect("invariant: just made");
        let witness = self.hosts[at].copy().is_some_and(|c| c.store.kind() == MemberRole::Witness);
        let copied = if witness || pull.todo.is_empty() && pull.wanted.is_empty() {
            None
        } else {
            let skips = self.is_broken(Broken::BlocksSkipped);
            Some(copy_some(import, vouched, &mut pull.todo, &mut pull.wanted, skips))
        };
        match copied {
            Some(Ok(())) => Step::Again(self.rng.between(500, 20_000)),
            Some(Err((e, true))) => self.import_error(at, &e),
            Some(Err((e, false))) => self.import_error(owner, &e),
            None => self.install(at, pull, witness),
        }
    }

    fn once_more(&mut self, pull: &mut Pull, why: &str) -> Step {
        pull.tries += 1;
        if pull.tries > TRIES_MAX { Step::Failed(why.to_owned()) } else { Step::Again(250_000) }
    }

    fn import_error(&mut self, at: At, e: &StoreError) -> Step {
        self.store_error(at, e, "copying blocks");
        Step::Failed(e.to_string())
    }

    /// The owner's side: freezes a view, and appends the `Root` and the `Seal` that vouch for it.
    fn freeze(&mut self, owner: At) -> Result<Vouched, String> {
        let store = self.hosts[owner].copy().ok_or("gone")?.store.clone();
        if !self.hosts[owner].machine().is_some_and(Machine::may_vouch) {
            return Err("not now".into());
        }
        let view = store.view();
        let at = view.head();
        let excused = |w: &mut Self, e: &StoreError| {
            w.store_error(owner, e, "freezing a view");
            e.to_string()
        };
        let base =
            store.update_at(at.seq).map_err(|e| excused(self, &e))?.ok_or("the head is not in the log")?;
        let merkle = view.merkle_tree().map_err(|e| excused(self, &e))?;
        let op = Op::Root { at: at.seq, merkle: merkle.root(), state: view.state().digest() };
        let Some(mut machine) = self.lock(owner) else { return Err("gone".into()) };
        let mut out = Vec::new();
        let room = 2 * (FIXED_BYTES + 128 + 8 * MEMBERS_MAX);
        // The engine reserves before it numbers; both updates are small.
        let made = match store.reserve(room, 0, Space::Control) {
            Ok(room) => {
                drop(room);
                let mut made = Vec::new();
                if self.is_broken(Broken::SealOnAnother) {
                    made.push(self.env(owner, |env| machine.append(env, Draft::op(op), &mut out)));
                    let op = Op::Resize { size_bytes: view.state().size_bytes };
                    made.push(self.env(owner, |env| machine.append(env, Draft::op(op), &mut out)));
                    made.push(self.env(owner, |env| machine.seal(env, &mut out)));
                } else {
                    let vouched = |env: &mut Env<'_>| machine.append_vouched(env, Draft::op(op), &mut out);
                    made.extend(<[_; 2]>::from(self.env(owner, vouched)));
                    // As when it took two calls: later chances stay what they were in seeds that once found something.
                    self.rng.next();
                }
                let stored = made.iter().try_for_each(|update| {
                    self.made(owner, update, Effect::None, false);
                    self.store_own(owner, update, &[], Space::Control)
                });
                let (root, seal) = (made.swap_remove(0), made.pop().expect("invariant: two at least"));
                stored.map(|()| (root, seal))
            }
            Err(e) => Err(e),
        };
        if made.is_err() && machine.state().head() != store.head() {
            self.env(owner, |env| machine.handle(env, Input::StoreFailed, &mut out));
        }
        // Before a power cut that was the reason is carried out.
        let made = made.map_err(|e| excused(self, &e));
        self.unlock(owner, machine, out);
        self.settle(owner);
        let (root, seal) = made?;
        let state = view.state();
        let key = state.members.get(self.host_id(owner)).ok_or("the owner is no member")?.key;
        let vouches = check_seal(&seal, &key).is_ok() && seal.header.parent == root.digest;
        if !vouches || state.head() != base.head() {
            self.fail(Check::SealVouches, format!("the Seal of host {owner} does not vouch for its Root"));
        }
        let state = ImageState::decode(&state.encode()).map_err(|e| e.to_string())?;
        Ok(Vouched { base, merkle, state, view, life: self.life(owner) })
    }

    fn install(&mut self, at: At, pull: &mut Pull, witness: bool) -> Step {
        let Some(vouched) = pull.vouched.take() else { return Step::Failed("nothing to install".into()) };
        let (import, _) = pull.import.take().expect("invariant: made before");
        match import.merkle_tree() {
            Ok(m) if witness || m == vouched.merkle => {}
            Ok(_) => {
                self.fail(
                    Check::CopiedIsVouchedFor,
                    format!("host {at} copied every block, and has another Merkle root"),
                );
                return Step::Failed("wrong root".into());
            }
            Err(e) => return self.import_error(at, &e),
        }
        let owner = self.host_id(pull.owner);
        let Some(mut machine) = self.lock(at) else { return Step::Failed("gone".into()) };
        if !machine.may_import(owner, &vouched.state) {
            self.unlock(at, machine, Vec::new());
            return Step::Failed("overtaken".into());
        }
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        let from = store.head();
        let log_start = store.log_start();
        self.cutting(at, vouched.base.head());
        let mut out = Vec::new();
        let discards = !machine.is_part_of(&vouched.state);
        let step = match import.finish(&vouched.base, vouched.state.clone(), discards) {
            Ok(fork) => {
                self.note(|| format!("{at} has copied the state at {}", vouched.base.header.seq));
                self.cut(at, from, vouched.base.head(), fork.as_ref(), log_start);
                self.hosts[at].known.copied = self.hosts[at].known.durable;
                self.counts.imports += 1;
                let state = Box::new(vouched.state);
                self.env(at, |env| machine.handle(env, Input::Imported { state }, &mut out));
                Step::Installed
            }
            Err(e) => self.import_error(at, &e),
        };
        self.unlock(at, machine, out);
        step
    }
}

/// Walks some Merkle nodes, or copies some blocks. On an error: whether it was the member's own.
fn copy_some(
    (import, ours): &(Import, MerkleTree),
    Vouched { view, merkle, .. }: &Vouched,
    todo: &mut Vec<(u32, u64)>,
    wanted: &mut Vec<BlockIndex>,
    skips: bool,
) -> Result<(), (StoreError, bool)> {
    for _ in 0..STEP {
        let Some((level, index)) = todo.pop() else { break };
        let first = BlockIndex(index * MERKLE_FANOUT);
        let (theirs, ours) = if level > 1 {
            (merkle.children(level, index), ours.children(level, index))
        } else {
            (
                view.digests(first, MERKLE_LEAF_BLOCKS).map_err(|e| (e, false))?,
                import.digests(first, MERKLE_LEAF_BLOCKS).map_err(|e| (e, true))?,
            )
        };
        for i in (0..MERKLE_FANOUT).rev() {
            let at = usize::try_from(i).unwrap_or(BLOCKS);
            if theirs[at] == ours[at] {
                continue;
            }
            let child = index * MERKLE_FANOUT + i;
            if level > 1 {
                todo.push((level - 1, child));
            } else {
                wanted.push(BlockIndex(child));
            }
        }
    }
    for _ in 0..STEP {
        let Some(block) = wanted.pop() else { break };
        if skips {
            continue;
        }
        let digest = view.digests(block, 1).map_err(|e| (e, false))?[0];
        let mut buf = vec![0u8; BLOCK_BYTES];
        if digest.is_zero() {
            buf.clear();
        } else {
            view.read(block, &mut buf).map_err(|e| (e, false))?;
        }
        import.write(block, &[digest], &buf).map_err(|e| (e, true))?;
    }
    Ok(())
}
