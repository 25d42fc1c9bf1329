//! What goes into a [`crate::Machine`] and what comes out of it.
//!
//! # Contract with the engine
//! - One lock per image around (machine, store append). Outputs are executed in order, before the
//!   lock is given up, as far as they concern the store ([`Output::AppendLocal`],
//!   [`Output::RollBack`]) or order on a stream ([`Output::Send`], [`Output::Stream`],
//!   [`Output::RequestSync`]); slow ones ([`Output::LocalSync`], [`Output::PersistMeta`],
//!   [`Output::ReadHeaders`], [`Output::ServeUpdates`], [`Output::StartBlockSync`]) are started and
//!   reported later as inputs.
//! - Everything one host says to another about one image travels in order on one stream. Messages
//!   are lost only with a [`Input::PeerDown`] and a later [`Input::PeerUp`] at *both* ends; then the
//!   machines restate everything. A machine made while peers are connected is told by `PeerUp`s.
//! - After each call, call again with [`Input::Tick`] at [`crate::Machine::next_deadline`].

use std::fmt;

use vmfs_common::chain::Refusal;
use vmfs_common::header::Update;
use vmfs_common::identity::HostKey;
use vmfs_common::msg::ImageMsg;
use vmfs_common::policy::{ImagePolicy, Member};
use vmfs_common::state::ImageState;
use vmfs_common::{DatastoreId, Epoch, Head, HostId, Millis, Seq, StoreId};

use crate::ops::{FlushError, OpError, OpOutcome};

/// Names a request of the engine's; the machine only hands it back.
pub type Token = u64;

/// When another host was last reachable, on this host's monotonic clock. Kept per pair of hosts by
/// the engine, with pings on the connection every quarter of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contact {
    /// When anything was last received from it: what keeps this host from voting against it.
    pub heard: Option<Millis>,
    /// *Send* time of the latest ping of ours that it has answered: what this host's own lease as an
    /// owner runs from. A host that we hear but that does not hear us does not extend our lease.
    pub confirmed: Option<Millis>,
}

/// The world, as far as a call may look at it.
pub struct Env<'a> {
    /// Monotonic time.
    pub now: Millis,
    /// Nanoseconds since the Unix epoch, for headers. May jump; the chain clamps it.
    pub time_ns: u64,
    /// Fills a buffer with secure random bytes.
    pub entropy: &'a mut dyn FnMut(&mut [u8]),
    /// Contact with other hosts.
    pub contact: &'a dyn Fn(HostId) -> Contact,
    /// Head of this copy as it was at a seq, from the log; `None` when not retained or beyond the
    /// head. Asked on rare paths only (elections, roll-backs).
    pub history: &'a dyn Fn(Seq) -> Option<Head>,
    /// First seq whose update is still in this copy's log.
    pub log_start: Seq,
}

impl fmt::Debug for Env<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Env")
            .field("now", &self.now)
            .field("log_start", &self.log_start)
            .finish_non_exhaustive()
    }
}

/// Who this machine speaks for; shared by all images of a host.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The datastore.
    pub datastore: DatastoreId,
    /// This host.
    pub host: HostId,
    /// This host's store directory.
    pub store: StoreId,
    /// This host's key: votes, seals and certificates are signed with it.
    pub key: HostKey,
}

/// Delays and bounds of the protocol. The defaults suit a LAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// How long contact counts as fresh. Voters do not promise against an owner heard from within
    /// it; a `stall` owner without a quorum for this long freezes. Must be the same on all hosts.
    pub lease_ms: u64,
    /// An unanswered proposal, join or fetch is repeated after this.
    pub retry_ms: u64,
    /// An ordered promotion or hand-over gives up after this.
    pub promote_timeout_ms: u64,
    /// After a quorum of votes, how long to wait for the votes of other connected members, which may
    /// hold more (unflushed) updates.
    pub adopt_grace_ms: u64,
    /// An owner that met a higher promise, or a candidate that lost a race, bids again after between
    /// one and two times this (random), doubling up to 16 times.
    pub rebid_ms: u64,
    /// An image is sealed when nothing was appended for this long...
    pub seal_idle_ms: u64,
    /// ...and at least this often while updates keep coming. Each seal is followed by a sync, so
    /// that the commit point moves without guest flushes.
    pub seal_interval_ms: u64,
    /// Shortest time between two restarts of the stream to one member after refusals.
    pub restart_ms: u64,
    /// A flush that has waited this long is answered with [`FlushError::Timeout`]; `None`: never.
    pub stall_timeout_ms: Option<u64>,
    /// How often changes of the volatile part of the meta record (acknowledged rank, commit point,
    /// shares) are persisted. Promises are persisted at once.
    pub meta_interval_ms: u64,
    /// Writes wait while more than this many bytes are not committed (`acks` majority and all).
    pub max_lag_bytes: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_ms: 3_000,
            retry_ms: 250,
            promote_timeout_ms: 4_000,
            adopt_grace_ms: 100,
            rebid_ms: 400,
            seal_idle_ms: 200,
            seal_interval_ms: 1_000,
            restart_ms: 100,
            stall_timeout_ms: None,
            meta_interval_ms: 5_000,
            max_lag_bytes: 256 << 20,
        }
    }
}

/// May a read or a write go on?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Yes.
    Open,
    /// Not now: wait for [`Output::GateChanged`], then ask again.
    Wait(Wait),
    /// No: answer an error.
    Refused(Refused),
}

/// Why an owner makes requests wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wait {
    /// An election is under way, or its `EpochStart` is not yet durable on a quorum.
    Election,
    /// No quorum within the lease (`on_quorum_loss = "stall"`).
    Frozen,
    /// Too many bytes are not committed.
    MaxLag,
    /// Ownership is being handed over.
    Handover,
}

/// Why a request cannot be served here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refused {
    /// Another host owns the image (EROFS).
    NotOwner,
    /// A witness has no data.
    NoData,
    /// The store has failed here (EIO).
    Failed,
}

/// What the engine does with an update that was found good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// Append it, then [`crate::Machine::took`].
    Append,
    /// Roll back to `to` first, keeping the tail as a fork (durable on return), call
    /// [`crate::Machine::rolled_back`], then judge the same update again with
    /// [`crate::Machine::check_update`].
    RollBack {
        /// The common ancestor, which [`Env::history`] has confirmed, unless the log was trimmed beyond it:
        /// then the roll-back is not possible, and block-level sync takes its place.
        to: Head,
    },
    /// Left over from a stream that has been refused already: drop it without counting.
    Ignore,
}

/// What the machine is told.
#[derive(Debug, Clone)]
pub enum Input {
    /// Time has passed.
    Tick,
    /// A connection to a host is up; its stream starts empty.
    PeerUp {
        /// The host.
        host: HostId,
    },
    /// It is down; messages under way are lost.
    PeerDown {
        /// The host.
        host: HostId,
    },
    /// A control message about this image.
    Msg {
        /// Who sent it, as authenticated by the connection.
        from: HostId,
        /// What it says.
        msg: Box<ImageMsg>,
    },
    /// A guest's flush: answered by [`Output::FlushDone`].
    Flush {
        /// Handed back.
        token: Token,
    },
    /// The last [`Output::LocalSync`] is complete: everything up to `head`, which was the copy's
    /// head when the sync began, is on stable storage.
    Synced {
        /// The durable head.
        head: Head,
    },
    /// The meta record of this version (or a later one) is on stable storage.
    MetaPersisted {
        /// From [`Output::PersistMeta`].
        version: u64,
    },
    /// An append, sync or meta write failed: the image is latched fail-stop here.
    StoreFailed,
    /// Block-level sync has durably and atomically replaced the copy's content and state.
    Imported {
        /// The new state.
        state: Box<ImageState>,
    },
    /// Block-level sync has not worked; it is asked for again after a while.
    ImportFailed,
    /// How far the stream to a member has got: for the lag in [`crate::Status`]. Report when idle
    /// and now and then under load.
    StreamProgress {
        /// The member.
        to: HostId,
        /// The last update handed to the connection.
        seq: Seq,
    },
    /// The stream to a member has come to an update that can no longer be read from the log (its payload, or
    /// the log around it, is damaged): the member gets the blocks instead.
    LogUnreadable {
        /// The member.
        to: HostId,
        /// The update.
        seq: Seq,
    },
    /// The operator wants this host to own the image. Answered by [`Output::OpDone`].
    Promote {
        /// Without a quorum: start a separate lineage.
        force: bool,
        /// Handed back.
        token: Token,
    },
    /// The operator wants `to` to own the image; this host owns it.
    Handover {
        /// The successor.
        to: HostId,
        /// Handed back.
        token: Token,
    },
    /// Admit a member once it has caught up. A replaced store or role is remove, then add.
    AddMember {
        /// The member.
        member: Member,
        /// Handed back.
        token: Token,
    },
    /// Drop a member, or stop the catching up of one not yet admitted.
    RemoveMember {
        /// The member.
        host: HostId,
        /// Handed back.
        token: Token,
    },
    /// Change the policy.
    SetPolicy {
        /// The new policy.
        policy: ImagePolicy,
        /// Handed back.
        token: Token,
    },
    /// The operator gives up waiting: every stalled request is answered with an error now.
    Fail {
        /// Handed back.
        token: Token,
    },
    /// The operator gives up the separate lineage that this host was forced to start: its tail
    /// becomes a fork when the quorum's owner offers its chain.
    AbandonForced {
        /// Handed back.
        token: Token,
    },
}

/// What the machine wants done.
#[derive(Debug, Clone)]
pub enum Output {
    /// Send a control message, in order. Dropped when the host is not connected.
    Send {
        /// The host.
        to: HostId,
        /// The message.
        msg: Box<ImageMsg>,
    },
    /// Stream every update after `after`, retained and future, until stopped or disconnected.
    /// Replaces a stream to the same host: nothing of the old one is sent after this.
    Stream {
        /// The host.
        to: HostId,
        /// The update before the first.
        after: Seq,
        /// Without payload.
        headers_only: bool,
    },
    /// End the stream to a host, unsent frames included.
    StopStream {
        /// The host.
        to: HostId,
    },
    /// Send `Sync { seq, commit }` to a host as soon as its stream has passed `seq`. The engine
    /// keeps, of those not yet passed, the lowest and the highest, and sends the `commit` of the
    /// latest request. Dropped with the stream.
    RequestSync {
        /// The host.
        to: HostId,
        /// The seq to make durable.
        seq: Seq,
        /// The owner's commit point.
        commit: Seq,
    },
    /// Make everything appended so far durable; answer [`Input::Synced`] or [`Input::StoreFailed`].
    /// At most one is under way per image.
    LocalSync,
    /// Append an update of the machine's own making to the store now, under the same lock. The
    /// machine has applied it already; from the owner's reserve, so it must not fail for space.
    AppendLocal(Box<Update>),
    /// Replace the meta record durably; answer [`Input::MetaPersisted`]. Later versions supersede.
    PersistMeta {
        /// Grows.
        version: u64,
        /// Opaque; secret (mode 0600).
        bytes: Vec<u8>,
    },
    /// Roll the copy back now, durably, and call [`crate::Machine::rolled_back`].
    RollBack {
        /// The head to go back to.
        to: Head,
        /// Keep the tail as a named fork.
        keep_fork: bool,
    },
    /// A flush is answered.
    FlushDone {
        /// Which.
        token: Token,
        /// How.
        result: Result<(), FlushError>,
    },
    /// An operator's request is answered.
    OpDone {
        /// Which.
        token: Token,
        /// How.
        result: Result<OpOutcome, OpError>,
    },
    /// What [`crate::Machine::may_read`] and [`crate::Machine::may_write`] answer may have changed.
    GateChanged,
    /// Answer every request that waits at the gate with EIO (the operator's `fail`).
    FailWaiting,
    /// Send `Headers` messages (each within the message limit) with the headers after `after` up
    /// to and including `upto`, or `FetchFailed` when the log does not have them.
    ReadHeaders {
        /// Who asked.
        to: HostId,
        /// The common ancestor.
        after: Head,
        /// The last one wanted.
        upto: Head,
    },
    /// Send update frames after `after` up to and including `upto`, or `FetchFailed`.
    ServeUpdates {
        /// Who asked.
        to: HostId,
        /// The update before the first.
        after: Seq,
        /// The last one wanted.
        upto: Head,
        /// Without payload.
        headers_only: bool,
    },
    /// Copy the content block by block from a host into a shadow; before it replaces the content, ask
    /// [`crate::Machine::may_import`]; answer [`Input::Imported`] or [`Input::ImportFailed`].
    StartBlockSync {
        /// The owner.
        from: HostId,
    },
    /// Something to log.
    Report(Event),
}

/// Worth a line in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// An update was refused; logged for the first of its kind.
    Refused {
        /// From.
        from: HostId,
        /// Why.
        why: Refusal,
        /// Its number.
        seq: Seq,
    },
    /// An election was started.
    Bidding {
        /// For.
        ballot: Epoch,
    },
    /// This host owns the image; `confirmed` when the ended epoch's secret was published.
    Elected {
        /// Its tenure.
        epoch: Epoch,
        /// The adopted head.
        parent: Head,
        /// See above.
        confirmed: bool,
    },
    /// Another host has taken over.
    Deposed {
        /// By.
        by: Epoch,
    },
    /// A tail was cut off.
    RolledBack {
        /// From.
        from: Head,
        /// To.
        to: Head,
    },
    /// A member left its place in the quorum: flushes are acknowledged with fewer data copies.
    Degraded,
    /// The full number of copies is back.
    Restored,
    /// No quorum within the lease: reads and writes wait.
    Frozen,
    /// The quorum is back.
    Thawed,
    /// Two valid updates with one parent, or a lineage that cannot be joined; nothing was changed.
    Fork {
        /// Ours.
        ours: Head,
        /// Theirs.
        theirs: Head,
    },
    /// The owner says that this host is no member any more.
    Removed {
        /// Who says so.
        by: HostId,
    },
    /// A member has lost what it acknowledged.
    Amnesia {
        /// Who.
        host: HostId,
    },
}
