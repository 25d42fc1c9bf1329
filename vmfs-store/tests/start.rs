//! Starting a store on a disk that fails.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use vmfs_common::{DatastoreId, HostId, StoreId};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{Store, StoreConfig, StoreError};

const DATASTORE: DatastoreId = DatastoreId::from_bytes([1; 16]);
const HOST: HostId = HostId::from_bytes([2; 16]);

fn config() -> StoreConfig {
    StoreConfig { reserve_bytes: 256 << 10, pool_segments: 0, ..StoreConfig::default() }
}

fn open(disk: &SimDisk) -> Result<Arc<Store>, StoreError> {
    Store::open(Arc::new(disk.clone()), DATASTORE, HOST, config())
}

/// Found by the simulator: each start wrote one of the two copies of the generation limit, took the one
/// that was in the page cache alone for durable, and the next start overwrote the other.
#[test]
fn starts_whose_syncs_fail_and_a_power_cut_leave_a_store_that_opens() {
    let disk = SimDisk::new(64 << 20);
    let store = StoreId::from_bytes([3; 16]);
    drop(Store::create(Arc::new(disk.clone()), DATASTORE, HOST, store, config()).unwrap());
    for failed in 1..=4 {
        disk.fail_syncs(true);
        assert!(open(&disk).is_err());
        for seed in 0..100 {
            let cut = disk.power_cut(seed);
            assert_eq!(open(&cut).unwrap().id(), store, "after {failed} failed starts, cut {seed}");
        }
    }
}
