//! Compaction: space stays bounded under random overwrites, and nothing is lost by it whatever fails.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;

use common::{BLOCKS, IMAGE, Maker, Model, Rig, append, block, create, open, small};
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Seq};
use vmfs_store::disk::Disk as _;
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Store, StoreConfig, StoreError};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Several compactions share a checkpoint.
fn config() -> StoreConfig {
    StoreConfig { retain_log_bytes_max: 0, checkpoint_log_bytes: 512 << 10, ..small() }
}

/// As the daemon does while nothing else happens, until there is nothing to do.
fn settle(store: &Store) -> Result<(), StoreError> {
    let mut calm = 0;
    for _ in 0..1000 {
        store.background(1 << 20)?;
        calm = if store.compact(256 << 10)? == 0 { calm + 1 } else { 0 };
        if calm == 4 {
            return Ok(());
        }
    }
    panic!("compaction does not end");
}

/// Fills the image and overwrites single blocks of it at random.
fn overwrite(rig: &mut Rig, seed: u64, times: u64, mut between: impl FnMut(&Rig)) {
    let mut rng = Rng(seed);
    for start in (0..BLOCKS).step_by(50) {
        rig.write(start, &(start..start + 50).map(|i| i + 1).collect::<Vec<_>>());
    }
    for n in 0..times {
        rig.write(rng.below(BLOCKS), &[1000 + n]);
        if n % 20 == 0 {
            rig.image.set_commit(rig.image.sync().unwrap().seq);
            rig.image.retain_from(rig.image.head().seq.next());
            between(rig);
        }
    }
    rig.image.set_commit(rig.image.sync().unwrap().seq);
    rig.image.retain_from(rig.image.head().seq.next());
}

#[test]
fn space_is_bounded_under_random_overwrites() {
    let most = |compact: bool| {
        // What gathering moves is another matter.
        let cfg = StoreConfig { gather_after_rounds: u32::MAX, ..config() };
        let mut rig = Rig::with(SimDisk::new(1 << 30), cfg);
        let mut most = 0;
        overwrite(&mut rig, 1, 8 * BLOCKS, |rig| {
            rig.store.background(1 << 20).unwrap();
            if compact {
                // The budget is kept to within a piece.
                rig.store.compact(256 << 10).unwrap();
            }
            most = most.max(rig.image.space_use().segment_bytes);
        });
        rig.model.check(&rig.image);
        let report = rig.image.verify(&mut |_, _| {}).unwrap();
        assert_eq!((report.bad_blocks, report.bad_updates), (vec![], vec![]));
        if compact {
            settle(&rig.store).unwrap();
            let space = rig.image.space_use();
            assert_eq!(space.live_bytes, BLOCKS * 4096);
            println!("at rest: {space:?}");
            assert!(space.segment_bytes < 2 * space.live_bytes + (512 << 10), "{space:?}");
            // Each block was written eight times, and moved less often than that.
            assert!((1..8 * space.live_bytes).contains(&space.compacted_bytes), "{space:?}");
        }
        for disk in [rig.disk.kill(), rig.disk.power_cut(3)] {
            rig.reopen(disk);
            rig.model.check(&rig.image);
        }
        most
    };
    let (with, without) = (most(true), most(false));
    let image = BLOCKS * 4096;
    println!("{with} bytes of segments at most, without compaction {without}, for an image of {image}");
    // Beside the image: the log of two checkpoints, and emptied segments until two more are made.
    assert!(with < image * 22 / 10 + (2 << 20), "{with} of {image}");
    assert!(without > image * 3, "{without}: the load leaves no sparse segments");
}

/// A store that has something to compact: returns it before any of that is done.
fn sparse(disk: SimDisk) -> Rig {
    let mut rig = Rig::with(disk, config());
    overwrite(&mut rig, 5, 3 * BLOCKS, |rig| {
        rig.store.background(1 << 20).unwrap();
    });
    rig
}

fn check(disk: &SimDisk, model: &Model, what: &str) {
    let store = open(disk, config()).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(store.damaged(), [], "{what}");
    let image = store.image(IMAGE).unwrap();
    assert_eq!(image.head(), model.head(), "{what}");
    model.check(&image);
    let report = image.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.bad_blocks, report.bad_updates), (vec![], vec![]), "{what}");
    // And it goes on from there.
    image.set_commit(image.head().seq);
    settle(&store).unwrap();
    model.check(&image);
}

/// The store on a copy of a disk, as after a start.
fn on_copy(disk: &SimDisk) -> (SimDisk, Arc<Store>, Arc<ImageStore>) {
    let disk = disk.kill();
    let store = open(&disk, config()).unwrap();
    let image = store.image(IMAGE).unwrap();
    image.set_commit(image.head().seq);
    image.retain_from(image.head().seq.next());
    (disk, store, image)
}

#[test]
fn a_power_cut_at_any_call_of_a_compaction_loses_nothing() {
    let rig = sparse(SimDisk::new(1 << 30));
    let (disk, store, image) = on_copy(&rig.disk);
    let first = disk.calls();
    settle(&store).unwrap();
    assert!(image.space_use().compacted_bytes > 100 * 4096, "{:?}", image.space_use());
    let calls = disk.calls() - first;
    assert!(calls > 60, "{calls}");
    for cut in 0..calls {
        let (disk, store, _image) = on_copy(&rig.disk);
        disk.stop_at_call(Some(disk.calls() + cut));
        assert!(settle(&store).is_err(), "cut {cut}");
        for seed in 0..2 {
            check(&disk.power_cut(cut * 2 + seed), &rig.model, &format!("cut {cut} of {calls}, seed {seed}"));
        }
    }
}

#[test]
fn any_failing_call_of_a_compaction_leaves_the_image_as_it_was() {
    let rig = sparse(SimDisk::new(1 << 30));
    let (disk, store, _image) = on_copy(&rig.disk);
    let first = disk.calls();
    settle(&store).unwrap();
    let (calls, mut latched) = (disk.calls() - first, 0);
    for fail in 0..calls {
        let (disk, store, image) = on_copy(&rig.disk);
        disk.fail_call(Some(disk.calls() + fail));
        let what = format!("call {fail} of {calls}");
        let failed = settle(&store);
        // It is gone on with, unless nobody knows which superblock is on the disk.
        if image.latched().is_some() {
            latched += 1;
        } else {
            rig.model.check(&image);
            settle(&store).unwrap_or_else(|e| panic!("{what}: {e} after {failed:?}"));
            rig.model.check(&image);
            let space = image.space_use();
            assert!(space.segment_bytes < 2 * space.live_bytes + (512 << 10), "{what}: {space:?}");
        }
        check(&disk.kill(), &rig.model, &what);
        check(&disk.power_cut(fail), &rig.model, &what);
    }
    println!("{latched} of {calls} stopped the image");
    assert!(latched < calls / 3, "{latched} of {calls}");
}

#[test]
fn blocks_written_while_they_are_moved_keep_what_was_written() {
    let mut rig = sparse(SimDisk::new(1 << 30));
    let mut rng = Rng(9);
    for n in 0..400u64 {
        // A quarter of a job at a time.
        rig.store.compact(16 << 10).unwrap();
        let at = rng.below(BLOCKS - 3);
        match n % 7 {
            0 => {
                let u = rig.maker.zero(at, 3, Seq::ZERO);
                append(&rig.image, &u, &[]).unwrap();
                rig.model.push(&u, &[], |m| m[at as usize..at as usize + 3].fill(0));
            }
            _ => rig.write(at, &[90_000 + n]),
        }
        if n % 10 == 0 {
            rig.image.set_commit(rig.image.sync().unwrap().seq);
            rig.image.retain_from(rig.image.head().seq.next());
            rig.store.background(0).unwrap();
        }
        if n % 50 == 0 {
            rig.model.check(&rig.image);
        }
    }
    assert!(rig.image.space_use().compacted_bytes > 0);
    rig.image.sync().unwrap();
    rig.model.check(&rig.image);
    check(&rig.disk.power_cut(1), &rig.model, "at the end");
}

#[test]
fn a_reader_and_a_roll_back_see_what_was_there_before_a_compaction() {
    let mut rig = sparse(SimDisk::new(1 << 30));
    let view = rig.image.view();
    let before = rig.model.clone();
    let mut want = vec![0u8; BLOCKS as usize * 4096];
    view.read(BlockIndex(0), &mut want).unwrap();
    // From here on nothing more is committed.
    rig.write(3, &[70_000]);
    rig.image.sync().unwrap();
    settle(&rig.store).unwrap();
    for n in 0..200 {
        rig.write(n * 3, &[80_000 + n]);
        rig.store.background(0).unwrap();
        rig.store.compact(64 << 10).unwrap();
    }
    rig.image.sync().unwrap();
    let mut seen = vec![0u8; want.len()];
    view.read(BlockIndex(0), &mut seen).unwrap();
    assert!(seen == want);
    rig.image.roll_back(before.head(), false).unwrap();
    before.check(&rig.image);
    rig.model = before;
    rig.image.set_commit(rig.image.head().seq);
    settle(&rig.store).unwrap();
    rig.model.check(&rig.image);
    check(&rig.disk.power_cut(8), &rig.model, "after the roll-back");
    view.read(BlockIndex(0), &mut seen).unwrap();
    assert!(seen == want);
}

/// Where the bytes of a block are: file and offset.
fn place_of(disk: &SimDisk, want: &[u8]) -> Vec<(String, u64)> {
    let mut places = Vec::new();
    for (name, len) in disk.files().into_iter().filter(|(n, _)| n.starts_with("seg/")) {
        let file = disk.open(&name, false).unwrap();
        let mut page = vec![0u8; 4096];
        for at in (0..len).step_by(4096) {
            file.read_at(&mut page, at).unwrap();
            if page == want {
                places.push((name.clone(), at));
            }
        }
    }
    places
}

#[test]
fn a_damaged_block_is_not_moved_and_can_still_be_repaired() {
    let rig = sparse(SimDisk::new(1 << 30));
    let fills = &rig.model.history.last().unwrap().1;
    // Blocks that were not overwritten are in the oldest segments, which are the sparsest.
    let cold: Vec<u64> = (0..BLOCKS).filter(|i| fills[*i as usize] == i + 1).take(5).collect();
    assert_eq!(cold.len(), 5);
    for i in &cold {
        let places = place_of(&rig.disk, &block(*i, i + 1));
        assert_eq!(places.len(), 1);
        assert!(rig.disk.flip_bit(&places[0].0, places[0].1 + 1234, 5));
    }
    settle(&rig.store).unwrap();
    assert!(rig.image.space_use().compacted_bytes > 100 * 4096);
    assert_eq!(rig.image.rot().open.len(), 5, "{:?}", rig.image.rot());
    let report = rig.image.verify(&mut |_, _| {}).unwrap();
    assert_eq!(report.bad_blocks, cold.iter().map(|i| BlockIndex(*i)).collect::<Vec<_>>());
    for i in &cold {
        let read = rig.image.read(BlockIndex(*i), &mut [0; 4096]);
        assert!(matches!(read, Err(StoreError::BadBlock { index }) if index.0 == *i), "{read:?}");
        rig.image.rewrite_block(BlockIndex(*i), &block(*i, i + 1)).unwrap();
    }
    rig.model.check(&rig.image);
    check(&rig.disk.power_cut(2), &rig.model, "after the repair");
}

/// Opens copies of the disk with a damaged map page each. Returns how many pages were made again.
fn damage_each_map_page(rig: &Rig) -> u64 {
    let name = format!("map/{IMAGE}");
    let len = rig.disk.files().into_iter().find(|(n, _)| *n == name).unwrap().1;
    let mut repaired = 0;
    for page in 2..len / 4096 {
        let disk = rig.disk.kill();
        if !disk.flip_bit(&name, page * 4096 + 77, 1) {
            continue;
        }
        let store = open(&disk, config()).unwrap();
        let image = store.image(IMAGE).unwrap();
        rig.model.check(&image);
        // A body's page is made good by the next checkpoint.
        let rot = image.rot();
        assert!(rot.open.iter().all(|what| what.starts_with("checkpoint ")), "page {page}: {rot:?}");
        repaired += rot.repaired;
    }
    repaired
}

#[test]
fn damaged_map_pages_are_made_again_from_the_log_after_a_compaction() {
    let mut rig = sparse(SimDisk::new(1 << 30));
    settle(&rig.store).unwrap();
    assert!(rig.image.space_use().compacted_bytes > 100 * 4096);
    // Into the segment of the log that was being written when blocks were moved, over some of them: this is newer.
    for n in 0..12 {
        rig.write(n * 50, &[40_000 + n]);
    }
    rig.image.set_commit(rig.image.sync().unwrap().seq);
    rig.image.checkpoint().unwrap();
    // Two leaves and the root of the newest map.
    assert!(damage_each_map_page(&rig) >= 3);
    let mut rng = Rng(3);
    for n in 0..300u64 {
        rig.write(rng.below(BLOCKS), &[50_000 + n]);
        if n % 10 == 0 {
            rig.image.set_commit(rig.image.sync().unwrap().seq);
            rig.store.background(0).unwrap();
            rig.store.compact(32 << 10).unwrap();
        }
    }
    rig.image.set_commit(rig.image.sync().unwrap().seq);
    settle(&rig.store).unwrap();
    assert!(damage_each_map_page(&rig) >= 3);
}

/// A checkpoint that has begun holds what was new then, and is gone on with later: moves are not part of it.
#[test]
fn a_checkpoint_that_failed_during_a_compaction_is_made_before_the_map_changes() {
    let mut tested = 0;
    for fail in 4..14 {
        let mut rig = sparse(SimDisk::new(1 << 30));
        for n in 0..10 {
            rig.write(n * 11, &[60_000 + n]);
        }
        rig.image.sync().unwrap();
        assert!(rig.store.compact(8 << 10).unwrap() > 0, "a job is under way");
        rig.disk.fail_call(Some(rig.disk.calls() + fail));
        let failed = rig.image.checkpoint();
        rig.disk.fail_call(None);
        if failed.is_ok() || rig.image.latched().is_some() {
            continue;
        }
        tested += 1;
        while rig.store.compact(1 << 20).unwrap() > 0 {}
        assert!(rig.image.space_use().compacted_bytes > 0);
        rig.model.check(&rig.image);
        rig.image.checkpoint().unwrap();
        rig.model.check(&rig.image);
        check(&rig.disk.power_cut(fail), &rig.model, &format!("call {fail}"));
    }
    assert!(tested >= 2, "{tested}");
}

#[test]
fn a_full_disk_is_compacted_from_its_reserve() {
    let cfg = StoreConfig { reserve_bytes: 512 << 10, ..config() };
    let disk = SimDisk::new(8 << 20);
    let store = create(&disk, cfg.clone()).unwrap();
    let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
    let (mut maker, genesis) = Maker::genesis(IMAGE);
    append(&image, &genesis, &[]).unwrap();
    let mut model = Model::new();
    model.push(&genesis, &[], |_| {});
    let mut rng = Rng(4);
    let mut write = |n: u64| {
        let at = if n < BLOCKS { n } else { rng.below(BLOCKS) };
        let (u, payload) = maker.write(at, &block(at, n + 1), Seq::ZERO);
        let r = image.reserve(u.bytes.len(), 1, vmfs_store::Space::Data);
        r.map(|r| {
            image.append(r, &u, &payload).unwrap();
            model.push(&u, &payload, |m| m[at as usize] = n + 1);
        })
    };
    let mut n = 0;
    let full = loop {
        if let Err(e) = write(n) {
            break e;
        }
        n += 1;
        if n.is_multiple_of(20) {
            image.set_commit(image.sync().unwrap().seq);
            image.retain_from(image.head().seq.next());
            store.background(0).unwrap();
        }
        assert!(n < 20_000, "never full");
    };
    assert!(matches!(full, StoreError::Full), "{full}");
    image.set_commit(image.sync().unwrap().seq);
    image.retain_from(image.head().seq.next());
    let before = image.space_use();
    for _ in 0..400 {
        store.background(0).unwrap();
        store.compact(64 << 10).unwrap();
    }
    let after = image.space_use();
    println!("{before:?} then {after:?}, free {}", store.free_bytes());
    assert!(after.compacted_bytes > 0);
    assert!(after.segment_bytes < before.segment_bytes * 3 / 4, "{before:?} then {after:?}");
    model.check(&image);
    assert_eq!(image.latched(), None);
    // The update that got no space was never made: the chain goes on from the head.
    let u = maker.next_epoch(2, &image.state().tip);
    append(&image, &u, &[]).unwrap();
    model.push(&u, &[], |_| {});
    let (u, payload) = maker.write(0, &block(0, 99_999), Seq::ZERO);
    append(&image, &u, &payload).unwrap();
    model.push(&u, &payload, |m| m[0] = 99_999);
    image.sync().unwrap();
    let store = open(&disk.power_cut(1), cfg).unwrap();
    model.check(&store.image(IMAGE).unwrap());
}
