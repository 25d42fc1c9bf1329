//! The two copies of a segment's header and of its header pages.

use vmfs_common::ImageId;

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::image::ImageStore;
use crate::page::HeaderPage;
use crate::records::other_version;
use crate::segment::{FIRST_PAGE, PAGE, PAGE_U64, Segment, SegmentHeader, file_name};
use crate::shared::Shared;
use crate::writer::LogPos;

impl ImageStore {
    /// Looks at both copies of a segment's header. Returns the bytes read.
    pub(super) fn scrub_segment_header(&self, seg: &Segment) -> Result<u64, StoreError> {
        let file = self.shared.files.segment_apart(seg.no)?;
        match header_copies(seg, &*file)? {
            HeaderCopies::Whole => {}
            HeaderCopies::Lone(copy) => {
                let what = copy.name(seg);
                self.shared.rot.found(Some(self.id), &what);
                complete(seg, &*file, &[copy])?;
                self.shared.rot.repaired(Some(self.id), &what, "from its second copy");
            }
            HeaderCopies::Lost => {
                self.shared.rot.found(Some(self.id), &format!("header of {}", file_name(seg.no)));
            }
        }
        Ok(2 * PAGE_U64)
    }

    /// Looks at both copies of the partial page that an idle image's log ends with. While it is written to,
    /// the copies differ as they must.
    fn scrub_open_page(&self, seg: &Segment) -> Result<(), StoreError> {
        let alone = self.exclude_syncs();
        let mut tail = self.tail.lock();
        let mended = match tail.writers().find(|w| w.seg.generation == seg.generation) {
            Some(writer) => writer.mend_partial_page()?,
            None => None,
        };
        drop((tail, alone));
        if let Some(page) = mended {
            let what = format!("page {page} of {}", file_name(seg.no));
            self.shared.rot.found_and_repaired(Some(self.id), &what, "from memory");
        }
        Ok(())
    }

    /// Looks at both copies of every header page of a segment, except those that are still to be written.
    /// Returns the bytes read. Where both are damaged, what was in them is missed later.
    pub(super) fn scrub_header_pages(&self, seg: &Segment) -> Result<u64, StoreError> {
        let unfinished = {
            let mut tail = self.tail.lock();
            let writer = tail.writers().find(|w| w.seg.generation == seg.generation);
            writer.map_or_else(Vec::new, |w| w.unfinished_pages())
        };
        if !unfinished.is_empty() {
            self.scrub_open_page(seg)?;
        }
        let file = self.shared.files.segment_apart(seg.no)?;
        let (pairs, copies) =
            lone_copies(seg, &*file, first_page(), false, |page| unfinished.contains(&page))?;
        let damaged = || copies.iter().filter(|c| c.damaged).map(|c| c.name(seg));
        for what in damaged() {
            self.shared.rot.found(Some(self.id), &what);
        }
        complete(seg, &*file, &copies)?;
        for what in damaged() {
            self.shared.rot.repaired(Some(self.id), &what, "from its second copy");
        }
        Ok(pairs * 2 * PAGE_U64)
    }
}

/// The two copies of a segment's header.
enum HeaderCopies {
    Whole,
    Lone(LoneCopy),
    Lost,
}

fn header_copies(seg: &Segment, file: &dyn DiskFile) -> Result<HeaderCopies, StoreError> {
    let mut pages = vec![0u8; 2 * PAGE];
    file.read_at(&mut pages, 0).during(|| format!("reading {}", file_name(seg.no)))?;
    // Another version is an error as when the store is opened.
    SegmentHeader::read(seg.no, file)?;
    let whole = |page: &[u8]| {
        SegmentHeader::decode(page).ok().flatten().is_some_and(|h| h.generation == seg.generation)
    };
    let (a, b) = pages.split_at(PAGE);
    let lone = |good: &[u8], other: &[u8], at| {
        let meant = SegmentHeader::is_meant(other);
        HeaderCopies::Lone(LoneCopy { at, damaged: true, meant, doubted: false, good: good.to_vec() })
    };
    Ok(match (whole(a), whole(b)) {
        (true, true) => HeaderCopies::Whole,
        (true, false) => lone(a, b, 1),
        (false, true) => lone(b, a, 0),
        (false, false) => HeaderCopies::Lost,
    })
}

/// Where the header pages of a segment begin: page and index.
fn first_page() -> (u16, u16) {
    (u16::try_from(FIRST_PAGE).expect("invariant: a small constant"), 0)
}

/// A page that is to be written from the good one of its two copies.
struct LoneCopy {
    at: u64,
    /// It does not hold an older version, either.
    damaged: bool,
    /// And it is surely meant to hold one: it was damaged, or torn by a power cut, and not just never written.
    meant: bool,
    /// It is the good copy itself, which may be in the page cache alone.
    doubted: bool,
    good: Vec<u8>,
}

impl LoneCopy {
    fn name(&self, seg: &Segment) -> String {
        format!("page {} of {}", self.at, file_name(seg.no))
    }
}

/// Reads the pairs of header pages that lead from one (page and index) to the next, until there is none or `stop`
/// says so. Returns how many were read, and the copies that differ; with `all`, both of every page.
fn lone_copies(
    seg: &Segment,
    file: &dyn DiskFile,
    (mut page, mut index): (u16, u16),
    all: bool,
    stop: impl Fn(u16) -> bool,
) -> Result<(u64, Vec<LoneCopy>), StoreError> {
    let (mut pairs, mut copies) = (0, Vec::new());
    while u32::from(page) + 2 <= seg.class.pages() && !stop(page) {
        let mut pair = vec![0u8; 2 * PAGE];
        file.read_at(&mut pair, u64::from(page) * PAGE_U64)
            .during(|| format!("reading {}", file_name(seg.no)))?;
        pairs += 1;
        let (a, b) = pair.split_at(PAGE);
        let parse = |raw: &[u8]| {
            HeaderPage::parse(raw, page, index, seg.generation).map_err(|v| other_version(seg, page, v))
        };
        let (first, second) = (parse(a)?, parse(b)?);
        let write_no = |p: &Option<HeaderPage>| p.as_ref().map(|p| p.write_no);
        let second_is_newer = write_no(&second) > write_no(&first);
        let (good, newer, older) = if second_is_newer { (b, second, first) } else { (a, first, second) };
        let Some(newer) = newer else { break };
        let at = |second: bool| u64::from(page) + u64::from(second);
        let good = good.to_vec();
        if all {
            let at = at(second_is_newer);
            copies.push(LoneCopy { at, damaged: false, meant: false, doubted: true, good: good.clone() });
        }
        if all || older.as_ref().is_none_or(|o| o.write_no != newer.write_no) {
            let other = if second_is_newer { a } else { b };
            let damaged = older.is_none();
            let meant = damaged && HeaderPage::is_meant(other, seg.generation);
            copies.push(LoneCopy { at: at(!second_is_newer), damaged, meant, doubted: false, good });
        }
        if newer.next <= page {
            break;
        }
        (page, index) = (newer.next, index + 1);
    }
    Ok((pairs, copies))
}

/// Writes these copies. Durable on return. Never both of a page at once: a power cut could take the good copy, if it is in
/// the page cache alone, while the other one is torn. The good ones go first: what the disk has in their place is the
/// same, or an older version than in the other place.
fn complete(seg: &Segment, file: &dyn DiskFile, copies: &[LoneCopy]) -> Result<(), StoreError> {
    if copies.is_empty() {
        return Ok(());
    }
    let what = || format!("repairing {}", file_name(seg.no));
    for doubted in [true, false] {
        for copy in copies.iter().filter(|c| c.doubted == doubted) {
            file.write_at(&copy.good, copy.at * PAGE_U64).during(what)?;
        }
        file.sync().during(what)?;
    }
    Ok(())
}

/// Makes the second copies that the process before this one did not come to, or that were torn: from `pos` on, or
/// in the whole segment, its header too. After a failed sync (`marked`) what looks whole may be in the page cache alone:
/// writes everything again. What is damaged is reported: of a power cut, too, when that came in the middle of a page.
/// Durable on return.
pub(crate) fn complete_pairs(
    shared: &Shared,
    image: ImageId,
    seg: &Segment,
    pos: Option<LogPos>,
    marked: bool,
) -> Result<(), StoreError> {
    let file = shared.files.segment(seg.no)?;
    let from = pos.map_or_else(first_page, |p| (p.page, p.index));
    let (_, mut copies) = lone_copies(seg, &*file, from, marked, |_| false)?;
    if pos.is_none()
        && let HeaderCopies::Lone(copy) = header_copies(seg, &*file)?
    {
        copies.push(copy);
    }
    let meant = || copies.iter().filter(|c| c.meant).map(|c| c.name(seg));
    for what in meant() {
        shared.rot.found(Some(image), &what);
    }
    complete(seg, &*file, &copies)?;
    for what in meant() {
        shared.rot.repaired(Some(image), &what, "from its second copy");
    }
    Ok(())
}
