//! What the mount means, without a word about FUSE's API.
//!
//! [`Fs`] maps POSIX file operations to the [`Backend`] and the [`Catalog`]:
//!
//! - `tree`, `claims`: the names; `names`, `rename`: operations on them; `attrs`: stat, chmod, xattrs
//! - `files`: handles; `data`: what is done to an image's content; `flock`, [`locks`]: byte-range locks
//! - `wait`, `park`: what cannot be answered now; `readers`: threads for reads that wait for the disk
//!
//! Invariants: namespace operations never wait for the network (the caller may hold kernel locks
//! that others need); no call blocks on anything but the local disk; every reply is given exactly
//! once. Permission checks are the kernel's (`default_permissions`).

mod attrs;
mod claims;
mod data;
mod files;
mod flock;
pub mod locks;
mod names;
mod park;
mod readers;
mod rename;
#[cfg(test)]
mod tests;
mod tree;
mod wait;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, RwLock};
use vmfs_common::ids::ImageId;
use vmfs_common::op::Attrs;

use crate::backend::{Backend, Errno, View};
use crate::catalog::{Catalog, CatalogError, Change, Meta};

pub use attrs::{SetAttr, Stamp, XattrRule};
pub use names::{DirEntry, Made};
pub use park::{PARKED_BYTES_MAX, PARKED_OPS_MAX};
pub use rename::RenameRule;
pub use wait::Caller;

use claims::{Chores, Laid};
use flock::FileLocks;
use readers::Readers;
use tree::Tree;
use wait::Waits;

/// How long the kernel may remember a name that this host decides about.
const LOCAL_NAME_TTL: Duration = Duration::from_secs(60);
/// How long it may remember anything else. (Changes are pushed to it as well.)
const SHORT_TTL: Duration = Duration::from_secs(1);

/// What kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// Directory.
    Dir,
    /// Symbolic link.
    Symlink,
    /// Image.
    Image,
}

/// What `stat` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Kind.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Bytes that hold data.
    pub allocated: u64,
    /// Links; 0 for what has no name any more.
    pub nlink: u32,
    /// Mode, owner, atime, mtime.
    pub attrs: Attrs,
    /// Last change, nanoseconds since the epoch.
    pub ctime_ns: u64,
    /// How long the kernel may remember this.
    pub ttl: Duration,
}

/// A name that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it stands for.
    pub attr: Attr,
    /// How long the kernel may remember the name.
    pub ttl: Duration,
}

/// An open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The handle.
    pub fh: u64,
    /// Reads and writes bypass the page cache.
    pub direct: bool,
    /// What the page cache holds of the image is still its content.
    pub keep_cache: bool,
}

/// Told when the kernel remembers something that is not so any more. Calls may block on the
/// kernel's locks, so they come from a thread that holds none of ours.
pub trait KernelCache: Send + Sync {
    /// The name leads elsewhere.
    fn forget_name(&self, parent: u64, name: &str);
    /// Content, size and attributes changed.
    fn forget_content(&self, ino: u64);
    /// Returns when the kernel has been told all of the above.
    fn settle(&self);
}

/// How the mount behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// A data operation or flush that waits longer fails with `EIO`.
    pub stall_timeout: Duration,
    /// Attributes of the root directory of a new catalog, and of directories implied by claims.
    pub root: Attrs,
}

impl Default for Options {
    fn default() -> Self {
        let now = now_ns();
        let root = Attrs { mode: 0o755, uid: 0, gid: 0, atime_ns: now, mtime_ns: now };
        Self { stall_timeout: Duration::from_secs(600), root }
    }
}

/// One open file.
#[derive(Debug)]
pub(crate) struct Handle {
    ino: u64,
    id: ImageId,
    view: View,
    write: bool,
    /// The image may have set-user-id or set-group-id, which a write by an ordinary user drops.
    privileged: AtomicBool,
}

/// The file system. See the module.
pub struct Fs<B> {
    backend: Arc<B>,
    catalog: Arc<Catalog>,
    options: Options,
    tree: RwLock<Tree>,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    dirs: Mutex<HashMap<u64, Arc<Vec<DirEntry>>>>,
    next_fh: AtomicU64,
    locks: Mutex<HashMap<u64, FileLocks>>,
    /// Lineage and content version of what the kernel may have cached, by inode.
    cached: Mutex<HashMap<u64, (u64, u64)>>,
    /// Orders what chains are told of names.
    telling: Mutex<()>,
    chores: Arc<Chores>,
    /// Held while claims are laid out.
    laid: Mutex<Laid>,
    park: Arc<park::Park>,
    waits: Waits,
    readers: Readers,
    kernel: OnceLock<Box<dyn KernelCache>>,
    closed: Arc<(Mutex<bool>, Condvar)>,
    shut: AtomicBool,
}

impl<B> std::fmt::Debug for Fs<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").finish_non_exhaustive()
    }
}

pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The one mapping of catalog errors to errno.
fn catalog_errno(error: &CatalogError) -> Errno {
    let errno = match error {
        CatalogError::Io(e) => e.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        CatalogError::TooLarge => Errno::TOOBIG,
        CatalogError::Version { .. } | CatalogError::Damaged { .. } | CatalogError::Latched => Errno::IO,
    };
    if errno != Errno::NOSPC {
        tracing::error!(%error, "a name could not be changed");
    }
    errno
}

impl<B: Backend> Fs<B> {
    /// Builds the file system over an engine and a catalog, and redoes what chains have not been
    /// told yet. Starts its threads: one for what waits, one for what is tried again, one for
    /// chores.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn start(
        backend: Arc<B>,
        catalog: impl Into<Arc<Catalog>>,
        options: Options,
    ) -> std::io::Result<Arc<Self>> {
        let catalog = catalog.into();
        let rows = catalog.rows();
        let fs = Arc::new(Self {
            tree: RwLock::new(Tree::new(&rows)),
            backend,
            catalog,
            options,
            handles: RwLock::default(),
            dirs: Mutex::default(),
            next_fh: AtomicU64::new(1),
            locks: Mutex::default(),
            cached: Mutex::default(),
            telling: Mutex::new(()),
            chores: Arc::default(),
            laid: Mutex::default(),
            park: Arc::default(),
            waits: Waits::start()?,
            readers: Readers::default(),
            kernel: OnceLock::new(),
            closed: Arc::default(),
            shut: AtomicBool::new(false),
        });
        fs.redo(&rows);
        fs.sync_claims();
        let (park, backend) = (fs.park.clone(), fs.backend.clone());
        std::thread::Builder::new()
            .name("vmfs-retry".to_owned())
            .spawn(move || park.run(backend.as_ref(), |op| data::attempt(backend.as_ref(), op)))?;
        let (weak, closed) = (Arc::downgrade(&fs), fs.closed.clone());
        std::thread::Builder::new()
            .name("vmfs-chores".to_owned())
            .spawn(move || claims::run_chores(&weak, &closed))?;
        Ok(fs)
    }

    /// Where the kernel's memory is corrected. Only the first call counts.
    pub fn set_kernel(&self, kernel: Box<dyn KernelCache>) {
        let _ = self.kernel.set(kernel);
    }

    /// The engine.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Makes the transaction happen: in the journal, in memory, and on stable storage.
    fn commit(
        &self,
        mut tree: parking_lot::RwLockWriteGuard<'_, Tree>,
        changes: &[Change],
    ) -> Result<(), Errno> {
        let ticket = self.catalog.append(changes).map_err(|e| catalog_errno(&e))?;
        let gave_way = tree.apply(changes);
        drop(tree);
        self.catalog.sync(ticket).map_err(|e| catalog_errno(&e))?;
        if gave_way {
            self.sync_claims();
        }
        Ok(())
    }

    fn implied_meta(&self) -> Meta {
        Meta { attrs: self.options.root, ctime_ns: self.options.root.mtime_ns, ..Meta::default() }
    }

    fn fresh_fh(&self) -> u64 {
        self.next_fh.fetch_add(1, Ordering::Relaxed)
    }
}

impl<B> Fs<B> {
    /// Fails everything that waits and stops the threads. Later operations that would wait fail.
    pub fn close(&self) {
        if self.shut.swap(true, Ordering::SeqCst) {
            return;
        }
        *self.closed.0.lock() = true;
        self.closed.1.notify_all();
        self.waits.close();
        self.park.close();
    }
}

impl<B> Drop for Fs<B> {
    fn drop(&mut self) {
        self.close();
    }
}
