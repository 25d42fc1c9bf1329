//! Attributes and extended attributes.

use vmfs_common::op::{NAME_MAX_BYTES, XATTR_MAX_BYTES};

use super::data::DataOp;
use super::{Attr, Caller, FileKind, Fs, SHORT_TTL, now_ns};
use crate::backend::{AttrChange, Backend, Errno, StatFs};
use crate::catalog::{Change, Kind, Meta, Row, XATTRS_MAX};
use vmfs_common::op::Attrs;

/// A point in time, as `utimensat` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    /// This host's clock.
    Now,
    /// Nanoseconds since the epoch; times before 1970 are given as 0.
    At(u64),
}

impl Stamp {
    fn ns(self) -> u64 {
        match self {
            Self::Now => now_ns(),
            Self::At(ns) => ns,
        }
    }
}

/// What `SETATTR` changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// Permission bits (others are ignored).
    pub mode: Option<u32>,
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncate or extend.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<Stamp>,
    /// Last modification.
    pub mtime: Option<Stamp>,
}

/// `setxattr`'s flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrRule {
    /// Set or replace.
    Any,
    /// `XATTR_CREATE`.
    Create,
    /// `XATTR_REPLACE`.
    Replace,
}

impl XattrRule {
    pub(crate) const fn check(self, exists: bool) -> Result<(), Errno> {
        match (self, exists) {
            (Self::Create, true) => Err(Errno::EXIST),
            (Self::Replace, false) => Err(Errno::NODATA),
            _ => Ok(()),
        }
    }
}

/// What a change of owner or content takes away from a file's mode.
pub(crate) const fn without_privileges(mode: u32) -> u32 {
    let setgid = if mode & 0o010 == 0 { 0 } else { 0o2000 };
    mode & !0o4000 & !setgid
}

fn checked_xattr_name(name: &str) -> Result<(), Errno> {
    let known =
        ["user.", "trusted.", "security."].iter().any(|p| name.len() > p.len() && name.starts_with(p));
    if name.len() > NAME_MAX_BYTES {
        Err(Errno::RANGE)
    } else if !known || name == "security.capability" {
        // No ACLs, and no capabilities: nobody executes a disk image.
        Err(Errno::OPNOTSUPP)
    } else {
        Ok(())
    }
}

fn edit_xattr(meta: &mut Meta, name: &str, value: Option<&[u8]>, rule: XattrRule) -> Result<(), Errno> {
    let exists = meta.xattrs.contains_key(name);
    rule.check(exists)?;
    match value {
        Some(_) if !exists && meta.xattrs.len() >= XATTRS_MAX => return Err(Errno::NOSPC),
        Some(value) => meta.xattrs.insert(name.to_owned(), value.to_vec()),
        None => meta.xattrs.remove(name),
    };
    Ok(())
}

impl<B: Backend> Fs<B> {
    /// Attributes of an inode.
    ///
    /// # Errors
    /// `ENOENT` for an inode that nobody knows.
    pub fn getattr(&self, ino: u64) -> Result<Attr, Errno> {
        let (id, linked, view) = {
            let tree = self.tree.read();
            let node = tree.get(ino).ok_or(Errno::NOENT)?;
            let Some(id) = node.image() else {
                return Ok(Self::local_attr(ino, node));
            };
            (id, node.linked, node.pins.last().copied())
        };
        let nlink = u32::from(linked);
        // The pin may have been given back in between.
        let pinned = view.and_then(|view| self.backend.stat(id, Some(view)).ok());
        let stat = match pinned.map_or_else(|| self.backend.stat(id, None), Ok) {
            Ok(stat) => Some(stat),
            // A name whose image is lost stays, so that it can be seen and removed.
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno),
        };
        let mut attr = Attr {
            ino,
            kind: FileKind::Image,
            size: 0,
            allocated: 0,
            nlink,
            attrs: Attrs::default(),
            ctime_ns: 0,
            ttl: std::time::Duration::ZERO,
        };
        if let Some(stat) = stat {
            attr.size = stat.size_bytes;
            attr.allocated = stat.allocated_bytes;
            attr.attrs = stat.attrs;
            attr.ctime_ns = stat.ctime_ns;
            // What other hosts change is asked for every time.
            attr.ttl = if stat.writable_here { SHORT_TTL } else { attr.ttl };
        }
        Ok(attr)
    }

    fn local_attr(ino: u64, node: &super::tree::Node) -> Attr {
        let meta = node.meta().cloned().unwrap_or_default();
        let (kind, size) = match &node.row.kind {
            Kind::Symlink { target, .. } => (FileKind::Symlink, target.len() as u64),
            _ => (FileKind::Dir, 4096),
        };
        let links = if kind == FileKind::Dir { 2 + node.subdirs } else { 1 };
        Attr {
            ino,
            kind,
            size,
            allocated: 0,
            nlink: if node.linked { links } else { 0 },
            attrs: meta.attrs,
            ctime_ns: meta.ctime_ns,
            ttl: SHORT_TTL,
        }
    }

    /// Changes attributes, the size among them. `uid` is the caller's: a truncate by anybody but
    /// root takes set-user-id and set-group-id away.
    pub fn setattr(
        &self,
        ino: u64,
        fh: Option<u64>,
        change: SetAttr,
        uid: u32,
        caller: Caller,
        reply: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let node = self.tree.read().get(ino).map(super::tree::Node::image);
        let Some(id) = node else { return reply(Err(Errno::NOENT)) };
        let Some(id) = id else {
            return reply(if change.size.is_some() {
                Err(Errno::ISDIR)
            } else {
                self.set_meta(ino, &change)
            });
        };
        let truncated = change.size.is_some() && uid != 0;
        let attrs = match self.attr_change(id, &change, truncated) {
            Ok(attrs) => attrs,
            Err(errno) => return reply(Err(errno)),
        };
        if attrs.mode.is_some_and(|m| m & 0o6000 != 0) {
            self.mark_privileged(ino);
        }
        let view = match fh.map(|fh| self.handle(fh)).transpose() {
            Ok(handle) => handle.map(|h| h.view),
            Err(errno) => return reply(Err(errno)),
        };
        let op = DataOp::Change { id, view, size: change.size, attrs };
        self.submit(id, caller, op, move |outcome| reply(outcome.map(|_| ())));
    }

    /// What the change means for an image.
    fn attr_change(
        &self,
        id: vmfs_common::ids::ImageId,
        change: &SetAttr,
        drops_privileges: bool,
    ) -> Result<AttrChange, Errno> {
        let mut mode = change.mode.map(|m| m & 0o7777);
        if change.uid.is_some() || change.gid.is_some() || drops_privileges {
            let present = match mode {
                Some(mode) => mode,
                None => self.backend.stat(id, None)?.attrs.mode,
            };
            let kept = without_privileges(present);
            mode = if kept == present { mode } else { Some(kept) };
        }
        Ok(AttrChange {
            mode,
            uid: change.uid,
            gid: change.gid,
            atime_ns: change.atime.map(Stamp::ns),
            mtime_ns: change.mtime.map(Stamp::ns),
        })
    }

    /// Attributes of a directory or symlink.
    fn set_meta(&self, ino: u64, change: &SetAttr) -> Result<(), Errno> {
        self.edit_meta(ino, |meta| {
            let attrs = &mut meta.attrs;
            attrs.mode = change.mode.map_or(attrs.mode, |m| m & 0o7777);
            attrs.uid = change.uid.unwrap_or(attrs.uid);
            attrs.gid = change.gid.unwrap_or(attrs.gid);
            attrs.atime_ns = change.atime.map_or(attrs.atime_ns, Stamp::ns);
            attrs.mtime_ns = change.mtime.map_or(attrs.mtime_ns, Stamp::ns);
            Ok(())
        })
    }

    fn edit_meta(&self, ino: u64, edit: impl FnOnce(&mut Meta) -> Result<(), Errno>) -> Result<(), Errno> {
        let mut tree = self.tree.write();
        let node = tree.get(ino).ok_or(Errno::NOENT)?;
        let mut row: Row = node.row.clone();
        let (linked, mut changes) = (node.linked, Vec::new());
        match &mut row.kind {
            Kind::Dir(meta) | Kind::Symlink { meta, .. } => {
                edit(meta)?;
                meta.ctime_ns = now_ns();
            }
            Kind::Image(_) => return Err(Errno::INVAL),
        }
        if !linked {
            // A removed directory that somebody is still in: there is nothing to make durable.
            if let Some(node) = tree.get_mut(ino) {
                node.row = row;
            }
            return Ok(());
        }
        changes.extend(tree.materialise(row.parent));
        changes.push(Change::Put(ino, row));
        self.commit(tree, &changes)
    }

    /// One extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP` for a namespace that is not `user`, `trusted` or `security`.
    pub fn getxattr(&self, ino: u64, name: &str) -> Result<Vec<u8>, Errno> {
        checked_xattr_name(name)?;
        let id = {
            let tree = self.tree.read();
            let node = tree.get(ino).ok_or(Errno::NOENT)?;
            match node.meta() {
                Some(meta) => return meta.xattrs.get(name).cloned().ok_or(Errno::NODATA),
                None => node.image().ok_or(Errno::NODATA)?,
            }
        };
        self.backend.xattr_get(id, name)
    }

    /// Names of the extended attributes.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn listxattr(&self, ino: u64) -> Result<Vec<String>, Errno> {
        let id = {
            let tree = self.tree.read();
            let node = tree.get(ino).ok_or(Errno::NOENT)?;
            match node.meta() {
                Some(meta) => return Ok(meta.xattrs.keys().cloned().collect()),
                None => node.image().ok_or(Errno::NOENT)?,
            }
        };
        self.backend.xattr_list(id)
    }

    /// Sets an extended attribute, or removes it (`None`, with [`XattrRule::Replace`]).
    ///
    /// Answers `EEXIST`/`ENODATA` by the rule, `E2BIG`, `ENOSPC` beyond [`XATTRS_MAX`] of them, `EROFS`.
    pub fn setxattr(
        &self,
        ino: u64,
        name: &str,
        value: Option<&[u8]>,
        rule: XattrRule,
        caller: Caller,
        reply: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let image = checked_xattr_name(name).and_then(|()| {
            if value.is_some_and(|v| v.len() > XATTR_MAX_BYTES) {
                return Err(Errno::TOOBIG);
            }
            Ok(self.tree.read().get(ino).ok_or(Errno::NOENT)?.image())
        });
        match image {
            Err(errno) => reply(Err(errno)),
            Ok(None) => reply(self.edit_meta(ino, |meta| edit_xattr(meta, name, value, rule))),
            Ok(Some(id)) => {
                let op = DataOp::Xattr { id, name: name.to_owned(), value: value.map(<[u8]>::to_vec), rule };
                self.submit(id, caller, op, move |outcome| reply(outcome.map(|_| ())));
            }
        }
    }

    /// Capacity.
    pub fn statfs(&self) -> StatFs {
        self.backend.statfs()
    }
}
