//! What other hosts' images are called, and what chains have to be told of names given here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use vmfs_common::ids::ImageId;

use super::Fs;
use super::tree::{Node, Tree};
use crate::backend::{Backend, Claim, Errno};
use crate::catalog::{Change, Kind, Rows};

/// How often the engine is asked whether claims, ownership or contents changed.
const LOOK: std::time::Duration = std::time::Duration::from_millis(20);

/// How long to leave a chain that could not be told something.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How far the unlinking of an image's chain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Burial {
    /// The image that took the name has to have it committed first.
    After(ImageId),
    /// That is being waited for.
    Flushing,
    /// Nothing keeps it.
    Due,
}

/// Chain-side work that could not be done at once.
#[derive(Debug, Default)]
pub(crate) struct Chores {
    burials: Mutex<BTreeMap<ImageId, Burial>>,
    names: Mutex<BTreeSet<ImageId>>,
    /// Something can be done before the next retry.
    due: AtomicBool,
}

impl<B: Backend> Fs<B> {
    /// What an earlier process may not have told the chains.
    pub(crate) fn redo(&self, rows: &Rows) {
        let claims: BTreeMap<ImageId, Claim> = self.backend.list().into_iter().map(|c| (c.id, c)).collect();
        let tree = self.tree.read();
        for (ino, row) in &rows.rows {
            let Kind::Image(id) = row.kind else { continue };
            let told =
                claims.get(&id).is_none_or(|c| !c.owner_here || tree.path(*ino).as_deref() == Some(&c.path));
            if !told {
                self.chores.names.lock().insert(id);
            }
        }
        drop(tree);
        let mut forgotten = Vec::new();
        for (id, after) in &rows.buried {
            match claims.get(id) {
                Some(claim) if claim.owner_here && !claim.unlinked => {
                    let burial = after.map_or(Burial::Due, Burial::After);
                    self.chores.burials.lock().insert(*id, burial);
                }
                _ => forgotten.push(Change::Exhume(*id)),
            }
        }
        if !forgotten.is_empty() {
            self.commit_quietly(&mut self.tree.write(), &forgotten);
        }
    }

    /// A transaction that only drops what is known otherwise; lost, it is made again.
    fn commit_quietly(&self, tree: &mut Tree, changes: &[Change]) {
        match self.catalog.append(changes) {
            Ok(_) => {
                tree.apply(changes);
            }
            Err(error) => tracing::warn!(%error, "the catalog could not be tidied"),
        }
    }

    /// The chain learns the image's present name, now or when its engine can.
    pub(crate) fn tell_name(&self, id: ImageId) {
        let _in_order = self.telling.lock();
        let path = {
            let tree = self.tree.read();
            tree.ino_of(id).and_then(|ino| tree.path(ino))
        };
        let result = path.map_or(Ok(()), |path| self.backend.rename_claim(id, &path));
        match result {
            // Another host owns it by now: its name is that host's decision.
            Ok(()) | Err(Errno::ROFS | Errno::NOENT) => {
                self.chores.names.lock().remove(&id);
            }
            Err(error) => {
                tracing::debug!(image = %id, %error, "the chain could not be told the name yet");
                self.chores.names.lock().insert(id);
            }
        }
    }

    /// The chain learns that the image is unlinked; after a replacement only when the
    /// replacer's name is committed.
    pub(crate) fn bury(&self, id: ImageId, after: Option<ImageId>) {
        let burial = after.map_or(Burial::Due, Burial::After);
        self.chores.burials.lock().insert(id, burial);
        self.dig(id, burial);
    }

    fn dig(&self, id: ImageId, burial: Burial) {
        match burial {
            Burial::Flushing => {}
            Burial::After(after) => {
                self.chores.burials.lock().insert(id, Burial::Flushing);
                let chores = Arc::downgrade(&self.chores);
                let flushed = move |result: Result<(), Errno>| {
                    let Some(chores) = Weak::upgrade(&chores) else { return };
                    // A replacer that is gone itself protects nothing.
                    let due = matches!(result, Ok(()) | Err(Errno::NOENT));
                    let next = if due { Burial::Due } else { Burial::After(after) };
                    chores.burials.lock().insert(id, next);
                    chores.due.store(due, Ordering::Relaxed);
                };
                self.backend.flush(after, None, Box::new(flushed));
            }
            Burial::Due => match self.backend.unlink(id) {
                Ok(()) | Err(Errno::ROFS | Errno::NOENT) => {
                    self.chores.burials.lock().remove(&id);
                }
                Err(error) => {
                    tracing::debug!(image = %id, %error, "the chain could not be told of the unlink yet")
                }
            },
        }
    }

    /// Does what is left to do.
    pub(crate) fn do_chores(&self) {
        let burials: Vec<_> = self.chores.burials.lock().iter().map(|(id, b)| (*id, *b)).collect();
        for (id, burial) in burials {
            self.dig(id, burial);
        }
        let names: Vec<_> = self.chores.names.lock().iter().copied().collect();
        for id in names {
            self.tell_name(id);
        }
    }

    /// Lays the claims of this moment out over the catalog, and corrects the kernel.
    pub fn sync_claims(&self) {
        let mut laid = self.laid.lock();
        let mut claims = self.backend.list();
        // A locally owned image wins a name, else the lowest id.
        claims.sort_by_key(|c| (!c.owner_here, c.id));
        let generation = self.tree.read().generation;
        if laid.generation != Some(generation) || laid.claims != claims {
            let (generation, stale) = self.lay_out(&claims);
            *laid = Laid { claims, generation: Some(generation) };
            if let Some(kernel) = self.kernel.get() {
                stale.iter().for_each(|(parent, name)| kernel.forget_name(*parent, name));
            }
        }
        drop(laid);
        self.drop_stale_content();
    }

    /// Places every claim anew. Returns the tree's generation, and names that lead elsewhere now.
    fn lay_out(&self, claims: &[Claim]) -> (u64, Vec<(u64, String)>) {
        let mut tree = self.tree.write();
        let (changes, mut stale) = settle(&mut tree, claims);
        if !changes.is_empty() {
            self.commit_quietly(&mut tree, &changes);
        }
        let meta = self.implied_meta();
        let old = tree.clear_foreign();
        for claim in claims.iter().filter(|c| !c.unlinked) {
            let local = tree.ino_of(claim.id).is_some_and(|ino| tree.get(ino).is_some_and(|n| n.local));
            if !local && !tree.buried.contains_key(&claim.id) {
                tree.place_claim(claim.id, &claim.path, claim.owner_here, &meta);
            }
        }
        stale.extend(tree.changed_names(&old));
        tree.sweep(&old);
        (tree.generation, stale)
    }

    /// Tells the kernel of content that changed other than through it.
    fn drop_stale_content(&self) {
        let Some(kernel) = self.kernel.get() else { return };
        let marks: Vec<_> = self.cached.lock().iter().map(|(ino, mark)| (*ino, *mark)).collect();
        for (ino, mark) in marks {
            let id = self.tree.read().get(ino).and_then(Node::image);
            let stat = id.and_then(|id| self.backend.stat(id, None).ok());
            let now = stat.map(|s| (s.lineage, s.content_version));
            if now == Some(mark) {
                continue;
            }
            // Remembered before the kernel forgets: what it reads in between is newer.
            match now {
                Some(now) => self.cached.lock().insert(ino, now),
                None => self.cached.lock().remove(&ino),
            };
            kernel.forget_content(ino);
        }
    }
}

/// What was last laid out.
#[derive(Debug, Default)]
pub(crate) struct Laid {
    claims: Vec<Claim>,
    /// The tree's, afterwards.
    generation: Option<u64>,
}

/// Rows that are not this host's any more, and burials that are over. Also the names that this
/// takes away.
fn settle(tree: &mut Tree, claims: &[Claim]) -> (Vec<Change>, Vec<(u64, String)>) {
    let (mut changes, mut stale) = (Vec::new(), Vec::new());
    for claim in claims {
        if let Some(ino) = tree.ino_of(claim.id)
            && let Some(node) = tree.get(ino).filter(|n| n.local)
            && (!claim.owner_here || claim.unlinked)
        {
            changes.push(Change::Del(ino));
            stale.push((node.row.parent, node.row.name.clone()));
        }
        let Some(seen) = tree.buried.get_mut(&claim.id) else { continue };
        if !claim.owner_here || (*seen && !claim.unlinked) {
            // It belongs to another host, or somebody undeleted it.
            changes.push(Change::Exhume(claim.id));
        }
        *seen |= claim.unlinked;
    }
    // Past the undelete window the engine does not know the image any more.
    let known: BTreeSet<ImageId> = claims.iter().map(|c| c.id).collect();
    let purged = tree.buried.iter().filter(|(id, seen)| **seen && !known.contains(id));
    changes.extend(purged.map(|(id, _)| Change::Exhume(*id)));
    (changes, stale)
}

/// The chores thread: claims as they change, and what could not be done at once.
pub(crate) fn run_chores<B: Backend>(fs: &Weak<Fs<B>>, closed: &(Mutex<bool>, Condvar)) {
    let mut laid = None;
    let mut last_retry = Instant::now();
    loop {
        {
            let mut stop = closed.0.lock();
            if !*stop {
                closed.1.wait_for(&mut stop, LOOK);
            }
            if *stop {
                return;
            }
        }
        let Some(fs) = fs.upgrade() else { return };
        let version = fs.backend.claims_version();
        let now = Some((version, fs.tree.read().generation));
        if laid != now {
            laid = now;
            fs.sync_claims();
            if let Some(kernel) = fs.kernel.get() {
                kernel.settle();
            }
            fs.backend.corrected(version);
        }
        let due = fs.chores.due.swap(false, Ordering::Relaxed);
        if due || last_retry.elapsed() >= RETRY_AFTER {
            last_retry = Instant::now();
            fs.do_chores();
        }
    }
}
