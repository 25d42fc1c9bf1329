//! The protocol of one image on one host, as a deterministic state machine.
pub mod api;
pub mod loss;
pub mod machine;
pub mod status;

pub use api::{
    Answer, Contact, Env, Event, FlushError, Gate, Identity, Input, OpError, OpOutcome, Output, Refused, Take, Timing,
    Token, Wait,
};
pub use loss::Loss;
pub use machine::Machine;
pub use status::{Health, MemberStatus, Role, Status};
