//! `lonas serve` of models that classify, against PyTorch + PEFT.

use super::process::{Server, lonas};
use crate::golden;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Two super-adapters of one base, each with its own number of labels.
pub(crate) const NAMES: [(&str, usize); 2] = [("tiny-bert", 2), ("tiny-bert-three", 3)];

/// The base with a tokenizer that knows as many tokens as the model.
pub(crate) fn base(folder: &Path) {
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden::path("tiny-bert/base").join(name), folder.join(name)).unwrap();
    }
    let mut tokenizer: Value = golden::json("tokenizer/word-piece.json");
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for id in vocabulary.len()..97 {
        vocabulary.insert(format!("[unused{id}]"), json!(id));
    }
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

pub(crate) fn ask(server: &Server, body: &Value) -> Value {
    let (head, answer) = server.post("/v1/classify", body);
    assert!(head.starts_with("HTTP/1.1 200"), "{head} {answer}");
    serde_json::from_str(&answer).unwrap()
}

pub(crate) fn probs(answer: &Value) -> Vec<Vec<f32>> {
    let inputs = answer["data"].as_array().unwrap().iter();
    inputs.map(|one| serde_json::from_value(one["probs"].clone()).unwrap()).collect()
}

#[test]
fn a_berts_sub_networks_classify_over_http_as_in_pytorch() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    let models = NAMES.map(|(name, _)| golden::path(name).join("supernet"));
    let [one, two] = [0, 1].map(|i| models[i].to_str().unwrap());
    let base = folder.path().to_str().unwrap();
    let server = Server::start(&[one, two, "--base", base, "--dtype", "f32", "--admin-key", "secret"]);
    for (name, labels) in NAMES {
        let cases: Value = golden::json(&format!("{name}/cases.json"));
        let expected: BTreeMap<String, Vec<f32>> = golden::tensors(&format!("{name}/logits.safetensors"));
        // Token ids have no types on this way, so pairs are left to the tests of the model.
        let texts = cases["texts"].as_array().unwrap().iter().enumerate();
        let texts = texts.filter(|(_, t)| t["token_types"].as_array().unwrap().iter().all(|kind| kind == 0));
        let (places, inputs): (Vec<_>, Vec<_>) = texts.map(|(at, text)| (at, text["tokens"].clone())).unzip();
        assert!(places.len() > 1);
        for case in cases["cases"].as_array().unwrap() {
            let sub_network = case["name"].as_str().unwrap();
            let line = json!({"model": name, "name": sub_network, "choices": case["choices"]});
            if sub_network.starts_with("random") {
                let (head, answer) = server.send("POST", "/v1/subnetworks", "secret", &line);
                // Two random ones may be the same sub-network under two names.
                assert!(head.starts_with("HTTP/1.1 201"), "{head} {answer}");
            }
            let model = format!("{name}:{sub_network}");
            let answer = ask(&server, &json!({"model": model, "input": inputs, "use_activation": false}));
            assert_eq!(
                (&answer["model"], &answer["elastic"]["served"]),
                (&json!(model), &json!(sub_network))
            );
            for (place, ours) in places.iter().zip(probs(&answer)) {
                let off = golden::distance(&ours, &expected[&format!("{sub_network}/{place}")]);
                assert!(ours.len() == labels && off <= 1e-4, "{model} {place}: off by {off}");
            }
        }
    }
    let (status, log) = server.end_by("TERM");
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn a_bert_reads_texts_and_pairs_and_continues_none() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    let model = golden::path("tiny-bert/supernet");
    let server = Server::start(&[model.to_str().unwrap(), "--base", folder.path().to_str().unwrap()]);
    let pair = json!({"text": "the cat sat", "text_pair": "on the mat"});
    let answer = ask(&server, &json!({"input": [pair, "the cat sat", "the cat sat", "on the mat"]}));
    let all = probs(&answer);
    assert!(all.iter().all(|probs| (probs.iter().sum::<f32>() - 1.0).abs() < 1e-6), "{all:?}");
    assert_eq!(all[1], all[2]);
    assert!(all[0] != all[1] && all[0] != all[3], "{all:?}");
    assert_eq!(answer["data"][0]["num_classes"], 2);
    // A text of 32 tokens at most.
    let (head, error) = server.post("/v1/classify", &json!({"input": ["the", "the cat ".repeat(40)]}));
    assert!(head.starts_with("HTTP/1.1 400") && error.contains("input[1] has"), "{head} {error}");
    let cut = json!({"input": "the cat ".repeat(40), "truncate_prompt_tokens": -1});
    assert_eq!(ask(&server, &cut)["usage"]["total_tokens"], 32);
    let (head, error) = server.post("/v1/completions", &json!({"prompt": "the cat"}));
    assert!(head.starts_with("HTTP/1.1 400") && error.contains("/v1/classify"), "{head} {error}");
    let (_, card) = server.get("/v1/models/tiny-bert");
    let card: Value = serde_json::from_str(&card).unwrap();
    assert_eq!((&card["task"], &card["labels"]), (&json!("classify"), &json!(["LABEL_0", "LABEL_1"])));
}

#[test]
fn a_model_of_another_base_is_not_served_as_a_classifier() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    let model = golden::path("tiny-tied/supernet");
    let output =
        lonas(&["serve", model.to_str().unwrap(), "--base", folder.path().to_str().unwrap()]).output();
    let said = String::from_utf8(output.as_ref().unwrap().stderr.clone()).unwrap();
    assert_eq!(output.unwrap().status.code(), Some(1), "{said}");
    assert!(said.contains("supernet.json") || said.contains("adapter"), "{said}");
}
