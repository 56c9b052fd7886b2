//! Bodies that nobody would send: whatever they hold, the server answers with success or a 4xx of OpenAI's shape.

use super::app::{App, CHAT, CLASSIFY, COMPLETIONS, Options};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

/// Any JSON, a little deep.
fn any_json() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|x| json!(x)),
        (-3i64..200).prop_map(|n| json!(n))
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|b| json!(b)),
        number,
        "\\PC{0,12}".prop_map(|s| json!(s))
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map("[a-z0-9]{0,6}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A good value or any JSON for each field that the server knows.
fn any_request() -> impl Strategy<Value = Value> {
    let good = json!({
        "model": "tiny-other:minimal", "prompt": "one", "messages": [{"role": "user", "content": "one"}],
        "elastic": {"subnetwork": "minimal"}, "max_tokens": 3, "max_completion_tokens": 3, "min_tokens": 1,
        "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"5": 3}, "seed": 5, "n": 2, "stop": "e",
        "stop_token_ids": [5], "ignore_eos": true, "stream": false, "echo": true,
        "logprobs": null, "cache_salt": "mine", "suffix": "", "add_special_tokens": true, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "audio": null,
    });
    mostly(&good)
}

/// The same for a classification.
fn any_classification() -> impl Strategy<Value = Value> {
    mostly(&json!({
        "model": "tiny-tied:minimal", "input": ["one", {"text": "one", "text_pair": "two"}, [5, 6]],
        "elastic": {"subnetwork": "minimal"}, "truncate_prompt_tokens": 5, "truncation_side": "left",
        "add_special_tokens": true, "use_activation": true, "softmax": true, "messages": null,
    }))
}

/// Fields of a good request, each left out or replaced now and then.
fn mostly(good: &Value) -> impl Strategy<Value = Value> + use<> {
    let fields = good.as_object().unwrap().clone().into_iter();
    let field = fields.map(|(key, value)| {
        let value = prop_oneof![12 => Just(None), 12 => Just(Some(value)), 1 => any_json().prop_map(Some)];
        value.prop_map(move |value| value.map(|value| (key.clone(), value)))
    });
    field.collect::<Vec<_>>().prop_map(|fields| Value::Object(fields.into_iter().flatten().collect()))
}

#[test]
fn no_json_makes_the_server_fail() {
    check(&App::new(), &[COMPLETIONS, CHAT], prop_oneof![3 => any_request(), 1 => any_json()]);
}

#[test]
fn no_json_makes_a_classifier_fail() {
    let app = App::with(Options { classify: true, ..Options::default() });
    check(&app, &[CLASSIFY], prop_oneof![3 => any_classification(), 1 => any_json()]);
}

fn check(app: &App, paths: &[&str], bodies: impl Strategy<Value = Value>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(600) });
    let checked = runner.run(&bodies, |body| {
        for path in paths {
            let answer = runtime.block_on(app.post(path, &body));
            match answer.status {
                200 => {}
                400 | 404 => drop(answer.error()),
                other => panic!("{path} {body}: {other} {}", answer.body),
            }
        }
        Ok(())
    });
    checked.unwrap();
    runtime.block_on(app.until_idle());
    let taken = runtime.block_on(app.scrape()).accepted();
    assert!(taken > 50.0, "only {taken} of the bodies were requests; the others test little");
}
