//! The disk tier of one rank: a sparse file of a fixed size with a header and the bytes of one KV block per place, which
//! outlives processes. The checksum is the one that the bytes got when they left the device, carried along: what is torn,
//! flipped, of another content or of another layout does not agree. The file belongs to one process at a time. Linear in the
//! bytes. Knows no tokens, and not which block belongs to whom.

use crate::host_region::HostRegion;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Places begin with a page.
const PAGE_BYTES: u64 = 4096;
/// The file begins with a page that says what it is.
const PREFACE_BYTES: u64 = PAGE_BYTES;
const WORDS: usize = 5;
/// A place begins with its header.
const HEADER_BYTES: usize = 4 * 8;
/// "llmscale" in ASCII, then the number of this format.
const MAGIC: u64 = u64::from_be_bytes(*b"llmscale") ^ 0x0100;
/// A process that was killed lets go of the file with its last descriptor.
const MAX_WAIT_FOR_OWNER: Duration = Duration::from_secs(10);

/// Why there is no disk tier.
#[derive(Debug)]
pub enum DiskError {
    /// The file cannot be had.
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// Another process has it.
    Taken {
        /// Which.
        path: PathBuf,
    },
    /// No file is as large as that.
    TooLarge,
}

impl std::fmt::Display for DiskError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path, error } => write!(out, "the disk tier's file {} cannot be had: {error}", path.display()),
            Self::Taken { path } => {
                let path = path.display();
                write!(
                    out,
                    "the disk tier's file {path} belongs to another process; give every node a folder of its own"
                )
            }
            Self::TooLarge => write!(out, "the disk tier has no room in any file; lower kv_disk_bytes"),
        }
    }
}

impl std::error::Error for DiskError {}

/// How a transfer ended that did not do what it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TransferError {
    /// The source does not hold what it should.
    Bad,
    /// The system refused.
    Refused(std::io::ErrorKind),
}

/// See the file's header.
#[derive(Debug)]
pub struct DiskRegion {
    file: File,
    blocks: u32,
    block_bytes: usize,
    layout: u64,
    incarnation: u64,
}

impl DiskRegion {
    /// Opens or makes `path`, for this process alone. If it holds blocks of this layout, they are kept, and the incarnation
    /// with them; else it is empty, and `fresh`, which is not 0, is its incarnation. `layout` stands for everything that
    /// gives the bytes their meaning.
    pub fn open(path: &Path, blocks: u32, block_bytes: usize, layout: u64, fresh: u64) -> Result<Self, DiskError> {
        let failed = |error| DiskError::File { path: path.to_path_buf(), error };
        let size = size_for(blocks, block_bytes).ok_or(DiskError::TooLarge)?;
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
        take(&file, path)?;
        let mut region = Self { file, blocks, block_bytes, layout, incarnation: fresh };
        let expected = [MAGIC, layout, u64::from(blocks), block_bytes as u64];
        let length = region.file.metadata().map_err(failed)?.len();
        if length == size {
            let mut found = [0; 8 * WORDS];
            region.file.read_exact_at(&mut found, 0).map_err(failed)?;
            let found: [u64; WORDS] = words(&found);
            if found[..4] == expected && found[4] != 0 {
                region.incarnation = found[4];
                return Ok(region);
            }
        }
        // Emptied first: places of another layout may look like places of this one.
        region.file.set_len(0).map_err(failed)?;
        region.file.set_len(size).map_err(failed)?;
        let [magic, layout, blocks, block_bytes] = expected;
        let preface = bytes(&[magic, layout, blocks, block_bytes, fresh]);
        region.file.write_all_at(&preface, 0).map_err(failed)?;
        Ok(region)
    }

    /// Blocks that it has room for.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Another file has another number.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Writes what a block on the host holds under a tag.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn write(&self, disk: u32, tag: u64, host: &HostRegion, from: u32) -> Result<(), TransferError> {
        let at = self.place(disk);
        let (bytes_of_block, sum) = host.held(from, tag).ok_or(TransferError::Bad)?;
        // The header comes last: until then the one before does not agree with the bytes.
        let written = self.file.write_all_at(bytes_of_block, at + HEADER_BYTES as u64);
        let header = bytes(&[MAGIC, self.layout, tag, sum]);
        let written = written.and_then(|()| self.file.write_all_at(&header, at));
        written.map_err(|error| TransferError::Refused(error.kind()))
    }

    /// Reads a place into a block on the host, which holds it under the tag then; or nothing, if the place does not.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn read(&self, disk: u32, tag: u64, host: &mut HostRegion, into: u32) -> Result<(), TransferError> {
        let at = self.place(disk);
        let mut header = [0; HEADER_BYTES];
        let refused = |error: std::io::Error| TransferError::Refused(error.kind());
        let header_read = self.file.read_exact_at(&mut header, at).map_err(refused);
        let [magic, layout, found, sum] = words(&header);
        let fits = header_read.is_ok() && (magic, layout, found) == (MAGIC, self.layout, tag) && sum != 0;
        let file = &self.file;
        let read = host.fill(into, tag, sum, |room| {
            if fits {
                file.read_exact_at(room, at + HEADER_BYTES as u64).map_err(refused)
            } else {
                Err(TransferError::Bad)
            }
        });
        header_read?;
        read?.then_some(()).ok_or(TransferError::Bad)
    }

    fn place(&self, disk: u32) -> u64 {
        assert!(disk < self.blocks, "disk block {disk} is one of {}", self.blocks);
        PREFACE_BYTES + stride(self.block_bytes).expect("it was checked when the file was opened") * u64::from(disk)
    }
}

fn stride(block_bytes: usize) -> Option<u64> {
    (block_bytes as u64).checked_add(HEADER_BYTES as u64)?.checked_next_multiple_of(PAGE_BYTES)
}

/// Bytes that one block takes in the file; `None` if no file has room for it.
pub fn place_bytes(block_bytes: usize) -> Option<u64> {
    stride(block_bytes)
}

fn size_for(blocks: u32, block_bytes: usize) -> Option<u64> {
    let places = stride(block_bytes)?.checked_mul(u64::from(blocks))?;
    places.checked_add(PREFACE_BYTES).filter(|&size| i64::try_from(size).is_ok())
}

/// Makes the file this process's own, once the one before has let go of it.
fn take(file: &File, path: &Path) -> Result<(), DiskError> {
    let deadline = Instant::now() + MAX_WAIT_FOR_OWNER;
    loop {
        match lock(file) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                return Err(DiskError::File { path: path.to_path_buf(), error });
            }
            Err(_) if Instant::now() >= deadline => return Err(DiskError::Taken { path: path.to_path_buf() }),
            Err(_) => std::thread::park_timeout(Duration::from_millis(10)),
        }
    }
}

#[expect(unsafe_code, reason = "the standard library has no lock that says who has it without waiting")]
fn lock(file: &File) -> std::io::Result<()> {
    // SAFETY: a descriptor that is open as long as `file` is.
    let outcome = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if outcome == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    std::array::from_fn(|index| {
        u64::from_le_bytes(bytes[8 * index..8 * index + 8].try_into().expect("eight bytes were taken"))
    })
}

#[cfg(test)]
pub(crate) mod tests;
