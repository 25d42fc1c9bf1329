//! What others may know of an image: for status, verification and forks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::header::Update;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Digest, Head, HostId, Seq};
use vmfs_proto::Status;
use vmfs_store::{ForkInfo, LogEntry, SpaceUse, StoreError, VerifyReport};

use super::image::Image;

impl Image {
    /// A snapshot of the machine.
    pub fn status(&self) -> Status {
        let now = self.node().now();
        let mut status = self.core.lock().machine.status(now);
        status.lineage = self.lineage();
        status
    }
    /// Owner of the latest epoch known here.
    pub fn owner(&self) -> Option<HostId> {
        self.status().owner
    }
    /// Data or headers.
    pub fn kind(&self) -> MemberRole {
        self.store.kind()
    }
    /// Bytes of blocks that hold data.
    pub fn stored_bytes(&self) -> u64 {
        self.store.allocated_blocks().bytes()
    }
    /// How much of the disk it takes.
    pub fn space_use(&self) -> SpaceUse {
        self.store.space_use()
    }
    /// Why the store has stopped the image, when it has.
    pub fn latched(&self) -> Option<String> {
        self.store.latched()
    }
    /// The first update still in the log.
    pub fn log_start(&self) -> Seq {
        self.store.log_start()
    }
    /// One update of the retained log.
    pub(crate) fn update_at(&self, seq: Seq) -> Result<Option<Update>, StoreError> {
        self.store.update_at(seq)
    }
    /// Reads and hashes everything.
    pub(crate) fn verify_content(
        &self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<VerifyReport, StoreError> {
        self.store.verify(progress)
    }
    /// Starts the repair of damaged blocks.
    pub(crate) fn ask_for_repair(&self, blocks: &[BlockIndex]) {
        for index in blocks {
            // The answer is for a reader, of which there is none.
            let _ = self.bad_block(StoreError::BadBlock { index: *index });
        }
    }
    /// Blocks copied so far by a block-level sync that is under way.
    pub fn pulling(&self) -> Option<u64> {
        (self.pulling.load(Ordering::Acquire) != 0).then(|| self.pulled_blocks.load(Ordering::Relaxed))
    }
    /// Requests waiting for a quorum or at the gate.
    pub fn waiting(&self) -> u64 {
        (self.status().flushes_waiting + self.wakes.lock().len()) as u64
    }
    /// How far the member that is furthest behind has got, of how much.
    pub fn progress(&self) -> (u64, Option<u64>) {
        let status = self.status();
        let least = status.members.iter().map(|m| m.durable_seq.0).min().unwrap_or(0);
        (least, Some(status.head.seq.0))
    }

    pub(crate) fn store_forks(&self) -> Vec<ForkInfo> {
        self.store.forks()
    }
    /// A fork's name, unique on this host.
    pub(crate) fn fork_public_name(&self, name: &str) -> String {
        format!("{}-{name}", self.id.short())
    }
    /// The store's name of a fork that has this public name.
    pub(crate) fn fork_name(&self, public: &str) -> Option<String> {
        self.store.forks().into_iter().map(|f| f.name).find(|n| self.fork_public_name(n) == public)
    }
    /// Updates of the fork with this public name, from `first` on: up to about `bytes_max` of payload, at
    /// least one unless there is none.
    pub(crate) fn read_fork(
        &self,
        public: &str,
        first: u64,
        bytes_max: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let name = self.fork_name(public).ok_or_else(|| StoreError::NoFork(public.to_owned()))?;
        self.store.read_fork(&name, Seq(first), bytes_max)
    }
    /// Deletes a fork for good.
    pub(crate) fn drop_fork(&self, name: &str) -> Result<(), StoreError> {
        self.store.drop_fork(name)
    }

    /// Appends a Seal and works out the Merkle root of the content it ends.
    pub(crate) async fn seal_and_merkle(self: &Arc<Self>) -> Result<(Head, Digest), String> {
        let image = self.clone();
        let work = move || {
            let view = image.seal_and_view().map_err(|e| e.to_string())?;
            let tree = view.merkle_tree().map_err(|e| e.to_string())?;
            Ok((view.head(), tree.root()))
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?
    }
}
