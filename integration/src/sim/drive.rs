//! Carrying out what a machine asks for, in the order and under the locks of the engine in
//! `vmfs-replica` (`node/image.rs`, `node/execute.rs`): what concerns the store or the order on a stream
//! happens at once, whatever is slow comes back as an event.

use std::collections::VecDeque;
use std::rc::Rc;

use vmfs_common::chain::Refusal;
use vmfs_common::hash::block_digest;
use vmfs_common::header::Update;
use vmfs_common::msg::{self, HEADERS_MAX, HEADERS_MAX_BYTES, ImageMsg};
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES, Digest, Head, HostId, Seq};
use vmfs_proto::{Env, Input, Machine, Output, Take};
use vmfs_store::{Space, StoreError};

use super::At;
use super::blocksync::Pull;
use super::broken::Broken;
use super::check::Check;
use super::line::{Feed, Line, Work};
use super::link::Packet;
use super::model::Effect;
use super::rng::Rng;
use super::world::{Event, World};

/// Bytes read from the log at a time.
const BATCH_BYTES: usize = 96 << 10;

/// True when `payload` is exactly the blocks that the digests describe.
fn payload_matches(digests: &[Digest], payload: &[u8]) -> bool {
    let stored = digests.iter().filter(|d| !d.is_zero());
    payload.len().is_multiple_of(BLOCK_BYTES)
        && payload.chunks_exact(BLOCK_BYTES).map(block_digest).eq(stored.copied())
}

impl World {
    /// Builds the environment of a host's machine and runs `f` in it.
    pub(crate) fn env<R>(&mut self, at: At, f: impl FnOnce(&mut Env<'_>) -> R) -> R {
        let mut rng = Rng(self.rng.next());
        let host = &self.hosts[at];
        let running = host.running.as_ref().expect("invariant: the host is up");
        let store = &running.copy.as_ref().expect("invariant: the host has a copy").store;
        let contact = |h: HostId| running.contacts.get(&h).copied().unwrap_or_default();
        let history = |seq| store.head_at(seq).ok().flatten();
        let mut env = Env {
            now: host.now(self.now),
            time_ns: host.wall_skew_ns + self.now * 1000,
            entropy: &mut |b: &mut [u8]| rng.fill(b),
            contact: &contact,
            history: &history,
            log_start: store.log_start(),
        };
        f(&mut env)
    }

    /// Takes the image's lock: the machine, if the host is up and has the image.
    pub(crate) fn lock(&mut self, at: At) -> Option<Machine> {
        self.hosts[at].copy_mut()?.machine.take()
    }

    /// Carries out what the machine asked for, and gives the lock up.
    pub(crate) fn unlock(&mut self, at: At, mut machine: Machine, out: Vec<Output>) {
        let mut queue = VecDeque::from(out);
        while let Some(output) = queue.pop_front() {
            let mut more = Vec::new();
            self.execute(at, &mut machine, output, &mut more);
            queue.extend(more);
        }
        let copy = self.hosts[at].copy_mut().expect("invariant: nobody stops a host under its lock");
        copy.machine = Some(machine);
    }

    /// One input to a host's machine.
    pub(crate) fn input(&mut self, at: At, input: Input) {
        let Some(mut machine) = self.lock(at) else { return };
        let mut out = Vec::new();
        self.env(at, |env| machine.handle(env, input, &mut out));
        self.unlock(at, machine, out);
    }

    fn execute(&mut self, at: At, machine: &mut Machine, output: Output, more: &mut Vec<Output>) {
        let life = self.life(at);
        match output {
            Output::Send { to, msg } => {
                let Some(msg) = self.bent_message(at, msg) else { return };
                self.check_said(at, &msg);
                self.on_line(at, to, |l| l.messages.push_back(*msg));
            }
            Output::Stream { to, after, headers_only } => self.on_line(at, to, |l| {
                l.feed = Some(Feed { next: after.next(), headers_only, upto: None });
            }),
            Output::StopStream { to } => self.on_line(at, to, Line::stop_feed),
            Output::RequestSync { to, seq, commit } => self.on_line(at, to, |l| l.sync(seq, commit)),
            Output::LocalSync if self.is_broken(Broken::SyncedTooEarly) => {
                let head = machine.state().head();
                self.env(at, |env| machine.handle(env, Input::Synced { head }, more));
            }
            Output::LocalSync => {
                let delay = self.disk_delay();
                self.after(delay, Event::SyncRun { at, life });
            }
            Output::AppendLocal(update) => {
                let forced = matches!(&update.header.op, Op::EpochStart(s)
                    if matches!(s.mandate, vmfs_common::election::Mandate::Forced(_)));
                self.made(at, &update, Effect::None, forced);
                if self.is_broken(Broken::AppendedTwice) {
                    self.made(at, &update, Effect::None, forced);
                }
                if let Err(e) = self.store_own(at, &update, &[], Space::Control) {
                    self.store_error(at, &e, "appending an update of the machine's");
                    self.env(at, |env| machine.handle(env, Input::StoreFailed, more));
                }
            }
            Output::PersistMeta { version, bytes } => {
                let delay = self.disk_delay();
                let copy = self.hosts[at].copy_mut().expect("invariant: it is running");
                copy.meta_next = Some((version, bytes));
                if !std::mem::replace(&mut copy.meta_writing, true) {
                    self.after(delay, Event::MetaRun { at, life });
                }
            }
            Output::RollBack { to, keep_fork } => {
                self.roll_back(at, machine, to, keep_fork, more);
            }
            Output::FlushDone { token, result: Err(_) } if self.is_broken(Broken::FlushOutlivesOwner) => {
                self.oracle.kept_waiting.push((at, token));
            }
            Output::FlushDone { token, .. } if self.is_broken(Broken::FlushErrorSwallowed) => {
                self.flush_done(at, machine, token, Ok(()));
            }
            Output::FlushDone { token, result } => self.flush_done(at, machine, token, result),
            Output::OpDone { token, result } => self.op_done(at, token, self.bent_answer(at, result)),
            Output::ReadHeaders { to, after, upto } => {
                let delay = self.disk_delay();
                self.after(delay, Event::ReadHeaders { at, life, to, after, upto });
            }
            Output::ServeUpdates { to, after, upto, headers_only } => {
                let delay = self.disk_delay();
                self.after(delay, Event::Serve { at, life, to, after, upto, headers_only });
            }
            Output::StartBlockSync { from } => self.start_block_sync(at, from),
            Output::Report(event) => self.note(|| format!("{at} reports {event:?}")),
            Output::GateChanged | Output::FailWaiting => {}
        }
    }

    /// The line to a connected peer.
    pub(crate) fn on_line(&mut self, at: At, to: HostId, f: impl FnOnce(&mut Line)) {
        let Some(peer) = self.at(to) else { return };
        if self.net.session(at, peer).is_none() {
            return;
        }
        let life = self.life(at);
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        let line = copy.lines.entry(peer).or_default();
        f(line);
        if !std::mem::replace(&mut line.pumping, true) {
            let delay = 5 + self.rng.below(100);
            self.after(delay, Event::Pump { at, life, peer });
        }
    }

    pub(crate) fn wake_lines(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let peers: Vec<HostId> = copy.lines.keys().map(|p| self.hosts[*p].id.host).collect();
        for peer in peers {
            self.on_line(at, peer, |_| ());
        }
    }

    /// Sends one thing of a line.
    pub(crate) fn pump(&mut self, at: At, peer: At) {
        let to = self.host_id(peer);
        let life = self.life(at);
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        let head = copy.store.head().seq;
        let Some(line) = copy.lines.get_mut(&peer) else { return };
        line.pumping = false;
        let mut damaged = None;
        let (pause, failed) = match line.next_work(head) {
            Work::Idle => return,
            Work::Message(m) => {
                self.note(|| format!("{at} -> {peer} {}", brief(&m)));
                (self.send(at, peer, Packet::Control(msg::encode(&m).into())), None)
            }
            Work::Read(feed, serving) => match copy.store.read_log(feed.next, BATCH_BYTES) {
                Ok(entries) => {
                    line.batch = entries.into();
                    line.batch_of = Some((feed, serving));
                    (0, None)
                }
                Err(e) => {
                    if serving {
                        line.serve = None;
                    } else {
                        line.feed = None;
                    }
                    let bad = matches!(e, StoreError::BadPayload { .. } | StoreError::Corrupt { .. });
                    damaged = Some(feed.next).filter(|_| bad && !serving);
                    let what = format!("{at} cannot read its log for {peer}: {e}");
                    self.note(|| what);
                    (0, Some(feed.upto.filter(|_| serving)))
                }
            },
            Work::Item(entry, serving) => {
                let feed = if serving { line.serve } else { line.feed };
                let bare = feed.is_some_and(|f| f.headers_only);
                let payload: Rc<[u8]> = if bare { Rc::from([]) } else { entry.payload.into() };
                let seq = entry.update.header.seq;
                self.note(|| format!("{at} -> {peer} update {seq} of {}", entry.update.header.epoch));
                (self.send(at, peer, Packet::Update(Rc::from(&*entry.update.bytes), payload)), None)
            }
        };
        if let Some(seq) = damaged {
            return self.input(at, Input::LogUnreadable { to, seq });
        }
        match failed {
            Some(Some(upto)) => {
                let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
                let upto = store.head_at(upto).ok().flatten().unwrap_or_default();
                let log_start = store.log_start();
                self.on_line(at, to, |l| l.messages.push_back(ImageMsg::FetchFailed { upto, log_start }));
            }
            Some(None) => self.restate(at, peer),
            None => {
                let line = self.hosts[at].copy_mut().and_then(|c| c.lines.get_mut(&peer));
                if let Some(line) = line
                    && !std::mem::replace(&mut line.pumping, true)
                {
                    self.after(pause + 1, Event::Pump { at, life, peer });
                }
            }
        }
    }

    /// Both ends start over, as after a lost stream.
    fn restate(&mut self, at: At, peer: At) {
        let host = self.host_id(peer);
        if let Some(copy) = self.hosts[at].copy_mut() {
            copy.lines.remove(&peer);
        }
        self.input(at, Input::PeerDown { host });
        if self.net.session(at, peer).is_some() {
            self.input(at, Input::PeerUp { host });
        }
    }

    // --- the store ---

    /// Stores an update of the host's own making.
    pub(crate) fn store_own(
        &mut self,
        at: At,
        update: &Update,
        payload: &[u8],
        space: Space,
    ) -> Result<(), StoreError> {
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        let reserved = store.reserve(update.bytes.len(), payload.len() / BLOCK_BYTES, space)?;
        store.append(reserved, update, payload)?;
        self.wake_lines(at);
        Ok(())
    }

    /// An error of the store is a broken promise, unless the disk was made to fail.
    pub(crate) fn store_error(&mut self, at: At, e: &StoreError, what: &str) {
        self.note(|| format!("{at} {what}: {e}"));
        let host = &self.hosts[at];
        let latched = matches!(e, StoreError::Latched { .. });
        if !(host.is_excused() || latched) {
            self.fail(Check::StoreWorks, format!("{what} failed at host {at} on a healthy disk: {e}"));
        }
    }

    pub(crate) fn sync_run(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let store = copy.store.clone();
        let life = self.life(at);
        let delay = self.disk_delay() / 2;
        match self.synced(&store) {
            Ok(head) => {
                self.durable(at, head);
                self.after(delay, Event::SyncDone { at, life, head });
            }
            Err(e) => {
                self.store_error(at, &e, "syncing the log");
                self.input(at, Input::StoreFailed);
            }
        }
    }

    pub(crate) fn meta_run(&mut self, at: At) {
        let life = self.life(at);
        let Some(running) = &mut self.hosts[at].running else { return };
        let Some(copy) = &mut running.copy else { return };
        let Some((version, bytes)) = copy.meta_next.take() else {
            copy.meta_writing = false;
            return;
        };
        let store = running.store.clone();
        let bytes = self.bent_promises(bytes);
        self.hosts[at].known.meta_maybe = Some(bytes.clone());
        let forgotten = self.is_broken(Broken::PromiseForgotten);
        let put = if forgotten { Ok(()) } else { store.put_meta(super::host::IMAGE, &bytes) };
        match put {
            Ok(()) => {
                let known = &mut self.hosts[at].known;
                known.meta = Some(bytes);
                known.meta_maybe = None;
                let delay = self.disk_delay() / 2;
                self.after(delay, Event::MetaDone { at, life, version });
                self.after(delay + 1, Event::MetaRun { at, life });
            }
            Err(e) => {
                self.store_error(at, &e, "writing promises");
                self.input(at, Input::StoreFailed);
            }
        }
    }

    fn roll_back(
        &mut self,
        at: At,
        machine: &mut Machine,
        to: Head,
        keep_fork: bool,
        out: &mut Vec<Output>,
    ) -> bool {
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        let from = store.head();
        let log_start = store.log_start();
        // What the log was trimmed beyond has no epoch here, and cannot be gone back to.
        if to.seq < store.log_start().prev() {
            self.note(|| format!("{at} cannot roll back to {}", to.seq));
        } else {
            self.cutting(at, to);
        }
        match self.cut_back(&store, to, keep_fork) {
            Ok(fork) => {
                self.note(|| format!("{at} rolls back from {} to {} of {}", from.seq, to.seq, to.epoch));
                self.cut(at, from, to, fork.as_ref(), log_start);
                self.env(at, |env| machine.rolled_back(env, (*store.state()).clone(), out));
                for token in self.kept_waiting(at) {
                    self.flush_done(at, machine, token, Ok(()));
                }
                true
            }
            Err(StoreError::CannotRollBack { .. })
                if machine.status(self.hosts[at].now(self.now)).owner.is_some() =>
            {
                let from = machine.status(self.hosts[at].now(self.now)).owner;
                let from = from.filter(|h| *h != self.hosts[at].id.host);
                // A separate lineage was given up, and the copy cannot be cut back to what it had promised the
                // others: until it is given the blocks anew, it is lost to them.
                self.oracle.bereft |= from.is_none();
                out.extend(from.map(|from| Output::StartBlockSync { from }));
                false
            }
            Err(e) => {
                self.store_error(at, &e, "rolling back");
                self.env(at, |env| machine.handle(env, Input::StoreFailed, out));
                false
            }
        }
    }

    // --- what peers say ---

    /// Takes a frame off the wire.
    pub(crate) fn receive(&mut self, from: At, at: At, packet: &Packet) {
        let host = self.host_id(from);
        self.heard(from, at);
        match packet {
            Packet::Control(bytes) => match msg::decode::<ImageMsg>(bytes) {
                Ok(m) => {
                    if let ImageMsg::Propose { proposal, .. } = &m
                        && self.hosts[from].liar
                    {
                        self.oracle.proposals.insert(proposal.digest(), proposal.ballot);
                    }
                    self.message(host, at, m);
                }
                // As the engine does: whoever says what cannot be read is hung up on.
                Err(_) if self.hosts[from].liar => self.reset(from, at),
                Err(e) => {
                    self.fail(Check::MessagesDecode, format!("a message of host {from} does not decode: {e}"))
                }
            },
            Packet::Update(header, payload) => match Update::decode(header) {
                Ok(update) => self.take(host, at, &update, payload),
                Err(_) => {
                    let Some(mut machine) = self.lock(at) else { return };
                    let mut out = Vec::new();
                    self.env(at, |env| machine.refuse(env, host, None, Refusal::Malformed, &mut out));
                    self.unlock(at, machine, out);
                }
            },
            Packet::Beat { .. } | Packet::Close => {}
        }
    }

    fn message(&mut self, from: HostId, at: At, message: ImageMsg) {
        if self.hosts[at].copy().is_none() {
            let (ImageMsg::Offer { role, .. } | ImageMsg::Propose { role, .. }) = &message else { return };
            let role = *role;
            let Some(running) = &self.hosts[at].running else { return };
            match running.store.create_image(super::host::IMAGE, role) {
                Ok(copy) => {
                    let (id, timing) = (self.hosts[at].id.clone(), self.timing.clone());
                    let image = super::host::IMAGE;
                    self.admit(at, copy, |env, out| Ok(Machine::blank(env, id, timing, image, role, out)));
                }
                Err(e) => return self.store_error(at, &e, "making room for a copy"),
            }
        }
        self.input(at, Input::Msg { from, msg: Box::new(message) });
    }

    /// As the engine's `Image::take`.
    fn take(&mut self, from: HostId, at: At, update: &Update, payload: &[u8]) {
        let Some(mut machine) = self.lock(at) else { return };
        let mut out = Vec::new();
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        let witness = store.kind() == MemberRole::Witness;
        let whole =
            if witness { payload.is_empty() } else { payload_matches(&update.header.digests, payload) };
        if whole {
            self.take_whole(at, &mut machine, from, update, payload, &mut out);
        } else {
            self.env(at, |env| machine.refuse(env, from, Some(update), Refusal::AlteredPayload, &mut out));
        }
        self.unlock(at, machine, out);
    }

    fn take_whole(
        &mut self,
        at: At,
        machine: &mut Machine,
        from: HostId,
        update: &Update,
        payload: &[u8],
        out: &mut Vec<Output>,
    ) {
        let store = self.hosts[at].copy().expect("invariant: it is running").store.clone();
        for _ in 0..2 {
            match self.env(at, |env| machine.check_update(env, from, update, out)) {
                Ok(Take::Append) => {
                    let payload = if store.kind() == MemberRole::Witness { &[] } else { payload };
                    let reserved =
                        store.reserve(update.bytes.len(), payload.len() / BLOCK_BYTES, Space::Data);
                    let skipped = self.breaks(Broken::AppendSkipped, 20);
                    let append = |r| if skipped { Ok(()) } else { store.append(r, update, payload) };
                    match reserved.and_then(append) {
                        Ok(()) => {
                            self.taken(at, update);
                            self.wake_lines(at);
                            self.env(at, |env| machine.took(env, update, out));
                        }
                        Err(StoreError::Full) if store.latched().is_none() => {
                            self.store_error(at, &StoreError::Full, "making room for an update");
                            self.env(at, |env| {
                                machine.refuse(env, from, Some(update), Refusal::NoSpace, out);
                            });
                        }
                        Err(e) => {
                            self.store_error(at, &e, "appending an update");
                            self.env(at, |env| machine.handle(env, Input::StoreFailed, out));
                        }
                    }
                    return;
                }
                Ok(Take::RollBack { to }) => {
                    if !self.roll_back(at, machine, to, true, out) {
                        return;
                    }
                }
                Ok(Take::Ignore) | Err(_) => return,
            }
        }
    }

    // --- what peers ask for ---

    pub(crate) fn read_headers(&mut self, at: At, to: HostId, after: Head, upto: Head) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let store = copy.store.clone();
        let messages = headers_between(&store, after, upto)
            .unwrap_or_else(|| vec![ImageMsg::FetchFailed { upto, log_start: store.log_start() }]);
        for m in messages {
            self.on_line(at, to, |l| l.messages.push_back(m));
        }
    }

    pub(crate) fn serve(&mut self, at: At, to: HostId, after: Seq, upto: Head, headers_only: bool) {
        let Some(copy) = self.hosts[at].copy() else { return };
        let log_start = copy.store.log_start();
        let held = copy.store.head_at(upto.seq).ok().flatten() == Some(upto) && after.next() >= log_start;
        self.on_line(at, to, |l| {
            if held {
                l.serve = Some(Feed { next: after.next(), headers_only, upto: Some(upto.seq) });
            } else {
                l.messages.push_back(ImageMsg::FetchFailed { upto, log_start });
            }
        });
    }

    fn start_block_sync(&mut self, at: At, from: HostId) {
        let Some(owner) = self.at(from) else { return };
        let life = self.life(at);
        let copy = self.hosts[at].copy_mut().expect("invariant: it is running");
        if copy.pull.is_some() {
            return;
        }
        copy.pull = Some(Pull::new(owner));
        self.note(|| format!("{at} copies blocks from {owner}"));
        self.after(1000, Event::Pull { at, life });
    }
}

fn headers_between(store: &vmfs_store::ImageStore, after: Head, upto: Head) -> Option<Vec<ImageMsg>> {
    if store.head_at(upto.seq).ok()? != Some(upto) {
        return None;
    }
    let mut messages = Vec::new();
    let (mut parent, mut headers, mut bytes) = (after, Vec::new(), 0);
    let mut last = after;
    // Few per message, so that the continuation of an answer is exercised.
    let most = HEADERS_MAX.min(7);
    for seq in after.seq.0 + 1..=upto.seq.0 {
        let update = store.update_at(Seq(seq)).ok()??;
        if headers.len() == most || bytes + update.bytes.len() > HEADERS_MAX_BYTES {
            messages.push(ImageMsg::Headers { parent, headers: std::mem::take(&mut headers), upto });
            (parent, bytes) = (last, 0);
        }
        bytes += update.bytes.len();
        last = update.head();
        headers.push(update.bytes.to_vec());
    }
    if !headers.is_empty() {
        messages.push(ImageMsg::Headers { parent, headers, upto });
    }
    Some(messages)
}

/// A message in one line.
pub(super) fn brief(m: &ImageMsg) -> String {
    let text = match m {
        ImageMsg::Offer { head, start, .. } => format!("Offer head {:?} start {:?}", head, start),
        ImageMsg::Headers { parent, headers, upto } => {
            format!("Headers {} after {} upto {}", headers.len(), parent.seq, upto.seq)
        }
        ImageMsg::Join(j) => format!("Join head {:?} durable {:?}", j.head, j.durable.seq),
        ImageMsg::Voted { vote, .. } => {
            format!("Voted head {:?} commit {:?} acked {:?}", vote.head, vote.commit, vote.acked)
        }
        ImageMsg::Refused { why, seq, promised, join } => {
            format!("Refused {why:?} {seq} promised {promised} head {:?}", join.head)
        }
        ImageMsg::Propose { proposal, occasion, head, .. } => {
            format!("Propose {} {occasion:?} head {head:?}", proposal.ballot)
        }
        ImageMsg::Share { epoch, .. } => format!("Share {epoch}"),
        other => format!("{other:?}"),
    };
    text.chars().take(260).collect()
}
