//! Attention of steps in which every sequence has one row: they are stored on the way.

use super::*;
use crate::backend::cuda::{Cache, KvDtype};
use crate::backend::{Sight, alibi_slopes};

/// Sequences in layer 1 of a pool of random numbers.
struct Decoding {
    gpu: Cuda,
    kv: KvDtype,
    shape: AttentionShape,
    layout: CacheLayout,
    cache: Cache,
    before: Vec<f32>,
}

/// A sequence's rows in a step: from which position on, how many, its blocks.
type Part = (usize, usize, Vec<u32>);

impl Decoding {
    fn new(kv: KvDtype, shape: AttentionShape, blocks: usize, block_size: usize) -> Self {
        let AttentionShape { kv_heads, head_size, .. } = shape;
        let gpu = gpu().with_kv(kv);
        let layout = CacheLayout { layers: 2, kv_heads, head_size, blocks, block_size };
        let before = random(9, 4 * kv_heads * head_size * blocks * block_size);
        let cache = gpu.cache(layout).unwrap();
        let halves = before.iter().copied().map(bf16::from_f32).collect::<Vec<_>>();
        let bytes: &[u8] = match kv {
            KvDtype::F32 => bytemuck::cast_slice(&before),
            KvDtype::Bf16 => bytemuck::cast_slice(&halves),
        };
        gpu.device.upload_to(cache.values.address, bytes).unwrap();
        Self { gpu, kv, shape, layout, cache, before }
    }

    fn pool(&self) -> Vec<f32> {
        let (address, length) = (self.cache.values.address, self.before.len());
        match self.kv {
            KvDtype::F32 => self.gpu.device.download(address, length).unwrap(),
            KvDtype::Bf16 => {
                let halves = self.gpu.device.download::<bf16>(address, length).unwrap();
                halves.into_iter().map(bf16::to_f32).collect()
            }
        }
    }

    /// The results of a step, its rotated queries where they are, and how many kernels it took.
    fn step(&mut self, seed: u64, parts: &[Part], rotated: bool) -> (Vec<f32>, u64) {
        let AttentionShape { query_heads, kv_heads, head_size, .. } = self.shape;
        let (gpu, count) = (self.gpu.clone(), parts.iter().map(|part| part.1).sum::<usize>());
        let [q, k, v] = [(seed, query_heads), (seed + 1, kv_heads), (seed + 2, kv_heads)]
            .map(|(seed, heads)| rows(&gpu, seed, count, heads * head_size));
        let positions = parts.iter().flat_map(|(start, count, _)| *start as u32..(start + count) as u32);
        let angles = gpu.angles(&positions.collect::<Vec<_>>(), &frequencies(head_size)).unwrap();
        let mut next = 0;
        let spans = parts.iter().map(|(start, count, blocks)| {
            next += count;
            SequenceSpan { rows: next - count..next, start: *start, blocks: blocks.clone() }
        });
        let (spans, cache) = (spans.collect::<Vec<_>>(), Some((&mut self.cache, 1)));
        gpu.finish().unwrap();
        let before = gpu.counts().launches;
        let y = if rotated {
            gpu.rotary_attention([q, k, v], &angles, &self.shape, &spans, &[], cache)
        } else {
            gpu.attention(&q, &k, &v, &self.shape, &spans, cache)
        };
        let y = y.unwrap();
        gpu.finish().unwrap();
        (gpu.host(y).unwrap(), gpu.counts().launches - before)
    }

    /// Where layer 1 has a slot's keys; its values are half a layer further on.
    fn slot(&self, blocks: &[u32], position: usize) -> usize {
        let CacheLayout { block_size, kv_heads, head_size, .. } = self.layout;
        let slot = blocks[position / block_size] as usize * block_size + position % block_size;
        self.before.len() / 2 + slot * kv_heads * head_size
    }

    /// The results of parts of one row each over what is in the pool now, as the formula has it.
    fn by_hand(&self, seed: u64, parts: &[Part], rotated: bool) -> Vec<f32> {
        let AttentionShape { query_heads, kv_heads, head_size: size, sight, alibi } = self.shape;
        let slopes = if alibi { alibi_slopes(query_heads) } else { vec![0.0; query_heads] };
        let (pool, group) = (self.pool(), query_heads / kv_heads);
        let q = random(seed, parts.len() * query_heads * size);
        let mut all = Vec::new();
        for (head, q) in q.chunks_exact(size).enumerate() {
            let ((position, _, blocks), head) = (&parts[head / query_heads], head % query_heads);
            let q = if rotated { turned(q, *position) } else { q.to_vec() };
            let at = |seen: usize| self.slot(blocks, seen) + head / group * size;
            let score = |seen: usize| {
                let dot = q.iter().zip(&pool[at(seen)..]).map(|(q, k)| f64::from(q * k)).sum::<f64>();
                (dot / (size as f64).sqrt() - f64::from(slopes[head]) * (position - seen) as f64).exp()
            };
            let first = first_seen(sight, *position);
            let scores = (first..=*position).map(score).collect::<Vec<_>>();
            let values = pool.len() / 4;
            let weighted = |d: usize| {
                let part = |(seen, score): (usize, &f64)| score * f64::from(pool[at(seen) + values + d]);
                let weighted = (first..).zip(&scores).map(part);
                weighted.sum::<f64>() / scores.iter().sum::<f64>()
            };
            all.extend((0..size).map(|d| weighted(d) as f32));
        }
        all
    }
}

fn first_seen(sight: Sight, position: usize) -> usize {
    match sight {
        Sight::Window(width) => (position + 1).saturating_sub(width),
        Sight::Past | Sight::All => 0,
    }
}

fn frequencies(head_size: usize) -> Vec<f32> {
    (0..head_size / 2).map(|i| 0.7f32.powi(i as i32)).collect()
}

fn turned(head: &[f32], position: usize) -> Vec<f32> {
    let (low, high) = head.split_at(head.len() / 2);
    let pairs =
        || low.iter().zip(high).zip(frequencies(head.len())).map(|(pair, f)| (pair, f * position as f32));
    let lower = pairs().map(|((x, y), angle)| x * angle.cos() - y * angle.sin());
    let upper = pairs().map(|((x, y), angle)| y * angle.cos() + x * angle.sin());
    lower.chain(upper).collect()
}

/// Sequences with blocks for one position more than the step has, theirs between each other's.
fn sequences(rows: &[(usize, usize)], block_size: usize) -> (Vec<Part>, usize) {
    let mut parts = rows.iter().map(|&(start, count)| (start, count, Vec::new())).collect::<Vec<Part>>();
    let wanted = |(start, count, _): &Part| (start + count) / block_size + 1;
    let total = parts.iter().map(wanted).sum::<usize>();
    let mut left = (0..total as u32).rev();
    while left.len() > 0 {
        for part in &mut parts {
            if part.2.len() < wanted(part) {
                part.2.extend(left.next());
            }
        }
    }
    (parts, total)
}

/// Two steps of sequences around the borders of chunks: by themselves, where `attend` stores, and beside a sequence with several
/// rows, where `store` does.
fn check_decoding(kv: KvDtype, shape: AttentionShape, (block_size, chunk): (usize, usize), rotated: bool) {
    let what = format!("{kv:?}, {shape:?}, blocks of {block_size}, {rotated}");
    let starts = [chunk - 2, 0, 2 * chunk + 1, chunk, 4];
    // Few rows, or as many as are taken by tiles.
    let other = (3, if chunk == 64 { 2 } else { 9 });
    let rows = starts.map(|start| (start, 1)).into_iter().chain([other]).collect::<Vec<_>>();
    let (mut parts, blocks) = sequences(&rows, block_size);
    let new = || Decoding::new(kv, shape, blocks, block_size);
    let (mut alone, mut beside, width) = (new(), new(), shape.query_heads * shape.head_size);
    let numbers = shape.kv_heads * shape.head_size;
    let mut written = Vec::new();
    for seed in [10, 20] {
        let ones = &parts[..starts.len()];
        let (one, few) = alone.step(seed, ones, rotated);
        let (other, more) = beside.step(seed, &parts, rotated);
        // The second step may be one graph, where memory came to lie as in the first.
        assert!(seed > 10 || few < more, "{what}: {few} kernels, and with `store` {more}");
        assert!(one == other[..starts.len() * width], "{what}: differs from store and attend");
        same(&what, &one, &alone.by_hand(seed, ones, rotated), BF16);
        written.extend(ones.iter().map(|(position, _, blocks)| alone.slot(blocks, *position)));
        parts.iter_mut().take(starts.len()).for_each(|part| part.0 += 1);
    }
    let (one, other) = (alone.pool(), beside.pool());
    let (layer, values) = (one.len() / 2, one.len() / 4);
    for slot in (layer..layer + values).step_by(numbers) {
        let both = |pool: &[f32]| [slot, slot + values].map(|at| pool[at..at + numbers].to_vec());
        let expected = if written.contains(&slot) { both(&other) } else { both(&alone.before) };
        assert_eq!(both(&one), expected, "{what}: slot at {slot}");
    }
    assert!(one[..layer] == alone.before[..layer], "{what}: another layer was written to");
}

#[test]
fn rows_that_are_stored_on_the_way_are_those_of_store_and_attend_bit_for_bit() {
    // Query heads, key-value heads, size; block size; positions of a chunk in bf16 and in f32.
    let cases = [
        ((1, 1, 20), 5, (64, 32)),
        ((6, 2, 36), 7, (64, 32)),
        ((2, 2, 8), 2, (128, 128)),
        ((4, 1, 40), 3, (128, 128)),
        ((9, 3, 64), 16, (128, 128)),
        ((7, 1, 72), 1, (128, 64)),
        ((2, 2, 128), 5, (128, 64)),
        ((8, 1, 128), 16, (128, 64)),
        ((3, 1, 136), 3, (64, 32)),
        ((1, 1, 250), 9, (64, 32)),
        ((1, 1, 256), 4, (64, 32)),
        ((4, 1, 256), 16, (64, 32)),
    ];
    for (i, ((query_heads, kv_heads, head_size), block_size, (of_bf16, of_f32))) in
        cases.into_iter().enumerate()
    {
        let shape = AttentionShape::new(query_heads, kv_heads, head_size);
        check_decoding(KvDtype::Bf16, shape, (block_size, of_bf16), i % 4 != 3);
        check_decoding(KvDtype::F32, shape, (block_size, of_f32), i % 4 != 1);
    }
}

#[test]
fn rows_with_a_window_or_a_price_of_distance_are_stored_on_the_way_too() {
    let cases = [
        ((6, 2, 36), 7, (64, 32), Sight::Past, true),
        ((4, 4, 64), 16, (128, 128), Sight::Past, true),
        ((5, 1, 40), 3, (128, 128), Sight::Past, true),
        ((2, 2, 8), 2, (128, 128), Sight::Window(1), false),
        ((8, 1, 128), 16, (128, 64), Sight::Window(100), false),
        ((3, 3, 136), 3, (64, 32), Sight::Window(64), true),
        ((1, 1, 250), 9, (64, 32), Sight::Window(33), true),
    ];
    for (i, ((query_heads, kv_heads, head_size), block_size, (of_bf16, of_f32), sight, alibi)) in
        cases.into_iter().enumerate()
    {
        let shape = AttentionShape { sight, alibi, ..AttentionShape::new(query_heads, kv_heads, head_size) };
        check_decoding(KvDtype::Bf16, shape, (block_size, of_bf16), i % 2 == 0);
        check_decoding(KvDtype::F32, shape, (block_size, of_f32), i % 2 == 1);
    }
}

/// Blocks that a window has left behind may be another sequence's by then, or hold anything.
#[test]
fn what_a_window_has_left_behind_is_not_read() {
    for (window, kv) in [(10, KvDtype::Bf16), (10, KvDtype::F32), (65, KvDtype::Bf16), (140, KvDtype::F32)] {
        let shape = AttentionShape { sight: Sight::Window(window), ..AttentionShape::new(4, 2, 16) };
        for count in [1, 9] {
            let blocks = (0..60).rev().collect::<Vec<u32>>();
            let mut decoding = Decoding::new(kv, shape, 60, 4);
            let left = vec![0xffu8; 32 * kv.bytes()];
            for seen in 0..first_seen(shape.sight, 200) {
                let slot = decoding.slot(&blocks, seen);
                for at in [slot, slot + decoding.before.len() / 4] {
                    let address = decoding.cache.values.address + (at * kv.bytes()) as u64;
                    decoding.gpu.device.upload_to(address, &left).unwrap();
                }
            }
            let (got, _) = decoding.step(10, &[(200, count, blocks.clone())], true);
            let parts =
                (200..200 + count).map(|position| (position, 1, blocks.clone())).collect::<Vec<Part>>();
            let what = format!("{kv:?}, {count} rows with a window of {window}");
            same(&what, &got, &decoding.by_hand(10, &parts, true), 2.0 * ROUNDED);
        }
    }
}

#[test]
fn a_row_that_reads_what_another_writes_waits_for_it() {
    type Sequences = &'static [(usize, &'static [u32])];
    let shape = AttentionShape::new(4, 2, 16);
    let cases: [(Sequences, u64); 6] = [
        // Each writes to a block of its own, and both read a third.
        (&[(5, &[0, 1]), (6, &[0, 2])], 1),
        (&[(3, &[3])], 1),
        // A block that both write to, one that the other reads, one that stands in a table twice.
        (&[(2, &[0]), (3, &[0])], 2),
        (&[(3, &[0]), (5, &[0, 1])], 2),
        (&[(5, &[0, 1]), (3, &[0])], 2),
        (&[(5, &[2, 2])], 2),
    ];
    for (parts, kernels) in cases {
        let mut decoding = Decoding::new(KvDtype::Bf16, shape, 4, 4);
        let parts = parts.iter().map(|(start, blocks)| (*start, 1, blocks.to_vec())).collect::<Vec<Part>>();
        let (got, launches) = decoding.step(10, &parts, true);
        assert_eq!(launches, kernels, "{parts:?}");
        same(&format!("{parts:?}"), &got, &decoding.by_hand(10, &parts, true), BF16);
    }
}

#[test]
fn a_tape_stays_the_same_until_contexts_have_twice_the_chunks() {
    let gpu = Cuda::open(0).unwrap();
    let shape = AttentionShape::new(1, 1, 8);
    let layout = CacheLayout { layers: 9, kv_heads: 1, head_size: 8, blocks: 20, block_size: 16 };
    let mut cache = gpu.cache(layout).unwrap();
    let table = gpu.table(host(1, 1, 8)).unwrap();
    for position in 0..132usize {
        let angles = gpu.angles(&[position as u32], &frequencies(8)).unwrap();
        for layer in 0..9 {
            let qkv = [0, 1, 2].map(|_| gpu.embed(&table, &[0]).unwrap());
            let blocks = (0..=position as u32 / 16).collect();
            let spans = [SequenceSpan { rows: 0..1, start: position, blocks }];
            gpu.rotary_attention(qkv, &angles, &shape, &spans, &[], Some((&mut cache, layer))).unwrap();
        }
        gpu.finish().unwrap();
        // Of 36 kernels, 8, 24 and the rest start together. A graph is made when such a part comes for the second time; chunks are of
        // 128 positions.
        let expected = match position {
            0 => 0,
            1..=128 => 3,
            _ => 6,
        };
        assert_eq!(gpu.counts().graphs, expected, "at position {position}");
    }
}
