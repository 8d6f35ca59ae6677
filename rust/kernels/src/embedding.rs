//! Embedding lookup: copies one table row per token.
//! O(rows x hidden), bounded by memory; all ids are checked before the first row is written.
//! Knows nothing of scaling, tying or vocabularies split over ranks.
#![expect(unsafe_code, reason = "disjoint rows of one array are written on several threads")]

use crate::element::Element;
use crate::error::{KernelError, require_index, require_length};
use crate::pool::Pool;
use crate::rows::RowChunks;
use crate::shared_output::SharedOutput;

/// `output[r] = table[token_ids[r]]`; `table` is `vocabulary x hidden`, `output` is `rows x hidden`.
///
/// # Errors
/// A token id outside the table, or a length that does not fit.
pub fn gather_rows<T: Element>(
    pool: &Pool,
    table: &[T],
    hidden: usize,
    token_ids: &[i32],
    output: &mut [T],
) -> Result<(), KernelError> {
    if hidden == 0 {
        return Err(KernelError::Unsupported { argument: "hidden", given: 0, rule: "at least 1" });
    }
    let vocabulary = table.len() / hidden;
    require_length("table", vocabulary * hidden, table.len())?;
    require_length("output", token_ids.len() * hidden, output.len())?;
    for (row, &id) in token_ids.iter().enumerate() {
        require_index("token_ids", row, id, vocabulary)?;
    }
    let output = SharedOutput::new(output);
    let chunks = RowChunks::new(token_ids.len(), 2 * hidden * size_of::<T>());
    pool.parallel_for(chunks.count(), |chunk| {
        for row in chunks.rows(chunk) {
            let source = &table[token_ids[row] as usize * hidden..][..hidden];
            // SAFETY: every row belongs to one chunk and is written once.
            unsafe { output.part(row * hidden, hidden) }.copy_from_slice(source);
        }
    })
}
