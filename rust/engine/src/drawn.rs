//! Rows that have been drawn: what the ranks of a stage tell each other of theirs, and the step's result from all of them,
//! be it the mirror's step or one before it.
//! A row is one 32-bit word, its id or why it has none; a row with log probabilities has room for as many as were asked
//! for. So every rank knows from the step alone where whose words lie, and a step without log probabilities exchanges
//! four bytes per row. O(words). Knows nothing of logits, how a token is drawn, or how words travel.

use llmscale_scheduler::Mirror;
use llmscale_types::{Epoch, RowError, Sampling, Slot, StepId, StepResult, Token, TokenLogprobs};

/// Most words of a row.
pub const MAX_ROW_WORDS: usize = row_words(Some(Sampling::MAX_LOGPROBS));

/// Ids end at 2^31 - 1, so the highest words are free.
const NOT_A_NUMBER: u32 = u32::MAX;
const NOTHING_TO_SAMPLE: u32 = u32::MAX - 1;

/// What became of one sampling row.
#[derive(Clone, PartialEq, Debug)]
pub struct DrawnRow {
    /// The id, or why there is none.
    pub token: Result<Token, RowError>,
    /// Present where asked for and where there is an id.
    pub logprobs: Option<TokenLogprobs>,
}

/// Words that no rank writes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the words of sampling row {row} cannot be read: {why}; ranks of one stage run different versions or steps")]
pub struct UnreadableRow {
    /// Which row of the step.
    pub row: usize,
    /// What does not fit.
    pub why: &'static str,
}

/// Who samples in a step, and what each row is to tell: enough to read what was drawn when the mirror holds another step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SampledStep {
    epoch: Epoch,
    step: StepId,
    slots: Vec<Slot>,
    /// How many log probabilities each row wants.
    asked: Vec<Option<u32>>,
}

impl SampledStep {
    /// Of the step that the mirror holds.
    pub fn of(mirror: &Mirror) -> Self {
        let (epoch, step) = mirror.step();
        let slots = mirror.sample_slots().to_vec();
        let asked = slots.iter().map(|&slot| mirror.sampling(slot).sampling.logprobs).collect();
        Self { epoch, step, slots, asked }
    }

    /// Which step it is.
    pub fn id(&self) -> (Epoch, StepId) {
        (self.epoch, self.step)
    }

    /// How many log probabilities each sampling row wants, in their order.
    pub fn asked(&self) -> &[Option<u32>] {
        &self.asked
    }

    /// Where the words of each sampling row begin, and where the last end: R + 1 numbers.
    pub fn word_bounds(&self) -> Vec<usize> {
        bounds(self.asked.iter().copied())
    }

    /// All rows.
    ///
    /// # Errors
    /// Words that no rank writes.
    pub fn read_rows(&self, words: &[u32]) -> Result<Vec<DrawnRow>, UnreadableRow> {
        let bounds = self.word_bounds();
        let row = |(row, pair): (usize, &[usize])| {
            let words = words.get(pair[0]..pair[1]).ok_or("it has too few");
            words.and_then(read_row).map_err(|why| UnreadableRow { row, why })
        };
        bounds.windows(2).enumerate().map(row).collect()
    }

    /// Tells the mirror what was sampled, unless a snapshot has come since and nobody will read it, and makes the step's
    /// result, but for its times.
    pub fn complete(&self, mirror: &mut Mirror, rows: Vec<DrawnRow>) -> StepResult {
        if mirror.awaits(self.step) {
            let tokens: Vec<Option<Token>> = rows.iter().map(|row| row.token.ok()).collect();
            mirror.record(&tokens);
        }
        let mut result = StepResult {
            epoch: self.epoch,
            step: self.step,
            slots: Vec::with_capacity(rows.len()),
            tokens: Vec::with_capacity(rows.len()),
            logprobs: Vec::new(),
            errors: Vec::new(),
            elapsed_ns: 0,
            waited_ns: 0,
            copied_ns: 0,
        };
        for (&slot, row) in self.slots.iter().zip(rows) {
            match row.token {
                Ok(token) => {
                    result.slots.push(slot);
                    result.tokens.push(token);
                    result.logprobs.extend(row.logprobs.map(|logprobs| (slot, logprobs)));
                }
                Err(error) => result.errors.push((slot, error)),
            }
        }
        result
    }
}

fn bounds(asked: impl Iterator<Item = Option<u32>>) -> Vec<usize> {
    let mut bounds = vec![0];
    for asked in asked {
        bounds.push(bounds[bounds.len() - 1] + row_words(asked));
    }
    bounds
}

/// The id; with log probabilities also the chosen one's, how many follow, and the pairs.
const fn row_words(asked: Option<u32>) -> usize {
    match asked {
        None => 1,
        Some(count) => 3 + 2 * count as usize,
    }
}

/// Fills a row's words.
pub fn write_row(row: &DrawnRow, words: &mut [u32]) {
    words[0] = match row.token {
        Ok(token) => token,
        Err(RowError::NotANumber) => NOT_A_NUMBER,
        Err(RowError::NothingToSample) => NOTHING_TO_SAMPLE,
    };
    if let Some(TokenLogprobs { chosen, top }) = &row.logprobs {
        (words[1], words[2]) = (chosen.to_bits(), top.len() as u32);
        for (pair, (token, logprob)) in words[3..].chunks_exact_mut(2).zip(top) {
            pair.copy_from_slice(&[*token, logprob.to_bits()]);
        }
    }
}

/// The reverse of [`write_row`]; a row has log probabilities if it has words for them.
pub fn read_row(words: &[u32]) -> Result<DrawnRow, &'static str> {
    let token = match words[0] {
        NOT_A_NUMBER => Err(RowError::NotANumber),
        NOTHING_TO_SAMPLE => Err(RowError::NothingToSample),
        token if token > i32::MAX as u32 => return Err("its id is beyond every vocabulary"),
        token => Ok(token),
    };
    if words.len() == 1 || token.is_err() {
        return Ok(DrawnRow { token, logprobs: None });
    }
    let (pairs, _) = words[3..].as_chunks::<2>();
    let pairs = pairs.get(..words[2] as usize).ok_or("it has more log probabilities than were asked for")?;
    let top = pairs.iter().map(|&[token, logprob]| (token, f32::from_bits(logprob))).collect();
    Ok(DrawnRow { token, logprobs: Some(TokenLogprobs { chosen: f32::from_bits(words[1]), top }) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(row: &DrawnRow, asked: Option<u32>) -> Vec<u32> {
        let bounds = bounds(std::iter::once(asked));
        // What an earlier step has left there must not be read.
        let mut words = vec![7; bounds[1]];
        write_row(row, &mut words);
        words
    }

    fn with_logprobs(top: &[(Token, f32)]) -> DrawnRow {
        let logprobs = TokenLogprobs { chosen: -0.25, top: top.to_vec() };
        DrawnRow { token: Ok(5), logprobs: Some(logprobs) }
    }

    #[test]
    fn a_row_without_log_probabilities_is_one_word() {
        for token in [Ok(0), Ok(i32::MAX as u32), Err(RowError::NotANumber), Err(RowError::NothingToSample)] {
            let row = DrawnRow { token, logprobs: None };
            let words = words_of(&row, None);
            assert_eq!(words.len(), 1);
            assert_eq!(read_row(&words), Ok(row));
        }
    }

    #[test]
    fn log_probabilities_keep_every_bit_and_their_number() {
        let all = [(3, -1.5_f32), (9, f32::NEG_INFINITY), (0, -0.0)];
        for given in 0..=all.len() {
            let row = with_logprobs(&all[..given]);
            let words = words_of(&row, Some(3));
            assert_eq!(words.len(), 9);
            let read = read_row(&words).expect("it was written so");
            assert_eq!(read, row);
            let bits = |row: &DrawnRow| -> Vec<u32> {
                row.logprobs.iter().flat_map(|logprobs| &logprobs.top).map(|(_, value)| value.to_bits()).collect()
            };
            assert_eq!(bits(&read), bits(&row));
        }
    }

    #[test]
    fn a_failed_row_keeps_the_room_of_its_log_probabilities_and_has_none() {
        let row = DrawnRow { token: Err(RowError::NotANumber), logprobs: None };
        let words = words_of(&row, Some(2));
        assert_eq!(words.len(), 7);
        assert_eq!(read_row(&words), Ok(row));
    }

    #[test]
    fn words_that_no_rank_writes_are_refused() {
        assert_eq!(read_row(&[1 << 31]), Err("its id is beyond every vocabulary"));
        let mut words = words_of(&with_logprobs(&[(3, -1.5)]), Some(1));
        words[2] = 2;
        assert_eq!(read_row(&words), Err("it has more log probabilities than were asked for"));
    }

    #[test]
    fn rows_lie_one_behind_the_other_with_room_for_what_each_has_asked_for() {
        assert_eq!(bounds([None, Some(0), None, Some(20)].into_iter()), [0, 1, 4, 5, 48]);
        assert_eq!(bounds(std::iter::empty()), [0]);
    }
}
