//! A one-way channel between two ranks of one host, through memory that both processes map: a ring of slots, each with one
//! message or a piece of a longer one. A sender waits only while the ring is full, a receiver while it is empty; both for a
//! bounded time, after which the other one is named. One copy in, one copy out. Knows nothing of what the bytes mean.
#![expect(unsafe_code, reason = "memory that another process writes")]

use crate::mapping::{LINE_BYTES, Mapping};
use crate::rank_wait::{RankError, wait_until, wake_all};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Bytes of a slot: the residual stream of 512 rows of a 135M model takes two and a half.
const SLOT_BYTES: usize = 256 << 10;
/// Slots of the ring. What steps in flight send fits, so that a stage waits for the one behind it only where steps are
/// larger than 16 MiB.
const SLOTS: u32 = 64;
/// Lines of the head: messages written, messages read, whether the reader sleeps, whether the writer does.
const HEAD_LINES: usize = 4;

/// One end of the channel; a rank uses it to send or to receive, never both.
#[derive(Debug)]
pub struct RankChannel {
    memory: Mapping,
    /// The rank at the other end.
    peer: usize,
    /// Slots that this end has written, or read; wraps.
    position: u32,
    max_wait: Duration,
}

impl RankChannel {
    /// Size of the memory.
    pub const BYTES: usize = HEAD_LINES * LINE_BYTES + SLOTS as usize * (LINE_BYTES + SLOT_BYTES);

    /// Maps a file of [`Self::BYTES`] zeros that both ranks open. `peer` is the rank at the other end.
    ///
    /// # Errors
    /// A file of another size, or one that cannot be mapped.
    pub fn open(path: &Path, peer: usize, max_wait: Duration) -> Result<Self, RankError> {
        Ok(Self { memory: Mapping::open(path, Self::BYTES)?, peer, position: 0, max_wait })
    }

    /// Sends a message; it may be overwritten afterwards.
    ///
    /// # Errors
    /// A receiver that does not make room.
    pub fn send(&mut self, message: &[u8]) -> Result<(), RankError> {
        for piece in message.chunks(SLOT_BYTES) {
            let position = self.position;
            let has_room = |read: u32| position.wrapping_sub(read) < SLOTS;
            wait_until(self.read(), self.writer_sleeps(), has_room, self.max_wait)
                .map_err(|waited| self.absent(waited))?;
            self.length(position).store(piece.len() as u32, Ordering::Relaxed);
            // SAFETY: the slot has room for a piece, and the receiver has read what was in it, as has just been seen.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), self.slot(position), piece.len()) };
            self.position = position.wrapping_add(1);
            self.written().store(self.position, Ordering::SeqCst);
            if self.reader_sleeps().load(Ordering::SeqCst) != 0 {
                wake_all(self.written());
            }
        }
        Ok(())
    }

    /// Receives a message of exactly this length.
    ///
    /// # Errors
    /// A sender that does not come, or a message of another length: both ends must agree on what is sent.
    pub fn receive(&mut self, message: &mut [u8]) -> Result<(), RankError> {
        for piece in message.chunks_mut(SLOT_BYTES) {
            let position = self.position;
            let is_there = |written: u32| written.wrapping_sub(position).cast_signed() > 0;
            wait_until(self.written(), self.reader_sleeps(), is_there, self.max_wait)
                .map_err(|waited| self.absent(waited))?;
            let given = self.length(position).load(Ordering::Relaxed) as usize;
            if given != piece.len() {
                return Err(RankError::Shape {
                    what: "the length of a piece from another rank",
                    given,
                    limit: piece.len(),
                });
            }
            // SAFETY: the sender has written the slot, as has just been seen, and writes it again only after `read` has
            // passed it.
            unsafe { std::ptr::copy_nonoverlapping(self.slot(position), piece.as_mut_ptr(), given) };
            self.position = position.wrapping_add(1);
            self.read().store(self.position, Ordering::SeqCst);
            if self.writer_sleeps().load(Ordering::SeqCst) != 0 {
                wake_all(self.read());
            }
        }
        Ok(())
    }

    fn absent(&self, waited: Duration) -> RankError {
        RankError::Absent { rank: self.peer, waited }
    }

    fn written(&self) -> &AtomicU32 {
        self.memory.line(0)
    }

    fn read(&self) -> &AtomicU32 {
        self.memory.line(1)
    }

    fn reader_sleeps(&self) -> &AtomicU32 {
        self.memory.line(2)
    }

    fn writer_sleeps(&self) -> &AtomicU32 {
        self.memory.line(3)
    }

    fn length(&self, position: u32) -> &AtomicU32 {
        self.memory.line(HEAD_LINES + (position % SLOTS) as usize)
    }

    fn slot(&self, position: u32) -> *mut u8 {
        let slots = (HEAD_LINES + SLOTS as usize) * LINE_BYTES;
        self.memory.room(slots + (position % SLOTS) as usize * SLOT_BYTES, SLOT_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::MappingError;
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    fn memory(bytes: usize) -> File {
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"channel".as_ptr(), 0)) };
        file.set_len(bytes as u64).expect("it is memory");
        file
    }

    fn channel(wait: Duration) -> (RankChannel, RankChannel) {
        let file = memory(RankChannel::BYTES);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let open = |peer| RankChannel::open(Path::new(&path), peer, wait).expect("it has the size");
        (open(1), open(0))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn messages_arrive_whole_and_in_order_though_they_fill_the_ring(
            lengths in prop::collection::vec(prop_oneof![0_usize..2_000, 100_000_usize..900_000], 1..60),
        ) {
            let (mut sender, mut receiver) = channel(Duration::from_secs(30));
            let message = |index: usize, length: usize| -> Vec<u8> { (0..length).map(|at| (at * 7 + index) as u8).collect() };
            let sent = lengths.clone();
            let thread = std::thread::spawn(move || {
                for (index, &length) in sent.iter().enumerate() {
                    sender.send(&message(index, length)).expect("it is received");
                }
            });
            for (index, &length) in lengths.iter().enumerate() {
                let mut received = vec![0; length];
                receiver.receive(&mut received).expect("it is sent");
                prop_assert_eq!(received, message(index, length));
            }
            thread.join().expect("it sent everything");
        }
    }

    #[test]
    fn a_rank_at_the_other_end_that_does_not_come_is_named() {
        let (mut sender, mut receiver) = channel(Duration::from_millis(1));
        let error = receiver.receive(&mut [0; 4]).expect_err("nothing was sent").to_string();
        assert!(error.starts_with("rank 0 did not come"), "{error}");
        for _ in 0..SLOTS {
            sender.send(&[1]).expect("there is room");
        }
        let error = sender.send(&[1]).expect_err("the ring is full").to_string();
        assert!(error.starts_with("rank 1 did not come"), "{error}");
    }

    #[test]
    fn ends_that_disagree_about_a_length_are_told() {
        let (mut sender, mut receiver) = channel(Duration::from_secs(1));
        sender.send(&[1, 2, 3]).expect("there is room");
        let error = receiver.receive(&mut [0; 4]).expect_err("three are not four").to_string();
        assert_eq!(error, "the length of a piece from another rank is 3, the limit is 4");
    }

    #[test]
    fn positions_wrap() {
        let (mut sender, mut receiver) = channel(Duration::from_secs(1));
        (sender.position, receiver.position) = (u32::MAX - 1, u32::MAX - 1);
        sender.read().store(u32::MAX - 1, Ordering::SeqCst);
        sender.written().store(u32::MAX - 1, Ordering::SeqCst);
        for byte in 0..5 {
            sender.send(&[byte]).expect("there is room");
            let mut received = [9];
            receiver.receive(&mut received).expect("it was sent");
            assert_eq!(received, [byte]);
        }
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let file = memory(4_096);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let outcome = RankChannel::open(Path::new(&path), 1, Duration::from_secs(1));
        assert!(matches!(outcome, Err(RankError::Memory(MappingError::Size { given: 4_096, .. }))), "{outcome:?}");
    }
}
