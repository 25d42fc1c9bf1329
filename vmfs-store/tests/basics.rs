//! What one image does, one thing at a time.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::{IMAGE, Maker, Rig, append, create, open, small};
use vmfs_common::hash::hash;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Digest, ImageId, Seq};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{MERKLE_ROOT_LEVEL, Space, StoreConfig, StoreError};

#[test]
fn what_is_written_is_read_before_and_after_a_restart() {
    let mut rig = Rig::new();
    rig.write(3, &[1, 2, 0, 4]);
    rig.write(5, &[9]);
    rig.model.check(&rig.image);
    rig.image.sync().unwrap();
    rig.reopen(rig.disk.power_cut(1));
    rig.model.check(&rig.image);
    assert_eq!(rig.image.durable_head(), rig.model.head());
    rig.image.checkpoint().unwrap();
    rig.model.check(&rig.image);
    rig.reopen(rig.disk.power_cut(2));
    rig.model.check(&rig.image);
}

#[test]
fn many_segments_and_checkpoints() {
    let mut rig = Rig::new();
    for round in 1..200u64 {
        rig.write((round * 37) % 600, &[round, round + 1, 0, round + 2, round + 3]);
        if round % 7 == 0 {
            rig.image.sync().unwrap();
        }
        if round % 50 == 0 {
            rig.image.checkpoint().unwrap();
            rig.model.check(&rig.image);
        }
    }
    rig.model.check(&rig.image);
    rig.image.sync().unwrap();
    rig.reopen(rig.disk.power_cut(3));
    rig.model.check(&rig.image);
    let report = rig.image.verify(&mut |_, _| {}).unwrap();
    assert!(report.bad_blocks.is_empty() && report.bad_updates.is_empty());
    assert_eq!(report.blocks, rig.image.allocated_blocks().0);
    let mut buf = vec![0; 4096];
    rig.image.read(BlockIndex(1 << 39), &mut buf).unwrap();
    assert!(buf.iter().all(|b| *b == 0));
}

#[test]
fn overwriting_the_same_data_does_not_fill_the_disk() {
    let mut rig = Rig::new();
    let mut most = 0;
    for round in 1..3000u64 {
        rig.write(round % 40, &[round]);
        if round % 10 == 0 {
            rig.image.set_commit(rig.image.sync().unwrap().seq);
            rig.store.background(1 << 20).unwrap();
        }
        if round == 1000 {
            most = rig.disk.used_bytes();
        }
        if round > 1000 {
            assert!(rig.disk.used_bytes() < most * 3 / 2, "{} then {most}", rig.disk.used_bytes());
        }
    }
    assert!(rig.image.log_start() > Seq(2000));
    let log_start = rig.image.log_start();
    assert!(
        matches!(rig.image.read_log(Seq(5), 1), Err(StoreError::Trimmed { log_start: s }) if s == log_start)
    );
    assert_eq!(rig.image.update_at(Seq(5)).unwrap(), None);
    rig.model.check(&rig.image);
    rig.reopen(rig.disk.kill());
    rig.model.check(&rig.image);
    assert_eq!(rig.image.log_start(), log_start);
}

#[test]
fn retained_log_is_kept_and_let_go() {
    let mut rig = Rig::new();
    rig.image.retain_from(Seq(240));
    for round in 1..300u64 {
        rig.write(round % 8, &[round]);
    }
    rig.image.set_commit(rig.image.sync().unwrap().seq);
    // The other superblock's checkpoint keeps its log, so it takes two to let go.
    rig.image.checkpoint().unwrap();
    rig.write(1, &[1]);
    rig.image.set_commit(rig.image.sync().unwrap().seq);
    rig.image.checkpoint().unwrap();
    let kept = rig.image.log_start();
    assert!(kept > Seq(150) && kept <= Seq(240), "{kept}");
    rig.image.retain_from(rig.image.head().seq);
    rig.write(1, &[2]);
    rig.image.checkpoint().unwrap();
    assert!(rig.image.log_start() > Seq(250), "{}", rig.image.log_start());
    let gone = rig.model.history[100].0;
    assert!(matches!(rig.image.roll_back(gone, true), Err(StoreError::CannotRollBack { to: Seq(100) })));
    rig.model.check(&rig.image);
}

#[test]
fn log_for_catch_up_is_kept_beyond_the_configured_bytes_as_long_as_it_is_wanted() {
    let mut rig = Rig::with(SimDisk::new(1 << 30), StoreConfig { retain_log_bytes_max: 0, ..small() });
    let overwrite = |rig: &mut Rig, times: u64| {
        for round in 1..=times {
            rig.write(round % 8, &[round]);
        }
        // The other superblock's checkpoint keeps its log, so it takes two to let go.
        for _ in 0..2 {
            rig.write(1, &[times]);
            rig.image.set_commit(rig.image.sync().unwrap().seq);
            rig.image.checkpoint().unwrap();
        }
        rig.image.log_start()
    };
    overwrite(&mut rig, 100);
    let wanted = rig.image.head().seq;
    rig.image.retain_for_catch_up(Some((wanted, 1 << 20)));
    assert!(overwrite(&mut rig, 80) <= wanted);
    let held = rig.disk.used_bytes();
    // More than a megabyte of it.
    assert!(overwrite(&mut rig, 400) > wanted);
    let wanted = rig.image.head().seq;
    rig.image.retain_for_catch_up(Some((wanted, 1 << 20)));
    assert!(overwrite(&mut rig, 80) <= wanted);
    rig.image.retain_for_catch_up(None);
    assert!(overwrite(&mut rig, 8) > wanted);
    rig.store.background(1 << 20).unwrap();
    assert!(rig.disk.used_bytes() < held, "{} now, {held} then", rig.disk.used_bytes());
    rig.model.check(&rig.image);
}

#[test]
fn a_view_outlives_everything_it_shows() {
    let mut rig = Rig::new();
    rig.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let view = rig.image.view();
    let root = view.merkle_tree().unwrap().root();
    for round in 1..800u64 {
        rig.write(round % 8, &[100 + round]);
        if round % 20 == 0 {
            rig.image.set_commit(rig.image.sync().unwrap().seq);
            rig.image.checkpoint().unwrap();
            rig.store.background(1 << 20).unwrap();
        }
    }
    let mut buf = vec![0u8; 8 * 4096];
    view.read(BlockIndex(0), &mut buf).unwrap();
    for i in 0..8u64 {
        assert!(buf[i as usize * 4096..][..4096] == common::block(i, i + 1));
    }
    assert_eq!(view.merkle_tree().unwrap().root(), root);
    assert_ne!(rig.image.view().merkle_tree().unwrap().root(), root);
    assert_eq!(view.head().seq, Seq(2));
    let held = rig.disk.used_bytes();
    drop(view);
    rig.store.background(1 << 20).unwrap();
    assert!(rig.disk.used_bytes() <= held);
}

#[test]
fn merkle_roots_depend_on_content_alone() {
    let mut a = Rig::new();
    a.write(600, &[1, 2, 3]);
    a.write(5, &[9, 0, 9]);
    let mut b = Rig::new();
    b.write(5, &[7]);
    b.write(5, &[9, 5, 9]);
    b.write(6, &[0]);
    b.image.checkpoint().unwrap();
    b.write(600, &[1, 2, 3]);
    let view = a.image.view();
    let (mut a, b) = (view.merkle_tree().unwrap(), b.image.view().merkle_tree().unwrap());
    assert_eq!(a, b);
    assert_eq!(a.node(3, 1), Digest::default());
    assert_eq!(a.node(MERKLE_ROOT_LEVEL, 1), Digest::default());
    assert_eq!(a.node(MERKLE_ROOT_LEVEL, u64::MAX), Digest::default());
    let children = a.children(2, 0);
    assert_eq!(children.iter().filter(|d| !d.is_zero()).count(), 2);
    assert_eq!(children[1], a.node(1, 1));
    // As docs/protocol.md says it.
    let bytes = |digests: &[Digest]| digests.iter().flat_map(|d| *d.as_bytes()).collect::<Vec<u8>>();
    let node = |level: u32, below: &[Digest]| hash("merkle", &[&level.to_le_bytes()[..], &bytes(below)]);
    let leaf = view.digests(BlockIndex(512), 512).unwrap();
    assert_eq!(children[1], node(1, &leaf));
    assert_eq!(a.node(2, 0), node(2, &children));
    let root = a.root();
    a.set(1, &[Digest::default(); 512]);
    assert_ne!(a.root(), root);
    a.set(1, &leaf);
    assert_eq!(a.root(), root);
}

#[test]
fn a_witness_keeps_headers_only() {
    let disk = SimDisk::new(1 << 26);
    let store = create(&disk, small()).unwrap();
    let image = store.create_image(IMAGE, MemberRole::Witness).unwrap();
    let (mut maker, genesis) = Maker::genesis(IMAGE);
    append(&image, &genesis, &[]).unwrap();
    for i in 1..200u64 {
        let (u, payload) = maker.write(i, &common::block(i, i), Seq::ZERO);
        append(&image, &u, &payload).unwrap();
    }
    let head = image.sync().unwrap();
    assert!(disk.used_bytes() < 200 * 4096);
    assert!(matches!(image.read(BlockIndex(1), &mut [0; 4096]), Err(StoreError::NoData(_))));
    let disk = disk.power_cut(5);
    let store = open(&disk, small()).unwrap();
    let image = store.image(IMAGE).unwrap();
    assert_eq!(image.head(), head);
    assert_eq!(image.kind(), MemberRole::Witness);
    assert_eq!(image.read_log(Seq(1), 1 << 20).unwrap().len(), 200);
    let to = image.head_at(Seq(100)).unwrap().unwrap();
    assert!(image.roll_back(to, true).unwrap().is_some());
    assert_eq!(image.head(), to);
    assert_eq!(image.verify(&mut |_, _| {}).unwrap().updates, 100);
}

#[test]
fn images_come_and_go() {
    let disk = SimDisk::new(1 << 26);
    let store = create(&disk, small()).unwrap();
    let id = |n: u8| ImageId::from_bytes([n; 16]);
    for n in 1..20u8 {
        let image = store.create_image(id(n), MemberRole::Replica).unwrap();
        let (mut maker, genesis) = Maker::genesis(id(n));
        append(&image, &genesis, &[]).unwrap();
        for i in 0..100u64 {
            let (u, payload) = maker.write(i, &common::block(i, 1 + i + u64::from(n)), Seq::ZERO);
            append(&image, &u, &payload).unwrap();
        }
        image.sync().unwrap();
    }
    assert!(matches!(store.create_image(id(3), MemberRole::Replica), Err(StoreError::ImageExists(_))));
    let full = disk.used_bytes();
    let held = store.image(id(3)).unwrap();
    for n in 1..20u8 {
        store.remove_image(id(n)).unwrap();
    }
    assert!(matches!(store.remove_image(id(3)), Err(StoreError::NoImage(_))));
    assert!(matches!(held.sync(), Err(StoreError::Latched { .. })));
    assert!(matches!(held.reserve(300, 1, Space::Data), Err(StoreError::Latched { .. })));
    drop(held);
    store.background(0).unwrap();
    assert!(disk.used_bytes() < full / 3, "{} of {full}", disk.used_bytes());
    let again = store.create_image(id(3), MemberRole::Replica).unwrap();
    let mut buf = vec![1u8; 4096];
    again.read(BlockIndex(1), &mut buf).unwrap();
    assert!(buf.iter().all(|b| *b == 0));
    drop((store, again));
    let store = open(&disk.power_cut(9), small()).unwrap();
    assert_eq!(store.image_ids(), [id(3)]);
}

#[test]
fn appends_that_do_not_extend_the_head_change_nothing() {
    let mut rig = Rig::new();
    let (skipped, _) = rig.maker.write(1, &common::block(1, 1), Seq::ZERO);
    let (u, payload) = rig.maker.write(1, &common::block(1, 2), Seq::ZERO);
    assert!(matches!(append(&rig.image, &u, &payload), Err(StoreError::NotExtending { .. })));
    assert!(matches!(append(&rig.image, &skipped, &[]), Err(StoreError::DigestMismatch)));
    assert_eq!(rig.image.latched(), None);
    rig.model.check(&rig.image);
    assert!(matches!(rig.image.roll_back(u.head(), false), Err(StoreError::NotInHistory(_))));
}

#[test]
fn forks_last_until_they_are_dropped() {
    let mut rig = Rig::new();
    rig.write(0, &[1, 2, 3]);
    let to = rig.model.head();
    for i in 0..100 {
        rig.write(i, &[i + 10]);
    }
    let tail_head = rig.model.head();
    let fork = rig.image.roll_back(to, true).unwrap().unwrap();
    assert_eq!((fork.ancestor, fork.head, fork.updates, fork.bytes), (to, tail_head, 100, 100 * 4096));
    rig.model.truncate(2);
    rig.model.check(&rig.image);
    assert_eq!(rig.image.roll_back(to, true).unwrap(), None);
    let tip = rig.image.state().tip;
    let u = rig.maker.next_epoch(7, &tip);
    append(&rig.image, &u, &[]).unwrap();
    rig.model.push(&u, &[], |_| {});
    for i in 0..200 {
        rig.write(i, &[i + 1000]);
    }
    rig.image.set_commit(rig.image.sync().unwrap().seq);
    rig.image.checkpoint().unwrap();
    rig.reopen(rig.disk.power_cut(1));
    rig.model.check(&rig.image);
    assert_eq!(rig.image.forks(), std::slice::from_ref(&fork));
    let entries = rig.image.read_fork(&fork.name, Seq(0), 1 << 20).unwrap();
    assert_eq!(entries.len(), 100);
    assert_eq!(entries[99].update.head(), tail_head);
    assert!(entries[99].payload == common::block(99, 109));
    assert!(matches!(rig.image.drop_fork("other"), Err(StoreError::NoFork(_))));
    rig.image.drop_fork(&fork.name).unwrap();
    assert!(matches!(rig.image.read_fork(&fork.name, Seq(0), 1), Err(StoreError::NoFork(_))));
    rig.reopen(rig.disk.power_cut(2));
    assert_eq!(rig.image.forks(), []);
    rig.model.check(&rig.image);
}

#[test]
fn an_import_can_keep_the_old_log_as_a_fork() {
    let mut rig = Rig::new();
    for i in 0..50 {
        rig.write(i, &[i + 1]);
    }
    let old_head = rig.model.head();
    let import = rig.image.begin_import(true).unwrap();
    let data = common::block(7, 777);
    import.write(BlockIndex(7), &[vmfs_common::hash::block_digest(&data)], &data).unwrap();
    let wrong = import.write(BlockIndex(8), &[Digest::from_bytes([1; 32])], &data);
    assert!(matches!(wrong, Err(StoreError::DigestMismatch)));
    let mut state = (*rig.image.state()).clone();
    let base = rig.maker.next_epoch(9, &state.tip);
    state.apply(&base);
    let fork = import.finish(&base, state, true).unwrap().unwrap();
    assert_eq!((fork.head, fork.updates), (old_head, 51));
    rig.reopen(rig.disk.power_cut(3));
    assert_eq!(rig.image.head(), base.head());
    assert_eq!(rig.image.read_fork(&fork.name, Seq(1), 1 << 20).unwrap().len(), 51);
    let mut buf = vec![0u8; 2 * 4096];
    rig.image.read(BlockIndex(7), &mut buf).unwrap();
    assert!(buf[..4096] == data && buf[4096..] == common::block(8, 9));
    let report = rig.image.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.blocks, report.bad_blocks.len()), (50, 0));
}

#[test]
fn metadata_lasts_and_its_journal_stays_small() {
    let disk = SimDisk::new(1 << 27);
    let store = create(&disk, small()).unwrap();
    let id = |n: u8| ImageId::from_bytes([n; 16]);
    for round in 0..1500u32 {
        store.put_meta(id((round % 3) as u8), &round.to_le_bytes()).unwrap();
        if round % 100 == 0 {
            store.background(0).unwrap();
        }
    }
    store.remove_meta(id(1)).unwrap();
    let len = disk.files().iter().find(|(n, _)| n == "meta").unwrap().1;
    assert!(len < 6 << 20, "{len}");
    let store = open(&disk.power_cut(3), small()).unwrap();
    assert_eq!(store.meta_keys(), [id(0), id(2)]);
    assert_eq!(**store.get_meta(id(2)).unwrap(), 1499u32.to_le_bytes());
    assert_eq!(store.get_meta(id(1)), None);
}
