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

/// Unused segments of one class kept beyond the prewritten ones; more are deleted.
const RAW_MAX: usize = 2;
/// Smallest-class allocations go in steps of this many pages.
const ALLOC_STEP_PAGES: u32 = 8;
/// Written at a time when prewriting.
const PREWRITE_BYTES: u64 = 1 << 20;
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

#[derive(Default)]
struct Inner {
    prepared: [Vec<u32>; Class::COUNT],
    raw: [Vec<u32>; Class::COUNT],
    next_no: u32,
    wanted: [bool; Class::COUNT],
    prewrite: Option<Prewrite>,
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
            let list = if prepared { &mut inner.prepared } else { &mut inner.raw };
            list[class.index()].push(no);
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
            match inner.prepared[class.index()].pop() {
                Some(no) => (no, true),
                None => match inner.raw[class.index()].pop() {
                    Some(no) => (no, false),
                    None => return Ok(None),
                },
            }
        };
        self.open(shared, no, class, prepared).map(Some)
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
        let raw = self.inner.lock().raw[class.index()].pop();
        if let Some(no) = raw {
            return self.open(shared, no, class, false);
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
        if class != Class::SMALLEST {
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
        self.give_back_no(shared, seg.no, seg.class, prepared)
    }

    /// Takes back a segment that was taken and not used.
    pub(crate) fn give_back_no(
        &self,
        shared: &Shared,
        no: u32,
        class: Class,
        prepared: bool,
    ) -> Result<(), StoreError> {
        {
            let mut inner = self.inner.lock();
            let at = class.index();
            let keep = shared.cfg.pool_segments + RAW_MAX;
            if inner.prepared[at].len() + inner.raw[at].len() < keep {
                let list = if prepared { &mut inner.prepared[at] } else { &mut inner.raw[at] };
                list.push(no);
                return Ok(());
            }
        }
        shared.files.forget_segment(no);
        shared.disk.remove(&file_name(no)).during(|| format!("removing {}", file_name(no)))
    }

    /// Prewrites segments of the classes in use, about `budget_bytes` of them. True when there is
    /// more to do.
    pub(crate) fn background(&self, shared: &Shared, budget_bytes: u64) -> Result<bool, StoreError> {
        let mut left = budget_bytes;
        loop {
            let Some(mut job) = self.next_prewrite(shared)? else { return Ok(false) };
            let end = job.class.bytes();
            let file = shared.files.segment(job.no)?;
            while job.at_bytes < end && left > 0 {
                let n = PREWRITE_BYTES.min(end - job.at_bytes);
                let zeros = vec![0u8; usize::try_from(n).unwrap_or(0)];
                let name = || format!("prewriting {}", file_name(job.no));
                let written = file.write_at(&zeros, job.at_bytes).during(name);
                if let Err(e) = written {
                    self.inner.lock().raw[job.class.index()].push(job.no);
                    return if matches!(e, StoreError::Full) { Ok(false) } else { Err(e) };
                }
                job.at_bytes += n;
                left = left.saturating_sub(n);
            }
            if job.at_bytes < end {
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

    fn next_prewrite(&self, shared: &Shared) -> Result<Option<Prewrite>, StoreError> {
        let class = {
            let mut inner = self.inner.lock();
            if let Some(job) = inner.prewrite.take() {
                return Ok(Some(job));
            }
            let wants = |c: &Class| {
                *c != Class::SMALLEST
                    && inner.wanted[c.index()]
                    && inner.prepared[c.index()].len() < shared.cfg.pool_segments
            };
            let Some(class) = Class::ALL.into_iter().find(wants) else { return Ok(None) };
            if let Some(no) = inner.raw[class.index()].pop() {
                return Ok(Some(Prewrite { no, class, at_bytes: 0 }));
            }
            class
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
