//! The checkpointed map: a radix tree of fan-out 512 in copy-on-write pages of the image's map file,
//! each page's checksum beside the reference to it.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmfs_common::ImageId;

use super::cache::MapPage;
use super::overlay::Overlay;
use super::{BLOCKS_MAX, Entry};
use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::segment::{PAGE, PAGE_U64};
use crate::shared::Shared;
use crate::way::PIECE_BYTES;

/// Entries of a map page.
pub(crate) const ENTRIES: usize = 512;
const BITS: u32 = 9;

/// A reference to a map page: its number and checksum; or a special for a subtree without data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRef(pub(crate) u64);

impl PageRef {
    pub(crate) const ABSENT: Self = Self(0);
    pub(crate) const ZERO: Self = Self(1);

    fn to(page: u32, crc: u32) -> Self {
        Self(u64::from(page) << 32 | u64::from(crc))
    }
    pub(crate) fn page(self) -> u32 {
        u32::try_from(self.0 >> 32).expect("invariant: 32 bits are left")
    }
    pub(crate) fn crc(self) -> u32 {
        u32::try_from(self.0 & 0xffff_ffff).expect("invariant: 32 bits are left")
    }
    /// The entry of every block below, when there is no page.
    pub(crate) fn special(self) -> Option<Entry> {
        match self {
            Self::ABSENT => Some(Entry::ABSENT),
            Self::ZERO => Some(Entry::ZERO),
            _ => None,
        }
    }
}

/// A page of a tree and what it covers: 512^height blocks from `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageAt {
    pub(crate) page: PageRef,
    pub(crate) height: u32,
    pub(crate) start: u64,
}

/// A checkpointed map.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) image: ImageId,
    pub(crate) root: PageRef,
    /// Levels of pages; a tree of height h covers 512^h blocks. Blocks beyond are absent.
    pub(crate) height: u32,
    /// Blocks with data.
    pub(crate) allocated: u64,
    /// Blocks with data by segment number.
    pub(crate) live: BTreeMap<u32, u32>,
}

fn span(height: u32) -> u64 {
    1u64.checked_shl(BITS * height).unwrap_or(u64::MAX)
}

impl Base {
    pub(crate) const fn empty(image: ImageId) -> Self {
        Self { image, root: PageRef::ABSENT, height: 1, allocated: 0, live: BTreeMap::new() }
    }
    fn load(&self, shared: &Shared, r: PageRef) -> Result<MapPage, StoreError> {
        load(shared, self.image, r)
    }
    /// The subtree of one leaf page that covers `at`.
    fn leaf_ref(&self, shared: &Shared, at: u64) -> Result<(PageRef, u32), StoreError> {
        if at >= span(self.height) {
            return Ok((PageRef::ABSENT, u32::MAX));
        }
        let (mut r, mut level) = (self.root, self.height);
        while level > 1 && r.special().is_none() {
            level -= 1;
            r = PageRef(self.load(shared, r)?[slot(level, at)]);
        }
        Ok((r, level))
    }
    /// Fills in what is still [`Entry::UNSET`] in `out`.
    pub(crate) fn fill(&self, shared: &Shared, start: u64, out: &mut [Entry]) -> Result<(), StoreError> {
        let mut done = 0;
        while done < out.len() {
            let at = start + done as u64;
            let first = slot(0, at);
            let n = (ENTRIES - first).min(out.len() - done);
            let piece = &mut out[done..done + n];
            done += n;
            if piece.iter().all(|e| *e != Entry::UNSET) {
                continue;
            }
            let (r, _) = self.leaf_ref(shared, at)?;
            let unset = piece.iter_mut().enumerate().filter(|(_, e)| **e == Entry::UNSET);
            if let Some(e) = r.special() {
                unset.for_each(|(_, o)| *o = e);
            } else {
                let page = self.load(shared, r)?;
                unset.for_each(|(i, o)| *o = Entry(page[first + i]));
            }
        }
        Ok(())
    }
    /// As [`Overlay::uniform`].
    pub(crate) fn uniform(&self, shared: &Shared, at: u64) -> Result<(Option<Entry>, u64), StoreError> {
        if at >= span(self.height) {
            return Ok((Some(Entry::ABSENT), u64::MAX - at));
        }
        let (r, level) = self.leaf_ref(shared, at)?;
        Ok((r.special(), span(level) - at % span(level)))
    }
    /// Calls `f` with the number of every page of the tree, reading inner pages only.
    pub(crate) fn for_each_page(&self, shared: &Shared, f: &mut impl FnMut(u32)) -> Result<(), StoreError> {
        self.for_each_ref(shared, &mut |at| f(at.page.page()))
    }
    /// Calls `f` with every page of the tree, above its children, reading inner pages only.
    pub(crate) fn for_each_ref(&self, shared: &Shared, f: &mut impl FnMut(PageAt)) -> Result<(), StoreError> {
        self.walk(shared, PageAt { page: self.root, height: self.height, start: 0 }, f)
    }
    fn walk(&self, shared: &Shared, at: PageAt, f: &mut impl FnMut(PageAt)) -> Result<(), StoreError> {
        if at.page.special().is_some() {
            return Ok(());
        }
        f(at);
        if at.height > 1 {
            let (page, height) = (self.load(shared, at.page)?, at.height - 1);
            for (child, i) in page.iter().zip(0u64..) {
                let start = at.start + i * span(height);
                self.walk(shared, PageAt { page: PageRef(*child), height, start }, f)?;
            }
        }
        Ok(())
    }
}

/// Which word of a page at `level` (0 = leaf entries) block `at` is in.
fn slot(level: u32, at: u64) -> usize {
    usize::try_from(at >> (BITS * level) & (ENTRIES as u64 - 1)).expect("invariant: below 512")
}

fn load(shared: &Shared, image: ImageId, r: PageRef) -> Result<MapPage, StoreError> {
    if let Some(page) = shared.pages.get(image, r.page()) {
        return Ok(page);
    }
    let bytes = match read_page(shared, image, r)? {
        Some(bytes) => bytes,
        None => from_copy(shared, image, r)?,
    };
    let page = words_of(&bytes);
    shared.pages.put(image, r.page(), Arc::clone(&page));
    Ok(page)
}

/// A page's name in messages.
pub(crate) fn page_name(page: u32) -> String {
    format!("page {page} of the map")
}

/// The page as it is in the map file; `None` when it is damaged there.
pub(crate) fn read_page(
    shared: &Shared,
    image: ImageId,
    r: PageRef,
) -> Result<Option<[u8; PAGE]>, StoreError> {
    let file = shared.files.map(image)?;
    read_from(&*file, image, r)
}

fn read_from(file: &dyn DiskFile, image: ImageId, r: PageRef) -> Result<Option<[u8; PAGE]>, StoreError> {
    let mut bytes = [0u8; PAGE];
    let what = || format!("reading {} of image {image}", page_name(r.page()));
    file.read_at(&mut bytes, u64::from(r.page()) * PAGE_U64).during(what)?;
    Ok((crc32c::crc32c(&bytes) == r.crc()).then_some(bytes))
}

/// The page as it is in the file of second copies; `None` when it is not there.
pub(crate) fn read_copy(
    shared: &Shared,
    image: ImageId,
    r: PageRef,
) -> Result<Option<[u8; PAGE]>, StoreError> {
    let file = shared.files.map_copy(image)?;
    read_from(&*file, image, r)
}

/// A damaged page's second copy, which is put back in its place.
fn from_copy(shared: &Shared, image: ImageId, r: PageRef) -> Result<[u8; PAGE], StoreError> {
    let what = page_name(r.page());
    shared.rot.found(Some(image), &what);
    let Some(bytes) = read_copy(shared, image, r)? else {
        return Err(StoreError::BadMapPage { image, page: r.page() });
    };
    put_back(shared, image, r, &bytes)?;
    shared.rot.repaired(Some(image), &what, "from its second copy");
    Ok(bytes)
}

/// Writes a page's right bytes over the damaged ones. Durable on return. The caller holds a map that
/// refers to the page, so that it is not given to anybody else meanwhile.
pub(crate) fn put_back(
    shared: &Shared,
    image: ImageId,
    r: PageRef,
    bytes: &[u8; PAGE],
) -> Result<(), StoreError> {
    assert_eq!(crc32c::crc32c(bytes), r.crc(), "invariant: only a page's own bytes are put back");
    let file = shared.files.map_apart(image)?;
    let what = || format!("repairing {} of image {image}", page_name(r.page()));
    file.write_at(bytes, u64::from(r.page()) * PAGE_U64).during(what)?;
    file.sync().during(what)?;
    shared.pages.put(image, r.page(), words_of(bytes));
    Ok(())
}

fn words_of(bytes: &[u8; PAGE]) -> MapPage {
    let mut words = [0u64; ENTRIES];
    for (w, b) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *w = u64::from_le_bytes(b.try_into().expect("invariant: chunks of eight"));
    }
    Arc::new(words)
}

/// As they are on the disk.
pub(crate) fn bytes_of(words: &[u64; ENTRIES]) -> [u8; PAGE] {
    let mut bytes = [0u8; PAGE];
    for (b, w) in bytes.chunks_exact_mut(8).zip(words) {
        b.copy_from_slice(&w.to_le_bytes());
    }
    bytes
}

/// Pages of a map file that may be overwritten.
pub(crate) struct FreePages {
    used: Vec<u64>,
    next: u32,
}

impl FreePages {
    /// With `used` pages taken; the first two are the superblocks.
    pub(crate) fn new() -> Self {
        Self { used: vec![0b11], next: 2 }
    }
    pub(crate) fn mark(&mut self, page: u32) {
        let at = page as usize / 64;
        if at >= self.used.len() {
            self.used.resize(at + 1, 0);
        }
        self.used[at] |= 1 << (page % 64);
    }
    /// Takes the first `pages` pages of the file for used.
    pub(crate) fn mark_below(&mut self, pages: u64) {
        (0..u32::try_from(pages).unwrap_or(u32::MAX)).for_each(|page| self.mark(page));
    }
    /// Takes the lowest free page.
    pub(crate) fn take(&mut self) -> u32 {
        let mut page = self.next;
        while let Some(word) = self.used.get(page as usize / 64) {
            if word & 1 << (page % 64) == 0 {
                break;
            }
            page = if word.trailing_ones() == 64 { (page / 64 + 1) * 64 } else { page + 1 };
        }
        self.mark(page);
        self.next = page + 1;
        page
    }
}

/// Makes a new map from an old one and an overlay, writing the pages that change.
pub(crate) struct Merge<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) file: &'a dyn DiskFile,
    pub(crate) free: &'a mut FreePages,
    pub(crate) image: ImageId,
    /// Syncs the file.
    pub(crate) sync: &'a dyn Fn() -> Result<(), StoreError>,
    /// Bytes written since it was last synced.
    pub(crate) unsynced: u64,
}

#[derive(Default)]
struct Delta {
    allocated: i64,
    live: BTreeMap<u32, i64>,
}

impl Delta {
    fn count(&mut self, entry: Entry, by: i64) {
        if entry.is_data() {
            self.allocated += by;
            *self.live.entry(entry.segment_no()).or_default() += by;
        }
    }
}

impl Merge<'_> {
    /// The merged map. Its pages are written, and not all of them synced.
    ///
    /// # Errors
    /// The disk's. Pages written so far are garbage.
    pub(crate) fn run(&mut self, base: &Base, overlay: &Overlay) -> Result<Base, StoreError> {
        let (mut root, mut height) = (base.root, base.height);
        while Self::beyond_matters(overlay, height) {
            if root != PageRef::ABSENT {
                let mut words = [0u64; ENTRIES];
                words[0] = root.0;
                root = self.write(&words, height + 1)?;
            }
            height += 1;
        }
        let mut delta = Delta::default();
        let root = self.node(base, root, height, 0, overlay, &mut delta)?;
        let mut live = base.live.clone();
        for (no, d) in delta.live {
            let n = live.entry(no).or_default();
            let count = i64::from(*n) + d;
            *n = u32::try_from(count).map_err(|_| StoreError::corrupt("a count of live blocks"))?;
            if *n == 0 {
                live.remove(&no);
            }
        }
        let allocated = base.allocated.checked_add_signed(delta.allocated);
        let allocated = allocated.ok_or_else(|| StoreError::corrupt("a count of blocks"))?;
        Ok(Base { image: self.image, root, height, allocated, live })
    }
    /// True when the overlay has anything but absent blocks beyond a tree of `height`.
    fn beyond_matters(overlay: &Overlay, height: u32) -> bool {
        let mut at = span(height);
        while at < BLOCKS_MAX {
            match overlay.uniform(at) {
                (Some(Entry::UNSET | Entry::ABSENT), len) => at = at.saturating_add(len),
                _ => return true,
            }
        }
        false
    }
    fn write(&mut self, words: &[u64; ENTRIES], height: u32) -> Result<PageRef, StoreError> {
        let bytes = bytes_of(words);
        let page = self.free.take();
        let image = self.image;
        let at = u64::from(page) * PAGE_U64;
        self.shared.with_reserve(crate::image::Space::Control, || {
            self.file.write_at(&bytes, at).during(|| format!("writing the map of image {image}"))
        })?;
        if height > 1 {
            // Few, and much hangs on each. A leaf gets its second copy from the scrub, and until then can
            // be made again from the log.
            let copy = self.shared.files.map_copy(image)?;
            self.shared.with_reserve(crate::image::Space::Control, || {
                copy.write_at(&bytes, at).during(|| format!("writing the map of image {image}"))
            })?;
        }
        self.shared.pages.put(image, page, Arc::new(*words));
        self.unsynced += PAGE_U64;
        if self.unsynced >= PIECE_BYTES && self.shared.way.is_busy() {
            (self.sync)()?;
            self.unsynced = 0;
            self.shared.way.rest();
        }
        Ok(PageRef::to(page, crc32c::crc32c(&bytes)))
    }
    fn node(
        &mut self,
        base: &Base,
        old: PageRef,
        height: u32,
        start: u64,
        overlay: &Overlay,
        delta: &mut Delta,
    ) -> Result<PageRef, StoreError> {
        let range = start..start + span(height);
        if !overlay.touches(&range) {
            return Ok(old);
        }
        if let (Some(e), len) = overlay.uniform(start)
            && len >= span(height)
            && let Some(old) = old.special()
        {
            debug_assert!(!old.is_data());
            return Ok(PageRef(e.0));
        }
        let mut words = match old.special() {
            Some(e) => [e.0; ENTRIES],
            None => *base.load(self.shared, old)?,
        };
        let before = words;
        if height == 1 {
            let mut entries = [Entry::UNSET; ENTRIES];
            overlay.fill(start, &mut entries);
            for (w, e) in words.iter_mut().zip(entries).filter(|(_, e)| *e != Entry::UNSET) {
                delta.count(Entry(*w), -1);
                delta.count(e, 1);
                *w = e.0;
            }
        } else {
            let step = span(height - 1);
            for (i, w) in words.iter_mut().enumerate() {
                *w = self.node(base, PageRef(*w), height - 1, start + i as u64 * step, overlay, delta)?.0;
            }
        }
        if words == before && old.special().is_none() {
            return Ok(old);
        }
        if words[0] <= 1 && words.iter().all(|w| *w == words[0]) {
            return Ok(PageRef(words[0]));
        }
        self.write(&words, height)
    }
}
