//! Why bytes are not a frame. Offsets count bytes from the start of the frame; each variant has a stable label.

use llmscale_types::LimitError;

/// A frame that is refused, when it is made or when it arrives.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum WireError {
    /// Longer than a frame may be.
    #[error("the frame has {given} bytes, the limit is {limit} (max_frame_bytes)")]
    TooLarge {
        /// Its length.
        given: usize,
        /// What is allowed.
        limit: usize,
    },
    /// Arrays within arrays beyond the limit.
    #[error("the frame nests deeper than {limit} levels at byte {at}")]
    TooDeep {
        /// Where.
        at: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The bytes end within a value.
    #[error("the frame ends within the value at byte {at}")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// A length prefix that claims more than the frame holds.
    #[error("the value at byte {at} claims {given} bytes or more, the frame has {remaining} left")]
    LengthBeyondFrame {
        /// Where.
        at: usize,
        /// The fewest bytes that the prefix asks for.
        given: u64,
        /// What is left.
        remaining: usize,
    },
    /// A msgpack extension, or the one marker that msgpack never uses.
    #[error("byte {at} is the marker {marker:#04x}, which no message uses")]
    ForbiddenMarker {
        /// Where.
        at: usize,
        /// The byte.
        marker: u8,
    },
    /// Text that is not UTF-8.
    #[error("the text at byte {at} is not UTF-8")]
    InvalidUtf8 {
        /// Where.
        at: usize,
    },
    /// Bytes after the frame.
    #[error("{given} bytes follow the frame")]
    TrailingBytes {
        /// How many.
        given: usize,
    },
    /// Not `[version, tag, body]`.
    #[error("the bytes are not a frame: they do not start with an array of version, tag and body")]
    NotAFrame,
    /// A version that this side does not speak.
    #[error("the frame is of version {given}, this side speaks {low} to {high}")]
    UnsupportedVersion {
        /// Of the frame.
        given: u64,
        /// Oldest that is spoken.
        low: u8,
        /// Newest that is spoken.
        high: u8,
    },
    /// A message that this direction does not have.
    #[error("{direction} has no message with tag {given}")]
    UnknownTag {
        /// Which enum.
        direction: &'static str,
        /// The tag.
        given: u64,
    },
    /// A code that an enum within a message does not have.
    #[error("{what} has no code {given}")]
    UnknownCode {
        /// Which enum.
        what: &'static str,
        /// The code.
        given: u64,
    },
    /// A value of another kind than the field has.
    #[error("the value at byte {at} is not {expected}")]
    Unexpected {
        /// Where.
        at: usize,
        /// What the field holds.
        expected: &'static str,
    },
    /// A number that does not fit its field.
    #[error("the number at byte {at} is {given}, the limit is {limit}")]
    NumberTooLarge {
        /// Where.
        at: usize,
        /// What was given.
        given: u64,
        /// What fits.
        limit: u64,
    },
    /// A record with too few or too many fields.
    #[error("{record} has {given} fields, {expected} are expected")]
    FieldCount {
        /// Which record.
        record: &'static str,
        /// What was given.
        given: usize,
        /// What it has.
        expected: usize,
    },
    /// Columns of one table that differ in length.
    #[error("column {column} has {given} rows, the table has {expected}")]
    ColumnLength {
        /// Which column.
        column: &'static str,
        /// Its length.
        given: usize,
        /// Of the first column.
        expected: usize,
    },
    /// Rows that are not in ascending order, or name one twice.
    #[error("{column} is not in strictly ascending order")]
    NotAscending {
        /// Which column.
        column: &'static str,
    },
    /// A value outside its bound.
    #[error(transparent)]
    Limit(#[from] LimitError),
}

impl WireError {
    /// The stable label used in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::TooDeep { .. } => "too_deep",
            Self::Truncated { .. } => "truncated",
            Self::LengthBeyondFrame { .. } => "length_beyond_frame",
            Self::ForbiddenMarker { .. } => "forbidden_marker",
            Self::InvalidUtf8 { .. } => "invalid_utf8",
            Self::TrailingBytes { .. } => "trailing_bytes",
            Self::NotAFrame => "not_a_frame",
            Self::UnsupportedVersion { .. } => "unsupported_version",
            Self::UnknownTag { .. } => "unknown_tag",
            Self::UnknownCode { .. } => "unknown_code",
            Self::Unexpected { .. } => "unexpected_value",
            Self::NumberTooLarge { .. } => "number_too_large",
            Self::FieldCount { .. } => "field_count",
            Self::ColumnLength { .. } => "column_length",
            Self::NotAscending { .. } => "not_ascending",
            Self::Limit(_) => "limit",
        }
    }
}
