//! What the store does when the disk, or the operator, does not behave.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;

use common::{DATASTORE, HOST, IMAGE, Maker, Rig, STORE, append, block, create, open, small};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, DatastoreId, HostId, ImageId, Seq};
use vmfs_store::disk::{Disk, FileDisk};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{BadPayload, Space, Store, StoreConfig, StoreError};

#[test]
fn another_hosts_store_is_refused_naming_both() {
    let disk = SimDisk::new(1 << 24);
    drop(create(&disk, small()).unwrap());
    let other = HostId::from_bytes([7; 16]);
    let e = Store::open(Arc::new(disk.clone()), DATASTORE, other, small()).unwrap_err();
    assert!(e.to_string().contains(&other.to_string()) && e.to_string().contains(&HOST.to_string()), "{e}");
    let other = DatastoreId::from_bytes([7; 16]);
    let e = Store::open(Arc::new(disk.clone()), other, HOST, small()).unwrap_err();
    assert!(matches!(e, StoreError::WrongDatastore { .. }));
    assert!(matches!(create(&disk, small()), Err(StoreError::StoreExists)));
    assert!(matches!(open(&SimDisk::new(1 << 20), small()), Err(StoreError::NoStore)));
    assert!(Store::exists(&disk).unwrap());
}

#[test]
fn a_store_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let store = Store::create(disk, DATASTORE, HOST, STORE, small()).unwrap();
    let e = FileDisk::open(dir.path()).unwrap_err();
    assert!(matches!(&e, StoreError::InUse { path } if *path == dir.path().display().to_string()), "{e}");
    drop(store);
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    assert_eq!(Store::open(disk, DATASTORE, HOST, small()).unwrap().id(), STORE);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = |p: &std::path::Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir.path().join("meta")), 0o600);
    assert_eq!(mode(&dir.path().join("store")), 0o600);
}

/// Rewrites a field of a sealed page (checksum in its last four bytes).
fn patch(disk: &SimDisk, name: &str, page: u64, at: usize, value: u32) {
    let file = disk.open(name, false).unwrap();
    let mut bytes = vec![0u8; 4096];
    file.read_at(&mut bytes, page * 4096).unwrap();
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..4092]);
    bytes[4092..].copy_from_slice(&crc.to_le_bytes());
    file.write_at(&bytes, page * 4096).unwrap();
}

#[test]
fn other_versions_are_refused_naming_both() {
    let mut rig = Rig::new();
    rig.write(1, &[1]);
    rig.image.sync().unwrap();
    let disk = rig.disk.kill();
    patch(&disk, "store", 0, 8, 9);
    let e = open(&disk, small()).unwrap_err().to_string();
    assert!(e.contains("version 9") && e.contains("version 1"), "{e}");
    let disk = rig.disk.kill();
    patch(&disk, &format!("map/{IMAGE}"), 0, 8, 5);
    let store = open(&disk, small()).unwrap();
    let (id, why) = store.damaged()[0].clone();
    assert!(id == IMAGE && why.contains("version 5") && why.contains("version 1"), "{why}");
    assert!(store.image(IMAGE).is_none());
    assert!(matches!(store.create_image(IMAGE, MemberRole::Replica), Err(StoreError::ImageExists(_))));
    drop(store);
    // Nothing was taken from it: with its version back it opens.
    patch(&disk, &format!("map/{IMAGE}"), 0, 8, 1);
    rig.reopen(disk);
    rig.model.check(&rig.image);
    let disk = rig.disk.kill();
    let seg = disk.files().into_iter().find(|(n, _)| n.starts_with("seg/")).unwrap().0;
    patch(&disk, &seg, 0, 8, 3);
    let e = open(&disk, small()).unwrap_err().to_string();
    assert!(e.contains("version 3") && e.contains(&seg), "{e}");
}

/// As [`patch`], for structures whose checksum is elsewhere: `crc` makes it.
fn patch_page(disk: &SimDisk, name: &str, page: u64, change: impl FnOnce(&mut [u8])) {
    let file = disk.open(name, false).unwrap();
    let mut bytes = vec![0u8; 4096];
    file.read_at(&mut bytes, page * 4096).unwrap();
    change(&mut bytes);
    file.write_at(&bytes, page * 4096).unwrap();
}

#[test]
fn other_versions_of_header_pages_and_metadata_are_refused_naming_both() {
    let mut rig = Rig::new();
    rig.write(1, &[1]);
    rig.store.put_meta(IMAGE, &[1; 100]).unwrap();
    rig.image.sync().unwrap();
    let seg = rig.disk.files().into_iter().find(|(n, _)| n.starts_with("seg/")).unwrap().0;
    let disk = rig.disk.kill();
    for page in [2, 3] {
        patch_page(&disk, &seg, page, |b| {
            b[4..6].copy_from_slice(&7u16.to_le_bytes());
            let crc = crc32c::crc32c_append(crc32c::crc32c(&b[..60]), &b[64..]);
            b[60..64].copy_from_slice(&crc.to_le_bytes());
        });
    }
    let store = open(&disk, small()).unwrap();
    let (id, why) = store.damaged()[0].clone();
    assert_eq!(id, IMAGE);
    assert!(why.contains("version 7") && why.contains("version 1") && why.contains(&seg), "{why}");
    let disk = rig.disk.kill();
    for page in [0, 1] {
        patch_page(&disk, "meta", page, |b| {
            b[4..8].copy_from_slice(&6u32.to_le_bytes());
            let len = u32::from_le_bytes(b[16..20].try_into().unwrap()) as usize;
            let crc = crc32c::crc32c_append(crc32c::crc32c(&b[..20]), &b[24..24 + len]);
            b[20..24].copy_from_slice(&crc.to_le_bytes());
        });
    }
    let e = open(&disk, small()).unwrap_err().to_string();
    assert!(e.contains("version 6") && e.contains("version 1") && e.contains("metadata"), "{e}");
}

#[test]
fn a_full_disk_refuses_data_and_takes_control_updates() {
    let cfg = StoreConfig { reserve_bytes: 512 << 10, ..small() };
    let mut rig = Rig::with(SimDisk::new(4 << 20), cfg);
    let mut i = 0u64;
    let full = loop {
        i += 1;
        let (u, payload) = rig.maker.write(i % 500, &block(i % 500, i), Seq::ZERO);
        match rig.image.reserve(u.bytes.len(), 1, Space::Data) {
            Ok(r) => {
                rig.image.append(r, &u, &payload).unwrap();
                rig.model.push(&u, &payload, |m| m[(i % 500) as usize] = i);
            }
            Err(e) => break e,
        }
        assert!(i < 5000, "never full");
    };
    assert!(matches!(full, StoreError::Full), "{full}");
    assert_eq!(rig.image.latched(), None);
    rig.model.check(&rig.image);
    assert!(
        rig.disk.free_bytes().unwrap() >= rig.cfg.reserve_bytes / 4,
        "data took what is kept for promises"
    );
    // The update that got no space was never made: the chain goes on from the head.
    let tip = rig.image.state().tip;
    for n in 0..100u64 {
        let u = if n == 0 {
            rig.maker.next_epoch(5, &tip)
        } else {
            rig.maker.op(vmfs_common::chain::Draft::op(Op::Unlink), Seq::ZERO)
        };
        let r = rig.image.reserve(u.bytes.len(), 0, Space::Control).unwrap();
        rig.image.append(r, &u, &[]).unwrap();
        rig.model.push(&u, &[], |_| {});
    }
    let head = rig.image.sync().unwrap();
    rig.store.put_meta(IMAGE, &[1; 500]).unwrap();
    rig.image.checkpoint().unwrap();
    rig.reopen(rig.disk.power_cut(1));
    assert_eq!(rig.image.head(), head);
    rig.model.check(&rig.image);
    // Everything but the newest data is dead: the retained log is given up for it.
    rig.image.set_commit(head.seq);
    rig.store.background(0).unwrap();
    rig.store.background(0).unwrap();
    let tip = rig.image.state().tip;
    let u = rig.maker.next_epoch(6, &tip);
    rig.image.append(rig.image.reserve(u.bytes.len(), 0, Space::Control).unwrap(), &u, &[]).unwrap();
    rig.model.push(&u, &[], |_| {});
    rig.image.sync().unwrap();
    rig.image.set_commit(u.header.seq);
    for _ in 0..3 {
        rig.store.background(0).unwrap();
    }
    println!(
        "log from {} of {}, free {}",
        rig.image.log_start(),
        rig.image.head().seq,
        rig.store.free_bytes()
    );
    rig.write(3, &[99_999]);
    rig.model.check(&rig.image);
}

/// Something else took the disk's last byte: what a promise and an epoch need comes out of the reserve.
#[test]
fn control_updates_and_promises_live_on_the_reserve_when_nothing_else_is_free() {
    let cfg = StoreConfig { reserve_bytes: 1 << 20, ..small() };
    let mut rig = Rig::with(SimDisk::new(4 << 20), cfg);
    rig.write(1, &[1, 2, 3]);
    rig.image.sync().unwrap();
    rig.disk.set_capacity_bytes(rig.disk.used_bytes());
    assert_eq!(rig.disk.free_bytes().unwrap(), 0);
    for n in 0..400u64 {
        let u = rig.maker.op(vmfs_common::chain::Draft::op(Op::Unlink), Seq::ZERO);
        let r =
            rig.image.reserve(u.bytes.len(), 0, Space::Control).unwrap_or_else(|e| panic!("update {n}: {e}"));
        rig.image.append(r, &u, &[]).unwrap();
        rig.model.push(&u, &[], |_| {});
    }
    let head = rig.image.sync().unwrap();
    for n in 0..40u64 {
        rig.store.put_meta(IMAGE, &n.to_le_bytes()).unwrap();
    }
    rig.image.checkpoint().unwrap();
    rig.reopen(rig.disk.power_cut(1));
    assert_eq!(rig.image.head(), head);
    assert_eq!(**rig.store.get_meta(IMAGE).unwrap(), 39u64.to_le_bytes());
    rig.model.check(&rig.image);
}

#[test]
fn a_failed_sync_stops_the_image_and_recovery_writes_the_tail_again() {
    let mut rig = Rig::new();
    rig.write(1, &[1, 2]);
    rig.image.sync().unwrap();
    rig.write(2, &[5, 6]);
    let calls = rig.disk.calls();
    // The payload and the header page go first, then the sync.
    rig.disk.fail_call(Some(calls + 2));
    assert!(rig.image.sync().is_err());
    assert!(matches!(rig.image.sync(), Err(StoreError::Latched { .. })));
    assert!(matches!(rig.image.reserve(300, 1, Space::Data), Err(StoreError::Latched { .. })));
    assert!(rig.image.latched().unwrap().contains("sync"));
    assert_eq!(rig.image.durable_head().seq, Seq(2));
    // The process dies, the page cache lives; what it shows is not on the disk and a sync would
    // not write it.
    rig.reopen(rig.disk.kill());
    assert_eq!(rig.image.head(), rig.model.head());
    rig.reopen(rig.disk.power_cut(4));
    assert_eq!(rig.image.head(), rig.model.head());
    rig.model.check(&rig.image);
    assert!(rig.disk.files().iter().all(|(n, _)| !n.starts_with("mark/")));
}

/// Nobody was told that it is durable, but it is there as long as the machine runs.
#[test]
fn what_a_failed_sync_left_in_memory_outlives_a_recovery_that_is_killed_anywhere() {
    for n in 0.. {
        let mut rig = Rig::new();
        rig.write(1, &[1, 2]);
        rig.image.sync().unwrap();
        rig.write(2, &[5, 6]);
        rig.disk.fail_call(Some(rig.disk.calls() + 2));
        assert!(rig.image.sync().is_err());
        let disk = rig.disk.kill();
        let calls = disk.calls();
        disk.stop_at_call(Some(calls + n));
        let opened = open(&disk, small());
        let whole = opened.is_ok() && disk.calls() <= calls + n;
        drop(opened);
        rig.reopen(disk.kill());
        assert_eq!(rig.image.head(), rig.model.head(), "killed at call {n} of the recovery");
        rig.model.check(&rig.image);
        if whole {
            assert!(n > 10, "only {n} calls");
            return;
        }
    }
}

/// What was durable before the failed sync is in one of the two copies of a header page, and the recovery writes both.
#[test]
fn what_was_durable_before_a_failed_sync_outlives_a_recovery_that_loses_power_anywhere() {
    for seed in 0..24 {
        for n in 0.. {
            let mut rig = Rig::new();
            let mut durable = rig.image.head();
            for i in 0..3 {
                rig.write(10 * i, &[i + 1, 2]);
                durable = rig.image.sync().unwrap();
            }
            rig.write(2, &[5, 6]);
            rig.disk.fail_syncs(true);
            assert!(rig.image.sync().is_err());
            rig.disk.fail_syncs(false);
            let disk = rig.disk.kill();
            let calls = disk.calls();
            disk.stop_at_call(Some(calls + n));
            let whole = open(&disk, small()).is_ok() && disk.calls() <= calls + n;
            rig.reopen(disk.power_cut(seed));
            let head = rig.image.head();
            assert!(head.seq >= durable.seq, "seed {seed}: power lost at call {n} of the recovery: {head:?}");
            rig.model.check(&rig.image);
            if whole {
                assert!(n > 10, "only {n} calls");
                break;
            }
        }
    }
}

/// Seed 610209 of the simulator: the disk that fails a sync fails what would have told of it, too.
#[test]
fn a_failed_sync_that_could_leave_no_mark_is_not_believed_by_the_next_process_either() {
    let (mut failed, mut shorter) = (0, 0);
    for n in 0.. {
        let mut rig = Rig::new();
        rig.write(1, &[1, 2]);
        let synced = rig.image.sync().unwrap();
        for i in 0..4 {
            rig.write(2 + i, &[5, 6]);
        }
        let calls = rig.disk.calls();
        rig.disk.fail_call(Some(calls + n));
        let done = rig.image.checkpoint();
        if rig.disk.calls() <= calls + n {
            break;
        }
        failed += usize::from(done.is_err());
        let disk = rig.disk.kill();
        disk.fail_call(None);
        for (mark, _) in disk.files().iter().filter(|(n, _)| n.starts_with("mark/")) {
            disk.remove(mark).unwrap();
        }
        rig.reopen(disk);
        let head = rig.image.head();
        assert!(head.seq >= synced.seq, "call {n}");
        shorter += usize::from(head != rig.model.head());
        for seed in 0..4 {
            let store = open(&rig.disk.power_cut(seed), small()).unwrap();
            let image = store.image(IMAGE).unwrap();
            assert_eq!(image.head(), head, "call {n}: shown before, and gone");
            let report = image.verify(&mut |_, _| {}).unwrap();
            assert!(report.bad_blocks.is_empty() && report.bad_updates.is_empty(), "call {n}: {report:?}");
        }
    }
    assert!(failed > 3 && shorter > 0, "{failed} {shorter}");
}

/// Flips a bit of the payload with this content.
fn damage(disk: &SimDisk, content: &[u8]) {
    let segments = disk.files().into_iter().filter(|(n, _)| n.starts_with("seg/"));
    let found = segments.into_iter().find_map(|(n, len)| {
        let file = disk.open(&n, false).unwrap();
        let mut page = vec![0u8; 4096];
        (0..len / 4096).find_map(|p| {
            file.read_at(&mut page, p * 4096).unwrap();
            (page == content).then(|| (n.clone(), p * 4096))
        })
    });
    let (name, at) = found.unwrap();
    assert!(disk.flip_bit(&name, at + 17, 3));
}

/// What a scrub finds.
fn scrubbed(rig: &Rig) -> Vec<BadPayload> {
    let mut scrub = rig.image.begin_scrub();
    assert!(scrub.step(u64::MAX).unwrap().finished);
    scrub.take_bad()
}

#[test]
fn a_repair_is_read_back_from_the_disk() {
    let mut rig = Rig::new();
    rig.write(3, &[7, 8]);
    rig.image.sync().unwrap();
    let right = block(3, 7);
    damage(&rig.disk, &right);
    let bad = scrubbed(&rig);
    assert_eq!(bad.len(), 1);
    rig.disk.lose_next_write();
    assert!(matches!(rig.image.repair(&bad[0], &right), Err(StoreError::Corrupt { .. })));
    let mut buf = vec![0u8; 4096];
    assert!(matches!(rig.image.read(BlockIndex(3), &mut buf), Err(StoreError::BadBlock { .. })));
    rig.disk.lose_next_write();
    assert!(matches!(rig.image.rewrite_block(BlockIndex(3), &right), Err(StoreError::Corrupt { .. })));
    assert!(rig.image.repair(&bad[0], &right).unwrap());
    rig.image.read(BlockIndex(3), &mut buf).unwrap();
    assert_eq!((buf, scrubbed(&rig)), (right, Vec::new()));
}

/// Of a file that was written in large pieces, which the kernel keeps in pieces as large.
#[test]
fn one_page_that_is_forgotten_is_read_from_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(dir.path()).unwrap();
    let file = disk.open("f", true).unwrap();
    file.write_at(&vec![7; 4 << 20], 0).unwrap();
    file.sync().unwrap();
    let in_memory = || file.read_soon(&mut [0; 4096], 100 * 4096).unwrap();
    file.forget(100..101).unwrap();
    if in_memory() {
        // Unless the file system is in memory altogether.
        file.forget(0..1024).unwrap();
        assert!(in_memory(), "the page was kept");
    }
}

/// The kernel gives up what the log has not synced in that file, too, and says so once to each descriptor.
#[test]
fn a_failed_sync_of_a_repair_is_heard_by_the_log() {
    for scrub in [true, false] {
        let mut rig = Rig::new();
        rig.write(3, &[7]);
        rig.image.sync().unwrap();
        let right = block(3, 7);
        damage(&rig.disk, &right);
        let bad = scrubbed(&rig);
        rig.write(9, &[1]);
        rig.disk.fail_syncs(true);
        let repaired = match scrub {
            true => rig.image.repair(&bad[0], &right).map(|_| ()),
            false => rig.image.rewrite_block(BlockIndex(3), &right),
        };
        assert!(matches!(repaired, Err(StoreError::Io { .. })), "{repaired:?}");
        rig.disk.fail_syncs(false);
        assert!(rig.image.sync().is_err(), "what was written after the last sync may be lost");
    }
}

#[test]
fn a_damaged_block_is_found_repaired_and_never_shortens_the_chain() {
    let mut rig = Rig::new();
    for i in 0..10 {
        rig.write(i, &[i + 1]);
    }
    rig.image.sync().unwrap();
    rig.write(100, &[1]);
    rig.image.sync().unwrap();
    let want = block(4, 5);
    damage(&rig.disk, &want);
    let disk = rig.disk.power_cut(2);
    let store = open(&disk, small()).unwrap();
    let image = store.image(IMAGE).unwrap();
    assert_eq!(image.head(), rig.model.head());
    let mut buf = vec![0u8; 10 * 4096];
    let e = image.read(BlockIndex(0), &mut buf).unwrap_err();
    assert!(matches!(e, StoreError::BadBlock { index: BlockIndex(4) }), "{e}");
    image.read(BlockIndex(5), &mut buf[..4096]).unwrap();
    let entries = image.read_log(Seq(1), 1 << 20).unwrap();
    assert_eq!(entries.last().unwrap().update.header.seq, Seq(5));
    assert!(matches!(image.read_log(Seq(6), 1 << 20), Err(StoreError::BadPayload { seq: Seq(6) })));
    let report = image.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.bad_blocks, report.bad_updates), (vec![BlockIndex(4)], vec![Seq(6)]));
    assert!(matches!(image.rewrite_block(BlockIndex(4), &block(4, 6)), Err(StoreError::DigestMismatch)));
    image.rewrite_block(BlockIndex(4), &want).unwrap();
    rig.store = store;
    rig.image = image;
    rig.model.check(&rig.image);
}

/// Every bit of every kind of page: whatever is hit, what is read is right or an error, and a
/// reopened copy never claims what it does not have.
#[test]
fn one_flipped_bit_never_becomes_content() {
    let mut rig = Rig::new();
    for i in 0..120u64 {
        rig.write((i * 13) % 200, &[i + 1, 0, i + 2]);
        if i % 9 == 0 {
            rig.image.set_commit(rig.image.sync().unwrap().seq);
        }
        if i % 50 == 49 {
            rig.image.checkpoint().unwrap();
        }
    }
    rig.store.put_meta(IMAGE, &[5; 5000]).unwrap();
    rig.image.sync().unwrap();
    let (mut whole, mut hurt) = (0, 0);
    let clean = rig.disk.power_cut(1);
    let mut seed = 77u64;
    for (name, len) in clean.files() {
        for page in 0..len / 4096 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let disk = clean.kill();
            if name == "reserve"
                || !disk.flip_bit(&name, page * 4096 + (seed >> 33) % 4096, (seed >> 60) as u32)
            {
                continue;
            }
            let Ok(store) = open(&disk, small()) else {
                hurt += 1;
                continue;
            };
            if let Some(v) = store.get_meta(IMAGE) {
                assert!(**v == [5; 5000]);
            } else {
                panic!("metadata lost by {name} page {page}");
            }
            let Some(image) = store.image(IMAGE) else {
                hurt += 1;
                assert_eq!(store.damaged().len(), 1, "{name} page {page}");
                continue;
            };
            let at = rig.model.at(image.head()).expect("a head that was there");
            let fills = &rig.model.history[at].1;
            let mut buf = vec![0u8; 4096];
            let mut good = at + 1 == rig.model.history.len();
            for (i, fill) in fills.iter().enumerate() {
                match image.read(BlockIndex(i as u64), &mut buf) {
                    Ok(()) => assert!(buf == block(i as u64, *fill), "{name} page {page} block {i}"),
                    Err(_) => good = false,
                }
            }
            if good { whole += 1 } else { hurt += 1 }
        }
    }
    // Two copies of nearly everything that is not data.
    assert!(whole > 0 && hurt > 0, "{whole} {hurt}");
    println!("{whole} unharmed, {hurt} harmed");
}

/// One fixed piece of work, cut at every single call to the disk.
#[test]
fn a_power_cut_at_any_call_leaves_a_prefix() {
    let cfg = || StoreConfig { checkpoint_log_bytes: 40 << 10, ..small() };
    let work = |disk: &SimDisk, log: &mut Vec<(vmfs_common::Head, u64)>| -> Result<(), StoreError> {
        let store = create(disk, cfg())?;
        let image = store.create_image(IMAGE, MemberRole::Replica)?;
        let (mut maker, genesis) = Maker::genesis(IMAGE);
        append(&image, &genesis, &[])?;
        for i in 1..40u64 {
            let (u, payload) = maker.write(0, &block(0, i), Seq::ZERO);
            append(&image, &u, &payload)?;
            if i % 3 == 0 {
                let head = image.sync()?;
                log.push((head, i));
                store.put_meta(IMAGE, &i.to_le_bytes())?;
            }
            store.background(1 << 16)?;
        }
        let to = image.head_at(Seq(20))?.expect("in the log");
        image.roll_back(to, true)?;
        log.push((to, 19));
        let fork = image.forks()[0].name.clone();
        image.drop_fork(&fork)?;
        store.remove_image(IMAGE)?;
        log.clear();
        Ok(())
    };
    let disk = SimDisk::new(1 << 26);
    work(&disk, &mut Vec::new()).unwrap();
    let calls = disk.calls();
    assert!(calls > 150);
    for cut in 0..calls {
        let disk = SimDisk::new(1 << 26);
        disk.stop_at_call(Some(cut));
        let mut log = Vec::new();
        work(&disk, &mut log).unwrap_err();
        for seed in 0..3 {
            let disk = disk.power_cut(cut * 3 + seed);
            if !Store::exists(&disk).unwrap() {
                assert!(log.is_empty(), "cut {cut}");
                continue;
            }
            let store = open(&disk, cfg()).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
            assert_eq!(store.damaged(), [], "cut {cut}");
            let Some(image) = store.image(IMAGE) else {
                let removing = log.last().is_some_and(|l| l.1 == 19);
                assert!(log.is_empty() || removing, "cut {cut}");
                continue;
            };
            let head = image.head();
            let (floor, fill) = log.last().copied().unwrap_or_default();
            let rolled = head.seq == Seq(20) && floor.seq > Seq(20);
            assert!(head.seq >= floor.seq || rolled, "cut {cut}: {} below {}", head.seq, floor.seq);
            let mut buf = vec![0u8; 4096];
            image.read(BlockIndex(0), &mut buf).unwrap();
            assert!(buf == block(0, head.seq.0.saturating_sub(1)), "cut {cut}");
            let meta = store.get_meta(IMAGE).map_or(0, |m| u64::from_le_bytes((**m).try_into().unwrap()));
            assert!(fill == 19 || meta + 3 >= fill, "cut {cut}: metadata {meta} of {fill}");
        }
    }
}

#[test]
fn a_lost_and_a_misdirected_write_are_found() {
    for misdirect in [false, true] {
        let mut rig = Rig::new();
        for i in 0..20 {
            rig.write(i, &[i + 1]);
        }
        // Small payloads wait for a sync, and go to the disk together: here each by itself.
        rig.image.sync().unwrap();
        if misdirect {
            // Over the payload of the next update but one.
            rig.disk.misdirect_next_write(2);
        } else {
            rig.disk.lose_next_write();
        }
        for (block, fill) in [(5, 500), (6, 600), (7, 700)] {
            rig.write(block, &[fill]);
            rig.image.sync().unwrap();
        }
        let e = rig.image.read(BlockIndex(5), &mut [0; 4096]).unwrap_err();
        assert!(matches!(e, StoreError::BadBlock { index: BlockIndex(5) }), "{e}");
        rig.image.read(BlockIndex(4), &mut [0; 4096]).unwrap();
        assert_eq!(rig.image.verify(&mut |_, _| {}).unwrap().bad_blocks, [BlockIndex(5)]);
    }
}

#[test]
fn many_images_open_quickly_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let id = |n: u64| ImageId::from_bytes([n.to_le_bytes(), [1; 8]].concat().try_into().unwrap());
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let cfg = StoreConfig { reserve_bytes: 1 << 20, open_files_max: 32, ..StoreConfig::default() };
    let store = Store::create(disk, DATASTORE, HOST, STORE, cfg.clone()).unwrap();
    for n in 0..100 {
        let image = store.create_image(id(n), MemberRole::Replica).unwrap();
        let (mut maker, genesis) = Maker::genesis(id(n));
        append(&image, &genesis, &[]).unwrap();
        for i in 0..40u64 {
            let (u, payload) = maker.write(i << 20, &block(i, i + n + 1), Seq::ZERO);
            append(&image, &u, &payload).unwrap();
        }
        image.sync().unwrap();
    }
    drop(store);
    let t = std::time::Instant::now();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let store = Store::open(disk, DATASTORE, HOST, cfg).unwrap();
    let took = t.elapsed();
    assert_eq!(store.image_ids().len(), 100);
    for n in 0..100 {
        let image = store.image(id(n)).unwrap();
        assert_eq!(image.head().seq, Seq(41));
        let mut buf = vec![0u8; 4096];
        image.read(BlockIndex(7 << 20), &mut buf).unwrap();
        assert!(buf == block(7, 8 + n));
    }
    assert!(took.as_secs() < 5, "{took:?}");
}
