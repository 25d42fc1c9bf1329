use super::*;
use vmfs_common::ids::ImageId;
use vmfs_store::simdisk::SimDisk;

const FILE: &str = "catalog/0000000000000001.cat";
const COPY: &str = "catalog/0000000000000001.cat.copy";

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn content(disk: &SimDisk, name: &str) -> Vec<u8> {
    let file = disk.open(name, false).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len_bytes().unwrap()).unwrap()];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn flip(disk: &SimDisk, name: &str, at: usize) {
    assert!(disk.flip_bit(name, at as u64, 4), "byte {at} of {name}");
}

fn disk() -> SimDisk {
    SimDisk::new(1 << 30)
}

fn dir(name: &str, parent: u64) -> Row {
    Row { parent, name: name.to_owned(), kind: Kind::Dir(Meta::default()) }
}

fn image(name: &str, parent: u64, byte: u8) -> Row {
    Row { parent, name: name.to_owned(), kind: Kind::Image(ImageId::from_bytes([byte; 16])) }
}

fn try_open(disk: &SimDisk) -> Result<Catalog, CatalogError> {
    Catalog::open(Arc::new(disk.clone()), &Meta::default())
}

fn open(disk: &SimDisk) -> Catalog {
    try_open(disk).unwrap()
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

/// Also when calls fail, and the process ends and starts again with what is in the page cache.
#[test]
fn synced_transactions_survive_a_crash_and_every_state_is_a_prefix() {
    let (mut failed_syncs, mut failed_appends, mut failed_compactions) = (0, 0, 0);
    for seed in 0..1000 {
        let rng = &mut Rng::new(seed);
        let mut disk = disk();
        let mut catalog = open(&disk);
        // Every state since the last sync: after a crash it must be one of them.
        let mut since = vec![catalog.rows()];
        for n in 0..60 {
            let mut next = since.last().unwrap().clone();
            let txn = random_txn(rng, n, &next);
            let mut gone = false;
            if seed % 2 == 1 && rng.next().is_multiple_of(4) {
                disk.fail_call(Some(disk.calls() + 1 + rng.next() % 4));
            }
            let ticket = match catalog.append(&txn) {
                Ok(ticket) => {
                    txn.iter().for_each(|c| next.apply(c));
                    since.push(next);
                    ticket
                }
                Err(CatalogError::Latched) => unreachable!("it was opened again after a failed sync"),
                Err(_) => {
                    assert_eq!(catalog.rows(), next, "seed {seed}, step {n}");
                    failed_appends += 1;
                    continue;
                }
            };
            match rng.next() % 8 {
                0..=2 => match catalog.sync(ticket) {
                    Ok(()) => since = vec![since.pop().unwrap()],
                    Err(_) => {
                        failed_syncs += 1;
                        gone = true;
                    }
                },
                3 => gone = true,
                4 => {
                    let done = catalog.compact(&mut catalog.inner.lock());
                    match done {
                        Ok(()) => since = vec![since.pop().unwrap()],
                        Err(_) => {
                            failed_compactions += 1;
                            gone = catalog.inner.lock().failed || rng.next().is_multiple_of(2);
                        }
                    }
                }
                _ => {}
            }
            if gone {
                let seed_of_cut = rng.next();
                disk = if rng.next().is_multiple_of(2) { disk.kill() } else { disk.power_cut(seed_of_cut) };
                catalog = open(&disk);
                let found = catalog.rows();
                assert!(since.contains(&found), "seed {seed}, step {n}");
                found.check().unwrap();
                since = vec![found];
            }
        }
    }
    println!("{failed_syncs} {failed_appends} {failed_compactions}");
    assert!(failed_syncs > 100 && failed_appends > 100 && failed_compactions > 100);
}

#[test]
fn a_crash_during_compaction_loses_nothing() {
    for seed in 0..200 {
        let rng = &mut Rng::new(seed);
        let disk = disk();
        let catalog = open(&disk);
        let last = (0..20)
            .map(|n| catalog.append(&[Change::Put(n + 10, image(&format!("i{n}"), 1, 3))]).unwrap())
            .last();
        catalog.sync(last.unwrap()).unwrap();
        // It ends somewhere inside.
        disk.stop_at_call(Some(disk.calls() + 1 + rng.next() % 12));
        let compacted = catalog.compact(&mut catalog.inner.lock());
        let after = if seed % 2 == 0 { disk.kill() } else { disk.power_cut(rng.next()) };
        assert_eq!(open(&after).rows(), catalog.rows(), "seed {seed}, {compacted:?}");
    }
}

#[test]
fn the_journal_is_compacted_and_stays_small() {
    let disk = disk();
    let catalog = open(&disk);
    for n in 0..40_000u64 {
        catalog.append(&[Change::Put(10, image(&format!("name-{n}"), 1, 3))]).unwrap();
    }
    catalog.sync_all().unwrap();
    let names: Vec<String> = disk.files().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(content(&disk, &names[0]).len() < 2 << 20);
    assert_eq!(open(&disk).rows(), catalog.rows());
}

#[test]
fn an_unknown_version_is_refused_and_both_versions_named() {
    let disk = disk();
    drop(open(&disk));
    flip(&disk, FILE, 8);
    flip(&disk, COPY, 8);
    let error = try_open(&disk).unwrap_err().to_string();
    assert!(error.contains("version 17") && error.contains("reads version 1"), "{error}");
}

#[test]
fn damage_below_the_durable_point_is_refused_and_a_torn_tail_is_cut() {
    let disk = disk();
    let catalog = open(&disk);
    let start = content(&disk, FILE).len();
    for n in 0..5u8 {
        let ticket =
            catalog.append(&[Change::Put(10 + u64::from(n), image(&format!("i{n}"), 1, n))]).unwrap();
        catalog.sync(ticket).unwrap();
    }
    drop(catalog);
    flip(&disk, FILE, start + 30);
    flip(&disk, COPY, start + 30);
    let error = try_open(&disk).unwrap_err();
    assert!(matches!(&error, CatalogError::Damaged { .. }), "{error}");
    flip(&disk, FILE, start + 30);
    flip(&disk, COPY, start + 30);
    // The last record has nothing after it: it might be torn, and is cut.
    let len = content(&disk, FILE).len();
    flip(&disk, FILE, len - 20);
    flip(&disk, COPY, len - 20);
    assert_eq!(open(&disk).rows().rows.len(), 5);
    assert!(content(&disk, FILE).len() < len);
}

#[test]
fn a_flipped_byte_anywhere_in_either_copy_is_repaired() {
    let disk = disk();
    let catalog = open(&disk);
    for n in 0..5u8 {
        let ticket =
            catalog.append(&[Change::Put(10 + u64::from(n), image(&format!("i{n}"), 1, n))]).unwrap();
        catalog.sync(ticket).unwrap();
    }
    let rows = catalog.rows();
    drop(catalog);
    let whole = content(&disk, FILE);
    assert_eq!(content(&disk, COPY), whole);
    for at in 0..whole.len() {
        for name in [FILE, COPY] {
            flip(&disk, name, at);
            let catalog = open(&disk);
            assert_eq!(catalog.rows(), rows, "{name} byte {at}");
            assert!(!catalog.was_mended() || name == FILE, "{name} byte {at}");
            drop(catalog);
            // Zeros that pad the header or a record belong to no checksum.
            let same = content(&disk, FILE) == content(&disk, COPY);
            assert!(same, "{name} byte {at}");
            if content(&disk, FILE) != whole {
                flip(&disk, FILE, at);
                flip(&disk, COPY, at);
            }
            assert_eq!(content(&disk, FILE), whole, "{name} byte {at}");
        }
    }
}

#[test]
fn a_scrub_writes_a_damaged_catalog_anew() {
    let disk = disk();
    let catalog = open(&disk);
    catalog.append(&[Change::Put(10, image("a", 1, 1))]).unwrap();
    catalog.sync_all().unwrap();
    assert!(!catalog.scrub().unwrap());
    for name in [FILE, COPY] {
        let name = name.replace("01.cat", &format!("{:02x}.cat", catalog.inner.lock().generation));
        flip(&disk, &name, 70);
        assert!(catalog.scrub().unwrap() && catalog.was_mended());
        assert!(!catalog.scrub().unwrap());
        assert_eq!(open(&disk).rows(), catalog.rows());
    }
}

#[test]
fn a_failed_write_changes_nothing_and_a_failed_sync_latches() {
    let disk = disk();
    let catalog = open(&disk);
    disk.set_capacity_bytes(disk.used_bytes());
    // Until its last page is full there is room.
    let mut n = 0;
    let error = loop {
        let before = catalog.rows();
        match catalog.append(&[Change::Put(10 + n, image(&format!("i{n}"), 1, 1))]) {
            Ok(_) => n += 1,
            Err(error) => {
                assert_eq!(catalog.rows(), before);
                break error;
            }
        }
    };
    assert!(matches!(&error, CatalogError::Io(e) if e.kind() == io::ErrorKind::StorageFull), "{error}");
    disk.set_capacity_bytes(1 << 30);
    let ticket = catalog.append(&[Change::Put(10, dir("a", 1))]).unwrap();
    disk.fail_syncs(true);
    assert!(catalog.sync(ticket).is_err());
    disk.fail_syncs(false);
    assert!(matches!(catalog.sync(ticket), Err(CatalogError::Latched)));
    assert!(matches!(catalog.append(&[]), Err(CatalogError::Latched)));
}

/// A flush has failed, and the daemon was started again: what that flush was for is in the page cache, and later
/// transactions follow it.
#[test]
fn what_a_failed_sync_was_for_takes_no_later_transaction_with_it() {
    for seed in 0..60 {
        let disk = disk();
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
    let disk = disk();
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
