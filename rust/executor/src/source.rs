//! Rows of a model's tensors as they lie in files. A tensor is a stretch of a file with a format and a shape; a stack is
//! several, one below the other. Rows are read with plain reads into the reader's memory, many threads at once, and
//! converted: a file that is cut off meanwhile is an error of that read. Linear in the bytes that are read. It does not
//! know what tensors mean.
#![expect(unsafe_code, reason = "numbers are read as bytes")]

use crate::error::LoadError;
use llmscale_kernels::element::{Bf16, Element};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// IEEE single precision.
    F32,
    /// The upper half of it.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Signed bytes.
    I8,
    /// Words of several codes.
    I32,
    /// Bytes of e4m3, which only `fp8` reads.
    F8,
}

impl Stored {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::I8 | Self::F8 => 1,
        }
    }
}

/// An open file and its name for errors.
#[derive(Debug)]
pub struct TensorFile {
    file: File,
    path: String,
}

impl TensorFile {
    /// Opens a file to read.
    pub fn open(path: &str) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|problem| LoadError::File { path: path.into(), problem })?;
        Ok(Self { file, path: path.into() })
    }

    fn read(&self, bytes: &mut [u8], begin: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, begin).map_err(|problem| {
            io::Error::new(problem.kind(), format!("{} at byte {begin}, {} bytes: {problem}", self.path, bytes.len()))
        })
    }
}

/// One tensor `[rows, columns]` in a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The file.
    pub file: Arc<TensorFile>,
    /// Where its first byte lies.
    pub begin: u64,
    /// Format.
    pub stored: Stored,
    /// Rows; an array is one column.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

/// Tensors of one width, one below the other.
#[derive(Clone, Debug)]
pub struct Stack {
    parts: Vec<Tensor>,
}

impl Stack {
    /// Of at least one tensor, all of one width.
    pub fn new(parts: Vec<Tensor>) -> Result<Self, LoadError> {
        let Some(first) = parts.first() else {
            return Err(LoadError::Shape("a weight of no tensors".into()));
        };
        if let Some(other) = parts.iter().find(|part| part.columns != first.columns) {
            let message = format!("tensors of {} and {} columns are no one weight", first.columns, other.columns);
            return Err(LoadError::Shape(message));
        }
        Ok(Self { parts })
    }

    /// Its tensors.
    pub fn parts(&self) -> &[Tensor] {
        &self.parts
    }

    /// Rows of all.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// Their width.
    pub fn columns(&self) -> usize {
        self.parts[0].columns
    }

    /// Bytes in files.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.rows * part.columns * part.stored.bytes()).sum()
    }

    /// Calls `read(tensor, its first row, rows)` for what whole rows from `first` on are made of, with their part of `out`,
    /// which has `columns` elements for each.
    fn each<T>(
        &self,
        first: usize,
        columns: usize,
        out: &mut [T],
        mut read: impl FnMut(&Tensor, usize, &mut [T]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut row, mut out) = (first, out);
        for part in &self.parts {
            if row >= part.rows {
                row -= part.rows;
                continue;
            }
            let taken = (part.rows - row).min(out.len() / columns);
            let (now, later) = out.split_at_mut(taken * columns);
            if taken > 0 {
                read(part, row, now)?;
            }
            (row, out) = (0, later);
        }
        assert!(out.is_empty(), "rows behind the last of a stack");
        Ok(())
    }

    /// Fills `out` with whole rows from `first` on, converted.
    pub fn read<T: Element>(&self, first: usize, out: &mut [T]) -> io::Result<()> {
        self.each(first, self.columns(), out, |part, row, out| read_numbers(part, row, out))
    }

    /// Fills `out` with whole rows of signed bytes from `first` on.
    pub fn read_bytes(&self, first: usize, out: &mut [i8]) -> io::Result<()> {
        // SAFETY: signed and unsigned bytes have one layout.
        let bytes = unsafe { core::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), out.len()) };
        self.read_raw(Stored::I8, first, bytes)
    }

    /// Fills `out` with whole rows from `first` on as they are stored, which must be this format.
    pub fn read_raw(&self, stored: Stored, first: usize, out: &mut [u8]) -> io::Result<()> {
        let row_bytes = self.columns() * stored.bytes();
        self.each(first, row_bytes, out, |part, row, out| {
            if part.stored != stored {
                let message = format!("{} has {:?} where {stored:?} is read", part.file.path, part.stored);
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            part.file.read(out, part.begin + (row * row_bytes) as u64)
        })
    }

    /// The error of a row that cannot be rounded to codes.
    pub(crate) fn not_finite(&self, row: usize) -> io::Error {
        let mut rows = 0;
        let part = self.parts.iter().find(|part| {
            rows += part.rows;
            row < rows
        });
        let path = part.map_or("", |part| &part.file.path);
        let message = format!(
            "{path}: row {row} of a weight of {} x {} holds what is no finite number, which has no code. Download the \
             checkpoint again, or serve it without quantization.",
            self.rows(),
            self.columns()
        );
        io::Error::new(io::ErrorKind::InvalidData, message)
    }

    /// All numbers in order.
    pub fn read_all<T: Element>(&self) -> Result<Vec<T>, LoadError> {
        let mut out = vec![T::default(); self.rows() * self.columns()];
        let path = || self.parts[0].file.path.clone();
        self.read(0, &mut out).map_err(|problem| LoadError::File { path: path(), problem })?;
        Ok(out)
    }
}

fn read_numbers<T: Element>(tensor: &Tensor, row: usize, out: &mut [T]) -> io::Result<()> {
    let size = tensor.stored.bytes();
    let begin = tensor.begin + (row * tensor.columns * size) as u64;
    let is_same = match tensor.stored {
        Stored::F32 => !T::IS_BF16,
        Stored::Bf16 => T::IS_BF16,
        Stored::F16 | Stored::I8 | Stored::I32 | Stored::F8 => false,
    };
    if is_same && cfg!(target_endian = "little") {
        // SAFETY: elements are plain numbers of `size` bytes each, and any bytes are a number.
        let bytes = unsafe { core::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), out.len() * size) };
        return tensor.file.read(bytes, begin);
    }
    if tensor.stored == Stored::F8 {
        let message = format!("{} has e4m3 codes where numbers are read", tensor.file.path);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut bytes = vec![0; out.len() * size];
    tensor.file.read(&mut bytes, begin)?;
    match tensor.stored {
        Stored::F32 => convert(&bytes, out, f32::from_le_bytes),
        Stored::Bf16 => convert(&bytes, out, |bytes| Bf16(u16::from_le_bytes(bytes)).to_f32()),
        Stored::F16 => convert(&bytes, out, |bytes| half_to_f32(u16::from_le_bytes(bytes))),
        Stored::I8 | Stored::F8 => convert(&bytes, out, |[byte]| f32::from(byte as i8)),
        Stored::I32 => convert(&bytes, out, |bytes| i32::from_le_bytes(bytes) as f32),
    }
    Ok(())
}

/// One loop per format: one that looked at the format of each number took a quarter of loading.
fn convert<T: Element, const SIZE: usize>(bytes: &[u8], out: &mut [T], number: impl Fn([u8; SIZE]) -> f32) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<SIZE>().0) {
        *value = T::from_f32(number(*bytes));
    }
}

/// IEEE 754 binary16, exactly.
fn half_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let (exponent, fraction) = (u32::from(bits >> 10 & 31), u32::from(bits & 0x3ff));
    match exponent {
        // Below the least normal number the fraction counts steps of 2^-24.
        0 => f32::from_bits(sign | (fraction as f32 * 2.0_f32.powi(-24)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::{Stack, Stored, Tensor, TensorFile, half_to_f32};
    use crate::error::LoadError;
    use llmscale_kernels::element::Bf16;
    use std::io::Write;
    use std::sync::Arc;

    /// A file of these bytes that has no name any more.
    fn file(bytes: &[u8]) -> Arc<TensorFile> {
        let path = std::env::temp_dir().join(format!("llmscale-source-{}-{:p}", std::process::id(), bytes));
        std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        let opened = TensorFile::open(path.to_str().unwrap()).unwrap();
        std::fs::remove_file(&path).unwrap();
        Arc::new(opened)
    }

    fn tensor(file: &Arc<TensorFile>, begin: u64, stored: Stored, rows: usize, columns: usize) -> Tensor {
        Tensor { file: Arc::clone(file), begin, stored, rows, columns }
    }

    #[test]
    fn rows_of_a_stack_come_from_its_tensors_in_order_whatever_their_formats() {
        let mut bytes: Vec<u8> = [1.0_f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes.extend([5.0_f32, -6.0].iter().flat_map(|&value| Bf16::from_f32(value).0.to_le_bytes()));
        bytes.extend([0x4700_u16, 0xc800].iter().flat_map(|half| half.to_le_bytes()));
        let file = file(&bytes);
        let parts = vec![
            tensor(&file, 0, Stored::F32, 2, 2),
            tensor(&file, 16, Stored::Bf16, 1, 2),
            tensor(&file, 20, Stored::F16, 1, 2),
        ];
        let stack = Stack::new(parts).unwrap();
        assert_eq!((stack.rows(), stack.columns(), stack.bytes()), (4, 2, 24));
        assert_eq!(stack.read_all::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, -6.0, 7.0, -8.0]);
        let mut rows = [Bf16::default(); 4];
        stack.read(1, &mut rows).unwrap();
        assert_eq!(rows, [3.0, 4.0, 5.0, -6.0].map(Bf16::from_f32));
    }

    #[test]
    fn halves_are_converted_exactly() {
        let cases = [(0x0000, 0.0), (0x8000, -0.0), (0x0001, 2.0_f32.powi(-24)), (0x03ff, 1023.0 * 2.0_f32.powi(-24))];
        for (bits, value) in cases.into_iter().chain([(0x0400, 2.0_f32.powi(-14)), (0x3c01, 1.0 + 1.0 / 1024.0)]) {
            assert_eq!(half_to_f32(bits).to_bits(), value.to_bits(), "{bits:#x}");
        }
        assert_eq!(half_to_f32(0xfc00).to_bits(), f32::NEG_INFINITY.to_bits());
        assert!(half_to_f32(0x7c01).is_nan());
    }

    #[test]
    fn a_file_that_is_cut_off_is_an_error_with_its_place() {
        let file = file(&[0; 10]);
        let stack = Stack::new(vec![tensor(&file, 4, Stored::F32, 2, 1)]).unwrap();
        let Err(LoadError::File { problem, .. }) = stack.read_all::<f32>() else { panic!("it was read") };
        assert!(problem.to_string().contains("at byte 4"), "{problem}");
    }

    #[test]
    fn tensors_of_different_widths_are_no_stack() {
        let file = file(&[0; 16]);
        let parts = vec![tensor(&file, 0, Stored::I8, 2, 4), tensor(&file, 8, Stored::I8, 2, 3)];
        assert!(matches!(Stack::new(parts), Err(LoadError::Shape(_))));
        assert!(matches!(Stack::new(Vec::new()), Err(LoadError::Shape(_))));
    }
}
