//! Streamed answers: server-sent events that say, joined, what the plain answer says.

use super::app::{App, CHAT, COMPLETIONS, tokens};
use super::held::Then;
use crate::tiny::X;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

/// The choice of this index, put together from its chunks: lists and texts joined, the last of everything else.
fn joined(chunks: &[Value], index: usize) -> Value {
    let mut all = Map::new();
    let of_index =
        chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == index);
    for choice in of_index {
        for (key, value) in choice.as_object().unwrap() {
            join(all.entry(key).or_insert(Value::Null), value);
        }
    }
    Value::Object(all)
}

fn join(all: &mut Value, more: &Value) {
    match (all, more) {
        (_, Value::Null) => {}
        (Value::String(all), Value::String(more)) => *all += more,
        (Value::Array(all), Value::Array(more)) => all.extend(more.clone()),
        (Value::Object(all), Value::Object(more)) => {
            for (key, value) in more {
                join(all.entry(key).or_insert(Value::Null), value);
            }
        }
        (all, more) => *all = more.clone(),
    }
}

/// What must be equal of a plain and a joined choice. `role` and the like come once, so joining does not change them.
fn essence(choice: &Value) -> [Value; 4] {
    let text = choice.get("text").or(choice.pointer("/message/content")).or(choice.pointer("/delta/content"));
    let text = text.cloned().unwrap_or_default();
    // A stream without any content has no chunk to say that its list is empty.
    let empty = choice.pointer("/logprobs/content") == Some(&json!([]));
    let logprobs = if empty { Value::Null } else { choice["logprobs"].clone() };
    [text, logprobs, choice["finish_reason"].clone(), choice["stop_reason"].clone()]
}

fn merged(body: &Value, more: &Value) -> Value {
    let mut body = body.clone();
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Asks plainly and as a stream; both must say the same.
async fn check(app: &App, path: &str, body: &Value) {
    let plain = app.post(path, body).await.expect(200);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = app.post(path, &merged(body, &options)).await.chunks();
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!(tokens(&usage["usage"]), tokens(&plain["usage"]), "{body}");
    for (index, choice) in plain["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(essence(&joined(chunks, index)), essence(choice), "{body}");
    }
}

/// Requests whose answers are full of characters that are split over several tokens, and of stop strings.
fn requests() -> impl Strategy<Value = (bool, Value)> {
    let stops = prop::collection::vec("[é€😀a-f]{1,3}", 0..4);
    let numbers = (any::<i64>(), 0usize..60, 1usize..4, -10.0..15.0f64, 0usize..20);
    (any::<bool>(), stops, numbers, any::<[bool; 3]>()).prop_map(|(chat, stop, numbers, flags)| {
        let (seed, max_tokens, n, bias, min_tokens) = numbers;
        // Tokens 67 to 76 are the bytes of é, €, 😀 and two more.
        let bias = (67..77).map(|t| (t.to_string(), json!(bias))).collect::<Map<_, _>>();
        let mut body = json!({"seed": seed, "max_tokens": max_tokens.max(1), "n": n, "stop": stop, "logit_bias": bias,
                              "min_tokens": min_tokens.min(max_tokens), "ignore_eos": flags[0]});
        match (chat, flags[1]) {
            (true, logprobs) => {
                body["messages"] = json!([{"role": "user", "content": "the list"}]);
                body["logprobs"] = logprobs.into();
            }
            (false, logprobs) => {
                body["prompt"] = "the é".into();
                body["echo"] = flags[2].into();
                body["logprobs"] = if logprobs { json!(1) } else { Value::Null };
            }
        }
        (chat, body)
    })
}

#[test]
fn a_stream_joined_is_the_plain_answer() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let app = App::new();
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(80) });
    let checked = runner.run(&requests(), |(chat, body)| {
        runtime.block_on(check(&app, if chat { CHAT } else { COMPLETIONS }, &body));
        Ok(())
    });
    checked.unwrap();
}

#[tokio::test]
async fn a_character_of_several_tokens_comes_whole() {
    let app = App::new();
    let token = |byte: u8| (0..97).find(|&t| app.tokenizer.token_bytes(t) == [byte]).unwrap();
    // Only é's first byte may follow é's last one, so greedy and a penalty for what has come make é after é.
    let bias = json!({(token(0xC3).to_string()): 60, (token(0xA9).to_string()): 60});
    let body = json!({"prompt": "an é", "echo": true, "max_tokens": 9, "temperature": 0, "stream": true,
                      "frequency_penalty": 2, "presence_penalty": 2, "logit_bias": bias});
    let chunks = app.post(COMPLETIONS, &body).await.chunks();
    let texts = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(texts[0], "an é", "the echo is the first chunk");
    let whole = texts[1..].iter().filter(|t| **t == "é").count();
    assert!(whole >= 2, "{texts:?}");
}

#[tokio::test]
async fn a_chat_stream_begins_with_the_role_alone_and_ends_with_the_reason_alone() {
    let app = App::new();
    let body = json!({"messages": [{"role": "user", "content": "one"}], "max_tokens": 8, "n": 2, "stream": true,
                      "ignore_eos": true});
    let chunks = app.post(CHAT, &body).await.chunks();
    for index in [0, 1] {
        let own = chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == index).collect::<Vec<_>>();
        assert_eq!(own[0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(own[0]["finish_reason"], Value::Null);
        let (last, between) = own[1..].split_last().unwrap();
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
        for chunk in between {
            assert_eq!(chunk["delta"].as_object().unwrap().keys().collect::<Vec<_>>(), ["content"]);
            assert_eq!(chunk["finish_reason"], Value::Null);
        }
    }
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"], "one id for the whole stream");
        assert!(chunk["choices"][0].as_object().unwrap().contains_key("logprobs"));
        assert!(chunk.get("usage").is_none(), "nobody asked for it");
    }
}

#[tokio::test]
async fn only_the_last_chunk_of_a_completion_has_a_reason() {
    let app = App::new();
    let body =
        json!({"prompt": "one", "max_tokens": 8, "stream": true, "logit_bias": {(X.to_string()): 100}});
    let chunks = app.post(COMPLETIONS, &body).await.chunks();
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert!(others.len() >= 7, "tokens come one by one");
    for chunk in others {
        assert_eq!(chunk["object"], "text_completion");
        assert_eq!(chunk["choices"][0]["finish_reason"], Value::Null);
    }
    assert_eq!(chunks[0]["elastic"]["served"], "maximal", "the first chunk says what is served");
}

#[tokio::test]
async fn usage_comes_on_request_in_a_last_chunk_without_choices() {
    let app = App::new();
    let chat = json!({"messages": [{"role": "user", "content": "one"}], "max_tokens": 5, "ignore_eos": true});
    let completion = json!({"prompt": "one", "max_tokens": 5, "ignore_eos": true});
    for (path, body) in [(CHAT, chat), (COMPLETIONS, completion)] {
        let plain = app.post(path, &body).await.expect(200);
        let ask = |options: Value| merged(&body, &json!({"stream": true, "stream_options": options}));

        let chunks = app.post(path, &ask(json!({"include_usage": true}))).await.chunks();
        let (last, others) = chunks.split_last().unwrap();
        assert_eq!((&last["choices"], tokens(&last["usage"])), (&json!([]), tokens(&plain["usage"])));
        assert!(others.iter().all(|c| c["usage"] == Value::Null && c.get("usage").is_some()), "{others:?}");

        let continuous = json!({"include_usage": true, "continuous_usage_stats": true});
        let chunks = app.post(path, &ask(continuous)).await.chunks();
        let counts = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap());
        let counts = counts.collect::<Vec<_>>();
        assert!(counts.is_sorted(), "{counts:?}");
        assert_eq!(counts.last(), Some(&5));

        let without = app.post(path, &ask(json!({"include_usage": false}))).await.chunks();
        assert!(without.iter().all(|c| c.get("usage").is_none() && c["choices"] != json!([])));
    }
}

#[tokio::test]
async fn no_proxy_keeps_a_stream_back() {
    let app = App::new();
    let body = json!({"prompt": "one", "stream": true});
    let answer = app.post(COMPLETIONS, &body).await;
    assert_eq!(answer.header("content-type"), "text/event-stream");
    assert_eq!(answer.header("cache-control"), "no-cache");
    assert_eq!(answer.header("x-accel-buffering"), "no");
    assert_eq!(answer.header("x-subnetwork"), "maximal");
}

#[tokio::test]
async fn an_error_within_a_stream_is_an_event_in_front_of_the_end() {
    let app = App::new();
    let bias = json!({(X.to_string()): 100});
    let chat = json!({"messages": [{"role": "user", "content": "one"}], "stream": true, "logit_bias": bias});
    let completion = json!({"prompt": "one", "max_tokens": 50, "stream": true, "logit_bias": bias});
    for then in [Then::Fail, Then::Panic] {
        for (path, body) in [(CHAT, &chat), (COMPLETIONS, &completion)] {
            app.gate.after(4, then);
            let answer = app.post(path, body).await;
            let chunks = answer.chunks();
            let (error, others) = chunks.split_last().unwrap();
            assert_eq!(error["error"]["type"], "server_error", "{error}");
            assert_eq!(error["error"]["code"], "internal_error");
            assert!(error["error"].as_object().unwrap().contains_key("param"));
            assert!(others.len() >= 4, "what came before the error was given out");
            assert!(!answer.body.contains("secret"), "the reason stands in the log: {}", answer.body);
        }
    }
    app.gate.open();
    app.until_idle().await;
    assert_eq!(app.post(COMPLETIONS, &completion).await.chunks().last().unwrap()["error"], Value::Null);
    let scrape = app.scrape().await;
    assert_eq!((scrape.ended("error"), scrape.ended("length")), (4.0, 1.0));
}

#[tokio::test]
async fn a_plain_answer_that_fails_is_a_500_that_says_not_to_try_again() {
    let app = App::new();
    app.gate.after(2, Then::Fail);
    let answer = app.post(COMPLETIONS, &json!({"prompt": "one", "ignore_eos": true})).await;
    let error = answer.expect(500);
    assert_eq!(error["error"]["type"], "server_error");
    assert_eq!(answer.header("x-should-retry"), "false");
    assert!(!answer.body.contains("secret"));
}
