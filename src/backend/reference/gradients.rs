//! The loss of a model that comes in stages, and its gradient.
//!
//! A graph of a whole micro-batch remembers every operation's operands. Here it can be cut at each layer's input: what
//! the layer computes is forgotten and, on the way back, computed again with a graph of its own (gradient
//! checkpointing: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). The same operations run on the
//! same numbers, so that the gradient is the same bit for bit.
//!
//! The logits of a large vocabulary are the largest activation of all, and on their way back candle holds four tensors
//! of their size (logits, gradient, the zeros it adds it to, the sum). So the loss is taken of few rows at a time, and
//! their logits are gone before the next ones are computed. That holds for a teacher's logits too: what is kept of it is
//! what its last layer gave, a vocabulary's worth smaller.

use super::fused::{CrossEntropy, Divergence};
use super::{Reference, named};
use crate::backend::BackendError;
use candle_core::{Result, Tensor, TensorId, Var};
use std::collections::HashMap;
use std::ops::Range;

/// Rows whose logits exist at the same time on a processor. Fewer would not use it well: each time, the product with the
/// vocabulary reads all of it. A GPU takes more, see [`Compute::logits_rows`](super::Compute::logits_rows).
pub(super) const LOGITS_ROWS: usize = 128;

type Done<T> = std::result::Result<T, BackendError>;

/// A batch's way through a model.
pub trait Stages {
    /// `(T, H)`: what the first layer takes.
    fn embed(&self) -> Done<Tensor>;

    fn layers(&self) -> usize;

    /// `x (T, H)` to the same after layer `index`.
    fn layer(&self, index: usize, x: Tensor) -> Done<Tensor>;

    /// What the rows that are asked for their next token should say, at least one.
    fn targets(&self) -> &[u32];

    /// The logits of some of these rows, `(n, V)`, from what the last layer gave.
    fn logits(&self, x: &Tensor, targets: Range<usize>) -> Done<Tensor>;

    /// What a teacher's last layer gave for the same rows, `(T, H)`, where its distribution is to be learnt in place of
    /// the targets. Its logits are computed as this model's are, since the vocabulary product is the same.
    fn teacher(&self) -> Option<&Tensor> {
        None
    }
}

/// What a way there and back gives.
pub struct BothWays {
    /// The mean over all targets, nats: of the cross-entropy or, where there is a teacher, of the divergence from it.
    pub loss: f32,
    pub gradients: Gradients,
    /// What the last layer gave, `(T, H)`, without a graph.
    pub last: Tensor,
}

/// The gradient of one loss for every variable that it depends on.
#[derive(Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Reference {
    /// The mean loss of all targets, nats.
    pub fn loss(&self, stages: &impl Stages) -> Done<f32> {
        let mut x = stages.embed()?;
        for layer in 0..stages.layers() {
            // Nothing goes back, so nothing need be remembered.
            x = stages.layer(layer, x)?.detach();
        }
        self.loss_of_rows(stages, &x, |_| Ok(()))
    }

    /// The mean loss of all targets, and its gradient. With `recompute`, each layer's input is all that is remembered of
    /// it.
    pub fn loss_and_gradients(&self, stages: &impl Stages, recompute: bool) -> Done<BothWays> {
        let first = variable(&stages.embed()?)?;
        let mut x = first.as_tensor().clone();
        let mut remembered = Vec::new();
        for layer in 0..stages.layers() {
            if recompute {
                x = x.detach();
                remembered.push((x.clone(), self.dropout_position()));
            }
            x = stages.layer(layer, x)?;
        }

        let last = variable(&x)?;
        let mut gradients = Gradients::default();
        let mut above = named("loss", last.zeros_like())?;
        let loss = self.loss_of_rows(stages, &last, |part| {
            let of_part = gradients.go_back(part, &part.ones_like()?, &last)?;
            above = (&above + of_part)?;
            Ok(())
        })?;
        let last = last.as_tensor().detach();

        if !recompute {
            named("backward", gradients.go_back(&x, &above, &first))?;
            return Ok(BothWays { loss, gradients, last });
        }
        drop(x);
        for (layer, (input, position)) in remembered.into_iter().enumerate().rev() {
            self.continue_dropout(position);
            let input = variable(&input)?;
            let y = stages.layer(layer, input.as_tensor().clone())?;
            above = named("backward", gradients.go_back(&y, &above, &input))?;
        }
        Ok(BothWays { loss, gradients, last })
    }

    /// The mean loss of all targets from what the last layer gave. `each` gets every summand while its graph still
    /// exists.
    fn loss_of_rows(
        &self,
        stages: &impl Stages,
        x: &Tensor,
        mut each: impl FnMut(&Tensor) -> Result<()>,
    ) -> Done<f32> {
        let targets = stages.targets();
        let mut mean = 0.0;
        let at_once = self.compute.logits_rows();
        for start in (0..targets.len()).step_by(at_once) {
            let rows = start..targets.len().min(start + at_once);
            let count = targets.len();
            let logits = stages.logits(x, rows.clone())?;
            let teacher = stages.teacher().map(|last| stages.logits(last, rows.clone())).transpose()?;
            let part = || {
                let part = match teacher {
                    Some(teacher) => self.compute.run1(Divergence { teacher, count }, &logits),
                    None => {
                        self.compute.run1(CrossEntropy { targets: targets[rows].to_vec(), count }, &logits)
                    }
                }?;
                each(&part)?;
                part.to_scalar::<f32>()
            };
            mean += f64::from(named("loss", part())?);
        }
        Ok(mean as f32)
    }
}

/// A copy that gradients can be asked for.
fn variable(x: &Tensor) -> Done<Var> {
    named("backward", Var::from_tensor(&x.detach()))
}

impl Gradients {
    /// Of one variable, if the loss depends on it.
    pub(super) fn of(&self, variable: &Var) -> Option<&Tensor> {
        self.0.get(&variable.as_tensor().id())
    }

    /// Goes on from `y`, whose gradient is `above`: adds those of all variables that `y` comes from, and returns that
    /// of `input`, which is one of them.
    fn go_back(&mut self, y: &Tensor, above: &Tensor, input: &Var) -> Result<Tensor> {
        // The gradient of sum(y * above) is 1 * above at y: candle's way back begins at a scalar only.
        let scalar = (y * above)?.sum_all()?;
        let store = scalar.backward()?;
        let mut of_input = None;
        for variable in scalar.sorted_nodes().into_iter().filter(|node| node.is_variable()) {
            let Some(gradient) = store.get(variable) else { continue };
            if variable.id() == input.id() {
                of_input = Some(gradient.clone());
                continue;
            }
            let sum = match self.0.get(&variable.id()) {
                Some(so_far) => (so_far + gradient)?,
                None => gradient.clone(),
            };
            self.0.insert(variable.id(), sum);
        }
        of_input.map_or_else(|| input.zeros_like(), Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::sync::Mutex;

    /// Each layer adds its variable; notes every call and how long the graph behind its input was.
    struct Sums {
        added: Vec<Var>,
        targets: Vec<u32>,
        calls: Mutex<Vec<(usize, usize)>>,
        /// Rows of each piece of the logits.
        pieces: Mutex<Vec<usize>>,
    }

    const WIDTH: usize = 5;

    impl Sums {
        fn new(rows: usize) -> Self {
            let value = |i: usize| (0..rows * WIDTH).map(|j| (i * 31 + j * 7) as f32 % 3.0).collect();
            let values = (0..3).map(|i| Tensor::from_vec(value(i), (rows, WIDTH), &Device::Cpu).unwrap());
            let added = values.map(|t| Var::from_tensor(&t).unwrap()).collect();
            let targets = (0..rows).map(|r| (r % WIDTH) as u32).collect();
            Self { added, targets, calls: Mutex::default(), pieces: Mutex::default() }
        }
    }

    impl Stages for Sums {
        fn embed(&self) -> Done<Tensor> {
            named("embed", self.added[0].zeros_like())
        }

        fn layers(&self) -> usize {
            self.added.len()
        }

        fn layer(&self, index: usize, x: Tensor) -> Done<Tensor> {
            self.calls.lock().unwrap().push((index, x.sorted_nodes().len()));
            named("layer", &x + self.added[index].as_tensor())
        }

        fn targets(&self) -> &[u32] {
            &self.targets
        }

        fn logits(&self, x: &Tensor, targets: Range<usize>) -> Done<Tensor> {
            self.pieces.lock().unwrap().push(targets.len());
            named("logits", x.narrow(0, targets.start, targets.len()))
        }
    }

    #[test]
    fn a_layer_that_is_computed_again_is_not_remembered_and_its_gradient_is_the_same() {
        let backend = Reference::on_one_thread();
        let rows = 2 * LOGITS_ROWS + 3;
        let stages = Sums::new(rows);
        let whole = backend.loss_and_gradients(&stages, false).unwrap();
        // The graph grows by an addition and a variable a layer.
        assert_eq!(std::mem::take(&mut *stages.calls.lock().unwrap()), [(0, 1), (1, 3), (2, 5)]);
        assert_eq!(*stages.pieces.lock().unwrap(), [LOGITS_ROWS, LOGITS_ROWS, 3]);
        let cut = backend.loss_and_gradients(&stages, true).unwrap();
        // Forward without a graph, then from the last layer to the first, from a variable each.
        let expected = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)];
        assert_eq!(*stages.calls.lock().unwrap(), expected);

        let logits = stages.added.iter().map(|v| v.to_vec2::<f32>().unwrap());
        let logits = logits.reduce(|a, b| {
            a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
        });
        let (mut mean, mut gradient) = (0.0f64, Vec::new());
        for (row, &target) in logits.unwrap().iter().zip(&stages.targets) {
            let total = row.iter().map(|&l| f64::from(l).exp()).sum::<f64>();
            mean -= (f64::from(row[target as usize]).exp() / total).ln() / rows as f64;
            let part = |(i, l): (usize, &f32)| f64::from(*l).exp() / total - f64::from(i == target as usize);
            gradient.extend(row.iter().enumerate().map(|cell| part(cell) / rows as f64));
        }
        assert_eq!(cut.loss, whole.loss);
        assert_eq!(cut.last.to_vec2::<f32>().unwrap(), whole.last.to_vec2::<f32>().unwrap());
        assert!((f64::from(cut.loss) - mean).abs() < 1e-6, "{} not {mean}", cut.loss);
        assert!((f64::from(backend.loss(&stages).unwrap()) - mean).abs() < 1e-6);
        for variable in &stages.added {
            let of = |g: &Gradients| g.of(variable).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(of(&cut.gradients), of(&whole.gradients));
            let got = of(&cut.gradients);
            let off = got.iter().zip(&gradient).map(|(a, b)| (f64::from(*a) - b).abs());
            assert!(off.fold(0.0, f64::max) < 1e-8);
        }
    }
}
