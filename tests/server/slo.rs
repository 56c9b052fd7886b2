//! Bounds on latency that a gateway puts into headers: what `elastic` would say, and no silent way round it.

use super::app::{Answer, App, CHAT, CLASSIFY, COMPLETIONS, Options};
use super::choice::measure;
use axum::body::Body;
use axum::http::{Request, header};
use serde_json::{Value, json};

const TTFT: &str = "x-slo-ttft-ms";
const TPOT: &str = "x-slo-tpot-ms";

async fn post(app: &App, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    app.send(request.body(Body::from(body.to_string())).unwrap()).await
}

fn measured(classify: bool) -> App {
    App::with(Options { models: measure, machine: Some("here".into()), classify, ..Options::default() })
}

#[tokio::test]
async fn headers_bound_as_fields_do() {
    let app = measured(false);
    // A prompt of 10 tokens takes 40, 20 or 10 ms; a token of the answer takes as long.
    let completion = json!({"prompt": vec![5; 10], "max_tokens": 2});
    let cases = [
        (&[(TPOT, "25")][..], json!({"max_tpot_ms": 25.0}), "heuristic"),
        (&[(TTFT, "15.5")], json!({"max_ttft_ms": 15.5}), "minimal"),
        (&[(TTFT, "1e3"), (TPOT, "1e3")], json!({"max_tpot_ms": 1000.0, "max_ttft_ms": 1000.0}), "maximal"),
        (&[(TTFT, "1000"), (TPOT, "15")], json!({"max_tpot_ms": 15.0, "max_ttft_ms": 1000.0}), "minimal"),
        (&[(TTFT, "15"), (TTFT, " 15 ")], json!({"max_ttft_ms": 15.0}), "minimal"),
        (&[], Value::Null, "maximal"),
    ];
    for (headers, requested, served) in cases {
        let answer = post(&app, COMPLETIONS, headers, &completion).await;
        assert_eq!(answer.header("x-subnetwork"), served, "{headers:?}");
        let elastic = &answer.expect(200)["elastic"];
        assert_eq!((&elastic["requested"], &elastic["served"]), (&requested, &json!(served)), "{headers:?}");
    }
    // Together with what the body says, also in a chat.
    let bounded = json!({"prompt": vec![5; 10], "elastic": {"min_accuracy": 0.5, "max_tpot_ms": 25}});
    for headers in [&[(TTFT, "100")][..], &[(TPOT, "25.0")]] {
        assert_eq!(post(&app, COMPLETIONS, headers, &bounded).await.header("x-subnetwork"), "heuristic");
    }
    let chat = json!({"messages": [{"role": "user", "content": "one"}], "max_tokens": 1});
    assert_eq!(post(&app, CHAT, &[(TPOT, "12")], &chat).await.header("x-subnetwork"), "minimal");
}

#[tokio::test]
async fn what_cannot_be_is_said_by_the_header() {
    let app = measured(false);
    let plain = json!({"prompt": "one"});
    let bad = ["0", "-5", "soon", "", "NaN", "inf", "1e10", "5 ms"];
    for value in bad {
        let error = post(&app, COMPLETIONS, &[(TPOT, value)], &plain).await.expect(400);
        assert_eq!(error["error"]["param"], TPOT, "{value}: {error}");
    }
    let twice = post(&app, COMPLETIONS, &[(TTFT, "5"), (TTFT, "6")], &plain).await.expect(400);
    assert_eq!(twice["error"]["param"], TTFT);
    let other = json!({"prompt": "one", "elastic": {"max_tpot_ms": 30}});
    let error = post(&app, COMPLETIONS, &[(TPOT, "25")], &other).await.expect(400);
    assert_eq!(error["error"]["param"], TPOT, "{error}");
    let named = json!({"model": "tiny-tied:minimal", "prompt": "one"});
    let error = post(&app, COMPLETIONS, &[(TPOT, "25")], &named).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("contradictory"), "{error}");
    let error = post(&app, COMPLETIONS, &[(TPOT, "5")], &plain).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("`minimal` with 10"), "{error}");
}

#[tokio::test]
async fn a_classification_has_no_time_for_each_token() {
    let app = measured(true);
    let body = json!({"input": [vec![5; 10]]});
    let answer = post(&app, CLASSIFY, &[(TTFT, "15")], &body).await;
    assert_eq!(answer.expect(200)["elastic"]["served"], "minimal");
    let error = post(&app, CLASSIFY, &[(TPOT, "15")], &body).await.expect(400);
    assert_eq!(error["error"]["param"], TPOT);
}
