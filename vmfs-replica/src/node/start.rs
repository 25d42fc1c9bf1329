//! Bringing a node up, and down again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, watch};
use vmfs_common::codec::CodecError;
use vmfs_common::config::{ByteSize, Config};
use vmfs_common::{ImageId, StoreId};
use vmfs_net::{Handlers, HostIdentity, HostRole, NetConfig, NetError, Network, PkiError};
use vmfs_proto::{Env, Identity, Machine, Output, Timing};
use vmfs_store::disk::FileDisk;
use vmfs_store::{ImageStore, Store, StoreError};

use super::image::Image;
use super::incoming::{Handler, Incoming};
use super::ring::RingBudget;
use super::sync::SyncServer;
use super::{Node, NodeInner, fill_random};

/// Network events not yet taken.
const EVENTS_MAX: usize = 1024;
/// How long a stopping node waits for the last syncs.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Why a node does not start. One line that names the file or directory.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration is another host's.
    #[error("identity {}: it is the one of host {found:?}, the configuration is that of {configured:?}", dir.display())]
    Name {
        /// The identity directory.
        dir: PathBuf,
        /// The name in the certificate.
        found: String,
        /// The name in the configuration.
        configured: String,
    },
    /// Keys and certificates.
    #[error(transparent)]
    Identity(#[from] PkiError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetError),
    /// The store.
    #[error("store {}: {source}", dir.display())]
    Store {
        /// Its directory.
        dir: PathBuf,
        /// What is wrong with it.
        source: StoreError,
    },
    /// An image's record of promises is damaged: taking part could break them.
    #[error("store {}: the promises of image {image} cannot be read: {source}", dir.display())]
    Promises {
        /// The store's directory.
        dir: PathBuf,
        /// The image.
        image: ImageId,
        /// What is wrong.
        source: CodecError,
    },
}

/// Log kept for each image when the config does not say.
const LOG_RETAIN_DEFAULT: ByteSize = ByteSize::mib(256);

fn open_store(config: &Config, identity: &HostIdentity) -> Result<Arc<Store>, StoreError> {
    let disk = Arc::new(FileDisk::open(&config.store.dir)?);
    let cfg = vmfs_store::StoreConfig {
        segment_bytes_max: config.store.segment_size.bytes(),
        map_cache_bytes: config.store.map_cache.bytes(),
        pool_segments: config.store.segment_pool as usize,
        retain_log_bytes_max: config.store.log_retain.unwrap_or(LOG_RETAIN_DEFAULT).bytes(),
        ..vmfs_store::StoreConfig::default()
    };
    let (datastore, host) = (identity.datastore(), identity.host());
    if !Store::exists(&*disk)? {
        let mut id = [0; StoreId::LEN];
        fill_random(&mut id);
        return Store::create(disk, datastore, host, StoreId::from_bytes(id), cfg);
    }
    Store::open(disk, datastore, host, cfg)
}

/// Opens the store, starts the network, takes up every image. Must be called inside a tokio runtime
/// with several threads.
///
/// # Errors
/// See [`NodeError`].
pub async fn start(config: Config, roles: Vec<HostRole>) -> Result<Node, NodeError> {
    let host = HostIdentity::load(&config.identity.dir)?;
    if host.name() != config.host.as_str() {
        let (found, configured) = (host.name().to_owned(), config.host.to_string());
        return Err(NodeError::Name { dir: config.identity.dir, found, configured });
    }
    let dir = config.store.dir.clone();
    let store = open_store(&config, &host).map_err(|source| NodeError::Store { dir: dir.clone(), source })?;
    let identity = Arc::new(Identity {
        datastore: host.datastore(),
        host: host.host(),
        store: store.id(),
        key: host.key().clone(),
    });
    let timing = Timing {
        lease_ms: config.replication.lease.millis(),
        stall_timeout_ms: Some(config.replication.stall_timeout.millis()),
        max_lag_bytes: config.replication.max_lag.bytes(),
        ..Timing::default()
    };
    let mut net = NetConfig::new(config.network.listen, store.id());
    net.advertise = config.network.advertise.as_ref().map(ToString::to_string);
    net.addresses = config.peers.iter().map(|(name, at)| (name.to_string(), at.to_string())).collect();
    net.roles = roles;
    net.addresses = config.peers.iter().map(|(n, a)| (n.as_str().to_owned(), a.to_string())).collect();
    let mut serial = [0; 4];
    fill_random(&mut serial);
    let first_claims_version = u64::from(u32::from_le_bytes(serial)) << 16;
    let rings = RingBudget::new(usize::try_from(config.replication.ring.bytes()).unwrap_or(usize::MAX));
    let node = Arc::new(NodeInner {
        identity,
        timing,
        store,
        network: std::sync::OnceLock::new(),
        runtime: tokio::runtime::Handle::current(),
        images: RwLock::default(),
        sessions: RwLock::default(),
        contacts: RwLock::new(HashMap::new()),
        known_stores: Mutex::default(),
        started: Instant::now(),
        // Not the same after a restart, so that nobody takes the new claims for the old ones.
        claims_version: AtomicU64::new(first_claims_version),
        rings,
        sync_server: Arc::new(SyncServer::default()),
        peer_claims: Mutex::default(),
        stopping: watch::Sender::new(false),
        slow_disk_until: AtomicU64::new(0),
        inline_syncs: super::inline::InlineSyncs::default(),
        writers: super::inline::Alone::default(),
        caller_syncs: AtomicUsize::new(0),
        refused: Mutex::default(),
        introduced: Mutex::default(),
        waiting_bytes: Mutex::default(),
        appended_bytes: AtomicU64::new(0),
        scrubs: super::scrub::Scrubs::default(),
        mount_seen: AtomicU64::new(u64::MAX),
        config,
    });
    node.load_known_stores();
    let incoming = Incoming::new();
    let handlers = Handlers {
        streams: Arc::new(Handler(incoming.clone())),
        requests: Arc::new(Handler(incoming.clone())),
    };
    let (events_in, events) = mpsc::channel(EVENTS_MAX);
    let network = Network::start(net, host, handlers, events_in).await?;
    assert!(node.network.set(network).is_ok(), "invariant: set once");
    node.take_up_images(&dir)?;
    incoming.attach(&node);
    node.spawn(node.clone().follow_network(events));
    node.spawn(node.clone().follow_clock());
    node.spawn(node.clone().follow_claims());
    let maintainer = node.clone();
    std::thread::spawn(move || maintainer.maintain());
    let scrubber = node.clone();
    std::thread::spawn(move || scrubber.scrub());
    Ok(Node(node))
}

impl NodeInner {
    fn take_up_images(self: &Arc<Self>, dir: &std::path::Path) -> Result<(), NodeError> {
        let failed = |source| NodeError::Store { dir: dir.to_owned(), source };
        for (image, why) in self.store.damaged() {
            tracing::error!(image = %image, "cannot be opened, its files are left alone: {why}");
        }
        for id in self.store.image_ids() {
            let Some(copy) = self.store.image(id) else { continue };
            let meta = self.store.get_meta(id);
            if copy.head().seq.0 == 0 && meta.is_none() {
                // Power was cut before its first update was durable: nobody was told that it exists.
                self.store.remove_image(id).map_err(failed)?;
                continue;
            }
            let (kind, state, cut_off) = (copy.kind(), (*copy.state()).clone(), copy.cut_off());
            let mut damaged = None;
            self.admit(copy, |env, identity, timing, out| {
                let meta = meta.as_ref().map(|m| m.as_slice());
                let recovered =
                    Machine::recover(env, identity.clone(), timing.clone(), kind, state, cut_off, meta, out);
                recovered.unwrap_or_else(|e| {
                    damaged = Some(e);
                    Machine::blank(env, identity, timing, id, kind, out)
                })
            });
            if let Some(source) = damaged {
                return Err(NodeError::Promises { dir: dir.to_owned(), image: id, source });
            }
        }
        Ok(())
    }

    /// Makes the machine of a copy and carries out its first outputs.
    pub(super) fn admit(
        self: &Arc<Self>,
        copy: Arc<ImageStore>,
        make: impl FnOnce(&mut Env<'_>, Arc<Identity>, Timing, &mut Vec<Output>) -> Machine,
    ) -> Arc<Image> {
        let mut out = Vec::new();
        let machine =
            self.with_store_env(&copy, |env| make(env, self.identity.clone(), self.timing.clone(), &mut out));
        let image = Image::new(self, copy, machine);
        self.images.write().insert(image.id, image.clone());
        image.locked(|_, _, all| *all = out);
        self.introduce(&image);
        self.claims_changed();
        image
    }
}

impl Node {
    /// Makes what was appended durable here, tells peers, and stops. Owners' next start is an election
    /// as after any stop.
    pub async fn stop(&self) {
        self.stopping.send_replace(true);
        let images = self.images();
        let sync = tokio::task::spawn_blocking(move || {
            for image in images {
                if let Err(e) = image.store.sync().and_then(|_| image.store.checkpoint()) {
                    tracing::warn!(image = %image.id, "not everything is durable at the stop: {e}");
                }
            }
        });
        if tokio::time::timeout(STOP_GRACE, sync).await.is_err() {
            tracing::warn!("stopping without waiting longer for the disk");
        }
        self.network().shutdown().await;
    }
}
