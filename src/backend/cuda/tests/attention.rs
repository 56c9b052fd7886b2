//! Attention, however the prompt was cut and whoever is in the step.

use super::*;
use crate::backend::cuda::KvDtype;
use crate::backend::{AttentionShape, CacheLayout, SequenceSpan};

/// Positions of the sequence below: three chunks of attention, the last a part.
const LENGTH: usize = 150;

/// Two sequences that share their first block, fed in chunks, with the angles of their positions; of layer 1.
fn attended<B: Backend>(
    backend: &B,
    shape: AttentionShape,
    (cached, fused): (bool, bool),
    chunk: usize,
) -> Vec<f32> {
    let AttentionShape { query_heads, kv_heads, head_size, .. } = shape;
    let layout = CacheLayout { layers: 2, kv_heads, head_size, blocks: 12, block_size: 16 };
    let mut cache = backend.cache(layout).unwrap();
    let (length, mut all) = (LENGTH, Vec::new());
    let frequencies = (0..head_size / 2).map(|i| 0.7f32.powi(i as i32)).collect::<Vec<_>>();
    let [q, k, v] = [(1, query_heads), (2, kv_heads), (3, kv_heads)]
        .map(|(seed, heads)| rows(backend, seed, length, heads * head_size));
    for start in (0..length).step_by(chunk) {
        let end = (start + chunk).min(length);
        let (ids, positions) = ((start as u32..end as u32).collect::<Vec<_>>(), start as u32..end as u32);
        let angles = backend.angles(&positions.collect::<Vec<_>>(), &frequencies).unwrap();
        let part = |x: &B::Rows| backend.select(x, &ids).unwrap();
        let blocks = if cached { vec![11, 3, 5, 0, 7, 2, 9, 1, 10, 4] } else { Vec::new() };
        let span = [SequenceSpan { rows: 0..end - start, start, blocks }];
        let cache = cached.then_some((&mut cache, 1));
        let y = if fused {
            let qkv = [part(&q), part(&k), part(&v)];
            backend.rotary_attention(qkv, &angles, &shape, &span, &[], cache).unwrap()
        } else {
            let turned = |x: &B::Rows| backend.rotary(part(x), head_size, &angles).unwrap();
            backend.attention(&turned(&q), &turned(&k), &part(&v), &shape, &span, cache).unwrap()
        };
        all.extend(backend.host(y).unwrap());
    }
    all
}

#[test]
fn attention_is_what_the_reference_computes_however_the_prompt_was_cut() {
    for (query_heads, kv_heads, head_size) in [(6, 2, 10), (1, 1, 2), (4, 4, 64), (3, 1, 130), (20, 2, 16)] {
        let shape = AttentionShape::new(query_heads, kv_heads, head_size);
        let (gpu, reference) = (gpu().with_kv(KvDtype::F32), Reference::new());
        let whole = attended(&gpu, shape, (false, false), LENGTH);
        let expected = attended(&reference, shape, (false, false), LENGTH);
        same(&format!("{shape:?}"), &whole, &expected, BF16);
        for (chunk, fused) in [(LENGTH, true), (64, false), (7, true)] {
            let cut = attended(&gpu, shape, (true, fused), chunk);
            assert_eq!(cut, whole, "{shape:?} in chunks of {chunk}");
        }
        // Keys and values in bf16 are off by their rounding. Many rows take tensor cores where heads are multiples of eight.
        let gpu = gpu.with_kv(KvDtype::Bf16);
        let rounded = [LENGTH, 65, 7].map(|chunk| attended(&gpu, shape, (true, chunk > 7), chunk));
        assert_ne!(rounded[0], whole);
        assert!(rounded[0] == rounded[1], "{shape:?}: chunks of 65 differ");
        for (rounded, chunk) in rounded.iter().zip([LENGTH, 65, 7]) {
            same(&format!("{shape:?}, rounded, {chunk}"), rounded, &expected, 2.0 * ROUNDED);
        }
    }
}

/// Sequences of which some decode and others have many rows, beside what each gives alone.
#[test]
fn a_step_of_prompts_and_decoding_sequences_attends_as_each_alone() {
    let gpu = gpu().with_kv(KvDtype::Bf16);
    let shape = AttentionShape::new(6, 2, 24);
    let layout = CacheLayout { layers: 1, kv_heads: 2, head_size: 24, blocks: 40, block_size: 4 };
    let lengths = [1usize, 20, 1, 9, 3];
    let mut start = 0;
    let spans = [0, 1, 2, 3, 4].map(|i: u32| {
        let length = lengths[i as usize];
        start += length;
        SequenceSpan { rows: start - length..start, start: 0, blocks: (8 * i..8 * i + 8).rev().collect() }
    });
    let [q, k, v] = [(1, 144), (2, 48), (3, 48)].map(|(seed, width)| rows(&gpu, seed, 34, width));
    let run = |rows: &[u32], spans: &[SequenceSpan]| {
        let mut cache = gpu.cache(layout).unwrap();
        let [q, k, v] = [&q, &k, &v].map(|x| gpu.select(x, rows).unwrap());
        gpu.host(gpu.attention(&q, &k, &v, &shape, spans, Some((&mut cache, 0))).unwrap()).unwrap()
    };
    let together = run(&(0..34).collect::<Vec<_>>(), &spans);
    for span in spans {
        let own = span.rows.start as u32..span.rows.end as u32;
        let alone = SequenceSpan { rows: 0..span.rows.len(), ..span.clone() };
        let alone = run(&own.collect::<Vec<_>>(), &[alone]);
        assert_eq!(alone, together[span.rows.start * 144..span.rows.end * 144], "{span:?}");
    }
}
