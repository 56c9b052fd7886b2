//! Rounding weights to blocks of 32 that share a scale.
//!
//! A scale is kept as f16, as the files have it, so it is rounded (upwards, that nothing leaves the range) before the
//! quants are taken by it.

use crate::weights::{BLOCK, Blocks};
use half::f16;

/// Symmetric, `-127..=127`, by the largest absolute value of each block. Row-major `values` of `columns`; a last block
/// may be shorter. `places` gives the order in which a row is cut into blocks (see [`Blocks::places`]).
pub(super) fn to_bytes(values: &[f32], columns: usize, places: Option<&[u32]>) -> Blocks {
    let round = |block: &[f32], quants: &mut Vec<i8>| {
        let (low, high) = extremes(block);
        let scale = at_least(high.max(-low).max(0.0) / 127.0);
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        quants.extend(block.iter().map(|v| nearest(v * inverse, -127.0, 127.0)));
        (scale, 0.0)
    };
    Blocks { minimums: None, ..blocks(values, columns, places, round) }
}

/// `0..=15` above the smallest value of each block.
pub(super) fn to_halves(values: &[f32], columns: usize) -> Blocks {
    blocks(values, columns, None, |block, quants| {
        let (low, high) = extremes(block);
        let minimum = -at_least(-low);
        let scale = at_least((high - minimum) / 15.0);
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        quants.extend(block.iter().map(|v| nearest((v - minimum) * inverse, 0.0, 15.0)));
        (scale, minimum)
    })
}

/// Blocks of all rows; `round` adds a block's quants and returns its scale and minimum.
fn blocks(
    values: &[f32],
    columns: usize,
    places: Option<&[u32]>,
    mut round: impl FnMut(&[f32], &mut Vec<i8>) -> (f32, f32),
) -> Blocks {
    let mut quants = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / BLOCK);
    let mut minimums = Vec::with_capacity(values.len() / BLOCK);
    let mut placed = Vec::new();
    for row in values.chunks_exact(columns) {
        let row = match places {
            None => row,
            Some(places) => {
                placed.clear();
                placed.extend(places.iter().map(|&column| row[column as usize]));
                &placed
            }
        };
        for block in row.chunks(BLOCK) {
            let (scale, minimum) = round(block, &mut quants);
            scales.push(scale);
            minimums.push(minimum);
        }
    }
    Blocks { quants, scales, minimums: Some(minimums), places: places.map(<[u32]>::to_vec) }
}

/// The smallest and the largest value; what is no number does not count. In lanes, so that it compiles to vectors.
fn extremes(block: &[f32]) -> (f32, f32) {
    const LANES: usize = 8;
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for values in block.chunks(LANES) {
        for ((low, high), &value) in low.iter_mut().zip(&mut high).zip(values) {
            *low = if value < *low { value } else { *low };
            *high = if value > *high { value } else { *high };
        }
    }
    (low.into_iter().fold(f32::INFINITY, f32::min), high.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// The nearest whole number within the limits, halves away from zero: `f32::round`, which is a call where it is not an
/// instruction.
fn nearest(value: f32, low: f32, high: f32) -> i8 {
    /// The largest below a half: a half itself would carry what is just below one over.
    const HALF: f32 = 0.5 - f32::EPSILON / 4.0;
    let value = value.clamp(low, high);
    (value + HALF.copysign(value)) as i8
}

/// The smallest f16 that is not below `x`, as f32; beyond its range, the largest.
fn at_least(x: f32) -> f32 {
    let nearest = f16::from_f32(x);
    if nearest.is_infinite() {
        return if x > 0.0 { f16::MAX.to_f32() } else { f16::MIN.to_f32() };
    }
    if nearest.to_f32() >= x {
        return nearest.to_f32();
    }
    // The next one up: away from zero above it, towards zero below.
    let bits = nearest.to_bits();
    let up = if nearest.is_sign_positive() { bits + 1 } else { bits - 1 };
    let up = f16::from_bits(up);
    if up.is_finite() { up.to_f32() } else { f16::MAX.to_f32() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quants_are_within_half_a_step_of_the_values() {
        let values = (0..70).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect::<Vec<_>>();
        for (blocks, steps) in [(to_bytes(&values, 35, None), 127.0), (to_halves(&values, 35), 15.0)] {
            let zeros = vec![0.0; 4];
            let minimums = blocks.minimums.as_ref().unwrap_or(&zeros);
            assert_eq!((blocks.quants.len(), blocks.scales.len()), (70, 4));
            for (i, value) in values.iter().enumerate() {
                let block = i / 35 * 2 + i % 35 / BLOCK;
                let scale = blocks.scales[block];
                assert!(scale <= 1.4 / steps, "{scale}");
                let got = f32::from(blocks.quants[i]) * scale + minimums[block];
                assert!((got - value).abs() <= 0.5001 * scale, "{i}: {got} not {value}, steps of {scale}");
            }
        }
    }

    #[test]
    fn the_nearest_whole_number_is_that_of_round() {
        let bits = |x: f32| (-3..=3).map(move |off| f32::from_bits(x.to_bits().wrapping_add_signed(off)));
        let near = (0..=260).map(|i| i as f32 / 2.0).flat_map(bits).flat_map(|x| [x, -x]);
        for x in near.chain([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30]) {
            assert_eq!(nearest(x, -127.0, 127.0), x.round().clamp(-127.0, 127.0) as i8, "{x:e}");
        }
    }

    #[test]
    fn extremes_are_those_of_numbers() {
        assert_eq!(extremes(&[1.0, f32::NAN, -3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 9.0, -0.5]), (-3.0, 9.0));
        assert_eq!(extremes(&[4.0]), (4.0, 4.0));
    }

    #[test]
    fn a_scale_is_rounded_upwards_to_f16() {
        for x in [0.0, 1e-9, 6e-8, 3.1e-5, 0.1, 1.0, 1.0001, 65504.0, -0.1, -1e-9, -2.00001] {
            let up = at_least(x);
            assert!(up >= x && f16::from_f32(up).to_f32() == up, "{x} {up}");
            assert!(up - x <= x.abs() * 1e-3 + 6e-8, "{x} {up}");
        }
        assert_eq!(at_least(1e9), 65504.0);
        assert_eq!(at_least(-1e9), -65504.0);
        assert_eq!(at_least(65510.0), 65504.0);
    }
}
