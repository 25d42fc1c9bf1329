//! The simulator: whole clusters of the real state machines (`vmfs_proto::Machine`) and the real store on
//! a faulty disk (`vmfs_store::simdisk`), over a faulty network, in virtual time, on one thread. The same
//! seed is the same run.
//!
//! A run is faults first, under oracles that know nothing of the code under test ([`oracle`], [`model`]);
//! then everything is healed, and the cluster has to converge ([`converge`]).
//!
//! - [`world`]: clock, events, hosts going up and down
//! - [`drive`]: carrying out a machine's outputs, as the engine of `vmfs-replica` does
//! - [`link`], [`line`]: the network; what one host has to say to another
//! - [`blocksync`]: block-level sync, in steps
//! - [`rot`], [`liar`]: a disk, and a host, that cannot be trusted
//! - [`check`]: the checks by name; [`broken`]: rules broken on purpose, to show that the checks notice
//! - [`tenure`]: what must hold of flushes, owners and promotions
//! - [`schedule`]: what guests, operators and fate do
//!
//! Not here: sockets, threads, the mount, and a second image (images share nothing but the meta journal).

mod blocksync;
mod broken;
mod check;
mod converge;
mod drive;
mod faults;
mod host;
mod liar;
mod line;
mod link;
mod model;
mod network;
mod oracle;
mod rng;
mod rot;
#[cfg(test)]
mod scenarios;
mod schedule;
mod tenure;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::World;

pub use broken::Broken;
pub use check::Check;
pub use world::{FORESEEN_FROM, SCRUBBED_FROM};

/// Index of a host in its cluster.
type At = usize;

/// What a run has seen, to show that it tests something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Updates made by all owners.
    pub updates: u64,
    /// Flushes acknowledged to guests.
    pub flushes: u64,
    /// Epochs that were served.
    pub epochs: u64,
    /// Power cuts, kills and wipes.
    pub crashes: u64,
    /// Roll-backs that kept a fork.
    pub forks: u64,
    /// Block-level syncs completed.
    pub imports: u64,
    /// Promotions, hand-overs and changes of members and policy that succeeded.
    pub operations: u64,
    /// Loss statements checked.
    pub statements: u64,
    /// Bits that flipped at rest.
    pub rotten: u64,
    /// Blocks repaired from another copy.
    pub repaired: u64,
    /// Lies told.
    pub lies: u64,
    /// Runs that ended in histories that cannot be brought together, by a lie or a bad disk, and said so.
    pub evident: u64,
    /// Scrubs that ran to their end beside everything else.
    pub scrubbed: u64,
    /// Bytes that compaction moved.
    pub compacted: u64,
    /// Blocks read and compared.
    pub blocks_checked: u64,
    /// Milliseconds of virtual time.
    pub virtual_ms: u64,
    /// Hash over everything that happened, in order.
    pub fingerprint: u64,
}

impl Tally {
    /// Adds another run's numbers; fingerprints are combined.
    pub const fn add(&mut self, other: &Self) {
        self.updates += other.updates;
        self.flushes += other.flushes;
        self.epochs += other.epochs;
        self.crashes += other.crashes;
        self.forks += other.forks;
        self.imports += other.imports;
        self.operations += other.operations;
        self.statements += other.statements;
        self.rotten += other.rotten;
        self.repaired += other.repaired;
        self.lies += other.lies;
        self.evident += other.evident;
        self.scrubbed += other.scrubbed;
        self.compacted += other.compacted;
        self.blocks_checked += other.blocks_checked;
        self.virtual_ms += other.virtual_ms;
        self.fingerprint ^= other.fingerprint;
    }
}

/// A promise was broken, or the cluster did not converge.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Replays the run.
    pub seed: u64,
    /// Replays the run.
    pub ticks: u64,
    /// Which check failed.
    pub check: Check,
    /// What was found.
    pub what: String,
    /// The last events before it.
    pub trace: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {} fails {:?}: {}", self.seed, self.check, self.what)?;
        for line in &self.trace {
            writeln!(f, "    {line}")?;
        }
        write!(
            f,
            "  replay: cargo run --release -p integration --bin sim -- --seed {} --ticks {} --runs 1",
            self.seed, self.ticks
        )
    }
}

/// Lines of trace kept.
const TRACE_LINES: usize = 120;

/// One run: `ticks` random actions, then convergence.
///
/// # Errors
/// The first promise found broken, with the trace of the events before it.
pub fn run(seed: u64, ticks: u64) -> Result<Tally, Box<Failure>> {
    attempt(seed, ticks, None, false).map_err(|((check, what), _)| explain(seed, ticks, check, &what))
}

/// As [`run`], with something broken on purpose: its check and words, if one fails.
///
/// # Errors
/// The first check that fails.
pub fn run_broken(seed: u64, ticks: u64, broken: Option<Broken>) -> Result<Tally, (Check, String)> {
    attempt(seed, ticks, broken, false).map_err(|(violation, _)| violation)
}

fn explain(seed: u64, ticks: u64, check: Check, what: &str) -> Box<Failure> {
    let (again, trace) = match attempt(seed, ticks, None, true) {
        Err(((_, again), trace)) => (again, trace),
        Ok(_) => ("nothing".to_owned(), Vec::new()),
    };
    let what = if again == what { again } else { format!("{what}\n  and again, differently: {again}") };
    Box::new(Failure { seed, ticks, check, what, trace })
}

/// A check that failed, and the events before it.
type Found = ((Check, String), Vec<String>);

fn attempt(seed: u64, ticks: u64, broken: Option<Broken>, trace: bool) -> Result<Tally, Found> {
    let mut world = World::new(seed, trace);
    world.broken = broken;
    let panicked = catch_unwind(AssertUnwindSafe(|| schedule::run(&mut world, ticks)));
    // What a check has found may be why something panics after it.
    let what = match (world.violation.take(), panicked) {
        (Some(found), _) => Some(found),
        (None, Ok(())) => None,
        (None, Err(cause)) => {
            let text = cause.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| cause.downcast_ref::<&str>().copied());
            Some((Check::NoPanic, format!("panic: {}", text.unwrap_or("without a message"))))
        }
    };
    match what {
        None => Ok(world.tally()),
        Some(what) => Err((what, world.take_trace(TRACE_LINES))),
    }
}
