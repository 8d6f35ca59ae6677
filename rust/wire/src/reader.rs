//! Reads values of known kinds from a frame, one after another. O(1) per value; a value of another kind is an error with
//! its offset. Knows nothing of messages.

use crate::error::WireError;
use crate::marker::{Head, head};
use crate::scan::skip;

/// A place in a frame.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    max_depth: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], max_depth: usize) -> Self {
        Self { bytes, at: 0, max_depth }
    }

    /// Where the next value starts.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Bytes from here to the end of the frame.
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn next(&mut self) -> Result<Head, WireError> {
        let (found, next) = head(self.bytes, self.at)?;
        self.at = next;
        Ok(found)
    }

    #[inline]
    pub(crate) fn unsigned(&mut self) -> Result<u64, WireError> {
        let at = self.at;
        match self.next()? {
            Head::Unsigned(value) => Ok(value),
            _ => Err(WireError::Unexpected { at, expected: "an unsigned number" }),
        }
    }

    /// An unsigned number of at most `limit`.
    #[inline]
    pub(crate) fn unsigned_to(&mut self, limit: u64) -> Result<u64, WireError> {
        let at = self.at;
        let given = self.unsigned()?;
        if given > limit { Err(WireError::NumberTooLarge { at, given, limit }) } else { Ok(given) }
    }

    pub(crate) fn bool(&mut self) -> Result<bool, WireError> {
        let at = self.at;
        match self.next()? {
            Head::Bool(value) => Ok(value),
            _ => Err(WireError::Unexpected { at, expected: "true or false" }),
        }
    }

    pub(crate) fn float(&mut self) -> Result<f32, WireError> {
        let at = self.at;
        match self.next()? {
            Head::Float(value) => Ok(value),
            _ => Err(WireError::Unexpected { at, expected: "a float" }),
        }
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, WireError> {
        let at = self.at;
        match self.next()? {
            Head::Text(length) => std::str::from_utf8(self.payload(length)).map_err(|_| WireError::InvalidUtf8 { at }),
            _ => Err(WireError::Unexpected { at, expected: "text" }),
        }
    }

    pub(crate) fn binary(&mut self) -> Result<&'a [u8], WireError> {
        let at = self.at;
        match self.next()? {
            Head::Binary(length) => Ok(self.payload(length)),
            _ => Err(WireError::Unexpected { at, expected: "raw bytes" }),
        }
    }

    /// The head of an array: how many values follow.
    pub(crate) fn array(&mut self) -> Result<usize, WireError> {
        let at = self.at;
        match self.next()? {
            Head::Array(count) => Ok(count),
            _ => Err(WireError::Unexpected { at, expected: "an array" }),
        }
    }

    /// The head of a record with exactly `expected` fields.
    pub(crate) fn record(&mut self, record: &'static str, expected: usize) -> Result<(), WireError> {
        let given = self.array()?;
        if given == expected { Ok(()) } else { Err(WireError::FieldCount { record, given, expected }) }
    }

    /// The head of a record with at least `expected` fields: how many more there are.
    pub(crate) fn open_record(&mut self, record: &'static str, expected: usize) -> Result<usize, WireError> {
        let given = self.array()?;
        given.checked_sub(expected).ok_or(WireError::FieldCount { record, given, expected })
    }

    /// Whether the next value is nil; if so, it is consumed.
    pub(crate) fn take_nil(&mut self) -> Result<bool, WireError> {
        let (found, next) = head(self.bytes, self.at)?;
        if found == Head::Nil {
            self.at = next;
        }
        Ok(found == Head::Nil)
    }

    /// Passes over whole values.
    pub(crate) fn skip(&mut self, values: usize) -> Result<(), WireError> {
        for _ in 0..values {
            self.at = skip(self.bytes, self.at, self.max_depth)?;
        }
        Ok(())
    }

    /// Bytes whose length the head has checked already.
    fn payload(&mut self, length: usize) -> &'a [u8] {
        let payload = &self.bytes[self.at..self.at + length];
        self.at += length;
        payload
    }
}
