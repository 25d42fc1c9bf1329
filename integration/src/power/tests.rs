//! What a cut may take, and what it may not. Every test tries many cuts: both outcomes of what is left to
//! chance have to be seen.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::content::{Content, PAGE};
use super::names::{Names, ROOT};
use super::{Luck, PowerDisk};
use crate::harness::until_true;

const CUTS: u64 = 200;

/// A file of `pages` pages of ones, synced.
fn content(pages: usize) -> Content {
    let mut content = Content::new(tempfile::tempfile().unwrap()).unwrap();
    content.write(0, &vec![1; pages * PAGE]).unwrap();
    content.sync().unwrap();
    content
}

fn byte_counts(page: &[u8]) -> BTreeSet<u8> {
    page.iter().copied().collect()
}

#[test]
fn synced_bytes_survive_every_cut() {
    for seed in 0..CUTS {
        let mut c = content(4);
        c.write(100, &[2; 9000]).unwrap();
        c.set_len(3 * PAGE as u64 + 7).unwrap();
        c.sync().unwrap();
        let before = c.read(0, 1 << 20).unwrap();
        c.cut(&mut Luck::new(seed)).unwrap();
        assert_eq!(c.read(0, 1 << 20).unwrap(), before, "seed {seed}");
    }
}

#[test]
fn unsynced_pages_survive_vanish_and_tear_each_on_its_own() {
    let (mut kept, mut lost, mut torn, mut mixed) = (0, 0, 0, 0);
    for seed in 0..CUTS {
        let mut c = content(8);
        c.write(0, &[2; 8 * PAGE]).unwrap();
        c.cut(&mut Luck::new(seed)).unwrap();
        let bytes = c.read(0, 1 << 20).unwrap();
        let mut whole = BTreeSet::new();
        for page in bytes.chunks(PAGE) {
            match byte_counts(page).into_iter().collect::<Vec<_>>()[..] {
                [1] => lost += 1,
                [2] => kept += 1,
                [1, 2] => {
                    torn += 1;
                    assert!(page.chunks(512).all(|s| byte_counts(s).len() == 1), "sectors are whole");
                }
                ref other => panic!("bytes {other:?} were never written"),
            }
            whole.extend(byte_counts(page));
        }
        mixed += u32::from(whole.len() == 2);
    }
    assert!(kept > 100 && lost > 100 && torn > 100 && mixed > 20, "{kept} {lost} {torn} {mixed}");
}

#[test]
fn any_version_since_the_sync_may_be_what_is_left() {
    let mut seen = BTreeSet::new();
    for seed in 0..CUTS {
        let mut c = content(1);
        c.write(0, &[2; PAGE]).unwrap();
        c.write(0, &[3; PAGE]).unwrap();
        c.cut(&mut Luck::new(seed)).unwrap();
        let found = byte_counts(&c.read(0, PAGE).unwrap());
        if found.len() == 1 {
            seen.extend(found);
        }
    }
    assert_eq!(seen, BTreeSet::from([1, 2, 3]));
}

#[test]
fn a_length_is_the_old_or_the_new_one_and_cut_bytes_never_come_back() {
    let mut seen = BTreeSet::new();
    for seed in 0..CUTS {
        let mut c = content(4);
        c.set_len(PAGE as u64 + 10).unwrap();
        c.set_len(6 * PAGE as u64).unwrap();
        assert!(c.read(PAGE as u64 + 10, 1 << 20).unwrap().iter().all(|&b| b == 0));
        c.cut(&mut Luck::new(seed)).unwrap();
        seen.insert(c.len());
        let all = c.read(0, 1 << 20).unwrap();
        assert_eq!(all.len() as u64, c.len());
        assert!(all[..PAGE].iter().all(|&b| b == 1), "the part that was never touched");
        assert!(all[4 * PAGE..].iter().all(|&b| b == 0), "beyond what was ever written");
    }
    assert_eq!(seen, BTreeSet::from([4 * PAGE as u64, 6 * PAGE as u64]));
}

#[test]
fn names_survive_when_their_directory_is_synced_and_in_order_otherwise() {
    let mut seen = BTreeSet::new();
    for seed in 0..CUTS {
        let mut n = Names::default();
        n.link(ROOT, "dir", 2);
        n.sync(ROOT);
        n.link(2, "synced", 3);
        n.sync(2);
        n.link(2, "first", 4);
        n.rename((2, "first"), (ROOT, "second"));
        n.unlink(2, "synced");
        n.cut(&mut Luck::new(seed));
        assert_eq!(n.lookup(ROOT, "dir"), Some(2));
        let state = (n.lookup(2, "first"), n.lookup(ROOT, "second"), n.lookup(2, "synced"));
        seen.insert(state);
    }
    let expected =
        [(None, None, Some(3)), (Some(4), None, Some(3)), (None, Some(4), Some(3)), (None, Some(4), None)];
    assert_eq!(seen, BTreeSet::from(expected));
}

#[test]
fn a_synced_directory_takes_with_it_what_its_names_came_from() {
    let mut n = Names::default();
    n.link(ROOT, "a", 2);
    n.link(ROOT, "b", 3);
    n.sync(ROOT);
    n.link(2, "file", 4);
    n.rename((2, "file"), (3, "file"));
    n.link(2, "other", 5);
    n.sync(3);
    // Keeps nothing that is not durable.
    n.cut(&mut Luck { keep: 0.0, ..Luck::new(1) });
    assert_eq!((n.lookup(2, "file"), n.lookup(3, "file"), n.lookup(2, "other")), (None, Some(4), None));
}

struct Mounted {
    dir: tempfile::TempDir,
    disk: PowerDisk,
}

impl Mounted {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["point", "backing"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::create_dir(dir.path().join("point/sub")).unwrap();
        std::fs::write(dir.path().join("point/sub/old"), b"imported").unwrap();
        let disk = PowerDisk::mount(&dir.path().join("point"), &dir.path().join("backing")).unwrap();
        Self { dir, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("point").join(name)
    }

    fn cut(&self, seed: u64) {
        self.disk.fail_waiting();
        self.disk.cut(seed).unwrap();
    }
}

fn sync_dir(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

/// The calls that a store makes, through the kernel.
#[test]
fn a_mounted_disk_keeps_what_was_synced_and_loses_what_was_not() {
    let m = Mounted::new();
    assert_eq!(std::fs::read(m.path("sub/old")).unwrap(), b"imported");
    let (mut vanished, mut stayed) = (0, 0);
    for seed in 0..40 {
        let (a, b) = (m.path(&format!("sub/a{seed}")), m.path(&format!("sub/b{seed}")));
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).open(path).unwrap();
        let file = open(&a);
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();
        file.write_all_at(&[7; 5000], 3000).unwrap();
        file.sync_data().unwrap();
        sync_dir(&m.path("sub"));
        let other = open(&b);
        other.write_all_at(&[8; 100], 0).unwrap();
        other.sync_all().unwrap();
        file.write_all_at(&[9; 4096], 8192).unwrap();
        drop((file, other));
        m.cut(seed);
        let mut bytes = vec![0; 1 << 20];
        File::open(&a).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[3000..8000].iter().all(|&x| x == 7) && bytes[..3000].iter().all(|&x| x == 0));
        // The new file's name was never synced; where it is there, so is its content.
        match std::fs::read(&b) {
            Ok(bytes) => {
                assert_eq!(bytes, [8; 100]);
                stayed += 1;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => vanished += 1,
            Err(e) => panic!("{e}"),
        }
    }
    assert!(vanished > 5 && stayed > 5, "{vanished} vanished, {stayed} stayed");
    assert_eq!(std::fs::read(m.path("sub/old")).unwrap(), b"imported");
}

#[test]
fn a_replaced_file_is_the_old_or_the_new_one() {
    let m = Mounted::new();
    let mut seen = BTreeSet::new();
    let mut now = b"imported".to_vec();
    for seed in 0..40 {
        let file = File::create(m.path("sub/new")).unwrap();
        let next = format!("content {seed}").into_bytes();
        file.write_all_at(&next, 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        std::fs::rename(m.path("sub/new"), m.path("sub/old")).unwrap();
        if seed % 4 == 0 {
            sync_dir(&m.path("sub"));
        }
        m.cut(seed);
        let found = std::fs::read(m.path("sub/old")).unwrap();
        assert!(found == next || (seed % 4 != 0 && found == now), "seed {seed}: {found:?}");
        seen.insert(found == next);
        now = found;
    }
    assert_eq!(seen.len(), 2, "both outcomes happen");
}

#[test]
fn no_call_takes_effect_after_the_disk_froze() {
    let m = Mounted::new();
    let path = m.path("sub/old");
    let file = File::options().write(true).open(&path).unwrap();
    // Three calls: a write, a sync, a write.
    m.disk.freeze_after(3);
    let writer = std::thread::spawn(move || {
        let mut done = 0;
        for byte in 1..=9 {
            if file.write_all_at(&[byte; 8], 0).and_then(|()| file.sync_data()).is_err() {
                break;
            }
            done = byte;
        }
        done
    });
    until_true("the disk freezes", Duration::from_secs(10), || m.disk.is_frozen());
    m.disk.fail_waiting();
    assert_eq!(writer.join().unwrap(), 1, "one write and its sync were answered");
    m.cut(5);
    let left = std::fs::read(&path).unwrap();
    assert!(left == [1; 8] || left == [2; 8], "{left:?}");
}
