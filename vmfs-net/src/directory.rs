//! Who exists: one entry per host (its certificate, its address and what it does), and the hosts that
//! were removed.
//!
//! An entry proves itself: the CA signed the certificate, and the host signed the rest with the key
//! in it. A removal is signed by the CA's key. So either may come from anybody, and hosts pass them on
//! whenever they connect or something changes; the newest version of an entry wins, a removal always.
//! Each is a file (`hosts/ID.json`, `removed/ID.json`), replaced atomically.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use parking_lot::RwLock;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use vmfs_common::HostId;
use vmfs_common::identity::{HostKey, PublicKey, Signature};
use vmfs_common::ids::{hex_decode, hex_encode};

use crate::pki::files::{self, Mode};
use crate::pki::{CaKey, PkiError, Trust, unix_ms};

const ENTRY_LABEL: &str = "vmfs1/host-entry";
const REMOVAL_LABEL: &str = "vmfs1/host-removal";
/// Longest address, as text.
const ADDRESS_BYTES_MAX: usize = 300;
/// Most hosts (and most removals) that are kept: all of them fit one frame.
const HOSTS_MAX: usize = 512;

/// What a host does in its datastore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostRole {
    /// Has a mount and may own images.
    Mount,
    /// Keeps copies.
    Replica,
    /// Keeps headers and votes.
    Witness,
}

/// A host as the others know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostEntry {
    /// Its name, from the certificate.
    pub name: String,
    /// Its id.
    pub host: HostId,
    /// Its key, from the certificate.
    pub public_key: PublicKey,
    /// Where it listens, as `host:port`; resolved anew at every connection attempt.
    pub address: String,
    /// What it does.
    pub roles: Vec<HostRole>,
    /// Grows with every change (milliseconds since 1970 when it was made).
    pub version: u64,
    certificate: CertificateDer<'static>,
    signature: Signature,
}

/// [`HostEntry`] in files and on the wire (JSON).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct EntryRecord {
    /// For people; the certificate has the truth.
    name: String,
    address: String,
    roles: Vec<HostRole>,
    version: u64,
    certificate: String,
    signature: Signature,
}

/// A host's removal in files and on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Removal {
    pub(crate) host: HostId,
    at_ms: u64,
    signature: Signature,
}

/// What hosts tell each other about hosts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Gossip {
    hosts: Vec<EntryRecord>,
    removed: Vec<Removal>,
}

/// The part of an entry that its host decides, as signed by it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Announcement {
    pub(crate) address: String,
    pub(crate) roles: Vec<HostRole>,
    pub(crate) version: u64,
    pub(crate) signature: Signature,
}

impl Announcement {
    pub(crate) fn sign(
        trust_datastore: vmfs_common::DatastoreId,
        key: &HostKey,
        address: &str,
        roles: &[HostRole],
        version: u64,
    ) -> Self {
        let msg = announcement_bytes(trust_datastore, key.host_id(), address, roles, version);
        let signature = key.sign(ENTRY_LABEL, &msg);
        Self { address: address.to_owned(), roles: roles.to_vec(), version, signature }
    }

    /// Joins it with the host's certificate, all of it checked.
    pub(crate) fn into_entry(
        self,
        trust: &Trust,
        certificate: CertificateDer<'static>,
        place: &str,
    ) -> Result<HostEntry, PkiError> {
        let now_s = i64::try_from(unix_ms() / 1000).unwrap_or(i64::MAX);
        let info = trust.check_host(&certificate, now_s, &place)?;
        check_address(&self.address).map_err(|what| PkiError::malformed(place, what))?;
        let msg = announcement_bytes(trust.datastore(), info.host, &self.address, &self.roles, self.version);
        info.public_key
            .verify(ENTRY_LABEL, &msg, &self.signature)
            .map_err(|e| PkiError::malformed(place, e))?;
        Ok(HostEntry {
            name: info.name,
            host: info.host,
            public_key: info.public_key,
            address: self.address,
            roles: self.roles,
            version: self.version,
            certificate,
            signature: self.signature,
        })
    }
}

fn announcement_bytes(
    datastore: vmfs_common::DatastoreId,
    host: HostId,
    address: &str,
    roles: &[HostRole],
    version: u64,
) -> Vec<u8> {
    let bits = roles.iter().fold(0_u8, |bits, r| bits | 1 << (*r as u8));
    let mut msg = Vec::with_capacity(64 + address.len());
    msg.extend_from_slice(datastore.as_bytes());
    msg.extend_from_slice(host.as_bytes());
    msg.extend_from_slice(&version.to_le_bytes());
    msg.push(bits);
    msg.extend_from_slice(address.as_bytes());
    msg
}

/// Checks that an address looks like `host:port`, with an address that can be dialled.
pub(crate) fn check_address(address: &str) -> Result<(), String> {
    if let Ok(socket) = address.parse::<SocketAddr>() {
        return if socket.ip().is_unspecified() || socket.port() == 0 {
            Err(format!("{address} is nothing that other hosts could connect to"))
        } else {
            Ok(())
        };
    }
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    let name_ok = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let fits = address.len() <= ADDRESS_BYTES_MAX && name_ok && port.parse::<u16>().is_ok_and(|p| p != 0);
    if fits { Ok(()) } else { Err(format!("{address:?} is not HOST:PORT")) }
}

impl HostEntry {
    fn record(&self) -> EntryRecord {
        EntryRecord {
            name: self.name.clone(),
            address: self.address.clone(),
            roles: self.roles.clone(),
            version: self.version,
            certificate: hex_encode(&self.certificate),
            signature: self.signature,
        }
    }
}

impl EntryRecord {
    fn check(self, trust: &Trust, place: &str) -> Result<HostEntry, PkiError> {
        let der = hex_decode(&self.certificate)
            .ok_or_else(|| PkiError::malformed(place, "certificate: not hexadecimal"))?;
        let Self { address, roles, version, signature, .. } = self;
        Announcement { address, roles, version, signature }.into_entry(trust, der.into(), place)
    }
}

impl Removal {
    fn bytes(trust: &Trust, host: HostId, at_ms: u64) -> Vec<u8> {
        [&trust.datastore().as_bytes()[..], &host.as_bytes()[..], &at_ms.to_le_bytes()[..]].concat()
    }

    fn check(self, trust: &Trust, place: &str) -> Result<Self, PkiError> {
        let msg = Self::bytes(trust, self.host, self.at_ms);
        let ca = trust.ca_info().public_key;
        ca.verify(REMOVAL_LABEL, &msg, &self.signature).map_err(|e| PkiError::malformed(place, e))?;
        Ok(self)
    }
}

#[derive(Debug, Default)]
struct Inner {
    hosts: BTreeMap<HostId, HostEntry>,
    removed: BTreeMap<HostId, Removal>,
}

/// The known hosts of one identity directory.
#[derive(Debug)]
pub struct Directory {
    dir: PathBuf,
    trust: Trust,
    inner: RwLock<Inner>,
    /// Counts changes.
    changed: watch::Sender<u64>,
}

impl Directory {
    /// Reads the entries in `dir`. An entry that does not check (cut off, expired) is logged and
    /// skipped: peers bring it back.
    ///
    /// # Errors
    /// When a directory or file cannot be read.
    pub fn open(dir: &Path, trust: &Trust) -> Result<Self, PkiError> {
        let mut inner = Inner::default();
        let skip = |path: &Path, e: &dyn std::fmt::Display| {
            tracing::warn!("{}: skipped: {e}", path.display());
        };
        for path in files::list(&dir.join("removed"), "json")? {
            let bytes = files::read(&path)?;
            let parsed = serde_json::from_slice::<Removal>(&bytes).map_err(|e| e.to_string());
            match parsed.and_then(|r| r.check(trust, &path.display().to_string()).map_err(|e| e.to_string()))
            {
                Ok(removal) => drop(inner.removed.insert(removal.host, removal)),
                // Forgetting a removal would let the host back in.
                Err(e) => return Err(PkiError::malformed(path.display(), e)),
            }
        }
        for path in files::list(&dir.join("hosts"), "json")? {
            let bytes = files::read(&path)?;
            let place = path.display().to_string();
            let parsed = serde_json::from_slice::<EntryRecord>(&bytes).map_err(|e| e.to_string());
            match parsed.and_then(|r| r.check(trust, &place).map_err(|e| e.to_string())) {
                Ok(entry) if inner.removed.contains_key(&entry.host) => {}
                Ok(entry) => drop(inner.hosts.insert(entry.host, entry)),
                Err(e) => skip(&path, &e),
            }
        }
        let changed = watch::Sender::new(0);
        Ok(Self { dir: dir.to_owned(), trust: trust.clone(), inner: RwLock::new(inner), changed })
    }

    /// All hosts, this one included, by id.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostEntry> {
        self.inner.read().hosts.values().cloned().collect()
    }

    /// One host.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<HostEntry> {
        self.inner.read().hosts.get(&host).cloned()
    }

    /// The host with this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<HostEntry> {
        self.inner.read().hosts.values().find(|h| h.name == name).cloned()
    }

    /// True when the host was removed.
    #[must_use]
    pub fn is_removed(&self, host: HostId) -> bool {
        self.inner.read().removed.contains_key(&host)
    }

    /// Tells of every change from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Everything, for a peer.
    pub(crate) fn gossip(&self) -> Gossip {
        let inner = self.inner.read();
        Gossip {
            hosts: inner.hosts.values().map(HostEntry::record).collect(),
            removed: inner.removed.values().cloned().collect(),
        }
    }

    /// [`Self::gossip`] as JSON.
    pub(crate) fn gossip_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.gossip()).expect("invariant: plain structs of strings and numbers")
    }

    /// Takes over what is new in a peer's gossip; what does not check is skipped and returned as
    /// text. On return the news is on stable storage.
    pub(crate) fn merge(&self, gossip: Gossip, from: &str) -> Result<Vec<String>, PkiError> {
        let mut bad = Vec::new();
        for removal in gossip.removed {
            if !self.is_removed(removal.host) {
                match removal.check(&self.trust, &format!("removal told by {from}")) {
                    Ok(r) => self.put_removal(r)?,
                    Err(e) => bad.push(e.to_string()),
                }
            }
        }
        for record in gossip.hosts {
            let place = format!("entry of host {:?} told by {from}", record.name);
            match record.check(&self.trust, &place) {
                Ok(entry) => self.put(entry)?,
                Err(e) => bad.push(e.to_string()),
            }
        }
        Ok(bad)
    }

    /// Adds or renews an entry; an older one, or one of a removed host, changes nothing.
    pub(crate) fn put(&self, entry: HostEntry) -> Result<(), PkiError> {
        let mut inner = self.inner.write();
        let known = inner.hosts.get(&entry.host);
        let stale = known.is_some_and(|k| k.version >= entry.version)
            || inner.removed.contains_key(&entry.host)
            || (known.is_none() && inner.hosts.len() >= HOSTS_MAX);
        if stale {
            return Ok(());
        }
        files::make_dir(&self.dir.join("hosts"))?;
        files::replace(&self.path("hosts", entry.host), Mode::Public, &json(&entry.record()))?;
        inner.hosts.insert(entry.host, entry);
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Removes a host for ever. Needs the CA's key.
    ///
    /// # Errors
    /// When the removal cannot be written.
    pub fn remove(&self, ca: &CaKey, host: HostId) -> Result<(), PkiError> {
        let at_ms = unix_ms();
        let signature = ca.sign(REMOVAL_LABEL, &Removal::bytes(&self.trust, host, at_ms));
        self.put_removal(Removal { host, at_ms, signature })
    }

    fn put_removal(&self, removal: Removal) -> Result<(), PkiError> {
        let mut inner = self.inner.write();
        if inner.removed.len() >= HOSTS_MAX {
            return Err(PkiError::malformed(self.dir.display(), "too many removed hosts"));
        }
        files::make_dir(&self.dir.join("removed"))?;
        files::replace(&self.path("removed", removal.host), Mode::Public, &json(&removal))?;
        files::remove(&self.path("hosts", removal.host))?;
        inner.hosts.remove(&removal.host);
        inner.removed.insert(removal.host, removal);
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Makes sure that this host's own entry has this address and these roles.
    pub(crate) fn announce(
        &self,
        identity: &crate::pki::HostIdentity,
        address: &str,
        roles: &[HostRole],
    ) -> Result<(), PkiError> {
        let known = self.get(identity.host());
        if known.as_ref().is_some_and(|k| k.address == address && k.roles == roles) {
            return Ok(());
        }
        let version = unix_ms().max(known.map_or(0, |k| k.version + 1));
        let signed = Announcement::sign(identity.datastore(), identity.key(), address, roles, version);
        self.put(signed.into_entry(&self.trust, identity.certificate().clone(), "own entry")?)
    }

    fn path(&self, kind: &str, host: HostId) -> PathBuf {
        self.dir.join(kind).join(format!("{host}.json"))
    }
}

/// The bytes of a small value of ours.
fn json(value: &impl Serialize) -> Vec<u8> {
    let mut bytes =
        serde_json::to_vec_pretty(value).expect("invariant: plain structs of strings and numbers");
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::check_address;

    #[test]
    fn addresses_are_host_and_port_that_can_be_dialled() {
        for good in ["10.0.0.1:7", "[::1]:65535", "a:1", "host-1.example.org:7777"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for bad in
            ["", "a", ":1", "a:", "a:0", "a:65536", "0.0.0.0:1", "[::]:1", "1.2.3.4:0", "a b:1", "a/b:1"]
        {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }
}
