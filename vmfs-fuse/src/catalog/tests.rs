use super::*;
use crate::testdisk::{MemDisk, Rng};
use std::sync::atomic::Ordering;
use vmfs_common::ids::ImageId;
use vmfs_store::simdisk::SimDisk;

const FILE: &str = "catalog/0000000000000001.cat";
const COPY: &str = "catalog/0000000000000001.cat.copy";

fn dir(name: &str, parent: u64) -> Row {
    Row { parent, name: name.to_owned(), kind: Kind::Dir(Meta::default()) }
}

fn image(name: &str, parent: u64, byte: u8) -> Row {
    Row { parent, name: name.to_owned(), kind: Kind::Image(ImageId::from_bytes([byte; 16])) }
}

fn open(disk: &Arc<MemDisk>) -> Catalog {
    Catalog::open(disk.clone(), &Meta::default()).unwrap()
}

/// A random transaction that keeps the rows sound: names are never reused.
fn random_txn(rng: &mut Rng, n: u64, rows: &Rows) -> Vec<Change> {
    let inos: Vec<u64> = rows.rows.keys().copied().filter(|i| *i != ROOT_INO).collect();
    let pick = |rng: &mut Rng| inos[usize::try_from(rng.next()).unwrap() % inos.len()];
    match rng.next() % 6 {
        0..=2 => vec![Change::Put(n + 10, image(&format!("i{n}"), ROOT_INO, u8::try_from(n % 251).unwrap()))],
        3 if !inos.is_empty() => vec![Change::Del(pick(rng))],
        4 if inos.len() > 1 => {
            // An exchange: both or neither.
            let (a, b) = (pick(rng), pick(rng));
            let (ra, rb) = (rows.rows[&a].clone(), rows.rows[&b].clone());
            if a == b {
                return vec![];
            }
            vec![
                Change::Put(a, Row { name: rb.name.clone(), ..ra.clone() }),
                Change::Put(b, Row { name: ra.name, ..rb }),
            ]
        }
        _ => vec![Change::Bury { id: ImageId::from_bytes([7; 16]), after: None }],
    }
}

#[test]
fn synced_transactions_survive_a_crash_and_every_state_is_a_prefix() {
    for seed in 0..400 {
        let rng = &mut Rng::new(seed);
        let mut disk = Arc::new(MemDisk::default());
        let mut catalog = open(&disk);
        let mut synced = catalog.rows();
        // Every state since the last sync: after a crash it must be one of them.
        let mut since = vec![synced.clone()];
        for n in 0..60 {
            let mut next = since.last().unwrap().clone();
            let txn = random_txn(rng, n, &next);
            let ticket = catalog.append(&txn).unwrap();
            txn.iter().for_each(|c| next.apply(c));
            since.push(next);
            match rng.next() % 8 {
                0..=2 => {
                    catalog.sync(ticket).unwrap();
                    synced = since.pop().unwrap();
                    since = vec![synced.clone()];
                }
                3 => {
                    disk = disk.crash(rng);
                    catalog = open(&disk);
                    let found = catalog.rows();
                    assert!(since.contains(&found), "seed {seed}, step {n}");
                    found.check().unwrap();
                    since = vec![found];
                }
                4 => catalog
                    .compact(&mut catalog.inner.lock())
                    .map(|()| synced = since.last().unwrap().clone())
                    .unwrap(),
                _ => {}
            }
            if synced == *since.last().unwrap() {
                since = vec![synced.clone()];
            }
        }
    }
}

#[test]
fn a_crash_during_compaction_loses_nothing() {
    for seed in 0..200 {
        let rng = &mut Rng::new(seed);
        let disk = Arc::new(MemDisk::default());
        let catalog = open(&disk);
        let last = (0..20)
            .map(|n| catalog.append(&[Change::Put(n + 10, image(&format!("i{n}"), 1, 3))]).unwrap())
            .last();
        catalog.sync(last.unwrap()).unwrap();
        // Fail somewhere inside.
        disk.faults.syncs_left.store(1 + rng.next() % 4, Ordering::Relaxed);
        let compacted = catalog.compact(&mut catalog.inner.lock());
        let after = open(&disk.crash(rng));
        assert_eq!(after.rows(), catalog.rows(), "seed {seed}, {compacted:?}");
    }
}

#[test]
fn the_journal_is_compacted_and_stays_small() {
    let disk = Arc::new(MemDisk::default());
    let catalog = open(&disk);
    for n in 0..40_000u64 {
        catalog.append(&[Change::Put(10, image(&format!("name-{n}"), 1, 3))]).unwrap();
    }
    catalog.sync_all().unwrap();
    let names = disk.file_names();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(disk.content(&names[0]).len() < 2 << 20);
    assert_eq!(open(&disk).rows(), catalog.rows());
}

#[test]
fn an_unknown_version_is_refused_and_both_versions_named() {
    let disk = Arc::new(MemDisk::default());
    drop(open(&disk));
    disk.flip(FILE, 8);
    disk.flip(COPY, 8);
    let error = Catalog::open(disk, &Meta::default()).unwrap_err().to_string();
    assert!(error.contains("version 17") && error.contains("reads version 1"), "{error}");
}

#[test]
fn damage_below_the_durable_point_is_refused_and_a_torn_tail_is_cut() {
    let disk = Arc::new(MemDisk::default());
    let catalog = open(&disk);
    let start = disk.content(FILE).len();
    for n in 0..5u8 {
        let ticket =
            catalog.append(&[Change::Put(10 + u64::from(n), image(&format!("i{n}"), 1, n))]).unwrap();
        catalog.sync(ticket).unwrap();
    }
    drop(catalog);
    disk.flip(FILE, start + 30);
    disk.flip(COPY, start + 30);
    let error = Catalog::open(disk.clone(), &Meta::default()).unwrap_err();
    assert!(matches!(&error, CatalogError::Damaged { .. }), "{error}");
    disk.flip(FILE, start + 30);
    disk.flip(COPY, start + 30);
    // The last record has nothing after it: it might be torn, and is cut.
    let len = disk.content(FILE).len();
    disk.flip(FILE, len - 20);
    disk.flip(COPY, len - 20);
    assert_eq!(open(&disk).rows().rows.len(), 5);
    assert!(disk.content(FILE).len() < len);
}

#[test]
fn a_flipped_byte_anywhere_in_either_copy_is_repaired() {
    let disk = Arc::new(MemDisk::default());
    let catalog = open(&disk);
    for n in 0..5u8 {
        let ticket =
            catalog.append(&[Change::Put(10 + u64::from(n), image(&format!("i{n}"), 1, n))]).unwrap();
        catalog.sync(ticket).unwrap();
    }
    let rows = catalog.rows();
    drop(catalog);
    let whole = disk.content(FILE);
    assert_eq!(disk.content(COPY), whole);
    for at in 0..whole.len() {
        for name in [FILE, COPY] {
            disk.flip(name, at);
            let catalog = open(&disk);
            assert_eq!(catalog.rows(), rows, "{name} byte {at}");
            assert!(!catalog.was_mended() || name == FILE, "{name} byte {at}");
            drop(catalog);
            // Zeros that pad the header or a record belong to no checksum.
            let same = disk.content(FILE) == disk.content(COPY);
            assert!(same, "{name} byte {at}");
            if disk.content(FILE) != whole {
                disk.flip(FILE, at);
                disk.flip(COPY, at);
            }
            assert_eq!(disk.content(FILE), whole, "{name} byte {at}");
        }
    }
}

#[test]
fn a_scrub_writes_a_damaged_catalog_anew() {
    let disk = Arc::new(MemDisk::default());
    let catalog = open(&disk);
    catalog.append(&[Change::Put(10, image("a", 1, 1))]).unwrap();
    catalog.sync_all().unwrap();
    assert!(!catalog.scrub().unwrap());
    for name in [FILE, COPY] {
        let name = name.replace("01.cat", &format!("{:02x}.cat", catalog.inner.lock().generation));
        disk.flip(&name, 70);
        assert!(catalog.scrub().unwrap() && catalog.was_mended());
        assert!(!catalog.scrub().unwrap());
        assert_eq!(open(&disk).rows(), catalog.rows());
    }
}

#[test]
fn a_failed_write_changes_nothing_and_a_failed_sync_latches() {
    let disk = Arc::new(MemDisk::default());
    let catalog = open(&disk);
    disk.faults.writes_left.store(1, Ordering::Relaxed);
    let error = catalog.append(&[Change::Put(10, image("a", 1, 1))]).unwrap_err();
    assert!(matches!(&error, CatalogError::Io(e) if e.raw_os_error() == Some(28)), "{error}");
    assert_eq!(catalog.rows().rows.len(), 1);
    disk.faults.writes_left.store(0, Ordering::Relaxed);
    let ticket = catalog.append(&[Change::Put(10, dir("a", 1))]).unwrap();
    disk.faults.syncs_left.store(1, Ordering::Relaxed);
    assert!(catalog.sync(ticket).is_err());
    disk.faults.syncs_left.store(0, Ordering::Relaxed);
    assert!(matches!(catalog.sync(ticket), Err(CatalogError::Latched)));
    assert!(matches!(catalog.append(&[]), Err(CatalogError::Latched)));
}

/// A flush has failed, and the daemon was started again: what that flush was for is in the page cache, and later
/// transactions follow it.
#[test]
fn what_a_failed_sync_was_for_takes_no_later_transaction_with_it() {
    for seed in 0..60 {
        let disk = SimDisk::new(1 << 30);
        let open = |disk: &SimDisk| Catalog::open(Arc::new(disk.clone()), &Meta::default()).unwrap();
        let catalog = open(&disk);
        catalog.append(&[Change::Put(10, dir("a", 1))]).unwrap();
        catalog.sync_all().unwrap();
        disk.fail_syncs(true);
        let link = |n: u64| {
            let kind = Kind::Symlink { target: vec![b'x'; 3000], meta: Meta::default() };
            Change::Put(20 + n, Row { parent: 1, name: format!("l{n}"), kind })
        };
        catalog.append(&(0..seed % 7).map(link).collect::<Vec<_>>()).unwrap();
        catalog.sync_all().unwrap_err();
        disk.fail_syncs(false);
        let disk = disk.kill();
        let catalog = open(&disk);
        assert!(catalog.rows().rows.contains_key(&10));
        catalog.append(&[Change::Put(11, dir("b", 1))]).unwrap();
        catalog.sync_all().unwrap();
        assert_eq!(open(&disk.power_cut(seed)).rows(), catalog.rows(), "seed {seed}");
    }
}

#[test]
fn rows_of_every_kind_round_trip() {
    let disk = Arc::new(MemDisk::default());
    let catalog = open(&disk);
    let mut meta = Meta { ctime_ns: 5, ..Meta::default() };
    meta.attrs.mode = 0o2755;
    meta.xattrs.insert("user.a".to_owned(), vec![0, 255]);
    let link = Kind::Symlink { target: b"../\xff".to_vec(), meta: meta.clone() };
    let changes = [
        Change::Put(2, Row { parent: 1, name: "d".to_owned(), kind: Kind::Dir(meta) }),
        Change::Put(3, Row { parent: 2, name: "l".to_owned(), kind: link }),
        Change::Put(4, image("i", 2, 9)),
        Change::Bury { id: ImageId::from_bytes([4; 16]), after: Some(ImageId::from_bytes([9; 16])) },
    ];
    catalog.append(&changes).unwrap();
    catalog.sync_all().unwrap();
    assert_eq!(open(&disk).rows(), catalog.rows());
    catalog.compact(&mut catalog.inner.lock()).unwrap();
    assert_eq!(open(&disk).rows(), catalog.rows());
}
