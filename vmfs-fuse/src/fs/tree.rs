//! The names in memory: the catalog's rows, and over them what other hosts' images claim.
//!
//! Every node has an inode number. A *local* node is a row of the catalog; a *foreign* one stands
//! for an image's claim, or is a directory that such a claim implies. Foreign nodes are made anew
//! whenever the claims change and never reach the disk, except that a foreign directory becomes
//! local when something is created in it.

use std::collections::{BTreeMap, HashMap};

use vmfs_common::ids::ImageId;
use vmfs_common::op::{NAME_MAX_BYTES, PATH_MAX_BYTES};

use crate::backend::{Errno, View};
use crate::catalog::{Change, Kind, Meta, ROOT_INO, Row, Rows};

/// Inode numbers with this bit belong to images and derive from their ids.
const IMAGE_BIT: u64 = 1 << 63;

/// One inode.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) row: Row,
    /// A row of the catalog.
    pub(crate) local: bool,
    /// Has a name. Nodes without one live on while the kernel or a handle knows them.
    pub(crate) linked: bool,
    /// This host owns the image (of images only).
    pub(crate) owner_here: bool,
    /// Directories directly inside.
    pub(crate) subdirs: u32,
    /// Times that the kernel looked it up and has not forgotten.
    pub(crate) lookups: u64,
    /// Open handles.
    pub(crate) opens: u32,
    /// Views of open handles that pin a state, oldest first.
    pub(crate) pins: Vec<View>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: HashMap<u64, Node>,
    children: BTreeMap<(u64, String), u64>,
    images: HashMap<ImageId, u64>,
    /// Images that were unlinked here; true once their chain was seen to say so.
    pub(crate) buried: BTreeMap<ImageId, bool>,
    /// Inode numbers of foreign directories by path, so that they keep them.
    foreign_dirs: HashMap<String, u64>,
    next_ino: u64,
    /// Counts what was applied, for those who have to look again.
    pub(crate) generation: u64,
}

/// True for what may be one path component.
pub(crate) fn name_fits(name: &str) -> bool {
    let special = name.is_empty() || name == "." || name == "..";
    !special && name.len() <= NAME_MAX_BYTES && !name.contains(['/', '\0'])
}

impl Node {
    pub(crate) const fn is_dir(&self) -> bool {
        matches!(self.row.kind, Kind::Dir(_))
    }
    pub(crate) const fn image(&self) -> Option<ImageId> {
        match self.row.kind {
            Kind::Image(id) => Some(id),
            _ => None,
        }
    }
    /// The attributes of a directory or symlink.
    pub(crate) const fn meta(&self) -> Option<&Meta> {
        match &self.row.kind {
            Kind::Dir(meta) | Kind::Symlink { meta, .. } => Some(meta),
            Kind::Image(_) => None,
        }
    }
    /// This host decides about its name.
    pub(crate) const fn may_move(&self) -> bool {
        self.local || self.owner_here
    }
}

impl Tree {
    pub(crate) fn new(rows: &Rows) -> Self {
        let mut tree = Self {
            nodes: HashMap::new(),
            children: BTreeMap::new(),
            images: HashMap::new(),
            buried: rows.buried.keys().map(|id| (*id, false)).collect(),
            foreign_dirs: HashMap::new(),
            next_ino: ROOT_INO + 1,
            generation: 0,
        };
        for (ino, row) in &rows.rows {
            if ino & IMAGE_BIT == 0 {
                tree.next_ino = tree.next_ino.max(ino + 1);
            }
            tree.put(*ino, row.clone(), true);
        }
        // A directory may have a lower number than the one it was moved into.
        for (ino, row) in &rows.rows {
            let inside = tree.children(*ino).filter(|(_, i)| tree.nodes.get(i).is_some_and(Node::is_dir));
            let count = u32::try_from(inside.count()).unwrap_or(u32::MAX);
            if matches!(row.kind, Kind::Dir(_))
                && let Some(node) = tree.nodes.get_mut(ino)
            {
                node.subdirs = count;
            }
        }
        tree
    }

    pub(crate) fn get(&self, ino: u64) -> Option<&Node> {
        self.nodes.get(&ino)
    }
    pub(crate) fn get_mut(&mut self, ino: u64) -> Option<&mut Node> {
        self.nodes.get_mut(&ino)
    }
    /// A directory that still has a name.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`.
    pub(crate) fn dir(&self, ino: u64) -> Result<&Node, Errno> {
        let node = self.nodes.get(&ino).filter(|n| n.linked).ok_or(Errno::NOENT)?;
        if node.is_dir() { Ok(node) } else { Err(Errno::NOTDIR) }
    }
    pub(crate) fn child(&self, parent: u64, name: &str) -> Option<u64> {
        // The key type owns its name; a lookup allocates, which is cheap beside a FUSE request.
        self.children.get(&(parent, name.to_owned())).copied()
    }
    pub(crate) fn children(&self, parent: u64) -> impl Iterator<Item = (&str, u64)> {
        self.children
            .range((parent, String::new())..)
            .take_while(move |((p, _), _)| *p == parent)
            .map(|((_, name), ino)| (name.as_str(), *ino))
    }
    pub(crate) fn is_empty(&self, dir: u64) -> bool {
        self.children(dir).next().is_none()
    }

    /// A fresh inode number for a directory or symlink.
    pub(crate) const fn fresh_ino(&mut self) -> u64 {
        self.next_ino += 1;
        self.next_ino - 1
    }

    /// The image's inode number: the same in every process and on every host, unless two images
    /// of one host share 63 bits of their random ids.
    pub(crate) fn image_ino(&mut self, id: ImageId) -> u64 {
        if let Some(ino) = self.images.get(&id) {
            return *ino;
        }
        let bytes = id.as_bytes().first_chunk().copied().unwrap_or_default();
        let mut ino = u64::from_le_bytes(bytes) | IMAGE_BIT;
        while self.nodes.contains_key(&ino) || ino == u64::MAX {
            ino = ino.wrapping_add(1) | IMAGE_BIT;
        }
        ino
    }
    pub(crate) fn ino_of(&self, id: ImageId) -> Option<u64> {
        self.images.get(&id).copied()
    }

    /// Path of a named node from the root, without a leading slash.
    pub(crate) fn path(&self, ino: u64) -> Option<String> {
        let mut parts = Vec::new();
        let mut at = ino;
        while at != ROOT_INO {
            let node = self.nodes.get(&at).filter(|n| n.linked)?;
            parts.push(node.row.name.as_str());
            at = node.row.parent;
        }
        parts.reverse();
        Some(parts.join("/"))
    }

    /// Path of `name` in `parent`.
    ///
    /// # Errors
    /// `ENOENT`, or `ENAMETOOLONG` beyond what a chain can hold.
    pub(crate) fn path_in(&self, parent: u64, name: &str) -> Result<String, Errno> {
        let dir = self.path(parent).ok_or(Errno::NOENT)?;
        let path = if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") };
        if path.len() > PATH_MAX_BYTES { Err(Errno::NAMETOOLONG) } else { Ok(path) }
    }

    /// True when `ino` is `ancestor` or below it.
    pub(crate) fn is_inside(&self, ino: u64, ancestor: u64) -> bool {
        let mut at = ino;
        while at != ancestor {
            match self.nodes.get(&at) {
                Some(node) if at != ROOT_INO => at = node.row.parent,
                _ => return false,
            }
        }
        true
    }

    /// The images below a node, or the node itself.
    pub(crate) fn images_under(&self, ino: u64) -> Vec<u64> {
        let (mut found, mut todo) = (Vec::new(), vec![ino]);
        while let Some(at) = todo.pop() {
            match self.nodes.get(&at) {
                Some(node) if node.is_dir() => todo.extend(self.children(at).map(|(_, i)| i)),
                Some(node) if node.image().is_some() => found.push(at),
                _ => {}
            }
        }
        found
    }

    /// The changes that make a directory and those above it local, outermost first.
    pub(crate) fn materialise(&self, dir: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut at = dir;
        while let Some(node) = self.nodes.get(&at).filter(|n| !n.local) {
            changes.push(Change::Put(at, node.row.clone()));
            at = node.row.parent;
        }
        changes.reverse();
        changes
    }

    /// Applies what the catalog has accepted. True when a foreign name had to give way.
    pub(crate) fn apply(&mut self, changes: &[Change]) -> bool {
        self.generation += 1;
        let (mut displaced, mut deleted) = (Vec::new(), Vec::new());
        for change in changes {
            match change {
                Change::Put(ino, row) => displaced.extend(self.put(*ino, row.clone(), true)),
                Change::Del(ino) => {
                    self.unlink(*ino);
                    deleted.push(*ino);
                }
                Change::Bury { id, .. } => {
                    self.buried.insert(*id, false);
                }
                Change::Exhume(id) => {
                    self.buried.remove(id);
                }
            }
        }
        displaced.retain(|ino| !deleted.contains(ino));
        let gave_way = displaced.iter().filter_map(|ino| self.nodes.get(ino)).any(|n| !n.linked);
        for ino in displaced.into_iter().chain(deleted) {
            self.drop_unused(ino);
        }
        gave_way
    }

    fn count_subdir(&mut self, parent: u64, add: bool) {
        if let Some(dir) = self.nodes.get_mut(&parent) {
            dir.subdirs = if add { dir.subdirs + 1 } else { dir.subdirs.saturating_sub(1) };
        }
    }

    /// Gives a node this row. Another node in its place loses its name and is returned: in an
    /// exchange it gets another one at once, else [`Tree::drop_unused`] is due.
    pub(crate) fn put(&mut self, ino: u64, row: Row, local: bool) -> Option<u64> {
        let mut displaced = None;
        if ino != ROOT_INO {
            self.take_name(ino);
            displaced = self.child(row.parent, &row.name);
            if let Some(other) = displaced {
                self.unlink(other);
            }
            self.children.insert((row.parent, row.name.clone()), ino);
            if matches!(row.kind, Kind::Dir(_)) {
                self.count_subdir(row.parent, true);
            }
        }
        if let Kind::Image(id) = row.kind {
            self.images.insert(id, ino);
        }
        let node = self.nodes.entry(ino).or_insert_with(|| Node {
            row: row.clone(),
            local,
            linked: true,
            owner_here: local,
            subdirs: 0,
            lookups: 0,
            opens: 0,
            pins: Vec::new(),
        });
        node.row = row;
        node.linked = true;
        node.local = local;
        if local {
            node.owner_here = true;
            self.foreign_dirs.retain(|_, i| *i != ino);
        }
        displaced
    }

    /// Removes the node from its directory's index.
    fn take_name(&mut self, ino: u64) {
        let Some(node) = self.nodes.get(&ino).filter(|n| n.linked) else { return };
        let (key, is_dir) = ((node.row.parent, node.row.name.clone()), node.is_dir());
        if self.children.get(&key) == Some(&ino) {
            self.children.remove(&key);
            if is_dir {
                self.count_subdir(key.0, false);
            }
        }
    }

    /// The node has no name any more.
    pub(crate) fn unlink(&mut self, ino: u64) {
        self.take_name(ino);
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.linked = false;
            node.local = false;
        }
    }

    /// Drops a node that has no name and that nobody knows.
    pub(crate) fn drop_unused(&mut self, ino: u64) {
        let unused = |n: &Node| !n.linked && n.lookups == 0 && n.opens == 0;
        if self.nodes.get(&ino).is_some_and(unused)
            && let Some(Node { row: Row { kind: Kind::Image(id), .. }, .. }) = self.nodes.remove(&ino)
        {
            self.images.remove(&id);
        }
    }

    /// Takes all foreign names away, to lay them out anew. Returns what they were.
    pub(crate) fn clear_foreign(&mut self) -> BTreeMap<(u64, String), u64> {
        let foreign = |ino: &u64| self.nodes.get(ino).is_some_and(|n| !n.local);
        let old: BTreeMap<_, _> =
            self.children.iter().filter(|(_, ino)| foreign(ino)).map(|(k, i)| (k.clone(), *i)).collect();
        for ino in old.values() {
            self.take_name(*ino);
            if let Some(node) = self.nodes.get_mut(ino) {
                node.linked = false;
            }
        }
        old
    }

    /// What changed since [`Tree::clear_foreign`] returned `old`: names that lead elsewhere.
    pub(crate) fn changed_names(&self, old: &BTreeMap<(u64, String), u64>) -> Vec<(u64, String)> {
        let gone = old.iter().filter(|(key, ino)| self.children.get(key) != Some(ino));
        gone.map(|(key, _)| key.clone()).collect()
    }

    /// Drops what [`Tree::clear_foreign`] left without a name.
    pub(crate) fn sweep(&mut self, old: &BTreeMap<(u64, String), u64>) {
        for ino in old.values() {
            self.drop_unused(*ino);
        }
        let nodes = &self.nodes;
        self.foreign_dirs.retain(|_, ino| nodes.get(ino).is_some_and(|n| n.linked && !n.local));
    }

    /// Lays a claim out: makes the directories it implies and finds a free name for the image.
    pub(crate) fn place_claim(&mut self, id: ImageId, path: &str, owner_here: bool, meta: &Meta) {
        let sound = path.len() <= PATH_MAX_BYTES && path.split('/').all(name_fits);
        let (dirs, leaf) = match path.rsplit_once('/') {
            _ if !sound => ("", "image"),
            Some((dirs, leaf)) => (dirs, leaf),
            None => ("", path),
        };
        let mut blocked = !sound;
        let (mut parent, mut walked) = (ROOT_INO, String::new());
        for part in dirs.split('/').filter(|p| !p.is_empty()) {
            if !walked.is_empty() {
                walked.push('/');
            }
            walked.push_str(part);
            match self.child(parent, part) {
                Some(ino) if self.nodes.get(&ino).is_some_and(Node::is_dir) => parent = ino,
                Some(_) => {
                    blocked = true;
                    break;
                }
                None => {
                    let known = self.foreign_dirs.get(&walked).copied();
                    let ino = known.unwrap_or_else(|| self.fresh_ino());
                    self.foreign_dirs.insert(walked.clone(), ino);
                    let kind = Kind::Dir(meta.clone());
                    self.put(ino, Row { parent, name: part.to_owned(), kind }, false);
                    parent = ino;
                }
            }
        }
        let digits = id.to_string();
        let mut name = leaf.to_owned();
        // The whole id makes any name unique.
        for len in [8, 16, 32] {
            if !blocked && self.child(parent, &name).is_none() {
                break;
            }
            blocked = false;
            let mut keep = leaf.len().min(NAME_MAX_BYTES - 1 - len);
            while !leaf.is_char_boundary(keep) {
                keep -= 1;
            }
            name = format!("{}~{}", &leaf[..keep], &digits[..len]);
        }
        if self.child(parent, &name).is_some() {
            tracing::warn!(%id, path, "an image's name is taken, and so are all its other names");
            return;
        }
        let ino = self.image_ino(id);
        self.put(ino, Row { parent, name, kind: Kind::Image(id) }, false);
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.owner_here = owner_here;
        }
    }
}
