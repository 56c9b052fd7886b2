//! `POST /v1/classify` over a stand-in whose outputs tell apart every text, pair and sub-network.

use super::app::{App, CHAT, CLASSIFY, COMPLETIONS, Options};
use super::errors::refused;
use super::held::{Then, says};
use super::lifecycle::{Served, read};
use crate::tiny::{BOS, CONTEXT, EOS, VOCABULARY};
use axum::body::Body;
use axum::http::Request;
use lonas::engine::EngineOptions;
use lonas::server::{Drained, OutputKind, ServedModel};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

fn options() -> Options {
    Options { classify: true, ..Options::default() }
}

fn app() -> App {
    App::with(options())
}

/// What the stand-in says of token ids as one text. Sub-networks are numbered in the catalog's order, maximal first.
fn outputs(tokens: &[u32], adapter: usize, subnetwork: u32) -> Vec<f32> {
    says(&tokens.iter().map(|&token| (token, 0)).collect::<Vec<_>>(), adapter, subnetwork)
}

/// `probs` by input.
fn probs(answer: &Value) -> Vec<Vec<f32>> {
    let inputs = answer["data"].as_array().unwrap().iter();
    inputs.map(|one| serde_json::from_value(one["probs"].clone()).unwrap()).collect()
}

/// The outputs themselves of one input.
async fn raw(app: &App, input: Value) -> Vec<f32> {
    let answer = app.classify(json!({"input": input, "use_activation": false})).await;
    probs(&answer).remove(0)
}

#[tokio::test]
async fn the_answer_has_vllms_shape_and_says_what_was_served() {
    let app = app();
    for path in [CLASSIFY, "/classify"] {
        let answer = app.post(path, &json!({"model": "tiny-tied:minimal", "input": "the end"})).await;
        assert_eq!(answer.header("x-subnetwork"), "minimal");
        assert_eq!(answer.header("content-type"), "application/json");
        let body = answer.expect(200);
        let keys = body.as_object().unwrap().keys().collect::<Vec<_>>();
        assert_eq!(keys, ["id", "object", "created", "model", "data", "usage", "elastic"]);
        assert!(body["id"].as_str().unwrap().starts_with("classify-"));
        assert_eq!((&body["object"], &body["model"]), (&json!("list"), &json!("tiny-tied:minimal")));
        let tokens = app.encode("the end").len();
        assert_eq!(
            body["usage"],
            json!({"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens})
        );
        assert_eq!(body["elastic"], json!({"requested": "minimal", "served": "minimal", "reason": "model"}));
        let one = body["data"][0].as_object().unwrap();
        assert_eq!(one.keys().collect::<Vec<_>>(), ["index", "label", "probs", "num_classes"]);
        assert_eq!((&one["index"], &one["num_classes"]), (&json!(0), &json!(3)));
        let probs = &probs(&body)[0];
        assert!((probs.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{probs:?}");
        let best = (0..3).rev().max_by(|&a, &b| probs[a].total_cmp(&probs[b])).unwrap();
        assert_eq!(one["label"], ["no", "maybe", "yes"][best]);
    }
}

#[tokio::test]
async fn an_input_may_be_text_tokens_or_a_pair_alone_or_among_others() {
    let app = app();
    let (one, two) = (app.encode("one"), app.encode("two, too"));
    let bare = |text: &str| app.tokenizer.encode(text, false).unwrap();
    let typed = |tokens: &[u32], kind: u32| tokens.iter().map(|&t| (t, kind)).collect::<Vec<_>>();
    let pair = [typed(&one, 0), typed(&[EOS], 0), typed(&bare("two, too"), 1)].concat();
    let (first, second, joined) = (outputs(&one, 0, 0), outputs(&two, 0, 0), says(&pair, 0, 0));
    let pair_of = |a: &str, b: &str| json!({"text": a, "text_pair": b});
    let cases = [
        (json!("one"), vec![&first]),
        (json!(["one"]), vec![&first]),
        (json!(one), vec![&first]),
        (json!([one]), vec![&first]),
        (json!(["one", "two, too", "one"]), vec![&first, &second, &first]),
        (json!([two, one]), vec![&second, &first]),
        (pair_of("one", "two, too"), vec![&joined]),
        (json!([pair_of("one", "two, too")]), vec![&joined]),
        (json!({"text": "one"}), vec![&first]),
        (
            json!([{"text": "one", "text_pair": null}, "two, too", one, pair_of("one", "two, too")]),
            vec![&first, &second, &first, &joined],
        ),
    ];
    for (input, expected) in cases {
        let answer = app.classify(json!({"input": input, "use_activation": false})).await;
        assert_eq!(probs(&answer).iter().collect::<Vec<_>>(), expected, "{input}");
        let indices = answer["data"].as_array().unwrap().iter().map(|one| one["index"].as_u64().unwrap());
        assert!(indices.eq(0..expected.len() as u64));
    }
    assert_ne!(joined, raw(&app, pair_of("two, too", "one")).await);
    let usage = app.classify(json!({"input": ["one", pair_of("one", "two, too")]})).await["usage"].clone();
    assert_eq!(usage["prompt_tokens"], one.len() + pair.len());
    let bare = app.classify(json!({"input": "one", "add_special_tokens": false, "softmax": false})).await;
    assert_eq!(probs(&bare), [outputs(&one[1..], 0, 0)]);
}

#[tokio::test]
async fn outputs_become_what_the_task_makes_of_them() {
    let independent = |models: &mut [ServedModel]| {
        let mut classes = models[0].classes.as_deref().unwrap().clone();
        classes.kind = OutputKind::Independent;
        models[0].classes = Some(Arc::new(classes));
    };
    let (exclusive, independent) = (app(), App::with(Options { models: independent, ..options() }));
    let outputs = raw(&exclusive, json!("one")).await;
    let powers = outputs.iter().map(|&x| f64::from(x).exp()).collect::<Vec<_>>();
    let softmax = powers.iter().map(|power| power / powers.iter().sum::<f64>());
    let sigmoid = outputs.iter().map(|&x| 1.0 / (1.0 + f64::from(-x).exp()));
    let close = |got: &Value, expected: Vec<f64>| {
        let got = probs(got).remove(0);
        assert!(
            got.iter().zip(&expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6),
            "{got:?} {expected:?}"
        );
    };
    close(&exclusive.classify(json!({"input": "one"})).await, softmax.collect());
    close(&independent.classify(json!({"input": "one", "activation": true})).await, sigmoid.collect());
    for flag in ["use_activation", "activation", "softmax"] {
        let plain = independent.classify(json!({"input": "one", flag: false})).await;
        assert_eq!(probs(&plain)[0], outputs, "{flag}");
    }
    let number = exclusive.classify(json!({"model": "tiny-other", "input": "one"})).await;
    assert_eq!(probs(&number), [super::classify::outputs(&exclusive.encode("one"), 1, 3)]);
    assert_eq!(
        (&number["data"][0]["label"], &number["data"][0]["num_classes"]),
        (&json!("score"), &json!(1))
    );
}

#[tokio::test]
async fn each_request_picks_its_sub_network() {
    let scored = |models: &mut [ServedModel]| {
        for (sub_network, score) in models[0].sub_networks.iter_mut().zip([0.9, 0.8, 0.7]) {
            Arc::make_mut(sub_network).entry.scores = [("task".to_string(), score)].into();
        }
    };
    let app = App::with(Options { models: scored, ..options() });
    let tokens = app.encode("one");
    let cases = [
        (json!({}), "maximal", "default"),
        (json!({"model": "tiny-tied:heuristic"}), "heuristic", "model"),
        (json!({"elastic": {"subnetwork": "minimal"}}), "minimal", "elastic"),
        (json!({"elastic": {"min_accuracy": 0.75}}), "heuristic", "accuracy"),
    ];
    for (fields, served, reason) in cases {
        let mut body = json!({"input": "one", "use_activation": false});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = app.post(CLASSIFY, &body).await;
        assert_eq!(answer.header("x-subnetwork"), served);
        let answer = answer.expect(200);
        assert_eq!(
            (&answer["elastic"]["served"], &answer["elastic"]["reason"]),
            (&json!(served), &json!(reason))
        );
        let id = ["maximal", "heuristic", "minimal"].iter().position(|&name| name == served).unwrap();
        assert_eq!(probs(&answer), [outputs(&tokens, 0, id as u32)]);
    }
    let wrong = [
        (json!({"model": "nobody"}), 404, "model"),
        (json!({"model": "tiny-tied:huge"}), 404, "model"),
        (json!({"elastic": {"subnetwork": "huge"}}), 404, "elastic.subnetwork"),
        (json!({"model": "tiny-tied:minimal", "elastic": {"subnetwork": "maximal"}}), 400, "elastic"),
        (json!({"elastic": {"min_accuracy": 0.99}}), 400, "elastic.min_accuracy"),
        (json!({"elastic": {"max_ttft_ms": 5}}), 400, "elastic.max_ttft_ms"),
        (json!({"elastic": {"max_tpot_ms": 5}}), 400, "elastic.max_tpot_ms"),
    ];
    for (fields, status, param) in wrong {
        let mut body = json!({"input": "one"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = app.post(CLASSIFY, &body).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert_eq!(answer.error()["param"], param, "{body}");
    }
}

#[tokio::test]
async fn what_is_too_long_is_named_or_cut_as_the_request_says() {
    let app = app();
    let long = "a".repeat(CONTEXT + 5);
    let all = app.encode(&long);
    assert!(all.len() > CONTEXT);
    for (input, name) in [
        (json!(["one", long]), "input[1]"),
        (json!(long), "input"),
        (json!([["one"], 5]), "input"),
        (json!([all]), "input[0]"),
        (json!({"text": "one", "text_pair": long}), "input"),
    ] {
        let answer = app.post(CLASSIFY, &json!({"input": input})).await;
        assert_eq!(answer.status, 400);
        let error = answer.error();
        assert!(error["param"].as_str().unwrap().starts_with(name), "{error}");
    }
    let error = app.post(CLASSIFY, &json!({"input": ["one", long]})).await.error();
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(error["message"].as_str().unwrap().contains("input[1]"), "{error}");
    let cut = |fields: Value| {
        let mut body = json!({"input": ["abcdef", long], "use_activation": false});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let letters = app.tokenizer.encode("abcdef", false).unwrap();
    let with_start = |tokens: &[u32]| [&[BOS], tokens].concat();
    let fits = probs(&app.classify(cut(json!({"truncate_prompt_tokens": -1}))).await);
    assert_eq!(fits, [outputs(&with_start(&letters), 0, 0), outputs(&all[..CONTEXT], 0, 0)]);
    let right = app.classify(cut(json!({"truncate_prompt_tokens": 4}))).await;
    assert_eq!(
        probs(&right)[0],
        outputs(&with_start(&letters[..3]), 0, 0),
        "the beginning and its own token"
    );
    assert_eq!(right["usage"]["prompt_tokens"], 8);
    let left = app.classify(cut(json!({"truncate_prompt_tokens": 4, "truncation_side": "left"}))).await;
    assert_eq!(probs(&left)[0], outputs(&with_start(&letters[letters.len() - 3..]), 0, 0));
    let ids = json!({"input": [5, 6, 7, 8], "truncate_prompt_tokens": 2, "use_activation": false});
    assert_eq!(probs(&app.classify(ids.clone()).await), [outputs(&[5, 6], 0, 0)]);
    let mut from_left = ids;
    from_left["truncation_side"] = json!("left");
    assert_eq!(probs(&app.classify(from_left).await), [outputs(&[7, 8], 0, 0)]);
    let none = app.post(CLASSIFY, &cut(json!({"truncate_prompt_tokens": 1}))).await;
    assert_eq!((none.status, &none.error()["param"]), (400, &json!("truncate_prompt_tokens")));
}

#[tokio::test]
async fn every_field_has_a_range() {
    let app = app();
    let cases = [
        (
            "input",
            vec![
                json!(null),
                json!([]),
                json!([[]]),
                json!(5),
                json!(true),
                json!({}),
                json!({"text": 5}),
                json!({"text_pair": "one"}),
                json!({"text": "one", "pair": "two"}),
                json!([{"text": "one", "text_pair": ["two"]}]),
                json!([["one", "two"]]),
                json!([1, "one"]),
                json!(["one", 1]),
                json!([[1], 1]),
                json!([-1]),
                json!([1.5]),
                json!([5_000_000_000_u64]),
                json!([VOCABULARY]),
                json!(["one", [VOCABULARY]]),
                json!([null]),
                json!(vec!["one"; 129]),
            ],
        ),
        ("truncate_prompt_tokens", vec![json!(0), json!(-2), json!(CONTEXT + 1), json!("5"), json!(1.5)]),
        ("truncation_side", vec![json!("middle"), json!(1)]),
        ("add_special_tokens", vec![json!(1)]),
        ("use_activation", vec![json!("yes"), json!(1)]),
        ("softmax", vec![json!([])]),
        ("messages", vec![json!([{"role": "user", "content": "one"}])]),
        ("model", vec![json!(1), json!({})]),
        ("elastic", vec![json!("minimal"), json!({"sub_network": "minimal"}), json!({"min_accuracy": 0})]),
    ];
    refused(&app, CLASSIFY, &json!({"input": "one"}), &cases).await;
    let both = app.post(CLASSIFY, &json!({"input": "one", "softmax": true, "use_activation": false})).await;
    assert_eq!((both.status, &both.error()["param"]), (400, &json!("softmax")));
    let missing = app.post(CLASSIFY, &json!({})).await;
    assert_eq!((missing.status, &missing.error()["param"]), (400, &json!("input")));
    // This model has one type of tokens, so it cannot tell a pair's texts apart.
    let pair =
        json!({"model": "tiny-other", "input": [{"text": "one"}, {"text": "one", "text_pair": "two"}]});
    let pair = app.post(CLASSIFY, &pair).await;
    assert_eq!((pair.status, &pair.error()["param"]), (400, &json!("input[1]")));
    for body in [
        "",
        "nonsense",
        "[",
        "{\"input\": \"a\"} more",
        &"[".repeat(100_000),
        &format!("{{\"input\": {}", "[".repeat(100_000)),
    ] {
        let answer = app.post_text(CLASSIFY, body.to_string()).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
        answer.error();
    }
    app.until_idle().await;
    assert_eq!(app.scrape().await.accepted(), 0.0, "none of these reached the engine");
}

#[tokio::test]
async fn a_model_is_asked_only_for_what_it_does() {
    let (texts, classes) = (App::new(), app());
    let message = json!([{"role": "user", "content": "one"}]);
    let body = json!({"prompt": "one", "input": "one", "messages": message});
    for (app, path, instead) in [
        (&classes, COMPLETIONS, "/v1/classify"),
        (&classes, CHAT, "/v1/classify"),
        (&texts, CLASSIFY, "/v1/completions"),
        (&texts, "/classify", "/v1/completions"),
    ] {
        let answer = app.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path}: {}", answer.body);
        let error = answer.error();
        assert_eq!((&error["param"], &error["code"]), (&json!("model"), &json!("unsupported_task")));
        assert!(error["message"].as_str().unwrap().contains(instead), "{error}");
    }
    for (app, task) in [(&texts, "generate"), (&classes, "classify")] {
        let cards = app.get("/v1/models").await.expect(200);
        assert!(cards["data"].as_array().unwrap().iter().all(|card| card["task"] == task), "{cards}");
    }
    let labels = |card: Value| card["labels"].clone();
    assert_eq!(labels(classes.get("/v1/models/tiny-tied").await.expect(200)), json!(["no", "maybe", "yes"]));
    assert_eq!(labels(classes.get("/v1/models/tiny-other").await.expect(200)), json!(["score"]));
    assert_eq!(
        labels(classes.get("/v1/models/tiny-tied:minimal").await.expect(200)),
        Value::Null,
        "once is enough"
    );
    assert_eq!(labels(texts.get("/v1/models/tiny-tied").await.expect(200)), Value::Null);
}

#[tokio::test]
async fn sub_networks_of_several_requests_share_a_step_and_say_what_they_say_alone() {
    let app = app();
    let asked = |sub_network: &str| json!({"model": format!("tiny-tied:{sub_network}"), "input": ["one", "the end", [5, 6]]});
    let names = ["maximal", "heuristic", "minimal"];
    let mut alone = Vec::new();
    for name in names {
        alone.push(probs(&app.classify(asked(name)).await));
    }
    assert_ne!(alone[0], alone[1]);
    let steps = |scrape: &super::scrape::Scrape| {
        (scrape.sum("lonas_step_subnetworks_count", &[]), scrape.sum("lonas_step_subnetworks_sum", &[]))
    };
    app.until_idle().await;
    let before = steps(&app.scrape().await);
    app.gate.after(0, Then::Wait);
    let first = app.start(CLASSIFY, &json!({"input": "first"}));
    app.until("a step is held", |s| s.load().0 == 1.0).await;
    let mixed = names.map(|name| app.start(CLASSIFY, &asked(name)));
    app.until("all are in", |s| s.accepted() == 7.0).await;
    app.gate.open();
    first.await.unwrap().expect(200);
    for (answer, alone) in mixed.into_iter().zip(alone) {
        assert_eq!(probs(&answer.await.unwrap().expect(200)), alone);
    }
    app.until_idle().await;
    let after = steps(&app.scrape().await);
    assert_eq!((after.0 - before.0, after.1 - before.1), (2.0, 4.0), "one step of one, one of three");
}

#[tokio::test]
async fn a_full_server_says_at_once_when_to_come_again() {
    let engine = EngineOptions { max_running: 2, max_waiting: 1, step_tokens: 64, prefix_cache: true };
    let app = App::with(Options { engine, ..options() });
    app.gate.after(0, Then::Wait);
    let running = app.start(CLASSIFY, &json!({"input": ["one", "two"]}));
    app.until("it is in", |s| s.accepted() == 1.0).await;
    let answer = app.post(CLASSIFY, &json!({"input": ["one", "two"]})).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    assert_eq!(answer.error()["code"], "queue_full");
    let never = app.post(CLASSIFY, &json!({"input": vec!["one"; 4]})).await;
    assert_eq!((never.status, &never.error()["param"]), (400, &json!("input")));
    app.gate.open();
    running.await.unwrap().expect(200);
    app.classify(json!({"input": vec!["one"; 3]})).await;
    let scrape = app.scrape().await;
    assert_eq!((scrape.ended("rejected"), scrape.ended("invalid"), scrape.ended("done")), (1.0, 1.0, 2.0));
    assert_eq!(scrape.sum("lonas_rejected_total", &[("reason", "queue_full")]), 1.0);
}

#[tokio::test]
async fn a_step_that_fails_ends_its_requests_without_its_secrets() {
    let app = app();
    for then in [Then::Fail, Then::Panic, Then::Nothing] {
        app.gate.after(0, then);
        let answer = app.post(CLASSIFY, &json!({"input": ["one", "two"]})).await;
        assert_eq!(answer.status, 500);
        assert!(!answer.body.contains("secret") && !answer.body.contains("panic"), "{}", answer.body);
        answer.error();
        app.gate.open();
        app.classify(json!({"input": "one"})).await;
        assert_eq!(app.get("/health").await.status, 200);
    }
    assert_eq!(app.scrape().await.ended("error"), 3.0);
    app.until_idle().await;
}

#[tokio::test]
async fn a_guarded_server_classifies_for_a_key() {
    let app = App::with(Options { api_keys: vec!["one-key".into()], ..options() });
    for path in [CLASSIFY, "/classify"] {
        assert_eq!(app.post_text(path, "nonsense").await.status, 401, "before the body is looked at");
        let request = Request::post(path).header("authorization", "Bearer one-key");
        let request = request.header("content-type", "application/json");
        app.send(request.body(Body::from(r#"{"input": "one"}"#)).unwrap()).await.expect(200);
    }
}

#[tokio::test]
async fn a_registered_sub_network_classifies_at_once() {
    let app = App::with(Options { admin_keys: vec!["admin".into()], ..options() });
    let minimal = app.get("/v1/subnetworks/tiny-tied:minimal").await.expect(200);
    let ask = |method: &str, path: &str, body: Value| {
        let request = Request::builder().method(method).uri(path).header("authorization", "Bearer admin");
        app.send(
            request.header("content-type", "application/json").body(Body::from(body.to_string())).unwrap(),
        )
    };
    let mut choices = minimal["choices"].clone();
    let maximal = app.get("/v1/subnetworks/tiny-tied:maximal").await.expect(200);
    choices[0] = maximal["choices"][0].clone();
    let made = json!({"model": "tiny-tied", "name": "mine", "choices": choices});
    ask("POST", "/v1/subnetworks", made).await.expect(201);
    let body = json!({"model": "tiny-tied:mine", "input": "one", "use_activation": false});
    // Ids are given one after the other: six there were.
    assert_eq!(probs(&app.classify(body.clone()).await), [outputs(&app.encode("one"), 0, 6)]);
    ask("DELETE", "/v1/subnetworks/tiny-tied:mine", json!({})).await.expect(200);
    app.post(CLASSIFY, &body).await.expect(404);
}

#[tokio::test]
async fn every_request_is_counted_once_and_every_token_as_in_the_usage() {
    let app = app();
    let mut tokens = 0.0;
    for input in [json!("one"), json!(["the end", "two"]), json!({"text": "a", "text_pair": "b"})] {
        let answer = app.classify(json!({"model": "tiny-tied:minimal", "input": input})).await;
        tokens += answer["usage"]["total_tokens"].as_f64().unwrap();
    }
    app.post(CLASSIFY, &json!({"model": "secret-model", "input": "one"})).await.expect(404);
    app.until_idle().await;
    let scrape = app.scrape().await;
    let subnetwork = [("subnetwork", "tiny-tied:minimal")];
    let count = |name: &str| scrape.sum(&format!("lonas_{name}"), &subnetwork);
    assert_eq!((count("requests_total"), scrape.ended("done")), (3.0, 3.0));
    assert_eq!(scrape.sum("lonas_requests_total", &[("endpoint", "classify")]), 4.0, "and one for nobody");
    assert_eq!(count("subnetwork_selected_total"), 3.0);
    assert_eq!((count("prompt_tokens_total"), count("request_prompt_tokens_sum")), (tokens, tokens));
    assert_eq!(
        (count("request_duration_seconds_count"), count("request_generated_tokens_count")),
        (3.0, 0.0)
    );
    assert_eq!(count("queue_seconds_count"), 4.0, "one for each text");
    assert!(scrape.sum("lonas_step_seconds_count", &[("phase", "prefill")]) >= 3.0);
    assert!(!scrape.0.contains("secret"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_is_not_computed_for() {
    let served = Served::start(options(), Duration::from_secs(30)).await;
    let app = &served.app;
    app.gate.after(0, Then::Wait);
    let body = json!({"input": vec!["a long text, that fills its step"; 20]}).to_string();
    let client = served.send("POST", CLASSIFY, &body);
    app.until("its first step is held", |s| s.load().0 > 0.0).await;
    drop(client);
    app.until("the request is over", |s| s.ended("cancelled") == 1.0).await;
    app.gate.open();
    app.until_idle().await;
    assert_eq!(app.scrape().await.sum("lonas_step_subnetworks_count", &[]), 1.0, "the step that was held");
    app.classify(json!({"input": "one"})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_what_is_in_and_cuts_off_what_takes_too_long() {
    for (drain, status, drained) in
        [(Duration::from_secs(30), 200, Drained::All), (Duration::from_millis(50), 503, Drained::TimedOut)]
    {
        let mut served = Served::start(options(), drain).await;
        served.app.gate.after(0, Then::Wait);
        let mut running = served.send("POST", CLASSIFY, r#"{"input": ["one", "two"]}"#);
        served.app.until("it is in", |s| s.accepted() == 1.0).await;
        served.stop();
        served.app.until_health(503).await;
        assert_eq!(served.whole("POST", CLASSIFY, r#"{"input": "one"}"#).0, 503);
        if status == 200 {
            served.app.gate.open();
        }
        let (got, answer) = read(&mut running);
        assert_eq!(got, status, "{answer}");
        assert_eq!(served.serving.await.unwrap().unwrap(), drained);
        served.app.gate.open();
    }
}
