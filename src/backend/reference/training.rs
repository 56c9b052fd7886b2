//! AdamW over the reference backend's variables.
//!
//! The adapters are a few million numbers, so the optimizer works on plain host vectors, where its arithmetic can be
//! read. A variable outside the sampled prefix has a zero gradient, not none: its moments decay and weight decay
//! still acts, as in LoNAS.

use super::gradients::Gradients;
use super::product::with_values;
use super::{Reference, lock, named};
use crate::backend::BackendError;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

/// A tensor's name, shape and row-major values.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    pub name: String,
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f32>,
}

impl Reference {
    fn variables(&self) -> Vec<(String, Var)> {
        self.training.as_ref().map(|t| lock(&t.state).variables.clone()).unwrap_or_default()
    }
}

/// AdamW's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    /// torch's own, without weight decay, as LoNAS trains language models.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW (Loshchilov and Hutter 2019) as `torch.optim.AdamW` computes it, over all variables of one backend.
pub struct AdamW {
    options: AdamWOptions,
    steps: u64,
    parameters: Vec<Parameter>,
}

struct Parameter {
    name: String,
    variable: Var,
    value: Vec<f32>,
    gradient: Vec<f32>,
    moment1: Vec<f32>,
    moment2: Vec<f32>,
}

/// All that AdamW remembers, for a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWState {
    pub steps: u64,
    pub values: Vec<NamedTensor>,
    pub moments1: Vec<NamedTensor>,
    pub moments2: Vec<NamedTensor>,
}

impl AdamW {
    /// Takes every adapter tensor that `backend` has loaded so far.
    pub fn new(backend: &Reference, options: AdamWOptions) -> Result<Self, BackendError> {
        let parameter = |(name, variable): (String, Var)| {
            let value = flat(variable.as_tensor())?;
            let zeros = vec![0.0; value.len()];
            let (gradient, moment1, moment2) = (zeros.clone(), zeros.clone(), zeros);
            Ok(Parameter { name, variable, value, gradient, moment1, moment2 })
        };
        let parameters = backend.variables().into_iter().map(parameter).collect::<Result<_, _>>()?;
        Ok(Self { options, steps: 0, parameters })
    }

    /// Adds `weight` times these gradients to what the next step will use.
    pub fn accumulate(&mut self, gradients: &Gradients, weight: f64) -> Result<(), BackendError> {
        self.parameters.par_iter_mut().try_for_each(|parameter| {
            let Some(gradient) = gradients.of(&parameter.variable) else { return Ok(()) };
            let sums = &mut parameter.gradient;
            let add = |gradient: &[f32]| {
                sums.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g * weight as f32);
                Ok(())
            };
            let on_host = gradient.contiguous().and_then(|g| g.to_device(&Device::Cpu));
            // A copy to the host may still be under way when it has been asked for.
            let there = on_host.and_then(|g| gradient.device().synchronize().map(|()| g));
            named("gradient", there.and_then(|g| with_values(&g, add)))
        })
    }

    /// The accumulated gradients.
    pub fn gradients(&self) -> Vec<NamedTensor> {
        self.parameters.iter().map(|p| p.named(&p.gradient)).collect()
    }

    /// The variables' values.
    pub fn values(&self) -> Vec<NamedTensor> {
        self.parameters.iter().map(|p| p.named(&p.value)).collect()
    }

    /// The norm of the accumulated gradient, over all variables together.
    pub fn gradient_norm(&self) -> f64 {
        let square = |p: &Parameter| p.gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        // Collected first, so that the sum does not depend on which thread was faster.
        self.parameters.par_iter().map(square).collect::<Vec<_>>().iter().sum::<f64>().sqrt()
    }

    /// Clips the accumulated gradient, whose norm is `norm`, to `max_norm`, takes one step and forgets the gradient.
    pub fn step(&mut self, learning_rate: f64, norm: f64, max_norm: f64) -> Result<(), BackendError> {
        // torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6.
        let clip = (max_norm / (norm + 1e-6)).min(1.0);
        self.steps += 1;
        let (options, steps) = (self.options, self.steps);
        let update = |p: &mut Parameter| p.update(&options, steps, learning_rate, clip);
        self.parameters.par_iter_mut().try_for_each(update)
    }

    pub fn state(&self) -> AdamWState {
        let all = |of: fn(&Parameter) -> &Vec<f32>| self.parameters.iter().map(|p| p.named(of(p))).collect();
        AdamWState {
            steps: self.steps,
            values: all(|p| &p.value),
            moments1: all(|p| &p.moment1),
            moments2: all(|p| &p.moment2),
        }
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// A tensor that is missing or has another size.
    pub fn restore(&mut self, state: AdamWState) -> Result<(), BackendError> {
        let AdamWState { steps, values, moments1, moments2 } = state;
        for (tensors, of) in [
            (values, (|p| &mut p.value) as fn(&mut Parameter) -> &mut Vec<f32>),
            (moments1, |p| &mut p.moment1),
            (moments2, |p| &mut p.moment2),
        ] {
            for parameter in &mut self.parameters {
                let found = tensors.iter().find(|t| t.name == parameter.name);
                let found = found.filter(|t| t.values.len() == parameter.value.len());
                let Some(tensor) = found else {
                    return Err(BackendError::Shape {
                        operation: "restore",
                        expected: format!("tensor `{}` of {} values", parameter.name, parameter.value.len()),
                        got: "none".into(),
                    });
                };
                of(parameter).clone_from(&tensor.values);
            }
        }
        self.steps = steps;
        self.parameters.iter_mut().try_for_each(Parameter::publish)
    }
}

impl Parameter {
    fn update(
        &mut self,
        options: &AdamWOptions,
        steps: u64,
        learning_rate: f64,
        clip: f64,
    ) -> Result<(), BackendError> {
        let AdamWOptions { beta1, beta2, eps, weight_decay } = *options;
        let correction1 = 1.0 - beta1.powf(steps as f64);
        let correction2_sqrt = (1.0 - beta2.powf(steps as f64)).sqrt();
        let step_size = learning_rate / correction1;
        let decay = (1.0 - learning_rate * weight_decay) as f32;
        let moments = self.moment1.iter_mut().zip(&mut self.moment2);
        for ((value, gradient), (m, v)) in self.value.iter_mut().zip(&mut self.gradient).zip(moments) {
            let g = (f64::from(*gradient) * clip) as f32;
            *gradient = 0.0;
            *m += (1.0 - beta1) as f32 * (g - *m);
            *v = beta2 as f32 * *v + (1.0 - beta2) as f32 * g * g;
            let denominator = v.sqrt() / correction2_sqrt as f32 + eps as f32;
            *value = *value * decay - step_size as f32 * *m / denominator;
        }
        self.publish()
    }

    /// Makes the value what the model computes with.
    fn publish(&mut self) -> Result<(), BackendError> {
        let tensor = self.variable.as_tensor();
        let set = Tensor::from_slice(&self.value, tensor.shape(), tensor.device());
        named("step", set.and_then(|t| self.variable.set(&t)))
    }

    fn named(&self, values: &[f32]) -> NamedTensor {
        let dims = self.variable.as_tensor().dims();
        NamedTensor { name: self.name.clone(), rows: dims[0], columns: dims[1], values: values.to_vec() }
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>, BackendError> {
    named("gradient", tensor.flatten_all().and_then(|t| t.to_vec1()))
}
