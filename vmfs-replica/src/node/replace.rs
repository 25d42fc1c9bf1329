//! Content that takes the place of a copy's: an earlier state of it, or another member's.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmfs_common::header::Update;
use vmfs_common::state::ImageState;
use vmfs_common::{Head, HostId};
use vmfs_proto::{Env, Input, Output};
use vmfs_store::{Import, StoreError};

use super::image::{Core, Image};

impl Image {
    pub(super) fn roll_back(
        &self,
        core: &mut Core,
        env: &mut Env<'_>,
        out: &mut Vec<Output>,
        to: Head,
        keep_fork: bool,
    ) -> Result<(), StoreError> {
        if let Some(fork) = self.store.roll_back(to, keep_fork)? {
            tracing::warn!(
                image = %self.id, fork = fork.name, updates = fork.updates,
                "rolled back to update {}; the tail is kept as a fork", to.seq
            );
        }
        core.machine.rolled_back(env, (*self.store.state()).clone(), out);
        self.head_moved_back();
        Ok(())
    }

    /// Content too old to be rebuilt is copied anew; anything else stops the image.
    pub(super) fn roll_back_failed(
        &self,
        core: &mut Core,
        env: &mut Env<'_>,
        out: &mut Vec<Output>,
        why: &StoreError,
    ) {
        if let (StoreError::CannotRollBack { .. }, Some(from)) = (why, core.machine.status(env.now).owner) {
            // From itself, after a lineage was given up: whoever owns the image will say so.
            if from != self.node().identity.host {
                out.push(Output::StartBlockSync { from });
            }
            return;
        }
        tracing::error!(image = %self.id, "stopped: cannot roll back: {why}");
        core.machine.handle(env, Input::StoreFailed, out);
    }

    /// Installs a block-level sync's result and tells the machine, under one lock. False, and nothing is
    /// changed, when the copy has promised or followed something else meanwhile.
    pub(super) fn install(
        self: &Arc<Self>,
        from: HostId,
        import: Import,
        base: &Update,
        state: ImageState,
    ) -> Result<bool, StoreError> {
        self.locked(|core, env, out| {
            if !core.machine.may_import(from, &state) {
                return Ok(false);
            }
            let discards = !core.machine.is_part_of(&state);
            if let Some(fork) = import.finish(base, state.clone(), discards)? {
                tracing::info!(image = %self.id, fork = fork.name, "the replaced log is kept as a fork");
            }
            self.head_moved_back();
            core.machine.handle(env, Input::Imported { state: Box::new(state) }, out);
            Ok(true)
        })
    }

    pub(super) fn sync_progress(&self, blocks: u64) {
        self.pulled_blocks.fetch_add(blocks, Ordering::Relaxed);
    }
}
