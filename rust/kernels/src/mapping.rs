//! A file that this process has mapped together with others: memory that ranks share, or that outlives a worker. Words of it
//! are atomics, the rest is reached by address under its owner's rules. Knows nothing of what it holds.
#![expect(unsafe_code, reason = "memory that other processes write")]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Words that are polled have lines of their own: one that all write would travel between cores with every poll.
pub(crate) const LINE_BYTES: usize = 128;

/// Why memory cannot be had.
#[derive(Debug)]
pub enum MappingError {
    /// The file cannot be opened or mapped.
    File(std::io::Error),
    /// It has another size than is needed.
    Size {
        /// Bytes that it has.
        given: u64,
        /// Bytes that it should have.
        needed: usize,
    },
}

impl std::fmt::Display for MappingError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(error) => write!(out, "shared memory cannot be mapped: {error}"),
            Self::Size { given, needed } => {
                write!(out, "shared memory has {given} bytes, {needed} are needed; both sides need the same sizes")
            }
        }
    }
}

impl std::error::Error for MappingError {}

/// A file that is mapped as long as this value lives.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value and is unmapped by it alone; whoever writes through it holds it mutably.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference only atomics are used, addresses are computed, and pages are made.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a file of exactly `needed` bytes.
    pub(crate) fn open(path: &Path, needed: usize) -> Result<Self, MappingError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(MappingError::File)?;
        let given = file.metadata().map_err(MappingError::File)?.len();
        if given != needed as u64 {
            return Err(MappingError::Size { given, needed });
        }
        // SAFETY: a new mapping of a file that is long enough; the address is chosen by the kernel.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                needed,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(MappingError::File(std::io::Error::last_os_error()));
        }
        Ok(Self { start: start.cast(), bytes: needed })
    }

    /// The word at the beginning of a line, which is only ever used as an atomic.
    pub(crate) fn line(&self, index: usize) -> &AtomicU32 {
        assert!((index + 1) * LINE_BYTES <= self.bytes, "a line lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        let line = unsafe { self.start.add(index * LINE_BYTES) };
        #[expect(clippy::cast_ptr_alignment, reason = "mappings are aligned to pages and lines to 128 bytes")]
        let word = line.cast::<AtomicU32>();
        // SAFETY: valid and aligned, and only ever used as an atomic.
        unsafe { &*word }
    }

    /// A word of 64 bits, counted from the beginning, which is only ever used as an atomic.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.bytes, "a word lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        let word = unsafe { self.start.add(index * 8) };
        #[expect(clippy::cast_ptr_alignment, reason = "mappings are aligned to pages and words to their size")]
        let word = word.cast::<AtomicU64>();
        // SAFETY: valid and aligned, and only ever used as an atomic.
        unsafe { &*word }
    }

    /// Bytes of the whole file.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has the pages of `bytes` bytes at an offset made, which changes nothing that they hold. False if the system cannot.
    pub(crate) fn populate(&self, offset: usize, bytes: usize) -> bool {
        let room = self.room(offset, bytes);
        // SAFETY: inside the mapping; pages that are there stay as they are.
        unsafe { libc::madvise(room.cast(), bytes, libc::MADV_POPULATE_WRITE) == 0 }
    }

    /// The address of `bytes` bytes at an offset, aligned to lines.
    pub(crate) fn room(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset.is_multiple_of(LINE_BYTES), "a room begins with a line");
        assert!(offset + bytes <= self.bytes, "a room lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `open`, which nothing refers to any more.
        let outcome = unsafe { libc::munmap(self.start.cast(), self.bytes) };
        assert!(outcome == 0 || std::thread::panicking(), "the mapping was ours");
    }
}
