//! The mount of a hypervisor host.
//!
//! - [`backend`]: the trait through which the mount talks to the engine
//! - [`catalog`]: names, directories and symlinks, durable
pub mod backend;
pub mod catalog;

#[cfg(test)]
#[path = "../tests/support/disk.rs"]
mod testdisk;
