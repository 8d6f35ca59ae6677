//! The same memory where a device makes the copies by itself, whenever it comes to them: a block is cleared before its copy
//! begins, sealed when it has ended and checked before it is copied back. So a header is there only for bytes that are,
//! however late that is. Hashing reads memory once; whoever calls knows when a copy has begun and ended.

use super::{HostRegion, checksum};
use std::sync::atomic::Ordering;

impl HostRegion {
    /// The whole mapping, for a device to register.
    pub fn memory(&self) -> (usize, usize) {
        (self.mapping.room(0, self.mapping.bytes()) as usize, self.mapping.bytes())
    }

    /// Address of a block's bytes.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn address(&self, host: u32) -> usize {
        self.room(host) as usize
    }

    /// A copy to this block is about to begin: it holds nothing.
    pub fn clear(&mut self, host: u32) {
        let [_, sum] = self.header(host);
        sum.store(0, Ordering::SeqCst);
    }

    /// A copy to this block has ended: it holds what a tag stands for.
    pub fn seal(&mut self, host: u32, tag: u64) {
        let sum = self.hash(host, tag);
        let [header_tag, header_sum] = self.header(host);
        header_tag.store(tag, Ordering::SeqCst);
        header_sum.store(sum, Ordering::SeqCst);
    }

    /// Whether the block holds what was sealed under this tag.
    #[must_use]
    pub fn agrees(&self, host: u32, tag: u64) -> bool {
        let [header_tag, header_sum] = self.header(host);
        let sum = header_sum.load(Ordering::SeqCst);
        sum != 0 && header_tag.load(Ordering::SeqCst) == tag && self.hash(host, tag) == sum
    }

    fn hash(&self, host: u32, tag: u64) -> u64 {
        // SAFETY: a block inside the mapping; the device that writes such blocks is done with this one.
        let bytes = unsafe { std::slice::from_raw_parts(self.room(host).cast_const(), self.block_bytes) };
        checksum(bytes, self.layout ^ tag)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Memory, block};

    fn write(region: &super::HostRegion, host: u32, bytes: &[u8]) {
        // SAFETY: a block of the test's own mapping, and nobody else uses it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), region.address(host) as *mut u8, bytes.len()) }
    }

    #[test]
    fn what_a_device_has_copied_comes_back_by_either_way() {
        let memory = Memory::new("sealed", 40_000);
        let mut region = memory.open(9, 11);
        region.clear(2);
        write(&region, 2, &block(40_000, 1));
        assert!(!region.agrees(2, 77), "not before it is sealed");
        region.seal(2, 77);
        assert!(region.agrees(2, 77));
        assert!(!region.agrees(2, 78), "another content was asked for");
        let mut back = vec![0; 40_000];
        assert!(region.restore(2, 77, &mut back), "a processor copies it as well");
        region.offload(1, 5, &block(40_000, 2));
        assert!(region.agrees(1, 5), "and what a processor has copied is sealed already");
    }

    #[test]
    fn a_seal_from_before_the_copy_ended_does_not_agree() {
        let memory = Memory::new("early", 64);
        let mut region = memory.open(9, 11);
        region.clear(0);
        region.seal(0, 5);
        write(&region, 0, &[3; 64]);
        assert!(!region.agrees(0, 5));
        region.clear(0);
        assert!(!region.agrees(0, 5));
    }
}
