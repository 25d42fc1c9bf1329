//! What is done to an image's content: tried at once, parked when the engine cannot.

use std::cell::RefCell;

use vmfs_common::ids::ImageId;

use super::attrs::XattrRule;
use super::park::Parked;
use super::wait::Signals;
use super::{Caller, Fs};
use crate::backend::{Attempt, AttrChange, Backend, Errno, SizeRule, View};

/// Bytes moved by one `copy_file_range` request; the caller asks again for the rest.
const COPY_BYTES_MAX: u64 = 8 << 20;
const COPY_PIECE: u32 = 1 << 20;
/// Longest read that is tried without the disk first: a longer one is worth a serving thread.
const SOON_BYTES_MAX: u32 = 128 << 10;

/// An operation that owns everything it needs, so that it can wait.
#[derive(Debug)]
pub(crate) enum DataOp {
    Read {
        id: ImageId,
        view: View,
        offset: u64,
        len: u32,
    },
    Write {
        id: ImageId,
        view: View,
        offset: u64,
        data: Vec<u8>,
    },
    Zero {
        id: ImageId,
        view: View,
        offset: u64,
        len: u64,
        size: SizeRule,
    },
    Allocate {
        id: ImageId,
        view: View,
        offset: u64,
        len: u64,
        size: SizeRule,
    },
    /// Size and attributes of one `SETATTR`.
    Change {
        id: ImageId,
        view: Option<View>,
        size: Option<u64>,
        attrs: AttrChange,
    },
    Xattr {
        id: ImageId,
        name: String,
        value: Option<Vec<u8>>,
        rule: XattrRule,
    },
    Copy {
        from: (ImageId, View, u64),
        to: (ImageId, View, u64),
        len: u64,
    },
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Outcome {
    Data(Vec<u8>),
    Count(u64),
    Done,
}

impl DataOp {
    /// Memory that it holds while it waits.
    pub(crate) fn held_bytes(&self) -> usize {
        match self {
            Self::Write { data, .. } | Self::Xattr { value: Some(data), .. } => data.len(),
            _ => 0,
        }
    }
}

fn map<T, U>(attempt: Attempt<T>, with: impl FnOnce(T) -> U) -> Attempt<U> {
    match attempt {
        Attempt::Ready(result) => Attempt::Ready(result.map(with)),
        Attempt::Wait => Attempt::Wait,
    }
}

/// `EAGAIN` of a change of attributes means "not now".
fn waits(result: Result<(), Errno>) -> Attempt<Outcome> {
    match result {
        Err(Errno::AGAIN) => Attempt::Wait,
        other => Attempt::Ready(other.map(|()| Outcome::Done)),
    }
}

/// One try.
pub(crate) fn attempt<B: Backend>(backend: &B, op: &DataOp) -> Attempt<Outcome> {
    match op {
        DataOp::Read { id, view, offset, len } => {
            let mut buf = Vec::new();
            map(backend.read(*id, *view, *offset, *len, &mut buf), |()| Outcome::Data(buf))
        }
        DataOp::Write { id, view, offset, data } => {
            map(backend.write(*id, *view, *offset, data), |()| Outcome::Count(data.len() as u64))
        }
        DataOp::Zero { id, view, offset, len, size } => {
            map(backend.zero(*id, *view, *offset, *len, *size), |()| Outcome::Done)
        }
        DataOp::Allocate { id, view, offset, len, size } => {
            map(backend.allocate(*id, *view, *offset, *len, *size), |()| Outcome::Done)
        }
        DataOp::Change { id, view, size, attrs } => {
            // Tried again from the start when only the second half has to wait: both are idempotent.
            match size.map(|size| backend.resize(*id, *view, size)) {
                Some(Attempt::Ready(Ok(()))) | None if attrs.is_empty() => Attempt::ok(Outcome::Done),
                Some(Attempt::Ready(Ok(()))) | None => waits(backend.set_attrs(*id, attrs)),
                Some(other) => map(other, |()| Outcome::Done),
            }
        }
        DataOp::Xattr { id, name, value, rule } => {
            let exists = match backend.xattr_get(*id, name) {
                Ok(_) => true,
                Err(Errno::NODATA) => false,
                Err(errno) => return Attempt::err(errno),
            };
            // The kernel holds the inode's lock, so that nobody comes between the question and
            // the change through this mount.
            match rule.check(exists) {
                Ok(()) => waits(backend.xattr_set(*id, name, value.as_deref())),
                Err(errno) => Attempt::err(errno),
            }
        }
        DataOp::Copy { from, to, len } => map(copy(backend, *from, *to, *len), Outcome::Count),
    }
}

/// Copies up to [`COPY_BYTES_MAX`]. Stops early, with what it has, at a wait or an error.
fn copy<B: Backend>(
    backend: &B,
    from: (ImageId, View, u64),
    to: (ImageId, View, u64),
    len: u64,
) -> Attempt<u64> {
    if let Some(shared) = backend.share_range(from, to, len) {
        return shared;
    }
    let mut copied = 0;
    let mut buf = Vec::new();
    while copied < len.min(COPY_BYTES_MAX) {
        let step = copy_piece(backend, from, to, copied, len.min(COPY_BYTES_MAX) - copied, &mut buf);
        match step {
            Attempt::Ready(Ok(0)) => break,
            Attempt::Ready(Ok(n)) => copied += n,
            other if copied == 0 => return other,
            Attempt::Ready(Err(_)) | Attempt::Wait => break,
        }
    }
    Attempt::ok(copied)
}

/// Copies one piece of data, or one hole. 0: the source ends here.
fn copy_piece<B: Backend>(
    backend: &B,
    (from, from_view, from_start): (ImageId, View, u64),
    (to, to_view, to_start): (ImageId, View, u64),
    done: u64,
    left: u64,
    buf: &mut Vec<u8>,
) -> Attempt<u64> {
    let (source, target) = (from_start + done, to_start + done);
    let hole_end = match backend.seek_data(from, from_view, source) {
        Ok(data) => data,
        Err(Errno::NXIO) => match backend.stat(from, Some(from_view)) {
            Ok(stat) if stat.size_bytes <= source => return Attempt::ok(0),
            Ok(stat) => stat.size_bytes,
            Err(errno) => return Attempt::err(errno),
        },
        Err(errno) => return Attempt::err(errno),
    };
    if hole_end > source {
        let hole = left.min(hole_end - source);
        return map(backend.zero(to, to_view, target, hole, SizeRule::Extend), |()| hole);
    }
    let data = match backend.seek_hole(from, from_view, source) {
        Ok(end) => left.min(end.saturating_sub(source)),
        Err(errno) => return Attempt::err(errno),
    };
    let len = COPY_PIECE.min(u32::try_from(data).unwrap_or(COPY_PIECE));
    match backend.read(from, from_view, source, len, buf) {
        Attempt::Ready(Ok(())) if buf.is_empty() => Attempt::ok(0),
        Attempt::Ready(Ok(())) => map(backend.write(to, to_view, target, buf), |()| buf.len() as u64),
        other => map(other, |()| 0),
    }
}

fn reply_to_read(
    reply: impl FnOnce(Result<&[u8], Errno>) + Send + 'static,
) -> impl FnOnce(Result<Outcome, Errno>) + Send + 'static {
    move |outcome| {
        reply(match &outcome {
            Ok(Outcome::Data(data)) => Ok(data),
            Ok(_) => Err(Errno::IO),
            Err(errno) => Err(*errno),
        });
    }
}

thread_local! {
    static READ_BUF: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl<B: Backend> Fs<B> {
    /// Tries the operation and answers, or parks it.
    pub(crate) fn submit(
        &self,
        id: ImageId,
        caller: Caller,
        op: DataOp,
        reply: impl FnOnce(Result<Outcome, Errno>) + Send + 'static,
    ) {
        match attempt(self.backend.as_ref(), &op) {
            Attempt::Ready(result) => reply(result),
            Attempt::Wait => self.parker(id, caller)(op, reply),
        }
    }

    /// Something that parks an operation on the image, whoever calls it and when.
    fn parker<R>(&self, id: ImageId, caller: Caller) -> impl FnOnce(DataOp, R) + Send + use<B, R>
    where
        R: FnOnce(Result<Outcome, Errno>) + Send + 'static,
    {
        let (backend, park) = (self.backend.clone(), self.park.clone());
        let waits = super::wait::Desk::clone(&self.waits);
        let limit = Some(self.options.stall_timeout);
        move |op, reply| {
            let pending = waits.owe(caller, Signals::Deadly, limit, reply);
            park.park(backend.as_ref(), id, Parked { op, pending });
        }
    }

    /// Reads up to `len` bytes; fewer at the end of the image.
    pub fn read(
        &self,
        fh: u64,
        offset: u64,
        len: u32,
        caller: Caller,
        reply: impl FnOnce(Result<&[u8], Errno>) + Send + 'static,
    ) {
        let handle = match self.handle(fh) {
            Ok(handle) => handle,
            Err(errno) => return reply(Err(errno)),
        };
        let (id, view) = (handle.id, handle.view);
        // Taken out, so that a reply that reads again does not find it borrowed.
        let mut buf = READ_BUF.take();
        let turn = self.readers.turn();
        let read = match turn {
            None if len <= SOON_BYTES_MAX => self.backend.read_soon(id, view, offset, len, &mut buf),
            _ => Some(self.backend.read(id, view, offset, len, &mut buf)),
        };
        drop(turn);
        let op = DataOp::Read { id, view, offset, len };
        match read {
            Some(Attempt::Ready(Ok(()))) => reply(Ok(&buf)),
            Some(Attempt::Ready(Err(errno))) => reply(Err(errno)),
            Some(Attempt::Wait) => self.parker(id, caller)(op, reply_to_read(reply)),
            None => self.read_from_disk(id, caller, op, reply),
        }
        READ_BUF.set(buf);
    }

    /// Has a read done by a thread that may wait for the disk.
    fn read_from_disk(
        &self,
        id: ImageId,
        caller: Caller,
        op: DataOp,
        reply: impl FnOnce(Result<&[u8], Errno>) + Send + 'static,
    ) {
        let (backend, park) = (self.backend.clone(), self.parker(id, caller));
        self.readers.run(Box::new(move || match attempt(backend.as_ref(), &op) {
            Attempt::Ready(outcome) => reply_to_read(reply)(outcome),
            Attempt::Wait => park(op, reply_to_read(reply)),
        }));
    }

    /// Writes all of `data`. With `durable` (`O_SYNC`, `O_DSYNC`, `RWF_DSYNC`) it is write plus
    /// flush, and answers after both.
    pub fn write(
        &self,
        fh: u64,
        offset: u64,
        data: &[u8],
        durable: bool,
        caller: Caller,
        reply: impl FnOnce(Result<u32, Errno>) + Send + 'static,
    ) {
        let handle = match self.handle(fh) {
            Ok(handle) if handle.write => handle,
            Ok(_) => return reply(Err(Errno::BADF)),
            Err(errno) => return reply(Err(errno)),
        };
        let (id, view) = (handle.id, handle.view);
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let flusher = self.flusher(id, view, caller);
        let written = move |result: Result<(), Errno>| match result {
            Ok(()) if durable => flusher(Box::new(move |flushed| reply(flushed.map(|()| count)))),
            other => reply(other.map(|()| count)),
        };
        match self.backend.write(id, view, offset, data) {
            Attempt::Ready(result) => {
                let done = result.is_ok();
                written(result);
                if done {
                    self.backend.answered(id);
                }
            }
            Attempt::Wait => {
                let op = DataOp::Write { id, view, offset, data: data.to_vec() };
                self.parker(id, caller)(op, move |outcome: Result<_, _>| written(outcome.map(|_| ())));
            }
        }
    }
}
