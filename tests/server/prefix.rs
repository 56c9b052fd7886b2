//! Prompts that begin with what was computed before: what is said is the same bit for bit, and the answer tells how much
//! did not have to be computed.

use super::app::{App, CHAT, COMPLETIONS, Options, cached};
use lonas::engine::EngineOptions;
use serde_json::{Value, json};

const PROMPT: &str = "the end of the list is the beginning of another one";
/// Positions of a block.
const BLOCK: usize = 4;

/// With log probabilities, which differ where a single bit of the context does.
fn ask(model: &str) -> Value {
    json!({"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "logprobs": 3, "ignore_eos": true})
}

fn with(mut body: Value, key: &str, value: impl Into<Value>) -> Value {
    body[key] = value.into();
    body
}

#[tokio::test]
async fn an_answer_does_not_depend_on_what_was_in_the_cache() {
    let app = App::new();
    let whole = (app.encode(PROMPT).len() - 1) / BLOCK * BLOCK;
    assert!(whole >= 2 * BLOCK, "a prompt of several blocks");
    for model in ["tiny-tied:maximal", "tiny-tied:minimal", "tiny-other:maximal", "tiny-other:minimal"] {
        let first = app.complete(ask(model)).await;
        let again = app.complete(ask(model)).await;
        assert_eq!((cached(&first), cached(&again)), (0, whole), "{model}");
        assert_eq!(first["choices"], again["choices"], "{model}");
        // The prompt's own log probabilities are computed anew.
        let echoed = app.complete(with(ask(model), "echo", true)).await;
        assert_eq!(cached(&echoed), 0);
        let of_answer = |answer: &Value, from: usize| {
            answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[from..].to_vec()
        };
        assert_eq!(of_answer(&echoed, app.encode(PROMPT).len()), of_answer(&first, 0), "{model}");
    }
}

#[tokio::test]
async fn a_salt_keeps_requests_apart() {
    let app = App::new();
    let salted = |salt: &str| with(ask("tiny-tied:minimal"), "cache_salt", salt);
    let asked = [ask("tiny-tied:minimal"), salted("mine"), salted("yours"), salted("mine")];
    let mut found = Vec::new();
    for body in asked {
        found.push(cached(&app.complete(body).await) > 0);
    }
    assert_eq!(found, [false, false, false, true]);
}

#[tokio::test]
async fn a_conversation_is_not_computed_again() {
    let app = App::new();
    let mut messages = vec![json!({"role": "user", "content": "one and two"})];
    let turn = |messages: &[Value]| {
        json!({"messages": messages, "temperature": 0, "max_tokens": 9, "stream": true,
                                    "stream_options": {"include_usage": true}})
    };
    let first = app.post(CHAT, &turn(&messages)).await.chunks();
    assert_eq!(cached(first.last().unwrap()), 0);
    let said = first.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    messages.push(json!({"role": "assistant", "content": said.collect::<String>()}));
    messages.push(json!({"role": "user", "content": "go on"}));
    let second = app.post(CHAT, &turn(&messages)).await.chunks();
    // At least what the first turn was asked, but for its last block.
    let asked = first.last().unwrap()["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    let found = cached(second.last().unwrap());
    assert!(found + BLOCK > asked && found > 0, "{found} of {asked}");
}

#[tokio::test]
async fn what_is_found_is_counted_as_its_prompt_is() {
    let app = App::new();
    let model = "tiny-tied:minimal";
    app.complete(ask(model)).await;
    let prompt = app.encode(PROMPT).len();
    let whole = (prompt - 1) / BLOCK * BLOCK;
    let answers = app.complete(with(ask(model), "n", 3)).await;
    assert_eq!(cached(&answers), whole, "once for all answers to a prompt");
    app.until_idle().await;
    let scrape = app.scrape().await;
    let count = |name: &str| scrape.sum(&format!("lonas_prefix_cache_{name}"), &[("subnetwork", model)]);
    // As the engine sees it: each of four sequences.
    assert_eq!(count("queried_tokens_total"), 4.0 * prompt as f64);
    assert_eq!(count("hit_tokens_total"), 3.0 * whole as f64);
    assert_eq!(scrape.sum("lonas_kv_blocks", &[("state", "used")]), 0.0, "what is only kept is free");
}

#[tokio::test]
async fn it_can_be_left_out() {
    let engine = EngineOptions { prefix_cache: false, ..Options::default().engine };
    let app = App::with(Options { engine, ..Options::default() });
    for _ in 0..2 {
        let answer = app.post(COMPLETIONS, &ask("tiny-tied:maximal")).await.expect(200);
        assert_eq!(cached(&answer), 0);
    }
}
