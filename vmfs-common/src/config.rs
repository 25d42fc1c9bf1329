//! The configuration of one host: one TOML file, every key documented in `examples/vmfs.toml`.
//!
//! Pure: [`Config::parse`] takes text. Reading the file, and taking relative paths from its directory,
//! is `vmfs-replica`'s business. Unknown keys are errors.

mod units;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::policy::{Acks, ImagePolicy, MEMBERS_MAX, OnQuorumLoss};

pub use units::{
    ByteSize, HOST_NAME_BYTES_MAX, HostName, PATTERN_BYTES_MAX, PathPattern, PeerAddress, TimeSpan,
    ValueError,
};

/// Where the control socket is unless the configuration or the command line says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vmfs/vmfs.sock";
/// The UDP port unless the configuration says otherwise.
pub const DEFAULT_PORT: u16 = 4410;

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, an unknown key, a missing key, or a value of the wrong kind.
    #[error("line {line}, column {column}: {message}")]
    At {
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// Values that do not fit together or are out of range.
    #[error("{key}: {message}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong.
        message: String,
    },
}

/// Configuration of one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this host, as in its certificate.
    pub host: HostName,
    /// True for a host that only votes: it never holds data, and has no mount.
    #[serde(default)]
    pub witness: bool,
    /// `tracing` filter of the log on standard error.
    #[serde(default = "default_log")]
    pub log: String,
    /// The store.
    pub store: StoreConfig,
    /// The mount; absent for `vmfs-replica`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<MountConfig>,
    /// QUIC.
    #[serde(default)]
    pub network: NetworkConfig,
    /// Keys and certificates.
    pub identity: IdentityConfig,
    /// The control socket.
    #[serde(default)]
    pub control: ControlConfig,
    /// Replication.
    #[serde(default)]
    pub replication: ReplicationConfig,
    /// Addresses of other hosts, by name, in place of those that they announce themselves.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<HostName, PeerAddress>,
    /// Rules for new images; the first whose pattern matches counts.
    #[serde(default, rename = "policy", skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<PolicyRule>,
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Directory of the store, made when it is missing.
    pub dir: PathBuf,
    /// Size of one segment of a log. Only for new segments.
    #[serde(default = "default_segment_size")]
    pub segment_size: ByteSize,
    /// Written segments kept ready for reuse.
    #[serde(default = "default_segment_pool")]
    pub segment_pool: u32,
    /// Memory for block maps, over all images.
    #[serde(default = "default_map_cache")]
    pub map_cache: ByteSize,
    /// Log kept for each image, also superseded blocks, so that a replica can catch up from it; while one is
    /// away, no more. When not given: 256 MiB, and at the owner up to half of what the image holds while a
    /// replica is away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_retain: Option<ByteSize>,
    /// For how long replicas keep a deleted image.
    #[serde(default = "default_undelete_window")]
    pub undelete_window: TimeSpan,
    /// Bytes a second that the background scrub reads; 0 turns it off.
    #[serde(default = "default_scrub_rate")]
    pub scrub_rate: ByteSize,
    /// How often each image is scrubbed; 0 turns it off.
    #[serde(default = "default_scrub_interval")]
    pub scrub_interval: TimeSpan,
    /// Bytes a second that compaction copies, four times that when it falls behind; 0 turns it off.
    #[serde(default = "default_compact_rate")]
    pub compact_rate: ByteSize,
}

/// `[mount]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountConfig {
    /// An empty directory.
    pub point: PathBuf,
    /// Whether users other than the daemon's may use the mount (QEMU usually runs as one).
    #[serde(default = "default_true")]
    pub allow_other: bool,
}

/// `[network]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// UDP address to listen on.
    pub listen: SocketAddr,
    /// Address that this host tells the others to reach it at; absent: the one it listens on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<PeerAddress>,
}

impl StoreConfig {
    /// A store in `dir`, everything else as by default.
    #[must_use]
    pub const fn at(dir: PathBuf) -> Self {
        Self {
            dir,
            segment_size: default_segment_size(),
            segment_pool: default_segment_pool(),
            map_cache: default_map_cache(),
            log_retain: None,
            undelete_window: default_undelete_window(),
            scrub_rate: default_scrub_rate(),
            scrub_interval: default_scrub_interval(),
            compact_rate: default_compact_rate(),
        }
    }
}

impl MountConfig {
    /// A mount on `point`, everything else as by default.
    #[must_use]
    pub const fn at(point: PathBuf) -> Self {
        Self { point, allow_other: true }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)), advertise: None }
    }
}

/// `[identity]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityConfig {
    /// Directory with this host's key and certificate, the CA's certificate and the known hosts.
    pub dir: PathBuf,
}

/// `[control]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlConfig {
    /// Unix socket of the control API.
    pub socket: PathBuf,
    /// File that holds the daemon's process id, locked while it runs; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<PathBuf>,
    /// TCP address that serves `GET /metrics` and nothing else; absent: only the socket does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self { socket: PathBuf::from(DEFAULT_SOCKET), pid_file: None, metrics_listen: None }
    }
}

/// `[replication]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicationConfig {
    /// Bytes the quorum may be behind before writes slow to its rate, per image.
    pub max_lag: ByteSize,
    /// Memory for recent updates that are on their way to replicas, over all images.
    pub ring: ByteSize,
    /// A request that waits for a quorum fails with EIO after this long.
    pub stall_timeout: TimeSpan,
    /// For how long an owner may act on its last contact with a quorum.
    pub lease: TimeSpan,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self {
            max_lag: ByteSize::mib(256),
            ring: ByteSize::mib(64),
            stall_timeout: TimeSpan::from_secs(600),
            lease: TimeSpan::from_millis(3000),
        }
    }
}

/// Which of the other hosts replicate an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"all\", a number of hosts, or a list of host names")]
pub enum Replicas {
    /// Every other host of the datastore.
    All(AllWord),
    /// So many of them.
    Count(u8),
    /// These.
    Named(Vec<HostName>),
}

/// The word `"all"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllWord {
    /// `"all"`
    All,
}

impl Default for Replicas {
    fn default() -> Self {
        Self::All(AllWord::All)
    }
}

/// `[[policy]]`: who holds a new image, and what its flushes wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRule {
    /// Which paths it is for.
    pub pattern: PathPattern,
    /// The hosts beside this one that hold the data.
    #[serde(default)]
    pub replicas: Replicas,
    /// The hosts that hold only the chain's headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub witnesses: Vec<HostName>,
    /// What a flush waits for.
    #[serde(default)]
    pub acks: Acks,
    /// What a flush does without a quorum.
    #[serde(default)]
    pub on_quorum_loss: OnQuorumLoss,
}

impl PolicyRule {
    /// The rule for paths that no pattern matches: a copy on every host of the datastore, flushes
    /// wait for a majority and stall without one.
    #[must_use]
    pub fn fallback() -> Self {
        Self {
            pattern: PathPattern::everything(),
            replicas: Replicas::default(),
            witnesses: Vec::new(),
            acks: Acks::default(),
            on_quorum_loss: OnQuorumLoss::default(),
        }
    }
    /// The part that goes into the chain of an image.
    #[must_use]
    pub const fn image_policy(&self) -> ImagePolicy {
        ImagePolicy { acks: self.acks, on_quorum_loss: self.on_quorum_loss }
    }
}

fn default_log() -> String {
    "info".to_owned()
}
const fn default_true() -> bool {
    true
}
const fn default_segment_size() -> ByteSize {
    ByteSize::mib(16)
}
const fn default_segment_pool() -> u32 {
    4
}
const fn default_map_cache() -> ByteSize {
    ByteSize::mib(64)
}
const fn default_undelete_window() -> TimeSpan {
    TimeSpan::from_secs(7 * 86_400)
}
const fn default_scrub_rate() -> ByteSize {
    ByteSize::mib(8)
}
const fn default_scrub_interval() -> TimeSpan {
    TimeSpan::from_secs(7 * 86_400)
}
const fn default_compact_rate() -> ByteSize {
    ByteSize::mib(64)
}

impl Config {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`ConfigError`] names the place or the key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| at(text, &e))?;
        config.check()?;
        Ok(config)
    }

    /// As TOML, for `vmfs up` and `vmfs datastore init`.
    ///
    /// # Panics
    /// When a path is not UTF-8: TOML cannot say it. Callers check that first.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self)
            .expect("invariant: callers check that the paths are UTF-8, the rest is text and numbers")
    }

    /// Takes relative paths from `base`, the directory of the file.
    pub fn resolve(&mut self, base: &Path) {
        let mut paths = vec![&mut self.store.dir, &mut self.identity.dir, &mut self.control.socket];
        paths.extend(self.mount.as_mut().map(|m| &mut m.point));
        paths.extend(self.control.pid_file.as_mut());
        for path in paths {
            *path = base.join(&*path);
        }
    }

    /// The rule for a new image at `path`.
    #[must_use]
    pub fn policy_for(&self, path: &str) -> PolicyRule {
        self.policies.iter().find(|r| r.pattern.matches(path)).cloned().unwrap_or_else(PolicyRule::fallback)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let r = &self.replication;
        range("replication.lease", r.lease, TimeSpan::from_millis(200), TimeSpan::from_secs(60))?;
        range(
            "replication.stall_timeout",
            r.stall_timeout,
            TimeSpan::from_secs(1),
            TimeSpan::from_secs(30 * 86_400),
        )?;
        range("replication.ring", r.ring, ByteSize::mib(4), ByteSize::mib(4096))?;
        range("replication.max_lag", r.max_lag, ByteSize::mib(4), ByteSize::mib(1 << 20))?;
        range("store.segment_size", self.store.segment_size, ByteSize::mib(4), ByteSize::mib(1024))?;
        range("store.segment_pool", self.store.segment_pool, 1, 1024)?;
        range("store.map_cache", self.store.map_cache, ByteSize::mib(4), ByteSize::mib(1 << 20))?;
        if !self.store.segment_size.bytes().is_power_of_two() {
            return key("store.segment_size", "must be a power of two");
        }
        if let Some(mount) = &self.mount
            && (mount.point.starts_with(&self.store.dir) || self.store.dir.starts_with(&mount.point))
        {
            return key("mount.point", "the mount point and the store may not be inside each other");
        }
        if self.witness && self.mount.is_some() {
            return key("witness", "a witness holds no data: it cannot have a [mount]");
        }
        if self.peers.contains_key(&self.host) {
            return key("peers", format!("{} is this host itself", self.host));
        }
        self.policies.iter().enumerate().try_for_each(|(i, rule)| self.check_rule(i, rule))
    }

    fn check_rule(&self, index: usize, rule: &PolicyRule) -> Result<(), ConfigError> {
        let name = format!("policy {} ({:?})", index + 1, rule.pattern.as_str());
        let named = match &rule.replicas {
            Replicas::Named(hosts) => hosts.as_slice(),
            Replicas::Count(n) if usize::from(*n) >= MEMBERS_MAX => {
                return key(&name, format!("an image has at most {MEMBERS_MAX} members"));
            }
            Replicas::Count(_) | Replicas::All(_) => &[],
        };
        let mut seen = std::collections::BTreeSet::from([&self.host]);
        for host in named.iter().chain(&rule.witnesses) {
            if *host == self.host {
                return key(&name, format!("{host} is this host itself, which holds its own images anyway"));
            }
            if !seen.insert(host) {
                return key(&name, format!("{host} is named twice"));
            }
        }
        if seen.len() > MEMBERS_MAX {
            return key(&name, format!("an image has at most {MEMBERS_MAX} members"));
        }
        Ok(())
    }
}

fn key<T>(key: &str, message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Key { key: key.to_owned(), message: message.into() })
}

fn range<T: PartialOrd + std::fmt::Display>(name: &str, value: T, min: T, max: T) -> Result<(), ConfigError> {
    if value < min || value > max {
        return key(name, format!("{value} is out of range ({min} to {max})"));
    }
    Ok(())
}

fn at(text: &str, error: &toml::de::Error) -> ConfigError {
    let start = error.span().map_or(0, |span| span.start).min(text.len());
    let before = &text.as_bytes()[..start];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let line_start = before.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
    let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
    ConfigError::At { line, column, message: error.message().trim_end().replace('\n', "; ") }
}

#[cfg(test)]
mod tests;
