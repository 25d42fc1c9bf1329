//! Checkpoints on disk: two superblocks in a map file, written alternately, each naming a body.

use std::sync::Arc;

use vmfs_common::codec::{CodecError, Reader, Writer};
use vmfs_common::election::{decode_head, encode_head};
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{ImageId, Seq, StoreId};

use crate::disk::DiskFile;
use crate::error::{IoContext as _, StoreError};
use crate::fork::ForkInfo;
use crate::image::Space;
use crate::map::tree::{FreePages, PageRef};
use crate::segment::{Class, PAGE, PAGE_U64, SEGMENTS_MAX};
use crate::shared::Shared;
use crate::writer::LogPos;

const SUPER_MAGIC: [u8; 8] = *b"VMFSMAP\0";
const BODY_MAGIC: u32 = u32::from_le_bytes(*b"VMCB");
const VERSION: u32 = 1;
/// Bytes of a body in one page.
const CHUNK: usize = PAGE - 16;
/// Longest body: an image of 16 TiB in 64 MiB segments takes about 12 MiB.
const BODY_BYTES_MAX: usize = 256 << 20;

/// A segment that the image uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentRow {
    pub(crate) no: u32,
    pub(crate) class: Class,
    pub(crate) generation: u64,
    pub(crate) ordinal: u64,
    /// The last update before its first record.
    pub(crate) start_seq: Seq,
    /// Part of the retained log.
    pub(crate) in_chain: bool,
    pub(crate) prepared: bool,
    pub(crate) live: u32,
}

/// A fork, and the segments that hold its updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForkRow {
    pub(crate) info: ForkInfo,
    pub(crate) chain: Vec<SegmentRow>,
}

/// What a checkpoint says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) kind: MemberRole,
    /// Segments of this image with a generation from here on are newer than the checkpoint.
    pub(crate) gen_mark: u64,
    pub(crate) commit: Seq,
    pub(crate) log_start: Seq,
    /// Where the log goes on in the last segment of the chain; `None` when it does not.
    pub(crate) pos: Option<LogPos>,
    pub(crate) root: PageRef,
    pub(crate) height: u32,
    pub(crate) allocated: u64,
    pub(crate) segments: Vec<SegmentRow>,
    pub(crate) forks: Vec<ForkRow>,
    pub(crate) state: Arc<ImageState>,
}

fn encode_row(w: &mut Writer, r: &SegmentRow) {
    w.u32(r.no);
    w.u8(r.class.code());
    w.u8(u8::from(r.in_chain) | u8::from(r.prepared) << 1);
    w.u16(0);
    w.u64(r.generation);
    w.u64(r.ordinal);
    w.u64(r.start_seq.0);
    w.u32(r.live);
}

fn decode_row(r: &mut Reader<'_>) -> Result<SegmentRow, CodecError> {
    let no = r.u32()?;
    let class = Class::from_code(r.u8()?).ok_or(CodecError::Invalid("segment class"))?;
    let flags = r.u8()?;
    let reserved = r.u16()?;
    if no >= SEGMENTS_MAX || flags > 3 || reserved != 0 {
        return Err(CodecError::Invalid("segment row"));
    }
    Ok(SegmentRow {
        no,
        class,
        generation: r.u64()?,
        ordinal: r.u64()?,
        start_seq: Seq(r.u64()?),
        in_chain: flags & 1 != 0,
        prepared: flags & 2 != 0,
        live: r.u32()?,
    })
}

const ROWS_MAX: usize = 1 << 22;
const FORKS_MAX: usize = 1 << 16;

impl Body {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(match self.kind {
            MemberRole::Replica => 1,
            MemberRole::Witness => 2,
        });
        w.u64(self.gen_mark);
        w.u64(self.commit.0);
        w.u64(self.log_start.0);
        let pos = self.pos.unwrap_or(LogPos { generation: 0, page: 0, index: 0, offset: 0 });
        w.u64(pos.generation);
        w.u16(pos.page);
        w.u16(pos.index);
        w.u16(pos.offset);
        w.u64(self.root.0);
        w.u32(self.height);
        w.u64(self.allocated);
        w.count(self.segments.len());
        self.segments.iter().for_each(|r| encode_row(&mut w, r));
        w.count(self.forks.len());
        for f in &self.forks {
            w.var(f.info.name.as_bytes());
            encode_head(&mut w, &f.info.ancestor);
            encode_head(&mut w, &f.info.head);
            w.u64(f.info.updates);
            w.u64(f.info.bytes);
            w.u64(f.info.time_ns);
            w.count(f.chain.len());
            f.chain.iter().for_each(|r| encode_row(&mut w, r));
        }
        w.var(&self.state.encode());
        w.finish()
    }
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut r = Reader::new(bytes);
        let kind = match r.u8()? {
            1 => MemberRole::Replica,
            2 => MemberRole::Witness,
            _ => return Err(CodecError::Invalid("image kind")),
        };
        let gen_mark = r.u64()?;
        let commit = Seq(r.u64()?);
        let log_start = Seq(r.u64()?);
        let pos = LogPos { generation: r.u64()?, page: r.u16()?, index: r.u16()?, offset: r.u16()? };
        let root = PageRef(r.u64()?);
        let height = r.u32()?;
        if height == 0 || height > 6 {
            return Err(CodecError::Invalid("map height"));
        }
        let allocated = r.u64()?;
        let n = r.count(ROWS_MAX)?;
        let segments = (0..n).map(|_| decode_row(&mut r)).collect::<Result<_, _>>()?;
        let mut forks = Vec::new();
        for _ in 0..r.count(FORKS_MAX)? {
            let info = ForkInfo {
                name: r.text(256)?,
                ancestor: decode_head(&mut r)?,
                head: decode_head(&mut r)?,
                updates: r.u64()?,
                bytes: r.u64()?,
                time_ns: r.u64()?,
            };
            let n = r.count(ROWS_MAX)?;
            let chain = (0..n).map(|_| decode_row(&mut r)).collect::<Result<_, _>>()?;
            forks.push(ForkRow { info, chain });
        }
        let state = Arc::new(ImageState::decode(r.var(BODY_BYTES_MAX)?)?);
        r.end()?;
        let nowhere = LogPos { generation: 0, page: 0, index: 0, offset: 0 };
        if pos.generation == 0 && pos != nowhere {
            return Err(CodecError::Invalid("log position"));
        }
        let pos = (pos != nowhere).then_some(pos);
        Ok(Self { kind, gen_mark, commit, log_start, pos, root, height, allocated, segments, forks, state })
    }
}

/// Where a body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BodyRef {
    pub(crate) pages: Vec<u32>,
    len: usize,
    crc: u32,
}

/// Writes a body into free pages. Not synced.
pub(crate) fn write_body(
    shared: &Shared,
    image: ImageId,
    file: &dyn DiskFile,
    free: &mut FreePages,
    body: &Body,
) -> Result<BodyRef, StoreError> {
    let bytes = body.encode();
    let pages: Vec<u32> = bytes.chunks(CHUNK).map(|_| free.take()).collect();
    for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
        let mut page = Vec::with_capacity(PAGE);
        page.extend_from_slice(&BODY_MAGIC.to_le_bytes());
        page.extend_from_slice(&pages.get(i + 1).copied().unwrap_or(0).to_le_bytes());
        page.extend_from_slice(&u32::try_from(chunk.len()).unwrap_or(0).to_le_bytes());
        page.extend_from_slice(&crc32c::crc32c(chunk).to_le_bytes());
        page.extend_from_slice(chunk);
        page.resize(PAGE, 0);
        let at = u64::from(pages[i]) * PAGE_U64;
        shared.with_reserve(Space::Control, || {
            file.write_at(&page, at).during(|| format!("writing the map of image {image}"))
        })?;
    }
    Ok(BodyRef { pages, len: bytes.len(), crc: crc32c::crc32c(&bytes) })
}

fn read_body(
    file: &dyn DiskFile,
    first: u32,
    len: usize,
    crc: u32,
) -> std::io::Result<Option<(Vec<u8>, BodyRef)>> {
    // Whatever the superblock says, no more is set aside than the file can have.
    if len > BODY_BYTES_MAX || len as u64 > file.len_bytes()? {
        return Ok(None);
    }
    let (mut bytes, mut pages, mut next) = (Vec::with_capacity(len), Vec::new(), first);
    let mut page = [0u8; PAGE];
    while bytes.len() < len {
        if next < 2 {
            return Ok(None);
        }
        file.read_at(&mut page, u64::from(next) * PAGE_U64)?;
        let word = |o: usize| u32::from_le_bytes([page[o], page[o + 1], page[o + 2], page[o + 3]]);
        let n = word(8) as usize;
        if word(0) != BODY_MAGIC || n == 0 || n > CHUNK || crc32c::crc32c(&page[16..16 + n]) != word(12) {
            return Ok(None);
        }
        pages.push(next);
        bytes.extend_from_slice(&page[16..16 + n]);
        next = word(4);
    }
    let whole = bytes.len() == len && crc32c::crc32c(&bytes) == crc;
    Ok(whole.then_some((bytes, BodyRef { pages, len, crc })))
}

/// Writes superblock `slot`. Not synced.
pub(crate) fn write_super(
    store: StoreId,
    image: ImageId,
    file: &dyn DiskFile,
    slot: usize,
    number: u64,
    body: &BodyRef,
) -> Result<(), StoreError> {
    let mut w = Writer::with_capacity(PAGE);
    w.bytes(&SUPER_MAGIC);
    w.u32(VERSION);
    w.u32(0);
    w.bytes(store.as_bytes());
    w.bytes(image.as_bytes());
    w.u64(number);
    w.u32(body.pages.first().copied().unwrap_or(0));
    w.count(body.len);
    w.u32(body.crc);
    let mut page = w.finish();
    page.resize(PAGE - 4, 0);
    let crc = crc32c::crc32c(&page);
    page.extend_from_slice(&crc.to_le_bytes());
    file.write_at(&page, slot as u64 * PAGE_U64).during(|| format!("writing the map of image {image}"))
}

/// A readable checkpoint.
pub(crate) struct Found {
    pub(crate) number: u64,
    pub(crate) body: Body,
    pub(crate) at: BodyRef,
}

/// True when superblock `slot` was never written.
pub(crate) fn is_slot_blank(image: ImageId, file: &dyn DiskFile, slot: usize) -> Result<bool, StoreError> {
    let mut page = [0u8; PAGE];
    file.read_at(&mut page, slot as u64 * PAGE_U64).during(|| format!("reading the map of image {image}"))?;
    Ok(page.iter().all(|b| *b == 0))
}

/// Reads superblock `slot` and its body; `None` when either is damaged or was never written.
///
/// # Errors
/// The disk's, or another version.
pub(crate) fn read_slot(
    store: StoreId,
    image: ImageId,
    file: &dyn DiskFile,
    slot: usize,
) -> Result<Option<Found>, StoreError> {
    let what = || format!("the map of image {image}");
    let mut page = [0u8; PAGE];
    file.read_at(&mut page, slot as u64 * PAGE_U64).during(|| format!("reading {}", what()))?;
    let word = |o: usize| u32::from_le_bytes([page[o], page[o + 1], page[o + 2], page[o + 3]]);
    if page[..8] != SUPER_MAGIC || crc32c::crc32c(&page[..PAGE - 4]) != word(PAGE - 4) {
        return Ok(None);
    }
    if word(8) != VERSION {
        return Err(StoreError::Version { what: what(), found: word(8), known: VERSION });
    }
    if page[16..32] != *store.as_bytes() || page[32..48] != *image.as_bytes() {
        return Ok(None);
    }
    let number = u64::from(word(48)) | u64::from(word(52)) << 32;
    let read = read_body(file, word(56), word(60) as usize, word(64));
    let Some((bytes, at)) = read.during(|| format!("reading {}", what()))? else { return Ok(None) };
    match Body::decode(&bytes) {
        Ok(body) => Ok(Some(Found { number, body, at })),
        Err(CodecError::Version { got, known }) => {
            Err(StoreError::Version { what: format!("the state of image {image}"), found: got, known })
        }
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmfs_common::Head;

    use super::*;

    fn row(n: u32) -> SegmentRow {
        SegmentRow {
            no: n,
            class: Class::ALL[n as usize % Class::COUNT],
            generation: 7 + u64::from(n),
            ordinal: 3,
            start_seq: Seq(u64::from(n) * 10),
            in_chain: n.is_multiple_of(2),
            prepared: n.is_multiple_of(3),
            live: n,
        }
    }

    fn body(rows: u32) -> Body {
        let info = ForkInfo {
            name: "a fork".into(),
            ancestor: Head::default(),
            head: Head { seq: Seq(9), ..Head::default() },
            updates: 9,
            bytes: 4096,
            time_ns: 5,
        };
        Body {
            kind: MemberRole::Replica,
            gen_mark: 99,
            commit: Seq(4),
            log_start: Seq(2),
            pos: Some(LogPos { generation: 8, page: 4, index: 1, offset: 77 }),
            root: PageRef(5 << 32 | 1),
            height: 2,
            allocated: 12,
            segments: (0..rows).map(row).collect(),
            forks: vec![ForkRow { info, chain: vec![row(1)] }],
            state: Arc::new(ImageState::new(ImageId::from_bytes([3; 16]))),
        }
    }

    proptest! {
        #[test]
        fn bodies_round_trip_and_damaged_ones_never_panic(
            rows in 0u32..40, at in 0usize..4000, xor in 1u8.., cut in 0usize..4000,
        ) {
            let body = body(rows);
            let mut bytes = body.encode();
            prop_assert_eq!(Body::decode(&bytes).expect("just encoded"), body);
            let at = at % bytes.len();
            bytes[at] ^= xor;
            let _ = Body::decode(&bytes);
            bytes.truncate(cut);
            let _ = Body::decode(&bytes);
        }
    }
}
