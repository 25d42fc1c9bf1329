//! Rename: replace, no-replace, exchange; of images, symlinks and whole directories.

use parking_lot::RwLockWriteGuard;
use vmfs_common::ids::ImageId;
use vmfs_common::op::PATH_MAX_BYTES;

use super::names::{checked, find, touch};
use super::tree::{Node, Tree};
use super::{Fs, now_ns};
use crate::backend::{Backend, Errno};
use crate::catalog::{Change, Kind, Row};

/// What to do about the target of a rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameRule {
    /// It is replaced.
    Replace,
    /// `RENAME_NOREPLACE`.
    Keep,
    /// `RENAME_EXCHANGE`.
    Exchange,
}

impl<B: Backend> Fs<B> {
    /// Renames; one transaction whatever is replaced, exchanged or moved along.
    ///
    /// # Errors
    /// `EROFS` when an image that another host owns would get another path; `EEXIST`,
    /// `ENOTEMPTY`, `EISDIR`, `ENOTDIR`, `EINVAL` (into itself), `ENAMETOOLONG`.
    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), rule: RenameRule) -> Result<(), Errno> {
        let name = checked(to.1)?;
        let mut tree = self.tree.write();
        tree.dir(from.0)?;
        tree.dir(to.0)?;
        let source = find(&tree, from.0, from.1)?;
        let target = tree.child(to.0, name);
        match (target, rule) {
            (Some(_), RenameRule::Keep) => return Err(Errno::EXIST),
            (None, RenameRule::Exchange) => return Err(Errno::NOENT),
            (Some(target), _) if target == source => return Ok(()),
            _ => {}
        }
        check_move(&tree, source, (to.0, name))?;
        let mut changes = tree.materialise(to.0);
        changes.extend(tree.materialise(from.0));
        let mut moved = tree.images_under(source);
        let mut removed = None;
        let put = |ino: u64, parent: u64, name: &str, changes: &mut Vec<Change>| {
            let Some(node) = tree.get(ino) else { return };
            let mut kind = node.row.kind.clone();
            if let Kind::Dir(meta) | Kind::Symlink { meta, .. } = &mut kind {
                meta.ctime_ns = now_ns();
            }
            changes.push(Change::Put(ino, Row { parent, name: name.to_owned(), kind }));
        };
        put(source, to.0, name, &mut changes);
        match target {
            Some(target) if rule == RenameRule::Exchange => {
                let old_name = std::str::from_utf8(from.1).map_err(|_| Errno::ILSEQ)?;
                check_move(&tree, target, (from.0, old_name))?;
                moved.extend(tree.images_under(target));
                put(target, from.0, old_name, &mut changes);
            }
            Some(target) => {
                check_replace(&tree, source, target)?;
                changes.insert(0, Change::Del(target));
                if let Some(id) = tree.get(target).and_then(Node::image) {
                    // The new name first, so that a failover between the two loses neither.
                    let after = tree.get(source).and_then(Node::image);
                    changes.push(Change::Bury { id, after });
                    removed = Some((id, after));
                }
            }
            None => {}
        }
        touch(&tree, from.0, &mut changes);
        if from.0 != to.0 {
            touch(&tree, to.0, &mut changes);
        }
        own_moved(&mut tree, &moved, &mut changes);
        self.commit_rename(tree, &changes, &moved, removed)
    }

    fn commit_rename(
        &self,
        tree: RwLockWriteGuard<'_, Tree>,
        changes: &[Change],
        moved: &[u64],
        removed: Option<(ImageId, Option<ImageId>)>,
    ) -> Result<(), Errno> {
        let ids: Vec<ImageId> = moved.iter().filter_map(|i| tree.get(*i).and_then(Node::image)).collect();
        self.commit(tree, changes)?;
        for id in ids {
            self.tell_name(id);
        }
        // Also while it is open: elsewhere its name is the replacer's from now on.
        if let Some((id, after)) = removed {
            self.bury(id, after);
        }
        Ok(())
    }
}

/// Whether this host may give the node that place.
fn check_move(tree: &Tree, ino: u64, (parent, name): (u64, &str)) -> Result<(), Errno> {
    let path = tree.path_in(parent, name)?;
    let old = tree.path(ino).ok_or(Errno::NOENT)?;
    let node = tree.get(ino).ok_or(Errno::NOENT)?;
    if node.is_dir() && tree.is_inside(parent, ino) {
        return Err(Errno::INVAL);
    }
    for image in tree.images_under(ino) {
        let node = tree.get(image).ok_or(Errno::NOENT)?;
        if !node.may_move() {
            return Err(Errno::ROFS);
        }
        let below = tree.path(image).ok_or(Errno::NOENT)?;
        if below.len() - old.len() + path.len() > PATH_MAX_BYTES {
            return Err(Errno::NAMETOOLONG);
        }
    }
    Ok(())
}

fn check_replace(tree: &Tree, source: u64, target: u64) -> Result<(), Errno> {
    let (source, node) = (tree.get(source).ok_or(Errno::NOENT)?, tree.get(target).ok_or(Errno::NOENT)?);
    match (source.is_dir(), node.is_dir()) {
        (true, false) => Err(Errno::NOTDIR),
        (false, true) => Err(Errno::ISDIR),
        (_, true) if !node.local || !tree.is_empty(target) => Err(Errno::NOTEMPTY),
        _ if !node.is_dir() && !node.may_move() => Err(Errno::ROFS),
        _ => Ok(()),
    }
}

/// Names that move along and are not rows yet (images promoted here, directories that claims
/// imply) become rows: their place is this host's decision from now on.
fn own_moved(tree: &mut Tree, moved: &[u64], changes: &mut Vec<Change>) {
    for ino in moved {
        let mut rows = Vec::new();
        let mut at = *ino;
        while let Some(node) = tree.get(at).filter(|n| !n.local) {
            rows.push(Change::Put(at, node.row.clone()));
            at = node.row.parent;
        }
        rows.reverse();
        for row in rows {
            let Change::Put(ino, _) = &row else { continue };
            if !changes.iter().any(|c| matches!(c, Change::Put(known, _) if known == ino)) {
                changes.push(row);
            }
        }
    }
}
