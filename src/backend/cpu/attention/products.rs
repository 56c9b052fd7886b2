//! The inner loops of attention: rows times a tile, and the softmax of a row's scores.
//!
//! Every output has one accumulator that takes the inputs in order, and every sum over lanes one order, so that a row's
//! numbers do not depend on the rows beside it.

use super::TILE;
use super::lanes::{Lanes, exp};

/// Rows that do not lie beside each other.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    pub(super) floats: &'a [f32],
    pub(super) stride: usize,
}

/// `y[r] = x[r, :depth] w[:depth]` for so many rows, added to what is there if `add`. The depth is that of the last of
/// the rows that are taken together, which is given; a row's inputs beyond its own depth are zero.
#[inline(always)]
pub(super) fn products<L: Lanes>(
    rows: usize,
    w: &[[f32; TILE]],
    x: Strided<'_>,
    (y, stride): (&mut [f32], usize),
    add: bool,
    depth: impl Fn(usize) -> usize,
) {
    let mut row = 0;
    while row < rows {
        let x = Strided { floats: &x.floats[row * x.stride..], ..x };
        let y = (&mut y[row * stride..], stride);
        let w = |together: usize| &w[..depth(row + together - 1)];
        row += match rows - row {
            12.. if L::ROWS >= 12 => product::<L, 12>(w(12), x, y, add),
            6.. if L::ROWS >= 6 => product::<L, 6>(w(6), x, y, add),
            4.. if L::ROWS >= 4 => product::<L, 4>(w(4), x, y, add),
            3.. => product::<L, 3>(w(3), x, y, add),
            2 => product::<L, 2>(w(2), x, y, add),
            _ => product::<L, 1>(w(1), x, y, add),
        };
    }
}

/// `R` rows; returns `R`.
// Loops instead of `array::from_fn` and `map`, here and below: in a function this large those can stay functions of their
// own, which are compiled for no instruction set.
#[inline(always)]
fn product<L: Lanes, const R: usize>(
    w: &[[f32; TILE]],
    x: Strided<'_>,
    (y, stride): (&mut [f32], usize),
    add: bool,
) -> usize {
    let mut rows = [&x.floats[..0]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &x.floats[r * x.stride..][..w.len()];
    }
    for part in 0..L::PARTS {
        let mut sums = [L::splat(0.0); R];
        if add {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(lanes(y, r * stride), part);
            }
        }
        for (k, w) in w.iter().enumerate() {
            let w = L::load(w, part);
            for r in 0..R {
                sums[r] = sums[r].add_product(L::splat(rows[r][k]), w);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            sum.store(lanes(y, r * stride), part);
        }
    }
    R
}

#[inline(always)]
fn lanes(floats: &mut [f32], at: usize) -> &mut [f32; TILE] {
    floats[at..].first_chunk_mut().expect("rows are padded to whole tiles")
}

/// Scores to weights, relative to the largest score; that score, and the sum of the weights. `scores` are whole tiles,
/// those from `seen` on are of positions that the row does not see, or of none; their weights are zero.
#[inline(always)]
pub(super) fn softmax<L: Lanes>(scores: &mut [f32], seen: usize) -> (f32, f32) {
    scores[seen..].fill(f32::NEG_INFINITY);
    let mut largest = L::splat(f32::NEG_INFINITY);
    for tile in scores.as_chunks::<TILE>().0 {
        for part in 0..L::PARTS {
            largest = L::load(tile, part).max(largest);
        }
    }
    let largest = across(largest, |x, y| if x > y { x } else { y });
    let mut sum = L::splat(0.0);
    for tile in scores.as_chunks_mut::<TILE>().0 {
        for part in 0..L::PARTS {
            // Scores that nobody sees become the least weight there is, which changes no sum: the largest score's is 1.
            let weight = exp(L::load(tile, part).add(L::splat(-largest)));
            weight.store(tile, part);
            sum = sum.add(weight);
        }
    }
    scores[seen..].fill(0.0);
    (largest, across(sum, |x, y| x + y))
}

/// Combines all lanes, halves with halves.
#[inline(always)]
fn across<L: Lanes>(lanes: L, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut all = [0.0; TILE];
    lanes.store(&mut all, 0);
    let mut count = TILE / L::PARTS;
    while count > 1 {
        count /= 2;
        for i in 0..count {
            all[i] = combine(all[i], all[i + count]);
        }
    }
    all[0]
}
