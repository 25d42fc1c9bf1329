//! What the fuzz targets reach of the catalog that nobody else does. See `docs/testing.md`.

use std::collections::BTreeMap;

use vmfs_common::codec::{Reader, Writer};
use vmfs_common::ids::ImageId;
use vmfs_common::op::Attrs;

use super::format::{self, Header, Tag};
use super::row::{Change, Kind, Meta, ROOT_INO, Row, Rows};

/// A catalog file: its header, its records, what they do to the rows.
///
/// # Panics
/// When a change that was taken has another byte form.
pub fn catalog(data: &[u8]) -> bool {
    let Some((head, mut rest)) = data.split_at_checked(format::HEADER_BYTES) else { return false };
    let mut head = head.to_vec();
    let crc = crc32c::crc32c(&head[..24]);
    head[24..28].copy_from_slice(&crc.to_le_bytes());
    let Header::Good(generation) = format::decode_header(&head) else { return false };
    let mut rows = Rows::default();
    let mut taken = false;
    loop {
        let fixed = format::with_checksum(generation, rest);
        let Some(record) = format::decode_record(generation, &fixed) else { return taken };
        taken = true;
        for change in &record.changes {
            let mut w = Writer::new();
            change.encode(&mut w);
            let bytes = w.finish();
            let mut r = Reader::new(&bytes);
            assert_eq!(Change::decode(&mut r).as_ref(), Ok(change));
            r.end().expect("all of it was read");
            rows.apply(change);
        }
        // What is wrong with it, if anything, is for the opening of the file to say.
        let _ = rows.check();
        let Some(next) = rest.get(record.len..) else { return taken };
        rest = next;
    }
}

/// A file with a row of every kind.
///
/// # Panics
/// Never.
#[must_use]
pub fn catalog_seeds() -> Vec<Vec<u8>> {
    let meta = Meta {
        attrs: Attrs { mode: 0o755, ..Attrs::default() },
        ctime_ns: 5,
        xattrs: BTreeMap::from([("user.a".to_owned(), vec![1, 2])]),
    };
    let row = |parent, name: &str, kind| Row { parent, name: name.to_owned(), kind };
    let id = ImageId::from_bytes([3; 16]);
    let link = Kind::Symlink { target: b"../disk.img".to_vec(), meta: meta.clone() };
    let changes = [
        Change::Put(ROOT_INO, row(ROOT_INO, "", Kind::Dir(meta))),
        Change::Put(2, row(ROOT_INO, "disk.img", Kind::Image(id))),
        Change::Put(3, row(ROOT_INO, "link", link)),
    ];
    let more = [Change::Del(2), Change::Bury { id, after: None }, Change::Exhume(id)];
    let record = |seq, tag, changes: &[Change]| {
        format::encode_record(6, seq, 0, tag, changes).expect("a small record")
    };
    let all = [
        format::encode_header(6),
        record(1, Tag::Rows, &changes),
        record(2, Tag::Complete, &[]),
        record(3, Tag::Txn, &more),
    ];
    vec![all.concat(), all[..2].concat()]
}
