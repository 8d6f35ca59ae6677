//! The worker's mirror of the scheduler: expands each delta into flat int32 buffers of fixed capacity, which an executor
//! wraps once and reads every step. Holds ids, tables and sampling state of the sequences that run, nothing that a fresh
//! worker could not be told again. A step costs O(rows) writes; tables change only where blocks were appended.
//! Knows no model, device or socket.

use llmscale_types::{Admission, Delta, EngineLimits, Epoch, Sampling, Slot, StepId, Token};

/// What the sampler needs to know about a slot.
#[derive(Debug, Default)]
pub struct SlotSampling {
    /// The request's parameters.
    pub sampling: Sampling,
    /// How many ids of the context are prompt.
    pub prompt_tokens: u32,
    /// Prompt ids, sorted and unique; kept only where the repetition penalty needs them.
    pub prompt_set: Vec<Token>,
    /// Emitted ids with their counts, sorted; kept only where a penalty needs them.
    pub emitted_counts: Vec<(Token, u32)>,
}

impl SlotSampling {
    fn new(admission: &Admission) -> Self {
        let sampling = admission.sampling.clone();
        let (prompt, emitted) = admission.context.split_at(admission.prompt_tokens as usize);
        let mut state = Self { sampling, prompt_tokens: admission.prompt_tokens, ..Self::default() };
        if state.penalizes_prompt() {
            state.prompt_set = prompt.to_vec();
            state.prompt_set.sort_unstable();
            state.prompt_set.dedup();
        }
        for &token in emitted {
            state.count(token);
        }
        state
    }

    fn penalizes_prompt(&self) -> bool {
        self.sampling.repetition_penalty.to_bits() != 1.0_f32.to_bits()
    }

    fn penalizes_output(&self) -> bool {
        let off = |value: f32| value.to_bits() << 1 == 0;
        self.penalizes_prompt() || !off(self.sampling.presence_penalty) || !off(self.sampling.frequency_penalty)
    }

    fn count(&mut self, token: Token) {
        if self.penalizes_output() {
            match self.emitted_counts.binary_search_by_key(&token, |entry| entry.0) {
                Ok(at) => self.emitted_counts[at].1 += 1,
                Err(at) => self.emitted_counts.insert(at, (token, 1)),
            }
        }
    }
}

/// A delta that does not follow from what the mirror holds. Until a snapshot comes, nothing does.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("step {step} of epoch {epoch} does not follow: {why}")]
pub struct Gap {
    /// The delta's epoch.
    pub epoch: Epoch,
    /// The delta's step.
    pub step: StepId,
    /// What does not fit.
    pub why: &'static str,
}

/// How much of the buffers the current step uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepCounts {
    /// Token rows.
    pub rows: u32,
    /// Sequences with rows.
    pub sequences: u32,
    /// Of these, sequences with one decode row; they come first.
    pub decodes: u32,
    /// Rows that sample.
    pub samples: u32,
}

/// One running sequence as a worker sees it.
#[derive(Debug, Default)]
struct Row {
    context: Vec<Token>,
    blocks: u32,
    /// Position of the next decode row; meaningful while it decodes.
    position: u32,
    /// Its place among the decoding sequences, while it decodes.
    decode_index: Option<u32>,
    sampling: SlotSampling,
}

/// See the file's header.
#[derive(Debug)]
pub struct Mirror {
    limits: EngineLimits,
    max_blocks: usize,
    epoch: Epoch,
    step: StepId,
    /// What it holds is void.
    lost: bool,
    rows: Vec<Option<Row>>,
    decoding: Vec<Slot>,
    /// The token that the next decode row of a slot reads.
    last_token: Vec<Token>,
    /// Slots that start to decode after this step's chunks.
    joining: Vec<Slot>,
    counts: StepCounts,
    sample_slots: Vec<Slot>,
    buffers: Buffers,
}

/// The flat buffers; lengths are capacities and never change, so that pointers into them stay valid.
#[derive(Debug)]
pub struct Buffers {
    /// `[rows]` ids.
    pub token_ids: Box<[i32]>,
    /// `[rows]` absolute positions.
    pub positions: Box<[i32]>,
    /// `[rows]` where the row's KV goes: block times block size plus offset.
    pub slot_mapping: Box<[i32]>,
    /// `[sequences + 1]` first row of each sequence.
    pub query_start: Box<[i32]>,
    /// `[sequences]` KV tokens, this step's included.
    pub sequence_lengths: Box<[i32]>,
    /// `[sequences]` where the sequence's table starts in `block_tables`.
    pub table_offsets: Box<[i32]>,
    /// `[slots][max blocks per sequence]` tables, kept from step to step.
    pub block_tables: Box<[i32]>,
    /// `[samples]` rows that sample.
    pub sample_rows: Box<[i32]>,
}

impl Mirror {
    /// An empty mirror of an epoch.
    pub fn new(limits: &EngineLimits, epoch: Epoch) -> Self {
        let sequences = limits.max_sequences as usize;
        let rows = limits.max_step_tokens as usize;
        let max_blocks = limits.blocks_for(limits.max_sequence_tokens) as usize;
        let buffer = |entries: usize| vec![0_i32; entries].into_boxed_slice();
        Self {
            max_blocks,
            epoch,
            step: StepId(0),
            lost: false,
            rows: (0..sequences).map(|_| None).collect(),
            decoding: Vec::with_capacity(sequences),
            last_token: vec![0; sequences],
            joining: Vec::new(),
            counts: StepCounts::default(),
            sample_slots: Vec::with_capacity(sequences),
            buffers: Buffers {
                token_ids: buffer(rows),
                positions: buffer(rows),
                slot_mapping: buffer(rows),
                query_start: buffer(sequences + 1),
                sequence_lengths: buffer(sequences),
                table_offsets: buffer(sequences),
                block_tables: buffer(sequences * max_blocks),
                sample_rows: buffer(sequences),
            },
            limits: limits.clone(),
        }
    }

    /// Takes a delta: afterwards the buffers hold the step. A delta that does not follow leaves the mirror lost: the caller
    /// asks for a snapshot, and passes over what comes before it.
    pub fn expand(&mut self, delta: &Delta) -> Result<StepCounts, Gap> {
        let follows = if delta.epoch != self.epoch {
            Err("it is of another epoch")
        } else if delta.step <= self.step {
            Err("it is not newer than the last step seen")
        } else if delta.is_snapshot() {
            self.clear();
            Ok(())
        } else if self.lost || delta.base != self.step {
            Err("its base is not the last step seen")
        } else {
            Ok(())
        };
        let outcome = follows.and_then(|()| self.apply(delta));
        self.lost = outcome.is_err();
        if !self.lost {
            self.step = delta.step;
        }
        outcome.map_err(|why| Gap { epoch: delta.epoch, step: delta.step, why })
    }

    /// What the mirror holds is void, because the step that it expanded last was not computed to its end.
    pub fn lose(&mut self) {
        self.lost = true;
    }

    /// Whether this delta is to be passed over, because a snapshot was asked for and comes behind it.
    pub fn passes_over(&self, delta: &Delta) -> bool {
        self.lost && !delta.is_snapshot()
    }

    fn clear(&mut self) {
        self.rows.iter_mut().for_each(|row| *row = None);
        self.decoding.clear();
        self.joining.clear();
    }

    fn apply(&mut self, delta: &Delta) -> Result<StepCounts, &'static str> {
        self.join_decoding();
        for &slot in &delta.leave {
            self.leave(slot).ok_or("a slot leaves that is empty")?;
        }
        for admission in &delta.admit {
            self.admit(admission)?;
        }
        if delta.append_slots.len() != delta.append_blocks.len() {
            return Err("appended slots and blocks differ in number");
        }
        for (&slot, &block) in delta.append_slots.iter().zip(&delta.append_blocks) {
            self.append(slot, block.0)?;
        }
        self.counts = StepCounts::default();
        self.sample_slots.clear();
        if delta.decodes {
            self.write_decodes()?;
        }
        for chunk in &delta.chunks {
            self.write_chunk(chunk.slot, chunk.start_tokens, chunk.tokens)?;
        }
        self.buffers.query_start[self.counts.sequences as usize] = self.counts.rows as i32;
        Ok(self.counts)
    }

    /// Tells the mirror what the step sampled, in the order of `sample_slots`; rows that failed have no token.
    pub fn record(&mut self, tokens: &[Option<Token>]) {
        assert_eq!(tokens.len(), self.sample_slots.len(), "one result per sampling row");
        for (&slot, token) in self.sample_slots.iter().zip(tokens) {
            let (Some(token), Some(row)) = (*token, self.rows[slot.index()].as_mut()) else { continue };
            self.last_token[slot.index()] = token;
            row.sampling.count(token);
        }
    }

    /// The buffers of the current step.
    pub fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Which slots sample, in the order of `sample_rows`.
    pub fn sample_slots(&self) -> &[Slot] {
        &self.sample_slots
    }

    /// Position that the sampled token of a row will have: one past the row's own.
    pub fn sample_position(&self, sample: usize) -> u32 {
        let row = self.buffers.sample_rows[sample] as usize;
        self.buffers.positions[row] as u32 + 1
    }

    /// Sampling state of an occupied slot.
    pub fn sampling(&self, slot: Slot) -> &SlotSampling {
        &self.rows[slot.index()].as_ref().expect("a sampling slot is occupied").sampling
    }

    /// Ids that the row must not sample: the sequence's ends, while it is shorter than `min_tokens`.
    pub fn suppressed(&self, sample: usize, slot: Slot) -> Vec<Token> {
        let state = self.sampling(slot);
        let output_tokens = self.sample_position(sample) - state.prompt_tokens;
        if output_tokens >= state.sampling.min_tokens {
            return Vec::new();
        }
        let eos: &[Token] = if state.sampling.ignore_eos { &[] } else { &self.limits.eos_tokens };
        eos.iter().chain(&state.sampling.stop_tokens).copied().collect()
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.limits.vocabulary as usize
    }

    /// The step whose rows are in the buffers.
    pub fn step(&self) -> (Epoch, StepId) {
        (self.epoch, self.step)
    }

    fn leave(&mut self, slot: Slot) -> Option<()> {
        let row = self.rows.get_mut(slot.index())?.take()?;
        if let Some(index) = row.decode_index {
            self.decoding.swap_remove(index as usize);
            if let Some(&moved) = self.decoding.get(index as usize) {
                let row = self.rows[moved.index()].as_mut().expect("a decoding slot is occupied");
                row.decode_index = Some(index);
            }
        }
        Some(())
    }

    fn admit(&mut self, admission: &Admission) -> Result<(), &'static str> {
        let index = admission.slot.index();
        let free = self.rows.get(index).ok_or("a slot is admitted that does not exist")?.is_none();
        if !free {
            return Err("a slot is admitted that is taken");
        }
        let context_ok = admission.context.len() <= self.limits.max_sequence_tokens as usize
            && (1..=admission.context.len()).contains(&(admission.prompt_tokens as usize))
            && (admission.computed_tokens as usize) < admission.context.len();
        if !context_ok || admission.blocks.len() > self.max_blocks {
            return Err("an admission exceeds the limits");
        }
        let sampling = SlotSampling::new(admission);
        let context = admission.context.clone();
        self.rows[index] = Some(Row { context, blocks: 0, position: 0, decode_index: None, sampling });
        for block in &admission.blocks {
            self.append(admission.slot, block.0)?;
        }
        Ok(())
    }

    fn append(&mut self, slot: Slot, block: u32) -> Result<(), &'static str> {
        if block >= self.limits.total_blocks {
            return Err("a block is named that does not exist");
        }
        let row = self.rows.get_mut(slot.index()).and_then(Option::as_mut).ok_or("a block for an empty slot")?;
        if row.blocks as usize >= self.max_blocks {
            return Err("a table exceeds the longest sequence");
        }
        self.buffers.block_tables[slot.index() * self.max_blocks + row.blocks as usize] = block as i32;
        row.blocks += 1;
        Ok(())
    }

    /// Sequences whose last chunk was in the previous step decode from now on.
    fn join_decoding(&mut self) {
        for slot in std::mem::take(&mut self.joining) {
            let row = self.rows[slot.index()].as_mut().expect("it had a row in the previous step");
            row.position = row.context.len() as u32;
            row.decode_index = Some(self.decoding.len() as u32);
            // The ids are in the KV now; only the sampler's state is still needed.
            row.context = Vec::new();
            self.decoding.push(slot);
        }
    }

    fn write_decodes(&mut self) -> Result<(), &'static str> {
        for index in 0..self.decoding.len() {
            let slot = self.decoding[index];
            let row = self.rows[slot.index()].as_mut().expect("a decoding slot is occupied");
            let position = row.position;
            row.position += 1;
            let token = self.last_token[slot.index()];
            self.start_sequence(slot, position + 1)?;
            self.write_row(slot, position, token)?;
            self.sample_last_row(slot);
        }
        self.counts.decodes = self.counts.sequences;
        Ok(())
    }

    fn write_chunk(&mut self, slot: Slot, start: u32, tokens: u32) -> Result<(), &'static str> {
        let row = self.rows.get(slot.index()).and_then(Option::as_ref).ok_or("a chunk of an empty slot")?;
        let end = start.checked_add(tokens).ok_or("a chunk exceeds its context")?;
        let length = row.context.len() as u32;
        if tokens == 0 || end > length || row.decode_index.is_some() {
            return Err("a chunk exceeds its context");
        }
        self.start_sequence(slot, end)?;
        for position in start..end {
            let token = self.rows[slot.index()].as_ref().map_or(0, |row| row.context[position as usize]);
            self.write_row(slot, position, token)?;
        }
        if end == length {
            self.sample_last_row(slot);
            self.joining.push(slot);
        }
        Ok(())
    }

    fn start_sequence(&mut self, slot: Slot, length: u32) -> Result<(), &'static str> {
        let at = self.counts.sequences as usize;
        if at >= self.buffers.sequence_lengths.len() {
            return Err("a step has more sequences than there are slots");
        }
        self.buffers.query_start[at] = self.counts.rows as i32;
        self.buffers.sequence_lengths[at] = length as i32;
        self.buffers.table_offsets[at] = (slot.index() * self.max_blocks) as i32;
        self.counts.sequences += 1;
        Ok(())
    }

    fn write_row(&mut self, slot: Slot, position: u32, token: Token) -> Result<(), &'static str> {
        let at = self.counts.rows as usize;
        if at >= self.buffers.token_ids.len() {
            return Err("a step has more rows than max_step_tokens");
        }
        let block = position / self.limits.block_tokens;
        let held = self.rows[slot.index()].as_ref().map_or(0, |row| row.blocks);
        if block >= held {
            return Err("a row lies behind the end of its table");
        }
        let block = self.buffers.block_tables[slot.index() * self.max_blocks + block as usize];
        self.buffers.token_ids[at] = token as i32;
        self.buffers.positions[at] = position as i32;
        self.buffers.slot_mapping[at] =
            block * self.limits.block_tokens as i32 + (position % self.limits.block_tokens) as i32;
        self.counts.rows += 1;
        Ok(())
    }

    fn sample_last_row(&mut self, slot: Slot) {
        self.buffers.sample_rows[self.counts.samples as usize] = self.counts.rows as i32 - 1;
        self.counts.samples += 1;
        self.sample_slots.push(slot);
    }
}
