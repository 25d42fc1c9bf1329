//! The replica role of a host: the engine that runs the machines over store and network, and what
//! controls it.
//!
//! - [`node`]: the engine; [`control`]: its answers to the control API
//! - [`api`]: that API: documents, server
//! - [`daemon`]: the program `vmfs-replica`; [`config_file`], [`pid_file`], [`sd_notify`]: what it shares
//!   with `vmfs-fuse`

pub mod api;
pub mod config_file;
pub mod control;
pub mod daemon;
#[doc(hidden)]
pub mod fuzzing;
pub mod node;
pub mod pid_file;
pub mod sd_notify;
