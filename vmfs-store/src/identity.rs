//! The `store` file: whose store this is, and the limit of generation numbers given out.

use vmfs_common::codec::{Reader, Writer};
use vmfs_common::{DatastoreId, HostId, StoreId};

use crate::disk::{Disk, DiskFile};
use crate::error::{IoContext as _, StoreError};
use crate::rot::Ledger;
use crate::segment::{PAGE, PAGE_U64};

const NAME: &str = "store";
const NEW_NAME: &str = "store.new";
const MAGIC: [u8; 8] = *b"VMFSSTOR";
const LIMIT_MAGIC: [u8; 8] = *b"VMFSGENL";
const VERSION: u32 = 1;
/// Generations taken at every open.
const STEP: u64 = 1 << 32;

/// Whose store it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) store: StoreId,
    pub(crate) host: HostId,
    pub(crate) datastore: DatastoreId,
}

fn seal(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(PAGE - 4, 0);
    let crc = crc32c::crc32c(&page);
    page.extend_from_slice(&crc.to_le_bytes());
    page
}

fn is_sealed(page: &[u8]) -> bool {
    crc32c::crc32c(&page[..PAGE - 4]).to_le_bytes() == page[PAGE - 4..]
}

fn encode(identity: &Identity) -> Vec<u8> {
    let mut w = Writer::new();
    w.bytes(&MAGIC);
    w.u32(VERSION);
    w.bytes(identity.store.as_bytes());
    w.bytes(identity.host.as_bytes());
    w.bytes(identity.datastore.as_bytes());
    seal(w.finish())
}

fn limit_page(limit: u64) -> Vec<u8> {
    let mut w = Writer::new();
    w.bytes(&LIMIT_MAGIC);
    w.u64(limit);
    seal(w.finish())
}

/// True when the disk holds a store.
pub(crate) fn exists(disk: &dyn Disk) -> Result<bool, StoreError> {
    let names = disk.list("").during(|| "listing the store".into())?;
    Ok(names.iter().any(|n| n == NAME))
}

/// Makes the file; durable on return.
pub(crate) fn create(disk: &dyn Disk, identity: &Identity) -> Result<(), StoreError> {
    if exists(disk)? {
        return Err(StoreError::StoreExists);
    }
    let what = || "creating the store".to_owned();
    let file = disk.open(NEW_NAME, true).during(what)?;
    let page = encode(identity);
    // Two copies of the identity, then two of the limit.
    file.write_at(&[page.as_slice(), &page, &limit_page(1), &limit_page(1)].concat(), 0).during(what)?;
    file.sync().during(what)?;
    disk.rename(NEW_NAME, NAME).during(what)?;
    disk.sync_names("").during(what)
}

fn open(disk: &dyn Disk) -> Result<std::sync::Arc<dyn DiskFile>, StoreError> {
    if !exists(disk)? {
        return Err(StoreError::NoStore);
    }
    disk.open(NAME, false).during(|| "opening the store".into())
}

/// Reads the identity.
///
/// # Errors
/// [`StoreError::NoStore`], [`StoreError::Version`], [`StoreError::Corrupt`], or the disk's.
pub(crate) fn read(disk: &dyn Disk) -> Result<Identity, StoreError> {
    let file = open(disk)?;
    let mut pages = vec![0u8; 2 * PAGE];
    file.read_at(&mut pages, 0).during(|| "reading the store".into())?;
    let corrupt = || StoreError::corrupt("the store's identity");
    let page = pages.chunks_exact(PAGE).find(|p| p[..8] == MAGIC && is_sealed(p)).ok_or_else(corrupt)?;
    let mut r = Reader::new(&page[8..]);
    let bad = |_| corrupt();
    let found = r.u32().map_err(bad)?;
    if found != VERSION {
        return Err(StoreError::Version { what: "the store".into(), found, known: VERSION });
    }
    Ok(Identity {
        store: StoreId::from_bytes(r.array().map_err(bad)?),
        host: HostId::from_bytes(r.array().map_err(bad)?),
        datastore: DatastoreId::from_bytes(r.array().map_err(bad)?),
    })
}

/// Takes a range of generation numbers that was never given out; returns its first.
///
/// Both copies of the limit end up the same: the loss of either must not bring an older limit back, and
/// with it generations that were given out before.
///
/// # Errors
/// [`StoreError::Corrupt`] when neither copy of the limit is readable, or the disk's.
pub(crate) fn take_generations(disk: &dyn Disk, rot: &Ledger) -> Result<u64, StoreError> {
    let what = || "reading the store".to_owned();
    let file = open(disk)?;
    let mut limits = [None, None];
    for (i, limit) in limits.iter_mut().enumerate() {
        *limit = read_limit(&*file, i as u64)?;
    }
    let highest = limits.iter().flatten().max().copied();
    let corrupt = || StoreError::corrupt("the store's generation limit");
    let highest = highest.ok_or_else(corrupt)?;
    let damaged = limits.iter().position(Option::is_none);
    // The damaged one may have been the higher, by one step.
    let first = if damaged.is_some() { highest.checked_add(STEP) } else { Some(highest) };
    let first = first.ok_or_else(corrupt)?;
    let next = first.checked_add(STEP).ok_or_else(corrupt)?;
    // The lower (or damaged) one is overwritten first. Before that the other is made durable: it may be
    // there in the page cache only, from a start whose sync has failed.
    let victim = u64::from(limits[0] > limits[1]);
    for (limit, place) in [(highest, 1 - victim), (next, victim), (next, 1 - victim)] {
        file.write_at(&limit_page(limit), (2 + place) * PAGE_U64).during(what)?;
        file.sync().during(what)?;
    }
    if let Some(i) = damaged {
        rot.found_and_repaired(None, &format!("page {} of the file store", 2 + i), "from its second copy");
    }
    Ok(first)
}

fn read_limit(file: &dyn DiskFile, copy: u64) -> Result<Option<u64>, StoreError> {
    let mut page = vec![0u8; PAGE];
    file.read_at(&mut page, (2 + copy) * PAGE_U64).during(|| "reading the store".to_owned())?;
    let whole = page[..8] == LIMIT_MAGIC && is_sealed(&page);
    Ok(if whole { Reader::new(&page[8..]).u64().ok() } else { None })
}

/// Writes whichever copies of the identity and of the limit are damaged again, from the other ones.
///
/// # Errors
/// As [`read`], or the disk's.
pub(crate) fn mend(disk: &dyn Disk, rot: &Ledger) -> Result<(), StoreError> {
    let what = || "repairing the store".to_owned();
    let good = encode(&read(disk)?);
    let file = open(disk)?;
    let limits = [read_limit(&*file, 0)?, read_limit(&*file, 1)?];
    // Only a running store is mended here: its limits are the same.
    let limit = limits.iter().flatten().max().copied();
    let limit = limit.ok_or_else(|| StoreError::corrupt("the store's generation limit"))?;
    for (at, want) in [good.clone(), good, limit_page(limit), limit_page(limit)].iter().enumerate() {
        let offset = at as u64 * PAGE_U64;
        let mut page = vec![0u8; PAGE];
        file.read_at(&mut page, offset).during(what)?;
        if page != *want {
            let name = format!("page {at} of the file store");
            rot.found(None, &name);
            file.write_at(want, offset).during(what)?;
            file.sync().during(what)?;
            rot.repaired(None, &name, "from its second copy");
        }
    }
    Ok(())
}
