//! What decoding allocates, counted by the allocator itself: never more than a small multiple of the frame.

#![expect(unsafe_code, reason = "a counting allocator implements an unsafe trait")]

mod common;

use common::{from_node, from_worker, to_node, to_worker};
use llmscale_wire::{CodecLimits, FromNode, FromWorker, Message, ToNode, ToWorker, decode, encode};
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATED_BYTES: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is handed to the system allocator unchanged; counting touches a thread-local integer only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED_BYTES.set(ALLOCATED_BYTES.get() + layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer comes from `alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The widest element for its bytes is a 64-bit id that takes one byte on the wire.
const MOST_BYTES_PER_BYTE: usize = 8;

fn allocated_by_decoding<M: Message>(bytes: &[u8]) -> usize {
    let before = ALLOCATED_BYTES.get();
    let message = decode::<M>(bytes, &CodecLimits::default());
    let after = ALLOCATED_BYTES.get();
    drop(message);
    after - before
}

fn is_bounded(bytes: &[u8]) {
    let most = allocated_by_decoding::<ToNode>(bytes)
        .max(allocated_by_decoding::<FromNode>(bytes))
        .max(allocated_by_decoding::<ToWorker>(bytes))
        .max(allocated_by_decoding::<FromWorker>(bytes));
    let limit = bytes.len() * MOST_BYTES_PER_BYTE;
    assert!(most <= limit, "{most} bytes allocated for a frame of {}", bytes.len());
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let limits = CodecLimits::default();
    prop_oneof![
        to_node().prop_map(move |message| encode(&message, &limits).expect("within bounds")),
        from_node().prop_map(move |message| encode(&message, &limits).expect("within bounds")),
        to_worker().prop_map(move |message| encode(&message, &limits).expect("within bounds")),
        from_worker().prop_map(move |message| encode(&message, &limits).expect("within bounds")),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn mutated_frames_allocate_a_small_multiple_of_their_bytes(
        mut frame in any_frame(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        for (place, byte) in changes {
            let place = place.index(frame.len());
            frame[place] = byte;
        }
        is_bounded(&frame);
    }
}

#[test]
fn a_column_that_claims_four_billion_rows_allocates_nothing() {
    for direction_tag in 0..8 {
        for fields in 0..16_u8 {
            let mut frame = vec![0x93, 1, direction_tag, 0x90 | fields];
            frame.extend([0xdd, 0xff, 0xff, 0xff, 0xff]);
            frame.extend(vec![0; 1_000]);
            assert_eq!(allocated_by_decoding::<ToNode>(&frame), 0);
            assert_eq!(allocated_by_decoding::<FromNode>(&frame), 0);
            assert_eq!(allocated_by_decoding::<ToWorker>(&frame), 0);
            assert_eq!(allocated_by_decoding::<FromWorker>(&frame), 0);
        }
    }
}

#[test]
fn a_column_of_wide_elements_with_one_byte_each_allocates_nothing() {
    // A delta whose admissions are 10,000 zeros: an admission has at least 46 bytes, so none is reserved.
    let mut frame = vec![0x93, 1, 1, 0x99, 1, 1, 0, 0xc2, 0x90, 0xdc];
    frame.extend(10_000_u16.to_be_bytes());
    frame.extend(vec![0; 10_000 + 3]);
    assert_eq!(allocated_by_decoding::<ToWorker>(&frame), 0);
}
