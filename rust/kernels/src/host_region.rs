//! The host tier's memory as one rank sees it: a header and the bytes of one KV block per place, in a file without a name
//! that outlives workers. A block is hashed while it is copied (xxh3, Collet), so a check costs no second pass over memory.
//! A header is cleared before its bytes change and written after them: what a death cut off does not agree. Linear in the
//! bytes; one writer at a time. Knows no tokens, and not which block belongs to whom.
#![expect(unsafe_code, reason = "memory that outlives the process is reached by address")]

mod by_device;

use crate::mapping::{LINE_BYTES, Mapping, MappingError};
use crate::touch_ahead::{Ahead, TouchAhead};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// Copied, then hashed, while it is in the first cache.
const PIECE_BYTES: usize = 16 << 10;
/// Blocks begin with a page, as devices that copy by themselves like it.
const PAGE_BYTES: usize = 4096;
/// The file begins with a line that says what it is; then come the headers.
const PREFACE_WORDS: usize = LINE_BYTES / 8;
const HEADER_WORDS: usize = 2;
/// "llmscale" in ASCII, then the number of this format.
const MAGIC: u64 = u64::from_be_bytes(*b"llmscale") ^ 1;

/// See the file's header.
#[derive(Debug)]
pub struct HostRegion {
    mapping: Arc<Mapping>,
    blocks: u32,
    block_bytes: usize,
    layout: u64,
    incarnation: u64,
}

/// Two conversations of 2,000 tokens of a small model, a third of a second of zeroing; little of a tier that may never be
/// needed.
const AHEAD: Ahead = Ahead { unused_bytes: 8 << 20, used_bytes: 128 << 20 };

/// Words of the preface.
enum Preface {
    Magic,
    Layout,
    Blocks,
    BlockBytes,
    Incarnation,
}

impl HostRegion {
    /// Size of the file. `None` for empty blocks, and if no address space has room for it.
    pub fn bytes_for(blocks: u32, block_bytes: usize) -> Option<usize> {
        let data = stride(block_bytes).filter(|&bytes| bytes > 0)?.checked_mul(blocks as usize)?;
        data.checked_add(data_start(blocks)).filter(|&bytes| isize::try_from(bytes).is_ok())
    }

    /// Maps `path`, a file of `bytes_for` bytes. If it holds blocks of this layout, they are kept, and the incarnation
    /// with them; else it is empty, and `fresh`, which is not 0, is its incarnation. `layout` stands for everything that
    /// gives the bytes their meaning.
    ///
    /// # Panics
    /// If `bytes_for` has no answer.
    pub fn open(path: &Path, blocks: u32, block_bytes: usize, layout: u64, fresh: u64) -> Result<Self, MappingError> {
        let needed = Self::bytes_for(blocks, block_bytes).expect("the file was made by the same sizes");
        let mapping = Arc::new(Mapping::open(path, needed)?);
        let mut region = Self { mapping, blocks, block_bytes, layout, incarnation: fresh };
        let expected = [MAGIC, layout, u64::from(blocks), block_bytes as u64];
        let found = region.word(Preface::Incarnation as usize).load(Ordering::Acquire);
        if found != 0 && (0..4).all(|place| region.word(place).load(Ordering::Relaxed) == expected[place]) {
            region.incarnation = found;
            return Ok(region);
        }
        region.word(Preface::Incarnation as usize).store(0, Ordering::Release);
        for word in PREFACE_WORDS..PREFACE_WORDS + HEADER_WORDS * blocks as usize {
            region.word(word).store(0, Ordering::Relaxed);
        }
        for (place, value) in
            [Preface::Magic, Preface::Layout, Preface::Blocks, Preface::BlockBytes].into_iter().zip(expected)
        {
            region.word(place as usize).store(value, Ordering::Relaxed);
        }
        region.word(Preface::Incarnation as usize).store(fresh, Ordering::Release);
        Ok(region)
    }

    /// Blocks of the region.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Another memory has another number.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Has pages made ahead of copies.
    ///
    /// # Errors
    /// The operating system's, where it starts no thread.
    pub fn touch_ahead(&self) -> std::io::Result<TouchAhead> {
        let stride = stride(self.block_bytes).expect("it was checked when the file was opened");
        let (mapping, start) = (Arc::clone(&self.mapping), data_start(self.blocks));
        let touch = move |block: u32| mapping.populate(start + stride * block as usize, stride);
        TouchAhead::start(self.blocks, stride, AHEAD, touch)
    }

    /// Copies a block here, under a tag.
    ///
    /// # Panics
    /// If there is no such block, or `source` is not one.
    pub fn offload(&mut self, host: u32, tag: u64, source: &[u8]) {
        assert_eq!(source.len(), self.block_bytes, "a whole block is copied");
        let [header_tag, header_sum] = self.header(host);
        header_sum.store(0, Ordering::SeqCst);
        header_tag.store(tag, Ordering::SeqCst);
        let room = self.room(host);
        // SAFETY: a block inside the mapping, which nobody else touches while this value is held mutably.
        let target = unsafe { std::slice::from_raw_parts_mut(room, self.block_bytes) };
        let sum = copy_and_hash(source, target, self.layout ^ tag);
        header_sum.store(sum, Ordering::SeqCst);
    }

    /// Copies a block back. False if it does not hold what was put there under this tag: then `target` holds nothing of use.
    ///
    /// # Panics
    /// If there is no such block, or `target` is not one.
    #[must_use]
    pub fn restore(&self, host: u32, tag: u64, target: &mut [u8]) -> bool {
        assert_eq!(target.len(), self.block_bytes, "a whole block is copied");
        let [header_tag, header_sum] = self.header(host);
        let sum = header_sum.load(Ordering::SeqCst);
        if sum == 0 || header_tag.load(Ordering::SeqCst) != tag {
            return false;
        }
        // SAFETY: a block inside the mapping, which is written only while this value is held mutably.
        let source = unsafe { std::slice::from_raw_parts(self.room(host).cast_const(), self.block_bytes) };
        copy_and_hash(source, target, self.layout ^ tag) == sum
    }

    /// The bytes of a block and their checksum, if it holds something under this tag. Whether they agree is not looked at.
    pub(crate) fn held(&self, host: u32, tag: u64) -> Option<(&[u8], u64)> {
        let [header_tag, header_sum] = self.header(host);
        let sum = header_sum.load(Ordering::SeqCst);
        // SAFETY: a block inside the mapping, which nobody writes while a transfer is about it.
        let bytes = unsafe { std::slice::from_raw_parts(self.room(host).cast_const(), self.block_bytes) };
        (sum != 0 && header_tag.load(Ordering::SeqCst) == tag).then_some((bytes, sum))
    }

    /// Has `read` write a block's bytes, which it holds under this tag from then on if they have this checksum. Returns
    /// whether they have.
    pub(crate) fn fill<E>(
        &mut self,
        host: u32,
        tag: u64,
        sum: u64,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let [header_tag, header_sum] = self.header(host);
        header_sum.store(0, Ordering::SeqCst);
        header_tag.store(tag, Ordering::SeqCst);
        // SAFETY: a block inside the mapping, which nobody else touches while a transfer is about it.
        let room = unsafe { std::slice::from_raw_parts_mut(self.room(host), self.block_bytes) };
        read(room)?;
        let found = checksum(room, self.layout ^ tag);
        if found == sum {
            header_sum.store(sum, Ordering::SeqCst);
        }
        Ok(found == sum)
    }

    fn header(&self, host: u32) -> [&AtomicU64; 2] {
        assert!(host < self.blocks, "host block {host} is one of {}", self.blocks);
        let word = PREFACE_WORDS + HEADER_WORDS * host as usize;
        [self.word(word), self.word(word + 1)]
    }

    fn room(&self, host: u32) -> *mut u8 {
        assert!(host < self.blocks, "host block {host} is one of {}", self.blocks);
        let stride = stride(self.block_bytes).expect("it was checked when the file was opened");
        self.mapping.room(data_start(self.blocks) + stride * host as usize, self.block_bytes)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.mapping.word(index)
    }
}

fn stride(block_bytes: usize) -> Option<usize> {
    block_bytes.checked_next_multiple_of(PAGE_BYTES)
}

fn data_start(blocks: u32) -> usize {
    ((PREFACE_WORDS + HEADER_WORDS * blocks as usize) * 8).next_multiple_of(PAGE_BYTES)
}

/// The hash of bytes that are there, as `copy_and_hash` makes it on the way.
fn checksum(bytes: &[u8], seed: u64) -> u64 {
    xxh3_64_with_seed(bytes, seed).max(1)
}

/// The hash of what was copied; never 0, which is what a header without bytes has.
fn copy_and_hash(source: &[u8], target: &mut [u8], seed: u64) -> u64 {
    let mut hash = Xxh3::with_seed(seed);
    for (from, to) in source.chunks(PIECE_BYTES).zip(target.chunks_mut(PIECE_BYTES)) {
        to.copy_from_slice(from);
        // What was written is hashed, not what was read: a bad copy does not agree with its own bytes.
        hash.update(to);
    }
    hash.digest().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    const BLOCKS: u32 = 4;

    pub(super) struct Memory {
        path: PathBuf,
        block_bytes: usize,
    }

    impl Memory {
        pub(super) fn new(name: &str, block_bytes: usize) -> Self {
            let path = std::env::temp_dir().join(format!("llmscale-host-region-{}-{name}", std::process::id()));
            let file = File::create(&path).unwrap();
            file.set_len(HostRegion::bytes_for(BLOCKS, block_bytes).unwrap() as u64).unwrap();
            Self { path, block_bytes }
        }

        pub(super) fn open(&self, layout: u64, fresh: u64) -> HostRegion {
            HostRegion::open(&self.path, BLOCKS, self.block_bytes, layout, fresh).unwrap()
        }

        fn flip(&self, byte: u64) {
            let file = File::options().read(true).write(true).open(&self.path).unwrap();
            let mut old = [0];
            file.read_exact_at(&mut old, byte).unwrap();
            file.write_all_at(&[old[0] ^ 4], byte).unwrap();
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            std::fs::remove_file(&self.path).unwrap();
        }
    }

    pub(super) fn block(bytes: usize, seed: u8) -> Vec<u8> {
        (0..bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    #[test]
    fn blocks_come_back_in_the_next_process_and_under_their_tag_alone() {
        let memory = Memory::new("kept", 50_000);
        let mut first = memory.open(9, 11);
        first.offload(2, 77, &block(50_000, 1));
        drop(first);
        let second = memory.open(9, 12);
        assert_eq!((second.incarnation(), second.blocks(), second.block_bytes()), (11, BLOCKS, 50_000));
        let mut back = vec![0; 50_000];
        assert!(second.restore(2, 77, &mut back));
        assert!(back == block(50_000, 1));
        assert!(!second.restore(2, 78, &mut back), "another content was asked for");
        assert!(!second.restore(1, 77, &mut back), "nothing was ever put there");
    }

    #[test]
    fn another_layout_finds_an_empty_region_of_another_incarnation() {
        let memory = Memory::new("layout", 128);
        memory.open(9, 11).offload(0, 5, &block(128, 1));
        let other = memory.open(10, 12);
        assert_eq!(other.incarnation(), 12);
        assert!(!other.restore(0, 5, &mut [0; 128]));
    }

    #[test]
    fn a_copy_that_was_cut_off_does_not_agree() {
        let memory = Memory::new("torn", 64);
        let mut region = memory.open(1, 1);
        region.offload(3, 5, &[7; 64]);
        let [_, sum] = region.header(3);
        sum.store(0, Ordering::SeqCst);
        assert!(!region.restore(3, 5, &mut [0; 64]));
    }

    #[test]
    fn a_file_of_another_size_is_refused_with_both_sizes() {
        let memory = Memory::new("size", 64);
        File::options().append(true).open(&memory.path).unwrap().write_all(&[0]).unwrap();
        let error = HostRegion::open(&memory.path, BLOCKS, 64, 1, 1).unwrap_err().to_string();
        assert!(error.contains("has 20481 bytes, 20480 are needed"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_flipped_bit_of_a_block_is_noticed(block_bytes in 1_usize..40_000, at in any::<prop::sample::Index>()) {
            let memory = Memory::new("flip", block_bytes);
            let mut region = memory.open(3, 4);
            region.offload(1, 9, &block(block_bytes, 3));
            let start = data_start(BLOCKS) + stride(block_bytes).unwrap();
            memory.flip((start + at.index(block_bytes)) as u64);
            prop_assert!(!region.restore(1, 9, &mut vec![0; block_bytes]));
        }
    }
}
