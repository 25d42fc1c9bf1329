//! Hosts finding, trusting and talking to each other.
//!
//! - [`pki`]: the datastore's CA, host identities, invitations. Files, no network.
//! - [`directory`]: who exists, as signed entries that hosts pass on.
//! - [`Network`]: one UDP socket, one QUIC connection per pair of hosts, streams of frames per
//!   image ([`StreamSender`], [`FrameReader`]), requests, beats.
//! - [`join`]: the new host's side of enrolment.
//! - [`frame`], [`hello`]: the bytes.
//!
//! What the bodies of control and update frames mean is no business of this crate.

mod config;
pub mod directory;
mod enrol;
pub mod error;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
pub mod hello;
mod hub;
mod network;
pub mod pki;
mod runtime;
mod session;
pub mod spot;
mod stream;
mod tls;
mod transport;
mod window;

pub use config::{Answer, Congestion, Handlers, NetConfig, NetEvent, RequestHandler, StreamHandler, Tuning};
pub use directory::{Directory, HostEntry, HostRole};
pub use enrol::join;
pub use error::{NetError, Refusal};
pub use frame::Frame;
pub use network::{ConnectionStatus, Counters, Network, PeerStatus};
pub use pki::{HostIdentity, PkiError};
pub use stream::{FrameReader, StreamSender};
