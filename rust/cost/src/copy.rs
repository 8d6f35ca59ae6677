//! The time of copying one block between tiers, learned from the steps that copied: a mean that fades, in fixed point. It
//! begins at the least of the first few: a stall only ever adds time, and one that was all there is to know kept a tier out
//! of use for as long as its replica lived.
//! O(1) per observation. Knows nothing of directions or of what the blocks hold.

/// Before anything was copied: a megabyte at 4 GB/s.
const DEFAULT_NS: u64 = 250_000;
/// Fraction bits of the mean.
const FRACTION_BITS: u32 = 8;
/// A step's mean counts for 1/8.
const FADING_SHIFT: u32 = 3;
/// Later observations count at most this many times (or this fraction of) the mean, so that one stall moves it little.
const MAX_SURPRISE: u64 = 4;
const MOST_NS: u64 = 1 << 40;
/// So many observations are enough to decline by.
const FIRST: u8 = 3;

/// Learns how long a replica's copies take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyCost {
    mean: u64,
    /// Observations, up to `FIRST`.
    observed: u8,
}

impl Default for CopyCost {
    fn default() -> Self {
        Self { mean: DEFAULT_NS << FRACTION_BITS, observed: 0 }
    }
}

impl CopyCost {
    /// Learns that so many blocks took `elapsed_ns` in all.
    pub fn observe(&mut self, blocks: u32, elapsed_ns: u64) {
        if blocks == 0 {
            return;
        }
        let one = ((elapsed_ns.min(MOST_NS) << FRACTION_BITS) / u64::from(blocks)).max(1);
        if self.is_settled() {
            let bounded = one.clamp(self.mean / MAX_SURPRISE, self.mean.saturating_mul(MAX_SURPRISE));
            self.mean = (self.mean - (self.mean >> FADING_SHIFT) + (bounded >> FADING_SHIFT)).max(1);
        } else {
            self.mean = if self.observed == 0 { one } else { one.min(self.mean) };
            self.observed += 1;
        }
    }

    /// Whether anything was ever copied.
    pub fn is_known(&self) -> bool {
        self.observed > 0
    }

    /// Whether enough was copied to believe that it does not pay; until then it is tried.
    pub fn is_settled(&self) -> bool {
        self.observed == FIRST
    }

    /// Time that so many blocks take.
    pub fn predict(&self, blocks: u32) -> u64 {
        let whole = u128::from(self.mean) * u128::from(blocks);
        u64::try_from(whole >> FRACTION_BITS).unwrap_or(u64::MAX).min(MOST_NS)
    }

    /// How many blocks are copied within this time.
    pub fn blocks_within(&self, nanoseconds: u64) -> u32 {
        let blocks = (u128::from(nanoseconds) << FRACTION_BITS) / u128::from(self.mean);
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_least_of_the_first_copies_tells_and_one_stall_moves_the_mean_little() {
        for stalled in 0..3 {
            let mut cost = CopyCost::default();
            assert_eq!(cost.predict(4), 4 * DEFAULT_NS);
            for at in 0..3 {
                assert!(!cost.is_settled());
                cost.observe(10, if at == stalled { 1_000_000_000 } else { 1_000_000 });
            }
            assert!(cost.is_settled());
            assert_eq!(cost.predict(1), 100_000);
            cost.observe(1, 1_000_000_000);
            assert!(cost.predict(1) <= 140_000);
            for _ in 0..100 {
                cost.observe(10, 2_000_000);
            }
            assert!(cost.predict(1).abs_diff(200_000) < 2_000);
        }
    }

    #[test]
    fn what_fits_a_time_takes_no_longer() {
        let mut cost = CopyCost::default();
        cost.observe(3, 1_000);
        assert_eq!(cost.blocks_within(10_000), 30);
        assert_eq!(cost.blocks_within(0), 0);
    }

    proptest! {
        #[test]
        fn nothing_overflows_and_more_blocks_never_take_less(
            observations in prop::collection::vec((any::<u32>(), any::<u64>()), 0..40),
            blocks in any::<u32>(),
            more in any::<u32>(),
        ) {
            let mut cost = CopyCost::default();
            for (blocks, elapsed_ns) in observations {
                cost.observe(blocks, elapsed_ns);
            }
            let fewer = cost.predict(blocks);
            prop_assert!(fewer <= cost.predict(blocks.saturating_add(more)));
            prop_assert!(fewer == MOST_NS || cost.blocks_within(fewer) <= blocks);
        }
    }
}
