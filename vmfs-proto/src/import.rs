//! When a block-level sync may take effect: between its start and its end the copy may have promised a
//! later epoch, or followed another owner past the state that was copied.

use vmfs_common::ids::HostId;
use vmfs_common::state::ImageState;

use crate::lineage::common;
use crate::machine::{Machine, RoleState};

impl Machine {
    /// True when the content copied from `from`, with the state after it, may replace this copy's. To be
    /// asked under the lock under which the content is then replaced and
    /// [`crate::Input::Imported`] is given; when it may not, [`crate::Input::ImportFailed`] is. Not while a
    /// vote is being made durable, which states the head; and not below what is known to be committed.
    #[must_use]
    pub fn may_import(&self, from: HostId, state: &ImageState) -> bool {
        let epoch = state.epoch_start().map(|e| e.epoch).unwrap_or_default();
        matches!(self.role, RoleState::Follower)
            && self.following.as_ref().is_some_and(|f| f.host == from && f.start.epoch == epoch)
            && self.promise.is_none()
            && self.promised() <= epoch
            && (state.head().seq >= self.meta.commit.1 || self.meta.has_given_up())
            && state.head().rank() > self.state.head().rank()
    }

    /// True when what this copy holds is a part of the history that ends with `state`, as far as both remember
    /// it: nothing is discarded when that takes its place. An epoch has one order of updates, unless its owner
    /// lies; then it is false once this copy has noticed.
    #[must_use]
    pub fn is_part_of(&self, state: &ImageState) -> bool {
        self.forked.is_none() && common(state, &self.join()) == Some(self.state.head().seq)
    }
}
