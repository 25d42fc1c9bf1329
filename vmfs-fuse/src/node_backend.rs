//! [`Backend`] over the engine of `vmfs-replica`: converts, calls, maps errors.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES_U64, BlockIndex, ImageId};
use vmfs_replica::node::{CreateError, IN_USE, Image, IoError, Node, View as Frozen};
use vmfs_store::StoreError;

use crate::backend::{
    Attempt, AttrChange, Attrs, Backend, Claim, Done, Errno, ImageStat, PinId, SizeRule, StatFs, View, Wake,
};

/// The engine as the mount sees it.
pub struct NodeBackend {
    node: Node,
    pins: RwLock<HashMap<PinId, Arc<Frozen>>>,
    next_pin: AtomicU64,
}

/// The one mapping of the engine's errors to errno.
fn errno(e: &IoError) -> Errno {
    match e {
        IoError::Wait => Errno::AGAIN,
        IoError::NotOwner => Errno::ROFS,
        IoError::Failed => Errno::IO,
        IoError::Full | IoError::Limit => Errno::NOSPC,
        IoError::TooLarge => Errno::FBIG,
        IoError::Store(e) => {
            tracing::error!("an operation failed: {e}");
            Errno::IO
        }
    }
}

fn attempt(result: Result<(), IoError>) -> Attempt<()> {
    match result {
        Ok(()) => Attempt::ok(()),
        Err(IoError::Wait) => Attempt::Wait,
        Err(e) => Attempt::err(errno(&e)),
    }
}

fn store_errno(e: &StoreError) -> Errno {
    match e {
        StoreError::Full => Errno::NOSPC,
        e => {
            tracing::error!("an operation failed: {e}");
            Errno::IO
        }
    }
}

impl NodeBackend {
    /// Over a running engine.
    #[must_use]
    pub fn new(node: Node) -> Self {
        node.mount_corrected(0);
        Self { node, pins: RwLock::default(), next_pin: AtomicU64::new(1) }
    }

    fn image(&self, id: ImageId) -> Result<Arc<Image>, Errno> {
        self.node.image(id).ok_or(Errno::NOENT)
    }
    fn pinned(&self, view: View) -> Result<Option<Arc<Frozen>>, Errno> {
        match view.pin {
            None => Ok(None),
            Some(pin) => self.pins.read().get(&pin).cloned().map(Some).ok_or(Errno::BADF),
        }
    }
    fn with_image(&self, id: ImageId, f: impl FnOnce(&Arc<Image>) -> Result<(), IoError>) -> Attempt<()> {
        match self.image(id) {
            Ok(image) => attempt(f(&image)),
            Err(e) => Attempt::err(e),
        }
    }
    /// Names and attributes never wait: what cannot be appended now is told to come back.
    fn control(
        &self,
        id: ImageId,
        make: impl FnOnce(&vmfs_common::state::ImageState) -> Option<Op>,
    ) -> Result<(), Errno> {
        self.image(id)?.control(make).map_err(|e| errno(&e))
    }
    /// The frozen content that a seek looks at, its size, and the offset checked against it.
    fn seek(&self, id: ImageId, view: View, offset: u64) -> Result<(Frozen, u64), Errno> {
        let image = self.image(id)?;
        let frozen = self.pinned(view)?.map_or_else(|| image.view(), |f| (*f).clone());
        let size = frozen.state().size_bytes;
        if offset >= size { Err(Errno::NXIO) } else { Ok((frozen, size)) }
    }
}

impl Backend for NodeBackend {
    fn create(&self, path: &str, attrs: &Attrs, xattrs: &[(String, Vec<u8>)]) -> Result<ImageId, Errno> {
        match self.node.create_image(path, attrs, xattrs) {
            Ok(image) => Ok(image.id),
            Err(CreateError::Exists) => Err(Errno::EXIST),
            Err(CreateError::Policy) => {
                tracing::error!(path, "{}", CreateError::Policy);
                Err(Errno::INVAL)
            }
            Err(CreateError::Store(e)) => Err(store_errno(&e)),
            Err(CreateError::Io(e)) => Err(errno(&e)),
        }
    }

    fn list(&self) -> Vec<Claim> {
        let claim = |i: &Arc<Image>| {
            let state = i.state();
            let path = state.path.clone()?;
            let witness = i.kind() == MemberRole::Witness;
            (!witness).then(|| Claim {
                id: i.id,
                path,
                unlinked: state.unlinked,
                owner_here: i.is_owner_here(),
            })
        };
        self.node.images().iter().filter_map(claim).collect()
    }

    fn claims_version(&self) -> u64 {
        self.node.claims_version()
    }

    fn rename_claim(&self, id: ImageId, path: &str) -> Result<(), Errno> {
        self.control(id, |state| {
            let same = !state.unlinked && state.path.as_deref() == Some(path);
            (!same).then(|| Op::Name { path: path.to_owned() })
        })
    }

    fn unlink(&self, id: ImageId) -> Result<(), Errno> {
        let Ok(image) = self.image(id) else { return Ok(()) };
        image.unlink().map_err(|e| errno(&e))
    }

    fn stat(&self, id: ImageId, view: Option<View>) -> Result<ImageStat, Errno> {
        let image = self.image(id)?;
        let pinned = view.map(|v| self.pinned(v)).transpose()?.flatten();
        let newest = image.state();
        let shown = pinned.as_ref().map_or(&newest, |p| p.state());
        Ok(ImageStat {
            size_bytes: shown.size_bytes,
            allocated_bytes: image.stored_bytes(),
            attrs: newest.attrs,
            ctime_ns: newest.ctime_ns,
            writable_here: image.is_writable(),
            lineage: image.lineage(),
            content_version: image.content_version(),
        })
    }

    fn set_attrs(&self, id: ImageId, change: &AttrChange) -> Result<(), Errno> {
        self.control(id, |state| {
            let old = state.attrs;
            Some(Op::Attr(Attrs {
                mode: change.mode.unwrap_or(old.mode),
                uid: change.uid.unwrap_or(old.uid),
                gid: change.gid.unwrap_or(old.gid),
                atime_ns: change.atime_ns.unwrap_or(old.atime_ns),
                mtime_ns: change.mtime_ns.unwrap_or(old.mtime_ns),
            }))
        })
    }

    fn xattr_get(&self, id: ImageId, name: &str) -> Result<Vec<u8>, Errno> {
        self.image(id)?.state().xattrs.get(name).cloned().ok_or(Errno::NODATA)
    }

    fn xattr_list(&self, id: ImageId) -> Result<Vec<String>, Errno> {
        Ok(self.image(id)?.state().xattrs.keys().filter(|name| *name != IN_USE).cloned().collect())
    }

    fn xattr_set(&self, id: ImageId, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        let image = self.image(id)?;
        let state = image.state();
        let full = state.xattrs.len() >= vmfs_common::state::XATTRS_MAX && !state.xattrs.contains_key(name);
        if value.is_some() && full {
            return Err(Errno::NOSPC);
        }
        let op = Op::Xattr { name: name.to_owned(), value: value.map(<[u8]>::to_vec) };
        image.control(|_| Some(op)).map_err(|e| errno(&e))
    }

    fn open(&self, id: ImageId, write: bool) -> Result<View, Errno> {
        let image = self.image(id)?;
        if image.kind() == MemberRole::Witness {
            return Err(Errno::IO);
        }
        image.note_open();
        let lineage = image.lineage();
        if write || image.is_owner_here() {
            return Ok(View { lineage, pin: None });
        }
        let pin = PinId(self.next_pin.fetch_add(1, Ordering::Relaxed));
        self.pins.write().insert(pin, Arc::new(image.view()));
        Ok(View { lineage, pin: Some(pin) })
    }

    fn close(&self, id: ImageId, view: View) {
        if let Ok(image) = self.image(id) {
            image.note_close();
        }
        if let Some(pin) = view.pin {
            self.pins.write().remove(&pin);
        }
    }

    fn read(&self, id: ImageId, view: View, offset: u64, len: u32, buf: &mut Vec<u8>) -> Attempt<()> {
        let pinned = match self.pinned(view) {
            Ok(p) => p,
            Err(e) => return Attempt::err(e),
        };
        self.with_image(id, |image| match &pinned {
            Some(frozen) => image.read_view(frozen, offset, len as usize, buf),
            None => image.read(view.lineage, offset, len as usize, buf),
        })
    }

    fn read_soon(
        &self,
        id: ImageId,
        view: View,
        offset: u64,
        len: u32,
        buf: &mut Vec<u8>,
    ) -> Option<Attempt<()>> {
        if view.pin.is_some() {
            return Some(self.read(id, view, offset, len, buf));
        }
        let image = match self.image(id) {
            Ok(image) => image,
            Err(e) => return Some(Attempt::err(e)),
        };
        match image.read_soon(view.lineage, offset, len as usize, buf) {
            Ok(false) => None,
            read => Some(attempt(read.map(|_| ()))),
        }
    }

    fn write(&self, id: ImageId, view: View, offset: u64, data: &[u8]) -> Attempt<()> {
        self.with_image(id, |image| image.write(view.lineage, offset, data))
    }

    fn answered(&self, id: ImageId) {
        if let Some(image) = self.node.image(id) {
            image.answered();
        }
    }

    fn zero(&self, id: ImageId, view: View, offset: u64, len: u64, size: SizeRule) -> Attempt<()> {
        self.with_image(id, |image| image.zero(view.lineage, offset, len, size == SizeRule::Keep))
    }

    fn allocate(&self, id: ImageId, view: View, offset: u64, len: u64, size: SizeRule) -> Attempt<()> {
        self.with_image(id, |image| {
            let end = offset.saturating_add(len);
            let state = image.state();
            // A log has no places to reserve: what can be promised is that the space is there now.
            if len > self.node.space().0 {
                return Err(IoError::Full);
            }
            if size == SizeRule::Extend && end > state.size_bytes {
                return image.resize(view.lineage, end);
            }
            Ok(())
        })
    }

    fn resize(&self, id: ImageId, view: Option<View>, size_bytes: u64) -> Attempt<()> {
        self.with_image(id, |image| {
            image.resize(view.map_or_else(|| image.lineage(), |v| v.lineage), size_bytes)
        })
    }

    fn seek_data(&self, id: ImageId, view: View, offset: u64) -> Result<u64, Errno> {
        let (frozen, size) = self.seek(id, view, offset)?;
        let next = frozen.next_data(BlockIndex::containing(offset)).map_err(|e| store_errno(&e))?;
        let at = next.map(|b| b.offset_bytes().max(offset)).filter(|at| *at < size);
        at.ok_or(Errno::NXIO)
    }

    fn seek_hole(&self, id: ImageId, view: View, offset: u64) -> Result<u64, Errno> {
        let (frozen, size) = self.seek(id, view, offset)?;
        let next = frozen.next_hole(BlockIndex::containing(offset)).map_err(|e| store_errno(&e))?;
        Ok(next.0.saturating_mul(BLOCK_BYTES_U64).max(offset).min(size))
    }

    fn flush(&self, id: ImageId, view: Option<View>, done: Done<()>) {
        let image = match self.image(id) {
            Ok(image) => image,
            Err(e) => return done(Err(e)),
        };
        if view.is_some_and(|v| v.lineage != image.lineage()) {
            return done(Err(Errno::IO));
        }
        let owner = image.is_owner_here();
        image.flush(Box::new(move |result| {
            done(match result {
                // A reader's fsync on a replica has nothing to make durable.
                Err(IoError::NotOwner) if !owner => Ok(()),
                other => other.map_err(|e| errno(&e)),
            });
        }));
    }

    fn notify_ready(&self, id: ImageId, wake: Wake) {
        match self.image(id) {
            Ok(image) => image.notify_ready(wake),
            Err(_) => wake(),
        }
    }

    fn corrected(&self, version: u64) {
        self.node.mount_corrected(version);
    }

    fn statfs(&self) -> StatFs {
        let (free_bytes, total_bytes) = self.node.space();
        StatFs { total_bytes, free_bytes, images_count: self.node.images().len() as u64 }
    }
}
