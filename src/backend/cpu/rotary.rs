//! Rotary positions: the angles of a step, and the rows turned by them.
#![allow(unsafe_code)]

use super::kernel::Loops;
use super::shared::Shared;
use super::{Cpu, Rows};

/// Rows that a thread turns at a time.
const ROWS: usize = 16;

/// Sine and cosine of each row's angles, `(T, D / 2)` each: a step computes them once, all layers use them.
pub struct Angles {
    half: usize,
    sines: Vec<f32>,
    cosines: Vec<f32>,
}

impl Angles {
    pub(super) fn new(positions: &[u32], frequencies: &[f32]) -> Self {
        let angle = |&position: &u32| frequencies.iter().map(move |f| (position as f32 * f).sin_cos());
        let (sines, cosines) = positions.iter().flat_map(angle).unzip();
        Self { half: frequencies.len(), sines, cosines }
    }

    /// Half a head's size.
    pub(super) fn half(&self) -> usize {
        self.half
    }

    /// Rows that it has angles for.
    pub(super) fn rows(&self) -> usize {
        self.sines.len().checked_div(self.half).unwrap_or(0)
    }
}

/// Turns each pair `(d, d + D/2)` of each head of `x`, which begins at row `first`.
struct Turn<'a> {
    angles: &'a Angles,
    x: &'a mut [f32],
    width: usize,
    first: usize,
}

impl Loops for Turn<'_> {
    #[inline(always)]
    fn run(self) {
        let Angles { half, sines, cosines } = self.angles;
        for (row, x) in (self.first..).zip(self.x.chunks_exact_mut(self.width)) {
            let of_row = row * half..(row + 1) * half;
            let (sines, cosines) = (&sines[of_row.clone()], &cosines[of_row]);
            for head in x.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(*half);
                for (((a, b), sin), cos) in first.iter_mut().zip(second).zip(sines).zip(cosines) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}

/// Turns all rows of `x`; the caller has checked that there are angles for them and that heads fit.
pub(super) fn rotate(cpu: &Cpu, x: &mut Rows, angles: &Angles) {
    let (width, rows) = (x.width(), x.len());
    let shared = Shared::new(x.values_mut());
    cpu.each(rows.div_ceil(ROWS), |chunk| {
        let (first, end) = (chunk * ROWS, ((chunk + 1) * ROWS).min(rows));
        // SAFETY: chunks of rows do not overlap, and each is done once.
        let x = unsafe { shared.part(first * width..end * width) };
        cpu.kernel.vectorised(Turn { angles, x, width, first });
    });
}
