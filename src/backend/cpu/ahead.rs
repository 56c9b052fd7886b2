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
/// Of the next operation, evenly while few rows go through this one. Its beginning is all that helps: whatever is asked for
/// beside what is being read delays that (one row through all layers of SmolLM2-135M in 4-bit weights, Sapphire Rapids: 0.92 to
/// 0.94 of the time that asking for 128 KiB during the last panel takes, with 8 to 64 KiB; 0.96 with 128 KiB).
const BEGINNING: usize = 32 << 10;
/// How far ahead of few rows their panels are asked for: less lets them wait (a row through an MLP of 4-bit weights, Sapphire
/// Rapids: with 2 KiB 0.98 of the time that 1.25 take, with 4 KiB 0.88, with 8 KiB 0.91).
const NEAR: usize = 4 << 10;
/// Bytes of a cache line.
pub(super) const LINE: usize = 64;
/// Lines of the longest record of a panel.
const LONGEST: usize = 18;

/// Addresses that are read: the first `run` bytes of every `stride` from `start` to `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Runs {
    pub(super) start: usize,
    pub(super) run: usize,
    pub(super) stride: usize,
    pub(super) end: usize,
}

impl Runs {
    /// All of them.
    pub(super) fn whole(Range { start, end }: Range<usize>) -> Self {
        let run = end.saturating_sub(start);
        Self { start, run, stride: run, end }
    }

    fn count(&self) -> usize {
        if self.run == 0 { 0 } else { self.end.saturating_sub(self.start).div_ceil(self.stride.max(1)) }
    }

    /// The first of them, up to so many bytes.
    fn up_to(self, bytes: usize) -> Self {
        let run = self.run.min(bytes);
        let count = self.count().min(bytes / run.max(1));
        Self { run, end: self.end.min(self.start.saturating_add(count * self.stride)), ..self }
    }

    fn bytes(&self) -> usize {
        self.count() * self.run
    }

    fn lines(&self) -> usize {
        self.count() * self.run.div_ceil(LINE)
    }
}

/// What a thread will read, the first of it first.
pub(super) type Spans = [Runs; 2];
/// By thread.
pub(super) type ByThread = Arc<[Spans]>;
/// An operation, by what is read of which weights: how many panels, and how many inputs of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Operation {
    /// Where its weights begin, and its first adapter's A, if it has one.
    pub(super) start: usize,
    pub(super) adapter: usize,
    pub(super) panels: usize,
    pub(super) inputs: usize,
}

/// Operations that are known, at most: some hundred bytes each, and some hundred in a model for each of its sub-networks.
const KNOWN: usize = 8192;

/// Which operation follows which. A step may belong to another sub-network than the one before, each has an order of its own.
#[derive(Default)]
pub(super) struct Order {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    previous: Operation,
    /// By operation: the next one, and what each thread reads of it.
    next: HashMap<Operation, (Operation, ByThread)>,
}

impl Order {
    /// Notes that this is computed now, and that each thread reads what `spans` says; tells what came after it the last time.
    pub(super) fn follow(&self, operation: Operation, spans: impl FnOnce() -> ByThread) -> Option<ByThread> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = std::mem::replace(&mut known.previous, operation);
        if known.next.get(&previous).is_none_or(|(next, _)| *next != operation) {
            if known.next.len() >= KNOWN {
                known.next.clear();
            }
            known.next.insert(previous, (operation, spans()));
        }
        known.next.get(&operation).map(|(_, spans)| Arc::clone(spans))
    }
}

/// What one thread may still ask for. Only this thread changes it.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Ahead {
    now: Left,
    /// After that.
    later: Left,
}

/// What is left of [`Runs`], beginning within one of them.
#[derive(Default)]
struct Left {
    at: AtomicUsize,
    /// Where the run ends.
    run_end: AtomicUsize,
    run: AtomicUsize,
    stride: AtomicUsize,
    end: AtomicUsize,
}

impl Left {
    fn set(&self, Runs { start, run, stride, end }: Runs) {
        self.at.store(start, Ordering::Relaxed);
        self.run_end.store(start + run, Ordering::Relaxed);
        self.run.store(run, Ordering::Relaxed);
        self.stride.store(stride, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    /// The rest of this run, and what comes after it.
    fn get(&self) -> (Range<usize>, Runs) {
        let of = |field: &AtomicUsize| field.load(Ordering::Relaxed);
        let (run, stride, run_end) = (of(&self.run), of(&self.stride), of(&self.run_end));
        let after = Runs { start: (run_end - run).saturating_add(stride), run, stride, end: of(&self.end) };
        (of(&self.at)..run_end, after)
    }
}

impl Ahead {
    /// A panel, or what follows the last one, while many rows go through the panel before.
    pub(super) fn set(&self, spans: &Spans) {
        self.set_up_to(MOST, spans);
    }

    /// The next operation, while few rows go through this one.
    pub(super) fn set_beginning(&self, spans: &Spans) {
        self.set_up_to(BEGINNING, spans);
    }

    fn set_up_to(&self, bytes: usize, [first, second]: &Spans) {
        let first = first.up_to(bytes);
        self.now.set(first);
        self.later.set(second.up_to(bytes - first.bytes()));
    }

    /// Asks for so many more cache lines, or a few less; `false` if there is nothing left to ask for.
    #[inline]
    pub(super) fn ask(&self, lines: usize) -> bool {
        let (mut run, after) = self.now.get();
        if run.is_empty() {
            if after.count() > 0 {
                self.now.set(after);
            } else {
                let (first, after) = self.later.get();
                if first.is_empty() {
                    return false;
                }
                self.now.set(Runs { start: first.start, ..after });
                self.later.set(Runs::default());
            }
            (run, _) = self.now.get();
        }
        let stop = run.end.min(run.start + lines * LINE);
        let mut at = run.start;
        while at < stop {
            prefetch(at);
            at += LINE;
        }
        self.now.at.store(at, Ordering::Relaxed);
        true
    }

    /// Cache lines that are left to ask for.
    fn left(&self) -> usize {
        let of = |left: &Left| {
            let (run, after) = left.get();
            run.end.saturating_sub(run.start).div_ceil(LINE) + after.lines()
        };
        of(&self.now) + of(&self.later)
    }

    /// To ask for all that is left in so many turns, if in any; `near`: and for what follows what is being read.
    pub(super) fn in_turns(&self, turns: Option<usize>, near: bool) -> Asking<'_> {
        let lines = turns.map_or(0, |turns| self.left().div_ceil(turns.max(1)));
        Asking { ahead: self, lines, near, end: usize::MAX, skipped: 0, then: None }
    }

    /// To ask for nothing.
    pub(super) fn not_at_all(&self) -> Asking<'_> {
        self.in_turns(None, false)
    }
}

/// Some of what is left, asked for turn by turn between products.
#[derive(Clone, Copy)]
pub(super) struct Asking<'a> {
    ahead: &'a Ahead,
    lines: usize,
    near: bool,
    /// Where what is read now ends, and how many bytes on from there reading continues.
    end: usize,
    skipped: usize,
    then: Option<usize>,
}

impl Asking<'_> {
    /// Where reading goes on after these weights, if not behind them.
    #[inline(always)]
    pub(super) fn then(self, then: Option<usize>) -> Self {
        Self { then, ..self }
    }

    /// While these weights are read, and what comes so many bytes after them is not.
    #[inline(always)]
    pub(super) fn during<T>(self, weights: &[T], skipped: usize) -> Self {
        let end = weights.as_ptr_range().end as usize;
        // Modulo the size of memory: what comes next may lie before.
        let skipped = self.then.map_or(skipped, |then| then.wrapping_sub(end));
        Self { end, skipped, ..self }
    }

    /// A turn, before `bytes` of the next `stride` bytes of weights are read from `at` on.
    #[inline(always)]
    pub(super) fn turn<T>(self, at: *const T, bytes: usize, stride: usize) {
        if self.near {
            prefetch_record(self.coming(at as usize, stride), bytes, stride);
        }
        if self.lines > 0 {
            self.ahead.ask(self.lines);
        }
    }

    /// What will be read when [`NEAR`] bytes, in whole strides, have been read from `at` on.
    #[inline(always)]
    fn coming(self, at: usize, stride: usize) -> usize {
        let start = at + NEAR.next_multiple_of(stride);
        if start < self.end { start } else { start.wrapping_add(self.skipped) }
    }
}

/// Asks for the first `bytes` of a record, to the first level. Loops of constant length, which the compiler writes out: with
/// one of any length, asking took as many instructions as a product (4-bit weights, one row: 1.04 times a step's time).
#[inline(always)]
fn prefetch_record(start: usize, bytes: usize, record: usize) {
    if bytes == record {
        for line in 0..record.div_ceil(LINE) {
            prefetch_near(start.wrapping_add(line * LINE));
        }
        return;
    }
    for pair in 0..LONGEST / 2 {
        if 2 * pair * LINE < bytes {
            prefetch_near(start.wrapping_add(2 * pair * LINE));
            prefetch_near(start.wrapping_add((2 * pair + 1) * LINE));
        }
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
        let spans =
            |start: usize| -> ByThread { Arc::from([[Runs::whole(start..start + 100), Runs::default()]]) };
        let read_as = |start: usize, panels| {
            order
                .follow(Operation { start, adapter: 0, panels, inputs: 1 }, || spans(start + panels))
                .map(|spans| spans[0][0].start)
        };
        let read = |start| read_as(start, 0);
        assert_eq!([1000, 2000, 3000].map(read), [None; 3]);
        assert_eq!([1000, 2000, 3000].map(read), [Some(2000), Some(3000), Some(1000)]);
        assert_eq!([1000, 3000].map(read), [Some(2000), Some(1000)]);
        assert_eq!([1000, 3000].map(read), [Some(3000), Some(1000)]);
        // The same weights for another sub-network, whose steps take turns with those of the first.
        let step = |panels: usize| [1000, 2000].map(|start| read_as(start, panels));
        step(7);
        assert_eq!([step(5)[0], step(7)[0], step(5)[0]], [None, Some(2007), Some(2005)]);
        // Nor does what is known grow without end.
        (0..2 * KNOWN).for_each(|panels| _ = read_as(1000, panels));
        assert!(order.known.lock().unwrap().next.len() <= KNOWN);
    }

    #[test]
    fn no_more_is_asked_for_than_there_is() {
        let (ahead, memory) = (Ahead::default(), vec![0u8; 1000]);
        assert!(!ahead.ask(1));
        let start = memory.as_ptr() as usize;
        // Ten lines, then five.
        let spans = [Runs::whole(start..start + 640), Runs::whole(start + 640..start + 960)];
        ahead.set(&spans);
        assert_eq!(ahead.left(), 15);
        assert_eq!((0..10).take_while(|_| ahead.ask(4)).count(), 5);
        ahead.set(&spans);
        let asking = ahead.in_turns(Some(5), false);
        let turn = |_| {
            asking.turn(memory.as_ptr(), 0, 1);
            ahead.left()
        };
        assert_eq!([0; 5].map(turn), [12, 9, 6, 5, 2]);
        ahead.set(&[Runs::whole(0..usize::MAX), Runs::whole(0..1)]);
        assert_eq!(ahead.left(), MOST / LINE);
        ahead.set_beginning(&[Runs::whole(0..LINE), Runs::whole(0..usize::MAX)]);
        assert_eq!(ahead.left(), BEGINNING / LINE);
    }

    #[test]
    fn of_a_prefix_only_its_runs_are_asked_for() {
        let (ahead, memory) = (Ahead::default(), vec![0u8; 6400]);
        let start = memory.as_ptr() as usize;
        // Two of ten lines, ten times; the last stride is cut short.
        let runs = Runs { start, run: 2 * LINE, stride: 10 * LINE, end: start + 6000 };
        ahead.set(&[runs, Runs::default()]);
        assert_eq!(ahead.left(), 20);
        let asked = |_| {
            ahead.ask(1);
            (ahead.now.at.load(Ordering::Relaxed) - start) / LINE
        };
        assert_eq!([0; 5].map(asked), [1, 2, 11, 12, 21]);
        assert_eq!(ahead.left(), 15);
        // As many whole runs as there is room for, else a part of the first.
        assert_eq!(runs.up_to(7 * LINE).lines(), 6);
        assert_eq!(runs.up_to(LINE), Runs { run: LINE, end: start + 10 * LINE, ..runs });
        assert_eq!(Runs::default().up_to(100), Runs::default());
    }

    #[test]
    fn what_comes_after_a_prefix_is_the_next_panel() {
        // Panels of 20 blocks of 640 bytes, of which 12 are read.
        let (block, memory, ahead) = (640, vec![0u8; 12_800], Ahead::default());
        let start = memory.as_ptr() as usize;
        let asking = ahead.in_turns(None, true);
        let coming = |asking: Asking<'_>, from: usize| {
            asking.coming(start + from * block, block).wrapping_sub(start) as isize / block as isize
        };
        // Seven blocks are the first 4 KiB or more.
        let prefix = asking.during(&memory[..12 * block], 8 * block);
        assert_eq!([0, 4, 5, 11].map(|from| coming(prefix, from)), [7, 11, 20, 26]);
        // Or what lies somewhere else, be it before.
        for elsewhere in [100, -100] {
            let then = start.wrapping_add_signed(elsewhere * block as isize);
            let asking = asking.then(Some(then)).during(&memory[..12 * block], 8 * block);
            assert_eq!([4, 5, 11].map(|from| coming(asking, from)), [11, elsewhere, elsewhere + 6]);
        }
    }
}
