//! What `/metrics` counts.

use super::app::{App, CHAT, COMPLETIONS};
use serde_json::{Value, json};

#[tokio::test]
async fn every_request_is_counted_once_and_every_token_as_in_the_usage() {
    let app = App::new();
    let requests = [
        (COMPLETIONS, json!({"model": "tiny-tied:minimal", "prompt": "one", "max_tokens": 5})),
        (
            COMPLETIONS,
            json!({"model": "tiny-tied:minimal", "prompt": ["one", "two"], "n": 2, "max_tokens": 4}),
        ),
        (COMPLETIONS, json!({"model": "tiny-tied:minimal", "prompt": "one", "stop": "e", "seed": 5})),
        (CHAT, json!({"model": "tiny-tied:minimal", "messages": [{"role": "user", "content": "one"}]})),
        (
            CHAT,
            json!({"model": "tiny-tied:minimal", "messages": [{"role": "user", "content": "one"}],
                      "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 9}),
        ),
    ];
    let (mut prompt_tokens, mut generated_tokens) = (0.0, 0.0);
    for (path, body) in &requests {
        let answer = app.post(path, body).await;
        let usage = match body["stream"] {
            Value::Bool(true) => answer.chunks().pop().unwrap()["usage"].clone(),
            _ => answer.expect(200)["usage"].clone(),
        };
        prompt_tokens += usage["prompt_tokens"].as_f64().unwrap();
        generated_tokens += usage["completion_tokens"].as_f64().unwrap();
    }
    app.until_idle().await;
    let scrape = app.scrape().await;
    let subnetwork = [("subnetwork", "tiny-tied:minimal")];
    let count = |name: &str| scrape.sum(&format!("lonas_{name}"), &subnetwork);
    assert_eq!(count("requests_total"), 5.0);
    for (endpoint, expected) in [("completions", 3.0), ("chat", 2.0)] {
        assert_eq!(scrape.sum("lonas_requests_total", &[("endpoint", endpoint)]), expected);
    }
    assert_eq!(scrape.ended("stop") + scrape.ended("length"), 5.0, "and none for another sub-network");
    assert_eq!(count("subnetwork_selected_total"), 5.0);
    for histogram in [
        "request_duration_seconds",
        "time_to_first_token_seconds",
        "request_prompt_tokens",
        "request_generated_tokens",
    ] {
        assert_eq!(count(&format!("{histogram}_count")), 5.0, "{histogram}");
    }
    assert_eq!(count("queue_seconds_count"), 8.0, "one for each sequence");
    assert_eq!(
        (count("prompt_tokens_total"), count("request_prompt_tokens_sum")),
        (prompt_tokens, prompt_tokens)
    );
    assert_eq!(
        (count("generated_tokens_total"), count("request_generated_tokens_sum")),
        (generated_tokens, generated_tokens)
    );
    assert_eq!(count("inter_token_latency_seconds_count"), generated_tokens - 8.0, "between two tokens each");
    assert!(count("time_per_output_token_seconds_count") <= 8.0);
    assert!(scrape.sum("lonas_engine_last_step_timestamp_seconds", &[]) > 1.7e9);
    let phases =
        ["prefill", "decode", "mixed"].map(|p| scrape.sum("lonas_step_seconds_count", &[("phase", p)]));
    assert_eq!(phases.iter().sum::<f64>(), scrape.sum("lonas_step_subnetworks_count", &[]));
}

#[tokio::test]
async fn series_exist_before_their_first_event() {
    let app = App::new();
    let text = app.scrape().await.0;
    for series in [
        "lonas_requests_running{subnetwork=\"tiny-other:heuristic\"} 0",
        "lonas_generated_tokens_total{subnetwork=\"tiny-tied:maximal\"} 0",
        "lonas_preemptions_total{subnetwork=\"tiny-tied:minimal\"} 0",
        "lonas_rejected_total{reason=\"queue_full\"} 0",
        "lonas_subnetwork_info{model=\"tiny-tied\",name=\"minimal\",subnetwork=\"tiny-tied:minimal\"} 1",
        "lonas_model_info{base=\"base\",device=\"cpu\",dtype=\"f32\",model=\"tiny-other\"} 1",
    ] {
        assert!(text.lines().any(|line| line == series), "no {series} in\n{text}");
    }
}

#[tokio::test]
async fn nothing_that_a_client_writes_becomes_a_label() {
    let app = App::new();
    for body in [
        json!({"model": "secret-model", "prompt": "one"}),
        json!({"model": "tiny-tied:secret", "prompt": "one"}),
    ] {
        app.post(COMPLETIONS, &body).await.expect(404);
    }
    app.get("/secret/path").await.expect(404);
    app.get("/v1/models/secret-model").await.expect(404);
    app.get("/v1/models/tiny-tied:minimal").await.expect(200);
    let odd = axum::http::Request::builder().method("SECRET").uri("/v1/models");
    app.send(odd.body(axum::body::Body::empty()).unwrap()).await.expect(405);
    let scrape = app.scrape().await;
    assert!(!scrape.0.to_lowercase().contains("secret"), "{}", scrape.0);
    let http = |labels: &[(&str, &str)]| scrape.sum("lonas_http_requests_total", labels);
    assert_eq!(http(&[("route", "/v1/models/{id}"), ("status", "200")]), 1.0);
    assert_eq!(http(&[("route", "none"), ("status", "404")]), 1.0);
    assert_eq!(http(&[("method", "other"), ("status", "405")]), 1.0);
    assert_eq!(scrape.sum("lonas_requests_total", &[("subnetwork", "none"), ("outcome", "invalid")]), 2.0);
}
