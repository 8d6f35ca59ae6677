//! Every bound of the codec in one place. The defaults fit links between hosts; a link to a local worker may raise
//! `max_frame_bytes`. A frame is refused by the same numbers when it is made and when it arrives.

use llmscale_types::frame::MAX_FRAME_BYTES;

/// Bounds of a frame and of what it carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodecLimits {
    /// Longest frame.
    pub max_frame_bytes: usize,
    /// Deepest nesting of arrays and maps; at most `CodecLimits::MAX_DEPTH`.
    pub max_depth: usize,
    /// Longest name: of a front, fleet, model, revision, adapter, numerics id.
    pub max_name_bytes: usize,
    /// Longest message for people, and longest folder path.
    pub max_text_bytes: usize,
    /// Longest column: sequences, tokens or appended blocks of one step.
    pub max_rows: usize,
    /// Longest context of one sequence, and longest block table.
    pub max_context_tokens: usize,
}

impl CodecLimits {
    /// The deepest nesting that the scan keeps room for. The deepest message of version 1 nests 7 levels.
    pub const MAX_DEPTH: usize = 32;

    /// The beginning of a message for people that fits `max_text_bytes`, cut between characters.
    pub fn bounded_text<'a>(&self, text: &'a str) -> &'a str {
        let mut end = text.len().min(self.max_text_bytes);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        &text[..end]
    }
}

impl Default for CodecLimits {
    fn default() -> Self {
        Self {
            max_frame_bytes: MAX_FRAME_BYTES as usize,
            max_depth: Self::MAX_DEPTH,
            max_name_bytes: 256,
            max_text_bytes: 4_096,
            max_rows: 1 << 18,
            max_context_tokens: 1 << 24,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::CodecLimits;

    #[test]
    fn text_is_cut_between_characters() {
        let limits = CodecLimits { max_text_bytes: 4, ..CodecLimits::default() };
        assert_eq!(limits.bounded_text("abcd"), "abcd");
        assert_eq!(limits.bounded_text("abcde"), "abcd");
        assert_eq!(limits.bounded_text("abc\u{e9}"), "abc");
    }
}
