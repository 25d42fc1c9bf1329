//! Segments whose header the disk has lost: in doubt they are what the map says, unless somebody lists a later use.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;

use common::{IMAGE, Maker, Model, Rig, block, open, small};
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{BlockIndex, ImageId, Seq};
use vmfs_store::disk::Disk as _;
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, StoreConfig};

const OTHER: ImageId = ImageId::from_bytes([5; 16]);

/// One whole scrub.
fn scrub(image: &Arc<ImageStore>) {
    assert!(image.begin_scrub().step(u64::MAX).unwrap().finished);
}

/// A store with segments that both checkpoints list for blocks, and nothing but updates after them in the last one.
fn with_two_checkpoints(cfg: StoreConfig) -> Rig {
    let mut rig = Rig::with(SimDisk::new(1 << 30), cfg);
    for i in 0..60u64 {
        rig.write((i * 13) % 690, &[i + 1, 0, i + 2]);
    }
    for i in 0..3 {
        rig.image.set_commit(rig.image.sync().unwrap().seq);
        rig.image.checkpoint().unwrap();
        rig.write(i, &[1000]);
    }
    rig.image.sync().unwrap();
    rig
}

fn segments(disk: &SimDisk) -> Vec<String> {
    disk.files().into_iter().map(|(name, _)| name).filter(|name| name.starts_with("seg/")).collect()
}

/// What a disk that has lost the write of a header has there.
#[derive(Debug, Clone, Copy)]
enum Instead {
    Nothing,
    /// The header of an earlier use, by this image.
    Earlier(ImageId),
}

const INSTEAD: [Instead; 3] = [Instead::Nothing, Instead::Earlier(IMAGE), Instead::Earlier(OTHER)];

fn lose_header(disk: &SimDisk, name: &str, instead: Instead) {
    let file = disk.open(name, false).unwrap();
    let mut page = vec![0; 4096];
    if let Instead::Earlier(image) = instead {
        // docs/disk-format.md: image and generation, and the checksum at the end.
        file.read_at(&mut page, 0).unwrap();
        page[32..48].copy_from_slice(image.as_bytes());
        page[48..56].fill(0);
        let crc = crc32c::crc32c(&page[..4092]);
        page[4092..].copy_from_slice(&crc.to_le_bytes());
    }
    file.write_at(&[page.as_slice(), &page].concat(), 0).unwrap();
}

fn each_way(names: &[String]) -> impl Iterator<Item = (&str, u64, Instead)> {
    names
        .iter()
        .flat_map(|name| [0, 1].into_iter().flat_map(move |slot| INSTEAD.map(|i| (name.as_str(), slot, i))))
}

fn lose_superblock(disk: &SimDisk, slot: u64) {
    assert!(disk.flip_bit(&format!("map/{IMAGE}"), slot * 4096 + 50, 1));
}

/// The image goes on after a restart, gives back what it no longer needs, and takes every segment that is not in use; half
/// of it stays as it is.
/// False when it has begun with an earlier update than the last.
fn gone_on(rig: &Rig, disk: SimDisk) -> (Rig, bool) {
    let store = open(&disk, rig.cfg.clone()).unwrap();
    let image = store.image(IMAGE).unwrap();
    let whole = image.head() == rig.model.head();
    let (maker, model) = (Maker::genesis(IMAGE).0, rig.model.clone());
    let mut copy = Rig { disk, store, image, maker, model, cfg: rig.cfg.clone() };
    let epoch = copy.maker.next_epoch(2, &copy.image.state().tip);
    common::append(&copy.image, &epoch, &[]).unwrap();
    copy.model.push(&epoch, &[], |_| {});
    for i in 0..30 {
        copy.write(i % 4, &[i + 7]);
        copy.image.set_commit(copy.image.sync().unwrap().seq);
        copy.image.checkpoint().unwrap();
    }
    for i in 0..34 {
        copy.write(i * 20 % 340, &[i + 100; 20]);
    }
    (copy, whole)
}

/// The disk never wrote the first page of a segment, and one of the checkpoints is damaged, too: a segment without a header
/// was taken for one that is used for something else, and the content was without its blocks.
/// Found by the simulator (seed 7030053; with the header of an earlier use there, 11091771).
#[test]
fn the_blocks_of_a_segment_are_not_lost_with_its_header_and_a_superblock() {
    // With the log, and with segments that are kept for their blocks alone.
    for retain_log_bytes_max in [512 << 10, 0] {
        let cfg = StoreConfig { retain_log_bytes_max, ..small() };
        let rig = with_two_checkpoints(cfg.clone());
        let segments = segments(&rig.disk);
        assert!(segments.len() > 3, "{segments:?}");
        for (name, slot, instead) in each_way(&segments) {
            let disk = rig.disk.kill();
            lose_header(&disk, name, instead);
            lose_superblock(&disk, slot);
            let damaged = disk.kill();
            let store = open(&disk, cfg.clone()).unwrap();
            let image = store.image(IMAGE).unwrap();
            assert_eq!(image.head(), rig.model.head(), "{name}, superblock {slot}, {instead:?}");
            rig.model.check(&image);
            scrub(&image);
            assert_eq!(image.rot().open, [format!("header of {name}")]);
            let report = image.verify(&mut |_, _| {}).unwrap();
            assert_eq!((report.bad_blocks.len(), report.bad_updates.len()), (0, 0), "{name}: {report:?}");
            let again = open(&disk.kill(), cfg.clone()).unwrap();
            rig.model.check(&again.image(IMAGE).unwrap());
            let (copy, whole) = gone_on(&rig, damaged);
            assert!(whole);
            copy.model.check(&copy.image);
        }
    }
}

/// What describes its first blocks is lost as well: they are still what the map says.
#[test]
fn blocks_are_read_without_the_header_and_the_first_header_page_of_their_segment() {
    let cfg = StoreConfig { retain_log_bytes_max: 0, ..small() };
    let rig = with_two_checkpoints(cfg.clone());
    let mut read = 0;
    for (name, slot) in segments(&rig.disk).iter().flat_map(|name| [(name, 0), (name, 1)]) {
        let disk = rig.disk.kill();
        disk.open(name, false).unwrap().write_at(&[0; 16384], 0).unwrap();
        lose_superblock(&disk, slot);
        let store = open(&disk, cfg.clone()).unwrap();
        let image = store.image(IMAGE).unwrap();
        // The last one has updates that the checkpoints do not.
        if image.head() != rig.model.head() {
            continue;
        }
        for (at, fill) in (0..).zip(&rig.model.history.last().unwrap().1) {
            let mut found = vec![0; 4096];
            image.read(BlockIndex(at), &mut found).unwrap();
            assert!(found == block(at, *fill), "block {at} without {name}");
        }
        read += 1;
    }
    assert!(read > 3, "{read}");
}

/// Two images in one store: what the one leaves, the other takes.
struct Two {
    rig: Rig,
    other: Arc<ImageStore>,
    maker: Maker,
    model: Model,
}

impl Two {
    fn new(cfg: StoreConfig) -> Self {
        let rig = Rig::with(SimDisk::new(1 << 30), cfg);
        let other = rig.store.create_image(OTHER, MemberRole::Replica).unwrap();
        let (maker, genesis) = Maker::genesis(OTHER);
        common::append(&other, &genesis, &[]).unwrap();
        let mut model = Model::new();
        model.history[0].2 = ImageState::new(OTHER);
        model.push(&genesis, &[], |_| {});
        Self { rig, other, maker, model }
    }
    fn write_other(&mut self, start: u64, fill: u64) {
        let (u, payload) = self.maker.write(start, &block(start, fill), Seq::ZERO);
        common::append(&self.other, &u, &payload).unwrap();
        self.model.push(&u, &payload, |m| m[start as usize] = fill);
    }
    /// Both are whole after a restart, when the first image goes on. False when it has lost something with the damage, as
    /// it may.
    fn both_are_whole(&self, disk: SimDisk) -> bool {
        let (copy, whole) = gone_on(&self.rig, disk);
        if whole {
            copy.model.check(&copy.image);
        }
        let other = copy.store.image(OTHER).unwrap();
        assert_eq!(other.head(), self.model.head());
        self.model.check(&other);
        whole
    }
}

/// Segments that have another header now.
fn used_again(before: &SimDisk, now: &SimDisk) -> Vec<String> {
    let header = |disk: &SimDisk, name: &str| {
        let mut page = vec![0; 4096];
        disk.open(name, false).unwrap().read_at(&mut page, 0).unwrap();
        page
    };
    let was = segments(before);
    let mut names = segments(now);
    names.retain(|name| was.contains(name) && header(before, name) != header(now, name));
    names
}

/// A segment without a header, that an older checkpoint lists, may be another image's by now: it stays with that.
#[test]
fn a_segment_without_a_header_belongs_to_its_latest_use() {
    let mut two = Two::new(StoreConfig { retain_log_bytes_max: 0, ..small() });
    let (mut before, mut whole) = (two.rig.disk.kill(), 0);
    for round in 0..16u64 {
        for i in 0..20 {
            two.write_other((round * 10 + i) % 600, round + 1);
        }
        for i in 0..20 {
            two.rig.write(i % 4, &[round * 100 + i + 1]);
        }
        two.rig.image.set_commit(two.rig.image.sync().unwrap().seq);
        two.other.set_commit(two.other.sync().unwrap().seq);
        two.other.checkpoint().unwrap();
        for (name, slot, instead) in each_way(&used_again(&before, &two.rig.disk)) {
            let disk = two.rig.disk.kill();
            lose_header(&disk, name, instead);
            lose_superblock(&disk, slot);
            whole += usize::from(two.both_are_whole(disk));
        }
        two.rig.image.checkpoint().unwrap();
        before = two.rig.disk.kill();
    }
    assert!(whole > 20, "{whole}");
}

/// The same where the disk has not written the map for a while: the checkpoint found lists it for blocks, and is much older.
#[test]
fn a_segment_without_a_header_is_not_taken_from_who_lists_a_later_use() {
    let mut two = Two::new(StoreConfig { retain_log_bytes_max: 0, ..small() });
    let mut versions = vec![two.rig.disk.kill()];
    let mut cases = 0;
    for round in 0..14u64 {
        for i in 0..20 {
            two.write_other((round * 10 + i) % 600, round + 1);
        }
        // None of it is left three rounds later.
        for i in 0..20 {
            two.rig.write((round * 20 + i) % 60, &[round * 100 + i + 1]);
        }
        for image in [&two.rig.image, &two.other] {
            image.set_commit(image.sync().unwrap().seq);
            image.checkpoint().unwrap();
        }
        let old = &versions[versions.len().saturating_sub(6)];
        for name in used_again(old, &two.rig.disk) {
            let disk = two.rig.disk.kill();
            for map in [format!("map/{IMAGE}"), format!("map/{IMAGE}.copy")] {
                let Some((_, len)) = disk.files().into_iter().find(|(n, _)| *n == map) else { continue };
                let mut bytes = vec![0; len as usize];
                let was = old.files().into_iter().find(|(n, _)| *n == map);
                if let Some((_, was)) = was {
                    let was = was.min(len) as usize;
                    old.open(&map, false).unwrap().read_at(&mut bytes[..was], 0).unwrap();
                }
                disk.open(&map, false).unwrap().write_at(&bytes, 0).unwrap();
            }
            lose_header(&disk, &name, INSTEAD[cases as usize % 3]);
            lose_superblock(&disk, cases % 2);
            two.both_are_whole(disk);
            cases += 1;
        }
        versions.push(two.rig.disk.kill());
    }
    assert!(cases > 20, "{cases}");
}

/// A file that is not there is lost, and said to be.
#[test]
fn a_scrub_misses_segments() {
    let rig = with_two_checkpoints(small());
    let mut said = 0;
    for (name, slot) in segments(&rig.disk).iter().flat_map(|name| [(name, 0), (name, 1)]) {
        let disk = rig.disk.kill();
        disk.remove(name).unwrap();
        lose_superblock(&disk, slot);
        let store = open(&disk, small()).unwrap();
        let image = store.image(IMAGE).unwrap();
        scrub(&image);
        let open = image.rot().open;
        let report = image.verify(&mut |_, _| {}).unwrap();
        let missing = open.contains(&format!("blocks in {name}, which is missing"));
        assert_eq!(missing, !report.bad_blocks.is_empty(), "{name}: {open:?} {report:?}");
        said += usize::from(missing);
    }
    assert!(said > 3, "{said}");
}

/// Nothing tells whose it is: while there is an image that cannot be opened, perhaps by this release only, it is left alone.
#[test]
fn a_segment_without_a_header_that_may_be_an_unopenable_images_is_left_alone() {
    let rig = with_two_checkpoints(small());
    let mut used = 0;
    for name in segments(&rig.disk) {
        let damaged = rig.disk.kill();
        lose_header(&damaged, &name, Instead::Nothing);
        let read = |disk: &SimDisk| {
            let len = disk.files().into_iter().find(|(n, _)| *n == name).map_or(0, |(_, len)| len);
            let mut bytes = vec![0; len as usize];
            let read = disk.open(&name, false).and_then(|file| file.read_at(&mut bytes, 0));
            read.is_ok().then_some(bytes)
        };
        for openable in [false, true] {
            let disk = damaged.kill();
            if openable {
                disk.remove(&format!("map/{IMAGE}")).unwrap();
            } else {
                (0..2).for_each(|slot| lose_superblock(&disk, slot));
            }
            let store = open(&disk, small()).unwrap();
            assert_eq!(store.damaged().len(), usize::from(!openable));
            let other = store.create_image(OTHER, MemberRole::Replica).unwrap();
            let (mut maker, genesis) = Maker::genesis(OTHER);
            common::append(&other, &genesis, &[]).unwrap();
            for i in 0..400 {
                let (u, payload) = maker.write(i, &block(i, 5), Seq::ZERO);
                common::append(&other, &u, &payload).unwrap();
            }
            other.sync().unwrap();
            if openable {
                // With the image gone it is nobody's.
                used += usize::from(read(&disk) != read(&damaged));
            } else {
                assert!(read(&disk) == read(&damaged), "{name} was used for something else");
            }
        }
    }
    assert!(used > 3, "{used}");
}
