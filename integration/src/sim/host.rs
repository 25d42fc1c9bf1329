//! One host: its disk, and what runs on it while it is up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmfs_common::Digest;
use vmfs_common::identity::HostKey;
use vmfs_common::policy::{Member, MemberRole};
use vmfs_common::{DatastoreId, Epoch, HostId, ImageId, Millis, StoreId};
use vmfs_proto::{Contact, Identity, Machine};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Scrub, Store, StoreConfig, View};

use super::At;
use super::blocksync::Pull;
use super::line::Line;
use super::link::Us;
use super::model::Ix;

/// The one datastore.
pub(crate) const DATASTORE: DatastoreId = DatastoreId::from_bytes([0xdd; 16]);
/// The one image.
pub(crate) const IMAGE: ImageId = ImageId::from_bytes([0x11; 16]);

/// A store so small that segments, checkpoints and trimming come often.
pub(crate) fn store_config() -> StoreConfig {
    StoreConfig {
        segment_bytes_max: 128 << 10,
        checkpoint_log_bytes: 96 << 10,
        reserve_bytes: 256 << 10,
        retain_log_bytes_max: 384 << 10,
        gather_after_rounds: 3,
        pool_segments: 1,
        idle_bytes_max: 1 << 20,
        map_cache_bytes: 256 << 10,
        open_files_max: 16,
        recovery_threads: 1,
    }
}

/// The image on a running host.
pub(crate) struct Copy {
    pub(crate) store: Arc<ImageStore>,
    /// Absent only while it is called.
    pub(crate) machine: Option<Machine>,
    pub(crate) lines: BTreeMap<At, Line>,
    /// The newest meta record not yet written, and whether a writer is at work.
    pub(crate) meta_next: Option<(u64, Vec<u8>)>,
    pub(crate) meta_writing: bool,
    pub(crate) pull: Option<Pull>,
    /// A scrub under way.
    pub(crate) scrub: Option<Scrub>,
    pub(crate) tick_at: Option<Us>,
    /// A pinned state, and which.
    pub(crate) pinned: Option<(View, Ix)>,
}

/// What runs while a host is up.
pub(crate) struct Running {
    pub(crate) store: Arc<Store>,
    pub(crate) contacts: BTreeMap<HostId, Contact>,
    pub(crate) copy: Option<Copy>,
}

/// What the oracles know of a store, whatever happens to the process.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The last update known to be durable and not cut since.
    pub(crate) durable: Ix,
    /// Where the last block-level sync ended.
    pub(crate) copied: Ix,
    /// A cut down to here was begun: the power may fail before or after it takes effect.
    pub(crate) cutting: Option<Ix>,
    /// The last change of the rule that this host made as the owner.
    pub(crate) rule_since: Ix,
    /// Forks that must be listed until somebody drops them.
    pub(crate) forks: BTreeSet<String>,
    /// The meta record last written with success, and one that may have been written after it.
    pub(crate) meta: Option<Vec<u8>>,
    pub(crate) meta_maybe: Option<Vec<u8>>,
    /// When each other host was last heard about the image, on this host's wall clock.
    pub(crate) heard_ns: BTreeMap<HostId, u64>,
    /// The highest ballot voted for: its proposal and head.
    pub(crate) vote: Option<(Epoch, Digest, vmfs_common::Head)>,
}

/// One host.
pub(crate) struct Host {
    pub(crate) id: Arc<Identity>,
    pub(crate) role: MemberRole,
    pub(crate) disk: SimDisk,
    pub(crate) running: Option<Running>,
    /// Grows with every start and stop: events of an older one are void.
    pub(crate) life: u64,
    pub(crate) clock_offset_ms: u64,
    pub(crate) wall_skew_ns: u64,
    /// The disk stops at this call: then the power is cut.
    pub(crate) stop_call: Option<u64>,
    /// Some call fails, some sync fails, the disk is nearly full.
    pub(crate) faulty: bool,
    pub(crate) full: bool,
    /// The disk loses, misplaces and alters what was written, now and then.
    pub(crate) bad_disk: bool,
    /// The host says what is not so.
    pub(crate) liar: bool,
    pub(crate) known: Known,
}

/// A host's key follows from its index.
pub(crate) fn key(at: At) -> HostKey {
    let byte = u8::try_from(at + 1).expect("invariant: few hosts");
    HostKey::from_seed([byte; 32])
}

/// A store id follows from the host and how often it was wiped.
pub(crate) fn identity(at: At, wipes: u8) -> Arc<Identity> {
    let key = key(at);
    let byte = u8::try_from(at + 1).expect("invariant: few hosts");
    let mut store = [byte; 16];
    store[0] = wipes;
    Arc::new(Identity { datastore: DATASTORE, host: key.host_id(), store: StoreId::from_bytes(store), key })
}

impl Host {
    pub(crate) fn new(at: At, role: MemberRole, clock_offset_ms: u64) -> Self {
        Self {
            id: identity(at, 0),
            role,
            disk: SimDisk::new(1 << 30),
            running: None,
            life: 0,
            clock_offset_ms,
            wall_skew_ns: 1_700_000_000_000_000_000,
            stop_call: None,
            faulty: false,
            full: false,
            bad_disk: false,
            liar: false,
            known: Known::default(),
        }
    }
    pub(crate) fn member(&self) -> Member {
        Member { host: self.id.host, store: self.id.store, key: self.id.key.public(), role: self.role }
    }
    pub(crate) fn now(&self, now: Us) -> Millis {
        Millis(now / 1000 + self.clock_offset_ms)
    }
    pub(crate) fn copy(&self) -> Option<&Copy> {
        self.running.as_ref()?.copy.as_ref()
    }
    pub(crate) fn copy_mut(&mut self) -> Option<&mut Copy> {
        self.running.as_mut()?.copy.as_mut()
    }
    pub(crate) fn machine(&self) -> Option<&Machine> {
        self.copy()?.machine.as_ref()
    }
    /// What it says it holds is there, also after a restart.
    pub(crate) const fn is_sound(&self) -> bool {
        !self.bad_disk && !self.liar
    }
    /// The disk was made to fail, so that errors of the store are no surprise.
    pub(crate) fn is_excused(&self) -> bool {
        self.faulty || self.full || self.bad_disk || self.has_stopped()
    }
    /// True when the disk has come to the call at which the power fails.
    pub(crate) fn has_stopped(&self) -> bool {
        self.stop_call.is_some_and(|n| self.disk.calls() > n)
    }
}
