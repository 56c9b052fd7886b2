//! A buffer that several threads fill and read in turns.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

/// Borrowed memory of which each thread takes parts of its own.
///
/// Who uses it cuts the work so that no part is written twice at a time, and separates writing from reading by a barrier
/// or the end of the run: the two `unsafe` methods are where that is claimed.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are given out under the contracts of `part` and `view`, which are those of ordinary borrows.
unsafe impl<T: Send + Sync> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), length: values.len(), borrowed: PhantomData }
    }

    /// A part to write to.
    ///
    /// # Safety
    /// While it lives, nobody else has a part or a view that overlaps it.
    ///
    /// # Panics
    /// Outside the buffer.
    #[expect(clippy::mut_from_ref, reason = "the caller answers for parts that do not overlap")]
    #[inline(always)]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: within the buffer; alone by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// A part to read.
    ///
    /// # Safety
    /// While it lives, nobody has a part that overlaps it; what it shows was written before a barrier.
    ///
    /// # Panics
    /// Outside the buffer.
    #[inline(always)]
    pub(super) unsafe fn view(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: within the buffer; not written meanwhile by contract.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }
}
