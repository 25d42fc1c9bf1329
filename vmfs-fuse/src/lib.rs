//! The mount of a hypervisor host.
//!
//! - [`backend`]: the trait through which the mount talks to the engine
pub mod backend;
