//! `/v1/chat/completions`: what only chat has.

use super::app::{App, CHAT, Options, tokens};
use crate::tiny::CONTEXT;
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn a_conversation_is_what_its_template_writes() {
    let app = App::new();
    let messages = json!([
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]);
    let chat = app.chat(json!({"messages": messages, "temperature": 0, "max_tokens": 20})).await;
    // The template writes <s> itself, so the tokenizer must not put a second one in front.
    let rendered = "<s>system: be short\nuser: one\ntwo\nassistant: three\nuser: four\nassistant:";
    let body = json!({"prompt": rendered, "add_special_tokens": false, "temperature": 0, "max_tokens": 20});
    let completion = app.complete(body).await;
    assert_eq!(content(&chat), completion["choices"][0]["text"]);
    assert_eq!(tokens(&chat["usage"]), tokens(&completion["usage"]));
    let unopened = json!({"messages": messages, "add_generation_prompt": false, "max_tokens": 1});
    let opening = app.encode("assistant:").len() - app.encode("").len();
    let prompt = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(prompt(&app.chat(unopened).await) + opening as u64, prompt(&chat));
}

#[tokio::test]
async fn an_answer_may_be_as_long_as_the_context_allows() {
    let app = App::new();
    let free = app.chat(json!({"messages": user("one"), "ignore_eos": true})).await;
    assert_eq!(free["usage"]["total_tokens"], CONTEXT);
    assert_eq!(free["choices"][0]["finish_reason"], "length");
    for (most, expected) in
        [(json!({"max_tokens": 7}), 7), (json!({"max_completion_tokens": 5, "max_tokens": 9}), 5)]
    {
        let mut body = json!({"messages": user("one"), "ignore_eos": true});
        body.as_object_mut().unwrap().extend(most.as_object().unwrap().clone());
        assert_eq!(app.chat(body).await["usage"]["completion_tokens"], expected);
    }
}

#[tokio::test]
async fn the_tokens_log_probabilities_spell_the_content() {
    let app = App::new();
    let bias = (67..77).map(|t| (t.to_string(), json!(8))).collect::<serde_json::Map<_, _>>();
    let body = json!({"messages": user("one"), "seed": 2, "max_tokens": 40, "ignore_eos": true, "logprobs": true,
                      "top_logprobs": 3, "logit_bias": bias});
    let answer = app.chat(body).await;
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 40);
    let bytes = |token: &Value| serde_json::from_value::<Vec<u8>>(token["bytes"].clone()).unwrap();
    let visible = tokens.iter().filter(|t| !["<pad>", "<s>", "</s>"].contains(&t["token"].as_str().unwrap()));
    let all = visible.flat_map(bytes).collect::<Vec<_>>();
    assert_eq!(String::from_utf8_lossy(&all), content(&answer));
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        let values = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect::<Vec<_>>();
        assert!(values.is_sorted_by(|a, b| a >= b), "{values:?}");
        assert!(token["logprob"].as_f64().unwrap() <= values[0]);
        assert_eq!(String::from_utf8_lossy(&bytes(token)), token["token"].as_str().unwrap());
    }
}

#[tokio::test]
async fn every_required_key_is_there() {
    let app = App::new();
    let answer = app.chat(json!({"messages": user("one"), "max_tokens": 3})).await;
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let set = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    let expected = ["choices", "created", "elastic", "id", "model", "object", "system_fingerprint", "usage"];
    assert_eq!(keys(&answer), set(&expected));
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &answer["choices"][0];
    assert_eq!(keys(choice), set(&["finish_reason", "index", "logprobs", "message", "stop_reason"]));
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(keys(&choice["message"]), set(&["content", "refusal", "role"]));
    assert_eq!(choice["message"]["role"], "assistant");
}

#[tokio::test]
async fn what_the_template_refuses_is_the_clients_error() {
    let app = App::new();
    let body = json!({"messages": [{"role": "assistant", "content": "me first"}]});
    let error = app.post(CHAT, &body).await.expect(400);
    assert_eq!(error["error"]["param"], "messages");
    assert!(error["error"]["message"].as_str().unwrap().contains("the assistant cannot begin"), "{error}");
}

#[tokio::test]
async fn a_base_without_a_chat_template_answers_completions_only() {
    let app = App::with(Options { chat: false, ..Options::default() });
    let error = app.post(CHAT, &json!({"messages": user("one")})).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("/v1/completions"), "{error}");
    assert_eq!(app.complete(json!({"prompt": "one"})).await["object"], "text_completion");
}

#[tokio::test]
async fn stop_strings_and_seeds_work_as_in_completions() {
    let app = App::new();
    let ask = |stop: Value| json!({"messages": user("one"), "seed": 4, "max_tokens": 40, "ignore_eos": true, "stop": stop});
    let free = app.chat(ask(Value::Null)).await;
    let text = content(&free);
    assert_eq!(content(&app.chat(ask(Value::Null)).await), text);
    let stop = text.chars().skip(4).take(2).collect::<String>();
    let answer = app.chat(ask(json!(stop))).await;
    assert_eq!(content(&answer), &text[..text.find(&stop).unwrap()]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], stop);
}
