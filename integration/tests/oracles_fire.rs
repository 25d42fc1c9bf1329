//! Every check of the simulator's oracles fires when the rule that it is about is broken. A run with the rule
//! broken, from the seed named here, must fail by exactly that check; where the schedule has changed since, one of
//! the next seeds does. docs/testing.md has the table.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use integration::mutants;
use integration::sim::{self, Broken, Check};
use vmfs_common::weaken::{self, Weakness};

/// Actions in each run.
const TICKS: u64 = 200;
/// Seeds tried from the one named on.
const SEEDS: u64 = 500;
/// Rows are tried on these many threads; each run is single-threaded.
const THREADS: usize = 2;

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    /// A rule of the machines.
    Of(Weakness),
    /// What surrounds them.
    Around(Broken),
}

use Rule::{Around, Of};

impl Rule {
    fn name(self) -> String {
        match self {
            Of(weakness) => format!("{weakness:?}"),
            Around(broken) => format!("{broken:?}"),
        }
    }

    /// The check that a run with the rule broken fails by, and its words.
    fn run(self, seed: u64) -> Option<(Check, String)> {
        match self {
            Of(weakness) => {
                weaken::set(Some(weakness));
                let found = sim::run_broken(seed, TICKS, None);
                weaken::set(None);
                found.err()
            }
            Around(broken) => sim::run_broken(seed, TICKS, Some(broken)).err(),
        }
    }

    fn find(self, check: Check, first: u64, seeds: u64) -> Option<(u64, String)> {
        (first..first + seeds).find_map(|seed| {
            let (fails, what) = self.run(seed)?;
            (fails == check).then_some((seed, what))
        })
    }
}

/// Each check, a broken rule that makes it fire, and the first seed at which it does.
const ROWS: &[(Check, Rule, u64)] = &[
    (Check::MadeOnKnown, Around(Broken::ParentUnknown), 1),
    (Check::MadeInOrder, Around(Broken::NumberSkipped), 1),
    (Check::MadeOnce, Around(Broken::AppendedTwice), 1),
    (Check::MadeOneSuccessor, Around(Broken::SecondSuccessor), 1),
    (Check::TakenWasMade, Of(Weakness::OriginUnchecked), 29),
    (Check::HeadWasMade, Around(Broken::SyncedHeadWrong), 1),
    (Check::MachineIsAtStore, Around(Broken::AppendSkipped), 1),
    (Check::SizeIsRight, Around(Broken::GrowthUnsaid), 1),
    (Check::BlocksAreRight, Around(Broken::WriteMisplaced), 1),
    (Check::PinnedIsRight, Around(Broken::ViewNotPinned), 1),
    (Check::CopyVerifies, Around(Broken::SilentRot), 30),
    (Check::ScrubFinds, Around(Broken::ScrubForgets), 1),
    (Check::SoundIsWhole, Around(Broken::SilentRot), sim::SCRUBBED_FROM),
    (Check::ScrubWorks, Around(Broken::SilentFaults), sim::SCRUBBED_FROM),
    (Check::TailIsKept, Around(Broken::ForkNotKept), 9),
    (Check::ForkEndsAtTail, Around(Broken::ForkCutShort), 9),
    (Check::ForkBeginsInCopy, Around(Broken::ForkMisplaced), 17),
    (Check::ForkIsListed, Around(Broken::ForkDropped), 2),
    (Check::ForkSurvives, Around(Broken::ForkDropped), 1),
    (Check::ForkIsWhole, Around(Broken::ForkRunsDry), 1),
    (Check::ForkIsPure, Around(Broken::ForkReadFromLog), 9),
    (Check::StoreOpens, Around(Broken::SilentRot), 8),
    (Check::StoreWorks, Around(Broken::SilentFaults), 1),
    (Check::StoreWorks, Around(Broken::SilentlyFull), 1),
    (Check::StoreWorks, Around(Broken::SilentRot), 1),
    (Check::BackgroundWorks, Around(Broken::SilentFaults), 10),
    (Check::ImageIsUndamaged, Around(Broken::SilentRot), 60),
    (Check::PromisesAreReadable, Around(Broken::HalfAPromise), 4),
    (Check::PromisesSurvive, Around(Broken::PromiseForgotten), 4),
    (Check::CopySurvives, Around(Broken::CopyForgotten), 1),
    (Check::DurableSurvives, Around(Broken::SyncForgotten), 4),
    (Check::RestartIsDurable, Around(Broken::RecoveryUnsynced), 4),
    (Check::AckIsDurable, Around(Broken::SyncedTooEarly), 1),
    (Check::AckKeepsPromise, Of(Weakness::AckBelowPromise), 121),
    (Check::VoteIsDurable, Around(Broken::SyncedTooEarly), 52),
    (Check::VoteIsFinal, Around(Broken::VoteChanged), 45),
    (Check::VoteIsOnDisk, Of(Weakness::PromiseNotDurable), 6),
    (Check::VoteIsAskedFor, Around(Broken::VoteForAnother), 2),
    (Check::VoteKeepsPromise, Of(Weakness::LowerBallotAccepted), 47),
    (Check::MessagesDecode, Around(Broken::MessageCutShort), 1),
    (Check::SealVouches, Around(Broken::SealOnAnother), 1),
    (Check::CopiedIsVouchedFor, Around(Broken::BlocksSkipped), 1),
    (Check::FlushIsHeld, Around(Broken::FlushOutlivesOwner), 9),
    (Check::FlushHasCopies, Of(Weakness::QuorumOfHalf), 10),
    (Check::FlushIsNotOutlived, Around(Broken::FlushErrorSwallowed), 925),
    (Check::OwnerHasFlushes, Of(Weakness::HeadsByLength), 59),
    (Check::OwnerIsAlone, Of(Weakness::OwnerNeverFreezes), 77),
    (Check::NothingIsMissing, Around(Broken::SaysNothing), 91),
    (Check::EndIsRight, Around(Broken::SaysEarlierEnd), 110),
    (Check::LaterDidExist, Around(Broken::SaysLater), 110),
    (Check::ContactEndIsRight, Around(Broken::SaysEarlierEnd), 24),
    (Check::ContactDidHappen, Around(Broken::SaysContact), 24),
    (Check::QuorumKnows, Around(Broken::SaysUnknown), 2),
    (Check::Converges, Around(Broken::JoinsUnsaid), 1),
    (Check::NoPanic, Of(Weakness::QuorumOfHalf), 5),
];

#[test]
fn every_check_fires_when_its_rule_is_broken() {
    let next = AtomicUsize::new(0);
    let silent = Mutex::new(Vec::new());
    let work = || {
        while let Some((check, rule, first)) = ROWS.get(next.fetch_add(1, Ordering::Relaxed)) {
            match rule.find(*check, *first, SEEDS) {
                Some((seed, what)) => {
                    let what = what.lines().next().unwrap_or_default();
                    println!("{check:?}, {} broken, seed {seed}: {what}", rule.name());
                    // It is the broken rule that it finds.
                    if let Err(failure) = sim::run(seed, TICKS) {
                        silent.lock().unwrap().push(format!("{check:?} without anything broken: {failure}"));
                    }
                }
                None => {
                    let tried = format!("seeds {first} to {}", first + SEEDS - 1);
                    silent.lock().unwrap().push(format!("{check:?}, {} broken, {tried}", rule.name()));
                }
            }
        }
    };
    std::thread::scope(|s| (0..THREADS).for_each(|_| drop(s.spawn(work))));
    let silent = silent.into_inner().unwrap();
    assert!(silent.is_empty(), "these do not fire:\n{}", silent.join("\n"));
}

#[test]
fn every_check_and_everything_broken_has_a_row() {
    let shown: BTreeSet<Check> = ROWS.iter().map(|(check, ..)| *check).collect();
    let missing: Vec<_> = Check::ALL.iter().filter(|c| !shown.contains(c)).collect();
    assert!(missing.is_empty(), "nothing shows that these can fire: {missing:?}");
    let used: BTreeSet<Rule> = ROWS.iter().map(|(_, rule, _)| *rule).collect();
    let idle: Vec<_> = Broken::ALL.iter().filter(|b| !used.contains(&Around(**b))).collect();
    assert!(idle.is_empty(), "these are broken for nothing: {idle:?}");
}

#[test]
fn every_row_is_in_the_table_of_the_docs() {
    let doc = std::fs::read_to_string(mutants::root().join("docs/testing.md")).unwrap();
    for (check, rule, _) in ROWS {
        let (check, rule) = (format!("| `{check:?}` |"), format!("`{}`", rule.name()));
        let found = doc.lines().any(|l| l.starts_with(&check) && l.contains(&rule));
        assert!(found, "docs/testing.md has no row for {check} and {rule}");
    }
}

/// Prints the first seed of each row: for new rows, and after a change of the schedule. `VMFS_SEED` is the first one
/// tried, `VMFS_SEEDS` how many are, `VMFS_CHECK` the part of a name.
#[test]
#[ignore = "a search, for whoever changes the table"]
fn seeds_are_found() {
    let number = |name: &str, or: u64| std::env::var(name).map_or(or, |n| n.parse().unwrap());
    let part = std::env::var("VMFS_CHECK").unwrap_or_default();
    for (check, rule, _) in ROWS.iter().filter(|(c, ..)| format!("{c:?}").contains(&part)) {
        let found = rule.find(*check, number("VMFS_SEED", 1), number("VMFS_SEEDS", SEEDS));
        println!("{check:?}, {} broken: {:?}", rule.name(), found);
    }
}
