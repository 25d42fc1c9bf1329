//! What `examples/` promises to operators, run as it is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use integration::harness::cluster::{repository, vmfs_binary};
use integration::harness::command::{Ran, try_run};
use integration::harness::guest::{self, GuestSpec, Journal, last_acked};
use integration::harness::lab::Lab;
use integration::harness::wait::secs;
use integration::harness::{Cluster, Place, bytes, until_true};

/// `PATH` with the binary under test first.
fn path_with_vmfs() -> String {
    let bin = vmfs_binary().parent().unwrap().to_str().unwrap();
    format!("{bin}:{}", std::env::var("PATH").unwrap())
}

fn example(cluster: &Cluster, host: &str, script: &str, args: &[&str]) -> Ran {
    let mut command = std::process::Command::new(repository().join("examples").join(script));
    command.args(args).env("PATH", path_with_vmfs()).env("VMFS_SOCKET", cluster.socket(host));
    command.env("RESTIC_REPOSITORY", cluster.scratch().join("restic")).env("RESTIC_PASSWORD", "test");
    try_run(command)
}

#[test]
fn backup_scripts_copy_one_moment_of_a_busy_image() {
    let cluster = Cluster::start("backup");
    let scratch = cluster.scratch();
    std::fs::create_dir(cluster.mnt("a").join("vms")).unwrap();
    guest::make_disk(&cluster.file("a", "vms/vm.raw"), Journal::Raw, 64 << 20);
    let mut spec = GuestSpec::new(cluster.file("a", "vms/vm.raw"), Journal::Raw);
    let mut guest = spec.boot(&scratch, "backup");
    guest.wait_acked(100);

    // Busy all the time: a mixture of moments would show as a wrong order of records.
    let acked_before = guest.acked();
    let copies = scratch.join("copies");
    let _ = example(&cluster, "b", "backup/copy.sh", &[copies.to_str().unwrap(), "vms/vm.raw"]).ok();
    spec.image = copies.join("vms/vm.raw");
    spec.assert_journal(&scratch, acked_before);
    assert!(bytes::allocated_bytes(&spec.image) < 32 << 20, "the copy is not sparse");

    let repo = scratch.join("restic");
    let _ = integration::harness::bash(
        "RESTIC_PASSWORD=test restic --quiet --no-cache --repo \"$1\" init",
        [repo.to_str().unwrap()],
    );
    let acked_before = guest.acked();
    let _ = example(&cluster, "c", "backup/restic.sh", &["vms/vm.raw"]).ok();
    let restored = scratch.join("restored");
    let _ = integration::harness::bash(
        "RESTIC_PASSWORD=test restic --quiet --no-cache --repo \"$1\" restore latest --target \"$2\"",
        [&repo, &restored],
    );
    spec.image = restored.join("vms/vm.raw");
    spec.assert_journal(&scratch, acked_before);
    guest.wait_more(10);
    guest.assert_no_errors();

    for script in ["backup/copy.sh", "backup/restic.sh", "failover.sh"] {
        assert_eq!(example(&cluster, "b", script, &[]).code(), 2, "{script} without arguments");
    }
}

#[test]
fn failover_script_promotes_the_images_of_a_vm_and_starts_it() {
    let mut place = Place::new("failover-script");
    let lab = Lab::with_libvirt(&mut place);
    let cluster = place.cluster().expect("this test needs a cluster, not a plain directory");
    let scratch = cluster.scratch();
    for image in ["vm.raw", "data.raw", "other.raw"] {
        guest::make_disk(&cluster.file("a", image), Journal::Raw, 64 << 20);
        cluster.wait_in_sync(image);
        cluster.wait_visible("b", image);
    }
    // The domain as it is defined on b, with a second disk.
    let image = cluster.file("b", "vm.raw");
    let xml_path = lab.domain_xml("vm", image.to_str().unwrap(), &["cmdline=gj.mode=raw gj.burst=1"]);
    let second = format!(
        "</disk><disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>\
         <source file='{}'/><target dev='vdb' bus='virtio'/></disk>",
        cluster.file("b", "data.raw").display()
    );
    let xml = std::fs::read_to_string(&xml_path).unwrap().replace("</disk>", &second);
    std::fs::write(&xml_path, xml).unwrap();
    let _ = lab.virsh(&["define", xml_path.to_str().unwrap()]);

    // One record per flush: a second boot cannot leave a hole in the burst that the first one was cut off in.
    let mut spec = GuestSpec::new(cluster.file("a", "vm.raw"), Journal::Raw);
    spec.burst = 1;
    let mut guest = spec.boot(&scratch, "on-a");
    guest.wait_acked(100);
    cluster.kill9("a");
    guest.kill9();
    let acked = guest.acked();

    let script = repository().join("examples/failover.sh");
    let (path, socket) = (path_with_vmfs(), cluster.socket("b"));
    let env = [("PATH", path.as_str()), ("VMFS_SOCKET", socket.to_str().unwrap())];
    let fail_over = || lab.try_in(&env, &[script.to_str().unwrap(), "vm"]);
    let said = fail_over().ok();
    println!("{}", said.stdout);
    for image in ["vm.raw", "data.raw"] {
        assert_eq!(cluster.image("b", image).unwrap().role, "owner", "{image}");
    }
    assert_ne!(cluster.image("b", "other.raw").unwrap().role, "owner", "no image of this VM");
    until_true("the guest goes on at b", secs(60), || last_acked(&lab.console("vm")) > acked + 20);
    assert_eq!(fail_over().code(), 1, "the domain runs already");
    let _ = lab.virsh(&["destroy", "vm"]);
    let acked = last_acked(&lab.console("vm"));
    spec.image = cluster.file("b", "vm.raw");
    spec.assert_journal(&scratch, acked);
    // A second run after an interruption: what is owned already stays, and the domain starts.
    let _ = fail_over().ok();
    let _ = lab.virsh(&["destroy", "vm"]);
}

#[test]
fn failover_script_without_a_quorum_starts_nothing() {
    let mut place = Place::new("failover-noquorum");
    let lab = Lab::with_libvirt(&mut place);
    let cluster = place.cluster().expect("this test needs a cluster, not a plain directory");
    guest::make_disk(&cluster.file("a", "vm.raw"), Journal::Raw, 64 << 20);
    cluster.wait_in_sync("vm.raw");
    cluster.wait_visible("b", "vm.raw");
    let image = cluster.file("b", "vm.raw");
    let xml = lab.domain_xml("vm", image.to_str().unwrap(), &[]);
    let _ = lab.virsh(&["define", xml.to_str().unwrap()]);
    cluster.kill9("a");
    cluster.kill9("c");
    let script = repository().join("examples/failover.sh");
    let (path, socket) = (path_with_vmfs(), cluster.socket("b"));
    let env = [("PATH", path.as_str()), ("VMFS_SOCKET", socket.to_str().unwrap())];
    let refused = lab.try_in(&env, &[script.to_str().unwrap(), "vm"]);
    assert_eq!(refused.code(), 3, "{refused}");
    assert_eq!(lab.virsh(&["domstate", "vm"]).trim(), "shut off");
    let forced = lab.try_in(&env, &[script.to_str().unwrap(), "--force", "vm"]).ok();
    println!("{}", forced.stdout);
    assert_eq!(lab.virsh(&["domstate", "vm"]).trim(), "running");
    let _ = lab.virsh(&["destroy", "vm"]);
}

#[test]
fn libvirt_examples_are_accepted() {
    let mut place = Place::plain("libvirt-examples", &std::env::temp_dir());
    let lab = Lab::with_libvirt(&mut place);
    let example = |name: &str| repository().join("examples/libvirt").join(name);
    let _ = lab.virsh(&["pool-define", example("pool.xml").to_str().unwrap()]);
    // The test machine has no KVM; everything else is taken as it is.
    let xml = std::fs::read_to_string(example("domain.xml")).unwrap().replace("type='kvm'", "type='qemu'");
    let path = place.outside("domain.xml");
    std::fs::write(&path, xml).unwrap();
    let _ = lab.virsh(&["define", &path]);
    assert!(lab.virsh(&["domblklist", "web"]).contains("/var/lib/vmfs/mnt/web.raw"));
    assert!(Path::new(&path).exists());
}
