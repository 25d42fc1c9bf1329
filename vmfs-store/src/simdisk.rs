//! A disk in memory that misbehaves on demand, deterministically: for tests and the simulator.
//!
//! Model: a write goes to the cache; [`DiskFile::sync`] makes a file's cached pages durable. A power
//! cut keeps, for every page written since, any one of its versions, or a mixture of two at 512-byte
//! sectors. Names are durable after [`Disk::sync_names`]; a power cut keeps a prefix of the later
//! ones. A failed sync drops the pages' dirtiness: a later sync does not write them (as Linux does).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::disk::{Disk, DiskFile};

const PAGE: usize = 4096;
const SECTOR: usize = 512;
/// Versions of one unsynced page that are remembered.
const VERSIONS_MAX: usize = 4;

type Page = [u8; PAGE];

/// A small deterministic generator (splitmix64).
#[derive(Debug, Clone)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

#[derive(Debug, Clone, Default)]
struct SimPage {
    durable: Option<Box<Page>>,
    /// Later versions, oldest first; the last one is what reads see.
    cached: Vec<Box<Page>>,
    /// A sync will write the last version.
    dirty: bool,
}

impl SimPage {
    fn now(&self) -> Option<&Page> {
        self.cached.last().or(self.durable.as_ref()).map(|p| &**p)
    }
    fn used(&self) -> bool {
        self.now().is_some()
    }
}

#[derive(Debug, Clone, Default)]
struct SimFile {
    pages: BTreeMap<u64, SimPage>,
    len: u64,
    durable_len: u64,
    reserved_pages: u64,
    /// Syncs that failed.
    failures: u64,
}

impl SimFile {
    fn pages_taken(&self) -> u64 {
        let beyond = self.pages.range(self.reserved_pages..).filter(|(_, p)| p.used()).count();
        self.reserved_pages + beyond as u64
    }
    fn crash(&mut self, rng: &mut Rng) {
        for page in self.pages.values_mut() {
            let cached = std::mem::take(&mut page.cached);
            page.dirty = false;
            if cached.is_empty() {
                continue;
            }
            let old = page.durable.take().unwrap_or_else(|| Box::new([0; PAGE]));
            let mut versions = vec![old];
            versions.extend(cached);
            let n = versions.len() as u64;
            let pick = |r: &mut Rng| usize::try_from(r.below(n)).unwrap_or(0);
            let (a, b) = (pick(rng), pick(rng));
            let mut result = versions[a].clone();
            if rng.below(4) == 0 {
                for s in 0..PAGE / SECTOR {
                    if rng.below(2) == 0 {
                        let range = s * SECTOR..(s + 1) * SECTOR;
                        result[range.clone()].copy_from_slice(&versions[b][range]);
                    }
                }
            }
            page.durable = Some(result);
        }
        self.len =
            if self.len == self.durable_len || rng.below(2) == 0 { self.durable_len } else { self.len };
        self.durable_len = self.len;
        let end = self.len.div_ceil(PAGE as u64);
        self.pages.retain(|p, page| *p < end && page.used());
        if let Some(last) = self.pages.get_mut(&(self.len / PAGE as u64)) {
            let keep = usize::try_from(self.len % PAGE as u64).unwrap_or(0);
            if let Some(p) = &mut last.durable {
                p[keep..].fill(0);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum NameOp {
    Create(String, u64),
    Rename(String, String),
    Remove(String),
}

impl NameOp {
    fn dirs(&self) -> Vec<&str> {
        match self {
            Self::Create(n, _) | Self::Remove(n) => vec![dir_of(n)],
            Self::Rename(a, b) => vec![dir_of(a), dir_of(b)],
        }
    }
    fn apply(&self, names: &mut BTreeMap<String, u64>) {
        match self {
            Self::Create(n, id) => {
                names.insert(n.clone(), *id);
            }
            Self::Rename(a, b) => {
                if let Some(id) = names.remove(a) {
                    names.insert(b.clone(), id);
                }
            }
            Self::Remove(n) => {
                names.remove(n);
            }
        }
    }
}

fn dir_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(d, _)| d)
}

#[derive(Debug, Clone, Default)]
struct Faults {
    /// The call with this number fails.
    fail_at: Option<u64>,
    /// This call and all later ones fail.
    stop_at: Option<u64>,
    fail_syncs: bool,
    /// The next write lands this many pages further on.
    misdirect_pages: Option<u64>,
    /// The next write is lost although reported as done.
    lose_next_write: bool,
}

#[derive(Debug, Clone, Default)]
struct Inner {
    files: BTreeMap<u64, SimFile>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    pending: Vec<NameOp>,
    next_id: u64,
    calls: u64,
    syncs: u64,
    reads: u64,
    capacity_pages: u64,
    faults: Faults,
}

fn eio(what: &str) -> io::Error {
    io::Error::other(format!("simulated fault: {what}"))
}

impl Inner {
    /// Counts a call that changes the disk, and fails it when asked to.
    fn enter(&mut self, what: &str) -> io::Result<()> {
        let n = self.calls;
        self.calls += 1;
        if self.faults.fail_at == Some(n) || self.faults.stop_at.is_some_and(|s| n >= s) {
            return Err(eio(what));
        }
        Ok(())
    }
    fn file(&mut self, id: u64) -> io::Result<&mut SimFile> {
        self.files.get_mut(&id).ok_or_else(|| eio("no such file"))
    }
    fn pages_taken(&self) -> u64 {
        // A removed file's space is free at once, although a power cut may bring it back.
        self.names.values().filter_map(|id| self.files.get(id)).map(SimFile::pages_taken).sum()
    }
    fn drop_unnamed(&mut self) {
        let mut named: BTreeSet<u64> =
            self.names.values().chain(self.durable_names.values()).copied().collect();
        named.extend(self.pending.iter().filter_map(|op| match op {
            NameOp::Create(_, id) => Some(*id),
            _ => None,
        }));
        self.files.retain(|id, _| named.contains(id));
    }
    fn write(&mut self, id: u64, buf: &[u8], offset: u64) -> io::Result<()> {
        self.enter("write")?;
        if std::mem::take(&mut self.faults.lose_next_write) {
            return Ok(());
        }
        let offset = offset + self.faults.misdirect_pages.take().unwrap_or(0) * PAGE as u64;
        let end = offset + buf.len() as u64;
        let (first, last) = (offset / PAGE as u64, end.div_ceil(PAGE as u64));
        let file = self.file(id)?;
        let fresh = (first.max(file.reserved_pages)..last)
            .filter(|p| !file.pages.get(p).is_some_and(SimPage::used))
            .count() as u64;
        if fresh > 0 && self.pages_taken() + fresh > self.capacity_pages {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = self.file(id)?;
        for p in first..last {
            let start = p * PAGE as u64;
            let from = usize::try_from(offset.saturating_sub(start)).map_err(io::Error::other)?;
            let to = usize::try_from((end - start).min(PAGE as u64)).map_err(io::Error::other)?;
            let at = usize::try_from((start + from as u64) - offset).map_err(io::Error::other)?;
            let page = file.pages.entry(p).or_default();
            let mut next = page.now().map_or_else(|| Box::new([0; PAGE]), |n| Box::new(*n));
            next[from..to].copy_from_slice(&buf[at..at + to - from]);
            if page.cached.len() == VERSIONS_MAX {
                page.cached.remove(0);
            }
            page.cached.push(next);
            page.dirty = true;
        }
        file.len = file.len.max(end);
        Ok(())
    }
    fn sync(&mut self, id: u64) -> io::Result<()> {
        self.syncs += 1;
        let failed = self.faults.fail_syncs;
        let entered = self.enter("sync");
        if self.faults.stop_at.is_some_and(|s| self.calls > s) {
            // A process that has ended makes no calls: its pages stay as dirty as they were.
            return entered;
        }
        let file = self.file(id)?;
        for page in file.pages.values_mut().filter(|p| p.dirty) {
            page.dirty = false;
            if !failed && entered.is_ok() {
                page.durable = page.cached.pop();
                page.cached.clear();
            }
        }
        entered?;
        if failed {
            return Err(eio("sync"));
        }
        file.durable_len = file.len;
        Ok(())
    }
}

/// A misbehaving disk. Clones share it.
#[derive(Debug, Clone)]
pub struct SimDisk(Arc<Mutex<Inner>>);

impl SimDisk {
    /// An empty disk of `capacity_bytes`.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let inner = Inner { capacity_pages: capacity_bytes / PAGE as u64, ..Inner::default() };
        Self(Arc::new(Mutex::new(inner)))
    }
    /// What is left after a power cut now, as another disk; `seed` decides what survives of the
    /// unsynced writes. Faults are cleared.
    #[must_use]
    pub fn power_cut(&self, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let mut inner = self.0.lock().clone();
        let keep = usize::try_from(rng.below(inner.pending.len() as u64 + 1)).unwrap_or(0);
        for op in std::mem::take(&mut inner.pending).into_iter().take(keep) {
            op.apply(&mut inner.durable_names);
        }
        inner.names = inner.durable_names.clone();
        for file in inner.files.values_mut() {
            file.crash(&mut rng);
        }
        inner.faults = Faults::default();
        inner.drop_unnamed();
        Self(Arc::new(Mutex::new(inner)))
    }
    /// What is there after the process was killed, as another disk: the cache survives, still
    /// unsynced. Faults are cleared.
    #[must_use]
    pub fn kill(&self) -> Self {
        let mut inner = self.0.lock().clone();
        inner.faults = Faults::default();
        Self(Arc::new(Mutex::new(inner)))
    }
    /// Calls that change the disk so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.0.lock().calls
    }
    /// Reads so far.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.0.lock().reads
    }
    /// Syncs so far.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }
    /// The call with number `n` (counted by [`SimDisk::calls`]) fails.
    pub fn fail_call(&self, n: Option<u64>) {
        self.0.lock().faults.fail_at = n;
    }
    /// The process ends at the call with number `n`: that and all later ones fail and do nothing. Follow with
    /// [`SimDisk::power_cut`] or [`SimDisk::kill`].
    pub fn stop_at_call(&self, n: Option<u64>) {
        self.0.lock().faults.stop_at = n;
    }
    /// Syncs fail, or work again.
    pub fn fail_syncs(&self, fail: bool) {
        self.0.lock().faults.fail_syncs = fail;
    }
    /// The next write lands `pages` further on in its file.
    pub fn misdirect_next_write(&self, pages: u64) {
        self.0.lock().faults.misdirect_pages = Some(pages);
    }
    /// The next write is reported as done and lost.
    pub fn lose_next_write(&self) {
        self.0.lock().faults.lose_next_write = true;
    }
    /// Such a write is still to come.
    #[must_use]
    pub fn has_bad_write_ahead(&self) -> bool {
        let faults = &self.0.lock().faults;
        faults.lose_next_write || faults.misdirect_pages.is_some()
    }
    /// Changes the capacity.
    pub fn set_capacity_bytes(&self, bytes: u64) {
        self.0.lock().capacity_pages = bytes / PAGE as u64;
    }
    /// Flips one bit of a file's durable and cached content. False when there is no such page.
    pub fn flip_bit(&self, name: &str, offset: u64, bit: u32) -> bool {
        let mut inner = self.0.lock();
        let Some(id) = inner.names.get(name).copied() else { return false };
        let Some(file) = inner.files.get_mut(&id) else { return false };
        let Some(page) = file.pages.get_mut(&(offset / PAGE as u64)) else { return false };
        let at = usize::try_from(offset % PAGE as u64).unwrap_or(0);
        for copy in page.durable.iter_mut().chain(page.cached.iter_mut()) {
            copy[at] ^= 1 << (bit % 8);
        }
        page.used()
    }
    /// Names and lengths of all files.
    #[must_use]
    pub fn files(&self) -> Vec<(String, u64)> {
        let inner = self.0.lock();
        inner.names.iter().map(|(n, id)| (n.clone(), inner.files.get(id).map_or(0, |f| f.len))).collect()
    }
    /// Bytes taken.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.0.lock().pages_taken() * PAGE as u64
    }
}

impl Disk for SimDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut inner = self.0.lock();
        let id = match inner.names.get(name) {
            Some(id) => *id,
            None if create => {
                inner.enter("create")?;
                let id = inner.next_id;
                inner.next_id += 1;
                inner.files.insert(id, SimFile::default());
                inner.names.insert(name.to_owned(), id);
                inner.pending.push(NameOp::Create(name.to_owned(), id));
                id
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        let heard = AtomicU64::new(inner.file(id)?.failures);
        Ok(Arc::new(SimHandle { disk: self.clone(), id, heard }))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let inner = self.0.lock();
        let in_dir = inner.names.keys().filter(|n| dir_of(n) == dir);
        Ok(in_dir.map(|n| n.rsplit('/').next().unwrap_or(n).to_owned()).collect())
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.0.lock();
        inner.enter("rename")?;
        if !inner.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let op = NameOp::Rename(from.to_owned(), to.to_owned());
        op.apply(&mut inner.names);
        inner.pending.push(op);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        let mut inner = self.0.lock();
        inner.enter("remove")?;
        let op = NameOp::Remove(name.to_owned());
        op.apply(&mut inner.names);
        inner.pending.push(op);
        Ok(())
    }
    fn sync_names(&self, dir: &str) -> io::Result<()> {
        let mut inner = self.0.lock();
        inner.syncs += 1;
        inner.enter("sync names")?;
        if inner.faults.fail_syncs {
            return Err(eio("sync names"));
        }
        let pending = std::mem::take(&mut inner.pending);
        let (done, rest): (Vec<_>, Vec<_>) = pending.into_iter().partition(|op| op.dirs().contains(&dir));
        for op in done {
            op.apply(&mut inner.durable_names);
        }
        inner.pending = rest;
        inner.drop_unnamed();
        Ok(())
    }
    fn free_bytes(&self) -> io::Result<u64> {
        let inner = self.0.lock();
        Ok(inner.capacity_pages.saturating_sub(inner.pages_taken()) * PAGE as u64)
    }
}

struct SimHandle {
    disk: SimDisk,
    id: u64,
    /// Failures of the file that it has reported, or that came before it.
    heard: AtomicU64,
}

impl DiskFile for SimHandle {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut inner = self.disk.0.lock();
        if inner.faults.stop_at.is_some_and(|s| inner.calls > s) {
            return Err(eio("read"));
        }
        inner.reads += 1;
        let file = inner.file(self.id)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = usize::try_from(at % PAGE as u64).map_err(io::Error::other)?;
            let n = (PAGE - within).min(buf.len() - done);
            match file.pages.get(&(at / PAGE as u64)).and_then(SimPage::now) {
                Some(page) => buf[done..done + n].copy_from_slice(&page[within..within + n]),
                None => buf[done..done + n].fill(0),
            }
            done += n;
        }
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.disk.0.lock().write(self.id, buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        let mut inner = self.disk.0.lock();
        let synced = inner.sync(self.id);
        let file = inner.file(self.id)?;
        file.failures += u64::from(synced.is_err());
        // As Linux does: each descriptor hears of a failure once, whoever met it.
        let failed_since = self.heard.swap(file.failures, Ordering::AcqRel) < file.failures;
        match synced {
            Ok(()) if failed_since => Err(eio("sync, through another descriptor")),
            other => other,
        }
    }
    fn forget(&self, pages: Range<u64>) -> io::Result<()> {
        let mut inner = self.disk.0.lock();
        for (_, page) in inner.file(self.id)?.pages.range_mut(pages) {
            if !page.dirty {
                page.cached.clear();
            }
        }
        Ok(())
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().file(self.id)?.len)
    }
    fn allocate(&self, len_bytes: u64) -> io::Result<()> {
        let mut inner = self.disk.0.lock();
        inner.enter("allocate")?;
        let pages = len_bytes.div_ceil(PAGE as u64);
        let file = inner.file(self.id)?;
        let before = file.reserved_pages;
        file.reserved_pages = before.max(pages);
        if inner.pages_taken() > inner.capacity_pages {
            inner.file(self.id)?.reserved_pages = before;
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = inner.file(self.id)?;
        file.len = file.len.max(len_bytes);
        Ok(())
    }
    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        let mut inner = self.disk.0.lock();
        inner.enter("set length")?;
        let file = inner.file(self.id)?;
        if len_bytes < file.len {
            // A cut is treated as durable at once: the store never relies on the old bytes.
            let end = len_bytes.div_ceil(PAGE as u64);
            file.pages.retain(|p, _| *p < end);
            file.reserved_pages = file.reserved_pages.min(end);
            file.durable_len = file.durable_len.min(len_bytes);
        }
        file.len = len_bytes;
        Ok(())
    }
}
