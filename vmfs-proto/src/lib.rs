//! The protocol of one image on one host, as a deterministic state machine without I/O: inputs and
//! time go in, outputs and deadlines come out. The same [`Machine`] is replica, witness, candidate
//! and owner; the engine in `vmfs-replica` and the simulator drive it. `docs/protocol.md` describes
//! what it does on the wire; DESIGN.md section 7 the rules it keeps.
//!
//! - [`api`]: what goes in and out, and the contract with whoever drives it
//! - [`machine`]: construction, dispatch, timers
//! - `copy`, `voter`, `follower`: what every member does
//! - `candidate`, `adopt`: elections
//! - `owner`: appending, committing, streaming, members, hand-over
//! - `meta`: the durable record beside the chain; `shares`: the split secret; `lineage`: how far
//!   two copies agree; [`loss`]: what a promotion says
//! - [`ops`]: how requests end
//! - [`status`]: what it tells about itself
//!
//! Not here: clocks, threads, files, sockets, payload (the engine checks it against the digests),
//! and anything that involves two images.

mod adopt;
pub mod api;
mod candidate;
mod certify;
mod copy;
mod failed;
mod follower;
#[doc(hidden)]
pub mod fuzzing;
mod import;
mod lineage;
pub mod loss;
pub mod machine;
mod meta;
pub mod ops;
mod owner;
mod shares;
pub mod status;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod voter;

pub use api::{Contact, Env, Event, Gate, Identity, Input, Output, Refused, Take, Timing, Token, Wait};
pub use loss::Loss;
pub use machine::Machine;
pub use ops::{Answer, FlushError, OpError, OpOutcome};
pub use owner::flush::Shortage;
pub use status::{Health, MemberStatus, Role, Status};
