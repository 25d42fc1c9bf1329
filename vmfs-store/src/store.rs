//! The store: one directory, its images, its metadata.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{DatastoreId, HostId, ImageId, Seq, StoreId};
use zeroize::Zeroizing;

use crate::append::mark_name;
use crate::checkpointing::{Checkpoints, Commit};
use crate::compact::Job;
use crate::config::StoreConfig;
use crate::disk::Disk;
use crate::error::{IoContext as _, StoreError};
use crate::files::{Files, map_copy_name, map_name};
use crate::identity::{self, Identity};
use crate::image::ImageStore;
use crate::log::Tail;
use crate::map::cache::PageCache;
use crate::map::tree::{Base, FreePages};
use crate::map::{Content, Segments};
use crate::meta::Meta;
use crate::pool::{Pool, Reserve};
use crate::recover::{Candidate, Claims, Loaded, recover};
use crate::rot::{Ledger, Rot};
use crate::segment::{Class, Kind, Segment, SegmentHeader, file_name};
use crate::shared::{Generations, Indexes, Shared};
use crate::way::Way;

/// Ends the name of a map file whose image does not exist yet.
const NEW_SUFFIX: &str = ".new";

/// One host's store. Cheap to share; every method may be called from any thread.
pub struct Store {
    shared: Arc<Shared>,
    meta: Meta,
    images: RwLock<BTreeMap<ImageId, Arc<ImageStore>>>,
    /// Held while an image is made or removed, so that `images` is locked for moments only.
    changing: Mutex<()>,
    damaged: Mutex<Vec<(ImageId, String)>>,
    /// Segments of removed images, once nobody reads them.
    limbo: Mutex<Vec<Arc<Segment>>>,
    /// Calls of [`Store::compact`], which begins with another image each time.
    turns: AtomicUsize,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl Store {
    /// True when `disk` holds a store.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn exists(disk: &dyn Disk) -> Result<bool, StoreError> {
        identity::exists(disk)
    }
    /// Makes an empty store. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::StoreExists`], or the disk's.
    pub fn create(
        disk: Arc<dyn Disk>,
        datastore: DatastoreId,
        host: HostId,
        id: StoreId,
        cfg: StoreConfig,
    ) -> Result<Arc<Self>, StoreError> {
        identity::create(&*disk, &Identity { store: id, host, datastore })?;
        Self::open(disk, datastore, host, cfg)
    }
    /// Opens a store and recovers its images: on return every reported head is durable.
    ///
    /// # Errors
    /// [`StoreError::NoStore`], [`StoreError::WrongHost`], [`StoreError::WrongDatastore`],
    /// [`StoreError::Version`], [`StoreError::Corrupt`], or the disk's.
    pub fn open(
        disk: Arc<dyn Disk>,
        datastore: DatastoreId,
        host: HostId,
        cfg: StoreConfig,
    ) -> Result<Arc<Self>, StoreError> {
        let rot = Ledger::default();
        let identity = identity::read(&*disk)?;
        if identity.host != host {
            return Err(StoreError::WrongHost { expected: host, found: identity.host });
        }
        if identity.datastore != datastore {
            return Err(StoreError::WrongDatastore { expected: datastore, found: identity.datastore });
        }
        let first_generation = identity::take_generations(&*disk, &rot)?;
        identity::mend(&*disk, &rot)?;
        let shared = Arc::new(Shared {
            files: Files::new(Arc::clone(&disk), cfg.open_files_max),
            pages: PageCache::new(cfg.map_cache_bytes),
            disk,
            store: identity.store,
            pool: Pool::default(),
            reserve: Reserve::default(),
            indexes: Indexes::default(),
            generations: Generations::starting(first_generation),
            rot,
            dirty_map_bytes: AtomicU64::new(0),
            way: Way::default(),
            cfg,
        });
        shared.reserve.load(&shared)?;
        let meta = Meta::open(&shared)?;
        let opened = Opening::scan(&shared)?.recover(&shared)?;
        shared.reserve.refill(&shared)?;
        Ok(Arc::new(Self {
            shared,
            meta,
            images: RwLock::new(opened.images),
            changing: Mutex::default(),
            damaged: Mutex::new(opened.damaged),
            limbo: Mutex::default(),
            turns: AtomicUsize::new(0),
        }))
    }
    /// The store's identity.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.shared.store
    }
    /// Every usable image, ordered.
    #[must_use]
    pub fn image_ids(&self) -> Vec<ImageId> {
        self.images.read().keys().copied().collect()
    }
    /// Images that could not be opened, and why: damage, another version, no space, a failing disk.
    /// Their files are left alone.
    #[must_use]
    pub fn damaged(&self) -> Vec<(ImageId, String)> {
        self.damaged.lock().clone()
    }
    /// Bytes that data may still take: free space of the disk without the reserve.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        let free = self.shared.disk.free_bytes().unwrap_or(0);
        free.saturating_sub(self.shared.cfg.reserve_bytes / 4)
    }
    /// Makes an empty image. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::ImageExists`], [`StoreError::Full`], or the disk's.
    pub fn create_image(&self, id: ImageId, kind: MemberRole) -> Result<Arc<ImageStore>, StoreError> {
        let _changing = self.changing.lock();
        if self.images.read().contains_key(&id) || self.damaged.lock().iter().any(|(d, _)| *d == id) {
            return Err(StoreError::ImageExists(id));
        }
        let (name, new) = (map_name(id), map_name(id) + NEW_SUFFIX);
        let what = || format!("creating {name}");
        let disk = &self.shared.disk;
        let file = disk.open(&new, true).during(what)?;
        file.set_len(0).during(what)?;
        self.shared.files.adopt_map(id, Arc::clone(&file));
        let image = Arc::new(self.empty_image(id, kind));
        let made = image
            .first_checkpoint()
            .and_then(|()| disk.rename(&new, &name).during(what))
            .and_then(|()| disk.sync_names("map").during(what));
        if let Err(e) = made {
            self.shared.files.forget_map(id);
            disk.remove(&new).during(what)?;
            disk.remove(&name).during(what)?;
            return Err(e);
        }
        self.images.write().insert(id, Arc::clone(&image));
        Ok(image)
    }
    fn empty_image(&self, id: ImageId, kind: MemberRole) -> ImageStore {
        let tail = Tail::new(ImageState::new(id));
        let content = Content::empty(Arc::new(Base::empty(id)));
        let shared = Arc::clone(&self.shared);
        ImageStore::assemble(shared, id, kind, tail, content, Checkpoints::default(), Seq::ZERO)
    }
    /// The image, when it is here.
    #[must_use]
    pub fn image(&self, id: ImageId) -> Option<Arc<ImageStore>> {
        self.images.read().get(&id).map(Arc::clone)
    }
    /// Removes an image and its forks, also a damaged one. Durable on return. Its space returns once
    /// nobody reads it. Metadata under its id stays.
    ///
    /// # Errors
    /// [`StoreError::NoImage`], or the disk's.
    pub fn remove_image(&self, id: ImageId) -> Result<(), StoreError> {
        let _changing = self.changing.lock();
        let image = self.images.write().remove(&id);
        let was_damaged = {
            let mut damaged = self.damaged.lock();
            let before = damaged.len();
            damaged.retain(|(d, _)| *d != id);
            damaged.len() < before
        };
        if image.is_none() && !was_damaged {
            return Err(StoreError::NoImage(id));
        }
        let what = || format!("removing {}", map_name(id));
        let segments = image.map_or_else(Segments::default, |i| i.retire());
        self.shared.files.forget_map(id);
        self.shared.disk.remove(&mark_name(id)).during(what)?;
        self.shared.disk.remove(&map_name(id)).during(what)?;
        self.shared.disk.remove(&map_copy_name(id)).during(what)?;
        self.shared.disk.sync_names("map").during(what)?;
        self.shared.pages.purge(id);
        self.shared.rot.forget(id);
        self.limbo.lock().extend(segments.values().map(Arc::clone));
        drop(segments);
        self.recycle()
    }
    fn recycle(&self) -> Result<(), StoreError> {
        let mut limbo = self.limbo.lock();
        let mut waiting = Vec::new();
        for seg in std::mem::take(&mut *limbo) {
            if Arc::strong_count(&seg) > 1 {
                waiting.push(seg);
            } else {
                self.shared.pool.give_back(&self.shared, &seg)?;
            }
        }
        *limbo = waiting;
        Ok(())
    }
    /// Stores a small value (at most 1 MiB) under `key`, replacing the one before. Atomic, and
    /// durable on return; concurrent calls share one device flush. The value may be secret.
    ///
    /// # Errors
    /// The disk's; then the store takes no more metadata until it is reopened.
    pub fn put_meta(&self, key: ImageId, bytes: &[u8]) -> Result<(), StoreError> {
        self.meta.change(&self.shared, key, Some(bytes))
    }
    /// The value under `key`.
    #[must_use]
    pub fn get_meta(&self, key: ImageId) -> Option<Zeroizing<Vec<u8>>> {
        self.meta.get(key)
    }
    /// Every key that has a value, ordered.
    #[must_use]
    pub fn meta_keys(&self) -> Vec<ImageId> {
        self.meta.keys()
    }
    /// Forgets the value under `key`. Durable on return.
    ///
    /// # Errors
    /// As [`Store::put_meta`].
    pub fn remove_meta(&self, key: ImageId) -> Result<(), StoreError> {
        self.meta.change(&self.shared, key, None)
    }
    /// Damage found in what all images share: the store's identity and its metadata.
    #[must_use]
    pub fn rot(&self) -> Rot {
        self.shared.rot.get(None)
    }
    /// Notes damage to something else on the same disk, which has been repaired.
    pub fn note_mended(&self, what: &str) {
        self.shared.rot.found_and_repaired(None, what, "from its second copy");
    }
    /// Looks at what all images share (identity, metadata), a few pages, and repairs what is damaged.
    ///
    /// # Errors
    /// The disk's, or damage in both copies of something.
    pub fn scrub_shared(&self) -> Result<(), StoreError> {
        self.shared.rot.begin_pass(None);
        identity::mend(&*self.shared.disk, &self.shared.rot)?;
        self.meta.scrub(&self.shared)?;
        self.shared.rot.end_pass(None);
        Ok(())
    }
    /// Does background work worth about `budget_bytes` of I/O: checkpoints that are due, recycling,
    /// prewriting segments. To be called from one thread, about ten times a second while writes go
    /// on. True when there is more to do. While guests flush it does little at a time and rests in between, so
    /// that they need not wait for much of it.
    ///
    /// # Errors
    /// The disk's. What was not done stays due.
    pub fn background(&self, budget_bytes: u64) -> Result<bool, StoreError> {
        let images: Vec<_> = self.images.read().values().map(Arc::clone).collect();
        self.shared.way.begin(self.is_bloated(&images));
        let mut first_error = None;
        for image in images {
            let dirty = self.shared.dirty_map_bytes.load(Ordering::Relaxed);
            if let Err(e) = image.background(dirty > self.shared.cfg.map_cache_bytes / 2) {
                tracing::warn!(image = %image.id(), error = %e, "background work failed");
                first_error.get_or_insert(e);
            }
        }
        self.recycle()?;
        self.meta.compact(&self.shared)?;
        self.shared.reserve.refill(&self.shared)?;
        let more = self.shared.pool.background(&self.shared, budget_bytes)?;
        first_error.map_or(Ok(more), Err)
    }
    /// What lies dead takes so much that giving it back is worth more than quick flushes: an image's segments take
    /// more than 2.25 times its data and 128 MiB, or the disk is nearly full. As the last call of
    /// [`Store::background`] or [`Store::compact`] found it.
    #[must_use]
    pub fn was_bloated(&self) -> bool {
        self.shared.way.is_hurried()
    }
    fn is_bloated(&self, images: &[Arc<ImageStore>]) -> bool {
        self.shared.is_tight() || images.iter().any(|image| image.space_use().is_bloated())
    }

    /// Copies what is left of sparse segments together, about `budget_bytes` of it, so that they can be given
    /// back: [`Store::background`] does that, with the next checkpoints. When there is nothing of that kind to do,
    /// blocks of images at rest that are scattered are copied together, so that reading them in order is fast
    /// again. To be called from the same thread as it. Returns how much of the budget was used; 0 when there is
    /// nothing to do now.
    ///
    /// # Errors
    /// The disk's. No image is changed by what failed.
    pub fn compact(&self, budget_bytes: u64) -> Result<u64, StoreError> {
        let mut images: Vec<_> = self.images.read().values().map(Arc::clone).collect();
        self.shared.way.begin(self.is_bloated(&images));
        let turn = self.turns.fetch_add(1, Ordering::AcqRel) % images.len().max(1);
        images.rotate_left(turn);
        let (mut used, mut first_error) = (0, None);
        for work in [ImageStore::compact, ImageStore::gather] {
            for image in &images {
                if used >= budget_bytes {
                    break;
                }
                match work(image, budget_bytes - used) {
                    Ok(n) => used += n,
                    Err(e) => {
                        tracing::warn!(image = %image.id(), error = %e, "compaction failed");
                        first_error.get_or_insert(e);
                    }
                }
            }
            // Space goes before speed.
            if used > 0 || first_error.is_some() {
                break;
            }
        }
        first_error.map_or(Ok(used), Err)
    }
}

impl ImageStore {
    fn first_checkpoint(&self) -> Result<(), StoreError> {
        let mut ck = self.checkpoints.lock();
        let base = Arc::clone(&self.map.read().content.base);
        ck.register(&base);
        let state = Arc::clone(&self.tail.lock().state);
        let moment = self.moment(state, None, Arc::default(), Seq(1));
        let segments = Segments::default();
        let commit =
            Commit { moment: &moment, base: &base, forks: &[], victims: vec![0], segments: &segments };
        let mut free = FreePages::new();
        self.commit(&mut ck, &mut free, &commit)?;
        // A body of its own, so that a new image does not hang on one page either.
        self.commit(&mut ck, &mut free, &Commit { victims: vec![1], ..commit }).map(|_| ())
    }
    /// Stops the image for good and gives up its segments.
    fn retire(&self) -> Segments {
        let _ = self.latch.set("it was removed".into());
        let job = self.compaction.lock().job.take();
        let mut ck = self.checkpoints.lock();
        ck.limbo.extend(job.map(Job::into_target));
        let excluded = self.exclude_syncs();
        let mut tail = self.tail.lock();
        self.forks.lock().clear();
        tail.chain = Arc::default();
        tail.closing.clear();
        tail.current = None;
        *ck = Checkpoints { limbo: std::mem::take(&mut ck.limbo), ..Checkpoints::default() };
        let mut map = self.map.write();
        map.content.frozen = None;
        let mut segments = std::mem::take(&mut map.content.segments);
        Arc::make_mut(&mut segments).extend(ck.limbo.drain(..).map(|s| (s.no, s)));
        drop((map, tail, excluded, ck));
        segments
    }
}

/// What is found in the directory when a store is opened.
struct Opening {
    loaded: Vec<Loaded>,
    damaged: Vec<(ImageId, String)>,
    candidates: BTreeMap<ImageId, Vec<Candidate>>,
    images: BTreeMap<ImageId, Arc<ImageStore>>,
}

impl Opening {
    fn scan(shared: &Shared) -> Result<Self, StoreError> {
        let mut this = Self {
            loaded: Vec::new(),
            damaged: Vec::new(),
            candidates: BTreeMap::new(),
            images: BTreeMap::new(),
        };
        for name in shared.disk.list("map").during(|| "listing maps".into())? {
            if name.ends_with(NEW_SUFFIX) {
                // A creation that was interrupted.
                shared.disk.remove(&format!("map/{name}")).during(|| format!("removing {name}"))?;
            }
            let Ok(image) = name.parse::<ImageId>() else { continue };
            match Loaded::read(shared, image) {
                Ok(loaded) => this.loaded.push(loaded),
                Err(e) => this.damage(image, &e),
            }
        }
        this.scan_segments(shared)?;
        Ok(this)
    }
    /// Keeps an image that cannot be opened aside, so that the others can be.
    fn damage(&mut self, image: ImageId, e: &StoreError) {
        tracing::error!(%image, error = %e, "image cannot be opened");
        self.damaged.push((image, e.to_string()));
    }
    fn scan_segments(&mut self, shared: &Shared) -> Result<(), StoreError> {
        let (unsure, sure): (Vec<_>, Vec<_>) = self.loaded.iter().partition(|l| l.is_fallback());
        let in_use: BTreeSet<u32> = sure.into_iter().flat_map(Loaded::listed).map(|(no, _)| no).collect();
        let perhaps: BTreeSet<(u32, u64)> = unsure.iter().copied().flat_map(Loaded::listed).collect();
        let own: BTreeSet<(u32, u64)> = unsure.into_iter().flat_map(Loaded::own).collect();
        let known: BTreeSet<ImageId> = self.loaded.iter().map(|l| l.image).collect();
        let highest = in_use.iter().copied().chain(perhaps.iter().map(|(no, _)| *no)).max();
        let mut next_no = highest.map_or(0, |n| n + 1);
        let mut unused = Vec::new();
        for name in shared.disk.list("seg").during(|| "listing segments".into())? {
            let Ok(no) = name.parse::<u32>() else { continue };
            if name.len() != 10 {
                continue;
            }
            next_no = next_no.max(no + 1);
            if in_use.contains(&no) {
                continue;
            }
            let file = shared.disk.open(&file_name(no), false).during(|| format!("opening {name}"))?;
            let header = SegmentHeader::read(no, &*file)?.filter(|h| h.store == shared.store);
            // Still what the checkpoint lists, unless its header says that it has been used again.
            let listed = perhaps.range((no, 0)..=(no, u64::MAX)).next_back();
            let is_kept =
                |h: &SegmentHeader, listed: u64| h.generation < listed || own.contains(&(no, h.generation));
            if listed.is_some_and(|(_, listed)| header.as_ref().is_none_or(|h| is_kept(h, *listed))) {
                continue;
            }
            match header {
                Some(header) if known.contains(&header.image) => {
                    self.candidates.entry(header.image).or_default().push(Candidate { no, header });
                }
                Some(h) if self.damaged.iter().any(|(d, _)| *d == h.image) => {}
                // One that was being removed is shorter.
                Some(h) => {
                    let len = file.len_bytes().during(|| format!("opening {name}"))?;
                    unused.push((no, h.class, h.kind == Kind::Pool && len == h.class.bytes()));
                }
                // It may be one of an image that cannot be opened.
                None if !self.damaged.is_empty() => {}
                None => {
                    let len = file.len_bytes().during(|| format!("opening {name}"))?;
                    let exact = Class::ALL.into_iter().find(|c| c.bytes() == len);
                    unused.push((no, exact.unwrap_or(Class::SMALLEST), false));
                }
            }
        }
        shared.pool.load(next_no, unused);
        Ok(())
    }
    fn recover(mut self, shared: &Arc<Shared>) -> Result<Self, StoreError> {
        let mut claims = Claims::new();
        for (no, generation) in self.loaded.iter().flat_map(Loaded::listed) {
            let latest = claims.entry(no).or_default();
            *latest = generation.max(*latest);
        }
        let jobs: Vec<_> = std::mem::take(&mut self.loaded)
            .into_iter()
            .map(|l| {
                let candidates = self.candidates.remove(&l.image).unwrap_or_default();
                Mutex::new(Some((l, candidates)))
            })
            .collect();
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let work = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::AcqRel)) {
                if let Some((loaded, candidates)) = job.lock().take() {
                    let image = loaded.image;
                    let result = recover(shared, loaded, candidates, &claims);
                    results.lock().push((image, result));
                }
            }
        };
        let threads = shared.cfg.recovery_threads.min(jobs.len());
        if threads <= 1 {
            work();
        } else {
            std::thread::scope(|s| {
                for _ in 0..threads {
                    s.spawn(work);
                }
            });
        }
        let mut results = results.into_inner();
        results.sort_by_key(|(image, _)| *image);
        for (id, result) in results {
            match result {
                Ok(r) => {
                    for (no, class) in r.unused {
                        shared.pool.give_back_no(shared, no, class, false)?;
                    }
                    self.images.insert(id, r.image);
                }
                Err(e) => self.damage(id, &e),
            }
        }
        Ok(self)
    }
}
