//! A store whose files are not what was written: opened, read, verified. Damage is reported or not there;
//! no block is given out that does not fit its digest.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use vmfs_common::chain::{EpochSecret, OwnerChain, Tip};
use vmfs_common::election::{EpochStart, Genesis, Mandate, Proposal};
use vmfs_common::hash::block_digest;
use vmfs_common::header::FORMAT_LEVEL;
use vmfs_common::identity::Signature;
use vmfs_common::op::Attrs;
use vmfs_common::policy::{ImagePolicy, MemberList, MemberRole};
use vmfs_common::{BlockIndex, Digest, Epoch, Seq, StoreId};
use vmfs_store::disk::{Disk, DiskFile};
use vmfs_store::fuzzing::MemFile;
use vmfs_store::{Space, Store, StoreConfig};

use crate::samples::{DATASTORE, IMAGE, key, member, write};

const STORE: StoreId = StoreId::from_bytes([1; 16]);
const PAGE: usize = 4096;

type Files = BTreeMap<String, Vec<u8>>;

/// A disk in memory.
#[derive(Default)]
struct MemDisk(Mutex<BTreeMap<String, Arc<MemFile>>>);

impl MemDisk {
    fn of(files: Files) -> Self {
        Self(Mutex::new(files.into_iter().map(|(k, v)| (k, Arc::new(MemFile(Mutex::new(v))))).collect()))
    }
    fn files(&self) -> Files {
        self.0.lock().iter().map(|(k, v)| (k.clone(), v.0.lock().clone())).collect()
    }
}

impl Disk for MemDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut files = self.0.lock();
        if !create && !files.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::clone(files.entry(name.to_owned()).or_default()) as Arc<dyn DiskFile>)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let inside = |k: &String| k.strip_prefix(&prefix).filter(|n| !n.contains('/')).map(str::to_owned);
        Ok(self.0.lock().keys().filter_map(inside).collect())
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.0.lock();
        let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.lock().remove(name);
        Ok(())
    }
    fn sync_names(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
    fn free_bytes(&self) -> io::Result<u64> {
        Ok(1 << 30)
    }
}

fn config() -> StoreConfig {
    StoreConfig {
        segment_bytes_max: 128 << 10,
        checkpoint_log_bytes: 32 << 10,
        map_cache_bytes: 1 << 20,
        reserve_bytes: 64 << 10,
        retain_log_bytes_max: 1 << 20,
        pool_segments: 0,
        recovery_threads: 1,
        ..StoreConfig::default()
    }
}

const BLOCKS: u64 = 24;

fn content(block: u64) -> [u8; 4096] {
    [u8::try_from(block + 1).unwrap_or(1); 4096]
}

/// A store with one image of a few blocks, a checkpoint, and a log after it.
fn template() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let disk = Arc::new(MemDisk::default());
        let host = key(1).host_id();
        let store = Store::create(Arc::clone(&disk) as _, DATASTORE, host, STORE, config());
        let store = store.expect("an empty disk");
        let image = store.create_image(IMAGE, MemberRole::Replica).expect("an empty store");
        let members = MemberList::new(vec![member(1)]).expect("one member");
        let secret = EpochSecret::from_bytes([9; 32]);
        let ballot = Epoch { number: 1, host };
        let proposal = Proposal {
            datastore: DATASTORE,
            image: IMAGE,
            ballot,
            members: members.digest(),
            pub0: secret.first_public(IMAGE, ballot),
            secret_hash: secret.commitment(),
        };
        let policy = ImagePolicy::default();
        let genesis = Genesis { members, policy, attrs: Attrs::default(), level: FORMAT_LEVEL };
        let start = EpochStart {
            proposal,
            mandate: Mandate::Genesis(genesis),
            published: None,
            signature: Signature([0; 64]),
        };
        let start = start.signed(Seq(1), &Digest::default(), &key(1));
        let (mut chain, first) = OwnerChain::begin(secret, &Tip::default(), start, 1);
        let reserved = image.reserve(first.bytes.len(), 0, Space::Control).expect("space");
        image.append(reserved, &first, &[]).expect("the genesis");
        for block in 0..BLOCKS {
            let data = content(block);
            let update = chain.append(write(block, &[data]), 2 + block, Seq(1), vec![]);
            let reserved = image.reserve(update.bytes.len(), 1, Space::Data).expect("space");
            image.append(reserved, &update, &data).expect("a write");
            if block == BLOCKS / 2 {
                image.sync().expect("a good disk");
                image.checkpoint().expect("a good disk");
            }
        }
        image.sync().expect("a good disk");
        store.put_meta(IMAGE, b"a record of promises").expect("a good disk");
        drop((image, store));
        disk.files()
    })
}

/// One change of a file: which file (1), kind of checksum made right afterwards (1), offset (4), how many
/// bytes (1), the bytes.
pub(crate) fn whole_store(data: &[u8]) -> bool {
    let mut files = template().clone();
    let names: Vec<String> = files.keys().cloned().collect();
    let mut rest = data;
    while let Some(([which, sum, o0, o1, o2, o3, n], next)) = rest.split_first_chunk::<7>() {
        let (bytes, next) = next.split_at(usize::from(*n).min(next.len()));
        rest = next;
        let Some(file) = files.get_mut(&names[usize::from(*which) % names.len()]) else { continue };
        let at = u32::from_le_bytes([*o0, *o1, *o2, *o3]) as usize % (file.len() + 1);
        let end = (at + bytes.len()).min(file.len());
        file[at..end].copy_from_slice(&bytes[..end - at]);
        let page = at / PAGE * PAGE;
        if let Some(page) = file.get_mut(page..page + PAGE) {
            make_right(page, *sum);
        }
    }
    look_at(files)
}

fn make_right(page: &mut [u8], kind: u8) {
    match kind % 4 {
        1 => {
            let crc = crc32c::crc32c(&page[..PAGE - 4]);
            page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
        }
        2 => {
            let crc = crc32c::crc32c_append(crc32c::crc32c(&page[..60]), &page[64..]);
            page[60..64].copy_from_slice(&crc.to_le_bytes());
        }
        3 => {
            let n = u32::from_le_bytes([page[8], page[9], page[10], page[11]]) as usize;
            if n <= PAGE - 16 {
                let crc = crc32c::crc32c(&page[16..16 + n]);
                page[12..16].copy_from_slice(&crc.to_le_bytes());
            }
        }
        _ => {}
    }
}

fn look_at(files: Files) -> bool {
    let disk = Arc::new(MemDisk::of(files));
    let Ok(store) = Store::open(disk as _, DATASTORE, key(1).host_id(), config()) else { return false };
    let _ = store.damaged();
    let _ = store.get_meta(IMAGE);
    let Some(image) = store.image(IMAGE) else { return false };
    let view = image.view();
    let mut buf = [0; PAGE];
    for block in (0..BLOCKS + 2).chain([1 << 30, (1 << 40) - 1]) {
        let read = view.read(BlockIndex(block), &mut buf);
        if let (Ok(()), Ok(digests)) = (read, view.digests(BlockIndex(block), 1))
            && !digests[0].is_zero()
        {
            assert_eq!(block_digest(&buf), digests[0], "block {block} is not what its digest says");
        }
    }
    let head = image.head();
    for seq in 0..=head.seq.0.min(64) {
        let _ = image.update_at(Seq(seq));
    }
    let _ = image.update_at(Seq(u64::MAX));
    let _ = image.read_log(image.log_start(), 1 << 20);
    let _ = view.merkle_tree();
    let _ = image.forks();
    let _ = image.sync();
    let _ = image.checkpoint();
    true
}

pub(crate) fn edits() -> Vec<Vec<u8>> {
    let edit = |file: u8, sum: u8, at: u32, bytes: &[u8]| {
        let n = u8::try_from(bytes.len()).unwrap_or(0);
        [&[file, sum][..], &at.to_le_bytes(), &[n], bytes].concat()
    };
    let files = u8::try_from(template().len()).unwrap_or(8);
    let mut seeds = vec![Vec::new()];
    for file in 0..files {
        for (sum, at) in [(1, 60), (2, 2 * 4096 + 20), (3, 2 * 4096 + 8), (0, 3 * 4096 + 100)] {
            seeds.push(edit(file, sum, at, &[0xff, 0, 1, 0x80]));
        }
    }
    seeds
}

/// The named file of the template, at most `max` bytes of it.
fn file(wanted: impl Fn(&str) -> bool, max: usize) -> Vec<Vec<u8>> {
    let found = template().iter().filter(|(name, _)| wanted(name));
    found.map(|(_, bytes)| bytes[..bytes.len().min(max)].to_vec()).collect()
}

pub(crate) fn segments() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for segment in file(|n| n.starts_with("seg/"), 16 * PAGE) {
        seeds.push(segment[..PAGE - 4].to_vec());
        seeds.extend(
            segment.chunks_exact(2 * PAGE).skip(1).filter(|p| p.starts_with(b"VMHP")).map(<[u8]>::to_vec),
        );
    }
    seeds.truncate(8);
    seeds
}

pub(crate) fn maps() -> Vec<Vec<u8>> {
    file(|n| n.starts_with("map/"), 16 * PAGE)
}

pub(crate) fn bodies() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for map in maps() {
        for page in map.chunks_exact(PAGE).filter(|p| p.starts_with(b"VMCB")) {
            let n = u32::from_le_bytes([page[8], page[9], page[10], page[11]]) as usize;
            seeds.push(page[16..16 + n.min(PAGE - 16)].to_vec());
        }
    }
    seeds
}

pub(crate) fn journals() -> Vec<Vec<u8>> {
    file(|n| n == "meta", 4 * PAGE)
}

pub(crate) fn identities() -> Vec<Vec<u8>> {
    file(|n| n == "store", 4 * PAGE)
}
