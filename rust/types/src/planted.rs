//! Bugs that tests plant in the production state machines to see that the simulator finds them. One thread has at most one.
//! Without the feature `planted`, which only the simulator's tests turn on, every question is answered "no" at compile time
//! and nothing of this is left in a build. Knows nothing of what the bugs do: each is where its name is asked for.

/// A bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Planted {
    /// A replica believes that the cache of its dead worker is still there.
    KeepsCacheOfDeadWorker,
    /// A replica convicts whoever was at work when its worker died for the first time.
    ConvictsAtOnce,
    /// A replica gives the last rows of an ended sequence to the next one in its slot.
    GivesRowsToTheNextInSlot,
    /// A replica does not give blocks back when a sequence is aborted.
    AbortLeaksBlocks,
    /// A replica does not remember who was at work when its worker died.
    ForgetsSuspects,
    /// A replica computes one token more than was asked for.
    ComputesOneTooMany,
    /// A replica forgets the token that was sampled before a preemption.
    PreemptionForgetsAToken,
    /// A replica goes on from the order that its dead worker knew.
    NewWorkerGetsNoSnapshot,
    /// A replica keeps the deadline of what has ended.
    KeepsDeadlineOfTheEnded,
    /// A replica leaves one change out when it tells a front what it missed.
    ReplayLeavesOneOut,
    /// A front loses a token of a frame with many.
    LosesATokenOfALargeFrame,
    /// A front tells a reader who comes back what that one has already.
    TellsReadersTwice,
    /// A front takes tokens of attempts that it has given up.
    TakesTokensOfOldAttempts,
    /// A front lets requests live on after their deadline.
    IgnoresDeadlines,
    /// A front does not take the load of a lost attempt off its replica.
    ForgetsToReleaseLoad,
    /// A front goes on without the last token that it has.
    GoesOnWithoutTheLastToken,
    /// A front goes on where tokens are computed otherwise, though another replica is free.
    IgnoresNumerics,
    /// A front takes more requests than its bound.
    QueuesWithoutBound,
    /// A front leaves more than half of a pool alone.
    EjectsMoreThanHalf,
    /// A front lets both attempts at a request go on after the first token.
    KeepsRacingAfterTheFirstToken,
    /// A front always finds room in its retry budget.
    RetriesWithoutBudget,
    /// A node speaks its own newest version to whoever greets it.
    SpeaksItsOwnVersion,
    /// A replica copies the neighbour of a block that is evicted.
    OffloadsAnotherBlock,
    /// A replica believes that copies of lost steps were made.
    BelievesInLostCopies,
    /// A replica lets others share what a step in flight has yet to restore.
    SharesBeforeItIsRestored,
    /// A worker restores blocks whose headers it does not look at.
    LooksAtNoHeader,
    /// A replica takes writes to the disk for done that failed.
    BelievesInFailedWrites,
    /// A replica lets a sequence start with what is still being read from the disk.
    RestoresBeforeItIsRead,
    /// A worker takes what it reads from the disk without looking at its header.
    LooksAtNoDiskHeader,
    /// A replica that drains writes over what the disk was to keep.
    SavesOverWhatItKeeps,
    /// A replica that drains does not wait for its last writes.
    EndsBeforeItHasSaved,
    /// A replica lets a prompt begin in the time that is left where the one before was cut.
    OvertakesACutPrompt,
}

impl Planted {
    /// All of them.
    pub const ALL: [Self; 32] = [
        Self::KeepsCacheOfDeadWorker,
        Self::ConvictsAtOnce,
        Self::GivesRowsToTheNextInSlot,
        Self::AbortLeaksBlocks,
        Self::ForgetsSuspects,
        Self::ComputesOneTooMany,
        Self::PreemptionForgetsAToken,
        Self::NewWorkerGetsNoSnapshot,
        Self::KeepsDeadlineOfTheEnded,
        Self::ReplayLeavesOneOut,
        Self::LosesATokenOfALargeFrame,
        Self::TellsReadersTwice,
        Self::TakesTokensOfOldAttempts,
        Self::IgnoresDeadlines,
        Self::ForgetsToReleaseLoad,
        Self::GoesOnWithoutTheLastToken,
        Self::IgnoresNumerics,
        Self::QueuesWithoutBound,
        Self::EjectsMoreThanHalf,
        Self::KeepsRacingAfterTheFirstToken,
        Self::RetriesWithoutBudget,
        Self::SpeaksItsOwnVersion,
        Self::OffloadsAnotherBlock,
        Self::BelievesInLostCopies,
        Self::SharesBeforeItIsRestored,
        Self::LooksAtNoHeader,
        Self::BelievesInFailedWrites,
        Self::RestoresBeforeItIsRead,
        Self::LooksAtNoDiskHeader,
        Self::SavesOverWhatItKeeps,
        Self::EndsBeforeItHasSaved,
        Self::OvertakesACutPrompt,
    ];

    /// Whether this thread has the bug.
    #[cfg(feature = "planted")]
    pub fn is_here(self) -> bool {
        HERE.get() == Some(self)
    }

    /// Whether this thread has the bug.
    #[cfg(not(feature = "planted"))]
    #[inline]
    pub const fn is_here(self) -> bool {
        false
    }

    /// Gives this thread the bug while `run` runs.
    #[cfg(feature = "planted")]
    pub fn while_here<R>(self, run: impl FnOnce() -> R) -> R {
        let before = HERE.replace(Some(self));
        let result = run();
        HERE.set(before);
        result
    }
}

#[cfg(feature = "planted")]
thread_local! {
    static HERE: std::cell::Cell<Option<Planted>> = const { std::cell::Cell::new(None) };
}
