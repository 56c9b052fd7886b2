//! A slice that several threads fill, each its own parts of it.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

pub(super) struct Shared<'a, T> {
    at: *mut T,
    length: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: threads reach the slice through `part` only, whose callers give no number to two of them at a time.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn of(values: &'a mut [T]) -> Self {
        Self { at: values.as_mut_ptr(), length: values.len(), borrowed: PhantomData }
    }

    /// # Safety
    /// While the part is in use, nobody takes another that overlaps it.
    #[expect(clippy::mut_from_ref, reason = "parts that are in use together do not overlap")]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: within the slice, as just checked, which is borrowed for as long as `self`; nobody else has a
        // reference to this part, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(range.start), range.len()) }
    }
}
