//! The machine's front: construction and the calls of the hot path.

use std::sync::Arc;

use vmfs_common::chain::{Draft, Refusal};
use vmfs_common::codec::CodecError;
use vmfs_common::election::Genesis;
use vmfs_common::header::Update;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{Head, HostId, ImageId, Millis};

use crate::api::{Env, Gate, Identity, Input, Output, Take, Timing};
use crate::status::Status;

/// One image on one host. See [`crate::api`] for the contract.
#[derive(Debug)]
pub struct Machine {
    state: ImageState,
}

impl Machine {
    /// Creates the image here: this host owns it. Outputs the genesis `EpochStart`
    /// ([`Output::AppendLocal`]) and the first meta record. The image takes buffered writes at
    /// once; flushes wait for the quorum.
    ///
    /// # Panics
    /// When this host with this store is not a data member in `genesis`.
    pub fn genesis(
        env: &mut Env<'_>,
        identity: Arc<Identity>,
        timing: Timing,
        image: ImageId,
        genesis: Genesis,
        out: &mut Vec<Output>,
    ) -> Self {
        let _ = (env, identity, timing, genesis, out);
        Self { state: ImageState::new(image) }
    }

    /// Takes up an image found in the store. `durable` is its head after the store's recovery has
    /// synced it, which is `state.head()`. When this host owned the last epoch it starts a restart
    /// election.
    ///
    /// # Errors
    /// The meta record is damaged or of another version: the image must not take part.
    #[expect(clippy::too_many_arguments, reason = "called in one place")]
    pub fn recover(
        env: &mut Env<'_>,
        identity: Arc<Identity>,
        timing: Timing,
        kind: MemberRole,
        state: ImageState,
        durable: Head,
        meta: Option<&[u8]>,
        out: &mut Vec<Output>,
    ) -> Result<Self, CodecError> {
        let _ = (env, identity, timing, kind, durable, meta, out);
        Ok(Self { state })
    }

    /// An image this store knows nothing of, on its first `Offer` (whose `role` says what to keep).
    pub fn blank(
        env: &mut Env<'_>,
        identity: Arc<Identity>,
        timing: Timing,
        image: ImageId,
        kind: MemberRole,
        out: &mut Vec<Output>,
    ) -> Self {
        let _ = (env, identity, timing, kind, out);
        Self { state: ImageState::new(image) }
    }

    /// The state after the head.
    #[must_use]
    pub const fn state(&self) -> &ImageState {
        &self.state
    }

    /// May a guest write now?
    #[must_use]
    pub fn may_write(&self, now: Millis) -> Gate {
        let _ = (self, now);
        Gate::Open
    }

    /// May a guest read now? A replica may always be read: what it shows is a prefix.
    #[must_use]
    pub fn may_read(&self, now: Millis) -> Gate {
        let _ = (self, now);
        Gate::Open
    }

    /// Makes the next update. The caller has asked [`Machine::may_write`] under the same lock and
    /// reserved the space; the update is part of the chain from here on and must be stored.
    ///
    /// # Panics
    /// When this host is not the owner.
    pub fn append(&mut self, env: &mut Env<'_>, draft: Draft, out: &mut Vec<Output>) -> Update {
        let _ = (&self, env, draft, out);
        unimplemented!()
    }

    /// Judges an update frame. The payload has been checked against the digests before (see
    /// [`Machine::refuse`]). Changes nothing but counters and answers.
    ///
    /// # Errors
    /// The reason, which has been counted and told to the sender.
    pub fn check_update(
        &mut self,
        env: &mut Env<'_>,
        from: HostId,
        update: &Update,
        out: &mut Vec<Output>,
    ) -> Result<Take, Refusal> {
        let _ = (&self, env, from, update, out);
        Err(Refusal::NotOwner)
    }

    /// Counts and answers a refusal that the engine found (malformed frame, altered payload).
    pub fn refuse(&mut self, env: &mut Env<'_>, from: HostId, update: Option<&Update>, why: Refusal, out: &mut Vec<Output>) {
        let _ = (&self, env, from, update, why, out);
    }

    /// The store has appended an update that [`Machine::check_update`] found good.
    pub fn took(&mut self, env: &mut Env<'_>, update: &Update, out: &mut Vec<Output>) {
        let _ = (&self, env, update, out);
    }

    /// The store has rolled back, durably.
    pub fn rolled_back(&mut self, env: &mut Env<'_>, state: ImageState, out: &mut Vec<Output>) {
        let _ = (env, out);
        self.state = state;
    }

    /// Everything else.
    pub fn handle(&mut self, env: &mut Env<'_>, input: Input, out: &mut Vec<Output>) {
        let _ = (&self, env, input, out);
    }

    /// When to call again with [`Input::Tick`]; `None`: nothing is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        let _ = self;
        None
    }

    /// What `vmfs status` shows.
    #[must_use]
    pub fn status(&self, now: Millis) -> Status {
        let _ = (self, now);
        unimplemented!()
    }
}
