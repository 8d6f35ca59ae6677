//! Where a token's key and value lie in the paged KV region of a stage.
//! The region is one contiguous array `[block][layer][K, V][kv_head][run][token in run][dim]`, so that a block with all its
//! layers moves in one copy. A run is 8 tokens; where rows have scales, its eight follow its rows, so that they come with
//! the block whoever copies it, and with the rows into the cache. Without scales runs are just tokens.
//! Addresses are O(1); validating a step's slots is O(rows log rows), once per step.
//! Knows nothing of sequences, ref counts or which blocks are in use.

use crate::error::{KernelError, require_index};
use crate::kv_format::KvFormat;

/// Tokens that lie side by side whatever the block size.
pub(crate) const RUN_TOKENS: usize = 8;

/// Geometry of a KV region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvRegionShape {
    /// Blocks in the region.
    pub blocks: usize,
    /// Layers of this stage, all of which lie in every block.
    pub layers: usize,
    /// Key/value heads of this rank.
    pub kv_heads: usize,
    /// Tokens per block: a power of two, at least 8.
    pub block_tokens: usize,
    /// Elements of one head's key or value: a multiple of 8, at most 256.
    pub head_dim: usize,
    /// What rows are stored as. All sizes and offsets count stored elements, of which a scale takes some.
    pub format: KvFormat,
}

impl KvRegionShape {
    /// The largest head.
    pub const MAX_HEAD_DIM: usize = 256;

    /// Checks the limits that the kernels rely on.
    pub fn validate(&self) -> Result<(), KernelError> {
        let unsupported =
            |argument, given: usize, rule| KernelError::Unsupported { argument, given: given as i64, rule };
        if !self.block_tokens.is_power_of_two() || self.block_tokens < 8 {
            return Err(unsupported("block_tokens", self.block_tokens, "a power of two of at least 8"));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(8) || self.head_dim > Self::MAX_HEAD_DIM {
            return Err(unsupported("head_dim", self.head_dim, "a multiple of 8 from 8 to 256"));
        }
        if self.kv_heads == 0 {
            return Err(unsupported("kv_heads", 0, "at least 1"));
        }
        if self.layers == 0 {
            return Err(unsupported("layers", 0, "at least 1"));
        }
        let slots = self.blocks.checked_mul(self.block_tokens).filter(|&slots| i32::try_from(slots).is_ok());
        let elements = [2, self.layers, self.kv_heads, self.head_dim + self.format.scale_elements()]
            .into_iter()
            .try_fold(slots.unwrap_or(usize::MAX), usize::checked_mul);
        if slots.is_none() || elements.is_none_or(|elements| elements > isize::MAX as usize / 4) {
            return Err(unsupported("blocks", self.blocks, "at most 2^31 - 1 slots and 2^61 elements in a region"));
        }
        Ok(())
    }

    /// Refuses memory of another format.
    pub(crate) fn require_format(&self, given: KvFormat) -> Result<(), KernelError> {
        if given == self.format {
            return Ok(());
        }
        let rule = "of the format that the region was made for";
        Err(KernelError::Unsupported { argument: "kv_region", given: given as i64, rule })
    }

    /// Elements of the whole region.
    pub const fn elements(&self) -> usize {
        self.blocks * self.block_elements()
    }

    /// Elements of one block with all its layers.
    pub const fn block_elements(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.head_elements()
    }

    /// Elements of one head's keys (or values) in one block and layer.
    pub const fn head_elements(&self) -> usize {
        self.block_tokens * (self.head_dim + self.format.scale_elements())
    }

    /// Elements of 8 tokens' rows of one head, with their scales.
    pub const fn run_elements(&self) -> usize {
        RUN_TOKENS * (self.head_dim + self.format.scale_elements())
    }

    /// Offset in elements of a token's row from the first of its head and block.
    pub const fn row_offset(&self, token: usize) -> usize {
        token / RUN_TOKENS * self.run_elements() + token % RUN_TOKENS * self.head_dim
    }

    /// Offset in elements of the scale of a token's row from the first row of its head and block.
    pub const fn scale_offset(&self, token: usize) -> usize {
        token / RUN_TOKENS * self.run_elements()
            + RUN_TOKENS * self.head_dim
            + token % RUN_TOKENS * self.format.scale_elements()
    }

    /// Distance in elements from a key to the value of the same token and head.
    pub const fn key_to_value(&self) -> usize {
        self.kv_heads * self.head_elements()
    }

    /// Offset in elements of the key of head 0 and token 0 of a block in a layer.
    pub const fn layer_offset(&self, block: usize, layer: usize) -> usize {
        block * self.block_elements() + layer * 2 * self.key_to_value()
    }

    /// Slots (token places) of the region.
    pub const fn slots(&self) -> usize {
        self.blocks * self.block_tokens
    }
}

/// The validated slots of a step's rows, usable for every layer of the step.
///
/// Holds its own copy, so that nothing can change after the check; that every row writes another slot is what makes
/// writing them from several threads sound.
#[derive(Clone, Debug)]
pub struct SlotMapping {
    shape: KvRegionShape,
    slots: Vec<u32>,
}

impl SlotMapping {
    /// Checks one slot (`block * block_tokens + offset`) per row: in range and all different.
    pub fn new(shape: KvRegionShape, slot_mapping: &[i32]) -> Result<Self, KernelError> {
        shape.validate()?;
        let mut slots = Vec::with_capacity(slot_mapping.len());
        for (row, &slot) in slot_mapping.iter().enumerate() {
            slots.push(require_index("slot_mapping", row, slot, shape.slots())? as u32);
        }
        let mut sorted = slots.clone();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(KernelError::Duplicate { argument: "slot_mapping", value: i64::from(pair[0]) });
        }
        Ok(Self { shape, slots })
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.slots.len()
    }

    /// Geometry that the slots were checked against.
    pub const fn shape(&self) -> &KvRegionShape {
        &self.shape
    }

    /// Where a row's key of head 0 in a layer begins, and its scale, in elements. Heads are
    /// [`KvRegionShape::head_elements`] apart.
    pub fn key_offsets(&self, row: usize, layer: usize) -> (usize, usize) {
        let (block, token) =
            (self.slots[row] as usize / self.shape.block_tokens, self.slots[row] as usize % self.shape.block_tokens);
        let first = self.shape.layer_offset(block, layer);
        (first + self.shape.row_offset(token), first + self.shape.scale_offset(token))
    }
}

#[cfg(test)]
mod tests {
    use super::{KvRegionShape, SlotMapping};
    use crate::error::KernelError;
    use crate::kv_format::KvFormat;

    const SHAPE: KvRegionShape = KvRegionShape {
        blocks: 4,
        layers: 3,
        kv_heads: 2,
        block_tokens: 8,
        head_dim: 16,
        format: KvFormat::Activations,
    };

    #[test]
    fn offsets_follow_the_order_block_layer_part_head_token_dim() {
        assert_eq!(SHAPE.elements(), 4 * 3 * 2 * 2 * 8 * 16);
        let slots = SlotMapping::new(SHAPE, &[2 * 8 + 5]).unwrap();
        let (block, layer, part, head, token) = (2, 1, 1, 1, 5);
        let expected = ((((block * 3 + layer) * 2 + part) * 2 + head) * 8 + token) * 16;
        assert_eq!(slots.key_offsets(0, 1).0 + SHAPE.key_to_value() + SHAPE.head_elements(), expected);
    }

    #[test]
    fn scales_follow_the_rows_of_their_run_and_no_element_has_two_uses() {
        let shape = KvRegionShape { block_tokens: 32, format: KvFormat::Bytes, ..SHAPE };
        assert_eq!(shape.block_elements(), 3 * 2 * 2 * 32 * (16 + 4));
        let mut uses = vec![0; shape.elements()];
        let slots: Vec<i32> = (0..shape.slots() as i32).collect();
        let slots = SlotMapping::new(shape, &slots).unwrap();
        for row in 0..slots.rows() {
            for layer in 0..shape.layers {
                let (key, scale) = slots.key_offsets(row, layer);
                assert_eq!(scale - key, 8 * 16 - row % 8 * 16 + row % 8 * 4);
                for part in 0..2 * shape.kv_heads {
                    let further = part * shape.head_elements();
                    uses[key + further..][..16].iter_mut().for_each(|uses| *uses += 1);
                    uses[scale + further..][..4].iter_mut().for_each(|uses| *uses += 1);
                }
            }
        }
        assert!(uses.iter().all(|&uses| uses == 1));
    }

    #[test]
    fn a_slot_outside_the_region_or_used_twice_is_refused() {
        let error = SlotMapping::new(SHAPE, &[0, 32]).unwrap_err();
        assert_eq!(error, KernelError::OutOfRange { argument: "slot_mapping", position: 1, value: 32, limit: 32 });
        assert!(matches!(SlotMapping::new(SHAPE, &[-1]), Err(KernelError::OutOfRange { .. })));
        let error = SlotMapping::new(SHAPE, &[3, 7, 3]).unwrap_err();
        assert_eq!(error, KernelError::Duplicate { argument: "slot_mapping", value: 3 });
    }

    #[test]
    fn unsupported_geometries_are_refused_with_the_rule() {
        for (shape, argument) in [
            (KvRegionShape { block_tokens: 12, ..SHAPE }, "block_tokens"),
            (KvRegionShape { block_tokens: 4, ..SHAPE }, "block_tokens"),
            (KvRegionShape { head_dim: 36, ..SHAPE }, "head_dim"),
            (KvRegionShape { head_dim: 264, ..SHAPE }, "head_dim"),
            (KvRegionShape { kv_heads: 0, ..SHAPE }, "kv_heads"),
            (KvRegionShape { layers: 0, ..SHAPE }, "layers"),
            (KvRegionShape { blocks: usize::MAX / 8, ..SHAPE }, "blocks"),
        ] {
            match shape.validate() {
                Err(KernelError::Unsupported { argument: given, .. }) => assert_eq!(given, argument),
                other => panic!("{shape:?} gave {other:?}"),
            }
        }
    }
}
