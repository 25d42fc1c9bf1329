//! One host of the test cluster: its disk, and the feeders of its streams.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmfs_common::header::Update;
use vmfs_common::msg::{HEADERS_MAX, HEADERS_MAX_BYTES, ImageMsg};
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{Head, ImageId, Millis, Seq};

use crate::api::Identity;
use crate::machine::Machine;
use crate::testing::{At, Packet};

/// A finished disk operation.
#[derive(Debug, Clone, Copy)]
pub enum Done {
    /// A sync: the head it made durable.
    Sync(Head),
    /// A meta record: its version.
    Meta(u64),
    /// A block-level sync from a host.
    Import(At),
}

/// A log entry: the update, and the state after it.
pub type Entry = (Update, ImageState);

/// A feeder.
#[derive(Debug)]
pub struct Stream {
    sent: Seq,
    /// Lowest and highest seq to be made durable, not yet passed, and the latest commit point.
    pending: Option<(Seq, Seq, Seq)>,
}

impl Stream {
    /// One that starts after a seq.
    #[must_use]
    pub const fn new(after: Seq) -> Self {
        Self { sent: after, pending: None }
    }
    /// See [`crate::Output::RequestSync`].
    pub fn request(&mut self, seq: Seq, commit: Seq) {
        let (low, high) = self.pending.map_or((seq, seq), |(l, h, _)| (l.min(seq), h.max(seq)));
        self.pending = Some((low, high, commit));
    }
}

/// One host.
#[derive(Debug)]
pub struct Node {
    /// Who it is.
    pub id: Arc<Identity>,
    /// What it keeps.
    pub kind: MemberRole,
    /// Power is on.
    pub up: bool,
    /// The machine, once the host knows the image.
    pub machine: Option<Machine>,
    /// The log, as the page cache shows it.
    pub log: Vec<Entry>,
    /// Entries known to be on the disk.
    pub synced: usize,
    /// What roll-backs cut off and kept.
    pub forks: Vec<Vec<Update>>,
    /// First retained seq.
    pub log_start: Seq,
    /// Feeders, by host.
    pub streams: BTreeMap<At, Stream>,
    meta: Option<Vec<u8>>,
    /// Due, kind and content of what the disk is doing.
    sync_due: Option<(Millis, usize, u64)>,
    meta_due: Vec<(Millis, u64, Vec<u8>)>,
    import_due: Option<(Millis, At)>,
    /// Grows with each roll-back: a sync that began before it proves nothing after it.
    generation: u64,
    /// Updates that the machine had appended while the guest's own was being handed out.
    early: Vec<Update>,
}

/// Head of a log at a seq.
#[must_use]
pub fn head_at(log: &[Entry], seq: Seq) -> Option<Head> {
    let at = usize::try_from(seq.0.checked_sub(1)?).ok()?;
    log.get(at).map(|(u, _)| u.head())
}

impl Node {
    /// A host without the image.
    #[must_use]
    pub fn new(id: Arc<Identity>, kind: MemberRole) -> Self {
        Self {
            id,
            kind,
            up: true,
            machine: None,
            log: Vec::new(),
            synced: 0,
            forks: Vec::new(),
            log_start: Seq(1),
            streams: BTreeMap::new(),
            meta: None,
            sync_due: None,
            meta_due: Vec::new(),
            import_due: None,
            generation: 0,
            early: Vec::new(),
        }
    }

    /// The head as the page cache shows it.
    #[must_use]
    pub fn head(&self) -> Head {
        self.log.last().map(|(u, _)| u.head()).unwrap_or_default()
    }

    /// Appends. Panics when the update does not follow the head: a chain never has a hole.
    pub fn store(&mut self, update: &Update) {
        assert_eq!(update.header.seq, self.head().seq.next(), "a hole in the log of {:?}", self.id.host);
        assert_eq!(update.header.parent, self.head().digest, "a break in the log of {:?}", self.id.host);
        let mut state =
            self.log.last().map_or_else(|| ImageState::new(update.header.image), |(_, state)| state.clone());
        state.apply(update);
        self.log.push((update.clone(), state));
        for next in std::mem::take(&mut self.early) {
            self.store(&next);
        }
    }

    /// Appends updates that were made at a stroke, and then what the machine made after them.
    pub fn store_together(&mut self, updates: &[Update]) {
        let early = std::mem::take(&mut self.early);
        updates.iter().chain(&early).for_each(|u| self.store(u));
    }

    /// Appends an update of the machine's own making.
    pub fn store_own(&mut self, update: &Update) {
        if update.header.seq == self.head().seq.next() {
            self.store(update);
        } else {
            self.early.push(update.clone());
        }
    }

    pub(super) fn roll_back(&mut self, to: Seq, image: ImageId) -> ImageState {
        let at = usize::try_from(to.0).expect("invariant: short logs");
        self.forks.push(self.log.split_off(at).into_iter().map(|(u, _)| u).collect());
        self.synced = self.log.len();
        self.generation += 1;
        self.log.last().map_or_else(|| ImageState::new(image), |(_, s)| s.clone())
    }

    pub(super) fn replace(&mut self, log: Vec<Entry>) {
        self.forks.push(self.log.drain(..).map(|(u, _)| u).collect());
        self.synced = log.len();
        self.generation += 1;
        self.log = log;
    }

    pub(super) fn crash(&mut self, keep: u64) {
        let unsynced = self.log.len() - self.synced;
        let kept = usize::try_from(keep % (unsynced as u64 + 1)).expect("invariant: below a usize");
        self.log.truncate(self.synced + kept);
        self.synced = self.log.len();
        if keep & (1 << 40) != 0
            && let Some((_, _, bytes)) = self.meta_due.first()
        {
            self.meta = Some(bytes.clone());
        }
        self.up = false;
        self.machine = None;
        self.generation += 1;
        self.sync_due = None;
        self.import_due = None;
        self.meta_due.clear();
        self.streams.clear();
        self.early.clear();
    }

    /// Nothing is left of the image, in a store that stays the same.
    pub(super) fn discard(&mut self) {
        self.meta = None;
    }

    pub(super) fn wipe(&mut self) {
        let mut id = (*self.id).clone();
        let mut store = *id.store.as_bytes();
        store[15] ^= 0xff;
        id.store = vmfs_common::StoreId::from_bytes(store);
        self.id = Arc::new(id);
        self.meta = None;
    }

    pub(super) fn recover(&mut self, image: ImageId) -> Option<(ImageState, Option<Vec<u8>>)> {
        // Recovery syncs before it reports a head.
        self.synced = self.log.len();
        let state = self.log.last().map(|(_, state)| state.clone());
        match (state, &self.meta) {
            (None, None) => None,
            (state, meta) => Some((state.unwrap_or_else(|| ImageState::new(image)), meta.clone())),
        }
    }

    pub(super) fn deadline(&self) -> Option<Millis> {
        self.machine.as_ref().filter(|_| self.up).and_then(Machine::next_deadline)
    }

    pub(super) fn start_sync(&mut self, due: Millis) {
        assert!(self.sync_due.is_none(), "two local syncs at once");
        self.sync_due = Some((due, self.log.len(), self.generation));
    }

    pub(super) fn start_meta(&mut self, due: Millis, version: u64, bytes: Vec<u8>) {
        let due = self.meta_due.last().map_or(due, |(t, _, _)| due.max(*t));
        self.meta_due.push((due, version, bytes));
    }

    /// Block-level sync is under way.
    #[must_use]
    pub const fn is_importing(&self) -> bool {
        self.import_due.is_some()
    }

    pub(super) fn start_import(&mut self, due: Millis, from: At) {
        self.import_due = Some((due, from));
    }

    pub(super) fn next_done(&self) -> Option<Millis> {
        let sync = self.sync_due.map(|s| s.0);
        let meta = self.meta_due.first().map(|m| m.0);
        [sync, meta, self.import_due.map(|i| i.0)].into_iter().flatten().min()
    }

    pub(super) fn finish_one(&mut self) -> Option<Done> {
        let due = self.next_done()?;
        if let Some((_, len, generation)) = self.sync_due.take_if(|s| s.0 == due) {
            let void = generation != self.generation;
            let head = match len.checked_sub(1).and_then(|i| self.log.get(i)).filter(|_| !void) {
                Some((u, _)) => u.head(),
                None => Head::default(),
            };
            if !void {
                self.synced = self.synced.max(len);
            }
            return Some(Done::Sync(head));
        }
        if let Some((_, from)) = self.import_due.take_if(|i| i.0 == due) {
            return Some(Done::Import(from));
        }
        let (_, version, bytes) = self.meta_due.remove(0);
        self.meta = Some(bytes);
        Some(Done::Meta(version))
    }

    pub(super) fn headers(&self, after: Head, upto: Head) -> Vec<ImageMsg> {
        let mut msgs = Vec::new();
        let mut parent = after;
        let mut headers: Vec<Vec<u8>> = Vec::new();
        for update in self.updates(after.seq, upto) {
            let bytes: usize = headers.iter().map(Vec::len).sum();
            if headers.len() == HEADERS_MAX.min(7) || bytes + update.bytes.len() > HEADERS_MAX_BYTES {
                msgs.push(ImageMsg::Headers { parent, headers: std::mem::take(&mut headers), upto });
            }
            if headers.is_empty() && !msgs.is_empty() {
                parent = head_at(&self.log, update.header.seq.prev()).unwrap_or_default();
            }
            headers.push(update.bytes.to_vec());
        }
        msgs.push(ImageMsg::Headers { parent, headers, upto });
        msgs
    }

    pub(super) fn updates(&self, after: Seq, upto: Head) -> Vec<Update> {
        let inside = |u: &&Update| u.header.seq > after && u.header.seq <= upto.seq;
        self.log.iter().map(|(u, _)| u).filter(inside).cloned().collect()
    }

    pub(super) fn ready(&mut self) -> Vec<(At, Packet)> {
        let mut packets = Vec::new();
        for (to, s) in &mut self.streams {
            let start = usize::try_from(s.sent.0).expect("invariant: short logs");
            for (update, _) in self.log.iter().skip(start) {
                packets.push((*to, Packet::Update(Box::new(update.clone()))));
                s.sent = update.header.seq;
            }
            if let Some((low, high, commit)) = s.pending.filter(|(low, _, _)| *low <= s.sent) {
                let seq = s.sent.min(high.max(low));
                packets.push((*to, Packet::Msg(Box::new(ImageMsg::Sync { seq, commit }))));
                s.pending = (high > s.sent).then_some((high, high, commit));
            }
        }
        packets
    }
}
