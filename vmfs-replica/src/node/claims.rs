//! Which paths other hosts' images claim. Members learn names from the chains they hold; what this host
//! holds no copy of it learns here, so that a name that a reachable host claims is not given twice.
//!
//! A hint, refreshed about twice a second: two hosts that create one name at the same moment end with
//! two images, shown as the mount's rules say; nothing is lost.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use vmfs_common::HostId;
use vmfs_common::hash::hash;

use super::NodeInner;
use super::ask::{Ask, Told};

/// How often peers are asked whether their claims changed.
const REFRESH: Duration = Duration::from_millis(500);
/// Most claims taken from one host: 512 KiB of hashes.
pub(super) const CLAIMS_MAX: usize = 65_536;

/// What connected hosts claim, as hashes of paths.
#[derive(Debug, Default)]
pub(super) struct PeerClaims(HashMap<HostId, (u64, HashSet<u64>)>);

fn path_hash(path: &str) -> u64 {
    let digest = hash("claim", &[path.as_bytes()]);
    u64::from_le_bytes(*digest.as_bytes().first_chunk().expect("invariant: a digest has 32 bytes"))
}

impl NodeInner {
    /// True when a connected host claims `path` for an image of its own.
    pub(super) fn is_claimed_elsewhere(&self, path: &str) -> bool {
        let claims = self.peer_claims.lock();
        if claims.0.is_empty() {
            return false;
        }
        let key = path_hash(path);
        claims.0.iter().any(|(host, (_, paths))| paths.contains(&key) && self.session(*host).is_some())
    }

    /// Answers [`Ask::Claims`].
    pub(super) fn own_claims(&self, known: u64) -> (Told, Vec<u8>) {
        let version = self.claims_version();
        if known == version {
            return (Told::NotYet, Vec::new());
        }
        let own = self.images().into_iter().filter(|i| i.is_owner_here()).filter_map(|i| {
            let state = i.state();
            if state.unlinked { None } else { state.path.as_deref().map(path_hash) }
        });
        let raw = own.take(CLAIMS_MAX).flat_map(u64::to_le_bytes).collect();
        (Told::Claims { version }, raw)
    }

    /// Keeps [`PeerClaims`] fresh until the node stops.
    pub(super) async fn follow_claims(self: Arc<Self>) {
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                () = tokio::time::sleep(REFRESH) => {}
                _ = stopping.wait_for(|s| *s) => return,
            }
            let connected = self.connected();
            self.peer_claims.lock().0.retain(|host, _| connected.contains(host));
            for host in connected {
                let known = self.peer_claims.lock().0.get(&host).map_or(0, |(v, _)| *v);
                // A host that does not answer keeps what it last said; it is dropped when it disconnects.
                if let Ok((Told::Claims { version }, raw)) = self.ask(host, &Ask::Claims { known }).await {
                    let hashes = raw.chunks_exact(8).take(CLAIMS_MAX);
                    let paths = hashes.filter_map(|c| c.try_into().ok().map(u64::from_le_bytes)).collect();
                    self.peer_claims.lock().0.insert(host, (version, paths));
                }
            }
        }
    }
}
