//! Monotone counts since the start: what metrics show and what tests hold against their own books.

/// What a front has seen and done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontCounters {
    /// Requests taken.
    pub submitted: u64,
    /// Requests not taken.
    pub refused: u64,
    /// Terminal events.
    pub finished: u64,
    /// Attempts sent to replicas.
    pub attempts: u64,
    /// Attempts lost with their replica, by a gap, by silence or by a refusal that counts.
    pub lost_attempts: u64,
    /// Attempts made again after a replica answered badly.
    pub retries: u64,
    /// Of these, attempts of requests that had failed before: what the retry budget bounds.
    pub repeated_retries: u64,
    /// Times that such an attempt had to wait because too many were made.
    pub retries_delayed: u64,
    /// Second attempts that began beside a first one whose first token was late.
    pub hedges: u64,
    /// Of these, those that were first after all.
    pub hedge_wins: u64,
    /// Context tokens of second attempts.
    pub hedged_tokens: u64,
    /// Context tokens of first attempts; 0 without second attempts.
    pub first_attempt_tokens: u64,
    /// Attempts that came back to wait again at no fault of theirs.
    pub given_back: u64,
    /// Attempts asked back.
    pub recalls: u64,
    /// Attempts moved away from a draining replica, or one without a worker, in the middle of their stream.
    pub moved: u64,
    /// Output tokens taken into records.
    pub tokens: u64,
    /// Frames of an incarnation that is gone.
    pub stale_frames: u64,
    /// Rows of an attempt that is gone.
    pub stale_rows: u64,
    /// Rows and orders for requests that have ended.
    pub late: u64,
    /// Tokens that were there already.
    pub duplicate_tokens: u64,
    /// Tokens beyond `max_tokens`.
    pub surplus_tokens: u64,
    /// Streams with a missing token.
    pub gaps: u64,
    /// Attempts given up because nothing was heard of them.
    pub silences: u64,
    /// Requests ended at their deadline by this front.
    pub expired: u64,
    /// Requests ended because their reader had too much left unread.
    pub slow_readers: u64,
    /// Times that a stream went on under another numerics id, because no replica of its own could begin it.
    pub numerics_changes: u64,
    /// Replicas turned away because the table is full.
    pub refused_replicas: u64,
}
