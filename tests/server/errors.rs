//! What a client may do wrong: always a 4xx of OpenAI's shape that names the field, never a 5xx.

use super::app::{Answer, App, CHAT, COMPLETIONS, Options};
use super::held::Then;
use crate::tiny::{CONTEXT, VOCABULARY};
use axum::body::Body;
use axum::http::Request;
use lonas::engine::EngineOptions;
use serde_json::{Value, json};

/// Each of these fields with each of these values must be a 400 that names the field.
pub(super) async fn refused(app: &App, path: &str, valid: &Value, cases: &[(&str, Vec<Value>)]) {
    for (field, values) in cases {
        for value in values {
            let mut body = valid.clone();
            body[field] = value.clone();
            let answer = app.post(path, &body).await;
            assert_eq!(answer.status, 400, "{field}: {value}: {}", answer.body);
            let error = answer.error();
            let named = error["param"].as_str().unwrap_or_default();
            let begins =
                named.strip_prefix(field).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
            assert!(begins, "{field}: {value}: {error}");
            assert!(error["message"].as_str().unwrap().contains(field), "{field}: {value}: {error}");
        }
    }
}

/// What both endpoints refuse.
fn shared_cases() -> Vec<(&'static str, Vec<Value>)> {
    let many_biases = (0..1025).map(|id| (id.to_string(), json!(0))).collect::<serde_json::Map<_, _>>();
    vec![
        ("model", vec![json!(1), json!(["tiny-tied"]), json!({})]),
        ("max_tokens", vec![json!(-1), json!(CONTEXT + 1), json!("5"), json!(1.5), json!(1e300), json!([1])]),
        ("cache_salt", vec![json!(""), json!("s".repeat(257)), json!(5)]),
        ("min_tokens", vec![json!(-1), json!(CONTEXT + 1), json!(true)]),
        ("temperature", vec![json!(-0.1), json!(2.1), json!("hot"), json!([0.5])]),
        ("top_p", vec![json!(0), json!(-0.5), json!(1.1), json!(1e-60)]),
        ("top_k", vec![json!(-2), json!(5e9), json!("all")]),
        ("min_p", vec![json!(-0.1), json!(1.1)]),
        ("frequency_penalty", vec![json!(-2.1), json!(2.1), json!({})]),
        ("presence_penalty", vec![json!(-2.1), json!(2.1)]),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(101)]),
        (
            "logit_bias",
            vec![
                json!({"x": 1}),
                json!({(VOCABULARY.to_string()): 1}),
                json!({"-1": 1}),
                json!({"5": 101}),
                json!({"5": -101}),
                json!({"5": "1"}),
                json!([1]),
                many_biases.into(),
            ],
        ),
        ("seed", vec![json!(1.5), json!("1"), json!(1e30)]),
        ("n", vec![json!(0), json!(-1), json!(17), json!("2")]),
        (
            "stop",
            vec![
                json!(""),
                json!(["a", ""]),
                json!(vec!["a"; 17]),
                json!("a".repeat(257)),
                json!(5),
                json!([5]),
            ],
        ),
        (
            "stop_token_ids",
            vec![json!([VOCABULARY]), json!([-1]), json!(vec![5; 129]), json!(5), json!(["5"])],
        ),
        ("ignore_eos", vec![json!(1), json!("true")]),
        ("stream", vec![json!(1), json!("true")]),
        ("stream_options", vec![json!({"include_usage": true}), json!(true), json!("usage")]),
        (
            "elastic",
            vec![
                json!("minimal"),
                json!({"sub_network": "minimal"}),
                json!({"min_accuracy": 0}),
                json!({"min_accuracy": 1.1}),
                json!({"max_tpot_ms": -1}),
                json!({"max_ttft_ms": 1e10}),
                json!({"max_ttft_ms": "5"}),
            ],
        ),
    ]
}

/// What both endpoints cannot do yet, and must not seem to do.
fn unsupported_cases() -> Vec<(&'static str, Vec<Value>)> {
    vec![
        ("truncate_prompt_tokens", vec![json!(5)]),
        ("allowed_token_ids", vec![json!([5])]),
        ("bad_words", vec![json!(["one"])]),
        ("include_stop_str_in_output", vec![json!(true)]),
        ("structured_outputs", vec![json!({"regex": "a*"})]),
        ("use_beam_search", vec![json!(true)]),
        ("skip_special_tokens", vec![json!(false), json!("no")]),
        ("prompt_logprobs", vec![json!(3)]),
        ("guided_json", vec![json!({"type": "object"})]),
        ("guided_regex", vec![json!("a*")]),
        ("guided_choice", vec![json!(["yes", "no"])]),
        ("guided_grammar", vec![json!("root ::= \"a\"")]),
        ("json_schema", vec![json!({"type": "object"})]),
        ("grammar", vec![json!("root ::= \"a\"")]),
        ("response_format", vec![json!({"type": "json_object"}), json!("text")]),
    ]
}

#[tokio::test]
async fn every_parameter_of_a_completion_has_a_range() {
    let app = App::new();
    let valid = json!({"prompt": "one"});
    refused(&app, COMPLETIONS, &valid, &shared_cases()).await;
    refused(&app, COMPLETIONS, &valid, &unsupported_cases()).await;
    let too_many = json!(vec!["one"; 129]);
    let own = [
        (
            "prompt",
            vec![
                json!(null),
                json!([]),
                json!([[]]),
                json!([[1], []]),
                json!(5),
                json!(true),
                json!({}),
                json!([-1]),
                json!([1.5]),
                json!([5_000_000_000_u64]),
                json!([1, "one"]),
                json!(["one", 1]),
                json!([[1], "one"]),
                json!([null]),
                json!([VOCABULARY]),
                json!([[1], [VOCABULARY]]),
                too_many,
            ],
        ),
        ("logprobs", vec![json!(-1), json!(21), json!(true)]),
        ("echo", vec![json!("yes"), json!(1)]),
        ("best_of", vec![json!(2), json!(0)]),
        ("suffix", vec![json!("end")]),
        ("add_special_tokens", vec![json!(1)]),
    ];
    refused(&app, COMPLETIONS, &valid, &own).await;
    assert_eq!(app.scrape().await.accepted(), 0.0, "the engine has seen nothing of all this");
}

#[tokio::test]
async fn every_parameter_of_a_chat_has_a_range() {
    let app = App::new();
    let valid = json!({"messages": [{"role": "user", "content": "one"}]});
    refused(&app, CHAT, &valid, &shared_cases()).await;
    refused(&app, CHAT, &valid, &unsupported_cases()).await;
    let image = json!({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}});
    let own = [
        (
            "messages",
            vec![
                json!(null),
                json!([]),
                json!("one"),
                json!([123]),
                json!([null]),
                json!([{}]),
                json!([{"role": 5, "content": "one"}]),
                json!([{"role": "tool", "content": "one"}]),
                json!([{"role": "user"}]),
                json!([{"role": "user", "content": 5}]),
                json!([{"role": "user", "content": [image]}]),
                json!([{"role": "user", "content": [{"type": "text"}]}]),
            ],
        ),
        ("max_completion_tokens", vec![json!(0), json!(-1), json!(CONTEXT + 1)]),
        ("max_tokens", vec![json!(0)]),
        ("logprobs", vec![json!(5), json!("true")]),
        ("top_logprobs", vec![json!(5), json!(-1), json!(21)]),
        ("tools", vec![json!([{"type": "function"}])]),
        ("functions", vec![json!([{}])]),
        ("modalities", vec![json!(["audio"])]),
        ("audio", vec![json!({"voice": "a"})]),
        ("chat_template", vec![json!("{{ messages }}")]),
        ("function_call", vec![json!({"name": "f"})]),
        ("continue_final_message", vec![json!(true)]),
        ("add_generation_prompt", vec![json!("no")]),
    ];
    refused(&app, CHAT, &valid, &own).await;
    assert_eq!(app.scrape().await.accepted(), 0.0);
}

#[tokio::test]
async fn hints_that_change_nothing_are_taken() {
    let app = App::new();
    let body = json!({"prompt": "one", "user": "me", "stop": null, "logit_bias": null, "stream_options": null,
                      "best_of": 1, "suffix": null, "truncate_prompt_tokens": null, "bad_words": [],
                      "include_stop_str_in_output": false, "structured_outputs": {}, "metadata": {"a": "b"}, "something_new": [1]});
    app.complete(body).await;
    let body = json!({"messages": [{"role": "user", "content": "one", "name": "me"}], "tools": [],
                      "tool_choice": "none", "response_format": {"type": "text"}, "store": false,
                      "modalities": ["text"], "parallel_tool_calls": true});
    app.chat(body).await;
}

#[tokio::test]
async fn required_fields_are_named_where_they_are_missing() {
    let app = App::new();
    for (path, field) in [(COMPLETIONS, "prompt"), (CHAT, "messages")] {
        let answer = app.post(path, &json!({"max_tokens": 1})).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(field)));
    }
}

#[tokio::test]
async fn a_prompt_without_tokens_is_refused() {
    let app = App::new();
    let answer = app.post(COMPLETIONS, &json!({"prompt": "", "add_special_tokens": false})).await;
    assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("prompt")));
    let with_beginning = app.complete(json!({"prompt": ""})).await;
    assert_eq!(with_beginning["usage"]["prompt_tokens"], 1, "<s> alone");
}

#[tokio::test]
async fn what_does_not_fit_the_context_is_refused_and_never_cut() {
    let app = App::new();
    let chat = |words: usize| json!([{"role": "user", "content": "one ".repeat(words)}]);
    let cases = [
        (COMPLETIONS, json!({"prompt": vec![5; CONTEXT + 1]}), "prompt"),
        (COMPLETIONS, json!({"prompt": vec![5; CONTEXT + 1], "max_tokens": 0}), "prompt"),
        (COMPLETIONS, json!({"prompt": vec![5; CONTEXT]}), "prompt"),
        (COMPLETIONS, json!({"prompt": "one ".repeat(100)}), "prompt"),
        (COMPLETIONS, json!({"prompt": vec![5; 100], "max_tokens": CONTEXT - 99}), "max_tokens"),
        (COMPLETIONS, json!({"prompt": [vec![5; 1], vec![5; CONTEXT + 1]]}), "prompt"),
        (CHAT, json!({"messages": chat(100)}), "messages"),
        (CHAT, json!({"messages": chat(10), "max_tokens": CONTEXT}), "max_tokens"),
        (CHAT, json!({"messages": chat(10), "max_completion_tokens": CONTEXT}), "max_completion_tokens"),
    ];
    for (path, body, param) in &cases {
        let answer = app.post(path, body).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
        let error = answer.error();
        assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!(param)));
    }
    let scrape = app.scrape().await;
    assert_eq!(scrape.sum("lonas_rejected_total", &[("reason", "too_long")]), cases.len() as f64);
    let full = app.complete(json!({"prompt": vec![5; CONTEXT], "max_tokens": 0})).await;
    assert_eq!(full["usage"]["total_tokens"], CONTEXT, "exactly full is fine");
    app.complete(json!({"prompt": vec![5; 100], "max_tokens": CONTEXT - 100})).await;
}

#[tokio::test]
async fn what_is_no_json_object_is_a_400() {
    let app = App::new();
    let bodies = [
        "",
        "{",
        "{\"prompt\": \"one\"",
        "nonsense",
        "null",
        "5",
        "\"prompt\"",
        "[]",
        "[1, 2]",
        "{\"prompt\": \"one\"} {}",
        "{\"prompt\": \"\\ud800\"}",
        "{'prompt': 'one'}",
        "{\"prompt\": \"one\", \"prompt\": \"two\"}",
        "{\"prompt\": NaN}",
    ];
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let deep = format!("{{\"prompt\": {deep}, \"messages\": {deep}}}");
    for path in [COMPLETIONS, CHAT] {
        for body in bodies.iter().map(ToString::to_string).chain([deep.clone()]) {
            let answer = app.post_text(path, body.clone()).await;
            assert_eq!(answer.status, 400, "{body}: {}", answer.body);
            answer.error();
        }
        let answer = app.post_text(path, b"{\"prompt\": \"\xFF\"}".to_vec()).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
    }
}

#[tokio::test]
async fn http_has_its_own_ways_to_be_wrong() {
    let app = App::new();
    let large = json!({"prompt": "x".repeat(2 << 20)}).to_string();
    let code = |answer: &Answer| answer.error()["code"].as_str().unwrap().to_string();
    for path in [COMPLETIONS, CHAT] {
        let answer = app.post_text(path, large.clone()).await;
        assert_eq!((answer.status, code(&answer)), (413, "request_too_large".into()));

        let text = Request::post(path).header("content-type", "text/plain").body(Body::from("{}")).unwrap();
        let answer = app.send(text).await;
        assert_eq!((answer.status, code(&answer)), (415, "unsupported_media_type".into()));

        let answer = app.get(path).await;
        assert_eq!((answer.status, code(&answer)), (405, "method_not_allowed".into()));
        assert_eq!(answer.header("allow"), "POST");
    }
    for path in ["/v1/models/%ff", "/v1/subnetworks/%ff"] {
        let answer = app.get(path).await;
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("id")), "{path}");
    }
    for path in ["/", "/v1", "/v1/completion", "/v1/completions/", "/v2/completions", "/metrics/x"] {
        let answer = app.get(path).await;
        assert_eq!((answer.status, code(&answer)), (404, "not_found".into()), "{path}");
    }
    let answer = app.post(&format!("{COMPLETIONS}?stream=true"), &json!({"prompt": "one"})).await;
    assert_eq!(answer.expect(200)["object"], "text_completion", "a query changes nothing");
}

#[tokio::test]
async fn a_full_server_says_at_once_when_to_come_again() {
    let app = App::with(Options {
        engine: EngineOptions { max_running: 2, max_waiting: 1, step_tokens: 64, prefix_cache: true },
        ..Options::default()
    });
    app.gate.after(0, Then::Wait);
    let body = json!({"prompt": "one", "max_tokens": 3, "ignore_eos": true});
    let running = [0; 3].map(|_| app.start(COMPLETIONS, &body));
    app.until("two run and one waits", |s| s.accepted() == 3.0).await;
    for path in [COMPLETIONS, CHAT] {
        let mut body = body.clone();
        body["messages"] = json!([{"role": "user", "content": "one"}]);
        let answer = app.post(path, &body).await;
        assert_eq!(answer.status, 503, "{}", answer.body);
        assert_eq!(answer.header("retry-after"), "1");
        assert_eq!(answer.error()["code"], "queue_full");
    }
    let more = json!({"prompt": "one", "n": 4});
    let answer = app.post(COMPLETIONS, &more).await;
    assert_eq!(answer.status, 400, "more than the server ever holds: {}", answer.body);
    app.gate.open();
    for answer in running {
        assert_eq!(answer.await.unwrap().expect(200)["usage"]["completion_tokens"], 3);
    }
    let scrape = app.scrape().await;
    assert_eq!(scrape.sum("lonas_rejected_total", &[("reason", "queue_full")]), 2.0);
    assert_eq!((scrape.ended("rejected"), scrape.ended("length")), (2.0, 3.0));
    let all = app.complete(json!({"prompt": "one", "n": 3, "max_tokens": 2})).await;
    assert_eq!(all["choices"].as_array().unwrap().len(), 3, "what fits at all is taken when there is room");
}

#[tokio::test]
async fn only_a_key_opens_a_guarded_server() {
    let app = App::with(Options { api_keys: vec!["one-key".into(), "Another".into()], ..Options::default() });
    let ask = |path: &str, key: Option<&str>| {
        let request = Request::get(path);
        let request = match key {
            Some(key) => request.header("authorization", key),
            None => request,
        };
        app.send(request.body(Body::empty()).unwrap())
    };
    let routes =
        ["/v1/models", "/v1/models/tiny-tied", "/metrics", "/version", "/tokenizer_info", "/no/such/path"];
    let wrong = [
        None,
        Some("Bearer"),
        Some("Bearer "),
        Some("Bearer one-ke"),
        Some("Bearer one-key2"),
        Some("Bearer ANOTHER"),
        Some("Basic one-key"),
        Some("one-key"),
    ];
    let mut refused = 0.0;
    for path in routes {
        for key in wrong {
            let answer = ask(path, key).await;
            assert_eq!(answer.status, 401, "{path} with {key:?}");
            assert_eq!(answer.error()["code"], "invalid_api_key");
            assert_eq!(answer.header("www-authenticate"), "Bearer");
            refused += 1.0;
        }
        let expected = if path == "/no/such/path" { 404 } else { 200 };
        for key in ["Bearer one-key", "bearer Another"] {
            assert_eq!(ask(path, Some(key)).await.status, expected, "{path} with {key}");
        }
    }
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        assert_eq!(app.post_text(path, "nonsense").await.status, 401, "{path} before the body is looked at");
        refused += 1.0;
    }
    assert_eq!(app.get("/health").await.status, 200, "whoever watches the server needs no key");
    let scrape = super::scrape::Scrape(ask("/metrics", Some("Bearer one-key")).await.body);
    assert_eq!(scrape.sum("lonas_rejected_total", &[("reason", "auth")]), refused);
}
