//! An allocator that remembers, for each thread, the most bytes that were asked for at once: whether a file's word decided it.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static MOST: Cell<usize> = const { Cell::new(0) };
}

struct Watched;

#[global_allocator]
static WATCHED: Watched = Watched;

fn note(bytes: usize) {
    // A thread that ends has no cell any more.
    let _ = MOST.try_with(|most| most.set(most.get().max(bytes)));
}

// SAFETY: the system's allocator does it all; a cell of a number allocates nothing.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are handed on; so below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Runs `work`, and says the most bytes that it asked for at once on this thread.
pub(crate) fn most_during<T>(work: impl FnOnce() -> T) -> (T, usize) {
    MOST.set(0);
    let result = work();
    (result, MOST.get())
}

#[test]
fn the_largest_request_is_remembered() {
    let (_, most) = most_during(|| (vec![0u8; 1000], vec![1u8; 77_777], Vec::<u8>::with_capacity(5)));
    assert_eq!(most, 77_777);
}
