//! What peers send: image streams, and questions. A peer with a valid certificate may still send whatever
//! it likes, as fast as it can: how much of this host it can occupy is bounded in [`super::quota`].

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::{HostId, ImageId};
use vmfs_net::{Answer, Frame, FrameReader, NetError, RequestHandler, StreamHandler};
use vmfs_proto::Input;

use super::NodeInner;
use super::ask::{Ask, Told, encode_told};
use super::image::{Image, SealPin};
use super::quota::{Pace, Quota, Quotas, Wasted, cpu_time};

/// Most updates, and about the most bytes, taken at a time.
const BATCH_UPDATES_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 2 << 20;
/// Payload up to which a batch is taken on the network's own thread, and the longest that may last
/// before the disk counts as slow.
const INLINE_BYTES_MAX: usize = 128 << 10;
const INLINE_TIME_MAX: Duration = Duration::from_millis(5);
/// How often it is looked up whether a peer is a member.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Hands incoming streams and requests to the node.
pub(super) struct Incoming {
    node: Mutex<Weak<NodeInner>>,
    /// The reader at work for each (image, peer): a second stream replaces the first.
    readers: Mutex<HashMap<(ImageId, HostId), (u64, tokio::task::AbortHandle)>>,
    quotas: Quotas,
}

impl Incoming {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { node: Mutex::new(Weak::new()), readers: Mutex::default(), quotas: Quotas::default() })
    }
    pub(super) fn attach(&self, node: &Arc<NodeInner>) {
        *self.node.lock() = Arc::downgrade(node);
    }
    fn node(&self) -> Option<Arc<NodeInner>> {
        self.node.lock().upgrade()
    }
}

/// [`Incoming`], as the network wants it.
pub(super) struct Handler(pub(super) Arc<Incoming>);

impl StreamHandler for Handler {
    fn on_stream(&self, from: HostId, session: u64, image: ImageId, frames: FrameReader) {
        let incoming = self.0.clone();
        let Some(node) = incoming.node() else { return };
        let key = (image, from);
        let serial = node.random_u64();
        let mut readers = incoming.readers.lock();
        let old = readers.remove(&key);
        let task = {
            let (incoming, node) = (incoming.clone(), node.clone());
            let replaced = old.is_some();
            tokio::spawn(async move {
                if let Some((_, old)) = old {
                    old.abort();
                }
                let quota = incoming.quotas.of(from);
                let ended = read_stream(&node, &quota, (from, session), image, frames, replaced).await;
                let mut readers = incoming.readers.lock();
                let current = readers.get(&key).is_some_and(|(s, _)| *s == serial);
                if current {
                    readers.remove(&key);
                }
                drop(readers);
                let connected = node.session(from).is_some_and(|(s, _)| s == session);
                if current && connected {
                    tracing::debug!(image = %image.short(), peer = %from.short(), "incoming stream ended: {ended:?}");
                    if let Some(image) = node.image(image) {
                        image.bounce(from);
                    }
                }
            })
        };
        readers.insert(key, (serial, task.abort_handle()));
    }
}

async fn read_stream(
    node: &Arc<NodeInner>,
    quota: &Quota,
    (from, session): (HostId, u64),
    image: ImageId,
    mut frames: FrameReader,
    replaced: bool,
) -> Result<(), NetError> {
    // The connection's PeerUp may still be on its way to the machines.
    node.wait_for_session(from, session).await;
    if replaced && let Some(image) = node.image(image) {
        image.bounce(from);
    }
    let mut pace = Pace::new();
    let (mut stranger, mut looked) = (true, None::<Instant>);
    let mut intake = Intake { node, from, image, batch: Vec::new(), wasted: Wasted::default() };
    while let Some(frame) = frames.next().await? {
        let turn = quota.turn().await;
        let ended = intake.take_ready(frame, &mut frames);
        drop(turn);
        let wasted = std::mem::take(&mut intake.wasted);
        if wasted.frames > 0 {
            if looked.is_none_or(|at| at.elapsed() > LOOK_AGAIN) {
                stranger = node.image(image).is_none_or(|i| i.is_stranger(from));
                looked = Some(Instant::now());
            }
            pace.charge(wasted, stranger).await;
        }
        ended?;
    }
    Ok(())
}

/// What one stream brings, on its way to its image.
struct Intake<'a> {
    node: &'a Arc<NodeInner>,
    from: HostId,
    image: ImageId,
    /// Updates (header and payload) that are to be taken together.
    batch: Vec<(Bytes, Bytes)>,
    /// What led to nothing since this was last looked at.
    wasted: Wasted,
}

impl Intake<'_> {
    /// Takes a frame and those that have arrived with it: one change of threads for all of them.
    fn take_ready(&mut self, frame: Frame, frames: &mut FrameReader) -> Result<(), NetError> {
        let mut bytes = self.take(frame)?;
        while bytes < BATCH_BYTES_MAX && self.batch.len() < BATCH_UPDATES_MAX {
            match frames.next_ready() {
                Ok(Some(frame)) => bytes += self.take(frame)?,
                Ok(None) => break,
                Err(e) => {
                    self.take_batch();
                    return Err(e);
                }
            }
        }
        self.take_batch();
        Ok(())
    }

    /// Queues an update. A control message is handled at once, after the updates that came before it. Says
    /// how long the frame is, in bytes.
    fn take(&mut self, frame: Frame) -> Result<usize, NetError> {
        let body = match frame {
            Frame::Update { header, payload } => {
                let bytes = header.len() + payload.len();
                self.batch.push((header, payload));
                return Ok(bytes);
            }
            Frame::Control(body) => body,
        };
        self.take_batch();
        let began = cpu_time();
        let mut routine = false;
        match msg::decode::<ImageMsg>(&body) {
            Ok(message) => {
                routine = matches!(message, ImageMsg::Ack { .. } | ImageMsg::Sync { .. });
                on_message(self.node, self.from, self.image, message)?;
            }
            Err(e) => self.node.refused("malformed-message", self.from, &e),
        }
        self.wasted.add(1, cpu_time().saturating_sub(began), routine);
        Ok(body.len())
    }

    /// Hands the batch to the image. A small one is taken on this thread, which is cheaper than handing the
    /// others' work over; not while the disk has been slow of late, since this thread serves other streams
    /// too.
    fn take_batch(&mut self) {
        let updates = std::mem::take(&mut self.batch);
        if updates.is_empty() {
            return;
        }
        self.node.inline_syncs.note(self.image, self.node.now());
        let count = updates.len();
        let began = cpu_time();
        let refused = self.node.image(self.image).map_or(count, |image| self.hand_over(&image, updates));
        if refused == count {
            self.wasted.add(count, cpu_time().saturating_sub(began), false);
        }
    }

    fn hand_over(&self, image: &Arc<Image>, updates: Vec<(Bytes, Bytes)>) -> usize {
        let bytes: usize = updates.iter().map(|(_, payload)| payload.len()).sum();
        if bytes > INLINE_BYTES_MAX || self.node.disk_was_slow() {
            return tokio::task::block_in_place(|| image.take_all(self.from, updates));
        }
        let began = Instant::now();
        let refused = image.take_all(self.from, updates);
        if began.elapsed() > INLINE_TIME_MAX {
            self.node.note_slow_disk();
        }
        refused
    }
}

fn on_message(node: &Arc<NodeInner>, from: HostId, id: ImageId, message: ImageMsg) -> Result<(), NetError> {
    let image = match node.image(id) {
        Some(image) => image,
        // A member named in the genesis may be asked for its vote before it has received anything.
        None => match tokio::task::block_in_place(|| node.take_offer(from, id, &message)) {
            Ok(Some(image)) => image,
            Ok(None) => return Ok(()),
            Err(e) => {
                tracing::warn!(image = %id, "cannot keep a copy: {e}");
                // The other end starts over in a while, and offers it again.
                return Err(NetError::Broken);
            }
        },
    };
    let sync = matches!(message, ImageMsg::Sync { .. });
    let input = Input::Msg { from, msg: Box::new(message) };
    if sync && node.inline_syncs.note(id, node.now()) && !node.disk_was_slow() {
        image.input_and_sync(input);
    } else {
        image.input(input);
    }
    Ok(())
}

impl RequestHandler for Handler {
    fn on_request(&self, from: HostId, body: Bytes) -> Answer {
        let (node, quota) = (self.0.node(), self.0.quotas.of(from));
        Box::pin(async move {
            let node = node.ok_or_else(|| "starting".to_owned())?;
            let ask = msg::decode::<Ask>(&body).map_err(|e| {
                node.refused("malformed-message", from, &e);
                e.to_string()
            })?;
            // Held until the work is done, also when nobody waits for the answer any more.
            let turn = quota.answer().await;
            let answered = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                answer(&node, from, ask)
            })
            .await;
            let (told, raw) = answered.map_err(|e| e.to_string())?;
            Ok(encode_told(&told, &raw))
        })
    }
}

fn answer(node: &Arc<NodeInner>, from: HostId, ask: Ask) -> (Told, Vec<u8>) {
    let gone = || {
        node.refused("not-allowed", from, &"a question about an image that it is no member of");
        (Told::Gone, Vec::new())
    };
    let member = |id| node.image(id).filter(|i| i.state().members.get(from).is_some() || i.is_learner(from));
    match ask {
        Ask::Claims { known } => node.own_claims(known),
        Ask::SyncOpen { image, token } => match member(image) {
            Some(image) => node.sync_server.open(&image, from, token),
            None => gone(),
        },
        Ask::SyncNode { token, level, index } => node.sync_server.node(from, token, level, index),
        Ask::SyncBlocks { token, blocks } => node.sync_server.blocks(from, token, &blocks),
        Ask::SyncClose { token } => {
            node.sync_server.close(from, token);
            (Told::Done, Vec::new())
        }
        Ask::Settle { version } => {
            let version = if version == 0 { node.claims_version() } else { version };
            let told = if node.is_mount_at(version) { Told::Done } else { Told::Settling { version } };
            (told, Vec::new())
        }
        Ask::Fetch { image, wanted } => match member(image) {
            Some(image) => image.fetch_for_peer(&wanted),
            None => gone(),
        },
        Ask::FetchPayload { image, seq, digest } => match member(image) {
            Some(image) => image.payload_for_peer(seq, &digest),
            None => gone(),
        },
        Ask::PinSeal { image } => match member(image) {
            Some(image) => {
                *image.sealed_view.lock() = SealPin { wanted: true, view: None };
                (Told::Done, Vec::new())
            }
            None => gone(),
        },
        Ask::MerkleAt { image, head } => match member(image) {
            Some(image) => image.merkle_for_peer(head),
            None => gone(),
        },
    }
}
