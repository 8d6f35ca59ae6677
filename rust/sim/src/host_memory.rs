//! The host tier's memory of a simulated node: what each of its blocks holds, and under which tag. It outlives workers. A
//! copy that a worker's death cut off, and a bit that flipped, leave a block whose checksum does not agree. O(tokens) per
//! copied block. Knows nothing of who asks for copies.

use llmscale_types::{BlockCopy, CopyDirection, HostBlockId, Planted};

/// The KV of one block's positions.
type Values = Vec<Option<u64>>;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct HostBlock {
    pub(crate) tag: u64,
    pub(crate) values: Values,
    /// The bytes are those that the checksum was made of.
    pub(crate) intact: bool,
}

impl HostBlock {
    /// One bit of it flips.
    pub(crate) fn flip(&mut self) {
        self.intact = false;
        if let Some(value) = self.values.first_mut() {
            *value = value.map(|value| value ^ 1);
        }
    }
}

/// See the file's header.
#[derive(Clone, Debug)]
pub struct HostMemory {
    /// Which memory it is: another one has another number.
    incarnation: u64,
    blocks: Vec<Option<HostBlock>>,
}

impl HostMemory {
    /// Empty memory.
    pub fn new(host_blocks: u32, incarnation: u64) -> Self {
        Self { incarnation, blocks: vec![None; host_blocks as usize] }
    }

    /// Blocks of it.
    pub fn blocks(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Its number.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// What one of its blocks holds.
    pub(crate) fn block(&mut self, host: HostBlockId) -> &mut Option<HostBlock> {
        &mut self.blocks[host.index()]
    }

    /// Makes copies in order. Returns the blocks that do not hold what they should; these are not copied.
    pub(crate) fn copy(
        &mut self,
        copies: &[BlockCopy],
        device: &mut [Option<u64>],
        block_tokens: usize,
    ) -> Vec<HostBlockId> {
        let mut bad = Vec::new();
        for copy in copies {
            let start = copy.block.index() * block_tokens;
            let values = &mut device[start..start + block_tokens];
            let host = &mut self.blocks[copy.host.index()];
            match copy.direction {
                CopyDirection::Offload => {
                    *host = Some(HostBlock { tag: copy.tag, values: values.to_vec(), intact: true });
                }
                CopyDirection::Restore => match host {
                    Some(host) if (host.intact && host.tag == copy.tag) || Planted::LooksAtNoHeader.is_here() => {
                        values.copy_from_slice(&host.values);
                    }
                    _ => bad.push(copy.host),
                },
            }
        }
        bad
    }

    /// Copies outwards were cut off in their middle.
    pub(crate) fn tear(&mut self, copies: &[BlockCopy]) {
        for copy in copies.iter().filter(|copy| copy.direction == CopyDirection::Offload) {
            let values = vec![None; 0];
            self.blocks[copy.host.index()] = Some(HostBlock { tag: copy.tag, values, intact: false });
        }
    }

    /// A bit flips in the first block from `place` on that holds something. Returns whether there is one.
    pub fn flip(&mut self, place: usize) -> bool {
        let middle = place.min(self.blocks.len());
        let (before, behind) = self.blocks.split_at_mut(middle);
        let Some(block) = behind.iter_mut().chain(before).flatten().find(|block| block.intact) else { return false };
        block.flip();
        true
    }
}
