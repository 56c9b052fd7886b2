//! Threads that compute together: a leader, whoever calls, and members that stay ready between two steps.
//!
//! A step of a small model consists of hundreds of short parallel pieces, so handing one over must cost less than a
//! microsecond: members spin for a while before they sleep, and within one piece of work all meet at barriers instead
//! of coming back to the leader. Knows nothing of what is computed.
#![allow(unsafe_code)]

use super::ahead::Ahead;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Turns of a waiting loop before a member sleeps: about 0.2 ms, longer than sampling takes between two steps.
const SPINS_BEFORE_SLEEP: u32 = 5_000;
/// Turns before a thread at a barrier lets others run: where there are more threads than cores, the one that it waits
/// for may be among them.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// Pieces that a thread takes at a time, at most.
const AT_ONCE: usize = 64;

/// The work of one [`Team::run`], its lifetime erased; valid until all members have left it.
type Job = *const (dyn Fn(&Member<'_>) + Sync);

struct Shared {
    threads: usize,
    /// Counts runs; a member that sees it change takes `job`.
    run: AtomicU32,
    job: UnsafeCell<Option<Job>>,
    /// Members that have not finished the run.
    working: AtomicUsize,
    /// Threads that wait at the barrier, and how often it has opened.
    arrived: AtomicUsize,
    opened: AtomicU32,
    /// Whether a thread has panicked in this run: the others must not wait for it.
    broken: AtomicBool,
    ending: AtomicBool,
    /// By member: whether it sleeps.
    asleep: Vec<AtomicBool>,
    /// By thread: what it asks memory for while it waits.
    ahead: Vec<Ahead>,
}

// SAFETY: `job` is written by the leader before `run` is released and read by members after they have acquired it; the
// leader writes again only when `working` is back at zero.
unsafe impl Sync for Shared {}
// SAFETY: the erased job is `Sync` and outlives the run, see `Team::run`.
unsafe impl Send for Shared {}

/// Threads that compute together.
pub(super) struct Team {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    sleepers: Vec<Thread>,
    /// One run at a time.
    leader: Mutex<()>,
}

/// One thread's view of a run.
pub(super) struct Member<'a> {
    shared: &'a Shared,
    index: usize,
}

/// Pieces of work `0..count` that the threads of a run take one after the other, each piece once.
///
/// Each thread has a range of its own and begins there, so that it reads memory in order and what it asks for ahead is
/// its own; who is done takes over what others have not begun.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// By thread: the next piece of its range.
    next: Vec<Padded>,
    count: usize,
}

/// Alone on its cache lines, which the processor fetches in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct Padded(AtomicUsize);

impl Team {
    /// A leader and `threads - 1` members; fewer where the system gives no more threads.
    pub(super) fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            threads,
            run: AtomicU32::new(0),
            job: UnsafeCell::new(None),
            working: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            opened: AtomicU32::new(0),
            broken: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            ahead: (0..threads).map(|_| Ahead::default()).collect(),
        });
        let spawn = |member: usize| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("lonas-cpu-{member}"));
            builder.spawn(move || shared.serve(member))
        };
        let handles = (1..threads).map(spawn).collect::<Result<Vec<_>, _>>();
        match handles {
            Ok(handles) => {
                let sleepers = handles.iter().map(|h| h.thread().clone()).collect();
                Self { shared, handles, sleepers, leader: Mutex::new(()) }
            }
            Err(error) => {
                tracing::warn!("computing on one thread: no more could be started: {error}");
                // Those that were started end by themselves.
                shared.ending.store(true, Ordering::SeqCst);
                shared.run.fetch_add(1, Ordering::SeqCst);
                Self::new(1)
            }
        }
    }

    /// Runs `work` once on every thread, the caller's among them, and returns when all have finished it.
    ///
    /// # Panics
    /// Where `work` does, on whichever thread.
    pub(super) fn run(&self, work: impl Fn(&Member<'_>) + Sync) {
        let shared = &*self.shared;
        if self.handles.is_empty() {
            return work(&Member { shared, index: 0 });
        }
        // A panic in an earlier run leaves nothing behind that this one would not set anew.
        let _leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        shared.arrived.store(0, Ordering::Relaxed);
        shared.broken.store(false, Ordering::Relaxed);
        shared.working.store(self.handles.len(), Ordering::Relaxed);
        let job: *const (dyn Fn(&Member<'_>) + Sync + '_) = &raw const work;
        // SAFETY: nobody reads `job` now, see `Shared`. The pointer's lifetime is erased; it is used by members only
        // until `working` is zero, and this function does not return, nor unwind, before that.
        unsafe {
            *shared.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(&Member<'_>) + Sync + '_), Job>(job));
        };
        shared.run.fetch_add(1, Ordering::SeqCst);
        for (asleep, thread) in shared.asleep.iter().zip(&self.sleepers) {
            if asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let own = shared.attempt(|| work(&Member { shared, index: 0 }));
        shared.wait(0, || shared.working.load(Ordering::Acquire) == 0);
        match own {
            Err(panic) => resume_unwind(panic),
            Ok(()) => assert!(!shared.broken.load(Ordering::Relaxed), "a computing thread panicked"),
        }
    }

    /// Work to be shared in one run, once.
    pub(super) fn pieces(&self, count: usize) -> Pieces {
        Pieces::new(count, self.shared.threads)
    }

    /// The same in place of other work that has been done.
    pub(super) fn pieces_in<'p>(&self, pieces: &'p mut Pieces, count: usize) -> &'p Pieces {
        pieces.reset(count, self.shared.threads);
        pieces
    }

    /// Runs `work` for each of `0..count`, on all threads if there is more than one piece.
    pub(super) fn each(&self, count: usize, work: impl Fn(usize) + Sync) {
        if count <= 1 {
            return (0..count).for_each(work);
        }
        let pieces = self.pieces(count);
        self.run(|member| member.share(&pieces, |range| range.for_each(&work)));
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.shared.run.fetch_add(1, Ordering::SeqCst);
        self.sleepers.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            // A member's panic has been reported by the run that it happened in.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// A member's life.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.sleep_until_changed(index, seen);
            if self.ending.load(Ordering::SeqCst) {
                return;
            }
            seen = self.run.load(Ordering::SeqCst);
            // SAFETY: `run` has changed, so the leader has written the job and keeps it alive until `working` falls.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above.
                let _ = self.attempt(|| unsafe { (*job)(&Member { shared: self, index }) });
            }
            self.working.fetch_sub(1, Ordering::Release);
        }
    }

    fn sleep_until_changed(&self, index: usize, seen: u32) {
        for _ in 0..SPINS_BEFORE_SLEEP {
            if self.run.load(Ordering::Acquire) != seen {
                return;
            }
            self.pause(index);
        }
        // Announced before looking again, so that a leader who starts meanwhile either is seen here or sees us asleep.
        self.asleep[index - 1].store(true, Ordering::SeqCst);
        while self.run.load(Ordering::SeqCst) == seen {
            std::thread::park();
        }
        self.asleep[index - 1].store(false, Ordering::SeqCst);
    }

    fn attempt(&self, work: impl FnOnce()) -> std::thread::Result<()> {
        let result = catch_unwind(AssertUnwindSafe(work));
        if result.is_err() {
            self.broken.store(true, Ordering::SeqCst);
        }
        result
    }

    /// A turn of a waiting loop.
    fn pause(&self, index: usize) {
        if !self.ahead[index].ask(2) {
            spin_loop();
        }
    }

    fn wait(&self, index: usize, done: impl Fn() -> bool) {
        let mut turns = 0;
        while !done() {
            if turns < SPINS_BEFORE_YIELD {
                turns += 1;
                self.pause(index);
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Member<'_> {
    /// Below the number of threads; 0 is the leader.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Waits until all threads of the run are here. What they wrote before is visible to all after.
    pub(super) fn barrier(&self) {
        let shared = self.shared;
        if shared.threads == 1 {
            return;
        }
        let opened = shared.opened.load(Ordering::Relaxed);
        if shared.arrived.fetch_add(1, Ordering::AcqRel) + 1 == shared.threads {
            shared.arrived.store(0, Ordering::Relaxed);
            shared.opened.fetch_add(1, Ordering::Release);
            return;
        }
        self.wait_until(|| shared.opened.load(Ordering::Acquire) != opened);
    }

    /// Waits for what another thread of the run will do, or has done.
    pub(super) fn wait_until(&self, done: impl Fn() -> bool) {
        let broken = || self.shared.broken.load(Ordering::Relaxed);
        self.shared.wait(self.index, || done() || broken());
        assert!(!broken(), "another computing thread panicked");
    }

    /// What this thread will read, and how much of it has been asked for.
    pub(super) fn ahead(&self) -> &Ahead {
        &self.shared.ahead[self.index]
    }

    /// Takes pieces until none is left. Each call of `work` gets neighbours.
    pub(super) fn share(&self, pieces: &Pieces, mut work: impl FnMut(Range<usize>)) {
        let threads = pieces.next.len();
        if threads == 1 {
            return work(0..pieces.count);
        }
        for owner in (self.index..threads).chain(0..self.index) {
            let (next, end) = (&pieces.next[owner].0, pieces.start_of(owner + 1));
            loop {
                // Fewer and fewer, so that the last ones end at about the same time; half of what is left, since one row goes
                // through neighbouring panels faster.
                let at_once = (end.saturating_sub(next.load(Ordering::Relaxed)) / 2).clamp(1, AT_ONCE);
                let start = next.fetch_add(at_once, Ordering::Relaxed);
                if start >= end {
                    break;
                }
                work(start..(start + at_once).min(end));
            }
        }
    }
}

impl Pieces {
    fn new(count: usize, threads: usize) -> Self {
        let mut pieces = Self::default();
        pieces.reset(count, threads);
        pieces
    }

    /// Other work, none of it done; in the same memory, since some hundred times a step a place on cache lines of its own would
    /// have to be found.
    fn reset(&mut self, count: usize, threads: usize) {
        self.count = count;
        self.next.resize_with(threads, || Padded(AtomicUsize::new(0)));
        for (thread, next) in self.next.iter_mut().enumerate() {
            *next.0.get_mut() = count * thread / threads;
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Whether a thread's range begins here, or all have ended.
    pub(super) fn begins_at(&self, piece: usize) -> bool {
        (1..=self.next.len()).any(|thread| self.start_of(thread) == piece)
    }

    /// Where a thread's range begins.
    pub(super) fn start_of(&self, thread: usize) -> usize {
        self.count * thread / self.next.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_and_barriers_separate_phases() {
        for threads in [1, 2, 5] {
            let team = Team::new(threads);
            for count in [0, 1, 2, 7, 133] {
                let done = (0..count).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>();
                let (first, second) = (team.pieces(count), team.pieces(count));
                team.run(|member| {
                    member.share(&first, |range| {
                        range.for_each(|i| _ = done[i].fetch_add(1, Ordering::Relaxed));
                    });
                    member.barrier();
                    member.share(&second, |_| {
                        assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
                    });
                });
                team.each(count, |i| _ = done[i].fetch_add(1, Ordering::Relaxed));
                assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 2), "{threads} {count}");
            }
        }
    }

    #[test]
    fn a_panic_ends_the_run_and_the_team_goes_on() {
        let team = Team::new(3);
        for unlucky in 0..3 {
            let here = AtomicUsize::new(0);
            let run = || {
                team.run(|member| {
                    assert!(here.fetch_add(1, Ordering::Relaxed) != unlucky, "on purpose");
                    member.barrier();
                });
            };
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            let sum = AtomicUsize::new(0);
            team.each(100, |i| _ = sum.fetch_add(i, Ordering::Relaxed));
            assert_eq!(sum.load(Ordering::Relaxed), 4950);
        }
    }

    #[test]
    fn members_wake_up_again_after_a_pause() {
        let team = Team::new(2);
        for _ in 0..3 {
            let here = AtomicUsize::new(0);
            team.run(|member| {
                here.fetch_add(1, Ordering::Relaxed);
                member.barrier();
                assert_eq!(here.load(Ordering::Relaxed), 2);
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
