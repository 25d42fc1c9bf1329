//! The log-structured image store: segments, block map, checkpoints, recovery. Sync, no network.

pub mod disk;
