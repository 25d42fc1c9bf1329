//! Tests of the whole product, with real processes, mounts, guests and tools.
//!
//! What lives here: [`harness`], which starts clusters, guests and foreign tools and cleans up after them.
//! The promises themselves are in `tests/`, one file per promise. What does not live here: tests of one
//! crate (they are beside their code) and anything that ships.

pub mod harness;
pub mod mutants;
pub mod power;
pub mod sim;
