//! The owner's data path: bytes in and out of an image. Nothing here waits for the network; what
//! cannot be done now says [`IoError::Wait`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use vmfs_common::chain::Draft;
use vmfs_common::header::UPDATE_BLOCKS_MAX;
use vmfs_common::op::{Op, SIZE_MAX_BYTES};
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockCount, BlockIndex};
use vmfs_store::{Space, StoreError, View};

use super::blocks::{Content, hash_blocks};
use super::image::Image;

/// Why an operation on an image's content or attributes was not done.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// Not now: frozen, stalled, beginning an epoch, too far ahead of the quorum. Nothing was changed.
    #[error("not now")]
    Wait,
    /// This host does not own the image.
    #[error("another host owns the image")]
    NotOwner,
    /// The handle's lineage is no longer the image's, the image has failed, or an operator said so.
    #[error("the image has failed or is not what the handle was shown")]
    Failed,
    /// No space. Nothing was changed.
    #[error("no space")]
    Full,
    /// Beyond the largest image.
    #[error("too large")]
    TooLarge,
    /// The chain's limits do not allow it.
    #[error("limit reached")]
    Limit,
    /// A damaged block that could not be repaired, or the disk.
    #[error("{0}")]
    Store(StoreError),
}

impl From<StoreError> for IoError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Full => Self::Full,
            e => Self::Store(e),
        }
    }
}

fn grows(state: &ImageState, end_bytes: u64) -> Option<u64> {
    (end_bytes > state.size_bytes).then_some(end_bytes)
}

fn write_draft(content: &Content, state: &ImageState, end_bytes: u64) -> Draft {
    let size_after_bytes = grows(state, end_bytes);
    if content.is_all_zero() {
        let op = Op::Zero { size_after_bytes };
        return Draft { op, start: content.start, count: content.count(), digests: Vec::new(), flags: 0 };
    }
    Draft {
        op: Op::Write { size_after_bytes },
        start: content.start,
        count: content.count(),
        digests: content.digests.clone(),
        flags: 0,
    }
}

/// Reads bytes through a function that reads whole blocks and says whether it has.
fn read_bytes(
    size_bytes: u64,
    offset: u64,
    len: usize,
    buf: &mut Vec<u8>,
    read: impl Fn(BlockIndex, &mut [u8]) -> Result<bool, StoreError>,
) -> Result<bool, StoreError> {
    buf.clear();
    let end = size_bytes.min(offset.saturating_add(len as u64));
    if offset >= end {
        return Ok(true);
    }
    let skip = usize::try_from(offset % BLOCK_BYTES_U64).expect("invariant: below 4096");
    let want = usize::try_from(end - offset).expect("invariant: at most len");
    buf.resize((skip + want).next_multiple_of(BLOCK_BYTES), 0);
    if !read(BlockIndex::containing(offset), buf)? {
        return Ok(false);
    }
    if skip > 0 {
        buf.drain(..skip);
    }
    buf.truncate(want);
    Ok(true)
}

impl Image {
    /// Reads bytes of the newest state, fewer at the end.
    ///
    /// # Errors
    /// [`IoError::Wait`] while reads are frozen or a damaged block is being repaired.
    pub fn read(&self, lineage: u64, offset: u64, len: usize, buf: &mut Vec<u8>) -> Result<(), IoError> {
        let read = |start, out: &mut [u8]| self.store.read(start, out).map(|()| true);
        self.read_with(lineage, offset, len, buf, read).map(|_| ())
    }

    /// As [`Image::read`] if the bytes are in memory. Else begins to fetch them and returns false.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read_soon(
        &self,
        lineage: u64,
        offset: u64,
        len: usize,
        buf: &mut Vec<u8>,
    ) -> Result<bool, IoError> {
        self.read_with(lineage, offset, len, buf, |start, out| self.store.read_soon(start, out))
    }

    fn read_with(
        &self,
        lineage: u64,
        offset: u64,
        len: usize,
        buf: &mut Vec<u8>,
        read: impl Fn(BlockIndex, &mut [u8]) -> Result<bool, StoreError>,
    ) -> Result<bool, IoError> {
        self.check_lineage(lineage)?;
        self.check_readable()?;
        let size = self.size_bytes.load(Ordering::Acquire);
        read_bytes(size, offset, len, buf, read).map_err(|e| self.bad_block(e))
    }

    /// Reads bytes of a pinned state.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read_view(&self, view: &View, offset: u64, len: usize, buf: &mut Vec<u8>) -> Result<(), IoError> {
        let size = view.state().size_bytes;
        let read = |start, out: &mut [u8]| view.read(start, out).map(|()| true);
        read_bytes(size, offset, len, buf, read).map(|_| ()).map_err(|e| self.bad_block(e))
    }

    /// Writes bytes at any offset. Visible at once, durable after a flush.
    ///
    /// # Errors
    /// [`IoError`]; nothing was changed, except that a write of more than 2 MiB may have been done in part.
    pub fn write(self: &Arc<Self>, lineage: u64, offset: u64, data: &[u8]) -> Result<(), IoError> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > SIZE_MAX_BYTES) {
            return Err(IoError::TooLarge);
        }
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let room = UPDATE_BLOCKS_MAX * BLOCK_BYTES
                - usize::try_from(at % BLOCK_BYTES_U64).expect("invariant: below 4096");
            let (piece, tail) = rest.split_at(rest.len().min(room));
            self.write_piece(lineage, at, piece)?;
            at += piece.len() as u64;
            rest = tail;
        }
        Ok(())
    }

    fn write_piece(self: &Arc<Self>, lineage: u64, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let end = offset + data.len() as u64;
        let start = BlockIndex::containing(offset);
        if offset.is_multiple_of(BLOCK_BYTES_U64) && data.len().is_multiple_of(BLOCK_BYTES) {
            let content = hash_blocks(start, data);
            let _shared = self.edges.read();
            return self.write_content(lineage, &content, end);
        }
        // Read-modify-write: no other write of this image may come between the read and the map update.
        let _alone = self.edges.write();
        let content = self.widen(start, offset, data)?;
        self.write_content(lineage, &content, end)
    }

    fn widen(&self, start: BlockIndex, offset: u64, data: &[u8]) -> Result<Content, IoError> {
        let skip = usize::try_from(offset % BLOCK_BYTES_U64).expect("invariant: below 4096");
        let mut blocks = vec![0u8; (skip + data.len()).next_multiple_of(BLOCK_BYTES)];
        let last = blocks.len() - BLOCK_BYTES;
        let last_block = BlockIndex(start.0 + (last / BLOCK_BYTES) as u64);
        if !(skip + data.len()).is_multiple_of(BLOCK_BYTES) {
            self.store.read(last_block, &mut blocks[last..]).map_err(|e| self.bad_block(e))?;
        }
        if skip > 0 {
            self.store.read(start, &mut blocks[..BLOCK_BYTES]).map_err(|e| self.bad_block(e))?;
        }
        blocks[skip..skip + data.len()].copy_from_slice(data);
        Ok(hash_blocks(start, &blocks))
    }

    fn write_content(self: &Arc<Self>, lineage: u64, content: &Content, end: u64) -> Result<(), IoError> {
        self.append_checked(
            Some(lineage),
            content.payload.clone(),
            content.digests.len(),
            Space::Data,
            |state| Some(write_draft(content, state, end)),
        )
    }

    /// Makes a range zeros; whole blocks give their space back.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn zero(
        self: &Arc<Self>,
        lineage: u64,
        offset: u64,
        len: u64,
        keep_size: bool,
    ) -> Result<(), IoError> {
        let mut end = offset.checked_add(len).filter(|e| *e <= SIZE_MAX_BYTES).ok_or(IoError::TooLarge)?;
        let _alone = self.edges.write();
        let size = self.store.state().size_bytes;
        if keep_size {
            end = end.min(size);
        }
        if offset >= end {
            return Ok(());
        }
        // What lies beyond the size is zeros already, so the last block may be taken whole there.
        let last_partial = !end.is_multiple_of(BLOCK_BYTES_U64) && end < size;
        let whole_from = offset.div_ceil(BLOCK_BYTES_U64);
        let whole_to = if last_partial { end / BLOCK_BYTES_U64 } else { end.div_ceil(BLOCK_BYTES_U64) };
        if whole_from > whole_to {
            let len = usize::try_from(end - offset).expect("invariant: within a block");
            return self.edge(lineage, offset, &vec![0; len], end);
        }
        let head = usize::try_from(whole_from * BLOCK_BYTES_U64 - offset).expect("invariant: within a block");
        let head = head.min(usize::try_from(end - offset).unwrap_or(head));
        if head > 0 {
            self.edge(lineage, offset, &vec![0; head], offset + head as u64)?;
        }
        if whole_from < whole_to {
            let (start, count) = (BlockIndex(whole_from), BlockCount(whole_to - whole_from));
            self.append_checked(Some(lineage), Bytes::new(), 0, Space::Data, |state| {
                let op = Op::Zero { size_after_bytes: grows(state, end) };
                Some(Draft { op, start, count, digests: Vec::new(), flags: 0 })
            })?;
        }
        if last_partial {
            let from = whole_to * BLOCK_BYTES_U64;
            if from >= offset {
                let len = usize::try_from(end - from).expect("invariant: within a block");
                self.edge(lineage, from, &vec![0; len], end)?;
            }
        }
        Ok(())
    }

    /// A read-modify-write by a caller that holds the edges lock.
    fn edge(self: &Arc<Self>, lineage: u64, offset: u64, data: &[u8], end: u64) -> Result<(), IoError> {
        let content = self.widen(BlockIndex::containing(offset), offset, data)?;
        self.write_content(lineage, &content, end)
    }

    /// Sets the size; what is cut off reads as zeros when the image grows again.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn resize(self: &Arc<Self>, lineage: u64, size_bytes: u64) -> Result<(), IoError> {
        if size_bytes > SIZE_MAX_BYTES {
            return Err(IoError::TooLarge);
        }
        let _alone = self.edges.write();
        let old = self.store.state().size_bytes;
        if size_bytes < old && !size_bytes.is_multiple_of(BLOCK_BYTES_U64) {
            let block_end = size_bytes.next_multiple_of(BLOCK_BYTES_U64).min(old);
            let len = usize::try_from(block_end - size_bytes).expect("invariant: within a block");
            self.edge(lineage, size_bytes, &vec![0; len], block_end)?;
        }
        self.append_checked(Some(lineage), Bytes::new(), 0, Space::Control, |_| {
            Some(Draft::op(Op::Resize { size_bytes }))
        })
    }

    /// Appends an operation without data, unless `make` finds that it would change nothing.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn control(self: &Arc<Self>, make: impl FnOnce(&ImageState) -> Option<Op>) -> Result<(), IoError> {
        self.append_checked(None, Bytes::new(), 0, Space::Control, |state| make(state).map(Draft::op))
    }
}
