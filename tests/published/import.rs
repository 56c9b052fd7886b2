//! `lonas import`, end to end: what it writes computes what PyTorch computes, and is opened as any other model folder.

use super::write::{A, B, BASE, Groups, LONAS, Writing, llama_node, nncf};
use crate::cli::process::{Server, lonas};
use crate::files::{Folder, assert_names};
use crate::golden::{self, Supernet, distance};
use crate::logits::{self, Case, Cases};
use crate::tiny::Tiny;
use lonas::artifact::read_adapter_head;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::supernet::{Cost, Kind};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Output;

/// LoNAS's groups of `tests/golden/tiny-tied`, in the order in which its supernet.json has them.
fn space(ranks: &[usize], widths: &[usize]) -> Groups {
    let group = |nodes: &'static [(&str, &str)], choices: &[usize]| {
        let choices = choices.to_vec();
        (0..3).map(move |l| (nodes.iter().map(|(m, end)| llama_node(l, m, end)).collect(), choices.clone()))
    };
    let mlp = &[("gate_proj", BASE), ("gate_proj", B), ("up_proj", BASE), ("up_proj", B)];
    group(&[("q_proj", A), ("k_proj", A), ("v_proj", A)], ranks)
        .chain(group(mlp, widths))
        .chain(group(&[("gate_proj", A), ("up_proj", A)], ranks))
        .collect()
}

fn tiny_tied() -> String {
    nncf(&space(&[8, 6, 4], &[80, 61, 40]), LONAS)
}

fn import(base: &Path, adapter: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = lonas(&["import"]);
    command.arg("--base").arg(base).arg("--adapter").arg(adapter).arg("--out").arg(out);
    command.args(more).output().unwrap()
}

#[track_caller]
fn done(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

#[track_caller]
fn failed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Imports an adapter onto the base of tiny-tied; the folder and what the command said.
fn imported(adapter: &str, configuration: &str) -> (Folder, String) {
    imported_with(adapter, configuration, &[])
}

fn imported_with(adapter: &str, configuration: &str, more: &[&str]) -> (Folder, String) {
    let folder = Folder::empty();
    folder.write("nncf.json", configuration);
    let space = folder.file("nncf.json");
    let more = [&["--nncf-config", space.to_str().unwrap(), "--name", "mine"], more].concat();
    let output = import(&golden::path("tiny-tied/base"), &golden::path(adapter), &folder.file("out"), &more);
    (folder, done(&output))
}

/// Every case that the folder's search space has, against the golden logits; the names of those cases.
fn assert_golden(out: &Path) -> Vec<String> {
    let net = Supernet::of(&golden::path("tiny-tied/base"), out);
    let Cases { tokens, cases } = golden::json("tiny-tied/cases.json");
    let has = |case: &Case| net.space.sub_network(case.choices.clone()).is_ok();
    let all = logits::golden_logits("tiny-tied", &cases, tokens.len());
    let (cases, golden): (Vec<_>, Vec<_>) = cases.into_iter().zip(all).filter(|(case, _)| has(case)).unzip();
    let ours = logits::run(&net, Cpu::new(Dtype::F32, 2), &tokens, &cases, 100);
    for (case, (ours, golden)) in cases.iter().zip(ours.iter().zip(&golden)) {
        for (ours, golden) in ours.iter().zip(golden) {
            let off = distance(ours, golden);
            assert!(off <= 1e-4, "{}: off by {off}", case.name);
        }
    }
    cases.into_iter().map(|case| case.name).collect()
}

#[test]
fn an_imported_adapter_computes_what_pytorch_computes() {
    let adapters = ["tiny-tied/supernet", "adapters/f32", "adapters/state-dict"];
    for adapter in adapters {
        let (folder, said) = imported(adapter, &tiny_tied());
        assert_names(&said, &["9 elastic groups", "10^4.3 sub-networks"]);
        let cases = assert_golden(&folder.file("out"));
        assert_eq!(cases, ["maximal", "heuristic", "minimal", "random0", "random1", "random2"]);

        let (ours, theirs) = (
            Supernet::of(&golden::path("tiny-tied/base"), &folder.file("out")),
            Supernet::open("tiny-tied/base", "tiny-tied"),
        );
        assert_eq!(ours.space, theirs.space);
        assert_eq!(ours.folder.name, "mine");
        assert!(ours.folder.catalog(&ours.shape, &ours.space).unwrap().get("heuristic").is_some());
    }
}

#[test]
fn ordered_ranks_are_the_same_adapter_whose_first_ranks_are_nearest_to_it() {
    let configuration = nncf(&space(&[8, 6, 4], &[80]), LONAS);
    let tokens = [vec![5, 40, 12, 77, 3, 9, 60, 22]];
    let logits = |more: &[&str]| {
        let (folder, _) = imported_with("tiny-tied/supernet", &configuration, more);
        let net = Supernet::of(&golden::path("tiny-tied/base"), &folder.file("out"));
        let card = String::from_utf8(folder.read("out/README.md")).unwrap();
        assert_eq!(card.contains("--order-ranks"), !more.is_empty(), "{card}");
        let case = |ranks: usize| {
            let choices = [[ranks; 3], [80; 3], [ranks; 3]].concat();
            Case { name: ranks.to_string(), choices }
        };
        logits::run(&net, Cpu::new(Dtype::F32, 1), &tokens, &[8, 6, 4].map(case), 100)
    };
    let (trained, ordered) = (logits(&[]), logits(&["--order-ranks"]));
    let whole = &trained[0][0];
    let off = |logits: &[Vec<f32>]| distance(&logits[0], whole);
    assert!(off(&ordered[0]) <= 1e-4, "off by {}", off(&ordered[0]));
    for ((trained, ordered), ranks) in trained.iter().zip(&ordered).zip([8, 6, 4]).skip(1) {
        assert!(off(ordered) < 0.8 * off(trained), "{ranks}: {} and {}", off(ordered), off(trained));
    }
}

#[test]
fn a_sub_adapter_computes_what_its_super_adapter_computed() {
    let (folder, said) = imported("adapters/cut", &tiny_tied());
    assert_names(&said, &["11 of 18 modules", "scale stays 2"]);
    // The one that was cut out, and those within it.
    assert_eq!(assert_golden(&folder.file("out")), ["minimal", "random0"]);
    let base = golden::path("tiny-tied/base");
    let (cut, whole) =
        (Supernet::of(&base, &folder.file("out")), Supernet::open("tiny-tied/base", "tiny-tied"));
    assert_eq!(cut.space.maximal().choices(), [4, 6, 4, 80, 80, 80, 8, 4, 8]);
    let cost = |net: &Supernet| Cost::of(&net.shape, &net.space.resolve(&net.shape, &net.space.maximal()));
    assert!(cost(&cut).parameters < cost(&whole).parameters, "what is not there costs nothing");
    // Another space, in which what is left is no choice.
    let other = Folder::empty();
    other.write("nncf.json", nncf(&space(&[8, 5, 3], &[80]), LONAS));
    let path = other.file("nncf.json");
    let output = import(
        &base,
        &golden::path("adapters/cut"),
        &other.file("out"),
        &["--nncf-config", path.to_str().unwrap()],
    );
    assert_names(
        &failed(&output),
        &["nncf.json", "group 0", "first choice is 3", "q_proj.lora_A.weight` has size 4"],
    );
    assert!(!other.file("out").exists());
}

#[test]
fn an_imported_folder_is_inspected_measured_and_served_as_any_other() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    // SQFT's file, where SQFT puts it.
    let adapter = folder.file("adapter");
    std::fs::create_dir(&adapter).unwrap();
    for file in ["adapter_config.json", "adapter_model.bin"] {
        std::fs::copy(golden::path("adapters/f16").join(file), adapter.join(file)).unwrap();
    }
    let target = |l: usize, m: &str| format!("base_model.model.model.layers.{l}.self_attn.{m}_proj.lora_A");
    let item = |l| json!({"target": [target(l, "q"), target(l, "v")], "search_space": [4, 8]});
    std::fs::write(
        adapter.join("elastic_adapter_config.json"),
        json!([item(0), item(1), item(2)]).to_string(),
    )
    .unwrap();
    let out = folder.file("sqft");
    let said = done(&import(&tiny.base(), &adapter, &out, &[]));
    assert_names(&said, &["3 elastic groups", "does not fall", "[8, 4]"]);

    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert_names(
        &card,
        &[
            "# sqft\n",
            "elastic_adapter_config.json: 3 groups",
            "3 x rank of 2 tensors: [8, 4]",
            "does not fall",
        ],
    );
    let inspected = lonas(&["inspect", "--json"]).arg(&out).output().unwrap();
    done(&inspected);
    let json: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!((&json["name"], &json["groups"]), (&"sqft".into(), &3.into()));

    let server = Server::start(&[out.to_str().unwrap()]);
    let request = json!({"model": "sqft:minimal", "prompt": "the cat", "max_tokens": 4, "ignore_eos": true});
    let (head, body) = server.post("/v1/completions", &request);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}\n{body}");
}

#[test]
fn a_classifiers_heads_and_head_are_imported() {
    let folder = Folder::empty();
    let base = folder.file("base");
    std::fs::create_dir(&base).unwrap();
    // An import looks at a base's sizes, not at its weights.
    let config = json!({
        "model_type": "bert", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 3, "vocab_size": 30, "max_position_embeddings": 16, "type_vocab_size": 2,
        "hidden_act": "gelu", "id2label": {"0": "a", "1": "b", "2": "c"}
    });
    folder.write("base/config.json", config.to_string());
    let nothing = (safetensors::Dtype::F32, vec![1], vec![0; 4]);
    folder.write_tensors("base/model.safetensors", &[("nothing".to_string(), nothing)].into());
    let module = |l: usize, module: &str, end: &str| {
        let root =
            "PeftModelForSequenceClassification/LoraModel[base_model]/BertForSequenceClassification[model]";
        format!("{root}/BertModel[bert]/BertEncoder[encoder]/ModuleList[layer]/BertLayer[{l}]/{module}{end}")
    };
    let of = |l: usize, name: &str, end: &str| {
        let linear = if end == "/linear_0" { "NNCFLinear" } else { "Linear" };
        module(l, &format!("BertAttention[attention]/BertSelfAttention[self]/{linear}[{name}]"), end)
    };
    let heads = |l| {
        let rows = [("query", BASE), ("query", B), ("key", "/linear_0"), ("value", BASE), ("value", B)];
        (rows.map(|(name, end)| of(l, name, end)).to_vec(), vec![12, 8, 4])
    };
    let ranks = |l| (["query", "value"].map(|name| of(l, name, A)).to_vec(), vec![4, 2]);
    let widths =
        |l| (vec![module(l, "BertIntermediate[intermediate]/NNCFLinear[dense]", "/linear_0")], vec![20, 7]);
    let dynamic = [0, 1]
        .map(|l| module(l, "BertAttention[attention]/BertSelfOutput[output]/NNCFLinear[dense]", "/linear_0"));
    let groups = [heads(0), heads(1), ranks(0), ranks(1), widths(0), widths(1)].to_vec();
    folder.write("nncf.json", nncf(&groups, Writing { dynamic_inputs: &dynamic, ..LONAS }));
    let (space, out) = (folder.file("nncf.json"), folder.file("out"));
    done(&import(
        &base,
        &golden::path("adapters/bert-bin"),
        &out,
        &["--nncf-config", space.to_str().unwrap()],
    ));

    let net = Supernet::of(&base, &out);
    let kinds = net.space.groups().iter().map(|g| g.kind).collect::<Vec<_>>();
    assert_eq!(kinds, [[Kind::Heads; 2], [Kind::Rank; 2], [Kind::Width; 2]].concat());
    assert!(net.folder.adapter_config.classifies);
    assert_eq!(net.folder.head().unwrap(), read_adapter_head(&golden::path("adapters/bert")).unwrap());
    assert_eq!(net.folder.adapter().unwrap().len(), 4);

    // Half a head.
    let odd = [(heads(0).0, vec![12, 6])].to_vec();
    folder.write("odd.json", nncf(&odd, LONAS));
    let odd = folder.file("odd.json");
    let more = ["--nncf-config", odd.to_str().unwrap(), "--overwrite"];
    let message = failed(&import(&base, &golden::path("adapters/bert"), &out, &more));
    assert_names(&message, &["odd.json", "group 0", "6 rows are no whole number of heads"]);
}

#[test]
fn what_cannot_be_imported_leaves_nothing() {
    let (folder, base) = (Folder::empty(), golden::path("tiny-tied/base"));
    folder.write("nncf.json", tiny_tied());
    let (space, out) = (folder.file("nncf.json"), folder.file("out"));
    let with = ["--nncf-config", space.to_str().unwrap()];
    let adapter = golden::path("tiny-tied/supernet");

    let message = failed(&import(&base, &adapter, &out, &[]));
    assert_names(&message, &["--nncf-config", "elastic_adapter_config.json"]);
    let message = failed(&import(&base, &adapter, &out, &[&with[..], &["--name", "a:b"]].concat()));
    assert_names(&message, &["--name", "`a:b`"]);
    // Another base.
    let message = failed(&import(&golden::path("tiny-untied-bf16/base"), &adapter, &out, &with));
    assert_names(&message, &["model.layers.", "no place in this model"]);
    // A classifier's adapter.
    let message = failed(&import(&base, &golden::path("adapters/bert"), &out, &with));
    assert_names(&message, &["classifier", "SEQ_CLS"]);
    assert!(!out.exists());
    let left = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    assert_eq!(left, ["nncf.json"]);

    done(&import(&base, &adapter, &out, &with));
    assert_names(&failed(&import(&base, &adapter, &out, &with)), &["--overwrite"]);
    done(&import(&base, &adapter, &out, &[&with[..], &["--overwrite"]].concat()));
    std::fs::write(out.join("mine.txt"), "").unwrap();
    let message = failed(&import(&base, &adapter, &out, &[&with[..], &["--overwrite"]].concat()));
    assert_names(&message, &["mine.txt"]);
}

#[test]
fn an_import_replaces_an_import_and_nothing_else() {
    let (folder, base) = (Folder::empty(), golden::path("tiny-tied/base"));
    folder.write("nncf.json", tiny_tied());
    let space = folder.file("nncf.json");
    let copy = |to: &str| {
        let to = folder.file(to);
        std::fs::create_dir(&to).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(golden::path("tiny-tied/supernet").join(name), to.join(name)).unwrap();
        }
        std::fs::write(to.join("README.md"), "A published adapter.\n").unwrap();
        to
    };
    let (adapter, other) = (copy("adapter"), copy("other"));
    let refused = |out: &std::path::Path, named: &str| {
        for more in [&[][..], &["--overwrite"]] {
            let with = [&["--nncf-config", space.to_str().unwrap()], more].concat();
            let message = failed(&import(&base, &adapter, out, &with));
            assert!(
                message.contains(named) || more.is_empty() && message.contains("--overwrite"),
                "{message}"
            );
        }
        assert_eq!(std::fs::read_to_string(other.join("README.md")).unwrap(), "A published adapter.\n");
        assert_eq!(std::fs::read_dir(&adapter).unwrap().count(), 3);
    };
    refused(&adapter, "it is the adapter");
    refused(&adapter.join("new"), "it lies in the adapter");
    refused(folder.path(), "it holds the adapter");
    refused(&base, "it is the base");
    refused(&other, "no model card (README.md)");
}
