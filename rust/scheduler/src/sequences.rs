//! The rows of running sequences, by slot. What a completing step reads for every sequence lies in one 64-byte line
//! (`Hot`); everything else lies in columns beside it. A slot is reused only after its sequence ended; results of steps
//! planned before the new admission are told apart by their step number.

use crate::record::Record;
use llmscale_blocks::prefix::ContentId;
use llmscale_types::{BlockId, FrontId, GroupId, HostBlockId, Slot, Token};
use std::collections::VecDeque;

/// Where a sequence stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// The slot is empty.
    Free,
    /// Its context is being computed.
    Prefill,
    /// It takes one row in every decoding step.
    Decode,
    /// Its last row is planned: `max_tokens` is reached when the result arrives.
    LastRow,
    /// Preempted while rows are in flight: waits for their tokens, then goes back to the queue.
    Preempted,
}

/// What `complete` reads per row.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct Hot {
    /// First step that had a row of this sequence; results of earlier steps belong to the slot's previous owner.
    pub(crate) admitted_step: u64,
    pub(crate) request: u64,
    pub(crate) attempt: u32,
    pub(crate) front: FrontId,
    pub(crate) prompt_tokens: u32,
    /// Length at which the sequence ends.
    pub(crate) limit_tokens: u32,
    /// Stop tokens that lie here; the rare longer list is searched in the record.
    pub(crate) stops: [Token; Self::INLINE_STOPS],
    pub(crate) stop_count: u8,
    pub(crate) more_stops: bool,
    pub(crate) phase: Phase,
}

impl Hot {
    pub(crate) const INLINE_STOPS: usize = 4;
    const FREE: Self = Self {
        admitted_step: 0,
        request: 0,
        attempt: 0,
        front: FrontId(0),
        prompt_tokens: 0,
        limit_tokens: 0,
        stops: [0; Self::INLINE_STOPS],
        stop_count: 0,
        more_stops: false,
        phase: Phase::Free,
    };
}

/// What planning and block accounting need.
#[derive(Debug, Default)]
pub(crate) struct Cold {
    pub(crate) table: Vec<BlockId>,
    /// Context positions whose KV a planned step computes.
    pub(crate) planned_tokens: u32,
    /// Context positions whose KV a completed step has computed (prefill; in decode it follows from the length).
    pub(crate) computed_tokens: u32,
    /// Whom it decodes with.
    pub(crate) group: GroupId,
    /// The group's round in which it took its first decode row, at position `joined_tokens`.
    pub(crate) joined_round: u64,
    pub(crate) joined_tokens: u32,
    /// Its place in the wheel's bucket.
    pub(crate) bucket_index: u32,
    /// Leading blocks that the prefix index knows, and the content of the last of them.
    pub(crate) registered_blocks: u32,
    pub(crate) content: Option<ContentId>,
    /// Blocks of the table, by place, that are still to be copied back from the host, which keeps them until then.
    pub(crate) restores: VecDeque<(u32, HostBlockId)>,
    /// Leading blocks that were found cached at its admission, on whatever tier.
    pub(crate) found_blocks: u32,
    /// Length it will have when the rows in flight at its preemption are complete.
    pub(crate) expected_tokens: u32,
    pub(crate) record: Option<Box<Record>>,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Sequences {
    pub(crate) hot: Vec<Hot>,
    pub(crate) contexts: Vec<Vec<Token>>,
    pub(crate) cold: Vec<Cold>,
    free: Vec<Slot>,
}

impl Sequences {
    pub(crate) fn new(max_sequences: u32) -> Self {
        Self {
            hot: vec![Hot::FREE; max_sequences as usize],
            contexts: (0..max_sequences).map(|_| Vec::new()).collect(),
            cold: (0..max_sequences).map(|_| Cold::default()).collect(),
            // Popped from the end, so that low slots are used first and the touched rows stay dense.
            free: (0..max_sequences).rev().map(Slot).collect(),
        }
    }

    pub(crate) fn has_free_slot(&self) -> bool {
        !self.free.is_empty()
    }

    pub(crate) fn running(&self) -> u32 {
        (self.hot.len() - self.free.len()) as u32
    }

    /// Puts a record into a slot; its context moves into the slot's row.
    pub(crate) fn occupy(&mut self, mut record: Box<Record>, admitted_step: u64, limits: &Ends<'_>) -> Slot {
        let slot = self.free.pop().expect("the planner asks for a free slot first");
        let index = slot.index();
        assert_eq!(self.hot[index].phase, Phase::Free, "slot {slot} is taken twice");
        let submission = &mut record.submission;
        let (stops, stop_count, more_stops) = limits.stops(&submission.sampling);
        self.hot[index] = Hot {
            admitted_step,
            request: submission.key.request.0,
            attempt: submission.key.attempt.0,
            front: submission.key.front,
            prompt_tokens: submission.prompt_tokens,
            limit_tokens: limits.tokens(submission.prompt_tokens, submission.sampling.max_tokens),
            stops,
            stop_count,
            more_stops,
            phase: Phase::Prefill,
        };
        self.contexts[index] = std::mem::take(&mut submission.context);
        self.cold[index] = Cold { record: Some(record), ..Cold::default() };
        slot
    }

    /// Empties a slot; the record gets its context back.
    pub(crate) fn vacate(&mut self, slot: Slot) -> Box<Record> {
        let index = slot.index();
        let cold = std::mem::take(&mut self.cold[index]);
        let mut record = cold.record.expect("an occupied slot has a record");
        assert!(cold.table.is_empty(), "slot {slot} is emptied while it holds blocks");
        assert!(cold.restores.is_empty(), "slot {slot} is emptied while it pins host blocks");
        record.submission.context = std::mem::take(&mut self.contexts[index]);
        self.hot[index] = Hot::FREE;
        self.free.push(slot);
        record
    }

    pub(crate) fn record(&self, slot: Slot) -> &Record {
        self.cold[slot.index()].record.as_ref().expect("an occupied slot has a record")
    }

    /// Slots that are taken, in order. O(slots).
    pub(crate) fn occupied(&self) -> impl Iterator<Item = Slot> + '_ {
        (0..self.hot.len() as u32).map(Slot).filter(|slot| self.hot[slot.index()].phase != Phase::Free)
    }
}

/// Where sequences end on this replica.
#[derive(Debug)]
pub(crate) struct Ends<'a> {
    pub(crate) eos_tokens: &'a [Token],
    pub(crate) max_sequence_tokens: u32,
}

impl Ends<'_> {
    /// The first stop tokens for the hot line, and whether there are more.
    fn stops(&self, sampling: &llmscale_types::Sampling) -> ([Token; Hot::INLINE_STOPS], u8, bool) {
        let eos: &[Token] = if sampling.ignore_eos { &[] } else { self.eos_tokens };
        let mut stops = [0; Hot::INLINE_STOPS];
        let mut count = 0;
        for &token in eos.iter().chain(&sampling.stop_tokens).take(Hot::INLINE_STOPS) {
            stops[count] = token;
            count += 1;
        }
        (stops, count as u8, eos.len() + sampling.stop_tokens.len() > count)
    }

    fn tokens(&self, prompt_tokens: u32, max_tokens: u32) -> u32 {
        prompt_tokens.saturating_add(max_tokens).min(self.max_sequence_tokens)
    }
}
