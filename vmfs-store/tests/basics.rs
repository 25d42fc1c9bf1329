//! What one image does, one thing at a time.

#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::{IMAGE, Maker, Model, append, block, create, open, small};
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Seq};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Store};

struct Rig {
    disk: SimDisk,
    store: Arc<Store>,
    image: Arc<ImageStore>,
    maker: Maker,
    model: Model,
}

impl Rig {
    fn new() -> Self {
        let disk = SimDisk::new(1 << 30);
        let store = create(&disk, small()).unwrap();
        let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
        let (maker, genesis) = Maker::genesis(IMAGE);
        append(&image, &genesis, &[]).unwrap();
        let mut model = Model::new();
        model.push(&genesis, &[], |_| {});
        Self { disk, store, image, maker, model }
    }
    fn write(&mut self, start: u64, fills: &[u64]) {
        let data: Vec<u8> = fills.iter().zip(start..).flat_map(|(f, i)| block(i, *f)).collect();
        let (u, payload) = self.maker.write(start, &data, Seq::ZERO);
        append(&self.image, &u, &payload).unwrap();
        self.model.push(&u, &payload, |m| m[start as usize..start as usize + fills.len()].copy_from_slice(fills));
    }
    fn reopen(&mut self, disk: SimDisk) {
        self.disk = disk;
        self.store = open(&self.disk, small()).unwrap();
        self.image = self.store.image(IMAGE).unwrap();
    }
}

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
