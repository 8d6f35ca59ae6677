//! The memory of keys and values. Its size is reserved when a program is made and its pages come as they are written, so that
//! a start does not wait for gigabytes of zeros and an idle server does not hold them; a slot that was never written reads
//! as zero all the same. Blocks are first handed out in ascending order, so a thread makes the next pages while steps have
//! not come that far. Whoever makes a program has seen to it that the machine has the memory. O(rows) per step. It does
//! not know whose a block is.

use crate::error::LoadError;
use llmscale_kernels::huge_pages::{HugeArray, Number};
use llmscale_kernels::kv_region::KvRegionShape;
use llmscale_kernels::touch_ahead::{Ahead, TouchAhead};
use std::ops::{Deref, DerefMut};

/// A prompt of 512 tokens of a small model writes 12 MiB, and lost a quarter of its speed to pages that nobody had made yet:
/// the first prompts find theirs, and so do bursts between which the thread comes to run.
const AHEAD: Ahead = Ahead { unused_bytes: 64 << 20, used_bytes: 256 << 20 };

/// The array of a [`KvRegionShape`], of its stored elements.
#[derive(Debug)]
pub struct KvMemory<T> {
    elements: HugeArray<T>,
    block_tokens: usize,
    touch: TouchAhead,
}

impl<T: Number> KvMemory<T> {
    /// Reserves it, all zero.
    pub fn new(shape: &KvRegionShape) -> Result<Self, LoadError> {
        shape.validate()?;
        let refused = |what| move |problem| LoadError::Memory { what, problem };
        let elements = HugeArray::zeroed(shape.elements()).map_err(refused("the KV region"))?;
        let block_bytes = shape.block_elements() * size_of::<T>();
        let pages = elements.pages();
        let make = move |block: u32| pages.touch(block as usize * block_bytes, block_bytes);
        let touch = TouchAhead::start(shape.blocks as u32, block_bytes, AHEAD, make);
        let touch = touch.map_err(refused("the thread that makes pages of the KV region"))?;
        Ok(Self { elements, block_tokens: shape.block_tokens, touch })
    }

    /// A step writes these slots.
    pub fn reached(&self, slots: &[i32]) {
        if let Some(furthest) = slots.iter().copied().max().and_then(|slot| usize::try_from(slot).ok()) {
            self.touch.reached((furthest / self.block_tokens) as u32);
        }
    }
}

impl<T> Deref for KvMemory<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.elements
    }
}

impl<T> DerefMut for KvMemory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.elements
    }
}

#[cfg(test)]
mod tests {
    use super::KvMemory;
    use llmscale_kernels::kv_format::KvFormat;
    use llmscale_kernels::kv_region::KvRegionShape;

    #[test]
    fn what_is_written_stays_while_pages_are_made_and_the_rest_is_zero() {
        let format = KvFormat::Activations;
        let shape = KvRegionShape { blocks: 300, layers: 2, kv_heads: 2, block_tokens: 32, head_dim: 64, format };
        let mut memory = KvMemory::<f32>::new(&shape).unwrap();
        let elements = memory.len() / shape.blocks;
        for block in 0..shape.blocks {
            memory[block * elements..][..elements / 2].fill(block as f32);
            memory.reached(&[0, (block * shape.block_tokens) as i32, -1]);
        }
        for (block, values) in memory.chunks_exact(elements).enumerate() {
            assert!(values[..elements / 2].iter().all(|value| value.to_bits() == (block as f32).to_bits()));
            assert!(values[elements / 2..].iter().all(|value| value.to_bits() == 0));
        }
    }
}
