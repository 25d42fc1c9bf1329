//! `vmfs status --json` as the contract of the command line documents it.

use std::collections::BTreeMap;

use serde::Deserialize;

/// What one host says about itself and its images.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// The host's name.
    pub host: String,
    /// Where its datastore is mounted; none on hosts without a mount.
    pub mount: Option<String>,
    /// Every image it knows.
    pub images: Vec<ImageStatus>,
}

/// One image, as one host sees it.
#[derive(Debug, Clone, Deserialize)]
pub struct ImageStatus {
    /// Path inside the mount.
    pub path: String,
    /// The image's id, in hex.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of blocks that hold data.
    #[serde(default)]
    pub stored_bytes: u64,
    /// Bytes of its segments.
    #[serde(default)]
    pub segment_bytes: u64,
    /// Tails that were kept, in this host's copy.
    pub forks: u64,
    /// `owner`, `replica` or `witness`.
    pub role: String,
    /// Name of the owner.
    pub owner: Option<String>,
    /// The epoch (its form is the daemon's; tests only compare it).
    pub epoch: serde_json::Value,
    /// Last update of this host's copy.
    pub seq: u64,
    /// Last seq acknowledged by a flush.
    pub flushed_seq: u64,
    /// `ok`, `degraded`, `stalled`, `catching-up`, `fenced` or `failed`.
    pub state: String,
    /// All members.
    pub members: Vec<MemberStatus>,
    /// Refused frames by reason.
    #[serde(default)]
    pub refusals: BTreeMap<String, u64>,
}

/// One member of an image, as one host sees it.
#[derive(Debug, Clone, Deserialize)]
pub struct MemberStatus {
    /// The member's name.
    pub host: String,
    /// `owner`, `replica` or `witness`.
    pub role: String,
    /// Its state.
    pub state: String,
    /// Last update it is known to have.
    pub seq: u64,
    /// Last update it is known to have on stable storage.
    pub durable_seq: u64,
    /// Bytes of updates it has not got yet.
    pub lag_bytes: u64,
}

impl Status {
    /// The image at `path` inside the mount, with or without a leading `/`.
    #[must_use]
    pub fn image(&self, path: &str) -> Option<&ImageStatus> {
        let wanted = path.trim_start_matches('/');
        self.images.iter().find(|i| i.path.trim_start_matches('/') == wanted)
    }
}
