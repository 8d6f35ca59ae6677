//! Versions of the frame layout. Both sides name the range that they speak in the handshake and use the newest common
//! one; the handshake itself keeps the layout of version 1 for ever, with fields only ever added at its end.

use crate::error::WireError;
use llmscale_types::Planted;

/// Versions that this build speaks.
pub const VERSIONS: VersionRange = VersionRange { low: 1, high: 1 };

/// What every frame of a handshake says, whatever its sender speaks otherwise.
pub const HANDSHAKE_VERSION: u8 = 1;

/// A range of versions, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VersionRange {
    /// Oldest.
    pub low: u8,
    /// Newest.
    pub high: u8,
}

impl VersionRange {
    /// The newest version that both sides speak: `self` has greeted `other`.
    pub fn newest_common(self, other: Self) -> Option<u8> {
        let newest = if Planted::SpeaksItsOwnVersion.is_here() { other.high } else { self.high.min(other.high) };
        (newest >= self.low.max(other.low)).then_some(newest)
    }

    /// Whether the version is one of them.
    pub fn has(self, version: u8) -> bool {
        (self.low..=self.high).contains(&version)
    }

    pub(crate) fn accept(self, given: u64) -> Result<(), WireError> {
        if u8::try_from(given).is_ok_and(|version| self.has(version)) {
            return Ok(());
        }
        Err(WireError::UnsupportedVersion { given, low: self.low, high: self.high })
    }
}

#[cfg(test)]
mod tests {
    use super::VersionRange;

    fn range(low: u8, high: u8) -> VersionRange {
        VersionRange { low, high }
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(range(1, 3).newest_common(range(2, 5)), Some(3));
        assert_eq!(range(2, 5).newest_common(range(1, 3)), Some(3));
        assert_eq!(range(1, 1).newest_common(range(1, 1)), Some(1));
    }

    #[test]
    fn ranges_that_do_not_meet_have_no_common_version() {
        assert_eq!(range(1, 2).newest_common(range(3, 4)), None);
        assert_eq!(range(3, 4).newest_common(range(1, 2)), None);
    }
}
