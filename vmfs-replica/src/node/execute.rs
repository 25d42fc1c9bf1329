//! Carrying out what a machine asks for. Everything here runs under the image's lock, so whatever is
//! slow is only started.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmfs_common::msg::{HEADERS_MAX, HEADERS_MAX_BYTES, ImageMsg};
use vmfs_common::{Head, HostId, Seq};
use vmfs_proto::{Event, FlushError, Input, Output};
use zeroize::Zeroizing;

use super::NodeInner;
use super::image::{Core, Image, Pending};
use super::io::IoError;
use super::line::Line;
use super::sync::Puller;

/// For how long the operator's `fail` answers waiting requests with an error, in milliseconds.
const FAILING_MS: u64 = 1000;
/// Shortest time between two new starts of the streams with one peer.
const BOUNCE_PAUSE: Duration = Duration::from_secs(1);

impl Image {
    /// Carries out `outputs` in order, and whatever follows from them.
    pub(super) fn execute(self: &Arc<Self>, node: &Arc<NodeInner>, core: &mut Core, outputs: Vec<Output>) {
        let mut queue = VecDeque::from(outputs);
        while let Some(output) = queue.pop_front() {
            let mut more = Vec::new();
            self.execute_one(node, core, output, &mut more);
            queue.extend(more);
        }
    }

    fn execute_one(
        self: &Arc<Self>,
        node: &Arc<NodeInner>,
        core: &mut Core,
        output: Output,
        more: &mut Vec<Output>,
    ) {
        match output {
            Output::Send { to, msg } => self.on_line(node, to, |l| l.send(*msg)),
            Output::Stream { to, after, headers_only } => {
                self.on_line(node, to, |l| l.feed(after, headers_only));
            }
            Output::StopStream { to } => self.on_line(node, to, Line::stop_feed),
            Output::RequestSync { to, seq, commit } => self.on_line(node, to, |l| l.sync(seq, commit)),
            Output::LocalSync if core.sync_here => core.sync_due = true,
            Output::LocalSync => self.start_sync(node),
            Output::AppendLocal(update) => {
                if let Err(e) = self.store_local(&update) {
                    tracing::error!(image = %self.id, "stopped after an error of the store: {e}");
                    node.with_env(self, |env| core.machine.handle(env, Input::StoreFailed, more));
                }
            }
            Output::PersistMeta { version, bytes } => self.persist_meta(node, version, bytes),
            Output::RollBack { to, keep_fork } => node.with_env(self, |env| {
                if let Err(e) = self.roll_back(core, env, more, to, keep_fork) {
                    self.roll_back_failed(core, env, more, &e);
                }
            }),
            Output::FlushDone { token, result } => self.flush_done(core, token, result),
            Output::OpDone { token, result } => {
                if let Some(Pending::Operator(answer)) = self.pending.lock().remove(&token) {
                    // Whoever asked may have gone away.
                    let _ = answer.send(result);
                }
            }
            Output::GateChanged => {
                let image = self.clone();
                core.deferred.push(Box::new(move || {
                    image.wake_all();
                    image.node().claims_changed();
                }));
            }
            Output::FailWaiting => {
                self.failing_until.store(node.now().0 + FAILING_MS, Ordering::Release);
                let image = self.clone();
                core.deferred.push(Box::new(move || image.wake_all()));
            }
            Output::ReadHeaders { to, after, upto } => {
                self.on_line(node, to, |l| l.send_headers(after, upto));
            }
            Output::ServeUpdates { to, after, upto, headers_only } => {
                self.serve_updates(node, to, after, upto, headers_only);
            }
            Output::StartBlockSync { from } => self.start_block_sync(node, from),
            Output::Report(event) => self.report(&event),
        }
    }

    /// The line to a connected peer, made when there is none.
    fn on_line(self: &Arc<Self>, node: &Arc<NodeInner>, to: HostId, f: impl FnOnce(&Line)) {
        let Some((session, _)) = node.session(to) else { return };
        let mut lines = self.lines.lock();
        let line = match lines.get(&to) {
            Some(line) if line.session == session && !line.is_closed() => line.clone(),
            _ => {
                let line = Line::start(self, node.network(), to, session);
                lines.insert(to, line.clone());
                line
            }
        };
        drop(lines);
        f(&line);
    }

    fn start_sync(self: &Arc<Self>, node: &NodeInner) {
        let image = self.clone();
        node.blocking(move || image.sync_log());
    }

    fn persist_meta(self: &Arc<Self>, node: &Arc<NodeInner>, version: u64, bytes: Vec<u8>) {
        let mut slot = self.meta.lock();
        slot.next = Some((version, Zeroizing::new(bytes)));
        if std::mem::replace(&mut slot.writing, true) {
            return;
        }
        drop(slot);
        let (image, node2) = (self.clone(), node.clone());
        node.blocking(move || {
            loop {
                let mut slot = image.meta.lock();
                let Some((version, bytes)) = slot.next.take() else {
                    slot.writing = false;
                    return;
                };
                drop(slot);
                match node2.store.put_meta(image.id, &bytes) {
                    Ok(()) => image.input(Input::MetaPersisted { version }),
                    Err(e) => {
                        tracing::error!(image = %image.id, "stopped: cannot write its promises: {e}");
                        image.input(Input::StoreFailed);
                    }
                }
            }
        });
    }

    fn flush_done(&self, core: &mut Core, token: u64, result: Result<(), FlushError>) {
        if let Some(Pending::Flush(done)) = self.pending.lock().remove(&token) {
            let result = result.map_err(|e| match e {
                FlushError::NotOwner => IoError::NotOwner,
                FlushError::StoreFailed | FlushError::Timeout | FlushError::GivenUp => IoError::Failed,
            });
            core.deferred.push(Box::new(move || done(result)));
        }
    }

    /// The next message of headers after `after` up to `upto`, and where it ends; or that they are not
    /// there.
    pub(super) fn headers_after(&self, after: Head, upto: Head) -> (ImageMsg, Option<Head>) {
        let log_start = self.store.log_start();
        self.headers_between(after, upto).map_or_else(
            || (ImageMsg::FetchFailed { upto, log_start }, None),
            |(headers, last)| (ImageMsg::Headers { parent: after, headers, upto }, Some(last)),
        )
    }

    fn headers_between(&self, after: Head, upto: Head) -> Option<(Vec<Vec<u8>>, Head)> {
        if self.store.head_at(upto.seq).ok()? != Some(upto) {
            return None;
        }
        let (mut headers, mut bytes, mut last) = (Vec::new(), 0, after);
        while last.seq < upto.seq && headers.len() < HEADERS_MAX {
            let update = self.store.update_at(last.seq.next()).ok()??;
            bytes += update.bytes.len();
            if bytes > HEADERS_MAX_BYTES && !headers.is_empty() {
                break;
            }
            last = update.head();
            headers.push(update.bytes.to_vec());
        }
        (!headers.is_empty()).then_some((headers, last))
    }

    fn serve_updates(
        self: &Arc<Self>,
        node: &Arc<NodeInner>,
        to: HostId,
        after: Seq,
        upto: Head,
        headers_only: bool,
    ) {
        let (image, node2) = (self.clone(), node.clone());
        node.blocking(move || {
            let log_start = image.store.log_start();
            let held =
                image.store.head_at(upto.seq).ok().flatten() == Some(upto) && after.next() >= log_start;
            image.on_line(&node2, to, |l| {
                if held {
                    l.serve(after, upto.seq, headers_only);
                } else {
                    l.send(ImageMsg::FetchFailed { upto, log_start });
                }
            });
        });
    }

    fn start_block_sync(self: &Arc<Self>, node: &Arc<NodeInner>, from: HostId) {
        // The one before may not have said yet that it is done: it has installed its content, which the owner
        // has answered already.
        let token = node.random_u64().max(1);
        self.pulling.store(token, Ordering::Release);
        self.pulled_blocks.store(0, Ordering::Relaxed);
        let image = self.clone();
        let puller = Puller::new(node.clone(), self.clone(), from, token);
        tracing::info!(image = %self.id, owner = %from.short(), "the log does not reach back: copying blocks");
        node.spawn(async move {
            let result = puller.run().await;
            // Not that of a later one.
            let _ = image.pulling.compare_exchange(token, 0, Ordering::AcqRel, Ordering::Acquire);
            match result {
                Ok(head) => {
                    tracing::info!(image = %image.id, seq = head.seq.0, "content copied and verified");
                }
                Err(e) => {
                    tracing::warn!(image = %image.id, "block-level sync given up: {e}");
                    image.input(Input::ImportFailed);
                }
            }
        });
    }

    fn report(&self, event: &Event) {
        let image = self.id.short();
        match event {
            Event::Refused { .. } | Event::Degraded | Event::Frozen | Event::Deposed { .. } => {
                tracing::warn!(image, "{event:?}");
            }
            Event::Fork { .. } | Event::Amnesia { .. } => tracing::error!(image, "{event:?}"),
            _ => tracing::info!(image, "{event:?}"),
        }
    }

    /// The log no longer holds what a peer was being sent: both ends start over, which finds out how
    /// to go on.
    pub(crate) fn feed_failed(self: &Arc<Self>, peer: HostId, serving: Option<Seq>) {
        let node = self.node();
        match serving {
            Some(upto) => {
                let upto = self.store.head_at(upto).ok().flatten().unwrap_or_default();
                let log_start = self.store.log_start();
                self.on_line(&node, peer, |l| l.send(ImageMsg::FetchFailed { upto, log_start }));
            }
            None => self.restate(peer),
        }
    }

    /// A task of a line has ended by itself: when the connection is still there, both ends start over.
    pub(crate) fn line_ended(self: &Arc<Self>, line: &Arc<Line>) {
        let current = self.lines.lock().get(&line.peer).is_some_and(|l| Arc::ptr_eq(l, line));
        if current && !line.was_closed_here() {
            self.bounce(line.peer);
        }
    }

    /// Tells the machine that a peer went and came: both ends state anew where they are. At most once
    /// a second for each peer, so that two ends do not keep each other busy; what is asked for sooner is
    /// done when the second is over.
    pub(super) fn bounce(self: &Arc<Self>, peer: HostId) {
        let now = Instant::now();
        let mut bounced = self.bounced.lock();
        let wait = match bounced.get(&peer) {
            Some((_, true)) => return,
            Some((at, false)) => BOUNCE_PAUSE.saturating_sub(now.duration_since(*at)),
            None => Duration::ZERO,
        };
        bounced.insert(peer, (now, !wait.is_zero()));
        drop(bounced);
        if wait.is_zero() {
            self.restate(peer);
            return;
        }
        let image = self.clone();
        self.node().spawn(async move {
            tokio::time::sleep(wait).await;
            image.bounced.lock().insert(peer, (Instant::now(), false));
            // The other end may have brought a new stream meanwhile; stating it all again is harmless.
            image.restate(peer);
        });
    }

    fn restate(self: &Arc<Self>, peer: HostId) {
        self.peer_down(peer);
        if self.node().session(peer).is_some() {
            self.input(Input::PeerUp { host: peer });
        }
    }

    pub(super) fn peer_down(self: &Arc<Self>, peer: HostId) {
        if let Some(line) = self.lines.lock().remove(&peer) {
            line.close();
        }
        self.input(Input::PeerDown { host: peer });
    }
}
