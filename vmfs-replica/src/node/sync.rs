//! Block-level sync: a member whose log cannot be caught up copies the owner's content into a shadow,
//! which replaces the old content atomically once it is complete and verified.
//!
//! The owner freezes a view after update R, computes its Merkle root, and appends a `Root` that
//! vouches for it and a `Seal` that vouches for the `Root`. The member walks the Merkle tree, fetches
//! what differs, checks the root, and installs the content with the state after R; from R + 1 on it
//! is fed from the log like everybody else. Until the durable switch it votes with its old head.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use vmfs_common::chain::{Draft, check_seal};
use vmfs_common::header::Update;
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, Head, HostId, ImageId};
use vmfs_store::{Import, MERKLE_FANOUT, MERKLE_ROOT_LEVEL, View};

use super::NodeInner;
use super::ask::{Ask, BLOCK_INDEX_END, BLOCKS_MAX, Told};
use super::blocks::payload_matches;
use super::image::Image;

/// A view nobody has asked about for this long is given up.
const SERVED_IDLE: Duration = Duration::from_secs(60);
/// Views served at a time, in all and to one host.
const SERVED_MAX: usize = 64;
const SERVED_TO_ONE_MAX: usize = 8;
/// A host may have a new view of the same image made this often: each is a pass over the image, and two
/// updates in its log.
const REOPEN: Duration = Duration::from_secs(1);
/// Requests for blocks under way at a time.
const FETCHES_MAX: usize = 8;
/// Attempts at one question before the sync is given up (it is started anew by the next offer).
const TRIES_MAX: u32 = 120;

/// Why a sync was given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SyncError {
    #[error("{0}")]
    Store(#[from] vmfs_store::StoreError),
    #[error("{0}")]
    Peer(String),
    #[error("the owner's answer does not verify: {0}")]
    Lie(&'static str),
    #[error("the copy follows another owner, or has gone on without it")]
    Overtaken,
}

enum Served {
    Opening,
    Open(Box<Opened>),
}

struct Opened {
    view: View,
    base: Update,
    root: Update,
    seal: Update,
}

/// Views that this host serves to members.
#[derive(Default)]
pub(crate) struct SyncServer {
    views: Mutex<HashMap<(HostId, u64), (Served, Instant)>>,
    /// When a host last had a view of an image made.
    opened: Mutex<HashMap<(HostId, ImageId), Instant>>,
}

impl SyncServer {
    /// Gives up views nobody asks about.
    pub(crate) fn expire(&self) {
        self.views.lock().retain(|_, (_, used)| used.elapsed() < SERVED_IDLE);
        self.opened.lock().retain(|_, at| at.elapsed() < REOPEN);
    }
    pub(crate) fn close(&self, from: HostId, token: u64) {
        self.views.lock().remove(&(from, token));
    }
    fn view(&self, from: HostId, token: u64) -> Option<View> {
        let mut all = self.views.lock();
        let (served, used) = all.get_mut(&(from, token))?;
        *used = Instant::now();
        match served {
            Served::Opening => None,
            Served::Open(open) => Some(open.view.clone()),
        }
    }

    fn may_open(&self, from: HostId, image: ImageId) -> bool {
        let mut opened = self.opened.lock();
        if opened.get(&(from, image)).is_some_and(|at| at.elapsed() < REOPEN) {
            return false;
        }
        opened.insert((from, image), Instant::now());
        true
    }

    /// Answers [`Ask::SyncOpen`]: starts the work at the first call, answers when it is done.
    pub(crate) fn open(self: &Arc<Self>, image: &Arc<Image>, from: HostId, token: u64) -> (Told, Vec<u8>) {
        let mut all = self.views.lock();
        if let Some((served, used)) = all.get_mut(&(from, token)) {
            *used = Instant::now();
            return match served {
                Served::Opening => (Told::NotYet, Vec::new()),
                Served::Open(open) => opened(&open.view, &open.base, &open.root, &open.seal),
            };
        }
        let to_one = all.keys().filter(|(host, _)| *host == from).count();
        if all.len() >= SERVED_MAX || to_one >= SERVED_TO_ONE_MAX || !self.may_open(from, image.id) {
            return (Told::NotYet, Vec::new());
        }
        all.insert((from, token), (Served::Opening, Instant::now()));
        drop(all);
        let (server, image) = (self.clone(), image.clone());
        tokio::task::spawn_blocking(move || match freeze(&image) {
            Ok((view, base, root, seal)) => {
                let mut all = server.views.lock();
                if let Some(slot) = all.get_mut(&(from, token)) {
                    *slot = (Served::Open(Box::new(Opened { view, base, root, seal })), Instant::now());
                }
            }
            Err(e) => {
                tracing::warn!(image = %image.id.short(), "no view for a block-level sync: {e}");
                server.close(from, token);
            }
        });
        (Told::NotYet, Vec::new())
    }

    /// Answers [`Ask::SyncNode`].
    pub(crate) fn node(&self, from: HostId, token: u64, level: u32, index: u64) -> (Told, Vec<u8>) {
        let Some(view) = self.view(from, token) else { return (Told::Gone, Vec::new()) };
        if level == 0 || level > MERKLE_ROOT_LEVEL || index >= BLOCK_INDEX_END {
            return (Told::Gone, Vec::new());
        }
        match view.merkle_children(level, index) {
            Ok(children) => (Told::Node, children.iter().flat_map(|d| *d.as_bytes()).collect()),
            Err(_) => (Told::Gone, Vec::new()),
        }
    }

    /// Answers [`Ask::SyncBlocks`].
    pub(crate) fn blocks(&self, from: HostId, token: u64, blocks: &[BlockIndex]) -> (Told, Vec<u8>) {
        let Some(view) = self.view(from, token) else { return (Told::Gone, Vec::new()) };
        if blocks.len() > BLOCKS_MAX || blocks.iter().any(|b| b.0 >= BLOCK_INDEX_END) {
            return (Told::Gone, Vec::new());
        }
        match read_blocks(&view, blocks) {
            Ok((digests, raw)) => (Told::Blocks { digests }, raw),
            Err(e) => {
                tracing::warn!("a block for a member cannot be read: {e}");
                (Told::Gone, Vec::new())
            }
        }
    }
}

fn read_blocks(view: &View, blocks: &[BlockIndex]) -> Result<(Vec<Digest>, Vec<u8>), vmfs_store::StoreError> {
    let mut digests = Vec::with_capacity(blocks.len());
    let mut raw = Vec::with_capacity(blocks.len() * BLOCK_BYTES);
    let mut buf = vec![0u8; BLOCK_BYTES];
    for b in blocks {
        let digest = view.digests(*b, 1)?[0];
        if !digest.is_zero() {
            view.read(*b, &mut buf)?;
            raw.extend_from_slice(&buf);
        }
        digests.push(digest);
    }
    Ok((digests, raw))
}

fn opened(view: &View, base: &Update, root: &Update, seal: &Update) -> (Told, Vec<u8>) {
    let state = view.state().encode();
    let len = |b: &[u8]| u32::try_from(b.len()).expect("invariant: headers and states are bounded");
    let told = Told::SyncOpened {
        base_bytes: len(&base.bytes),
        root_bytes: len(&root.bytes),
        seal_bytes: len(&seal.bytes),
        state_bytes: len(&state),
    };
    (told, [&base.bytes[..], &root.bytes[..], &seal.bytes[..], &state].concat())
}

/// Freezes a view after some update R, and appends the `Root` and the `Seal` that vouch for it.
fn freeze(image: &Arc<Image>) -> Result<(View, Update, Update, Update), String> {
    let view = image.store.view();
    let at = view.head();
    let base =
        image.store.update_at(at.seq).map_err(|e| e.to_string())?.ok_or("the head is not in the log")?;
    let merkle = view.merkle(MERKLE_ROOT_LEVEL, 0).map_err(|e| e.to_string())?;
    let op = Op::Root { at: at.seq, merkle, state: view.state().digest() };
    let (root, seal) = image.append_vouched(Draft::op(op)).map_err(|e| e.to_string())?;
    Ok((view, base, root, seal))
}

struct Vouched {
    base: Update,
    merkle: Digest,
    state: ImageState,
}

/// Checks that the owner's Seal vouches for the Root, and the Root for the state.
fn check_opened(image: ImageId, owner: HostId, told: &Told, raw: &[u8]) -> Result<Vouched, SyncError> {
    let Told::SyncOpened { base_bytes, root_bytes, seal_bytes, state_bytes } = told else {
        return Err(SyncError::Lie("not an opened view"));
    };
    let mut rest = raw;
    let mut cut = |n: u32| {
        let (head, tail) = rest.split_at_checked(n as usize).ok_or(SyncError::Lie("lengths"))?;
        rest = tail;
        Ok::<_, SyncError>(head)
    };
    let update = |b: &[u8]| Update::decode(b).map_err(|_| SyncError::Lie("an update's form"));
    let (base, root, seal) =
        (update(cut(*base_bytes)?)?, update(cut(*root_bytes)?)?, update(cut(*seal_bytes)?)?);
    let state = ImageState::decode(cut(*state_bytes)?).map_err(|_| SyncError::Lie("the state's form"))?;
    let Op::Root { at, merkle, state: state_digest } = &root.header.op else {
        return Err(SyncError::Lie("no Root"));
    };
    let key = state.members.get(owner).ok_or(SyncError::Lie("the owner is no member"))?.key;
    check_seal(&seal, &key).map_err(|_| SyncError::Lie("the Seal"))?;
    let same_image = [&base, &root, &seal].iter().all(|u| u.header.image == image) && state.image == image;
    let chained = seal.header.parent == root.digest && seal.header.epoch.host == owner;
    let about = *at == base.header.seq && *state_digest == state.digest() && state.head() == base.head();
    if same_image && chained && about && *at < root.header.seq {
        Ok(Vouched { base, merkle: *merkle, state })
    } else {
        Err(SyncError::Lie("the Root is not about this state"))
    }
}

/// A member's side of one sync.
pub(crate) struct Puller {
    node: Arc<NodeInner>,
    image: Arc<Image>,
    owner: HostId,
    token: u64,
}

impl Puller {
    pub(crate) const fn new(node: Arc<NodeInner>, image: Arc<Image>, owner: HostId, token: u64) -> Self {
        Self { node, image, owner, token }
    }

    async fn ask(&self, ask: Ask) -> Result<(Told, Bytes), SyncError> {
        let mut last = String::new();
        for _ in 0..TRIES_MAX {
            match self.node.ask(self.owner, &ask).await {
                Ok((Told::NotYet, _)) => last = "not yet".to_owned(),
                Ok((Told::Gone, _)) => return Err(SyncError::Peer("the owner gave up the view".to_owned())),
                Ok(answer) => return Ok(answer),
                Err(e) => last = e,
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        Err(SyncError::Peer(last))
    }

    /// Copies, verifies and installs. Returns the new head; on an error the old content stays.
    pub(crate) async fn run(self) -> Result<Head, SyncError> {
        let this = Arc::new(self);
        let (told, raw) = this.ask(Ask::SyncOpen { image: this.image.id, token: this.token }).await?;
        let vouched = check_opened(this.image.id, this.owner, &told, &raw)?;
        let blank = this.image.store.head().seq.0 == 0;
        let import = Arc::new(this.image.store.begin_import(!blank)?);
        // A witness needs the state alone.
        let result = match this.image.store.kind() {
            MemberRole::Witness => Ok(()),
            MemberRole::Replica => this.copy(&import, vouched.merkle).await,
        };
        // Best effort: an unclosed view expires by itself.
        let _ = this.node.ask(this.owner, &Ask::SyncClose { token: this.token }).await;
        result?;
        let import = Arc::into_inner(import).ok_or(SyncError::Lie("a fetch outlived the copy"))?;
        let (image, from) = (this.image.clone(), this.owner);
        let head = vouched.base.head();
        let installed =
            tokio::task::spawn_blocking(move || image.install(from, import, &vouched.base, vouched.state))
                .await
                .map_err(|e| SyncError::Peer(e.to_string()))??;
        if installed { Ok(head) } else { Err(SyncError::Overtaken) }
    }

    async fn copy(self: &Arc<Self>, import: &Arc<Import>, merkle: Digest) -> Result<(), SyncError> {
        let mut todo = vec![(MERKLE_ROOT_LEVEL, 0u64)];
        let mut wanted: Vec<BlockIndex> = Vec::new();
        let mut fetches = tokio::task::JoinSet::new();
        while let Some((level, index)) = todo.pop() {
            let (_, raw) = self.ask(Ask::SyncNode { token: self.token, level, index }).await?;
            let theirs: Vec<Digest> = raw
                .chunks_exact(Digest::LEN)
                .map(|c| Digest::from_bytes(c.try_into().expect("invariant: chunks of 32 bytes")))
                .collect();
            if theirs.len() as u64 != MERKLE_FANOUT || raw.len() != theirs.len() * Digest::LEN {
                return Err(SyncError::Lie("a Merkle node's size"));
            }
            let ours = tokio::task::block_in_place(|| import.merkle_children(level, index))?;
            let differ = (0..MERKLE_FANOUT).zip(theirs.iter().zip(&ours)).filter(|(_, (a, b))| a != b);
            let children: Vec<u64> = differ.map(|(i, _)| index * MERKLE_FANOUT + i).collect();
            if level > 1 {
                todo.extend(children.iter().rev().map(|c| (level - 1, *c)));
                continue;
            }
            wanted.extend(children.into_iter().map(BlockIndex));
            while wanted.len() >= BLOCKS_MAX {
                let batch: Vec<_> = wanted.drain(..BLOCKS_MAX).collect();
                self.fetch(&mut fetches, import, batch).await?;
            }
        }
        if !wanted.is_empty() {
            self.fetch(&mut fetches, import, wanted).await?;
        }
        while let Some(done) = fetches.join_next().await {
            done.map_err(|e| SyncError::Peer(e.to_string()))??;
        }
        let got = tokio::task::block_in_place(|| import.merkle(MERKLE_ROOT_LEVEL, 0))?;
        if got == merkle { Ok(()) } else { Err(SyncError::Lie("the copied content's Merkle root")) }
    }

    async fn fetch(
        self: &Arc<Self>,
        fetches: &mut tokio::task::JoinSet<Result<(), SyncError>>,
        import: &Arc<Import>,
        blocks: Vec<BlockIndex>,
    ) -> Result<(), SyncError> {
        while fetches.len() >= FETCHES_MAX {
            if let Some(done) = fetches.join_next().await {
                done.map_err(|e| SyncError::Peer(e.to_string()))??;
            }
        }
        let (this, import) = (self.clone(), import.clone());
        fetches.spawn(async move {
            let count = blocks.len();
            let (told, raw) = this.ask(Ask::SyncBlocks { token: this.token, blocks: blocks.clone() }).await?;
            let Told::Blocks { digests } = told else { return Err(SyncError::Lie("not blocks")) };
            if digests.len() != count || !payload_matches(&digests, &raw) {
                return Err(SyncError::Lie("blocks that do not match their digests"));
            }
            tokio::task::block_in_place(|| write_runs(&import, &blocks, &digests, &raw))?;
            this.image.sync_progress(count as u64);
            Ok(())
        });
        Ok(())
    }
}

/// Writes blocks to the import, run by run of consecutive ones.
fn write_runs(
    import: &Import,
    blocks: &[BlockIndex],
    digests: &[Digest],
    raw: &[u8],
) -> Result<(), vmfs_store::StoreError> {
    let (mut at, mut raw_at) = (0, 0);
    while at < blocks.len() {
        let mut end = at + 1;
        while end < blocks.len() && blocks[end].0 == blocks[end - 1].0 + 1 {
            end += 1;
        }
        let bytes = digests[at..end].iter().filter(|d| !d.is_zero()).count() * BLOCK_BYTES;
        import.write(blocks[at], &digests[at..end], &raw[raw_at..raw_at + bytes])?;
        raw_at += bytes;
        at = end;
    }
    Ok(())
}
