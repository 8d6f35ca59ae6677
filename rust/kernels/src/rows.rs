//! How row-wise kernels split their rows over a pool.
//! A chunk is large enough (about 32 KiB of work) that claiming it, some 50 ns, is lost in it, and small enough that
//! the last chunk does not leave the other threads idle.

use core::ops::Range;

/// The partition of `rows` rows into chunks of equal length but the last.
#[derive(Clone, Copy)]
pub(crate) struct RowChunks {
    rows: usize,
    rows_per_chunk: usize,
}

impl RowChunks {
    const CHUNK_BYTES: usize = 32 << 10;

    /// Chunks for rows that touch `row_bytes` bytes each.
    pub(crate) fn new(rows: usize, row_bytes: usize) -> Self {
        Self { rows, rows_per_chunk: (Self::CHUNK_BYTES / row_bytes.max(1)).max(1) }
    }

    pub(crate) fn count(self) -> usize {
        self.rows.div_ceil(self.rows_per_chunk)
    }

    pub(crate) fn rows(self, chunk: usize) -> Range<usize> {
        let from = chunk * self.rows_per_chunk;
        from..(from + self.rows_per_chunk).min(self.rows)
    }
}
