//! Starts real clusters, guests and tools, waits for conditions, and cleans up whatever happens.
//!
//! Everything here panics with one clear message when something outside the system under test is not as
//! it must be (no `/dev/fuse`, no QEMU): a test that cannot run has failed, it is never skipped.

pub mod bytes;
pub mod cluster;
pub mod command;
pub mod guest;
pub mod lab;
pub mod lan;
pub mod model;
pub mod network;
pub mod place;
pub mod power;
pub mod qmp;
pub mod reaper;
pub mod seed;
pub mod status;
pub mod wait;

pub use cluster::Cluster;
pub use command::{Ran, bash, run, try_run};
pub use guest::{Guest, GuestSpec, Journal};
pub use place::Place;
pub use power::PoweredCluster;
pub use wait::{until, until_true};
