//! Model cards, tokens and text, health, version, request ids.

use super::app::{App, COMPLETIONS};
use crate::tiny::{BOS, CONTEXT, VOCABULARY};
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

#[tokio::test]
async fn each_super_adapter_and_each_sub_network_has_a_card() {
    let app = App::new();
    let list = app.get("/v1/models").await.expect(200);
    assert_eq!(list["object"], "list");
    let cards = list["data"].as_array().unwrap();
    let ids = cards.iter().map(|c| c["id"].as_str().unwrap()).collect::<Vec<_>>();
    let of = |name: &str| {
        let sub_networks = ["maximal", "heuristic", "minimal"].map(|s| format!("{name}:{s}"));
        [vec![name.to_string()], sub_networks.into()].concat()
    };
    assert_eq!(ids, [of("tiny-tied"), of("tiny-other")].concat());
    for card in cards {
        assert_eq!(&app.get(&format!("/v1/models/{}", card["id"].as_str().unwrap())).await.expect(200), card);
        assert_eq!(
            (&card["object"], &card["root"], &card["max_model_len"]),
            (&json!("model"), &json!("base"), &json!(CONTEXT))
        );
        assert!(card["created"].as_u64().is_some() && card["owned_by"].is_string());
    }
    assert_eq!((&cards[0]["parent"], &cards[0]["elastic"]["subnetwork"]), (&Value::Null, &json!("maximal")));
    assert_eq!(
        (&cards[3]["parent"], &cards[3]["elastic"]["subnetwork"]),
        (&json!("tiny-tied"), &json!("minimal"))
    );
    let parameters =
        cards[1..4].iter().map(|c| c["elastic"]["parameters"].as_u64().unwrap()).collect::<Vec<_>>();
    assert!(parameters.is_sorted_by(|a, b| a > b), "{parameters:?}");
    for unknown in ["huge", "tiny-tied:huge"] {
        let error = app.get(&format!("/v1/models/{unknown}")).await.expect(404);
        assert_eq!(error["error"]["code"], "model_not_found");
    }
}

#[tokio::test]
async fn text_goes_to_tokens_and_back() {
    let app = App::new();
    let text = "the end, é and 😀";
    let tokens = app.post("/tokenize", &json!({"prompt": text})).await.expect(200);
    assert_eq!(tokens["tokens"][0], BOS);
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], CONTEXT);
    let bare = app.post("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).await.expect(200);
    assert_eq!(bare["tokens"].as_array().unwrap()[..], tokens["tokens"].as_array().unwrap()[1..]);
    let back = app.post("/detokenize", &json!({"tokens": bare["tokens"]})).await.expect(200);
    assert_eq!(back, json!({"prompt": text}));
    for tokens in [json!([VOCABULARY]), json!([-1]), json!("5")] {
        let error = app.post("/detokenize", &json!({"tokens": tokens})).await.expect(400);
        assert!(error["error"]["param"].as_str().unwrap().starts_with("tokens"), "{error}");
    }
    let info = app.get("/tokenizer_info").await.expect(200);
    assert_eq!(info, json!({"bos_token": "<s>", "eos_token": "</s>", "model_max_length": CONTEXT}));
}

#[tokio::test]
async fn health_and_version_answer() {
    let app = App::new();
    assert_eq!(app.get("/health").await.expect(200), json!({"status": "ok"}));
    assert_eq!(app.get("/version").await.expect(200), json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test]
async fn a_harmless_request_id_is_given_back_and_any_other_replaced() {
    let app = App::new();
    let ask = |id: &str| {
        let request = Request::get("/health").header("x-request-id", id).body(Body::empty()).unwrap();
        app.send(request)
    };
    assert_eq!(ask("client-1.a_B").await.header("x-request-id"), "client-1.a_B");
    for odd in ["", "a b", "a\"b", "é", &"x".repeat(129)] {
        let given = ask(odd).await;
        let id = given.header("x-request-id");
        assert!(id.starts_with("req-") && id != odd, "{odd:?} became {id:?}");
    }
    let answer = app.post(COMPLETIONS, &json!({"prompt": 5})).await;
    assert!(answer.header("x-request-id").starts_with("req-"), "errors have one too");
}
