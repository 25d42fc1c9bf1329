//! The control API: what an operator may ask of a daemon, as HTTP/JSON on a Unix socket.
//!
//! * [`types`]: the JSON documents, a contract with scripts (`docs/api.md`).
//! * [`Control`]: what a daemon implements to be controlled; it knows nothing of HTTP.
//! * [`server`]: the socket and the routes.
//!
//! The client is in `vmfs-cli`: the daemons never talk to each other this way.

pub mod error;
pub mod metrics;
pub mod progress;
pub mod server;
pub mod types;

use std::future::Future;
use std::pin::Pin;

pub use error::{ApiError, ErrorCode};
pub use metrics::MetricsServer;
pub use progress::{Progress, ProgressEvent, StreamLine, Unit};
pub use server::{ControlServer, ServerError};
pub use types::{
    AbandonReport, AbandonRequest, Damage, FailReport, ForkDropRequest, ForkExportReport, ForkExportRequest,
    ForkInfo, ForkList, HandoverReport, HandoverRequest, HostInfo, HostList, HostRemoveRequest, ImageInfo,
    ImageRequest, ImageRole, ImageState, ImageStatus, InviteReport, InviteRequest, Loss, MemberName,
    MemberState, MemberStatus, PeerStatus, PolicyReport, PolicySetRequest, PromoteReport, PromoteRequest,
    ReplicaAddRequest, ReplicaRemoveRequest, ReplicaReport, ScrubReport, ScrubRequest, ScrubStatus,
    ScrubbedImage, StatusReport, Unopened, VerifyCopy, VerifyReport, VerifyRequest, WaitReport, WaitRequest,
};

/// What [`Control`] answers with: a future that may borrow the daemon.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, ApiError>> + Send + 'a>>;

/// What a daemon can be asked to do. Implementations box an `async` block per method:
///
/// ```
/// use vmfs_replica::api::{Answer, StatusReport};
/// fn status(report: StatusReport) -> Answer<'static, StatusReport> {
///     Box::pin(async move { Ok(report) })
/// }
/// ```
///
/// Images are named by their path inside the mount, without a leading slash, already checked for
/// emptiness and `..` by the server. Every method answers with [`ErrorCode::NotFound`] for an image,
/// host or fork that this daemon does not know, and [`ErrorCode::NoQuorum`] when a refusal would be
/// lifted by more members being reachable.
///
/// A client that goes away drops the future of a long question ([`Control::verify`],
/// [`Control::wait`]); what changes ownership or members runs to its end.
pub trait Control: Send + Sync + 'static {
    /// Everything about this host at a glance. Never waits for a disk or a peer.
    fn status(&self) -> Answer<'_, StatusReport>;
    /// One image: its status, its policy and its forks. Never waits for a disk or a peer.
    fn info(&self, image: String) -> Answer<'_, ImageInfo>;
    /// Makes this host the owner by an election; with `force` without one, in a separate lineage.
    fn promote(&self, request: PromoteRequest, progress: Progress) -> Answer<'_, PromoteReport>;
    /// Moves ownership from this host to another; returns when the other one is the owner.
    fn handover(&self, request: HandoverRequest, progress: Progress) -> Answer<'_, HandoverReport>;
    /// Adds a member; returns when the membership change is committed and, for a replica, its copy is
    /// complete.
    fn replica_add(&self, request: ReplicaAddRequest, progress: Progress) -> Answer<'_, ReplicaReport>;
    /// Removes a member; returns when the change is committed.
    fn replica_remove(&self, request: ReplicaRemoveRequest, progress: Progress) -> Answer<'_, ReplicaReport>;
    /// Compares the copies of an image by digest; `deep` also reads and hashes every local block.
    fn verify(&self, request: VerifyRequest, progress: Progress) -> Answer<'_, VerifyReport>;
    /// Scrubs one image, or all, from the beginning; returns when that is done. A client that goes away
    /// only stops watching.
    fn scrub(&self, request: ScrubRequest, progress: Progress) -> Answer<'_, ScrubReport>;
    /// The forks of one image, or of all.
    fn forks(&self, image: Option<String>) -> Answer<'_, ForkList>;
    /// Deletes a fork for good.
    fn fork_drop(&self, request: ForkDropRequest) -> Answer<'_, ForkInfo>;
    /// Writes what a fork has changed to a file of this host; returns when that is durable.
    fn fork_export(&self, request: ForkExportRequest, progress: Progress) -> Answer<'_, ForkExportReport>;
    /// The rules of an image that are in force now.
    fn policy(&self, image: String) -> Answer<'_, PolicyReport>;
    /// Changes rules of an image this host owns; returns when the change is in force.
    fn policy_set(&self, request: PolicySetRequest) -> Answer<'_, PolicyReport>;
    /// Fails every waiting request on an image with EIO, so that nothing hangs on it.
    fn fail(&self, request: ImageRequest) -> Answer<'_, FailReport>;
    /// Gives up the separate lineage of an image that a forced promotion began here, or with `discard` this
    /// host's copy: how an operator chooses between two lineages.
    fn abandon(&self, request: AbandonRequest) -> Answer<'_, AbandonReport>;
    /// Waits until the image is known here and, with `in_sync`, until every member holds durably
    /// everything that the owner had when the wait began. The server ends it at the time-out of the request.
    fn wait(&self, request: WaitRequest, progress: Progress) -> Answer<'_, WaitReport>;
    /// The hosts of the datastore that this host knows.
    fn hosts(&self) -> Answer<'_, HostList>;
    /// Makes a short-lived single-use invitation. Only on the host that holds the CA's key.
    fn host_invite(&self, request: InviteRequest) -> Answer<'_, InviteReport>;
    /// Strikes a host off the datastore. Refused while it is a member of an image this host owns.
    fn host_remove(&self, request: HostRemoveRequest) -> Answer<'_, HostList>;
    /// Prometheus text exposition.
    fn metrics(&self) -> Answer<'_, String>;
}
