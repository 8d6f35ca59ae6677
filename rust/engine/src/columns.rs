//! How the rows of a step are sampled, as columns of int32 for a sampler on a device, and what it drew, read back. One entry
//! per row and column; single logits that change are one list for all rows, each token once per row, ascending. O(rows) and
//! O(n log n) in the changes. Knows no sampler; `drawn.rs` says what becomes of a drawn row.

use crate::drawn::DrawnRow;
use crate::packed::NoRoom;
use llmscale_scheduler::Mirror;
use llmscale_types::{RowError, Sampling, Slot, Token, TokenLogprobs};
use std::ops::Range;

/// The part of a packed step that says where each row's changes begin; it has one entry more than rows.
pub(crate) const CHANGE_START: usize = 19;
/// Columns of sampling parameters.
pub const COLUMNS: usize = 13;
/// Flag of a changed logit: the token is in the prompt or the output.
pub const SEEN: i32 = 1;
/// Flag of a changed logit: the token must not be sampled.
pub const SUPPRESSED: i32 = 2;
/// Log probabilities that a row has room for.
pub const MAX_LOGPROBS: usize = Sampling::MAX_LOGPROBS as usize;
/// Columns of what was drawn that every row has: status, token, its log probability, how many others follow.
const DRAWN: usize = 4;

/// Room for changed logits: four equal parts with tokens, counts, flags and biases.
pub struct Changes<'a> {
    parts: [&'a mut [i32]; 4],
}

impl<'a> Changes<'a> {
    /// Divides memory whose length is a multiple of four.
    pub fn of(memory: &'a mut [i32]) -> Self {
        let quarter = memory.len() / 4;
        let (first, rest) = memory.split_at_mut(quarter);
        let (second, rest) = rest.split_at_mut(quarter);
        let (third, rest) = rest.split_at_mut(quarter);
        Self { parts: [first, second, third, &mut rest[..quarter]] }
    }

    fn room(&self) -> usize {
        self.parts[0].len()
    }

    fn set(&mut self, at: usize, change: [i32; 4]) {
        for (part, value) in self.parts.iter_mut().zip(change) {
            part[at] = value;
        }
    }
}

/// Fills the columns of some sampling rows, and neutral ones behind them. Returns how many logits change; `None` if they
/// have no room or a token's bias is given twice: then all rows are neutral.
pub(crate) fn fill(
    mirror: &Mirror,
    samples: Range<usize>,
    mut columns: [&mut [i32]; COLUMNS],
    changes: &mut Changes<'_>,
) -> Option<usize> {
    for row in samples.len()..columns[0].len() {
        neutral(&mut columns, row);
    }
    let found = fill_rows(mirror, samples.clone(), &mut columns, changes);
    if found.is_none() {
        (0..samples.len()).for_each(|row| neutral(&mut columns, row));
    }
    columns[COLUMNS - 1][samples.len()..].fill(found.unwrap_or(0) as i32);
    found
}

fn fill_rows(
    mirror: &Mirror,
    samples: Range<usize>,
    columns: &mut [&mut [i32]; COLUMNS],
    changes: &mut Changes<'_>,
) -> Option<usize> {
    let mut used = 0;
    for (row, sample) in samples.enumerate() {
        let slot = mirror.sample_slots()[sample];
        let sampling = &mirror.sampling(slot).sampling;
        let bits = |value: f32| value.to_bits() as i32;
        let values = [
            bits(sampling.temperature),
            bits(sampling.top_p),
            bits(sampling.min_p),
            bits(sampling.repetition_penalty),
            bits(sampling.presence_penalty),
            bits(sampling.frequency_penalty),
            sampling.top_k.min(i32::MAX as u32) as i32,
            sampling.choice as i32,
            mirror.sample_position(sample) as i32,
            sampling.logprobs.unwrap_or(0) as i32,
            sampling.seed as u32 as i32,
            (sampling.seed >> 32) as u32 as i32,
            used as i32,
        ];
        for (column, value) in columns.iter_mut().zip(values) {
            column[row] = value;
        }
        used = add_changes(mirror, sample, slot, changes, used)?;
    }
    Some(used)
}

/// A row that takes the greatest logit: the cheapest there is.
fn neutral(columns: &mut [&mut [i32]; COLUMNS], row: usize) {
    let one = 1.0_f32.to_bits() as i32;
    for (column, value) in columns.iter_mut().zip([0, one, 0, one]) {
        column[row] = value;
    }
    for column in &mut columns[4..] {
        column[row] = 0;
    }
}

/// Appends a row's changes behind `used` others.
fn add_changes(mirror: &Mirror, sample: usize, slot: Slot, changes: &mut Changes<'_>, used: usize) -> Option<usize> {
    let state = mirror.sampling(slot);
    let (prompt, counts, bias) = (&state.prompt_set, &state.emitted_counts, &state.sampling.logit_bias);
    let suppressed = mirror.suppressed(sample, slot);
    if prompt.is_empty() && counts.is_empty() && bias.is_empty() && suppressed.is_empty() {
        return Some(used);
    }
    let mut tokens: Vec<Token> = bias.iter().map(|entry| entry.0).collect();
    tokens.sort_unstable();
    if tokens.windows(2).any(|pair| pair[0] == pair[1]) {
        return None;
    }
    tokens.extend(prompt.iter().chain(&suppressed).copied().chain(counts.iter().map(|entry| entry.0)));
    tokens.sort_unstable();
    tokens.dedup();
    if used + tokens.len() > changes.room() {
        return None;
    }
    for (at, &token) in tokens.iter().enumerate() {
        let count = counts.binary_search_by_key(&token, |entry| entry.0).map_or(0, |found| counts[found].1);
        let seen = count > 0 || prompt.binary_search(&token).is_ok();
        let flags = i32::from(seen) * SEEN + i32::from(suppressed.contains(&token)) * SUPPRESSED;
        let added = bias.iter().find(|entry| entry.0 == token).map_or(0.0, |entry| entry.1);
        changes.set(used + at, [token as i32, count as i32, flags, added.to_bits() as i32]);
    }
    Some(used + tokens.len())
}

/// Entries of what a sampler for `max_rows` rows leaves: by column, status, token, log probability and number of others for
/// every row, then 20 tokens and 20 log probabilities for every row.
pub fn drawn_entries(max_rows: usize) -> usize {
    max_rows * (DRAWN + 2 * MAX_LOGPROBS)
}

/// One row of what a sampler for `max_rows` rows has left. `asked` is how many log probabilities the row wants.
///
/// # Errors
/// Memory that is too small.
///
/// # Panics
/// If the status is none, which no request can cause.
pub fn read_drawn(memory: &[i32], max_rows: usize, row: usize, asked: Option<u32>) -> Result<DrawnRow, NoRoom> {
    let needed = if asked.is_some() { drawn_entries(max_rows) } else { 3 * max_rows };
    if memory.len() < needed || row >= max_rows {
        return Err(NoRoom { what: "entries of drawn rows", needed, room: memory.len() });
    }
    let column = |column: usize| memory[column * max_rows + row];
    let token = match column(0) {
        0 => Ok(column(1) as Token),
        1 => Err(RowError::NotANumber),
        2 => Err(RowError::NothingToSample),
        other => panic!("the sampler of the device left status {other}"),
    };
    let logprobs = asked.filter(|_| token.is_ok()).map(|asked| {
        let count = (column(3).max(0) as usize).min(asked as usize).min(MAX_LOGPROBS);
        let first = DRAWN * max_rows + row * MAX_LOGPROBS;
        let tokens = &memory[first..first + count];
        let values = &memory[first + max_rows * MAX_LOGPROBS..][..count];
        let top = tokens.iter().zip(values).map(|(&token, &value)| (token as Token, f32::from_bits(value as u32)));
        TokenLogprobs { chosen: f32::from_bits(column(2) as u32), top: top.collect() }
    });
    Ok(DrawnRow { token, logprobs })
}
