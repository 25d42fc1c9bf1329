//! Everything but the status: what is asked, and what is answered.

use std::fmt;

use serde::{Deserialize, Serialize};
use vmfs_common::policy::{Acks, OnQuorumLoss};
use vmfs_common::{HostId, ImageId};

use super::status::{ImageRole, ImageStatus};

/// Names an image and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRequest {
    /// Path inside the mount.
    pub image: String,
}

/// `GET /v1/image?image=PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// As in the status.
    #[serde(flatten)]
    pub status: ImageStatus,
    /// The rules in force.
    pub policy: PolicyReport,
    /// Forks kept on this host.
    pub fork_list: Vec<ForkInfo>,
    /// Digest of this host's head, in hexadecimal.
    pub head_digest: String,
    /// Oldest update whose data is still in this host's log.
    pub log_start_seq: u64,
    /// Time of the last update, milliseconds since 1970.
    pub last_update_ms: u64,
}

/// `POST /v1/promote`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromoteRequest {
    /// Path inside the mount.
    pub image: String,
    /// Go on without a quorum, in a separate lineage: the operator's explicit word.
    #[serde(default)]
    pub force: bool,
    /// With `force`: names of the members of that lineage besides this host.
    #[serde(default)]
    pub members: Vec<String>,
}

/// What is known about acknowledged writes after a promotion. Never claims more than can be known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Loss {
    /// Nothing acknowledged is missing.
    Nothing,
    /// The copy ends at an update after which others are known to have been acknowledged.
    EndsAt {
        /// The last update that is there.
        seq: u64,
        /// When it was made, milliseconds since 1970.
        time_ms: u64,
        /// How many acknowledged updates after it are known of, when that can be counted.
        later_updates: Option<u64>,
    },
    /// The old owner could acknowledge alone: nobody here knows what it did since.
    UnknownAfter {
        /// The last update that is there.
        seq: u64,
        /// Last contact with the old owner, milliseconds since 1970.
        time_ms: u64,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing acknowledged is missing"),
            Self::EndsAt { seq, time_ms, later_updates } => {
                write!(f, "ends at update {seq} of {}; ", utc_clock(*time_ms))?;
                match later_updates {
                    Some(1) => f.write_str("1 later update had been acknowledged"),
                    Some(n) => write!(f, "{n} later updates had been acknowledged"),
                    None => f.write_str("later updates had been acknowledged"),
                }
            }
            Self::UnknownAfter { seq, time_ms } => {
                write!(f, "ends at update {seq}; unknown after the last contact at {}", utc_clock(*time_ms))
            }
        }
    }
}

/// `12:03:07 UTC` of a time in milliseconds since 1970.
fn utc_clock(time_ms: u64) -> String {
    let s = time_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02} UTC", s / 3600, s / 60 % 60, s % 60)
}

/// Result of a promotion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromoteReport {
    /// Path inside the mount.
    pub image: String,
    /// The image.
    pub id: ImageId,
    /// The epoch that began.
    pub epoch: u64,
    /// The update that began it.
    pub seq: u64,
    /// What may be missing.
    pub loss: Loss,
    /// True when a separate lineage was begun.
    pub forced: bool,
    /// What the image lacks or waits for now, if anything.
    pub warning: Option<String>,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// `POST /v1/handover`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverRequest {
    /// Path inside the mount.
    pub image: String,
    /// Name of the host that becomes the owner.
    pub to: String,
}

/// Result of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverReport {
    /// Path inside the mount.
    pub image: String,
    /// The image.
    pub id: ImageId,
    /// Name of the new owner.
    pub owner: String,
    /// The epoch that began.
    pub epoch: u64,
    /// For how long neither host could write.
    pub pause_ms: u64,
}

/// `POST /v1/replica/add`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaAddRequest {
    /// Path inside the mount.
    pub image: String,
    /// Name of the host.
    pub host: String,
    /// Headers only.
    #[serde(default)]
    pub witness: bool,
}

/// `POST /v1/replica/remove`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaRemoveRequest {
    /// Path inside the mount.
    pub image: String,
    /// Name of the host.
    pub host: String,
}

/// Result of a change of members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Path inside the mount.
    pub image: String,
    /// The update that made the change.
    pub seq: u64,
    /// The members now in force.
    pub members: Vec<MemberName>,
}

/// A member, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberName {
    /// Name of the host.
    pub host: String,
    /// What it is for the image.
    pub role: ImageRole,
}

/// `POST /v1/verify`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Path inside the mount.
    pub image: String,
    /// Also read and hash every block of the local copy.
    #[serde(default)]
    pub deep: bool,
}

/// `POST /v1/scrub`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// Path inside the mount; absent: every image on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Bytes a second to read at most; absent: as configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes: Option<u64>,
}

/// What a scrub found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// True when every image was read and nothing damaged is left.
    pub ok: bool,
    /// Bytes read.
    pub bytes_read: u64,
    /// How long it took.
    pub elapsed_ms: u64,
    /// Each image.
    pub images: Vec<ScrubbedImage>,
}

/// One image of a [`ScrubReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubbedImage {
    /// Path inside the mount.
    pub image: String,
    /// Bytes read.
    pub bytes_read: u64,
    /// Damaged places that this scrub found.
    pub found: u64,
    /// How many were repaired meanwhile.
    pub repaired: u64,
    /// What is still damaged, at most 20.
    pub open: Vec<String>,
    /// Why it was given up.
    pub error: Option<String>,
}

/// Result of a verification. `ok` is the answer; the rest says why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Path inside the mount.
    pub image: String,
    /// True when the chain holds and every copy that could be asked agrees.
    pub ok: bool,
    /// Updates of the chain that were checked here.
    pub updates: u64,
    /// Ended epochs whose secret was published, audited in full.
    pub epochs_audited: u64,
    /// Bytes read and hashed here (0 unless `deep`).
    pub bytes_read: u64,
    /// Blocks here that do not match their digest.
    pub bad_blocks: u64,
    /// Each copy, this host's first.
    pub copies: Vec<VerifyCopy>,
    /// What is wrong, one line each, at most 100.
    pub problems: Vec<String>,
}

/// One copy, as a verification found it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyCopy {
    /// Name of the host.
    pub host: String,
    /// The update up to which it was compared; absent when it was not reached.
    pub seq: Option<u64>,
    /// Whether it agrees; absent when it was not reached or holds headers only.
    pub same: Option<bool>,
    /// What stood in the way of an answer.
    pub note: Option<String>,
}

/// A divergent tail that was kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkInfo {
    /// Its name, unique on this host: what `vmfs fork export` and `drop` take.
    pub fork: String,
    /// Path of its image.
    pub image: String,
    /// The image.
    pub image_id: ImageId,
    /// Epoch of its last update.
    pub epoch: u64,
    /// Its first update.
    pub first_seq: u64,
    /// Its last update.
    pub last_seq: u64,
    /// Bytes of payload.
    pub bytes: u64,
    /// When it was cut off the image, milliseconds since 1970.
    pub created_ms: u64,
    /// Why it exists ("deposed by epoch 7 of b").
    pub reason: String,
}

/// `GET /v1/forks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkList {
    /// Ordered by image, then by first update.
    pub forks: Vec<ForkInfo>,
}

/// `POST /v1/fork/drop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkDropRequest {
    /// As in [`ForkInfo::fork`].
    pub fork: String,
}

/// `POST /v1/fork/export`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkExportRequest {
    /// As in [`ForkInfo::fork`].
    pub fork: String,
    /// Absolute path of a file on this host. It is made, sparse and of the image's size, and must not exist.
    pub file: String,
    /// The file exists, and holds the image as it was before the fork: it is changed in place.
    #[serde(default)]
    pub onto: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkExportReport {
    /// As in [`ForkInfo::fork`].
    pub fork: String,
    /// Path of its image.
    pub image: String,
    /// As asked.
    pub file: String,
    /// Updates of the fork, all of which were applied.
    pub updates: u64,
    /// Bytes of data written, counted each time.
    pub written_bytes: u64,
    /// Bytes set to zeros (holes), counted each time.
    pub zeroed_bytes: u64,
    /// Size of the file, bytes.
    pub size_bytes: u64,
}

/// The rules of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// Path inside the mount.
    pub image: String,
    /// What a flush waits for.
    pub acks: Acks,
    /// What a flush does without a quorum.
    pub on_quorum_loss: OnQuorumLoss,
    /// The members.
    pub members: Vec<MemberName>,
    /// Members that make a majority.
    pub quorum: u64,
    /// Data copies a flush waits for.
    pub data_copies: u64,
}

/// `POST /v1/policy`: what is absent stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySetRequest {
    /// Path inside the mount.
    pub image: String,
    /// What a flush waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acks: Option<Acks>,
    /// What a flush does without a quorum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_quorum_loss: Option<OnQuorumLoss>,
}

/// Result of `POST /v1/fail`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailReport {
    /// Path inside the mount.
    pub image: String,
    /// Requests that were waiting and got EIO.
    pub failed_requests: u64,
}

/// `POST /v1/abandon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbandonRequest {
    /// Path inside the mount.
    pub image: String,
    /// Drop the copy of this host altogether, whatever its lineage.
    #[serde(default)]
    pub discard: bool,
}

/// Result of `POST /v1/abandon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbandonReport {
    /// Path inside the mount.
    pub image: String,
    /// True when the whole copy was dropped; else this host follows the other lineage, and what it alone
    /// has is a fork.
    pub discarded: bool,
}

/// `POST /v1/wait`, streamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitRequest {
    /// Path inside the mount.
    pub image: String,
    /// Wait until every member holds everything.
    #[serde(default)]
    pub in_sync: bool,
    /// Give up after this long; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// Result of a wait that ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitReport {
    /// The image as it was when the condition held.
    pub status: ImageStatus,
    /// How long it took.
    pub waited_ms: u64,
}

/// A host of the datastore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub host: String,
    /// Its id.
    pub host_id: HostId,
    /// Where it is reached (`HOST:PORT`); absent while no address is known.
    pub address: Option<String>,
    /// True for the host that answers.
    pub this: bool,
    /// True while there is a connection to it.
    pub connected: bool,
}

/// `GET /v1/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostList {
    /// Ordered by name.
    pub hosts: Vec<HostInfo>,
}

/// `POST /v1/host/invite`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// Name the new host will have.
    pub name: String,
    /// How long the invitation is good for; absent: the daemon's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_ms: Option<u64>,
}

/// An invitation. Whoever holds the token can join once under that name: treat it as a password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteReport {
    /// Name the new host will have.
    pub name: String,
    /// What `vmfs host join` takes.
    pub token: String,
    /// When it ends, milliseconds since 1970.
    pub expires_ms: u64,
}

impl fmt::Debug for InviteReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InviteReport").field("name", &self.name).finish_non_exhaustive()
    }
}

/// `POST /v1/host/remove`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRemoveRequest {
    /// Name of the host.
    pub name: String,
}
