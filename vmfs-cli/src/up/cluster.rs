//! The directory of a cluster:
//!
//! ```text
//! DIR/cluster.json        that this is one, and its hosts; written last
//! DIR/up.lock             pid file of `vmfs up`
//! DIR/a/vmfs.toml         configuration, with relative paths: the directory may be moved
//! DIR/a/identity/         keys and certificates; the one of the first host has the CA
//! DIR/a/store/  mnt/  vmfs.sock  vmfs.pid  vmfs.log
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmfs_common::config::{
    Config, ControlConfig, HostName, IdentityConfig, MountConfig, NetworkConfig, PeerAddress,
    ReplicationConfig, StoreConfig,
};
use vmfs_net::HostRole;
use vmfs_net::pki::{init_datastore, invite};
use vmfs_replica::config_file;
use vmfs_replica::pid_file::{self, ENDING_MAX, Holder};

use crate::error::{CliError, CliResult};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
const HOSTS_DEFAULT: u8 = 3;
/// Between two looks whether a killed daemon is gone.
const SETTLE_POLL: Duration = Duration::from_millis(10);
/// Longest path of a Unix socket on Linux.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Format of `cluster.json`.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    version: u32,
    hosts: Vec<HostName>,
}

/// One host, by where it is.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) name: HostName,
    dir: PathBuf,
}

impl Host {
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
    pub(super) fn config(&self) -> PathBuf {
        self.dir.join("vmfs.toml")
    }
    pub(super) fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }
    pub(super) fn socket(&self) -> PathBuf {
        self.dir.join("vmfs.sock")
    }
    pub(super) fn pid_file(&self) -> PathBuf {
        self.dir.join("vmfs.pid")
    }
    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("vmfs.log")
    }
    /// Whoever holds its pid file.
    pub(super) fn holder(&self) -> CliResult<Holder> {
        pid_file::holder(&self.pid_file()).map_err(|e| at(&self.pid_file(), &e))
    }
    /// Its daemon, when it runs.
    pub(super) fn pid(&self) -> CliResult<Option<u32>> {
        pid_file::running(&self.pid_file()).map_err(|e| at(&self.pid_file(), &e))
    }
}

/// A cluster's directory, complete.
#[derive(Debug)]
pub(super) struct Cluster {
    dir: PathBuf,
    hosts: Vec<Host>,
}

fn at(path: &Path, error: &io::Error) -> CliError {
    CliError::failed(format!("{}: {error}", path.display()))
}

/// Makes sure that a cluster can be at `dir`: it is one, or it is empty, or it is missing and can be made.
pub(super) fn check_place(dir: &Path) -> CliResult {
    if dir.to_str().is_none() {
        return Err(CliError::usage(format!("{}: the path is not UTF-8", dir.display())));
    }
    let longest = dir.join(NAMES[0]).join("vmfs.sock").as_os_str().len();
    if longest > SOCKET_PATH_BYTES_MAX {
        return Err(CliError::failed(format!(
            "{}: too long for the path of a Unix socket below it (by {} bytes)",
            dir.display(),
            longest - SOCKET_PATH_BYTES_MAX
        )));
    }
    match std::fs::read_dir(dir) {
        Ok(mut entries) => {
            let foreign = |name: &std::ffi::OsStr| name != "up.lock" && name != HALF_MADE;
            let any = entries.any(|e| e.is_ok_and(|e| foreign(&e.file_name())));
            if any && !marker_path(dir).exists() && !dir.join(HALF_MADE).exists() {
                return Err(CliError::failed(format!(
                    "{} is not empty and no directory of vmfs up",
                    dir.display()
                )));
            }
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir).map_err(|e| at(dir, &e))
        }
        Err(e) => Err(at(dir, &e)),
    }
}

fn marker_path(dir: &Path) -> PathBuf {
    dir.join("cluster.json")
}

/// Hosts are made in here and moved out when they are complete; it goes away after the marker is written.
const HALF_MADE: &str = ".half-made";

impl Cluster {
    /// The cluster at `dir`; none when there is none.
    pub(super) fn open(dir: &Path) -> CliResult<Option<Self>> {
        let path = marker_path(dir);
        let text = match std::fs::read(&path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            other => other.map_err(|e| at(&path, &e))?,
        };
        let bad = |what: String| CliError::failed(format!("{}: {what}", path.display()));
        let marker: Marker = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if marker.version != VERSION {
            return Err(bad(format!("version {} where this vmfs knows {VERSION}", marker.version)));
        }
        Ok(Some(Self { dir: dir.to_owned(), hosts: hosts(dir, marker.hosts) }))
    }

    /// The cluster at `dir`, made with `count` hosts when there is none.
    pub(super) fn open_or_make(dir: &Path, count: Option<u8>) -> CliResult<Self> {
        if let Some(cluster) = Self::open(dir)? {
            let there = cluster.hosts.len();
            return match count {
                Some(count) if usize::from(count) != there => Err(CliError::failed(format!(
                    "{} has {there} hosts, not {count}: leave out --hosts or choose another directory",
                    dir.display()
                ))),
                _ => Ok(cluster),
            };
        }
        make(dir, usize::from(count.unwrap_or(HOSTS_DEFAULT)))?;
        Self::open(dir)?.ok_or_else(|| CliError::failed(format!("{} has gone away", dir.display())))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Returns when no daemon is ending that was killed a moment ago.
    pub(super) async fn settled(&self) -> CliResult {
        let begun = Instant::now();
        for host in &self.hosts {
            while let Holder::Ending(pid) = host.holder()? {
                if begun.elapsed() > ENDING_MAX {
                    return Err(CliError::failed(format!(
                        "host {}: process {pid} was killed and does not end",
                        host.name
                    )));
                }
                tokio::time::sleep(SETTLE_POLL).await;
            }
        }
        Ok(())
    }

    /// The hosts whose daemon does not run.
    pub(super) fn not_running(&self) -> CliResult<Vec<Host>> {
        let mut missing = Vec::new();
        for host in &self.hosts {
            if host.pid()?.is_none() {
                missing.push(host.clone());
            }
        }
        Ok(missing)
    }

    /// Makes sure that the ports of `starting` are free, with new ones in all configurations where another
    /// program has taken one.
    pub(super) fn settle_ports(&self, starting: &[Host]) -> CliResult {
        let mut listens = BTreeMap::new();
        for host in &self.hosts {
            let config = config_file::load(&host.config()).map_err(CliError::failed)?;
            listens.insert(host.name.clone(), config.network.listen);
        }
        // Held until all are chosen, so that no two hosts get the same.
        let mut held = Vec::new();
        let mut changed = false;
        for host in starting {
            let Some(listen) = listens.get_mut(&host.name) else { continue };
            match UdpSocket::bind(*listen) {
                Ok(socket) => held.push(socket),
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && listen.ip().is_loopback() => {
                    let socket = free_port()?;
                    *listen = socket.local_addr().map_err(|e| at(&self.dir, &e))?;
                    held.push(socket);
                    changed = true;
                }
                Err(e) => {
                    return Err(CliError::failed(format!(
                        "host {}: cannot listen on {listen}: {e}",
                        host.name
                    )));
                }
            }
        }
        if changed {
            for host in &self.hosts {
                rewrite_ports(host, &listens)?;
            }
        }
        Ok(())
    }
}

fn hosts(dir: &Path, names: Vec<HostName>) -> Vec<Host> {
    names.into_iter().map(|name| Host { dir: dir.join(name.as_str()), name }).collect()
}

fn free_port() -> CliResult<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| CliError::failed(format!("no free UDP port: {e}")))
}

fn rewrite_ports(host: &Host, listens: &BTreeMap<HostName, SocketAddr>) -> CliResult {
    let path = host.config();
    let text = std::fs::read_to_string(&path).map_err(|e| at(&path, &e))?;
    // Not resolved: relative paths stay relative.
    let mut config =
        Config::parse(&text).map_err(|e| CliError::failed(format!("config {}: {e}", path.display())))?;
    if let Some(listen) = listens.get(&host.name) {
        config.network.listen = *listen;
    }
    config.peers = peers(&host.name, listens)?;
    let new = path.with_extension("toml.new");
    write_synced(&new, config.to_toml().as_bytes())?;
    std::fs::rename(&new, &path).map_err(|e| at(&path, &e))
}

fn peers(
    of: &HostName,
    listens: &BTreeMap<HostName, SocketAddr>,
) -> CliResult<BTreeMap<HostName, PeerAddress>> {
    let others = listens.iter().filter(|(name, _)| *name != of);
    others
        .map(|(name, listen)| Ok((name.clone(), listen.to_string().parse().map_err(CliError::failed)?)))
        .collect()
}

fn write_synced(path: &Path, bytes: &[u8]) -> CliResult {
    let write = || {
        let mut file = std::fs::File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| at(path, &e))
}

/// Makes a cluster of `count` hosts in `dir`, which has none. What a crash leaves is taken away first.
fn make(dir: &Path, count: usize) -> CliResult {
    let half = dir.join(HALF_MADE);
    remove_half_made(dir, &half)?;
    std::fs::create_dir_all(&half).map_err(|e| at(&half, &e))?;
    let names: Vec<HostName> =
        NAMES[..count].iter().map(|n| n.parse().map_err(CliError::failed)).collect::<CliResult<_>>()?;
    let result = fill(&half, &names);
    if result.is_err() {
        // A failure leaves no trace.
        let _ = std::fs::remove_dir_all(&half);
    }
    result?;
    for name in &names {
        let (from, to) = (half.join(name.as_str()), dir.join(name.as_str()));
        std::fs::rename(&from, &to).map_err(|e| at(&to, &e))?;
    }
    let marker = serde_json::to_vec(&Marker { version: VERSION, hosts: names }).map_err(CliError::failed)?;
    let new = half.join("cluster.json");
    write_synced(&new, &marker)?;
    let path = marker_path(dir);
    std::fs::rename(&new, &path).map_err(|e| at(&path, &e))?;
    std::fs::remove_dir_all(&half).map_err(|e| at(&half, &e))
}

/// Takes away hosts that a crash left between `half` and their place. No daemon ever ran there.
fn remove_half_made(dir: &Path, half: &Path) -> CliResult {
    if !half.exists() {
        return Ok(());
    }
    for name in NAMES {
        let host = dir.join(name);
        if host.join("identity").exists() && !host.join("store").exists() {
            std::fs::remove_dir_all(&host).map_err(|e| at(&host, &e))?;
        }
    }
    std::fs::remove_dir_all(half).map_err(|e| at(half, &e))
}

fn fill(dir: &Path, names: &[HostName]) -> CliResult {
    let mut sockets = Vec::new();
    let mut listens = BTreeMap::new();
    for name in names {
        let socket = free_port()?;
        listens.insert(name.clone(), socket.local_addr().map_err(|e| at(dir, &e))?);
        sockets.push(socket);
    }
    // The first host is the enrolling one: it can invite further hosts later.
    let ca = dir.join(NAMES[0]).join("identity");
    init_datastore(&ca).map_err(CliError::failed)?;
    let roles = [HostRole::Mount, HostRole::Replica];
    for host in hosts(dir, names.to_vec()) {
        let listen = listens[&host.name];
        let identity = host.dir().join("identity");
        invite::join_local(&ca, host.name.as_str(), &identity, &listen.to_string(), &roles)
            .map_err(CliError::failed)?;
        // QEMU runs as a user of its own and has to reach the mount; what is private (identity, store,
        // socket) has modes of its own.
        let reachable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(host.dir(), reachable).map_err(|e| at(host.dir(), &e))?;
        let mount = host.mount();
        std::fs::create_dir(&mount).map_err(|e| at(&mount, &e))?;
        let config = Config {
            host: host.name.clone(),
            witness: false,
            log: "info".to_owned(),
            store: StoreConfig::at("store".into()),
            mount: Some(MountConfig::at("mnt".into())),
            network: NetworkConfig { listen, advertise: None },
            identity: IdentityConfig { dir: "identity".into() },
            control: ControlConfig {
                socket: "vmfs.sock".into(),
                pid_file: Some("vmfs.pid".into()),
                metrics_listen: None,
            },
            replication: ReplicationConfig::default(),
            peers: peers(&host.name, &listens)?,
            policies: Vec::new(),
        };
        write_synced(&host.config(), config.to_toml().as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listens(cluster: &Cluster) -> Vec<SocketAddr> {
        let load = |h: &Host| config_file::load(&h.config()).unwrap().network.listen;
        cluster.hosts().iter().map(load).collect()
    }

    #[test]
    fn cluster_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        check_place(dir.path()).unwrap();
        let cluster = Cluster::open_or_make(dir.path(), Some(2)).unwrap();
        let names: Vec<_> = cluster.hosts().iter().map(|h| h.name.to_string()).collect();
        assert_eq!(names, ["a", "b"]);
        let identity = vmfs_net::HostIdentity::load(&dir.path().join("b/identity")).unwrap();
        assert_eq!(identity.name(), "b");
        let ports = listens(&cluster);
        check_place(dir.path()).unwrap();
        assert_eq!(listens(&Cluster::open_or_make(dir.path(), None).unwrap()), ports);
        let other = Cluster::open_or_make(dir.path(), Some(3)).unwrap_err().to_string();
        assert!(other.contains("has 2 hosts, not 3"), "{other}");
        assert!(!dir.path().join(HALF_MADE).exists());
    }

    #[test]
    fn taken_port_is_replaced_in_every_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::open_or_make(dir.path(), Some(3)).unwrap();
        let before = listens(&cluster);
        let taken = UdpSocket::bind(before[1]).unwrap();
        cluster.settle_ports(cluster.hosts()).unwrap();
        let after = listens(&cluster);
        assert_eq!((before[0], before[2]), (after[0], after[2]));
        assert_ne!(before[1], after[1]);
        for host in [0, 2] {
            let config = config_file::load(&cluster.hosts()[host].config()).unwrap();
            assert_eq!(config.peers[&"b".parse().unwrap()].to_string(), after[1].to_string());
            assert_eq!(config.store.dir, cluster.hosts()[host].dir().join("store"));
        }
        drop(taken);
    }

    #[test]
    fn foreign_directory_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("thesis.txt"), "x").unwrap();
        let error = check_place(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("is not empty and no directory of vmfs up"), "{error}");
        assert!(Cluster::open(dir.path()).unwrap().is_none());
        let file = dir.path().join("thesis.txt");
        assert!(check_place(&file).is_err());
        assert!(Cluster::open(&file).unwrap().is_none());
        assert!(check_place(&dir.path().join("x".repeat(100))).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn crash_while_making_is_made_good() {
        let dir = tempfile::tempdir().unwrap();
        // As after the first of two renames.
        let half = dir.path().join(HALF_MADE);
        std::fs::create_dir_all(&half).unwrap();
        fill(&half, &["a".parse().unwrap(), "b".parse().unwrap()]).unwrap();
        std::fs::rename(half.join("a"), dir.path().join("a")).unwrap();
        check_place(dir.path()).unwrap();
        let cluster = Cluster::open_or_make(dir.path(), Some(3)).unwrap();
        assert_eq!(cluster.hosts().len(), 3);
        assert!(!half.exists());
    }
}
