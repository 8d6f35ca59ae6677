//! The table of cosines and sines of a rotary embedding (Su et al. 2021, arXiv 2104.09864): one row per position. Angles
//! are products in f32, as the models were trained with; their cosines are rounded from f64. Memory is linear in the
//! longest sequence. Where frequencies come from is not known here.

use llmscale_kernels::rope_cache::RotaryTable;

/// Cosines and sines for positions from 0 on.
#[derive(Debug)]
pub struct RopeTable {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    rotary_dim: usize,
}

impl RopeTable {
    /// For these frequencies, in radians per position, and so many positions.
    pub fn new(frequencies: &[f32], positions: usize) -> Self {
        let angles =
            || (0..positions).flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)));
        Self {
            cosines: angles().map(|angle| angle.cos() as f32).collect(),
            sines: angles().map(|angle| angle.sin() as f32).collect(),
            rotary_dim: 2 * frequencies.len(),
        }
    }

    /// As kernels take it.
    pub fn view(&self) -> RotaryTable<'_> {
        RotaryTable { cosines: &self.cosines, sines: &self.sines, rotary_dim: self.rotary_dim }
    }
}

#[cfg(test)]
mod tests {
    use super::RopeTable;

    #[test]
    fn a_row_holds_the_cosines_and_sines_of_a_position() {
        let table = RopeTable::new(&[1.0, 0.25], 5);
        let view = table.view();
        assert_eq!((view.cosines.len(), view.rotary_dim), (10, 4));
        assert_eq!(&view.cosines[..2], [1.0, 1.0]);
        assert!((view.sines[8] - 4.0_f32.sin()).abs() < 1e-7 && (view.cosines[9] - 1.0_f32.cos()).abs() < 1e-7);
    }
}
