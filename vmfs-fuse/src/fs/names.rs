//! Operations on names.

use std::sync::Arc;

use vmfs_common::op::{Attrs, PATH_MAX_BYTES};

use super::tree::{Node, Tree, name_fits};
use super::{Entry, FileKind, Fs, LOCAL_NAME_TTL, Opened, SHORT_TTL, now_ns};
use crate::backend::{Backend, Errno};
use crate::catalog::{Change, Kind, Meta, Row};

/// Who makes a name, and with what mode (the umask is applied already).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Made {
    /// Permission bits.
    pub mode: u32,
    /// The caller's user.
    pub uid: u32,
    /// The caller's group.
    pub gid: u32,
}

/// One entry of a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Name.
    pub name: String,
    /// Inode number.
    pub ino: u64,
    /// Kind.
    pub kind: FileKind,
}

/// The name as a chain can hold it. Names are UTF-8, because chains are read by other hosts.
///
/// # Errors
/// `ENAMETOOLONG`, `EILSEQ`, `EINVAL`.
pub(super) fn checked(name: &[u8]) -> Result<&str, Errno> {
    if name.len() > vmfs_common::op::NAME_MAX_BYTES {
        return Err(Errno::NAMETOOLONG);
    }
    let name = std::str::from_utf8(name).map_err(|_| Errno::ILSEQ)?;
    if name_fits(name) { Ok(name) } else { Err(Errno::INVAL) }
}

const fn kind_of(node: &Node) -> FileKind {
    match node.row.kind {
        Kind::Dir(_) => FileKind::Dir,
        Kind::Symlink { .. } => FileKind::Symlink,
        Kind::Image(_) => FileKind::Image,
    }
}

/// The directory with a new mtime and ctime, as it is or as `changes` make it.
pub(super) fn touch(tree: &Tree, dir: u64, changes: &mut Vec<Change>) {
    let now = now_ns();
    let touched = |row: &Row| {
        let mut row = row.clone();
        if let Kind::Dir(meta) = &mut row.kind {
            meta.ctime_ns = now;
            meta.attrs.mtime_ns = now;
        }
        row
    };
    let pending = changes.iter().rev().find_map(|c| match c {
        Change::Put(ino, row) if *ino == dir => Some(row),
        _ => None,
    });
    match (pending, tree.get(dir)) {
        (Some(row), _) => changes.push(Change::Put(dir, touched(row))),
        (None, Some(node)) if node.local => changes.push(Change::Put(dir, touched(&node.row))),
        // A directory that only other hosts' images imply has no attributes of its own.
        _ => {}
    }
}

impl Made {
    /// Attributes of what is made in `parent`, which may hand its group down.
    fn attrs(&self, parent: &Node, dir: bool) -> Attrs {
        let now = now_ns();
        let mut attrs =
            Attrs { mode: self.mode & 0o7777, uid: self.uid, gid: self.gid, atime_ns: now, mtime_ns: now };
        if let Some(meta) = parent.meta().filter(|m| m.attrs.mode & 0o2000 != 0) {
            attrs.gid = meta.attrs.gid;
            attrs.mode |= if dir { 0o2000 } else { 0 };
        }
        attrs
    }
}

impl<B: Backend> Fs<B> {
    /// Looks a name up; the kernel remembers it until it forgets it.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `ENAMETOOLONG`.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Entry, Errno> {
        if name.len() > vmfs_common::op::NAME_MAX_BYTES {
            return Err(Errno::NAMETOOLONG);
        }
        let name = std::str::from_utf8(name).map_err(|_| Errno::NOENT)?;
        let ino = {
            let tree = self.tree.read();
            tree.dir(parent)?;
            tree.child(parent, name).ok_or(Errno::NOENT)?
        };
        self.remember(ino)
    }

    /// The entry of an inode, counted as looked up.
    ///
    /// # Errors
    /// `ENOENT` when it is gone.
    pub fn remember(&self, ino: u64) -> Result<Entry, Errno> {
        let local = {
            let mut tree = self.tree.write();
            let node = tree.get_mut(ino).ok_or(Errno::NOENT)?;
            node.lookups += 1;
            node.local
        };
        let attr = self.getattr(ino).inspect_err(|_| self.forget(ino, 1))?;
        Ok(Entry { attr, ttl: if local { LOCAL_NAME_TTL } else { SHORT_TTL } })
    }

    /// The kernel forgets `count` look-ups.
    pub fn forget(&self, ino: u64, count: u64) {
        let mut tree = self.tree.write();
        if let Some(node) = tree.get_mut(ino) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        tree.drop_unused(ino);
    }

    /// Checks that `name` can be made in `parent`, and says what it starts with.
    fn vacancy(&self, parent: u64, name: &str, made: Made, dir: bool) -> Result<(Attrs, String), Errno> {
        let tree = self.tree.read();
        let node = tree.dir(parent)?;
        if tree.child(parent, name).is_some() {
            return Err(Errno::EXIST);
        }
        Ok((made.attrs(node, dir), tree.path_in(parent, name)?))
    }

    /// Makes an empty image. Its replicas follow from the datastore's policy.
    ///
    /// # Errors
    /// `EEXIST` here or on a reachable member, `ENOSPC`, name errors.
    pub fn create(&self, parent: u64, name: &[u8], made: Made) -> Result<Entry, Errno> {
        let name = checked(name)?;
        let (attrs, path) = self.vacancy(parent, name, made, false)?;
        // Without our lock: it writes to the disk. The kernel lets nobody else make this name.
        let id = self.backend.create(&path, &attrs, &[])?;
        let placed = (|| {
            let mut tree = self.tree.write();
            tree.dir(parent)?;
            if tree.child(parent, name).is_some_and(|i| tree.get(i).is_some_and(|n| n.local || n.is_dir())) {
                return Err(Errno::EXIST);
            }
            let ino = tree.image_ino(id);
            let mut changes = tree.materialise(parent);
            touch(&tree, parent, &mut changes);
            changes.push(Change::Put(ino, Row { parent, name: name.to_owned(), kind: Kind::Image(id) }));
            self.commit(tree, &changes)?;
            Ok(ino)
        })();
        match placed {
            Ok(ino) => {
                // A directory above may have been renamed meanwhile.
                if self.tree.read().path(ino).is_none_or(|now| now != path) {
                    self.tell_name(id);
                }
                self.remember(ino)
            }
            Err(errno) => {
                self.bury(id, None);
                Err(errno)
            }
        }
    }

    /// [`Fs::create`] and [`Fs::open`] in one.
    ///
    /// # Errors
    /// As both.
    pub fn create_open(
        &self,
        parent: u64,
        name: &[u8],
        made: Made,
        flags: i32,
    ) -> Result<(Entry, Opened), Errno> {
        let entry = self.create(parent, name, made)?;
        let opened = self.open(entry.attr.ino, flags).inspect_err(|_| self.forget(entry.attr.ino, 1))?;
        Ok((entry, opened))
    }

    fn make(
        &self,
        parent: u64,
        name: &[u8],
        made: Made,
        dir: bool,
        kind: impl FnOnce(Meta) -> Kind,
    ) -> Result<Entry, Errno> {
        let name = checked(name)?;
        let (attrs, _) = self.vacancy(parent, name, made, dir)?;
        let mut tree = self.tree.write();
        tree.dir(parent)?;
        if tree.child(parent, name).is_some() {
            return Err(Errno::EXIST);
        }
        let ino = tree.fresh_ino();
        let mut changes = tree.materialise(parent);
        touch(&tree, parent, &mut changes);
        let meta = Meta { attrs, ctime_ns: attrs.mtime_ns, ..Meta::default() };
        changes.push(Change::Put(ino, Row { parent, name: name.to_owned(), kind: kind(meta) }));
        self.commit(tree, &changes)?;
        self.remember(ino)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// `EEXIST`, name errors.
    pub fn mkdir(&self, parent: u64, name: &[u8], made: Made) -> Result<Entry, Errno> {
        self.make(parent, name, made, true, Kind::Dir)
    }

    /// Makes a symbolic link. It exists on this host only.
    ///
    /// # Errors
    /// `EEXIST`, `ENAMETOOLONG`, name errors.
    pub fn symlink(&self, parent: u64, name: &[u8], target: &[u8], made: Made) -> Result<Entry, Errno> {
        if target.len() >= PATH_MAX_BYTES {
            return Err(Errno::NAMETOOLONG);
        }
        let made = Made { mode: 0o777, ..made };
        self.make(parent, name, made, false, |meta| Kind::Symlink { target: target.to_vec(), meta })
    }

    /// Where a symbolic link points.
    ///
    /// # Errors
    /// `EINVAL` for anything else.
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>, Errno> {
        match &self.tree.read().get(ino).ok_or(Errno::NOENT)?.row.kind {
            Kind::Symlink { target, .. } => Ok(target.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    /// Removes a name. The image itself goes at its last close, and is kept on its replicas for
    /// the undelete window.
    ///
    /// # Errors
    /// `EROFS` for an image that another host owns, `EISDIR`, `ENOENT`.
    pub fn unlink(&self, parent: u64, name: &[u8]) -> Result<(), Errno> {
        let tree = self.tree.write();
        let ino = find(&tree, parent, name)?;
        let node = tree.get(ino).ok_or(Errno::NOENT)?;
        if node.is_dir() {
            return Err(Errno::ISDIR);
        }
        if !node.may_move() {
            return Err(Errno::ROFS);
        }
        let mut changes = vec![Change::Del(ino)];
        touch(&tree, parent, &mut changes);
        let image = node.image();
        if let Some(id) = image {
            changes.push(Change::Bury { id, after: None });
        }
        self.commit(tree, &changes)?;
        // Also while it is open: its content lives until the last close, its name does not.
        if let Some(id) = image {
            self.bury(id, None);
        }
        Ok(())
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `ENOTEMPTY`, `ENOTDIR`, `ENOENT`.
    pub fn rmdir(&self, parent: u64, name: &[u8]) -> Result<(), Errno> {
        let tree = self.tree.write();
        let ino = find(&tree, parent, name)?;
        if !tree.dir(ino).map(|n| n.local)? || !tree.is_empty(ino) {
            return Err(Errno::NOTEMPTY);
        }
        let mut changes = vec![Change::Del(ino)];
        touch(&tree, parent, &mut changes);
        self.commit(tree, &changes)
    }

    /// Opens a directory for listing.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`.
    pub fn opendir(&self, ino: u64) -> Result<u64, Errno> {
        match self.tree.read().get(ino) {
            None => return Err(Errno::NOENT),
            Some(node) if !node.is_dir() => return Err(Errno::NOTDIR),
            Some(_) => {}
        }
        let fh = self.fresh_fh();
        self.dirs.lock().insert(fh, Arc::default());
        Ok(fh)
    }

    /// The listing: as of the first read, and anew after a rewind, so that offsets stay valid.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn list(&self, ino: u64, fh: u64, rewind: bool) -> Result<Arc<Vec<DirEntry>>, Errno> {
        if !rewind {
            return self.dirs.lock().get(&fh).cloned().ok_or(Errno::BADF);
        }
        let list = {
            let tree = self.tree.read();
            let node = tree.get(ino).ok_or(Errno::NOENT)?;
            let entry = |name: &str, ino, kind| DirEntry { name: name.to_owned(), ino, kind };
            let mut list = vec![entry(".", ino, FileKind::Dir), entry("..", node.row.parent, FileKind::Dir)];
            if node.linked {
                list.extend(
                    tree.children(ino).filter_map(|(name, i)| Some(entry(name, i, kind_of(tree.get(i)?)))),
                );
            }
            Arc::new(list)
        };
        let mut dirs = self.dirs.lock();
        *dirs.get_mut(&fh).ok_or(Errno::BADF)? = list.clone();
        Ok(list)
    }

    /// Closes a listing.
    pub fn releasedir(&self, fh: u64) {
        self.dirs.lock().remove(&fh);
    }

    /// On return, every name is on stable storage.
    ///
    /// # Errors
    /// `EIO` after a failed write-back.
    pub fn syncdir(&self) -> Result<(), Errno> {
        self.catalog.sync_all().map_err(|e| super::catalog_errno(&e))
    }
}

pub(super) fn find(tree: &Tree, parent: u64, name: &[u8]) -> Result<u64, Errno> {
    tree.dir(parent)?;
    let name = std::str::from_utf8(name).map_err(|_| Errno::NOENT)?;
    tree.child(parent, name).ok_or(Errno::NOENT)
}
