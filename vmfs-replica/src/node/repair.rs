//! Damaged blocks: fetched from a member that still has the right content, checked against the digest
//! in the log, put back. And what other hosts ask to see of this copy.

use std::sync::Arc;
use std::time::Duration;

use vmfs_common::hash::block_digest;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, Head};
use vmfs_store::{MERKLE_ROOT_LEVEL, StoreError};

use super::ask::{Ask, BLOCK_INDEX_END, BLOCKS_MAX, Told};
use super::image::Image;
use super::io::IoError;

/// Repairs under way or given up, per image.
const REPAIRS_MAX: usize = 1024;
/// A block that nobody could give is asked for again after this.
const GIVEN_UP: Duration = Duration::from_secs(5);

impl Image {
    /// What a failed read means to the guest: a damaged block is being repaired (wait), or cannot be.
    pub(super) fn bad_block(&self, e: StoreError) -> IoError {
        let StoreError::BadBlock { index } = e else { return e.into() };
        let mut repairs = self.repairs.lock();
        match repairs.get(&index) {
            Some(true) => IoError::Wait,
            Some(false) => IoError::Store(StoreError::BadBlock { index }),
            None if repairs.len() >= REPAIRS_MAX => IoError::Store(StoreError::BadBlock { index }),
            None => {
                let node = self.node();
                let Some(image) = node.image(self.id) else { return IoError::Failed };
                repairs.insert(index, true);
                tracing::error!(image = %self.id, block = index.0, "damaged block: looking for another copy");
                node.spawn(async move { image.repair(index).await });
                IoError::Wait
            }
        }
    }

    async fn repair(self: Arc<Self>, index: BlockIndex) {
        let fixed = self.try_repair(index).await;
        if fixed {
            tracing::warn!(image = %self.id, block = index.0, "damaged block repaired from another copy");
            self.repairs.lock().remove(&index);
        } else {
            tracing::error!(image = %self.id, block = index.0, "damaged block: no good copy can be reached");
            self.repairs.lock().insert(index, false);
        }
        self.wake_all();
        if !fixed {
            tokio::time::sleep(GIVEN_UP).await;
            self.repairs.lock().remove(&index);
        }
    }

    async fn try_repair(&self, index: BlockIndex) -> bool {
        let node = self.node();
        let digest = match self.store.view().digests(index, 1) {
            Ok(d) => d[0],
            Err(e) => {
                tracing::error!(image = %self.id, block = index.0, "its digest cannot be read either: {e}");
                return false;
            }
        };
        let ask = Ask::Fetch { image: self.id, wanted: vec![(index, digest)] };
        for host in node.connected() {
            if let Ok((Told::Fetched { here }, raw)) = node.ask(host, &ask).await
                && here == [true]
                && raw.len() == BLOCK_BYTES
                && block_digest(&raw) == digest
            {
                match tokio::task::block_in_place(|| self.store.rewrite_block(index, &raw)) {
                    Ok(()) => return true,
                    Err(e) => tracing::error!(image = %self.id, block = index.0, "cannot be rewritten: {e}"),
                }
            }
        }
        false
    }

    /// Damaged blocks that could not be repaired, for status.
    pub fn bad_blocks(&self) -> u64 {
        self.repairs.lock().len() as u64
    }

    /// Answers [`Ask::Fetch`]: only content that matches the digest asked for is given.
    pub(super) fn fetch_for_peer(&self, wanted: &[(BlockIndex, Digest)]) -> (Told, Vec<u8>) {
        let mut here = Vec::new();
        let mut raw = Vec::new();
        let mut buf = vec![0u8; BLOCK_BYTES];
        for (index, digest) in wanted.iter().take(BLOCKS_MAX) {
            let good = index.0 < BLOCK_INDEX_END
                && self.store.read(*index, &mut buf).is_ok()
                && block_digest(&buf) == *digest;
            here.push(good);
            if good {
                raw.extend_from_slice(&buf);
            }
        }
        (Told::Fetched { here }, raw)
    }

    /// Answers [`Ask::MerkleAt`]: of the view kept at the Seal that was announced.
    pub(super) fn merkle_for_peer(&self, head: Head) -> (Told, Vec<u8>) {
        let view = self.sealed_view.lock().view.clone();
        let told = match view {
            Some(view) if view.head() == head => match view.merkle(MERKLE_ROOT_LEVEL, 0) {
                Ok(root) => Told::Merkle { head, root },
                Err(_) => Told::Gone,
            },
            Some(view) if view.head().seq > head.seq => Told::Gone,
            _ => Told::NotYet,
        };
        (told, Vec::new())
    }
}
