//! Sequences that begin with what others have computed, over the toy of `tests`, which says something else at once where a
//! block holds anything but what it is taken for.

use super::tests::{Bench, FAIL, alone, engine, options, read, request};
use super::{EngineOptions, Event, Finish, Request, Scheduler};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

const BLOCK: usize = 4;

fn bench(blocks: usize) -> Bench {
    engine(blocks, BLOCK, options(4, 100, 64))
}

/// How many tokens of its prompt were in the cache; it says what it says alone.
fn cached(bench: &Bench, request: &Request) -> usize {
    let mut receiver = bench.engine.submit(request.clone()).unwrap();
    let Some(Event::Started { cached }) = receiver.blocking_recv() else { panic!("it starts first") };
    let (tokens, finish) = alone(request);
    assert_eq!(read(receiver), (tokens, Ok(finish)));
    cached
}

fn prompt(length: u32) -> Vec<u32> {
    (10..10 + length).collect()
}

#[test]
fn what_begins_alike_is_computed_once() {
    let bench = bench(30);
    assert_eq!(cached(&bench, &request(&prompt(10), 3, 0)), 0);
    assert_eq!(cached(&bench, &request(&prompt(10), 3, 0)), 8, "whole blocks");
    assert_eq!(cached(&bench, &request(&prompt(14), 3, 0)), 8, "as far as it was computed");
    assert_eq!(cached(&bench, &request(&prompt(14), 3, 0)), 12);
    assert_eq!(cached(&bench, &request(&prompt(12), 3, 0)), 8, "the last token is always computed");
    assert_eq!(cached(&bench, &request(&prompt(3), 3, 0)), 0, "no whole block");
    let other = [&prompt(4)[..], &[1, 2, 3, 4, 5]].concat();
    assert_eq!(cached(&bench, &request(&other, 3, 0)), 4, "as far as it is the same");
    let shifted = prompt(12)[4..].to_vec();
    assert_eq!(cached(&bench, &request(&shifted, 3, 0)), 0, "the same tokens behind others");
}

#[test]
fn only_the_same_sub_network_and_salt_find_it() {
    let bench = bench(60);
    let salted = |salt: &str, subnetwork| Request {
        cache_salt: Some(salt.into()),
        ..request(&prompt(9), 2, subnetwork)
    };
    let wanted = [request(&prompt(9), 2, 0), request(&prompt(9), 2, 2), salted("a", 0), salted("b", 0)];
    for request in &wanted {
        assert_eq!(cached(&bench, request), 0, "{request:?}");
    }
    for request in &wanted {
        assert_eq!(cached(&bench, request), 8, "{request:?}");
    }
    // Its logits are wanted, and nobody has kept them.
    let scored = Request { prompt_logprobs: Some(0), ..request(&prompt(9), 2, 0) };
    assert_eq!(cached(&bench, &scored), 0);
}

#[test]
fn an_answer_is_the_beginning_of_the_next_prompt() {
    let bench = bench(30);
    let first = Request { stop_tokens: Vec::new(), ..request(&prompt(5), 8, 0) };
    let (answer, _) = alone(&first);
    assert_eq!(cached(&bench, &first), 0);
    let next = [&first.prompt, &answer[..], &[30, 31, 32]].concat();
    // Thirteen tokens, of which the last was chosen but never computed.
    assert_eq!(cached(&bench, &request(&next, 4, 0)), 12);
}

#[test]
fn what_was_used_longest_ago_makes_room() {
    // Six blocks; each of these needs three, the last of which is not full.
    let bench = bench(6);
    let of = |first: u32| request(&(first..first + 9).collect::<Vec<_>>(), 1, 0);
    assert_eq!([0, 10, 0].map(|first| cached(&bench, &of(first))), [0, 0, 8]);
    // Two blocks are empty; then goes the second one of 10, which was let go of before its first one.
    assert_eq!(cached(&bench, &of(20)), 0);
    assert_eq!(cached(&bench, &of(0)), 8);
    assert_eq!(cached(&bench, &of(20)), 8);
    assert_eq!(cached(&bench, &of(10)), 4);
    let whole = request(&(1..21).collect::<Vec<_>>(), 4, 0);
    assert_eq!(cached(&bench, &whole), 0, "all of the pool can be had");
    assert_eq!([0, 20, 10].map(|first| cached(&bench, &of(first))), [0; 3]);
}

#[test]
fn nothing_of_a_failed_step_is_found() {
    let bench = bench(30);
    let failing = [&prompt(8)[..], &[FAIL]].concat();
    let (_, end) = read(bench.engine.submit(request(&failing, 3, 0)).unwrap());
    assert!(end.is_err());
    assert_eq!(cached(&bench, &request(&prompt(9), 3, 0)), 0);
    // But what was computed before it is.
    let (_, end) = read(bench.engine.submit(request(&failing, 3, 0)).unwrap());
    assert!(end.is_err());
    assert_eq!(cached(&bench, &request(&prompt(9), 3, 0)), 8);
}

#[test]
fn without_the_cache_nothing_is_kept() {
    let bench = engine(30, BLOCK, EngineOptions { prefix_cache: false, ..options(4, 100, 64) });
    assert_eq!([0; 2].map(|_| cached(&bench, &request(&prompt(10), 3, 0))), [0; 2]);
}

#[test]
fn who_is_preempted_finds_what_is_left_of_its_own() {
    // Two that grow into a pool with room for one of them: the younger is put back, and needs but little again.
    let mut scheduler = Scheduler::new(8, BLOCK, &options(4, 0, 64));
    for id in 0..2 {
        scheduler.add(id, &request(&prompt(13 + id as u32), 100, id as u32));
    }
    let mut cached = HashMap::<u64, Vec<usize>>::new();
    for step in 0..20 {
        let plan = scheduler.plan().expect("somebody always gets on");
        plan.started.iter().for_each(|started| cached.entry(started.id).or_default().push(started.cached));
        plan.sequences.iter().for_each(|planned| scheduler.publish(planned));
        plan.sequences.iter().for_each(|planned| scheduler.push(planned.id, 7));
        // The older one has had all of it for a while.
        if step == 14 {
            scheduler.remove(0);
        }
    }
    assert_eq!(cached[&0], [0]);
    let [first, again] = cached[&1][..] else { panic!("preempted once: {cached:?}") };
    assert!(first == 0 && (4..=12).contains(&again), "{cached:?}");
}

/// Tokens that are computed until all of these have all of theirs, and the step in which each has.
fn computed(scheduler: &mut Scheduler, requests: &[Request]) -> (usize, Vec<usize>) {
    for (id, request) in requests.iter().enumerate() {
        scheduler.add(id as u64, request);
    }
    let (mut tokens, mut done) = (0, vec![0; requests.len()]);
    for step in 1.. {
        let Some(plan) = scheduler.plan() else { break };
        plan.sequences.iter().for_each(|planned| scheduler.publish(planned));
        tokens += plan.batch.tokens.len();
        for planned in plan.sequences.iter().filter(|planned| planned.last) {
            done[planned.id as usize] = step;
            scheduler.remove(planned.id);
        }
    }
    (tokens, done)
}

#[test]
fn what_several_begin_with_is_computed_once_even_when_they_come_together() {
    let computed = |step_tokens: usize, prompts: &[&[u32]]| {
        let requests = prompts.iter().map(|prompt| request(prompt, 1, 0)).collect::<Vec<_>>();
        computed(&mut Scheduler::new(100, BLOCK, &options(8, 0, step_tokens)), &requests)
    };
    let long = (0..33).collect::<Vec<u32>>();
    // Eight blocks in two steps, and a token of each in the third.
    assert_eq!(computed(16, &[&long[..]; 4]), (33 + 3, vec![3; 4]));
    // One that shares two blocks with it and goes on by itself begins as soon as these are there, another at once.
    let alike = [&long[..8], &[40, 41, 42]].concat();
    assert_eq!(computed(8, &[&long, &alike]), (33 + 3, vec![5, 2]));
    assert_eq!(computed(8, &[&long, &[7; 6]]), (33 + 6, vec![5, 2]));
    // It gives its turn to the one that it waits for, though that one is neither the oldest nor the shortest.
    let (oldest, longer) = (vec![9; 48], (0..40).collect::<Vec<u32>>());
    let (tokens, done) = computed(8, &[&oldest, &longer, &alike]);
    assert_eq!(tokens, 48 + 40 + 3);
    assert!(done[2] <= 4, "{done:?}");
}

#[test]
fn nobody_gives_turns_to_who_is_behind_it() {
    let mut scheduler = Scheduler::new(100, BLOCK, &options(8, 0, 8));
    let shared = (0..40).collect::<Vec<u32>>();
    computed(&mut scheduler, &[request(&shared, 1, 0)]);
    let scored = Request { prompt_logprobs: Some(0), ..request(&[&shared[..], &[1; 24]].concat(), 1, 0) };
    let found = request(&[&shared[..], &[2; 3]].concat(), 1, 0);
    let requests = [request(&[9; 64], 1, 0), scored, found, request(&[8; 3], 1, 0)];
    let (_, done) = computed(&mut scheduler, &requests);
    // The one with prompt log probabilities computes all of what the next one has found.
    assert!(done[2] <= 2 && done[3] <= 2 && done[0] <= 17, "{done:?}");
}

#[test]
fn what_somebody_computes_again_is_not_forgotten_before_what_follows() {
    // The last token is always computed, so of two whole blocks the second one is, though it can be found.
    let bench = bench(16);
    let again = Request { stop_tokens: Vec::new(), ..request(&prompt(8), 1, 0) };
    let filler = Request { stop_tokens: Vec::new(), ..request(&[1; 50], 1, 0) };
    let read_all = |request: Request| {
        let mut receiver = bench.engine.submit(request).unwrap();
        let Some(Event::Started { cached }) = receiver.blocking_recv() else { panic!("it starts first") };
        let (tokens, end) = read(receiver);
        assert_eq!(end, Ok(Finish::Length));
        (cached, tokens)
    };
    read_all(again.clone());
    read_all(filler);
    let (found, answer) = read_all(Request { max_tokens: 40, ..again });
    assert_eq!(found, 4);
    let next = [&prompt(8)[..], &answer].concat();
    assert_eq!(
        cached(&bench, &request(&next, 1, 0)),
        44,
        "all but the last token, which nobody has computed"
    );
}

#[test]
fn only_a_generated_token_decodes() {
    let mut scheduler = Scheduler::new(100, BLOCK, &options(8, 0, 64));
    for id in 0..2 {
        scheduler.add(id, &request(&prompt(9), 9, 0));
        let mut decodes = Vec::new();
        for _ in 0..3 {
            let plan = scheduler.plan().expect("it goes on");
            decodes.push((plan.sequences[0].positions.len(), plan.sequences[0].decodes));
            scheduler.publish(&plan.sequences[0]);
            scheduler.push(id, 7);
        }
        // The second finds all of its prompt but one token.
        assert_eq!(decodes, [([9, 1][id as usize], false), (1, true), (1, true)]);
        scheduler.remove(id);
    }
}

#[test]
fn both_of_two_that_compute_the_same_at_once_go_on() {
    let bench = bench(12);
    let alike = request(&prompt(9), 6, 0);
    let receivers = bench.engine.submit_all(vec![alike.clone(); 3]).unwrap();
    for receiver in receivers {
        let (tokens, finish) = alone(&alike);
        assert_eq!(read(receiver), (tokens, Ok(finish)));
    }
    assert_eq!(cached(&bench, &alike), 8);
    assert_eq!(bench.seen.preempted.load(Ordering::SeqCst), 0);
    // Their copies are free again: this one needs the whole pool.
    let long = Request { stop_tokens: Vec::new(), ..request(&prompt(9), 39, 0) };
    assert_eq!(read(bench.engine.submit(long).unwrap()).1, Ok(Finish::Length));
}
