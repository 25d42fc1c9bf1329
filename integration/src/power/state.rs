//! The file system itself, and its power switch. No FUSE type here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use rustix::io::Errno;

use super::content::Content;
use super::names::{Ino, Names, ROOT};
use super::{Lost, Luck, backing_file};

/// Beyond this the cache is written back by itself, as a kernel does.
const CACHED_PAGES_MAX: usize = 65_536;
/// Longer than any test takes to kill what it froze. A process that waits for a call cannot be killed, and
/// whoever froze it may be gone.
const FROZEN_MAX: Duration = Duration::from_secs(60);

/// The power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Calls are served.
    Live,
    /// Calls wait.
    Frozen,
    /// Calls fail.
    Dead,
}

/// A file or directory.
#[derive(Debug)]
pub(super) enum Body {
    Dir,
    File(Content),
}

/// With its permissions (which a cut does not touch).
#[derive(Debug)]
pub(super) struct Node {
    pub(super) body: Body,
    pub(super) mode: u32,
}

/// What `stat` shows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attr {
    pub(super) ino: Ino,
    pub(super) is_dir: bool,
    pub(super) size: u64,
    pub(super) mode: u32,
}

/// Everything, under the one lock.
#[derive(Debug)]
pub(super) struct State {
    phase: Phase,
    freeze_after: Option<u64>,
    backing: PathBuf,
    names: Names,
    nodes: BTreeMap<Ino, Node>,
    next_ino: Ino,
    /// Open files by handle: an unlinked file lives until its last close.
    open: BTreeMap<u64, Ino>,
    next_handle: u64,
    cached_pages: usize,
}

/// The state, and those who wait for the power.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn import(point: &Path, backing: &Path) -> io::Result<Self> {
        let mode = point.metadata()?.permissions().mode() & 0o7777;
        let root = Node { body: Body::Dir, mode };
        let mut state = State {
            phase: Phase::Live,
            freeze_after: None,
            backing: backing.to_owned(),
            names: Names::default(),
            nodes: BTreeMap::from([(ROOT, root)]),
            next_ino: ROOT + 1,
            open: BTreeMap::new(),
            next_handle: 1,
            cached_pages: 0,
        };
        state.import(point, ROOT)?;
        Ok(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("invariant: nobody panics with the lock")
    }

    /// The state, once there is power.
    pub(super) fn enter(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, FROZEN_MAX, |s| s.phase == Phase::Frozen);
        let (mut state, waited) = waited.expect("invariant: nobody panics with the lock");
        if waited.timed_out() && state.phase == Phase::Frozen {
            state.phase = Phase::Dead;
            self.changed.notify_all();
        }
        if state.phase == Phase::Dead { Err(Errno::IO.into()) } else { Ok(state) }
    }

    /// The same for a call that changes something: it may be the one before which the power goes.
    pub(super) fn enter_change(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.enter()?;
        if state.freeze_after == Some(0) {
            state.freeze_after = None;
            state.phase = Phase::Frozen;
            self.changed.notify_all();
            drop(state);
            return self.enter_change();
        }
        if let Some(left) = &mut state.freeze_after {
            *left -= 1;
        }
        Ok(state)
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.lock().phase = phase;
        self.changed.notify_all();
    }

    pub(super) fn freeze_after(&self, calls: u64) {
        self.lock().freeze_after = Some(calls);
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.lock().phase == Phase::Frozen
    }

    /// Closes a file, with or without power. A handle of before a cut is not known any more.
    pub(super) fn close(&self, handle: u64) {
        self.lock().open.remove(&handle);
    }

    pub(super) fn cut(&self, luck: &mut Luck) -> io::Result<Lost> {
        let mut state = self.lock();
        if state.phase != Phase::Dead {
            return Err(io::Error::new(ErrorKind::InvalidInput, "calls may still be waiting"));
        }
        let lost = state.cut(luck)?;
        state.phase = Phase::Live;
        state.freeze_after = None;
        drop(state);
        self.changed.notify_all();
        Ok(lost)
    }
}

impl State {
    /// Moves the files of `dir` to the backing directory.
    fn import(&mut self, path: &Path, dir: Ino) -> io::Result<()> {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            let name = text(&entry.file_name())?.to_owned();
            let mode = entry.metadata()?.permissions().mode() & 0o7777;
            let ino = self.number();
            self.names.found(dir, &name, ino);
            if entry.file_type()?.is_dir() {
                self.nodes.insert(ino, Node { body: Body::Dir, mode });
                self.import(&entry.path(), ino)?;
                std::fs::remove_dir(entry.path())?;
            } else {
                std::fs::rename(entry.path(), self.backing.join(ino.to_string()))?;
                let content = Content::new(backing_file(&self.backing, ino)?)?;
                self.nodes.insert(ino, Node { body: Body::File(content), mode });
            }
        }
        Ok(())
    }

    const fn number(&mut self) -> Ino {
        self.next_ino += 1;
        self.next_ino - 1
    }

    fn node(&self, ino: Ino) -> io::Result<&Node> {
        self.nodes.get(&ino).ok_or_else(|| Errno::STALE.into())
    }

    /// Runs `change` on a file, and writes the cache back when it has become too large.
    fn with_file<T>(
        &mut self,
        ino: Ino,
        change: impl FnOnce(&mut Content) -> io::Result<T>,
    ) -> io::Result<T> {
        let node = self.nodes.get_mut(&ino).ok_or(Errno::STALE)?;
        let Body::File(content) = &mut node.body else { return Err(Errno::ISDIR.into()) };
        let before = content.cached_pages();
        let result = change(content);
        self.cached_pages = self.cached_pages + content.cached_pages() - before;
        if self.cached_pages > CACHED_PAGES_MAX {
            // The file at hand has as good a chance as any of being the largest.
            self.cached_pages -= content.cached_pages();
            content.sync()?;
        }
        result
    }

    pub(super) fn attr(&self, ino: Ino) -> io::Result<Attr> {
        let node = self.node(ino)?;
        let (is_dir, size) = match &node.body {
            Body::Dir => (true, 0),
            Body::File(content) => (false, content.len()),
        };
        Ok(Attr { ino, is_dir, size, mode: node.mode })
    }

    pub(super) fn lookup(&self, dir: Ino, name: &str) -> io::Result<Attr> {
        self.attr(self.names.lookup(dir, name).ok_or(Errno::NOENT)?)
    }

    /// The entries of a directory, by number.
    pub(super) fn list(&self, dir: Ino) -> io::Result<Vec<(String, Attr)>> {
        let mut names = self.names.list(dir);
        names.sort_by_key(|(_, ino)| *ino);
        names.into_iter().map(|(name, ino)| Ok((name, self.attr(ino)?))).collect()
    }

    /// Makes a file or directory.
    pub(super) fn make(&mut self, dir: Ino, name: &str, is_dir: bool, mode: u32) -> io::Result<Attr> {
        if self.names.lookup(dir, name).is_some() {
            return Err(Errno::EXIST.into());
        }
        let ino = self.number();
        let body =
            if is_dir { Body::Dir } else { Body::File(Content::new(backing_file(&self.backing, ino)?)?) };
        self.nodes.insert(ino, Node { body, mode: mode & 0o7777 });
        self.names.link(dir, name, ino);
        self.attr(ino)
    }

    pub(super) fn unlink(&mut self, dir: Ino, name: &str, is_dir: bool) -> io::Result<()> {
        let found = self.lookup(dir, name)?;
        match (found.is_dir, is_dir) {
            (true, false) => return Err(Errno::ISDIR.into()),
            (false, true) => return Err(Errno::NOTDIR.into()),
            (true, true) if !self.names.list(found.ino).is_empty() => return Err(Errno::NOTEMPTY.into()),
            _ => {}
        }
        self.names.unlink(dir, name);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: (Ino, &str), to: (Ino, &str), exchange: bool) -> io::Result<()> {
        let moved = self.lookup(from.0, from.1)?;
        let replaced = self.names.lookup(to.0, to.1);
        if exchange {
            replaced.ok_or(Errno::NOENT)?;
            self.names.exchange(from, to);
        } else {
            if let Some(ino) = replaced {
                match (moved.is_dir, self.attr(ino)?.is_dir) {
                    (false, true) => return Err(Errno::ISDIR.into()),
                    (true, false) => return Err(Errno::NOTDIR.into()),
                    (true, true) if !self.names.list(ino).is_empty() => return Err(Errno::NOTEMPTY.into()),
                    _ => {}
                }
            }
            self.names.rename(from, to);
        }
        Ok(())
    }

    pub(super) fn open(&mut self, ino: Ino) -> io::Result<u64> {
        let _ = self.node(ino)?;
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, ino);
        Ok(handle)
    }

    /// Space of the file system that holds the backing directory.
    pub(super) fn space(&self) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::statvfs(&self.backing)?)
    }

    pub(super) fn read(&self, ino: Ino, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        match &self.node(ino)?.body {
            Body::Dir => Err(Errno::ISDIR.into()),
            Body::File(content) => content.read(offset, size as usize),
        }
    }

    pub(super) fn write(&mut self, ino: Ino, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.with_file(ino, |f| f.write(offset, bytes))
    }

    pub(super) fn set_len(&mut self, ino: Ino, len: u64) -> io::Result<()> {
        self.with_file(ino, |f| f.set_len(len))
    }

    pub(super) fn set_mode(&mut self, ino: Ino, mode: u32) -> io::Result<()> {
        self.nodes.get_mut(&ino).ok_or(Errno::STALE)?.mode = mode & 0o7777;
        Ok(())
    }

    /// Space is not reserved: only lengths and holes are modelled.
    pub(super) fn allocate(&mut self, ino: Ino, offset: u64, len: u64, mode: i32) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(Errno::FBIG)?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let zero = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        if mode & !(libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0
        {
            return Err(Errno::OPNOTSUPP.into());
        }
        self.with_file(ino, |f| {
            if zero {
                f.zero(offset, end.min(f.len()))?;
            }
            if keep_size || f.len() >= end { Ok(()) } else { f.set_len(end) }
        })
    }

    pub(super) fn sync(&mut self, ino: Ino) -> io::Result<()> {
        self.with_file(ino, Content::sync)
    }

    pub(super) fn sync_dir(&mut self, dir: Ino) -> io::Result<()> {
        let _ = self.node(dir)?;
        self.names.sync(dir);
        self.sweep()
    }

    /// Forgets what has no name and is not open.
    fn sweep(&mut self) -> io::Result<()> {
        let mut keep: BTreeSet<Ino> = self.names.reachable();
        keep.extend(self.open.values().copied());
        let gone: Vec<Ino> = self.nodes.keys().copied().filter(|ino| !keep.contains(ino)).collect();
        for ino in gone {
            if let Some(Node { body: Body::File(content), .. }) = self.nodes.remove(&ino) {
                self.cached_pages -= content.cached_pages();
                std::fs::remove_file(self.backing.join(ino.to_string()))?;
            }
        }
        self.names.keep_dirs(&keep);
        Ok(())
    }

    fn cut(&mut self, luck: &mut Luck) -> io::Result<Lost> {
        let lost = Lost { pages: self.cached_pages, names: self.names.pending() };
        self.names.cut(luck);
        self.open.clear();
        for node in self.nodes.values_mut() {
            if let Body::File(content) = &mut node.body {
                content.cut(luck)?;
            }
        }
        self.cached_pages = 0;
        self.sweep()?;
        Ok(lost)
    }
}

/// A name as text: a store has no others.
pub(super) fn text(name: &std::ffi::OsStr) -> io::Result<&str> {
    name.to_str().ok_or_else(|| Errno::ILSEQ.into())
}
