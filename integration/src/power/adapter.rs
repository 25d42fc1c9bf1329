//! fuser's callbacks: convert, call, reply.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::REQUEST_BYTES_MAX;
use super::state::{Attr, Shared, text};

/// The kernel remembers nothing: a cut would make it wrong.
const TTL: Duration = Duration::ZERO;
const GENERATION: Generation = Generation(0);
/// Past the page cache, which the cut could not clear.
const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

pub(super) struct Adapter {
    shared: Arc<Shared>,
}

impl Adapter {
    pub(super) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    let kind = if attr.is_dir { FileType::Directory } else { FileType::RegularFile };
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: u16::try_from(attr.mode & 0o7777).expect("invariant: twelve bits"),
        nlink: if attr.is_dir { 2 } else { 1 },
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn errno(e: &io::Error) -> fuser::Errno {
    fuser::Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))
}

fn empty(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(&e)),
    }
}

fn entry(reply: ReplyEntry, result: io::Result<Attr>) {
    match result {
        Ok(attr) => reply.entry(&TTL, &file_attr(&attr), GENERATION),
        Err(e) => reply.error(errno(&e)),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS] {
            // Without them it is slower.
            let _ = config.add_capabilities(flag);
        }
        // Within fuser's and the kernel's limits, which are the error.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.shared.enter().and_then(|s| s.lookup(parent.0, text(name)?));
        entry(reply, found);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.shared.enter().and_then(|s| s.attr(ino.0)) {
            Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.shared.enter_change().and_then(|mut s| {
            if let Some(mode) = mode {
                s.set_mode(ino.0, mode)?;
            }
            if let Some(size) = size {
                s.set_len(ino.0, size)?;
            }
            s.attr(ino.0)
        });
        match changed {
            Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn mkdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let made =
            self.shared.enter_change().and_then(|mut s| s.make(parent.0, text(name)?, true, mode & !umask));
        entry(reply, made);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.shared.enter_change().and_then(|mut s| s.unlink(parent.0, text(name)?, false));
        empty(reply, done);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.shared.enter_change().and_then(|mut s| s.unlink(parent.0, text(name)?, true));
        empty(reply, done);
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
        let done = self.shared.enter_change().and_then(|mut s| {
            let (from, to) = ((parent.0, text(name)?), (newparent.0, text(newname)?));
            if flags == RenameFlags::RENAME_NOREPLACE && s.lookup(to.0, to.1).is_ok() {
                return Err(rustix::io::Errno::EXIST.into());
            }
            s.rename(from, to, flags == RenameFlags::RENAME_EXCHANGE)
        });
        empty(reply, done);
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.shared.enter_change().and_then(|mut s| {
            let attr = s.make(parent.0, text(name)?, false, mode & !umask)?;
            Ok((attr, s.open(attr.ino)?))
        });
        match made {
            Ok((attr, fh)) => {
                reply.created(&TTL, &file_attr(&attr), GENERATION, FileHandle(fh), OPEN_FLAGS);
            }
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.shared.enter().and_then(|mut s| s.open(ino.0)) {
            Ok(fh) => reply.opened(FileHandle(fh), OPEN_FLAGS),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.shared.enter().and_then(|s| s.read(ino.0, offset, size)) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.shared.enter_change().and_then(|mut s| {
            s.write(ino.0, offset, data)?;
            if flags.0 & libc::O_DSYNC != 0 { s.sync(ino.0) } else { Ok(()) }
        });
        match written {
            Ok(()) => reply.written(u32::try_from(data.len()).expect("invariant: at most 1 MiB")),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
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
        self.shared.close(fh.0);
        reply.ok();
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.shared.enter_change().and_then(|mut s| s.sync(ino.0)));
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = match self.shared.enter().and_then(|s| s.list(ino.0)) {
            Ok(list) => list,
            Err(e) => return reply.error(errno(&e)),
        };
        // The place in a listing is a file's number: what comes or goes meanwhile shifts nothing.
        for (name, attr) in list.iter().filter(|(_, attr)| attr.ino > offset) {
            let kind = if attr.is_dir { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(attr.ino), attr.ino, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.shared.enter_change().and_then(|mut s| s.sync_dir(ino.0)));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.shared.enter().and_then(|s| s.space()) {
            Ok(v) => {
                let unit = u32::try_from(v.f_frsize).unwrap_or(4096);
                reply.statfs(v.f_blocks, v.f_bfree, v.f_bavail, v.f_files, v.f_ffree, unit, 255, unit);
            }
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        empty(reply, self.shared.enter_change().and_then(|mut s| s.allocate(ino.0, offset, length, mode)));
    }
}
