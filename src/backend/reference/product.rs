//! Matrix products over plain f32 memory, by the gemm crate.
#![allow(unsafe_code)]

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use gemm::Parallelism;

/// A matrix inside a slice: element `(r, c)` is `values[r * row_stride + c * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// The first `rows` rows and `columns` columns of a row-major matrix whose rows are `stride` long.
    pub(super) fn prefix(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        Self { values, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// A whole row-major matrix.
    pub(super) fn whole(values: &'a [f32], columns: usize) -> Self {
        Self::prefix(values, values.len() / columns, columns, columns)
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn fits(&self) -> bool {
        let last = |count: usize, stride: usize| count.saturating_sub(1) * stride;
        let end = last(self.rows, self.row_stride) + last(self.columns, self.column_stride);
        self.rows == 0 || self.columns == 0 || end < self.values.len()
    }
}

/// What becomes of the numbers that a product's target holds already.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Onto {
    /// They are replaced.
    Fresh,
    /// The product is added to them.
    Sum,
}

/// `into[..a.rows, ..b.columns] = factor * a b` (or `+=`); rows of `into` are `stride` long. `threads` work on it.
///
/// # Panics
/// Where the shapes do not fit each other or their memory; the callers have checked them.
pub(super) fn multiply(
    into: (&mut [f32], usize),
    onto: Onto,
    factor: f32,
    a: View<'_>,
    b: View<'_>,
    threads: usize,
) {
    let (into, stride) = into;
    let target = View::prefix(into, a.rows, b.columns, stride);
    assert!(target.fits() && b.columns <= stride, "a product beyond its memory");
    // SAFETY: the target lies within its slice, as just checked, which is borrowed alone.
    unsafe { run((into.as_mut_ptr(), stride), onto, factor, a, b, threads) }
}

/// `factor * a b`, row-major. `threads` work on it.
///
/// # Panics
/// Where the shapes do not fit each other or their memory; the callers have checked them.
pub(super) fn product(factor: f32, a: View<'_>, b: View<'_>, threads: usize) -> Vec<f32> {
    let length = a.rows * b.columns;
    if a.columns == 0 {
        return vec![0.0; length];
    }
    let mut result = Vec::with_capacity(length);
    // SAFETY: there is room for all rows, and all of it has been written afterwards: zeros first would be one way through
    // memory more.
    unsafe {
        run((result.as_mut_ptr(), b.columns), Onto::Fresh, factor, a, b, threads);
        result.set_len(length);
    }
    result
}

/// # Safety
/// `into` has room for `a.rows` rows of `stride`, of which `b.columns` are written, and is no other's; where it is `Onto::Sum`
/// these hold numbers.
unsafe fn run(
    (into, stride): (*mut f32, usize),
    onto: Onto,
    factor: f32,
    a: View<'_>,
    b: View<'_>,
    threads: usize,
) {
    assert_eq!(a.columns, b.rows, "inner sizes of a product");
    assert!(a.fits() && b.fits(), "a product beyond its memory");
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: both operands lie within their slices, as just checked; the target by contract.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            into,
            1,
            stride as isize,
            onto == Onto::Sum,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The values under a layout, which must be contiguous.
pub(super) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("not contiguous: {layout:?}") };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Runs `work` on a contiguous tensor's values.
pub(super) fn with_values<R>(tensor: &Tensor, work: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("not on the cpu") };
    work(contiguous(storage, layout)?)
}
