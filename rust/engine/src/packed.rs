//! A step, or some rows of it, as one run of int32 for a device that computes elsewhere: rows, tables of the blocks in use
//! and the parameters of whoever samples, at places that follow from the room alone, so that one transfer moves all and a
//! captured graph finds each part where it was. Room that is not used holds rows that no sequence has. O(rows + blocks in
//! use). Knows no device; how a sampler reads its columns is in `columns.rs`.

use crate::columns::{self, COLUMNS, Changes};
use llmscale_scheduler::Mirror;
use std::ops::Range;

/// Parts begin at multiples of this many entries, 16 bytes: kernels load that much at once.
const ALIGNED: usize = 4;
/// Parts before the block tables, which are last.
pub const PARTS: usize = 21;

/// Room for rows and for sequences, of which as many may sample.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Token rows.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
}

/// What was packed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packed {
    /// Entries that were written, from the first on.
    pub entries: usize,
    /// Which of the step's sampling rows these are.
    pub samples: Range<usize>,
    /// Logits that change before sampling; `None` if there is no room for them or a row asks for what columns cannot say:
    /// then the columns say nothing, and the rows are sampled elsewhere.
    pub changes: Option<usize>,
    /// Whether a row wants log probabilities.
    pub wants_logprobs: bool,
}

/// Why rows cannot be packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{needed} {what} are to be packed, there is room for {room}")]
pub struct NoRoom {
    /// What there is too much of.
    pub what: &'static str,
    /// How much there is.
    pub needed: usize,
    /// How much fits.
    pub room: usize,
}

/// Where each part begins, and last the block tables: token ids, positions, slots (by row); first rows (one more than
/// sequences), lengths, table offsets, sampling rows (by sequence); the columns of `columns.rs`; and by sequence where the id
/// of its decode row comes from: 0 if it is among the token ids, or one more than a sampling row of the step before.
pub fn offsets(room: Room) -> [usize; PARTS + 1] {
    let mut found = [0; PARTS + 1];
    for part in 0..PARTS {
        let entries = match part {
            0..=2 => room.rows,
            3 | columns::CHANGE_START => room.sequences + 1,
            _ => room.sequences,
        };
        found[part + 1] = found[part] + entries.next_multiple_of(ALIGNED);
    }
    found
}

/// Packs the rows of the mirror's step that `rows` names. A sequence of which only the first rows are among them is as long
/// as they reach.
///
/// # Errors
/// More than there is room for.
pub fn pack(
    mirror: &Mirror,
    rows: Range<usize>,
    room: Room,
    out: &mut [i32],
    changes: &mut Changes<'_>,
) -> Result<Packed, NoRoom> {
    let offsets = offsets(room);
    require("rows", rows.len(), room.rows)?;
    require("entries", offsets[PARTS], out.len())?;
    let (head, tables) = out.split_at_mut(offsets[PARTS]);
    let mut parts = Parts { rest: head, offsets, next: 0 };
    let buffers = mirror.buffers();
    for source in [&buffers.token_ids, &buffers.positions, &buffers.slot_mapping] {
        let part = parts.take();
        part[..rows.len()].copy_from_slice(&source[rows.clone()]);
        part[rows.len()..].fill(0);
    }
    let (starts, lengths, table_offsets) = (parts.take(), parts.take(), parts.take());
    let (mut sequences, mut used) = (0, 0);
    for sequence in 0..mirror.sequences() {
        let [from, to] = [buffers.query_start[sequence], buffers.query_start[sequence + 1]].map(|row| row as usize);
        let (first, last) = (from.max(rows.start), to.min(rows.end));
        if first >= last {
            continue;
        }
        require("sequences", sequences + 1, room.sequences)?;
        let length = buffers.positions[last - 1] + 1;
        let blocks = (length as u32).div_ceil(mirror.block_tokens()) as usize;
        let table = buffers.table_offsets[sequence] as usize;
        require("table entries", used + blocks, tables.len())?;
        tables[used..used + blocks].copy_from_slice(&buffers.block_tables[table..table + blocks]);
        starts[sequences] = (first - rows.start) as i32;
        (lengths[sequences], table_offsets[sequences]) = (length, used as i32);
        used += blocks;
        sequences += 1;
    }
    // Sequences that are not there have no row between their bounds.
    starts[sequences..].fill(rows.len() as i32);
    lengths[sequences..].fill(0);
    table_offsets[sequences..].fill(0);
    let samples = samples_of(mirror, &rows);
    require("sampling rows", samples.len(), room.sequences)?;
    let sample_rows = parts.take();
    for (out, &row) in sample_rows.iter_mut().zip(&buffers.sample_rows[samples.clone()]) {
        *out = row - rows.start as i32;
    }
    sample_rows[samples.len()..].fill(0);
    let columns: [&mut [i32]; COLUMNS] = std::array::from_fn(|_| parts.take());
    let changes = columns::fill(mirror, samples.clone(), columns, changes);
    let drawn_from = parts.take();
    drawn_from.fill(0);
    // Decodes come first, one row each, so a row is a sequence.
    let drawn = mirror.drawn_rows();
    let drawn = drawn.get(rows.start..rows.end.min(drawn.len())).unwrap_or_default();
    for (out, place) in drawn_from.iter_mut().zip(drawn) {
        *out = place.map_or(0, |place| place as i32 + 1);
    }
    let wants_logprobs =
        mirror.sample_slots()[samples.clone()].iter().any(|&slot| mirror.sampling(slot).sampling.logprobs.is_some());
    Ok(Packed { entries: offsets[PARTS] + used, samples, changes, wants_logprobs })
}

/// Which sampling rows are among the rows; both ascend.
fn samples_of(mirror: &Mirror, rows: &Range<usize>) -> Range<usize> {
    let sampling = &mirror.buffers().sample_rows[..mirror.sample_slots().len()];
    let before = |end: usize| sampling.partition_point(|&row| (row as usize) < end);
    before(rows.start)..before(rows.end)
}

fn require(what: &'static str, needed: usize, room: usize) -> Result<(), NoRoom> {
    if needed <= room { Ok(()) } else { Err(NoRoom { what, needed, room }) }
}

/// Cuts the parts off one after the other.
struct Parts<'a> {
    rest: &'a mut [i32],
    offsets: [usize; PARTS + 1],
    next: usize,
}

impl<'a> Parts<'a> {
    fn take(&mut self) -> &'a mut [i32] {
        let entries = self.offsets[self.next + 1] - self.offsets[self.next];
        let (part, rest) = std::mem::take(&mut self.rest).split_at_mut(entries);
        self.rest = rest;
        self.next += 1;
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::columns::{MAX_LOGPROBS, drawn_entries, read_drawn};
    use llmscale_types::{
        Admission, BlockId, Chunk, Delta, EngineLimits, Epoch, RowError, Sampling, Slot, StepId, TokenLogprobs,
    };

    const EPOCH: Epoch = Epoch(1);
    const FIRST: u32 = 5;

    fn limits() -> EngineLimits {
        EngineLimits {
            block_tokens: 4,
            total_blocks: 64,
            host_blocks: 0,
            disk_blocks: 0,
            max_sequences: 4,
            max_step_tokens: 32,
            max_sequence_tokens: 64,
            max_waiting_sequences: 4,
            max_steps_in_flight: 2,
            groups: 1,
            eos_tokens: vec![2],
            vocabulary: 50,
        }
    }

    fn admission(slot: u32, tokens: u32, first_block: u32, sampling: Sampling) -> Admission {
        Admission {
            slot: Slot(slot),
            context: (0..tokens).map(|token| FIRST + token).collect(),
            prompt_tokens: tokens,
            computed_tokens: 0,
            blocks: (0..=tokens.div_ceil(4)).map(|block| BlockId(first_block + block)).collect(),
            sampling,
        }
    }

    /// Two sequences of 6 and 9 tokens, of which the second samples with everything that changes logits.
    fn mirror() -> Mirror {
        let mut mirror = Mirror::new(&limits(), EPOCH);
        let mut delta = Delta::new(EPOCH, StepId(1), Delta::NOTHING);
        let busy = Sampling {
            repetition_penalty: 2.0,
            logit_bias: vec![(40, 1.5), (7, -2.0)],
            min_tokens: 3,
            max_tokens: 9,
            logprobs: Some(2),
            seed: 0x1_0000_0002,
            ..Sampling::default()
        };
        delta.admit.push(admission(2, 6, 10, Sampling::default()));
        delta.admit.push(admission(0, 9, 20, busy));
        for (slot, tokens) in [(2, 6), (0, 9)] {
            delta.chunks.push(Chunk { slot: Slot(slot), start_tokens: 0, tokens });
        }
        mirror.expand(&delta).unwrap();
        mirror
    }

    fn packed(mirror: &Mirror, rows: Range<usize>, room: Room, change_room: usize) -> (Packed, Vec<i32>, Vec<i32>) {
        let (mut out, mut changes) = (vec![-1; 400], vec![-1; 4 * change_room]);
        let packed = pack(mirror, rows, room, &mut out, &mut Changes::of(&mut changes)).unwrap();
        (packed, out, changes)
    }

    fn part(out: &[i32], room: Room, part: usize, entries: usize) -> &[i32] {
        &out[offsets(room)[part]..][..entries]
    }

    #[test]
    fn a_step_lies_in_parts_that_begin_at_sixteen_bytes_with_nobody_in_the_room_that_is_left() {
        let room = Room { rows: 17, sequences: 3 };
        let (packed, out, _) = packed(&mirror(), 0..15, room, 40);
        assert!(offsets(room).iter().all(|offset| offset % ALIGNED == 0));
        assert_eq!((packed.samples.clone(), packed.wants_logprobs), (0..2, true));
        let ids: Vec<i32> = (5..11).chain(5..14).chain([0, 0]).collect();
        assert_eq!(part(&out, room, 0, 17), ids);
        assert_eq!(part(&out, room, 2, 7), [40, 41, 42, 43, 44, 45, 80]);
        assert_eq!(part(&out, room, 3, 4), [0, 6, 15, 15], "an absent sequence has no row between its bounds");
        assert_eq!(part(&out, room, 4, 3), [6, 9, 0]);
        assert_eq!(part(&out, room, 5, 3), [0, 2, 0]);
        assert_eq!(part(&out, room, 6, 3), [5, 14, 0]);
        assert_eq!(part(&out, room, PARTS, 5), [10, 11, 20, 21, 22], "tables of blocks in use, and no others");
        assert_eq!(packed.entries, offsets(room)[PARTS] + 5);
    }

    #[test]
    fn rows_in_the_middle_are_a_step_of_their_own_that_reaches_as_far_as_they_do() {
        let room = Room { rows: 8, sequences: 2 };
        let (packed, out, _) = packed(&mirror(), 4..12, room, 40);
        assert_eq!(packed.samples, 0..1, "the last row of the second is not among them");
        assert_eq!(part(&out, room, 1, 8), [4, 5, 0, 1, 2, 3, 4, 5]);
        assert_eq!(part(&out, room, 3, 3), [0, 2, 8]);
        assert_eq!(part(&out, room, 4, 2), [6, 6]);
        assert_eq!(part(&out, room, 6, 2), [1, 0]);
        assert_eq!(part(&out, room, PARTS, 4), [10, 11, 20, 21]);
    }

    #[test]
    fn columns_say_how_each_row_is_sampled_and_each_token_changes_once() {
        let room = Room { rows: 16, sequences: 4 };
        let (packed, out, changes) = packed(&mirror(), 0..15, room, 12);
        // Nine of the prompt, two with a bias of which one is in the prompt, and the end of the text.
        assert_eq!(packed.changes, Some(11));
        assert_eq!(part(&out, room, columns::CHANGE_START, 5), [0, 0, 11, 11, 11]);
        assert_eq!(part(&out, room, 17, 2), [Sampling::default().seed as i32, 2]);
        assert_eq!(part(&out, room, 18, 2), [0, 1]);
        assert_eq!(part(&out, room, 15, 4), [6, 9, 0, 0]);
        assert_eq!(part(&out, room, 16, 4), [0, 2, 0, 0]);
        let tokens: Vec<i32> = [2].into_iter().chain(5..14).chain([40]).collect();
        assert_eq!(changes[..11], tokens);
        assert_eq!(changes[24..35], [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
        assert_eq!(f32::from_bits(changes[36 + 3] as u32).to_bits(), (-2.0_f32).to_bits());
    }

    #[test]
    fn a_decode_whose_id_nobody_knows_yet_names_the_row_that_samples_it() {
        let mut mirror = mirror();
        let mut next = Delta::new(EPOCH, StepId(2), StepId(1));
        next.decodes = true;
        next.append_slots.push(Slot(0));
        next.append_blocks.push(BlockId(30));
        next.leave.push(Slot(2));
        mirror.expand(&next).unwrap();
        let room = Room { rows: 2, sequences: 2 };
        let drawn_from = |mirror: &Mirror| {
            let (_, out, _) = packed(mirror, 0..1, room, 40);
            part(&out, room, 20, 2).to_vec()
        };
        assert_eq!(
            drawn_from(&mirror),
            [2, 0],
            "slot 0 samples in the second row, and the room that is left is nobody's"
        );
        mirror.record(&[Some(40), Some(41)]);
        assert_eq!(drawn_from(&mirror), [0, 0]);
        assert_eq!(mirror.buffers().token_ids[0], 41);
    }

    #[test]
    fn changes_without_room_leave_neutral_columns() {
        let room = Room { rows: 16, sequences: 2 };
        let (packed, out, _) = packed(&mirror(), 0..15, room, 10);
        assert_eq!(packed.changes, None);
        assert_eq!(part(&out, room, columns::CHANGE_START, 3), [0, 0, 0]);
        assert_eq!(part(&out, room, 7, 2), [0, 0], "a temperature of 0");
        assert_eq!(part(&out, room, 10, 2), [1.0_f32.to_bits() as i32; 2]);
    }

    #[test]
    fn what_has_no_room_is_refused_by_name() {
        let mirror = mirror();
        let refused = |rows: usize, sequences: usize, entries: usize| {
            let mut out = vec![0; entries];
            let room = Room { rows, sequences };
            pack(&mirror, 0..15, room, &mut out, &mut Changes::of(&mut [])).unwrap_err().what
        };
        assert_eq!(refused(14, 2, 400), "rows");
        assert_eq!(refused(15, 1, 400), "sequences");
        assert_eq!(refused(15, 2, 50), "entries");
        let all = offsets(Room { rows: 15, sequences: 2 })[PARTS];
        assert_eq!(refused(15, 2, all + 4), "table entries");
    }

    #[test]
    fn what_a_sampler_leaves_is_read_row_by_row() {
        let mut drawn = vec![0; drawn_entries(4)];
        (drawn[1], drawn[2]) = (1, 2);
        (drawn[4], drawn[8], drawn[12]) = (33, (-0.5_f32).to_bits() as i32, 2);
        (drawn[16], drawn[17]) = (33, 34);
        (drawn[16 + 4 * MAX_LOGPROBS], drawn[17 + 4 * MAX_LOGPROBS]) = (0, 1.0_f32.to_bits() as i32);
        let first = read_drawn(&drawn, 4, 0, Some(2)).unwrap();
        assert_eq!(first.token, Ok(33));
        assert_eq!(first.logprobs, Some(TokenLogprobs { chosen: -0.5, top: vec![(33, 0.0), (34, 1.0)] }));
        assert_eq!(read_drawn(&drawn, 4, 0, Some(1)).unwrap().logprobs.unwrap().top.len(), 1);
        assert_eq!(read_drawn(&drawn[..12], 4, 0, None).unwrap().logprobs, None, "ids come back without the rest");
        assert_eq!(read_drawn(&drawn, 4, 1, None).unwrap().token, Err(RowError::NotANumber));
        assert_eq!(read_drawn(&drawn, 4, 2, Some(1)).unwrap().token, Err(RowError::NothingToSample));
        assert!(read_drawn(&drawn[..12], 4, 0, Some(0)).is_err());
        assert!(read_drawn(&drawn, 4, 4, None).is_err());
    }
}
