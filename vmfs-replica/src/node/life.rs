//! What goes on by itself: connections coming and going, time passing, the store being looked after.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use vmfs_common::msg;
use vmfs_common::policy::{Member, MemberRole};
use vmfs_common::{BLOCK_BYTES_U64, HostId, ImageId, Millis, Seq, StoreId};
use vmfs_net::NetEvent;
use vmfs_proto::{Health, Input, OpError, Status};
use vmfs_store::StoreError;

use super::NodeInner;
use super::image::{Image, Pending};
use super::memory::{self, GiveBack};

/// How often machines whose deadline has come are called, in milliseconds.
const TICK_MS: u64 = 10;
/// How often waiting operations are woken in any case, and stream progress is reported.
const SLOW_TICK_MS: u64 = 250;
/// How often the store is looked after, and its load measured, in milliseconds.
const LOOK_MS: u64 = 100;
/// Payload appended in that time that makes the store busy.
const BUSY_BYTES: u64 = 2 << 20;
/// How long the store's background work rests after it failed, in milliseconds.
const FAILED_PAUSE_MS: u64 = 1_000;
/// How often that is logged, in milliseconds.
const FAILED_TOLD_MS: u64 = 60_000;
/// How many times its rate compaction copies while segments take too much.
const HURRIED: u64 = 4;
/// Background I/O of the store per round.
const BACKGROUND_BYTES: u64 = 8 << 20;
/// Key of this node's own record among the images' meta records.
pub(super) const NODE_META: ImageId = ImageId::from_bytes([0; 16]);

impl NodeInner {
    pub(super) fn known_store(&self, host: HostId) -> Option<StoreId> {
        self.known_stores.lock().get(&host).copied()
    }

    fn learn_store(&self, host: HostId, store: StoreId) {
        let mut known = self.known_stores.lock();
        if known.insert(host, store) == Some(store) {
            return;
        }
        let record = msg::encode(&known.iter().map(|(h, s)| (*h, *s)).collect::<Vec<_>>());
        drop(known);
        if let Err(e) = self.store.put_meta(NODE_META, &record) {
            tracing::warn!("cannot remember the store of {}: {e}", self.host_name(host));
        }
    }

    pub(super) fn load_known_stores(&self) {
        let record = self.store.get_meta(NODE_META);
        let known: Option<Vec<(HostId, StoreId)>> = record.and_then(|r| msg::decode(&r).ok());
        *self.known_stores.lock() = known.unwrap_or_default().into_iter().collect::<BTreeMap<_, _>>();
    }

    /// Takes events of the network until it ends.
    pub(super) async fn follow_network(self: Arc<Self>, mut events: mpsc::Receiver<NetEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                NetEvent::PeerUp { host, store, session } => {
                    tracing::info!(peer = self.host_name(host), "connected");
                    let node = self.clone();
                    // Remembering the store may touch the disk; machines are told after it.
                    let learnt = tokio::task::spawn_blocking(move || node.learn_store(host, store)).await;
                    if learnt.is_err() {
                        tracing::warn!("cannot remember the store of {}", self.host_name(host));
                    }
                    self.contacts.write().entry(host).or_default().heard = Some(self.now());
                    self.sessions.write().insert(host, (session, store));
                    self.images().iter().for_each(|i| i.input(Input::PeerUp { host }));
                }
                NetEvent::PeerDown { host, session } => {
                    tracing::info!(peer = self.host_name(host), "disconnected");
                    if self.session(host).is_some_and(|(s, _)| s == session) {
                        self.sessions.write().remove(&host);
                        self.images().iter().for_each(|i| i.peer_down(host));
                    }
                }
                NetEvent::Beat { host, echo_age_ms, .. } => {
                    let now = self.now();
                    let mut contacts = self.contacts.write();
                    let contact = contacts.entry(host).or_default();
                    contact.heard = Some(now);
                    if let Some(age) = echo_age_ms {
                        contact.confirmed = contact.confirmed.max(Some(Millis(now.0.saturating_sub(age))));
                    }
                }
            }
        }
    }

    /// Waits, a moment at most, until the machines have been told of a peer's session.
    pub(super) async fn wait_for_session(&self, host: HostId, session: u64) {
        for _ in 0..200 {
            if self.session(host).is_some_and(|(s, _)| s >= session) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Calls machines that are due, until the node stops.
    pub(super) async fn follow_clock(self: Arc<Self>) {
        let mut stopping = self.stopping();
        let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut slow_at = self.now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = stopping.wait_for(|s| *s) => return,
            }
            let now = self.now();
            let slow = now >= slow_at;
            if slow {
                slow_at = now.plus(SLOW_TICK_MS);
                self.sync_server.expire();
            }
            for image in self.images() {
                if image.is_due(now) {
                    image.input(Input::Tick);
                }
                if slow {
                    image.slow_tick();
                    image.add_missing(&self);
                }
            }
        }
    }

    /// The store's background work and the removal of deleted images, until the node stops. Runs on
    /// a thread of its own.
    pub(super) fn maintain(self: &Arc<Self>) {
        let stopping = self.stopping();
        let (mut last_sweep, mut last_look) = (self.now(), self.now());
        let (mut appended, mut busy) = (0, false);
        let (mut failed_at, mut told_at): (Option<Millis>, Option<Millis>) = (None, None);
        let mut give_back = GiveBack::default();
        let mut pace = Pace::new(self.config.store.compact_rate.bytes(), self.now());
        while !*stopping.borrow() {
            // Prewriting segments competes with the writes it is to speed up: it waits for a calm moment.
            if self.now().since(last_look) >= LOOK_MS {
                last_look = self.now();
                let before = std::mem::replace(&mut appended, self.appended_bytes.load(Ordering::Relaxed));
                busy = appended - before > BUSY_BYTES;
                if give_back.is_due(last_look, appended, self.rings.held_bytes(), busy) {
                    memory::give_back();
                }
            }
            let budget = if busy { 0 } else { BACKGROUND_BYTES };
            let resting = failed_at.is_some_and(|t| self.now().since(t) < FAILED_PAUSE_MS);
            let mut round = Round::default();
            if !resting {
                round = self.look_after_store(budget, &mut pace).unwrap_or_else(|e| {
                    failed_at = Some(self.now());
                    // A disk that has died fails each time: said now and then.
                    if told_at.is_none_or(|t| self.now().since(t) > FAILED_TOLD_MS) {
                        told_at = failed_at;
                        tracing::warn!("background work of the store: {e}");
                    }
                    Round::default()
                });
            }
            if self.now().since(last_sweep) > 1000 {
                last_sweep = self.now();
                self.sweep_deleted();
                self.sweep_offered();
            }
            let soon = round.hurries || (round.more && !busy);
            std::thread::sleep(Duration::from_millis(if soon { 5 } else { LOOK_MS }));
        }
    }

    /// One round of the store's background work. Segments become sparse while guests write, so compaction
    /// does not wait for a calm moment; its rate is what bounds it.
    fn look_after_store(&self, budget_bytes: u64, pace: &mut Pace) -> Result<Round, StoreError> {
        let more = self.store.background(budget_bytes);
        let bloated = self.store.was_bloated();
        let allowed = pace.allowed(self.now(), if bloated { HURRIED } else { 1 });
        let used = if allowed > 0 { self.store.compact(allowed) } else { Ok(0) };
        if let Ok(used) = used {
            pace.spend(used);
        }
        let hurries = bloated && used.as_ref().is_ok_and(|used| *used > 0);
        more.and_then(|more| used.map(|_| Round { more, hurries }))
    }
}

/// What a round of background work has come to.
#[derive(Default)]
struct Round {
    /// There is more to do for the store.
    more: bool,
    /// Segments take too much, and compaction goes on.
    hurries: bool,
}

/// Keeps work to so many bytes a second. What was overdrawn is saved before more is allowed.
struct Pace {
    rate_bytes_per_s: u64,
    balance_bytes: i64,
    at: Millis,
}

impl Pace {
    const fn new(rate_bytes_per_s: u64, now: Millis) -> Self {
        Self { rate_bytes_per_s, balance_bytes: 0, at: now }
    }
    /// What may be done now, at so many times the rate; what is not used up within an eighth of a second lapses.
    fn allowed(&mut self, now: Millis, times: u64) -> u64 {
        let rate_bytes_per_s = self.rate_bytes_per_s.saturating_mul(times);
        let earned = rate_bytes_per_s.saturating_mul(now.since(self.at)) / 1000;
        self.at = now;
        let most = i64::try_from(rate_bytes_per_s / 8).unwrap_or(i64::MAX);
        let balance = self.balance_bytes.saturating_add_unsigned(earned);
        self.balance_bytes = balance.min(most);
        u64::try_from(self.balance_bytes).unwrap_or(0)
    }
    fn spend(&mut self, bytes: u64) {
        self.balance_bytes = self.balance_bytes.saturating_sub_unsigned(bytes);
    }
}

impl Image {
    fn slow_tick(self: &Arc<Self>) {
        self.wake_all();
        let progress: Vec<_> =
            self.lines.lock().iter().filter_map(|(to, l)| Some((*to, l.take_progress()?))).collect();
        for (to, seq) in progress {
            self.input(Input::StreamProgress { to, seq });
        }
        self.keep_log_for_members();
    }

    /// Tells the store what of the log is still wanted and what is committed, and the ring what every
    /// stream has passed.
    fn keep_log_for_members(&self) {
        let now = self.node().now();
        let (status, committed) = {
            let core = self.core.lock();
            (core.machine.status(now), core.machine.committed_seq())
        };
        // Not what was flushed: with `acks = "local"` that may yet be rolled back.
        self.store.set_commit(committed);
        let wanted = status.members.iter().map(|m| m.durable_seq).min();
        if let Some(seq) = wanted {
            self.store.retain_from(seq.next());
        }
        let owns = status.owner == Some(self.node().identity.host);
        self.store.retain_for_catch_up(if owns { self.log_wanted(&status) } else { None });
        let mut ring = self.ring.lock();
        match wanted {
            Some(seq) if owns => ring.trim_below(seq.next()),
            // An owner once, or without members: nobody will ask.
            _ => ring.clear(),
        }
    }

    /// From where on members can be brought up to date by the owner's log, and how many bytes of it that is
    /// worth. Superseded blocks are kept for it, in addition to the content: never more than that is. A member
    /// that is away may stay away; one that is being fed, or copies the blocks before, would have to start
    /// over.
    fn log_wanted(&self, status: &Status) -> Option<(Seq, u64)> {
        let node = self.node();
        let (log_start, content) =
            (self.store.log_start(), self.store.allocated_blocks().0 * BLOCK_BYTES_U64);
        let away_max = if node.config.store.log_retain.is_some() { 0 } else { content / 2 };
        let mut wanted: Option<(Seq, u64)> = None;
        for m in status.members.iter().filter(|m| m.host != node.identity.host) {
            let copies = node.sync_server.copied_up_to(m.host, self.id);
            let from = copies.unwrap_or(m.durable_seq).next();
            if from < log_start {
                continue;
            }
            let bytes = match (copies, m.connected, m.health) {
                (Some(_), ..) | (None, true, Health::CatchingUp) => content,
                (None, false, _) => away_max,
                // It has what is committed, or cannot be fed: the log that is kept in any case is enough.
                (None, true, _) => continue,
            };
            let (first, most) = wanted.unwrap_or((from, bytes));
            wanted = Some((first.min(from), most.max(bytes)));
        }
        wanted
    }

    /// Every member has everything, durably.
    pub(super) fn is_settled(&self, node: &NodeInner) -> bool {
        let status = self.core.lock().machine.status(node.now());
        status.members.iter().all(|m| m.durable_seq >= status.head.seq)
    }

    /// True when `host` is not in the member list: it may become a member, or own an epoch that has not
    /// reached this copy; most likely it has no business here.
    pub(super) fn is_stranger(&self, host: HostId) -> bool {
        self.state().members.get(host).is_none()
    }

    /// If no update was ever taken here, and no vote given: from now on none is. True then.
    pub(super) fn retire_untouched(self: &Arc<Self>) -> bool {
        self.locked(|core, env, out| {
            let untouched = core.machine.state().head().seq == Seq::ZERO && !core.machine.has_promised();
            if untouched {
                core.machine.handle(env, Input::StoreFailed, out);
            }
            untouched
        })
    }

    /// True when `host` is catching up before its admission.
    pub(super) fn is_learner(&self, host: HostId) -> bool {
        let now = self.node().now();
        let status = self.core.lock().machine.status(now);
        status.members.iter().any(|m| m.host == host && !m.admitted)
    }

    /// Adds the members that the policy had named when the image was made and whose stores were unknown
    /// then: one at a time, tried until it works.
    fn add_missing(self: &Arc<Self>, node: &Arc<NodeInner>) {
        let Some(host) = self.missing.lock().iter().copied().find(|h| node.session(*h).is_some()) else {
            return;
        };
        let entry = node.network().directory().get(host);
        let (Some(entry), Some(store)) = (entry, node.known_store(host)) else { return };
        // Off the list while it is tried, so that it is tried once at a time.
        self.missing.lock().retain(|h| *h != host);
        let member = Member { host, store, key: entry.public_key, role: MemberRole::Replica };
        let (answer, answered) = tokio::sync::oneshot::channel();
        let token = self.token(Pending::Operator(answer));
        self.input(Input::AddMember { member, token });
        let (image, name) = (self.clone(), entry.name);
        node.spawn(async move {
            match answered.await {
                Ok(Ok(_) | Err(OpError::AlreadyMember)) | Err(_) => {}
                Ok(Err(OpError::NotOwner)) => {}
                Ok(Err(e)) => {
                    tracing::debug!(image = %image.id.short(), "{name} cannot be added yet: {e}");
                    image.missing.lock().push(host);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_kept_whatever_the_size_of_the_steps() {
        for step in [900, 70_000] {
            let mut pace = Pace::new(100_000, Millis(0));
            let mut done = 0;
            for ms in (5..=10_000).step_by(5) {
                if pace.allowed(Millis(ms), 1) > 0 {
                    done += step;
                    pace.spend(step);
                }
            }
            assert!(done <= 1_000_000 + step, "{done} in steps of {step}");
            assert!(done >= 1_000_000 - step - 12_500, "{done} in steps of {step}");
        }
        let mut off = Pace::new(0, Millis(0));
        assert_eq!(off.allowed(Millis(60_000), HURRIED), 0);
        let mut idle = Pace::new(80_000, Millis(0));
        assert_eq!(idle.allowed(Millis(60_000), 1), 10_000, "what was not used lapses");
    }
}
