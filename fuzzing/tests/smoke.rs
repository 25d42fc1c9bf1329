//! Every fuzz target over its committed corpus, and over mutations of it from a seed: what is run in CI.
//! `FUZZ_SEED` repeats a run, `FUZZ_RUNS` multiplies its length.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

use std::path::Path;

use fuzzing::alloc::Counting;
use fuzzing::mutate::Mutator;
use fuzzing::{Target, by_name, check};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target.name);
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.iter().map(|f| std::fs::read(f).unwrap()).collect()
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap())
}

fn smoke(name: &str) {
    let target = by_name(name);
    // What is made once and kept is no part of any input's memory.
    (target.run)(&[]);
    let corpus = corpus(target);
    let taken = corpus.iter().filter(|c| check(target, c)).count();
    assert!(taken * 2 > corpus.len(), "{name}: {taken} of {} seeds are taken", corpus.len());
    let seed = number("FUZZ_SEED", rand_seed());
    println!("FUZZ_SEED={seed}");
    let runs = u64::from(target.smoke_runs) * number("FUZZ_RUNS", 1);
    let mut mutator = Mutator::new(seed, &corpus);
    for run in 0..runs {
        let input = mutator.next_input();
        let checked = std::panic::catch_unwind(|| check(target, &input));
        if checked.is_err() {
            let file = std::env::temp_dir().join(format!("fuzz-{name}-{seed}-{run}"));
            std::fs::write(&file, &input).unwrap();
            panic!("{name}: run {run} of FUZZ_SEED={seed} failed; the input is in {}", file.display());
        }
    }
}

/// Another one for every run of the tests: more is seen with time, and what is found has a number.
fn rand_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos() % u128::from(u64::MAX)).unwrap()
}

macro_rules! smoke {
    ($($name:ident)*) => {
        $(#[test] fn $name() { smoke(stringify!($name)); })*
        #[test]
        fn no_target_is_forgotten() {
            let here = [$(stringify!($name)),*];
            assert_eq!(here.to_vec(), fuzzing::TARGETS.map(|t| t.name).to_vec());
            for t in fuzzing::TARGETS {
                let binary = format!("{}/../fuzz/fuzz_targets/{}.rs", env!("CARGO_MANIFEST_DIR"), t.name);
                assert!(Path::new(&binary).exists(), "{binary}");
            }
        }
    };
}

smoke! {
    frames hello enrolment control_messages questions updates certificates image_state machine meta_record
    segment_pages checkpoint map_file meta_journal store_identity whole_store catalog texts api_requests
}
