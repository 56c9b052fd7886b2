//! `lonas search` as a process: what it writes, that a killed search ends as if nothing had happened, what it refuses.

use super::process::{Server, lonas};
use crate::tiny::{NAME, Tiny};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A task of so many questions.
fn task(tiny: &Tiny, questions: usize) -> String {
    let path = tiny.base().join(format!("task-{questions}.json"));
    let item = |i: usize| {
        let options = ["the red one", "in there", "no", "it is on"];
        let (a, b) = (options[i % 4], options[(i / 2 + 1) % 4]);
        json!({
            "instruction": format!("Please choose the correct answer to the question: is {i} {b}?\n\nAnswer1: {a} Answer2: {b}\n\nAnswer format: answer1/answer2"),
            "output": "", "answer": format!("answer{}", i % 2 + 1),
        })
    };
    std::fs::write(&path, Value::from_iter((0..questions).map(item)).to_string()).unwrap();
    format!("dev={}", path.display())
}

fn command(tiny: &Tiny, task: &str, more: &[&str]) -> Command {
    let mut command = lonas(&["search"]);
    command.arg(tiny.model(NAME)).args(["--threads", "1", "--task", task]).args(more);
    command
}

fn search(tiny: &Tiny, task: &str, more: &[&str]) -> Output {
    command(tiny, task, more).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn must(output: Output) -> String {
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn catalog(tiny: &Tiny) -> Vec<Value> {
    serde_json::from_str(&read(&tiny.model(NAME).join("catalog.json"))).unwrap()
}

#[test]
fn a_faithful_search_leaves_the_authors_files_and_ours() {
    let tiny = Tiny::write();
    let task = task(&tiny, 6);
    let more = ["--faithful", "--evaluations", "14", "--population", "4", "--samples", "5"];
    let table = must(search(&tiny, &task, &more));
    assert!(
        table.contains("items: 5 dev; cost: MMACs") && table.contains("best: the cheapest above"),
        "{table}"
    );
    let folder = tiny.model(NAME).join("search");

    // Three generations of four; as Python's csv module writes NNCF's records.
    let csv = read(&folder.join("search_progression.csv"));
    let rows = csv.split_terminator("\r\n").collect::<Vec<_>>();
    assert_eq!(rows.len(), 12);
    let lines = read(&folder.join("evaluations.jsonl"));
    let lines = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).collect::<Vec<_>>();
    for (row, line) in rows.iter().zip(&lines) {
        let choices = line["choices"].as_array().unwrap().iter().enumerate();
        let widths = choices.map(|(i, c)| format!("{i}: {c}")).collect::<Vec<_>>().join(", ");
        let (macs, accuracy) = (&line["objectives"]["MACs"], &line["objectives"]["negative_accuracy"]);
        let expected = format!(
            "\"OrderedDict([(<ElasticityDim.WIDTH: 'width'>, {{{widths}}})])\",MACs,{macs},top1_acc,{accuracy}"
        );
        assert_eq!(*row, expected);
        let right = line["tasks"][0]["right"].as_f64().unwrap();
        assert_eq!(accuracy.as_f64().unwrap(), -(right / 5.0));
        assert_eq!((&line["items"], &line["tasks"][0]["task"]), (&5.into(), &"dev".into()));
        assert!(line["seconds"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(lines.len(), 12);
    assert_eq!(lines.iter().map(|l| l["generation"].as_u64().unwrap()).max(), Some(3));
    let front: Value = serde_json::from_str(&read(&folder.join("front.json"))).unwrap();
    let costs = front["front"].as_array().unwrap().iter().map(|p| p["MACs"].as_f64().unwrap());
    assert!(costs.clone().count() > 0 && costs.is_sorted(), "{front}");
    assert!(front["best"]["accuracy"].is_number() && front["always"]["minimal"]["loss"].is_number());
    assert!(read(&folder.join("search.svg")).ends_with("</svg>\n"));
}

#[test]
fn a_killed_search_goes_on_and_ends_in_the_same_numbers() {
    let tiny = Tiny::write();
    let task = task(&tiny, 40);
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let with = |name: &str| {
        let mut all = command(&tiny, &task, &["--objective", "loss", "--evaluations", "90", "--seed", "3"]);
        all.arg("--out").arg(out(name));
        all
    };
    let through = must(with("through").output().unwrap());
    let mut process = with("killed").stderr(std::process::Stdio::null()).spawn().unwrap();
    let told = |path: &Path| {
        let state = std::fs::read(path).ok()?;
        // Replaced whole, so whenever it is read it is a whole one.
        let state: Value = serde_json::from_slice(&state).unwrap();
        state["search"]["evaluations"].as_array().map(Vec::len)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while told(&out("killed").join("state.json")).is_none_or(|n| n < 20) {
        assert!(Instant::now() < deadline, "it does not come forward");
        std::thread::sleep(Duration::from_millis(2));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(!out("killed").join("front.json").exists(), "it was killed before its end");
    let resumed = with("killed").output().unwrap();
    assert!(said(&resumed).contains("going on after"), "{}", said(&resumed));
    assert_eq!(must(resumed), through);
    for file in ["search_progression.csv", "front.json", "search.svg"] {
        assert_eq!(read(&out("killed").join(file)), read(&out("through").join(file)), "{file}");
    }
    // A finished search is only read again.
    assert_eq!(must(with("killed").output().unwrap()), through);
}

#[test]
fn points_of_the_front_go_into_the_catalog_with_what_is_known_of_them() {
    let tiny = Tiny::write();
    let task = task(&tiny, 6);
    let whole = ["--evaluations", "20", "--name", "good=best", "cheap=0.9", "first=0"];
    must(search(&tiny, &task, &whole));
    let entries = catalog(&tiny);
    let find = |name: &str| entries.iter().find(|e| e["name"] == name).unwrap();
    let (maximal, cheap) =
        (find("maximal")["macs"].as_f64().unwrap(), find("cheap")["macs"].as_f64().unwrap());
    assert!(cheap <= 0.9 * maximal, "{cheap}");
    assert!(find("first")["macs"].as_f64().unwrap() <= cheap);
    assert!(find("good")["scores"]["dev"].is_number(), "the whole file was scored");
    let best: Value = serde_json::from_str(&read(&tiny.model(NAME).join("search/front.json"))).unwrap();
    assert_eq!(find("good")["choices"], best["best"]["choices"]);

    let part = ["--evaluations", "20", "--samples", "3", "--overwrite", "--name", "sampled=0"];
    let output = search(&tiny, &task, &part);
    assert!(said(&output).contains("no accuracy was written for dev"), "{}", said(&output));
    must(output);
    let sampled = catalog(&tiny).into_iter().find(|e| e["name"] == "sampled").unwrap();
    assert_eq!(sampled["scores"], json!({}));
}

#[test]
fn latency_is_measured_once_and_its_error_is_said() {
    let tiny = Tiny::write();
    let task = task(&tiny, 4);
    for cost in ["prefill", "decode"] {
        let out = tiny.base().join(cost);
        let more = ["--cost", cost, "--evaluations", "16", "--out", out.to_str().unwrap()];
        let first = must(search(&tiny, &task, &more));
        assert!(first.contains("over 8 measured sub-networks that it was not fitted to"), "{first}");
        assert_eq!(must(search(&tiny, &task, &more)), first);
    }
}

#[test]
fn what_cannot_be_searched_is_refused_by_name() {
    let tiny = Tiny::write();
    let (task, empty) = (task(&tiny, 4), tiny.base().join("empty.json"));
    std::fs::write(&empty, r#"[{"instruction": "say a", "output": "a"}]"#).unwrap();
    let empty = format!("dev={}", empty.display());
    let cases: [(&str, &[&str], &str); 13] = [
        (&task, &["--population", "300"], "population: expected at most the 200 evaluations, got 300"),
        (&task, &["--population", "1"], "population: expected at least 2"),
        (&task, &["--evaluations", "99999999"], "evaluations: expected at most"),
        (&task, &["--samples", "0"], "--samples"),
        (&task, &["--name", "good"], "expected NAME=best"),
        (&task, &["--name", "good=-1"], "expected NAME=best"),
        (&task, &["--name", "a:b=best"], "sub-network name \"a:b\""),
        (&task, &["--name", "minimal=best"], "fixed meaning"),
        (&task, &["--objective", "loss", "--name", "good=best"], "go by accuracy"),
        (&task, &["--reference-accuracy", "45"], "a share from 0 to 1"),
        (&task, &["--task", "dev=nowhere.json"], "nowhere.json"),
        (&empty, &[], "no item is a question with options"),
        ("dev", &[], "expected NAME=FILE"),
    ];
    for (task, more, named) in cases {
        let output = search(&tiny, task, more);
        assert_eq!(output.status.code(), Some(1), "{more:?}: {}", said(&output));
        assert!(said(&output).contains(named), "{more:?}: {}", said(&output));
        assert!(!tiny.model(NAME).join("search").exists(), "{more:?}: nothing is begun");
    }
    let once = lonas(&["search"]).arg(tiny.model(NAME)).args(["--task", &task, &task]).output().unwrap();
    assert!(said(&once).contains("two tasks are named `dev`"), "{}", said(&once));
}

#[test]
fn another_searchs_state_is_not_gone_on_with() {
    let tiny = Tiny::write();
    let task = task(&tiny, 4);
    must(search(&tiny, &task, &["--evaluations", "12"]));
    let refused = |more: &[&str], named: &str| {
        let output = search(&tiny, &task, &[&["--evaluations", "12"], more].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(named) && said(&output).contains("--overwrite"), "{}", said(&output));
    };
    refused(&["--seed", "1"], "--seed was 0, not 1");
    refused(&["--cost", "parameters"], "--cost was MACs, not parameters");
    refused(&["--samples", "3"], "--samples was 200, not 3");
    let config = tiny.base().join("config.json");
    let before = read(&config);
    let mut changed: Value = serde_json::from_str(&before).unwrap();
    changed["rms_norm_eps"] = json!(1e-3);
    std::fs::write(&config, changed.to_string()).unwrap();
    refused(&[], "the base's configuration or tokenizer: not the same");
    std::fs::write(&config, before).unwrap();
    must(search(&tiny, &task, &["--evaluations", "12", "--seed", "1", "--overwrite"]));
    std::fs::write(tiny.model(NAME).join("search/state.json"), "{").unwrap();
    refused(&["--seed", "1"], "state.json");
}

#[test]
fn what_a_search_names_is_served_at_once_where_it_is_registered() {
    let tiny = Tiny::write();
    let task = task(&tiny, 6);
    let model = tiny.model(NAME);
    let server = Server::start(&[model.to_str().unwrap(), "--admin-key", "secret"]);
    let url = server.url();
    let run = |more: &[&str]| {
        let common = ["--evaluations", "6", "--population", "4", "--name", "mine=0.95"];
        search(&tiny, &task, &[&common, more].concat())
    };
    let cases: [(&[&str], &str); 4] = [
        (&["--register", &url, "--admin-key", "wrong"], "401: missing or wrong admin key"),
        (&["--register", &url], "LONAS_ADMIN_KEY"),
        (&["--register", "https://127.0.0.1", "--admin-key", "secret"], "expected http://HOST:PORT"),
        (&["--register", "http://127.0.0.1:1", "--admin-key", "secret"], "127.0.0.1:1: "),
    ];
    for (more, named) in cases {
        let output = run(more);
        assert_eq!(output.status.code(), Some(1), "{more:?}");
        assert!(said(&output).contains(named), "{more:?}: {}", said(&output));
        assert!(!model.join("search").exists(), "before anything was scored");
    }
    let question = json!({"model": "tiny-tied:mine", "prompt": "one", "max_tokens": 3});
    assert!(server.post("/v1/completions", &question).0.contains(" 404 "));
    must(run(&["--register", &url, "--admin-key", "secret"]));
    let (head, answer) = server.post("/v1/completions", &question);
    assert!(head.contains(" 200 "), "{answer}");
    let (_, card) = server.get("/v1/subnetworks/mine");
    let card: Value = serde_json::from_str(&card).unwrap();
    let line = catalog(&tiny).into_iter().find(|line| line["name"] == "mine").unwrap();
    for field in ["choices", "parameters", "macs", "scores"] {
        assert_eq!(card[field], line[field], "{field}");
    }
}

#[test]
fn one_search_has_a_folder_and_the_catalog_keeps_what_others_write_meanwhile() {
    let tiny = Tiny::write();
    let task = task(&tiny, 40);
    let more = ["--objective", "loss", "--evaluations", "90", "--name", "mine=0"];
    let mut first = command(&tiny, &task, &more);
    let mut first = first.stdout(std::process::Stdio::null()).spawn().unwrap();
    let state = tiny.model(NAME).join("search/state.json");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !state.exists() {
        assert!(Instant::now() < deadline, "it does not come forward");
        std::thread::sleep(Duration::from_millis(2));
    }
    let second = search(&tiny, &task, &[&more[..], &["--overwrite"]].concat());
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains("search: another process is writing to it"), "{}", said(&second));
    let choices = json!(smallest(&tiny));
    let by_hand = json!([{"name": "by-hand", "choices": choices}]).to_string();
    std::fs::write(tiny.model(NAME).join("catalog.json"), by_hand).unwrap();
    assert!(first.wait().unwrap().success());
    let names =
        catalog(&tiny).into_iter().map(|e| e["name"].as_str().unwrap().to_string()).collect::<Vec<_>>();
    assert!(names.contains(&"by-hand".into()) && names.contains(&"mine".into()), "{names:?}");
}

/// The smallest choice of each group.
fn smallest(tiny: &Tiny) -> Vec<Value> {
    let supernet: Value = serde_json::from_str(&read(&tiny.model(NAME).join("supernet.json"))).unwrap();
    let last = |group: &Value| group["choices"].as_array().unwrap().last().unwrap().clone();
    supernet["groups"].as_array().unwrap().iter().map(last).collect()
}
