//! Logits of tiny super-networks against PyTorch + PEFT, which slices every module by LoNAS's rules.

use crate::golden::{self, Supernet, distance, push};
use lonas::backend::Backend;
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

/// Every sub-network and every sequence in one mixed batch, whole and in chunks of `chunk` tokens, against the golden
/// logits.
fn check<B: Backend>(backend: impl Fn() -> B, tolerance: f32) {
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
                    let off = distance(logits, &golden[&format!("{}/{i}", case.name)]);
                    assert!(off <= tolerance, "{name} {} sequence {i} chunk {chunk}: off by {off}", case.name);
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

#[test]
fn the_reference_backend_agrees_with_pytorch() {
    check(Reference::new, 1e-4);
}
