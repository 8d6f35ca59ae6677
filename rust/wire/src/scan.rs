//! The look at a whole frame before anything is built from it: size, depth, lengths, UTF-8, extension types, trailing
//! bytes. Linear in the frame, with a fixed stack and no allocation. Knows nothing of messages.

use crate::error::WireError;
use crate::limits::CodecLimits;
use crate::marker::{Head, head};

/// Checks that `bytes` hold exactly one well-formed array of three within the limits.
pub(crate) fn scan(bytes: &[u8], limits: &CodecLimits) -> Result<(), WireError> {
    if bytes.len() > limits.max_frame_bytes {
        return Err(WireError::TooLarge { given: bytes.len(), limit: limits.max_frame_bytes });
    }
    // Most foreign bytes (HTTP, TLS, pickle) end here.
    if bytes.first() != Some(&0x93) {
        return Err(WireError::NotAFrame);
    }
    let end = skip(bytes, 0, limits.max_depth)?;
    if end < bytes.len() {
        return Err(WireError::TrailingBytes { given: bytes.len() - end });
    }
    Ok(())
}

/// Where the value that starts at `start` ends.
pub(crate) fn skip(bytes: &[u8], start: usize, max_depth: usize) -> Result<usize, WireError> {
    let limit = max_depth.min(CodecLimits::MAX_DEPTH);
    // Values that are still to come on each open level; level 0 is the value itself.
    let mut pending = [0_u64; CodecLimits::MAX_DEPTH + 1];
    pending[0] = 1;
    let mut level = 0;
    let mut at = start;
    loop {
        while pending[level] == 0 {
            if level == 0 {
                return Ok(at);
            }
            level -= 1;
        }
        pending[level] -= 1;
        let (found, next) = head(bytes, at)?;
        let children = match found {
            Head::Text(length) => {
                let text = &bytes[next..next + length];
                std::str::from_utf8(text).map_err(|_| WireError::InvalidUtf8 { at })?;
                at = next + length;
                continue;
            }
            Head::Binary(length) => {
                at = next + length;
                continue;
            }
            Head::Array(count) => count as u64,
            Head::Map(count) => 2 * count as u64,
            _ => {
                at = next;
                continue;
            }
        };
        if level == limit {
            return Err(WireError::TooDeep { at, limit });
        }
        level += 1;
        pending[level] = children;
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::scan;
    use crate::error::WireError;
    use crate::limits::CodecLimits;

    fn check(bytes: &[u8]) -> Result<(), WireError> {
        scan(bytes, &CodecLimits::default())
    }

    fn nested(levels: usize) -> Vec<u8> {
        let mut bytes = vec![0x93, 1, 0];
        bytes.extend(std::iter::repeat_n(0x91, levels - 1));
        bytes.push(0xc0);
        bytes
    }

    #[test]
    fn nesting_up_to_the_limit_passes_and_one_more_does_not() {
        assert_eq!(check(&nested(32)), Ok(()));
        assert_eq!(check(&nested(33)), Err(WireError::TooDeep { at: 34, limit: 32 }));
    }

    #[test]
    fn a_length_beyond_the_frame_is_refused_at_its_prefix() {
        let bytes = [0x93, 1, 0, 0xdd, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(check(&bytes), Err(WireError::LengthBeyondFrame { at: 3, given: 0xffff_ffff, remaining: 0 }));
        let map = [0x93, 1, 0, 0x82, 1, 1, 1];
        assert_eq!(check(&map), Err(WireError::LengthBeyondFrame { at: 3, given: 4, remaining: 3 }));
    }

    #[test]
    fn every_extension_marker_is_refused() {
        for marker in [0xc1, 0xc7, 0xc8, 0xc9, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8] {
            let bytes = [0x93, 1, 0, marker, 0, 0, 0, 0];
            assert_eq!(check(&bytes), Err(WireError::ForbiddenMarker { at: 3, marker }));
        }
    }

    #[test]
    fn bytes_after_the_frame_are_refused() {
        assert_eq!(check(&[0x93, 1, 0, 0x90]), Ok(()));
        assert_eq!(check(&[0x93, 1, 0, 0x90, 0]), Err(WireError::TrailingBytes { given: 1 }));
    }

    #[test]
    fn text_must_be_utf8() {
        assert_eq!(check(&[0x93, 1, 0, 0xa2, 0xc3, 0xa9]), Ok(()));
        assert_eq!(check(&[0x93, 1, 0, 0xa2, 0xc3, 0x28]), Err(WireError::InvalidUtf8 { at: 3 }));
    }

    #[test]
    fn a_frame_one_byte_over_the_limit_is_refused() {
        let limits = CodecLimits { max_frame_bytes: 4, ..CodecLimits::default() };
        assert_eq!(scan(&[0x93, 1, 0, 0x90], &limits), Ok(()));
        assert_eq!(scan(&[0x93, 1, 0, 0xcc, 0], &limits), Err(WireError::TooLarge { given: 5, limit: 4 }));
    }
}
