//! Makes chained updates and compares a store with a naive model.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::cast_possible_truncation, clippy::unwrap_used)]

pub mod old;

use std::sync::Arc;

use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Tip};
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal};
use vmfs_common::hash::block_digest;
use vmfs_common::header::Update;
use vmfs_common::identity::{HostKey, Signature};
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{ImagePolicy, Member, MemberList, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{
    BLOCK_BYTES, BlockCount, BlockIndex, DatastoreId, Digest, Epoch, Head, HostId, ImageId, Seq, StoreId,
};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Space, Store, StoreConfig, StoreError};

pub const DATASTORE: DatastoreId = DatastoreId::from_bytes([1; 16]);
pub const HOST: HostId = HostId::from_bytes([2; 16]);
pub const STORE: StoreId = StoreId::from_bytes([3; 16]);
pub const IMAGE: ImageId = ImageId::from_bytes([4; 16]);

pub fn small() -> StoreConfig {
    StoreConfig {
        segment_bytes_max: 128 << 10,
        checkpoint_log_bytes: 96 << 10,
        reserve_bytes: 64 << 10,
        retain_log_bytes_max: 512 << 10,
        gather_after_rounds: 2,
        pool_segments: 1,
        idle_bytes_max: 0,
        recovery_threads: 1,
        ..StoreConfig::default()
    }
}

pub fn create(disk: &SimDisk, cfg: StoreConfig) -> Result<Arc<Store>, StoreError> {
    Store::create(Arc::new(disk.clone()), DATASTORE, HOST, STORE, cfg)
}

pub fn open(disk: &SimDisk, cfg: StoreConfig) -> Result<Arc<Store>, StoreError> {
    Store::open(Arc::new(disk.clone()), DATASTORE, HOST, cfg)
}

/// Makes the updates of one image's chain.
pub struct Maker {
    pub image: ImageId,
    chain: OwnerChain,
    key: HostKey,
    members: MemberList,
    time: u64,
}

fn epoch_start(
    key: &HostKey,
    image: ImageId,
    number: u64,
    members: &MemberList,
    parent: &Tip,
    genesis: bool,
) -> (OwnerChain, Update) {
    let secret = EpochSecret::from_bytes([number as u8; 32]);
    let ballot = Epoch { number, host: key.host_id() };
    let proposal = Proposal {
        datastore: DATASTORE,
        image,
        ballot,
        members: members.digest(),
        pub0: secret.first_public(image, ballot),
        secret_hash: secret.commitment(),
    };
    let mandate = if genesis {
        Mandate::Genesis(Genesis {
            members: members.clone(),
            policy: ImagePolicy::default(),
            attrs: Attrs::default(),
            level: 1,
        })
    } else {
        Mandate::Forced(members.clone())
    };
    let start = EpochStart { proposal, mandate, published: None, signature: Signature([0; 64]) };
    let start = start.signed(parent.head.seq.next(), &parent.head.digest, key);
    OwnerChain::begin(secret, parent, start, 1)
}

impl Maker {
    /// A chain's genesis.
    pub fn genesis(image: ImageId) -> (Self, Update) {
        let key = HostKey::from_seed([9; 32]);
        let member =
            Member { host: key.host_id(), store: STORE, key: key.public(), role: MemberRole::Replica };
        let members = MemberList::new(vec![member]).unwrap();
        let (chain, update) = epoch_start(&key, image, 1, &members, &Tip::default(), true);
        (Self { image, chain, key, members, time: 1 }, update)
    }
    /// A new epoch on some tip of the same image.
    pub fn next_epoch(&mut self, number: u64, parent: &Tip) -> Update {
        let (chain, update) = epoch_start(&self.key, self.image, number, &self.members, parent, false);
        self.chain = chain;
        update
    }
    pub fn op(&mut self, draft: Draft, commit: Seq) -> Update {
        self.time += 1;
        self.chain.append(draft, self.time, commit, Vec::new())
    }
    pub fn write(&mut self, start: u64, data: &[u8], commit: Seq) -> (Update, Vec<u8>) {
        let digests: Vec<Digest> = data.chunks_exact(BLOCK_BYTES).map(block_digest).collect();
        let payload = data
            .chunks_exact(BLOCK_BYTES)
            .zip(&digests)
            .filter(|(_, d)| !d.is_zero())
            .flat_map(|(b, _)| b.to_vec())
            .collect();
        let draft = Draft {
            op: Op::Write { size_after_bytes: Some((start + digests.len() as u64) * 4096) },
            start: BlockIndex(start),
            count: BlockCount(digests.len() as u64),
            digests,
            flags: 0,
        };
        (self.op(draft, commit), payload)
    }
    pub fn zero(&mut self, start: u64, count: u64, commit: Seq) -> Update {
        let op = Op::Zero { size_after_bytes: None };
        self.op(
            Draft { op, start: BlockIndex(start), count: BlockCount(count), digests: vec![], flags: 0 },
            commit,
        )
    }
    pub fn resize(&mut self, blocks: u64, commit: Seq) -> Update {
        self.op(Draft::op(Op::Resize { size_bytes: blocks * 4096 }), commit)
    }
}

pub fn append(image: &ImageStore, update: &Update, payload: &[u8]) -> Result<(), StoreError> {
    let r = image.reserve(update.bytes.len(), update.header.payload_blocks(), Space::Data)?;
    image.append(r, update, payload)
}

/// Content of `fill` for block `i`: different for every (i, fill); zero for fill 0.
pub fn block(i: u64, fill: u64) -> Vec<u8> {
    let mut b = vec![0u8; BLOCK_BYTES];
    if fill != 0 {
        for (k, c) in b.chunks_exact_mut(8).enumerate() {
            c.copy_from_slice(&(i * 1_000_003 + fill * 7919 + k as u64).to_le_bytes());
        }
    }
    b
}

pub const BLOCKS: u64 = 700;

/// The naive model: every state there was.
#[derive(Clone)]
pub struct Model {
    /// One entry per update, from the state before any: head and fills.
    pub history: Vec<(Head, Vec<u64>, ImageState)>,
    /// Index of the image's block that the model's first one stands for.
    pub offset: u64,
    /// The update that led to each, and its payload.
    pub updates: Vec<Option<(Update, Vec<u8>)>>,
}

impl Model {
    pub fn new() -> Self {
        Self {
            history: vec![(Head::default(), vec![0; BLOCKS as usize], ImageState::new(IMAGE))],
            offset: 0,
            updates: vec![None],
        }
    }
    pub fn push(&mut self, update: &Update, payload: &[u8], change: impl FnOnce(&mut Vec<u64>)) {
        self.updates.push(Some((update.clone(), payload.to_vec())));
        let (_, fills, state) = self.history.last().unwrap();
        let (mut fills, mut state) = (fills.clone(), state.clone());
        change(&mut fills);
        state.apply(update);
        self.history.push((update.head(), fills, state));
    }
    pub fn head(&self) -> Head {
        self.history.last().unwrap().0
    }
    /// Forgets everything after the state number `at`.
    pub fn truncate(&mut self, at: usize) {
        self.history.truncate(at + 1);
        self.updates.truncate(at + 1);
    }
    /// The state with this head.
    pub fn at(&self, head: Head) -> Option<usize> {
        self.history.iter().position(|h| h.0 == head)
    }
    pub fn check(&self, image: &ImageStore) {
        let head = image.head();
        let at = self.at(head).unwrap_or_else(|| panic!("head {head:?} was never there"));
        let (_, fills, state) = &self.history[at];
        assert_eq!(*image.state(), *state, "state at {}", head.seq);
        let view = image.view();
        let mut buf = vec![0u8; BLOCKS as usize * BLOCK_BYTES];
        if let Err(e) = image.read(BlockIndex(self.offset), &mut buf) {
            let bad = match e {
                StoreError::BadBlock { index } => index.0,
                e => panic!("{e}"),
            };
            for (u, p) in self.updates.iter().flatten() {
                if (u.header.start.0..u.header.start.0 + u.header.count.0).contains(&bad) {
                    println!("block {bad} was written by {} ({} payload)", u.header.seq, p.len());
                }
            }
            panic!("{e} at {} log {}", head.seq, image.log_start());
        }
        let mut again = vec![0u8; buf.len()];
        view.read(BlockIndex(self.offset), &mut again).unwrap();
        assert!(buf == again);
        let digests = view.digests(BlockIndex(self.offset), BLOCKS as usize).unwrap();
        let mut data = 0;
        for (i, fill) in fills.iter().enumerate() {
            let want = block(i as u64, *fill);
            assert!(buf[i * 4096..(i + 1) * 4096] == want, "block {i} at {}", head.seq);
            assert_eq!(digests[i], block_digest(&want), "digest of block {i}");
            data += u64::from(*fill != 0);
        }
        assert_eq!(view.allocated_blocks().unwrap().0, data);
        assert_eq!(image.allocated_blocks().0, data, "allocated at {}", head.seq);
        let mut at = 0;
        let mut seen = 0;
        while let Some(d) = image.next_data(BlockIndex(at)).unwrap() {
            let hole = image.next_hole(d).unwrap();
            seen += hole.0 - d.0;
            at = hole.0;
        }
        assert_eq!(seen, data);
        let mut next = image.log_start();
        while next <= head.seq {
            let entries = image.read_log(next, 100_000).unwrap();
            assert!(!entries.is_empty());
            for e in entries {
                let at = self.history.iter().position(|h| h.0.seq == next).expect("in the model");
                let (update, payload) = self.updates[at].as_ref().expect("in the model");
                assert_eq!(e.update, *update);
                assert!(e.payload == *payload, "payload of {next}");
                next = next.next();
            }
        }
        if image.log_start() <= head.seq {
            assert_eq!(image.update_at(image.log_start()).unwrap().unwrap().header.seq, image.log_start());
        }
    }
}

/// A store with one image, and its model.
pub struct Rig {
    pub disk: SimDisk,
    pub cfg: StoreConfig,
    pub store: Arc<Store>,
    pub image: Arc<ImageStore>,
    pub maker: Maker,
    pub model: Model,
}

impl Rig {
    pub fn new() -> Self {
        Self::on(SimDisk::new(1 << 30))
    }
    pub fn on(disk: SimDisk) -> Self {
        Self::with(disk, small())
    }
    pub fn with(disk: SimDisk, cfg: StoreConfig) -> Self {
        let store = create(&disk, cfg.clone()).unwrap();
        let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
        let (maker, genesis) = Maker::genesis(IMAGE);
        append(&image, &genesis, &[]).unwrap();
        let mut model = Model::new();
        model.push(&genesis, &[], |_| {});
        Self { disk, cfg, store, image, maker, model }
    }
    pub fn write(&mut self, start: u64, fills: &[u64]) {
        let data: Vec<u8> = fills.iter().zip(start..).flat_map(|(f, i)| block(i, *f)).collect();
        let (u, payload) = self.maker.write(start, &data, Seq::ZERO);
        append(&self.image, &u, &payload).unwrap();
        self.model
            .push(&u, &payload, |m| m[start as usize..start as usize + fills.len()].copy_from_slice(fills));
    }
    pub fn reopen(&mut self, disk: SimDisk) {
        self.disk = disk;
        self.store = open(&self.disk, self.cfg.clone()).unwrap();
        self.image = self.store.image(IMAGE).unwrap();
    }
}
