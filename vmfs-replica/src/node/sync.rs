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
use vmfs_common::{BLOCK_BYTES, BlockIndex, Digest, Head, HostId, ImageId, Seq};
use vmfs_store::{Import, MERKLE_FANOUT, MERKLE_LEAF_BLOCKS, MERKLE_ROOT_LEVEL, MerkleTree, View};

use super::NodeInner;
use super::ask::{Ask, BLOCK_INDEX_END, BLOCKS_MAX, Told};
use super::image::Image;

/// A view nobody has asked about for this long is given up.
const SERVED_IDLE: Duration = Duration::from_secs(60);
/// Views served at a time, in all and to one host.
const SERVED_MAX: usize = 64;
const SERVED_TO_ONE_MAX: usize = 8;
/// A host may have a new view of the same image made this often: each is a pass over the image, and two
/// updates in its log.
const REOPEN: Duration = Duration::from_secs(1);
/// Merkle nodes of level 1 whose blocks are being copied at a time.
const FETCHES_MAX: usize = 16;
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
    /// Being made; the view will be of this update or a later one.
    Opening(Seq),
    Open(Arc<Opened>),
    /// Copied, up to this update: the member will ask for those after it.
    Closed(Seq),
}

struct Opened {
    view: View,
    merkle: MerkleTree,
    base: Update,
    root: Update,
    seal: Update,
}

struct Entry {
    image: ImageId,
    served: Served,
    used: Instant,
}

impl Entry {
    const fn is_closed(&self) -> bool {
        matches!(self.served, Served::Closed(_))
    }
    fn base(&self) -> Seq {
        match &self.served {
            Served::Opening(seq) | Served::Closed(seq) => *seq,
            Served::Open(open) => open.base.header.seq,
        }
    }
}

/// Views that this host serves to members.
#[derive(Default)]
pub(crate) struct SyncServer {
    views: Mutex<HashMap<(HostId, u64), Entry>>,
    /// When a host last had a view of an image made.
    opened: Mutex<HashMap<(HostId, ImageId), Instant>>,
}

impl SyncServer {
    /// Gives up views nobody asks about.
    pub(crate) fn expire(&self) {
        self.views.lock().retain(|_, e| e.used.elapsed() < SERVED_IDLE);
        self.opened.lock().retain(|_, at| at.elapsed() < REOPEN);
    }
    /// The member has what it needs of a view, or no longer wants it.
    pub(crate) fn close(&self, from: HostId, token: u64) {
        if let Some(e) = self.views.lock().get_mut(&(from, token)) {
            (e.served, e.used) = (Served::Closed(e.base()), Instant::now());
        }
    }
    /// The update up to which a host copies an image's content, or has just copied it: it needs the log
    /// from there on.
    pub(crate) fn copied_up_to(&self, host: HostId, image: ImageId) -> Option<Seq> {
        let views = self.views.lock();
        views.iter().filter(|((h, _), e)| *h == host && e.image == image).map(|(_, e)| e.base()).min()
    }
    fn view(&self, from: HostId, token: u64) -> Option<Arc<Opened>> {
        let mut all = self.views.lock();
        let e = all.get_mut(&(from, token))?;
        e.used = Instant::now();
        match &e.served {
            Served::Open(open) => Some(open.clone()),
            Served::Opening(_) | Served::Closed(_) => None,
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
        if let Some(e) = all.get_mut(&(from, token)) {
            e.used = Instant::now();
            return match &e.served {
                Served::Opening(_) => (Told::NotYet, Vec::new()),
                Served::Open(open) => opened(open),
                Served::Closed(_) => (Told::Gone, Vec::new()),
            };
        }
        let open = |e: &&Entry| !e.is_closed();
        let to_one = all.iter().filter(|((host, _), e)| *host == from && open(e)).count();
        if all.values().filter(open).count() >= SERVED_MAX
            || to_one >= SERVED_TO_ONE_MAX
            || !self.may_open(from, image.id)
        {
            return (Told::NotYet, Vec::new());
        }
        // It starts over: what it copied before is of no use to it.
        all.retain(|(host, _), e| *host != from || e.image != image.id || !e.is_closed());
        let served = Served::Opening(image.store.head().seq);
        all.insert((from, token), Entry { image: image.id, served, used: Instant::now() });
        drop(all);
        let (server, image) = (self.clone(), image.clone());
        tokio::task::spawn_blocking(move || match freeze(&image) {
            Ok(opened) => {
                if let Some(e) = server.views.lock().get_mut(&(from, token)).filter(|e| !e.is_closed()) {
                    (e.served, e.used) = (Served::Open(Arc::new(opened)), Instant::now());
                }
            }
            Err(e) => {
                tracing::warn!(image = %image.id.short(), "no view for a block-level sync: {e}");
                server.views.lock().remove(&(from, token));
            }
        });
        (Told::NotYet, Vec::new())
    }

    /// Answers [`Ask::SyncNode`].
    pub(crate) fn node(&self, from: HostId, token: u64, level: u32, index: u64) -> (Told, Vec<u8>) {
        let Some(open) = self.view(from, token) else { return (Told::Gone, Vec::new()) };
        if level == 0 || level > MERKLE_ROOT_LEVEL || index >= BLOCK_INDEX_END {
            return (Told::Gone, Vec::new());
        }
        let children = if level > 1 {
            Ok(open.merkle.children(level, index))
        } else {
            open.view.digests(leaf_start(index), MERKLE_LEAF_BLOCKS)
        };
        match children {
            Ok(children) => (Told::Node, children.iter().flat_map(|d| *d.as_bytes()).collect()),
            Err(_) => (Told::Gone, Vec::new()),
        }
    }

    /// Answers [`Ask::SyncBlocks`].
    pub(crate) fn blocks(&self, from: HostId, token: u64, blocks: &[BlockIndex]) -> (Told, Vec<u8>) {
        let Some(open) = self.view(from, token) else { return (Told::Gone, Vec::new()) };
        if blocks.len() > BLOCKS_MAX || blocks.iter().any(|b| b.0 >= BLOCK_INDEX_END) {
            return (Told::Gone, Vec::new());
        }
        match read_blocks(&open.view, blocks) {
            Ok((digests, raw)) => (Told::Blocks { digests }, raw),
            Err(e) => {
                tracing::warn!("a block for a member cannot be read: {e}");
                (Told::Gone, Vec::new())
            }
        }
    }
}

/// The first block that a Merkle node of level 1 covers.
const fn leaf_start(index: u64) -> BlockIndex {
    BlockIndex(index.saturating_mul(MERKLE_FANOUT))
}

/// Runs of consecutive blocks, as ranges of positions.
fn runs(blocks: &[BlockIndex]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut end = 0;
    blocks.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)).map(move |run| {
        let start = end;
        end += run.len();
        start..end
    })
}

fn read_blocks(view: &View, blocks: &[BlockIndex]) -> Result<(Vec<Digest>, Vec<u8>), vmfs_store::StoreError> {
    let mut digests = Vec::with_capacity(blocks.len());
    let mut raw = Vec::with_capacity(blocks.len() * BLOCK_BYTES);
    let mut buf = Vec::new();
    for run in runs(blocks) {
        let (start, count) = (blocks[run.start], run.len());
        let of_run = view.digests(start, count)?;
        buf.resize(count * BLOCK_BYTES, 0);
        view.read(start, &mut buf)?;
        for (digest, block) in of_run.iter().zip(buf.chunks_exact(BLOCK_BYTES)) {
            if !digest.is_zero() {
                raw.extend_from_slice(block);
            }
        }
        digests.extend(of_run);
    }
    Ok((digests, raw))
}

fn opened(Opened { view, base, root, seal, .. }: &Opened) -> (Told, Vec<u8>) {
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
fn freeze(image: &Arc<Image>) -> Result<Opened, String> {
    let view = image.store.view();
    let at = view.head();
    let base =
        image.store.update_at(at.seq).map_err(|e| e.to_string())?.ok_or("the head is not in the log")?;
    let merkle = view.merkle_tree().map_err(|e| e.to_string())?;
    let op = Op::Root { at: at.seq, merkle: merkle.root(), state: view.state().digest() };
    let (root, seal) = image.append_vouched(Draft::op(op)).map_err(|e| e.to_string())?;
    Ok(Opened { view, merkle, base, root, seal })
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

    /// Walks the Merkle tree down to where the contents differ, and copies that.
    async fn copy(self: &Arc<Self>, import: &Arc<Import>, merkle: Digest) -> Result<(), SyncError> {
        let from = import.clone();
        let tree = tokio::task::spawn_blocking(move || from.merkle_tree());
        let mut ours = tree.await.map_err(|e| SyncError::Peer(e.to_string()))??;
        let mut todo = vec![(MERKLE_ROOT_LEVEL, 0u64)];
        let mut fetches = tokio::task::JoinSet::new();
        while let Some((level, index)) = todo.pop() {
            if level > 1 {
                let theirs = self.children(level, index).await?;
                let differ = (0..MERKLE_FANOUT).zip(theirs.iter().zip(ours.children(level, index)));
                let differ = differ.filter(|(_, (theirs, ours))| *theirs != ours);
                let below: Vec<_> = differ.map(|(i, _)| (level - 1, index * MERKLE_FANOUT + i)).collect();
                todo.extend(below.into_iter().rev());
                continue;
            }
            while fetches.len() >= FETCHES_MAX {
                Self::finish_one(&mut fetches, &mut ours).await?;
            }
            let (this, import) = (self.clone(), import.clone());
            fetches.spawn(async move { Ok((index, this.copy_leaf(&import, index).await?)) });
        }
        while !fetches.is_empty() {
            Self::finish_one(&mut fetches, &mut ours).await?;
        }
        if ours.root() == merkle { Ok(()) } else { Err(SyncError::Lie("the copied content's Merkle root")) }
    }

    async fn finish_one(
        fetches: &mut tokio::task::JoinSet<Result<(u64, Vec<Digest>), SyncError>>,
        ours: &mut MerkleTree,
    ) -> Result<(), SyncError> {
        if let Some(done) = fetches.join_next().await {
            let (index, digests) = done.map_err(|e| SyncError::Peer(e.to_string()))??;
            ours.set(index, &digests);
        }
        Ok(())
    }

    async fn children(&self, level: u32, index: u64) -> Result<Vec<Digest>, SyncError> {
        let (_, raw) = self.ask(Ask::SyncNode { token: self.token, level, index }).await?;
        if raw.len() != MERKLE_LEAF_BLOCKS * Digest::LEN {
            return Err(SyncError::Lie("a Merkle node's size"));
        }
        let digest = |c: &[u8]| Digest::from_bytes(c.try_into().expect("invariant: chunks of 32 bytes"));
        Ok(raw.chunks_exact(Digest::LEN).map(digest).collect())
    }

    /// Copies what differs of the blocks under a Merkle node of level 1; returns the digests of all of them
    /// as they are in the import then.
    async fn copy_leaf(&self, import: &Arc<Import>, index: u64) -> Result<Vec<Digest>, SyncError> {
        let theirs = self.children(1, index).await?;
        let ours = tokio::task::block_in_place(|| import.digests(leaf_start(index), MERKLE_LEAF_BLOCKS))?;
        let differ = (leaf_start(index).0..).zip(theirs.iter().zip(&ours)).filter(|(_, (a, b))| a != b);
        let differ: Vec<_> = differ.map(|(block, _)| BlockIndex(block)).collect();
        for blocks in differ.chunks(BLOCKS_MAX) {
            let ask = Ask::SyncBlocks { token: self.token, blocks: blocks.to_vec() };
            let (told, raw) = self.ask(ask).await?;
            let Told::Blocks { digests } = told else { return Err(SyncError::Lie("not blocks")) };
            let stored = digests.iter().filter(|d| !d.is_zero()).count();
            if digests.len() != blocks.len() || raw.len() != stored * BLOCK_BYTES {
                return Err(SyncError::Lie("other blocks than asked for"));
            }
            tokio::task::block_in_place(|| write_runs(import, blocks, &digests, &raw)).map_err(
                |e| match e {
                    vmfs_store::StoreError::DigestMismatch => {
                        SyncError::Lie("blocks that do not match their digests")
                    }
                    e => SyncError::Store(e),
                },
            )?;
            self.image.sync_progress(blocks.len() as u64);
        }
        Ok(tokio::task::block_in_place(|| import.digests(leaf_start(index), MERKLE_LEAF_BLOCKS))?)
    }
}

/// Writes blocks to the import, run by run of consecutive ones.
fn write_runs(
    import: &Import,
    blocks: &[BlockIndex],
    digests: &[Digest],
    raw: &[u8],
) -> Result<(), vmfs_store::StoreError> {
    let mut raw_at = 0;
    for run in runs(blocks) {
        let bytes = digests[run.clone()].iter().filter(|d| !d.is_zero()).count() * BLOCK_BYTES;
        import.write(blocks[run.start], &digests[run], &raw[raw_at..raw_at + bytes])?;
        raw_at += bytes;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_of_consecutive_blocks_and_cover_all() {
        let of = |blocks: &[u64]| {
            let blocks: Vec<_> = blocks.iter().copied().map(BlockIndex).collect();
            runs(&blocks).collect::<Vec<_>>()
        };
        assert!(of(&[]).is_empty());
        assert_eq!(of(&[7, 9]), [0..1, 1..2]);
        assert_eq!(of(&[1, 2, 3, 5, 4, 6, 7]), [0..3, 3..4, 4..5, 5..7]);
        assert_eq!(of(&[u64::MAX, 0, 1, 1]), [0..1, 1..3, 3..4]);
    }
}
