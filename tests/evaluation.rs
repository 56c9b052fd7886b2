//! Scoring and generating against transformers 4.31, and finding answers against the authors' regular expressions.

use crate::golden::{self, Supernet};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::backend::{Backend, BackendError, Selection};
use lonas::data::{Answering, Choice};
use lonas::evaluate::{Decoding, Item, Prompt, Text, generate, score};
use lonas::model::Executor;
use lonas::model::llama::LlamaExecutor;
use std::collections::BTreeMap;

#[derive(serde::Deserialize)]
struct Golden {
    prompts: Vec<Vec<u32>>,
    stop: Vec<u32>,
    new_tokens: usize,
    beams: usize,
    questions: Vec<Question>,
    sequences: Vec<Vec<u32>>,
    sub_networks: BTreeMap<String, OfSubNetwork>,
}

#[derive(serde::Deserialize)]
struct Question {
    context: Vec<u32>,
    options: Vec<Vec<u32>>,
}

#[derive(serde::Deserialize)]
struct OfSubNetwork {
    option_logprobs: Vec<Vec<f64>>,
    losses: Vec<f64>,
    greedy: Vec<Option<Vec<u32>>>,
    beam_search: Vec<Option<Vec<u32>>>,
}

fn open() -> (Supernet, Golden) {
    (Supernet::open("tiny-tied/base", "tiny-tied"), golden::json("eval/models.json"))
}

fn executor<B: Backend>(net: &Supernet, backend: B, blocks: usize, block_size: usize) -> LlamaExecutor<B> {
    LlamaExecutor::new(net.load(&backend), backend, blocks, block_size).unwrap()
}

/// The golden sub-networks with how they are selected, in name order.
fn selections(net: &Supernet, golden: &Golden) -> Vec<Selection> {
    let of = |name: &str| match name {
        "maximal" => net.space.maximal(),
        "heuristic" => net.space.heuristic(),
        _ => net.space.minimal(),
    };
    (0..).zip(golden.sub_networks.keys()).map(|(id, name)| net.selection(id, &of(name))).collect()
}

/// Sums of log probabilities.
fn scored(executor: &mut dyn Executor, texts: &[Text]) -> Vec<f64> {
    let mut all = Vec::new();
    score(executor, texts, |step| {
        all.extend(step.iter().map(lonas::evaluate::Scored::logprob));
        Ok::<_, BackendError>(())
    })
    .unwrap();
    all
}

fn check_likelihoods<B: Backend>(backend: impl Fn() -> B) {
    let (net, golden) = open();
    let selections = selections(&net, &golden);
    let items = golden.questions.iter().map(|q| Item {
        context: q.context.clone(),
        options: q.options.clone(),
        correct: 0,
    });
    let items = items.collect::<Vec<_>>();
    let texts = items.iter().flat_map(|item| selections.iter().flat_map(|s| item.texts(s)));
    let texts = texts.collect::<Vec<_>>();
    for (blocks, block_size) in [(600, 1), (40, 1), (60, 4)] {
        let mut executor = executor(&net, backend(), blocks, block_size);
        let ours = scored(&mut executor, &texts);
        let of = |item: usize, option: usize| {
            golden.sub_networks.values().map(move |s| s.option_logprobs[item][option])
        };
        let mut ours = ours.into_iter();
        for (i, item) in items.iter().enumerate() {
            let by_option = (0..item.options.len()).map(|o| of(i, o).collect::<Vec<_>>()).collect::<Vec<_>>();
            for (s, name) in golden.sub_networks.keys().enumerate() {
                for (o, golden) in by_option.iter().enumerate() {
                    let (ours, golden) = (ours.next().unwrap(), golden[s]);
                    assert!((ours - golden).abs() < 1e-3, "{name} question {i} option {o}: {ours}, {golden}");
                }
            }
        }
    }
}

#[test]
fn likelihoods_of_options_are_those_of_transformers() {
    check_likelihoods(|| Cpu::new(Dtype::F32, 2));
    check_likelihoods(Reference::new);
}

#[test]
fn losses_of_whole_texts_are_those_of_transformers() {
    let (net, golden) = open();
    let mut executor = executor(&net, Cpu::new(Dtype::F32, 2), 100, 1);
    for (selection, of) in selections(&net, &golden).iter().zip(golden.sub_networks.values()) {
        let text =
            |tokens: &Vec<u32>| Text { tokens: tokens.clone(), context: 1, selection: selection.clone() };
        let texts = golden.sequences.iter().map(text).collect::<Vec<_>>();
        for ((text, ours), golden) in texts.iter().zip(scored(&mut executor, &texts)).zip(&of.losses) {
            let loss = -ours / (text.tokens.len() - 1) as f64;
            assert!((loss - golden).abs() < 1e-4, "{loss}, transformers {golden}");
        }
    }
}

/// Every prompt under every sub-network, mixed.
fn generated(
    executor: &mut dyn Executor,
    golden: &Golden,
    beams: usize,
    selections: &[Selection],
) -> Vec<Vec<u32>> {
    let prompts = golden.prompts.iter().flat_map(|tokens| {
        selections.iter().map(|s| Prompt { tokens: tokens.clone(), selection: s.clone() })
    });
    let prompts = prompts.collect::<Vec<_>>();
    let decoding = Decoding { max_new_tokens: golden.new_tokens, beams, stop: golden.stop.clone() };
    let mut all = vec![None; prompts.len()];
    generate(executor, &prompts, &decoding, |i, tokens| {
        assert!(all[i].replace(tokens).is_none(), "a text comes once");
        Ok::<_, BackendError>(())
    })
    .unwrap();
    all.into_iter().map(Option::unwrap).collect()
}

fn check_texts<B: Backend>(backend: impl Fn() -> B, pools: &[(usize, usize)], beams: usize) {
    let (net, golden) = open();
    let selections = selections(&net, &golden);
    for &(blocks, block_size) in pools {
        let mut executor = executor(&net, backend(), blocks, block_size);
        let mut ours = generated(&mut executor, &golden, beams, &selections).into_iter();
        for i in 0..golden.prompts.len() {
            for (name, of) in &golden.sub_networks {
                let mut ours = ours.next().unwrap();
                let theirs = if beams == 1 { &of.greedy[i] } else { &of.beam_search[i] };
                // Of beams transformers does not say which stop token it was.
                if beams > 1 && ours.last().is_some_and(|t| golden.stop.contains(t)) {
                    ours.pop();
                }
                // Where transformers gave up there is nothing to compare.
                if let Some(theirs) = theirs {
                    assert_eq!(&ours, theirs, "{name}, prompt {i}, {blocks} blocks of {block_size}");
                }
            }
        }
    }
}

#[test]
fn greedy_texts_are_those_of_transformers() {
    // A wide pool, one that holds two or three prompts at a time, blocks of several positions.
    check_texts(|| Cpu::new(Dtype::F32, 2), &[(4000, 1), (70, 1), (40, 4), (8, 16)], 1);
    check_texts(Reference::new, &[(4000, 16)], 1);
}

#[test]
fn beam_search_is_that_of_transformers_4_31() {
    let (_, golden) = open();
    assert_eq!(golden.beams, 4);
    check_texts(|| Cpu::new(Dtype::F32, 2), &[(4000, 1), (150, 1), (70, 1)], 4);
    check_texts(Reference::new, &[(4000, 1)], 4);
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let (net, golden) = open();
    let selection = selections(&net, &golden).remove(0);
    let prompts = [Prompt { tokens: vec![3; 30], selection }];
    let refused = |blocks, block_size, beams| {
        let mut executor = executor(&net, Cpu::new(Dtype::F32, 1), blocks, block_size);
        let decoding = Decoding { max_new_tokens: 10, beams, stop: Vec::new() };
        let result = generate(&mut executor, &prompts, &decoding, |_, _| Ok::<_, BackendError>(()));
        result.map_err(|e| e.to_string())
    };
    assert!(refused(39, 1, 1).unwrap_err().contains("at most 39 tokens, prompt and texts together, got 40"));
    assert!(refused(40, 1, 1).is_ok());
    assert!(refused(49, 1, 2).unwrap_err().contains("got 50"));
    assert!(refused(99, 4, 2).unwrap_err().contains("blocks of one position"));
}

#[derive(serde::Deserialize)]
struct Said {
    labels: Vec<String>,
    text: String,
    chosen: Option<usize>,
}

#[test]
fn answers_are_found_as_the_authors_expressions_find_them() {
    let cases: Vec<Said> = golden::json("eval/answers.json");
    let found = cases.iter().filter(|c| c.chosen.is_some()).count();
    assert!(cases.len() > 500 && found > 200 && cases.len() - found > 200, "{found} of {}", cases.len());
    for Said { labels, text, chosen } in cases {
        let choice = Choice { question: "q".into(), options: labels.clone(), labels, correct: 0 };
        assert_eq!(Answering::Lonas.chosen(&choice, &text), chosen, "{text:?} of {:?}", choice.labels);
        assert_eq!(Answering::LonasTest.chosen(&choice, &text), chosen, "{text:?}");
    }
}
