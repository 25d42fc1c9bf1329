//! One image: its log, map and state.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex, RwLock};
use vmfs_common::header::Update;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BlockCount, BlockIndex, Head, ImageId, Seq};

use crate::checkpointing::Checkpoints;
use crate::compact::Compaction;
use crate::error::StoreError;
use crate::fork::ForkInfo;
use crate::log::{Tail, walk};
use crate::map::{Content, Entry};
use crate::shared::Shared;
use crate::view::{View, Wait, read_entries};

/// Blocks looked up at a time by a read.
const READ_BLOCKS: usize = 256;

/// What a reservation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Guest data: refused when only the reserve is left.
    Data,
    /// A control update (epoch change, deletion, members): may use the reserve.
    Control,
}

/// Space in the log for one update. Reservations of one image are used in the order they were made;
/// dropping one gives its space back.
#[derive(Debug)]
pub struct Reservation {
    pub(crate) counter: Arc<AtomicU32>,
    pub(crate) pages: u32,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.pages, Ordering::AcqRel);
    }
}

/// An update of the log with its payload: the non-zero blocks in order, concatenated. A witness has
/// no payload.
#[derive(Debug, Clone)]
pub struct LogEntry {
    /// The header.
    pub update: Update,
    /// The payload.
    pub payload: Vec<u8>,
}

/// The map and what is known of it without looking.
pub(crate) struct MapState {
    pub(crate) content: Content,
    pub(crate) allocated: u64,
}

/// Group commit.
pub(crate) struct SyncState {
    pub(crate) durable: Head,
    pub(crate) running: bool,
}

/// One image's copy in this store.
///
/// Locks are taken in the order `compaction`, `checkpoints`, `tail`, `map`; `syncing` is held for moments only,
/// and its `running` flag from before `tail` is taken.
pub struct ImageStore {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: ImageId,
    pub(crate) kind: MemberRole,
    pub(crate) tail: Mutex<Tail>,
    pub(crate) map: RwLock<MapState>,
    pub(crate) syncing: Mutex<SyncState>,
    pub(crate) sync_done: Condvar,
    pub(crate) checkpoints: Mutex<Checkpoints>,
    pub(crate) forks: Mutex<Vec<crate::fork::Fork>>,
    pub(crate) latch: OnceLock<String>,
    pub(crate) durable_seq: AtomicU64,
    pub(crate) commit: AtomicU64,
    pub(crate) retain: AtomicU64,
    /// See [`ImageStore::retain_for_catch_up`].
    pub(crate) catch_up: Mutex<Option<(Seq, u64)>>,
    pub(crate) importing: AtomicBool,
    pub(crate) compaction: Mutex<Compaction>,
    pub(crate) compacted_bytes: AtomicU64,
    /// Head seq at the last background round, and rounds since it changed.
    pub(crate) seen_seq: AtomicU64,
    pub(crate) rest_rounds: AtomicU32,
    /// Bytes of log some background rounds ago, and how many rounds: since then little was appended.
    pub(crate) quiet_from: AtomicU64,
    pub(crate) quiet_rounds: AtomicU32,
    /// One of the two checkpoints is damaged or was never made.
    pub(crate) checkpoint_missing: AtomicBool,
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore").field("id", &self.id).finish_non_exhaustive()
    }
}

impl ImageStore {
    pub(crate) fn assemble(
        shared: Arc<Shared>,
        id: ImageId,
        kind: MemberRole,
        tail: Tail,
        content: Content,
        checkpoints: Checkpoints,
        commit: Seq,
    ) -> Self {
        let head = tail.head();
        let allocated = content.base.allocated;
        Self {
            shared,
            id,
            kind,
            tail: Mutex::new(tail),
            map: RwLock::new(MapState { content, allocated }),
            syncing: Mutex::new(SyncState { durable: head, running: false }),
            sync_done: Condvar::new(),
            checkpoints: Mutex::new(checkpoints),
            forks: Mutex::default(),
            latch: OnceLock::new(),
            durable_seq: AtomicU64::new(head.seq.0),
            commit: AtomicU64::new(commit.0),
            retain: AtomicU64::new(0),
            catch_up: Mutex::new(None),
            importing: AtomicBool::new(false),
            compaction: Mutex::default(),
            compacted_bytes: AtomicU64::new(0),
            seen_seq: AtomicU64::new(0),
            rest_rounds: AtomicU32::new(0),
            quiet_from: AtomicU64::new(0),
            quiet_rounds: AtomicU32::new(0),
            checkpoint_missing: AtomicBool::new(false),
        }
    }
    /// Which image.
    #[must_use]
    pub const fn id(&self) -> ImageId {
        self.id
    }
    /// Data, or headers only.
    #[must_use]
    pub const fn kind(&self) -> MemberRole {
        self.kind
    }
    /// The state at the head. An append copies it if somebody still holds the previous one.
    #[must_use]
    pub fn state(&self) -> Arc<ImageState> {
        Arc::clone(&self.tail.lock().state)
    }
    /// The last update appended.
    #[must_use]
    pub fn head(&self) -> Head {
        self.tail.lock().head()
    }
    /// The last update known to be on stable storage.
    #[must_use]
    pub fn durable_head(&self) -> Head {
        self.syncing.lock().durable
    }
    /// Why the image is stopped, when it is.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        self.latch.get().cloned()
    }
    pub(crate) fn check_latch(&self) -> Result<(), StoreError> {
        match self.latch.get() {
            Some(cause) => Err(StoreError::Latched { image: self.id, cause: cause.clone() }),
            None => Ok(()),
        }
    }
    /// Stops the image for good if `result` is an error.
    pub(crate) fn or_latch<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(e) = &result {
            tracing::error!(image = %self.id, error = %e, "image stopped");
            let _ = self.latch.set(e.to_string());
        }
        result
    }
    pub(crate) fn check_data(&self) -> Result<(), StoreError> {
        if self.kind == MemberRole::Witness { Err(StoreError::NoData(self.id)) } else { Ok(()) }
    }
    /// Reads whole blocks from `start`. Never-written blocks and blocks beyond the size are zeros.
    ///
    /// # Errors
    /// [`StoreError::BadBlock`] when a block's checksum is wrong, [`StoreError::NoData`] at a
    /// witness, or the disk's.
    ///
    /// # Panics
    /// When `buf` is not whole blocks.
    pub fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<(), StoreError> {
        self.read_as(start, buf, Wait::ForDisk).map(|_| ())
    }
    /// As [`ImageStore::read`] if the blocks are in memory. Else begins to fetch them, leaves `buf` in any state
    /// and returns false: for callers that have other things to do than wait for the disk. (It may still wait
    /// for a page of the map.)
    ///
    /// # Errors
    /// As [`ImageStore::read`].
    ///
    /// # Panics
    /// When `buf` is not whole blocks.
    pub fn read_soon(&self, start: BlockIndex, buf: &mut [u8]) -> Result<bool, StoreError> {
        self.read_as(start, buf, Wait::Never)
    }
    fn read_as(&self, start: BlockIndex, buf: &mut [u8], wait: Wait) -> Result<bool, StoreError> {
        assert!(buf.len().is_multiple_of(BLOCK_BYTES), "invariant: reads are whole blocks");
        self.check_data()?;
        let mut at = start.0;
        let mut all = true;
        let mut entries = [Entry::UNSET; READ_BLOCKS];
        for piece in buf.chunks_mut(READ_BLOCKS * BLOCK_BYTES) {
            let n = piece.len() / BLOCK_BYTES;
            let (base, segments) = {
                let map = self.map.read();
                map.content.recent(at, &mut entries[..n]);
                (Arc::clone(&map.content.base), Arc::clone(&map.content.segments))
            };
            self.healing(|| base.fill(&self.shared, at, &mut entries[..n]))?;
            all &= read_entries(&self.shared, &segments, at, &entries[..n], piece, wait)?;
            at += n as u64;
        }
        Ok(all)
    }
    /// The content and state at the head, unchanging. O(1). Its segments stay until it is dropped.
    #[must_use]
    pub fn view(&self) -> View {
        let tail = self.tail.lock();
        let content = self.map.read().content.clone();
        View::new(Arc::clone(&self.shared), self.id, self.kind, Arc::clone(&tail.state), content)
    }
    /// The first update still in the log (head + 1 when the log is empty).
    #[must_use]
    pub fn log_start(&self) -> Seq {
        self.tail.lock().log_start
    }
    /// The update with this number, if the log still holds it.
    ///
    /// # Errors
    /// The disk's, or [`StoreError::Corrupt`].
    pub fn update_at(&self, seq: Seq) -> Result<Option<Update>, StoreError> {
        let (chain, start, head) = self.log_snapshot();
        if seq < start || seq > head || seq == Seq::ZERO {
            return Ok(None);
        }
        let mut found = None;
        walk(&self.shared, &chain, seq, seq, |_, _, update| {
            found = Some(update);
            Ok(false)
        })?;
        Ok(found)
    }
    /// The head this copy had after update `seq`, as far as the log or the state remember.
    ///
    /// # Errors
    /// As [`ImageStore::update_at`].
    pub fn head_at(&self, seq: Seq) -> Result<Option<Head>, StoreError> {
        if seq == Seq::ZERO {
            return Ok(Some(Head::default()));
        }
        if let Some(head) = self.state().known_head_at(seq) {
            return Ok(Some(head));
        }
        if let Some(update) = self.update_at(seq)? {
            return Ok(Some(update.head()));
        }
        // The one before the log's first: if another epoch began after it, the state would know.
        let next = self.update_at(seq.next())?.map(|u| u.header);
        Ok(next.map(|h| Head { epoch: h.epoch, seq, digest: h.parent }))
    }
    fn log_snapshot(&self) -> (Arc<Vec<crate::log::ChainSegment>>, Seq, Seq) {
        let tail = self.tail.lock();
        (Arc::clone(&tail.chain), tail.log_start, tail.head().seq)
    }
    /// Updates from `from` on with their payloads, at least one (if there is one) and then while
    /// they fit into `bytes_max`. Empty at the head. Sees updates that are not yet synced.
    ///
    /// # Errors
    /// [`StoreError::Trimmed`], [`StoreError::BadPayload`] when the first one's payload is damaged,
    /// or the disk's.
    pub fn read_log(&self, from: Seq, bytes_max: usize) -> Result<Vec<LogEntry>, StoreError> {
        let (chain, log_start, head) = self.log_snapshot();
        if from < log_start {
            return Err(StoreError::Trimmed { log_start });
        }
        read_entries_of_log(&self.shared, &chain, from, head, bytes_max)
    }
    /// The highest head of a kept fork that begins at this copy's head.
    #[must_use]
    pub fn cut_off(&self) -> Option<Head> {
        let head = self.head();
        let here = |f: &&crate::fork::Fork| f.info.ancestor == head;
        self.forks.lock().iter().filter(here).map(|f| f.info.head).max_by_key(Head::rank)
    }
    /// The kept forks, oldest first.
    #[must_use]
    pub fn forks(&self) -> Vec<ForkInfo> {
        self.forks.lock().iter().map(|f| f.info.clone()).collect()
    }
    /// As [`ImageStore::read_log`], from a fork (its updates begin after its ancestor).
    ///
    /// # Errors
    /// [`StoreError::NoFork`], or as [`ImageStore::read_log`].
    pub fn read_fork(&self, name: &str, from: Seq, bytes_max: usize) -> Result<Vec<LogEntry>, StoreError> {
        let fork = self.forks.lock().iter().find(|f| f.info.name == name).cloned();
        let fork = fork.ok_or_else(|| StoreError::NoFork(name.to_owned()))?;
        let from = from.max(fork.info.ancestor.seq.next());
        read_entries_of_log(&self.shared, &fork.chain, from, fork.info.head.seq, bytes_max)
    }
    /// The log from `seq` on is wanted by a member: kept, up to the configured bytes. Until the
    /// first call everything within that bound is kept.
    pub fn retain_from(&self, seq: Seq) {
        self.retain.store(seq.0, Ordering::Release);
    }
    /// The log from the given update on is wanted by a member that lags or is being brought up to date: kept
    /// up to this many bytes where that is more than the configured ones; `None`: by nobody. Neither holds on
    /// a disk that is nearly full.
    pub fn retain_for_catch_up(&self, wanted: Option<(Seq, u64)>) {
        *self.catch_up.lock() = wanted;
    }
    /// The highest committed update: one checkpoint at or below it is kept. It never goes back. What appended
    /// updates say of commit points does not count: whoever takes them knows whether they are to be believed.
    pub fn set_commit(&self, seq: Seq) {
        self.commit.fetch_max(seq.0, Ordering::AcqRel);
    }
    /// Blocks that hold data.
    #[must_use]
    pub fn allocated_blocks(&self) -> BlockCount {
        BlockCount(self.map.read().allocated)
    }
    /// The first block at or after `from` that holds data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_data(&self, from: BlockIndex) -> Result<Option<BlockIndex>, StoreError> {
        let content = self.map.read().content.clone();
        Ok(self.healing(|| content.next_data(&self.shared, from.0))?.map(BlockIndex))
    }
    /// The first block at or after `from` that holds no data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_hole(&self, from: BlockIndex) -> Result<BlockIndex, StoreError> {
        let content = self.map.read().content.clone();
        self.healing(|| content.next_hole(&self.shared, from.0)).map(BlockIndex)
    }
}

/// Reads updates `from..=head` of a chain with payload, at least one.
pub(crate) fn read_entries_of_log(
    shared: &Shared,
    chain: &[crate::log::ChainSegment],
    from: Seq,
    head: Seq,
    bytes_max: usize,
) -> Result<Vec<LogEntry>, StoreError> {
    let mut out: Vec<LogEntry> = Vec::new();
    let mut bytes = 0;
    if from > head {
        return Ok(out);
    }
    walk(shared, chain, from, head, |seg, record, update| {
        let size = update.bytes.len() + record.crcs.len() * BLOCK_BYTES;
        if !out.is_empty() && bytes + size > bytes_max {
            return Ok(false);
        }
        match record.payload(shared, seg)? {
            Some(payload) => out.push(LogEntry { update, payload }),
            None if out.is_empty() => return Err(StoreError::BadPayload { seq: update.header.seq }),
            None => return Ok(false),
        }
        bytes += size;
        Ok(bytes < bytes_max)
    })?;
    Ok(out)
}
