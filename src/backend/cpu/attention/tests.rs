//! Attention against a slow one in f64 over ugly sizes, and bit for bit against itself.

use super::super::kernel::Kernel;
use super::super::{Cpu, Dtype, Rows};
use super::{KvDtype, STRETCH};
use crate::backend::{AttentionShape, Backend, CacheLayout, SequenceSpan, Sight, alibi_slopes};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SHAPES: [AttentionShape; 7] = [
    AttentionShape::new(6, 2, 10),
    AttentionShape::new(3, 3, 16),
    AttentionShape::new(9, 3, 64),
    AttentionShape::new(4, 1, 80),
    // Heads that are no power of two; a window within a tile, and one of several stretches.
    AttentionShape { alibi: true, ..AttentionShape::new(6, 3, 12) },
    AttentionShape { sight: Sight::Window(5), ..AttentionShape::new(2, 2, 8) },
    AttentionShape { sight: Sight::Window(2 * STRETCH - 40), alibi: true, ..AttentionShape::new(3, 1, 8) },
];
const ROWS: [usize; 7] = [1, 2, 3, 7, 16, 64, 133];

/// Queries, keys and values of one whole sequence.
struct Sequence {
    shape: AttentionShape,
    q: Rows,
    k: Rows,
    v: Rows,
}

impl Sequence {
    fn new(seed: u64, shape: AttentionShape, rows: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut rows = |heads: usize| {
            let width = heads * shape.head_size;
            Rows::new(width, (0..rows * width).map(|_| random.random_range(-2.0..2.0)).collect())
        };
        Self { shape, q: rows(shape.query_heads), k: rows(shape.kv_heads), v: rows(shape.kv_heads) }
    }

    fn len(&self) -> usize {
        self.q.len()
    }

    /// By definition, in f64, from what the pool keeps.
    fn slow(&self, row: usize, kv: KvDtype) -> Vec<f64> {
        let AttentionShape { query_heads, kv_heads, head_size, sight, alibi } = self.shape;
        let slopes = alibi_slopes(query_heads);
        let seen = match sight {
            Sight::Past => 0..row + 1,
            Sight::Window(width) => (row + 1).saturating_sub(width)..row + 1,
            Sight::All => 0..self.len(),
        };
        let kept = |x: f32| match kv {
            KvDtype::F32 => f64::from(x),
            KvDtype::Bf16 => bf16::from_f32(x).to_f64(),
        };
        let of_head = |n: usize| {
            let query = &self.q.row(row)[n * head_size..(n + 1) * head_size];
            let head = n / (query_heads / kv_heads) * head_size;
            let score = |p: usize| {
                let key = &self.k.row(p)[head..head + head_size];
                let dot = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * kept(k)).sum::<f64>();
                let far = if alibi { f64::from(slopes[n]) * (p as f64 - row as f64) } else { 0.0 };
                (dot / (head_size as f64).sqrt() + far).exp()
            };
            let weights = seen.clone().map(score).collect::<Vec<_>>();
            let sum: f64 = weights.iter().sum();
            let number = |d: usize| {
                weights.iter().zip(seen.clone()).map(|(w, p)| w / sum * kept(self.v.row(p)[head + d])).sum()
            };
            (0..head_size).map(number).collect::<Vec<f64>>()
        };
        (0..query_heads).flat_map(of_head).collect()
    }
}

/// Sequences that are fed to a backend step by step, their blocks scattered among each other's.
struct Fed<'a> {
    cpu: &'a Cpu,
    sequences: &'a [Sequence],
    block_size: usize,
    cache: super::PagedCache,
}

const LAYER: usize = 1;

impl<'a> Fed<'a> {
    fn new(cpu: &'a Cpu, sequences: &'a [Sequence], block_size: usize) -> Self {
        let AttentionShape { kv_heads, head_size, .. } = sequences[0].shape;
        let most = sequences.iter().map(Sequence::len).max().unwrap();
        let blocks = most.div_ceil(block_size) * sequences.len();
        let layout = CacheLayout { layers: 2, kv_heads, head_size, blocks, block_size };
        Self { cpu, sequences, block_size, cache: cpu.cache(layout).unwrap() }
    }

    /// One step of some rows of some sequences, `(sequence, first row, rows)`: the rows' attention.
    fn step(&mut self, parts: &[(usize, usize, usize)]) -> Vec<Vec<f32>> {
        let most = self.sequences.iter().map(Sequence::len).max().unwrap().div_ceil(self.block_size);
        let sequences = self.sequences;
        let gather = |of: fn(&Sequence) -> &Rows| {
            let rows = |&(s, start, rows): &(usize, usize, usize)| {
                (start..start + rows).flat_map(move |r| of(&sequences[s]).row(r).to_vec())
            };
            Rows::new(of(&sequences[0]).width(), parts.iter().flat_map(rows).collect())
        };
        let (q, k, v) = (gather(|s| &s.q), gather(|s| &s.k), gather(|s| &s.v));
        let mut first = 0;
        let span = |&(s, start, rows): &(usize, usize, usize)| {
            first += rows;
            let block = |b: usize| ((most - 1 - b) * self.sequences.len() + s) as u32;
            let blocks = (0..(start + rows).div_ceil(self.block_size)).map(block).collect();
            SequenceSpan { rows: first - rows..first, start, blocks }
        };
        let spans = parts.iter().map(span).collect::<Vec<_>>();
        let (shape, cache) = (self.sequences[0].shape, Some((&mut self.cache, LAYER)));
        let y = self.cpu.attention(&q, &k, &v, &shape, &spans, cache).unwrap();
        (0..y.len()).map(|r| y.row(r).to_vec()).collect()
    }
}

fn check(got: &[f32], expected: &[f64], what: &str) {
    for (n, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() < 2e-5, "{what}, number {n}: {got} not {expected}");
    }
}

#[test]
fn a_row_that_sees_its_whole_sequence_sees_no_other() {
    for (query_heads, kv_heads, head_size) in [(4, 4, 10), (6, 2, 64), (2, 1, 320)] {
        let shape =
            AttentionShape { sight: Sight::All, ..AttentionShape::new(query_heads, kv_heads, head_size) };
        let sequences = [1, 40, 300, 7].map(|rows| Sequence::new(rows as u64, shape, rows));
        let gather = |of: fn(&Sequence) -> &Rows| {
            let values = sequences.iter().flat_map(|s| of(s).values()).copied().collect();
            Rows::new(of(&sequences[0]).width(), values)
        };
        let (q, k, v) = (gather(|s| &s.q), gather(|s| &s.k), gather(|s| &s.v));
        let mut end = 0;
        let spans = sequences.each_ref().map(|s| {
            end += s.len();
            SequenceSpan { rows: end - s.len()..end, start: 0, blocks: Vec::new() }
        });
        for kernel in Kernel::available() {
            let cpu = Cpu::with_kernel(Dtype::F32, 2, kernel);
            let mixed = cpu.attention(&q, &k, &v, &shape, &spans, None).unwrap();
            for (sequence, span) in sequences.iter().zip(&spans) {
                for row in [0, span.rows.len() / 3, span.rows.len() - 1] {
                    let what = format!("{kernel:?} {shape:?} row {row} of {}", sequence.len());
                    check(mixed.row(span.rows.start + row), &sequence.slow(row, KvDtype::F32), &what);
                }
                let whole = SequenceSpan { rows: 0..sequence.len(), ..span.clone() };
                let alone =
                    cpu.attention(&sequence.q, &sequence.k, &sequence.v, &shape, &[whole], None).unwrap();
                let of_mixed =
                    mixed.values()[span.rows.start * q.width()..span.rows.end * q.width()].to_vec();
                assert!(alone.values() == of_mixed, "{kernel:?} {shape:?} {} rows alone", sequence.len());
            }
            let mut cache =
                cpu.cache(CacheLayout { layers: 1, kv_heads, head_size, blocks: 99, block_size: 4 }).unwrap();
            let error = cpu.attention(&q, &k, &v, &shape, &spans, Some((&mut cache, 0))).unwrap_err();
            assert!(error.to_string().contains("rows see what follows"), "{error}");
        }
    }
}

#[test]
fn attention_is_what_its_formula_says_at_every_size() {
    for (shape, starts) in SHAPES.into_iter().flat_map(|s| [(s, [0, 5]), (s, [31, 2 * STRETCH - 3])]) {
        for rows in ROWS {
            let sequences = starts.map(|start| Sequence::new(start as u64, shape, start + rows));
            for kv in [KvDtype::F32, KvDtype::Bf16] {
                // All rows would take f64 too long.
                let chosen = [0, rows / 3, rows - 1];
                let slow = [0, 1].map(|s| chosen.map(|row| sequences[s].slow(starts[s] + row, kv)));
                for (kernel, block_size) in
                    Kernel::available().into_iter().flat_map(|k| [1, 4, 16, 32, 48].map(|b| (k, b)))
                {
                    let cpu = Cpu::with_kernel(Dtype::F32, 2, kernel).with_kv(kv);
                    let mut fed = Fed::new(&cpu, &sequences, block_size);
                    for (s, &start) in starts.iter().enumerate().filter(|(_, start)| **start > 0) {
                        fed.step(&[(s, 0, start)]);
                    }
                    let got = fed.step(&[(0, starts[0], rows), (1, starts[1], rows)]);
                    for s in [0, 1] {
                        for (i, row) in chosen.into_iter().enumerate() {
                            let what = format!(
                                "{kernel:?} {kv:?} {shape:?} blocks of {block_size}, {rows} rows from {} on, row {row}",
                                starts[s]
                            );
                            check(&got[s * rows + row], &slow[s][i], &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_in_every_chunk_batch_and_number_of_threads() {
    let rows = STRETCH + 45;
    for shape in SHAPES {
        let sequences = [1, 2, 3].map(|seed| Sequence::new(seed, shape, rows));
        for (kernel, kv) in
            Kernel::available().into_iter().flat_map(|k| [(k, KvDtype::F32), (k, KvDtype::Bf16)])
        {
            let cpus = [1, 2].map(|threads| Cpu::with_kernel(Dtype::F32, threads, kernel).with_kv(kv));
            let whole = Fed::new(&cpus[0], &sequences, 16).step(&[(1, 0, rows)]);
            for (cpu, block_size) in cpus.iter().flat_map(|cpu| [4, 16].map(|b| (cpu, b))) {
                for chunk in [1, 3, 4, 16, 100] {
                    let mut fed = Fed::new(cpu, &sequences, block_size);
                    for start in (0..rows).step_by(chunk) {
                        let count = chunk.min(rows - start);
                        // Between chunks of other lengths of two others, as far as those go.
                        let other = |s: usize, chunk: usize| {
                            let start = start / 3 * s;
                            (s, start, chunk.min(rows - start))
                        };
                        let parts = [other(2, 5), (1, start, count), other(0, 1)];
                        let before = parts[0].2;
                        let got = fed.step(&parts);
                        assert_eq!(
                            got[before..before + count],
                            whole[start..start + count],
                            "{kernel:?} {kv:?} {shape:?} blocks of {block_size}, chunks of {chunk}, from {start} on"
                        );
                    }
                }
                if kv == KvDtype::F32 {
                    let Sequence { q, k, v, .. } = &sequences[1];
                    let span = SequenceSpan { rows: 0..rows, start: 0, blocks: Vec::new() };
                    let uncached = cpu.attention(q, k, v, &shape, &[span], None).unwrap();
                    assert_eq!(uncached.values(), whole.concat());
                }
            }
        }
    }
}

#[test]
fn a_span_sees_the_blocks_that_an_earlier_span_of_the_step_has_written() {
    let shape = SHAPES[2];
    let sequence = Sequence::new(1, shape, 60);
    for (kv, block_size) in [(KvDtype::F32, 1), (KvDtype::Bf16, 1), (KvDtype::F32, 16)] {
        let cpu = Cpu::new(Dtype::F32, 2).with_kv(kv);
        let layout = CacheLayout { layers: 1, kv_heads: 3, head_size: 64, blocks: 100, block_size };
        let shared = 48;
        let table = (0..60u32.div_ceil(block_size as u32)).map(|b| 99 - b).collect::<Vec<_>>();
        let mut cache = cpu.cache(layout).unwrap();
        let spans = [
            SequenceSpan { rows: 0..shared, start: 0, blocks: table[..shared / block_size].to_vec() },
            SequenceSpan { rows: shared..60, start: shared, blocks: table.clone() },
        ];
        let Sequence { q, k, v, .. } = &sequence;
        let cut = cpu.attention(q, k, v, &shape, &spans, Some((&mut cache, 0))).unwrap();
        let span = SequenceSpan { rows: 0..60, start: 0, blocks: table };
        let mut cache = cpu.cache(layout).unwrap();
        let whole = cpu.attention(q, k, v, &shape, &[span], Some((&mut cache, 0))).unwrap();
        assert_eq!(cut.values(), whole.values());
    }
}

#[test]
fn spans_that_overlap_are_refused() {
    let shape = SHAPES[0];
    let Sequence { q, k, v, .. } = Sequence::new(1, shape, 5);
    let span = |rows| SequenceSpan { rows, start: 0, blocks: Vec::new() };
    let cpu = Cpu::new(Dtype::F32, 2);
    for rows in [[0..3, 2..5], [3..5, 0..3], [0..3, 3..6]] {
        assert!(cpu.attention(&q, &k, &v, &shape, &rows.map(span), None).is_err());
    }
}

#[test]
fn what_stands_in_a_block_beyond_the_context_changes_nothing() {
    for shape in [SHAPES[0], SHAPES[2]] {
        let width = shape.kv_heads * shape.head_size;
        let sequences = [1, 2].map(|seed| Sequence::new(seed, shape, 40));
        let broken = Sequence {
            k: Rows::new(width, vec![f32::NAN; 40 * width]),
            v: Rows::new(width, vec![f32::INFINITY; 40 * width]),
            ..Sequence::new(3, shape, 40)
        };
        let cpu = Cpu::new(Dtype::F32, 2);
        // A prompt, then a token by itself.
        let steps = |mut fed: Fed<'_>| [fed.step(&[(0, 0, 21)]), fed.step(&[(0, 21, 1)])];
        let clean = steps(Fed::new(&cpu, &sequences, 16));
        // The same blocks, after a sequence that overflowed.
        let broken = [broken, Sequence::new(2, shape, 40)];
        let mut fed = Fed::new(&cpu, &broken, 16);
        fed.step(&[(0, 0, 40)]);
        assert_eq!(steps(Fed { sequences: &sequences, ..fed }), clean);
    }
}
