//! Small values of the host (promises, ballots, secrets), in one journal for all images, so that
//! concurrent writers share one device flush.
//!
//! The journal is a sequence of numbered groups. Every group is written twice in a row, each copy
//! in pages of its own, so that neither a torn write nor a lost page takes an older value with it. A new
//! journal begins with an empty group, in a file of another name that is then renamed: one that is not empty and does not
//! begin with a group is damaged, and never just new.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use vmfs_common::ImageId;
use vmfs_common::codec::{Reader, Writer};
use zeroize::Zeroizing;

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::image::Space;
use crate::segment::{PAGE, PAGE_U64};
use crate::shared::Shared;

const NAME: &str = "meta";
const NEW_NAME: &str = "meta.new";
const MAGIC: u32 = u32::from_le_bytes(*b"VMMJ");
const VERSION: u32 = 1;
/// Magic, version, number, length, checksum.
const FIXED: usize = 24;
/// Longest value.
const VALUE_BYTES_MAX: usize = 1 << 20;
/// Longest group.
const GROUP_BYTES_MAX: usize = 64 << 20;
/// Space kept ahead of the journal's end.
const ROOM_BYTES: u64 = 256 << 10;
/// The journal is rewritten when it is larger than this and four times its values.
const COMPACT_BYTES: u64 = 4 << 20;

type Value = Zeroizing<Vec<u8>>;
type Change = (ImageId, Option<Value>);

struct Inner {
    values: BTreeMap<ImageId, Value>,
    queue: Vec<Change>,
    queued_no: u64,
    done_no: u64,
    running: bool,
    failed: bool,
}

struct Journal {
    file: Arc<dyn DiskFile>,
    end: u64,
    /// The file has space up to here.
    allocated: u64,
    next_group: u64,
}

impl Journal {
    /// Keeps space ahead of the end, so that a promise can be made on a full disk.
    fn make_room(&mut self, shared: &Shared) {
        if self.end + ROOM_BYTES / 4 <= self.allocated {
            return;
        }
        let want = self.end + ROOM_BYTES;
        let room = shared.with_reserve(Space::Control, || {
            self.file.allocate(want).during(|| "allocating the metadata journal".into())
        });
        match room {
            Ok(()) => self.allocated = want,
            Err(e) => tracing::warn!(error = %e, "no room ahead in the metadata journal"),
        }
    }
}

/// The host's metadata.
pub(crate) struct Meta {
    inner: Mutex<Inner>,
    done: Condvar,
    /// Used by whoever has set `running`.
    journal: Mutex<Journal>,
}

fn encode_group(number: u64, changes: &[Change]) -> Zeroizing<Vec<u8>> {
    // Of its final size from the start: a vector that grows leaves copies behind.
    let bytes: usize = changes.iter().map(|(_, v)| 21 + v.as_ref().map_or(0, |v| v.len())).sum();
    let mut payload = Zeroizing::new(Vec::with_capacity(bytes));
    for (key, value) in changes {
        payload.extend_from_slice(key.as_bytes());
        payload.push(u8::from(value.is_some()));
        let bytes = value.as_deref().map_or(&[][..], Vec::as_slice);
        payload.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(0).to_le_bytes());
        payload.extend_from_slice(bytes);
    }
    let mut w = Writer::with_capacity(FIXED);
    w.u32(MAGIC);
    w.u32(VERSION);
    w.u64(number);
    w.count(payload.len());
    let fixed = w.finish();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&fixed), &payload);
    let one = (FIXED + payload.len()).next_multiple_of(PAGE);
    let mut out = Zeroizing::new(vec![0u8; 2 * one]);
    for copy in out.chunks_exact_mut(one) {
        copy[..FIXED - 4].copy_from_slice(&fixed);
        copy[FIXED - 4..FIXED].copy_from_slice(&crc.to_le_bytes());
        copy[FIXED..FIXED + payload.len()].copy_from_slice(&payload);
    }
    out
}

pub(crate) struct Group {
    number: u64,
    changes: Vec<Change>,
    /// Bytes of one copy.
    copy_bytes: u64,
}

/// The group that starts at `at`, if a whole one does.
pub(crate) fn read_group(file: &dyn DiskFile, at: u64, end: u64) -> Result<Option<Group>, StoreError> {
    let what = || "reading the metadata journal".to_owned();
    let mut fixed = [0u8; FIXED];
    file.read_at(&mut fixed, at).during(what)?;
    let word = |o: usize| u32::from_le_bytes([fixed[o], fixed[o + 1], fixed[o + 2], fixed[o + 3]]);
    let len = word(16) as usize;
    if word(0) != MAGIC || len > GROUP_BYTES_MAX || at + (FIXED + len) as u64 > end {
        return Ok(None);
    }
    let mut payload = Zeroizing::new(vec![0u8; len]);
    file.read_at(&mut payload, at + FIXED as u64).during(what)?;
    if crc32c::crc32c_append(crc32c::crc32c(&fixed[..FIXED - 4]), &payload) != word(FIXED - 4) {
        return Ok(None);
    }
    if word(4) != VERSION {
        return Err(StoreError::Version {
            what: "the metadata journal".into(),
            found: word(4),
            known: VERSION,
        });
    }
    let number = u64::from(word(8)) | u64::from(word(12)) << 32;
    let mut r = Reader::new(&payload);
    let mut changes = Vec::new();
    let bad = |_| StoreError::corrupt("the metadata journal");
    while r.left() > 0 {
        let key = ImageId::from_bytes(r.array().map_err(bad)?);
        let present = r.flag().map_err(bad)?;
        let value = Zeroizing::new(r.var(VALUE_BYTES_MAX).map_err(bad)?.to_vec());
        changes.push((key, present.then_some(value)));
    }
    Ok(Some(Group { number, changes, copy_bytes: ((FIXED + len).next_multiple_of(PAGE)) as u64 }))
}

impl Meta {
    /// Reads the journal, or starts one.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when a group before another, or the first, is lost: a promise might be in it.
    pub(crate) fn open(shared: &Shared) -> Result<Self, StoreError> {
        let what = || "opening the metadata journal".to_owned();
        shared.disk.remove(NEW_NAME).during(what)?;
        let file = shared.disk.open(NAME, true).during(what)?;
        let end = file.len_bytes().during(what)?;
        let mut values = BTreeMap::new();
        let (mut at, mut good_end, mut expected) = (0, 0, None);
        let (mut copies, mut gap, mut damaged) = (0u64, false, false);
        // The number of the first group, when the first thing found is not at the start.
        let mut second_copy = None;
        let lost = || StoreError::corrupt("the metadata journal");
        while at < end {
            let Some(group) = read_group(&*file, at, end)? else {
                gap = true;
                at += PAGE_U64;
                continue;
            };
            // Whatever is bad before a whole group was whole once, and every group is there twice.
            damaged |= std::mem::take(&mut gap);
            copies += 1;
            // The other copy of the one before has its number.
            let wanted = expected.unwrap_or(group.number);
            if group.number > wanted {
                return Err(lost());
            }
            if expected.is_none() && at > 0 {
                // The second copy of the first group, or that was lost, and this is a later one.
                if at != group.copy_bytes {
                    return Err(lost());
                }
                second_copy = Some(group.number);
            } else if second_copy == Some(group.number) {
                return Err(lost());
            }
            at += group.copy_bytes;
            good_end = at;
            if group.number == wanted {
                let next = wanted.checked_add(1);
                expected = Some(next.ok_or_else(lost)?);
                for (key, value) in group.changes {
                    match value {
                        Some(v) => values.insert(key, v),
                        None => values.remove(&key),
                    };
                }
            }
        }
        if end > 0 && expected.is_none() {
            return Err(lost());
        }
        let journal = Journal { file, end: good_end, allocated: end, next_group: expected.unwrap_or(1) };
        let all: Vec<Change> = values.iter().map(|(k, v)| (*k, Some(Value::clone(v)))).collect();
        let inner =
            Inner { values, queue: Vec::new(), queued_no: 0, done_no: 0, running: false, failed: false };
        let this = Self { inner: Mutex::new(inner), done: Condvar::new(), journal: Mutex::new(journal) };
        if damaged || !copies.is_multiple_of(2) {
            shared.rot.found_and_repaired(None, NAME, "from its second copy");
        }
        // What was read may be in the page cache alone, and a sync may have failed on it.
        this.rewrite(shared, &all)?;
        Ok(this)
    }

    pub(crate) fn get(&self, key: ImageId) -> Option<Value> {
        self.inner.lock().values.get(&key).cloned()
    }
    pub(crate) fn keys(&self) -> Vec<ImageId> {
        self.inner.lock().values.keys().copied().collect()
    }

    /// Changes one value; durable on return.
    pub(crate) fn change(
        &self,
        shared: &Shared,
        key: ImageId,
        value: Option<&[u8]>,
    ) -> Result<(), StoreError> {
        if value.is_some_and(|v| v.len() > VALUE_BYTES_MAX) {
            return Err(StoreError::Full);
        }
        let mut inner = self.inner.lock();
        inner.queue.push((key, value.map(|v| Zeroizing::new(v.to_vec()))));
        inner.queued_no += 1;
        let mine = inner.queued_no;
        loop {
            if inner.done_no >= mine {
                return Ok(());
            }
            if inner.failed {
                return Err(StoreError::corrupt("the metadata journal (after a failed write)"));
            }
            if inner.running {
                self.done.wait(&mut inner);
                continue;
            }
            inner.running = true;
            let batch = std::mem::take(&mut inner.queue);
            let upto = inner.queued_no;
            drop(inner);
            let written = self.write(shared, &batch);
            inner = self.inner.lock();
            inner.running = false;
            self.done.notify_all();
            if let Err(e) = written {
                inner.failed = true;
                return Err(e);
            }
            inner.done_no = upto;
            for (key, value) in batch {
                match value {
                    Some(v) => inner.values.insert(key, v),
                    None => inner.values.remove(&key),
                };
            }
        }
    }

    fn write(&self, shared: &Shared, batch: &[Change]) -> Result<(), StoreError> {
        let mut journal = self.journal.lock();
        let group = encode_group(journal.next_group, batch);
        let what = || "writing the metadata journal".to_owned();
        shared.with_reserve(Space::Control, || journal.file.write_at(&group, journal.end).during(what))?;
        journal.file.sync().during(what)?;
        journal.end += group.len() as u64;
        journal.next_group += 1;
        journal.make_room(shared);
        Ok(())
    }

    /// Rewrites the journal when most of it is outdated.
    pub(crate) fn compact(&self, shared: &Shared) -> Result<(), StoreError> {
        let all: Vec<Change> = {
            let mut inner = self.inner.lock();
            let live: usize = inner.values.values().map(|v| v.len() + 32).sum();
            let end = self.journal.try_lock().map_or(0, |j| j.end);
            if inner.running || inner.failed || end < COMPACT_BYTES.max(4 * live as u64) {
                return Ok(());
            }
            inner.running = true;
            inner.values.iter().map(|(k, v)| (*k, Some(v.clone()))).collect()
        };
        let result = self.rewrite(shared, &all);
        let mut inner = self.inner.lock();
        inner.running = false;
        inner.failed |= result.is_err();
        self.done.notify_all();
        result
    }

    /// Reads the journal back and writes it anew, from memory, when any copy of a group in it is damaged.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn scrub(&self, shared: &Shared) -> Result<(), StoreError> {
        let all: Vec<Change> = {
            let mut inner = self.inner.lock();
            while inner.running {
                self.done.wait(&mut inner);
            }
            if inner.failed {
                return Ok(());
            }
            inner.running = true;
            inner.values.iter().map(|(k, v)| (*k, Some(v.clone()))).collect()
        };
        let result = self.check_copies().and_then(|whole| {
            if whole {
                return Ok(());
            }
            shared.rot.found(None, NAME);
            self.rewrite(shared, &all)?;
            shared.rot.repaired(None, NAME, "written anew");
            Ok(())
        });
        let mut inner = self.inner.lock();
        inner.running = false;
        inner.failed |= result.is_err();
        self.done.notify_all();
        result
    }

    /// True when every group is there twice.
    fn check_copies(&self) -> Result<bool, StoreError> {
        let journal = self.journal.lock();
        let mut at = 0;
        while at < journal.end {
            let Some(first) = read_group(&*journal.file, at, journal.end)? else { return Ok(false) };
            at += first.copy_bytes;
            let second = read_group(&*journal.file, at, journal.end)?;
            if second.is_none_or(|s| s.number != first.number) {
                return Ok(false);
            }
            at += first.copy_bytes;
        }
        Ok(at == journal.end)
    }

    fn rewrite(&self, shared: &Shared, all: &[Change]) -> Result<(), StoreError> {
        let what = || "rewriting the metadata journal".to_owned();
        let mut journal = self.journal.lock();
        shared.disk.remove(NEW_NAME).during(what)?;
        let file = shared.disk.open(NEW_NAME, true).during(what)?;
        let group = encode_group(journal.next_group, all);
        shared.with_reserve(Space::Control, || file.write_at(&group, 0).during(what))?;
        file.sync().during(what)?;
        shared.disk.rename(NEW_NAME, NAME).during(what)?;
        shared.disk.sync_names("").during(what)?;
        let end = group.len() as u64;
        *journal = Journal { file, end, allocated: end, next_group: journal.next_group + 1 };
        if !all.is_empty() {
            journal.make_room(shared);
        }
        Ok(())
    }
}
