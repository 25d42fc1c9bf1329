//! The two copies of a segment's header and of its header pages.

use std::sync::atomic::Ordering;

use crate::error::{IoContext as _, StoreError};
use crate::image::ImageStore;
use crate::page::HeaderPage;
use crate::records::other_version;
use crate::segment::{FIRST_PAGE, PAGE, PAGE_U64, Segment, SegmentHeader, file_name};

impl ImageStore {
    /// Looks at both copies of a segment's header. Returns the bytes read.
    pub(super) fn scrub_segment_header(&self, seg: &Segment) -> Result<u64, StoreError> {
        let file = self.shared.files.segment_apart(seg.no)?;
        let name = || file_name(seg.no);
        let mut pages = vec![0u8; 2 * PAGE];
        file.read_at(&mut pages, 0).during(|| format!("reading {}", name()))?;
        // Another version is an error as when the store is opened.
        SegmentHeader::read(seg.no, &*file)?;
        let whole = |page: &[u8]| {
            SegmentHeader::decode(page).ok().flatten().is_some_and(|h| h.generation == seg.generation)
        };
        let (a, b) = pages.split_at(PAGE);
        let (good, at) = match (whole(a), whole(b)) {
            (true, true) => return Ok(2 * PAGE_U64),
            (true, false) => (a, PAGE_U64),
            (false, true) => (b, 0),
            (false, false) => {
                self.shared.rot.found(Some(self.id), &format!("header of {}", name()));
                return Ok(2 * PAGE_U64);
            }
        };
        let what = format!("page {} of {}", at / PAGE_U64, name());
        self.shared.rot.found(Some(self.id), &what);
        file.write_at(good, at).during(|| format!("repairing {}", name()))?;
        file.sync().during(|| format!("repairing {}", name()))?;
        self.shared.rot.repaired(Some(self.id), &what, "from its second copy");
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
    /// Returns the bytes read.
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
        let unpaired = seg.unpaired.load(Ordering::Relaxed);
        let (mut read, mut written) = (0, Vec::new());
        let (mut page, mut index) = (u16::try_from(FIRST_PAGE).expect("invariant: a small constant"), 0u16);
        while u32::from(page) + 2 <= seg.class.pages() && !unfinished.contains(&page) {
            let mut pair = vec![0u8; 2 * PAGE];
            file.read_at(&mut pair, u64::from(page) * PAGE_U64)
                .during(|| format!("reading {}", file_name(seg.no)))?;
            read += 2 * PAGE_U64;
            let (a, b) = pair.split_at(PAGE);
            let parse = |raw: &[u8]| {
                HeaderPage::parse(raw, page, index, seg.generation).map_err(|v| other_version(seg, page, v))
            };
            let (first, second) = (parse(a)?, parse(b)?);
            let newer = match (&first, &second) {
                (Some(x), Some(y)) => usize::from(y.write_no > x.write_no),
                (Some(_), None) => 0,
                (None, Some(_)) => 1,
                (None, None) => {
                    let meant = [a, b].iter().any(|raw| HeaderPage::is_meant(raw, seg.generation));
                    // A segment may have been begun and a page linked without anything coming into it.
                    if meant || (index > 0 && !unpaired) {
                        let what = format!("both copies of page {page} of {}", file_name(seg.no));
                        self.shared.rot.found(Some(self.id), &what);
                    }
                    break;
                }
            };
            let same = first.as_ref().zip(second.as_ref()).is_some_and(|(x, y)| x.write_no == y.write_no);
            let (good, other) = if newer == 0 { (a, b) } else { (b, a) };
            if !same {
                let damaged = if newer == 0 { second.is_none() } else { first.is_none() };
                let at = u64::from(page) + 1 - newer as u64;
                let what = format!("page {at} of {}", file_name(seg.no));
                let known = damaged && (!unpaired || HeaderPage::is_meant(other, seg.generation));
                if known {
                    self.shared.rot.found(Some(self.id), &what);
                }
                file.write_at(good, at * PAGE_U64).during(|| format!("repairing {}", file_name(seg.no)))?;
                written.push((what, known));
            }
            let next = if newer == 0 { &first } else { &second }.as_ref().map_or(0, |p| p.next);
            if next <= page {
                break;
            }
            (page, index) = (next, index + 1);
        }
        if !written.is_empty() {
            file.sync().during(|| format!("repairing {}", file_name(seg.no)))?;
        }
        for (what, _) in written.iter().filter(|(_, known)| *known) {
            self.shared.rot.repaired(Some(self.id), what, "from its second copy");
        }
        if unfinished.is_empty() {
            seg.unpaired.store(false, Ordering::Relaxed);
        }
        Ok(read)
    }
}
