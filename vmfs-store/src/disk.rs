//! The one small trait through which everything durable goes. The real one is files
//! ([`crate::disk::FileDisk`]); the tests' one loses unsynced writes, tears sectors, flips bits,
//! fails calls and fills up.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, FlockOperation, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::error::{IoContext as _, StoreError};
use crate::segment::PAGE_U64;

/// Pages of the largest piece that the page cache keeps a file in: 2 MiB, aligned.
const FOLIO_PAGES: u64 = 512;

/// A directory tree that holds a store's files. Names are relative, `/`-separated, without `..`.
pub trait Disk: Send + Sync {
    /// Opens `name`; creates it (and its parent directories) when `create` is set.
    /// A new file's *name* is durable only after [`Disk::sync_names`].
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>>;
    /// Names of the files directly in `dir` (not their paths); empty when `dir` does not exist.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// Renames atomically, replacing `to`. Durable after [`Disk::sync_names`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file. Not an error when it is gone already. Durable after [`Disk::sync_names`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// On return, earlier creations, renames and removals in `dir` are on stable storage.
    fn sync_names(&self, dir: &str) -> io::Result<()>;
    /// Bytes free for this store.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// One open file of a [`Disk`].
pub trait DiskFile: Send + Sync {
    /// Fills `buf` from `offset`; bytes past the end read as zeros.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// As [`DiskFile::read_at`] if the bytes are in memory; else begins to fetch them, leaves `buf` in any
    /// state and returns false. So that pieces from many places come from the disk at the same time.
    fn read_soon(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_at(buf, offset).map(|()| true)
    }
    /// Writes all of `buf` at `offset`. Not durable before [`DiskFile::sync`].
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// On return, every earlier write to this file is on stable storage (fdatasync).
    fn sync(&self) -> io::Result<()>;
    /// Has `pages` (of 4096 bytes) read from the disk the next time, not from memory, unless they have been written
    /// since the last [`DiskFile::sync`]: after a failed sync the memory has what the disk does not. Pages around them
    /// may go, too. A request: those that another process uses may stay.
    fn forget(&self, pages: Range<u64>) -> io::Result<()>;
    /// Current length in bytes.
    fn len_bytes(&self) -> io::Result<u64>;
    /// Reserves space for `len` bytes from the file's start and makes it at least that long.
    fn allocate(&self, len_bytes: u64) -> io::Result<()>;
    /// Cuts or extends the file.
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;
}

/// The real disk: files below one directory, all of mode 0600 in directories of mode 0700.
/// Holds the directory's lock until dropped.
#[derive(Debug)]
pub struct FileDisk {
    root: PathBuf,
    _lock: File,
}

impl FileDisk {
    /// Makes the directory when it is missing, and locks it.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has the lock, or what the file system says.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let what = || format!("store {}", root.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).during(what)?;
        let path = root.join("lock");
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .during(what)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { root: root.to_path_buf(), _lock: lock }),
            Err(Errno::WOULDBLOCK) => Err(StoreError::InUse { path: root.display().to_string() }),
            Err(e) => Err(io::Error::from(e)).during(what),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

impl Disk for FileDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.path(name);
        let open = || {
            OpenOptions::new().read(true).write(true).create(create).truncate(false).mode(0o600).open(&path)
        };
        let file = match (open(), path.parent()) {
            (Err(e), Some(parent)) if create && e.kind() == io::ErrorKind::NotFound => {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
                File::open(&self.root)?.sync_all()?;
                open()?
            }
            (other, _) => other?,
        };
        Ok(Arc::new(RealFile(file)))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.path(dir)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort();
        Ok(names)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
    fn sync_names(&self, dir: &str) -> io::Result<()> {
        match File::open(self.path(dir)) {
            Ok(d) => d.sync_all(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }
    fn free_bytes(&self) -> io::Result<u64> {
        let s = rustix::fs::statvfs(&self.root)?;
        Ok(s.f_bavail.saturating_mul(s.f_frsize))
    }
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.0.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    return Ok(());
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
    fn read_soon(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        let len = buf.len();
        match preadv2(&self.0, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(n) if n == len => Ok(true),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP) => {
                // A hint: without it the read that follows only waits longer.
                let _ = fadvise(&self.0, offset, NonZeroU64::new(len as u64), Advice::WillNeed);
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn forget(&self, pages: Range<u64>) -> io::Result<()> {
        // The kernel forgets nothing of a folio that is not forgotten whole.
        let first = pages.start / FOLIO_PAGES * FOLIO_PAGES;
        let bytes = (pages.end.next_multiple_of(FOLIO_PAGES) - first) * PAGE_U64;
        Ok(fadvise(&self.0, first * PAGE_U64, NonZeroU64::new(bytes), Advice::DontNeed)?)
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn allocate(&self, len_bytes: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(&self.0, FallocateFlags::empty(), 0, len_bytes) {
                Err(Errno::INTR) => {}
                // Without fallocate, space is taken when it is written.
                Err(Errno::OPNOTSUPP) if self.len_bytes()? < len_bytes => {
                    return self.0.set_len(len_bytes);
                }
                Err(Errno::OPNOTSUPP) => return Ok(()),
                other => return Ok(other?),
            }
        }
    }
    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.0.set_len(len_bytes)
    }
}
