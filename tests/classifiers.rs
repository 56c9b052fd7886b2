//! Tiny BERT super-networks that classify against PyTorch + PEFT, which cuts heads, ranks and channels by LoNAS's rules.

use crate::golden::{self, Supernet, distance};
use crate::logits::Case;
use lonas::artifact::{Base, HeadTensor};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::backend::{Backend, BackendError, Segment, Selection};
use lonas::evaluate::{self, WholeText};
use lonas::model::{self, Adapters, Classifier, TextBatch};
use std::collections::BTreeMap;
use std::path::Path;

#[derive(serde::Deserialize)]
struct Cases {
    texts: Vec<Text>,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize, Clone)]
struct Text {
    tokens: Vec<u32>,
    token_types: Vec<u32>,
}

/// Base, super-network, labels.
const NETS: [(&str, &str, usize); 3] = [TWO, THREE, ("tiny-bert-relu/base", "tiny-bert-relu", 3)];

/// Two super-adapters of one base, each with a head of its own.
const TWO: (&str, &str, usize) = ("tiny-bert/base", "tiny-bert", 2);
const THREE: (&str, &str, usize) = ("tiny-bert/base", "tiny-bert-three", 3);

/// A text under a sub-network, and what PyTorch gave each label.
type Judged = (Selection, Text, Vec<f32>);

fn open((base, name, _): (&str, &str, usize)) -> (Supernet, Cases) {
    (Supernet::open(base, name), golden::json(&format!("{name}/cases.json")))
}

fn load<B: Backend>(backend: B, net: &Supernet, adapters: Adapters) -> Box<dyn Classifier> {
    model::classifier(backend, &net.base, adapters, &net.orders).unwrap()
}

/// Every text under every sub-network, by sub-network; each with the golden numbers.
fn all((net, Cases { texts, cases }): &(Supernet, Cases), name: &str, adapter: usize) -> Vec<Judged> {
    let mut golden = golden::tensors(&format!("{name}/logits.safetensors"));
    let mut all = Vec::new();
    for (id, case) in (100 * adapter as u32..).zip(cases) {
        let sub_network = net.space.sub_network(case.choices.clone()).unwrap();
        let selection = Selection { adapter, ..net.selection(id, &sub_network) };
        for (i, text) in texts.iter().enumerate() {
            let expected = golden.remove(&format!("{}/{i}", case.name)).unwrap();
            all.push((selection.clone(), text.clone(), expected));
        }
    }
    all
}

fn batch<'a>(texts: impl IntoIterator<Item = &'a Judged>) -> TextBatch {
    let mut batch = TextBatch::default();
    for (selection, text, _) in texts {
        let rows = batch.tokens.len()..batch.tokens.len() + text.tokens.len();
        batch.tokens.extend(&text.tokens);
        batch.token_types.extend(&text.token_types);
        batch.texts.push(rows.clone());
        match batch.segments.last_mut() {
            Some(last) if last.selection == *selection => last.rows.end = rows.end,
            _ => batch.segments.push(Segment { rows, selection: selection.clone() }),
        }
    }
    batch
}

/// All in one mixed batch against PyTorch.
fn check<B: Backend>(backend: impl Fn() -> B) {
    for net @ (_, name, labels) in NETS {
        let opened = open(net);
        let mut classifier = load(backend(), &opened.0, Adapters::Beside(vec![opened.0.super_adapter()]));
        assert_eq!(classifier.labels(0), Some(labels));
        let all = all(&opened, name, 0);
        assert_eq!(all.len(), 13 * 4);
        let logits = classifier.classify(&batch(&all)).unwrap();
        for (i, (ours, (_, _, expected))) in logits.iter().zip(&all).enumerate() {
            let off = distance(ours, expected);
            assert!(off <= 1e-4, "{name} {i}: off by {off}, {ours:?} for {expected:?}");
        }
    }
}

#[test]
fn classifiers_agree_with_pytorch_on_the_cpu_backend() {
    check(|| Cpu::new(Dtype::F32, 2));
    check(|| Cpu::new(Dtype::Auto, 1));
}

#[test]
fn classifiers_agree_with_pytorch_on_the_reference_backend() {
    check(Reference::new);
}

/// Texts of two super-adapters with two and three labels, one by one in turn.
fn in_turn() -> (Supernet, Vec<Judged>, Adapters) {
    let (two, three) = (open(TWO), open(THREE));
    let adapters = Adapters::Beside(vec![two.0.super_adapter(), three.0.super_adapter()]);
    let both = all(&two, TWO.1, 0).into_iter().zip(all(&three, THREE.1, 1));
    let texts = both.flat_map(|(a, b)| [a, b]).collect();
    (two.0, texts, adapters)
}

#[test]
fn super_adapters_with_heads_of_their_own_share_a_base_and_a_batch() {
    let (net, texts, adapters) = in_turn();
    let mut classifier = load(Cpu::new(Dtype::F32, 2), &net, adapters);
    assert_eq!([0, 1, 2].map(|adapter| classifier.labels(adapter)), [Some(2), Some(3), None]);
    let logits = classifier.classify(&batch(&texts)).unwrap();
    for (ours, (_, _, expected)) in logits.iter().zip(&texts) {
        let off = distance(ours, expected);
        assert!(off <= 1e-4, "off by {off}, {ours:?} for {expected:?}");
    }
}

#[test]
fn a_text_classified_alone_and_among_others_gives_the_same_bits() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        let (net, texts, adapters) = in_turn();
        let mut classifier = load(Cpu::new(dtype, 2), &net, adapters);
        let mixed = classifier.classify(&batch(&texts)).unwrap();
        let reversed = classifier.classify(&batch(texts.iter().rev())).unwrap();
        assert!(reversed.iter().rev().eq(&mixed), "{dtype:?}: the order matters");
        for (i, (text, mixed)) in texts.iter().zip(&mixed).enumerate() {
            let alone = classifier.classify(&batch([text])).unwrap();
            assert_eq!(alone, std::slice::from_ref(mixed), "{dtype:?}: text {i} alone differs");
        }
    }
}

/// What rounding to bf16, and to 8 bits, may move a label's number on average.
pub(crate) const ROUNDED: [f32; 2] = [0.15, 0.4];

/// Texts of two super-adapters in one batch, on a backend that rounds: on average off, and by less than `most`.
pub(crate) fn check_rounded<B: Backend>(what: &str, backend: B, most: f32) {
    let (net, texts, adapters) = in_turn();
    let mut classifier = load(backend, &net, adapters);
    let logits = classifier.classify(&batch(&texts)).unwrap();
    let off = logits.iter().zip(&texts).map(|(ours, (_, _, expected))| distance(ours, expected));
    let off = off.collect::<Vec<_>>();
    let mean = off.iter().sum::<f32>() / off.len() as f32;
    assert!(mean > 0.0 && mean < most, "{what}: off by {mean} on average");
}

#[test]
fn fewer_bits_move_a_classifier_only_a_little() {
    for (dtype, most) in [Dtype::Bf16, Dtype::Int8].into_iter().zip(ROUNDED) {
        check_rounded(&format!("{dtype:?}"), Cpu::new(dtype, 2), most);
    }
}

#[test]
fn a_merged_adapter_brings_its_head_along() {
    for net @ (_, name, _) in NETS {
        let opened = open(net);
        let merged = Adapters::Merged(opened.0.super_adapter());
        let mut classifier = load(Cpu::new(Dtype::F32, 2), &opened.0, merged);
        let all = all(&opened, name, 0);
        let logits = classifier.classify(&batch(&all)).unwrap();
        let mut kept = 0;
        for (ours, (selection, _, expected)) in logits.iter().zip(&all) {
            if opened.0.shape.keeps_ranks(&selection.shape) {
                kept += 1;
                let off = distance(ours, expected);
                assert!(off <= 1e-4, "{name}: off by {off}");
            }
        }
        assert!(kept >= 4, "{name}: only {kept} sub-networks have all ranks");
    }
}

#[test]
fn a_batch_that_makes_no_sense_is_refused_by_what_is_wrong_with_it() {
    let opened = open(TWO);
    let adapters = Adapters::Beside(vec![opened.0.super_adapter()]);
    let mut classifier = load(Cpu::new(Dtype::F32, 1), &opened.0, adapters);
    let all = all(&opened, TWO.1, 0);
    let good = batch(&all[..4]);
    assert_eq!(classifier.max_positions(), 32);
    let mut refused = |edit: &dyn Fn(&mut TextBatch)| {
        let mut bad = good.clone();
        edit(&mut bad);
        classifier.classify(&bad).unwrap_err().to_string()
    };
    let says = |error: String, what: &str| assert!(error.contains(what), "{error} does not say {what}");
    says(refused(&|b| b.tokens[3] = 97), "tokens below 97, got 97");
    says(refused(&|b| b.token_types[3] = 2), "token types below 2, got 2");
    says(refused(&|b| b.token_types.truncate(57)), "token types");
    says(refused(&|b| *b = TextBatch::default()), "at least one");
    says(refused(&|b| b.texts.truncate(3)), "segments and texts that cover rows 0..58");
    says(refused(&|b| b.texts[1].end -= 1), "texts to None");
    says(refused(&|b| b.segments[0].rows.end -= 1), "segments to Some(57)");
    says(refused(&|b| b.texts = std::iter::once(0..58).collect()), "texts of at most 32 tokens, got 58");
    says(refused(&|b| b.segments[0].selection.adapter = 1), "super-adapters below 1, got 1");
    let split = |b: &mut TextBatch| {
        let second = Segment { rows: 4..58, ..b.segments[0].clone() };
        b.segments[0].rows.end = 4;
        b.segments.push(second);
    };
    says(refused(&split), "segments of whole texts, got one from row 4");
    let three = open(THREE).0;
    let other = three.selection(7, &three.space.maximal());
    says(refused(&|b| b.segments[0].selection.shape = other.shape.clone()), "a sub-network with 2 labels");
    assert_eq!(classifier.classify(&good).unwrap().len(), 4);
}

#[test]
fn a_head_that_does_not_fit_is_refused_by_name() {
    let net = open(TWO).0;
    let refused = |edit: &dyn Fn(&mut BTreeMap<String, HeadTensor>)| {
        let mut adapter = net.super_adapter();
        edit(&mut adapter.head);
        let beside = Adapters::Beside(vec![adapter]);
        let loaded = model::classifier(Cpu::new(Dtype::F32, 1), &net.base, beside, &net.orders);
        loaded.err().unwrap().to_string()
    };
    let says = |error: String, what: &str| assert!(error.contains(what), "{error} does not say {what}");
    // The base is an encoder alone.
    says(refused(&BTreeMap::clear), "no tensor `classifier.weight`");
    says(refused(&|head| drop(head.remove("classifier.bias"))), "no tensor `classifier.bias`");
    let wider = |head: &mut BTreeMap<String, HeadTensor>| {
        head.get_mut("classifier.weight").unwrap().shape = vec![3, 40];
    };
    says(refused(&wider), "`classifier.weight` beside the adapter: expected shape [2, 40], got [3, 40]");
    let stray = |head: &mut BTreeMap<String, HeadTensor>| {
        let tensor = head["classifier.weight"].clone();
        head.insert("score.weight".into(), tensor);
    };
    says(refused(&stray), "`score.weight`, which has no place in this model");
}

#[test]
fn a_family_is_opened_for_what_it_can_do() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let beside = Adapters::Beside(vec![net.super_adapter()]);
    let refused = model::classifier(Reference::new(), &net.base, beside, &net.orders).err().unwrap();
    assert_eq!(refused.to_string(), "LLaMA models do not classify texts");
    let net = open(TWO).0;
    let beside = Adapters::Beside(vec![net.super_adapter()]);
    let refused = model::executor(Reference::new(), &net.base, beside, &net.orders, (1, 4)).err().unwrap();
    assert_eq!(refused.to_string(), "BERT models do not continue texts");
}

/// The labels that the super-adapter in a copy of `tiny-bert-three` has on a base, with a config.json of its own.
fn labels(base: &str, folder: &Path, config: Option<&str>) -> Result<(Vec<String>, bool), String> {
    let config_file = folder.join("config.json");
    match config {
        Some(text) => std::fs::write(&config_file, text).unwrap(),
        None => drop(std::fs::remove_file(&config_file)),
    }
    let base = Base::open(&golden::path(base)).unwrap();
    let classifier = base.config.with_head_of(folder).map_err(|e| e.to_string())?.classifier.unwrap();
    Ok((classifier.labels, classifier.regression))
}

#[test]
fn labels_are_the_adapters_own_else_the_bases_else_numbers() {
    let folder = crate::files::Folder::copy_of("tiny-bert-three/supernet");
    let folder = folder.path();
    let names = |names: &[&str]| (names.iter().map(|n| (*n).to_string()).collect::<Vec<_>>(), false);
    let numbers = names(&["LABEL_0", "LABEL_1", "LABEL_2"]);
    assert_eq!(labels("tiny-bert/base", folder, None).unwrap(), numbers);
    let of_base = names(&["entailment", "neutral", "contradiction"]);
    assert_eq!(labels("tiny-bert-relu/base", folder, None).unwrap(), of_base);
    let own = r#"{"id2label": {"0": "no", "1": "maybe", "2": "yes"}}"#;
    for base in ["tiny-bert/base", "tiny-bert-relu/base"] {
        assert_eq!(labels(base, folder, Some(own)).unwrap(), names(&["no", "maybe", "yes"]));
    }
    let regression = r#"{"problem_type": "regression"}"#;
    assert_eq!(labels("tiny-bert/base", folder, Some(regression)).unwrap(), (numbers.0, true));
    let error = labels("tiny-bert/base", folder, Some(r#"{"id2label": {"0": "no"}}"#)).unwrap_err();
    assert!(error.contains("`id2label`: 1 labels, but `classifier.weight` has 3 rows"), "{error}");
    let error = labels("tiny-bert/base", folder, Some(r#"{"num_labels": 99999999}"#)).unwrap_err();
    assert!(error.contains("`num_labels`: expected a number from 1 to 65536"), "{error}");
}

#[derive(serde::Deserialize)]
struct Agreement {
    classes: Vec<Classes>,
    numbers: Vec<Numbers>,
}

#[derive(serde::Deserialize)]
struct Classes {
    chosen: Vec<usize>,
    right: Vec<usize>,
    matthews: f64,
    f1: f64,
}

#[derive(serde::Deserialize)]
struct Numbers {
    said: Vec<f64>,
    right: Vec<f64>,
    pearson: f64,
    spearman: f64,
}

#[test]
fn glues_scores_are_those_of_their_definitions() {
    let Agreement { classes, numbers } = golden::json("agreement.json");
    let close = |ours: f64, golden: f64| assert!((ours - golden).abs() < 1e-12, "{ours} for {golden}");
    for Classes { chosen, right, matthews, f1 } in classes {
        let pairs = chosen.into_iter().zip(right).collect::<Vec<_>>();
        close(evaluate::matthews(&pairs), matthews);
        close(evaluate::f1(&pairs), f1);
    }
    for Numbers { said, right, pearson, spearman } in numbers {
        let pairs = said.into_iter().zip(right).collect::<Vec<_>>();
        close(evaluate::pearson(&pairs).unwrap(), pearson);
        close(evaluate::spearman(&pairs).unwrap(), spearman);
    }
    // What never varies goes with nothing.
    assert_eq!(evaluate::matthews(&[(1, 0), (1, 1), (1, 0)]), 0.0);
    assert_eq!(evaluate::matthews(&[]), 0.0);
    assert_eq!(evaluate::f1(&[(0, 0)]), 0.0);
    assert_eq!(evaluate::pearson(&[(1.0, 2.0), (1.0, 3.0)]), None);
    assert_eq!(evaluate::spearman(&[]), None);
    // Fisher 1921: r = 0.5 of 30 pairs is atanh(0.5) +- 1.96 / sqrt(27), back through tanh: 0.1704 to 0.7290.
    let (low, high) = evaluate::correlation_interval(0.5, 30);
    assert!((low - 0.1704).abs() < 1e-3 && (high - 0.7290).abs() < 1e-3, "{low} {high}");
}

#[test]
fn an_evaluation_gives_each_text_what_it_gets_alone_whatever_step_it_falls_into() {
    let (net, texts, adapters) = in_turn();
    let mut classifier = load(Cpu::new(Dtype::Int8, 2), &net, adapters);
    // More than one step's tokens.
    let texts = texts.iter().cycle().take(3 * texts.len()).collect::<Vec<_>>();
    let whole = texts.iter().map(|(selection, text, _)| WholeText {
        tokens: text.tokens.clone(),
        token_types: text.token_types.clone(),
        selection: selection.clone(),
    });
    let (mut all, mut steps) = (Vec::new(), 0);
    evaluate::classify(&mut *classifier, &whole.collect::<Vec<_>>(), |numbers| {
        steps += 1;
        all.extend(numbers);
        Ok::<_, BackendError>(())
    })
    .unwrap();
    assert!(steps > 1 && all.len() == texts.len());
    for (text, numbers) in texts.iter().zip(&all).step_by(7) {
        assert_eq!(classifier.classify(&batch([*text])).unwrap(), std::slice::from_ref(numbers));
    }
}
