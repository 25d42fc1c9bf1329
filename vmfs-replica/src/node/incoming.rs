//! What peers send: image streams, and questions. A peer with a valid certificate may still send whatever
//! it likes, as fast as it can: how much of this host it can occupy is bounded in [`super::quota`].

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use vmfs_common::chain::Refusal;
use vmfs_common::header::Update;
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::{HostId, ImageId};
use vmfs_net::{Answer, Frame, FrameReader, NetError, RequestHandler, StreamHandler};
use vmfs_proto::Input;

use super::NodeInner;
use super::ask::{Ask, Told, encode_told};
use super::image::{Image, SealPin};
use super::quota::{Pace, Quota, Quotas};

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
    while let Some(frame) = frames.next().await? {
        let turn = quota.turn().await;
        let begun = Instant::now();
        let taken = match frame {
            Frame::Control(body) => match msg::decode::<ImageMsg>(&body) {
                Ok(m) => {
                    on_message(node, from, image, m)?;
                    false
                }
                Err(e) => {
                    node.refused("malformed-message", from, &e);
                    false
                }
            },
            Frame::Update { header, payload } => {
                node.image(image).is_some_and(|image| on_update(&image, from, &header, payload))
            }
        };
        drop(turn);
        if !taken {
            let stranger = node.image(image).is_none_or(|i| i.is_stranger(from));
            pace.charge(begun.elapsed(), stranger).await;
        }
    }
    Ok(())
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
    tokio::task::block_in_place(|| image.input(Input::Msg { from, msg: Box::new(message) }));
    Ok(())
}

fn on_update(image: &Arc<Image>, from: HostId, header: &[u8], payload: Bytes) -> bool {
    match Update::decode(header) {
        Ok(update) => tokio::task::block_in_place(|| image.take(from, &update, payload)),
        Err(e) => {
            tracing::debug!(image = %image.id.short(), "a header that does not decode: {e}");
            image.locked(|core, env, out| core.machine.refuse(env, from, None, Refusal::Malformed, out));
            false
        }
    }
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
