//! What the fuzz targets do. One function per decoder of bytes that come from somewhere else (a peer, a
//! disk, a file, a command line): no panic, what is taken is in its canonical form where there is one,
//! and no more memory than the bound says. The same functions run in `fuzz/` (cargo-fuzz, for as long as
//! one likes) and in `tests/smoke.rs` (seeded mutations of the committed corpus, in every test run).

pub mod alloc;
mod decoders;
mod machine;
pub mod mutate;
mod samples;
mod whole_store;

/// One fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name: of the binary in `fuzz/fuzz_targets`, and of the directory in `fuzz/corpus`.
    pub name: &'static str,
    /// Decodes; true when something was taken.
    pub run: fn(&[u8]) -> bool,
    /// Real encodings to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Most bytes that one input of this length may have allocated at a time.
    pub alloc_max_bytes: fn(usize) -> usize,
    /// How many inputs the smoke run makes of the corpus.
    pub smoke_runs: u32,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// A fixed number of copies of the input, and a little.
const fn in_proportion(len: usize) -> usize {
    (256 << 10) + 16 * len
}
/// Control messages: a container may be made for as many elements as fit 1 MiB before they are read, one
/// within another.
const fn message(len: usize) -> usize {
    (4 << 20) + 16 * len
}
/// A whole store and its caches.
const fn store(_: usize) -> usize {
    64 << 20
}
/// A journal's group or a checkpoint's body, which states its length and is read when the file is as long.
const fn stated(len: usize) -> usize {
    (1 << 20) + 8 * len
}

const fn target(
    name: &'static str,
    run: fn(&[u8]) -> bool,
    seeds: fn() -> Vec<Vec<u8>>,
    alloc_max_bytes: fn(usize) -> usize,
    smoke_runs: u32,
) -> Target {
    Target { name, run, seeds, alloc_max_bytes, smoke_runs }
}

/// All of them.
pub const TARGETS: [Target; 19] = [
    target("frames", vmfs_net::fuzzing::frames, samples::frames, in_proportion, 20_000),
    target("hello", vmfs_net::fuzzing::hello, samples::hellos, in_proportion, 20_000),
    target("enrolment", vmfs_net::fuzzing::enrolment, samples::enrolment, in_proportion, 5_000),
    target("control_messages", decoders::control_messages, samples::messages, message, 20_000),
    target("questions", vmfs_replica::fuzzing::questions, samples::questions, message, 20_000),
    target("updates", decoders::updates, samples::updates, in_proportion, 20_000),
    target("certificates", decoders::certificates, samples::certificates, in_proportion, 500),
    target("image_state", decoders::image_state, samples::states, in_proportion, 10_000),
    target("machine", machine::machine, machine::seeds, message, 2_000),
    target("meta_record", vmfs_proto::fuzzing::meta_record, machine::meta_seeds, in_proportion, 10_000),
    target("segment_pages", vmfs_store::fuzzing::segment_pages, whole_store::segments, in_proportion, 2_000),
    target("checkpoint", vmfs_store::fuzzing::checkpoint, whole_store::bodies, in_proportion, 5_000),
    target("map_file", vmfs_store::fuzzing::map_file, whole_store::maps, stated, 1_000),
    target("meta_journal", vmfs_store::fuzzing::meta_journal, whole_store::journals, stated, 2_000),
    target(
        "store_identity",
        vmfs_store::fuzzing::store_identity,
        whole_store::identities,
        in_proportion,
        2_000,
    ),
    target("whole_store", whole_store::whole_store, whole_store::edits, store, 150),
    target(
        "catalog",
        vmfs_fuse::catalog::fuzzing::catalog,
        vmfs_fuse::catalog::fuzzing::catalog_seeds,
        in_proportion,
        5_000,
    ),
    target("texts", decoders::texts, samples::texts, in_proportion, 5_000),
    target("api_requests", decoders::api_requests, samples::api_requests, in_proportion, 10_000),
];

/// Runs one input under the target's bound on memory.
///
/// # Panics
/// As the target does; and when it allocated more than it may.
pub fn check(target: &Target, data: &[u8]) -> bool {
    let (taken, peak) = alloc::peak_of(|| (target.run)(data));
    let max = (target.alloc_max_bytes)(data.len());
    assert!(
        peak <= max,
        "{}: {} bytes of input had {peak} bytes allocated, {max} allowed",
        target.name,
        data.len()
    );
    taken
}

/// The target of this name.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn by_name(name: &str) -> &'static Target {
    TARGETS.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no target {name}"))
}

/// The body of a target of `fuzz/`.
#[macro_export]
macro_rules! libfuzzer_main {
    ($name:literal) => {
        #[global_allocator]
        static ALLOCATOR: $crate::alloc::Counting = $crate::alloc::Counting;

        libfuzzer_sys::fuzz_target!(|data: &[u8]| {
            static TARGET: std::sync::LazyLock<&'static $crate::Target> = std::sync::LazyLock::new(|| {
                let target = $crate::by_name($name);
                // What is made once and kept is no part of any input's memory.
                (target.run)(&[]);
                target
            });
            $crate::check(&TARGET, data);
        });
    };
}
