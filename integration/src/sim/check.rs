//! The checks of the oracles, by name: each is one promise that a run may be found to break. What shows that each
//! can find it is in `integration/tests/oracles_fire.rs`; docs/testing.md has the table.

/// An enumeration that can list its variants.
macro_rules! named {
    ($(#[$doc:meta])* $of:ident { $($(#[$of_doc:meta])* $name:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $of {
            $($(#[$of_doc])* $name,)*
        }

        impl $of {
            /// Every one of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}
pub(super) use named;

named! {
    /// What a run is checked for.
    Check {
        /// An owner builds on an update that somebody made.
        MadeOnKnown,
        /// An update follows its parent in number and epoch.
        MadeInOrder,
        /// No update is made twice.
        MadeOnce,
        /// No honest owner makes two updates with one parent in one epoch.
        MadeOneSuccessor,
        /// What a copy takes, an owner made.
        TakenWasMade,
        /// What a head, a fork or a sync names, an owner made.
        HeadWasMade,
        /// A copy's machine and its store are at the same update.
        MachineIsAtStore,
        /// A copy is as long as it was after the update that its head names.
        SizeIsRight,
        /// A copy's blocks are what they were after the update that its head names.
        BlocksAreRight,
        /// A pinned state does not change.
        PinnedIsRight,
        /// At the end nothing in a copy is damaged.
        CopyVerifies,
        /// After a whole scrub no copy is damaged where that was not reported.
        ScrubFinds,
        /// A scrub finds nothing damaged on a sound disk.
        SoundIsWhole,
        /// No scrub fails on a sound disk.
        ScrubWorks,
        /// A tail that is cut off is kept as a fork.
        TailIsKept,
        /// A fork ends where the copy ended.
        ForkEndsAtTail,
        /// A fork begins where the copy goes on without it.
        ForkBeginsInCopy,
        /// A fork stays listed while the host is up.
        ForkIsListed,
        /// A fork stays listed over a restart.
        ForkSurvives,
        /// Every update of a fork can be read.
        ForkIsWhole,
        /// A fork holds nothing but its own lineage.
        ForkIsPure,
        /// A healthy disk's store opens.
        StoreOpens,
        /// No call of the store fails on a healthy disk.
        StoreWorks,
        /// No background work of the store fails on a healthy disk.
        BackgroundWorks,
        /// A healthy disk's image is not damaged after a restart.
        ImageIsUndamaged,
        /// The promises on the disk can be read.
        PromisesAreReadable,
        /// The promises survive a restart.
        PromisesSurvive,
        /// A copy survives a restart.
        CopySurvives,
        /// What was durable survives a restart.
        DurableSurvives,
        /// What is there after a restart is durable.
        RestartIsDurable,
        /// Nothing is acknowledged before it is durable.
        AckIsDurable,
        /// Nothing is acknowledged below a ballot that was voted for.
        AckKeepsPromise,
        /// No vote is for more than what is durable.
        VoteIsDurable,
        /// A vote that is said again is the same.
        VoteIsFinal,
        /// No vote is said before it is on the disk.
        VoteIsOnDisk,
        /// No vote is for a proposal that nobody made.
        VoteIsAskedFor,
        /// No vote is for a ballot below one that was voted for, nor for another one as high.
        VoteKeepsPromise,
        /// What an honest host says can be decoded.
        MessagesDecode,
        /// The `Seal` of a block-level sync vouches for its `Root`.
        SealVouches,
        /// A block-level sync ends with the content that was vouched for.
        CopiedIsVouchedFor,
        /// An owner that acknowledges a flush has what it is about.
        FlushIsHeld,
        /// An acknowledged flush has the copies that the policy asks for.
        FlushHasCopies,
        /// No flush is acknowledged that a later owner, which has served, lacks.
        FlushIsNotOutlived,
        /// No owner serves without a flush acknowledged before.
        OwnerHasFlushes,
        /// No owner lets reads through long after a later one began to serve.
        OwnerIsAlone,
        /// "Nothing acknowledged is missing" is so.
        NothingIsMissing,
        /// "Ends at" names the last update held, and its time.
        EndIsRight,
        /// The later updates that "ends at" counts did exist.
        LaterDidExist,
        /// "Unknown after" names the last update held.
        ContactEndIsRight,
        /// "Unknown after" names a contact that did take place.
        ContactDidHappen,
        /// Where no single host can cost a flush, a quorum's promotion knows that nothing is missing.
        QuorumKnows,
        /// After the healing there are an owner, an acknowledged flush, and identical copies.
        Converges,
        /// Nothing panics.
        NoPanic,
    }
}
