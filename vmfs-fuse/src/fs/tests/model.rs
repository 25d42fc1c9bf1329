//! Random operations on a few names, compared with a map from paths to contents. Every operation
//! that returned is durable (the catalog) or held by the engine, so a restart changes nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};

use proptest::prelude::*;

use crate::backend::{Backend, Errno};
use crate::catalog::{Catalog, Meta, ROOT_INO};
use crate::fs::{Caller, FileKind, Fs, Made, Options, RenameRule, SetAttr, XattrRule};
use crate::testbackend::MemBackend;
use vmfs_store::simdisk::SimDisk;

const NOBODY: Caller = Caller { pid: 0 };
const MADE: Made = Made { mode: 0o644, uid: 1, gid: 2 };

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Dir,
    Link(Vec<u8>),
    File(Vec<u8>),
}

#[derive(Debug, Clone)]
enum Op {
    Create(String),
    Mkdir(String),
    Symlink(String, u8),
    Unlink(String),
    Rmdir(String),
    Rename(String, String, u8),
    Write(String, u64, usize, u8),
    Resize(String, u64),
    Punch(String, u64, u64),
    ZeroRange(String, u64, u64),
    Copy(String, u64, String, u64, u64),
    Freeze(bool),
    Xattr(String, Option<u8>),
    /// Remove a file while it is open, write through the handle, close.
    Orphan(String),
    /// A power cut with this seed, or a mere restart.
    Restart(u64),
}

fn path() -> impl Strategy<Value = String> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    prop::collection::vec(name(), 1..4).prop_map(|parts| parts.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    let at = || 0u64..20_000;
    prop_oneof![
        4 => path().prop_map(Op::Create),
        4 => path().prop_map(Op::Mkdir),
        1 => (path(), any::<u8>()).prop_map(|(p, b)| Op::Symlink(p, b)),
        2 => path().prop_map(Op::Unlink),
        1 => path().prop_map(Op::Rmdir),
        6 => (path(), path(), 0u8..4).prop_map(|(a, b, r)| Op::Rename(a, b, r)),
        4 => (path(), at(), 1usize..9000, 1u8..).prop_map(|(p, o, l, b)| Op::Write(p, o, l, b)),
        1 => (path(), at()).prop_map(|(p, s)| Op::Resize(p, s)),
        1 => (path(), at(), 1u64..9000).prop_map(|(p, o, l)| Op::Punch(p, o, l)),
        1 => (path(), at(), 1u64..9000).prop_map(|(p, o, l)| Op::ZeroRange(p, o, l)),
        1 => (path(), at(), path(), at(), 1u64..9000).prop_map(|(a, o, b, p, l)| Op::Copy(a, o, b, p, l)),
        1 => any::<bool>().prop_map(Op::Freeze),
        1 => (path(), any::<Option<u8>>()).prop_map(|(p, v)| Op::Xattr(p, v)),
        1 => path().prop_map(Op::Orphan),
        1 => any::<u64>().prop_map(Op::Restart),
    ]
}

/// Calls something that replies later, and waits.
pub(super) fn wait<T: Send + 'static>(
    call: impl FnOnce(Box<dyn FnOnce(Result<T, Errno>) + Send>),
) -> Result<T, Errno> {
    let (tx, rx) = mpsc::channel();
    call(Box::new(move |result| tx.send(result).unwrap()));
    rx.recv().expect("every reply is given")
}

pub(super) fn read_all(fs: &Fs<MemBackend>, ino: u64) -> Vec<u8> {
    let fh = fs.open(ino, libc::O_RDONLY).unwrap().fh;
    let data = wait(|reply| {
        fs.read(fh, 0, 1 << 20, NOBODY, move |data| reply(data.map(<[u8]>::to_vec)));
    });
    fs.release(fh);
    data.unwrap()
}

pub(super) fn resolve(fs: &Fs<MemBackend>, path: &str) -> Result<u64, Errno> {
    let mut at = ROOT_INO;
    for part in path.split('/').filter(|p| !p.is_empty()) {
        let entry = fs.lookup(at, part.as_bytes())?;
        fs.forget(entry.attr.ino, 1);
        at = entry.attr.ino;
    }
    Ok(at)
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

struct World {
    backend: Arc<MemBackend>,
    disk: SimDisk,
    fs: Arc<Fs<MemBackend>>,
    model: BTreeMap<String, Node>,
    frozen: bool,
}

impl World {
    fn new() -> Self {
        let backend = Arc::new(MemBackend::default());
        let disk = SimDisk::new(1 << 30);
        let fs = start(&backend, &disk);
        Self { backend, disk, fs, model: BTreeMap::new(), frozen: false }
    }

    /// The errors of a path walk, in the model.
    fn parent(&self, path: &str) -> Result<(), Errno> {
        let mut at = String::new();
        let parts: Vec<&str> = path.split('/').collect();
        for part in &parts[..parts.len() - 1] {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            match self.model.get(&at) {
                Some(Node::Dir) => {}
                Some(_) => return Err(Errno::NOTDIR),
                None => return Err(Errno::NOENT),
            }
        }
        Ok(())
    }

    fn is_empty(&self, dir: &str) -> bool {
        !self.model.keys().any(|k| k.strip_prefix(dir).is_some_and(|r| r.starts_with('/')))
    }

    fn make(&mut self, path: &str, node: Node) -> Result<(), Errno> {
        self.parent(path)?;
        if self.model.contains_key(path) {
            return Err(Errno::EXIST);
        }
        self.model.insert(path.to_owned(), node);
        Ok(())
    }

    fn remove(&mut self, path: &str, dir: bool) -> Result<(), Errno> {
        self.parent(path)?;
        match (self.model.get(path), dir) {
            (None, _) => return Err(Errno::NOENT),
            (Some(Node::Dir), false) => return Err(Errno::ISDIR),
            (Some(Node::Dir), true) if !self.is_empty(path) => return Err(Errno::NOTEMPTY),
            (Some(Node::File(_) | Node::Link(_)), true) => return Err(Errno::NOTDIR),
            _ => {}
        }
        self.model.remove(path);
        Ok(())
    }

    fn take(&mut self, path: &str) -> Vec<(String, Node)> {
        let inside = |k: &str| k == path || k.strip_prefix(path).is_some_and(|r| r.starts_with('/'));
        let keys: Vec<String> = self.model.keys().filter(|k| inside(k)).cloned().collect();
        keys.into_iter().map(|k| (k[path.len()..].to_owned(), self.model.remove(&k).unwrap())).collect()
    }

    fn give(&mut self, path: &str, nodes: Vec<(String, Node)>) {
        self.model.extend(nodes.into_iter().map(|(rest, node)| (format!("{path}{rest}"), node)));
    }

    fn rename(&mut self, from: &str, to: &str, rule: RenameRule) -> Result<(), Errno> {
        self.parent(from)?;
        self.parent(to)?;
        let source = self.model.get(from).ok_or(Errno::NOENT)?.clone();
        let target = self.model.get(to).cloned();
        match (&target, rule) {
            (Some(_), RenameRule::Keep) => return Err(Errno::EXIST),
            (None, RenameRule::Exchange) => return Err(Errno::NOENT),
            _ if from == to => return Ok(()),
            _ => {}
        }
        let inside = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|r| r.starts_with('/'));
        if inside(to, from) || (rule == RenameRule::Exchange && inside(from, to)) {
            return Err(Errno::INVAL);
        }
        if rule == RenameRule::Exchange {
            let (a, b) = (self.take(from), self.take(to));
            self.give(to, a);
            self.give(from, b);
            return Ok(());
        }
        match (&source, &target) {
            (Node::Dir, Some(Node::File(_) | Node::Link(_))) => return Err(Errno::NOTDIR),
            (Node::File(_) | Node::Link(_), Some(Node::Dir)) => return Err(Errno::ISDIR),
            (_, Some(Node::Dir)) if !self.is_empty(to) => return Err(Errno::NOTEMPTY),
            _ => {}
        }
        self.model.remove(to);
        let nodes = self.take(from);
        self.give(to, nodes);
        Ok(())
    }

    fn file(&mut self, path: &str) -> Option<&mut Vec<u8>> {
        match self.model.get_mut(path) {
            Some(Node::File(data)) if !self.frozen => Some(data),
            _ => None,
        }
    }

    fn with_file<T: Send + 'static>(
        &self,
        path: &str,
        call: impl FnOnce(&Fs<MemBackend>, u64, Box<dyn FnOnce(Result<T, Errno>) + Send>),
    ) {
        let ino = resolve(&self.fs, path).unwrap();
        let fh = self.fs.open(ino, libc::O_RDWR).unwrap().fh;
        wait(|reply| call(&self.fs, fh, reply)).unwrap();
        self.fs.release(fh);
    }

    /// A name operation: the file system's answer and the model's.
    fn name_op(&mut self, op: &Op) -> (Result<(), Errno>, Result<(), Errno>) {
        let fs = self.fs.clone();
        // As the kernel walks: what is not a directory ends the walk.
        let at = |path: &str| {
            let ino = resolve(&fs, split(path).0)?;
            if fs.getattr(ino)?.kind == FileKind::Dir { Ok(ino) } else { Err(Errno::NOTDIR) }
        };
        match op {
            Op::Create(p) => {
                let real = at(p).and_then(|d| fs.create(d, split(p).1.as_bytes(), MADE));
                (real.map(|e| fs.forget(e.attr.ino, 1)), self.make(p, Node::File(vec![])))
            }
            Op::Mkdir(p) => {
                let real = at(p).and_then(|d| fs.mkdir(d, split(p).1.as_bytes(), MADE));
                (real.map(|e| fs.forget(e.attr.ino, 1)), self.make(p, Node::Dir))
            }
            Op::Symlink(p, b) => {
                let real = at(p).and_then(|d| fs.symlink(d, split(p).1.as_bytes(), &[*b], MADE));
                (real.map(|e| fs.forget(e.attr.ino, 1)), self.make(p, Node::Link(vec![*b])))
            }
            Op::Unlink(p) => (at(p).and_then(|d| fs.unlink(d, split(p).1.as_bytes())), self.remove(p, false)),
            Op::Rmdir(p) => (at(p).and_then(|d| fs.rmdir(d, split(p).1.as_bytes())), self.remove(p, true)),
            Op::Rename(a, b, rule) => {
                let rule = match rule {
                    0 => RenameRule::Keep,
                    1 => RenameRule::Exchange,
                    _ => RenameRule::Replace,
                };
                let real = at(a).and_then(|from| {
                    let to = at(b)?;
                    fs.rename((from, split(a).1.as_bytes()), (to, split(b).1.as_bytes()), rule)
                });
                (real, self.rename(a, b, rule))
            }
            other => unreachable!("{other:?}"),
        }
    }

    fn data_op(&mut self, op: &Op) {
        match op {
            Op::Write(p, offset, len, byte) => {
                let Some(data) = self.file(p) else { return };
                let from = usize::try_from(*offset).unwrap();
                data.resize(data.len().max(from + len), 0);
                data[from..from + len].fill(*byte);
                let bytes = vec![*byte; *len];
                self.with_file(p, |fs, fh, r| fs.write(fh, *offset, &bytes, len % 2 == 0, NOBODY, r));
            }
            Op::Resize(p, size) => {
                let Some(data) = self.file(p) else { return };
                data.resize(usize::try_from(*size).unwrap(), 0);
                let ino = resolve(&self.fs, p).unwrap();
                let change = SetAttr { size: Some(*size), ..SetAttr::default() };
                wait(|r| self.fs.setattr(ino, None, change, 0, NOBODY, r)).unwrap();
            }
            Op::Punch(p, offset, len) | Op::ZeroRange(p, offset, len) => {
                let punch = matches!(op, Op::Punch(..));
                let Some(data) = self.file(p) else { return };
                let (from, to) = (usize::try_from(*offset).unwrap(), usize::try_from(offset + len).unwrap());
                if !punch {
                    data.resize(data.len().max(to), 0);
                }
                let to = to.min(data.len());
                if from < to {
                    data[from..to].fill(0);
                }
                let keep = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
                let mode = if punch { keep } else { libc::FALLOC_FL_ZERO_RANGE };
                self.with_file(p, |fs, fh, r| fs.fallocate(fh, *offset, *len, mode, NOBODY, r));
            }
            Op::Copy(a, from, b, to, len) => {
                let Some(source) = self.file(a).map(|d| d.clone()) else { return };
                if a == b || self.file(b).is_none() {
                    return;
                }
                let range = usize::try_from(*from).unwrap()..usize::try_from(from + len).unwrap();
                let piece = source.get(range.start..range.end.min(source.len())).unwrap_or_default().to_vec();
                let target = self.file(b).unwrap();
                let to_at = usize::try_from(*to).unwrap();
                if !piece.is_empty() {
                    target.resize(target.len().max(to_at + piece.len()), 0);
                    target[to_at..to_at + piece.len()].copy_from_slice(&piece);
                }
                self.copy(a, *from, b, *to, *len);
            }
            Op::Xattr(p, value) => {
                if !self.model.contains_key(p) || self.frozen {
                    return;
                }
                let ino = resolve(&self.fs, p).unwrap();
                let value = value.map(|b| vec![b]);
                let had = self.fs.getxattr(ino, "user.x").is_ok();
                let rule = if value.is_some() { XattrRule::Any } else { XattrRule::Replace };
                let done = wait(|r| self.fs.setxattr(ino, "user.x", value.as_deref(), rule, NOBODY, r));
                assert_eq!(done, if had || value.is_some() { Ok(()) } else { Err(Errno::NODATA) });
                assert_eq!(self.fs.getxattr(ino, "user.x").ok(), value);
            }
            Op::Orphan(p) => {
                if self.file(p).is_none() {
                    return;
                }
                let fs = self.fs.clone();
                let ino = resolve(&fs, p).unwrap();
                let fh = fs.open(ino, libc::O_RDWR).unwrap().fh;
                let dir = resolve(&fs, split(p).0).unwrap();
                fs.unlink(dir, split(p).1.as_bytes()).unwrap();
                wait(|r| fs.write(fh, 5, b"orphan", false, NOBODY, r)).unwrap();
                assert_eq!(fs.getattr(ino).unwrap().nlink, 0);
                fs.release(fh);
                assert_eq!(fs.getattr(ino).err(), Some(Errno::NOENT));
                self.model.remove(p);
            }
            other => unreachable!("{other:?}"),
        }
    }

    fn copy(&self, a: &str, mut from: u64, b: &str, mut to: u64, mut len: u64) {
        let fs = &self.fs;
        let source = fs.open(resolve(fs, a).unwrap(), libc::O_RDONLY).unwrap().fh;
        let target = fs.open(resolve(fs, b).unwrap(), libc::O_WRONLY).unwrap().fh;
        while len > 0 {
            let n = wait(|r| fs.copy_range((source, from), (target, to), len, NOBODY, r)).unwrap();
            if n == 0 {
                break;
            }
            (from, to, len) = (from + n, to + n, len - n);
        }
        fs.release(source);
        fs.release(target);
    }

    fn freeze(&mut self, freeze: bool) {
        self.frozen = freeze;
        for claim in self.backend.list() {
            if freeze {
                self.backend.freeze(claim.id);
            } else {
                self.backend.thaw(claim.id);
            }
        }
    }

    fn restart(&mut self, seed: u64) {
        self.fs.close();
        if seed.is_multiple_of(2) {
            self.disk = self.disk.power_cut(seed);
        }
        self.fs = start(&self.backend, &self.disk);
    }

    /// Everything as the file system lists and reads it.
    fn listing(&self) -> BTreeMap<String, Node> {
        let mut found = BTreeMap::new();
        let mut todo = vec![(String::new(), ROOT_INO)];
        while let Some((dir, ino)) = todo.pop() {
            let fh = self.fs.opendir(ino).unwrap();
            let mut subdirs = 0;
            for entry in self.fs.list(ino, fh, true).unwrap().iter().skip(2) {
                let path = if dir.is_empty() { entry.name.clone() } else { format!("{dir}/{}", entry.name) };
                let node = match entry.kind {
                    FileKind::Dir => {
                        subdirs += 1;
                        todo.push((path.clone(), entry.ino));
                        Node::Dir
                    }
                    FileKind::Symlink => Node::Link(self.fs.readlink(entry.ino).unwrap()),
                    FileKind::Image => Node::File(read_all(&self.fs, entry.ino)),
                };
                found.insert(path, node);
            }
            self.fs.releasedir(fh);
            assert_eq!(self.fs.getattr(ino).unwrap().nlink, 2 + subdirs, "links of {dir:?}");
        }
        found
    }

    /// What the chains say in the end: exactly the files, under their names.
    fn claims(&self) -> Vec<String> {
        let mut claims: Vec<String> =
            self.backend.list().into_iter().filter(|c| !c.unlinked).map(|c| c.path).collect();
        claims.sort();
        claims
    }

    fn files(&self) -> Vec<String> {
        self.model.iter().filter(|(_, n)| matches!(n, Node::File(_))).map(|(p, _)| p.clone()).collect()
    }
}

pub(super) fn start(backend: &Arc<MemBackend>, disk: &SimDisk) -> Arc<Fs<MemBackend>> {
    let catalog = Catalog::open(Arc::new(disk.clone()), &Meta::default()).unwrap();
    Fs::start(backend.clone(), catalog, Options::default()).unwrap()
}

proptest! {
    #[test]
    fn the_file_system_agrees_with_a_map_from_paths_to_contents(
        ops in prop::collection::vec(op(), 1..80)
    ) {
        let mut world = World::new();
        for op in &ops {
            match op {
                Op::Freeze(freeze) => world.freeze(*freeze),
                Op::Restart(seed) => world.restart(*seed),
                Op::Create(_) | Op::Mkdir(_) | Op::Symlink(..) | Op::Unlink(_) | Op::Rmdir(_) | Op::Rename(..) => {
                    let (real, model) = world.name_op(op);
                    prop_assert_eq!(real, model, "{:?}", op);
                }
                _ => world.data_op(op),
            }
        }
        world.freeze(false);
        prop_assert_eq!(world.listing(), world.model.clone());
        // Two rounds: a replacement is buried after its replacer's flush.
        world.fs.do_chores();
        world.fs.do_chores();
        prop_assert_eq!(world.claims(), world.files());
        world.restart(2);
        prop_assert_eq!(world.listing(), world.model.clone());
        world.fs.close();
    }
}
