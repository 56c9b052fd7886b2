//! What rows see of their sequence, what distance costs, and queries, keys and values that are parts of wider rows.

use super::*;
use crate::backend::Sight;
use crate::backend::cuda::KvDtype;

/// Positions of the sequences below: of the first, two chunks of attention and a part, which is three tiles.
const LENGTH: usize = 150;
const OTHER: usize = 21;

/// Where heads are not grouped, queries, keys and values are parts of the same rows.
fn queries_keys_values<B: Backend>(backend: &B, shape: &AttentionShape, length: usize) -> [B::Rows; 3] {
    let AttentionShape { query_heads, kv_heads, head_size, .. } = *shape;
    if query_heads == kv_heads {
        return backend.split(&rows(backend, 1, length, 3 * query_heads * head_size)).unwrap();
    }
    [(1, query_heads), (2, kv_heads), (3, kv_heads)]
        .map(|(seed, heads)| rows(backend, seed, length, heads * head_size))
}

/// Of two sequences without a cache, in one step.
fn whole<B: Backend>(backend: &B, shape: &AttentionShape) -> Vec<f32> {
    let [q, k, v] = queries_keys_values(backend, shape, LENGTH + OTHER);
    let span = |rows| SequenceSpan { rows, start: 0, blocks: Vec::new() };
    let spans = [span(0..LENGTH), span(LENGTH..LENGTH + OTHER)];
    backend.host(backend.attention(&q, &k, &v, shape, &spans, None).unwrap()).unwrap()
}

/// Of the same sequences, the first one's rows fed in chunks, the second's with the first of them.
fn in_chunks(gpu: &Cuda, shape: &AttentionShape, chunk: usize) -> Vec<f32> {
    let AttentionShape { kv_heads, head_size, .. } = *shape;
    let layout = CacheLayout { layers: 2, kv_heads, head_size, blocks: 30, block_size: 7 };
    let mut cache = gpu.cache(layout).unwrap();
    let all = queries_keys_values(gpu, shape, LENGTH + OTHER);
    let (mut first, mut second) = (Vec::<f32>::new(), Vec::<f32>::new());
    for start in (0..LENGTH).step_by(chunk) {
        let length = chunk.min(LENGTH - start);
        let mut ids = (start as u32..(start + length) as u32).collect::<Vec<_>>();
        let mut spans =
            vec![SequenceSpan { rows: 0..length, start, blocks: (0..22).map(|i| i * 5 % 22).collect() }];
        if start == 0 {
            ids.extend(LENGTH as u32..(LENGTH + OTHER) as u32);
            spans.push(SequenceSpan { rows: length..length + OTHER, start: 0, blocks: vec![29, 22, 25] });
        }
        let [q, k, v] = all.each_ref().map(|rows| gpu.select(rows, &ids).unwrap());
        let y = gpu.host(gpu.attention(&q, &k, &v, shape, &spans, Some((&mut cache, 1))).unwrap()).unwrap();
        let (one, other) = y.split_at(length * shape.query_heads * head_size);
        first.extend(one);
        second.extend(other);
    }
    first.extend(second);
    first
}

fn check(shape: AttentionShape, chunks: &[usize]) {
    let expected = whole(&Reference::new(), &shape);
    let of = |kv: KvDtype| gpu().with_kv(kv);
    let exact = whole(&of(KvDtype::F32), &shape);
    same(&format!("{shape:?}"), &exact, &expected, BF16);
    same(&format!("{shape:?}, rounded"), &whole(&of(KvDtype::Bf16), &shape), &expected, 2.0 * ROUNDED);
    for &chunk in chunks {
        assert!(in_chunks(&of(KvDtype::F32), &shape, chunk) == exact, "{shape:?}: chunks of {chunk} differ");
        let rounded = in_chunks(&of(KvDtype::Bf16), &shape, chunk);
        same(&format!("{shape:?}, rounded, {chunk}"), &rounded, &expected, 2.0 * ROUNDED);
    }
}

#[test]
fn a_window_ends_where_the_reference_ends_it_however_the_prompt_was_cut() {
    let cases = [((6, 2, 10), 1), ((2, 2, 24), 2), ((4, 1, 40), 63), ((2, 2, 64), 64), ((5, 1, 8), 1000)];
    for (i, ((query_heads, kv_heads, head_size), window)) in cases.into_iter().enumerate() {
        let shape = AttentionShape {
            sight: Sight::Window(window),
            ..AttentionShape::new(query_heads, kv_heads, head_size)
        };
        check(shape, if i % 2 == 0 { &[LENGTH, 7] } else { &[64, 9] });
    }
    // Without end it is none.
    let shape = AttentionShape::new(3, 1, 16);
    let endless = AttentionShape { sight: Sight::Window(usize::MAX), ..shape };
    for kv in [KvDtype::F32, KvDtype::Bf16] {
        let gpu = gpu().with_kv(kv);
        assert!(in_chunks(&gpu, &endless, 50) == in_chunks(&gpu, &shape, 50));
    }
}

#[test]
fn distance_costs_what_the_reference_says_however_the_prompt_was_cut() {
    // Heads that are no power of two have slopes of two series.
    let cases = [((3, 3, 24), Sight::Past), ((4, 4, 64), Sight::Past), ((12, 2, 16), Sight::Window(70))];
    for (i, ((query_heads, kv_heads, head_size), sight)) in cases.into_iter().enumerate() {
        let shape =
            AttentionShape { sight, alibi: true, ..AttentionShape::new(query_heads, kv_heads, head_size) };
        check(shape, if i == 1 { &[65] } else { &[LENGTH, 7] });
    }
    for size in [10, 136] {
        check(AttentionShape { alibi: true, ..AttentionShape::new(2, 2, size) }, &[LENGTH]);
    }
}

#[test]
fn rows_that_see_all_of_their_sequence_are_those_of_the_reference() {
    let cases = [((2, 2, 24), false), ((6, 2, 10), true), ((3, 3, 32), false), ((4, 1, 64), true)];
    for ((query_heads, kv_heads, head_size), alibi) in cases {
        let new = AttentionShape::new(query_heads, kv_heads, head_size);
        check(AttentionShape { sight: Sight::All, alibi, ..new }, &[]);
    }
}

#[test]
fn what_cannot_be_seen_is_refused() {
    let gpu = gpu();
    let layout = CacheLayout { layers: 1, kv_heads: 1, head_size: 8, blocks: 1, block_size: 4 };
    let mut cache = gpu.cache(layout).unwrap();
    let q = rows(&gpu, 1, 1, 8);
    let span = SequenceSpan { rows: 0..1, start: 0, blocks: vec![0] };
    for (sight, why) in [(Sight::All, "no cache"), (Sight::Window(0), "at least one position")] {
        let shape = AttentionShape { sight, ..AttentionShape::new(1, 1, 8) };
        let refused = gpu.attention(&q, &q, &q, &shape, std::slice::from_ref(&span), Some((&mut cache, 0)));
        let said = refused.err().unwrap().to_string();
        assert!(said.contains(why), "{said}");
    }
}
