//! The first bytes of a msgpack value: what it is and how long. Every length is checked against the bytes that are left
//! before anybody sees it, in O(1); extension types and the unused marker are refused. Knows nothing of messages.

use crate::error::WireError;

/// What stands at one place of a frame.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Head {
    /// A number from 0 to `u64::MAX`.
    Unsigned(u64),
    /// A signed number; no message has one.
    Signed,
    /// Nothing.
    Nil,
    /// A truth value.
    Bool(bool),
    /// A float of either width.
    Float(f32),
    /// Text of this many bytes.
    Text(usize),
    /// This many raw bytes.
    Binary(usize),
    /// An array of this many values.
    Array(usize),
    /// A map of this many pairs; no message has one.
    Map(usize),
}

/// Reads the head at `at`: what it is, and where its payload (or the next value) starts.
#[inline]
pub(crate) fn head(bytes: &[u8], at: usize) -> Result<(Head, usize), WireError> {
    let marker = *bytes.get(at).ok_or(WireError::Truncated { at })?;
    let next = at + 1;
    if marker < 0x80 {
        return Ok((Head::Unsigned(u64::from(marker)), next));
    }
    match marker {
        0xcc..=0xcf => number(bytes, next, 1 << (marker - 0xcc)).map(|(value, next)| (Head::Unsigned(value), next)),
        0x80..=0x8f => sized(bytes, at, next, u64::from(marker & 0x0f), 2, Head::Map),
        0x90..=0x9f => sized(bytes, at, next, u64::from(marker & 0x0f), 1, Head::Array),
        0xa0..=0xbf => sized(bytes, at, next, u64::from(marker & 0x1f), 1, Head::Text),
        0xc0 => Ok((Head::Nil, next)),
        0xc2 | 0xc3 => Ok((Head::Bool(marker == 0xc3), next)),
        0xc4..=0xc6 => prefixed(bytes, at, 1 << (marker - 0xc4), 1, Head::Binary),
        0xca => number(bytes, next, 4).map(|(bits, next)| (Head::Float(f32::from_bits(bits as u32)), next)),
        0xcb => number(bytes, next, 8).map(|(bits, next)| (Head::Float(f64::from_bits(bits) as f32), next)),
        0xd0..=0xd3 => number(bytes, next, 1 << (marker - 0xd0)).map(|(_, next)| (Head::Signed, next)),
        0xd9..=0xdb => prefixed(bytes, at, 1 << (marker - 0xd9), 1, Head::Text),
        0xdc | 0xdd => prefixed(bytes, at, 2 << (marker - 0xdc), 1, Head::Array),
        0xde | 0xdf => prefixed(bytes, at, 2 << (marker - 0xde), 2, Head::Map),
        0xe0..=0xff => Ok((Head::Signed, next)),
        _ => Err(WireError::ForbiddenMarker { at, marker }),
    }
}

/// A big-endian number of `width` bytes.
#[inline]
fn number(bytes: &[u8], at: usize, width: usize) -> Result<(u64, usize), WireError> {
    let end = at + width;
    let digits = bytes.get(at..end).ok_or(WireError::Truncated { at })?;
    Ok((digits.iter().fold(0, |value, &digit| value << 8 | u64::from(digit)), end))
}

/// A head whose length follows the marker in `width` bytes.
fn prefixed(
    bytes: &[u8],
    at: usize,
    width: usize,
    least_bytes: u64,
    kind: fn(usize) -> Head,
) -> Result<(Head, usize), WireError> {
    let (length, next) = number(bytes, at + 1, width)?;
    sized(bytes, at, next, length, least_bytes, kind)
}

/// A head with its length checked: every element takes `least_bytes` at least.
fn sized(
    bytes: &[u8],
    at: usize,
    next: usize,
    length: u64,
    least_bytes: u64,
    kind: fn(usize) -> Head,
) -> Result<(Head, usize), WireError> {
    let remaining = bytes.len() - next;
    // Lengths are at most 32 bits wide, so the product stays far from the end of 64.
    let given = length * least_bytes;
    if given > remaining as u64 {
        return Err(WireError::LengthBeyondFrame { at, given, remaining });
    }
    Ok((kind(length as usize), next))
}
