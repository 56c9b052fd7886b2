//! Importance reordering: before training, the MLP channels of each layer are put in falling importance, so that a
//! narrower sub-network keeps the channels that matter.
//!
//! The score of channel `j` is `sqrt(mean act_j^2) * |down column j|`, its mean contribution to the residual stream,
//! with `act = silu(gate) * up` over calibration sequences. The permutation is exact: it moves gate and up rows and
//! down columns together and leaves the full-width model as it was.

use super::stages::whole_sequences;
use super::{Sequence, TrainError};
use crate::artifact::Base;
use crate::backend::Selection;
use crate::backend::reference::{Compute, Reference};
use crate::model::{CausalModel, Layout, LoadError, llama, model_shape};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How many sequences are enough: on SmolLM2-135M the order of 32 takes the untrained minimal sub-network from a loss of
/// 12.9 to 4.2 on held-out questions, and halves it after the same training (4.17 to 2.00).
pub const CALIBRATION_SEQUENCES: usize = 32;

/// By layer, the MLP's channels in falling importance over `sequences`.
pub fn importance_orders(
    base: &Base,
    sequences: &[Sequence],
    compute: Compute,
) -> Result<BTreeMap<usize, Vec<usize>>, TrainError> {
    let backend = Reference::measuring_channels().on(compute);
    let model = llama::load(&backend, base, Vec::new(), &BTreeMap::new())?;
    let shape = model_shape(&base.config, None);
    let selection = Selection { adapter: 0, subnetwork: 0, shape: Arc::new(shape.full()) };
    for sequence in sequences.iter().filter(|s| !s.targets().is_empty()).take(CALIBRATION_SEQUENCES) {
        let (batch, _) = whole_sequences(&[sequence], selection.clone());
        model.forward(&backend, &batch, None)?;
    }
    let mut orders = BTreeMap::new();
    for (down, (squares, rows)) in backend.channel_squares() {
        let linear = &shape.linears[down];
        let weight = base.matrix(&format!("{}.weight", linear.name), linear.out, linear.inp);
        let norms = column_norms(&weight.map_err(LoadError::from)?.to_f32(), linear.inp);
        let scores = squares.iter().zip(&norms).map(|(s, norm)| (s / rows.max(1) as f64).sqrt() * norm);
        let (layer, _) = Layout::of(base.config.family).place(down);
        orders.insert(layer, falling(&scores.collect::<Vec<_>>()));
    }
    Ok(orders)
}

fn column_norms(weight: &[f32], columns: usize) -> Vec<f64> {
    let mut squares = vec![0.0; columns];
    for row in weight.chunks_exact(columns) {
        for (sum, &w) in squares.iter_mut().zip(row) {
            *sum += f64::from(w) * f64::from(w);
        }
    }
    squares.into_iter().map(f64::sqrt).collect()
}

/// Indices by falling score; equal scores keep their order.
fn falling(scores: &[f64]) -> Vec<usize> {
    let mut order = (0..scores.len()).collect::<Vec<_>>();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn column_norms_and_falling_order_are_what_they_say() {
        assert_eq!(column_norms(&[3.0, 0.0, 1.0, 4.0, 0.0, 1.0], 3), [5.0, 0.0, 2.0_f64.sqrt()]);
        assert_eq!(falling(&[1.0, 3.0, 2.0, 3.0]), [1, 3, 2, 0]);
    }
}
