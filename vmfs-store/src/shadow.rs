//! Segments of blocks that are not part of the log: what an import brings, and what compaction moves. They
//! count only once a checkpoint lists them.

use vmfs_common::{Digest, Head, ImageId};

use crate::error::{IoContext as _, StoreError};
use crate::pool::Spare;
use crate::segment::{Kind, PAGE, SegmentHeader, file_name};
use crate::shared::Shared;
use crate::writer::{RecordKind, SegmentWriter, pages_needed, record_bytes};

/// Whose blocks a shadow segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Of an import: within a record's span of indices, the others are zeros.
    Import,
    /// Copied from other segments. They are older than what the log holds from the segment with this
    /// generation on; 0 when there was no log.
    Moved { before: u64 },
}

/// The ordinal in the header of a segment of moved blocks; imports have 0.
const ORDINAL_MOVED: u64 = 1;

impl Origin {
    /// What the header of a shadow segment says.
    pub(crate) fn of(header: &SegmentHeader) -> Self {
        match header.ordinal {
            ORDINAL_MOVED if header.link == Head::default() => Self::Moved { before: header.prev_generation },
            _ => Self::Import,
        }
    }
}

/// Begins a shadow segment. Not synced.
pub(crate) fn begin(
    shared: &Shared,
    image: ImageId,
    spare: Spare,
    origin: Origin,
) -> Result<SegmentWriter, StoreError> {
    let (ordinal, prev_generation) = match origin {
        Origin::Import => (0, 0),
        Origin::Moved { before } => (ORDINAL_MOVED, before),
    };
    let header = SegmentHeader {
        kind: Kind::Shadow,
        class: spare.class,
        store: shared.store,
        image,
        generation: shared.generations.next(),
        ordinal,
        prev_generation,
        link: Head::default(),
    };
    SegmentWriter::begin(spare, &header)
}

/// Ends a shadow segment. On return it is complete and durable, its name too.
pub(crate) fn close(shared: &Shared, mut w: SegmentWriter) -> Result<(), StoreError> {
    w.close();
    // Twice: the second round writes the other copy of the last header pages.
    for _ in 0..2 {
        if w.prepare_sync(0)? {
            w.file.sync().during(|| format!("syncing {}", file_name(w.seg.no)))?;
        }
        w.finish_sync();
    }
    shared.pool.names.sync(shared, w.name_no)?;
    w.retire(shared);
    Ok(())
}

/// One record of blocks, before it is written.
pub(crate) struct BlocksRecord {
    body: Vec<u8>,
    /// Checksums of the blocks.
    pub(crate) crcs: Vec<u32>,
}

impl BlocksRecord {
    /// Of blocks with these indices and digests, whose bytes are `payload`.
    pub(crate) fn new(blocks: impl Iterator<Item = (u64, Digest)> + Clone, payload: &[u8]) -> Self {
        let crcs = payload.chunks_exact(PAGE).map(crc32c::crc32c).collect();
        let mut body: Vec<u8> = blocks.clone().flat_map(|(i, _)| i.to_le_bytes()).collect();
        body.extend(blocks.flat_map(|(_, d)| *d.as_bytes()));
        Self { body, crcs }
    }
    /// Pages it takes at most.
    pub(crate) fn pages(&self) -> Result<u32, StoreError> {
        pages_needed(record_bytes(self.body.len(), self.crcs.len()), self.crcs.len())
    }
    /// Writes it as the segment's record `number`; returns the first payload page. The caller has made sure
    /// that it fits. Not synced.
    pub(crate) fn append(
        &self,
        w: &mut SegmentWriter,
        number: u64,
        payload: &[u8],
    ) -> Result<u32, StoreError> {
        w.append(RecordKind::Blocks, number, 0, payload, &self.crcs, &self.body)
    }
}
