//! The JSON documents of the control API.
//!
//! Stable: fields are added, never renamed, retyped or removed, and readers ignore what they do not
//! know. Times are milliseconds since 1970 (UTC), sizes are bytes, hosts are named by their
//! configured name. `docs/api.md` shows each document.

mod requests;
mod status;

pub use requests::{
    AbandonReport, AbandonRequest, FailReport, ForkDropRequest, ForkExportReport, ForkExportRequest,
    ForkInfo, ForkList, HandoverReport, HandoverRequest, HostInfo, HostList, HostRemoveRequest, ImageInfo,
    ImageRequest, InviteReport, InviteRequest, Loss, MemberName, PolicyReport, PolicySetRequest,
    PromoteReport, PromoteRequest, ReplicaAddRequest, ReplicaRemoveRequest, ReplicaReport, ScrubReport,
    ScrubRequest, ScrubbedImage, VerifyCopy, VerifyReport, VerifyRequest, WaitReport, WaitRequest,
};
pub use status::{
    Damage, ImageRole, ImageState, ImageStatus, MemberState, MemberStatus, PeerStatus, ScrubStatus,
    StatusReport, Unopened,
};
