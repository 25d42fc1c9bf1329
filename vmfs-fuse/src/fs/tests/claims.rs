//! Names of other hosts' images, and what chains are told in which order.

use std::sync::Arc;
use std::sync::mpsc;

use super::model::{read_all, resolve, start, wait};
use crate::backend::{Backend, Errno};
use crate::catalog::{Catalog, Meta, ROOT_INO};
use crate::fs::locks::{Lock, LockKind};
use crate::fs::{Caller, Fs, Made, RenameRule, SetAttr, XattrRule};
use crate::testbackend::MemBackend;
use vmfs_store::simdisk::SimDisk;

const MADE: Made = Made { mode: 0o644, uid: 0, gid: 0 };
const NOBODY: Caller = Caller { pid: 0 };

struct Rig {
    backend: Arc<MemBackend>,
    disk: SimDisk,
    fs: Arc<Fs<MemBackend>>,
}

impl Rig {
    fn new() -> Self {
        let (backend, disk) = (Arc::new(MemBackend::default()), SimDisk::new(1 << 30));
        let fs = start(&backend, &disk);
        Self { backend, disk, fs }
    }
    fn restart(&mut self) {
        self.fs.close();
        self.disk = self.disk.power_cut(7);
        self.fs = start(&self.backend, &self.disk);
    }
    fn names(&self, dir: &str) -> Vec<String> {
        let ino = resolve(&self.fs, dir).unwrap();
        let fh = self.fs.opendir(ino).unwrap();
        self.fs.list(ino, fh, true).unwrap().iter().skip(2).map(|e| e.name.clone()).collect()
    }
    fn create(&self, name: &str) {
        self.fs.create(ROOT_INO, name.as_bytes(), MADE).unwrap();
    }
    fn rename(&self, from: &str, to: &str) -> Result<(), Errno> {
        self.fs.rename((ROOT_INO, from.as_bytes()), (ROOT_INO, to.as_bytes()), RenameRule::Replace)
    }
}

#[test]
fn a_replaced_image_is_unlinked_only_after_the_replacers_name_is_committed() {
    let mut rig = Rig::new();
    rig.create("old");
    rig.create("new");
    let old = rig.backend.id_at("old").unwrap();
    rig.backend.hold_flushes(true);
    rig.rename("new", "old").unwrap();
    rig.fs.do_chores();
    assert_eq!(rig.backend.events(), ["name old"]);
    assert_eq!(rig.names(""), ["old"]);
    // Also across a restart in between.
    rig.restart();
    rig.fs.do_chores();
    assert_eq!(rig.backend.events(), ["name old"]);
    assert_eq!(rig.names(""), ["old"]);
    rig.backend.hold_flushes(false);
    rig.fs.do_chores();
    assert!(rig.backend.is_unlinked(old));
    assert_eq!(rig.backend.events(), ["name old", "unlink old"]);
}

#[test]
fn an_open_file_gives_its_name_up_when_it_is_unlinked_and_lives_until_its_last_close() {
    let mut rig = Rig::new();
    rig.create("f");
    let (id, ino) = (rig.backend.id_at("f").unwrap(), resolve(&rig.fs, "f").unwrap());
    let fh = rig.fs.open(ino, libc::O_RDWR).unwrap().fh;
    rig.fs.unlink(ROOT_INO, b"f").unwrap();
    assert!(rig.backend.is_unlinked(id));
    wait(|r| rig.fs.write(fh, 0, b"still there", false, NOBODY, r)).unwrap();
    assert_eq!(rig.fs.getattr(ino).map(|a| (a.nlink, a.size)), Ok((0, 11)));
    assert_eq!(read_all(&rig.fs, ino), b"still there");
    rig.restart();
    assert!(rig.names("").is_empty());
    rig.fs.do_chores();
    assert_eq!(rig.backend.events(), ["unlink f"], "said once");
}

#[test]
fn an_open_file_that_is_replaced_gives_its_name_up_once_the_replacers_is_committed() {
    let mut rig = Rig::new();
    rig.create("old");
    rig.create("new");
    let (id, ino) = (rig.backend.id_at("old").unwrap(), resolve(&rig.fs, "old").unwrap());
    let fh = rig.fs.open(ino, libc::O_RDWR).unwrap().fh;
    rig.backend.hold_flushes(true);
    rig.rename("new", "old").unwrap();
    rig.fs.do_chores();
    assert_eq!(rig.backend.events(), ["name old"], "a failover in between loses neither");
    rig.backend.hold_flushes(false);
    rig.fs.do_chores();
    assert_eq!(rig.backend.events(), ["name old", "unlink old"]);
    wait(|r| rig.fs.write(fh, 0, b"old content", false, NOBODY, r)).unwrap();
    assert_eq!(read_all(&rig.fs, ino), b"old content");
    assert_eq!(rig.names(""), ["old"]);
    rig.fs.release(fh);
    rig.restart();
    assert!(rig.backend.is_unlinked(id) && rig.names("") == ["old"]);
}

#[test]
fn a_name_that_the_chain_could_not_be_told_is_told_after_a_crash() {
    let mut rig = Rig::new();
    rig.create("f");
    let id = rig.backend.id_at("f").unwrap();
    rig.backend.freeze(id);
    rig.rename("f", "g").unwrap();
    assert_eq!(rig.backend.id_at("f"), Some(id));
    rig.restart();
    rig.backend.thaw(id);
    rig.fs.do_chores();
    assert_eq!(rig.backend.id_at("g"), Some(id));
}

#[test]
fn claims_are_laid_out_by_owner_then_id_and_bad_ones_get_a_safe_name() {
    let rig = Rig::new();
    rig.backend.add_foreign(0x33, "x", b"3");
    rig.backend.add_foreign(0x22, "x", b"2");
    rig.backend.add_foreign(0x44, "../../etc/passwd", b"4");
    rig.backend.add_foreign(0x55, "x/below-a-file", b"5");
    rig.backend.add_foreign(0x66, "d/e/f", b"6");
    rig.fs.sync_claims();
    let names = ["below-a-file~55555555", "d", "image~44444444", "x", "x~33333333"];
    assert_eq!(rig.names(""), names);
    assert_eq!(read_all(&rig.fs, resolve(&rig.fs, "x").unwrap()), b"2");
    assert_eq!(rig.names("d/e"), ["f"]);
    // The one that this host owns wins.
    rig.backend.set_owner(vmfs_common::ids::ImageId::from_bytes([0x33; 16]), true);
    rig.fs.sync_claims();
    assert_eq!(read_all(&rig.fs, resolve(&rig.fs, "x").unwrap()), b"3");
    assert!(rig.names("").contains(&"x~22222222".to_owned()));
}

#[test]
fn a_promoted_image_can_be_renamed_and_a_handed_over_one_follows_its_new_owner() {
    let mut rig = Rig::new();
    let id = rig.backend.add_foreign(0x33, "vms/a", b"3");
    rig.fs.sync_claims();
    let dir = resolve(&rig.fs, "vms").unwrap();
    let rename = |rig: &Rig, from: &str, to: &str| {
        let dir = resolve(&rig.fs, "vms").unwrap();
        rig.fs.rename((dir, from.as_bytes()), (dir, to.as_bytes()), RenameRule::Replace)
    };
    assert_eq!(rename(&rig, "a", "b"), Err(Errno::ROFS));
    rig.backend.set_owner(id, true);
    rig.fs.sync_claims();
    rename(&rig, "a", "b").unwrap();
    assert_eq!(resolve(&rig.fs, "vms").unwrap(), dir, "a directory keeps its inode number");
    assert_eq!(rig.backend.id_at("vms/b"), Some(id));
    rig.restart();
    assert_eq!(rig.names("vms"), ["b"]);
    // Another host takes it and renames it: our catalog does not insist.
    rig.backend.set_owner(id, false);
    rig.backend.set_claim(id, "elsewhere/c");
    rig.fs.sync_claims();
    assert!(rig.names("vms").is_empty(), "the directory was made local by the rename");
    assert_eq!(rig.names("elsewhere"), ["c"]);
    rig.restart();
    assert_eq!(rig.names("elsewhere"), ["c"]);
}

#[test]
fn an_undeleted_image_shows_again() {
    let rig = Rig::new();
    rig.create("f");
    let id = rig.backend.id_at("f").unwrap();
    rig.fs.unlink(ROOT_INO, b"f").unwrap();
    rig.fs.sync_claims();
    assert!(rig.names("").is_empty());
    rig.backend.undelete(id);
    rig.fs.sync_claims();
    assert_eq!(rig.names(""), ["f"]);
}

#[test]
fn burials_are_forgotten_when_the_image_is_purged() {
    let rig = Rig::new();
    for n in 0..10 {
        rig.create(&format!("f{n}"));
        let id = rig.backend.id_at(&format!("f{n}")).unwrap();
        rig.fs.unlink(ROOT_INO, format!("f{n}").as_bytes()).unwrap();
        rig.fs.sync_claims();
        rig.backend.purge(id);
    }
    rig.fs.sync_claims();
    rig.fs.close();
    let catalog = Catalog::open(Arc::new(rig.disk.clone()), &Meta::default()).unwrap();
    assert!(catalog.rows().buried.is_empty(), "{:?}", catalog.rows().buried);
}

#[test]
fn a_name_whose_image_is_lost_can_be_seen_and_removed() {
    let mut rig = Rig::new();
    rig.create("f");
    rig.backend.purge(rig.backend.id_at("f").unwrap());
    rig.restart();
    let ino = resolve(&rig.fs, "f").unwrap();
    assert_eq!(rig.fs.getattr(ino).unwrap().size, 0);
    assert_eq!(rig.fs.open(ino, libc::O_RDONLY).err(), Some(Errno::NOENT));
    rig.fs.unlink(ROOT_INO, b"f").unwrap();
    assert!(rig.names("").is_empty());
}

#[test]
fn a_loser_gets_its_name_when_the_winner_goes() {
    let rig = Rig::new();
    rig.fs.symlink(ROOT_INO, b"x", b"nowhere", MADE).unwrap();
    rig.backend.add_foreign(0x22, "x", b"2");
    rig.fs.sync_claims();
    assert_eq!(rig.names(""), ["x", "x~22222222"]);
    rig.fs.unlink(ROOT_INO, b"x").unwrap();
    rig.fs.sync_claims();
    assert_eq!(rig.names(""), ["x"]);
}

#[test]
fn attributes_of_a_frozen_image_wait_and_names_do_not() {
    let rig = Rig::new();
    rig.create("f");
    let (id, ino) = (rig.backend.id_at("f").unwrap(), resolve(&rig.fs, "f").unwrap());
    rig.backend.freeze(id);
    let (tx, rx) = mpsc::channel();
    let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    let sender = tx.clone();
    rig.fs.setattr(ino, None, change, 0, NOBODY, move |r| sender.send(r).unwrap());
    rig.fs.setxattr(ino, "user.a", Some(b"1"), XattrRule::Create, NOBODY, move |r| tx.send(r).unwrap());
    rig.rename("f", "g").unwrap();
    assert!(rx.try_recv().is_err());
    rig.backend.thaw(id);
    assert_eq!((rx.recv().unwrap(), rx.recv().unwrap()), (Ok(()), Ok(())));
    assert_eq!(rig.fs.getattr(ino).unwrap().attrs.mode, 0o600);
    assert_eq!(rig.fs.getxattr(ino, "user.a"), Ok(b"1".to_vec()));
}

#[test]
fn names_that_no_chain_can_hold_are_refused() {
    let rig = Rig::new();
    assert_eq!(rig.fs.create(ROOT_INO, b"\xff", MADE).err(), Some(Errno::ILSEQ));
    assert_eq!(rig.fs.create(ROOT_INO, &[b'n'; 256], MADE).err(), Some(Errno::NAMETOOLONG));
    let mut at = ROOT_INO;
    for _ in 0..16 {
        at = rig.fs.mkdir(at, &[b'd'; 250], MADE).unwrap().attr.ino;
    }
    assert_eq!(rig.fs.create(at, &[b'f'; 250], MADE).err(), Some(Errno::NAMETOOLONG));
    assert_eq!(rig.fs.mkdir(at, b"ok", MADE).map(|_| ()), Ok(()));
}

#[test]
fn parked_writes_are_bounded_and_end_when_the_mount_goes_away() {
    let rig = Rig::new();
    rig.create("f");
    let id = rig.backend.id_at("f").unwrap();
    let fh = rig.fs.open(resolve(&rig.fs, "f").unwrap(), libc::O_RDWR).unwrap().fh;
    rig.backend.freeze(id);
    let (tx, rx) = mpsc::channel();
    let big = vec![1; 64 << 20];
    for _ in 0..5 {
        let tx = tx.clone();
        rig.fs.write(fh, 0, &big, false, NOBODY, move |r| tx.send(r).unwrap());
    }
    // Four fit into the bound, the fifth is refused at once.
    assert_eq!(rx.try_recv(), Ok(Err(Errno::AGAIN)));
    assert!(rx.try_recv().is_err());
    rig.fs.close();
    for _ in 0..4 {
        assert_eq!(rx.recv().unwrap(), Err(Errno::IO));
    }
}

#[test]
fn parked_writes_are_done_in_order_when_the_image_thaws() {
    let rig = Rig::new();
    rig.create("f");
    let (id, ino) = (rig.backend.id_at("f").unwrap(), resolve(&rig.fs, "f").unwrap());
    let fh = rig.fs.open(ino, libc::O_RDWR).unwrap().fh;
    rig.backend.freeze(id);
    let (tx, rx) = mpsc::channel();
    for n in 0..100u8 {
        let tx = tx.clone();
        rig.fs.write(fh, 0, &[n], n % 2 == 0, NOBODY, move |r| tx.send(r).unwrap());
    }
    rig.backend.thaw(id);
    for _ in 0..100 {
        assert_eq!(rx.recv().unwrap(), Ok(1));
    }
    assert_eq!(read_all(&rig.fs, ino), [99]);
}

#[test]
fn while_one_read_waits_for_the_disk_others_are_done_by_other_threads_and_wait_like_any() {
    let rig = Rig::new();
    rig.create("f");
    let (id, ino) = (rig.backend.id_at("f").unwrap(), resolve(&rig.fs, "f").unwrap());
    let fh = rig.fs.open(ino, libc::O_RDWR).unwrap().fh;
    wait(|r| rig.fs.write(fh, 0, b"content", false, NOBODY, r)).unwrap();
    let reader = || {
        let (tx, rx) = mpsc::channel();
        let here = std::thread::current().id();
        rig.fs.read(fh, 3, 100, NOBODY, move |read| {
            let elsewhere = std::thread::current().id() != here;
            tx.send((read.map(<[u8]>::to_vec), elsewhere)).unwrap();
        });
        rx
    };
    assert_eq!(reader().try_recv(), Ok((Ok(b"tent".to_vec()), false)), "a lone read is done in place");
    let turn = rig.fs.readers.turn();
    assert_eq!(reader().recv(), Ok((Ok(b"tent".to_vec()), true)));
    rig.backend.freeze(id);
    let parked = reader();
    rig.backend.thaw(id);
    assert_eq!(parked.recv(), Ok((Ok(b"tent".to_vec()), true)));
    drop(turn);
    assert_eq!(reader().try_recv(), Ok((Ok(b"tent".to_vec()), false)));
}

#[test]
fn an_engine_that_asks_for_a_hand_over_learns_of_locks() {
    let rig = Rig::new();
    rig.create("f");
    let (id, ino) = (rig.backend.id_at("f").unwrap(), resolve(&rig.fs, "f").unwrap());
    let fh = rig.fs.open(ino, libc::O_RDWR).unwrap().fh;
    let lock = Lock { start: 100, end: 203, kind: LockKind::Shared, owner: 1, fh, pid: 1 };
    wait(|r| rig.fs.setlk(lock, false, NOBODY, r)).unwrap();
    assert!(rig.fs.is_locked(id));
    rig.fs.release(fh);
    assert!(!rig.fs.is_locked(id));
    assert!(rig.backend.list().iter().all(|c| c.owner_here));
}
