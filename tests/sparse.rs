//! Sparse bases (Shears, SQFT) against PyTorch, and adapters that count only where the base is not zero (SparsePEFT).

use crate::files::assert_names;
use crate::golden::{self, Supernet, distance, push};
use crate::logits::{Cases, SPARSE};
use lonas::artifact::Base;
use lonas::backend::Selection;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::model::llama::{self, LlamaExecutor};
use lonas::model::{Adapters, Batch, Executor, Orders, model_shape};
use std::sync::Arc;

#[test]
fn a_base_with_zeros_anywhere_is_loaded_as_any_other() {
    let base = Base::open(&golden::path("sparse/base")).unwrap();
    let gate = base.matrix("model.layers.0.mlp.gate_proj.weight", 256, 128).unwrap().to_f32();
    assert_eq!(gate.iter().filter(|weight| **weight == 0.0).count(), gate.len() / 2);

    let Cases { tokens, .. } = golden::json("sparse/cases.json");
    let golden = golden::tensors("sparse/logits.safetensors");
    let backend = Cpu::new(Dtype::Auto, 2);
    let model = llama::load(&backend, &base, Vec::new(), &Orders::default()).unwrap();
    let shape = Arc::new(model_shape(&base.config, None).full());
    let mut executor = LlamaExecutor::new(model, backend, 8, 16).unwrap();
    for (i, tokens) in tokens.iter().enumerate() {
        let mut batch = Batch::default();
        let selection = Selection { adapter: 0, subnetwork: 0, shape: Arc::clone(&shape) };
        push(&mut batch, selection, tokens, 0, &[3, 1]);
        let ours = executor.forward(&batch).unwrap().values;
        let off = distance(&ours, &golden[&format!("base/{i}")]);
        assert!(off <= 1e-4, "sequence {i}: off by {off}");
    }
}

#[test]
fn a_sparse_adapter_is_merged_or_refused() {
    let (base, name) = SPARSE;
    let net = Supernet::open(base, name);
    assert!(net.folder.adapter_config.sparse);
    let cpu = Cpu::new(Dtype::F32, 1);
    let unmerged = llama::load(&cpu, &net.base, vec![net.super_adapter()], &net.orders);
    let message = unmerged.map(|_| ()).unwrap_err().to_string();
    assert_names(&message, &["`sparse_adapter`", "--merge-adapter", "export"]);
    // That merged ones compute what they should stands in `logits` and `export`.
    net.executor(cpu, Adapters::Merged(net.super_adapter()), (4, 16));
}

#[test]
fn merging_a_sparse_adapter_keeps_every_zero_and_no_other_weight_as_it_was() {
    let (base, name) = SPARSE;
    let net = Supernet::open(base, name);
    let adapter = net.super_adapter();
    let mut changed = 0;
    for linear in &net.shape.linears {
        let Some((a, b)) = adapter.tensors.get(&linear.name) else { continue };
        let before = net.base.matrix(&format!("{}.weight", linear.name), linear.out, linear.inp).unwrap();
        let after = before.clone().plus_product(adapter.scale, b, a, true).to_f32();
        let dense = before.clone().plus_product(adapter.scale, b, a, false).to_f32();
        for ((before, after), dense) in before.to_f32().into_iter().zip(after).zip(dense) {
            assert_eq!(after, if before == 0.0 { 0.0 } else { dense });
            changed += usize::from(after != before);
        }
    }
    assert!(changed > 1000, "{changed} weights changed");
}
