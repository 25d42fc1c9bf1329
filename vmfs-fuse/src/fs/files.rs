//! Open files.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmfs_common::ids::ImageId;
use vmfs_common::op::SIZE_MAX_BYTES;

use super::attrs::without_privileges;
use super::data::{DataOp, Outcome};
use super::wait::Signals;
use super::{Caller, Fs, Handle, Opened};
use crate::backend::{AttrChange, Backend, Done, Errno, SizeRule, View};
use crate::catalog::Kind;

/// What `fallocate` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fallocate {
    Allocate(SizeRule),
    Zero(SizeRule),
}

fn fallocate_kind(mode: i32) -> Result<Fallocate, Errno> {
    let size = if mode & libc::FALLOC_FL_KEEP_SIZE == 0 { SizeRule::Extend } else { SizeRule::Keep };
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Ok(Fallocate::Allocate(size)),
        libc::FALLOC_FL_ZERO_RANGE => Ok(Fallocate::Zero(size)),
        libc::FALLOC_FL_PUNCH_HOLE if size == SizeRule::Keep => Ok(Fallocate::Zero(size)),
        _ => Err(Errno::OPNOTSUPP),
    }
}

impl<B: Backend> Fs<B> {
    pub(crate) fn handle(&self, fh: u64) -> Result<Arc<Handle>, Errno> {
        self.handles.read().get(&fh).cloned().ok_or(Errno::BADF)
    }

    /// Opens an image; `flags` are those of `open(2)`.
    ///
    /// Who reads what: the page cache is used for images that this host writes, since then every
    /// change of content passes through this kernel. Others are read directly: their content
    /// changes underneath, and each handle may be pinned to another state.
    ///
    /// # Errors
    /// `EISDIR`, `ELOOP`, `ENOENT`, or what the engine says.
    pub fn open(&self, ino: u64, flags: i32) -> Result<Opened, Errno> {
        let write = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let id = {
            let mut tree = self.tree.write();
            let node = tree.get_mut(ino).ok_or(Errno::NOENT)?;
            let id = match node.row.kind {
                Kind::Image(id) => id,
                Kind::Dir(_) => return Err(Errno::ISDIR),
                Kind::Symlink { .. } => return Err(Errno::LOOP),
            };
            // Counted before it is open, so that an unlink in between leaves it alive.
            node.opens += 1;
            id
        };
        let opened = self.backend.open(id, write).and_then(|view| {
            let stat = self.backend.stat(id, Some(view)).inspect_err(|_| self.backend.close(id, view))?;
            Ok((view, stat))
        });
        let (view, stat) = match opened {
            Ok(opened) => opened,
            Err(errno) => {
                self.end_open(ino, None, || {});
                return Err(errno);
            }
        };
        if view.pin.is_some()
            && let Some(node) = self.tree.write().get_mut(ino)
        {
            node.pins.push(view);
        }
        let direct = flags & libc::O_DIRECT != 0 || !stat.writable_here;
        let mut keep_cache = false;
        if !direct {
            let mark = (stat.lineage, stat.content_version);
            keep_cache = self.cached.lock().insert(ino, mark) == Some(mark);
        }
        let fh = self.fresh_fh();
        let privileged = AtomicBool::new(stat.attrs.mode & 0o6000 != 0);
        self.handles.write().insert(fh, Arc::new(Handle { ino, id, view, write, privileged }));
        Ok(Opened { fh, direct, keep_cache })
    }

    /// The mode of an image got a privilege bit: its handles have to know.
    pub(crate) fn mark_privileged(&self, ino: u64) {
        for handle in self.handles.read().values().filter(|h| h.ino == ino) {
            handle.privileged.store(true, Ordering::Relaxed);
        }
    }

    /// An ordinary user is about to write: set-user-id and set-group-id go.
    ///
    /// # Errors
    /// When they could not be taken away; the write must not happen then.
    pub fn drop_privileges(&self, fh: u64) -> Result<(), Errno> {
        let handle = self.handle(fh)?;
        if !handle.privileged.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mode = self.backend.stat(handle.id, None)?.attrs.mode;
        let kept = without_privileges(mode);
        if kept != mode {
            self.backend.set_attrs(handle.id, &AttrChange { mode: Some(kept), ..AttrChange::default() })?;
        }
        handle.privileged.store(kept & 0o6000 != 0, Ordering::Relaxed);
        Ok(())
    }

    /// The last descriptor and mapping of the handle are gone.
    pub fn release(&self, fh: u64) {
        let Some(handle) = self.handles.write().remove(&fh) else { return };
        self.change_locks(handle.ino, |table| table.drop_handle(fh));
        // First from the inode, so that nobody asks for a pin that is gone.
        self.end_open(handle.ino, handle.view.pin.map(|_| handle.view), || {
            self.backend.close(handle.id, handle.view);
        });
    }

    /// Takes the handle off the inode and gives its view back with `close`.
    fn end_open(&self, ino: u64, pinned: Option<View>, close: impl FnOnce()) {
        {
            let mut tree = self.tree.write();
            let Some(node) = tree.get_mut(ino) else { return close() };
            node.opens -= 1;
            if let Some(at) = node.pins.iter().position(|v| Some(*v) == pinned) {
                node.pins.remove(at);
            }
            if node.opens == 0 && !node.linked {
                self.cached.lock().remove(&ino);
            }
            tree.drop_unused(ino);
        }
        close();
    }

    /// The durability point of an open file.
    pub fn fsync(&self, fh: u64, caller: Caller, reply: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        match self.handle(fh) {
            Ok(handle) => self.flusher(handle.id, handle.view, caller)(Box::new(reply)),
            Err(errno) => reply(Err(errno)),
        }
    }

    /// Something that flushes the image and answers, whoever calls it and when. The names are
    /// durable already: every namespace operation syncs before it answers.
    pub(crate) fn flusher(
        &self,
        id: ImageId,
        view: View,
        caller: Caller,
    ) -> impl FnOnce(Done<()>) + Send + use<B> {
        let (backend, waits) = (self.backend.clone(), super::wait::Desk::clone(&self.waits));
        let limit = Some(self.options.stall_timeout);
        move |reply| {
            let pending = waits.owe(caller, Signals::Deadly, limit, reply);
            backend.flush(id, Some(view), Box::new(move |result| pending.finish(result)));
        }
    }

    /// `fallocate(2)`: mode 0, keep-size, punch-hole, zero-range.
    pub fn fallocate(
        &self,
        fh: u64,
        offset: u64,
        len: u64,
        mode: i32,
        caller: Caller,
        reply: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let checked = fallocate_kind(mode).and_then(|kind| Ok((kind, self.handle(fh)?)));
        let (kind, handle) = match checked {
            Ok((kind, handle)) if handle.write => (kind, handle),
            Ok(_) => return reply(Err(Errno::BADF)),
            Err(errno) => return reply(Err(errno)),
        };
        if offset.checked_add(len).is_none_or(|end| end > SIZE_MAX_BYTES) {
            return reply(Err(Errno::FBIG));
        }
        let (id, view) = (handle.id, handle.view);
        let op = match kind {
            Fallocate::Allocate(size) => DataOp::Allocate { id, view, offset, len, size },
            Fallocate::Zero(size) => DataOp::Zero { id, view, offset, len, size },
        };
        self.submit(id, caller, op, move |outcome| reply(outcome.map(|_| ())));
    }

    /// `SEEK_DATA` and `SEEK_HOLE`.
    ///
    /// # Errors
    /// `ENXIO` beyond the end, `EINVAL` for another `whence`.
    pub fn lseek(&self, fh: u64, offset: i64, whence: i32) -> Result<u64, Errno> {
        let handle = self.handle(fh)?;
        let offset = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
        match whence {
            libc::SEEK_DATA => self.backend.seek_data(handle.id, handle.view, offset),
            libc::SEEK_HOLE => self.backend.seek_hole(handle.id, handle.view, offset),
            _ => Err(Errno::INVAL),
        }
    }

    /// `copy_file_range(2)`; may copy less than asked for.
    pub fn copy_range(
        &self,
        from: (u64, u64),
        to: (u64, u64),
        len: u64,
        caller: Caller,
        reply: impl FnOnce(Result<u64, Errno>) + Send + 'static,
    ) {
        let handles = self.handle(from.0).and_then(|source| Ok((source, self.handle(to.0)?)));
        let (source, target) = match handles {
            Ok((source, target)) if target.write => (source, target),
            Ok(_) => return reply(Err(Errno::BADF)),
            Err(errno) => return reply(Err(errno)),
        };
        let op = DataOp::Copy {
            from: (source.id, source.view, from.1),
            to: (target.id, target.view, to.1),
            len: len.min(u64::from(u32::MAX)),
        };
        self.submit(target.id, caller, op, move |outcome| {
            reply(outcome.map(|o| if let Outcome::Count(n) = o { n } else { 0 }));
        });
    }
}
