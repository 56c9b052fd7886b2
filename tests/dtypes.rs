//! Bases kept in fewer bits: what rounding the weights and the inputs of products does to the logits.
//!
//! That the kernels compute what they should on rounded numbers is tested beside them; here the whole model is, against
//! PyTorch on the unrounded base.

use crate::golden::{self, Supernet};
use crate::logits::{Cases, NETS, golden_logits, run};
use lonas::backend::Backend;
use lonas::backend::cpu::{Cpu, Dtype};

/// The errors of 3 layers' 21 products add up like independent ones, `sqrt(21)` times a single one's; layers of large
/// random weights, whose softmax is steep, amplify them 4 to 6 times more. Something wrong moves logits by about 1.
const AMPLIFIED: f32 = 8.0;

/// A backend against PyTorch, as the Euclidean distance over the golden norm. `error` is the root mean square of what
/// rounding does to a product's factors, over the factors' own.
fn check<B: Backend>(what: &str, backend: impl Fn() -> B, error: f32) {
    check_in_chunks(what, backend, error, 6);
}

/// The same, with steps that feed every sequence its next `chunk` tokens.
fn check_in_chunks<B: Backend>(what: &str, backend: impl Fn() -> B, error: f32, chunk: usize) {
    check_nets(&NETS, what, backend, error, chunk);
}

pub(crate) fn check_nets<B: Backend>(
    nets: &[(&str, &str)],
    what: &str,
    backend: impl Fn() -> B,
    error: f32,
    chunk: usize,
) {
    let cost = AMPLIFIED * 21f32.sqrt() * error;
    for &(base, name) in nets {
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let golden = golden_logits(name, &cases, tokens.len()).concat().concat();
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
        let net = Supernet::open(base, name);
        let ours = run(&net, backend(), &tokens, &cases, chunk).concat().concat();
        let off = norm(&mut ours.iter().zip(&golden).map(|(a, b)| a - b));
        let off = off / norm(&mut golden.iter().copied());
        assert!(off <= cost, "{name}: rounding to {what} moves the logits by {off} of their norm");
        // A base in f32 is rounded, so there is something to see.
        assert!(off > 1e-6 || base.contains("bf16"), "{name}: {what} rounds nothing");
    }
}

/// The root mean square of what rounding a product's factors to bf16 does. 8 bits of mantissa: off by up to 2^-9 of itself,
/// uniformly, and a bit less for mantissas above 1. Half more where inputs are rounded too.
pub(crate) const BF16_ERROR: f32 = 0.0008 * 1.5;

#[test]
fn bf16_costs_what_its_mantissa_says() {
    for threads in [1, 2] {
        check("bf16", || Cpu::new(Dtype::Bf16, threads), BF16_ERROR);
    }
}

/// The largest of 32 normal numbers is about 2.3 deviations, a step that over 127, the error a step over sqrt(12);
/// weights and inputs are rounded alike. On AVX2 an input's step is twice that.
pub(crate) const INT8_ERROR: f32 = 0.0053 * 1.5;

#[test]
fn int8_costs_what_its_step_says() {
    for threads in [1, 2] {
        check("int8", || Cpu::new(Dtype::Int8, threads), INT8_ERROR);
    }
}
