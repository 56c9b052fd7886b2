//! `lonas serve`: start, stop, wrong usage.

use super::process::{Server, lonas};
use crate::files::Folder;
use crate::golden;
use crate::tiny::{NAME, OTHER, Tiny, X};
use serde_json::{Value, json};
use std::process::Output;

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = lonas(arguments).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn sigterm_and_ctrl_c_end_it_with_0() {
    let tiny = Tiny::write();
    for signal in ["TERM", "INT"] {
        let server = Server::start(&[tiny.model(NAME).to_str().unwrap()]);
        let (head, health) = server.get("/health");
        assert!(head.starts_with("HTTP/1.1 200") && health == "{\"status\":\"ok\"}", "{head} {health}");
        let (status, log) = server.end_by(signal);
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(log.contains("draining") && log.contains("stopped"), "{log}");
    }
}

#[test]
fn two_model_folders_share_one_base() {
    let tiny = Tiny::write();
    let folders = [NAME, OTHER].map(|name| tiny.model(name));
    let [one, other] = [0, 1].map(|i| folders[i].to_str().unwrap());
    let server = Server::start(&[one, other, "--default-subnetwork", "minimal"]);
    let (_, models) = server.get("/v1/models");
    let models: serde_json::Value = serde_json::from_str(&models).unwrap();
    let ids =
        models["data"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(ids.len(), 8);
    assert!(ids.contains(&"tiny-tied:heuristic") && ids.contains(&"tiny-other:minimal"), "{ids:?}");
    assert_eq!(models["data"][0]["elastic"]["subnetwork"], "minimal", "the default that was asked for");
}

#[test]
fn model_folders_that_order_the_base_differently_are_refused() {
    // By layer: the same order of another layer's heads is another one.
    let folder = |name: &str, orders: Value| {
        let folder = Folder::copy_of("tiny-heads-ordered/supernet");
        folder.edit_json("supernet.json", |j| {
            j["name"] = name.into();
            j["orders"] = orders;
            j["base"]["source"]["path"] = golden::path("tiny-heads/base").to_str().unwrap().into();
        });
        folder
    };
    let first = folder("one", json!({ "6": [2, 1, 0] }));
    for other in [json!({ "7": [2, 1, 0] }), json!({ "6": [2, 0, 1] }), json!({})] {
        let second = folder("other", other);
        let [one, other] = [&first, &second].map(|f| f.path().to_str().unwrap());
        let (status, said) = run(&["serve", one, other]);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains("heads differently") && said.contains(&format!("--order {one}")), "{said}");
    }
    // The same order lets them through to what this base lacks, a tokenizer.
    let second = folder("other", json!({ "6": [2, 1, 0] }));
    let [one, other] = [&first, &second].map(|f| f.path().to_str().unwrap());
    let (status, said) = run(&["serve", one, other]);
    assert!(status == Some(1) && said.contains("tokenizer") && !said.contains("differently"), "{said}");
}

#[test]
fn a_merged_adapter_serves_the_sub_networks_with_all_ranks() {
    let tiny = Tiny::write();
    let server = Server::start(&[tiny.model(NAME).to_str().unwrap(), "--merge-adapter", "--dtype", "f32"]);
    let (_, models) = server.get("/v1/models");
    assert!(models.contains("tiny-tied:maximal") && !models.contains("tiny-tied:minimal"), "{models}");
}

#[test]
fn api_keys_and_settings_may_come_from_a_file() {
    let tiny = Tiny::write();
    let file = tiny.base().join("lonas.toml");
    std::fs::write(&file, "[serve]\napi-key = [\"one\", \"two\"]\n").unwrap();
    let server = Server::start(&[tiny.model(NAME).to_str().unwrap(), "--settings", file.to_str().unwrap()]);
    assert!(server.get("/v1/models").0.starts_with("HTTP/1.1 401"));
    assert!(server.get("/health").0.starts_with("HTTP/1.1 200"));
}

#[test]
fn sub_networks_come_and_go_with_an_admin_key_and_stay_if_they_are_to() {
    let tiny = Tiny::write();
    let model = tiny.model(NAME);
    let model = model.to_str().unwrap();
    let server = Server::start(&[model, "--admin-key", "secret"]);
    let (_, minimal) = server.get("/v1/subnetworks/minimal");
    let minimal: serde_json::Value = serde_json::from_str(&minimal).unwrap();
    // With one super-adapter its name may be left out.
    let mut body = serde_json::json!({"name": "passing", "choices": minimal["choices"]});
    let status = |(head, _): &(String, String)| head[9..12].to_string();
    assert_eq!(status(&server.send("POST", "/v1/subnetworks", "wrong", &body)), "401");
    assert_eq!(status(&server.send("POST", "/v1/subnetworks", "secret", &body)), "201");
    (body["name"], body["persist"]) = ("lasting".into(), true.into());
    assert_eq!(status(&server.send("POST", "/v1/subnetworks", "secret", &body)), "201");
    assert_eq!(status(&server.get("/v1/models/tiny-tied:passing")), "200");
    assert_eq!(status(&server.send("DELETE", "/v1/subnetworks/passing", "secret", &body)), "200");
    assert_eq!(status(&server.get("/v1/subnetworks/passing")), "404");
    let (_, log) = server.end_by("TERM");
    assert!(log.contains("registered tiny-tied:lasting, in the catalog too"), "{log}");
    let again = Server::start(&[model]);
    assert_eq!(status(&again.get("/v1/subnetworks/lasting")), "200");
    assert_eq!(status(&again.send("DELETE", "/v1/subnetworks/lasting", "secret", &body)), "403");
}

#[test]
fn a_merged_adapter_takes_sub_networks_with_all_ranks_only() {
    let tiny = Tiny::write();
    let model = tiny.model(NAME);
    let arguments = [model.to_str().unwrap(), "--merge-adapter", "--dtype", "f32", "--admin-key", "secret"];
    let server = Server::start(&arguments);
    let plain = Server::start(&arguments[..1]);
    let choices = |name: &str| -> Vec<usize> {
        let (_, card) = plain.get(&format!("/v1/subnetworks/{name}"));
        let card: serde_json::Value = serde_json::from_str(&card).unwrap();
        serde_json::from_value(card["choices"].clone()).unwrap()
    };
    let (maximal, minimal) = (choices("maximal"), choices("minimal"));
    let register = |name: &str, choices: &[usize]| {
        server.send(
            "POST",
            "/v1/subnetworks",
            "secret",
            &serde_json::json!({"name": name, "choices": choices}),
        )
    };
    let (head, said) = register("mine", &minimal);
    assert!(head.contains(" 400 ") && said.contains("--merge-adapter"), "{head} {said}");
    // Of the widths alone as many as wanted.
    let supernet = std::fs::read_to_string(model.join("supernet.json")).unwrap();
    let supernet: serde_json::Value = serde_json::from_str(&supernet).unwrap();
    let groups = supernet["groups"].as_array().unwrap().iter();
    let narrow = groups.enumerate().map(|(i, g)| if g["kind"] == "width" { minimal[i] } else { maximal[i] });
    let narrow = narrow.collect::<Vec<_>>();
    assert_ne!(narrow, maximal);
    let (head, said) = register("mine", &narrow);
    assert!(head.contains(" 201 "), "{head} {said}");
    let question = serde_json::json!({"model": "tiny-tied:mine", "prompt": "one", "max_tokens": 3});
    assert!(server.post("/v1/completions", &question).0.contains(" 200 "));
}

#[test]
fn wrong_usage_ends_with_2() {
    for arguments in
        [&["serve", "--port", "x"][..], &["serve", "--no-such-option"], &["no-such-command"], &[]]
    {
        let (code, said) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains("--help") || said.contains("Usage"), "what to do instead: {said}");
    }
}

#[test]
fn what_cannot_be_served_ends_with_1_and_is_named() {
    let tiny = Tiny::write();
    let model = tiny.model(NAME);
    let model = model.to_str().unwrap();
    let other = tiny.model(OTHER);
    let other = other.to_str().unwrap();
    let cases: [(&[&str], &str); 9] = [
        (&["serve", model, "--api-key", "one,two", "--admin-key", "two"], "--api-key too"),
        (&["serve", model, other, "--merge-adapter", "--dtype", "f32"], "one model folder"),
        (&["serve", model, "--merge-adapter"], "--dtype f32, bf16 or int8"),
        (
            &["serve", model, "--merge-adapter", "--dtype", "f32", "--default-subnetwork", "minimal"],
            "`tiny-tied` has maximal",
        ),
        (&["serve", "no/such/folder"], "no/such/folder"),
        (&["serve", model, "--base", "no/such/base"], "no/such/base"),
        (&["serve", model, "--default-subnetwork", "huge"], "huge"),
        (&["serve", model, model], "both named `tiny-tied`"),
        (&["serve", model, "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ];
    for (arguments, named) in cases {
        let (code, said) = run(arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {said}");
        assert!(said.contains(named), "{arguments:?}: {said}");
    }
}

#[test]
fn a_base_without_a_tokenizer_is_named() {
    let tiny = Tiny::write();
    std::fs::remove_file(tiny.base().join("tokenizer.json")).unwrap();
    let (code, said) = run(&["serve", tiny.model(NAME).to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("tokenizer.json"), "{said}");
}

#[test]
fn help_says_how_with_an_example() {
    for command in ["serve", "train", "eval", "export", "bench", "inspect"] {
        let output = lonas(&[command, "--help"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{command}");
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.contains("Example") && help.contains(&format!("lonas {command}")), "{help}");
    }
}

#[test]
fn a_token_that_only_generation_config_names_ends_a_text() {
    let tiny = Tiny::write();
    let ask = json!({"model": NAME, "prompt": "one", "max_tokens": 4, "logit_bias": {X.to_string(): 100}});
    let finish = || {
        let (_, answer) = Server::start(&[tiny.model(NAME).to_str().unwrap()]).post("/v1/completions", &ask);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["choices"][0]["finish_reason"].clone()
    };
    assert_eq!(finish(), "length");
    std::fs::write(tiny.base().join("generation_config.json"), json!({"eos_token_id": [X]}).to_string())
        .unwrap();
    assert_eq!(finish(), "stop");
}

#[test]
fn a_chat_template_that_does_not_parse_costs_chat_only() {
    let tiny = Tiny::write();
    std::fs::write(tiny.base().join("chat_template.jinja"), "{% nonsense %}").unwrap();
    let server = Server::start(&[tiny.model(NAME).to_str().unwrap()]);
    let (head, body) = server.post("/v1/completions", &json!({"model": NAME, "prompt": "one"}));
    assert!(head.starts_with("HTTP/1.1 200"), "{head} {body}");
    let chat = json!({"model": NAME, "messages": [{"role": "user", "content": "one"}]});
    let (head, body) = server.post("/v1/chat/completions", &chat);
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(
        body.contains("does not parse") && body.contains("nonsense") && body.contains("/v1/completions"),
        "{body}"
    );
}
