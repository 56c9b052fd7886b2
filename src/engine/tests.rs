//! The engine over a toy executor whose next token depends on a sequence's whole history as its blocks hold it: a wrong
//! block table, position, chunk or preemption changes what it says.

use super::{Engine, EngineOptions, Event, Finish, Observer, Request, Scheduler, Step, SubmitError};
use crate::backend::{BackendError, Selection};
use crate::generation::Sampling;
use crate::model::{Batch, Executor, Logits};
use crate::supernet::ActiveShape;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;

const VOCABULARY: usize = 50;
const STOP: u32 = 7;
/// Tokens with which a prompt makes the toy misbehave.
pub(super) const FAIL: u32 = 40;
const PANIC: u32 = 41;
const NOT_A_NUMBER: u32 = 42;
const LOSE: u32 = 43;

pub(super) struct Toy {
    blocks: usize,
    block_size: usize,
    /// Token and sub-network by slot.
    pool: HashMap<(u32, usize), (u32, u32)>,
    gate: Arc<Gate>,
}

/// Lets a test hold the executor before its next step.
#[derive(Default)]
pub(super) struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

/// What the toy says after this history.
pub(super) fn next(history: &[u32], subnetwork: u32) -> u32 {
    let hash = history.iter().fold(17 + u64::from(subnetwork), |h, &t| (h * 31 + u64::from(t)) % 1_000_003);
    (hash % 40) as u32
}

fn toy_logits(history: &[u32], subnetwork: u32) -> Vec<f32> {
    let mut logits = vec![0.0; VOCABULARY];
    logits[next(history, subnetwork) as usize] = 9.0;
    if history.contains(&NOT_A_NUMBER) {
        logits.fill(f32::NAN);
    }
    logits
}

impl Executor for Toy {
    fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        self.gate.pass();
        let mut rows: HashMap<u32, Vec<f32>> = HashMap::new();
        for span in &batch.spans {
            let segment = batch.segments.iter().find(|s| s.rows.contains(&span.rows.start)).unwrap();
            assert!(segment.rows.end >= span.rows.end, "a span within one segment");
            let subnetwork = segment.selection.subnetwork;
            let slot = |p: usize| (span.blocks[p / self.block_size], p % self.block_size);
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.start + i;
                assert_eq!(batch.positions[row] as usize, position);
                self.pool.insert(slot(position), (batch.tokens[row], subnetwork));
            }
            for (i, row) in span.rows.clone().enumerate() {
                let history = (0..=span.start + i).map(|p| self.pool[&slot(p)]).collect::<Vec<_>>();
                assert!(history.iter().all(|h| h.1 == subnetwork), "somebody else's context");
                let tokens = history.iter().map(|h| h.0).collect::<Vec<_>>();
                assert!(!tokens.contains(&PANIC), "asked to panic");
                if tokens.contains(&LOSE) {
                    return Err(BackendError::Lost { operation: "toy", message: "asked to be lost".into() });
                }
                if tokens.contains(&FAIL) {
                    return Err(BackendError::Library { operation: "toy", message: "asked to fail".into() });
                }
                rows.insert(row as u32, toy_logits(&tokens, subnetwork));
            }
        }
        let values = batch.outputs.iter().flat_map(|r| rows[r].clone()).collect();
        Ok(Logits { values, vocabulary: VOCABULARY })
    }

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn block_size(&self) -> usize {
        self.block_size
    }
}

fn selection(subnetwork: u32) -> Selection {
    let shape = Arc::new(ActiveShape { linears: Vec::new() });
    Selection { adapter: (subnetwork % 2) as usize, subnetwork, shape }
}

pub(super) fn request(prompt: &[u32], max_tokens: usize, subnetwork: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        selection: selection(subnetwork),
        sampling: Sampling::greedy(),
        max_tokens,
        min_tokens: 0,
        stop_tokens: vec![STOP],
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: None,
    }
}

/// What the request must say, by definition, all by itself.
pub(super) fn alone(request: &Request) -> (Vec<u32>, Finish) {
    let mut history = request.prompt.clone();
    let mut tokens = Vec::new();
    while tokens.len() < request.max_tokens {
        let token = next(&history, request.selection.subnetwork);
        tokens.push(token);
        history.push(token);
        if token == STOP {
            return (tokens, Finish::Stop(STOP));
        }
    }
    (tokens, Finish::Length)
}

/// Steps and preemptions, and the load after the last step.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) preempted: AtomicUsize,
    started: AtomicUsize,
    most_tokens: AtomicUsize,
    used: AtomicUsize,
}

impl Observer for Seen {
    fn step(&self, step: &Step) {
        self.most_tokens.fetch_max(step.prefill_tokens + step.decode_tokens, Ordering::SeqCst);
        self.used.store(step.load.blocks_used, Ordering::SeqCst);
    }

    fn load(&self, load: &super::Load) {
        self.used.store(load.blocks_used, Ordering::SeqCst);
    }

    fn preempted(&self, _: u32) {
        self.preempted.fetch_add(1, Ordering::SeqCst);
    }

    fn started(&self, _: u32, _: Duration) {
        self.started.fetch_add(1, Ordering::SeqCst);
    }
}

pub(super) struct Bench {
    pub(super) engine: Engine,
    pub(super) seen: Arc<Seen>,
    pub(super) gate: Arc<Gate>,
}

pub(super) fn options(max_running: usize, max_waiting: usize, step_tokens: usize) -> EngineOptions {
    EngineOptions { max_running, max_waiting, step_tokens, prefix_cache: true }
}

pub(super) fn engine(blocks: usize, block_size: usize, options: EngineOptions) -> Bench {
    let (seen, gate) = (Arc::new(Seen::default()), Arc::new(Gate::default()));
    let toy = Toy { blocks, block_size, pool: HashMap::new(), gate: Arc::clone(&gate) };
    let observer: Arc<dyn Observer> = Arc::<Seen>::clone(&seen);
    Bench { engine: Engine::start(Box::new(toy), options, observer).unwrap(), seen, gate }
}

/// All tokens and how it ended.
pub(super) fn read(mut receiver: Receiver<Event>) -> (Vec<u32>, Result<Finish, String>) {
    let mut tokens = Vec::new();
    loop {
        match receiver.blocking_recv() {
            Some(Event::Token { token, .. }) => tokens.push(token),
            Some(Event::Finished(finish)) => return (tokens, Ok(finish)),
            Some(Event::Failed(reason)) => return (tokens, Err(reason)),
            Some(Event::Started { .. } | Event::Prompt(_)) => {}
            None => return (tokens, Err("the channel closed without an end".into())),
        }
    }
}

pub(super) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Many begin alike, so that they find each other's blocks.
fn requests() -> impl Strategy<Value = Vec<Request>> {
    let one = (0usize..12, prop::collection::vec(0u32..40, 1..8), 0usize..12, 0u32..4);
    let one = one.prop_map(|(alike, rest, max, sub)| {
        let prompt = (0..alike as u32).chain(rest).collect::<Vec<_>>();
        request(&prompt, max, sub)
    });
    prop::collection::vec(one, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_sequence_says_what_it_says_alone(
        requests in requests(), blocks in 8usize..30, step_tokens in 1usize..20, max_running in 1usize..9,
        prefix_cache in any::<bool>(),
    ) {
        let options = EngineOptions { max_running, max_waiting: 100, step_tokens, prefix_cache };
        let bench = engine(blocks, 4, options);
        let receivers = requests.iter().map(|r| bench.engine.submit(r.clone()).unwrap()).collect::<Vec<_>>();
        for (request, receiver) in requests.iter().zip(receivers) {
            let (tokens, finish) = alone(request);
            prop_assert_eq!(read(receiver), (tokens, Ok(finish)));
        }
        wait_until("all blocks free", || bench.seen.used.load(Ordering::SeqCst) == 0);
        prop_assert!(bench.seen.most_tokens.load(Ordering::SeqCst) <= step_tokens);
        prop_assert_eq!(bench.seen.started.load(Ordering::SeqCst), requests.len());
        prop_assert_eq!(bench.engine.active(), 0);
    }

    #[test]
    fn cancelling_some_changes_nothing_for_the_others(requests in requests(), cancelled in prop::collection::vec(any::<bool>(), 25)) {
        let bench = engine(12, 4, options(4, 100, 7));
        let mut kept = Vec::new();
        for (request, cancel) in requests.iter().zip(cancelled) {
            let receiver = bench.engine.submit(request.clone()).unwrap();
            if cancel { drop(receiver) } else { kept.push((request, receiver)) }
        }
        for (request, receiver) in kept {
            let (tokens, finish) = alone(request);
            prop_assert_eq!(read(receiver), (tokens, Ok(finish)));
        }
        wait_until("all places free", || bench.engine.active() == 0);
        wait_until("all blocks free", || bench.seen.used.load(Ordering::SeqCst) == 0);
    }

    #[test]
    fn a_plan_is_within_its_limits_and_nobody_starves(
        lengths in prop::collection::vec((1usize..30, 1usize..20, 0u32..3), 1..30),
        blocks in 13usize..40, budget in 1usize..40, max_running in 1usize..10,
    ) {
        let mut scheduler = Scheduler::new(blocks, 4, &options(max_running, 0, budget));
        let mut left = HashMap::new();
        for (id, &(prompt, output, sub)) in lengths.iter().enumerate() {
            scheduler.add(id as u64, &request(&vec![1; prompt], 0, sub));
            left.insert(id as u64, output);
        }
        for _ in 0..20_000 {
            let Some(plan) = scheduler.plan() else { break };
            prop_assert!(plan.batch.tokens.len() <= budget && plan.sequences.len() <= max_running);
            let mut holders = HashMap::<u32, usize>::new();
            plan.batch.spans.iter().flat_map(|s| &s.blocks).for_each(|&b| *holders.entry(b).or_default() += 1);
            let mut written = plan.batch.spans.iter().flat_map(|s| &s.blocks[s.start / 4..]);
            prop_assert!(written.all(|block| holders[block] == 1), "written while others hold it");
            plan.sequences.iter().for_each(|planned| scheduler.publish(planned));
            prop_assert_eq!(plan.batch.segments.last().unwrap().rows.end, plan.batch.tokens.len());
            for planned in plan.sequences.iter().filter(|p| p.last) {
                let left = left.get_mut(&planned.id).unwrap();
                *left -= 1;
                if *left == 0 { scheduler.remove(planned.id) } else { scheduler.push(planned.id, 2) }
            }
        }
        prop_assert!(scheduler.is_idle(), "somebody never ended");
        prop_assert_eq!(scheduler.blocks().0, 0);
    }
}

/// Prompts by name with their lengths, each with the steps in which all of its tokens had been computed.
fn steps_until_done(
    scheduler: &mut Scheduler,
    prompts: &[(u64, usize)],
    more: impl Fn(usize) -> Option<u64>,
) -> HashMap<u64, usize> {
    for &(id, length) in prompts {
        scheduler.add(id, &request(&vec![1; length], 0, 0));
    }
    let mut done = HashMap::new();
    for step in 1..200 {
        if let Some(id) = more(step) {
            scheduler.add(id, &request(&[1; 20], 0, 0));
        }
        let Some(plan) = scheduler.plan() else { break };
        for planned in plan.sequences.iter().filter(|planned| planned.last) {
            scheduler.remove(planned.id);
            done.insert(planned.id, step);
        }
    }
    done
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let options = EngineOptions { prefix_cache: false, ..options(100, 0, 32) };
    let scheduler = || Scheduler::new(1000, 16, &options);
    let done = steps_until_done(&mut scheduler(), &[(0, 3200), (1, 16), (2, 40)], |_| None);
    // The long one takes half of the first steps: the first short one is done in one, the next with what is left.
    assert_eq!((done[&1], done[&2], done[&0]), (1, 4, 102));
    // Nor does it ever wait for short ones that keep coming: half of every step is its own.
    let done = steps_until_done(&mut scheduler(), &[(0, 1600)], |step| Some(step as u64));
    assert_eq!(done[&0], 100);
    // Prompts of one length are computed one after the other.
    let done = steps_until_done(&mut scheduler(), &[(0, 320), (1, 320)], |_| None);
    assert_eq!((done[&0], done[&1]), (10, 20));
}

#[test]
fn a_full_pool_preempts_and_loses_nothing() {
    let bench = engine(10, 4, options(8, 100, 64));
    let requests = (0..8).map(|i| request(&[i, 9], 25, i)).map(|r| Request { stop_tokens: Vec::new(), ..r });
    let requests = requests.collect::<Vec<_>>();
    let receivers = bench.engine.submit_all(requests.clone()).unwrap();
    for (request, receiver) in requests.iter().zip(receivers) {
        let mut history = request.prompt.clone();
        for _ in 0..25 {
            history.push(next(&history, request.selection.subnetwork));
        }
        assert_eq!(read(receiver), (history[2..].to_vec(), Ok(Finish::Length)));
    }
    assert!(
        bench.seen.preempted.load(Ordering::SeqCst) > 0,
        "the pool was never full, so nothing was tested"
    );
}

#[test]
fn a_failing_step_ends_its_sequences_and_the_engine_goes_on() {
    let bench = engine(20, 4, EngineOptions::default());
    for (token, reason) in
        [(FAIL, "asked to fail"), (PANIC, "panicked"), (NOT_A_NUMBER, "no token is possible")]
    {
        let failed = bench.engine.submit(request(&[1, token], 5, 0)).unwrap();
        let (_, finish) = read(failed);
        assert!(finish.as_ref().is_err_and(|r| r.contains(reason)), "{finish:?}");
        let fine = request(&[1, 2], 5, 0);
        let (tokens, finish) = alone(&fine);
        assert_eq!(read(bench.engine.submit(fine).unwrap()), (tokens, Ok(finish)));
    }
    assert_eq!(bench.engine.active(), 0);
}

#[test]
fn a_lost_device_ends_the_engine_which_then_takes_nothing() {
    let bench = engine(20, 4, options(1, 3, 64));
    bench.gate.set(true);
    let lost = bench.engine.submit_all(vec![request(&[1, LOSE], 5, 0), request(&[1, 2], 5, 0)]).unwrap();
    assert!(bench.engine.is_accepting());
    bench.gate.set(false);
    for (receiver, reason) in lost.into_iter().zip(["asked to be lost", "the device is lost"]) {
        let (_, finish) = read(receiver);
        assert!(finish.as_ref().is_err_and(|r| r.contains(reason)), "{finish:?}");
    }
    wait_until("it takes nothing", || !bench.engine.is_accepting());
    assert_eq!(bench.engine.submit(request(&[1], 1, 0)).unwrap_err(), SubmitError::Stopped);
}

#[test]
fn a_full_queue_refuses_at_once_and_all_or_nothing() {
    let bench = engine(20, 4, options(1, 3, 64));
    bench.gate.set(true);
    let running = bench.engine.submit(request(&[1], 3, 0)).unwrap();
    wait_until("the first one starts", || bench.seen.started.load(Ordering::SeqCst) == 1);
    let two = bench.engine.submit_all(vec![request(&[2], 3, 0); 2]).unwrap();
    assert_eq!(
        bench.engine.submit_all(vec![request(&[3], 3, 0); 2]).unwrap_err(),
        SubmitError::QueueFull { limit: 4 }
    );
    let last = bench.engine.submit(request(&[4], 3, 0)).unwrap();
    assert_eq!(bench.engine.submit(request(&[5], 3, 0)).unwrap_err(), SubmitError::QueueFull { limit: 4 });
    bench.gate.set(false);
    for receiver in two.into_iter().chain([running, last]) {
        assert!(read(receiver).1.is_ok());
    }
    assert!(bench.engine.submit(request(&[5], 3, 0)).is_ok(), "places are free again");
}

#[test]
fn a_burst_takes_the_places_of_the_running_too() {
    let bench = engine(20, 4, options(5, 1, 64));
    bench.gate.set(true);
    let all = bench.engine.submit_all(vec![request(&[1], 3, 0); 6]).unwrap();
    assert_eq!(bench.engine.submit(request(&[1], 3, 0)).unwrap_err(), SubmitError::QueueFull { limit: 6 });
    bench.gate.set(false);
    for receiver in all {
        assert!(read(receiver).1.is_ok());
    }
}

#[test]
fn what_can_never_fit_is_refused() {
    let bench = engine(5, 4, EngineOptions::default());
    assert_eq!(
        bench.engine.submit(request(&[1; 15], 6, 0)).unwrap_err(),
        SubmitError::TooLong { tokens: 21, limit: 20 }
    );
    assert!(read(bench.engine.submit(request(&[1; 15], 5, 0)).unwrap()).1.is_ok());
}

#[test]
fn draining_finishes_what_runs_and_refuses_what_comes() {
    let bench = engine(50, 4, EngineOptions::default());
    bench.gate.set(true);
    let running = bench.engine.submit(request(&[1], 20, 0)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    assert!(!runtime.block_on(bench.engine.drain(Duration::from_millis(20))), "it cannot have ended yet");
    assert_eq!(bench.engine.submit(request(&[1], 2, 0)).unwrap_err(), SubmitError::Stopped);
    bench.gate.set(false);
    assert!(runtime.block_on(bench.engine.drain(Duration::from_secs(10))));
    assert!(read(running).1.is_ok());
}

#[test]
fn dropping_the_engine_fails_what_is_left() {
    let bench = engine(50, 4, EngineOptions::default());
    bench.gate.set(true);
    let receiver = bench.engine.submit(request(&[1], 100, 0)).unwrap();
    let gate = Arc::clone(&bench.gate);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        gate.set(false);
    });
    drop(bench);
    opener.join().unwrap();
    assert!(read(receiver).1.is_err());
}

#[test]
fn prompt_logprobs_come_whole_whatever_the_chunks() {
    let prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5];
    for step_tokens in [1, 2, 4, 100] {
        let bench = engine(20, 4, EngineOptions { step_tokens, ..EngineOptions::default() });
        let asked = Request { prompt_logprobs: Some(1), logprobs: Some(2), ..request(&prompt, 1, 0) };
        let mut receiver = bench.engine.submit(asked).unwrap();
        assert!(matches!(receiver.blocking_recv(), Some(Event::Started { cached: 0 })));
        let Some(Event::Prompt(logprobs)) = receiver.blocking_recv() else {
            panic!("the prompt comes first")
        };
        assert_eq!(logprobs.iter().map(|l| l.token).collect::<Vec<_>>(), prompt[1..]);
        for (i, logprob) in logprobs.iter().enumerate() {
            assert_eq!(logprob.top[0].0, next(&prompt[..=i], 0), "position {i}");
        }
        let Some(Event::Token { token, logprob: Some(logprob), .. }) = receiver.blocking_recv() else {
            panic!("then the token with its log probability")
        };
        assert_eq!((token, logprob.token, logprob.top.len()), (next(&prompt, 0), token, 2));
        assert!(matches!(receiver.blocking_recv(), Some(Event::Finished(Finish::Length))));
    }
}

#[test]
fn no_stop_token_comes_before_min_tokens() {
    let prompt = (0..200).map(|i| vec![i % 40, i / 40]).find(|p| next(p, 0) == STOP).unwrap();
    let bench = engine(20, 4, EngineOptions::default());
    let stopped = read(bench.engine.submit(request(&prompt, 3, 0)).unwrap());
    assert_eq!(stopped, (vec![STOP], Ok(Finish::Stop(STOP))));
    let asked = Request { min_tokens: 2, ..request(&prompt, 3, 0) };
    let (tokens, _) = read(bench.engine.submit(asked).unwrap());
    assert!(tokens.len() >= 2 && tokens[0] != STOP && tokens[1] != STOP, "{tokens:?}");
}
