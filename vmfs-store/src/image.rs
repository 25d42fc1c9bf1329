//! One image: its log, map and state.

use std::sync::Arc;

use vmfs_common::header::Update;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{BlockCount, BlockIndex, Head, ImageId, Seq};

use crate::error::StoreError;
use crate::fork::ForkInfo;
use crate::import::Import;
use crate::verify::VerifyReport;
use crate::view::View;

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
pub struct Reservation {}

/// An update of the log with its payload: the non-zero blocks in order, concatenated. A witness has
/// no payload.
#[derive(Debug, Clone)]
pub struct LogEntry {
    /// The header.
    pub update: Update,
    /// The payload.
    pub payload: Vec<u8>,
}

/// One image's copy in this store.
pub struct ImageStore {}

impl ImageStore {
    /// Which image.
    #[must_use]
    pub fn id(&self) -> ImageId {
        todo!()
    }
    /// Data, or headers only.
    #[must_use]
    pub fn kind(&self) -> MemberRole {
        todo!()
    }
    /// The state at the head. An append copies it if somebody still holds the previous one.
    #[must_use]
    pub fn state(&self) -> Arc<ImageState> {
        todo!()
    }
    /// The last update appended.
    #[must_use]
    pub fn head(&self) -> Head {
        todo!()
    }
    /// The last update known to be on stable storage.
    #[must_use]
    pub fn durable_head(&self) -> Head {
        todo!()
    }
    /// Makes sure that an update with a header of `header_bytes` and `payload_blocks` non-zero
    /// blocks can be appended.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Latched`], or the disk's; nothing has changed.
    pub fn reserve(
        &self,
        header_bytes: usize,
        payload_blocks: usize,
        space: Space,
    ) -> Result<Reservation, StoreError> {
        todo!()
    }
    /// Appends the update that extends the head. `payload` is its non-zero blocks in order, already
    /// checked against the digests (empty for a witness). Visible to reads on return, not durable
    /// before [`ImageStore::sync`].
    ///
    /// # Errors
    /// [`StoreError::NotExtending`] without effect; any other error latches the image.
    pub fn append(&self, r: Reservation, update: &Update, payload: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// On return everything appended before the call is on stable storage. Concurrent calls share
    /// one device flush. Returns the durable head.
    ///
    /// # Errors
    /// Any error latches the image.
    pub fn sync(&self) -> Result<Head, StoreError> {
        todo!()
    }
    /// Reads whole blocks from `start`. Never-written blocks and blocks beyond the size are zeros.
    ///
    /// # Errors
    /// [`StoreError::BadBlock`] when a block's checksum is wrong, [`StoreError::NoData`] at a
    /// witness, or the disk's.
    pub fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// The content and state at the head, unchanging. O(1). Its segments stay until it is dropped.
    #[must_use]
    pub fn view(&self) -> View {
        todo!()
    }
    /// The first update still in the log (head + 1 when the log is empty).
    #[must_use]
    pub fn log_start(&self) -> Seq {
        todo!()
    }
    /// The update with this number, if the log still holds it.
    ///
    /// # Errors
    /// The disk's, or [`StoreError::Corrupt`].
    pub fn update_at(&self, seq: Seq) -> Result<Option<Update>, StoreError> {
        todo!()
    }
    /// The head this copy had after update `seq`, as far as the log or the state remember.
    ///
    /// # Errors
    /// As [`ImageStore::update_at`].
    pub fn head_at(&self, seq: Seq) -> Result<Option<Head>, StoreError> {
        todo!()
    }
    /// Updates from `from` on with their payloads, at least one (if there is one) and then while
    /// they fit into `bytes_max`. Empty at the head. Sees updates that are not yet synced.
    ///
    /// # Errors
    /// [`StoreError::Trimmed`], [`StoreError::BadPayload`], or the disk's.
    pub fn read_log(&self, from: Seq, bytes_max: usize) -> Result<Vec<LogEntry>, StoreError> {
        todo!()
    }
    /// Goes back to the content and state after `to`. Durable on return. The tail is kept as a fork
    /// when asked for; `None` when there was no tail.
    ///
    /// # Errors
    /// [`StoreError::NotInHistory`], [`StoreError::CannotRollBack`] (a block-level sync is needed),
    /// or the disk's.
    pub fn roll_back(&self, to: Head, keep_fork: bool) -> Result<Option<ForkInfo>, StoreError> {
        todo!()
    }
    /// The kept forks, oldest first.
    #[must_use]
    pub fn forks(&self) -> Vec<ForkInfo> {
        todo!()
    }
    /// Gives up a fork. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::NoFork`], or the disk's.
    pub fn drop_fork(&self, name: &str) -> Result<(), StoreError> {
        todo!()
    }
    /// As [`ImageStore::read_log`], from a fork (its updates begin after its ancestor).
    ///
    /// # Errors
    /// [`StoreError::NoFork`], or as [`ImageStore::read_log`].
    pub fn read_fork(&self, name: &str, from: Seq, bytes_max: usize) -> Result<Vec<LogEntry>, StoreError> {
        todo!()
    }
    /// The log from `seq` on is wanted by a member: kept, up to the configured bytes. Until the
    /// first call everything within that bound is kept.
    pub fn retain_from(&self, seq: Seq) {
        todo!()
    }
    /// The highest committed update: one checkpoint at or below it is kept.
    pub fn set_commit(&self, seq: Seq) {
        todo!()
    }
    /// Blocks that hold data. Exact at checkpoints; in between it may be off by blocks whose old
    /// map page was not in memory when they were overwritten.
    #[must_use]
    pub fn allocated_blocks(&self) -> BlockCount {
        todo!()
    }
    /// The first block at or after `from` that holds data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_data(&self, from: BlockIndex) -> Result<Option<BlockIndex>, StoreError> {
        todo!()
    }
    /// The first block at or after `from` that holds no data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_hole(&self, from: BlockIndex) -> Result<BlockIndex, StoreError> {
        todo!()
    }
    /// Makes recovery start from here: writes the map and the state. Appends go on meanwhile.
    ///
    /// # Errors
    /// The disk's. The image stays usable unless its log could not be synced.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        todo!()
    }
    /// Starts building new content beside the present one, from nothing or from a copy of it.
    ///
    /// # Errors
    /// [`StoreError::Importing`], [`StoreError::NoData`] at a witness.
    pub fn begin_import(self: &Arc<Self>, from_copy: bool) -> Result<Import, StoreError> {
        todo!()
    }
    /// Replaces a damaged block's bytes by the right ones, which must have the block's digest.
    /// Durable on return.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], or the disk's.
    pub fn rewrite_block(&self, index: BlockIndex, data: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// Checks the retained log and the content against their digests; `progress` gets (done, total)
    /// in blocks.
    ///
    /// # Errors
    /// The disk's; damage is reported, not an error.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, StoreError> {
        todo!()
    }
    /// Why the image is stopped, when it is.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        todo!()
    }
}
