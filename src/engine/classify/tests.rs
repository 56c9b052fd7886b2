//! The engine over a toy classifier whose numbers depend on a text's tokens, their types and the sub-network: a text in the
//! wrong place, segment or order changes what it says.

use super::turns::Turns;
use super::{Classified, ClassifierEngine, ClassifyRequest, TextTokens};
use crate::backend::{BackendError, Selection};
use crate::engine::{EngineOptions, Load, Observer, Step, SubmitError};
use crate::model::{Classifier, TextBatch};
use crate::supernet::ActiveShape;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;

const LONGEST: usize = 24;
/// Tokens with which a text makes the toy misbehave.
const FAIL: u32 = 90;
const PANIC: u32 = 91;
const NOT_A_NUMBER: u32 = 92;
const TOO_FEW: u32 = 93;

/// What the toy says of a text.
fn outputs(text: &TextTokens, subnetwork: u32) -> Vec<f32> {
    let both = text.tokens.iter().zip(&text.token_types);
    let hash = both.fold(17 + u64::from(subnetwork), |h, (&token, &kind)| {
        (h * 31 + u64::from(token) * 2 + u64::from(kind)) % 1_000_003
    });
    let last = if text.tokens.contains(&NOT_A_NUMBER) { f32::NAN } else { text.tokens.len() as f32 };
    vec![hash as f32, subnetwork as f32, last]
}

struct Toy {
    gate: Arc<Gate>,
}

impl Classifier for Toy {
    fn classify(&mut self, batch: &TextBatch) -> Result<Vec<Vec<f32>>, BackendError> {
        self.gate.pass();
        let rows = batch.tokens.len();
        assert_eq!((batch.token_types.len(), batch.texts.last().unwrap().end), (rows, rows));
        let ends = batch.segments.iter().map(|s| s.rows.end);
        assert!(
            batch
                .segments
                .iter()
                .map(|s| s.rows.start)
                .eq(std::iter::once(0).chain(ends).take(batch.segments.len()))
        );
        let distinct = batch.segments.iter().map(|s| s.selection.subnetwork).collect::<BTreeSet<_>>();
        assert_eq!(distinct.len(), batch.segments.len(), "equal sub-networks stand together");
        assert!(!batch.tokens.contains(&PANIC), "asked to panic");
        if batch.tokens.contains(&FAIL) {
            return Err(BackendError::Library { operation: "toy", message: "asked to fail".into() });
        }
        let texts = batch.texts.iter().map(|rows| {
            let segment = batch.segments.iter().find(|s| s.rows.contains(&rows.start)).unwrap();
            assert!(rows.end <= segment.rows.end, "a text within one segment");
            let (tokens, token_types) =
                (batch.tokens[rows.clone()].to_vec(), batch.token_types[rows.clone()].to_vec());
            outputs(&TextTokens { tokens, token_types }, segment.selection.subnetwork)
        });
        let all = texts.collect::<Vec<_>>();
        Ok(if batch.tokens.contains(&TOO_FEW) { all[1..].to_vec() } else { all })
    }

    fn labels(&self, _: usize) -> Option<usize> {
        Some(3)
    }

    fn max_positions(&self) -> usize {
        LONGEST
    }
}

/// Lets a test hold the classifier before its next step.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    /// Steps that may still pass; `None` for all.
    steps: Option<usize>,
    /// A step stands before it.
    held: bool,
}

impl Gate {
    fn close(&self) {
        self.set(Some(0));
    }

    fn open(&self) {
        self.set(None);
    }

    fn set(&self, steps: Option<usize>) {
        self.state.lock().unwrap().steps = steps;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        while state.steps == Some(0) {
            state.held = true;
            state = self.changed.wait(state).unwrap();
        }
        state.held = false;
        state.steps = state.steps.map(|left| left - 1);
    }

    /// Until a step stands before it.
    fn until_held(&self) {
        wait_until("a step", || self.state.lock().unwrap().held);
    }
}

/// Every step's tokens and sub-networks, and the loads.
#[derive(Default)]
struct Seen {
    steps: Mutex<Vec<(usize, usize)>>,
    loads: Mutex<Vec<Load>>,
    started: Mutex<Vec<u32>>,
}

impl Observer for Seen {
    fn step(&self, step: &Step) {
        assert_eq!(step.decode_tokens, 0);
        self.steps.lock().unwrap().push((step.prefill_tokens, step.sub_networks));
        self.load(&step.load);
    }

    fn load(&self, load: &Load) {
        self.loads.lock().unwrap().push(load.clone());
    }

    fn started(&self, subnetwork: u32, _: Duration) {
        self.started.lock().unwrap().push(subnetwork);
    }
}

struct Bench {
    engine: ClassifierEngine,
    seen: Arc<Seen>,
    gate: Arc<Gate>,
}

/// An engine that nobody but the test opens the gate for.
fn engine(max_running: usize, step_tokens: usize) -> (ClassifierEngine, Arc<Seen>, Arc<Gate>) {
    let (seen, gate) = (Arc::new(Seen::default()), Arc::new(Gate::default()));
    let options = EngineOptions { max_running, max_waiting: 1, step_tokens, ..EngineOptions::default() };
    let observer: Arc<dyn Observer> = Arc::<Seen>::clone(&seen);
    let toy = Box::new(Toy { gate: Arc::clone(&gate) });
    (ClassifierEngine::start(toy, options, observer).unwrap(), seen, gate)
}

fn bench(max_running: usize, step_tokens: usize) -> Bench {
    let (engine, seen, gate) = engine(max_running, step_tokens);
    Bench { engine, seen, gate }
}

impl Drop for Bench {
    /// Dropping the engine waits for its thread, which must not be left at the gate.
    fn drop(&mut self) {
        self.gate.open();
    }
}

fn selection(subnetwork: u32) -> Selection {
    let shape = Arc::new(ActiveShape { linears: Vec::new() });
    Selection { adapter: (subnetwork % 2) as usize, subnetwork, shape }
}

fn text(tokens: &[u32]) -> TextTokens {
    let token_types = (0..tokens.len()).map(|i| u32::from(i > 2)).collect();
    TextTokens { tokens: tokens.to_vec(), token_types }
}

fn request(texts: &[&[u32]], subnetwork: u32) -> ClassifyRequest {
    ClassifyRequest { texts: texts.iter().map(|t| text(t)).collect(), selection: selection(subnetwork) }
}

/// Everything that comes, by text.
fn read(mut receiver: Receiver<Result<Classified, String>>) -> Result<Vec<Vec<f32>>, String> {
    let mut all = Vec::new();
    while let Some(result) = receiver.blocking_recv() {
        all.push(result?);
    }
    all.sort_by_key(|c| c.text);
    assert!(all.iter().map(|c| c.text).eq(0..all.len()), "each text once");
    Ok(all.into_iter().map(|c| c.outputs).collect())
}

fn alone(request: &ClassifyRequest) -> Vec<Vec<f32>> {
    request.texts.iter().map(|t| outputs(t, request.selection.subnetwork)).collect()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn requests() -> impl Strategy<Value = Vec<ClassifyRequest>> {
    let one = (prop::collection::vec(prop::collection::vec(0u32..50, 1..LONGEST), 1..9), 0u32..4);
    let one = one.prop_map(|(texts, subnetwork)| {
        request(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>(), subnetwork)
    });
    prop::collection::vec(one, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_text_says_what_it_says_alone(requests in requests(), step_tokens in 1usize..80) {
        let bench = bench(200, step_tokens);
        let receivers = requests.iter().map(|r| bench.engine.submit(r.clone()).unwrap()).collect::<Vec<_>>();
        for (request, receiver) in requests.iter().zip(receivers) {
            prop_assert_eq!(read(receiver), Ok(alone(request)));
        }
        prop_assert_eq!(bench.engine.active(), 0);
        let texts = requests.iter().map(|r| r.texts.len()).sum::<usize>();
        prop_assert_eq!(bench.seen.started.lock().unwrap().len(), texts, "each waited once");
    }

    #[test]
    fn cancelling_some_changes_nothing_for_the_others(requests in requests(), cancelled in prop::collection::vec(any::<bool>(), 12)) {
        let bench = bench(200, 30);
        bench.gate.close();
        let submit = |(r, gone): (&ClassifyRequest, &bool)| {
            let receiver = bench.engine.submit(r.clone()).unwrap();
            (!gone).then_some((r.clone(), receiver))
        };
        let kept = requests.iter().zip(&cancelled).map(submit).collect::<Vec<_>>();
        bench.gate.open();
        for (request, receiver) in kept.into_iter().flatten() {
            prop_assert_eq!(read(receiver), Ok(alone(&request)));
        }
        wait_until("every place is free", || bench.engine.active() == 0);
    }

    /// The two laws of the queue, on plans alone: a step is as full as the next text lets it be, and between two texts of a
    /// request no other has more than one.
    #[test]
    fn requests_take_turns(requests in requests(), step_tokens in 1usize..80) {
        let mut turns = Turns::new(step_tokens);
        for (id, request) in (0..).zip(&requests) {
            turns.add(id, request.selection.clone(), request.texts.clone());
        }
        let (mut served, mut steps) = (vec![0usize; requests.len()], Vec::new());
        while let Some(plan) = turns.plan() {
            let tokens = plan.batch.tokens.len();
            prop_assert!(tokens <= step_tokens || plan.texts.len() == 1);
            for planned in &plan.texts {
                served[planned.id as usize] += 1;
            }
            for i in (0..requests.len()).filter(|&i| served[i] < requests[i].texts.len()) {
                let fair = |(j, &theirs): (usize, &usize)| theirs <= served[i] + usize::from(j < i);
                prop_assert!(served.iter().enumerate().all(fair), "{i} waits and has {served:?}");
            }
            steps.push(tokens);
        }
        prop_assert!(turns.is_idle());
        prop_assert!(served.iter().zip(&requests).all(|(&n, r)| n == r.texts.len()));
        let all = requests.iter().flat_map(|r| &r.texts).map(|t| t.tokens.len()).sum::<usize>();
        prop_assert_eq!(steps.iter().sum::<usize>(), all);
        // The next step begins with a text that had no room in this one.
        let full = steps.windows(2).all(|two| two[0] + two[1].min(LONGEST) > step_tokens);
        prop_assert!(full, "a step that was not full: {steps:?} of {step_tokens}");
    }
}

#[test]
fn one_text_does_not_wait_for_a_batch_that_came_first() {
    let bench = bench(200, 8);
    bench.gate.close();
    let many = bench.engine.submit(request(&[&[1, 2, 3, 4][..]; 40], 0)).unwrap();
    bench.gate.until_held();
    let mut one = bench.engine.submit(request(&[&[9, 9]], 1)).unwrap();
    bench.gate.set(Some(2));
    assert!(one.blocking_recv().unwrap().is_ok());
    bench.gate.until_held();
    assert_eq!(many.len(), 3, "two of the step that was held, and one beside it");
    bench.gate.open();
    assert_eq!(read(many).unwrap().len(), 40);
}

#[test]
fn sub_networks_share_a_step() {
    let bench = bench(200, 64);
    bench.gate.close();
    let first = bench.engine.submit(request(&[&[1]], 0)).unwrap();
    bench.gate.until_held();
    let rest = [1, 2, 1, 3].map(|sub| bench.engine.submit(request(&[&[5, 6], &[7]], sub)).unwrap());
    bench.gate.open();
    assert!(read(first).is_ok());
    for receiver in rest {
        assert_eq!(read(receiver).unwrap().len(), 2);
    }
    // What came of a step is sent before the step is told.
    wait_until("both steps are told", || bench.seen.steps.lock().unwrap().len() == 2);
    assert_eq!(*bench.seen.steps.lock().unwrap(), [(1, 1), (12, 3)]);
}

#[test]
fn what_runs_and_what_waits_is_told() {
    let bench = bench(200, 4);
    bench.gate.close();
    let receiver = bench.engine.submit(request(&[&[1, 2, 3], &[4, 5, 6]], 2)).unwrap();
    bench.gate.until_held();
    let last = bench.seen.loads.lock().unwrap().last().unwrap().by_sub_network.clone();
    assert_eq!(last.get(&2), Some(&(1, 1)));
    bench.gate.open();
    assert!(read(receiver).is_ok());
    let idle = || bench.seen.loads.lock().unwrap().last().unwrap().by_sub_network.is_empty();
    wait_until("nothing is left", idle);
}

#[test]
fn a_step_that_fails_or_panics_ends_only_the_requests_in_it() {
    for (token, reason) in [(FAIL, "asked to fail"), (PANIC, "panicked"), (TOO_FEW, "of 1 texts, not of 2")] {
        let bench = bench(200, 8);
        bench.gate.close();
        let first = bench.engine.submit(request(&[&[1; 8]], 0)).unwrap();
        bench.gate.until_held();
        let broken = bench.engine.submit(request(&[&[token, 2, 3, 4], &[5; 8], &[6; 8]], 0)).unwrap();
        let beside = bench.engine.submit(request(&[&[7; 4]], 1)).unwrap();
        let after = request(&[&[8; 4]], 1);
        let later = bench.engine.submit(after.clone()).unwrap();
        bench.gate.open();
        assert!(read(first).is_ok());
        assert!(read(broken).unwrap_err().contains(reason));
        assert!(read(beside).unwrap_err().contains(reason));
        assert_eq!(read(later), Ok(alone(&after)));
        wait_until("every place is free", || bench.engine.active() == 0);
        assert!(bench.engine.is_accepting());
    }
}

#[test]
fn a_number_that_is_none_ends_its_own_request_only() {
    let bench = bench(200, 64);
    bench.gate.close();
    let first = bench.engine.submit(request(&[&[1]], 0)).unwrap();
    bench.gate.until_held();
    let broken = bench.engine.submit(request(&[&[1], &[NOT_A_NUMBER], &[2], &[3]], 0)).unwrap();
    let beside = request(&[&[7; 4], &[8]], 0);
    let kept = bench.engine.submit(beside.clone()).unwrap();
    bench.gate.open();
    assert!(read(first).is_ok());
    assert!(read(broken).unwrap_err().contains("not finite"));
    assert_eq!(read(kept), Ok(alone(&beside)));
    wait_until("every place is free", || bench.engine.active() == 0);
}

#[test]
fn a_cancelled_request_is_not_computed() {
    let bench = bench(200, 4);
    bench.gate.close();
    let first = bench.engine.submit(request(&[&[1; 4]], 0)).unwrap();
    bench.gate.until_held();
    drop(bench.engine.submit(request(&[&[PANIC; 4][..]; 30], 0)).unwrap());
    bench.gate.open();
    assert!(read(first).is_ok());
    wait_until("every place is free", || bench.engine.active() == 0);
    assert_eq!(*bench.seen.started.lock().unwrap(), [0], "none of the thirty began");
}

#[test]
fn all_texts_get_a_place_or_none() {
    let bench = bench(4, 8);
    bench.gate.close();
    let four = bench.engine.submit(request(&[&[1][..]; 4], 0)).unwrap();
    assert_eq!(
        bench.engine.submit(request(&[&[1][..]; 2], 0)).unwrap_err(),
        SubmitError::QueueFull { limit: 5 }
    );
    let one = bench.engine.submit(request(&[&[1]], 0)).unwrap();
    assert_eq!(bench.engine.active(), 5);
    bench.gate.open();
    assert!(read(four).is_ok() && read(one).is_ok());
    assert!(read(bench.engine.submit(request(&[&[1][..]; 5], 0)).unwrap()).is_ok(), "places are free again");
}

#[test]
fn what_the_model_cannot_take_is_refused_and_nothing_is_nothing() {
    let bench = bench(4, 8);
    let limit = LONGEST;
    for tokens in [0, LONGEST + 1] {
        let asked = request(&[&[1], &vec![1; tokens]], 0);
        assert_eq!(bench.engine.submit(asked).unwrap_err(), SubmitError::TooLong { tokens, limit });
    }
    assert!(read(bench.engine.submit(request(&[&[1; LONGEST]], 0)).unwrap()).is_ok(), "longer than a step");
    assert_eq!(read(bench.engine.submit(request(&[], 0)).unwrap()), Ok(vec![]));
    assert_eq!(bench.engine.active(), 0);
}

#[test]
fn draining_finishes_what_is_in_and_refuses_what_comes() {
    let bench = bench(50, 4);
    bench.gate.close();
    let running = bench.engine.submit(request(&[&[1; 3][..]; 9], 0)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    assert!(!runtime.block_on(bench.engine.drain(Duration::from_millis(20))), "it cannot have ended yet");
    assert_eq!(bench.engine.submit(request(&[&[1]], 0)).unwrap_err(), SubmitError::Stopped);
    bench.gate.open();
    assert!(runtime.block_on(bench.engine.drain(Duration::from_secs(10))));
    assert_eq!(read(running).unwrap().len(), 9);
}

#[test]
fn dropping_the_engine_fails_what_is_left() {
    let (engine, _, gate) = engine(50, 4);
    gate.close();
    let receiver = engine.submit(request(&[&[1; 3][..]; 9], 0)).unwrap();
    gate.until_held();
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        gate.open();
    });
    drop(engine);
    opener.join().unwrap();
    assert!(read(receiver).unwrap_err().contains("shutting down"));
}
