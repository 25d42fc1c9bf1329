//! One file's bytes: what is on the disk, and what only the cache has.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rand::Rng;
use rustix::fs::FallocateFlags;

use super::Luck;

/// Bytes of a page, the unit in which a cache is written back.
pub(super) const PAGE: usize = 4096;
const PAGE_U64: u64 = PAGE as u64;
/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;
/// Versions of one unsynced page that are remembered: a cache may have been written back in between.
const VERSIONS_MAX: usize = 4;

type Page = Box<[u8; PAGE]>;

/// A page that is not on the disk yet; `None` is a hole.
type Version = Option<Page>;

/// One file. Reads see the newest of everything; the backing file has what was synced.
#[derive(Debug)]
pub(super) struct Content {
    backing: File,
    durable_len: u64,
    len: u64,
    /// Unsynced versions by page number, oldest first.
    cached: BTreeMap<u64, Vec<Version>>,
}

fn zeros() -> Page {
    Box::new([0; PAGE])
}

/// An offset within a page, of which there are fewer than `usize` can count.
fn within(offset: u64) -> usize {
    usize::try_from(offset % PAGE_U64).expect("invariant: less than a page")
}

impl Content {
    /// The file whose synced content is `backing`.
    pub(super) fn new(backing: File) -> io::Result<Self> {
        let len = backing.metadata()?.len();
        Ok(Self { backing, durable_len: len, len, cached: BTreeMap::new() })
    }

    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// Pages that a power cut may lose.
    pub(super) fn cached_pages(&self) -> usize {
        self.cached.len()
    }

    fn durable_page(&self, page: u64) -> io::Result<Page> {
        let mut bytes = zeros();
        fill_from(&self.backing, &mut bytes[..], page * PAGE_U64)?;
        Ok(bytes)
    }

    /// The page as reads see it.
    fn page(&self, page: u64) -> io::Result<Page> {
        match self.cached.get(&page).and_then(|v| v.last()) {
            Some(version) => Ok(version.clone().unwrap_or_else(zeros)),
            None => self.durable_page(page),
        }
    }

    fn push(&mut self, page: u64, version: Version) {
        let versions = self.cached.entry(page).or_default();
        if versions.len() == VERSIONS_MAX {
            versions.remove(0);
        }
        versions.push(version);
    }

    /// Up to `size` bytes from `offset`, less at the end of the file.
    pub(super) fn read(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let end = self.len.min(offset.saturating_add(size as u64));
        let count = usize::try_from(end.saturating_sub(offset)).map_err(io::Error::other)?;
        let mut bytes = vec![0; count];
        fill_from(&self.backing, &mut bytes, offset)?;
        for (&page, versions) in self.cached.range(offset / PAGE_U64..end.div_ceil(PAGE_U64)) {
            let newest = versions.last().expect("invariant: no empty list of versions is kept");
            let (from, to) = (offset.max(page * PAGE_U64), end.min((page + 1) * PAGE_U64));
            if from >= to {
                continue;
            }
            let at = usize::try_from(from - offset).map_err(io::Error::other)?;
            let n = usize::try_from(to - from).map_err(io::Error::other)?;
            match newest {
                Some(data) => bytes[at..at + n].copy_from_slice(&data[within(from)..within(from) + n]),
                None => bytes[at..at + n].fill(0),
            }
        }
        Ok(bytes)
    }

    /// Writes into the cache alone.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let (page, from) = (at / PAGE_U64, within(at));
            let n = (PAGE - from).min(usize::try_from(end - at).map_err(io::Error::other)?);
            let mut next = if n == PAGE { zeros() } else { self.page(page)? };
            let done = usize::try_from(at - offset).map_err(io::Error::other)?;
            next[from..from + n].copy_from_slice(&bytes[done..done + n]);
            self.push(page, Some(next));
            at += n as u64;
        }
        self.len = self.len.max(end);
        Ok(())
    }

    /// Makes `range` zeros: whole pages become holes.
    pub(super) fn zero(&mut self, offset: u64, end: u64) -> io::Result<()> {
        let mut at = offset;
        while at < end {
            let page = at / PAGE_U64;
            let to = end.min((page + 1) * PAGE_U64);
            let next = if to - at == PAGE_U64 {
                None
            } else {
                let mut bytes = self.page(page)?;
                let from = within(at);
                bytes[from..from + usize::try_from(to - at).map_err(io::Error::other)?].fill(0);
                Some(bytes)
            };
            self.push(page, next);
            at = to;
        }
        Ok(())
    }

    /// Cuts or extends the file, in the cache alone.
    pub(super) fn set_len(&mut self, len: u64) -> io::Result<()> {
        if len < self.len {
            // What is cut off must not come back when the file grows again.
            self.zero(len, self.len)?;
        }
        self.len = len;
        Ok(())
    }

    /// Makes everything durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.durable_len != self.len {
            self.backing.set_len(self.len)?;
            self.durable_len = self.len;
        }
        for (page, mut versions) in std::mem::take(&mut self.cached) {
            let newest = versions.pop().expect("invariant: no empty list of versions is kept");
            put(&self.backing, page, newest.as_ref(), self.len)?;
        }
        Ok(())
    }

    /// The power goes: of every unsynced page some version stays, or a mixture of two at sectors.
    pub(super) fn cut(&mut self, luck: &mut Luck) -> io::Result<()> {
        let len = if luck.survives() { self.len } else { self.durable_len };
        self.backing.set_len(len)?;
        for (page, cached) in std::mem::take(&mut self.cached) {
            let old = self.durable_page(page)?;
            let mut versions = vec![Some(old)];
            versions.extend(cached);
            let mut pick = || if luck.survives() { luck.rng.random_range(1..versions.len()) } else { 0 };
            let (a, b) = (pick(), pick());
            let mut result = versions[a].clone().unwrap_or_else(zeros);
            if a != b && luck.tears() {
                let other = versions[b].clone().unwrap_or_else(zeros);
                for sector in (0..PAGE).step_by(SECTOR).filter(|_| luck.rng.random()) {
                    result[sector..sector + SECTOR].copy_from_slice(&other[sector..sector + SECTOR]);
                }
            }
            put(&self.backing, page, Some(&result), len)?;
        }
        (self.len, self.durable_len) = (len, len);
        Ok(())
    }
}

/// Fills `bytes` from `offset`; what is beyond the end of the file stays as it is.
fn fill_from(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(())
}

/// Puts one page into the backing file, which is `len` bytes long and stays so.
fn put(file: &File, page: u64, version: Option<&Page>, len: u64) -> io::Result<()> {
    let offset = page * PAGE_U64;
    let count = PAGE_U64.min(len.saturating_sub(offset));
    if count == 0 {
        return Ok(());
    }
    match version {
        Some(bytes) => file.write_all_at(&bytes[..usize::try_from(count).map_err(io::Error::other)?], offset),
        None => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(file, mode, offset, count)?)
        }
    }
}
