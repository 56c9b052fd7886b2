//! A super-adapter to begin with.

use crate::artifact::AdapterTensors;
use crate::supernet::ModelShape;
use crate::weights::{HostData, HostMatrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A by Kaiming's uniform rule with `a = sqrt(5)`, which is uniform in `±1/sqrt(inp)`; B zero: PEFT's defaults.
pub fn fresh_adapter(shape: &ModelShape, seed: u64) -> AdapterTensors {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(u64::MAX - 1);
    let mut tensors = AdapterTensors::new();
    for linear in &shape.linears {
        let Some(rank) = linear.rank else { continue };
        let bound = 1.0 / (linear.inp as f32).sqrt();
        let a = (0..rank * linear.inp).map(|_| random.random_range(-bound..bound)).collect();
        let matrix = |part: &str, rows, columns, values| HostMatrix {
            name: format!("{}.{part}.weight", linear.name),
            rows,
            columns,
            data: HostData::F32(values),
        };
        let a = matrix("lora_A", rank, linear.inp, a);
        let b = matrix("lora_B", linear.out, rank, vec![0.0; linear.out * rank]);
        tensors.insert(linear.name.clone(), (a, b));
    }
    tensors
}
