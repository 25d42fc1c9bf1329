//! Recovery of one image: the newest readable checkpoint, then every update after it that chains.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::header::Update;
use vmfs_common::policy::MemberRole;
use vmfs_common::{Head, ImageId, Seq};

use crate::append::mark_name;
use crate::checkpoint::{Body, Found, SegmentRow, is_slot_blank, read_slot, write_super};
use crate::checkpointing::{Checkpoints, Slot};
use crate::error::{IoContext as _, StoreError};
use crate::fork::Fork;
use crate::image::{ImageStore, Space};
use crate::log::{ChainSegment, Tail, walk};
use crate::map::Content;
use crate::map::overlay::Overlay;
use crate::map::tree::Base;
use crate::records::{Next, Record, Records};
use crate::scrub::segments::complete_pairs;
use crate::segment::{Class, Kind, Segment, SegmentHeader, file_name};
use crate::shared::Shared;
use crate::writer::{LogPos, RecordKind};

/// A segment file that names the image in its header.
#[derive(Clone)]
pub(crate) struct Candidate {
    pub(crate) no: u32,
    pub(crate) header: SegmentHeader,
}

/// Of every segment that the checkpoints of any image list, by number: the latest use, as its generation.
pub(crate) type Claims = BTreeMap<u32, u64>;

/// An image's checkpoints as read, before its log is.
pub(crate) struct Loaded {
    pub(crate) image: ImageId,
    slots: [Option<Found>; 2],
}

/// A checkpoint's name in messages.
pub(crate) fn checkpoint_name(slot: usize) -> String {
    format!("checkpoint {slot}")
}

impl Loaded {
    /// # Errors
    /// [`StoreError::Corrupt`] when neither checkpoint is readable, another version, or the disk's.
    pub(crate) fn read(shared: &Shared, image: ImageId) -> Result<Self, StoreError> {
        let file = shared.files.map(image)?;
        if !marked(shared, image)? {
            // One whose sync failed is not on the disk, and what it no longer needs will be used again.
            file.forget(0..2).during(|| format!("reading the map of image {image}"))?;
        }
        let slot = |i| read_slot(shared.store, image, &*file, i);
        let slots = [slot(0)?, slot(1)?];
        if slots.iter().all(Option::is_none) {
            return Err(StoreError::corrupt(format!("the map of image {image}")));
        }
        for (i, found) in slots.iter().enumerate() {
            if found.is_none() && !is_slot_blank(image, &*file, i)? {
                shared.rot.found(Some(image), &checkpoint_name(i));
            }
        }
        Ok(Self { image, slots })
    }
    fn newest(&self) -> &Found {
        let found = self.slots.iter().flatten().max_by_key(|f| f.number);
        found.expect("invariant: read has checked that there is one")
    }
    /// Makes sure that the superblocks read are the ones on the disk: after a failed sync they may
    /// be in the page cache alone. What they refer to was synced before.
    fn rewrite_superblocks(&self, shared: &Shared) -> Result<(), StoreError> {
        let file = shared.files.map(self.image)?;
        for (i, found) in self.slots.iter().enumerate() {
            if let Some(f) = found {
                write_super(shared.store, self.image, &*file, i, f.number, &f.at)?;
            }
        }
        file.sync().during(|| format!("syncing the map of image {}", self.image))
    }
    /// A superblock could not be read, which may have been that of a later checkpoint.
    pub(crate) fn is_fallback(&self) -> bool {
        self.slots.iter().any(Option::is_none)
    }
    /// Numbers and generations of the segments that the newest checkpoint lists. After a fall-back, those that
    /// it lists for their log alone may have been used again since, also by another image.
    pub(crate) fn listed(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        let forks = self.newest().body.forks.iter().flat_map(|f| &f.chain).map(|r| (r.no, r.generation));
        self.own().chain(forks)
    }
    /// The same, without those of forks alone: a fork that was cut off after the checkpoint shares its first one with
    /// the log that goes on from there.
    pub(crate) fn own(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.newest().body.segments.iter().map(|r| (r.no, r.generation))
    }
}

/// What a recovery found beside the image.
pub(crate) struct Recovered {
    pub(crate) image: Arc<ImageStore>,
    /// Segments named for the image and not part of it.
    pub(crate) unused: Vec<(u32, Class)>,
}

/// A piece of the path that the log takes after the checkpoint.
struct Step {
    part: ChainSegment,
    pos: Option<LogPos>,
}

/// What was read from a path.
struct Tale {
    updates: Vec<(Arc<Segment>, Record, Update)>,
    /// Number of `updates` before each step after the first.
    head: Head,
    /// Highest update known to have been durable.
    durable: Seq,
    /// The last step reached.
    step: usize,
    end: Option<LogPos>,
    torn: bool,
}

/// Recovers an image. On return its head is durable.
///
/// # Errors
/// [`StoreError::Corrupt`], or the disk's.
pub(crate) fn recover(
    shared: &Arc<Shared>,
    loaded: Loaded,
    candidates: Vec<Candidate>,
    claims: &Claims,
) -> Result<Recovered, StoreError> {
    let newest = loaded.newest();
    let body = &newest.body;
    let fallback = loaded.is_fallback();
    let segments = segments_of(shared, body, fallback, claims)?;
    let chain = chain_of(body, &segments);
    let own: BTreeSet<(u32, u64)> = loaded.own().collect();
    let mut later: BTreeMap<u64, Candidate> = BTreeMap::new();
    let mut unused = Vec::new();
    for c in candidates {
        if own.contains(&(c.no, c.header.generation)) {
            continue;
        }
        if c.header.kind == Kind::Log && c.header.generation >= body.gen_mark {
            later.insert(c.header.generation, c);
        } else {
            unused.push((c.no, c.header.class));
        }
    }
    unused.extend(later.values().map(|c| (c.no, c.header.class)));
    let marked = marked(shared, loaded.image)?;
    let mut settled = BTreeSet::new();
    let (tale, path, torn) = loop {
        let (tale, path) = choose_path(shared, body, &chain, &later)?;
        let on_path: BTreeSet<u32> = path.iter().map(|s| s.part.seg.no).collect();
        let torn = tale.torn || later.values().any(|c| !on_path.contains(&c.no));
        let any = !tale.updates.is_empty() || torn || path.iter().any(|s| s.pos.is_none());
        if !any || on_path.is_subset(&settled) {
            break (tale, path, torn);
        }
        // Again, from what is on the disk now.
        settle(shared, &path, marked, &mut later)?;
        settled.extend(on_path);
    };
    for step in &path {
        complete_pairs(shared, loaded.image, &step.part.seg, step.pos, marked)?;
    }

    let mut rebuilt =
        Rebuild { shared, image: loaded.image, body, segments, chain, path: &path, tale: &tale };
    let image = rebuilt.assemble(&loaded)?;
    unused.retain(|(no, _)| !image.map.read().content.segments.contains_key(no));
    if fallback {
        image.checkpoint_missing.store(true, Ordering::Release);
    }
    if marked {
        loaded.rewrite_superblocks(shared)?;
        image.rewrite_tail(newest.body.state.head(), &newest.body)?;
    } else if torn {
        image.cut_now()?;
    }
    Ok(Recovered { image, unused })
}

/// The segments that the checkpoint lists. After a fall-back to an older checkpoint each is checked:
/// one that was only wanted for its log may have been recycled since.
fn segments_of(
    shared: &Shared,
    body: &Body,
    fallback: bool,
    claims: &Claims,
) -> Result<BTreeMap<u32, Arc<Segment>>, StoreError> {
    let mut segments = BTreeMap::new();
    for r in body.segments.iter().chain(body.forks.iter().flat_map(|f| &f.chain)) {
        if fallback && !segments.contains_key(&r.no) && !is_still_there(shared, r, claims)? {
            continue;
        }
        segments
            .entry(r.no)
            .or_insert_with(|| Arc::new(Segment::new(r.no, r.class, r.generation, r.prepared)));
    }
    Ok(segments)
}

/// Whether a segment that an older checkpoint lists is still what it was. A later generation in its header says that it
/// was used again. A header in neither copy does not, and one of an earlier use does not either: the disk has lost that of
/// this one. Then it is, unless somebody lists a later use, if blocks of the content are in it (which the checkpoint after
/// this one has kept) or its first header page is of this use.
fn is_still_there(shared: &Shared, row: &SegmentRow, claims: &Claims) -> Result<bool, StoreError> {
    let file = match shared.files.segment(row.no) {
        Ok(file) => file,
        Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(false);
        }
        Err(e) => return Err(e),
    };
    if let Some(header) = SegmentHeader::read(row.no, &*file)?
        && header.generation >= row.generation
    {
        return Ok(header.generation == row.generation);
    }
    if claims.get(&row.no).is_some_and(|latest| *latest > row.generation) {
        return Ok(false);
    }
    let seg = Segment::new(row.no, row.class, row.generation, false);
    Ok(row.live > 0 || Records::from_start(shared, &seg)?.position().is_some())
}

fn chain_of(body: &Body, segments: &BTreeMap<u32, Arc<Segment>>) -> Vec<ChainSegment> {
    let mut rows: Vec<&SegmentRow> = body.segments.iter().filter(|r| r.in_chain).collect();
    rows.sort_by_key(|r| r.ordinal);
    // What comes before a missing one is no longer a log.
    let first = rows.iter().rposition(|r| !segments.contains_key(&r.no)).map_or(0, |i| i + 1);
    let part = |r: &&SegmentRow| ChainSegment {
        seg: Arc::clone(&segments[&r.no]),
        ordinal: r.ordinal,
        start_seq: r.start_seq,
    };
    rows[first..].iter().map(part).collect()
}

/// Follows the newest segment that links back to the checkpoint; without one, the checkpoint's last.
fn choose_path(
    shared: &Shared,
    body: &Body,
    chain: &[ChainSegment],
    later: &BTreeMap<u64, Candidate>,
) -> Result<(Tale, Vec<Step>), StoreError> {
    let first = |chain: &[ChainSegment]| {
        let last = chain.last()?;
        let pos = body.pos.filter(|p| p.generation == last.seg.generation)?;
        Some(Step { part: last.clone(), pos: Some(pos) })
    };
    let last_generation = chain.last().map_or(0, |c| c.seg.generation);
    for newest in later.values().rev() {
        let mut back = vec![newest];
        while let Some(c) = later.get(&back[back.len() - 1].header.prev_generation) {
            if c.header.generation >= back[back.len() - 1].header.generation {
                break;
            }
            back.push(c);
        }
        if back[back.len() - 1].header.prev_generation != last_generation {
            continue;
        }
        let links: Vec<Head> = back.iter().rev().map(|c| c.header.link).collect();
        let mut path: Vec<Step> = Vec::new();
        // Without a position nothing after the checkpoint is in its last segment.
        path.extend(first(chain));
        let skip = path.len();
        path.extend(back.iter().rev().map(|c| Step { part: part_of(c), pos: None }));
        if let Some(tale) = follow(shared, body, &path, &links, skip)? {
            return Ok((tale, path));
        }
    }
    let path: Vec<Step> = first(chain).into_iter().collect();
    let tale = follow(shared, body, &path, &[], path.len())?;
    Ok((tale.expect("invariant: a path without links cannot be broken"), path))
}

fn part_of(c: &Candidate) -> ChainSegment {
    let h = &c.header;
    ChainSegment {
        seg: Arc::new(Segment::new(c.no, h.class, h.generation, false)),
        ordinal: h.ordinal,
        start_seq: h.link.seq,
    }
}

/// Reads the updates along a path. `links` are the heads at which the steps from number `skip` on
/// begin; `None` when the records before one do not lead there.
fn follow(
    shared: &Shared,
    body: &Body,
    path: &[Step],
    links: &[Head],
    skip: usize,
) -> Result<Option<Tale>, StoreError> {
    let mut tale = Tale {
        updates: Vec::new(),
        head: body.state.head(),
        durable: body.state.head().seq,
        step: 0,
        end: body.pos,
        torn: false,
    };
    for (i, step) in path.iter().enumerate() {
        if i >= skip && tale.head != links[i - skip] {
            return Ok(None);
        }
        // An older tail of the same segment may have been cut off here.
        tale.durable = if i >= skip { tale.durable.min(tale.head.seq) } else { tale.durable };
        let until = links.get((i + 1).saturating_sub(skip)).filter(|_| i + 1 >= skip).copied();
        read_step(shared, step, until, &mut tale)?;
        tale.step = i;
    }
    if let Some(at) = first_torn_payload(shared, body.kind, &tale)? {
        if let Some(link) = links.last()
            && tale.updates[at].2.header.seq <= link.seq
        {
            // A later segment was begun on it. Cut there all the same: it was never acknowledged.
            tracing::warn!(seq = %tale.updates[at].2.header.seq, "payload torn before a later segment");
        }
        tale.updates.truncate(at);
        tale.head = tale.updates.last().map_or(body.state.head(), |(_, _, u)| u.head());
        tale.torn = true;
        tale.end = None;
    }
    Ok(Some(tale))
}

/// Reads one segment, up to the update `until` when the next segment begins after it.
fn read_step(shared: &Shared, step: &Step, until: Option<Head>, tale: &mut Tale) -> Result<(), StoreError> {
    let seg = &step.part.seg;
    let mut records = match step.pos {
        Some(pos) => Records::from_pos(shared, seg, pos)?,
        None => Records::from_start(shared, seg)?,
    };
    tale.torn = false;
    loop {
        tale.end = records.position();
        if until.is_some_and(|u| tale.head.seq >= u.seq) {
            break;
        }
        let record = match records.next()? {
            Next::Record(r) if r.kind == RecordKind::Update => r,
            Next::End => break,
            Next::Record(_) | Next::Torn => {
                tale.torn = true;
                break;
            }
        };
        let follows = record
            .update()
            .ok()
            .filter(|u| u.header.seq == tale.head.seq.next() && u.header.parent == tale.head.digest);
        let Some(update) = follows else {
            tale.torn = true;
            break;
        };
        tale.head = update.head();
        tale.updates.push((Arc::clone(seg), record, update));
    }
    tale.durable = tale.durable.max(Seq(records.synced_seq).min(tale.head.seq));
    Ok(())
}

/// The first update that was perhaps never durable and whose payload is not whole.
fn first_torn_payload(shared: &Shared, kind: MemberRole, tale: &Tale) -> Result<Option<usize>, StoreError> {
    if kind == MemberRole::Witness {
        return Ok(None);
    }
    for (i, (seg, record, update)) in tale.updates.iter().enumerate() {
        if update.header.seq > tale.durable && record.payload(shared, seg)?.is_none() {
            return Ok(Some(i));
        }
    }
    Ok(None)
}

/// After a plain kill the tail may be in the page cache and nowhere else: syncs it. After a failed sync that does not
/// help, since its pages look clean. Where that has left a mark, all is written again. It may not have been able to leave
/// one: forgets what looks clean, and segments whose header was lost with it.
fn settle(
    shared: &Shared,
    path: &[Step],
    marked: bool,
    later: &mut BTreeMap<u64, Candidate>,
) -> Result<(), StoreError> {
    for step in path {
        let seg = &step.part.seg;
        let file = shared.files.segment(seg.no)?;
        file.sync().during(|| format!("syncing {}", file_name(seg.no)))?;
        if marked {
            continue;
        }
        file.forget(0..u64::from(seg.class.pages())).during(|| format!("reading {}", file_name(seg.no)))?;
        let header = SegmentHeader::read(seg.no, &*file)?;
        if header.is_none_or(|h| h.generation != seg.generation) {
            later.remove(&seg.generation);
        }
    }
    shared.disk.sync_names("seg").during(|| "syncing the segment directory".into())
}

fn marked(shared: &Shared, image: ImageId) -> Result<bool, StoreError> {
    let names = shared.disk.list("mark").during(|| "listing marks".into())?;
    Ok(names.contains(&image.to_string()))
}

struct Rebuild<'a> {
    shared: &'a Arc<Shared>,
    image: ImageId,
    body: &'a Body,
    segments: BTreeMap<u32, Arc<Segment>>,
    chain: Vec<ChainSegment>,
    path: &'a [Step],
    tale: &'a Tale,
}

impl Rebuild<'_> {
    fn assemble(&mut self, loaded: &Loaded) -> Result<Arc<ImageStore>, StoreError> {
        let (body, tale) = (self.body, self.tale);
        let mut ck = Checkpoints::default();
        for (i, found) in loaded.slots.iter().enumerate() {
            let Some(f) = found else { continue };
            let base = Arc::new(base_of(self.image, &f.body));
            ck.register(&base);
            let state = Arc::clone(&f.body.state);
            ck.slots[i] = Some(Slot { number: f.number, state, base, pages: f.at.pages.clone() });
        }
        let newest = ck.slots.iter().flatten().max_by_key(|s| s.number);
        let base = Arc::clone(&newest.expect("invariant: there is a checkpoint").base);
        // Steps that begin after the head hold nothing of it.
        for step in self.path.iter().filter(|s| s.pos.is_none()) {
            if step.part.start_seq <= tale.head.seq {
                self.segments.insert(step.part.seg.no, Arc::clone(&step.part.seg));
                self.chain.push(step.part.clone());
            }
        }
        let mut state = Arc::clone(&body.state);
        let mut bytes = 0u64;
        let commit = body.commit;
        for (_, record, update) in &tale.updates {
            Arc::make_mut(&mut state).apply(update);
            bytes += (update.bytes.len() + record.crcs.len() * vmfs_common::BLOCK_BYTES) as u64;
        }
        let log_bytes = self.chain.iter().map(|c| c.seg.class.bytes()).sum();
        let forks = self.forks();
        let log_start =
            self.chain.first().map_or(state.head().seq.next(), |c| body.log_start.max(c.start_seq.next()));
        let tail = Tail {
            state,
            chain: Arc::new(std::mem::take(&mut self.chain)),
            current: None,
            closing: Vec::new(),
            spares: VecDeque::new(),
            log_start,
            log_bytes,
            bytes_since_checkpoint: bytes,
            end: if tale.torn { None } else { tale.end },
            shadow: false,
            crcs: Vec::new(),
        };
        let mut content = Content::empty(base);
        content.segments = Arc::new(std::mem::take(&mut self.segments));
        let image =
            ImageStore::assemble(Arc::clone(self.shared), self.image, body.kind, tail, content, ck, commit);
        *image.forks.lock() = forks;
        if body.kind == MemberRole::Replica {
            for (seg, record, update) in &tale.updates {
                image.change_map(&update.header, seg.no, record.payload_page, &record.crcs);
            }
        }
        Ok(Arc::new(image))
    }

    /// Forks whose segments are all there. After a fall-back to an older checkpoint a fork that was
    /// dropped since may have none.
    fn forks(&self) -> Vec<Fork> {
        let part = |r: &SegmentRow| {
            let seg = self.segments.get(&r.no)?;
            Some(ChainSegment { seg: Arc::clone(seg), ordinal: r.ordinal, start_seq: r.start_seq })
        };
        let mut forks = Vec::new();
        for row in &self.body.forks {
            match row.chain.iter().map(part).collect::<Option<Vec<_>>>() {
                Some(chain) => forks.push(Fork { info: row.info.clone(), chain: Arc::new(chain) }),
                None => tracing::warn!(image = %self.image, fork = row.info.name, "the fork's log is gone"),
            }
        }
        forks
    }
}

fn base_of(image: ImageId, body: &Body) -> Base {
    let live = body.segments.iter().filter(|r| r.live > 0).map(|r| (r.no, r.live)).collect();
    Base { image, root: body.root, height: body.height, allocated: body.allocated, live }
}

impl ImageStore {
    /// Cuts off what follows the head, durably, by beginning the next segment there.
    fn cut_now(&self) -> Result<(), StoreError> {
        let spare = self.shared.pool.take(&self.shared, 1, Class::SMALLEST, Space::Control)?;
        self.begin_segment(&mut self.tail.lock(), spare)?;
        self.sync_now().map(|_| ())
    }

    /// After a failed sync the page cache is not believed: writes every update after the checkpoint
    /// again, into segments that count only once a checkpoint lists them. Durable on return, whichever checkpoint is lost.
    fn rewrite_tail(&self, checkpoint: Head, body: &Body) -> Result<(), StoreError> {
        let (old_chain, old_head) = {
            let tail = self.tail.lock();
            (Arc::clone(&tail.chain), tail.head())
        };
        {
            let mut tail = self.tail.lock();
            let mut chain = (*tail.chain).clone();
            chain.retain(|c| c.start_seq < checkpoint.seq);
            tail.chain = Arc::new(chain);
            tail.state = Arc::clone(&body.state);
            tail.shadow = true;
            tail.end = None;
            let mut map = self.map.write();
            map.content.overlay = Overlay::default();
            map.allocated = map.content.base.allocated;
        }
        if old_head != checkpoint {
            walk(&self.shared, &old_chain, checkpoint.seq.next(), old_head.seq, |seg, record, update| {
                let payload = record.payload(&self.shared, seg)?;
                let payload = payload.ok_or(StoreError::BadPayload { seq: update.header.seq })?;
                self.append_checked(&mut self.tail.lock(), &update, &payload)?;
                Ok(true)
            })?;
        }
        let excluded = self.exclude_syncs();
        let head = self.sync_now()?;
        excluded.set_durable(head);
        drop(excluded);
        {
            let mut tail = self.tail.lock();
            if let Some(mut w) = tail.current.take() {
                w.close();
                tail.closing.push(w);
            }
            tail.shadow = false;
        }
        self.checkpoint_locked(&mut self.checkpoints.lock(), true)?;
        // A recovery that has to begin from the older checkpoint finds the log through them, too.
        let chain = Arc::clone(&self.tail.lock().chain);
        for part in chain.iter() {
            SegmentHeader::publish(part.seg.no, &*self.shared.files.segment(part.seg.no)?)?;
        }
        self.shared.disk.remove(&mark_name(self.id)).during(|| "removing a mark".into())?;
        self.shared.disk.sync_names("mark").during(|| "removing a mark".into())
    }
}
