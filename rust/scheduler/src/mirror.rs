//! The worker's mirror of the scheduler: expands each delta into flat int32 buffers of fixed capacity, which an executor
//! wraps once and reads every step. Holds ids, tables and sampling state of the sequences that run, nothing that a fresh
//! worker could not be told again. A step costs O(rows) writes; tables change only where blocks were appended.
//! Knows no model, device or socket.

mod buffers;
mod samples;
mod sampling;

pub use buffers::{Buffers, StepCounts};
pub use sampling::SlotSampling;

use llmscale_types::{
    Admission, BlockCopy, Chunk, Delta, DiskTransfer, EngineLimits, Epoch, GroupId, Slot, StepId, Token,
};
use samples::Samples;
use std::collections::VecDeque;

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

/// One running sequence as a worker sees it.
#[derive(Debug, Default)]
struct Row {
    /// The step that brought it: samples of earlier steps belong to the slot's previous owner.
    admitted: StepId,
    /// The last step in which it had rows.
    latest: StepId,
    /// Whom it decodes with, once it does.
    group: GroupId,
    context: Vec<Token>,
    blocks: u32,
    /// Position of the next decode row; meaningful while it decodes.
    position: u32,
    /// Its place among the group's decoding sequences, while it decodes.
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
    /// By group.
    decoding: Vec<Vec<Slot>>,
    /// The token that the next decode row of a slot reads.
    last_token: Vec<Token>,
    /// Slots that start to decode after this step's chunks, with this step's group.
    joining: Vec<Slot>,
    /// Group of this step.
    group: GroupId,
    counts: StepCounts,
    /// Sequences with rows in this step and none in the step before.
    newcomers: u32,
    /// What this step copies between tiers.
    copies: Vec<BlockCopy>,
    /// What it moves between the host tier and the disk.
    transfers: Vec<DiskTransfer>,
    sample_slots: Vec<Slot>,
    /// Steps whose samples are not recorded yet, this one included; the oldest first.
    unrecorded: VecDeque<Samples>,
    buffers: Buffers,
}

impl Mirror {
    /// An empty mirror of an epoch.
    pub fn new(limits: &EngineLimits, epoch: Epoch) -> Self {
        let sequences = limits.max_sequences as usize;
        let max_blocks = limits.blocks_for(limits.max_sequence_tokens) as usize;
        Self {
            max_blocks,
            epoch,
            step: StepId(0),
            lost: false,
            rows: (0..sequences).map(|_| None).collect(),
            decoding: vec![Vec::new(); limits.groups as usize],
            last_token: vec![0; sequences],
            joining: Vec::new(),
            group: GroupId(0),
            counts: StepCounts::default(),
            newcomers: 0,
            copies: Vec::new(),
            transfers: Vec::new(),
            sample_slots: Vec::with_capacity(sequences),
            unrecorded: VecDeque::new(),
            buffers: Buffers::new(limits, max_blocks),
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
        self.decoding.iter_mut().for_each(Vec::clear);
        self.joining.clear();
        self.unrecorded.clear();
    }

    fn apply(&mut self, delta: &Delta) -> Result<StepCounts, &'static str> {
        self.join_decoding();
        if delta.group.index() >= self.decoding.len() {
            return Err("a group is named that does not exist");
        }
        self.group = delta.group;
        let exists =
            |copy: &BlockCopy| copy.block.0 < self.limits.total_blocks && copy.host.0 < self.limits.host_blocks;
        if !delta.copies.iter().all(exists) {
            return Err("a block is copied that does not exist");
        }
        self.copies.clone_from(&delta.copies);
        let exists =
            |moved: &DiskTransfer| moved.host.0 < self.limits.host_blocks && moved.disk.0 < self.limits.disk_blocks;
        if !delta.transfers.iter().all(exists) {
            return Err("a block is moved to or from the disk that does not exist");
        }
        self.transfers.clone_from(&delta.transfers);
        for &slot in &delta.leave {
            self.leave(slot).ok_or("a slot leaves that is empty")?;
        }
        for admission in &delta.admit {
            self.admit(admission, delta.step)?;
        }
        if delta.append_slots.len() != delta.append_blocks.len() {
            return Err("appended slots and blocks differ in number");
        }
        for (&slot, &block) in delta.append_slots.iter().zip(&delta.append_blocks) {
            self.append(slot, block.0)?;
        }
        let (copies, transfers) = (delta.copies.len() as u32, delta.transfers.len() as u32);
        self.counts = StepCounts { copies, transfers, ..StepCounts::default() };
        self.newcomers = 0;
        self.sample_slots.clear();
        if delta.decodes {
            self.write_decodes(delta.step)?;
        }
        for chunk in &delta.chunks {
            self.write_chunk(delta.step, chunk)?;
        }
        self.buffers.query_start[self.counts.sequences as usize] = self.counts.rows as i32;
        if self.counts.samples > 0 {
            if self.unrecorded.len() > self.limits.max_steps_in_flight as usize {
                return Err("more steps are without samples than may be in flight");
            }
            let slots = self.sample_slots.clone();
            self.unrecorded.push_back(Samples { step: delta.step, group: delta.group, slots });
        }
        Ok(self.counts)
    }

    /// What this step copies between tiers, in order, before its rows are computed.
    pub fn copies(&self) -> &[BlockCopy] {
        &self.copies
    }

    /// What this step moves between the host tier and the disk, in order, after its copies.
    pub fn transfers(&self) -> &[DiskTransfer] {
        &self.transfers
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

    /// Sequences of the current step.
    pub fn sequences(&self) -> usize {
        self.counts.sequences as usize
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.limits.block_tokens
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
            let decoding = &mut self.decoding[row.group.index()];
            decoding.swap_remove(index as usize);
            if let Some(&moved) = decoding.get(index as usize) {
                let row = self.rows[moved.index()].as_mut().expect("a decoding slot is occupied");
                row.decode_index = Some(index);
            }
        }
        Some(())
    }

    fn admit(&mut self, admission: &Admission, step: StepId) -> Result<(), &'static str> {
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
        let group = GroupId(0);
        let row = Row {
            admitted: step,
            latest: StepId(0),
            group,
            context,
            blocks: 0,
            position: 0,
            decode_index: None,
            sampling,
        };
        self.rows[index] = Some(row);
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
            let decoding = &mut self.decoding[self.group.index()];
            row.group = self.group;
            row.position = row.context.len() as u32;
            row.decode_index = Some(decoding.len() as u32);
            // The ids are in the KV now; only the sampler's state is still needed.
            row.context = Vec::new();
            decoding.push(slot);
        }
    }

    fn write_decodes(&mut self, step: StepId) -> Result<(), &'static str> {
        let group = self.group.index();
        for index in 0..self.decoding[group].len() {
            let slot = self.decoding[group][index];
            let row = self.rows[slot.index()].as_mut().expect("a decoding slot is occupied");
            let position = row.position;
            row.position += 1;
            let token = self.last_token[slot.index()];
            self.start_sequence(step, slot, position + 1)?;
            self.write_row(slot, position, token)?;
            self.sample_last_row(slot);
        }
        self.counts.decodes = self.counts.sequences;
        Ok(())
    }

    fn write_chunk(&mut self, step: StepId, chunk: &Chunk) -> Result<(), &'static str> {
        let &Chunk { slot, start_tokens: start, tokens } = chunk;
        let row = self.rows.get(slot.index()).and_then(Option::as_ref).ok_or("a chunk of an empty slot")?;
        let end = start.checked_add(tokens).ok_or("a chunk exceeds its context")?;
        let length = row.context.len() as u32;
        if tokens == 0 || end > length || row.decode_index.is_some() {
            return Err("a chunk exceeds its context");
        }
        self.start_sequence(step, slot, end)?;
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

    fn start_sequence(&mut self, step: StepId, slot: Slot, length: u32) -> Result<(), &'static str> {
        let at = self.counts.sequences as usize;
        if at >= self.buffers.sequence_lengths.len() {
            return Err("a step has more sequences than there are slots");
        }
        self.buffers.query_start[at] = self.counts.rows as i32;
        self.buffers.sequence_lengths[at] = length as i32;
        self.buffers.table_offsets[at] = (slot.index() * self.max_blocks) as i32;
        self.counts.sequences += 1;
        let row = self.rows[slot.index()].as_mut().expect("a sequence with rows is there");
        self.newcomers += u32::from(row.latest != self.step);
        row.latest = step;
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
