//! Power cuts on real daemons: what fsync confirmed is there, whoever loses the power and whenever.
//!
//! Every store lies on a disk that forgets a random part of what was not synced (`integration::power`), cut
//! between any two of the store's calls.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use integration::harness::command::{try_run_within, wait_within};
use integration::harness::guest::{self, GuestSpec, Journal, Kit};
use integration::harness::model::{BLOCK, NumberedWrites};
use integration::harness::wait::secs;
use integration::harness::{Cluster, PoweredCluster, seed, until};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

const BLOCKS: u64 = 2048;
const IMAGE: &str = "disk.raw";
const ALL: [&str; 3] = ["a", "b", "c"];
/// From arming a disk to its freezing, while something writes.
const ARM_LIMIT: Duration = secs(20);

fn open(cluster: &Cluster, host: &str) -> File {
    let path = cluster.file(host, IMAGE);
    File::options().read(true).write(true).open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn make(cluster: &Cluster, host: &str) -> File {
    let file = File::create_new(cluster.file(host, IMAGE)).unwrap();
    file.set_len(BLOCKS * BLOCK as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    open(cluster, host)
}

/// Waits until `host` serves its image, after a restart or a promotion (degraded, while a member is down).
fn wait_owner(cluster: &Cluster, host: &str) {
    until(&format!("{host} owns its image"), secs(30), || {
        let serves = |state: &str| state == "ok" || state == "degraded";
        cluster.image(host, IMAGE).filter(|i| i.role == "owner" && serves(&i.state))
    });
}

/// Writes and flushes until `stop` has ended or a write fails; `stop` runs beside it.
fn write_during(writes: &mut NumberedWrites, file: &File, stop: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let stopping = scope.spawn(stop);
        while !stopping.is_finished() {
            let wrote = writes.write(file);
            let flushed = if writes.chance(12) { writes.flush(file) } else { Ok(()) };
            if wrote.and(flushed).is_err() {
                break;
            }
        }
    });
}

/// Cuts the power of `hosts` when the disk of the first has made a random number of calls.
fn cut_when_busy(power: &PoweredCluster, hosts: &[&str], rng: &mut StdRng) {
    power.arm(hosts[0], rng);
    power.wait_frozen(hosts[0], ARM_LIMIT);
    power.cut(hosts, rng);
}

#[test]
fn flushed_writes_survive_power_cuts_of_the_owner() {
    let power = PoweredCluster::start("cutowner");
    let cluster = &power.cluster;
    let mut rng = seed::rng("flushed_writes_survive_power_cuts_of_the_owner");
    let mut writes = NumberedWrites::new(BLOCKS, rand::SeedableRng::seed_from_u64(rng.random()));
    let mut file = make(cluster, "a");
    for round in 0..8 {
        write_during(&mut writes, &file, || cut_when_busy(&power, &["a"], &mut rng));
        drop(file);
        cluster.restart("a");
        wait_owner(cluster, "a");
        file = open(cluster, "a");
        let kept = writes.assert_prefix(&file);
        println!("round {round}: {} flushed, {kept} kept", writes.flushed());
    }
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn flushed_writes_survive_power_cuts_of_all_hosts_at_once() {
    let power = PoweredCluster::start("cutall");
    let cluster = &power.cluster;
    let mut rng = seed::rng("flushed_writes_survive_power_cuts_of_all_hosts_at_once");
    let mut writes = NumberedWrites::new(BLOCKS, rand::SeedableRng::seed_from_u64(rng.random()));
    let mut file = make(cluster, "a");
    for round in 0..8 {
        let mut hosts = ALL;
        hosts.rotate_left(rng.random_range(0..ALL.len()));
        write_during(&mut writes, &file, || cut_when_busy(&power, &hosts, &mut rng));
        drop(file);
        for host in ALL {
            cluster.restart(host);
        }
        wait_owner(cluster, "a");
        file = open(cluster, "a");
        let kept = writes.assert_prefix(&file);
        println!("round {round}: {} flushed, {kept} kept", writes.flushed());
    }
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

/// A replica that lost its power, and promises and acknowledgements with it, would lose writes for all.
#[test]
fn a_replica_that_lost_its_power_is_promoted_and_has_every_flush() {
    let power = PoweredCluster::start("cutreplica");
    let cluster = &power.cluster;
    let mut rng = seed::rng("a_replica_that_lost_its_power_is_promoted_and_has_every_flush");
    let mut writes = NumberedWrites::new(BLOCKS, rand::SeedableRng::seed_from_u64(rng.random()));
    let mut owner = "a";
    let mut file = make(cluster, owner);
    for round in 0..6 {
        cluster.wait_in_sync(IMAGE);
        let others: Vec<_> = ALL.into_iter().filter(|h| *h != owner).collect();
        let successor = *others.choose(&mut rng).unwrap();
        write_during(&mut writes, &file, || {
            // The owner goes on with the other replica, and loses its own power a little later: when the
            // successor has not caught up, or when it has.
            cut_when_busy(&power, &[successor], &mut rng);
            cluster.restart(successor);
            if rng.random() {
                cluster.wait_in_sync(IMAGE);
            }
            cut_when_busy(&power, &[owner], &mut rng);
        });
        drop(file);
        let said = cluster.vmfs(successor, &["promote", IMAGE]).ok();
        println!("round {round}: {successor} promoted after {owner}: {}", said.stdout.trim());
        wait_owner(cluster, successor);
        file = open(cluster, successor);
        let kept = writes.assert_prefix(&file);
        println!("round {round}: {} flushed, {kept} kept", writes.flushed());
        cluster.restart(owner);
        owner = successor;
    }
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

/// A kill loses nothing by itself, but what a killed daemon wrote is not on the disk: the next one may not
/// take it for that.
#[test]
fn what_a_restarted_daemon_says_it_holds_survives_a_power_cut_soon_after() {
    let power = PoweredCluster::start("cutrestart");
    let cluster = &power.cluster;
    let mut rng = seed::rng("what_a_restarted_daemon_says_it_holds_survives_a_power_cut_soon_after");
    let mut writes = NumberedWrites::new(BLOCKS, rand::SeedableRng::seed_from_u64(rng.random()));
    let mut file = make(cluster, "a");
    for round in 0..4 {
        let moment = Duration::from_millis(rng.random_range(20..400));
        write_during(&mut writes, &file, || {
            // The moment of the kill is what is random here; nothing is waited for.
            std::thread::sleep(moment);
            for host in ALL {
                cluster.kill9(host);
            }
        });
        drop(file);
        for host in ALL {
            cluster.restart(host);
        }
        let mut shown = 0;
        if rng.random() {
            // The owner shows nothing that is not durable on a quorum.
            wait_owner(cluster, "a");
            shown = writes.assert_prefix(&open(cluster, "a"));
        }
        power.cut(&ALL, &mut rng);
        for host in ALL {
            cluster.restart(host);
        }
        wait_owner(cluster, "a");
        file = open(cluster, "a");
        let kept = writes.assert_prefix(&file);
        assert!(kept >= shown, "write {shown} was shown after the restart, and only {kept} are left");
        println!("round {round}: killed after {moment:?}, {} flushed, {kept} kept", writes.flushed());
    }
    drop(file);
    cluster.assert_copies_identical(IMAGE);
}

/// One fio job in the region of `round`, to be run to its end or not.
fn fio(path: &Path, round: u64, options: &[&str]) -> Command {
    let mut fio = Command::new("fio");
    fio.arg(format!("--name=r{round}")).arg("--filename").arg(path);
    fio.args(["--ioengine=libaio", "--direct=1", "--iodepth=8", "--bs=4k", "--size=4M"]);
    fio.arg(format!("--offset={}M", 4 * round)).arg(format!("--randseed={}", round + 1));
    fio.args(["--verify=crc32c", "--verify_fatal=1"]).args(options);
    fio
}

fn start_quietly(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn fio_verifies_every_flushed_byte_after_power_cuts() {
    const ROUNDS: u64 = 4;
    let power = PoweredCluster::start("cutfio");
    let cluster = &power.cluster;
    let mut rng = seed::rng("fio_verifies_every_flushed_byte_after_power_cuts");
    let file = File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.set_len((4 * ROUNDS + 4) << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let path = cluster.file("a", IMAGE);
    let scratch = cluster.scratch();
    for round in 0..ROUNDS {
        let mut whole = fio(&path, round, &["--rw=randwrite", "--do_verify=0", "--end_fsync=1"]);
        whole.current_dir(&scratch);
        let _ = try_run_within(whole, secs(120)).ok();
        // The next one is hit in the middle.
        let options = ["--rw=randwrite", "--do_verify=0", "--fsync=16", "--time_based", "--runtime=60"];
        let mut cut = fio(&path, ROUNDS, &options);
        cut.current_dir(&scratch);
        let mut cut = start_quietly(cut);
        let hosts: &[&str] = if round % 2 == 0 { &["a"] } else { &ALL };
        cut_when_busy(&power, hosts, &mut rng);
        assert!(wait_within(&mut cut, secs(30)).is_some(), "fio goes on without its disk");
        for host in hosts {
            cluster.restart(host);
        }
        wait_owner(cluster, "a");
        for done in 0..=round {
            let mut verify = fio(&path, done, &["--rw=randwrite", "--verify_only"]);
            verify.current_dir(&scratch);
            let _ = try_run_within(verify, secs(120)).ok();
        }
    }
    cluster.assert_copies_identical(IMAGE);
}

/// Boots the journal guest on `owner`, and cuts the power of `hosts` at some moment after its first record.
/// Returns what was acknowledged.
fn guest_until_cut(
    power: &PoweredCluster,
    spec: &GuestSpec,
    name: &str,
    acked: i64,
    hosts: &[&str],
    rng: &mut StdRng,
) -> i64 {
    let mut running = spec.boot(&power.cluster.scratch(), name);
    running.wait_acked(acked + 1);
    // The moment of the cut is what is random here; nothing is waited for.
    std::thread::sleep(Duration::from_micros(rng.random_range(0..1_500_000)));
    running.assert_no_errors();
    cut_when_busy(power, hosts, rng);
    running.kill9();
    acked.max(running.acked())
}

#[test]
fn guest_journal_survives_power_cuts_of_owner_replica_and_all() {
    println!("guest kit: {}", Kit::get().work_dir().display());
    let power = PoweredCluster::start("cutguest");
    let cluster = &power.cluster;
    let mut rng = seed::rng("guest_journal_survives_power_cuts_of_owner_replica_and_all");
    let scratch = cluster.scratch();
    let mut owner = "a";
    let mut acked = -1;
    guest::make_disk(&cluster.file(owner, IMAGE), Journal::Raw, 64 << 20);
    for round in 0..4 {
        cluster.wait_in_sync(IMAGE);
        let spec = GuestSpec::new(cluster.file(owner, IMAGE), Journal::Raw);
        let name = format!("cut-{round}");
        let all = round % 2 == 1;
        let hosts: &[&str] = if all { &ALL } else { &[owner] };
        acked = guest_until_cut(&power, &spec, &name, acked, hosts, &mut rng);
        let others: Vec<_> = ALL.into_iter().filter(|h| *h != owner).collect();
        let successor = if all { owner } else { *others.choose(&mut rng).unwrap() };
        if all {
            ALL.into_iter().for_each(|host| cluster.restart(host));
        } else {
            let said = cluster.vmfs(successor, &["promote", IMAGE]).ok();
            println!("{successor} promoted: {}", said.stdout.trim());
        }
        wait_owner(cluster, successor);
        let spec = GuestSpec::new(cluster.file(successor, IMAGE), Journal::Raw);
        spec.assert_journal(&scratch, acked);
        spec.complete_burst();
        println!("round {round}: {hosts:?} cut, acked {acked}, owner is {successor}");
        if !all {
            cluster.restart(owner);
        }
        owner = successor;
    }
    cluster.assert_copies_identical(IMAGE);
}

/// The guest does not notice that a replica loses its power, and the replica has everything when it is
/// promoted later.
#[test]
fn guest_goes_on_when_a_replica_loses_its_power_and_that_replica_takes_over() {
    println!("guest kit: {}", Kit::get().work_dir().display());
    let power = PoweredCluster::start("cutguestreplica");
    let cluster = &power.cluster;
    let mut rng = seed::rng("guest_goes_on_when_a_replica_loses_its_power_and_that_replica_takes_over");
    let scratch = cluster.scratch();
    guest::make_disk(&cluster.file("a", IMAGE), Journal::Raw, 64 << 20);
    cluster.wait_in_sync(IMAGE);
    let spec = GuestSpec::new(cluster.file("a", IMAGE), Journal::Raw);
    let mut running = spec.boot(&scratch, "replica");
    running.wait_acked(1);
    for _ in 0..3 {
        cut_when_busy(&power, &["b"], &mut rng);
        running.wait_more(20);
        cluster.restart("b");
        running.wait_more(20);
        running.assert_no_errors();
    }
    cluster.wait_in_sync(IMAGE);
    cut_when_busy(&power, &["a"], &mut rng);
    running.kill9();
    let acked = running.acked();
    let said = cluster.vmfs("b", &["promote", IMAGE]).ok();
    println!("acked {acked}; b promoted: {}", said.stdout.trim());
    wait_owner(cluster, "b");
    GuestSpec::new(cluster.file("b", IMAGE), Journal::Raw).assert_journal(&scratch, acked);
    cluster.restart("a");
    cluster.assert_copies_identical(IMAGE);
}
