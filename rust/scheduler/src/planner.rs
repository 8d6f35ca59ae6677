//! Makes the next step. A steady decoding step costs the sequences that end, the sequences that need a block and the
//! delta that names them; nobody else is touched. Prefill chunks share what the decodes leave of the step's budget,
//! then waiting records are admitted while slots, blocks, budget and the delta's frame last.

use crate::budget::Budget;
use crate::event::Actions;
use crate::groups::Group;
use crate::queue::Place;
use crate::record::Record;
use crate::replica::{At, Flight, Location, Replica};
use crate::restore::CopyPrices;
use crate::sequences::{Ends, Phase};
use llmscale_blocks::Found;
use llmscale_cost::StepShape;
use llmscale_types::frame::admission_bytes;
use llmscale_types::{Admission, Chunk, CopyDirection, Delta, GroupId, Planted, Slot};

impl Replica {
    /// Plans one step if a worker can take one and there is something to compute. Returns whether it did.
    pub fn plan(&mut self, out: &mut Actions) -> bool {
        let Some(epoch) = self.epoch else { return false };
        if self.flights.len() >= self.limits.max_steps_in_flight as usize {
            return false;
        }
        let mut draft = Delta::new(epoch, self.step.next(), self.base);
        self.allow_offloads();
        if self.suspects_run_alone() {
            self.plan_suspect(&mut draft);
        } else {
            self.plan_in_turn(&mut draft);
        }
        self.plan_saves();
        if !self.has_work(&draft) {
            assert!(draft.admit.is_empty() && draft.append_slots.is_empty(), "a step without work changes tables");
            return false;
        }
        self.groups.pass_turn(draft.group);
        draft.leave = std::mem::take(&mut self.pending_leave);
        self.pending_leave.append(&mut self.leave_after_step);
        self.plan_writes();
        draft.copies = self.blocks.take_copies();
        draft.transfers = self.blocks.take_transfers();
        self.take_off(&draft);
        self.step = draft.step;
        self.base = draft.step;
        out.execute = Some(draft);
        true
    }

    /// A step of the first group in turn that has rows and may have another step in flight.
    fn plan_in_turn(&mut self, draft: &mut Delta) {
        for group in self.groups.in_turn() {
            if !self.groups.is_one() && self.flights.iter().any(|flight| flight.group == group) {
                continue;
            }
            draft.group = group;
            self.plan_decodes(draft);
            let mut budget = self.step_budget(self.decoded_shape(draft));
            self.plan_chunks(draft, &mut budget);
            self.admit_waiting(draft, &mut budget);
            self.plan_long_contexts(draft, &mut budget);
            if self.has_work(draft) {
                self.counters.paced_steps += u64::from(budget.is_cut());
                return;
            }
        }
    }

    /// Whether the step has rows, or blocks to bring back for rows to come.
    fn has_work(&self, draft: &Delta) -> bool {
        has_rows(draft) || self.blocks.copies() > 0 || self.blocks.asked_transfers() > 0
    }

    /// Notes what a planned step will answer.
    fn take_off(&mut self, draft: &Delta) {
        let mut shape = self.decoded_shape(draft);
        let samples = shape.decodes + draft.chunks.iter().filter(|chunk| self.ends_context(chunk)).count() as u32;
        draft.chunks.iter().for_each(|chunk| shape.add_prefill(chunk.start_tokens, chunk.tokens));
        let out = draft.copies.iter().filter(|copy| copy.direction == CopyDirection::Offload);
        self.flights.push_back(Flight {
            shape,
            predicted_ns: self.cost.predict_step(shape),
            restored: std::mem::take(&mut self.restored),
            copies: draft.copies.len() as u32,
            offloaded: out.map(|copy| copy.host).collect(),
            step: draft.step,
            group: draft.group,
            decodes: draft.decodes.then(|| self.groups.get(draft.group).round - 1),
            chunks: draft.chunks.clone(),
            appended: draft.append_slots.clone(),
            samples,
            preempted: Vec::new(),
        });
    }

    /// Its decoding part.
    fn decoded_shape(&self, draft: &Delta) -> StepShape {
        if draft.decodes { self.round } else { StepShape::default() }
    }

    fn ends_context(&self, chunk: &Chunk) -> bool {
        (chunk.start_tokens + chunk.tokens) as usize == self.sequences.contexts[chunk.slot.index()].len()
    }

    /// One decoding round: who has had the last row leaves, who starts a block gets one, all others just go on.
    fn plan_decodes(&mut self, draft: &mut Delta) {
        self.end_last_rows(draft.group);
        if !self.make_room_for_round(draft.group) || self.groups.get(draft.group).decoding == 0 {
            return;
        }
        for index in 0..self.due(draft.group).len() {
            let slot = self.due(draft.group)[index];
            let block = self.blocks.allocate().expect("room was made for the whole round");
            let position = self.next_position(slot);
            let table = &mut self.sequences.cold[slot.index()].table;
            assert_eq!(table.len() as u32, position / self.limits.block_tokens, "slot {slot} has a gap in its table");
            table.push(block);
            draft.append_slots.push(slot);
            draft.append_blocks.push(block);
        }
        draft.decodes = true;
        let group = self.groups.get_mut(draft.group);
        let context_tokens = group.decoding_tokens;
        self.round = StepShape { decodes: group.decoding, context_tokens, ..StepShape::default() };
        group.decoding_tokens += u64::from(group.decoding);
        group.round += 1;
    }

    /// The sequences of a group whose row of the coming round is the first of a new block.
    fn due(&self, group: GroupId) -> &[Slot] {
        let group = self.groups.get(group);
        group.wheel.due(group.round)
    }

    /// Sequences that reach their length leave before the round that would exceed it; their last token is in flight.
    fn end_last_rows(&mut self, group: GroupId) {
        loop {
            let group = self.groups.get_mut(group);
            let Some(ended) = group.endings.first_entry().filter(|entry| *entry.key() <= group.round) else { break };
            for (slot, admitted_step) in ended.remove() {
                let hot = self.sequences.hot[slot.index()];
                if hot.phase == Phase::Decode && hot.admitted_step == admitted_step {
                    self.stop_running(slot);
                    self.sequences.hot[slot.index()].phase = Phase::LastRow;
                    self.pending_leave.push(slot);
                }
            }
        }
    }

    /// Preempts from the end of the order until every due sequence can have its block. Returns false if the last
    /// sequence has to wait for blocks of sequences whose last row is in flight: they are free when it completes.
    fn make_room_for_round(&mut self, group: GroupId) -> bool {
        while self.blocks.free() < self.due(group).len() as u32 {
            let victim = *self.running.last().expect("a due sequence is running");
            if self.running.len() == 1 {
                assert!(!self.flights.is_empty(), "one sequence alone does not fit the pool");
                return false;
            }
            self.preempt(victim.2);
        }
        true
    }

    /// Continues contexts that are partly computed, in order.
    fn plan_chunks(&mut self, draft: &mut Delta, budget: &mut Budget) {
        while !budget.is_spent() {
            let Some(&slot) = self.groups.get(draft.group).prefilling.front() else { break };
            self.plan_chunk(draft, slot, u32::MAX, budget);
        }
    }

    /// Gives what is left of the budget to contexts of other groups that no single step can compute, so that a long
    /// prompt alone keeps every stage busy. Their last step stays their own group's: there they sample.
    fn plan_long_contexts(&mut self, draft: &mut Delta, budget: &mut Budget) {
        let own = draft.group;
        for group in self.groups.in_turn().filter(|&group| group != own) {
            let Some(&slot) = self.groups.get(group).prefilling.front() else { continue };
            if self.is_restoring(slot) {
                // What it gets back may bring it to its end, which is its own group's.
                continue;
            }
            let rest =
                self.sequences.contexts[slot.index()].len() as u32 - self.sequences.cold[slot.index()].planned_tokens;
            let tokens = rest.saturating_sub(self.limits.max_step_tokens);
            if tokens > 0 && !budget.is_spent() {
                self.plan_chunk(draft, slot, tokens, budget);
            }
        }
    }

    /// The next chunk of the first prefilling sequence, what is cached on the host first; when it reaches the end, the
    /// sequence starts to decode. Takes `most` tokens at most, and the whole budget if there is more of it to come.
    fn plan_chunk(&mut self, draft: &mut Delta, slot: Slot, most: u32, budget: &mut Budget) {
        self.plan_restores(slot, most, budget);
        let context = self.sequences.contexts[slot.index()].len() as u32;
        let cold = &mut self.sequences.cold[slot.index()];
        let wanted = most.min(context - cold.planned_tokens);
        let tokens = budget.fitting(&self.cost, cold.planned_tokens, wanted);
        budget.take(&self.cost, cold.planned_tokens, tokens);
        if tokens == 0 || (tokens < wanted && !Planted::OvertakesACutPrompt.is_here()) {
            // What is left may suffice for the start of another context, which would overtake this one.
            budget.exhaust();
        }
        if tokens == 0 {
            return;
        }
        draft.chunks.push(Chunk { slot, start_tokens: cold.planned_tokens, tokens });
        cold.planned_tokens += tokens;
        self.prefill_backlog -= u64::from(tokens);
        if cold.planned_tokens == context {
            let group = cold.group;
            assert_eq!(group, draft.group, "a context ends in a step of its own group");
            let first = self.groups.get_mut(group).prefilling.pop_front();
            assert_eq!(first, Some(slot), "chunks are planned in order");
            self.start_decoding(slot);
        }
    }

    /// The row that samples the first token is planned: decode rows follow from the next round on, if any are needed.
    fn start_decoding(&mut self, slot: Slot) {
        let index = slot.index();
        let context = self.sequences.contexts[index].len() as u32;
        let rows = self.sequences.hot[index].limit_tokens - context - 1;
        if rows == 0 {
            self.running.remove(&self.running_key(slot));
            self.sequences.hot[index].phase = Phase::LastRow;
            self.leave_after_step.push(slot);
            return;
        }
        self.sequences.hot[index].phase = Phase::Decode;
        let cold = &mut self.sequences.cold[index];
        let group = self.groups.get_mut(cold.group);
        cold.joined_round = group.round;
        cold.joined_tokens = context;
        group.wheel.insert(slot, &mut self.sequences.cold);
        group.decoding += 1;
        group.decoding_tokens += u64::from(context);
        let admitted_step = self.sequences.hot[index].admitted_step;
        group.endings.entry(group.round + u64::from(rows)).or_default().push((slot, admitted_step));
    }

    /// Admits in order while budget, slots, blocks and room in the frame last. Nobody overtakes: a first record that does
    /// not fit waits, and so does everybody behind it. What waits while the node drains had run before and was preempted,
    /// or lost its worker: it is finished here like everything else that runs. Who joins another group than this step's is
    /// computed in that one's; as much is admitted for the others as for this step.
    fn admit_waiting(&mut self, draft: &mut Delta, budget: &mut Budget) {
        let mut frame_bytes = 0;
        let mut budget_of_others = self.limits.max_step_tokens;
        while !budget.is_spent() && budget_of_others > 0 && self.sequences.has_free_slot() {
            let Some(place) = self.next_to_admit() else { break };
            let record = self.queue.get(place).expect("it was just found there");
            // A long context may be found in the prefix cache whole: then it costs the step's budget next to nothing and
            // the frame all its ids. One admission alone always fits, by the bounds of `EngineLimits`.
            frame_bytes += self.admission_bytes(record);
            if !draft.admit.is_empty() && frame_bytes > self.max_admission_bytes {
                break;
            }
            // A little room stays for the running sequences' next blocks, or an admission would preempt at once.
            let spare = if self.running.is_empty() { 0 } else { self.blocks.total() / 128 };
            if !self.fits(record, spare) {
                break;
            }
            // A step that would have no rows otherwise is not spent on telling of others.
            let group = if has_rows(draft) { self.groups.smallest(draft.group) } else { draft.group };
            let slot = self.admit(draft, group, place);
            if group == draft.group {
                self.plan_chunk(draft, slot, u32::MAX, budget);
            } else {
                let context = self.sequences.contexts[slot.index()].len() as u32;
                let computed = self.sequences.cold[slot.index()].planned_tokens;
                budget_of_others = budget_of_others.saturating_sub(context - computed);
            }
        }
    }

    /// Most bytes that a waiting record takes in a delta.
    fn admission_bytes(&self, record: &Record) -> u64 {
        let context_tokens = record.submission.context.len() as u32;
        admission_bytes(context_tokens, self.limits.blocks_for(context_tokens), &record.submission.sampling)
    }

    /// Lowers the bytes that the admissions of one delta take together, one alone excepted: for worlds that are too
    /// small to ever fill a frame.
    #[must_use]
    pub fn with_max_admission_bytes(mut self, max_admission_bytes: u64) -> Self {
        self.max_admission_bytes = self.max_admission_bytes.min(max_admission_bytes);
        self
    }

    fn fits(&self, record: &Record, spare: u32) -> bool {
        let submission = &record.submission;
        let context = &submission.context;
        let hashes = &record.hashes[..self.shareable_blocks(record, context.len())];
        let (found, found_free) = self.blocks.probe(&submission.namespace, hashes, context);
        let needed = self.limits.blocks_for(context.len() as u32) - found;
        needed + spare <= self.blocks.free() - found_free
    }

    /// How many leading blocks may be shared: at least one token is left to compute, or there would be no logits.
    pub(crate) fn shareable_blocks(&self, record: &Record, context_tokens: usize) -> usize {
        record.hashes.len().min((context_tokens - 1) / self.limits.block_tokens as usize)
    }

    /// Moves a waiting record into a slot with all blocks of its context, as a member of a group.
    fn admit(&mut self, draft: &mut Delta, group: GroupId, place: Place) -> Slot {
        let record = self.queue.remove(place).expect("the planner has seen it");
        let ends = Ends { eos_tokens: &self.limits.eos_tokens, max_sequence_tokens: self.limits.max_sequence_tokens };
        let slot = self.sequences.occupy(record, draft.step.0, &ends);
        let index = slot.index();
        let shareable = self.shareable_blocks(self.sequences.record(slot), self.sequences.contexts[index].len());
        let context = &self.sequences.contexts[index];
        let prices = CopyPrices { cost: &self.cost, copies: &self.copy_cost, limits: &self.limits };
        let cold = &mut self.sequences.cold[index];
        cold.group = group;
        let record = cold.record.as_mut().expect("just put there");
        let mut hit = self.blocks.find_prefix(&record.submission.namespace, &record.hashes[..shareable], context);
        prices.cut(&mut hit);
        self.blocks.take_prefix(&hit.blocks);
        self.end_fetch(place);
        let cold = &mut self.sequences.cold[index];
        let context = &self.sequences.contexts[index];
        let record = cold.record.as_mut().expect("just put there");
        cold.registered_blocks = hit.leading_device_blocks as u32;
        cold.content = hit.content;
        cold.found_blocks = hit.blocks.len() as u32;
        for (place, found) in hit.blocks.into_iter().enumerate() {
            cold.table.push(match found {
                Found::Device(block) => block,
                Found::Host(host) => {
                    cold.restores.push_back((place as u32, host));
                    self.blocks.allocate().expect("the planner has counted the blocks")
                }
            });
        }
        let computed = cold.registered_blocks * self.limits.block_tokens;
        cold.planned_tokens = computed;
        cold.computed_tokens = computed;
        let cached = cold.found_blocks * self.limits.block_tokens;
        record.cached_tokens.get_or_insert(cached.min(record.submission.prompt_tokens));
        while cold.table.len() < self.limits.blocks_for(context.len() as u32) as usize {
            cold.table.push(self.blocks.allocate().expect("the planner has counted the blocks"));
        }
        draft.admit.push(Admission {
            slot,
            context: context.clone(),
            prompt_tokens: record.submission.prompt_tokens,
            computed_tokens: computed,
            blocks: cold.table.clone(),
            sampling: record.submission.sampling.clone(),
        });
        self.prefill_backlog += context.len() as u64 - u64::from(computed);
        let key = (record.key().front, record.key().request);
        self.places.insert(key, Location { attempt: record.key().attempt, at: At::Slot(slot) });
        self.running.insert(self.running_key(slot));
        self.groups.get_mut(group).prefilling.push_back(slot);
        slot
    }

    /// Whether a suspect of a crash is to be computed next, alone.
    fn suspects_run_alone(&self) -> bool {
        self.suspect_at_work().is_some() || (self.queue.has_suspects() && self.sequences.has_free_slot())
    }

    /// The suspect that is partly computed.
    fn suspect_at_work(&self) -> Option<Slot> {
        let first = |group: &Group| group.prefilling.front().copied();
        self.groups.iter().filter_map(first).find(|&slot| self.sequences.record(slot).suspect)
    }

    /// A step with rows of one suspect only, so that a second crash names the culprit. Stages of a pipeline compute several
    /// steps at a time, and any of them may be the deadly one: there it is the only step in flight.
    fn plan_suspect(&mut self, draft: &mut Delta) {
        if !self.groups.is_one() && !self.flights.is_empty() {
            return;
        }
        let slot = self.suspect_at_work();
        let slot = if let Some(slot) = slot {
            slot
        } else {
            while !self.fits(self.queue.first_suspect().expect("there is a suspect"), 0) {
                let Some(&victim) = self.running.last() else {
                    assert!(!self.flights.is_empty(), "one sequence alone does not fit the pool");
                    return;
                };
                self.preempt(victim.2);
            }
            let place = self.queue.first_suspect().map(Record::place).expect("it was just looked at");
            let slot = self.admit(draft, draft.group, place);
            // Ahead of whatever was partly computed before the crash's suspects were told apart.
            self.groups.get_mut(draft.group).prefilling.rotate_right(1);
            slot
        };
        draft.group = self.sequences.cold[slot.index()].group;
        let mut budget = self.step_budget(StepShape::default());
        self.plan_chunk(draft, slot, u32::MAX, &mut budget);
    }

    /// Takes a sequence out of the running set and puts it back into the queue, with its tokens. Its blocks are free at
    /// once: later steps of the same ordered stream may overwrite them.
    pub(crate) fn preempt(&mut self, slot: Slot) {
        let index = slot.index();
        let expected = match self.sequences.hot[index].phase {
            Phase::Prefill => self.sequences.contexts[index].len() as u32,
            Phase::Decode => self.next_position(slot) + 1,
            phase => unreachable!("a sequence in phase {phase:?} is not running"),
        };
        self.counters.preemptions += 1;
        let key = self.sequences.record(slot).key();
        if self.sequences.hot[index].phase == Phase::Prefill {
            let admitted = self.sequences.hot[index].admitted_step;
            let works = |flight: &&mut Flight| {
                flight.step.0 >= admitted && flight.chunks.iter().any(|chunk| chunk.slot == slot)
            };
            self.flights.iter_mut().filter(works).for_each(|flight| flight.preempted.push(key));
        }
        self.stop_running(slot);
        self.pending_leave.push(slot);
        self.release_blocks(slot);
        self.sequences.cold[index].expected_tokens = expected;
        if self.sequences.contexts[index].len() as u32 == expected {
            self.requeue(slot);
        } else {
            self.sequences.hot[index].phase = Phase::Preempted;
        }
    }

    /// Position of the row that its group's coming round computes for a decoding sequence.
    pub(crate) fn next_position(&self, slot: Slot) -> u32 {
        let cold = &self.sequences.cold[slot.index()];
        cold.joined_tokens + (self.groups.get(cold.group).round - cold.joined_round) as u32
    }
}

fn has_rows(draft: &Delta) -> bool {
    draft.decodes || !draft.chunks.is_empty()
}
