//! What a sub-network says all by itself, computed by the model alone: no server, no engine, no batch.

use super::app::{executor, supernets};
use crate::golden::{Supernet, push};
use crate::tiny::Tiny;
use lonas::backend::cpu::Cpu;
use lonas::model::llama::LlamaExecutor;
use lonas::model::{Batch, Executor};

pub(crate) struct Alone {
    nets: [Supernet; 2],
    executor: LlamaExecutor<Cpu>,
}

/// One sub-network of the first or the second super-adapter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Which {
    pub(crate) adapter: usize,
    pub(crate) name: &'static str,
}

impl Alone {
    pub(crate) fn new(tiny: &Tiny) -> Self {
        let nets = supernets(tiny);
        let executor = executor(&nets, 40);
        Self { nets, executor }
    }

    /// The logits after each of these tokens.
    pub(crate) fn logits(&mut self, which: Which, tokens: &[u32]) -> Vec<Vec<f32>> {
        let net = &self.nets[which.adapter];
        let catalog = net.folder.catalog(&net.shape, &net.space).unwrap();
        let mut selection = net.selection(0, &catalog.get(which.name).unwrap().sub_network);
        selection.adapter = which.adapter;
        let mut batch = Batch::default();
        push(&mut batch, selection, tokens, 0, &(0..40).collect::<Vec<_>>());
        let logits = self.executor.forward(&batch).unwrap();
        (0..tokens.len()).map(|i| logits.row(i).to_vec()).collect()
    }

    /// The likeliest tokens one after the other, each time from the whole history.
    pub(crate) fn greedy(&mut self, which: Which, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut history = prompt.to_vec();
        for _ in 0..count {
            let last = self.logits(which, &history).pop().unwrap();
            let best = (0..last.len()).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            history.push(best as u32);
        }
        history.split_off(prompt.len())
    }
}

/// The natural-log softmax of these logits, in f64.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    logits.iter().map(|&x| f64::from(x - largest) - sum.ln()).collect()
}
