//! What the mount needs from the engine, and nothing else. The engine behind it is
//! `node_backend`; the tests' one is in memory.
//!
//! Rules that every implementation keeps:
//!
//! - **No method waits for the network, a lock held across the network, or a quorum.** What cannot
//!   be done now answers [`Attempt::Wait`]; the mount parks the operation (bounded, see
//!   `fs::park`) and tries again when [`Backend::notify_ready`] fires. Local disk I/O is allowed.
//! - Everything is byte-addressed here; blocks are the engine's business.
//! - `Err` means nothing was changed, except where a method says otherwise.

use vmfs_common::ids::ImageId;

pub use rustix::io::Errno;
pub use vmfs_common::op::Attrs;

/// Called once with the outcome of something that takes a while. Must not block.
pub type Done<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

/// Called once when it is worth trying again. Must not block.
pub type Wake = Box<dyn FnOnce() + Send>;

/// The outcome of one try.
#[derive(Debug, PartialEq, Eq)]
pub enum Attempt<T> {
    /// It was done, or failed for good. An error changed nothing.
    Ready(Result<T, Errno>),
    /// Not now: the image is frozen, stalled, waiting for its `EpochStart`, or more than `max_lag`
    /// ahead of its quorum. Nothing was changed. Ask [`Backend::notify_ready`] when to come back.
    Wait,
}

impl<T> Attempt<T> {
    /// Shorthand for success.
    pub const fn ok(value: T) -> Self {
        Self::Ready(Ok(value))
    }
    /// Shorthand for a failure that is final.
    pub const fn err(errno: Errno) -> Self {
        Self::Ready(Err(errno))
    }
}

/// A pinned prefix state of an image, from [`Backend::open`] to [`Backend::close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PinId(pub u64);

/// What an open file was shown. Every data operation names it, and the engine compares under its
/// own lock, so that a handle from before a roll-back can never write to what came after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct View {
    /// The image's lineage when it was opened: it changes whenever the adopted chain stops
    /// extending what was shown before (roll-back, forced promotion, rewind). It does *not*
    /// change when ownership moves and the new owner's chain extends the old one.
    /// A data operation with another lineage than the current one answers `EIO`.
    pub lineage: u64,
    /// The state that reads of this handle see. `None`: the newest.
    pub pin: Option<PinId>,
}

/// A claim of an image on a path, as its chain says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The image.
    pub id: ImageId,
    /// Without a leading slash; untrusted (the mount checks it).
    pub path: String,
    /// The chain says that the name is gone (the undelete window runs).
    pub unlinked: bool,
    /// The newest epoch known here belongs to this host, whether or not it can write right now
    /// (it may be re-electing itself after a restart).
    pub owner_here: bool,
}

/// What `stat` shows of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageStat {
    /// Size in bytes (of the pinned state when a pin was named).
    pub size_bytes: u64,
    /// Bytes of blocks that hold data.
    pub allocated_bytes: u64,
    /// Mode, user, group, atime and mtime. `mtime_ns` moves with every content change.
    pub attrs: Attrs,
    /// Time of the last update that changed content, size, attributes or name.
    pub ctime_ns: u64,
    /// This host may write: it owns the image and its epoch has begun.
    pub writable_here: bool,
    /// See [`View::lineage`].
    pub lineage: u64,
    /// Changes whenever the content changed other than through this trait: an update applied as
    /// a replica, a roll-back, a resync. Constant while this host owns and writes the image; the
    /// kernel's page cache is kept across opens only while it is.
    pub content_version: u64,
}

/// Changes of attributes; `None` leaves as it is. `ctime` becomes now in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AttrChange {
    /// Permission bits, at most `0o7777`.
    pub mode: Option<u32>,
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Nanoseconds since the epoch.
    pub atime_ns: Option<u64>,
    /// Nanoseconds since the epoch.
    pub mtime_ns: Option<u64>,
}

impl AttrChange {
    /// True when it asks for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How a zeroed range is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SizeRule {
    /// A range beyond the end extends the image.
    Extend,
    /// The size stays as it is; what lies beyond it is ignored.
    Keep,
}

/// Capacity of the store, for `statfs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatFs {
    /// Total.
    pub total_bytes: u64,
    /// Free for new data, without the reserve for deletion, promises and epoch changes.
    pub free_bytes: u64,
    /// Images on this host.
    pub images_count: u64,
}

/// The engine as the mount sees it. See the module for the rules.
pub trait Backend: Send + Sync + 'static {
    // Names.

    /// Makes an image owned by this host; the datastore's policy decides its members. Its name
    /// and attributes are in its chain on return (durable with its first flush). It may be opened
    /// and read as empty at once; writes may answer [`Attempt::Wait`] until its epoch has begun.
    ///
    /// # Errors
    /// `EEXIST` when a reachable member already claims the path for an image that is not
    /// unlinked; `ENOSPC`; `EIO`.
    fn create(&self, path: &str, attrs: &Attrs, xattrs: &[(String, Vec<u8>)]) -> Result<ImageId, Errno>;

    /// Every image of which this host holds a copy with data (not as a witness), unlinked ones
    /// within their undelete window included.
    fn list(&self) -> Vec<Claim>;

    /// Changes whenever [`Backend::list`] would answer differently, or an image's lineage,
    /// `content_version` while it is not written here, or `writable_here` changed. Cheap (the
    /// mount asks ten times a second). May lag by a moment, must not miss a change for ever.
    fn claims_version(&self) -> u64;

    /// The chain says `path` from now on. Idempotent: the present path changes nothing.
    ///
    /// # Errors
    /// `EROFS` when this host is not the owner, `ENOENT` for an unknown image; `EAGAIN` when it
    /// owns the image but cannot append yet (the mount repeats it).
    fn rename_claim(&self, id: ImageId, path: &str) -> Result<(), Errno>;

    /// The chain says that the name is gone. Idempotent, also for an image that is unlinked or gone.
    /// The content lives on while views are open here; the undelete window begins when none is.
    ///
    /// # Errors
    /// `EROFS` when this host is not the owner; `EAGAIN` when it owns the image but cannot append
    /// yet (the mount repeats it).
    fn unlink(&self, id: ImageId) -> Result<(), Errno>;

    // Attributes: of the newest state, appended to the chain. `EAGAIN` from a change says what
    // [`Attempt::Wait`] says: the mount parks the request.

    /// Attributes; with a `view`, size and blocks are those of what the handle sees.
    ///
    /// # Errors
    /// `ENOENT` for an unknown image.
    fn stat(&self, id: ImageId, view: Option<View>) -> Result<ImageStat, Errno>;

    /// Changes attributes.
    ///
    /// # Errors
    /// `EROFS` when this host is not the owner, `EAGAIN`, `ENOSPC`, `EIO`.
    fn set_attrs(&self, id: ImageId, change: &AttrChange) -> Result<(), Errno>;

    /// One extended attribute.
    ///
    /// # Errors
    /// `ENODATA` when it is not set.
    fn xattr_get(&self, id: ImageId, name: &str) -> Result<Vec<u8>, Errno>;

    /// Names of the extended attributes.
    ///
    /// # Errors
    /// `ENOENT` for an unknown image.
    fn xattr_list(&self, id: ImageId) -> Result<Vec<String>, Errno>;

    /// Sets (`Some`) or removes (`None`) one. The mount has checked that it (does not) exist.
    ///
    /// # Errors
    /// `EROFS` when this host is not the owner, `EAGAIN`, `ENOSPC` when there are too many, `EIO`.
    fn xattr_set(&self, id: ImageId, name: &str, value: Option<&[u8]>) -> Result<(), Errno>;

    // Open files.

    /// Opens. A read-only open of an image that is not writable here pins the newest *confirmed*
    /// prefix state until [`Backend::close`]; any other open sees the newest state. Opening for
    /// writing succeeds on a host that is not the owner (QEMU opens before the switch-over of a
    /// migration); its writes fail until it is.
    ///
    /// # Errors
    /// `ENOENT` for an unknown image; `EIO` when it has no readable state here.
    fn open(&self, id: ImageId, write: bool) -> Result<View, Errno>;

    /// Gives the view (and its pin) back.
    fn close(&self, id: ImageId, view: View);

    /// Fills `buf` (cleared first) with the bytes of `offset..offset + len`, fewer at the end of
    /// the image, none beyond it. Bytes never written are zeros.
    fn read(&self, id: ImageId, view: View, offset: u64, len: u32, buf: &mut Vec<u8>) -> Attempt<()>;

    /// As [`Backend::read`] if the bytes are in memory; else begins to fetch them and gives `None`, after which
    /// they are read by a thread that may wait for the disk.
    fn read_soon(
        &self,
        id: ImageId,
        view: View,
        offset: u64,
        len: u32,
        buf: &mut Vec<u8>,
    ) -> Option<Attempt<()>> {
        Some(self.read(id, view, offset, len, buf))
    }

    /// Writes all of `data` at `offset`, any alignment, extending the image as needed. Not
    /// durable before a [`Backend::flush`]. `EROFS` when this host is not the owner and never
    /// was for this view, `EIO` when it was deposed, `ENOSPC`, `EFBIG`.
    fn write(&self, id: ImageId, view: View, offset: u64, data: &[u8]) -> Attempt<()>;

    /// The caller of a [`Backend::write`] that was done has its answer: the time for what he need not wait
    /// for. May take as long as a sync of the local disk.
    fn answered(&self, id: ImageId) {
        let _ = id;
    }

    /// Makes the range read as zeros and frees whole blocks. Errors as [`Backend::write`].
    fn zero(&self, id: ImageId, view: View, offset: u64, len: u64, size: SizeRule) -> Attempt<()>;

    /// Reserves space for the range as far as the store can (a log has no places to reserve: it
    /// checks that the bytes are free) and extends the image unless told not to.
    fn allocate(&self, id: ImageId, view: View, offset: u64, len: u64, size: SizeRule) -> Attempt<()>;

    /// Sets the size; what is cut off reads as zeros when the image grows again.
    /// `view` is `None` for a truncate by path.
    fn resize(&self, id: ImageId, view: Option<View>, size_bytes: u64) -> Attempt<()>;

    /// Copies a range by sharing blocks instead of moving them. `None` when it cannot for these
    /// arguments: the mount then reads and writes. `Ok(n)`: the first `n` bytes are copied.
    fn share_range(
        &self,
        from: (ImageId, View, u64),
        to: (ImageId, View, u64),
        len: u64,
    ) -> Option<Attempt<u64>> {
        let _ = (from, to, len);
        None
    }

    /// First offset at or after `offset` that may hold data; the end of the image counts as hole.
    ///
    /// # Errors
    /// `ENXIO` at or beyond the end, or when only a hole follows.
    fn seek_data(&self, id: ImageId, view: View, offset: u64) -> Result<u64, Errno>;

    /// First offset at or after `offset` in a hole; at most the size.
    ///
    /// # Errors
    /// `ENXIO` at or beyond the end.
    fn seek_hole(&self, id: ImageId, view: View, offset: u64) -> Result<u64, Errno>;

    /// The durability point: `done(Ok)` says that everything done to the image before this call
    /// is as durable as its policy demands. Returns at once; may take a round trip, or until the
    /// quorum is back. `view` is `None` for the mount's own flushes. On a host that is not the
    /// owner: `Ok` for a handle that has nothing to flush.
    fn flush(&self, id: ImageId, view: Option<View>, done: Done<()>);

    /// Calls `wake` once when an operation on the image that answered [`Attempt::Wait`] should be
    /// tried again: at once when nothing holds the image any more, in any case within a second.
    fn notify_ready(&self, id: ImageId, wake: Wake);

    /// A lock was taken here on an image that is not writable here; `exclusive` when it is a
    /// write lock. The engine may ask the owner for a hand-over. Never waits.
    fn lock_wanted(&self, id: ImageId, exclusive: bool) {
        let _ = (id, exclusive);
    }

    /// Everything that [`Backend::claims_version`] stood for when it had this value is known to the
    /// mount, and the kernel keeps nothing older. Whoever moved ownership waits for it before saying
    /// that it is done, so that no page read under an earlier owner is taken for the present one.
    fn corrected(&self, version: u64) {
        let _ = version;
    }

    /// Capacity.
    fn statfs(&self) -> StatFs;
}
