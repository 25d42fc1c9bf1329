//! What the fuzz targets reach of this crate that nobody else does. See `docs/testing.md`.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use vmfs_common::{ImageId, StoreId};

use crate::checkpoint::{Body, read_slot};
use crate::disk::{Disk, DiskFile};
use crate::identity;
use crate::meta::read_group;
use crate::page::HeaderPage;
use crate::rot::Ledger;
use crate::segment::{PAGE, SegmentHeader};

/// A file in memory that is `bytes`, and zeros after it.
#[derive(Debug, Default)]
pub struct MemFile(pub Mutex<Vec<u8>>);

impl DiskFile for MemFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let n = (bytes.len() - from).min(buf.len());
        buf[..n].copy_from_slice(&bytes[from..from + n]);
        buf[n..].fill(0);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let mut bytes = self.0.lock();
        if bytes.len() < from + buf.len() {
            bytes.resize(from + buf.len(), 0);
        }
        bytes[from..from + buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn forget(&self, _: std::ops::Range<u64>) -> io::Result<()> {
        Ok(())
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }
    fn allocate(&self, len_bytes: u64) -> io::Result<()> {
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        let mut bytes = self.0.lock();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        Ok(())
    }
    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.0.lock().resize(usize::try_from(len_bytes).map_err(io::Error::other)?, 0);
        Ok(())
    }
}

/// `data` with its last four bytes made the CRC-32C of the rest: what is behind a checksum is reached.
fn sealed(data: &[u8], len: usize) -> Vec<u8> {
    let mut page = data.to_vec();
    page.resize(len - 4, 0);
    page.extend_from_slice(&crc32c::crc32c(&page).to_le_bytes());
    page
}

/// A segment's header and a pair of header pages.
///
/// # Panics
/// When something taken has another byte form.
pub fn segment_pages(data: &[u8]) -> bool {
    let page = sealed(data, PAGE);
    let mut taken = false;
    if let Ok(Some(header)) = SegmentHeader::decode(&page) {
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(Some(header)));
        taken = true;
    }
    let mut pair = data.to_vec();
    pair.resize(2 * PAGE, 0);
    for copy in pair.chunks_exact_mut(PAGE) {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&copy[..60]), &copy[64..]);
        copy[60..64].copy_from_slice(&crc.to_le_bytes());
    }
    let at = |o: usize| u16::from_le_bytes([pair[o], pair[o + 1]]);
    let generation = u64::from_le_bytes(*pair[8..].first_chunk().expect("a page"));
    if let Ok(Some(mut found)) = HeaderPage::parse_pair(&pair, at(48), at(6), generation) {
        assert!(found.body().len() <= PAGE);
        let synced = found.synced_seq;
        let written = *found.finish(generation, synced);
        let both = [written, written].concat();
        assert!(matches!(HeaderPage::parse_pair(&both, at(48), at(6), generation), Ok(Some(_))));
        taken = true;
    }
    taken
}

/// The body of a checkpoint.
///
/// # Panics
/// When something taken has another byte form.
pub fn checkpoint(data: &[u8]) -> bool {
    let Ok(body) = Body::decode(data) else { return false };
    assert_eq!(body.encode(), data, "a checkpoint's body has one form");
    true
}

/// A map file: superblocks, and the chain of pages that a body is in.
pub fn map_file(data: &[u8]) -> bool {
    let mut bytes = data.to_vec();
    if let Some(first) = bytes.get_mut(..PAGE) {
        let sealed = sealed(&first[..PAGE - 4], PAGE);
        first.copy_from_slice(&sealed);
    }
    for page in bytes.chunks_exact_mut(PAGE).skip(2) {
        let n = u32::from_le_bytes([page[8], page[9], page[10], page[11]]) as usize;
        if n <= PAGE - 16 {
            let crc = crc32c::crc32c(&page[16..16 + n]);
            page[12..16].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let id = |at: usize| bytes.get(at..at + 16).and_then(|b| b.try_into().ok()).unwrap_or([0; 16]);
    let (store, image) = (StoreId::from_bytes(id(16)), ImageId::from_bytes(id(32)));
    let file = MemFile(Mutex::new(bytes));
    (0..2).any(|slot| matches!(read_slot(store, image, &file, slot), Ok(Some(_))))
}

/// The journal of meta records, group by group.
pub fn meta_journal(data: &[u8]) -> bool {
    let mut bytes = data.to_vec();
    if bytes.len() >= 24 {
        let len = u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]) as usize;
        if let Some(payload) = bytes.get(24..).and_then(|b| b.get(..len)) {
            let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..20]), payload);
            bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let end = bytes.len() as u64;
    let file = MemFile(Mutex::new(bytes));
    let mut taken = false;
    for at in (0..end).step_by(PAGE) {
        taken |= matches!(read_group(&file, at, end), Ok(Some(_)));
    }
    taken
}

/// A disk whose every file is this one.
struct OneFile(Arc<MemFile>);

impl Disk for OneFile {
    fn open(&self, _: &str, _: bool) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::clone(&self.0) as Arc<dyn DiskFile>)
    }
    fn list(&self, _: &str) -> io::Result<Vec<String>> {
        Ok(vec!["store".to_owned()])
    }
    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        Ok(())
    }
    fn remove(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
    fn sync_names(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
    fn free_bytes(&self) -> io::Result<u64> {
        Ok(1 << 30)
    }
}

/// The file that says whose store it is, and which generations were given out.
pub fn store_identity(data: &[u8]) -> bool {
    let mut bytes = data.to_vec();
    for page in bytes.chunks_exact_mut(PAGE) {
        let sealed = sealed(&page[..PAGE - 4], PAGE);
        page.copy_from_slice(&sealed);
    }
    let disk = OneFile(Arc::new(MemFile(Mutex::new(bytes))));
    let read = identity::read(&disk).is_ok();
    read & identity::take_generations(&disk, &Ledger::default()).is_ok()
}
