//! A layer norm's weight and shift, which BLOOM, MPT and BERT have where a LLaMA scales rows without centring them.

use super::load::{LoadError, Loader};
use crate::backend::{Backend, BackendError};
use crate::weights::HostVector;

/// `(H)` each.
pub(super) struct LayerNorm<B: Backend> {
    weight: B::Vector,
    bias: B::Vector,
    eps: f32,
}

impl<B: Backend> LayerNorm<B> {
    /// The tensors `NAME.weight` and `NAME.bias` of the base.
    pub(super) fn load(loader: &Loader<'_, B>, name: &str) -> Result<Self, LoadError> {
        let config = &loader.base.config;
        let part = |part| loader.vector(&format!("{name}.{part}"), config.hidden);
        Ok(Self { weight: part("weight")?, bias: part("bias")?, eps: config.norm_eps })
    }

    /// The tensor `NAME.weight` alone, and no shift.
    pub(super) fn without_shift(loader: &Loader<'_, B>, name: &str) -> Result<Self, LoadError> {
        let config = &loader.base.config;
        let none = HostVector { name: format!("{name}.bias"), data: vec![0.0; config.hidden] };
        let weight = loader.vector(&format!("{name}.weight"), config.hidden)?;
        Ok(Self { weight, bias: loader.backend.vector(none)?, eps: config.norm_eps })
    }

    /// `x (T, H)`, each row normed.
    pub(super) fn of(&self, backend: &B, x: &B::Rows) -> Result<B::Rows, BackendError> {
        backend.layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}
