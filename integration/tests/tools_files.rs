//! cp, rsync, dd, fallocate, truncate, fsx, fio, restic and plain system calls, unchanged, on the mount.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use integration::harness::command::{bash, run, try_run, try_run_within};
use integration::harness::wait::secs;
use integration::harness::{Place, bytes, seed};
use rand::Rng;
use rustix::fs::{FallocateFlags, SeekFrom};

/// A file with data and holes: 1 MiB of noise at each of some offsets.
fn make_sparse(path: &str) {
    let file = File::create_new(path).unwrap();
    file.set_len(64 << 20).unwrap();
    for mib in [0, 7, 8, 40, 63] {
        file.write_all_at(&bytes::noise(mib, 1 << 20), mib << 20).unwrap();
    }
}

#[test]
fn cp_and_rsync_keep_content_and_holes() {
    let place = Place::new("copies");
    let source = place.outside("sparse");
    make_sparse(&source);
    for (name, command) in [
        ("cp-always", "cp --sparse=always \"$1\" \"$2\""),
        ("cp-never", "cp --sparse=never \"$1\" \"$2\""),
        ("cp-attributes", "cp -a \"$1\" \"$2\""),
        ("rsync", "rsync -a --sparse \"$1\" \"$2\""),
        ("rsync-inplace", "truncate -s 70M \"$2\"; rsync -a --inplace \"$1\" \"$2\""),
        ("cat", "cat \"$1\" >\"$2\""),
    ] {
        let copy = place.path(name);
        let _ = bash(command, [&source, &copy]);
        bytes::assert_same(Path::new(&source), Path::new(&copy));
        // All-zero blocks are not stored, however they were written.
        let used = bytes::allocated_bytes(Path::new(&copy));
        assert!(place.cluster().is_none() || used <= 6 << 20, "{name}: 5 MiB of data occupy {used} bytes");
        // Inside the mount, and back out.
        let inner = place.path(&format!("{name}-again"));
        let _ = bash("cp --sparse=auto \"$1\" \"$2\"", [&copy, &inner]);
        bytes::assert_same(Path::new(&source), Path::new(&inner));
    }
    place.assert_replicated();
}

#[test]
fn rsync_of_a_tree_keeps_attributes() {
    let place = Place::new("tree");
    let source = place.outside("tree");
    let _ = bash(
        r#"mkdir -p "$1"/{a/b/c,empty}; for i in $(seq 40); do head -c $((i * 997)) /dev/urandom >"$1/a/f$i"; done
           ln -s ../a/f1 "$1/a/link"; ln -s dangling "$1/a/b/none"; chmod 640 "$1"/a/f*; chmod 750 "$1/a/b"
           touch -d '2001-02-03 04:05:06.789' "$1/a/f2"; chown 1234:4321 "$1/a/f3"
           setfattr -n user.note -v hello "$1/a/f4"; printf x >"$1/a/name with spaces and ünïcode""#,
        [&source],
    );
    let copy = place.path("tree");
    let _ = run("rsync", ["-aX", &format!("{source}/"), &format!("{copy}/")]);
    let _ = run("diff", ["-r", "--no-dereference", &source, &copy]);
    let left = run("rsync", ["-aXni", "--checksum", &format!("{source}/"), &format!("{copy}/")]);
    assert_eq!(left.stdout, "", "rsync would still change something");
    let f3 = Path::new(&copy).join("a/f3").metadata().unwrap();
    assert_eq!((f3.uid(), f3.gid(), f3.permissions().mode() & 0o7777), (1234, 4321, 0o640));
    let note = run("getfattr", ["--only-values", "-n", "user.note", &format!("{copy}/a/f4")]);
    assert_eq!(note.stdout, "hello");
    let _ = run("rm", ["-r", &copy]);
    assert!(!Path::new(&copy).exists());
}

#[test]
fn dd_with_odd_sizes_writes_what_it_read() {
    let place = Place::new("dd");
    let source = place.outside("source");
    std::fs::write(&source, bytes::noise(5, 3_000_017)).unwrap();
    for (i, options) in [
        "bs=1 count=70001",
        "bs=511",
        "bs=4097",
        "bs=1000003",
        "bs=3000017",
        "bs=333 conv=fsync",
        "bs=65537 oflag=dsync",
        "bs=12289 iflag=fullblock conv=fdatasync",
    ]
    .iter()
    .enumerate()
    {
        let target = place.path(&format!("dd{i}"));
        let _ = bash(&format!(r#"dd if="$1" of="$2" status=none {options}"#), [&source, &target]);
        let length = Path::new(&target).metadata().unwrap().len();
        let expected = if options.contains("count") { 70001 } else { 3_000_017 };
        assert_eq!(length, expected, "{options}");
        let _ = run("cmp", ["-n", &expected.to_string(), &source, &target]);
    }
    // Overwriting in the middle, not aligned to anything, direct where it is aligned.
    let target = place.path("middle");
    let _ = bash(
        r#"cp "$1" "$2"; cp "$1" "$2.expected.tmp"; mv "$2.expected.tmp" "$3"
           for t in "$2" "$3"; do
               dd if="$1" of="$t" bs=777 skip=3 seek=1001 count=99 conv=notrunc status=none
               dd if="$1" of="$t" bs=4096 skip=5 seek=50 count=20 conv=notrunc oflag=direct status=none
               dd if=/dev/zero of="$t" bs=5003 seek=17 count=3 conv=notrunc status=none
           done"#,
        [&source, &target, &place.outside("expected")],
    );
    bytes::assert_same(Path::new(&place.outside("expected")), Path::new(&target));
    place.assert_replicated();
}

#[test]
fn fallocate_truncate_and_seek_hole_work() {
    let place = Place::new("fallocate");
    let path = place.path("f");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let read = |at: u64, n: usize| {
        let mut b = vec![0; n];
        file.read_exact_at(&mut b, at).unwrap();
        b
    };
    file.write_all_at(&bytes::noise(9, 1 << 20), 0).unwrap();
    let allocate = |flags, at, n| rustix::fs::fallocate(&file, flags, at, n);

    allocate(FallocateFlags::empty(), 0, 2 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2 << 20);
    allocate(FallocateFlags::KEEP_SIZE, 0, 8 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2 << 20);
    assert_eq!(read(0, 1 << 20), bytes::noise(9, 1 << 20));

    allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 65536, 131_072).unwrap();
    assert_eq!(read(65536, 131_072), vec![0; 131_072]);
    // Not aligned: only those bytes change.
    allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 300_001, 10_007).unwrap();
    let mut expected = bytes::noise(9, 1 << 20);
    expected[65536..65536 + 131_072].fill(0);
    expected[300_001..310_008].fill(0);
    assert_eq!(read(0, 1 << 20), expected);
    allocate(FallocateFlags::ZERO_RANGE, 500_000, 20_000).unwrap();
    expected[500_000..520_000].fill(0);
    assert_eq!(read(0, 1 << 20), expected);
    allocate(FallocateFlags::ZERO_RANGE, 2 << 20, 4096).unwrap();
    assert_eq!(file.metadata().unwrap().len(), (2 << 20) + 4096);

    let seek = |whence| rustix::fs::seek(&file, whence).unwrap();
    assert_eq!(seek(SeekFrom::Hole(0)), 65536);
    assert_eq!(seek(SeekFrom::Data(65536)), 65536 + 131_072);
    let end = file.metadata().unwrap().len();
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(end)), Err(rustix::io::Errno::NXIO));

    // What a truncation cut off must not come back.
    file.set_len(100_001).unwrap();
    file.set_len(200_000).unwrap();
    let mut cut = expected[..100_001].to_vec();
    cut.resize(200_000, 0);
    assert_eq!(read(0, 200_000), cut);
    let _ = run("truncate", ["-s", "+1G", &path]);
    assert_eq!(file.metadata().unwrap().len(), 200_000 + (1 << 30));
    let _ = run("fallocate", ["--dig-holes", &path]);
    assert_eq!(read(0, 200_000), cut);
    place.assert_replicated();
}

#[test]
fn unlinked_and_replaced_files_stay_usable_while_open() {
    let place = Place::new("unlink");
    let path = place.path("gone");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(&bytes::noise(4, 1 << 20), 0).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(!Path::new(&path).exists());
    file.write_all_at(b"still here", 1 << 20).unwrap();
    file.sync_all().unwrap();
    let mut tail = [0; 10];
    file.read_exact_at(&mut tail, 1 << 20).unwrap();
    assert_eq!(&tail, b"still here");
    drop(file);

    let (a, b) = (place.path("a"), place.path("b"));
    std::fs::write(&a, "a").unwrap();
    std::fs::write(&b, "b").unwrap();
    let old = File::open(&b).unwrap();
    std::fs::rename(&a, &b).unwrap();
    assert_eq!(std::fs::read(&b).unwrap(), b"a");
    let mut byte = [0];
    old.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(&byte, b"b", "the replaced file is still what the handle was opened on");
    // While it is open its chain lives on, and other hosts may show it under the name.
    drop(old);

    std::fs::write(&a, "a2").unwrap();
    let cwd = rustix::fs::CWD;
    let noreplace = rustix::fs::renameat_with(cwd, &a, cwd, &b, rustix::fs::RenameFlags::NOREPLACE);
    assert_eq!(noreplace, Err(rustix::io::Errno::EXIST));
    rustix::fs::renameat_with(cwd, &a, cwd, &b, rustix::fs::RenameFlags::EXCHANGE).unwrap();
    assert_eq!((std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap()), (b"a".to_vec(), b"a2".to_vec()));
    place.assert_replicated();
}

#[test]
fn forbidden_kinds_of_files_get_a_clear_error() {
    let place = Place::new("kinds");
    if place.cluster().is_none() {
        // An ordinary filesystem has them all.
        return;
    }
    let file = place.path("file");
    std::fs::write(&file, "x").unwrap();
    let denied = |r: Result<(), std::io::Error>, what: &str| {
        let error = r.expect_err(what).raw_os_error();
        assert!(matches!(error, Some(libc::EPERM | libc::EOPNOTSUPP)), "{what}: {error:?}");
    };
    denied(std::fs::hard_link(&file, place.path("link")), "hard link");
    denied(std::os::unix::net::UnixListener::bind(place.path("socket")).map(drop), "socket");
    let node = |kind, dev| {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, place.path("node"), kind, mode, dev).map_err(Into::into)
    };
    denied(node(rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3)), "device");
    denied(node(rustix::fs::FileType::BlockDevice, rustix::fs::makedev(7, 0)), "device");
}

#[test]
fn o_dsync_o_append_o_direct_and_mmap_agree() {
    let place = Place::new("opens");
    let path = place.path("f");
    let _ = bash(
        r#"python3 - "$1" <<'X'
import mmap, os, sys
p = sys.argv[1]
fd = os.open(p, os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.ftruncate(fd, 1 << 20)
try:
    os.open(p, os.O_RDWR | os.O_CREAT | os.O_EXCL); raise SystemExit("O_EXCL did not refuse")
except FileExistsError:
    pass
m = mmap.mmap(fd, 1 << 20)
m[5000:5005] = b"hello"
m.flush()
assert os.pread(fd, 5, 5000) == b"hello"
d = os.open(p, os.O_RDWR | os.O_DIRECT)
b = mmap.mmap(-1, 8192)
assert os.preadv(d, [b], 4096) == 8192 and b[904:909] == b"hello"
b[:] = b"d" * 8192
assert os.pwritev(d, [b], 4096) == 8192
assert os.pread(fd, 8192, 4096) == b"d" * 8192
assert m[4096:4096 + 8192] == b"d" * 8192, "the mapping shows what was written beside it"
private = mmap.mmap(fd, 1 << 20, flags=mmap.MAP_PRIVATE)
private[0:3] = b"own"
assert os.pread(fd, 3, 0) == b"\0\0\0"
s = os.open(p, os.O_WRONLY | os.O_DSYNC)
assert os.pwrite(s, b"sync", 20000) == 4 and os.pread(fd, 4, 20000) == b"sync"
assert os.pwritev(fd, [b"rwf"], 30000, os.RWF_DSYNC) == 3 and os.pread(fd, 3, 30000) == b"rwf"
a = os.open(p, os.O_WRONLY | os.O_APPEND)
os.write(a, b"end"); os.write(a, b"END")
assert os.fstat(fd).st_size == (1 << 20) + 6 and os.pread(fd, 6, 1 << 20) == b"endEND"
t = os.open(p, os.O_RDWR | os.O_TRUNC)
assert os.fstat(fd).st_size == 0
X"#,
        [&path],
    );
    place.assert_replicated();
}

#[test]
fn fsx_finds_no_difference() {
    let place = Place::new("fsx");
    let config = place.outside("fsx.toml");
    std::fs::write(
        &config,
        "flen = 1048576\n[opsize]\nmax = 131072\n[weights]\nclose_open = 1\ninvalidate = 1\nmapread = 10\n\
         mapwrite = 10\nread = 20\nwrite = 20\ntruncate = 5\nfsync = 1\nfdatasync = 1\nposix_fallocate = 5\n\
         punch_hole = 5\nsendfile = 5\nposix_fadvise = 1\ncopy_file_range = 5\n",
    )
    .unwrap();
    let mut rng = seed::rng("fsx_finds_no_difference");
    for round in 0..3 {
        let seed = rng.random::<u32>().to_string();
        let mut fsx = Command::new("fsx");
        fsx.args(["-f", &config, "-N", "10000", "-S", &seed, "-P", &place.outside("")]);
        fsx.arg(place.path(&format!("fsx{round}")));
        let _ = try_run_within(fsx, secs(240)).ok();
    }
    place.assert_replicated();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let place = Place::new("fio");
    for (name, options) in [
        ("random", &["--rw=randwrite", "--bs=4k", "--iodepth=16", "--direct=1"][..]),
        ("odd", &["--rw=randwrite", "--bsrange=512-100k", "--bs_unaligned", "--iodepth=1"]),
        ("mixed", &["--rw=randrw", "--bssplit=4k/60:64k/30:512k/10", "--iodepth=8", "--direct=1"]),
        ("sync", &["--rw=randwrite", "--bs=4k", "--fdatasync=1", "--io_size=4M"]),
        (
            "trim",
            &["--rw=randwrite", "--bs=8k", "--fallocate=none", "--iodepth=4", "--direct=1", "--end_fsync=1"],
        ),
    ] {
        let mut fio = Command::new("fio");
        fio.args(["--name", name, "--ioengine=libaio", "--size=32M", "--verify=crc32c", "--verify_fatal=1"])
            .args(["--do_verify=1", "--randrepeat=0", "--output-format=terse"])
            .arg(format!("--filename={}", place.path(name)))
            .args(options)
            .current_dir(place.outside(""));
        let _ = try_run_within(fio, secs(240)).ok();
    }
    // Several writers of one file, each with its own region.
    let mut fio = Command::new("fio");
    fio.args(["--name=many", "--ioengine=io_uring", "--size=8M", "--numjobs=4", "--offset_increment=8M"])
        .args([
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
            "--direct=1",
            "--verify=crc32c",
            "--verify_fatal=1",
        ])
        .arg(format!("--filename={}", place.path("many")))
        .args(["--output-format=terse", "--group_reporting"])
        .current_dir(place.outside(""));
    let _ = try_run_within(fio, secs(240)).ok();
    place.assert_replicated();
}

#[test]
fn restic_backs_up_and_restores() {
    let place = Place::new("restic");
    make_sparse(&place.path("vm.raw"));
    std::fs::create_dir(place.path("dir")).unwrap();
    std::fs::write(place.path("dir/small"), "small").unwrap();
    let restic = |args: &[&str]| {
        let mut c = Command::new("restic");
        c.args(["--quiet", "--no-cache", "--repo", &place.outside("repo")]).args(args);
        c.env("RESTIC_PASSWORD", "test").current_dir(place.mount());
        try_run(c).ok()
    };
    let _ = restic(&["init"]);
    let _ = restic(&["backup", "vm.raw", "dir"]);
    let _ = restic(&["check", "--read-data"]);
    std::fs::create_dir(place.path("restored")).unwrap();
    let _ = restic(&["restore", "latest", "--target", &place.path("restored")]);
    bytes::assert_same(Path::new(&place.path("vm.raw")), Path::new(&place.path("restored/vm.raw")));
    assert_eq!(std::fs::read(place.path("restored/dir/small")).unwrap(), b"small");
    place.assert_replicated();
}
