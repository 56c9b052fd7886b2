//! Which sub-network answers, that it says so, and that a mixed batch changes nothing.

use super::alone::{Alone, Which};
use super::app::{App, CHAT, COMPLETIONS, Options};
use super::held::Then;
use crate::tiny::{NAME, OTHER};
use lonas::server::ServedModel;
use lonas::supernet::Latency;
use serde_json::{Value, json};
use std::sync::Arc;

const NAMES: [&str; 3] = ["maximal", "heuristic", "minimal"];
const PROMPT: &str = "the end of the list is";

#[tokio::test]
async fn each_way_of_naming_serves_what_it_names_and_says_so() {
    let app = App::new();
    let cases = [
        (json!({}), NAME, "maximal", Value::Null, "default"),
        (json!({"model": NAME}), NAME, "maximal", Value::Null, "default"),
        (json!({"model": OTHER}), OTHER, "maximal", Value::Null, "default"),
        (json!({"model": "tiny-tied:minimal"}), NAME, "minimal", json!("minimal"), "model"),
        (json!({"model": "tiny-other:heuristic"}), OTHER, "heuristic", json!("heuristic"), "model"),
        (
            json!({"model": OTHER, "elastic": {"subnetwork": "minimal"}}),
            OTHER,
            "minimal",
            json!("minimal"),
            "elastic",
        ),
        (json!({"elastic": {"subnetwork": "heuristic"}}), NAME, "heuristic", json!("heuristic"), "elastic"),
        (
            json!({"model": "tiny-tied:minimal", "elastic": {"subnetwork": "minimal"}}),
            NAME,
            "minimal",
            json!("minimal"),
            "model",
        ),
    ];
    for (choice, model, served, requested, reason) in cases {
        for (path, key, value) in [
            (COMPLETIONS, "prompt", json!("one")),
            (CHAT, "messages", json!([{"role": "user", "content": "one"}])),
        ] {
            let mut body = choice.clone();
            (body[key], body["max_tokens"]) = (value, json!(2));
            let answer = app.post(path, &body).await;
            let json = answer.expect(200);
            assert_eq!(answer.header("x-subnetwork"), served, "{body}");
            let elastic = json!({"requested": requested, "served": served, "reason": reason});
            assert_eq!(json["elastic"], elastic, "{body}");
            assert_eq!(json["model"], format!("{model}:{served}"));
            let fingerprint = json["system_fingerprint"].as_str().unwrap();
            assert!(fingerprint.starts_with("fp_") && fingerprint.ends_with(served), "{fingerprint}");
        }
    }
}

/// A greedy request and the tokens that it must give.
struct Case {
    body: Value,
    expected: Vec<String>,
}

/// Every sub-network of both super-adapters on several prompts.
fn cases(app: &App) -> Vec<Case> {
    let mut alone = Alone::new(&app.tiny);
    let mut cases = Vec::new();
    for prompt in [PROMPT, "one", "a list of 1 2 3 and 4; is it in order?"] {
        for (adapter, model) in [NAME, OTHER].into_iter().enumerate() {
            for name in NAMES {
                let (ids, which) = (app.encode(prompt), Which { adapter, name });
                let tokens = alone.greedy(which, &ids, 20);
                let body = json!({"model": format!("{model}:{name}"), "prompt": ids, "temperature": 0,
                                  "max_tokens": 20, "logprobs": 0, "ignore_eos": true});
                cases.push(Case { body, expected: tokens.iter().map(|&t| app.spelled(t)).collect() });
            }
        }
    }
    cases
}

fn tokens(answer: &Value) -> Vec<String> {
    serde_json::from_value(answer["choices"][0]["logprobs"]["tokens"].clone()).unwrap()
}

#[tokio::test]
async fn a_request_says_in_a_mixed_batch_what_it_says_alone() {
    let app = App::with(Options {
        engine: lonas::engine::EngineOptions {
            max_running: 64,
            max_waiting: 64,
            step_tokens: 64,
            prefix_cache: true,
        },
        ..Options::default()
    });
    let cases = cases(&app);
    let distinct = cases.iter().take(6).map(|c| &c.expected).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(distinct.len(), 6, "the sub-networks of both super-adapters differ");
    app.gate.after(0, Then::Wait);
    let burst = cases.iter().map(|case| app.start(COMPLETIONS, &case.body)).collect::<Vec<_>>();
    let count = cases.len() as f64;
    app.until("all are accepted", |s| s.accepted() == count).await;
    app.gate.open();
    for (case, answer) in cases.iter().zip(burst) {
        let answer = answer.await.unwrap().expect(200);
        assert_eq!(answer["model"], case.body["model"]);
        assert_eq!(tokens(&answer), case.expected, "{} says something else than alone", case.body);
    }
    let scrape = app.scrape().await;
    let all = scrape.sum("lonas_step_subnetworks_count", &[]);
    let of_one = scrape.sum("lonas_step_subnetworks_bucket", &[("le", "1")]);
    assert!(all - of_one >= 15.0, "{all} steps, {of_one} of them with one sub-network only");
    let most = scrape.sum("lonas_step_subnetworks_bucket", &[("le", "4")]);
    assert!(most < all, "steps with all six sub-networks");
    for (adapter, name) in [NAME, OTHER].into_iter().flat_map(|m| NAMES.map(|n| (m, n))) {
        let label = format!("{adapter}:{name}");
        assert_eq!(scrape.sum("lonas_generated_tokens_total", &[("subnetwork", &label)]), 60.0, "{label}");
    }
}

#[tokio::test]
async fn contradictions_are_refused() {
    let app = App::new();
    let cases = [
        json!({"model": "tiny-tied:minimal", "elastic": {"subnetwork": "maximal"}}),
        json!({"model": "tiny-tied:minimal", "elastic": {"min_accuracy": 0.5}}),
        json!({"elastic": {"subnetwork": "minimal", "max_tpot_ms": 5}}),
    ];
    for mut body in cases {
        body["prompt"] = json!("one");
        let error = app.post(COMPLETIONS, &body).await.expect(400);
        assert_eq!(error["error"]["param"], "elastic", "{body}");
        assert!(error["error"]["message"].as_str().unwrap().contains("contradictory"), "{error}");
    }
}

#[tokio::test]
async fn unknown_names_are_404_and_never_served_by_something_else() {
    let app = App::new();
    let cases = [
        (json!({"model": "gpt-4o"}), "model"),
        (json!({"model": ""}), "model"),
        (json!({"model": "tiny-tied:huge"}), "model"),
        (json!({"model": "tiny-tied:"}), "model"),
        (json!({"model": ":minimal"}), "model"),
        (json!({"model": "minimal"}), "model"),
        (json!({"model": "tiny-tied:minimal:minimal"}), "model"),
        (json!({"elastic": {"subnetwork": "huge"}}), "elastic.subnetwork"),
    ];
    for (mut body, param) in cases {
        body["prompt"] = json!("one");
        let error = app.post(COMPLETIONS, &body).await.expect(404);
        assert_eq!(
            (&error["error"]["code"], &error["error"]["param"]),
            (&json!("model_not_found"), &json!(param))
        );
        assert_eq!(error["error"]["type"], "invalid_request_error");
    }
    assert_eq!(app.scrape().await.accepted(), 0.0);
}

/// maximal: 0.8 and slow, heuristic: 0.6, minimal: 0.4 and fast.
pub(crate) fn measure(models: &mut [ServedModel]) {
    for model in models {
        let known = [("maximal", 0.8, 4e-3), ("heuristic", 0.6, 2e-3), ("minimal", 0.4, 1e-3)];
        for (name, score, seconds) in known {
            let sub_network = model.sub_networks.iter_mut().find(|s| s.entry.name == name).unwrap();
            let entry = &mut Arc::make_mut(sub_network).entry;
            entry.scores = [("one".into(), score - 0.1), ("two".into(), score + 0.1)].into();
            let latency =
                Latency { prefill_seconds_per_token: seconds, decode_seconds_per_token: 10.0 * seconds };
            entry.latency = [("here".into(), latency)].into();
        }
    }
}

#[tokio::test]
async fn bounds_are_kept_by_what_the_catalog_has_measured() {
    let app = App::with(Options { models: measure, machine: Some("here".into()), ..Options::default() });
    // With <s>, a prompt of 10 tokens takes 40, 20 or 10 ms; a token of the answer takes as long.
    let prompt = vec![5; 10];
    let cases = [
        (json!({"min_accuracy": 0.5}), "heuristic", "accuracy"),
        (json!({"min_accuracy": 0.1}), "minimal", "accuracy"),
        (json!({"max_tpot_ms": 25}), "heuristic", "latency"),
        (json!({"max_tpot_ms": 1000}), "maximal", "latency"),
        (json!({"max_ttft_ms": 15}), "minimal", "latency"),
        (json!({"max_ttft_ms": 100, "max_tpot_ms": 30, "min_accuracy": 0.3}), "heuristic", "latency"),
        // The prompt and one more token: 80, 40 or 20 ms.
        (json!({"deadline_ms": 80}), "maximal", "latency"),
        (json!({"deadline_ms": 79}), "heuristic", "latency"),
        (json!({"deadline_ms": 79, "max_ttft_ms": 15}), "minimal", "latency"),
    ];
    for (bounds, served, reason) in cases {
        let answer = app.complete(json!({"prompt": prompt, "max_tokens": 2, "elastic": bounds})).await;
        let elastic = &answer["elastic"];
        assert_eq!((&elastic["served"], &elastic["reason"]), (&json!(served), &json!(reason)), "{bounds}");
        let requested = elastic["requested"].as_object().unwrap();
        for (key, value) in bounds.as_object().unwrap() {
            assert_eq!(requested[key].as_f64(), value.as_f64());
        }
    }
    let impossible = [
        (json!({"min_accuracy": 0.9}), "elastic.min_accuracy", "`maximal` with 0.8"),
        (json!({"max_tpot_ms": 5}), "elastic.max_tpot_ms", "`minimal` with 10"),
        (json!({"max_ttft_ms": 5}), "elastic.max_ttft_ms", "`minimal` with 10"),
        (json!({"max_tpot_ms": 15, "min_accuracy": 0.5}), "elastic.max_tpot_ms", "`heuristic` with 20"),
        // Sixteen tokens where the request does not say.
        (json!({"deadline_ms": 159}), "elastic.deadline_ms", "`minimal` with 160"),
    ];
    for (bounds, param, nearest) in impossible {
        let body = json!({"prompt": prompt, "elastic": bounds});
        let error = app.post(COMPLETIONS, &body).await.expect(400);
        assert_eq!(error["error"]["param"], param);
        assert!(error["error"]["message"].as_str().unwrap().contains(nearest), "{error}");
    }
    assert_eq!(
        app.scrape().await.sum("lonas_subnetwork_accuracy_ratio", &[("subnetwork", "tiny-tied:minimal")]),
        0.4
    );
}

#[tokio::test]
async fn a_bound_that_nothing_was_measured_for_is_refused() {
    let app = App::new();
    let bounds = [
        ("min_accuracy", "lonas eval"),
        ("max_tpot_ms", "lonas bench --save"),
        ("max_ttft_ms", "lonas bench --save"),
        ("deadline_ms", "lonas bench --save"),
    ];
    for (bound, remedy) in bounds {
        let body = json!({"prompt": "one", "elastic": {(bound): 0.5}});
        let error = &app.post(COMPLETIONS, &body).await.expect(400)["error"];
        assert_eq!(error["param"], format!("elastic.{bound}"));
        assert!(error["message"].as_str().unwrap().contains(remedy), "{error}");
    }
    // An answer without a bound has no latest time.
    let body = json!({"messages": [{"role": "user", "content": "one"}], "elastic": {"deadline_ms": 5}});
    let error = &app.post(CHAT, &body).await.expect(400)["error"];
    assert!(error["message"].as_str().unwrap().contains("max_tokens"), "{error}");
}
