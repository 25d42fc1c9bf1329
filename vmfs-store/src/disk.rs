//! The one small trait through which everything durable goes. The real one is files
//! ([`crate::disk::FileDisk`]); the tests' one loses unsynced writes, tears sectors, flips bits,
//! fails calls and fills up.

use std::io;
use std::sync::Arc;

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
    /// Writes all of `buf` at `offset`. Not durable before [`DiskFile::sync`].
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// On return, every earlier write to this file is on stable storage (fdatasync).
    fn sync(&self) -> io::Result<()>;
    /// Current length in bytes.
    fn len_bytes(&self) -> io::Result<u64>;
    /// Reserves space for `len` bytes from the file's start and makes it at least that long.
    fn allocate(&self, len_bytes: u64) -> io::Result<()>;
    /// Cuts or extends the file.
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;
}
