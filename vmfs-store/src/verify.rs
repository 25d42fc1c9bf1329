//! Checking everything an image holds against its digests, and repairing a block.

use std::sync::Arc;

use vmfs_common::hash::block_digest;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Seq};

use crate::error::{IoContext as _, StoreError};
use crate::image::ImageStore;
use crate::log::walk;
use crate::map::{BLOCKS_MAX, Entry};
use crate::segment::{PAGE_U64, Segment, file_name};
use crate::view::{DigestReader, Wait, read_entries};

/// What [`crate::ImageStore::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Updates of the retained log that were checked.
    pub updates: u64,
    /// Blocks of the content that were checked.
    pub blocks: u64,
    /// Blocks of the content that are damaged.
    pub bad_blocks: Vec<BlockIndex>,
    /// Updates of the log whose header or payload is damaged.
    pub bad_updates: Vec<Seq>,
}

impl ImageStore {
    /// Checks the retained log (that it chains, and every payload) and the content against their
    /// digests. `progress` gets (done, total) in updates and blocks.
    ///
    /// # Errors
    /// The disk's; damage is reported, not an error.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, StoreError> {
        let (chain, log_start, state) = {
            let tail = self.tail.lock();
            (Arc::clone(&tail.chain), tail.log_start, Arc::clone(&tail.state))
        };
        let content = self.map.read().content.clone();
        let mut report = VerifyReport::default();
        let head = state.head().seq;
        let blocks = self.healing(|| content.count_data(&self.shared, 0..BLOCKS_MAX))?;
        let total = (head.0 + 1).saturating_sub(log_start.0) + blocks;
        let mut parent = None;
        let mut next = log_start;
        if log_start <= head {
            let walked = walk(&self.shared, &chain, log_start, head, |seg, record, update| {
                let h = &update.header;
                let chained = parent.is_none_or(|p| p == h.parent);
                let whole = match record.payload(&self.shared, seg)? {
                    Some(p) => {
                        let digests = h.digests.iter().filter(|d| !d.is_zero());
                        self.kind == MemberRole::Witness
                            || p.chunks_exact(BLOCK_BYTES).map(block_digest).eq(digests.copied())
                    }
                    None => false,
                };
                if !chained || !whole {
                    report.bad_updates.push(h.seq);
                }
                parent = Some(update.digest);
                next = h.seq.next();
                report.updates += 1;
                progress(report.updates, total);
                Ok(true)
            });
            match walked {
                Err(StoreError::Corrupt { .. }) => report.bad_updates.push(next),
                other => other?,
            }
        }
        let done = report.updates;
        let mut reader = DigestReader::new(&self.shared);
        let mut buf = vec![0u8; BLOCK_BYTES];
        content.for_each(&self.shared, 0..BLOCKS_MAX, |start, entries| {
            for (at, entry) in (start..).zip(entries).filter(|(_, e)| e.is_data()) {
                let read =
                    read_entries(&self.shared, &content.segments, at, &[*entry], &mut buf, Wait::ForDisk);
                let good = match read {
                    Ok(_) => {
                        let digest = reader.digest(&content.segments, *entry)?;
                        digest.is_some_and(|d| d == block_digest(&buf))
                    }
                    Err(StoreError::BadBlock { .. }) => false,
                    Err(e) => return Err(e),
                };
                if !good {
                    report.bad_blocks.push(BlockIndex(at));
                }
                report.blocks += 1;
            }
            progress(done + report.blocks, total);
            Ok(true)
        })?;
        Ok(report)
    }

    /// Replaces a damaged block's bytes by the right ones, which must have the block's digest.
    /// Durable on return.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`], [`StoreError::Corrupt`] when the disk does not keep them, or the disk's.
    pub fn rewrite_block(&self, index: BlockIndex, data: &[u8]) -> Result<(), StoreError> {
        self.check_data()?;
        let content = self.map.read().content.clone();
        let mut entry = [Entry::UNSET];
        self.healing(|| content.entries(&self.shared, index.0, &mut entry))?;
        let [entry] = entry;
        if !entry.is_data() || data.len() != BLOCK_BYTES || !entry.matches(crc32c::crc32c(data)) {
            return Err(StoreError::DigestMismatch);
        }
        let known = DigestReader::new(&self.shared).digest(&content.segments, entry)?;
        if known.is_some_and(|d| d != block_digest(data)) {
            return Err(StoreError::DigestMismatch);
        }
        let seg = content.segments.get(&entry.segment_no());
        let seg = seg.ok_or_else(|| StoreError::corrupt(format!("the place of block {}", index.0)))?;
        self.write_again(seg, entry.page(), data)
    }

    /// Writes a page of a segment again, and reads it back from the disk. Durable on return.
    pub(crate) fn write_again(&self, seg: &Segment, page: u32, data: &[u8]) -> Result<(), StoreError> {
        let what = || format!("repairing {}", file_name(seg.no));
        let file = self.shared.files.segment_apart(seg.no)?;
        let at = u64::from(page);
        let synced = file.write_at(data, at * PAGE_U64).and_then(|()| file.sync()).during(what);
        // What is right in memory alone would hide the damage.
        file.forget(at..at + 1).during(what)?;
        synced?;
        let mut found = vec![0u8; data.len()];
        file.read_at(&mut found, at * PAGE_U64).during(what)?;
        if found == data {
            return Ok(());
        }
        Err(StoreError::corrupt(format!("page {page} of {}, just written again,", file_name(seg.no))))
    }
}
