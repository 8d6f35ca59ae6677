//! Ranks are threads here: the memory does not know the difference.

use super::*;
use crate::element::Bf16;
use crate::mapping::MappingError;
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

const PATIENCE: Duration = Duration::from_mins(1);

struct Shared(PathBuf);

impl Shared {
    fn new(ranks: usize, room_bytes: usize) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("llmscale-ranks-{}-{number}", std::process::id()));
        let file = std::fs::File::create_new(&path).expect("a new file");
        file.set_len(RankMemory::bytes_for(ranks, room_bytes) as u64).expect("room for it");
        Self(path)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).expect("it was there");
    }
}

/// Runs every rank in a thread of its own and returns what each made.
fn run<R: Send>(ranks: usize, room_bytes: usize, work: impl Fn(usize, RankMemory) -> R + Sync) -> Vec<R> {
    let shared = Shared::new(ranks, room_bytes);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                let (path, work) = (&shared.0, &work);
                scope.spawn(move || {
                    let memory = RankMemory::open(path, rank, ranks, room_bytes, PATIENCE).expect("it opens");
                    work(rank, memory)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panicked")).collect()
    })
}

/// A value that differs by rank, exchange and place, and that f32 holds exactly.
fn value(rank: usize, exchange: usize, index: usize) -> f32 {
    ((rank * 7 + exchange * 3 + index) % 257) as f32
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_gets_the_sum_however_the_lengths_lie_to_the_room(
        ranks in 1_usize..5, lengths in prop::collection::vec(0_usize..200, 1..30)
    ) {
        let sums = run(ranks, 256, |rank, mut memory| {
            let mut all = Vec::new();
            for (exchange, &length) in lengths.iter().enumerate() {
                let mut values: Vec<f32> = (0..length).map(|index| value(rank, exchange, index)).collect();
                memory.sum(&mut values).expect("all ranks come");
                all.push(values);
            }
            all
        });
        for (exchange, &length) in lengths.iter().enumerate() {
            let expected: Vec<f32> =
                (0..length).map(|index| (0..ranks).map(|rank| value(rank, exchange, index)).sum()).collect();
            for sum in &sums {
                prop_assert_eq!(&sum[exchange], &expected);
            }
        }
    }

    #[test]
    fn rows_are_dealt_with_all_columns_in_the_order_of_ranks(
        widths in prop::collection::vec(1_usize..60, 1..5), shares in prop::collection::vec(0_usize..6, 5)
    ) {
        let total: usize = widths.iter().sum();
        let bounds = bounds_of(&shares[..widths.len()]);
        let rows = bounds[widths.len()];
        let dealt = run(widths.len(), 256, |rank, mut memory| {
            let own: Vec<f32> = (0..rows * widths[rank]).map(|index| value(rank, 0, index)).collect();
            let mut output = vec![-1.0; (bounds[rank + 1] - bounds[rank]) * total];
            memory.deal_rows(&own, &widths, &bounds, &mut output).expect("all ranks come");
            // What was left of one exchange must not be read in the next.
            let again = output.clone();
            output.fill(-1.0);
            memory.deal_rows(&own, &widths, &bounds, &mut output).expect("all ranks come");
            assert_eq!(output, again);
            output
        });
        let mut expected = Vec::new();
        for row in 0..rows {
            for (rank, &width) in widths.iter().enumerate() {
                expected.extend((0..width).map(|column| value(rank, 0, row * width + column)));
            }
        }
        prop_assert_eq!(dealt.concat(), expected);
    }

    #[test]
    fn every_rank_gets_the_words_of_all(shares in prop::collection::vec(0_usize..150, 1..5)) {
        let bounds = bounds_of(&shares);
        let total = bounds[shares.len()];
        let gathered = run(shares.len(), 128, |rank, mut memory| {
            let own = bounds[rank]..bounds[rank + 1];
            let fill = |index| if own.contains(&index) { index as u32 * 3 } else { u32::MAX };
            let mut words: Vec<u32> = (0..total).map(fill).collect();
            memory.gather_words(&mut words, &bounds).expect("all ranks come");
            words
        });
        let expected: Vec<u32> = (0..total as u32).map(|index| index * 3).collect();
        for words in gathered {
            prop_assert_eq!(&words, &expected);
        }
    }
}

fn bounds_of(shares: &[usize]) -> Vec<usize> {
    std::iter::once(0)
        .chain(shares.iter().scan(0, |sum, share| {
            *sum += share;
            Some(*sum)
        }))
        .collect()
}

#[test]
fn rows_and_words_that_do_not_fit_their_bounds_are_refused() {
    let shared = Shared::new(2, 128);
    let mut memory = RankMemory::open(&shared.0, 0, 2, 128, PATIENCE).expect("it opens");
    let (own, mut output) = ([0.0_f32; 6], [0.0_f32; 8]);
    let mut deal = |widths: &[usize], bounds: &[usize], columns: usize| {
        let error = memory.deal_rows(&own, widths, bounds, &mut output[..columns]).expect_err("refused");
        let RankError::Shape { what, .. } = error else { panic!("{error}") };
        what
    };
    assert_eq!(deal(&[2], &[0, 2, 3], 8), "the number of widths");
    assert_eq!(deal(&[2, 2], &[0, 3], 8), "the number of bounds");
    assert_eq!(deal(&[2, 2], &[1, 2, 3], 8), "the first bound");
    assert_eq!(deal(&[2, 2], &[0, 4, 3], 8), "a bound");
    assert_eq!(deal(&[2, 2], &[0, 2, 4], 8), "the length of what this rank holds");
    assert_eq!(deal(&[2, 2], &[0, 2, 3], 7), "the length of the output");
    let error = memory.gather_words(&mut [0; 3], &[0, 1, 2]).expect_err("refused");
    assert!(matches!(error, RankError::Shape { what: "the number of words", given: 3, limit: 2 }), "{error}");
}

#[test]
fn nothing_to_deal_or_gather_waits_for_nobody() {
    let shared = Shared::new(2, 128);
    let mut memory = RankMemory::open(&shared.0, 1, 2, 128, Duration::ZERO).expect("it opens");
    memory.deal_rows::<f32>(&[], &[3, 4], &[0, 0, 0], &mut []).expect("no rows");
    memory.gather_words(&mut [], &[0, 0, 0]).expect("no words");
}

#[test]
fn ranks_hold_the_same_bits_although_the_order_of_a_sum_matters() {
    let parts = [1e8_f32, 1.0, -1e8, 1.0];
    let sums = run(4, 128, |rank, mut memory| {
        let mut values = [parts[rank]];
        memory.sum(&mut values).expect("all ranks come");
        values[0].to_bits()
    });
    assert_eq!(sums, [1.0_f32.to_bits(); 4], "((1e8 + 1) - 1e8) + 1 in f32");
}

#[test]
fn bf16_is_added_in_f32_and_rounded_once() {
    let sums = run(3, 128, |rank, mut memory| {
        // Each is half of the last place of 256: rounded after every addition they would vanish.
        let mut values = [Bf16::from_f32(if rank == 0 { 256.0 } else { 1.0 })];
        memory.sum(&mut values).expect("all ranks come");
        values[0].to_f32()
    });
    assert_eq!(sums, [258.0; 3]);
}

#[test]
fn a_slow_rank_is_waited_for_by_sleepers() {
    let rounds = 200;
    let totals = run(3, 128, |rank, mut memory| {
        let mut total = 0.0;
        for exchange in 0..rounds {
            if exchange % 3 == rank {
                // Long enough for the others to fall asleep.
                let began = Instant::now();
                while began.elapsed() < Duration::from_micros(300) {
                    std::thread::yield_now();
                }
            }
            let mut values = [1.0_f32];
            memory.sum(&mut values).expect("all ranks come");
            total += values[0];
        }
        total
    });
    assert_eq!(totals, [600.0; 3]);
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let shared = Shared::new(3, 128);
    let mut memory = RankMemory::open(&shared.0, 0, 3, 128, Duration::from_millis(5)).expect("it opens");
    let error = memory.sum(&mut [1.0_f32]).expect_err("nobody else is there");
    assert!(matches!(error, RankError::Absent { rank: 1, .. }), "{error}");
    assert!(error.to_string().starts_with("rank 1 did not come to the exchange within"), "{error}");
}

#[test]
fn memory_of_another_group_is_refused() {
    let shared = Shared::new(2, 128);
    let open = |rank, ranks, room| RankMemory::open(&shared.0, rank, ranks, room, PATIENCE).expect_err("refused");
    assert!(matches!(open(0, 3, 128), RankError::Memory(MappingError::Size { .. })));
    assert!(matches!(open(2, 2, 128), RankError::Shape { what: "the rank", .. }));
    assert!(matches!(open(0, 0, 128), RankError::Shape { .. }));
    assert!(matches!(open(0, 65, 128), RankError::Shape { .. }));
    assert!(matches!(open(0, 2, 100), RankError::Shape { .. }));
    let missing = RankMemory::open(Path::new("/nowhere/ranks"), 0, 2, 128, PATIENCE).expect_err("refused");
    assert!(matches!(missing, RankError::Memory(MappingError::File(_))));
}
