//! `/v1/completions`: prompts, lengths, ends, sampling.

use super::app::{App, COMPLETIONS, tokens};
use crate::tiny::{CONTEXT, EOS, X};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const PROMPT: &str = "the end of the list is";

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect()
}

fn keys(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test]
async fn every_form_of_prompt_means_the_same() {
    let app = App::new();
    let ids = app.encode(PROMPT);
    let greedy =
        |prompt: Value| json!({"prompt": prompt, "temperature": 0, "max_tokens": 20, "ignore_eos": true});
    let expected = app.complete(greedy(json!(PROMPT))).await;
    assert_eq!(expected["usage"]["completion_tokens"], 20);
    for form in [json!([PROMPT]), json!(ids), json!([ids])] {
        let answer = app.complete(greedy(form)).await;
        assert_eq!(texts(&answer), texts(&expected));
        assert_eq!(tokens(&answer["usage"]), tokens(&expected["usage"]));
    }
    let without = app.complete(json!({"prompt": PROMPT, "add_special_tokens": false, "max_tokens": 1})).await;
    assert_eq!(without["usage"]["prompt_tokens"], ids.len() - 1, "without <s>");
}

#[tokio::test]
async fn several_prompts_and_answers_come_in_order() {
    let app = App::new();
    let ask = |prompt: Value, n: usize| json!({"prompt": prompt, "n": n, "seed": 11, "max_tokens": 12, "ignore_eos": true});
    let both = app.complete(ask(json!(["one", "two of them"]), 3)).await;
    let choices = both["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    let mut expected = Vec::new();
    for prompt in ["one", "two of them"] {
        let alone = app.complete(ask(json!(prompt), 3)).await;
        expected.extend(texts(&alone).into_iter().map(String::from));
    }
    assert_eq!(texts(&both), expected);
    assert_eq!(expected.iter().collect::<BTreeSet<_>>().len(), 6, "each answer has draws of its own");
    let prompts = app.encode("one").len() + app.encode("two of them").len();
    assert_eq!(tokens(&both["usage"]), [prompts, 72, prompts + 72], "each prompt counts once");
}

#[tokio::test]
async fn echo_gives_the_prompt_back_in_front() {
    let app = App::new();
    let plain = app.complete(json!({"prompt": PROMPT, "temperature": 0})).await;
    let echoed = app.complete(json!({"prompt": PROMPT, "temperature": 0, "echo": true})).await;
    assert_eq!(texts(&echoed), [format!("{PROMPT}{}", texts(&plain)[0])]);
    assert_eq!(tokens(&echoed["usage"]), tokens(&plain["usage"]));
    let ids = app.encode("two");
    let of_ids = app.complete(json!({"prompt": ids, "echo": true, "max_tokens": 0})).await;
    assert_eq!(texts(&of_ids), ["<s>two"], "of token ids, what they stand for");
}

#[tokio::test]
async fn no_tokens_at_all_can_be_asked_for() {
    let app = App::new();
    let prompt_tokens = app.encode(PROMPT).len();
    for (echo, text) in [(true, PROMPT), (false, "")] {
        let answer = app.complete(json!({"prompt": PROMPT, "max_tokens": 0, "echo": echo})).await;
        assert_eq!(texts(&answer), [text]);
        assert_eq!(tokens(&answer["usage"]), [prompt_tokens, 0, prompt_tokens]);
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn sixteen_tokens_are_the_default_and_the_context_the_most() {
    let app = App::new();
    let ask = |ids: Vec<u32>| json!({"prompt": ids, "ignore_eos": true});
    let usual = app.complete(ask(vec![5; 10])).await;
    assert_eq!(usual["usage"]["completion_tokens"], 16);
    let tight = app.complete(ask(vec![5; CONTEXT - 3])).await;
    assert_eq!(tight["usage"]["completion_tokens"], 3, "as many as fit");
    assert_eq!(tight["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_stop_string_ends_the_text_in_front_of_it() {
    let app = App::new();
    let ask = |stop: Value| json!({"prompt": PROMPT, "seed": 3, "ignore_eos": true, "max_tokens": 40, "stop": stop});
    let free = app.complete(ask(Value::Null)).await;
    let text = texts(&free)[0];
    let characters = text.chars().collect::<Vec<_>>();
    assert_eq!(free["choices"][0]["finish_reason"], "length");
    for start in [0, 3, characters.len() / 2] {
        let stop = characters[start..start + 2].iter().collect::<String>();
        let answer = app.complete(ask(json!([stop, "never in it"]))).await;
        assert_eq!(texts(&answer), [&text[..text.find(&stop).unwrap()]], "{text:?} up to {stop:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer["choices"][0]["stop_reason"], stop);
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() <= 40);
    }
}

#[tokio::test]
async fn end_of_text_ends_an_answer_unless_ignored() {
    let app = App::new();
    let ask = |more: Value| {
        let mut body = json!({"prompt": PROMPT, "max_tokens": 5, "logit_bias": {(EOS.to_string()): 100}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let ended = app.complete(ask(json!({}))).await;
    let choice = &ended["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(""), &json!("stop")));
    assert_eq!((&choice["stop_reason"], &ended["usage"]["completion_tokens"]), (&Value::Null, &json!(1)));
    let ignored = app.complete(ask(json!({"ignore_eos": true}))).await;
    let choice = &ignored["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(""), &json!("length")));
    assert_eq!(ignored["usage"]["completion_tokens"], 5);
    let named = app.complete(ask(json!({"ignore_eos": true, "stop_token_ids": [EOS, 9]}))).await;
    assert_eq!(named["choices"][0]["finish_reason"], "stop");
    assert_eq!(named["choices"][0]["stop_reason"], EOS, "a token that the request itself named");
}

#[tokio::test]
async fn no_end_comes_before_min_tokens() {
    let app = App::new();
    let biased = json!({(EOS.to_string()): 100});
    let ask = |least: usize, most: Value| json!({"prompt": PROMPT, "min_tokens": least, "max_tokens": most, "logit_bias": biased});
    let answer = app.complete(ask(3, json!(10))).await;
    assert_eq!(answer["usage"]["completion_tokens"], 4, "three others and the end");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let more = app.complete(ask(30, Value::Null)).await;
    assert_eq!(more["usage"]["completion_tokens"], 30, "more than the default of 16");
    let error = app.post(COMPLETIONS, &ask(CONTEXT - 2, Value::Null)).await.expect(400);
    assert_eq!(error["error"]["param"], "min_tokens", "{error}");
}

#[tokio::test]
async fn a_stop_string_does_not_end_a_text_before_min_tokens() {
    let app = App::new();
    let e = app.encode("e")[1];
    let ask = |least: usize| json!({"prompt": PROMPT, "min_tokens": least, "max_tokens": 8, "stop": "e", "logit_bias": {(e.to_string()): 100}});
    assert_eq!(texts(&app.complete(ask(0)).await), [""]);
    assert_eq!(texts(&app.complete(ask(4)).await), ["eee"], "the fourth is the first that may end it");
    let ask = |least: usize| json!({"prompt": PROMPT, "min_tokens": least, "max_tokens": 8, "stop": "eeee", "logit_bias": {(e.to_string()): 100}});
    assert_eq!(texts(&app.complete(ask(6)).await), ["ee"], "it begins before and ends with the sixth");
}

#[tokio::test]
async fn a_bias_of_100_forces_a_token_and_one_of_minus_100_forbids_it() {
    let app = App::new();
    let free =
        app.complete(json!({"prompt": PROMPT, "temperature": 0, "logprobs": 0, "max_tokens": 1})).await;
    let forced = json!({"prompt": PROMPT, "max_tokens": 6, "logit_bias": {(X.to_string()): 100}});
    assert_eq!(texts(&app.complete(forced).await), ["xxxxxx"]);
    let best = free["choices"][0]["logprobs"]["tokens"][0].as_str().unwrap();
    let best = (0..97).find(|&id| app.spelled(id) == best).unwrap();
    let forbidden = json!({"prompt": PROMPT, "temperature": 0, "logprobs": 0, "max_tokens": 1,
                           "logit_bias": {(best.to_string()): -100}});
    let other = app.complete(forbidden).await;
    assert_ne!(other["choices"][0]["logprobs"]["tokens"], free["choices"][0]["logprobs"]["tokens"]);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_text() {
    let app = App::new();
    let ask = |seed: i64| json!({"prompt": PROMPT, "seed": seed, "max_tokens": 30});
    let mut seen = BTreeSet::new();
    for seed in [0, 1, -1, i64::MAX] {
        let (first, second) = (app.complete(ask(seed)).await, app.complete(ask(seed)).await);
        assert_eq!(texts(&first), texts(&second));
        seen.insert(texts(&first)[0].to_string());
    }
    assert_eq!(seen.len(), 4, "another seed, another text");
    let free = json!({"prompt": PROMPT, "max_tokens": 30});
    assert_ne!(texts(&app.complete(free.clone()).await), texts(&app.complete(free).await), "without a seed");
}

#[tokio::test]
async fn what_leaves_one_token_leaves_the_likeliest() {
    let app = App::new();
    let greedy = app.complete(json!({"prompt": PROMPT, "temperature": 0})).await;
    for (field, value) in [("top_k", json!(1)), ("top_p", json!(1e-6)), ("min_p", json!(1.0))] {
        let answer = app.complete(json!({"prompt": PROMPT, (field): value})).await;
        assert_eq!(texts(&answer), texts(&greedy), "{field}");
    }
    for all in [-1, 0] {
        let ask = |more: Value| json!({"prompt": PROMPT, "seed": 8, "top_k": more});
        let unlimited = app.complete(ask(json!(all))).await;
        assert_eq!(texts(&unlimited), texts(&app.complete(ask(Value::Null)).await), "top_k {all} keeps all");
    }
}

#[tokio::test]
async fn penalties_keep_tokens_from_coming_again() {
    let app = App::new();
    let count = async |penalties: Value| {
        let mut body = json!({"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": true,
                              "logit_bias": {(X.to_string()): 12}});
        body.as_object_mut().unwrap().extend(penalties.as_object().unwrap().clone());
        texts(&app.complete(body).await)[0].matches('x').count()
    };
    assert_eq!(count(json!({})).await, 8, "a bias of 12 alone makes it all x");
    let frequency = count(json!({"frequency_penalty": 2})).await;
    assert!((1..8).contains(&frequency), "each x makes the next less likely: {frequency}");
    let distinct = async |penalty: f64| {
        let body = json!({"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "ignore_eos": true, "logprobs": 0,
                          "repetition_penalty": penalty});
        let answer = app.complete(body).await;
        let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
        tokens.iter().map(|t| t.as_str().unwrap().to_string()).collect::<BTreeSet<_>>().len()
    };
    let (free, penalised) = (distinct(1.0).await, distinct(100.0).await);
    assert!(penalised > free, "{penalised} distinct tokens, {free} without a penalty");
}

#[tokio::test]
async fn every_required_key_is_there() {
    let app = App::new();
    let answer = app.post(COMPLETIONS, &json!({"prompt": PROMPT})).await;
    assert_eq!(answer.header("content-type"), "application/json");
    let answer = answer.expect(200);
    let expected = ["choices", "created", "elastic", "id", "model", "object", "system_fingerprint", "usage"];
    assert_eq!(keys(&answer), expected.into());
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &answer["choices"][0];
    assert_eq!(keys(choice), ["finish_reason", "index", "logprobs", "stop_reason", "text"].into());
    assert_eq!(choice["logprobs"], Value::Null, "there, though there is nothing to say");
    let usage = ["completion_tokens", "prompt_tokens", "prompt_tokens_details", "total_tokens"];
    assert_eq!(keys(&answer["usage"]), usage.into());
    let twice = app.complete(json!({"prompt": PROMPT})).await;
    assert_ne!(answer["id"], twice["id"]);
}
