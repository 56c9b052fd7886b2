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
    /// Multiply-accumulates of one sequence of [`COST_TOKENS`] tokens.
    pub macs: u64,
}

impl Cost {
    /// Counts the Linears of `active`, a sub-network of `shape`.
    pub fn of(shape: &ModelShape, active: &ActiveShape) -> Self {
        let parameters = shape.linears.iter().zip(&active.linears).map(|(full, a)| {
            let rank = if full.rank.is_some() { a.rank } else { 0 };
            (a.out * a.inp + rank * (a.inp + a.out)) as u64
        });
        let parameters = parameters.sum();
        Self { parameters, macs: parameters * COST_TOKENS }
    }
}
