//! Stores that earlier releases wrote, as they wrote them: each is opened, read in full, verified and
//! written to. `examples/write_store.rs` says how they are made.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::old::{COPIED, DATA, Expected, FORKED, HEADERS, META};
use common::{DATASTORE, HOST, Maker, append, block};
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, ImageId, Seq};
use vmfs_store::disk::FileDisk;
use vmfs_store::{Store, StoreConfig};

/// A copy of a store tree, so that opening it does not change what is kept.
fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn open(dir: &Path) -> Arc<Store> {
    let cfg = StoreConfig { reserve_bytes: 1 << 20, ..StoreConfig::default() };
    Store::open(Arc::new(FileDisk::open(dir).unwrap()), DATASTORE, HOST, cfg).unwrap()
}

fn check(store: &Store, e: &Expected, newer: &[(u64, u64)]) {
    let image = store.image(e.image).unwrap_or_else(|| panic!("{}: {:?}", e.image, store.damaged()));
    assert_eq!(image.kind(), e.kind);
    let report = image.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.bad_blocks.len(), report.bad_updates.len()), (0, 0), "{}", e.image);
    assert_eq!(report.updates, image.head().seq.0 + 1 - image.log_start().0);
    assert_eq!(image.forks().len(), e.forks);
    for fork in image.forks() {
        let entries = image.read_fork(&fork.name, Seq::ZERO, 1 << 20).unwrap();
        assert_eq!(entries.len() as u64, fork.updates);
        assert_eq!(entries.last().unwrap().update.digest, fork.head.digest);
    }
    let mut buf = vec![0u8; 4096];
    for (i, fill) in (0u64..).zip(&e.fills) {
        let newest = newer.iter().rev().find(|(at, _)| *at == i).map_or(*fill, |(_, f)| *f);
        image.read(BlockIndex(i), &mut buf).unwrap();
        assert!(buf == block(i, newest), "block {i} of {}", e.image);
    }
}

fn opens_and_goes_on(version: &str, images: &[ImageId]) {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats").join(version);
    let expected = Expected::read(&kept);
    let scratch = tempfile::tempdir().unwrap();
    copy_tree(&kept.join("store"), scratch.path());
    let store = open(scratch.path());
    assert_eq!(store.damaged(), []);
    assert_eq!(store.image_ids(), images);
    assert_eq!(**store.get_meta(DATA).unwrap(), *META);
    for e in &expected {
        let image = store.image(e.image).unwrap();
        let head = image.head();
        assert_eq!((head.seq.0, head.digest), (e.seq, e.digest), "{}", e.image);
        assert_eq!(image.log_start().0, e.log_start, "{}", e.image);
        check(&store, e, &[]);
        // Writing goes on, in an epoch of this release.
        let (mut maker, _) = Maker::genesis(e.image);
        append(&image, &maker.next_epoch(100, &image.state().tip), &[]).unwrap();
        for i in 0..40 {
            let (u, payload) = maker.write(i % 20, &block(i % 20, 1000 + i), Seq::ZERO);
            append(&image, &u, &payload).unwrap();
        }
        image.sync().unwrap();
    }
    let newer: Vec<(u64, u64)> = (0..40).map(|i| (i % 20, 1000 + i)).collect();
    let checked = |store: &Store| {
        for e in &expected {
            assert_eq!(store.image(e.image).unwrap().head().seq.0, e.seq + 41);
            check(store, e, if e.kind == MemberRole::Witness { &[] } else { &newer });
        }
    };
    checked(&store);
    drop(store);
    let store = open(scratch.path());
    checked(&store);
    for id in store.image_ids() {
        store.image(id).unwrap().checkpoint().unwrap();
    }
    drop(store);
    checked(&open(scratch.path()));
}

#[test]
fn store_of_version_1_opens_reads_verifies_and_goes_on() {
    opens_and_goes_on("v1", &[DATA, FORKED, COPIED, HEADERS]);
}
