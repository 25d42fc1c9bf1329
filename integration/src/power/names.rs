//! Names: what programs see, what is on the disk, and the changes in between.

use std::collections::{BTreeMap, BTreeSet};

use super::Luck;

/// Number of a file or directory; never reused.
pub(super) type Ino = u64;
/// The root directory, as FUSE counts.
pub(super) const ROOT: Ino = 1;

/// Entries of all directories, by directory.
type Entries = BTreeMap<Ino, BTreeMap<String, Ino>>;

/// One change of names that may not be on the disk yet.
#[derive(Debug, Clone)]
enum Change {
    Link { dir: Ino, name: String, ino: Ino },
    Unlink { dir: Ino, name: String },
    Rename { from: (Ino, String), to: (Ino, String) },
    Exchange { from: (Ino, String), to: (Ino, String) },
}

impl Change {
    fn dirs(&self) -> [Ino; 2] {
        match self {
            Self::Link { dir, .. } | Self::Unlink { dir, .. } => [*dir, *dir],
            Self::Rename { from, to } | Self::Exchange { from, to } => [from.0, to.0],
        }
    }

    fn touches(&self, dirs: &BTreeSet<Ino>) -> bool {
        self.dirs().iter().any(|d| dirs.contains(d))
    }

    fn apply(&self, entries: &mut Entries) {
        let mut put = |(dir, name): &(Ino, String), ino: Option<Ino>| {
            let dir = entries.entry(*dir).or_default();
            match ino {
                Some(ino) => dir.insert(name.clone(), ino),
                None => dir.remove(name),
            }
        };
        match self {
            Self::Link { dir, name, ino } => {
                put(&(*dir, name.clone()), Some(*ino));
            }
            Self::Unlink { dir, name } => {
                put(&(*dir, name.clone()), None);
            }
            Self::Rename { from, to } => {
                if let Some(ino) = put(from, None) {
                    put(to, Some(ino));
                }
            }
            Self::Exchange { from, to } => {
                let (a, b) = (put(from, None), put(to, None));
                put(from, b);
                put(to, a);
            }
        }
    }
}

/// All names. A directory's changes reach the disk in their order, and those of different directories
/// independently of each other: what POSIX leaves open, and more than any journal does.
#[derive(Debug, Default)]
pub(super) struct Names {
    now: Entries,
    durable: Entries,
    pending: Vec<Change>,
}

impl Names {
    /// Notes an entry that is on the disk already.
    pub(super) fn found(&mut self, dir: Ino, name: &str, ino: Ino) {
        for entries in [&mut self.now, &mut self.durable] {
            entries.entry(dir).or_default().insert(name.to_owned(), ino);
        }
    }

    pub(super) fn lookup(&self, dir: Ino, name: &str) -> Option<Ino> {
        self.now.get(&dir)?.get(name).copied()
    }

    /// The entries of one directory.
    pub(super) fn list(&self, dir: Ino) -> Vec<(String, Ino)> {
        self.now.get(&dir).into_iter().flatten().map(|(n, i)| (n.clone(), *i)).collect()
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    pub(super) fn link(&mut self, dir: Ino, name: &str, ino: Ino) {
        self.change(Change::Link { dir, name: name.to_owned(), ino });
    }

    pub(super) fn unlink(&mut self, dir: Ino, name: &str) {
        self.change(Change::Unlink { dir, name: name.to_owned() });
    }

    pub(super) fn rename(&mut self, from: (Ino, &str), to: (Ino, &str)) {
        let [from, to] = [from, to].map(|(d, n)| (d, n.to_owned()));
        self.change(Change::Rename { from, to });
    }

    pub(super) fn exchange(&mut self, from: (Ino, &str), to: (Ino, &str)) {
        let [from, to] = [from, to].map(|(d, n)| (d, n.to_owned()));
        self.change(Change::Exchange { from, to });
    }

    /// fsync of a directory: its changes are durable, and of others those that must come before.
    pub(super) fn sync(&mut self, dir: Ino) {
        let mut dirs = BTreeSet::from([dir]);
        let mut chosen = vec![false; self.pending.len()];
        for (change, chosen) in self.pending.iter().zip(&mut chosen).rev() {
            if change.touches(&dirs) {
                *chosen = true;
                dirs.extend(change.dirs());
            }
        }
        let mut chosen = chosen.into_iter();
        let durable = &mut self.durable;
        self.pending.retain(|change| {
            let take = chosen.next().expect("invariant: one for each");
            if take {
                change.apply(durable);
            }
            !take
        });
    }

    /// Changes that a power cut may lose.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The power goes: of every directory's unsynced changes some prefix stays.
    pub(super) fn cut(&mut self, luck: &mut Luck) {
        let mut stopped = BTreeSet::new();
        for change in std::mem::take(&mut self.pending) {
            if change.touches(&stopped) || !luck.survives() {
                stopped.extend(change.dirs());
            } else {
                change.apply(&mut self.durable);
            }
        }
        self.now = self.durable.clone();
    }

    /// Everything that has a name now, or may have one after a power cut.
    pub(super) fn reachable(&self) -> BTreeSet<Ino> {
        let mut found: BTreeSet<Ino> = [&self.now, &self.durable]
            .into_iter()
            .flat_map(|entries| entries.values().flat_map(|dir| dir.values().copied()))
            .collect();
        found.extend(self.pending.iter().filter_map(|c| match c {
            Change::Link { ino, .. } => Some(*ino),
            _ => None,
        }));
        found.insert(ROOT);
        found
    }

    /// Forgets directories that are gone.
    pub(super) fn keep_dirs(&mut self, keep: &BTreeSet<Ino>) {
        for entries in [&mut self.now, &mut self.durable] {
            entries.retain(|dir, _| keep.contains(dir));
        }
    }
}
