//! Small payload of a segment on its way to the file: kept in memory until a header page is full or synced, and
//! written with one call.
//!
//! A header page is written when it is full or synced, and never before the payload that it tells of. Until then
//! payload in the file is of no more use after a crash of the process than payload in memory; and a dozen small writes
//! cost the kernel three times what one write of the same bytes does.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::disk::DiskFile;
use crate::segment::{PAGE, PAGE_U64};

/// Held at most, in bytes; payload of more than half of it is written at once.
const HELD_BYTES_MAX: usize = 64 << 10;

/// See the module. Written to by whoever has the append lock, read by anybody.
#[derive(Debug)]
pub(crate) struct Held {
    /// Page of the first byte; `MAX`: nothing is held. Changes under the lock alone.
    from_page: AtomicU32,
    bytes: Mutex<Vec<u8>>,
}

impl Default for Held {
    fn default() -> Self {
        Self { from_page: AtomicU32::new(u32::MAX), bytes: Mutex::default() }
    }
}

fn pages_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len() / PAGE).unwrap_or(u32::MAX)
}

impl Held {
    /// Takes payload for the pages from `page` on: writes it, or keeps it for [`Held::write`]. Not durable either way.
    ///
    /// # Errors
    /// The disk's; what was held still is.
    pub(crate) fn put(&self, file: &dyn DiskFile, page: u32, payload: &[u8]) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let end = self.from_page.load(Ordering::Relaxed).saturating_add(pages_of(&bytes));
        if end != page || bytes.len() + payload.len() > HELD_BYTES_MAX {
            self.write_locked(file, &mut bytes)?;
        }
        if payload.len() > HELD_BYTES_MAX / 2 {
            self.write_locked(file, &mut bytes)?;
            return file.write_at(payload, u64::from(page) * PAGE_U64);
        }
        if bytes.is_empty() {
            self.from_page.store(page, Ordering::Release);
        }
        bytes.extend_from_slice(payload);
        Ok(())
    }

    /// On return nothing is held: all of it is in the file, not durable.
    ///
    /// # Errors
    /// The disk's; what was held still is.
    pub(crate) fn write(&self, file: &dyn DiskFile) -> io::Result<()> {
        self.write_locked(file, &mut self.bytes.lock())
    }

    /// As [`Held::write`], and gives the memory back: nothing may follow for long.
    ///
    /// # Errors
    /// As [`Held::write`].
    pub(crate) fn write_and_shrink(&self, file: &dyn DiskFile) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        self.write_locked(file, &mut bytes)?;
        *bytes = Vec::new();
        Ok(())
    }

    fn write_locked(&self, file: &dyn DiskFile, bytes: &mut Vec<u8>) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let first = self.from_page.load(Ordering::Relaxed);
        file.write_at(bytes, u64::from(first) * PAGE_U64)?;
        bytes.clear();
        self.from_page.store(u32::MAX, Ordering::Release);
        Ok(())
    }

    /// Fills in the pages from `page` on that are held, which are the last ones that `buf` is for. Says how many bytes
    /// before them are in the file.
    pub(crate) fn read(&self, page: u32, buf: &mut [u8]) -> usize {
        let end = page.saturating_add(pages_of(buf));
        // A page that the caller knows of was held before he could know, or is in the file.
        if self.from_page.load(Ordering::Acquire) >= end {
            return buf.len();
        }
        let bytes = self.bytes.lock();
        let first = self.from_page.load(Ordering::Relaxed);
        if first >= end {
            return buf.len();
        }
        let skip = page.saturating_sub(first) as usize * PAGE;
        let in_file = first.saturating_sub(page) as usize * PAGE;
        let wanted = buf.len() - in_file;
        match bytes.get(skip..skip + wanted) {
            Some(held) => {
                buf[in_file..].copy_from_slice(held);
                in_file
            }
            // Beyond what was ever put here: only a damaged map asks for it.
            None => buf.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk as _;
    use crate::simdisk::SimDisk;

    #[test]
    fn pages_read_the_same_wherever_they_are() {
        let disk = SimDisk::new(1 << 30);
        let file = disk.open("f", true).unwrap();
        let held = Held::default();
        let content = |page: u32| vec![u8::try_from(page % 251).unwrap() + 1; PAGE];
        let check = |known: std::ops::Range<u32>| {
            for from in known.clone() {
                for to in from + 1..=known.end {
                    let mut buf = vec![0; (to - from) as usize * PAGE];
                    let in_file = held.read(from, &mut buf);
                    file.read_at(&mut buf[..in_file], u64::from(from) * PAGE_U64).unwrap();
                    let expected: Vec<u8> = (from..to).flat_map(content).collect();
                    assert!(buf == expected, "pages {from}..{to}");
                }
            }
        };
        let mut next = 4;
        // Singly and in pairs, beyond the bound; then a gap, and what is too large to be held.
        for count in [1, 2, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9, 1, 8, 1] {
            let payload: Vec<u8> = (next..next + count).flat_map(content).collect();
            held.put(&*file, next, &payload).unwrap();
            next += count;
            check(4..next);
        }
        held.write(&*file).unwrap();
        check(4..next);
        held.put(&*file, next, &content(next)).unwrap();
        held.put(&*file, next + 3, &content(next + 3)).unwrap();
        check(4..next + 1);
        check(next + 3..next + 4);
        held.write_and_shrink(&*file).unwrap();
        check(next + 3..next + 4);
        // Never put: the file is asked.
        held.put(&*file, next + 4, &content(next + 4)).unwrap();
        assert_eq!(held.read(next + 5, &mut [0; PAGE]), PAGE);
        assert_eq!(held.read(next + 4, &mut [0; 2 * PAGE]), 2 * PAGE);
    }
}
