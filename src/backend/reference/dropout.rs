//! Dropout whose masks are never stored: whether an element stays follows from a key and the element's number.
//!
//! A mask drawn from a random stream would have to be kept for the way back, and taken to a GPU: for each adapter a byte for
//! every number that goes into it. A hash of the number gives the same wherever and whenever it is asked for.

use super::loops::vectorised;
use crate::backend::cpu::Loops;
use candle_core::{Device, Result, Tensor};

/// Where a backend's dropout is: what the masks drawn next will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    key: u64,
    next: u64,
}

impl Position {
    /// The beginning of one micro-batch: the same masks whatever ran before, so that a training can go on after a restart
    /// without remembering a generator.
    pub(super) fn of(seed: u64, micro_batch: u64) -> Self {
        Self { key: mixed_64(seed ^ mixed_64(micro_batch)), next: 0 }
    }

    /// The next mask, of so many elements of which each is dropped with `probability` in `(0, 1)`.
    pub(super) fn draw(&mut self, elements: usize, probability: f64) -> Mask {
        let threshold = (probability * 2f64.powi(32)) as u32;
        let mask =
            Mask { key: self.key, first: self.next, threshold, scale: (1.0 / (1.0 - probability)) as f32 };
        self.next += elements as u64;
        mask
    }
}

/// Which elements of a matrix dropout leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Mask {
    pub(super) key: u64,
    /// The number of the matrix's first element.
    pub(super) first: u64,
    /// An element goes if its hash is below this.
    pub(super) threshold: u32,
    /// What stays is scaled up by this much.
    pub(super) scale: f32,
}

impl Mask {
    /// Multiplies each element with its factor; `Draw` in kernels/train.cu computes the same.
    pub(super) fn apply(self, values: &mut [f32]) {
        let (mut rest, mut at) = (values, self.first);
        while !rest.is_empty() {
            // Numbers whose upper halves are the same, so that the loop goes over 32 bits, several at a time.
            let until = (1u64 << 32) - u64::from(at as u32);
            let length = rest.len().min(usize::try_from(until).unwrap_or(usize::MAX));
            let (part, after) = rest.split_at_mut(length);
            let (low, key) = (at as u32, self.key as u32);
            let high = (at >> 32) as u32 ^ (self.key >> 32) as u32;
            vectorised(Dropped { values: part, mask: self, low, key, high });
            (rest, at) = (after, at + length as u64);
        }
    }

    /// The factors of so many elements as a tensor.
    pub(super) fn factors(self, shape: (usize, usize), device: &Device) -> Result<Tensor> {
        let mut factors = vec![1.0; shape.0 * shape.1];
        self.apply(&mut factors);
        Tensor::from_vec(factors, shape, device)
    }
}

/// Neighbouring elements' numbers have the same upper half, which `high` is, mixed with the key's.
struct Dropped<'a> {
    values: &'a mut [f32],
    mask: Mask,
    low: u32,
    key: u32,
    high: u32,
}

impl Loops for Dropped<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { values, mask: Mask { threshold, scale, .. }, low, key, high } = self;
        for (value, i) in values.iter_mut().zip(0u32..) {
            let bits = mixed(mixed(low.wrapping_add(i) ^ key) ^ high);
            *value *= if bits >= threshold { scale } else { 0.0 };
        }
    }
}

/// Murmur3's last mixing: every bit of the result depends on every bit of `h`.
#[inline(always)]
fn mixed(mut h: u32) -> u32 {
    h ^= h >> 16;
    h = h.wrapping_mul(0x85eb_ca6b);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

/// The same for 64 bits.
fn mixed_64(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(mask: Mask, elements: usize) -> Vec<bool> {
        let mut ones = vec![1.0; elements];
        mask.apply(&mut ones);
        assert!(ones.iter().all(|&v| v == 0.0 || v == mask.scale));
        ones.into_iter().map(|v| v != 0.0).collect()
    }

    #[test]
    fn as_many_elements_go_as_probability_says_and_neighbours_know_nothing_of_each_other() {
        const COUNT: usize = 1 << 20;
        for probability in [0.05, 0.1, 0.5] {
            let mut position = Position::of(42, 7);
            let keep = kept(position.draw(COUNT, probability), COUNT);
            // Five standard deviations of a binomial.
            let near = |got: usize, count: usize, p: f64| {
                let off = (got as f64 - count as f64 * p).abs();
                assert!(off < 5.0 * (count as f64 * p * (1.0 - p)).sqrt(), "{got} of {count}, not {p}");
            };
            near(keep.iter().filter(|&&k| !k).count(), COUNT, probability);
            for distance in [1, 2, 32, 576, 1 << 16] {
                let both = keep.iter().zip(&keep[distance..]).filter(|(a, b)| !**a && !**b).count();
                near(both, COUNT - distance, probability * probability);
            }
        }
    }

    #[test]
    fn masks_follow_from_seed_micro_batch_and_what_was_drawn_before() {
        let masks = |seed, micro_batch| {
            let mut position = Position::of(seed, micro_batch);
            [position.draw(999, 0.3), position.draw(1000, 0.3)].map(|mask| kept(mask, 999))
        };
        let [first, second] = masks(1, 1);
        assert_eq!(masks(1, 1), [first.clone(), second.clone()]);
        assert_ne!(first, second);
        for other in [masks(2, 1), masks(1, 2), masks(1, 1 << 40)] {
            assert!(other[0] != first && other[1] != second && other[0] != second);
        }
        // A mask may begin before a power of two that its numbers pass.
        let across = Mask { key: 3, first: (1 << 32) - 500, threshold: 1 << 30, scale: 1.5 };
        let after = Mask { first: 1 << 32, ..across };
        assert_eq!(kept(across, 999)[500..], kept(after, 499));
        // Two masks in one go are the one after the other.
        let whole = kept(Position::of(1, 1).draw(1999, 0.3), 1998);
        assert_eq!(whole, [first, second].concat());
    }
}
