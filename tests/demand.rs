//! What a step must read and multiply, counted by hand from the tiny model's sizes.
//!
//! `tiny-tied`: 3 layers, H 48, I 80, 6 query and 2 key-value heads of 8, V 97, adapters of rank 8 on all Linears but
//! `o_proj`; its minimal sub-network has width 40 and rank 4, but for `down_proj`, whose rank is fixed.

use crate::golden::{Supernet, push};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::backend::{Backend, Selection};
use lonas::model::llama::LlamaExecutor;
use lonas::model::{Batch, Executor};

const LAYERS: usize = 3;
/// Of one layer: q and o, k and v, gate and up, down.
const MAXIMAL: usize = 2 * 48 * 48 + 2 * 16 * 48 + 2 * 80 * 48 + 48 * 80;
const MINIMAL: usize = 2 * 48 * 48 + 2 * 16 * 48 + 2 * 40 * 48 + 48 * 40;
/// Of one layer's adapters: q, k and v, gate and up, down.
const MAXIMAL_ADAPTER: usize = 8 * (48 + 48) + 2 * 8 * (48 + 16) + 2 * 8 * (48 + 80) + 8 * (80 + 48);
const MINIMAL_ADAPTER: usize = 4 * (48 + 48) + 2 * 4 * (48 + 16) + 2 * 4 * (48 + 40) + 8 * (40 + 48);
const HEAD: usize = 97 * 48;
/// Keys and values of one position.
const POSITION: usize = LAYERS * 2 * 2 * 8;
/// Multiply-adds of one row that sees one position: its product with the key, the value's with its weight.
const ATTENTION: usize = LAYERS * 2 * 48;

struct Selections {
    maximal: Selection,
    minimal: Selection,
    bare: Selection,
}

fn open<B: Backend>(backend: B) -> (LlamaExecutor<B>, Selections) {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let executor = LlamaExecutor::new(net.load(&backend), backend, 20, 4).unwrap();
    let maximal = net.selection(0, &net.space.maximal());
    let minimal = net.selection(1, &net.space.minimal());
    let bare = Selection { adapter: usize::MAX, ..minimal.clone() };
    (executor, Selections { maximal, minimal, bare })
}

/// Each sub-network with its rows and where they start.
fn batch(parts: &[(&Selection, usize, usize)]) -> Batch {
    let mut batch = Batch::default();
    for (i, &(selection, rows, start)) in parts.iter().enumerate() {
        let first = 4 * i as u32;
        push(&mut batch, selection.clone(), &vec![1; rows], start, &[first, first + 1, first + 2, first + 3]);
    }
    batch
}

#[test]
fn traffic_is_what_a_count_by_hand_gives() {
    let (executor, Selections { maximal, minimal, bare }) = open(Reference::new());
    let floats = |parts: &[(&Selection, usize, usize)]| executor.traffic(&batch(parts)) / 4;
    assert_eq!(executor.weight_bytes() / 4, LAYERS * (MAXIMAL + MAXIMAL_ADAPTER) + HEAD, "the head is tied");
    assert_eq!(
        floats(&[(&maximal, 3, 0)]),
        LAYERS * (MAXIMAL + MAXIMAL_ADAPTER) + HEAD + 3 * POSITION,
        "three new positions"
    );
    assert_eq!(
        floats(&[(&minimal, 1, 5)]),
        LAYERS * (MINIMAL + MINIMAL_ADAPTER) + HEAD + 6 * POSITION,
        "five positions and the new one"
    );
    assert_eq!(floats(&[(&bare, 1, 0)]), LAYERS * MINIMAL + HEAD + POSITION, "no adapter");
    assert_eq!(
        floats(&[(&maximal, 1, 0), (&minimal, 2, 2)]),
        LAYERS * (MAXIMAL + MAXIMAL_ADAPTER) + HEAD + 5 * POSITION,
        "a prefix of what is read anyway costs nothing"
    );
    assert_eq!(
        floats(&[(&bare, 1, 0), (&minimal, 1, 0)]),
        LAYERS * (MINIMAL + MINIMAL_ADAPTER) + HEAD + 2 * POSITION
    );
}

#[test]
fn layers_that_are_left_out_are_not_counted() {
    // Four layers, H 24, I 40, 4 query and 2 key-value heads of 8, V 57, adapters of rank 8; two of them and a half are left.
    let net = Supernet::open("tiny-depth/base", "tiny-depth");
    let backend = Reference::new();
    let executor = LlamaExecutor::new(net.load(&backend), backend, 20, 4).unwrap();
    let choices = [[8; 4], [40, 0, 40, 40], [8; 4], [32, 0, 0, 32]].concat();
    let selection = net.selection(0, &net.space.sub_network(choices).unwrap());
    let batch = batch(&[(&selection, 1, 5)]);
    let attention = 2 * 32 * 24 + 2 * 16 * 24 + 8 * (24 + 32) + 2 * 8 * (24 + 16);
    let mlp = 3 * 40 * 24 + 3 * 8 * (24 + 40);
    let weights = 2 * attention + 3 * mlp + 57 * 24;
    let cached = 6 * 2 * 2 * 16;
    assert_eq!(executor.traffic(&batch) / 4, weights + cached);
    let seen = 2 * 2 * 32 * 6;
    assert_eq!(executor.multiply_adds(&batch).f32, weights + seen);
}

#[test]
fn multiply_adds_are_what_a_count_by_hand_gives() {
    let (executor, Selections { maximal, minimal, bare }) = open(Reference::new());
    let count = |batch: &Batch| executor.multiply_adds(batch).total();
    // Rows at positions 0, 1, 2 see 1, 2, 3 positions; the helper wants every row's logits.
    assert_eq!(
        count(&batch(&[(&maximal, 3, 0)])),
        3 * LAYERS * (MAXIMAL + MAXIMAL_ADAPTER) + 3 * HEAD + 6 * ATTENTION
    );
    assert_eq!(
        count(&batch(&[(&minimal, 1, 5), (&bare, 1, 0)])),
        LAYERS * (2 * MINIMAL + MINIMAL_ADAPTER) + 2 * HEAD + 7 * ATTENTION
    );
    let mut quiet = batch(&[(&bare, 2, 0)]);
    quiet.outputs.clear();
    assert_eq!(count(&quiet), 2 * LAYERS * MINIMAL + HEAD + 3 * ATTENTION, "one row's logits stand in");
}

#[test]
fn the_cpu_backend_reads_no_more_for_less() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        let (executor, Selections { maximal, minimal, bare }) = open(Cpu::new(dtype, 1));
        let bytes = |parts: &[(&Selection, usize, usize)]| executor.traffic(&batch(parts));
        let position = bytes(&[(&maximal, 2, 0)]) - bytes(&[(&maximal, 1, 0)]);
        let whole = bytes(&[(&maximal, 1, 0)]);
        assert_eq!(whole - position, executor.weight_bytes(), "{dtype:?}: everything is read once");
        assert!(whole > bytes(&[(&minimal, 1, 0)]) && bytes(&[(&minimal, 1, 0)]) > bytes(&[(&bare, 1, 0)]));
        let mixed = bytes(&[(&maximal, 1, 0), (&minimal, 1, 0)]);
        assert_eq!(mixed, whole + position, "{dtype:?}: a mix reads its largest");
        assert_eq!(
            executor.multiply_adds(&batch(&[(&bare, 1, 0)])).total(),
            LAYERS * MINIMAL + HEAD + ATTENTION
        );
    }
}
