//! The engine: every image of this host over one store and one network.
//!
//! A [`Node`] runs the machines of `vmfs-proto`: it feeds them connections, messages, completions and
//! time, and carries out what they ask for. It decides nothing itself about who owns what or when a
//! flush is done. The mount (`vmfs-fuse`) and the control API sit on top of it.

mod ask;
mod blocks;
mod claims;
mod create;
mod deleted;
mod execute;
mod facts;
mod foresight;
mod image;
mod incoming;
mod inline;
mod io;
mod life;
mod line;
pub(crate) mod memory;
mod quota;
mod repair;
mod replace;
mod ring;
mod scrub;
mod start;
mod sync;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use vmfs_common::config::Config;
use vmfs_common::{HostId, ImageId, Millis, StoreId};
use vmfs_net::Network;
use vmfs_proto::{Contact, Env, Identity, Timing};
use vmfs_store::{ImageStore, Store};

pub(crate) use ask::{Ask, Told, decode_told, encode_told};
pub use create::CreateError;
pub use deleted::IN_USE;
pub(crate) use image::Pending;
pub use image::{FlushDone, Image, Wake};
pub use io::IoError;
pub use start::{NodeError, start};
pub use vmfs_store::View;

use sync::SyncServer;

/// A running engine; clones are the same one.
#[derive(Clone)]
pub struct Node(Arc<NodeInner>);

impl Deref for Node {
    type Target = Arc<NodeInner>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// What [`Node`] shares.
pub struct NodeInner {
    /// The host's configuration.
    pub config: Config,
    /// Who this host is.
    pub identity: Arc<Identity>,
    pub(crate) timing: Timing,
    pub(crate) store: Arc<Store>,
    network: OnceLock<Network>,
    runtime: Handle,
    images: RwLock<BTreeMap<ImageId, Arc<Image>>>,
    sessions: RwLock<HashMap<HostId, (u64, StoreId)>>,
    contacts: RwLock<HashMap<HostId, Contact>>,
    /// Stores of hosts met so far: what a new image's member list needs.
    known_stores: Mutex<BTreeMap<HostId, StoreId>>,
    started: Instant,
    claims_version: AtomicU64,
    rings: Arc<ring::RingBudget>,
    sync_server: Arc<SyncServer>,
    peer_claims: Mutex<claims::PeerClaims>,
    stopping: tokio::sync::watch::Sender<bool>,
    /// The claims version up to which the mount's kernel cache is right; `MAX` without a mount.
    mount_seen: AtomicU64,
    pub(crate) scrubs: scrub::Scrubs,
    /// Payload appended so far, over all images.
    pub(crate) appended_bytes: AtomicU64,
    /// Until then (this node's clock) nothing that touches the disk runs on the network's threads.
    slow_disk_until: AtomicU64,
    inline_syncs: inline::InlineSyncs,
    /// Of the images that are written on this host's mount.
    writers: inline::Alone,
    /// Threads of callers that are inside a local sync.
    pub(crate) caller_syncs: AtomicUsize,
    /// Refusals that no image has counted, by reason.
    refused: Mutex<BTreeMap<&'static str, u64>>,
    /// Copies that were offered and have received nothing yet: by whom, and when.
    introduced: Mutex<HashMap<ImageId, (HostId, Instant)>>,
    /// Bytes of control messages that wait for each peer.
    waiting_bytes: Mutex<HashMap<HostId, Arc<AtomicUsize>>>,
}

/// For how long a slow disk is remembered, in milliseconds.
const SLOW_DISK_MS: u64 = 10_000;
/// This node's clock starts here, so that "zero" is long ago.
const CLOCK_START_MS: u64 = 1_000_000;

/// Callers that may be inside a local sync at a time; the mount has more threads than that.
const CALLER_SYNCS_MAX: usize = 2;

/// See [`NodeInner::caller_sync`].
pub(crate) struct CallerSync<'a>(&'a AtomicUsize);

impl Drop for CallerSync<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl NodeInner {
    /// Milliseconds on this node's monotonic clock.
    pub fn now(&self) -> Millis {
        Millis(CLOCK_START_MS + u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX / 2))
    }
    /// The network.
    pub fn network(&self) -> &Network {
        self.network.get().expect("invariant: set before any image exists")
    }
    /// The runtime that everything runs on.
    pub const fn runtime(&self) -> &Handle {
        &self.runtime
    }
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }
    pub(crate) fn blocking(&self, work: impl FnOnce() + Send + 'static) {
        self.runtime.spawn_blocking(work);
    }
    /// The disk has kept a small write waiting.
    pub(crate) fn note_slow_disk(&self) {
        self.slow_disk_until.store(self.now().0 + SLOW_DISK_MS, Ordering::Relaxed);
    }
    pub(crate) fn disk_was_slow(&self) -> bool {
        self.now().0 < self.slow_disk_until.load(Ordering::Relaxed)
    }
    /// True on a thread that is none of the runtime's: one of the mount's.
    pub(crate) fn is_outside(&self) -> bool {
        Handle::try_current().is_err()
    }
    /// A caller's turn to sync a log on its own thread: not one of the runtime's, which serve others
    /// meanwhile, and no more than [`CALLER_SYNCS_MAX`] at a time.
    pub(crate) fn caller_sync(&self) -> Option<CallerSync<'_>> {
        if !self.is_outside() {
            return None;
        }
        let turn = CallerSync(&self.caller_syncs);
        (turn.0.fetch_add(1, Ordering::AcqRel) < CALLER_SYNCS_MAX).then_some(turn)
    }
    pub(crate) fn random_u64(&self) -> u64 {
        let mut b = [0; 8];
        fill_random(&mut b);
        u64::from_le_bytes(b)
    }
    pub(crate) fn session(&self, host: HostId) -> Option<(u64, StoreId)> {
        self.sessions.read().get(&host).copied()
    }
    pub(crate) fn connected(&self) -> Vec<HostId> {
        let mut hosts: Vec<HostId> = self.sessions.read().keys().copied().collect();
        hosts.sort_unstable();
        hosts
    }
    fn contact(&self, host: HostId) -> Contact {
        self.contacts.read().get(&host).copied().unwrap_or_default()
    }

    /// Builds the environment of a machine of `image` and runs `f` in it.
    pub(crate) fn with_env<R>(&self, image: &Image, f: impl FnOnce(&mut Env<'_>) -> R) -> R {
        self.with_store_env(&image.store, f)
    }
    fn with_store_env<R>(&self, store: &ImageStore, f: impl FnOnce(&mut Env<'_>) -> R) -> R {
        let contact = |host| self.contact(host);
        let history = |seq| store.head_at(seq).ok().flatten();
        let mut env = Env {
            now: self.now(),
            time_ns: unix_ns(),
            entropy: &mut fill_random,
            contact: &contact,
            history: &history,
            log_start: store.log_start(),
        };
        f(&mut env)
    }

    /// Every image on this host.
    pub fn images(&self) -> Vec<Arc<Image>> {
        self.images.read().values().cloned().collect()
    }
    /// One image.
    pub fn image(&self, id: ImageId) -> Option<Arc<Image>> {
        self.images.read().get(&id).cloned()
    }
    /// Changes whenever the set of images, their names or what they show has changed.
    pub fn claims_version(&self) -> u64 {
        self.claims_version.load(Ordering::Acquire)
    }
    pub(crate) fn claims_changed(&self) {
        self.claims_version.fetch_add(1, Ordering::AcqRel);
    }

    /// Asks another host; the answer and its raw part.
    pub(crate) async fn ask(&self, to: HostId, ask: &Ask) -> Result<(Told, Bytes), String> {
        let body = Bytes::from(vmfs_common::msg::encode(ask));
        let answer = self.network().request(to, body).await.map_err(|e| e.to_string())?;
        ask::decode_told(answer).map_err(|e| e.to_string())
    }

    /// Name of a host for people.
    pub fn host_name(&self, host: HostId) -> String {
        self.network().directory().get(host).map_or_else(|| host.short(), |e| e.name)
    }
    /// Bytes free for new data, and the size of the file system that the store is on.
    pub fn space(&self) -> (u64, u64) {
        let free = self.store.free_bytes();
        let total = rustix::fs::statvfs(&self.config.store.dir)
            .map_or(free, |s| s.f_blocks.saturating_mul(s.f_frsize));
        (free, total)
    }
    /// The mount has laid out the claims of this version and corrected what the kernel remembered.
    pub fn mount_corrected(&self, version: u64) {
        self.mount_seen.store(version, Ordering::Release);
    }
    /// True when the mount shows, and its kernel remembers, nothing older than `version`.
    pub(crate) fn is_mount_at(&self, version: u64) -> bool {
        self.mount_seen.load(Ordering::Acquire) >= version
    }
    /// Waits, two seconds at most, until the mount shows what is true now.
    pub(crate) async fn settle_mount(&self) {
        let version = self.claims_version();
        for _ in 0..1000 {
            if self.is_mount_at(version) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        tracing::warn!("the mount is slow to show a change of ownership");
    }
    /// The store of a host, if it was ever met.
    pub fn met_store(&self, host: HostId) -> Option<StoreId> {
        self.known_store(host)
    }
    /// Refusals that no image has counted (messages that do not decode, offers and questions of hosts that
    /// have no business with an image), by reason.
    pub fn refusals(&self) -> BTreeMap<&'static str, u64> {
        self.refused.lock().clone()
    }
    /// Counts one of them. Logged when it is the first, and when their number has doubled.
    pub(crate) fn refused(&self, reason: &'static str, from: HostId, why: &dyn std::fmt::Display) {
        let mut refused = self.refused.lock();
        let count = refused.entry(reason).or_default();
        *count += 1;
        let news = count.is_power_of_two();
        drop(refused);
        if news {
            tracing::warn!(peer = %from.short(), "{reason}: {why}");
        }
    }
    /// The counter of what waits for `peer`, over all its lines.
    pub(crate) fn waiting_bytes(&self, peer: HostId) -> Arc<AtomicUsize> {
        Arc::clone(self.waiting_bytes.lock().entry(peer).or_default())
    }
    /// Becomes true when the daemon stops.
    pub fn stopping(&self) -> tokio::sync::watch::Receiver<bool> {
        self.stopping.subscribe()
    }
}

pub(crate) fn fill_random(buf: &mut [u8]) {
    getrandom::fill(buf).expect("invariant: the kernel has randomness once a host has booted");
}

pub(crate) fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
