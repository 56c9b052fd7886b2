//! `lonas eval` as a process: what it writes and prints, that a killed evaluation goes on, what it refuses.

use super::process::lonas;
use crate::tiny::{NAME, Tiny};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A task file of so many questions, some in LLM-Adapters' form, some in the short one's own.
fn file(tiny: &Tiny, questions: usize) -> PathBuf {
    let path = tiny.base().join(format!("task-{questions}.json"));
    let item = |i: usize| {
        let options = ["the red one", "in there", "no", "it is on"];
        let (a, b) = (options[i % 4], options[(i / 4 + i + 1) % 4]);
        if a == b || i.is_multiple_of(2) {
            return json!({"question": format!("is {i} in?"), "choices": ["at it", "the end", "no"], "answer": i % 3});
        }
        json!({
            "instruction": format!("Please choose the correct answer to the question: is {i} {b}?\n\nAnswer1: {a} Answer2: {b}\n\nAnswer format: answer1/answer2"),
            "output": "the correct answer is answer1", "answer": "answer1",
        })
    };
    std::fs::write(&path, Value::from_iter((0..questions).map(item)).to_string()).unwrap();
    path
}

fn command(tiny: &Tiny, task: &Path, more: &[&str]) -> Command {
    let mut command = lonas(&["eval"]);
    command.arg(tiny.model(NAME)).args(["--threads", "1", "--task"]).arg(format!("dev={}", task.display()));
    command.args(more);
    command
}

fn eval(tiny: &Tiny, task: &Path, more: &[&str]) -> Output {
    command(tiny, task, more).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn records(tiny: &Tiny) -> PathBuf {
    tiny.model(NAME).join("eval.jsonl")
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn catalog(tiny: &Tiny) -> Vec<Value> {
    let text = std::fs::read_to_string(tiny.model(NAME).join("catalog.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn results_go_into_catalog_records_and_json_and_are_computed_once() {
    let tiny = Tiny::write();
    let task = file(&tiny, 9);
    let all = json_of(&eval(&tiny, &task, &["--json"]));
    assert_eq!((&all["computed"], &all["model"]), (&27.into(), &NAME.into()));
    let results = all["results"].as_array().unwrap();
    assert_eq!(results.len(), 3);
    for (result, entry) in results.iter().zip(catalog(&tiny)) {
        assert_eq!((&result["method"], &result["form"]), (&"likelihood".into(), &"short".into()));
        assert_eq!((&result["metric"], &result["count"]), (&"accuracy".into(), &9.into()));
        let kept = &entry["evaluations"][0];
        for field in ["task", "method", "form", "metric", "count", "file_sha256", "items_sha256"] {
            assert_eq!(kept[field], result[field], "{field}");
        }
        let near = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4;
        assert!(near(&kept["value"], &result["value"]) && near(&entry["scores"]["dev"], &result["value"]));
        assert!(near(&kept["interval95"][1], &result["interval95"][1]));
        assert!(near(&kept["details"]["answer_loss"], &result["details"]["answer_loss"]));
    }
    // Settings of three sub-networks and their nine items each; accuracy can be counted again from them.
    let written = lines(&records(&tiny));
    let settings = written.iter().filter(|l| l.get("setting").is_some()).collect::<Vec<_>>();
    assert_eq!((settings.len(), written.len()), (3, 30));
    assert!(settings[0]["is"]["choices"].is_array() && settings[0]["is"]["adapter_sha256"].is_string());
    let right = written.iter().filter(|line| line["subnetwork"] == "maximal").filter(|line| {
        let logprobs = line["likelihood"]["logprobs"].as_array().unwrap();
        let best = logprobs.iter().map(|p| p.as_f64().unwrap()).enumerate();
        let best = best.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
        line["likelihood"]["correct"] == best
    });
    let value = results.iter().find(|r| r["subnetwork"] == "maximal").unwrap()["value"].as_f64().unwrap();
    assert_eq!(right.count() as f64 / 9.0, value);

    // Nothing is computed twice, whatever the task is called; of a longer file only what is new.
    let again = json_of(&eval(&tiny, &task, &["--json"]));
    assert_eq!((&again["computed"], &again["results"]), (&0.into(), &all["results"]));
    let longer = json_of(&eval(&tiny, &file(&tiny, 12), &["--json", "--subnetwork", "minimal"]));
    assert_eq!((&longer["computed"], &longer["results"][0]["count"]), (&3.into(), &12.into()));
    assert_eq!(lines(&records(&tiny)).len(), 33);
    let table = eval(&tiny, &task, &["--subnetwork", "minimal"]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("answer loss"), "{}", said(&table));
    assert!(said(&table).contains("9 of 9 results are known already"));
}

#[test]
fn a_killed_evaluation_goes_on_and_ends_in_the_same_numbers() {
    let tiny = Tiny::write();
    let task = file(&tiny, 600);
    let through = tiny.base().join("through.jsonl");
    let other = ["--json", "--method", "generation", "--records", through.to_str().unwrap()];
    let expected = json_of(&eval(&tiny, &task, &other));
    let more = ["--json", "--method", "generation"];
    let mut process =
        command(&tiny, &task, &more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let count = || std::fs::read(records(&tiny)).map_or(0, |t| t.iter().filter(|&&b| b == b'\n').count());
    while count() < 40 {
        assert!(Instant::now() < deadline, "it does not come forward");
        std::thread::sleep(Duration::from_millis(1));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    // As if it had been killed in the middle of a line.
    let text = std::fs::read(records(&tiny)).unwrap();
    std::fs::write(records(&tiny), &text[..text.len() - 7]).unwrap();
    let resumed = eval(&tiny, &task, &more);
    assert!(said(&resumed).contains("the last line was not finished"), "{}", said(&resumed));
    let resumed = json_of(&resumed);
    let computed = resumed["computed"].as_u64().unwrap();
    assert!(0 < computed && computed < 1800 - 30, "{computed}");
    assert_eq!(resumed["results"], expected["results"]);
    assert_eq!(resumed["made_of"], expected["made_of"]);
}

#[test]
fn mixing_changes_no_result() {
    let tiny = Tiny::write();
    let task = file(&tiny, 12);
    for method in [
        &["--method", "likelihood"][..],
        &["--method", "loss"],
        &["--method", "generation"],
        &["--method", "generation", "--beams", "3", "--max-new-tokens", "9"],
    ] {
        let run = |more: &[&str]| {
            let all = json_of(&eval(&tiny, &task, &[&["--json", "--dry-run"], method, more].concat()));
            assert_eq!(all["computed"], 36);
            all["results"].clone()
        };
        let mixed = run(&[]);
        assert_eq!(run(&["--one-at-a-time", "text"]), mixed, "{method:?}");
        assert_eq!(run(&["--one-at-a-time", "question"]), mixed, "{method:?}");
    }
    assert!(!records(&tiny).exists() && !tiny.model(NAME).join("catalog.json").exists());
}

#[test]
fn every_method_says_what_it_measures() {
    let tiny = Tiny::write();
    let task = file(&tiny, 8);
    let of = |more: &[&str]| {
        json_of(&eval(&tiny, &task, &[&["--json", "--subnetwork", "minimal"], more].concat()))
    };
    let loss = of(&["--method", "loss"]);
    let result = &loss["results"][0];
    let value = result["value"].as_f64().unwrap();
    assert_eq!(result["metric"], "loss");
    let perplexity = result["details"]["perplexity"].as_f64().unwrap();
    assert!((perplexity - value.exp()).abs() < 1e-9 && result["details"]["response_loss"].is_number());
    let generation = of(&["--method", "generation", "--beams", "2"]);
    assert_eq!(generation["results"][0]["form"], "short, 2 beams");
    assert!(generation["results"][0]["details"]["unanswered"].is_number());
    // Each stands beside the others; only likelihood is what a request's `min_accuracy` goes by.
    let entry = catalog(&tiny).into_iter().find(|e| e["name"] == "minimal").unwrap();
    let methods = entry["evaluations"].as_array().unwrap().iter().map(|e| e["method"].clone());
    assert_eq!(methods.collect::<Vec<_>>(), ["generation", "loss"]);
    assert_eq!(entry["scores"], json!({}));
}

#[test]
fn what_is_a_part_or_another_model_leaves_the_catalog_alone() {
    let tiny = Tiny::write();
    let task = file(&tiny, 6);
    let limited = json_of(&eval(&tiny, &task, &["--json", "--limit", "4"]));
    let bare = json_of(&eval(&tiny, &task, &["--json", "--without-adapter"]));
    assert!(!tiny.model(NAME).join("catalog.json").exists());
    let whole = json_of(&eval(&tiny, &task, &["--json"]));
    let (limited, whole_of) = (&limited["results"][0], &whole["results"][0]);
    assert_eq!((&limited["count"], &whole["computed"]), (&4.into(), &6.into()), "four of six were known");
    assert_eq!(limited["file_sha256"], whole_of["file_sha256"]);
    assert_ne!(limited["items_sha256"], whole_of["items_sha256"]);
    assert_eq!((&bare["computed"], &bare["made_of"]["adapter_sha256"]), (&18.into(), &Value::Null));
}

/// Adds an entry by hand, and a latency to another.
fn change_catalog(tiny: &Tiny, choices: &Value) {
    let latency = json!({"here": {"prefill_seconds_per_token": 1.0, "decode_seconds_per_token": 2.0}});
    let entries = json!([{"name": "by-hand", "choices": choices}, {"name": "minimal", "choices": choices, "latency": latency}]);
    std::fs::write(tiny.model(NAME).join("catalog.json"), entries.to_string()).unwrap();
}

#[test]
fn what_others_write_meanwhile_stays_in_the_catalog() {
    let tiny = Tiny::write();
    let task = file(&tiny, 400);
    let minimal = json_of(&eval(&tiny, &task, &["--json", "--limit", "1", "--subnetwork", "minimal"]));
    assert_eq!(minimal["results"][0]["count"], 1);
    let choices = lines(&records(&tiny))[0]["is"]["choices"].clone();
    let more = ["--method", "generation", "--subnetwork", "minimal"];
    let process = command(&tiny, &task, &more).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read(records(&tiny)).unwrap().iter().filter(|&&b| b == b'\n').count() < 10 {
        assert!(Instant::now() < deadline, "it does not come forward");
        std::thread::sleep(Duration::from_millis(1));
    }
    change_catalog(&tiny, &choices);
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let entries = catalog(&tiny);
    assert!(entries.iter().any(|e| e["name"] == "by-hand"), "{entries:?}");
    let minimal = entries.iter().find(|e| e["name"] == "minimal").unwrap();
    assert_eq!(minimal["latency"]["here"]["decode_seconds_per_token"], 2.0);
    assert_eq!(minimal["evaluations"][0]["method"], "generation");
}

/// No file may grow here; a disk that is full or read-only ends a write in the same way.
#[cfg(unix)]
#[test]
fn results_are_printed_even_if_the_catalog_cannot_be_written() {
    let tiny = Tiny::write();
    let task = file(&tiny, 6);
    json_of(&eval(&tiny, &task, &["--json", "--limit", "6"]));
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_lonas"),
        "eval",
    ]);
    command.arg(tiny.model(NAME)).args(["--threads", "1", "--task"]).arg(format!("dev={}", task.display()));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("answer loss"), "{}", said(&output));
    assert!(said(&output).contains("catalog.json"), "{}", said(&output));
}

#[test]
fn a_dry_run_keeps_its_records_elsewhere() {
    let tiny = Tiny::write();
    let task = file(&tiny, 6);
    let elsewhere = tiny.base().join("elsewhere.jsonl");
    let more = ["--json", "--dry-run", "--records", elsewhere.to_str().unwrap()];
    assert_eq!(json_of(&eval(&tiny, &task, &more))["computed"], 18);
    assert_eq!(json_of(&eval(&tiny, &task, &more))["computed"], 0);
    assert!(!records(&tiny).exists() && !tiny.model(NAME).join("catalog.json").exists());
}

#[test]
fn results_of_another_configuration_or_tokenizer_are_not_taken_over() {
    let tiny = Tiny::write();
    let task = file(&tiny, 6);
    let computed = || json_of(&eval(&tiny, &task, &["--json"]))["computed"].clone();
    let edit = |name: &str, edit: &dyn Fn(&mut Value)| {
        let path = tiny.base().join(name);
        let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut json);
        std::fs::write(path, json.to_string()).unwrap();
    };
    assert_eq!((computed(), computed()), (18.into(), 0.into()));
    edit("config.json", &|config| config["rms_norm_eps"] = json!(1e-3));
    assert_eq!((computed(), computed()), (18.into(), 0.into()));
    edit("tokenizer.json", &|tokenizer| _ = tokenizer["model"]["merges"].as_array_mut().unwrap().pop());
    assert_eq!((computed(), computed()), (18.into(), 0.into()));
    // What decides nothing is computed from changes nothing.
    edit("config.json", &|config| config["transformers_version"] = "5".into());
    assert_eq!(computed(), 0);
}

#[test]
fn what_cannot_be_evaluated_is_refused_by_name() {
    let tiny = Tiny::write();
    let task = file(&tiny, 4);
    let write = |name: &str, value: Value| {
        let path = tiny.base().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path
    };
    let good = json!({"question": "q", "choices": ["a", "b"], "answer": 0});
    let long = json!({"question": "no ".repeat(99), "choices": ["a", "b"], "answer": 0});
    let no_answer = json!({"question": "q", "choices": ["a", "b"], "answer": "c"});
    let (empty, missing) = (write("empty.json", json!([])), tiny.base().join("nowhere.json"));
    let wrong = write("wrong.json", json!([good, no_answer]));
    let lacking = write("lacking.json", json!([good, good, {"instruction": "x"}]));
    let plain = write("plain.json", json!([{"instruction": "say a", "output": "a"}]));
    let long = write("long.json", json!([good, long]));
    let cases: [(i32, &Path, &[&str], &str); 16] = [
        (1, &empty, &[], "empty.json: not a JSON array of examples: it is empty"),
        (1, &missing, &[], "nowhere.json: No such file"),
        (
            1,
            &wrong,
            &[],
            "wrong.json: item 1: field `answer`: expected one of the choices or a number from 0 to 1",
        ),
        (1, &lacking, &[], "lacking.json: item 2: field `output` is missing"),
        (1, &plain, &[], "plain.json: no item is a question with options"),
        (
            1,
            &plain,
            &["--protocol", "lonas-math"],
            "plain.json: no item is a question with a number or letter",
        ),
        (1, &plain, &["--method", "loss"], "plain.json: no item has the form; --form lonas takes every one"),
        (1, &long, &[], "long.json: item 1: it has"),
        (1, &task, &["--form", "lonas"], "item 0: it has"),
        (1, &task, &["--limit", "0"], "--limit leaves no item"),
        (
            1,
            &task,
            &["--subnetwork", "huge"],
            "--subnetwork huge: the catalog has maximal, heuristic, minimal",
        ),
        (1, &task, &["--records", "no/such/folder.jsonl"], "no/such/folder.jsonl: No such file"),
        (2, &task, &["--protocol", "lonas", "--beams", "2"], "--beams"),
        (2, &task, &["--beams", "0"], "--beams"),
        (2, &task, &["--beams", "4"], "--beams: goes with --method generation only"),
        (2, &task, &["--merge-adapter", "--without-adapter"], "--merge-adapter"),
    ];
    for (code, task, more, named) in cases {
        let output = eval(&tiny, task, more);
        assert_eq!(output.status.code(), Some(code), "{task:?} {more:?}: {}", said(&output));
        assert!(said(&output).contains(named), "{named}: {}", said(&output));
        assert!(!records(&tiny).exists() && !tiny.model(NAME).join("catalog.json").exists(), "{more:?}");
    }
    let twice = format!("dev={}", task.display());
    let output = eval(&tiny, &task, &[&twice]);
    assert!(said(&output).contains("two tasks are named `dev`"), "{}", said(&output));
}
