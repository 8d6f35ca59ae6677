//! A step, or some rows of it, as one run of int32 for a device that computes elsewhere: rows, tables of the blocks in use
//! and the parameters of whoever samples, at places that follow from the room alone, so that one transfer moves all and a
//! captured graph finds each part where it was. Room that is not used holds rows that no sequence has. O(rows + blocks in
//! use). Knows no device; how a sampler reads its columns is in `columns.rs`.

use crate::columns::{self, Changes};
use llmscale_scheduler::Mirror;
use std::ops::Range;

/// Parts begin at multiples of this many entries, 16 bytes: kernels load that much at once.
const ALIGNED: usize = 4;
/// Parts before the block tables, which are last.
pub const PARTS: usize = 20;
/// Of them, the first that a sampler reads.
const FIRST_COLUMN: usize = 7;

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
/// sequences), lengths, table offsets, sampling rows (by sequence); the columns of `columns.rs`.
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
    let columns: [&mut [i32]; PARTS - FIRST_COLUMN] = std::array::from_fn(|_| parts.take());
    let changes = columns::fill(mirror, samples.clone(), columns, changes);
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
