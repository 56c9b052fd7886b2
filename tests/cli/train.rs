//! `lonas train` as a process, up to a server over what it has made.

use super::process::{Server, lonas};
use crate::tiny::Tiny;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

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
    command(tiny, folder, &[&["--epochs", "1"], more].concat()).output().unwrap()
}

/// Training on a dozen examples, two of them held out.
fn command(tiny: &Tiny, folder: &Path, more: &[&str]) -> Command {
    let (data, space_file) = (folder.join("data.json"), folder.join("space.json"));
    let example = |i: usize| {
        let yes = "yes ".repeat(i % 3 + 1);
        json!({
            "instruction": format!("Please answer the question: say {i}\n\nAnswer1: {yes} Answer2: no\n\nAnswer format: answer1/answer2"),
            "output": yes, "answer": format!("answer{}", i % 2 + 1),
        })
    };
    std::fs::write(&data, Value::from_iter((0..12).map(example)).to_string()).unwrap();
    std::fs::write(&space_file, space().to_string()).unwrap();
    let (base, out) = (tiny.base(), folder.join("mine"));
    let paths = [("--base", &base), ("--data", &data), ("--space", &space_file), ("--out", &out)];
    let mut command = lonas(&["train", "--threads", "2", "--validation", "2", "--cutoff", "100"]);
    for (option, path) in paths {
        command.arg(option).arg(path);
    }
    command.args(more);
    command
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
    let first = train(&tiny, folder.path(), &["--reorder", "--accumulation", "2"]);
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

    let again = train(&tiny, folder.path(), &["--reorder", "--accumulation", "2"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("finished super-network"), "{}", said(&again));

    let replaced = train(&tiny, folder.path(), &["--overwrite", "--seed", "7", "--accumulation", "2"]);
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
        (["--sampling=sandwich", "--accumulation=3"], "accumulation"),
        (["--distill", "--sampling=maximal"], "distill"),
        (["--max-tokens", "9"], "--epochs"),
    ] {
        let refused = train(&tiny, folder.path(), &more);
        // What contradicts itself on the command line is a question of usage.
        assert_eq!(refused.status.code(), Some(if named == "--epochs" { 2 } else { 1 }));
        assert!(said(&refused).contains(named), "{}", said(&refused));
        assert!(!folder.path().join("mine").exists());
    }
    // Three micro-batches are no optimizer step.
    let refused = train(&tiny, folder.path(), &[]);
    assert!(said(&refused).contains("nothing would be learnt: of 3"), "{}", said(&refused));
    assert!(!folder.path().join("mine/supernet.json").exists());
}

/// The log's micro-batches.
fn micro_batches(folder: &Path) -> Vec<Value> {
    let log = std::fs::read_to_string(folder.join("mine/train.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|l| l["kind"] == "micro_batch").collect()
}

#[test]
fn the_best_recipe_killed_and_gone_on_with_leaves_the_same_bytes() {
    let (tiny, through, killed) = (Tiny::write(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Checkpoints after every optimizer step, and steps enough to be killed among them.
    let with = [
        "--recipe",
        "best",
        "--form",
        "short",
        "--response-only",
        "--max-tokens",
        "30000",
        "--checkpoint-every",
        "0",
    ];
    let whole = command(&tiny, through.path(), &with).output().unwrap();
    assert!(whole.status.success(), "{}", said(&whole));
    assert!(said(&whole).contains("losses are over the responses"), "{}", said(&whole));

    let mut process = command(&tiny, killed.path(), &with).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !killed.path().join("mine/checkpoint.safetensors").exists() {
        assert!(Instant::now() < deadline, "it does not come forward");
        std::thread::sleep(Duration::from_millis(2));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(!killed.path().join("mine/supernet.json").exists(), "it was killed before its end");
    let resumed = command(&tiny, killed.path(), &with).output().unwrap();
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert!(said(&resumed).contains("going on from micro-batch"), "{}", said(&resumed));
    for file in ["adapter_model.safetensors", "supernet.json", "train.jsonl", "loss.svg"] {
        let read = |folder: &Path| std::fs::read(folder.join("mine").join(file)).unwrap();
        assert!(read(killed.path()) == read(through.path()), "{file}");
    }
    let card = std::fs::read_to_string(through.path().join("mine/README.md")).unwrap();
    assert!(card.contains("of 30000 asked for") && card.contains("in falling importance"), "{card}");
    let done = micro_batches(through.path());
    let tokens = |lines: &[Value]| lines.iter().map(|l| l["trained_tokens"].as_u64().unwrap()).sum::<u64>();
    assert!(tokens(&done) >= 30000 && tokens(&done[..done.len() - 4]) < 30000);
    assert!(done.chunks(2).all(|pair| pair[0]["distilled"].is_null() && pair[1]["distilled"] == true));
}
