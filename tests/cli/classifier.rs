//! A super-network that classifies, as a process: `lonas inspect` and `lonas eval`, and what it is refused for.

use super::process::lonas;
use crate::files::Folder;
use crate::golden::{self, Supernet};
use lonas::backend::Segment;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::model::{self, Adapters, TextBatch};
use serde_json::{Value, json};
use std::process::Output;

/// WordPiece with a handful of words, as BERT's tokenizers are saved.
fn tokenizer() -> String {
    let words =
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "sleeps", "some", "##body", "is", "awake", "no"];
    let vocabulary = words.iter().zip(0..).map(|(word, id)| ((*word).to_string(), json!(id)));
    let special = |id: usize| json!({"id": id, "content": words[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let own = |name: &str, kind: u32| json!({"SpecialToken": {"id": name, "type_id": kind}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let one = |id: u32| json!({"id": words[id as usize], "ids": [id], "tokens": [words[id as usize]]});
    json!({
        "version": "1.0",
        "added_tokens": (0..4).map(special).collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [own("[CLS]", 0), text("A", 0), own("[SEP]", 0)],
            "pair": [own("[CLS]", 0), text("A", 0), own("[SEP]", 0), text("B", 1), own("[SEP]", 1)],
            "special_tokens": {"[CLS]": one(2), "[SEP]": one(3)},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": vocabulary.collect::<serde_json::Map<_, _>>()},
    })
    .to_string()
}

/// A base with a tokenizer, a model folder with names for its labels, and somewhere for task files.
struct Setup {
    base: Folder,
    model: Folder,
}

impl Setup {
    fn new() -> Self {
        let (base, model) = (Folder::copy_of("tiny-bert/base"), Folder::copy_of("tiny-bert/supernet"));
        base.write("tokenizer.json", tokenizer());
        model.write("config.json", r#"{"id2label": {"0": "entailment", "1": "not_entailment"}}"#);
        Self { base, model }
    }

    fn run(&self, command: &str, more: &[&str]) -> Output {
        let (base, model) = (self.base.path().to_str().unwrap(), self.model.path().to_str().unwrap());
        lonas(&[&[command, model, "--base", base], more].concat()).output().unwrap()
    }

    fn eval(&self, file: &str, text: &str, more: &[&str]) -> Output {
        self.model.write(file, text);
        let task = format!("dev={}", self.model.file(file).display());
        self.run("eval", &[&["--task", &task, "--dtype", "f32", "--threads", "1"], more].concat())
    }
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const PAIRS: &str = "index\tsentence1\tsentence2\tlabel\n\
    0\tA man sleeps\tsomebody is awake\tnot_entailment\n\
    1\tA man is awake\tsomebody is awake\tentailment\n\
    2\tno\tno man sleeps\tentailment\n\
    3\tsomebody sleeps\tno\tnot_entailment\n";

#[test]
fn a_classifier_shows_its_labels_and_costs() {
    let setup = Setup::new();
    let shown = json_of(&setup.run("inspect", &["--json"]));
    assert_eq!(shown["labels"], json!(["entailment", "not_entailment"]));
    assert_eq!(shown["sub_networks"][0]["name"], "maximal");
    let text = String::from_utf8(setup.run("inspect", &[]).stdout).unwrap();
    assert!(text.contains("labels     entailment, not_entailment"), "{text}");
    assert!(text.contains("MACs are for 128 tokens"), "{text}");
}

#[test]
fn an_evaluation_of_a_classifier_says_what_its_model_computes() {
    let setup = Setup::new();
    let all = json_of(&setup.eval("dev.tsv", PAIRS, &["--json"]));
    assert_eq!((&all["computed"], &all["made_of"]["method"]), (&12.into(), &"classification".into()));
    let text = std::fs::read_to_string(setup.model.file("eval.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let records = records.filter(|record| record.get("item").is_some()).collect::<Vec<_>>();
    assert_eq!(records.len(), 12);
    for result in all["results"].as_array().unwrap() {
        let own = records.iter().filter(|r| r["subnetwork"] == result["subnetwork"]);
        let right = own.filter(|r| {
            let class = &r["class"];
            let [first, second] = [0, 1].map(|i| class["logits"][i].as_f64().unwrap());
            u64::from(second > first) == class["correct"].as_u64().unwrap()
        });
        assert_eq!(result["value"].as_f64().unwrap(), right.count() as f64 / 4.0);
        assert_eq!((&result["metric"], &result["count"]), (&"accuracy".into(), &4.into()));
        assert!(result["details"]["matthews"].is_number() && result["details"]["f1"].is_number());
    }
    // [CLS] a man sleeps [SEP] some ##body is awake [SEP], by hand, straight through the model.
    let net = Supernet::of(&golden::path("tiny-bert/base"), setup.model.path());
    let beside = Adapters::Beside(vec![net.super_adapter()]);
    let mut classifier = model::classifier(Cpu::new(Dtype::F32, 1), &net.base, beside, &net.orders).unwrap();
    let batch = TextBatch {
        tokens: vec![2, 4, 5, 6, 3, 7, 8, 9, 10, 3],
        token_types: vec![0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        segments: vec![Segment { rows: 0..10, selection: net.selection(0, &net.space.maximal()) }],
        texts: std::iter::once(0..10).collect(),
    };
    let logits = classifier.classify(&batch).unwrap().remove(0);
    let record = records.iter().find(|r| r["index"] == 0 && r["subnetwork"] == "maximal").unwrap();
    let recorded = record["class"]["logits"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap() as f32);
    assert_eq!(recorded.collect::<Vec<_>>(), logits);
    assert_eq!(record["class"]["correct"], 1);
    // Known now, and in the catalog.
    assert_eq!(json_of(&setup.eval("dev.tsv", PAIRS, &["--json"]))["computed"], 0);
    let catalog: Value = serde_json::from_slice(&setup.model.read("catalog.json")).unwrap();
    assert_eq!(catalog[0]["scores"]["dev"], all["results"][0]["value"]);
    let table = String::from_utf8(setup.eval("dev.tsv", PAIRS, &[]).stdout).unwrap();
    assert!(table.contains("Matthews"), "{table}");
}

#[test]
fn a_number_is_scored_by_its_correlation() {
    let setup = Setup::new();
    setup.model.write("config.json", r#"{"problem_type": "regression"}"#);
    let lines = (0..6).map(|i| {
        json!({"sentence1": "a man ".repeat(i + 1), "sentence2": "no", "label": i as f64 / 2.0}).to_string()
    });
    let all =
        json_of(&setup.eval("sts.jsonl", &lines.collect::<Vec<_>>().join("\n"), &["--json", "--dry-run"]));
    let result = &all["results"][0];
    assert_eq!((&result["metric"], &result["count"]), (&"pearson".into(), &6.into()));
    assert!(result["value"].as_f64().unwrap().abs() <= 1.0 && result["details"]["spearman"].is_number());
}

#[test]
fn what_a_classifier_cannot_be_asked_is_said() {
    let setup = Setup::new();
    let says = |error: String, what: &str| assert!(error.contains(what), "{error} does not say {what}");
    says(
        refusal(&setup.eval("dev.tsv", PAIRS, &["--method", "likelihood"])),
        "--method likelihood: the model classifies texts",
    );
    let maybe = PAIRS.replace("\tentailment", "\tmaybe");
    says(
        refusal(&setup.eval("dev.tsv", &maybe, &[])),
        "item 1: label \"maybe\": expected one of entailment, not_entailment",
    );
    says(
        refusal(&setup.eval("dev.tsv", PAIRS, &["--max-text-tokens", "3"])),
        "item 0: 3 tokens leave no room",
    );
    says(
        refusal(&setup.run("bench", &[])),
        "the model classifies texts; this measures those that continue them",
    );
}
