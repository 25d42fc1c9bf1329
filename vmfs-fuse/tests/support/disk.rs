//! A disk in memory that forgets what was not synced: at a crash every 512-byte sector, length
//! and name is, by chance, the old or the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vmfs_store::disk::{Disk, DiskFile};

const SECTOR: usize = 512;

#[derive(Default)]
struct Content {
    durable: Vec<u8>,
    current: Vec<u8>,
}

pub(crate) struct MemFile {
    content: Mutex<Content>,
    faults: Arc<Faults>,
}

/// Which calls fail from now on.
#[derive(Default)]
pub(crate) struct Faults {
    /// Writes left before every one fails with ENOSPC; 0 is "never".
    pub(crate) writes_left: AtomicU64,
    /// Syncs left before every one fails with EIO; 0 is "never".
    pub(crate) syncs_left: AtomicU64,
}

fn countdown(left: &AtomicU64, errno: rustix::io::Errno) -> io::Result<()> {
    match left.load(Ordering::Relaxed) {
        0 => Ok(()),
        1 => Err(errno.into()),
        n => {
            left.store(n - 1, Ordering::Relaxed);
            Ok(())
        }
    }
}

type Names = BTreeMap<String, Arc<MemFile>>;

/// See the module.
#[derive(Default)]
pub(crate) struct MemDisk {
    names: Mutex<(Names, Names)>,
    pub(crate) faults: Arc<Faults>,
}

/// xorshift64*: enough for choosing sectors.
pub(crate) struct Rng(u64);

#[allow(dead_code)]
impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub(crate) fn coin(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}

#[allow(dead_code)]
impl MemDisk {
    /// What a power cut leaves.
    pub(crate) fn crash(&self, rng: &mut Rng) -> Arc<Self> {
        let (current, durable) = &*self.names.lock();
        let mut after = Names::new();
        for name in current.keys().chain(durable.keys()).collect::<BTreeSet<_>>() {
            let kept = if rng.coin() { current.get(name) } else { durable.get(name) };
            if let Some(file) = kept {
                let content = file.content.lock();
                let mut bytes = content.current.clone();
                if rng.coin() {
                    bytes.resize(content.durable.len(), 0);
                }
                for (at, sector) in bytes.chunks_mut(SECTOR).enumerate() {
                    if rng.coin() {
                        for (i, byte) in sector.iter_mut().enumerate() {
                            *byte = content.durable.get(at * SECTOR + i).copied().unwrap_or(0);
                        }
                    }
                }
                let content = Content { durable: bytes.clone(), current: bytes };
                let file = MemFile { content: Mutex::new(content), faults: Arc::default() };
                after.insert(name.clone(), Arc::new(file));
            }
        }
        Arc::new(Self { names: Mutex::new((after.clone(), after)), faults: Arc::default() })
    }

    /// Flips one bit of a file, durably.
    pub(crate) fn flip(&self, name: &str, at: usize) {
        let file = self.names.lock().0[name].clone();
        let mut content = file.content.lock();
        content.current[at] ^= 0x10;
        content.durable = content.current.clone();
    }

    pub(crate) fn file_names(&self) -> Vec<String> {
        self.names.lock().0.keys().cloned().collect()
    }

    pub(crate) fn content(&self, name: &str) -> Vec<u8> {
        self.names.lock().0[name].content.lock().current.clone()
    }
}

impl Disk for MemDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut names = self.names.lock();
        if let Some(file) = names.0.get(name) {
            return Ok(file.clone());
        }
        if !create {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = Arc::new(MemFile { content: Mutex::default(), faults: self.faults.clone() });
        names.0.insert(name.to_owned(), file.clone());
        Ok(file)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{dir}/");
        let names = self.names.lock();
        Ok(names.0.keys().filter_map(|n| n.strip_prefix(&prefix)).map(str::to_owned).collect())
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut names = self.names.lock();
        let file = names.0.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.0.insert(to.to_owned(), file);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.names.lock().0.remove(name);
        Ok(())
    }
    fn sync_names(&self, _dir: &str) -> io::Result<()> {
        countdown(&self.faults.syncs_left, rustix::io::Errno::IO)?;
        let mut names = self.names.lock();
        names.1 = names.0.clone();
        Ok(())
    }
    fn free_bytes(&self) -> io::Result<u64> {
        Ok(1 << 30)
    }
}

impl DiskFile for MemFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.content.lock();
        let offset = usize::try_from(offset).unwrap();
        for (i, byte) in buf.iter_mut().enumerate() {
            *byte = content.current.get(offset + i).copied().unwrap_or(0);
        }
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        countdown(&self.faults.writes_left, rustix::io::Errno::NOSPC)?;
        let mut content = self.content.lock();
        let offset = usize::try_from(offset).unwrap();
        let end = offset + buf.len();
        if content.current.len() < end {
            content.current.resize(end, 0);
        }
        content.current[offset..end].copy_from_slice(buf);
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        countdown(&self.faults.syncs_left, rustix::io::Errno::IO)?;
        let mut content = self.content.lock();
        content.durable = content.current.clone();
        Ok(())
    }
    fn forget(&self, _: std::ops::Range<u64>) -> io::Result<()> {
        Ok(())
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.content.lock().current.len() as u64)
    }
    fn allocate(&self, len_bytes: u64) -> io::Result<()> {
        let mut content = self.content.lock();
        let len = usize::try_from(len_bytes).unwrap().max(content.current.len());
        content.current.resize(len, 0);
        Ok(())
    }
    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.content.lock().current.resize(usize::try_from(len_bytes).unwrap(), 0);
        Ok(())
    }
}
