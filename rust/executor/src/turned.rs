//! Weights of four bits that are stored `[inputs, outputs]`: GPTQ (Frantar et al. 2022, arXiv 2210.17323) packs eight inputs
//! of an output into a word, AWQ (Lin et al. 2023, arXiv 2306.00978) eight outputs of an input, in the order of its kernel's
//! registers. A part is read whole and turned panel by panel while it is packed; memory is one part's beside the result.
//! Linear in the weights. Inputs that are ordered by activation are refused by whoever describes a model. It does not know
//! products.

use crate::error::LoadError;
use crate::linear::check_signed_scales;
use crate::nibbles::Groups;
use crate::source::{Stack, Stored};
use llmscale_kernels::matmul::nibbles::PackedNibbles;
use llmscale_kernels::pool::Pool;

/// Codes in a word.
const CODES: usize = 8;
/// A word of eight ones.
const ONES: u32 = 0x1111_1111;
/// Where AWQ has output `j` of eight within a word.
const AWQ_PLACES: [usize; CODES] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How codes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Along the inputs; zero points along the outputs, and their words less this number times [`ONES`].
    Gptq(u8),
    /// Both along the outputs.
    Awq,
}

/// One tensor of a weight, as it is stored.
#[derive(Debug)]
pub struct TurnedPart {
    /// `[inputs / 8, outputs]`, or `[inputs, outputs / 8]` for AWQ.
    pub codes: Stack,
    /// `[groups, outputs]`.
    pub scales: Stack,
    /// `[groups, outputs / 8]`.
    pub zeros: Stack,
}

impl TurnedPart {
    /// Outputs of it.
    pub fn outputs(&self) -> usize {
        self.scales.columns()
    }
}

/// Words of a part, and where its codes are in them.
struct Words {
    codes: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f32>,
    outputs: usize,
    packing: Packing,
}

impl Words {
    fn read(part: &TurnedPart, inputs: usize, groups: usize, packing: Packing) -> Result<Self, LoadError> {
        let outputs = part.outputs();
        let wide = outputs.div_ceil(CODES);
        let codes = match packing {
            Packing::Gptq(_) => (inputs.div_ceil(CODES), outputs),
            Packing::Awq => (inputs, wide),
        };
        for (what, stack, needed) in [
            ("codes", &part.codes, codes),
            ("scales", &part.scales, (groups, outputs)),
            ("zero points", &part.zeros, (groups, wide)),
        ] {
            let given = (stack.rows(), stack.columns());
            if given != needed {
                return Err(LoadError::Shape(format!("{what} of 4 bits are {given:?}, {needed:?} are needed")));
            }
        }
        let scales = part.scales.read_all::<f32>()?;
        check_signed_scales(&scales)?;
        Ok(Self { codes: words(&part.codes)?, zeros: words(&part.zeros)?, scales, outputs, packing })
    }

    fn code(&self, output: usize, input: usize) -> u8 {
        match self.packing {
            Packing::Gptq(_) => nibble(self.codes[input / CODES * self.outputs + output], input % CODES),
            Packing::Awq => {
                nibble(self.codes[input * self.outputs.div_ceil(CODES) + output / CODES], AWQ_PLACES[output % CODES])
            }
        }
    }

    fn zero(&self, output: usize, group: usize) -> u8 {
        let word = self.zeros[group * self.outputs.div_ceil(CODES) + output / CODES];
        match self.packing {
            // Writers take the ones from whole words, so a zero point of 0 is stored as 15 and borrows of the next one.
            Packing::Gptq(less) => nibble(word.wrapping_add(u32::from(less) * ONES), output % CODES),
            Packing::Awq => nibble(word, AWQ_PLACES[output % CODES]),
        }
    }
}

fn nibble(word: u32, place: usize) -> u8 {
    (word >> (4 * place) & 15) as u8
}

fn words(stack: &Stack) -> Result<Vec<u32>, LoadError> {
    let mut bytes = vec![0; stack.rows() * stack.columns() * 4];
    let read = stack.read_raw(Stored::I32, 0, &mut bytes);
    read.map_err(|problem| LoadError::File { path: "a file of weights".into(), problem })?;
    Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
}

/// Reads, turns and packs parts, one below the other.
pub(crate) fn load(
    pool: &Pool,
    parts: &[TurnedPart],
    packing: Packing,
    inputs: usize,
    group: usize,
) -> Result<PackedNibbles, LoadError> {
    let times = Groups::of(group.min(inputs), inputs)?;
    let stored_groups = inputs.div_ceil(group.max(1));
    let read: Result<Vec<Words>, LoadError> =
        parts.iter().map(|part| Words::read(part, inputs, stored_groups, packing)).collect();
    let read = read?;
    let places: Vec<(&Words, usize)> =
        read.iter().flat_map(|part| (0..part.outputs).map(move |output| (part, output))).collect();
    let groups = inputs.div_ceil(times.group);
    let packed = PackedNibbles::read(pool, (places.len(), inputs), times.group, true, |first, rows| {
        for (row, codes) in rows.codes.chunks_exact_mut(inputs).enumerate() {
            let (part, output) = places[first + row];
            for (input, code) in codes.iter_mut().enumerate() {
                *code = part.code(output, input);
            }
            for at in 0..groups {
                let stored = at / times.repeats;
                rows.scales[row * groups + at] = part.scales[stored * part.outputs + output];
                rows.zeros[row * groups + at] = part.zero(output, stored);
            }
        }
        Ok(())
    })?;
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::{AWQ_PLACES, ONES, Packing, Words, nibble};

    #[test]
    fn codes_and_zero_points_are_where_each_format_has_them() {
        // Two outputs of eight inputs: the first has 0 to 7, the second 8 to 15.
        let gptq = Words {
            codes: vec![0x7654_3210, 0xfedc_ba98],
            zeros: vec![0x0000_00f3],
            scales: vec![1.0, 1.0],
            outputs: 2,
            packing: Packing::Gptq(1),
        };
        for input in 0..8 {
            assert_eq!((gptq.code(0, input), gptq.code(1, input)), (input as u8, input as u8 + 8));
        }
        assert_eq!((gptq.zero(0, 0), gptq.zero(1, 0)), (4, 0), "stored less one");
        let true_zeros = 0xf008_7010_u32;
        let gptq = Words { zeros: vec![true_zeros.wrapping_sub(ONES)], outputs: 8, ..gptq };
        for output in 0..8 {
            assert_eq!(gptq.zero(output, 0), nibble(true_zeros, output), "a zero borrows of its neighbour");
        }
        // Eight outputs of one input, in the order 0, 2, 4, 6, 1, 3, 5, 7.
        let word = [0_u32, 2, 4, 6, 1, 3, 5, 7].iter().enumerate().map(|(place, value)| value << (4 * place)).sum();
        let awq =
            Words { codes: vec![word], zeros: vec![word], scales: vec![1.0; 8], outputs: 8, packing: Packing::Awq };
        for (output, place) in AWQ_PLACES.into_iter().enumerate() {
            assert_eq!((awq.code(output, 0), awq.zero(output, 0)), (output as u8, output as u8));
            assert_eq!(nibble(word, place), output as u8);
        }
    }
}
