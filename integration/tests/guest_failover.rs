//! The heart of CI: a guest journals through one host's mount, the host dies, another takes over, and
//! nothing that the guest was told to be durable is missing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use integration::harness::guest::{self, GuestSpec, Journal, Kit};
use integration::harness::status::ImageStatus;
use integration::harness::wait::secs;
use integration::harness::{Cluster, seed, until};
use rand::Rng;
use rand::seq::IndexedRandom;

const IMAGE: &str = "guest.raw";
/// In each of the two modes.
const ROUNDS: u64 = 5;
/// The contract's limit for `vmfs promote` of an image in sync.
const PROMOTE_LIMIT: Duration = secs(1);

fn image(cluster: &Cluster, host: &str) -> ImageStatus {
    cluster.image(host, IMAGE).unwrap_or_else(|| panic!("{host} does not know {IMAGE}"))
}

/// The deposed owner, back again: follows, cannot write, and never loses what the others confirmed.
fn assert_follows(cluster: &Cluster, deposed: &str, owner: &str) {
    until(&format!("{deposed} follows {owner}"), secs(30), || {
        cluster.image(deposed, IMAGE).filter(|i| i.role == "replica" && i.owner.as_deref() == Some(owner))
    });
    let path = cluster.file(deposed, IMAGE);
    let wrote = std::fs::File::options().write(true).open(&path).and_then(|f| {
        std::os::unix::fs::FileExt::write_all_at(&f, &[0xEE; 4096], 0).and_then(|()| f.sync_all())
    });
    assert!(wrote.is_err(), "{deposed} was deposed, and its mount accepted a write");
}

fn fail_over(journal: Journal, name: &str) {
    let kit = Kit::get();
    println!("guest kit: {}", kit.work_dir().display());
    let cluster = Cluster::start(name);
    let mut rng = seed::rng(name);
    let scratch = cluster.scratch();
    let mut owner = "a".to_owned();
    guest::make_disk(&cluster.file(&owner, IMAGE), journal, 64 << 20);
    let mut acked = -1;
    let mut slowest = Duration::ZERO;
    for round in 1..=ROUNDS {
        cluster.wait_in_sync(IMAGE);
        let epoch = image(&cluster, &owner).epoch;
        let mut spec = GuestSpec::new(cluster.file(&owner, IMAGE), journal);
        spec.aio = ["native", "io_uring"].choose(&mut rng).expect("invariant: two of them");
        let mut running = spec.boot(&scratch, &format!("{name}-{round}"));
        running.wait_acked(acked + 1);
        // The moment of the crash is what is random here; nothing is waited for.
        let moment = Duration::from_micros(rng.random_range(0..2_500_000));
        std::thread::sleep(moment);
        running.assert_no_errors();
        cluster.kill9(&owner);
        running.kill9();
        acked = acked.max(running.acked());

        let others: Vec<_> = cluster.hosts().into_iter().filter(|h| *h != owner).map(str::to_owned).collect();
        let successor = others.choose(&mut rng).expect("invariant: two others").clone();
        let start = Instant::now();
        let said = cluster.vmfs(&successor, &["promote", IMAGE]).ok();
        let took = start.elapsed();
        slowest = slowest.max(took);
        println!(
            "round {round}: {owner} killed {moment:?} after the first record, acked {acked}, \
             {successor} promoted in {took:?}: {}",
            said.stdout.trim()
        );
        let now = image(&cluster, &successor);
        assert_eq!(now.role, "owner");
        assert_ne!(now.epoch, epoch, "a new owner has a new epoch");

        let spec = GuestSpec::new(cluster.file(&successor, IMAGE), journal);
        spec.assert_journal(&scratch, acked);
        spec.complete_burst();
        assert!(took < PROMOTE_LIMIT, "promotion took {took:?}");

        cluster.restart(&owner);
        assert_follows(&cluster, &owner, &successor);
        // The old owner's tail that nobody else had is a fork; what it confirmed was checked above.
        println!("forks at {owner}: {}", cluster.vmfs(&owner, &["forks", IMAGE]).ok().stdout.trim());
        owner = successor;
    }
    println!("slowest promotion {slowest:?}");
    cluster.assert_copies_identical(IMAGE);
}

#[test]
fn guest_failover_raw_journal_loses_nothing_acknowledged() {
    fail_over(Journal::Raw, "failover-raw");
}

#[test]
fn guest_failover_ext4_journal_loses_nothing_acknowledged() {
    fail_over(Journal::File, "failover-ext4");
}

/// A tail that only the old owner has is kept as a fork, and `fork drop` removes it.
#[test]
fn deposed_owner_keeps_its_tail_as_a_fork() {
    use std::os::unix::fs::FileExt;
    let cluster = Cluster::start_in_own_network("fork");
    let file = std::fs::File::create_new(cluster.file("a", IMAGE)).unwrap();
    file.write_all_at(&[1; 1 << 20], 0).unwrap();
    file.sync_all().unwrap();
    cluster.wait_in_sync(IMAGE);
    cluster.network().cut(cluster.pid("a"));
    // Accepted by the owner alone: no flush confirms it.
    file.write_all_at(&[2; 4096], 0).unwrap();
    let _ = cluster.vmfs("b", &["promote", IMAGE]).ok();
    drop(file);
    cluster.network().heal();
    assert_follows(&cluster, "a", "b");
    let forks = until("a lists its tail as a fork", secs(30), || {
        let said = cluster.vmfs("a", &["forks", IMAGE]).ok().stdout;
        (!said.trim().is_empty()).then_some(said)
    });
    println!("{forks}");
    cluster.assert_copies_identical(IMAGE);
    let mut first = [0; 4096];
    std::fs::File::open(cluster.file("a", IMAGE)).unwrap().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1; 4096], "the unconfirmed write must be in the fork, not in the image");
}
