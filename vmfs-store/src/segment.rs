//! Segment files: size classes, names, headers. A segment's pages 0 and 1 are two copies of its
//! header; what follows is described in [`crate::page`] and [`crate::writer`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use parking_lot::Mutex;
use vmfs_common::codec::{CodecError, Reader, Writer};
use vmfs_common::election::{decode_head, encode_head};
use vmfs_common::{Head, ImageId, StoreId};

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::files::Files;
use crate::held::Held;
use crate::writer::Live;

/// Bytes of a page, the unit of everything in a segment.
pub(crate) const PAGE: usize = 4096;
/// [`PAGE`] as an offset.
pub(crate) const PAGE_U64: u64 = 4096;
/// First page after the two header copies.
pub(crate) const FIRST_PAGE: u32 = 2;
/// Bits of a place that number the page within its segment.
pub(crate) const PAGE_BITS: u32 = 14;
/// Segment numbers are below this.
pub(crate) const SEGMENTS_MAX: u32 = 1 << 26;

const MAGIC: [u8; 8] = *b"VMFSSEG\0";
const VERSION: u32 = 1;

/// Size class of a segment: 128 KiB, 1 MiB, 8 MiB or 64 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Class(u8);

impl Class {
    pub(crate) const COUNT: usize = 4;
    pub(crate) const ALL: [Self; Self::COUNT] = [Self(0), Self(1), Self(2), Self(3)];
    /// The only class whose files are not allocated in full when they are made.
    pub(crate) const SMALLEST: Self = Self(0);

    pub(crate) const fn pages(self) -> u32 {
        32 << (3 * self.0)
    }
    pub(crate) const fn bytes(self) -> u64 {
        self.pages() as u64 * PAGE_U64
    }
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        (usize::from(code) < Self::COUNT).then_some(Self(code))
    }
    pub(crate) const fn code(self) -> u8 {
        self.0
    }
    /// The smallest class that has room for `pages` after its headers and first header pair.
    pub(crate) fn fitting(pages: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.pages() >= pages + FIRST_PAGE + 2)
    }
    /// The largest class of at most `bytes`.
    pub(crate) fn at_most(bytes: u64) -> Self {
        Self::ALL.into_iter().rev().find(|c| c.bytes() <= bytes).unwrap_or(Self(0))
    }
    /// The class a log of `log_bytes` grows by: an eighth to a whole of what it has.
    pub(crate) fn for_log(log_bytes: u64, max: u64) -> Self {
        Self::at_most(log_bytes.min(max))
    }
}

/// One segment in use. Its number may be used again, its generation never.
pub(crate) struct Segment {
    pub(crate) no: u32,
    pub(crate) class: Class,
    pub(crate) generation: u64,
    /// Every page of the file has been written once: its syncs need no file system journal.
    pub(crate) prepared: AtomicBool,
    /// Pages from its start on that surely have been written once, when it is no longer written to.
    pub(crate) written_pages: AtomicU32,
    /// Header pages not yet on disk, and the index, while the segment is written to.
    pub(crate) live: Mutex<Option<Live>>,
    /// Payload that is not in the file yet.
    pub(crate) held: Held,
}

impl Segment {
    pub(crate) fn new(no: u32, class: Class, generation: u64, prepared: bool) -> Self {
        Self {
            no,
            class,
            generation,
            prepared: AtomicBool::new(prepared),
            written_pages: AtomicU32::new(0),
            live: Mutex::new(None),
            held: Held::default(),
        }
    }
    pub(crate) fn file(&self, files: &Files) -> Result<Arc<dyn DiskFile>, StoreError> {
        files.segment(self.no)
    }

    /// Reads pages of payload, wherever they are. With `soon`, false when the disk was only asked for them.
    pub(crate) fn read_payload(
        &self,
        files: &Files,
        page: u32,
        buf: &mut [u8],
        soon: bool,
    ) -> Result<bool, StoreError> {
        let in_file = self.held.read(page, buf);
        if in_file == 0 {
            return Ok(true);
        }
        let file = self.file(files)?;
        let (buf, offset) = (&mut buf[..in_file], u64::from(page) * PAGE_U64);
        let read = if soon { file.read_soon(buf, offset) } else { file.read_at(buf, offset).map(|()| true) };
        read.during(|| format!("reading {}", file_name(self.no)))
    }
}

/// The file of segment `no`.
pub(crate) fn file_name(no: u32) -> String {
    format!("seg/{no:010}")
}

/// What a segment is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Part of an image's log; recovery follows it.
    Log,
    /// Part of an image only once a checkpoint lists it.
    Shadow,
    /// In the pool, every page written.
    Pool,
}

/// Header of a segment file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) kind: Kind,
    pub(crate) class: Class,
    pub(crate) store: StoreId,
    pub(crate) image: ImageId,
    pub(crate) generation: u64,
    /// Number in the image's log.
    pub(crate) ordinal: u64,
    /// Generation of the segment before it in the log; 0 for none.
    pub(crate) prev_generation: u64,
    /// The update that the log before this segment ends with; later ones there are cut off.
    pub(crate) link: Head,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_capacity(PAGE);
        w.bytes(&MAGIC);
        w.u32(VERSION);
        w.u8(match self.kind {
            Kind::Log => 1,
            Kind::Shadow => 2,
            Kind::Pool => 3,
        });
        w.u8(self.class.code());
        w.u16(0);
        w.bytes(self.store.as_bytes());
        w.bytes(self.image.as_bytes());
        w.u64(self.generation);
        w.u64(self.ordinal);
        w.u64(self.prev_generation);
        encode_head(&mut w, &self.link);
        let mut b = w.finish();
        b.resize(PAGE - 4, 0);
        let crc = crc32c::crc32c(&b);
        b.extend_from_slice(&crc.to_le_bytes());
        b
    }
    /// `None` when the page is not a segment header, or a damaged one.
    ///
    /// # Errors
    /// Another version.
    pub(crate) fn decode(page: &[u8]) -> Result<Option<Self>, CodecError> {
        let mut r = Reader::new(page);
        if r.array::<8>()? != MAGIC {
            return Ok(None);
        }
        let crc = crc32c::crc32c(&page[..PAGE - 4]);
        if crc.to_le_bytes() != page[PAGE - 4..] {
            return Ok(None);
        }
        let got = r.u32()?;
        if got != VERSION {
            return Err(CodecError::Version { got, known: VERSION });
        }
        let kind = match r.u8()? {
            1 => Kind::Log,
            2 => Kind::Shadow,
            3 => Kind::Pool,
            _ => return Ok(None),
        };
        let Some(class) = Class::from_code(r.u8()?) else { return Ok(None) };
        r.u16()?;
        Ok(Some(Self {
            kind,
            class,
            store: StoreId::from_bytes(r.array()?),
            image: ImageId::from_bytes(r.array()?),
            generation: r.u64()?,
            ordinal: r.u64()?,
            prev_generation: r.u64()?,
            link: decode_head(&mut r)?,
        }))
    }
    /// True when the page is surely meant to be a segment header, whole or not.
    pub(crate) fn is_meant(page: &[u8]) -> bool {
        page.starts_with(&MAGIC)
    }
    /// Writes both copies. Not synced.
    pub(crate) fn write(&self, no: u32, file: &dyn DiskFile) -> Result<(), StoreError> {
        let page = self.encode();
        file.write_at(&[page.as_slice(), &page].concat(), 0).during(|| format!("writing {}", file_name(no)))
    }
    /// Makes a shadow segment that a checkpoint lists part of the log for good, one copy after the other. Durable on
    /// return; one of the log is left as it is.
    pub(crate) fn publish(no: u32, file: &dyn DiskFile) -> Result<(), StoreError> {
        let Some(header) = Self::read(no, file)? else { return Ok(()) };
        let page = Self { kind: Kind::Log, ..header }.encode();
        for copy in 0..2 {
            let mut found = vec![0u8; PAGE];
            file.read_at(&mut found, copy * PAGE_U64).during(|| format!("reading {}", file_name(no)))?;
            if found != page {
                let written = file.write_at(&page, copy * PAGE_U64).and_then(|()| file.sync());
                written.during(|| format!("writing {}", file_name(no)))?;
            }
        }
        Ok(())
    }
    /// Reads the newer of the two copies; `None` when neither is a header.
    pub(crate) fn read(no: u32, file: &dyn DiskFile) -> Result<Option<Self>, StoreError> {
        let name = file_name(no);
        let mut buf = vec![0u8; 2 * PAGE];
        file.read_at(&mut buf, 0).during(|| format!("reading {name}"))?;
        let mut best: Option<Self> = None;
        for page in buf.chunks_exact(PAGE) {
            let header = Self::decode(page).map_err(|e| match e {
                CodecError::Version { got, known } => {
                    StoreError::Version { what: name.clone(), found: got, known }
                }
                _ => StoreError::corrupt(name.clone()),
            })?;
            if let Some(h) = header
                && best.as_ref().is_none_or(|b| h.generation > b.generation)
            {
                best = Some(h);
            }
        }
        Ok(best)
    }
}
