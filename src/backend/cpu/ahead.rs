//! Weights on their way from memory before they are needed.
//!
//! A step reads the same weights in the same order as the step before, so what each thread will read in the next operation
//! is known while it waits for the others, or computes attention, which needs little of memory.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that a thread asks for ahead, at most: a quarter of a small second-level cache.
const MOST: usize = 128 << 10;
/// How far ahead of few rows their panels are asked for: less lets them wait (a row through an MLP of 4-bit weights, Sapphire
/// Rapids: with 2 KiB 0.98 of the time that 1.25 take, with 4 KiB 0.88, with 8 KiB 0.91).
const NEAR: usize = 4 << 10;
/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Addresses that a thread will read, the first of them first.
pub(super) type Spans = [Range<usize>; 2];
/// By thread.
pub(super) type ByThread = Arc<[Spans]>;

/// Which weights follow which.
#[derive(Default)]
pub(super) struct Order {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Where the weights of the operation before begin.
    previous: usize,
    /// By where an operation's weights begin: where those of the next operation do, and what each thread reads of them.
    next: HashMap<usize, (usize, ByThread)>,
}

impl Order {
    /// Notes that weights that begin at `start` are read now, by each thread as `spans` says; tells what came after them the
    /// last time.
    pub(super) fn follow(&self, start: usize, spans: impl FnOnce() -> ByThread) -> Option<ByThread> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = std::mem::replace(&mut known.previous, start);
        if known.next.get(&previous).is_none_or(|(next, _)| *next != start) {
            known.next.insert(previous, (start, spans()));
        }
        known.next.get(&start).map(|(_, spans)| Arc::clone(spans))
    }
}

/// What one thread may still ask for. Only this thread changes it.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Ahead {
    at: AtomicUsize,
    end: AtomicUsize,
    /// After that.
    later: AtomicUsize,
    later_end: AtomicUsize,
}

impl Ahead {
    pub(super) fn set(&self, [first, second]: &Spans) {
        let end = first.end.min(first.start + MOST);
        let left = MOST - (end - first.start);
        self.at.store(first.start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.later.store(second.start, Ordering::Relaxed);
        self.later_end.store(second.end.min(second.start + left), Ordering::Relaxed);
    }

    /// Asks for so many more cache lines, or a few less; `false` if there is nothing left to ask for.
    #[inline]
    pub(super) fn ask(&self, lines: usize) -> bool {
        let (mut at, mut end) = (self.at.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        if at >= end {
            (at, end) = (self.later.load(Ordering::Relaxed), self.later_end.load(Ordering::Relaxed));
            if at >= end {
                return false;
            }
            self.end.store(end, Ordering::Relaxed);
            self.later_end.store(0, Ordering::Relaxed);
        }
        let stop = end.min(at + lines * LINE);
        while at < stop {
            prefetch(at);
            at += LINE;
        }
        self.at.store(at, Ordering::Relaxed);
        true
    }

    /// Cache lines that are left to ask for.
    fn left(&self) -> usize {
        let of = |start: &AtomicUsize, end: &AtomicUsize| {
            end.load(Ordering::Relaxed).saturating_sub(start.load(Ordering::Relaxed)).div_ceil(LINE)
        };
        of(&self.at, &self.end) + of(&self.later, &self.later_end)
    }

    /// To ask for all that is left in so many turns; `near`: and for what follows what is being read.
    pub(super) fn in_turns(&self, turns: usize, near: bool) -> Asking<'_> {
        Asking { ahead: self, lines: self.left().div_ceil(turns.max(1)), near, end: usize::MAX, skipped: 0 }
    }

    /// To ask for nothing.
    pub(super) fn not_at_all(&self) -> Asking<'_> {
        Asking { ahead: self, lines: 0, near: false, end: usize::MAX, skipped: 0 }
    }
}

/// Some of what is left, asked for turn by turn between products.
#[derive(Clone, Copy)]
pub(super) struct Asking<'a> {
    ahead: &'a Ahead,
    lines: usize,
    near: bool,
    /// Where what is read now ends, and how many bytes after it are not read.
    end: usize,
    skipped: usize,
}

impl Asking<'_> {
    /// While these weights are read, and what comes so many bytes after them is not.
    #[inline(always)]
    pub(super) fn during<T>(self, weights: &[T], skipped: usize) -> Self {
        Self { end: weights.as_ptr_range().end as usize, skipped, ..self }
    }

    /// A turn, before `bytes` of the next `stride` bytes of weights are read from `at` on.
    #[inline(always)]
    pub(super) fn turn<T>(self, at: *const T, bytes: usize, stride: usize) {
        if self.near {
            let start = self.coming(at as usize, stride);
            (start..start + bytes).step_by(LINE).for_each(prefetch_near);
        }
        if self.lines > 0 {
            self.ahead.ask(self.lines);
        }
    }

    /// What will be read when [`NEAR`] bytes, in whole strides, have been read from `at` on.
    #[inline(always)]
    fn coming(self, at: usize, stride: usize) -> usize {
        let start = at + NEAR.next_multiple_of(stride);
        if start < self.end { start } else { start + self.skipped }
    }
}

/// Asks for all of a few lines, at once.
pub(super) fn prefetch_all(addresses: Range<usize>) {
    addresses.step_by(LINE).for_each(prefetch);
}

/// Asks for a cache line, to the first level.
#[inline(always)]
pub(super) fn prefetch_near(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: any address may be asked for, even one that is not mapped.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for a cache line, to the second level.
#[inline(always)]
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: any address may be asked for, even one that is not mapped.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_last_step_is_known_and_a_change_is_noticed() {
        let order = Order::default();
        let spans = |start: usize| -> ByThread { Arc::from([[start..start + 100, 0..0]]) };
        let read = |start: usize| order.follow(start, || spans(start)).map(|spans| spans[0][0].start);
        assert_eq!([1000, 2000, 3000].map(read), [None; 3]);
        assert_eq!([1000, 2000, 3000].map(read), [Some(2000), Some(3000), Some(1000)]);
        assert_eq!([1000, 3000].map(read), [Some(2000), Some(1000)]);
        assert_eq!([1000, 3000].map(read), [Some(3000), Some(1000)]);
    }

    #[test]
    fn no_more_is_asked_for_than_there_is() {
        let (ahead, memory) = (Ahead::default(), vec![0u8; 1000]);
        assert!(!ahead.ask(1));
        let start = memory.as_ptr() as usize;
        // Ten lines, then five.
        ahead.set(&[start..start + 640, start + 640..start + 960]);
        assert_eq!(ahead.left(), 15);
        assert_eq!((0..10).take_while(|_| ahead.ask(4)).count(), 5);
        ahead.set(&[start..start + 640, start + 640..start + 960]);
        let asking = ahead.in_turns(5, false);
        assert_eq!(
            (0..5)
                .map(|_| {
                    asking.turn(memory.as_ptr(), 0, 1);
                    ahead.left()
                })
                .collect::<Vec<_>>(),
            [12, 9, 6, 5, 2]
        );
        ahead.set(&[0..usize::MAX, 0..1]);
        assert_eq!(ahead.left(), MOST / LINE);
    }

    #[test]
    fn what_comes_after_a_prefix_is_the_next_panel() {
        // Panels of 20 blocks of 640 bytes, of which 12 are read.
        let (block, memory, ahead) = (640, vec![0u8; 12_800], Ahead::default());
        let asking = ahead.in_turns(1, true).during(&memory[..12 * block], 8 * block);
        let start = memory.as_ptr() as usize;
        let coming = |from: usize| (asking.coming(start + from * block, block) - start) / block;
        // Seven blocks are the first 4 KiB or more.
        assert_eq!([0, 4, 5, 11].map(coming), [7, 11, 20, 26]);
    }
}
