//! libvirt with a directory pool on the mount: volumes, and a domain with snapshots.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use integration::harness::guest::{GuestSpec, Journal, last_acked};
use integration::harness::lab::Lab;
use integration::harness::wait::secs;
use integration::harness::{Place, bytes, run, until_true};

fn lab_with_pool(name: &str) -> (Place, Lab) {
    let mut place = Place::new(name);
    let lab = Lab::with_libvirt(&mut place);
    let target = place.path("");
    let _ = lab.virsh(&["pool-define-as", "pool", "dir", "--target", target.trim_end_matches('/')]);
    let _ = lab.virsh(&["pool-start", "pool"]);
    (place, lab)
}

#[test]
fn libvirt_volumes_are_made_filled_cloned_resized_and_deleted() {
    let (place, lab) = lab_with_pool("volumes");
    let source = place.outside("source.raw");
    std::fs::write(&source, bytes::noise(8, 16 << 20)).unwrap();
    for format in ["raw", "qcow2"] {
        let volume = format!("v.{format}");
        let _ = lab.virsh(&["vol-create-as", "pool", &volume, "64M", "--format", format]);
        assert!(lab.virsh(&["vol-info", &volume, "--pool", "pool"]).contains("64.00 MiB"));
        let _ = lab.virsh(&["vol-resize", &volume, "96M", "--pool", "pool"]);
        assert!(lab.virsh(&["vol-info", &volume, "--pool", "pool"]).contains("96.00 MiB"));
        let clone = format!("clone.{format}");
        let _ = lab.virsh(&["vol-clone", &volume, &clone, "--pool", "pool"]);
        let (original, copy) = (place.path(&volume), place.path(&clone));
        let _ = run("qemu-img", ["compare", "-q", "-f", format, "-F", format, &original, &copy]);
        let _ = lab.virsh(&["vol-delete", &clone, "--pool", "pool"]);
        assert!(!Path::new(&copy).exists());
    }
    let _ = lab.virsh(&["vol-create-as", "pool", "data.raw", "16M", "--format", "raw", "--allocation", "0"]);
    let _ = lab.virsh(&["vol-upload", "data.raw", &source, "--pool", "pool"]);
    bytes::assert_same(Path::new(&source), Path::new(&place.path("data.raw")));
    let _ = lab.virsh(&["vol-clone", "data.raw", "data2.raw", "--pool", "pool"]);
    let back = place.outside("back.raw");
    let _ = lab.virsh(&["vol-download", "data2.raw", &back, "--pool", "pool"]);
    bytes::assert_same(Path::new(&source), Path::new(&back));

    // What other tools made shows up.
    let _ = run("qemu-img", ["create", "-q", "-f", "qcow2", &place.path("other.qcow2"), "1G"]);
    let _ = lab.virsh(&["pool-refresh", "pool"]);
    let names = lab.virsh(&["vol-list", "pool"]);
    for name in ["v.raw", "v.qcow2", "data.raw", "data2.raw", "other.qcow2"] {
        assert!(names.contains(name), "{name} is missing:\n{names}");
    }
    place.assert_replicated();
}

#[test]
fn libvirt_domain_starts_snapshots_commits_and_stops() {
    let (place, lab) = lab_with_pool("domain");
    let _ = lab.virsh(&["vol-create-as", "pool", "vm.raw", "64M", "--format", "raw", "--allocation", "0"]);
    let (image, overlay) = (place.path("vm.raw"), place.path("vm.snap"));
    let xml = lab.domain_xml("vm", &image, &["io=native", "cmdline=gj.mode=raw gj.burst=1 gj.sleep=5"]);
    let _ = lab.virsh(&["define", xml.to_str().unwrap()]);
    let _ = lab.virsh(&["start", "vm"]);
    let acked = || last_acked(&lab.console("vm"));
    let goes_on = |what: &str| {
        let now = acked();
        until_true(what, secs(60), || acked() > now + 40);
    };
    goes_on("the guest writes");

    let spec = format!("vda,snapshot=external,file={overlay}");
    let _ = lab.virsh(&[
        "snapshot-create-as",
        "vm",
        "s1",
        "--disk-only",
        "--atomic",
        "--no-metadata",
        "--diskspec",
        &spec,
    ]);
    assert!(lab.virsh(&["domblklist", "vm"]).contains("vm.snap"));
    goes_on("the guest writes into the overlay");
    let _ = lab.virsh(&["blockcommit", "vm", "vda", "--active", "--pivot", "--wait"]);
    assert!(lab.virsh(&["domblklist", "vm"]).contains("vm.raw"));
    std::fs::remove_file(&overlay).unwrap();
    goes_on("the guest writes after the commit");
    let _ = lab.virsh(&["suspend", "vm"]);
    let _ = lab.virsh(&["resume", "vm"]);
    goes_on("the guest writes after a pause");
    let _ = lab.virsh(&["destroy", "vm"]);

    let console = lab.console("vm");
    assert!(!console.contains("ERROR") && !console.contains("I/O error"), "{console}");
    let mut journal = GuestSpec::new(&image, Journal::Raw);
    journal.burst = 1;
    journal.assert_journal(lab.work(), acked());

    // A second start finds what the first one left.
    let _ = lab.virsh(&["start", "vm"]);
    goes_on("the guest writes after a restart");
    let _ = lab.virsh(&["destroy", "vm"]);
    let last = acked();
    let _ = lab.virsh(&["undefine", "vm"]);
    place.assert_replicated();
    if let Some(cluster) = place.cluster() {
        for host in cluster.hosts() {
            journal.image = cluster.file(host, "vm.raw");
            journal.assert_journal(lab.work(), last);
        }
    }
    journal.image = image.into();
    journal.assert_journal(lab.work(), last);
}
