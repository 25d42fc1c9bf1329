//! Between fuser's types and ours.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileType, FopenFlags, Generation, INodeNo, ReplyEmpty, ReplyEntry, ReplyXattr, Request,
};

use crate::backend::Errno;
use crate::fs::{Attr, Caller, FileKind, Made, Opened};

/// Inode numbers are not reused within a process, and the kernel forgets them with the mount.
pub(super) const GENERATION: Generation = Generation(0);
/// Preferred size of I/O, and the unit of `statfs`.
pub(super) const BLOCK_BYTES: u32 = 4096;

pub(super) fn errno(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e.raw_os_error())
}

pub(super) fn caller(req: &Request) -> Caller {
    Caller { pid: req.pid() }
}

pub(super) fn time(ns: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(ns)
}

pub(super) fn ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) const fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Dir => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Image => FileType::RegularFile,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        atime: time(attr.attrs.atime_ns),
        mtime: time(attr.attrs.mtime_ns),
        ctime: time(attr.ctime_ns),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        perm: u16::try_from(attr.attrs.mode & 0o7777).expect("invariant: twelve bits"),
        nlink: attr.nlink,
        uid: attr.attrs.uid,
        gid: attr.attrs.gid,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub(super) fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if opened.direct {
        flags |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
    }
    if opened.keep_cache {
        flags |= FopenFlags::FOPEN_KEEP_CACHE;
    }
    flags
}

pub(super) fn made(req: &Request, mode: u32, umask: u32) -> Made {
    Made { mode: mode & !umask, uid: req.uid(), gid: req.gid() }
}

pub(super) fn entry(reply: ReplyEntry, result: Result<crate::fs::Entry, Errno>) {
    match result {
        Ok(e) => reply.entry_with_ttls(&e.attr.ttl, &e.ttl, &file_attr(&e.attr), GENERATION),
        Err(e) => reply.error(errno(e)),
    }
}

pub(super) fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

pub(super) fn sized(reply: ReplyXattr, size: u32, result: Result<Vec<u8>, Errno>) {
    let len = result.as_ref().map_or(0, |data| u32::try_from(data.len()).unwrap_or(u32::MAX));
    match result {
        Err(e) => reply.error(errno(e)),
        Ok(_) if size == 0 => reply.size(len),
        Ok(data) if len <= size => reply.data(&data),
        Ok(_) => reply.error(fuser::Errno::ERANGE),
    }
}

/// Extended attribute names are ASCII in every namespace that is stored.
pub(super) fn text(name: &OsStr) -> Result<&str, Errno> {
    name.to_str().ok_or(Errno::OPNOTSUPP)
}
