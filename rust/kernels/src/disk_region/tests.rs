//! The file against a host region beside it: what comes back, and everything that must not.

use super::*;
use proptest::prelude::*;

pub(crate) const BLOCK_BYTES: usize = 10_000;
const BLOCKS: u32 = 4;

/// A folder with the host's memory and the file.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("llmscale-disk-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let memory = File::create(path.join("host")).unwrap();
        memory.set_len(HostRegion::bytes_for(BLOCKS, BLOCK_BYTES).unwrap() as u64).unwrap();
        Self(path)
    }

    pub(crate) fn host(&self, layout: u64) -> HostRegion {
        HostRegion::open(&self.0.join("host"), BLOCKS, BLOCK_BYTES, layout, 3).unwrap()
    }

    pub(crate) fn disk(&self, layout: u64, fresh: u64) -> Result<DiskRegion, DiskError> {
        DiskRegion::open(&self.path(), BLOCKS, BLOCK_BYTES, layout, fresh)
    }

    fn path(&self) -> PathBuf {
        self.0.join("disk")
    }

    fn flip(&self, byte: u64) {
        let file = File::options().read(true).write(true).open(self.path()).unwrap();
        let mut old = [0];
        file.read_exact_at(&mut old, byte).unwrap();
        file.write_all_at(&[old[0] ^ 4], byte).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

pub(crate) fn block(seed: u8) -> Vec<u8> {
    (0..BLOCK_BYTES).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn blocks_come_back_in_the_next_process_and_under_their_tag_alone() {
    let folder = Folder::new("kept");
    let mut host = folder.host(9);
    host.offload(2, 77, &block(1));
    let first = folder.disk(9, 11).unwrap();
    assert_eq!(first.write(3, 78, &host, 2), Err(TransferError::Bad), "the host holds another content");
    assert_eq!(first.write(3, 77, &host, 2), Ok(()));
    drop(first);
    let second = folder.disk(9, 12).unwrap();
    assert_eq!(second.incarnation(), 11);
    assert_eq!(second.read(3, 78, &mut host, 0), Err(TransferError::Bad));
    assert_eq!(second.read(2, 77, &mut host, 0), Err(TransferError::Bad), "nothing was ever put there");
    let mut back = vec![0; BLOCK_BYTES];
    assert!(!host.restore(0, 77, &mut back));
    assert_eq!(second.read(3, 77, &mut host, 0), Ok(()));
    assert!(host.restore(0, 77, &mut back) && back == block(1));
}

#[test]
fn another_layout_finds_an_empty_file_of_another_incarnation() {
    let folder = Folder::new("layout");
    let mut host = folder.host(9);
    host.offload(0, 5, &block(1));
    folder.disk(9, 11).unwrap().write(0, 5, &host, 0).unwrap();
    let other = folder.disk(10, 12).unwrap();
    assert_eq!((other.incarnation(), other.read(0, 5, &mut host, 1)), (12, Err(TransferError::Bad)));
}

#[test]
fn the_file_is_of_this_user_alone_of_a_fixed_size_and_takes_no_room_before_it_is_written() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new("mode");
    let disk = folder.disk(9, 11).unwrap();
    let facts = std::fs::metadata(folder.path()).unwrap();
    assert_eq!((facts.mode() & 0o777, facts.len()), (0o600, 4096 + 4 * 12_288));
    assert!(facts.blocks() * 512 <= 4096);
    drop(disk);
}

#[test]
fn a_file_that_another_has_open_is_not_waited_for_for_ever() {
    let folder = Folder::new("taken");
    let _owner = folder.disk(9, 11).unwrap();
    let file = File::open(folder.path()).unwrap();
    assert_eq!(lock(&file).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let said = DiskError::Taken { path: folder.path() }.to_string();
    assert!(said.contains("belongs to another process; give every node a folder of its own"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_flipped_bit_of_a_place_is_noticed(at in 0..HEADER_BYTES + BLOCK_BYTES) {
        let folder = Folder::new("flip");
        let mut host = folder.host(9);
        host.offload(1, 9, &block(3));
        let disk = folder.disk(9, 11).unwrap();
        disk.write(1, 9, &host, 1).unwrap();
        folder.flip(disk.place(1) + at as u64);
        prop_assert_eq!(disk.read(1, 9, &mut host, 2), Err(TransferError::Bad));
        prop_assert!(!host.restore(2, 9, &mut vec![0; BLOCK_BYTES]));
    }
}
