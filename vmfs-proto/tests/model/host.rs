//! One host of the model: the real machine, its log and meta record on a disk that loses what was not
//! synced, and the feeders of its streams. Everything that matters for what happens next is in
//! [`Host::fingerprint`].

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use vmfs_common::header::Update;
use vmfs_common::ids::Digest;
use vmfs_common::msg::ImageMsg;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{Epoch, Head, ImageId, Millis, Seq};
use vmfs_proto::testing::fingerprint::{Clock, meta_fingerprint, promised_in};
use vmfs_proto::testing::{At, Packet};
use vmfs_proto::{Identity, Machine};

/// Time in the model goes in two steps: what comes soon, and what takes long. The leases never end.
pub(crate) const SOON_MS: u64 = 1 << 20;
pub(crate) const LONG_MS: u64 = 1 << 34;
pub(crate) const NEVER_MS: u64 = 1 << 44;

/// A log entry: the update, and the state after it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) update: Update,
    state: ImageState,
}

/// An encoded meta record.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) bytes: Arc<[u8]>,
    pub(crate) promised: Epoch,
    fingerprint: u64,
}

impl Record {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let (promised, fingerprint) = (promised_in(&bytes), meta_fingerprint(&bytes));
        Self { bytes: bytes.into(), promised, fingerprint }
    }
}

/// A feeder: what was sent, and the lowest and highest seq to be made durable with the commit point.
#[derive(Debug, Clone, Copy, Hash)]
pub(crate) struct Stream {
    pub(crate) sent: Seq,
    pub(crate) pending: Option<(Seq, Seq, Seq)>,
}

/// What a host has said, whatever it remembers: for the oracle.
#[derive(Debug, Clone, Copy, Default, Hash)]
pub(crate) struct Said {
    /// The highest ballot voted for or proposed.
    pub(crate) voted: Epoch,
    /// The last proposal.
    pub(crate) proposed: Option<(Epoch, Digest)>,
}

#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) id: Arc<Identity>,
    pub(crate) kind: MemberRole,
    pub(crate) up: bool,
    pub(crate) machine: Option<Machine>,
    pub(crate) log: Vec<Arc<Entry>>,
    /// Entries on stable storage.
    pub(crate) synced: usize,
    pub(crate) record: Option<Record>,
    /// Records on their way to the disk, oldest first.
    pub(crate) writing: Vec<(u64, Record)>,
    /// A sync under way: entries it covers; void after a roll-back.
    pub(crate) syncing: Option<(usize, bool)>,
    pub(crate) streams: BTreeMap<At, Stream>,
    pub(crate) now: Millis,
    pub(crate) said: Said,
    /// A tail has been cut off and kept as a fork.
    pub(crate) forked: bool,
    /// Of everything above.
    pub(crate) print: u64,
}

impl Host {
    pub(crate) fn new(id: Arc<Identity>, kind: MemberRole) -> Self {
        Self {
            id,
            kind,
            up: true,
            machine: None,
            log: Vec::new(),
            synced: 0,
            record: None,
            writing: Vec::new(),
            syncing: None,
            streams: BTreeMap::new(),
            now: Millis(1),
            said: Said::default(),
            forked: false,
            print: 0,
        }
    }

    pub(crate) fn clock(&self) -> Clock {
        Clock { now: self.now, soon_ms: SOON_MS, long_ms: LONG_MS }
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        let mut h = DefaultHasher::new();
        (self.up, self.head().digest, self.log.len(), self.synced, self.syncing).hash(&mut h);
        self.record.as_ref().map(|r| r.fingerprint).hash(&mut h);
        self.writing.iter().for_each(|(_, r)| r.fingerprint.hash(&mut h));
        (&self.streams, self.said, self.forked).hash(&mut h);
        self.machine.is_some().hash(&mut h);
        if let Some(m) = &self.machine {
            m.fingerprint(&self.clock(), &mut h);
        }
        h.finish()
    }

    pub(crate) fn head(&self) -> Head {
        self.log.last().map(|e| e.update.head()).unwrap_or_default()
    }

    /// The head as it was at a seq.
    pub(crate) fn head_at(&self, seq: Seq) -> Option<Head> {
        head_at(&self.log, seq)
    }

    pub(crate) fn holds(&self, head: &Head) -> bool {
        self.head_at(head.seq) == Some(*head)
    }

    fn state(&self, image: ImageId) -> ImageState {
        self.log.last().map_or_else(|| ImageState::new(image), |e| e.state.clone())
    }

    /// Appends; a chain never has a hole.
    pub(crate) fn store(&mut self, update: &Update) {
        assert_eq!(update.header.seq, self.head().seq.next(), "a hole in a log");
        assert_eq!(update.header.parent, self.head().digest, "a break in a log");
        let mut state = self.state(update.header.image);
        state.apply(update);
        self.log.push(Arc::new(Entry { update: update.clone(), state }));
    }

    /// Durable on return.
    pub(crate) fn roll_back(&mut self, to: Seq, image: ImageId) -> ImageState {
        self.log.truncate(index(to));
        self.synced = self.log.len();
        self.forked = true;
        if let Some((_, valid)) = &mut self.syncing {
            *valid = false;
        }
        self.state(image)
    }

    pub(crate) fn unsynced(&self) -> usize {
        self.log.len() - self.synced
    }

    /// The power fails: of what was not synced, the first entries and records may have survived.
    pub(crate) fn crash(&mut self, entries: usize, records: usize) {
        self.log.truncate(self.synced + entries);
        if let Some((_, r)) = records.checked_sub(1).and_then(|i| self.writing.get(i)) {
            self.record = Some(r.clone());
        }
        self.up = false;
        self.machine = None;
        self.writing.clear();
        self.syncing = None;
        self.streams.clear();
    }

    /// What recovery finds, after syncing it.
    pub(crate) fn recover(&mut self, image: ImageId) -> Option<(ImageState, Option<Arc<[u8]>>)> {
        self.synced = self.log.len();
        if self.log.is_empty() && self.record.is_none() {
            return None;
        }
        Some((self.state(image), self.record.as_ref().map(|r| r.bytes.clone())))
    }

    pub(crate) fn updates(&self, after: Seq, upto: Head) -> Vec<Update> {
        let inside = |u: &&Update| u.header.seq > after && u.header.seq <= upto.seq;
        self.log.iter().map(|e| &e.update).filter(inside).cloned().collect()
    }

    pub(crate) fn headers(&self, after: Head, upto: Head) -> ImageMsg {
        let headers = self.updates(after.seq, upto).iter().map(|u| u.bytes.to_vec()).collect();
        ImageMsg::Headers { parent: after, headers, upto }
    }

    /// What the feeders have to send now.
    pub(crate) fn ready(&mut self) -> Vec<(At, Packet)> {
        let mut packets = Vec::new();
        for (to, s) in &mut self.streams {
            for entry in self.log.iter().skip(index(s.sent)) {
                packets.push((*to, Packet::Update(Box::new(entry.update.clone()))));
                s.sent = entry.update.header.seq;
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

/// The head of a log at a seq.
pub(crate) fn head_at(log: &[Arc<Entry>], seq: Seq) -> Option<Head> {
    log.get(index(seq).checked_sub(1)?).map(|e| e.update.head())
}

fn index(seq: Seq) -> usize {
    usize::try_from(seq.0).expect("short logs")
}
