//! Header pages: a linked list of page pairs inside a segment whose bodies, one after the other,
//! are a stream of records. A partial page goes alternately to the two pages of its pair, so that
//! the last durable copy is never overwritten.

use crate::segment::{PAGE, PAGE_U64};

const MAGIC: u32 = u32::from_le_bytes(*b"VMHP");
const VERSION: u16 = 1;
/// Fixed part of a header page.
const FIXED: usize = 64;
/// Bytes of records in one header page.
pub(crate) const BODY: usize = PAGE - FIXED;
/// "No record starts in this page."
const NONE: u16 = u16::MAX;

/// A page of another format version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OtherVersion {
    pub(crate) found: u32,
    pub(crate) known: u32,
}

/// Where a record begins, for searches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    /// Offset in the body.
    pub(crate) offset: u16,
    /// Number of the record: the update's seq, or a count in a shadow segment.
    pub(crate) seq: u64,
    /// First payload page of the record, or where it would be.
    pub(crate) payload_page: u16,
}

/// One header page in memory.
#[derive(Debug, Clone)]
pub(crate) struct HeaderPage {
    /// First page of its pair.
    pub(crate) page: u16,
    /// Which pair of the segment it is.
    pub(crate) index: u16,
    /// Grows with every version written; 0 = never written.
    pub(crate) write_no: u32,
    /// First page of the next pair; 0 = none.
    pub(crate) next: u16,
    /// The first record that starts here.
    pub(crate) first: Option<Start>,
    /// Highest update known to be durable when the page was written.
    pub(crate) synced_seq: u64,
    used: u16,
    bytes: Box<[u8; PAGE]>,
}

impl HeaderPage {
    pub(crate) fn new(page: u16, index: u16) -> Self {
        Self {
            page,
            index,
            write_no: 0,
            next: 0,
            first: None,
            synced_seq: 0,
            used: 0,
            bytes: Box::new([0; PAGE]),
        }
    }
    pub(crate) const fn used(&self) -> usize {
        self.used as usize
    }
    pub(crate) fn body(&self) -> &[u8] {
        &self.bytes[FIXED..FIXED + self.used()]
    }
    /// Takes as much of `bytes` as fits; returns how much.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(BODY - self.used());
        let at = FIXED + self.used();
        self.bytes[at..at + n].copy_from_slice(&bytes[..n]);
        self.used += u16::try_from(n).expect("invariant: a page body is below 64 KiB");
        n
    }
    /// The page as written, for `generation`.
    pub(crate) fn finish(&mut self, generation: u64, synced_seq: u64) -> &[u8; PAGE] {
        self.synced_seq = synced_seq;
        let first = self.first.unwrap_or(Start { offset: NONE, seq: 0, payload_page: 0 });
        let b = &mut self.bytes;
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4..6].copy_from_slice(&VERSION.to_le_bytes());
        b[6..8].copy_from_slice(&self.index.to_le_bytes());
        b[8..16].copy_from_slice(&generation.to_le_bytes());
        b[16..20].copy_from_slice(&self.write_no.to_le_bytes());
        b[20..22].copy_from_slice(&self.used.to_le_bytes());
        b[22..24].copy_from_slice(&self.next.to_le_bytes());
        b[24..26].copy_from_slice(&first.offset.to_le_bytes());
        b[26..28].copy_from_slice(&first.payload_page.to_le_bytes());
        b[28..32].fill(0);
        b[32..40].copy_from_slice(&first.seq.to_le_bytes());
        b[40..48].copy_from_slice(&synced_seq.to_le_bytes());
        b[48..50].copy_from_slice(&self.page.to_le_bytes());
        b[50..60].fill(0);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&b[..60]), &b[FIXED..]);
        b[60..64].copy_from_slice(&crc.to_le_bytes());
        b
    }
    /// Offset in the file of the copy that the present version goes to.
    pub(crate) const fn slot_offset(&self) -> u64 {
        (self.page as u64 + (self.write_no & 1) as u64) * PAGE_U64
    }
    /// Offset in the file of the other copy.
    pub(crate) const fn other_slot_offset(&self) -> u64 {
        (self.page as u64 + (1 - (self.write_no & 1)) as u64) * PAGE_U64
    }
    /// The newer valid one of the two copies in `pair`.
    ///
    /// # Errors
    /// The version of a whole copy that this release does not read.
    pub(crate) fn parse_pair(
        pair: &[u8],
        page: u16,
        index: u16,
        generation: u64,
    ) -> Result<Option<Self>, OtherVersion> {
        let (a, b) = pair.split_at(PAGE);
        let (a, b) = (Self::parse(a, page, index, generation)?, Self::parse(b, page, index, generation)?);
        Ok([a, b].into_iter().flatten().max_by_key(|p| p.write_no))
    }
    /// One copy; `None` when it is damaged or something else.
    pub(crate) fn parse(
        b: &[u8],
        page: u16,
        index: u16,
        generation: u64,
    ) -> Result<Option<Self>, OtherVersion> {
        let u16_at = |o: usize| u16::from_le_bytes([b[o], b[o + 1]]);
        let u32_at = |o: usize| u32::from_le_bytes([b[o], b[o + 1], b[o + 2], b[o + 3]]);
        let u64_at = |o: usize| u64::from(u32_at(o)) | u64::from(u32_at(o + 4)) << 32;
        if u32_at(0) != MAGIC || u16_at(6) != index || u16_at(48) != page {
            return Ok(None);
        }
        if u64_at(8) != generation || usize::from(u16_at(20)) > BODY {
            return Ok(None);
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&b[..60]), &b[FIXED..PAGE]);
        if crc != u32_at(60) {
            return Ok(None);
        }
        if u16_at(4) != VERSION {
            return Err(OtherVersion { found: u16_at(4).into(), known: VERSION.into() });
        }
        let mut bytes = Box::new([0; PAGE]);
        bytes.copy_from_slice(b);
        let offset = u16_at(24);
        let first = Start { offset, seq: u64_at(32), payload_page: u16_at(26) };
        Ok(Some(Self {
            page,
            index,
            write_no: u32_at(16),
            next: u16_at(22),
            first: (offset != NONE).then_some(first),
            synced_seq: u64_at(40),
            used: u16_at(20),
            bytes,
        }))
    }
    /// True when the page is surely meant to be a header page of this segment, whole or not.
    pub(crate) fn is_meant(b: &[u8], generation: u64) -> bool {
        b[..4] == MAGIC.to_le_bytes() && b[8..16] == generation.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(write_no: u32, fill: u8) -> HeaderPage {
        let mut p = HeaderPage::new(6, 2);
        assert_eq!(p.push(&[fill; 100]), 100);
        p.first = Some(Start { offset: 10, seq: 77, payload_page: 9 });
        p.next = 30;
        p.write_no = write_no;
        p
    }

    #[test]
    fn the_newer_whole_copy_of_its_own_generation_counts() {
        let old = *page(4, 1).finish(8, 70);
        let new = *page(5, 2).finish(8, 71);
        let read = |a: &[u8], b: &[u8]| HeaderPage::parse_pair(&[a, b].concat(), 6, 2, 8).unwrap();
        let got = read(&old, &new).expect("two whole copies");
        assert_eq!((got.write_no, got.synced_seq, got.next, got.used()), (5, 71, 30, 100));
        assert_eq!(got.first, page(5, 2).first);
        assert_eq!(got.body(), [2; 100]);
        for at in [0, 5, 7, 9, 17, 21, 49, 61, 64, 4095] {
            let mut torn = new;
            torn[at] ^= 0x10;
            assert_eq!(read(&old, &torn).expect("the other copy").write_no, 4, "byte {at}");
        }
        for (page, index, generation) in [(6, 2, 9), (8, 2, 8), (6, 3, 8)] {
            let got = HeaderPage::parse_pair(&[old, new].concat(), page, index, generation);
            assert!(got.unwrap().is_none());
        }
    }

    #[test]
    fn a_partial_page_goes_to_the_other_copy_each_time() {
        let (a, b) = (page(4, 1), page(5, 1));
        assert_ne!(a.slot_offset(), b.slot_offset());
        assert_eq!(a.other_slot_offset(), b.slot_offset());
    }
}
