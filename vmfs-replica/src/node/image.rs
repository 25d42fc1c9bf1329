//! One image on this host: its machine, its copy in the store, and what is on its way to its members.
//!
//! The mutex around [`Core`] is the append lock: what the machine decides and what the store appends
//! happen under it together. Everything slow (hashing, syncing, sending) happens outside.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard, RwLock};
use vmfs_common::chain::{Draft, Refusal};
use vmfs_common::header::{FIXED_BYTES, Update};
use vmfs_common::op::Op;
use vmfs_common::policy::{MEMBERS_MAX, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, HostId, ImageId, Millis, Seq};
use vmfs_net::spot::{self, Woken};
use vmfs_proto::{Env, Gate, Input, Machine, OpError, OpOutcome, Output, Refused, Take, Wait};
use vmfs_store::{ImageStore, Reservation, Space, StoreError, View};

use super::NodeInner;
use super::blocks::payloads_match;
use super::foresight::Foresight;
use super::io::IoError;
use super::line::{Line, from_log};
use super::ring::{Ring, RingItem};

/// Called once with the outcome of a flush.
pub type FlushDone = Box<dyn FnOnce(Result<(), IoError>) + Send>;
/// Called once when a waiting operation should be tried again.
pub type Wake = Box<dyn FnOnce() + Send>;

pub(super) struct Core {
    pub(super) machine: Machine,
    /// Whoever holds the lock will make the log durable itself if that is asked for, and whether it was.
    pub(super) sync_here: bool,
    pub(super) sync_due: bool,
    flushes: Foresight,
    /// What to call once the lock is given up.
    pub(super) deferred: Vec<Box<dyn FnOnce() + Send>>,
}

/// A Seal takes less.
const SEAL_BYTES: usize = FIXED_BYTES + 64 + 8 * MEMBERS_MAX;

/// What a token of the machine stands for.
pub(crate) enum Pending {
    Flush(FlushDone),
    Operator(tokio::sync::oneshot::Sender<Result<OpOutcome, OpError>>),
}

/// See the module.
pub struct Image {
    /// Which image.
    pub id: ImageId,
    pub(crate) store: Arc<ImageStore>,
    pub(super) node: Weak<NodeInner>,
    pub(super) core: Mutex<Core>,
    /// Held shared by writes of whole blocks, alone by read-modify-writes.
    pub(super) edges: RwLock<()>,
    pub(super) ring: Mutex<Ring>,
    pub(super) lines: Mutex<BTreeMap<HostId, Arc<Line>>>,
    pub(super) pending: Mutex<HashMap<u64, Pending>>,
    pub(super) wakes: Mutex<Vec<Wake>>,
    next_token: AtomicU64,
    head: AtomicU64,
    /// The last write is likely to be made durable next, and nothing has been done about it here.
    flush_expected: AtomicBool,
    /// Reads are open up to and including then (this node's clock); later the machine is asked.
    readable_until: AtomicU64,
    pub(super) size_bytes: AtomicU64,
    pub(super) deadline: AtomicU64,
    pub(super) lineage: AtomicU64,
    pub(super) content_version: AtomicU64,
    /// Until then (this node's clock), what would wait is answered with an error.
    pub(super) failing_until: AtomicU64,
    /// The newest meta record not yet written, and whether a writer is at work.
    pub(super) meta: Mutex<MetaSlot>,
    /// When streams with a peer were last started over, and whether that is to be done again.
    pub(super) bounced: Mutex<BTreeMap<HostId, (std::time::Instant, bool)>>,
    /// Hosts the policy names whose store is not known yet: added when they are first met.
    pub(super) missing: Mutex<Vec<HostId>>,
    /// Open files of the mount.
    pub(super) opens: AtomicU64,
    pub(super) pulled_blocks: AtomicU64,
    /// The block-level sync that is under way; 0: none.
    pub(super) pulling: AtomicU64,
    pub(super) repairs: Mutex<HashMap<BlockIndex, bool>>,
    pub(super) sealed_view: Mutex<SealPin>,
}

/// See [`Image::meta`].
#[derive(Default)]
pub(super) struct MetaSlot {
    pub(super) next: Option<(u64, zeroize::Zeroizing<Vec<u8>>)>,
    pub(super) writing: bool,
}

/// A view kept for a comparison of copies.
#[derive(Default)]
pub(super) struct SealPin {
    pub(super) wanted: bool,
    pub(super) view: Option<View>,
}

impl Image {
    pub(super) fn new(node: &Arc<NodeInner>, store: Arc<ImageStore>, machine: Machine) -> Arc<Self> {
        let head = store.head().seq.0;
        Arc::new(Self {
            id: store.id(),
            node: Arc::downgrade(node),
            core: Mutex::new(Core {
                machine,
                sync_here: false,
                sync_due: false,
                flushes: Foresight::default(),
                deferred: Vec::new(),
            }),
            failing_until: AtomicU64::new(0),
            meta: Mutex::default(),
            bounced: Mutex::default(),
            missing: Mutex::default(),
            edges: RwLock::new(()),
            ring: Mutex::new(Ring::new(node.rings.clone())),
            lines: Mutex::default(),
            pending: Mutex::default(),
            wakes: Mutex::default(),
            next_token: AtomicU64::new(1),
            head: AtomicU64::new(head),
            flush_expected: AtomicBool::new(false),
            readable_until: AtomicU64::new(0),
            size_bytes: AtomicU64::new(0),
            deadline: AtomicU64::new(0),
            lineage: AtomicU64::new(1),
            content_version: AtomicU64::new(1),
            opens: AtomicU64::new(0),
            pulled_blocks: AtomicU64::new(0),
            pulling: AtomicU64::new(0),
            repairs: Mutex::default(),
            sealed_view: Mutex::default(),
            store,
        })
    }

    pub(super) fn node(&self) -> Arc<NodeInner> {
        self.node.upgrade().expect("invariant: the node outlives its images' tasks")
    }
    pub(crate) fn head_seq(&self) -> Seq {
        Seq(self.head.load(Ordering::Acquire))
    }
    /// What the state is now.
    #[must_use]
    pub fn state(&self) -> Arc<ImageState> {
        self.store.state()
    }
    /// See the mount's `View::lineage`.
    #[must_use]
    pub fn lineage(&self) -> u64 {
        self.lineage.load(Ordering::Acquire)
    }
    /// Changes when the content changed other than through this host's own writes.
    #[must_use]
    pub fn content_version(&self) -> u64 {
        self.content_version.load(Ordering::Acquire)
    }
    /// The newest state, frozen.
    #[must_use]
    pub fn view(&self) -> View {
        self.store.view()
    }
    pub(crate) fn token(&self, what: Pending) -> u64 {
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        self.pending.lock().insert(token, what);
        token
    }
    pub(super) fn check_lineage(&self, lineage: u64) -> Result<(), IoError> {
        if lineage == self.lineage() { Ok(()) } else { Err(IoError::Failed) }
    }

    fn gate(&self, gate: Gate, now: Millis) -> Result<(), IoError> {
        match gate {
            Gate::Open => Ok(()),
            // The operator's `fail` answers for a moment what would wait.
            Gate::Wait(_) if now.0 < self.failing_until.load(Ordering::Acquire) => Err(IoError::Failed),
            Gate::Wait(_) => Err(IoError::Wait),
            Gate::Refused(Refused::NotOwner) => Err(IoError::NotOwner),
            Gate::Refused(Refused::NoData | Refused::Failed) => Err(IoError::Failed),
        }
    }
    /// Names and attributes are not held back by the quorum, only content is.
    const fn control_gate(gate: Gate) -> Gate {
        match gate {
            Gate::Wait(Wait::MaxLag | Wait::Frozen) => Gate::Open,
            other => other,
        }
    }
    pub(super) fn check_readable(&self) -> Result<(), IoError> {
        let now = self.node().now();
        if now.0 <= self.readable_until.load(Ordering::Acquire) {
            return Ok(());
        }
        let gate = self.core.lock().machine.may_read(now);
        self.gate(gate, now)
    }
    /// True when this host owns the image and its epoch has begun.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        let now = self.node().now();
        !matches!(self.core.lock().machine.may_write(now), Gate::Refused(_) | Gate::Wait(Wait::Election))
    }
    /// True when the newest epoch known here is this host's, whether or not it can write now.
    #[must_use]
    pub fn is_owner_here(&self) -> bool {
        self.store.head().epoch.host == self.node().identity.host
    }

    /// Runs `f` under the lock with an environment, then carries out what the machine asked for.
    pub(super) fn locked<R>(
        self: &Arc<Self>,
        f: impl FnOnce(&mut Core, &mut Env<'_>, &mut Vec<Output>) -> R,
    ) -> R {
        let node = self.node();
        let mut core = self.core.lock();
        let mut out = Vec::new();
        let result = node.with_env(self, |env| f(&mut core, env, &mut out));
        // Before anybody is told of it.
        self.publish(&core);
        self.execute(&node, &mut core, out);
        self.unlock(core);
        result
    }

    /// One input to the machine.
    pub(crate) fn input(self: &Arc<Self>, input: Input) {
        self.locked(|core, env, out| core.machine.handle(env, input, out));
    }

    /// Publishes what readers look at without the lock.
    fn publish(&self, core: &Core) {
        self.size_bytes.store(core.machine.state().size_bytes, Ordering::Release);
        let until = core.machine.readable_until().map_or(0, |until| until.0);
        self.readable_until.store(until, Ordering::Release);
    }

    /// Publishes what other threads read without the lock, gives it up, and makes the deferred calls.
    pub(super) fn unlock(&self, mut core: MutexGuard<'_, Core>) {
        self.publish(&core);
        let next = core.machine.next_deadline().map_or(u64::MAX, |d| d.0);
        self.deadline.store(next, Ordering::Release);
        let deferred = std::mem::take(&mut core.deferred);
        drop(core);
        deferred.into_iter().for_each(|call| call());
    }

    pub(super) fn appended(&self, update: &Update, payload: Bytes) {
        self.head.store(update.header.seq.0, Ordering::Release);
        let Some(node) = self.node.upgrade() else { return };
        node.appended_bytes.fetch_add(payload.len() as u64, Ordering::Relaxed);
        let lines = self.lines.lock();
        // Only the owner's streams go on with what is appended: other copies keep nothing, and who asks one of
        // them is served from its log.
        let Some(wanted) = lines.values().filter_map(|l| l.feeds_from()).min() else { return };
        let bytes = payload.len();
        let mut ring = self.ring.lock();
        ring.push(RingItem::new(update, payload));
        // What every stream has passed goes at once: its memory is used again while it is in the processor's cache.
        ring.trim_below(wanted);
        drop(ring);
        lines.values().for_each(|l| l.appended(bytes));
    }
    pub(super) fn head_moved_back(&self) {
        self.head.store(self.store.head().seq.0, Ordering::Release);
        self.ring.lock().clear();
        self.lineage.fetch_add(1, Ordering::AcqRel);
        self.content_changed();
    }
    pub(super) fn content_changed(&self) {
        self.content_version.fetch_add(1, Ordering::AcqRel);
        if let Some(node) = self.node.upgrade() {
            node.claims_changed();
        }
    }

    /// Numbers, chains and stores one update of the owner's, if the gate is open.
    pub(super) fn append_checked(
        self: &Arc<Self>,
        lineage: Option<u64>,
        payload: Bytes,
        digests: usize,
        space: Space,
        make: impl FnOnce(&ImageState) -> Option<Draft>,
    ) -> Result<(), IoError> {
        let append = |core: &mut Core, env: &mut Env<'_>, out: &mut Vec<Output>| {
            if let Some(lineage) = lineage {
                self.check_lineage(lineage)?;
            }
            let gate = core.machine.may_write(env.now);
            self.gate(if space == Space::Control { Self::control_gate(gate) } else { gate }, env.now)?;
            let Some(draft) = make(core.machine.state()) else { return Ok::<_, IoError>(false) };
            let header_bytes = FIXED_BYTES + args_bytes(&draft.op) + 8 * MEMBERS_MAX + Digest::LEN * digests;
            let reserved = self.store.reserve(header_bytes, payload.len() / BLOCK_BYTES, space)?;
            let update = core.machine.append(env, draft, out);
            self.store_own(core, env, out, reserved, &update, payload)?;
            let alone = self.node().writers.note(self.id, env.now);
            let flush_expected = core.flushes.appended();
            if flush_expected {
                core.machine.sync_members(env, out);
            }
            Ok(flush_expected && alone)
        };
        let (flush_is_next, lines) = spot::gather(|| self.locked(append));
        if flush_is_next? {
            self.send_here(lines);
            self.flush_expected.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whoever wrote last has his answer. If he is expected to flush next, this thread makes the log durable
    /// meanwhile; as [`Image::flush`] does it.
    pub fn answered(self: &Arc<Self>) {
        if self.flush_expected.load(Ordering::Relaxed)
            && self.flush_expected.swap(false, Ordering::Relaxed)
            && let Some(_turn) = self.node().caller_sync()
        {
            self.locked_and_sync(|core, _, out| core.machine.sync_local(out));
        }
    }

    /// Sends what members wait for from this thread, if it is none of the runtime's and writes to no other image
    /// go on: waking one of those takes longer than sending.
    fn send_here(&self, lines: Woken) {
        let node = self.node();
        if node.is_outside() && node.writers.note(self.id, node.now()) {
            lines.run(node.runtime());
        }
    }

    /// Stores an update that has its number already: any error from here on stops the image.
    fn store_own(
        &self,
        core: &mut Core,
        env: &mut Env<'_>,
        out: &mut Vec<Output>,
        reserved: Reservation,
        update: &Update,
        payload: Bytes,
    ) -> Result<(), IoError> {
        if let Err(e) = self.store.append(reserved, update, &payload) {
            tracing::error!(image = %self.id, "stopped after an error of the store: {e}");
            core.machine.handle(env, Input::StoreFailed, out);
            return Err(IoError::Failed);
        }
        self.appended(update, payload);
        Ok(())
    }

    /// Stores an update of the machine's own making.
    pub(super) fn store_local(&self, update: &Update) -> Result<(), StoreError> {
        let reserved = self.store.reserve(update.bytes.len(), 0, Space::Control)?;
        self.store.append(reserved, update, &[])?;
        self.appended(update, Bytes::new());
        Ok(())
    }

    /// Appends an operation and a Seal over it: what block-level sync rests on.
    pub(super) fn append_vouched(self: &Arc<Self>, draft: Draft) -> Result<(Update, Update), IoError> {
        self.locked(|core, env, out| {
            if !core.machine.may_vouch() {
                return Err(IoError::Wait);
            }
            let bytes = FIXED_BYTES + args_bytes(&draft.op) + 8 * MEMBERS_MAX;
            let reserved = self.store.reserve(bytes, 0, Space::Control)?;
            let reserved_seal = self.store.reserve(SEAL_BYTES, 0, Space::Control)?;
            let (first, seal) = core.machine.append_vouched(env, draft, out);
            self.store_own(core, env, out, reserved, &first, Bytes::new())?;
            self.store_own(core, env, out, reserved_seal, &seal, Bytes::new())?;
            Ok((first, seal))
        })
    }

    /// Appends a Seal and freezes the content it ends: members asked before freeze theirs there too.
    pub(super) fn seal_and_view(self: &Arc<Self>) -> Result<View, IoError> {
        self.locked(|core, env, out| {
            self.gate(Self::control_gate(core.machine.may_write(env.now)), env.now)?;
            let reserved = self.store.reserve(SEAL_BYTES, 0, Space::Control)?;
            let seal = core.machine.seal(env, out);
            self.store_own(core, env, out, reserved, &seal, Bytes::new())?;
            Ok(self.store.view())
        })
    }

    /// The durability point. `done` is called once, from any thread, never from within this call's lock.
    ///
    /// A caller outside of the runtime's threads (one of the mount's) makes the local log durable itself while
    /// the members do the same, which saves waking another thread; as long as enough such callers are left.
    pub fn flush(self: &Arc<Self>, done: FlushDone) {
        let input = Input::Flush { token: self.token(Pending::Flush(done)) };
        self.flush_expected.store(false, Ordering::Relaxed);
        self.core.lock().flushes.flushed();
        match self.node().caller_sync() {
            Some(_turn) => self.input_and_sync(input),
            None => self.input(input),
        }
    }

    /// One input to the machine. When it asks for a local sync, this thread does it before it returns.
    pub(super) fn input_and_sync(self: &Arc<Self>, input: Input) {
        self.locked_and_sync(|core, env, out| core.machine.handle(env, input, out));
    }

    /// As [`Image::locked`]. When the machine asks for a local sync, this thread does it before it returns.
    fn locked_and_sync(self: &Arc<Self>, f: impl FnOnce(&mut Core, &mut Env<'_>, &mut Vec<Output>)) {
        let node = self.node();
        let (due, lines) = spot::gather(|| {
            let mut core = self.core.lock();
            core.sync_here = true;
            let mut out = Vec::new();
            node.with_env(self, |env| f(&mut core, env, &mut out));
            self.execute(&node, &mut core, out);
            core.sync_here = false;
            let due = std::mem::take(&mut core.sync_due);
            self.unlock(core);
            due
        });
        self.send_here(lines);
        if due {
            self.sync_log();
        }
    }

    /// Makes the log durable and tells the machine.
    pub(super) fn sync_log(self: &Arc<Self>) {
        let began = Instant::now();
        let synced = self.store.sync();
        self.node().inline_syncs.lasted(began.elapsed());
        match synced {
            Ok(head) => self.input(Input::Synced { head }),
            Err(e) => {
                tracing::error!(image = %self.id, "stopped: cannot make the log durable: {e}");
                self.input(Input::StoreFailed);
            }
        }
    }

    /// Calls `wake` when a waiting operation should be tried again; at the latest within a second.
    pub fn notify_ready(&self, wake: Wake) {
        self.wakes.lock().push(wake);
        // The gate may have opened after the caller was turned away and before it asked to be told.
        let now = self.node().now();
        let open = {
            let core = self.core.lock();
            core.machine.may_read(now) == Gate::Open && core.machine.may_write(now) == Gate::Open
        };
        if open {
            self.wake_all();
        }
    }
    pub(super) fn wake_all(&self) {
        let wakes = std::mem::take(&mut *self.wakes.lock());
        wakes.into_iter().for_each(|wake| wake());
    }

    pub(crate) fn ring_from(&self, from: Seq, bytes_max: usize) -> Option<Vec<RingItem>> {
        self.ring.lock().from(from, bytes_max)
    }
    pub(crate) fn log_from(&self, from: Seq, bytes_max: usize) -> Result<Vec<RingItem>, StoreError> {
        let entries = self.store.read_log(from, bytes_max)?;
        Ok(entries.into_iter().map(|e| from_log(&e.update, e.payload)).collect())
    }

    /// Takes updates (header and payload) from the stream of `from`, in order: checks payload, chain and
    /// certificate of each, appends. Says how many were not taken.
    pub(super) fn take_all(self: &Arc<Self>, from: HostId, updates: Vec<(Bytes, Bytes)>) -> usize {
        let mut refused = updates.len();
        let decoded: Vec<_> = updates.into_iter().map(|(h, payload)| (Update::decode(&h), payload)).collect();
        let whole = match self.store.kind() {
            MemberRole::Witness => decoded.iter().map(|(_, payload)| payload.is_empty()).collect(),
            MemberRole::Replica => payloads_match(decoded.iter().map(|(update, payload)| {
                (update.as_ref().map_or(&[][..], |u| &u.header.digests[..]), &payload[..])
            })),
        };
        let mut rest = decoded.into_iter().zip(whole).peekable();
        while rest.peek().is_some() {
            let mut taken = Vec::new();
            self.locked(|core, env, out| {
                // What the machine asks for is done before it sees the next one.
                while out.is_empty()
                    && let Some(((update, payload), whole)) = rest.next()
                {
                    let update = match update {
                        Ok(update) => update,
                        Err(e) => {
                            tracing::debug!(image = %self.id.short(), "a header that does not decode: {e}");
                            core.machine.refuse(env, from, None, Refusal::Malformed, out);
                            continue;
                        }
                    };
                    if !whole {
                        core.machine.refuse(env, from, Some(&update), Refusal::AlteredPayload, out);
                    } else if self.take_locked(core, env, out, from, &update, payload) {
                        let ends = matches!(update.header.op, Op::Seal(_));
                        taken.push(update);
                        // The content at a Seal is what copies are compared by.
                        if ends {
                            return;
                        }
                    }
                }
            });
            refused -= taken.len();
            taken.iter().for_each(|update| self.took_note(update));
        }
        refused
    }

    fn take_locked(
        &self,
        core: &mut Core,
        env: &mut Env<'_>,
        out: &mut Vec<Output>,
        from: HostId,
        update: &Update,
        payload: Bytes,
    ) -> bool {
        // Twice at most: a roll-back leaves it extending the head.
        for _ in 0..2 {
            match core.machine.check_update(env, from, update, out) {
                Ok(Take::Append) => return self.take_good(core, env, out, from, update, payload),
                Ok(Take::RollBack { to }) => {
                    if let Err(e) = self.roll_back(core, env, out, to, true) {
                        self.roll_back_failed(core, env, out, &e);
                        return false;
                    }
                }
                Ok(Take::Ignore) | Err(_) => return false,
            }
        }
        false
    }

    fn take_good(
        &self,
        core: &mut Core,
        env: &mut Env<'_>,
        out: &mut Vec<Output>,
        from: HostId,
        update: &Update,
        payload: Bytes,
    ) -> bool {
        let reserved = match self.store.reserve(update.bytes.len(), payload.len() / BLOCK_BYTES, Space::Data)
        {
            Ok(r) => r,
            Err(StoreError::Full) => {
                // Parked, visibly: the owner tries again, and it goes on when there is space.
                core.machine.refuse(env, from, Some(update), Refusal::NoSpace, out);
                return false;
            }
            Err(e) => {
                tracing::error!(image = %self.id, "stopped after an error of the store: {e}");
                core.machine.handle(env, Input::StoreFailed, out);
                return false;
            }
        };
        if self.store_own(core, env, out, reserved, update, payload).is_err() {
            return false;
        }
        core.machine.took(env, update, out);
        true
    }

    fn took_note(&self, update: &Update) {
        match update.header.op {
            Op::Seal(_) => {
                let mut pin = self.sealed_view.lock();
                if pin.wanted && self.store.head().seq == update.header.seq {
                    *pin = SealPin { wanted: false, view: Some(self.store.view()) };
                }
            }
            Op::Root { .. } | Op::Policy(_) => {}
            _ => self.content_changed(),
        }
    }

    /// Milliseconds of the machine's deadline.
    pub(super) fn is_due(&self, now: Millis) -> bool {
        self.deadline.load(Ordering::Acquire) <= now.0
    }
}

fn args_bytes(op: &Op) -> usize {
    match op {
        Op::Write { .. } | Op::Zero { .. } | Op::Resize { .. } => 8,
        other => other.encode_args().len(),
    }
}
