//! An unchanging content and state of an image.

use std::sync::Arc;

use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BlockCount, BlockIndex, Digest, Head, ImageId};

use crate::error::StoreError;
use crate::map::{BLOCKS_MAX, Content, Entry, Segments};
use crate::merkle::{MerkleTree, merkle_tree};
use crate::records::{Record, record_of_payload};
use crate::shared::Shared;

/// Content and state after one update. Segments it needs stay until it is dropped.
#[derive(Clone)]
pub struct View {
    shared: Arc<Shared>,
    image: ImageId,
    kind: MemberRole,
    state: Arc<ImageState>,
    content: Content,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("image", &self.image).field("head", &self.head()).finish_non_exhaustive()
    }
}

impl View {
    pub(crate) const fn new(
        shared: Arc<Shared>,
        image: ImageId,
        kind: MemberRole,
        state: Arc<ImageState>,
        content: Content,
    ) -> Self {
        Self { shared, image, kind, state, content }
    }
    /// The state.
    #[must_use]
    pub const fn state(&self) -> &Arc<ImageState> {
        &self.state
    }
    /// The last update it contains.
    #[must_use]
    pub fn head(&self) -> Head {
        self.state.head()
    }
    /// As [`crate::ImageStore::read`].
    ///
    /// # Errors
    /// The same.
    ///
    /// # Panics
    /// When `buf` is not whole blocks.
    pub fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<(), StoreError> {
        assert!(buf.len().is_multiple_of(BLOCK_BYTES), "invariant: reads are whole blocks");
        if self.kind == MemberRole::Witness {
            return Err(StoreError::NoData(self.image));
        }
        let mut entries = vec![Entry::UNSET; buf.len() / BLOCK_BYTES];
        self.content.entries(&self.shared, start.0, &mut entries)?;
        read_entries(&self.shared, &self.content.segments, start.0, &entries, buf, Wait::ForDisk).map(|_| ())
    }
    /// Blocks that hold data; exact.
    ///
    /// # Errors
    /// The disk's.
    pub fn allocated_blocks(&self) -> Result<BlockCount, StoreError> {
        self.content.count_data(&self.shared, 0..BLOCKS_MAX).map(BlockCount)
    }
    /// The first block at or after `from` that holds data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_data(&self, from: BlockIndex) -> Result<Option<BlockIndex>, StoreError> {
        Ok(self.content.next_data(&self.shared, from.0)?.map(BlockIndex))
    }
    /// The first block at or after `from` that holds no data.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_hole(&self, from: BlockIndex) -> Result<BlockIndex, StoreError> {
        self.content.next_hole(&self.shared, from.0).map(BlockIndex)
    }
    /// Digests of `count` blocks from `start`, from the log, without reading data; zero for blocks
    /// without data.
    ///
    /// # Errors
    /// The disk's, or [`StoreError::Corrupt`].
    pub fn digests(&self, start: BlockIndex, count: usize) -> Result<Vec<Digest>, StoreError> {
        digests(&self.shared, &self.content, start.0, count)
    }
    /// The Merkle tree over the digests: reads all of them.
    ///
    /// # Errors
    /// As [`View::digests`].
    pub fn merkle_tree(&self) -> Result<MerkleTree, StoreError> {
        merkle_tree(&self.shared, &self.content)
    }
}

/// What a read does about pieces that are not in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Waits for them.
    ForDisk,
    /// Has them fetched, and leaves them out.
    Never,
}

/// Reads the blocks that `entries` (of the blocks from `start`) name, and checks them. Pieces from many
/// places that are not in memory are fetched together. False with [`Wait::Never`] when something is missing.
pub(crate) fn read_entries(
    shared: &Shared,
    segments: &Segments,
    start: u64,
    entries: &[Entry],
    buf: &mut [u8],
    wait: Wait,
) -> Result<bool, StoreError> {
    let mut to_come = Vec::new();
    let mut at = 0;
    while at < entries.len() {
        let n = run_length(&entries[at..]);
        let piece = &mut buf[at * BLOCK_BYTES..(at + n) * BLOCK_BYTES];
        if !entries[at].is_data() {
            piece.fill(0);
        } else if n == entries.len() && wait == Wait::ForDisk {
            read_run(shared, segments, start, entries, piece, false)?;
        } else if !read_run(shared, segments, start + at as u64, &entries[at..at + n], piece, true)? {
            to_come.push(at..at + n);
        }
        at += n;
    }
    if wait == Wait::Never {
        return Ok(to_come.is_empty());
    }
    for run in to_come {
        let piece = &mut buf[run.start * BLOCK_BYTES..run.end * BLOCK_BYTES];
        read_run(shared, segments, start + run.start as u64, &entries[run], piece, false)?;
    }
    Ok(true)
}

/// How many of the first entries are consecutive places in one segment; 1 when the first is no data.
fn run_length(entries: &[Entry]) -> usize {
    let first = entries[0];
    if !first.is_data() {
        return 1;
    }
    let follows = |(i, e): &(usize, &Entry)| {
        e.is_data()
            && e.segment_no() == first.segment_no()
            && u64::from(e.page()) == u64::from(first.page()) + *i as u64
    };
    entries.iter().enumerate().take_while(follows).count()
}

/// Reads and checks consecutive places. False with `soon` when the disk was only asked for them.
fn read_run(
    shared: &Shared,
    segments: &Segments,
    start: u64,
    entries: &[Entry],
    piece: &mut [u8],
    soon: bool,
) -> Result<bool, StoreError> {
    let bad = |i: usize| StoreError::BadBlock { index: BlockIndex(start + i as u64) };
    let seg = segments.get(&entries[0].segment_no()).ok_or_else(|| bad(0))?;
    if !seg.read_payload(&shared.files, entries[0].page(), piece, soon)? {
        return Ok(false);
    }
    for (i, (block, entry)) in piece.chunks_exact(BLOCK_BYTES).zip(entries).enumerate() {
        if !entry.matches(crc32c::crc32c(block)) {
            return Err(bad(i));
        }
    }
    Ok(true)
}

/// Digests of data blocks, remembering the last record: neighbours are often in the same one.
pub(crate) struct DigestReader<'a> {
    shared: &'a Shared,
    last: Option<(u32, Record)>,
}

impl<'a> DigestReader<'a> {
    pub(crate) const fn new(shared: &'a Shared) -> Self {
        Self { shared, last: None }
    }
    /// The digest of the block that `entry` names; `None` when its record is damaged.
    pub(crate) fn digest(&mut self, segments: &Segments, entry: Entry) -> Result<Option<Digest>, StoreError> {
        Ok(self.described(segments, entry)?.map(|(_, digest)| digest))
    }
    /// Its checksum and its digest.
    pub(crate) fn described(
        &mut self,
        segments: &Segments,
        entry: Entry,
    ) -> Result<Option<(u32, Digest)>, StoreError> {
        let of = |r: &Record, at: usize| Some((*r.crcs.get(at)?, r.digest_of(at)?));
        let (no, page) = (entry.segment_no(), entry.page());
        if let Some((last_no, r)) = &self.last
            && *last_no == no
            && page >= r.payload_page
            && ((page - r.payload_page) as usize) < r.crcs.len()
        {
            return Ok(of(r, (page - r.payload_page) as usize));
        }
        let Some(seg) = segments.get(&no) else { return Ok(None) };
        let Some((record, at)) = record_of_payload(self.shared, seg, page)? else { return Ok(None) };
        let described = of(&record, at);
        self.last = Some((no, record));
        Ok(described)
    }
}

pub(crate) fn digests(
    shared: &Shared,
    content: &Content,
    start: u64,
    count: usize,
) -> Result<Vec<Digest>, StoreError> {
    let mut entries = vec![Entry::UNSET; count];
    content.entries(shared, start, &mut entries)?;
    let mut reader = DigestReader::new(shared);
    let mut out = vec![Digest::default(); count];
    for ((d, entry), index) in out.iter_mut().zip(entries).zip(start..) {
        if entry.is_data() {
            let found = reader.digest(&content.segments, entry)?;
            *d = found.ok_or_else(|| StoreError::corrupt(format!("the digest of block {index}")))?;
        }
    }
    Ok(out)
}
