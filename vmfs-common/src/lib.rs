//! What every part of VMFS shares: identifiers and units ([`ids`]), the update chain ([`chain`]).
//! Pure: no I/O, no async, no clock, no randomness of its own.

pub mod identity;
pub mod ids;

pub use ids::{
    BLOCK_BYTES, BLOCK_BYTES_U64, BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, HostId, ImageId,
    Millis, Seq, StoreId,
};
