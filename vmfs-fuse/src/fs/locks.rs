//! POSIX and OFD byte-range locks, as one pure table per image. No waiting in here.
//!
//! FUSE names the holder by a lock owner: the process (its file table) for POSIX locks, the open
//! file description for OFD locks; both kinds conflict with each other, as in the kernel. Every
//! lock also remembers the handle through which it was taken, because closing an OFD sends no
//! unlock: its locks go when the handle is released.

/// Shared or exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// `F_RDLCK`.
    Shared,
    /// `F_WRLCK`.
    Exclusive,
}

/// One lock, or a wish for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// First byte.
    pub start: u64,
    /// Last byte (inclusive; `i64::MAX` for "to the end").
    pub end: u64,
    /// How.
    pub kind: LockKind,
    /// Who, as the kernel names it.
    pub owner: u64,
    /// Through which handle.
    pub fh: u64,
    /// The process, for `F_GETLK`.
    pub pid: u32,
}

/// The locks of one image, in no particular order, never overlapping for one owner.
#[derive(Debug, Default)]
pub struct LockTable {
    held: Vec<Lock>,
}

impl LockTable {
    /// The first lock that keeps `wish` from being granted.
    #[must_use]
    pub fn conflict(&self, wish: &Lock) -> Option<Lock> {
        let overlaps = |l: &&Lock| l.start <= wish.end && wish.start <= l.end;
        let excludes = |l: &&Lock| l.kind == LockKind::Exclusive || wish.kind == LockKind::Exclusive;
        let conflicts = self.held.iter().filter(|l| l.owner != wish.owner).filter(overlaps).filter(excludes);
        conflicts.min_by_key(|l| l.start).copied()
    }

    /// Takes the lock, replacing what the same owner held there. False: something conflicts.
    pub fn acquire(&mut self, wish: Lock) -> bool {
        if self.conflict(&wish).is_some() {
            return false;
        }
        self.release(wish.owner, wish.start, wish.end);
        self.held.push(wish);
        true
    }

    /// Gives back what `owner` holds of `start..=end`.
    pub fn release(&mut self, owner: u64, start: u64, end: u64) {
        let mut rest = Vec::new();
        self.held.retain(|lock| {
            if lock.owner != owner || lock.end < start || end < lock.start {
                return true;
            }
            if lock.start < start {
                rest.push(Lock { end: start - 1, ..*lock });
            }
            if lock.end > end {
                rest.push(Lock { start: end + 1, ..*lock });
            }
            false
        });
        self.held.append(&mut rest);
    }

    /// A file descriptor of this owner was closed: POSIX drops all its locks on the file.
    pub fn drop_owner(&mut self, owner: u64) {
        self.held.retain(|l| l.owner != owner);
    }

    /// The handle is gone, and with it every lock that was taken through it.
    pub fn drop_handle(&mut self, fh: u64) {
        self.held.retain(|l| l.fh != fh);
    }

    /// True when nobody holds anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::{Lock, LockKind, LockTable};
    use proptest::prelude::*;

    fn lock(start: u64, end: u64, kind: LockKind, owner: u64) -> Lock {
        Lock { start, end, kind, owner, fh: owner, pid: 1 }
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_one_cell_per_byte(
            ops in prop::collection::vec((0u64..3, 0u64..4, 0u64..16, 0u64..16), 1..60)
        ) {
            let mut table = LockTable::default();
            // Per owner and byte: how it is locked.
            let mut cells = [[None; 16]; 4];
            for (what, owner, a, b) in ops {
                let (start, end) = (a.min(b), a.max(b));
                let me = usize::try_from(owner).unwrap();
                let range = usize::try_from(start).unwrap()..=usize::try_from(end).unwrap();
                if what == 0 {
                    table.release(owner, start, end);
                    cells[me][range].fill(None);
                    continue;
                }
                let kind = if what == 1 { LockKind::Shared } else { LockKind::Exclusive };
                let free = (0..4).filter(|o| *o != me).all(|o| {
                    cells[o][range.clone()].iter().all(|c| match c {
                        None => true,
                        Some(k) => *k == LockKind::Shared && kind == LockKind::Shared,
                    })
                });
                prop_assert_eq!(table.acquire(lock(start, end, kind, owner)), free);
                if free {
                    cells[me][range].fill(Some(kind));
                }
            }
            for (me, row) in cells.iter().enumerate() {
                for (byte, cell) in row.iter().enumerate() {
                    let (byte, me) = (byte as u64, me as u64);
                    let found = table.held.iter().filter(|l| l.owner == me && l.start <= byte && byte <= l.end);
                    prop_assert_eq!(found.map(|l| l.kind).collect::<Vec<_>>(), Vec::from_iter(*cell));
                }
            }
        }
    }

    #[test]
    fn releasing_a_handle_drops_only_its_locks() {
        let mut table = LockTable::default();
        assert!(table.acquire(lock(100, 203, LockKind::Shared, 1)));
        assert!(table.acquire(lock(100, 203, LockKind::Shared, 2)));
        table.drop_handle(1);
        assert!(table.acquire(lock(0, 500, LockKind::Exclusive, 2)));
        table.drop_owner(2);
        assert!(table.is_empty());
    }
}
