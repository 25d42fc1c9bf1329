//! `GET /v1/status`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmfs_common::{DatastoreId, HostId, ImageId, StoreId};

/// A host at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Name of the host that answers.
    pub host: String,
    /// Its id.
    pub host_id: HostId,
    /// Its store.
    pub store_id: StoreId,
    /// The datastore it belongs to.
    pub datastore: DatastoreId,
    /// Where its images are mounted; absent for a daemon without a mount.
    pub mount: Option<PathBuf>,
    /// Version of the daemon.
    pub version: String,
    /// The other hosts of the datastore.
    pub peers: Vec<PeerStatus>,
    /// Every image this host is a member of, ordered by path.
    pub images: Vec<ImageStatus>,
    /// What this host refused since it started, over all images, by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Damage found in what all images share.
    #[serde(default)]
    pub damage: Damage,
    /// Images whose files here could not be opened.
    #[serde(default)]
    pub unopened: Vec<Unopened>,
}

/// Damage found on this host's disk since its daemon started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Damage {
    /// Damaged places found.
    pub found: u64,
    /// Of those, how many were repaired.
    pub repaired: u64,
    /// What is damaged and could not be repaired yet, at most 20.
    pub open: Vec<String>,
}

/// An image that cannot be used on the answering host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unopened {
    /// The image.
    pub id: ImageId,
    /// Why.
    pub reason: String,
}

/// The scrub of one image on the answering host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// True while it is being scrubbed.
    pub running: bool,
    /// How far that is.
    pub done_bytes: u64,
    /// Of how much, roughly.
    pub total_bytes: u64,
    /// When the last whole scrub ended, milliseconds since 1970; absent when there was none.
    pub finished_ms: Option<u64>,
    /// Why the last one was given up.
    pub error: Option<String>,
}

/// Another host, as seen from the one that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub host: String,
    /// Its id.
    pub host_id: HostId,
    /// Where it is reached, or was last tried (`HOST:PORT`); absent while no address is known.
    pub address: Option<String>,
    /// True while there is an authenticated connection.
    pub connected: bool,
    /// Round trip in microseconds of that connection.
    pub rtt_us: Option<u64>,
    /// Why there is none, when the last attempt failed.
    pub error: Option<String>,
}

/// What the answering host is for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageRole {
    /// It may write.
    Owner,
    /// It holds a copy.
    Replica,
    /// It holds the chain's headers.
    Witness,
}

/// How an image fares on the answering host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// All members hold what they should.
    Ok,
    /// Works with fewer copies than its policy asks for, or with a member missing.
    Degraded,
    /// Flushes (or everything, without a lease) wait for a quorum.
    Stalled,
    /// The copy is being brought up to date.
    CatchingUp,
    /// Deposed, or without an `EpochStart` of its own yet: no writes here.
    Fenced,
    /// Latched after a local error, or by an operator; needs attention.
    Failed,
}

/// How far a member is, as the answering host knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberState {
    /// Holds everything, or nearly so while writes go on.
    InSync,
    /// Behind, and being fed from the log.
    CatchingUp,
    /// Too far behind for the log: a block-level sync runs.
    Syncing,
    /// Without a connection.
    Offline,
    /// Connected, but it cannot go on (its disk is full, its store failed).
    Parked,
    /// Connected, but its copy cannot follow this chain: it has another store than the one that was
    /// admitted, or another lineage.
    Stranger,
    /// Nothing is known: only the owner hears from all members.
    Unknown,
}

/// One image on the answering host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Path inside the mount, without a leading slash.
    pub path: String,
    /// The image, for ever.
    pub id: ImageId,
    /// Size in bytes of the file.
    pub size: u64,
    /// Bytes of blocks that hold data here.
    pub stored_bytes: u64,
    /// Bytes of the segments it takes here: its data, its log, and what is superseded and not yet given back.
    #[serde(default)]
    pub segment_bytes: u64,
    /// Bytes that compaction has moved since the daemon started.
    #[serde(default)]
    pub compacted_bytes: u64,
    /// What this host is for it.
    pub role: ImageRole,
    /// Name of the owner; absent while none is known.
    pub owner: Option<String>,
    /// Number of the current epoch.
    pub epoch: u64,
    /// Last update of this host's copy.
    pub seq: u64,
    /// Last update acknowledged by a flush, as far as this host knows.
    pub flushed_seq: u64,
    /// How it fares.
    pub state: ImageState,
    /// Why, when the state is not `ok`.
    pub reason: Option<String>,
    /// True in a lineage that began with a forced promotion.
    pub forced: bool,
    /// All members.
    pub members: Vec<MemberStatus>,
    /// What this host refused for this image since it started, by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Forks of it kept here.
    pub forks: u64,
    /// Damage found in the copy here.
    #[serde(default)]
    pub damage: Damage,
    /// The background scrub.
    #[serde(default)]
    pub scrub: ScrubStatus,
}

/// One member of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its name.
    pub host: String,
    /// What it is for the image.
    pub role: ImageRole,
    /// How far it is.
    pub state: MemberState,
    /// Last update it is known to have; 0 when nothing was heard of it.
    pub seq: u64,
    /// Last update it is known to have on stable storage; 0 when nothing was heard of it.
    pub durable_seq: u64,
    /// Bytes of updates (payload and headers) after `seq` that it is not known to have.
    pub lag_bytes: u64,
}

macro_rules! words {
    ($type:ty { $($variant:ident => $word:literal),* $(,)? }) => {
        impl $type {
            /// The word of the JSON documents and of the tables.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

words!(ImageRole { Owner => "owner", Replica => "replica", Witness => "witness" });
words!(ImageState {
    Ok => "ok", Degraded => "degraded", Stalled => "stalled", CatchingUp => "catching-up", Fenced => "fenced",
    Failed => "failed",
});
words!(MemberState {
    InSync => "in-sync", CatchingUp => "catching-up", Syncing => "syncing", Offline => "offline",
    Parked => "parked", Stranger => "stranger", Unknown => "unknown",
});
