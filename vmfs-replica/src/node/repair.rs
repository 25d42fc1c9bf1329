//! Damaged blocks: fetched from a member that still has the right content, checked against the digest
//! in the log, put back. And what other hosts ask to see of this copy.

use std::sync::Arc;
use std::time::Duration;

use vmfs_common::hash::block_digest;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, Head, Seq};
use vmfs_store::{BadPayload, Rot, StoreError};

use super::ask::{Ask, BLOCK_INDEX_END, BLOCKS_MAX, Told};
use super::image::Image;
use super::io::IoError;

/// Repairs under way or given up, per image.
const REPAIRS_MAX: usize = 1024;
/// Where a repair came from, in messages.
const ANOTHER_COPY: &str = "from another host's copy";
/// A block that nobody could give is asked for again after this.
const GIVEN_UP: Duration = Duration::from_secs(5);

/// As [`BadPayload::name`] says it.
fn block_name(index: BlockIndex) -> String {
    format!("block {}", index.0)
}

impl Image {
    /// What a failed read means to the guest: a damaged block is being repaired (wait), or cannot be.
    pub(super) fn bad_block(&self, e: StoreError) -> IoError {
        let index = match e {
            StoreError::BadBlock { index } => index,
            // Reads of the newest state heal the map themselves; a pinned state is read again when it is whole.
            StoreError::BadMapPage { page, .. } if self.store.heal_map_page(page).is_ok() => {
                return IoError::Wait;
            }
            e => return e.into(),
        };
        let mut repairs = self.repairs.lock();
        match repairs.get(&index) {
            Some(true) => IoError::Wait,
            Some(false) => IoError::Store(StoreError::BadBlock { index }),
            None if repairs.len() >= REPAIRS_MAX => IoError::Store(StoreError::BadBlock { index }),
            None => {
                let node = self.node();
                let Some(image) = node.image(self.id) else { return IoError::Failed };
                repairs.insert(index, true);
                self.store.note_damage(&block_name(index));
                node.spawn(async move { image.repair(index).await });
                IoError::Wait
            }
        }
    }

    async fn repair(self: Arc<Self>, index: BlockIndex) {
        let fixed = self.try_repair(index).await;
        if fixed {
            self.store.note_repair(&block_name(index), ANOTHER_COPY);
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

    /// Replaces a damaged payload block from another member. True when there is nothing left to be done.
    pub(super) async fn repair_payload(&self, bad: &BadPayload) -> bool {
        let node = self.node();
        let mut asks = Vec::new();
        if let Some(block) = bad.block {
            asks.push(Ask::Fetch { image: self.id, wanted: vec![(block, bad.digest)] });
        }
        if let Some(seq) = bad.update {
            asks.push(Ask::FetchPayload { image: self.id, seq, digest: bad.digest });
        }
        for ask in &asks {
            for host in node.connected() {
                let Ok((Told::Fetched { here }, raw)) = node.ask(host, ask).await else { continue };
                if here != [true] {
                    continue;
                }
                match tokio::task::block_in_place(|| self.store.repair(bad, &raw)) {
                    Ok(true) => {
                        self.store.note_repair(&bad.name(), ANOTHER_COPY);
                        return true;
                    }
                    // Nothing refers to it any more; the next scrub does not meet it again.
                    Ok(false) => return true,
                    Err(e) => tracing::error!(image = %self.id, "{} cannot be rewritten: {e}", bad.name()),
                }
            }
        }
        false
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

    /// Damage found here, and what became of it.
    pub(crate) fn rot(&self) -> Rot {
        self.store.rot()
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

    /// Answers [`Ask::FetchPayload`].
    pub(super) fn payload_for_peer(&self, seq: Seq, digest: &Digest) -> (Told, Vec<u8>) {
        match self.store.payload_of(seq, digest) {
            Ok(Some(raw)) => (Told::Fetched { here: vec![true] }, raw),
            _ => (Told::Fetched { here: vec![false] }, Vec::new()),
        }
    }

    /// Answers [`Ask::MerkleAt`]: of the view kept at the Seal that was announced.
    pub(super) fn merkle_for_peer(&self, head: Head) -> (Told, Vec<u8>) {
        let view = self.sealed_view.lock().view.clone();
        let told = match view {
            Some(view) if view.head() == head => match view.merkle_tree() {
                Ok(tree) => Told::Merkle { head, root: tree.root() },
                Err(_) => Told::Gone,
            },
            Some(view) if view.head().seq > head.seq => Told::Gone,
            _ => Told::NotYet,
        };
        (told, Vec::new())
    }
}
