//! Byte-range locks of open files, and those who wait for them.

use std::collections::VecDeque;
use std::sync::Arc;

use super::locks::{Lock, LockKind, LockTable};
use super::wait::{Pending, Signals};
use super::{Caller, Fs};
use crate::backend::{Backend, Errno};

/// The locks of one image and the wishes that wait, oldest first.
#[derive(Default)]
pub(crate) struct FileLocks {
    table: LockTable,
    waiting: VecDeque<(Lock, Arc<Pending<()>>)>,
}

impl FileLocks {
    /// Grants what can be granted now.
    fn grant(&mut self) {
        let Self { table, waiting } = self;
        waiting.retain(|(wish, pending)| {
            if table.conflict(wish).is_some() {
                return pending.is_owed();
            }
            // Only who takes the reply may take the lock: the wait may just have been interrupted.
            if let Some(answer) = pending.take() {
                table.acquire(*wish);
                answer(Ok(()));
            }
            false
        });
    }
}

impl<B: Backend> Fs<B> {
    /// `F_GETLK`: the lock that is in the way, if any.
    ///
    /// # Errors
    /// `EBADF` for an unknown handle.
    pub fn getlk(&self, wish: Lock) -> Result<Option<Lock>, Errno> {
        let ino = self.handle(wish.fh)?.ino;
        Ok(self.locks.lock().get(&ino).and_then(|l| l.table.conflict(&wish)))
    }

    /// `F_SETLK`, and with `wait` `F_SETLKW`, which answers when the lock is free or a signal
    /// comes. Deadlocks are not looked for.
    pub fn setlk(
        &self,
        wish: Lock,
        wait: bool,
        caller: Caller,
        reply: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let handle = match self.handle(wish.fh) {
            Ok(handle) => handle,
            Err(errno) => return reply(Err(errno)),
        };
        let mut locks = self.locks.lock();
        let file = locks.entry(handle.ino).or_default();
        let result = if file.table.acquire(wish) {
            // An exclusive lock that became shared may let others in.
            file.grant();
            Ok(())
        } else if wait {
            let pending = self.waits.owe(caller, Signals::Any, None, reply);
            file.waiting.push_back((wish, pending));
            return;
        } else {
            Err(Errno::AGAIN)
        };
        drop(locks);
        if result.is_ok() && self.backend.stat(handle.id, None).is_ok_and(|s| !s.writable_here) {
            self.backend.lock_wanted(handle.id, wish.kind == LockKind::Exclusive);
        }
        reply(result);
    }

    /// `F_UNLCK`.
    ///
    /// # Errors
    /// `EBADF` for an unknown handle.
    pub fn unlock(&self, fh: u64, owner: u64, start: u64, end: u64) -> Result<(), Errno> {
        let ino = self.handle(fh)?.ino;
        self.change_locks(ino, |table| table.release(owner, start, end));
        Ok(())
    }

    /// A descriptor was closed by the holder `owner`: POSIX drops its locks on the file.
    pub fn closed_by(&self, ino: u64, owner: u64) {
        self.change_locks(ino, |table| table.drop_owner(owner));
    }

    pub(crate) fn change_locks(&self, ino: u64, change: impl FnOnce(&mut LockTable)) {
        let mut locks = self.locks.lock();
        if let Some(file) = locks.get_mut(&ino) {
            change(&mut file.table);
            file.grant();
            if file.table.is_empty() && file.waiting.is_empty() {
                locks.remove(&ino);
            }
        }
    }

    /// True when anybody here holds a lock on the image, for an engine that is asked for a
    /// hand-over.
    pub fn is_locked(&self, id: vmfs_common::ids::ImageId) -> bool {
        let ino = self.tree.read().ino_of(id);
        ino.is_some_and(|ino| self.locks.lock().get(&ino).is_some_and(|l| !l.table.is_empty()))
    }
}
