//! What one host has to say to one peer about one image: a queue and the task that empties it onto
//! the image stream. Control messages overtake updates, except `Sync`, which waits until the stream
//! has passed its update.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use vmfs_common::header::Update;
use vmfs_common::msg::{self, ImageMsg, Join};
use vmfs_common::{Head, HostId, Seq};
use vmfs_net::{NetError, Network, StreamSender, spot};
use vmfs_proto::Input;
use vmfs_store::StoreError;

use super::image::Image;
use super::ring::RingItem;

/// Control messages of one image waiting for one peer; above it the line is torn down and starts over.
const MESSAGES_MAX: usize = 4096;
/// Bytes of control messages of all images waiting for one peer; above it likewise.
pub(crate) const PEER_MESSAGES_BYTES_MAX: usize = 16 << 20;
/// Bytes taken from the ring or the log at a time.
const BATCH_BYTES: usize = 4 << 20;

/// How long small updates are collected once they keep coming. What is lost with the owner's host when
/// nobody flushes grows by no more than this.
const LINGER: Duration = Duration::from_millis(1);
/// Small updates are handed to the connection together, about this much at a time.
const GROUP_BYTES: usize = 64 << 10;
/// Payload that is sent without waiting for more.
const EAGER_BYTES: usize = 32 << 10;

/// Updates to send from somewhere on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Feed {
    next: Seq,
    headers_only: bool,
    /// Last update to send; `None`: go on with whatever is appended.
    upto: Option<Seq>,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<ImageMsg>,
    /// The owner's live stream.
    feed: Option<Feed>,
    /// A part of the log that a candidate asked for.
    serve: Option<Feed>,
    /// Headers that were asked for: after the first head, up to the second.
    headers: Option<(Head, Head)>,
    /// Of the updates to be made durable and not yet passed: the lowest and the highest, and the
    /// owner's latest commit point.
    sync: Option<(Seq, Seq, Seq)>,
    closed: bool,
    /// Closed by the image, which knows why; the task need not say so.
    closed_here: bool,
    /// The last update handed to the connection, and whether that was reported.
    sent: (Seq, bool),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) peer: HostId,
    pub(crate) session: u64,
    queue: Mutex<Queue>,
    notify: Notify,
    /// There is a feed that goes on with whatever is appended.
    feeding: AtomicBool,
    /// The task looks for updates by itself before long: appends need not wake it.
    lingering: AtomicBool,
    /// The update that the feed goes on with.
    fed_to: AtomicU64,
    /// Payload appended since the task last looked, in bytes.
    unsent: AtomicUsize,
    /// Bytes of messages waiting for this peer, over all images.
    waiting_bytes: Arc<AtomicUsize>,
}

impl Drop for Line {
    fn drop(&mut self) {
        let left: usize = self.queue.get_mut().messages.iter().map(cost_bytes).sum();
        self.waiting_bytes.fetch_sub(left, Ordering::Relaxed);
    }
}

/// About what a waiting message occupies.
fn cost_bytes(message: &ImageMsg) -> usize {
    let marks = |join: &Join| size_of_val(&join.marks[..]);
    let parts = match message {
        ImageMsg::Offer { certificate, .. } => certificate.len(),
        ImageMsg::Join(join) | ImageMsg::Refused { join, .. } | ImageMsg::FetchHeaders { join, .. } => {
            marks(join)
        }
        ImageMsg::Headers { headers, .. } => headers.iter().map(|h| h.len() + size_of::<Vec<u8>>()).sum(),
        _ => 0,
    };
    size_of::<ImageMsg>() + parts
}

enum Work {
    Message(Box<ImageMsg>),
    Headers(Head, Head),
    Feed(Feed, bool),
    Idle,
    Closed,
}

impl Line {
    /// A line and its task. `head` of the image wakes it through [`Line::wake`].
    pub(crate) fn start(image: &Arc<Image>, network: &Network, peer: HostId, session: u64) -> Arc<Self> {
        let line = Arc::new(Self {
            peer,
            session,
            queue: Mutex::default(),
            notify: Notify::new(),
            feeding: AtomicBool::new(false),
            lingering: AtomicBool::new(false),
            fed_to: AtomicU64::new(0),
            unsent: AtomicUsize::new(0),
            waiting_bytes: image.node().waiting_bytes(peer),
        });
        let (task, image, network) = (line.clone(), image.clone(), network.clone());
        let runtime = image.node().runtime().clone();
        spot::spawn(&runtime, async move {
            let end = match network.open_stream(peer, image.id) {
                Ok(stream) => task.run(&image, stream).await,
                Err(e) => Err(e),
            };
            if let Err(e) = end {
                tracing::debug!(image = %image.id.short(), peer = %peer.short(), "stream ended: {e}");
            }
            task.queue.lock().closed = true;
            image.line_ended(&task);
        });
        line
    }

    pub(crate) fn close(&self) {
        let mut q = self.queue.lock();
        q.closed = true;
        q.closed_here = true;
        drop(q);
        self.notify.notify_one();
    }
    pub(crate) fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }
    pub(crate) fn was_closed_here(&self) -> bool {
        self.queue.lock().closed_here
    }
    /// How far the stream has got, when that has not been reported yet.
    pub(crate) fn take_progress(&self) -> Option<Seq> {
        let (seq, reported) = &mut self.queue.lock().sent;
        (!std::mem::replace(reported, true)).then_some(*seq)
    }
    /// True while the peer is sent what is appended.
    pub(crate) fn is_feeding(&self) -> bool {
        self.feeding.load(Ordering::Acquire)
    }
    /// The first update that the peer has yet to be sent, while it is sent what is appended.
    pub(crate) fn feeds_from(&self) -> Option<Seq> {
        self.is_feeding().then(|| Seq(self.fed_to.load(Ordering::Acquire)))
    }
    /// An update with this much payload was appended. While updates keep coming the task collects them
    /// for [`LINGER`] or up to [`EAGER_BYTES`]; nobody waits for them before a flush, and that wakes it.
    pub(crate) fn appended(&self, bytes: usize) {
        let unsent = self.unsent.fetch_add(bytes, Ordering::AcqRel) + bytes;
        // Either this sees that the task waits for a call, or the task, which says so before its last look,
        // sees the new head.
        fence(Ordering::SeqCst);
        if unsent >= EAGER_BYTES || !self.lingering.load(Ordering::SeqCst) {
            self.notify.notify_one();
        }
    }
    pub(crate) fn send(&self, message: ImageMsg) {
        let mut q = self.queue.lock();
        let bytes = cost_bytes(&message);
        let waiting = self.waiting_bytes.load(Ordering::Relaxed) + bytes;
        if q.closed {
            return;
        }
        if q.messages.len() >= MESSAGES_MAX || waiting > PEER_MESSAGES_BYTES_MAX {
            tracing::debug!(peer = %self.peer.short(), "too many messages wait for this peer: starting over");
            q.closed = true;
        } else {
            self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
            q.messages.push_back(message);
        }
        drop(q);
        self.notify.notify_one();
    }
    /// Sends the headers after `after` up to `upto`, one message at a time: in place of what was asked
    /// for before, which whoever asks again no longer waits for.
    pub(crate) fn send_headers(&self, after: Head, upto: Head) {
        self.queue.lock().headers = Some((after, upto));
        self.notify.notify_one();
    }
    /// Goes on after `last`, unless other headers were asked for meanwhile.
    fn headers_sent(&self, after: Head, upto: Head, last: Option<Head>) {
        let mut q = self.queue.lock();
        if q.headers == Some((after, upto)) {
            q.headers = last.filter(|last| last.seq < upto.seq).map(|last| (last, upto));
        }
    }
    fn next_message(&self, q: &mut Queue) -> Option<ImageMsg> {
        let message = q.messages.pop_front()?;
        self.waiting_bytes.fetch_sub(cost_bytes(&message), Ordering::Relaxed);
        Some(message)
    }
    pub(crate) fn feed(&self, after: Seq, headers_only: bool) {
        let mut q = self.queue.lock();
        q.feed = Some(Feed { next: after.next(), headers_only, upto: None });
        self.fed_to.store(after.next().0, Ordering::Release);
        self.feeding.store(true, Ordering::Release);
        drop(q);
        self.notify.notify_one();
    }
    pub(crate) fn stop_feed(&self) {
        let mut q = self.queue.lock();
        q.feed = None;
        q.sync = None;
        self.feeding.store(false, Ordering::Release);
    }
    pub(crate) fn serve(&self, after: Seq, upto: Seq, headers_only: bool) {
        self.queue.lock().serve = Some(Feed { next: after.next(), headers_only, upto: Some(upto) });
        self.notify.notify_one();
    }
    pub(crate) fn sync(&self, seq: Seq, commit: Seq) {
        let mut q = self.queue.lock();
        q.sync =
            Some(q.sync.map_or((seq, seq, commit), |(low, high, _)| (low.min(seq), high.max(seq), commit)));
        drop(q);
        self.notify.notify_one();
    }

    fn next_work(&self, head: Seq) -> Work {
        let mut q = self.queue.lock();
        if q.closed {
            return Work::Closed;
        }
        if let Some(m) = self.next_message(&mut q) {
            return Work::Message(Box::new(m));
        }
        if let Some((after, upto)) = q.headers {
            return Work::Headers(after, upto);
        }
        if let (Some(feed), Some((low, high, commit))) = (q.feed, q.sync)
            && feed.next > low
        {
            // The stream has passed the lowest one wanted: ask for all that it has passed.
            let seq = high.min(feed.next.prev());
            q.sync = (high > seq).then_some((high, high, commit));
            return Work::Message(Box::new(ImageMsg::Sync { seq, commit }));
        }
        if let Some(serve) = q.serve {
            if serve.upto.is_some_and(|u| serve.next <= u) {
                return Work::Feed(serve, true);
            }
            q.serve = None;
        }
        match q.feed {
            Some(feed) if feed.next <= head => Work::Feed(feed, false),
            _ => Work::Idle,
        }
    }

    async fn run(&self, image: &Arc<Image>, mut stream: StreamSender) -> Result<(), NetError> {
        // A stream nothing was sent on does not exist yet, so it cannot have been closed either.
        let mut is_open = false;
        // Updates were sent since the last wait: more are likely to follow.
        let mut busy = false;
        loop {
            match self.next_work(image.head_seq()) {
                Work::Closed => return Ok(()),
                Work::Message(m) => {
                    // Whoever has asked for a sync waits for it, and does not write meanwhile.
                    busy &= !matches!(*m, ImageMsg::Sync { .. });
                    stream.send_control(Bytes::from(msg::encode(&*m))).await?;
                }
                Work::Headers(after, upto) => {
                    let (message, last) = tokio::task::block_in_place(|| image.headers_after(after, upto));
                    self.headers_sent(after, upto, last);
                    stream.send_control(Bytes::from(msg::encode(&message))).await?;
                }
                Work::Feed(feed, serving) => {
                    self.unsent.store(0, Ordering::Release);
                    busy = true;
                    self.send_batch(image, &mut stream, feed, serving).await?;
                }
                Work::Idle => {
                    let linger = std::mem::take(&mut busy);
                    if self.lingering.swap(linger, Ordering::SeqCst) && !linger {
                        // What was appended just before did not wake us: it is looked for once more.
                        fence(Ordering::SeqCst);
                        continue;
                    }
                    tokio::select! {
                        () = self.notify.notified() => {}
                        () = tokio::time::sleep(LINGER), if linger => {}
                        () = stream.closed(), if is_open => return Err(NetError::Broken),
                    }
                    continue;
                }
            }
            is_open = true;
        }
    }

    async fn send_batch(
        &self,
        image: &Arc<Image>,
        stream: &mut StreamSender,
        feed: Feed,
        serving: bool,
    ) -> Result<(), NetError> {
        let items = match image.ring_from(feed.next, BATCH_BYTES) {
            Some(items) => items,
            None => match tokio::task::block_in_place(|| image.log_from(feed.next, BATCH_BYTES)) {
                Ok(items) => items,
                Err(why) => {
                    self.log_unreadable(image, feed, serving, &why);
                    return Ok(());
                }
            },
        };
        let mut group: Vec<(Bytes, Bytes)> = Vec::new();
        let (mut group_bytes, mut last) = (0, feed.next.prev());
        let mut items = items.into_iter().peekable();
        while let Some(RingItem { seq, header, payload }) = items.next() {
            if feed.upto.is_some_and(|u| seq > u) || !self.advance(&feed, seq, serving) {
                break;
            }
            let payload = if feed.headers_only { Bytes::new() } else { payload };
            group_bytes += header.len() + payload.len();
            group.push((header, payload));
            last = seq;
            if group_bytes < GROUP_BYTES && items.peek().is_some() {
                continue;
            }
            stream.send_updates(&group).await?;
            group.clear();
            group_bytes = 0;
            // What has a deadline goes between two groups.
            while let Some(m) = self.between_updates(last, serving) {
                stream.send_control(Bytes::from(msg::encode(&m))).await?;
            }
        }
        if !group.is_empty() {
            stream.send_updates(&group).await?;
            self.note_sent(last, serving);
        }
        Ok(())
    }

    fn between_updates(&self, seq: Seq, serving: bool) -> Option<ImageMsg> {
        self.note_sent(seq, serving);
        self.next_message(&mut self.queue.lock())
    }

    fn note_sent(&self, seq: Seq, serving: bool) {
        if !serving {
            self.queue.lock().sent = (seq, false);
        }
    }

    /// Moves the feed past `seq`; false when it was stopped or restarted meanwhile.
    fn advance(&self, feed: &Feed, seq: Seq, serving: bool) -> bool {
        let mut q = self.queue.lock();
        if q.closed {
            return false;
        }
        let slot = if serving { &mut q.serve } else { &mut q.feed };
        match slot {
            Some(f) if f.next == seq && f.headers_only == feed.headers_only => {
                f.next = seq.next();
                if !serving {
                    self.fed_to.store(seq.next().0, Ordering::Release);
                }
                true
            }
            _ => false,
        }
    }

    fn log_unreadable(&self, image: &Arc<Image>, feed: Feed, serving: bool, why: &StoreError) {
        tracing::debug!(image = %image.id.short(), peer = %self.peer.short(), "log from {}: {why}", feed.next);
        let mut q = self.queue.lock();
        if serving {
            q.serve = None;
        } else {
            q.feed = None;
            self.feeding.store(false, Ordering::Release);
        }
        drop(q);
        let damaged = matches!(why, StoreError::BadPayload { .. } | StoreError::Corrupt { .. });
        if damaged && !serving {
            tracing::error!(image = %image.id, seq = %feed.next, "the log is damaged: {why}");
            image.input(Input::LogUnreadable { to: self.peer, seq: feed.next });
        } else {
            image.feed_failed(self.peer, feed.upto.filter(|_| serving));
        }
    }
}

/// A ring item from a log entry.
pub(crate) fn from_log(update: &Update, payload: Vec<u8>) -> RingItem {
    RingItem::new(update, Bytes::from(payload))
}
