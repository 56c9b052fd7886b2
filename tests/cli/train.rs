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
fn an_adapter_of_somebody_else_is_not_trained_over() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    let out = folder.path().join("mine");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("adapter_model.safetensors"), "hours of work").unwrap();
    for more in [&[][..], &["--overwrite"]] {
        let refused = train(&tiny, folder.path(), more);
        assert_eq!(refused.status.code(), Some(1));
        assert!(said(&refused).contains("holds adapter_model.safetensors"), "{}", said(&refused));
    }
    assert_eq!(std::fs::read(out.join("adapter_model.safetensors")).unwrap(), b"hours of work");
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

/// Waits until a file is there.
fn wait_for(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        assert!(Instant::now() < deadline, "there is no {}", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    names.sort();
    names
}

/// Long enough to meet it while it runs, with a checkpoint after each optimizer step.
const LONG: [&str; 4] = ["--max-tokens", "60000", "--checkpoint-every", "0"];

#[test]
fn one_training_has_a_folder() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    let out = folder.path().join("mine");
    let first = command(&tiny, folder.path(), &LONG).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&out.join("checkpoint.safetensors"));
    let second = command(&tiny, folder.path(), &[&LONG[..], &["--overwrite"]].concat()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains("mine: another process is writing to it"), "{}", said(&second));
    let first = first.wait_with_output().unwrap();
    assert!(first.status.success(), "{}", said(&first));
    assert_eq!(
        names(&out),
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "catalog.json",
            "loss.svg",
            "supernet.json",
            "train.jsonl"
        ]
    );
}

#[test]
fn what_has_come_into_the_folder_meanwhile_is_not_trained_over() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    let out = folder.path().join("mine");
    let process = command(&tiny, folder.path(), &LONG).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&out.join("checkpoint.safetensors"));
    std::fs::write(out.join("supernet.json"), "somebody else's").unwrap();
    let refused = process.wait_with_output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("holds a finished super-network"), "{}", said(&refused));
    assert_eq!(std::fs::read(out.join("supernet.json")).unwrap(), b"somebody else's");
    std::fs::remove_file(out.join("supernet.json")).unwrap();
    let resumed = command(&tiny, folder.path(), &LONG).output().unwrap();
    assert!(resumed.status.success() && said(&resumed).contains("going on from"), "{}", said(&resumed));
}

#[test]
fn another_training_s_checkpoint_is_told_apart_and_replaced_only_when_asked_to() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    let out = folder.path().join("mine");
    let mut process = command(&tiny, folder.path(), &LONG).stderr(Stdio::null()).spawn().unwrap();
    wait_for(&out.join("checkpoint.safetensors"));
    process.kill().unwrap();
    process.wait().unwrap();
    std::fs::write(out.join("checkpoint.safetensorsAbC123.partial"), "half").unwrap();
    let refused = train(&tiny, folder.path(), &["--seed", "7", "--accumulation", "2"]);
    assert_eq!(refused.status.code(), Some(1));
    for named in ["seed was 42, not 7", "max tokens was 60000, not none", "--overwrite"] {
        assert!(said(&refused).contains(named), "{named}: {}", said(&refused));
    }
    assert!(!names(&out).iter().any(|name| name.ends_with(".partial")), "{:?}", names(&out));
    let config = tiny.base().join("config.json");
    let before = std::fs::read(&config).unwrap();
    let mut changed: Value = serde_json::from_slice(&before).unwrap();
    changed["rms_norm_eps"] = json!(1e-3);
    std::fs::write(&config, changed.to_string()).unwrap();
    let refused = command(&tiny, folder.path(), &LONG).output().unwrap();
    assert!(
        said(&refused).contains("(the base's configuration or tokenizer: not the same)"),
        "{}",
        said(&refused)
    );
    std::fs::write(&config, before).unwrap();
    let anew = train(&tiny, folder.path(), &["--seed", "7", "--accumulation", "2", "--overwrite"]);
    assert!(anew.status.success() && said(&anew).contains("starting over"), "{}", said(&anew));
    assert_eq!(validated(folder.path()), [0, 3]);
    assert!(!out.join("checkpoint.safetensors").exists());
}

#[test]
fn a_folder_that_cannot_be_written_to_is_named_before_anything_is_read() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("mine"), "a file").unwrap();
    std::fs::rename(tiny.base(), folder.path().join("gone")).unwrap();
    let refused = train(&tiny, folder.path(), &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("mine: ") && !said(&refused).contains("base"), "{}", said(&refused));
    // And a folder that was made for a training that never began goes again.
    std::fs::remove_file(folder.path().join("mine")).unwrap();
    let refused = train(&tiny, folder.path(), &[]);
    let said = said(&refused);
    assert!(
        said.contains("the base, which --base (LONAS_BASE) names: ") && said.contains("No such file"),
        "{said}"
    );
    assert!(!folder.path().join("mine").exists());
}

#[test]
fn a_base_is_found_from_any_folder() {
    let (tiny, folder) = (Tiny::write(), tempfile::tempdir().unwrap());
    let whole = command(&tiny, folder.path(), &["--epochs", "1", "--accumulation", "2"]);
    let mut relative = lonas(&[]);
    let arguments = whole.get_args().map(|a| if a == tiny.base() { "base".as_ref() } else { a });
    relative.args(arguments).current_dir(tiny.base().parent().unwrap());
    let trained = relative.output().unwrap();
    assert!(trained.status.success(), "{}", said(&trained));
    let inspect = || lonas(&["inspect"]).arg(folder.path().join("mine")).current_dir("/").output().unwrap();
    assert!(inspect().status.success(), "{}", said(&inspect()));
    std::fs::rename(tiny.base(), folder.path().join("gone")).unwrap();
    let said = said(&inspect());
    assert!(said.contains("the base, which ") && said.contains("mine/supernet.json names: "), "{said}");
}
