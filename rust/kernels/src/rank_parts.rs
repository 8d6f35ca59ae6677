//! What ranks do with the parts that they got from each other, however those came: add them up, or put columns together.
//! Sums are added in the order of ranks in f32 and rounded once, so that every rank has the same bits, in shared memory and
//! over a network. Linear in the elements. Knows no ranks.

use crate::element::Element;

/// The sum of parts of equal length, in their order.
///
/// # Panics
/// Without parts, or with one of another length.
pub fn add_parts<T: Element>(parts: &[&[T]], out: &mut [T]) {
    assert!(parts.iter().all(|part| part.len() == out.len()), "parts of one sum are of one length");
    if let &[first, second] = parts {
        // The common case, for which the compiler makes vector code.
        for ((out, &a), &b) in out.iter_mut().zip(first).zip(second) {
            *out = T::from_f32(a.to_f32() + b.to_f32());
        }
        return;
    }
    let (first, others) = parts.split_first().expect("a sum has parts");
    for (index, out) in out.iter_mut().enumerate() {
        let sum = others.iter().fold(first[index].to_f32(), |sum, part| sum + part[index].to_f32());
        *out = T::from_f32(sum);
    }
}

/// Puts consecutive values of a `[rows, width]` array, the first of them its `at`-th, into columns of a wider one.
pub fn place_columns<T: Copy>(
    mut values: &[T],
    mut at: usize,
    width: usize,
    output: &mut [T],
    total: usize,
    column: usize,
) {
    while !values.is_empty() {
        let (row, offset) = (at / width, at % width);
        let (now, rest) = values.split_at(values.len().min(width - offset));
        output[row * total + column + offset..][..now.len()].copy_from_slice(now);
        (values, at) = (rest, at + now.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Bf16;

    #[test]
    fn parts_are_added_in_their_order_and_rounded_once() {
        let parts: [&[f32]; 4] = [&[1e8], &[1.0], &[-1e8], &[1.0]];
        let mut sum = [0.0];
        add_parts(&parts, &mut sum);
        assert_eq!(sum[0].to_bits(), 1.0_f32.to_bits(), "((1e8 + 1) - 1e8) + 1 in f32");
        let one = [Bf16::from_f32(1.0)];
        let mut sum = [Bf16::from_f32(0.0)];
        add_parts(&[&[Bf16::from_f32(256.0)], &one, &one], &mut sum);
        assert_eq!(sum[0].to_f32().to_bits(), 258.0_f32.to_bits(), "each one is half of the last place of 256");
    }

    #[test]
    fn pieces_of_columns_may_begin_and_end_within_a_row() {
        let mut output = [0; 12];
        place_columns(&[2, 3, 4], 1, 2, &mut output, 4, 1);
        assert_eq!(output, [0, 0, 2, 0, 0, 3, 4, 0, 0, 0, 0, 0]);
    }
}
