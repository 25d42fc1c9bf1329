//! What peers send: image streams, and questions.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
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
use super::image::SealPin;

/// Most updates, and about the most bytes, taken at a time.
const BATCH_UPDATES_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 2 << 20;
/// Payload up to which a batch is taken on the network's own thread, and the longest that may last
/// before the disk counts as slow.
const INLINE_BYTES_MAX: usize = 128 << 10;
const INLINE_TIME_MAX: Duration = Duration::from_millis(5);

/// Hands incoming streams and requests to the node.
pub(super) struct Incoming {
    node: Mutex<Weak<NodeInner>>,
    /// The reader at work for each (image, peer): a second stream replaces the first.
    readers: Mutex<HashMap<(ImageId, HostId), (u64, tokio::task::AbortHandle)>>,
}

impl Incoming {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { node: Mutex::new(Weak::new()), readers: Mutex::default() })
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
                let ended = read_stream(&node, from, session, image, frames, replaced).await;
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
    from: HostId,
    session: u64,
    image: ImageId,
    mut frames: FrameReader,
    replaced: bool,
) -> Result<(), NetError> {
    // The connection's PeerUp may still be on its way to the machines.
    node.wait_for_session(from, session).await;
    if replaced && let Some(image) = node.image(image) {
        image.bounce(from);
    }
    let mut batch = Vec::new();
    while let Some(frame) = frames.next().await? {
        // What has arrived together is taken together: one change of threads for all of it.
        let mut bytes = queue_update(node, from, image, frame, &mut batch);
        while bytes < BATCH_BYTES_MAX && batch.len() < BATCH_UPDATES_MAX {
            match frames.next_ready() {
                Ok(Some(frame)) => bytes += queue_update(node, from, image, frame, &mut batch),
                Ok(None) => break,
                Err(e) => {
                    take_updates(node, from, image, &mut batch);
                    return Err(e);
                }
            }
        }
        take_updates(node, from, image, &mut batch);
    }
    Ok(())
}

/// Queues an update and says how long it is. A control message is handled at once, after the updates that
/// came before it.
fn queue_update(
    node: &Arc<NodeInner>,
    from: HostId,
    image: ImageId,
    frame: Frame,
    batch: &mut Vec<(Bytes, Bytes)>,
) -> usize {
    match frame {
        Frame::Update { header, payload } => {
            let bytes = header.len() + payload.len();
            batch.push((header, payload));
            bytes
        }
        Frame::Control(body) => {
            take_updates(node, from, image, batch);
            match msg::decode::<ImageMsg>(&body) {
                Ok(m) => on_message(node, from, image, m),
                Err(e) => {
                    node.malformed_frames.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(peer = %from.short(), "a control message that does not decode: {e}");
                }
            }
            body.len()
        }
    }
}

/// Hands a batch to the image. A small one is taken on this thread, which is cheaper than handing the
/// others' work over; not while the disk has been slow of late, since this thread serves other streams too.
fn take_updates(node: &Arc<NodeInner>, from: HostId, image: ImageId, batch: &mut Vec<(Bytes, Bytes)>) {
    let updates = std::mem::take(batch);
    if updates.is_empty() {
        return;
    }
    let Some(image) = node.image(image) else { return };
    let bytes: usize = updates.iter().map(|(_, payload)| payload.len()).sum();
    if bytes > INLINE_BYTES_MAX || node.disk_was_slow() {
        tokio::task::block_in_place(|| image.take_all(from, updates));
        return;
    }
    let began = Instant::now();
    image.take_all(from, updates);
    if began.elapsed() > INLINE_TIME_MAX {
        node.note_slow_disk();
    }
}

fn on_message(node: &Arc<NodeInner>, from: HostId, id: ImageId, message: ImageMsg) {
    let image = match (node.image(id), &message) {
        (Some(image), _) => image,
        // A member named in the genesis may be asked for its vote before it has received anything.
        (None, ImageMsg::Offer { role, .. } | ImageMsg::Propose { role, .. }) => {
            match node.take_offer(id, *role) {
                Ok(image) => image,
                Err(e) => {
                    tracing::warn!(image = %id, "cannot keep a copy: {e}");
                    return;
                }
            }
        }
        (None, _) => return,
    };
    image.input(Input::Msg { from, msg: Box::new(message) });
}

impl RequestHandler for Handler {
    fn on_request(&self, from: HostId, body: Bytes) -> Answer {
        let node = self.0.node();
        Box::pin(async move {
            let node = node.ok_or_else(|| "starting".to_owned())?;
            let ask = msg::decode::<Ask>(&body).map_err(|e| e.to_string())?;
            let answered = tokio::task::spawn_blocking(move || answer(&node, from, ask)).await;
            let (told, raw) = answered.map_err(|e| e.to_string())?;
            Ok(encode_told(&told, &raw))
        })
    }
}

fn answer(node: &Arc<NodeInner>, from: HostId, ask: Ask) -> (Told, Vec<u8>) {
    let gone = || (Told::Gone, Vec::new());
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
