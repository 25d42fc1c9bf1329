//! The store: one directory, its images, its metadata.

use std::sync::Arc;

use vmfs_common::policy::MemberRole;
use vmfs_common::{DatastoreId, HostId, ImageId, StoreId};
use zeroize::Zeroizing;

use crate::config::StoreConfig;
use crate::disk::Disk;
use crate::error::StoreError;
use crate::image::ImageStore;

/// One host's store. Cheap to share; every method may be called from any thread.
pub struct Store {}

impl Store {
    /// True when `disk` holds a store.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn exists(disk: &dyn Disk) -> Result<bool, StoreError> {
        todo!()
    }
    /// Makes an empty store. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::StoreExists`], or the disk's.
    pub fn create(
        disk: Arc<dyn Disk>,
        datastore: DatastoreId,
        host: HostId,
        id: StoreId,
        cfg: StoreConfig,
    ) -> Result<Arc<Self>, StoreError> {
        todo!()
    }
    /// Opens a store and recovers its images: on return every reported head is durable.
    ///
    /// # Errors
    /// [`StoreError::NoStore`], [`StoreError::WrongHost`], [`StoreError::WrongDatastore`],
    /// [`StoreError::Version`], [`StoreError::Corrupt`], or the disk's.
    pub fn open(
        disk: Arc<dyn Disk>,
        datastore: DatastoreId,
        host: HostId,
        cfg: StoreConfig,
    ) -> Result<Arc<Self>, StoreError> {
        todo!()
    }
    /// The store's identity.
    #[must_use]
    pub fn id(&self) -> StoreId {
        todo!()
    }
    /// Every usable image, ordered.
    #[must_use]
    pub fn image_ids(&self) -> Vec<ImageId> {
        todo!()
    }
    /// Images whose structures are too damaged to open, and why. Their files are left alone.
    #[must_use]
    pub fn damaged(&self) -> Vec<(ImageId, String)> {
        todo!()
    }
    /// Bytes that data may still take: free space of the disk without the reserve.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        todo!()
    }
    /// Makes an empty image. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::ImageExists`], [`StoreError::Full`], or the disk's.
    pub fn create_image(&self, id: ImageId, kind: MemberRole) -> Result<Arc<ImageStore>, StoreError> {
        todo!()
    }
    /// The image, when it is here.
    #[must_use]
    pub fn image(&self, id: ImageId) -> Option<Arc<ImageStore>> {
        todo!()
    }
    /// Removes an image and its forks. Durable on return. Its space returns once nobody reads it.
    ///
    /// # Errors
    /// [`StoreError::NoImage`], or the disk's.
    pub fn remove_image(&self, id: ImageId) -> Result<(), StoreError> {
        todo!()
    }
    /// Stores a small value under `key`, replacing the one before. Atomic, and durable on return;
    /// concurrent calls share one device flush. The value may be secret.
    ///
    /// # Errors
    /// The disk's; then the store takes no more metadata until it is reopened.
    pub fn put_meta(&self, key: ImageId, bytes: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
    /// The value under `key`.
    #[must_use]
    pub fn get_meta(&self, key: ImageId) -> Option<Zeroizing<Vec<u8>>> {
        todo!()
    }
    /// Every key that has a value, ordered.
    #[must_use]
    pub fn meta_keys(&self) -> Vec<ImageId> {
        todo!()
    }
    /// Forgets the value under `key`. Durable on return.
    ///
    /// # Errors
    /// As [`Store::put_meta`].
    pub fn remove_meta(&self, key: ImageId) -> Result<(), StoreError> {
        todo!()
    }
    /// Does background work worth about `budget_bytes` of I/O: checkpoints that are due, recycling,
    /// prewriting segments. To be called from one thread, about ten times a second while writes go
    /// on. True when there is more to do.
    ///
    /// # Errors
    /// The disk's. What was not done stays due.
    pub fn background(&self, budget_bytes: u64) -> Result<bool, StoreError> {
        todo!()
    }
}
