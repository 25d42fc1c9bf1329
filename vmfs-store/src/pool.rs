//! The segments nobody uses: prewritten ones ready to be taken, others, and the space kept back.
//! Only a fully written file is synced without a file system journal commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use vmfs_common::{Head, ImageId};

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::image::Space;
use crate::segment::{Class, FIRST_PAGE, Kind, PAGE_U64, SEGMENTS_MAX, Segment, SegmentHeader, file_name};
use crate::shared::Shared;
use crate::way::{FREED_BYTES, PIECE_BYTES};

/// Unused segments of one class kept beyond the prewritten ones in any case.
const RAW_MAX: usize = 2;
/// Of the larger classes, so many bytes are kept in any case: to make a segment anew costs more than to keep one.
const KEPT_BYTES: u64 = 64 << 20;
/// Smallest-class allocations go in steps of this many pages.
const ALLOC_STEP_PAGES: u32 = 8;
/// What is left to prewrite of a segment that was filled before is little, and is written in busy times too.
const LITTLE_BYTES: u64 = 2 << 20;
/// Rounds of background work without anybody taking a segment after which too many are deleted: 30 s.
const CALM_ROUNDS: u32 = 300;
const RESERVE_NAME: &str = "reserve";

/// A segment taken from the pool and not yet begun.
pub(crate) struct Spare {
    pub(crate) no: u32,
    pub(crate) class: Class,
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) prepared: bool,
    pub(crate) alloc_pages: u32,
    pub(crate) name_no: u64,
    pub(crate) reserved: Arc<AtomicU32>,
}

impl Spare {
    /// Pages taken once every reservation is used.
    pub(crate) fn virtual_end(&self) -> u32 {
        FIRST_PAGE + 2 + self.reserved.load(Ordering::Acquire)
    }
}

/// Counts created file names, so that a sync knows whether a file's name is durable yet.
#[derive(Default)]
pub(crate) struct Names {
    created: AtomicU64,
    synced: AtomicU64,
}

impl Names {
    fn create(&self) -> u64 {
        self.created.fetch_add(1, Ordering::AcqRel) + 1
    }
    /// On return the name numbered `no` is durable.
    pub(crate) fn sync(&self, shared: &Shared, no: u64) -> Result<(), StoreError> {
        if no <= self.synced.load(Ordering::Acquire) {
            return Ok(());
        }
        let upto = self.created.load(Ordering::Acquire);
        shared.disk.sync_names("seg").during(|| "syncing the segment directory".into())?;
        self.synced.fetch_max(upto, Ordering::AcqRel);
        Ok(())
    }
}

struct Prewrite {
    no: u32,
    class: Class,
    at_bytes: u64,
}

impl Prewrite {
    const fn left_bytes(&self) -> u64 {
        self.class.bytes().saturating_sub(self.at_bytes)
    }
}

/// An unused segment of which not every page was written.
#[derive(Clone, Copy)]
struct Raw {
    no: u32,
    /// Bytes from its start on that were.
    written_bytes: u64,
}

impl Raw {
    const fn unwritten(no: u32) -> Self {
        Self { no, written_bytes: 0 }
    }
}

#[derive(Default)]
struct Inner {
    prepared: [Vec<u32>; Class::COUNT],
    raw: [Vec<Raw>; Class::COUNT],
    next_no: u32,
    wanted: [bool; Class::COUNT],
    prewrite: Option<Prewrite>,
    /// Rounds of background work since somebody took a segment.
    calm_rounds: u32,
}

impl Inner {
    fn count(&self, class: Class) -> usize {
        self.prepared[class.index()].len() + self.raw[class.index()].len()
    }
    /// Bytes of the unused segments that are kept beyond those of [`kept`].
    fn idle_bytes(&self, shared: &Shared) -> u64 {
        let of = |c: Class| self.count(c).saturating_sub(kept(shared, c)) as u64 * c.bytes();
        Class::ALL.into_iter().map(of).sum()
    }
    /// Takes out one of those: the one that the most would have to be written of.
    fn take_idle(&mut self, shared: &Shared) -> Option<(u32, Class)> {
        let class = Class::ALL.into_iter().rev().find(|c| self.count(*c) > kept(shared, *c))?;
        let raw = &mut self.raw[class.index()];
        let least = (0..raw.len()).min_by_key(|i| raw[*i].written_bytes);
        let no = least.map(|i| raw.swap_remove(i).no).or_else(|| self.prepared[class.index()].pop())?;
        Some((no, class))
    }
    /// Takes out the one of which the most was written, if not all of it.
    fn take_raw(&mut self, class: Class) -> Option<Raw> {
        let raw = &mut self.raw[class.index()];
        let most = (0..raw.len()).max_by_key(|i| raw[*i].written_bytes);
        most.map(|i| raw.swap_remove(i))
    }
}

/// Unused segments by class.
#[derive(Default)]
pub(crate) struct Pool {
    inner: Mutex<Inner>,
    pub(crate) names: Names,
}

impl Pool {
    /// Registers what is on disk at open.
    pub(crate) fn load(&self, next_no: u32, unused: Vec<(u32, Class, bool)>) {
        let mut inner = self.inner.lock();
        inner.next_no = next_no;
        for (no, class, prepared) in unused {
            match prepared {
                true => inner.prepared[class.index()].push(no),
                false => inner.raw[class.index()].push(Raw::unwritten(no)),
            }
        }
    }

    /// Takes a segment with room for `pages`, of `preferred` class if it can be had.
    ///
    /// # Errors
    /// [`StoreError::Full`], or the disk's.
    pub(crate) fn take(
        &self,
        shared: &Shared,
        pages: u32,
        preferred: Class,
        space: Space,
    ) -> Result<Spare, StoreError> {
        let least = Class::fitting(pages).ok_or(StoreError::Full)?;
        let preferred = preferred.max(least);
        let downwards = Class::ALL.into_iter().rev().filter(|c| *c >= least && *c <= preferred);
        let upwards = Class::ALL.into_iter().filter(|c| *c > preferred);
        for class in downwards {
            if let Some(spare) = self.take_pooled(shared, class)? {
                return Ok(spare);
            }
            match Self::create(self, shared, class, space) {
                Err(StoreError::Full) => {}
                other => return other,
            }
        }
        for class in upwards {
            if let Some(spare) = self.take_pooled(shared, class)? {
                return Ok(spare);
            }
        }
        Err(StoreError::Full)
    }

    fn take_pooled(&self, shared: &Shared, class: Class) -> Result<Option<Spare>, StoreError> {
        let (no, prepared) = {
            let mut inner = self.inner.lock();
            inner.wanted[class.index()] = true;
            inner.calm_rounds = 0;
            match inner.prepared[class.index()].pop() {
                Some(no) => (no, true),
                None => match inner.take_raw(class) {
                    Some(raw) => (raw.no, false),
                    None => return Ok(None),
                },
            }
        };
        self.open(shared, no, class, prepared).map(Some)
    }

    /// A prewritten segment of this class, if there is one and space is not short.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn take_prepared(&self, shared: &Shared, class: Class) -> Result<Option<Spare>, StoreError> {
        let is_there = {
            let mut inner = self.inner.lock();
            inner.wanted[class.index()] = true;
            !inner.prepared[class.index()].is_empty()
        };
        if !is_there || shared.is_tight() {
            return Ok(None);
        }
        let no = {
            let mut inner = self.inner.lock();
            inner.calm_rounds = 0;
            inner.prepared[class.index()].pop()
        };
        no.map(|no| self.open(shared, no, class, true)).transpose()
    }

    /// As [`Pool::take`], and leaves the prewritten ones to those who wait for syncs, if it can.
    ///
    /// # Errors
    /// [`StoreError::Full`], or the disk's.
    pub(crate) fn take_unprepared(
        &self,
        shared: &Shared,
        pages: u32,
        space: Space,
    ) -> Result<Spare, StoreError> {
        let class = Class::fitting(pages).ok_or(StoreError::Full)?;
        let spare = {
            let mut inner = self.inner.lock();
            inner.calm_rounds = 0;
            let many = inner.prepared[class.index()].len() > shared.cfg.pool_segments;
            let written = if many { inner.prepared[class.index()].pop() } else { None };
            written.map(|no| (no, true)).or_else(|| inner.take_raw(class).map(|raw| (raw.no, false)))
        };
        if let Some((no, prepared)) = spare {
            return self.open(shared, no, class, prepared);
        }
        match self.create(shared, class, space) {
            Err(StoreError::Full) => {
                let no = self.inner.lock().prepared[class.index()].pop().ok_or(StoreError::Full)?;
                self.open(shared, no, class, true)
            }
            other => other,
        }
    }

    fn open(&self, shared: &Shared, no: u32, class: Class, prepared: bool) -> Result<Spare, StoreError> {
        let file = shared.files.segment(no)?;
        // Whatever is within a file's length was allocated or written before.
        let len = file.len_bytes().during(|| format!("opening {}", file_name(no)))?;
        let alloc_pages = u32::try_from(len / PAGE_U64).unwrap_or(u32::MAX).min(class.pages());
        // Its name may have been created before a crash and never synced.
        let name_no = self.names.create();
        let reserved = Arc::default();
        Ok(Spare { no, class, file, prepared, alloc_pages, name_no, reserved })
    }

    fn create(&self, shared: &Shared, class: Class, space: Space) -> Result<Spare, StoreError> {
        if class != Class::SMALLEST && shared.check_space(class.bytes(), space).is_err() {
            self.delete_idle(shared, 0, Hurry::Yes)?;
            shared.check_space(class.bytes(), space)?;
        }
        let no = {
            let mut inner = self.inner.lock();
            if inner.next_no >= SEGMENTS_MAX {
                return Err(StoreError::Full);
            }
            inner.next_no += 1;
            inner.next_no - 1
        };
        let name = file_name(no);
        let file = shared
            .with_reserve(space, || shared.disk.open(&name, true).during(|| format!("creating {name}")))?;
        let name_no = self.names.create();
        let mut spare =
            Spare { no, class, file, prepared: false, alloc_pages: 0, name_no, reserved: Arc::default() };
        if class != Class::SMALLEST {
            let allocated = shared.with_reserve(space, || {
                spare.file.allocate(class.bytes()).during(|| format!("allocating {name}"))
            });
            if let Err(e) = allocated {
                drop(spare);
                shared.disk.remove(&name).during(|| format!("removing {name}"))?;
                return Err(e);
            }
            spare.alloc_pages = class.pages();
        }
        shared.files.adopt_segment(no, Arc::clone(&spare.file));
        Ok(spare)
    }

    /// Makes sure that the file has space up to `end_page`.
    pub(crate) fn ensure_allocated(
        shared: &Shared,
        file: &dyn DiskFile,
        class: Class,
        alloc_pages: &mut u32,
        end_page: u32,
        space: Space,
    ) -> Result<(), StoreError> {
        if end_page <= *alloc_pages {
            return Ok(());
        }
        let to = end_page.next_multiple_of(ALLOC_STEP_PAGES).min(class.pages());
        let bytes = u64::from(to) * PAGE_U64;
        shared.check_space(bytes - u64::from(*alloc_pages) * PAGE_U64, space)?;
        shared.with_reserve(space, || file.allocate(bytes).during(|| "allocating a segment".into()))?;
        *alloc_pages = to;
        Ok(())
    }

    /// Takes back a segment that nobody refers to any more.
    pub(crate) fn give_back(&self, shared: &Shared, seg: &Segment) -> Result<(), StoreError> {
        let prepared = seg.prepared.load(Ordering::Acquire) && seg.class != Class::SMALLEST;
        let written_bytes = u64::from(seg.written_pages.load(Ordering::Acquire)) * PAGE_U64;
        self.keep(shared, Raw { no: seg.no, written_bytes }, seg.class, prepared)
    }

    /// Takes back a segment that was taken and not used.
    pub(crate) fn give_back_no(
        &self,
        shared: &Shared,
        no: u32,
        class: Class,
        prepared: bool,
    ) -> Result<(), StoreError> {
        self.keep(shared, Raw::unwritten(no), class, prepared)
    }

    /// Keeps a segment for whoever needs one next.
    fn keep(&self, shared: &Shared, raw: Raw, class: Class, prepared: bool) -> Result<(), StoreError> {
        let mut inner = self.inner.lock();
        match prepared {
            true => inner.prepared[class.index()].push(raw.no),
            false => inner.raw[class.index()].push(raw),
        }
        drop(inner);
        if shared.is_tight() { self.delete_idle(shared, 0, Hurry::Yes) } else { Ok(()) }
    }

    /// Deletes unused segments until no more than so many bytes of them are too many.
    fn delete_idle(&self, shared: &Shared, bytes_max: u64, hurry: Hurry) -> Result<(), StoreError> {
        loop {
            let idle = {
                let mut inner = self.inner.lock();
                if inner.idle_bytes(shared) <= bytes_max {
                    return Ok(());
                }
                inner.take_idle(shared)
            };
            let Some((no, class)) = idle else { return Ok(()) };
            let deleted = delete(shared, no, hurry);
            if deleted.is_err() {
                self.inner.lock().raw[class.index()].push(Raw::unwritten(no));
            }
            deleted?;
        }
    }

    /// Prewrites segments of the classes in use, about `budget_bytes` of them. True when there is
    /// more to do.
    pub(crate) fn background(&self, shared: &Shared, budget_bytes: u64) -> Result<bool, StoreError> {
        let calm = {
            let mut inner = self.inner.lock();
            inner.calm_rounds = inner.calm_rounds.saturating_add(1);
            inner.calm_rounds > CALM_ROUNDS
        };
        self.delete_idle(shared, if calm { 0 } else { shared.cfg.idle_bytes_max }, Hurry::No)?;
        let mut left = budget_bytes;
        loop {
            let Some(mut job) = self.next_prewrite(shared, left)? else { return Ok(false) };
            let file = shared.files.segment(job.no)?;
            if let Err(e) = Self::prewrite(shared, &*file, &mut job, &mut left) {
                self.inner.lock().raw[job.class.index()].push(Raw::unwritten(job.no));
                return if matches!(e, StoreError::Full) { Ok(false) } else { Err(e) };
            }
            if job.left_bytes() > 0 {
                self.inner.lock().prewrite = Some(job);
                return Ok(true);
            }
            let header = SegmentHeader {
                kind: Kind::Pool,
                class: job.class,
                store: shared.store,
                image: ImageId::default(),
                generation: shared.generations.next(),
                ordinal: 0,
                prev_generation: 0,
                link: Head::default(),
            };
            header.write(job.no, &*file)?;
            file.sync().during(|| format!("syncing {}", file_name(job.no)))?;
            self.inner.lock().prepared[job.class.index()].push(job.no);
            if left == 0 {
                return Ok(true);
            }
        }
    }

    /// Goes on with a job until it is done or the budget is used.
    fn prewrite(
        shared: &Shared,
        file: &dyn DiskFile,
        job: &mut Prewrite,
        left: &mut u64,
    ) -> Result<(), StoreError> {
        let name = || format!("prewriting {}", file_name(job.no));
        let little = job.left_bytes() <= LITTLE_BYTES;
        let zeros = vec![0u8; usize::try_from(PIECE_BYTES).unwrap_or(0)];
        while job.at_bytes < job.class.bytes() && (*left > 0 || little) {
            let n = PIECE_BYTES.min(job.class.bytes() - job.at_bytes);
            let piece = &zeros[..usize::try_from(n).unwrap_or(0)];
            file.write_at(piece, job.at_bytes).during(name)?;
            file.sync().during(name)?;
            job.at_bytes += n;
            *left = left.saturating_sub(n);
            shared.way.rest();
        }
        Ok(())
    }

    /// What to prewrite next; without a budget only what takes little.
    fn next_prewrite(&self, shared: &Shared, budget_bytes: u64) -> Result<Option<Prewrite>, StoreError> {
        let class = {
            let mut inner = self.inner.lock();
            if budget_bytes > 0
                && let Some(job) = inner.prewrite.take()
            {
                return Ok(Some(job));
            }
            let wants = |c: &Class| {
                *c != Class::SMALLEST
                    && inner.wanted[c.index()]
                    && inner.prepared[c.index()].len() < shared.cfg.pool_segments
            };
            let Some(class) = Class::ALL.into_iter().find(wants) else { return Ok(None) };
            let raw = &mut inner.raw[class.index()];
            let most = (0..raw.len()).max_by_key(|i| raw[*i].written_bytes);
            let job = |raw: Raw| Prewrite { no: raw.no, class, at_bytes: raw.written_bytes };
            match most {
                Some(i) if budget_bytes > 0 || job(raw[i]).left_bytes() <= LITTLE_BYTES => {
                    return Ok(Some(job(raw.swap_remove(i))));
                }
                _ if budget_bytes == 0 => return Ok(None),
                _ => class,
            }
        };
        // Room for twice as much must be left, else prewriting would fill the disk.
        if shared.check_space(3 * class.bytes(), Space::Data).is_err() {
            return Ok(None);
        }
        match self.create(shared, class, Space::Data) {
            Ok(spare) => Ok(Some(Prewrite { no: spare.no, class, at_bytes: 0 })),
            Err(StoreError::Full) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Whether somebody waits for the space.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hurry {
    Yes,
    No,
}

/// How many unused segments of a class are kept in any case.
fn kept(shared: &Shared, class: Class) -> usize {
    let least = if class.bytes() > FREED_BYTES { KEPT_BYTES / class.bytes() } else { 0 };
    (shared.cfg.pool_segments + RAW_MAX).max(usize::try_from(least).unwrap_or(0))
}

/// Deletes a segment's file. Without hurry it is made shorter step by step before: a file system may tell the
/// disk which of its blocks are free, and a flush waits for all that it is told.
fn delete(shared: &Shared, no: u32, hurry: Hurry) -> Result<(), StoreError> {
    let name = file_name(no);
    let what = || format!("removing {name}");
    if hurry == Hurry::No {
        let file = shared.files.segment(no)?;
        let mut len = file.len_bytes().during(what)?;
        while len > FREED_BYTES {
            len -= FREED_BYTES;
            file.set_len(len).during(what)?;
            shared.way.rest();
        }
    }
    shared.files.forget_segment(no);
    shared.disk.remove(&name).during(what)?;
    if hurry == Hurry::No {
        shared.way.rest();
    }
    Ok(())
}

/// Space held by a file, given up step by step when something that must not fail needs it.
#[derive(Default)]
pub(crate) struct Reserve {
    held_bytes: Mutex<u64>,
}

impl Reserve {
    /// Notes what a reserve from before holds.
    pub(crate) fn load(&self, shared: &Shared) -> Result<(), StoreError> {
        let what = || "opening the reserve".to_owned();
        if shared.disk.list("").during(what)?.iter().any(|n| n == RESERVE_NAME) {
            let file = shared.disk.open(RESERVE_NAME, false).during(what)?;
            *self.held_bytes.lock() = file.len_bytes().during(what)?;
        }
        Ok(())
    }
    /// Takes as much of the configured space as there is.
    pub(crate) fn refill(&self, shared: &Shared) -> Result<(), StoreError> {
        let want = shared.cfg.reserve_bytes;
        let mut held = self.held_bytes.lock();
        if *held >= want || shared.disk.free_bytes().unwrap_or(0) < 2 * want {
            return Ok(());
        }
        let file = shared.disk.open(RESERVE_NAME, true).during(|| "opening the reserve".into())?;
        match file.allocate(want).during(|| "allocating the reserve".into()) {
            Ok(()) => *held = want,
            Err(StoreError::Full) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }
    /// Gives a quarter of it up; false when there is nothing left.
    pub(crate) fn release(&self, shared: &Shared) -> Result<bool, StoreError> {
        let mut held = self.held_bytes.lock();
        if *held == 0 {
            return Ok(false);
        }
        let step = (shared.cfg.reserve_bytes / 4).max(PAGE_U64);
        *held = held.saturating_sub(step);
        let file = shared.disk.open(RESERVE_NAME, true).during(|| "opening the reserve".into())?;
        file.set_len(*held).during(|| "releasing the reserve".into())?;
        Ok(true)
    }
}
