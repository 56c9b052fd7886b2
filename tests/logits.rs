//! Logits of tiny super-networks against PyTorch + PEFT, which slices every module by LoNAS's rules.

use crate::golden::{self, Supernet, distance, push};
use lonas::backend::Backend;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::model::llama::LlamaExecutor;
use lonas::model::{Batch, Executor};

#[derive(serde::Deserialize)]
struct Cases {
    tokens: Vec<Vec<u32>>,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    choices: Vec<usize>,
}

/// Base, super-network.
const NETS: [(&str, &str); 4] = [
    ("tiny-tied/base", "tiny-tied"),
    ("tiny-untied-bf16/base", "tiny-untied-bf16"),
    ("tiny-bias-headdim/base", "tiny-bias-headdim"),
    ("tiny-tied/base", "tiny-tied-ordered"),
];

const BLOCK_SIZE: usize = 4;

/// How far logits may be from the golden ones.
#[derive(Clone, Copy)]
enum Tolerance {
    /// The largest difference.
    Absolute(f32),
    /// The Euclidean distance over the golden logits' norm.
    Relative(f32),
}

fn relative(logits: &[f32], golden: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut logits.iter().zip(golden).map(|(a, b)| a - b)) / norm(&mut golden.iter().copied())
}

/// Every sub-network and every sequence in one mixed batch, whole and in chunks of `chunk` tokens, against the golden
/// logits.
fn check<B: Backend>(backend: impl Fn() -> B, tolerance: Tolerance) {
    for (base, name) in NETS {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let golden = golden::tensors(&format!("{name}/logits.safetensors"));
        for chunk in [100, 5, 1] {
            let backend = backend();
            let model = net.load(&backend);
            let mut executor = LlamaExecutor::new(model, backend, 200, BLOCK_SIZE).unwrap();
            let logits = all_logits(&mut executor, &net, &tokens, &cases, chunk);
            for (case, of_case) in cases.iter().zip(logits) {
                for (i, logits) in of_case.iter().enumerate() {
                    let golden = &golden[&format!("{}/{i}", case.name)];
                    let (off, most) = match tolerance {
                        Tolerance::Absolute(most) => (distance(logits, golden), most),
                        Tolerance::Relative(most) => (relative(logits, golden), most),
                    };
                    assert!(off <= most, "{name} {} sequence {i} chunk {chunk}: off by {off}", case.name);
                }
            }
        }
    }
}

/// By case, by sequence: logits `(tokens, V)`, computed in steps that feed every sequence its next `chunk` tokens.
fn all_logits(
    executor: &mut dyn Executor,
    net: &Supernet,
    tokens: &[Vec<u32>],
    cases: &[Case],
    chunk: usize,
) -> Vec<Vec<Vec<f32>>> {
    let mut logits = vec![vec![Vec::new(); tokens.len()]; cases.len()];
    let longest = tokens.iter().map(Vec::len).max().unwrap();
    for start in (0..longest).step_by(chunk) {
        let (mut batch, mut owners) = (Batch::default(), Vec::new());
        for (c, case) in cases.iter().enumerate() {
            let sub_network = net.space.sub_network(case.choices.clone()).unwrap();
            for (s, sequence) in tokens.iter().enumerate().filter(|(_, t)| t.len() > start) {
                let rows = &sequence[start..(start + chunk).min(sequence.len())];
                // Each sequence has blocks of its own, in an order that is not theirs in the pool.
                let first = (c * tokens.len() + s) * 6;
                let blocks = (0..6).rev().map(|b| (first + b) as u32).collect::<Vec<_>>();
                push(&mut batch, net.selection(c as u32, &sub_network), rows, start, &blocks);
                owners.extend(std::iter::repeat_n((c, s), rows.len()));
            }
        }
        let result = executor.forward(&batch).unwrap();
        for (row, (c, s)) in owners.into_iter().enumerate() {
            logits[c][s].extend_from_slice(result.row(row));
        }
    }
    logits
}

/// Greedy decoding and every logit are the same bit for bit alone and mixed, whole and in chunks.
fn bits<B: Backend>(backend: impl Fn() -> B) {
    for (base, name) in NETS {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let run = |tokens: &[Vec<u32>], cases: &[Case], chunk| {
            let backend = backend();
            let model = net.load(&backend);
            let mut executor = LlamaExecutor::new(model, backend, 200, BLOCK_SIZE).unwrap();
            all_logits(&mut executor, &net, tokens, cases, chunk)
        };
        let mixed = run(&tokens, &cases, 100);
        assert!(run(&tokens, &cases, 1) == mixed, "{name}: one token at a time differs");
        assert!(run(&tokens, &cases, 7) == mixed, "{name}: chunks of 7 differ");
        for (case, of_case) in cases.iter().zip(&mixed) {
            for (sequence, logits) in tokens.iter().zip(of_case) {
                let alone = run(std::slice::from_ref(sequence), std::slice::from_ref(case), 100);
                assert!(&alone[0][0] == logits, "{name} {}: alone differs from mixed", case.name);
            }
        }
    }
}

#[test]
fn the_cpu_backend_agrees_with_pytorch() {
    check(|| Cpu::new(Dtype::F32, 2), Tolerance::Absolute(1e-4));
    // What the file has in bf16 stays as it is, so that Auto is as exact.
    check(|| Cpu::new(Dtype::Auto, 1), Tolerance::Absolute(1e-4));
}

#[test]
fn smaller_dtypes_differ_by_their_rounding_only() {
    // A bf16 weight is off by up to 2^-9 of itself, an int8 one by 1/254 of its block's largest; a few layers of random
    // weights amplify that ten to twenty times; a wrong kernel would be off by about 1.
    check(|| Cpu::new(Dtype::Bf16, 2), Tolerance::Relative(0.05));
    check(|| Cpu::new(Dtype::Int8, 2), Tolerance::Relative(0.08));
}

#[test]
fn rows_are_independent_bit_for_bit_on_the_cpu_backend() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        bits(|| Cpu::new(dtype, 2));
    }
}

#[test]
fn the_reference_backend_agrees_with_pytorch() {
    check(Reference::new, Tolerance::Absolute(1e-4));
}
