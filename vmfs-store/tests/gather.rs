//! Gathering: an image at rest whose blocks are scattered is put in order, once, and nothing is lost by it.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::{BLOCKS, IMAGE, Rig, block, small};
use vmfs_common::BlockIndex;
use vmfs_store::disk::Disk as _;
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Store, StoreConfig, StoreError};

const BLOCK: u64 = 4096;

fn config() -> StoreConfig {
    StoreConfig { retain_log_bytes_max: 0, checkpoint_log_bytes: 512 << 10, ..small() }
}

/// The daemon's background work, until there is nothing to do.
fn try_rest(store: &Store) -> Result<(), StoreError> {
    let mut calm = 0;
    for _ in 0..2000 {
        let more = store.background(1 << 20)?;
        calm = if store.compact(64 << 10)? == 0 && !more { calm + 1 } else { 0 };
        if calm == 6 {
            return Ok(());
        }
    }
    panic!("it does not end");
}

fn rest(store: &Store) {
    try_rest(store).unwrap();
}

fn commit(image: &ImageStore) {
    image.set_commit(image.sync().unwrap().seq);
    image.retain_from(image.head().seq.next());
}

/// Every block once, in an order that leaves no two neighbours together.
fn scatter(rig: &mut Rig, from: u64) {
    for n in 0..BLOCKS {
        rig.write(n * 307 % BLOCKS, &[from + n]);
        if n % 20 == 0 {
            commit(&rig.image);
            rig.store.background(1 << 20).unwrap();
        }
    }
    commit(&rig.image);
}

/// How many reads the disk gets for the whole image in order; the map is in memory.
fn reads(rig: &Rig) -> u64 {
    let mut buf = vec![0; BLOCKS as usize * 4096];
    rig.image.read(BlockIndex(0), &mut buf).unwrap();
    let before = rig.disk.reads();
    rig.image.read(BlockIndex(0), &mut buf).unwrap();
    rig.disk.reads() - before
}

/// Damages a block wherever it is on the disk. Returns in how many places that was.
fn damage(disk: &SimDisk, block: &[u8]) -> usize {
    let mut places = 0;
    for (name, len) in disk.files().into_iter().filter(|(n, _)| n.starts_with("seg/")) {
        let file = disk.open(&name, false).unwrap();
        for at in (0..len).step_by(4096) {
            let mut page = vec![0; 4096];
            file.read_at(&mut page, at).unwrap();
            if page == block {
                assert!(disk.flip_bit(&name, at + 99, 3));
                places += 1;
            }
        }
    }
    places
}

fn scattered() -> Rig {
    let mut rig = Rig::with(SimDisk::new(1 << 30), config());
    for start in (0..BLOCKS).step_by(50) {
        rig.write(start, &(start..start + 50).map(|i| i + 1).collect::<Vec<_>>());
    }
    scatter(&mut rig, 10_000);
    rig
}

#[test]
fn a_scattered_image_at_rest_is_put_in_order_once() {
    let mut rig = scattered();
    let before = reads(&rig);
    assert!(before > 600, "{before}");
    rest(&rig.store);
    rig.model.check(&rig.image);
    let (after, space) = (reads(&rig), rig.image.space_use());
    // All but what is in the log's last segment, and a rest that does not fill a segment.
    println!("{before} reads, then {after}; {space:?}");
    assert!(after < before / 3, "{before} reads, then {after}");
    assert!(space.segment_bytes < 2 * space.live_bytes + (2 << 20), "{space:?}");
    // Each block was gathered once, and compacted once at most.
    assert!(space.compacted_bytes <= 2 * BLOCKS * BLOCK, "{space:?}");
    // Rest does not wear the disk, and neither does little that is written.
    rest(&rig.store);
    assert_eq!(rig.image.space_use(), space);
    for n in 0..20 {
        rig.write(n * 31, &[20_000 + n]);
    }
    commit(&rig.image);
    rest(&rig.store);
    assert_eq!(rig.image.space_use().compacted_bytes, space.compacted_bytes);
    // A start looks at the map again, and finds it in order.
    rig.reopen(rig.disk.power_cut(1));
    commit(&rig.image);
    rest(&rig.store);
    rest(&rig.store);
    assert!(rig.image.space_use().compacted_bytes < BLOCKS * BLOCK / 3, "{:?}", rig.image.space_use());
    rig.model.check(&rig.image);
    let report = rig.image.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.bad_blocks, report.bad_updates), (vec![], vec![]));
}

/// A scattered image that compaction has nothing to do for, on a copy of the disk, as after a start.
fn copy_of(rig: &Rig) -> Rig {
    let mut copy = Rig::with(SimDisk::new(1 << 30), config());
    copy.reopen(rig.disk.kill());
    copy.model = rig.model.clone();
    commit(&copy.image);
    copy
}

fn compacted() -> Rig {
    let mut rig = scattered();
    rig.cfg = StoreConfig { gather_after_rounds: u32::MAX, ..config() };
    rig.reopen(rig.disk.kill());
    commit(&rig.image);
    rest(&rig.store);
    assert!(reads(&rig) > 400, "{}", reads(&rig));
    rig
}

/// Opens what is left, and goes on.
fn check(disk: SimDisk, rig: &mut Rig, what: &str) {
    rig.reopen(disk);
    assert_eq!(rig.store.damaged(), [], "{what}");
    assert_eq!(rig.image.head(), rig.model.head(), "{what}");
    rig.model.check(&rig.image);
    let report = rig.image.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.bad_blocks, report.bad_updates), (vec![], vec![]), "{what}");
    commit(&rig.image);
    rest(&rig.store);
    rig.model.check(&rig.image);
    assert!(reads(rig) < 250, "{what}: {}", reads(rig));
}

#[test]
fn a_power_cut_at_any_call_of_gathering_loses_nothing() {
    let base = compacted();
    let copy = copy_of(&base);
    let first = copy.disk.calls();
    rest(&copy.store);
    let calls = copy.disk.calls() - first;
    println!("{} reads, then {}, by {calls} calls", reads(&base), reads(&copy));
    assert!(calls > 60 && reads(&copy) < 250);
    for cut in 0..calls {
        let mut copy = copy_of(&base);
        copy.disk.stop_at_call(Some(copy.disk.calls() + cut));
        assert!(try_rest(&copy.store).is_err(), "cut {cut}");
        let disk = copy.disk.power_cut(cut);
        check(disk, &mut copy, &format!("cut {cut} of {calls}"));
    }
}

#[test]
fn any_failing_call_of_gathering_leaves_the_image_as_it_was() {
    let base = compacted();
    let copy = copy_of(&base);
    let first = copy.disk.calls();
    rest(&copy.store);
    let calls = copy.disk.calls() - first;
    let mut latched = 0;
    for fail in 0..calls {
        let mut copy = copy_of(&base);
        copy.disk.fail_call(Some(copy.disk.calls() + fail));
        let failed = try_rest(&copy.store);
        // Gone on with, unless nobody knows which superblock is on the disk.
        if copy.image.latched().is_some() {
            latched += 1;
        } else {
            copy.model.check(&copy.image);
            try_rest(&copy.store).unwrap_or_else(|e| panic!("call {fail}: {e} after {failed:?}"));
            copy.model.check(&copy.image);
        }
        let disk = copy.disk.power_cut(fail);
        check(disk, &mut copy, &format!("call {fail} of {calls}"));
    }
    assert!(latched < calls / 3, "{latched} of {calls}");
}

#[test]
fn readers_and_a_roll_back_see_what_was_there_before_gathering() {
    let mut rig = scattered();
    let view = rig.image.view();
    let before = rig.model.clone();
    let mut want = vec![0; BLOCKS as usize * 4096];
    view.read(BlockIndex(0), &mut want).unwrap();
    rest(&rig.store);
    assert!(reads(&rig) < 250);
    // Never committed.
    for n in 0..200 {
        rig.write(n * 3, &[80_000 + n]);
        if n % 50 == 0 {
            rig.image.sync().unwrap();
        }
        rig.store.background(1 << 20).unwrap();
        rig.store.compact(64 << 10).unwrap();
    }
    rig.image.sync().unwrap();
    let mut seen = vec![0; want.len()];
    view.read(BlockIndex(0), &mut seen).unwrap();
    assert!(seen == want);
    rig.image.roll_back(before.head(), false).unwrap();
    rig.model = before;
    rig.model.check(&rig.image);
    drop(view);
    let disk = rig.disk.power_cut(4);
    check(disk, &mut rig, "after the roll-back");
}

#[test]
fn damaged_map_pages_are_made_again_from_the_log_after_gathering() {
    let mut rig = scattered();
    rest(&rig.store);
    // Over some of what was moved: this is newer.
    for n in 0..12 {
        rig.write(n * 50, &[40_000 + n]);
    }
    commit(&rig.image);
    rig.image.checkpoint().unwrap();
    let name = format!("map/{IMAGE}");
    let len = rig.disk.files().into_iter().find(|(n, _)| *n == name).unwrap().1;
    let mut repaired = 0;
    for page in 2..len / 4096 {
        let mut copy = copy_of(&rig);
        let disk = rig.disk.kill();
        if !disk.flip_bit(&name, page * 4096 + 77, 1) {
            continue;
        }
        copy.reopen(disk);
        copy.model.check(&copy.image);
        let rot = copy.image.rot();
        assert!(rot.open.iter().all(|what| what.starts_with("checkpoint ")), "page {page}: {rot:?}");
        repaired += rot.repaired;
    }
    // Two leaves and the root.
    assert!(repaired >= 3, "{repaired}");
}

#[test]
fn what_is_moved_is_in_proportion_to_what_is_written() {
    let mut rig = scattered();
    rest(&rig.store);
    let before = rig.image.space_use().compacted_bytes;
    let (mut seed, mut written) = (7u64, 0);
    for n in 0..40 {
        // Now and then so few that it is not worth a look, else so many that some windows are scattered again.
        for i in 0..[15, 60, 110][n as usize % 3] {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            rig.write((seed >> 33) % BLOCKS, &[30_000 + 200 * n + i]);
            written += BLOCK;
        }
        commit(&rig.image);
        rest(&rig.store);
    }
    rig.model.check(&rig.image);
    let moved = rig.image.space_use().compacted_bytes - before;
    println!("{moved} bytes moved for {written} written");
    assert!(moved > 0 && moved < 8 * written, "{moved} for {written}");
    assert!(reads(&rig) < 400, "{}", reads(&rig));
}

#[test]
fn a_window_with_a_damaged_block_stays_until_it_is_repaired() {
    let mut rig = scattered();
    // 600 others were written after it: it is not in the log's last segment.
    let at = 100 * 307 % BLOCKS;
    let data = block(at, 10_100);
    assert!(damage(&rig.disk, &data) > 0);
    rest(&rig.store);
    let moved = rig.image.space_use().compacted_bytes;
    assert!(moved > 0);
    rest(&rig.store);
    assert_eq!(rig.image.space_use().compacted_bytes, moved, "it is not tried again and again");
    assert_eq!(rig.image.rot().open.len(), 1, "{:?}", rig.image.rot());
    rig.image.rewrite_block(BlockIndex(at), &data).unwrap();
    rig.model.check(&rig.image);
    scatter(&mut rig, 50_000);
    rest(&rig.store);
    rig.model.check(&rig.image);
    assert!(reads(&rig) < 250, "{}", reads(&rig));
}

#[test]
fn nothing_is_gathered_while_the_guest_writes_or_the_disk_is_nearly_full() {
    let mut rig = scattered();
    let scattered = reads(&rig);
    for n in 0..100 {
        rig.write(n, &[60_000 + n]);
        commit(&rig.image);
        rig.store.background(1 << 20).unwrap();
        rig.store.compact(64 << 10).unwrap();
    }
    assert!(reads(&rig) > scattered - 120, "{} of {scattered}", reads(&rig));
    // As much is free as one segment takes.
    let used: u64 = rig.disk.files().iter().map(|(_, len)| len).sum();
    rig.disk.set_capacity_bytes(used + (2 << 20));
    rest(&rig.store);
    assert!(reads(&rig) > scattered - 120, "{} of {scattered}", reads(&rig));
    rig.disk.set_capacity_bytes(1 << 30);
    rest(&rig.store);
    assert!(reads(&rig) < scattered / 2, "{} of {scattered}", reads(&rig));
    rig.model.check(&rig.image);
}
