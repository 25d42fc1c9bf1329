//! The catalog: the names that this host gave, durable.
//!
//! It holds directories, symlinks, and which image has which name *here*; it is authoritative
//! for them on this host. What images of other hosts are called is in their chains and is not
//! stored here (`fs::claims` lays those over it). One transaction per namespace operation: a
//! rename with its replaced target, an exchange, a move of a directory are each one record, so
//! a crash leaves all of it or nothing.
//!
//! Chain-side work that follows from a transaction (a `Name`, an `Unlink`) is not stored as a list of
//! things to do but as state to compare: a row whose image claims another path, or a buried
//! image that is not unlinked, is redone at the start. Redoing is idempotent.
//!
//! Every file has a second copy beside it, byte for byte the same, which is written after it and not
//! waited for: it is for damage at rest. A record that is bad in one is taken from the other.
//!
//! Durability: [`Catalog::append`] orders a transaction, [`Catalog::sync`] makes it durable;
//! transactions that arrive together share one device flush. After a failed flush the catalog
//! refuses everything (the kernel may have dropped the pages: retrying would lie).

mod format;
#[doc(hidden)]
pub mod fuzzing;
mod row;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use vmfs_store::disk::{Disk, DiskFile};

pub use format::VERSION;
pub use row::{Change, Kind, Meta, ROOT_INO, Row, Rows, XATTRS_MAX};

use format::{HEADER_BYTES, Header, Record, Tag, decode_header, decode_record, encode_header, encode_record};

/// Directory of the catalog's files on the store's [`Disk`].
pub const DIR: &str = "catalog";
/// The journal is compacted when it is this long and longer than four snapshots.
const COMPACT_BYTES: u64 = 1 << 20;
/// What [`DiskFile::forget`] counts in.
const PAGE_BYTES: u64 = 4096;
/// Rows per record of a snapshot.
const SNAPSHOT_ROWS: usize = 256;

/// Why the catalog cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The disk said no.
    #[error("catalog: {0}")]
    Io(#[from] io::Error),
    /// Written by another release.
    #[error("catalog: {file} has format version {found}, this release reads version {known}")]
    Version {
        /// Which file.
        file: String,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Damage that a crash does not explain. Nothing was changed.
    #[error("catalog: {file} is damaged at byte {offset}: {what}")]
    Damaged {
        /// Which file.
        file: String,
        /// Where.
        offset: u64,
        /// How.
        what: String,
    },
    /// An earlier flush failed; what is on the disk is unknown until a restart.
    #[error("catalog: refused, because an earlier write-back failed")]
    Latched,
    /// One operation touches too many names.
    #[error("catalog: the transaction is too large")]
    TooLarge,
}

/// Names a transaction for [`Catalog::sync`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

struct Inner {
    file: Arc<dyn DiskFile>,
    /// The second copy; none while it could not be written.
    copy: Option<Arc<dyn DiskFile>>,
    generation: u64,
    /// Where the next record goes.
    end: u64,
    /// Last record appended.
    seq: u64,
    /// Last record known durable, and the length that is.
    durable: (u64, u64),
    /// Where the snapshot ends.
    snapshot_bytes: u64,
    rows: Rows,
    failed: bool,
    /// Something was damaged and taken from the second copy.
    mended: bool,
}

/// The catalog. See the module.
pub struct Catalog {
    disk: Arc<dyn Disk>,
    inner: Mutex<Inner>,
    /// Held while a flush runs: those who wait for it find their ticket done.
    flushing: Mutex<()>,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").finish_non_exhaustive()
    }
}

fn file_name(generation: u64) -> String {
    format!("{DIR}/{generation:016x}.cat")
}

/// The second copy of a generation's file.
fn copy_name(generation: u64) -> String {
    file_name(generation) + ".copy"
}

fn generation_of(name: &str) -> Option<u64> {
    let hex = name.strip_suffix(".cat").filter(|h| h.len() == 16)?;
    u64::from_str_radix(hex, 16).ok()
}

impl Catalog {
    /// Opens the catalog on `disk`, or makes an empty one with `root` as its root directory.
    ///
    /// # Errors
    /// Disk errors, damage, or another format version. A torn tail is not an error.
    pub fn open(disk: Arc<dyn Disk>, root: &Meta) -> Result<Self, CatalogError> {
        let names = disk.list(DIR)?;
        let mut generations: Vec<u64> = names.iter().filter_map(|n| generation_of(n)).collect();
        generations.sort_unstable();
        let mut inner = None;
        for (at, generation) in generations.iter().enumerate().rev() {
            // A generation below another was complete before that one was begun; the lowest was
            // either complete or is the very first, in which nothing was ever acknowledged.
            if let Some(loaded) = load(disk.as_ref(), *generation, at == 0)? {
                inner = Some(loaded);
                break;
            }
        }
        let inner = match inner {
            Some(inner) => inner,
            None => {
                let mut rows = Rows::default();
                rows.apply(&Change::Put(
                    ROOT_INO,
                    Row { parent: ROOT_INO, name: String::new(), kind: Kind::Dir(root.clone()) },
                ));
                let next = generations.last().map_or(1, |g| g + 1);
                write_generation(disk.as_ref(), next, 0, rows)?
            }
        };
        for generation in generations.into_iter().filter(|g| *g != inner.generation) {
            disk.remove(&file_name(generation))?;
        }
        for name in names {
            let of = name.strip_suffix(".copy").and_then(generation_of);
            if of.is_some_and(|g| g != inner.generation) {
                disk.remove(&format!("{DIR}/{name}"))?;
            }
        }
        disk.sync_names(DIR)?;
        Ok(Self { disk, inner: Mutex::new(inner), flushing: Mutex::new(()) })
    }

    /// True when something of it was damaged and has been repaired since it was opened.
    #[must_use]
    pub fn was_mended(&self) -> bool {
        self.inner.lock().mended
    }

    /// Reads both copies back. When they are not the same, everything is written anew, from memory. True when
    /// that was necessary.
    ///
    /// # Errors
    /// The disk's; the catalog stays usable unless [`CatalogError::Latched`].
    pub fn scrub(&self) -> Result<bool, CatalogError> {
        let mut inner = self.inner.lock();
        if inner.failed {
            return Err(CatalogError::Latched);
        }
        let mut copies = [Vec::new(), Vec::new()];
        let files = [Some(&inner.file), inner.copy.as_ref()];
        for (bytes, file) in copies.iter_mut().zip(files) {
            let Some(file) = file else { continue };
            forget(&**file)?;
            *bytes = vec![0; usize::try_from(inner.end).map_err(io::Error::other)?];
            file.read_at(bytes, 0)?;
        }
        if copies[0] == copies[1] {
            return Ok(false);
        }
        self.compact(&mut inner)?;
        inner.mended = true;
        Ok(true)
    }

    /// A copy of everything it holds.
    #[must_use]
    pub fn rows(&self) -> Rows {
        self.inner.lock().rows.clone()
    }

    /// Appends one transaction; it takes effect as a whole or not at all. Durable only after
    /// [`Catalog::sync`]; later transactions are never durable without the earlier ones.
    ///
    /// # Errors
    /// Nothing was changed (`ENOSPC`, for instance, leaves the catalog usable).
    pub fn append(&self, changes: &[Change]) -> Result<Ticket, CatalogError> {
        let mut inner = self.inner.lock();
        if inner.failed {
            return Err(CatalogError::Latched);
        }
        let seq = inner.seq + 1;
        let record = encode_record(inner.generation, seq, inner.durable.1, Tag::Txn, changes)
            .ok_or(CatalogError::TooLarge)?;
        inner.file.write_at(&record, inner.end)?;
        if let Some(Err(error)) = inner.copy.as_ref().map(|c| c.write_at(&record, inner.end)) {
            tracing::warn!(%error, "the catalog has no second copy until it is scrubbed");
            inner.copy = None;
        }
        inner.end += record.len() as u64;
        inner.seq = seq;
        for change in changes {
            inner.rows.apply(change);
        }
        let journal = inner.end - inner.snapshot_bytes;
        if journal > COMPACT_BYTES.max(4 * inner.snapshot_bytes)
            && let Err(error) = self.compact(&mut inner)
        {
            // The present generation is still good; the next append tries again.
            tracing::warn!(%error, "the catalog could not be compacted");
        }
        Ok(Ticket(seq))
    }

    /// On return, the transaction and all before it are on stable storage.
    ///
    /// # Errors
    /// The flush failed: the catalog refuses everything from now on.
    pub fn sync(&self, ticket: Ticket) -> Result<(), CatalogError> {
        let _one_at_a_time = self.flushing.lock();
        let (file, generation, seq, end) = {
            let inner = self.inner.lock();
            if inner.failed {
                return Err(CatalogError::Latched);
            }
            if inner.durable.0 >= ticket.0 {
                return Ok(());
            }
            (inner.file.clone(), inner.generation, inner.seq, inner.end)
        };
        let result = file.sync();
        let mut inner = self.inner.lock();
        match result {
            Ok(()) => {
                if inner.generation == generation {
                    inner.durable = inner.durable.max((seq, end));
                }
                Ok(())
            }
            // A compaction has made everything durable elsewhere in the meantime.
            Err(_) if inner.durable.0 >= ticket.0 => Ok(()),
            Err(error) => {
                inner.failed = true;
                Err(error.into())
            }
        }
    }

    /// On return, every transaction so far is on stable storage.
    ///
    /// # Errors
    /// As [`Catalog::sync`].
    pub fn sync_all(&self) -> Result<(), CatalogError> {
        let last = Ticket(self.inner.lock().seq);
        self.sync(last)
    }

    /// Writes everything into a new generation. On success all of it is durable.
    fn compact(&self, inner: &mut Inner) -> Result<(), CatalogError> {
        let old = inner.generation;
        let new = match write_generation(self.disk.as_ref(), old + 1, inner.seq, inner.rows.clone()) {
            Ok(new) => new,
            Err(error) => {
                self.disk.remove(&file_name(old + 1))?;
                self.disk.remove(&copy_name(old + 1))?;
                self.disk.sync_names(DIR)?;
                return Err(error);
            }
        };
        *inner = Inner { mended: inner.mended, ..new };
        // Before the first transaction goes into the new one: while both exist, the newer holds
        // nothing that the older does not, so that a damaged newer one may be passed over.
        let gone = self.disk.remove(&file_name(old)).and_then(|()| self.disk.remove(&copy_name(old)));
        let gone = gone.and_then(|()| self.disk.sync_names(DIR));
        if gone.is_err() {
            inner.failed = true;
        }
        Ok(gone?)
    }
}

/// Writes a generation that holds `rows`, durable on return.
fn write_generation(disk: &dyn Disk, generation: u64, seq: u64, rows: Rows) -> Result<Inner, CatalogError> {
    let file = disk.open(&file_name(generation), true)?;
    file.set_len(0)?;
    let mut bytes = encode_header(generation);
    let mut whole = Vec::new();
    let mut end = 0;
    let changes: Vec<Change> = rows.changes().collect();
    for (tag, part) in changes.chunks(SNAPSHOT_ROWS).map(|p| (Tag::Rows, p)).chain([(Tag::Complete, &[][..])])
    {
        let record = encode_record(generation, seq, 0, tag, part).ok_or(CatalogError::TooLarge)?;
        bytes.extend_from_slice(&record);
        if bytes.len() >= 1 << 20 || tag == Tag::Complete {
            file.write_at(&bytes, end)?;
            end += bytes.len() as u64;
            whole.append(&mut bytes);
        }
    }
    file.sync()?;
    let copy = write_copy(disk, generation, &whole);
    disk.sync_names(DIR)?;
    let (durable, snapshot_bytes) = ((seq, end), end);
    Ok(Inner {
        file,
        copy,
        generation,
        end,
        seq,
        durable,
        snapshot_bytes,
        rows,
        failed: false,
        mended: false,
    })
}

/// Writes a generation's second copy. Without one the catalog works as well.
fn write_copy(disk: &dyn Disk, generation: u64, bytes: &[u8]) -> Option<Arc<dyn DiskFile>> {
    let write = || {
        let copy = disk.open(&copy_name(generation), true)?;
        copy.set_len(0)?;
        copy.write_at(bytes, 0)?;
        copy.sync()?;
        io::Result::Ok(copy)
    };
    write().inspect_err(|error| tracing::warn!(%error, "the catalog has no second copy")).ok()
}

/// Has the file read from the disk the next time, as far as it was written there.
fn forget(file: &dyn DiskFile) -> io::Result<()> {
    file.forget(0..file.len_bytes()?.div_ceil(PAGE_BYTES))
}

/// The whole content of a file; empty when there is none.
fn read_whole(file: io::Result<Arc<dyn DiskFile>>) -> io::Result<Vec<u8>> {
    let file = match file {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let len = usize::try_from(file.len_bytes()?).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A generation's bytes, and its second copy's.
struct Copies {
    bytes: Vec<u8>,
    copy: Vec<u8>,
    mended: bool,
}

impl Copies {
    /// Takes `len` bytes at `at` from the second copy.
    fn mend(&mut self, at: usize, len: usize) {
        if self.bytes.len() < at + len {
            self.bytes.resize(at + len, 0);
        }
        self.bytes[at..at + len].copy_from_slice(&self.copy[at..at + len]);
        self.mended = true;
    }
    fn header(&mut self, generation: u64) -> Header {
        let found = decode_header(&self.bytes);
        if found != Header::Good(generation) && decode_header(&self.copy) == Header::Good(generation) {
            self.mend(0, HEADER_BYTES);
            return Header::Good(generation);
        }
        found
    }
    fn record(&mut self, generation: u64, at: usize) -> Option<Record> {
        let decode = |bytes: &[u8]| bytes.get(at..).and_then(|rest| decode_record(generation, rest));
        if let Some(record) = decode(&self.bytes) {
            return Some(record);
        }
        let record = decode(&self.copy)?;
        self.mend(at, record.len.min(self.copy.len() - at));
        Some(record)
    }
}

/// Reads a generation. `None` when its snapshot was never completed, which is damage when it is
/// the `only` one and too long to be a first file that was never used.
fn load(disk: &dyn Disk, generation: u64, only: bool) -> Result<Option<Inner>, CatalogError> {
    let name = file_name(generation);
    let file = disk.open(&name, false)?;
    // What a killed process left in the page cache is acted upon: pin it down first. What a failed flush was for looks
    // clean there, and is not on the disk.
    file.sync()?;
    forget(&*file)?;
    let bytes = read_whole(Ok(Arc::clone(&file)))?;
    let len = bytes.len();
    let copy = read_whole(disk.open(&copy_name(generation), false))?;
    let mut copies = Copies { bytes, copy, mended: false };
    let damaged = |offset: usize, what: &str| CatalogError::Damaged {
        file: name.clone(),
        offset: offset as u64,
        what: what.to_owned(),
    };
    match copies.header(generation) {
        Header::Good(g) if g == generation => {}
        Header::Version(found) => return Err(CatalogError::Version { file: name, found, known: VERSION }),
        _ if only && len > FIRST_FILE_MAX_BYTES => return Err(damaged(0, "no header")),
        _ => return Ok(None),
    }
    let (mut at, mut rows, mut complete, mut seq) = (HEADER_BYTES, Rows::default(), None, 0);
    while let Some(record) = copies.record(generation, at) {
        let in_snapshot = complete.is_none();
        let tag_fits = if in_snapshot { record.tag != Tag::Txn as u8 } else { record.tag == Tag::Txn as u8 };
        if !tag_fits || (!in_snapshot && record.seq != seq + 1) {
            return Err(damaged(at, "a record out of order"));
        }
        seq = record.seq;
        record.changes.iter().for_each(|c| rows.apply(c));
        at += record.len;
        if record.tag == Tag::Complete as u8 {
            complete = Some(at as u64);
        }
    }
    let Copies { mut bytes, copy, mended } = copies;
    // The padding of the last record may have been torn off.
    bytes.resize(bytes.len().max(at), 0);
    if let Some(later) = later_record(generation, &bytes, at, seq) {
        return Err(damaged(at, &format!("a record is invalid, the one at byte {later} knew it durable")));
    }
    let Some(snapshot_bytes) = complete else {
        return if only && len > FIRST_FILE_MAX_BYTES { Err(damaged(at, "no snapshot")) } else { Ok(None) };
    };
    rows.check().map_err(|what| damaged(at, &what))?;
    if mended {
        tracing::warn!(file = name, "the catalog was damaged: repaired from its second copy");
        file.write_at(&bytes[..at], 0)?;
    }
    if at < len {
        file.set_len(at as u64)?;
    }
    if mended || at < len {
        file.sync()?;
    }
    let copy = if copy == bytes[..at] {
        Some(disk.open(&copy_name(generation), false)?)
    } else {
        write_copy(disk, generation, &bytes[..at])
    };
    let end = at as u64;
    let durable = (seq, end);
    Ok(Some(Inner { file, copy, generation, end, seq, durable, snapshot_bytes, rows, failed: false, mended }))
}

/// Longest first file that was never used: a header, the root and the end of the snapshot.
const FIRST_FILE_MAX_BYTES: usize = 512;

/// Offset of a valid record beyond `bad` that says the bytes at `bad` were durable before it.
fn later_record(generation: u64, bytes: &[u8], bad: usize, seq: u64) -> Option<usize> {
    // Records are 8-aligned; a stale length field costs one checksum of at most the file's rest,
    // so candidates are filtered by their seq first.
    (bad + 8..bytes.len().saturating_sub(format::RECORD_BYTES)).step_by(8).find(|at| {
        let field = |from: usize| {
            bytes[at + from..at + from + 8].try_into().map(u64::from_le_bytes).unwrap_or_default()
        };
        (seq + 1..seq + 1 + bytes.len() as u64).contains(&field(8))
            && field(16) > bad as u64
            && decode_record(generation, &bytes[*at..]).is_some()
    })
}
