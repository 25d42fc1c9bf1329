//! The log-structured image store: segments, block map, checkpoints, recovery. Sync, no network,
//! no clock, no randomness.
//!
//! A [`Store`] is one directory (a [`disk::Disk`]) of one host; it holds an [`ImageStore`] per
//! image: a log of updates in segments, and a block map that is a cache of the log. Bytes are
//! specified in `docs/disk-format.md`.

mod append;
mod checkpoint;
mod checkpointing;
mod compact;
mod config;
pub mod disk;
mod error;
mod files;
mod fork;
#[doc(hidden)]
pub mod fuzzing;
mod gather;
mod held;
mod identity;
mod image;
mod import;
mod log;
mod map;
mod merkle;
mod meta;
mod page;
mod pool;
mod rebuild;
mod records;
mod recover;
mod rot;
mod scrub;
mod segment;
mod shadow;
mod shared;
pub mod simdisk;
mod store;
mod verify;
mod view;
mod way;
mod writer;

pub use compact::SpaceUse;
pub use config::StoreConfig;
pub use error::StoreError;
pub use fork::ForkInfo;
pub use image::{ImageStore, LogEntry, Reservation, Space};
pub use import::Import;
pub use merkle::{MERKLE_FANOUT, MERKLE_LEAF_BLOCKS, MERKLE_ROOT_LEVEL, MerkleTree};
pub use rot::Rot;
pub use scrub::{BadPayload, Scrub, ScrubProgress};
pub use store::Store;
pub use verify::VerifyReport;
pub use view::View;
