//! fuser's callbacks: convert, call, reply.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::attach::REQUEST_BYTES_MAX;
use super::convert::{
    BLOCK_BYTES, GENERATION, caller, empty, entry, errno, file_attr, file_type, made, ns, open_flags, sized,
    text,
};
use crate::backend::{Backend, Errno};
use crate::fs::locks::{Lock, LockKind};
use crate::fs::{Fs, RenameRule, SetAttr, Stamp, XattrRule};

/// Asynchronous requests that the kernel may have outstanding.
const BACKGROUND_MAX: u16 = 64;

pub(super) struct Adapter<B> {
    fs: Arc<Fs<B>>,
}

impl<B: Backend> Adapter<B> {
    pub(super) const fn new(fs: Arc<Fs<B>>) -> Self {
        Self { fs }
    }
}

impl<B: Backend> Filesystem for Adapter<B> {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Not asked for: WRITEBACK_CACHE (a write is ours when write(2) returns), AUTO_INVAL_DATA
        // (we say what changed), FLOCK_LOCKS (fuser does not tell flock(2) locks from OFD locks
        // of the same file; the kernel keeps flock(2) locks for this mount), ATOMIC_O_TRUNC (an
        // open never waits).
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_POSIX_LOCKS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::info!(?flag, "this kernel does without");
            }
        }
        // The values are within fuser's and the kernel's limits, which are the errors.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        if let Err(most) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.fs.lookup(parent.0, name.as_bytes()));
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.fs.getattr(ino.0) {
            Ok(attr) => reply.attr(&attr.ttl, &file_attr(&attr)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let stamp = |t| match t {
            TimeOrNow::Now => Stamp::Now,
            TimeOrNow::SpecificTime(at) => Stamp::At(ns(at)),
        };
        let change = SetAttr { mode, uid, gid, size, atime: atime.map(stamp), mtime: mtime.map(stamp) };
        let fs = self.fs.clone();
        self.fs.setattr(ino.0, fh.map(|f| f.0), change, req.uid(), caller(req), move |result| {
            match result.and_then(|()| fs.getattr(ino.0)) {
                Ok(attr) => reply.attr(&attr.ttl, &file_attr(&attr)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.fs.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let regular = mode & libc::S_IFMT == libc::S_IFREG || mode & libc::S_IFMT == 0;
        let made = made(req, mode, umask);
        let result = if regular { self.fs.create(parent.0, name.as_bytes(), made) } else { Err(Errno::PERM) };
        entry(reply, result);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        entry(reply, self.fs.mkdir(parent.0, name.as_bytes(), made(req, mode, umask)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.fs.unlink(parent.0, name.as_bytes()));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.fs.rmdir(parent.0, name.as_bytes()));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = made(req, 0o777, 0);
        entry(reply, self.fs.symlink(parent.0, name.as_bytes(), target.as_os_str().as_bytes(), made));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let rule = if flags.is_empty() {
            Ok(RenameRule::Replace)
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            Ok(RenameRule::Keep)
        } else if flags == RenameFlags::RENAME_EXCHANGE {
            Ok(RenameRule::Exchange)
        } else {
            Err(Errno::INVAL)
        };
        let (from, to) = ((parent.0, name.as_bytes()), (newparent.0, newname.as_bytes()));
        empty(reply, rule.and_then(|rule| self.fs.rename(from, to, rule)));
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(fuser::Errno::EPERM);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.fs.open(ino.0, flags.0) {
            Ok(opened) => reply.opened(FileHandle(opened.fh), open_flags(&opened)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn read(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.fs.read(fh.0, offset, size, caller(req), move |result| match result {
            Ok(data) => reply.data(data),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID)
            && let Err(e) = self.fs.drop_privileges(fh.0)
        {
            return reply.error(errno(e));
        }
        // O_SYNC contains O_DSYNC's bit; RWF_DSYNC and RWF_SYNC arrive the same way.
        let durable = flags.0 & libc::O_DSYNC != 0;
        self.fs.write(fh.0, offset, data, durable, caller(req), move |result| match result {
            Ok(count) => reply.written(count),
            Err(e) => reply.error(errno(e)),
        });
    }

    /// Not a durability point: a `close(2)`. Only POSIX locks end here.
    fn flush(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        self.fs.closed_by(ino.0, owner.0);
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.fs.release(fh.0);
        reply.ok();
    }

    fn fsync(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.fs.fsync(fh.0, caller(req), move |result| empty(reply, result));
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.fs.opendir(ino.0) {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = match self.fs.list(ino.0, fh.0, offset == 0) {
            Ok(list) => list,
            Err(e) => return reply.error(errno(e)),
        };
        for (next, e) in (1..).zip(list.iter()).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(INodeNo(e.ino), next, file_type(e.kind), &e.name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let list = match self.fs.list(ino.0, fh.0, offset == 0) {
            Ok(list) => list,
            Err(e) => return reply.error(errno(e)),
        };
        for (next, e) in (1..).zip(list.iter()).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let dots = e.name == "." || e.name == "..";
            // The dots are not counted as looked up, everything else is.
            let found = if dots {
                self.fs.getattr(e.ino).map(|attr| (attr, Duration::ZERO))
            } else {
                self.fs.remember(e.ino).map(|entry| (entry.attr, entry.ttl))
            };
            // What has gone since the listing was made is left out.
            let Ok((attr, _)) = found else { continue };
            if reply.add(INodeNo(e.ino), next, &e.name, &attr.ttl, &file_attr(&attr), GENERATION) {
                if !dots {
                    self.fs.forget(e.ino, 1);
                }
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.fs.releasedir(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.fs.syncdir());
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let s = self.fs.statfs();
        let (block, free) = (u64::from(BLOCK_BYTES), s.free_bytes / u64::from(BLOCK_BYTES));
        // Every image needs at least one block of its own.
        reply.statfs(
            s.total_bytes / block,
            free,
            free,
            s.images_count + free,
            free,
            BLOCK_BYTES,
            255,
            BLOCK_BYTES,
        );
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let rule = match flags {
            0 => Ok(XattrRule::Any),
            libc::XATTR_CREATE => Ok(XattrRule::Create),
            libc::XATTR_REPLACE => Ok(XattrRule::Replace),
            _ => Err(Errno::INVAL),
        };
        match rule.and_then(|rule| Ok((rule, text(name)?))) {
            Ok((rule, name)) => {
                let caller = caller(req);
                self.fs.setxattr(ino.0, name, Some(value), rule, caller, move |r| empty(reply, r));
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        sized(reply, size, text(name).and_then(|name| self.fs.getxattr(ino.0, name)));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.fs.listxattr(ino.0);
        sized(
            reply,
            size,
            names.map(|n| n.iter().flat_map(|n| [n.as_bytes(), b"\0"]).flatten().copied().collect()),
        );
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match text(name) {
            Ok(name) => {
                let caller = caller(req);
                self.fs.setxattr(ino.0, name, None, XattrRule::Replace, caller, move |r| empty(reply, r));
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.fs.create_open(parent.0, name.as_bytes(), made(req, mode, umask), flags) {
            Ok((e, opened)) => {
                let (fh, flags) = (FileHandle(opened.fh), open_flags(&opened));
                reply.created(&e.attr.ttl, &file_attr(&e.attr), GENERATION, fh, flags);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn getlk(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let kind = if typ == libc::F_WRLCK { LockKind::Exclusive } else { LockKind::Shared };
        match self.fs.getlk(Lock { start, end, kind, owner: lock_owner.0, fh: fh.0, pid }) {
            Ok(Some(lock)) => {
                let typ = if lock.kind == LockKind::Exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                reply.locked(lock.start, lock.end, typ, lock.pid);
            }
            Ok(None) => reply.locked(0, 0, libc::F_UNLCK, 0),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn setlk(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let kind = match typ {
            libc::F_RDLCK => LockKind::Shared,
            libc::F_WRLCK => LockKind::Exclusive,
            libc::F_UNLCK => return empty(reply, self.fs.unlock(fh.0, lock_owner.0, start, end)),
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        let wish = Lock { start, end, kind, owner: lock_owner.0, fh: fh.0, pid };
        self.fs.setlk(wish, sleep, caller(req), move |result| empty(reply, result));
    }

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.fs.fallocate(fh.0, offset, length, mode, caller(req), move |result| empty(reply, result));
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.fs.lseek(fh.0, offset, whence).map(i64::try_from) {
            Ok(Ok(at)) => reply.offset(at),
            Ok(Err(_)) => reply.error(fuser::Errno::EOVERFLOW),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (from, to) = ((fh_in.0, offset_in), (fh_out.0, offset_out));
        self.fs.copy_range(from, to, len, caller(req), move |result| match result.map(u32::try_from) {
            Ok(Ok(count)) => reply.written(count),
            Ok(Err(_)) => reply.error(fuser::Errno::EOVERFLOW),
            Err(e) => reply.error(errno(e)),
        });
    }
}
