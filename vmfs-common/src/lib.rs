//! What every part of VMFS shares. Pure: no I/O, no async, no clock, no randomness of its own.
//!
//! - [`ids`]: identifiers and units; [`identity`]: host keys and signatures
//! - [`codec`], [`hash`]: canonical bytes, and SHA-256/HMAC with domain separation
//! - [`header`], [`op`]: the update and what it does; [`chain`]: extending and checking it
//! - [`policy`], [`election`]: members, votes, certificates
//! - [`state`]: everything about an image that is not blocks, as its updates make it
//! - [`config`]: the configuration of a host
//! - [`msg`]: control messages between hosts (the only user of bincode)

pub mod chain;
pub mod codec;
pub mod config;
pub mod election;
pub mod hash;
pub mod header;
pub mod identity;
pub mod ids;
pub mod msg;
pub mod op;
pub mod policy;
pub mod state;
#[cfg(feature = "testing")]
pub mod weaken;

pub use ids::{
    BLOCK_BYTES, BLOCK_BYTES_U64, BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, HostId, ImageId,
    Millis, Seq, StoreId,
};
