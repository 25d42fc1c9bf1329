//! What the store can fail with.

use std::io;

use vmfs_common::{BlockIndex, DatastoreId, Head, HostId, ImageId, Seq};

/// A failed store operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and with which file.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// No space: reported before anything was changed.
    #[error("no space left in the store")]
    Full,
    /// Another process has the store open.
    #[error("the store {path} is in use by another process")]
    InUse {
        /// Its directory.
        path: String,
    },
    /// There is no store here.
    #[error("no store here")]
    NoStore,
    /// A store exists already where one was to be created.
    #[error("a store exists here already")]
    StoreExists,
    /// The store belongs to another host.
    #[error("the store belongs to host {found}, not to host {expected}")]
    WrongHost {
        /// Who opens it.
        expected: HostId,
        /// Whose it is.
        found: HostId,
    },
    /// The store belongs to another datastore.
    #[error("the store belongs to datastore {found}, not to datastore {expected}")]
    WrongDatastore {
        /// What was asked for.
        expected: DatastoreId,
        /// What is there.
        found: DatastoreId,
    },
    /// Written by another release.
    #[error("{what} has format version {found}; this release reads version {known}")]
    Version {
        /// Which structure.
        what: String,
        /// Its version.
        found: u32,
        /// What this release reads.
        known: u32,
    },
    /// Bytes on the disk are not what was written, in every copy there is.
    #[error("{what} is damaged")]
    Corrupt {
        /// Which structure.
        what: String,
    },
    /// An earlier error stopped this image; only reopening the store helps.
    #[error("image {image} is stopped after an error: {cause}")]
    Latched {
        /// The image.
        image: ImageId,
        /// The first error.
        cause: String,
    },
    /// No such image.
    #[error("no image {0} in this store")]
    NoImage(ImageId),
    /// The image exists already.
    #[error("image {0} exists already in this store")]
    ImageExists(ImageId),
    /// A witness holds no data.
    #[error("image {0} is kept here without data")]
    NoData(ImageId),
    /// A block's content is not what was written.
    #[error("block {} is damaged", .index.0)]
    BadBlock {
        /// Which block of the image.
        index: BlockIndex,
    },
    /// A page of the block map is not what was written, and its second copy is missing or not either.
    #[error("page {page} of the map of image {image} is damaged")]
    BadMapPage {
        /// The image.
        image: ImageId,
        /// The page's number in the map file.
        page: u32,
    },
    /// An update's payload in the log is not what was written.
    #[error("the payload of update {seq} is damaged")]
    BadPayload {
        /// Which update.
        seq: Seq,
    },
    /// The log no longer reaches back that far.
    #[error("the log begins at update {log_start}")]
    Trimmed {
        /// The first update still in the log.
        log_start: Seq,
    },
    /// The update does not extend the head.
    #[error("update {seq} does not extend the head {head}")]
    NotExtending {
        /// The update.
        seq: Seq,
        /// The head's number.
        head: Seq,
    },
    /// The head asked for is not part of this copy's history.
    #[error("update {} is not in this copy's history", .0.seq)]
    NotInHistory(Head),
    /// No kept checkpoint lies at or below the target, or the log from it on is damaged, so its content cannot be
    /// rebuilt.
    #[error("the content after update {to} can no longer be rebuilt")]
    CannotRollBack {
        /// The target.
        to: Seq,
    },
    /// No such fork.
    #[error("no fork {0:?}")]
    NoFork(String),
    /// Data does not match its digest, or not its shape.
    #[error("data does not match its digest")]
    DigestMismatch,
    /// Not something this release can do.
    #[error("{0} is not supported by this release")]
    Unsupported(&'static str),
    /// An import is under way already.
    #[error("image {0} is being imported already")]
    Importing(ImageId),
}

impl StoreError {
    /// Bytes are not what was written: trying again does not help.
    pub(crate) const fn is_damage(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::BadPayload { .. } | Self::BadMapPage { .. })
    }
}

/// Adds what was being done to an I/O error, and makes "no space" its own kind.
pub(crate) trait IoContext<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, StoreError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, StoreError> {
        self.map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full,
            _ => StoreError::Io { what: what(), source },
        })
    }
}

impl StoreError {
    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }
}
