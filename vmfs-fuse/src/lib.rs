//! The mount of a hypervisor host.
//!
//! - [`backend`]: the trait through which the mount talks to the engine
//! - [`catalog`]: names, directories and symlinks, durable
//! - [`fs`]: what file operations mean; no FUSE type in it
//! - [`node_backend`]: that trait over the engine; [`daemon`]: the program
//! - [`mount`]: the kernel's side: attaching, serving, detaching
pub mod backend;
pub mod catalog;
pub mod daemon;
pub mod fs;
pub mod mount;
pub mod node_backend;

// The tests' supports are shared with the tests outside of the crate, which name it so.
#[cfg(test)]
extern crate self as vmfs_fuse;
#[cfg(test)]
#[path = "../tests/support/backend.rs"]
mod testbackend;
