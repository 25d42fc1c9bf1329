//! Rules broken on purpose in what surrounds the machines and stores of a run, to show that the oracles notice
//! (`integration/tests/oracles_fire.rs`). The machines' own rules are weakened by `vmfs_common::weaken`.

use vmfs_common::header::Update;
use vmfs_common::msg::ImageMsg;
use vmfs_common::{BLOCK_BYTES, Digest, Epoch, Head, Seq};
use vmfs_proto::{Loss, OpError, OpOutcome};
use vmfs_store::{ForkInfo, ImageStore, LogEntry, Space, Store, StoreError};

use super::At;
use super::host::IMAGE;
use super::model::Effect;
use super::world::World;

super::check::named! {
    /// What is broken in a run.
    Broken {
        /// Now and then an owner's update names a parent that nobody made.
        ParentUnknown,
        /// Now and then an owner skips a number.
        NumberSkipped,
        /// Updates of the machine's own are made twice.
        AppendedTwice,
        /// Now and then an owner's update is one of two with the same parent.
        SecondSuccessor,
        /// Now and then a copy counts an update as taken that its store was never given.
        AppendSkipped,
        /// A write that makes the image longer does not say so.
        GrowthUnsaid,
        /// Writes land one block further on.
        WriteMisplaced,
        /// A pinned state is read from the newest one.
        ViewNotPinned,
        /// Bits flip on disks that nobody knows to be bad.
        SilentRot,
        /// Calls fail on disks that nobody knows to fail.
        SilentFaults,
        /// Disks fill up that nobody knows to be full.
        SilentlyFull,
        /// A scrub keeps what it has found to itself.
        ScrubForgets,
        /// A tail that is cut off is given up.
        ForkNotKept,
        /// The last update of a tail is given up before the rest is kept.
        ForkCutShort,
        /// A fork is listed as beginning where it ends.
        ForkMisplaced,
        /// Forks are dropped without an order.
        ForkDropped,
        /// Of a fork only the first update can be read.
        ForkRunsDry,
        /// The log is read instead of the fork, where it goes as far.
        ForkReadFromLog,
        /// A log is reported as synced that was not.
        SyncForgotten,
        /// A machine that asks for a sync is told at once that all is durable.
        SyncedTooEarly,
        /// A sync reports a head of another epoch.
        SyncedHeadWrong,
        /// Promises are not written, and reported as durable.
        PromiseForgotten,
        /// Half of each promise is written.
        HalfAPromise,
        /// A restart finds no copy.
        CopyForgotten,
        /// What a recovery found is not synced.
        RecoveryUnsynced,
        /// A vote that is said again names an older head.
        VoteChanged,
        /// Votes name another proposal than the one that was made.
        VoteForAnother,
        /// Messages lose their last byte, now and then.
        MessageCutShort,
        /// A `Seal` follows something else than its `Root`.
        SealOnAnother,
        /// A block-level sync leaves blocks out.
        BlocksSkipped,
        /// A flush that has failed is answered as done.
        FlushErrorSwallowed,
        /// A flush that has failed waits on, and is answered as done when the copy is cut back.
        FlushOutlivesOwner,
        /// Every promotion says that nothing is missing.
        SaysNothing,
        /// Promotions name the update before the last.
        SaysEarlierEnd,
        /// Promotions count later updates that never were.
        SaysLater,
        /// Promotions name a contact that never was.
        SaysContact,
        /// No promotion knows what is lost.
        SaysUnknown,
        /// Nobody answers offers.
        JoinsUnsaid,
    }
}

impl World {
    pub(crate) fn is_broken(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }

    /// Once in `n` times, where this is what is broken. Draws nothing in a run that is whole.
    pub(crate) fn breaks(&mut self, broken: Broken, n: u64) -> bool {
        self.is_broken(broken) && self.rng.one_in(n)
    }

    /// What happens by itself, between the actions of a run.
    pub(crate) fn break_something(&mut self) {
        if self.broken.is_none() {
            return;
        }
        let at = self.rng.index(self.hosts.len());
        let healthy = !self.hosts[at].bad_disk;
        if healthy && self.breaks(Broken::SilentRot, 4) {
            self.flip(at);
        }
        if healthy && self.breaks(Broken::SilentFaults, 12) {
            let call = self.hosts[at].disk.calls() + self.rng.below(30);
            self.hosts[at].disk.fail_call(Some(call));
        }
        if healthy && self.breaks(Broken::SilentlyFull, 30) {
            let disk = &self.hosts[at].disk;
            disk.set_capacity_bytes(disk.used_bytes());
        }
        if self.breaks(Broken::ForkDropped, 4) {
            self.drop_a_fork(at);
        }
        if self.breaks(Broken::CopyForgotten, 30)
            && let Some(running) = &self.hosts[at].running
        {
            let removed = running.store.remove_image(IMAGE);
            self.note(|| format!("{at} forgets its copy: {removed:?}"));
            self.kill(at);
        }
    }

    fn drop_a_fork(&mut self, at: At) {
        let Some(store) = self.hosts[at].copy().map(|c| c.store.clone()) else { return };
        let Some(fork) = store.forks().first().cloned() else { return };
        let dropped = store.drop_fork(&fork.name);
        self.note(|| format!("{at} drops the fork {}: {dropped:?}", fork.name));
    }

    /// What an owner makes, as the record sees it.
    pub(crate) fn bent_update(&mut self, update: &Update) -> Option<Update> {
        let mut h = update.header.clone();
        if self.breaks(Broken::ParentUnknown, 20) {
            h.parent = Digest::from_bytes([7; 32]);
        } else if self.breaks(Broken::NumberSkipped, 20) {
            h.seq = h.seq.next();
        } else {
            return None;
        }
        Some(Update::from_header(h))
    }

    /// Puts another update beside one that is about to be made.
    pub(crate) fn make_a_second(&mut self, update: &Update) {
        if !self.breaks(Broken::SecondSuccessor, 20) {
            return;
        }
        let mut h = update.header.clone();
        h.time_ns += 1;
        let (parent, time_ns) = (h.parent, h.time_ns);
        let twin = Update::from_header(h);
        let added = self.model.add(twin.head(), parent, Effect::None, time_ns, false);
        added.expect("invariant: the update itself can be made");
    }

    /// What a host says instead of `msg`; nothing, when it keeps it to itself.
    pub(crate) fn bent_message(&self, at: At, mut msg: Box<ImageMsg>) -> Option<Box<ImageMsg>> {
        let known = &self.hosts[at].known;
        match (&mut *msg, self.broken) {
            (ImageMsg::Join(_), Some(Broken::JoinsUnsaid)) => return None,
            (ImageMsg::Voted { vote, .. }, Some(Broken::VoteForAnother)) => {
                vote.proposal = Digest::from_bytes([7; 32]);
            }
            (ImageMsg::Voted { vote, .. }, Some(Broken::VoteChanged))
                if known.vote.is_some_and(|(_, proposal, _)| proposal == vote.proposal) =>
            {
                vote.head = Head { seq: Seq::ZERO, epoch: Epoch::default(), ..vote.head };
            }
            _ => {}
        }
        Some(msg)
    }

    /// The flushes of a host whose failure was kept back.
    pub(crate) fn kept_waiting(&mut self, at: At) -> Vec<u64> {
        let (mine, others) = self.oracle.kept_waiting.iter().partition(|(host, _)| *host == at);
        self.oracle.kept_waiting = others;
        let mine: Vec<(At, u64)> = mine;
        mine.into_iter().map(|(_, token)| token).collect()
    }

    /// What is written as a host's promises.
    pub(crate) fn bent_promises(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        if self.is_broken(Broken::HalfAPromise) {
            bytes.truncate(bytes.len() / 2);
        }
        bytes
    }

    /// A store that was just opened shows one update more than is durable.
    pub(crate) fn show_unsynced(&self, at: At, store: &Store) -> Option<()> {
        if !self.is_broken(Broken::RecoveryUnsynced) {
            return None;
        }
        let copy = store.image(IMAGE)?;
        let head = copy.head();
        let others = self.hosts.iter().filter(|h| h.id.host != self.hosts[at].id.host);
        let theirs = others.filter_map(|h| h.copy()).filter(|c| c.store.kind() == copy.kind());
        let mut entries =
            theirs.filter_map(|c| c.store.read_log(head.seq.next(), 1).ok()?.into_iter().next());
        let next = entries.find(|e| e.update.header.parent == head.digest)?;
        let blocks = next.payload.len() / BLOCK_BYTES;
        let room = copy.reserve(next.update.bytes.len(), blocks, Space::Data).ok()?;
        copy.append(room, &next.update, &next.payload).ok()
    }

    /// The head that a sync reports.
    pub(crate) fn synced(&self, store: &ImageStore) -> Result<Head, StoreError> {
        match self.broken {
            Some(Broken::SyncForgotten) => Ok(store.head()),
            Some(Broken::SyncedHeadWrong) => store.sync().map(|h| {
                let number = h.epoch.number + 1;
                Head { epoch: Epoch { number, ..h.epoch }, ..h }
            }),
            _ => store.sync(),
        }
    }

    /// Cuts a copy back.
    pub(crate) fn cut_back(
        &self,
        store: &ImageStore,
        to: Head,
        keep_fork: bool,
    ) -> Result<Option<ForkInfo>, StoreError> {
        match self.broken {
            Some(Broken::ForkNotKept) => store.roll_back(to, false),
            Some(Broken::ForkCutShort) => {
                let before = store.head_at(store.head().seq.prev())?;
                if let Some(before) = before.filter(|b| b.seq > to.seq) {
                    store.roll_back(before, false)?;
                }
                store.roll_back(to, keep_fork)
            }
            Some(Broken::ForkMisplaced) => {
                let fork = store.roll_back(to, keep_fork)?;
                Ok(fork.map(|f| ForkInfo { ancestor: f.head, ..f }))
            }
            _ => store.roll_back(to, keep_fork),
        }
    }

    /// Reads a fork from `next` on.
    pub(crate) fn read_fork(
        &self,
        store: &ImageStore,
        fork: &ForkInfo,
        next: Seq,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let bytes_max = 256 << 10;
        match self.broken {
            Some(Broken::ForkRunsDry) if next > fork.ancestor.seq.next() => Ok(Vec::new()),
            Some(Broken::ForkRunsDry) => store.read_fork(&fork.name, next, 1),
            Some(Broken::ForkReadFromLog) => match store.read_log(next, bytes_max) {
                Ok(entries) if !entries.is_empty() => Ok(entries),
                _ => store.read_fork(&fork.name, next, bytes_max),
            },
            _ => store.read_fork(&fork.name, next, bytes_max),
        }
    }

    /// What a promotion answers.
    pub(crate) fn bent_answer(
        &self,
        at: At,
        answer: Result<OpOutcome, OpError>,
    ) -> Result<OpOutcome, OpError> {
        let Ok(OpOutcome::Promoted { epoch, loss, forced }) = answer else { return answer };
        let loss = match (self.broken, loss) {
            (Some(Broken::SaysNothing), _) => Loss::Nothing,
            (Some(Broken::SaysEarlierEnd), Loss::EndsAt { seq, time_ns, later_updates }) => {
                Loss::EndsAt { seq: seq.prev(), time_ns, later_updates }
            }
            (Some(Broken::SaysEarlierEnd), Loss::UnknownAfter { seq, time_ns }) => {
                Loss::UnknownAfter { seq: seq.prev(), time_ns }
            }
            (Some(Broken::SaysLater), Loss::EndsAt { seq, time_ns, later_updates }) => {
                Loss::EndsAt { seq, time_ns, later_updates: Some(later_updates.unwrap_or(0) + 1000) }
            }
            (Some(Broken::SaysContact), Loss::UnknownAfter { seq, .. }) => {
                Loss::UnknownAfter { seq, time_ns: u64::MAX }
            }
            (Some(Broken::SaysUnknown), Loss::Nothing) => {
                let seq = self.end_before(at).unwrap_or_default();
                Loss::UnknownAfter { seq, time_ns: 0 }
            }
            (_, loss) => loss,
        };
        Ok(OpOutcome::Promoted { epoch, loss, forced })
    }

    /// The last update before the epoch that a copy is in.
    fn end_before(&self, at: At) -> Option<Seq> {
        let state = self.hosts[at].copy()?.store.state();
        Some(state.epoch_start()?.start.seq.prev())
    }
}
