//! A real mount over an engine in memory, used by real tools. Needs root and `/dev/fuse`;
//! without them every test here fails, so that nobody takes silence for success.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[path = "support/backend.rs"]
mod backend;
#[path = "support/rig.rs"]
mod rig;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::MemBackend;
use rig::{Rig, errno, pattern, until};
use vmfs_common::op::Attrs;
use vmfs_fuse::catalog::{Catalog, Meta};
use vmfs_fuse::fs::{Fs, Options};
use vmfs_fuse::mount::{Detached, MountOptions, mount};
use vmfs_store::simdisk::SimDisk;

#[test]
fn it_shows_as_what_it_is_and_goes_away() {
    let rig = Rig::new();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|l| l.contains(rig.point.to_str().unwrap())).unwrap();
    assert!(line.contains(" - fuse.vmfs vmfs ") && line.contains("nosuid"), "{line}");
    // The magic number of FUSE, block size, and room.
    assert_eq!(rig.sh("stat -f -c '%t %S %b' .").trim(), "65735546 4096 4194304");
}

#[test]
fn tools_copy_sparse_files_and_odd_sizes() {
    let rig = Rig::new();
    rig.sh("truncate -s 64M big; printf hello | dd of=big bs=1 seek=33554435 conv=notrunc status=none
         cp --sparse=always big copy; cmp big copy
         cp --reflink=never --sparse=never big full; cmp big full
         test $(stat -c %b copy) -lt 64; test $(stat -c %s copy) = 67108864
         for bs in 1 511 513 4095 4097 65537; do
             head -c $((bs * 7 + 3)) /dev/urandom > /tmp/vmfs-odd.$$
             dd if=/tmp/vmfs-odd.$$ of=odd bs=$bs status=none conv=fsync; cmp odd /tmp/vmfs-odd.$$
             dd if=odd of=/tmp/vmfs-odd2.$$ bs=$((bs + 1)) status=none; cmp odd /tmp/vmfs-odd2.$$
         done; rm /tmp/vmfs-odd*.$$");
}

#[test]
fn fallocate_zero_punch_and_seek_agree() {
    let rig = Rig::new();
    rig.write("f", &[7; 100_000]);
    rig.sh("fallocate -p -o 8192 -l 40000 f; fallocate -z -o 60000 -l 100 f; fallocate -z -n -o 90000 -l 50000 f; test $(stat -c %s f) = 100000; fallocate -l 200000 f; fallocate -n -o 300000 -l 10 f");
    let mut want = vec![7; 100_000];
    want[8192..48192].fill(0);
    want[60000..60100].fill(0);
    want[90000..].fill(0);
    want.resize(200_000, 0);
    assert_eq!(fs::read(rig.path("f")).unwrap(), want);
    let file = rig.rw("f", 0);
    let seek = |at, whence| {
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).and(match whence {
            'd' => rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)),
            _ => rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(at)),
        })
    };
    assert_eq!(seek(0, 'h'), Ok(8192));
    assert_eq!(seek(8192, 'd'), Ok(45056));
    assert_eq!(seek(150_000, 'd'), Err(rustix::io::Errno::NXIO));
    assert_eq!(
        errno(Err::<(), _>(
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::COLLAPSE_RANGE, 0, 4096)
                .unwrap_err()
                .into()
        )),
        libc::EOPNOTSUPP
    );
}

#[test]
fn truncate_cuts_and_grows_with_zeros() {
    let rig = Rig::new();
    rig.write("f", &[1; 10_000]);
    let file = rig.rw("f", 0);
    file.set_len(5_001).unwrap();
    file.set_len(9_000).unwrap();
    let mut want = vec![1; 5_001];
    want.resize(9_000, 0);
    assert_eq!(fs::read(rig.path("f")).unwrap(), want);
    OpenOptions::new().write(true).truncate(true).open(rig.path("f")).unwrap();
    assert_eq!(fs::metadata(rig.path("f")).unwrap().len(), 0);
}

#[test]
fn renames_replace_keep_and_exchange() {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let rig = Rig::new();
    rig.write("a", b"a");
    rig.write("b", b"b");
    fs::create_dir(rig.path("d")).unwrap();
    rig.write("d/x", b"x");
    let rename = |a: &str, b: &str, flags| renameat_with(CWD, rig.path(a), CWD, rig.path(b), flags);
    assert_eq!(rename("a", "b", RenameFlags::NOREPLACE), Err(rustix::io::Errno::EXIST));
    rename("a", "d", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(rig.path("d")).unwrap(), b"a");
    assert_eq!(fs::read(rig.path("a/x")).unwrap(), b"x");
    assert!(rig.backend.id_at("a/x").is_some() && rig.backend.id_at("d").is_some());
    let replaced = rig.backend.id_at("b").unwrap();
    fs::rename(rig.path("d"), rig.path("b")).unwrap();
    assert_eq!(fs::read(rig.path("b")).unwrap(), b"a");
    until("the replaced image is unlinked in its chain", || rig.backend.is_unlinked(replaced));
    fs::rename(rig.path("a"), rig.path("e")).unwrap();
    assert_eq!(fs::read(rig.path("e/x")).unwrap(), b"x");
    assert_eq!(rig.sh("ls -A").split_whitespace().collect::<Vec<_>>(), ["b", "e"]);
    assert_eq!(errno(fs::remove_dir(rig.path("e"))), libc::ENOTEMPTY);
}

#[test]
fn an_unlinked_file_lives_until_its_last_close() {
    let rig = Rig::new();
    let mut file = rig.rw("f", 0);
    file.write_all(b"still here").unwrap();
    let id = rig.backend.id_at("f").unwrap();
    fs::remove_file(rig.path("f")).unwrap();
    assert_eq!(errno(fs::metadata(rig.path("f"))), libc::ENOENT);
    file.write_all(b", and growing").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here, and growing");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    // The name is free at once, everywhere; the content is the backend's until it hears of the last close.
    assert!(rig.backend.is_unlinked(id));
    assert_eq!(rig.backend.opens(id), 1);
    drop(file);
    until("the backend is told of the last close", || rig.backend.opens(id) == 0);
}

/// Runs `work` on a shared mapping of the first `len` bytes, synced afterwards, in a process of its own: a page
/// fault holds locks of its process's memory while the mount's threads, which are in this one, serve it.
fn in_a_mapping(file: &File, len: usize, work: impl FnOnce(&mut [u8]) -> u8) -> u8 {
    // SAFETY: the child touches its own mapping and ends; what it would do with locks is nothing.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        const FAILED: i32 = 255;
        // SAFETY: a mapping of an open file, used only in bounds.
        unsafe {
            let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
            let at = libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0);
            if at == libc::MAP_FAILED {
                libc::_exit(FAILED);
            }
            let answer = work(std::slice::from_raw_parts_mut(at.cast::<u8>(), len));
            let synced = libc::msync(at, len, libc::MS_SYNC) == 0;
            libc::_exit(if synced { i32::from(answer) } else { FAILED });
        }
    }
    let mut status = 0;
    // SAFETY: waits for the child made above, and for nothing else.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFEXITED(status), "the mapping's process ended by itself: {status:#x}");
    let answer = u8::try_from(libc::WEXITSTATUS(status)).unwrap();
    assert_ne!(answer, 255, "the mapping failed");
    answer
}

#[test]
fn direct_and_cached_handles_see_each_other_and_mmap_works() {
    let rig = Rig::new();
    rig.write("f", &pattern(1 << 16, 1));
    let cached = rig.rw("f", 0);
    let direct = rig.rw("f", libc::O_DIRECT);
    let mut page = vec![0; 4096];
    cached.read_exact_at(&mut page, 8192).unwrap();
    // O_DIRECT wants an aligned buffer.
    let layout = std::alloc::Layout::from_size_align(4096, 4096).unwrap();
    // SAFETY: the layout is not empty, the memory is freed with the same layout below.
    let aligned = unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc_zeroed(layout), 4096) };
    aligned.fill(0xee);
    direct.write_all_at(aligned, 8192).unwrap();
    cached.read_exact_at(&mut page, 8192).unwrap();
    assert_eq!(page, aligned);
    // A shared mapping of each kind of handle.
    for file in [&cached, &direct] {
        let first = pattern(1 << 16, 1)[100];
        let want = in_a_mapping(file, 65536, |bytes| {
            bytes[100] = bytes[100].wrapping_add(1);
            if bytes[8192] == 0xee { bytes[100] } else { 254 }
        });
        assert!(want == first.wrapping_add(1) || want == first.wrapping_add(2), "{want} after {first}");
        cached.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(page[100], want);
    }
    // SAFETY: allocated above with this layout.
    unsafe { std::alloc::dealloc(aligned.as_mut_ptr(), layout) };
}

/// Added to the kind of lock that `F_OFD_GETLK` found, to tell it from an errno.
const FOUND: i32 = 1000;

fn ofd(file: &File, cmd: i32, kind: i32, start: i64, len: i64) -> i32 {
    // SAFETY: flock is plain data.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap();
    lock.l_whence = i16::try_from(libc::SEEK_SET).unwrap();
    (lock.l_start, lock.l_len) = (start, len);
    // SAFETY: the descriptor is open, the struct outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), cmd, &raw mut lock) } {
        0 if cmd == libc::F_OFD_GETLK => i32::from(lock.l_type) + FOUND,
        0 => 0,
        _ => std::io::Error::last_os_error().raw_os_error().unwrap(),
    }
}

#[test]
fn ofd_locks_conflict_between_handles_and_go_with_them() {
    let rig = Rig::new();
    let (a, b) = (rig.rw("f", 0), rig.rw("f", 0));
    // As QEMU does: bytes 100-203.
    assert_eq!(ofd(&a, libc::F_OFD_SETLK, libc::F_RDLCK, 100, 104), 0);
    assert_eq!(ofd(&b, libc::F_OFD_SETLK, libc::F_RDLCK, 200, 1), 0);
    assert_eq!(ofd(&b, libc::F_OFD_SETLK, libc::F_WRLCK, 201, 1), libc::EAGAIN);
    assert_eq!(ofd(&b, libc::F_OFD_GETLK, libc::F_WRLCK, 204, 10), libc::F_UNLCK + FOUND);
    assert_eq!(ofd(&b, libc::F_OFD_GETLK, libc::F_WRLCK, 0, 0), libc::F_RDLCK + FOUND);
    // The kernel sends no unlock when an OFD is closed.
    drop(a);
    until("the lock goes with its handle", || ofd(&b, libc::F_OFD_SETLK, libc::F_WRLCK, 201, 1) == 0);
}

#[test]
fn a_blocking_lock_waits_without_holding_up_anything_and_a_signal_ends_it() {
    let rig = Rig::new();
    let holder = rig.rw("f", 0);
    assert_eq!(ofd(&holder, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0), 0);
    // More waiters than serving threads.
    let waiters: Vec<_> = (0..8)
        .map(|_| {
            let file = rig.rw("f", 0);
            std::thread::spawn(move || ofd(&file, libc::F_OFD_SETLKW, libc::F_WRLCK, 0, 0))
        })
        .collect();
    rig.write("other", b"served meanwhile");
    let mut stuck = Command::new("python3")
        .args(["-c", "import fcntl,sys; f=open(sys.argv[1],'r+b'); print('ready',flush=True); fcntl.lockf(f,fcntl.LOCK_EX)"])
        .arg(rig.path("f"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 5];
    stuck.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    // Whether it waits already or not: SIGTERM must end it soon.
    std::thread::sleep(Duration::from_millis(50));
    // SAFETY: our own child.
    unsafe { libc::kill(i32::try_from(stuck.id()).unwrap(), libc::SIGTERM) };
    let start = Instant::now();
    assert!(!stuck.wait().unwrap().success());
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(holder);
    for waiter in waiters {
        assert_eq!(waiter.join().unwrap(), 0);
    }
}

#[test]
fn a_frozen_image_holds_its_own_requests_and_nobody_elses() {
    let rig = Rig::new();
    rig.write("frozen", b"old");
    rig.write("other", b"x");
    let id = rig.backend.id_at("frozen").unwrap();
    let files: Vec<File> = (0..8).map(|_| rig.rw("frozen", libc::O_DIRECT)).collect();
    rig.backend.freeze(id);
    let stuck: Vec<_> = files
        .into_iter()
        .map(|f| {
            std::thread::spawn(move || {
                let mut buf = [0; 3];
                f.read_at(&mut buf, 0).map(|n| buf[..n].to_vec())
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(fs::read(rig.path("other")).unwrap(), b"x");
    fs::rename(rig.path("other"), rig.path("moved")).unwrap();
    assert!(stuck.iter().all(|t| !t.is_finished()));
    rig.backend.thaw(id);
    for thread in stuck {
        assert_eq!(thread.join().unwrap().unwrap(), b"old");
    }
}

#[test]
fn a_stalled_request_ends_at_its_timeout_and_when_its_caller_is_killed() {
    let rig = Rig::with(Options { stall_timeout: Duration::from_millis(700), ..Options::default() });
    rig.write("f", b"old");
    let id = rig.backend.id_at("f").unwrap();
    let file = rig.rw("f", 0);
    rig.backend.freeze(id);
    assert_eq!(errno((&file).write_all(b"new")), libc::EIO);
    rig.backend.thaw(id);
    rig.backend.hold_flushes(true);
    assert_eq!(errno(file.sync_all()), libc::EIO);
    drop(file);
    rig.backend.hold_flushes(false);

    let rig = Rig::new();
    rig.write("f", b"old");
    rig.backend.hold_flushes(true);
    let flushed = rig.backend.flushes();
    let mut stuck = Command::new("sync").arg(rig.path("f")).spawn().unwrap();
    until("the flush is under way", || rig.backend.flushes() > flushed);
    stuck.kill().unwrap();
    let start = Instant::now();
    stuck.wait().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "a killed caller stays");
}

#[test]
fn synchronous_writes_flush_and_others_do_not() {
    let rig = Rig::new();
    let plain = rig.rw("f", 0);
    plain.write_all_at(b"x", 0).unwrap();
    drop(plain);
    assert_eq!(rig.backend.flushes(), 0);
    rig.rw("f", libc::O_DSYNC).write_all_at(b"x", 0).unwrap();
    let once = rig.backend.flushes();
    assert!(once >= 1);
    let plain = rig.rw("f", 0);
    let iov = libc::iovec { iov_base: b"y".as_ptr().cast_mut().cast(), iov_len: 1 };
    // SAFETY: one valid buffer that outlives the call.
    let n = unsafe { libc::pwritev2(plain.as_raw_fd(), &raw const iov, 1, 0, libc::RWF_DSYNC) };
    assert_eq!(n, 1);
    assert!(rig.backend.flushes() > once);
}

/// After a cached write the kernel itself asks for an fsync; after a direct one nobody else does.
#[test]
fn direct_synchronous_writes_flush_before_they_answer() {
    let rig = Rig::new();
    rig.write("f", &[0; 4096]);
    let before = rig.backend.flushes();
    rig.rw("f", libc::O_DIRECT).write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!(rig.backend.flushes(), before);
    for sync in [libc::O_DSYNC, libc::O_SYNC] {
        let before = rig.backend.flushes();
        rig.rw("f", libc::O_DIRECT | sync).write_all_at(&[2; 4096], 0).unwrap();
        assert!(rig.backend.flushes() > before);
    }
    rig.backend.fail_flushes(true);
    let direct = rig.rw("f", libc::O_DIRECT | libc::O_DSYNC);
    assert_eq!(errno(direct.write_all_at(&[3; 4096], 0)), libc::EIO);
}

#[test]
fn every_fsync_asks_the_engine_and_says_what_it_says() {
    let rig = Rig::new();
    let file = rig.rw("f", 0);
    file.write_all_at(b"x", 0).unwrap();
    for sync in [File::sync_all, File::sync_data] {
        let before = rig.backend.flushes();
        sync(&file).unwrap();
        assert_eq!(rig.backend.flushes(), before + 1);
    }
    rig.backend.fail_flushes(true);
    assert_eq!(errno(file.sync_data()), libc::EIO);
    assert_eq!(errno(rig.rw("f", libc::O_DSYNC).write_all_at(b"y", 0)), libc::EIO);
    rig.backend.fail_flushes(false);
    file.sync_data().unwrap();
}

#[test]
fn attributes_and_extended_attributes_stick() {
    let rig = Rig::new();
    rig.write("f", b"x");
    rig.sh("mkdir d; ln -s d/none l; chmod 640 f; chown 7:8 f; touch -d '2001-02-03 04:05:06.789 UTC' f d
         setfattr -n user.note -v hello f; setfattr -n user.note -v dir d
         setfattr -n trusted.libvirt.security.dac -v +0:+0 f
         test \"$(getfattr --only-values -n user.note f)\" = hello
         test \"$(getfattr --only-values -n user.note d)\" = dir
         getfattr -m - f | grep -q trusted.libvirt.security.dac
         setfattr -x user.note f; ! getfattr -n user.note f 2>/dev/null
         test \"$(stat -c '%a %u %g %Y' f)\" = '640 7 8 981173106'
         test \"$(readlink l)\" = d/none
         ! ln f hard 2>/dev/null; ! mkfifo p 2>/dev/null; ! mknod n c 1 3 2>/dev/null");
    let long = "n".repeat(256);
    assert_eq!(errno(fs::write(rig.path(&long), b"")), libc::ENAMETOOLONG);
    assert_eq!(errno(fs::hard_link(rig.path("f"), rig.path("h"))), libc::EPERM);
}

#[test]
fn setgid_directories_hand_their_group_down_and_writes_drop_setuid() {
    let rig = Rig::new();
    rig.sh("mkdir d; chown 0:77 d; chmod 2777 d; touch d/f; mkdir d/sub; test \"$(stat -c '%g' d/f)\" = 77; test \"$(stat -c '%g %a' d/sub)\" = '77 2755'");
    rig.sh("chmod 4777 d/f; setpriv --reuid 1000 --regid 1000 --clear-groups bash -c 'echo x > d/f'");
    assert_eq!(fs::metadata(rig.path("d/f")).unwrap().permissions().mode() & 0o7777, 0o777);
}

#[test]
fn other_hosts_images_show_under_their_names_and_follow_their_owner() {
    let rig = Rig::new();
    let id = rig.backend.add_foreign(0x11, "vms/web.img", &pattern(20_000, 3));
    until("the claim shows", || rig.path("vms/web.img").exists());
    assert_eq!(fs::read(rig.path("vms/web.img")).unwrap(), pattern(20_000, 3));
    assert_eq!(errno(fs::remove_file(rig.path("vms/web.img"))), libc::EROFS);
    assert_eq!(errno(fs::rename(rig.path("vms"), rig.path("other"))), libc::EROFS);

    // A reader keeps its state; the next one sees the newer.
    let pinned = File::open(rig.path("vms/web.img")).unwrap();
    rig.backend.replicate(id, 0, &[0xff; 100]);
    let mut first = [0; 1];
    pinned.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first[0], pattern(1, 3)[0]);
    assert_eq!(fs::read(rig.path("vms/web.img")).unwrap()[0], 0xff);
    drop(pinned);
    until("pins are given back", || rig.backend.open_pins(id) == 0);

    // QEMU opens before the switch-over.
    let early = OpenOptions::new().read(true).write(true).open(rig.path("vms/web.img")).unwrap();
    assert_eq!(errno(early.write_at(b"x", 0)), libc::EROFS);
    rig.backend.set_owner(id, true);
    early.write_all_at(b"mine now", 0).unwrap();
    assert_eq!(&fs::read(rig.path("vms/web.img")).unwrap()[..8], b"mine now");

    // A local file wins the name, a loser is shown with its id.
    rig.write("disk.img", b"local");
    rig.backend.add_foreign(0x22, "disk.img", b"foreign");
    until("the loser shows", || rig.path("disk.img~22222222").exists());
    assert_eq!(fs::read(rig.path("disk.img")).unwrap(), b"local");
    assert_eq!(fs::read(rig.path("disk.img~22222222")).unwrap(), b"foreign");
    rig.backend.claim_elsewhere("taken");
    assert_eq!(errno(fs::write(rig.path("taken"), b"")), libc::EEXIST);
}

#[test]
fn a_handle_from_before_a_roll_back_is_dead_and_the_cache_is_dropped() {
    let rig = Rig::new();
    rig.write("f", b"before");
    let id = rig.backend.id_at("f").unwrap();
    let file = rig.rw("f", 0);
    assert_eq!(fs::read(rig.path("f")).unwrap(), b"before");
    rig.backend.roll_back(id, b"earlier");
    assert_eq!(errno(file.write_at(b"stale", 0)), libc::EIO);
    until("the new content shows", || fs::read(rig.path("f")).unwrap() == b"earlier");
    drop(file);
    rig.rw("f", 0).write_all_at(b"E", 0).unwrap();
    assert_eq!(fs::read(rig.path("f")).unwrap(), b"Earlier");
}

/// Even before the mount has told the kernel what changed.
#[test]
fn the_first_open_after_another_owner_wrote_shows_what_it_wrote() {
    let rig = Rig::new();
    rig.write("f", b"before");
    assert_eq!(fs::read(rig.path("f")).unwrap(), b"before");
    let id = rig.backend.id_at("f").unwrap();
    rig.backend.set_owner(id, false);
    rig.backend.replicate(id, 0, b"later!");
    rig.backend.set_owner(id, true);
    assert_eq!(fs::read(rig.path("f")).unwrap(), b"later!");
}

#[test]
fn copy_file_range_copies_inside_the_mount_and_keeps_holes() {
    let rig = Rig::new();
    let from = rig.rw("from", 0);
    from.set_len(20 << 20).unwrap();
    from.write_all_at(&pattern(70_000, 9), 5 << 20).unwrap();
    let to = rig.rw("to", 0);
    let (mut source, mut target) = (0, 0);
    while rustix::fs::copy_file_range(&from, Some(&mut source), &to, Some(&mut target), 64 << 20).unwrap() > 0
    {
    }
    assert_eq!(fs::read(rig.path("from")).unwrap(), fs::read(rig.path("to")).unwrap());
    assert!(fs::metadata(rig.path("to")).unwrap().blocks() < 200);
}

#[test]
fn directories_of_many_files_list_completely() {
    let rig = Rig::new();
    fs::create_dir(rig.path("d")).unwrap();
    for i in 0..500 {
        fs::create_dir(rig.path(&format!("d/some-longer-name-{i:04}"))).unwrap();
    }
    let list = |_| fs::read_dir(rig.path("d")).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    assert_eq!(list(0).len(), 500);
    assert_eq!(fs::metadata(rig.path("d")).unwrap().nlink(), 502);
    rig.sh("rm -r d; test -z \"$(ls)\"");
}

#[test]
fn a_foreign_file_system_over_the_mount_is_left_alone() {
    let mut rig = Rig::new();
    assert!(Command::new("mount").args(["-t", "tmpfs", "cover"]).arg(&rig.point).status().unwrap().success());
    let mounted = rig.mounted.take().unwrap();
    assert_eq!(mounted.detach(Duration::from_millis(100)).unwrap(), Detached::Covered);
    let cover = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at_point = |t: &str| t.lines().filter(|l| l.contains(rig.point.to_str().unwrap())).count();
    assert_eq!(at_point(&cover), 2);
    assert!(Command::new("umount").arg(&rig.point).status().unwrap().success());
    assert!(Command::new("umount").arg(&rig.point).status().unwrap().success());
}

#[test]
fn a_second_mount_on_the_same_point_is_refused_and_open_files_make_it_busy() {
    let mut rig = Rig::new();
    let backend = Arc::new(MemBackend::default());
    let catalog = Catalog::open(Arc::new(SimDisk::new(1 << 30)), &Meta::default()).unwrap();
    let fs = Fs::start(backend, catalog, Options::default()).unwrap();
    let error = mount(&fs, &MountOptions::new(&rig.point)).unwrap_err().to_string();
    assert!(error.contains("already mounted (fuse.vmfs"), "{error}");
    let file = rig.rw("f", 0);
    let mounted = rig.mounted.take().unwrap();
    assert_eq!(mounted.detach(Duration::from_millis(200)).unwrap(), Detached::Busy);
    assert!(!is_mounted(&rig.point));
    // What is open goes on working.
    file.write_all_at(b"x", 0).unwrap();
}

fn is_mounted(point: &Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains(point.to_str().unwrap())
}

#[test]
fn qemu_tools_work_and_their_locks_hold() {
    let rig = Rig::new();
    rig.sh(
        "qemu-img create -q -f raw a.raw 64M
         qemu-io -f raw -t none -n -c 'write -P 7 4k 1M' -c 'discard 64k 64k' -c 'write -z 128k 64k' -c flush a.raw >/dev/null
         qemu-io -f raw -t none -c 'read -P 7 4k 60k' -c 'read -P 0 64k 64k' -c 'read -P 7 196k 4k' a.raw | grep -vq failed
         qemu-img convert -q -t none -T none -f raw -O qcow2 a.raw b.qcow2; qemu-img check -q b.qcow2
         qemu-img convert -q -f qcow2 -O raw -S 4k b.qcow2 c.raw; cmp a.raw c.raw; qemu-img compare -q a.raw b.qcow2
         qemu-img create -q -f qcow2 -o preallocation=falloc d.qcow2 8M; qemu-img snapshot -c s d.qcow2
         mkfifo -m 600 /tmp/vmfs-hold.$$
         qemu-system-x86_64 -M q35 -accel tcg -S -nodefaults -display none -monitor stdio \\
             -drive id=d,file=a.raw,format=raw,if=none,cache=none -device virtio-blk,drive=d \\
             < /tmp/vmfs-hold.$$ >/dev/null & holder=$!
         exec 9> /tmp/vmfs-hold.$$; rm /tmp/vmfs-hold.$$
         locked() { qemu-io -f raw -c 'write 0 4k' a.raw 2>&1 | grep -q 'Failed to get'; }
         for i in $(seq 200); do locked && break; sleep 0.05; done; locked
         echo quit >&9; exec 9>&-; wait $holder; qemu-io -f raw -c 'write 0 4k' a.raw | grep -q wrote",
    );
}

#[test]
fn parallel_direct_writes_verify() {
    let rig = Rig::new();
    for engine in ["libaio --iodepth=16", "psync --numjobs=1"] {
        rig.sh(&format!(
            "fio --name=v --filename=f --size=16M --rw=randwrite --bs=4k --direct=1 --ioengine={engine} \
             --verify=crc32c --do_verify=1 --verify_fatal=1 --fallocate=none --output-format=terse >/dev/null"
        ));
    }
}

#[test]
fn an_operators_unmount_ends_the_service() {
    let mut rig = Rig::new();
    assert!(Command::new("umount").arg(&rig.point).status().unwrap().success());
    let mut mounted = rig.mounted.take().unwrap();
    assert!(mounted.wait(Duration::from_secs(10)).expect("it ends").is_ok());
    assert_eq!(mounted.detach(Duration::from_secs(1)).unwrap(), Detached::Gone);
}

/// The daemon that the next test kills: the same test, started again by itself with `VMFS_POINT` set.
fn serve_until_killed(point: &std::path::Path) {
    let options = Options::default();
    let meta = Meta { attrs: Attrs { mode: 0o755, ..options.root }, ..Meta::default() };
    let catalog = Catalog::open(Arc::new(SimDisk::new(1 << 30)), &meta).unwrap();
    let fs = Fs::start(Arc::new(MemBackend::default()), catalog, options).unwrap();
    let mut mounted = mount(&fs, &MountOptions::new(point)).unwrap();
    let _ = mounted.wait(Duration::from_secs(60));
}

#[test]
fn the_dead_mount_of_a_killed_daemon_is_replaced() {
    if let Some(point) = std::env::var_os("VMFS_POINT") {
        return serve_until_killed(point.as_ref());
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("a mount");
    fs::create_dir(&point).unwrap();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_dead_mount_of_a_killed_daemon_is_replaced"])
        .env("VMFS_POINT", &point)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("the daemon mounts", || {
        fs::read_to_string("/proc/self/mountinfo").unwrap().contains("/a\\040mount ")
    });
    fs::write(point.join("f"), b"x").unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert_eq!(errno(fs::metadata(point.join("f"))), libc::ENOTCONN);
    let catalog = Catalog::open(Arc::new(SimDisk::new(1 << 30)), &Meta::default()).unwrap();
    let files = Fs::start(Arc::new(MemBackend::default()), catalog, Options::default()).unwrap();
    let mounted = mount(&files, &MountOptions::new(&point)).unwrap();
    fs::write(point.join("g"), b"x").unwrap();
    assert_eq!(mounted.detach(Duration::from_secs(10)).unwrap(), Detached::Gone);
    assert!(fs::read_dir(&point).unwrap().next().is_none(), "nothing is left under it");
}
