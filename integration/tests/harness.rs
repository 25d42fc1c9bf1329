//! The witnesses themselves: a check that cannot find a loss proves nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};

use integration::harness::cluster::is_alive;
use integration::harness::guest::{self, GuestSpec, Journal};
use integration::harness::model::{BLOCK, NumberedWrites};
use integration::harness::network::Network;
use integration::harness::reaper::Reaper;
use integration::harness::wait::secs;
use integration::harness::{bytes, run, seed, try_run, until_true};

#[track_caller]
fn must_panic(what: &str, f: impl FnOnce()) {
    assert!(catch_unwind(AssertUnwindSafe(f)).is_err(), "{what} was not noticed");
}

#[test]
fn journal_checks_notice_a_lost_and_a_torn_record() {
    let reaper = Reaper::new("journal");
    for journal in [Journal::Raw, Journal::File] {
        let image = reaper.dir().join(format!("{journal:?}.raw"));
        guest::make_disk(&image, journal, 64 << 20);
        let spec = GuestSpec::new(&image, journal);
        let mut guest = spec.boot(reaper.dir(), "journal");
        guest.wait_acked(100);
        guest.kill9();
        let acked = guest.acked();
        spec.assert_journal(reaper.dir(), acked);
        must_panic("a lost record", || spec.assert_journal(reaper.dir(), acked + 1000));
    }
    let image = reaper.dir().join("Raw.raw");
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut block = vec![0; BLOCK];
    let place =
        (0..4096).find(|p| file.read_exact_at(&mut block, p * 4096).is_ok() && block[0] != 0).unwrap();
    file.write_all_at(b"torn", place * 4096 + 2048).unwrap();
    must_panic("a torn record", || GuestSpec::new(&image, Journal::Raw).assert_journal(reaper.dir(), 0));
}

#[test]
fn numbered_writes_notice_loss_reordering_and_misplacement() {
    let reaper = Reaper::new("model");
    let path = reaper.dir().join("f");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(16 * BLOCK as u64).unwrap();
    let mut writes = NumberedWrites::new(16, seed::rng("numbered_writes"));
    for _ in 0..100 {
        writes.write(&file).unwrap();
    }
    writes.flush(&file).unwrap();
    writes.write(&file).unwrap();
    assert_eq!(writes.assert_prefix(&file), 101);
    // The state before the last write is a prefix too, but the one before the flush is not good enough.
    let whole = std::fs::read(&path).unwrap();
    let restore = |bytes: &[u8]| std::fs::write(&path, bytes).unwrap();
    let mut zeroed = whole.clone();
    let written = (0..16).find(|b| zeroed[b * BLOCK..(b + 1) * BLOCK].iter().any(|&x| x != 0)).unwrap();
    zeroed[written * BLOCK..(written + 1) * BLOCK].fill(0);
    restore(&zeroed);
    must_panic("a lost write", || _ = writes.assert_prefix(&file));
    let mut swapped = whole.clone();
    swapped.rotate_left(BLOCK);
    restore(&swapped);
    must_panic("a misplaced write", || _ = writes.assert_prefix(&file));
    let mut flipped = whole.clone();
    flipped[written * BLOCK + 1000] ^= 1;
    restore(&flipped);
    must_panic("a flipped bit", || _ = writes.assert_prefix(&file));
    restore(&whole);
    assert_eq!(writes.assert_prefix(&file), 101);
}

#[test]
fn reaper_leaves_no_process_mount_or_file() {
    let mut reaper = Reaper::new("reaper");
    let dir = reaper.dir().to_owned();
    let mount = dir.join("mnt");
    std::fs::create_dir(&mount).unwrap();
    let _ = run("mount", ["-t", "tmpfs", "tmpfs", mount.to_str().unwrap()]);
    assert!(bytes::is_mounted(&mount));
    let mut child = Command::new("tail")
        .arg("-f")
        .arg("/dev/null")
        .arg(dir.join("x"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mark = std::env::temp_dir().join(format!("vmfs-reaper-mark-{}", std::process::id()));
    reaper.at_end(&format!("touch '{}'", mark.display()));
    drop(reaper);
    until_true("the process has ended", secs(10), || child.try_wait().unwrap().is_some());
    assert!(!is_alive(child.id()) && !bytes::is_mounted(&mount) && !dir.exists());
    std::fs::remove_file(&mark).unwrap();
}

#[test]
fn cut_host_hears_and_says_nothing() {
    let mut reaper = Reaper::new("cut");
    let network = Network::new(&mut reaper);
    let mark = reaper.dir().join("mark");
    let python = |script: &str| {
        let launcher = network.launcher();
        let mut command = Command::new(&launcher[0]);
        command.args(&launcher[1..]).args(["python3", "-c", script]).arg(&mark);
        command
    };
    let mut server = python(
        "import socket,sys\ns=socket.socket(type=socket.SOCK_DGRAM);s.bind(('127.0.0.1',5000));open(sys.argv[1],'w')\n\
         while 1:\n d,a=s.recvfrom(99);s.sendto(d,a)",
    )
    .spawn()
    .unwrap();
    until_true("the server listens", secs(10), || mark.exists());
    let answers = || {
        let ask = "import socket\ns=socket.socket(type=socket.SOCK_DGRAM);s.settimeout(1)\n\
                   s.sendto(b'x',('127.0.0.1',5000));s.recvfrom(9)";
        try_run(python(ask)).status.success()
    };
    assert!(answers());
    network.cut(server.id());
    assert!(!answers());
    network.cut(server.id());
    network.heal();
    assert!(answers());
    server.kill().unwrap();
    server.wait().unwrap();
}
