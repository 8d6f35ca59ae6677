//! What a disk tier holds, kept beside its files: one record of a fixed size per place, with a keyed checksum that covers the
//! place's number too. Records are written behind the engine by a thread of their own, because a file system may stall for as
//! long as it likes; what does not fit its queue, or was torn, is a miss after the next start. O(1) per change, O(places) to
//! open. Knows not what the files themselves hold: what does not agree with them is found out when it is read.

use crossbeam_channel::{Sender, TrySendError, bounded};
use llmscale_blocks::{BlockHash, DiskRecord, IndexChange, Namespace};
use llmscale_types::{DiskBlockId, Token};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

const MAGIC: &[u8; 8] = b"llmskvi1";
const HEADER_BYTES: u64 = 4096;
const SUM_BYTES: usize = 8;
/// Id, parent, namespace, hash.
const FIXED_BYTES: usize = 8 + 8 + 32 + 32;
/// Changes that wait to be written: some seconds of a busy tier.
const MAX_CHANGES: usize = 1 << 14;
/// Records read at a time.
const RECORDS_PER_READ: usize = 4_096;

/// What gives an index its meaning: another model, secret or size is another index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexMeaning {
    /// Keys the checksums; made of the secret that keys the hashes, and of the model.
    pub key: [u8; 32],
    /// Places.
    pub disk_blocks: u32,
    /// Tokens of one.
    pub block_tokens: u32,
}

impl IndexMeaning {
    /// The meaning of an index of contents of these weights under this secret.
    pub fn new(secret: &[u8; 32], weights_digest: &[u8; 32], disk_blocks: u32, block_tokens: u32) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(b"llmscale disk index");
        hasher.update(weights_digest);
        Self { key: *hasher.finalize().as_bytes(), disk_blocks, block_tokens }
    }

    fn record_bytes(&self) -> usize {
        FIXED_BYTES + 4 * self.block_tokens as usize + SUM_BYTES
    }

    fn file_bytes(&self) -> u64 {
        HEADER_BYTES + self.record_bytes() as u64 * u64::from(self.disk_blocks)
    }

    fn sum(&self, place: u64, body: &[u8]) -> [u8; SUM_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&place.to_le_bytes());
        hasher.update(body);
        hasher.finalize().as_bytes()[..SUM_BYTES].try_into().expect("a hash is longer")
    }

    /// The header never changes its place, which no record has.
    fn header(&self, incarnation: u64) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.disk_blocks.to_le_bytes());
        bytes.extend(self.block_tokens.to_le_bytes());
        bytes.extend(incarnation.to_le_bytes());
        let sum = self.sum(u64::MAX, &bytes);
        bytes.extend(sum);
        bytes
    }

    fn record(&self, disk: DiskBlockId, record: &DiskRecord) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.record_bytes());
        bytes.extend(record.id.get().to_le_bytes());
        bytes.extend(record.parent.map_or(0, std::num::NonZeroU64::get).to_le_bytes());
        bytes.extend(record.namespace);
        bytes.extend(record.hash);
        bytes.extend(record.ids.iter().flat_map(|id| id.to_le_bytes()));
        let sum = self.sum(u64::from(disk.0), &bytes);
        bytes.extend(sum);
        bytes
    }

    /// The record in these bytes, if they are one of this place.
    fn read(&self, disk: DiskBlockId, bytes: &[u8]) -> Option<DiskRecord> {
        let (body, sum) = bytes.split_at(bytes.len() - SUM_BYTES);
        let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes were taken"));
        let id = std::num::NonZeroU64::new(word(0))?;
        if self.sum(u64::from(disk.0), body) != sum {
            return None;
        }
        let namespace: Namespace = body[16..48].try_into().expect("32 bytes were taken");
        let hash: BlockHash = body[48..80].try_into().expect("32 bytes were taken");
        let token = |bytes: &[u8]| Token::from_le_bytes(bytes.try_into().expect("four bytes were taken"));
        let ids = body[FIXED_BYTES..].chunks_exact(4).map(token).collect();
        Some(DiskRecord { id, parent: std::num::NonZeroU64::new(word(8)), namespace, hash, ids })
    }
}

/// What an index says that an earlier process has left.
#[derive(Debug, Default)]
pub struct Recalled {
    /// The files that it is about; 0 if there is none.
    pub incarnation: u64,
    /// What they hold.
    pub records: Vec<(DiskBlockId, DiskRecord)>,
}

/// See the file's header.
#[derive(Debug)]
pub struct DiskIndex {
    changes: Option<Sender<IndexChange>>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl DiskIndex {
    /// Opens or makes the index at `path`, which belongs to this process alone, and reads what it holds.
    pub fn open(path: &Path, meaning: IndexMeaning) -> std::io::Result<(Self, Recalled)> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let recalled = recall(&file, &meaning)?;
        let (changes, orders) = bounded::<IndexChange>(MAX_CHANGES);
        let lost = Arc::new(AtomicU64::new(0));
        let own = Arc::clone(&lost);
        let write = move || {
            for change in orders {
                // A record that was not written is a miss after the next start, and nothing else.
                if write(&file, &meaning, &change).is_err() {
                    own.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let thread = std::thread::Builder::new().name("llmscale-index".into()).spawn(write)?;
        Ok((Self { changes: Some(changes), lost, thread: Some(thread) }, recalled))
    }

    /// Has a change written, some time.
    pub fn note(&self, change: IndexChange) {
        let Some(changes) = &self.changes else { return };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = changes.try_send(change) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Changes that found the queue full, or that the system refused to write.
    pub fn lost_changes(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for DiskIndex {
    /// What waits is written first.
    fn drop(&mut self) {
        self.changes = None;
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the index's thread panicked");
        }
    }
}

fn write(file: &File, meaning: &IndexMeaning, change: &IndexChange) -> std::io::Result<()> {
    let place = |disk: &DiskBlockId| HEADER_BYTES + meaning.record_bytes() as u64 * u64::from(disk.0);
    match change {
        IndexChange::Put(disk, record) => file.write_all_at(&meaning.record(*disk, record), place(disk)),
        IndexChange::Drop(disk) => file.write_all_at(&vec![0; meaning.record_bytes()], place(disk)),
        IndexChange::Restart(incarnation) => {
            file.set_len(0)?;
            file.set_len(meaning.file_bytes())?;
            file.write_all_at(&meaning.header(*incarnation), 0)
        }
    }
}

/// What the file holds; nothing if it means something else.
fn recall(file: &File, meaning: &IndexMeaning) -> std::io::Result<Recalled> {
    let length = meaning.header(0).len();
    let mut header = vec![0; length];
    if file.metadata()?.len() != meaning.file_bytes() {
        return Ok(Recalled::default());
    }
    file.read_exact_at(&mut header, 0)?;
    let incarnation = u64::from_le_bytes(header[16..24].try_into().expect("eight bytes were taken"));
    if header != meaning.header(incarnation) {
        return Ok(Recalled::default());
    }
    let mut records = Vec::new();
    let stride = meaning.record_bytes();
    let mut bytes = vec![0; stride * RECORDS_PER_READ];
    for first in (0..meaning.disk_blocks).step_by(RECORDS_PER_READ) {
        let count = RECORDS_PER_READ.min((meaning.disk_blocks - first) as usize);
        file.read_exact_at(&mut bytes[..stride * count], HEADER_BYTES + stride as u64 * u64::from(first))?;
        let places = (first..).map(DiskBlockId).zip(bytes[..stride * count].chunks_exact(stride));
        records.extend(places.filter_map(|(disk, bytes)| Some((disk, meaning.read(disk, bytes)?))));
    }
    Ok(Recalled { incarnation, records })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU64;
    use std::path::PathBuf;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("llmscale-index-{}-{name}", std::process::id())))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).unwrap();
        }
    }

    fn meaning(secret: u8) -> IndexMeaning {
        IndexMeaning::new(&[secret; 32], &[2; 32], 5_000, 4)
    }

    fn record(id: u64) -> DiskRecord {
        let parent = NonZeroU64::new(id - 1);
        DiskRecord {
            id: NonZeroU64::new(id).unwrap(),
            parent,
            namespace: [3; 32],
            hash: [id as u8; 32],
            ids: [id as u32; 4].into(),
        }
    }

    fn filled(place: &Place) {
        let (index, recalled) = DiskIndex::open(&place.0, meaning(1)).unwrap();
        assert_eq!((recalled.incarnation, recalled.records.len()), (0, 0));
        index.note(IndexChange::Restart(77));
        for id in 1..=3 {
            index.note(IndexChange::Put(DiskBlockId(id as u32 * 1_600), Box::new(record(id))));
        }
        index.note(IndexChange::Drop(DiskBlockId(3_200)));
        assert_eq!(index.lost_changes(), 0);
    }

    #[test]
    fn the_next_process_reads_what_was_noted_and_not_taken_back() {
        let place = Place::new("kept");
        filled(&place);
        let (_, recalled) = DiskIndex::open(&place.0, meaning(1)).unwrap();
        assert_eq!(recalled.incarnation, 77);
        assert_eq!(recalled.records, [(DiskBlockId(1_600), record(1)), (DiskBlockId(4_800), record(3))]);
    }

    #[test]
    fn another_secret_another_size_or_a_broken_header_is_another_index() {
        let place = Place::new("secret");
        filled(&place);
        let others = [meaning(9), IndexMeaning { disk_blocks: 4_999, ..meaning(1) }];
        for other in others {
            let (_, recalled) = DiskIndex::open(&place.0, other).unwrap();
            assert_eq!((recalled.incarnation, recalled.records.len()), (0, 0));
        }
        File::options().write(true).open(&place.0).unwrap().write_all_at(&[1], 20).unwrap();
        assert_eq!(DiskIndex::open(&place.0, meaning(1)).unwrap().1.incarnation, 0);
    }

    #[test]
    fn a_record_with_a_flipped_bit_and_one_in_another_place_are_passed_over() {
        let place = Place::new("flip");
        filled(&place);
        let file = File::options().read(true).write(true).open(&place.0).unwrap();
        let stride = meaning(1).record_bytes();
        let at = |disk: u64| HEADER_BYTES + stride as u64 * disk;
        let mut bytes = vec![0; stride];
        file.read_exact_at(&mut bytes, at(1_600)).unwrap();
        file.write_all_at(&bytes, at(7)).unwrap();
        bytes[90] ^= 4;
        file.write_all_at(&bytes, at(1_600)).unwrap();
        let (_, recalled) = DiskIndex::open(&place.0, meaning(1)).unwrap();
        assert_eq!(recalled.records, [(DiskBlockId(4_800), record(3))]);
    }
}
