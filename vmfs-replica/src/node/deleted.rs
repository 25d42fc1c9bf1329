//! Images whose name is gone: open ones live on, the others are given back after a while.
//!
//! Where an image is unlinked, its chain says so at once, so that its name is free everywhere; an image that
//! is still open there carries a mark of its own beside it ([`IN_USE`]), until its last close. A member keeps a
//! marked image for its undelete window after the latest update, in which the owner repeats the mark: a
//! temporary file that has no name and is being written loses no copy, and one whose owner never returns does
//! not stay for ever.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::op::Op;
use vmfs_common::state::ImageState;

use super::NodeInner;
use super::image::Image;
use super::io::IoError;

/// A deleted image that need not be kept is removed after this, nanoseconds.
const DELETED_GRACE_NS: u64 = 500_000_000;
/// The shortest undelete window of an image that is in use, nanoseconds.
const IN_USE_WINDOW_NS: u64 = 20_000_000_000;
/// An extended attribute in a namespace that guests cannot reach.
pub const IN_USE: &str = "vmfs.in-use";

fn is_marked(state: &ImageState) -> bool {
    state.xattrs.contains_key(IN_USE)
}

fn mark(value: Option<Vec<u8>>) -> Op {
    Op::Xattr { name: IN_USE.to_owned(), value }
}

impl Image {
    /// A file of the mount is open on it.
    pub fn note_open(&self) {
        self.opens.fetch_add(1, Ordering::AcqRel);
    }

    /// It is closed. The last close of an unlinked image begins its undelete window.
    pub fn note_close(self: &Arc<Self>) {
        let last = self.opens.fetch_sub(1, Ordering::AcqRel) == 1;
        if last && self.is_owner_here() && is_marked(&self.state()) {
            // When it cannot be appended now, the sweep does it.
            let _ = self.set_in_use(false);
        }
    }

    fn is_open_here(&self) -> bool {
        self.opens.load(Ordering::Acquire) > 0
    }

    fn set_in_use(self: &Arc<Self>, in_use: bool) -> Result<(), IoError> {
        self.control(|state| (state.unlinked || in_use).then(|| mark(in_use.then(Vec::new))))
    }

    /// Gives its name up; its content lives until the last close. Once is enough.
    ///
    /// # Errors
    /// Not the owner, or nothing can be appended now.
    pub fn unlink(self: &Arc<Self>) -> Result<(), IoError> {
        let state = self.state();
        if state.unlinked {
            return Ok(());
        }
        if self.is_open_here() && !is_marked(&state) {
            match self.set_in_use(true) {
                // No room for another attribute: then it is kept as if it were closed.
                Ok(()) | Err(IoError::Limit) => {}
                Err(e) => return Err(e),
            }
        }
        self.control(|state| (!state.unlinked).then_some(Op::Unlink))?;
        self.node().claims_changed();
        Ok(())
    }
}

impl NodeInner {
    /// Gives back what is deleted and need not be kept.
    pub(super) fn sweep_deleted(self: &Arc<Self>) {
        let (free, total) = self.space();
        let space_is_short = free < total / 20;
        for image in self.images() {
            let state = image.state();
            if state.unlinked && self.is_over(&image, &state, space_is_short) {
                tracing::debug!(image = %image.id, "deleted image removed");
                if let Err(e) = self.forget(&image) {
                    tracing::warn!(image = %image.id, "cannot remove a deleted image: {e}");
                }
            }
        }
    }

    fn is_over(&self, image: &Arc<Image>, state: &ImageState, space_is_short: bool) -> bool {
        let window_ns = self.config.store.undelete_window.millis().saturating_mul(1_000_000);
        let in_use_ns = window_ns.max(IN_USE_WINDOW_NS);
        let age_ns = super::unix_ns().saturating_sub(state.ctime_ns);
        let (owner, marked, open) = (image.is_owner_here(), is_marked(state), image.is_open_here());
        if owner && open && age_ns > in_use_ns / 4 {
            // Tried again at the next sweep when it cannot be appended now.
            let _ = image.set_in_use(true);
        } else if owner && marked && !open {
            // As after a crash, which closes everything.
            let _ = image.set_in_use(false);
        }
        if open || (owner && marked) {
            return false;
        }
        // The owner gives the space back once every member knows; the members keep the image for the
        // undelete window, unless it never held data or the space is needed.
        let empty = image.store.allocated_blocks().0 == 0;
        let kept_ns = match marked {
            true => in_use_ns,
            false if owner || empty || space_is_short => DELETED_GRACE_NS,
            false => window_ns,
        };
        let settled = !owner || image.is_settled(self) || age_ns > window_ns;
        age_ns > kept_ns && settled
    }
}
