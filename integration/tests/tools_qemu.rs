//! qemu-img, qemu-io and QEMU itself, unchanged, on the mount.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use integration::harness::command::{Ran, bash, run, try_run};
use integration::harness::guest::{self, GuestSpec, Journal};
use integration::harness::wait::secs;
use integration::harness::{Place, bytes, until_true};

fn img(args: &[&str]) -> Ran {
    run("qemu-img", args)
}

/// Waits until no QEMU holds the image any more.
fn wait_unlocked(format: &str, image: &str) {
    until_true("the killed QEMU's locks are gone", secs(5), || {
        let mut info = Command::new("qemu-img");
        info.args(["info", "-f", format, image]);
        try_run(info).status.success()
    });
}

fn json(ran: &Ran) -> serde_json::Value {
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn qemu_img_creates_converts_resizes_and_checks() {
    let place = Place::new("qemuimg");
    let source = place.outside("source.raw");
    let mut content = bytes::noise(3, 6 << 20);
    content.resize(32 << 20, 0);
    std::fs::write(&source, &content).unwrap();

    for format in ["raw", "qcow2"] {
        let created = place.path(&format!("created.{format}"));
        let _ = img(&["create", "-q", "-f", format, &created, "64M"]);
        let info = json(&img(&["info", "--output=json", &created]));
        assert_eq!(info["virtual-size"], 64 << 20);
        assert_eq!(info["format"], format);
        let _ = img(&["resize", "-q", "-f", format, &created, "96M"]);
        assert_eq!(json(&img(&["info", "--output=json", &created]))["virtual-size"], 96 << 20);
        let _ = img(&["resize", "-q", "--shrink", "-f", format, &created, "48M"]);
        assert_eq!(json(&img(&["info", "--output=json", &created]))["virtual-size"], 48 << 20);

        let converted = place.path(&format!("converted.{format}"));
        let _ = img(&["convert", "-q", "-f", "raw", "-O", format, &source, &converted]);
        let _ = img(&["compare", "-q", "-f", "raw", "-F", format, &source, &converted]);
        // And out again, without the page cache, many requests at once.
        let back = place.outside("back.raw");
        let _ = img(&[
            "convert", "-q", "-T", "none", "-W", "-m", "8", "-f", format, "-O", "raw", &converted, &back,
        ]);
        bytes::assert_same(Path::new(&source), Path::new(&back));
    }
    let _ = img(&["check", "-q", &place.path("converted.qcow2")]);
    let preallocated = place.path("falloc.raw");
    let _ = img(&["create", "-q", "-f", "raw", "-o", "preallocation=falloc", &preallocated, "8M"]);
    let _ = img(&["create", "-q", "-f", "raw", "-o", "preallocation=full", &place.path("full.raw"), "8M"]);
    let _ = img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        &place.path("converted.qcow2"),
        "-F",
        "qcow2",
        &place.path("overlay.qcow2"),
    ]);
    let _ = img(&["compare", "-q", "-f", "raw", "-F", "qcow2", &source, &place.path("overlay.qcow2")]);
    // The zeros of the source take no space.
    let sparse = bytes::allocated_bytes(Path::new(&place.path("converted.raw")));
    assert!(sparse < 8 << 20, "6 MiB of data occupy {sparse} bytes");
    place.assert_replicated();
}

#[test]
fn qemu_img_map_sees_holes() {
    let place = Place::new("map");
    let image = place.path("holes.raw");
    let _ = img(&["create", "-q", "-f", "raw", &image, "16M"]);
    let _ = run("qemu-io", ["-f", "raw", "-c", "write -P 0x11 4M 1M", "-c", "flush", &image]);
    let map = json(&img(&["map", "--output=json", "-f", "raw", &image]));
    // `qemu-img create` itself writes zeros to the first block, which a filesystem may store.
    let data: Vec<_> =
        map.as_array().unwrap().iter().filter(|e| e["data"] == true && e["start"] != 0).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&(4 << 20).into(), &(1 << 20).into()));
    place.assert_replicated();
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    let place = Place::new("qemuio");
    for (format, cache, aio) in [
        ("raw", "none", "native"),
        ("raw", "none", "io_uring"),
        ("raw", "writeback", "threads"),
        ("raw", "directsync", "threads"),
        ("qcow2", "none", "native"),
        ("qcow2", "writethrough", "threads"),
    ] {
        let image = place.path(&format!("{format}-{cache}-{aio}"));
        let _ = img(&["create", "-q", "-f", format, &image, "32M"]);
        let script = [
            "write -q -P 0x21 0 64k",
            "write -q -P 0x22 1M 3M",
            "aio_write -q -P 0x23 8M 1M",
            "aio_write -q -P 0x24 9M 1M",
            "aio_flush",
            "write -q -z 1M 64k",
            "discard -q 2M 1M",
            "flush",
            "read -q -P 0x21 0 64k",
            "read -q -P 0 1M 64k",
            "read -q -P 0x22 1088k 64k",
            "read -q -P 0 2M 1M",
            "read -q -P 0x23 8M 1M",
            "read -q -P 0x24 9M 1M",
            "write -q -P 0x25 5000192 512",
            "read -q -P 0x25 5000192 512",
        ];
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", format, "-t", cache, "-i", aio, "-d", "unmap"]);
        script.iter().for_each(|c| _ = qemu_io.args(["-c", c]));
        qemu_io.arg(&image);
        let ran = try_run(qemu_io).ok();
        assert!(!ran.stdout.contains("Pattern verification failed"), "{format} {cache} {aio}: {ran}");
    }
    place.assert_replicated();
}

#[test]
fn qemu_locks_keep_a_second_writer_out() {
    let place = Place::new("locks");
    let image = place.path("locked.raw");
    guest::make_disk(Path::new(&image), Journal::Raw, 64 << 20);
    let scratch = place.outside("");
    let spec = GuestSpec::new(&image, Journal::Raw);
    let mut guest = spec.boot(Path::new(&scratch), "locks");
    guest.wait_acked(0);
    let mut second = Command::new("qemu-io");
    second.args(["-f", "raw", "-c", "write 0 4k", &image]);
    let ran = try_run(second);
    assert!(!ran.status.success() && ran.stderr.contains("lock"), "{ran}");
    // Readers that share are let in.
    let _ = img(&["info", "-U", "--output=json", &image]);
    guest.kill9();
    // The locks go with their holder.
    wait_unlocked("raw", &image);
    let _ = run("qemu-io", ["-f", "raw", "-c", "write -q 32M 4k", &image]);
}

#[test]
fn qemu_guest_runs_with_every_cache_and_aio_mode() {
    let place = Place::new("modes");
    let scratch = place.outside("");
    for (format, cache, aio) in [
        ("raw", "none", "native"),
        ("raw", "none", "io_uring"),
        ("raw", "writeback", "threads"),
        ("qcow2", "none", "native"),
        ("qcow2", "none", "io_uring"),
        ("qcow2", "writeback", "io_uring"),
    ] {
        let image = place.path(&format!("{format}-{cache}-{aio}.img"));
        let _ = img(&["create", "-q", "-f", format, &image, "64M"]);
        let mut spec = GuestSpec::new(&image, Journal::Raw);
        (spec.format, spec.cache, spec.aio) = (format, cache, aio);
        let mut guest = spec.boot(Path::new(&scratch), "modes");
        guest.wait_acked(200);
        guest.assert_no_errors();
        guest.kill9();
        let acked = guest.acked();
        if format == "qcow2" {
            // The kernel ends an io_uring, and with it the locks of the files in it, after the process.
            wait_unlocked(format, &image);
            // The check reads raw bytes; QEMU translates them.
            let flat = place.outside("flat.raw");
            let _ = img(&["convert", "-q", "-f", "qcow2", "-O", "raw", &image, &flat]);
            spec.image = flat.into();
        }
        spec.assert_journal(Path::new(&scratch), acked);
        println!("{format} {cache} {aio}: {acked} records");
    }
    place.assert_replicated();
}

#[test]
fn qemu_img_snapshots_and_commits_qcow2() {
    let place = Place::new("qcow2");
    let base = place.path("base.qcow2");
    let overlay = place.path("top.qcow2");
    let _ = img(&["create", "-q", "-f", "qcow2", &base, "32M"]);
    let _ = run("qemu-io", ["-c", "write -q -P 1 0 4M", &base]);
    let _ = img(&["snapshot", "-c", "before", &base]);
    let _ = img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay]);
    let _ = run("qemu-io", ["-c", "write -q -P 2 1M 1M", &overlay]);
    let _ = img(&["commit", "-q", &overlay]);
    let _ = run("qemu-io", ["-c", "read -q -P 2 1M 1M", "-c", "read -q -P 1 2M 1M", &base]);
    let _ = img(&["snapshot", "-a", "before", &base]);
    let said = bash(r#"qemu-io -c "read -P 1 1M 1M" "$1""#, [&base]);
    assert!(!said.stdout.contains("verification failed"), "{said}");
    let _ = img(&["check", "-q", &base]);
    place.assert_replicated();
}
