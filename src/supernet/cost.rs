//! Parameters and MACs by LoNAS's own counting rule.
//!
//! The rule (NNCF's `weights_flops_calculator`, which the LoNAS scripts call): every Linear counts, base and adapter,
//! the vocabulary product included; embeddings, norms, biases and the attention products do not. A Linear of
//! `(out, inp)` has `out * inp` parameters and costs `out * inp` MACs for each token.

use super::{ActiveShape, ModelShape};

/// The sequence length at which LoNAS reports MACs of language models.
pub const COST_TOKENS: u64 = 256;

/// What one sub-network costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cost {
    /// Linear weights, base and adapter.
    pub parameters: u64,
    /// Multiply-accumulates of one sequence of [`ModelShape::cost_tokens`] tokens.
    pub macs: u64,
}

impl Cost {
    /// Counts the Linears of `active`, a sub-network of `shape`.
    pub fn of(shape: &ModelShape, active: &ActiveShape) -> Self {
        let (mut parameters, mut macs) = (0, 0);
        for (index, (full, a)) in shape.linears.iter().zip(&active.linears).enumerate() {
            let rank = if full.rank.is_some() { a.rank } else { 0 };
            let weights = (a.out * a.inp + rank * (a.inp + a.out)) as u64;
            parameters += weights;
            macs += weights * if index < shape.once_from { shape.cost_tokens } else { 1 };
        }
        Self { parameters, macs }
    }
}
