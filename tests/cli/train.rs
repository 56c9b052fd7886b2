//! `lonas train` as a process, up to a server over what it has made.

use super::process::{Server, lonas};
use crate::tiny::Tiny;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Output;

/// A search space of the tiny base.
fn space() -> Value {
    json!({
        "rank": 4, "alpha": 8, "targets": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "groups": [
            {"kind": "rank", "modules": ["q_proj"], "choices": [4, 2]},
            {"kind": "width", "modules": ["gate_proj", "up_proj"], "choices": [80, 48]},
        ]
    })
}

/// Trains on a dozen examples for one epoch: three micro-batches.
fn train(tiny: &Tiny, folder: &Path, more: &[&str]) -> Output {
    let (data, space_file) = (folder.join("data.json"), folder.join("space.json"));
    let example = |i: usize| json!({"instruction": format!("say {i}"), "output": "yes ".repeat(i % 3 + 1)});
    std::fs::write(&data, Value::from_iter((0..12).map(example)).to_string()).unwrap();
    std::fs::write(&space_file, space().to_string()).unwrap();
    let (base, out) = (tiny.base(), folder.join("mine"));
    let paths = [("--base", &base), ("--data", &data), ("--space", &space_file), ("--out", &out)];
    let mut command =
        lonas(&["train", "--threads", "2", "--epochs", "1", "--validation", "2", "--cutoff", "100"]);
    for (option, path) in paths {
        command.arg(option).arg(path);
    }
    command.args(more).output().unwrap()
}

/// The micro-batches after which the log has a validation.
fn validated(folder: &Path) -> Vec<u64> {
    let log = std::fs::read_to_string(folder.join("mine/train.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|l| l["kind"] == "validation").map(|l| l["micro_batch"].as_u64().unwrap()).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_training_leaves_a_folder_that_can_be_served_and_is_not_trained_over() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    let first = train(&tiny, folder.path(), &["--reorder"]);
    assert!(first.status.success(), "{}", said(&first));
    assert_eq!(validated(folder.path()), [0, 3]);
    let out = folder.path().join("mine");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("10 sequences") && card.contains("in falling importance"), "{card}");
    assert!(!out.join("checkpoint.safetensors").exists());

    let server = Server::start(&[out.to_str().unwrap()]);
    let (_, models) = server.get("/v1/models");
    assert!(models.contains("\"mine:minimal\""), "{models}");
    drop(server);

    let again = train(&tiny, folder.path(), &["--reorder"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("finished super-network"), "{}", said(&again));

    let replaced = train(&tiny, folder.path(), &["--overwrite", "--seed", "7"]);
    assert!(replaced.status.success(), "{}", said(&replaced));
    assert_eq!(validated(folder.path()), [0, 3], "nothing of the first training is left in the log");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("the base's own") && card.contains("seed 7"), "{card}");
}

#[test]
fn what_no_training_could_use_is_refused_before_it_begins() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    for (more, named) in [
        (["--dropout", "1"], "dropout"),
        (["--learning-rate", "nan"], "learning rate"),
        (["--micro-batch", "0"], "micro-batch"),
    ] {
        let refused = train(&tiny, folder.path(), &more);
        assert_eq!(refused.status.code(), Some(1));
        assert!(said(&refused).contains(named), "{}", said(&refused));
        assert!(!folder.path().join("mine").exists());
    }
}
