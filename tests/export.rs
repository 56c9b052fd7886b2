//! Sub-networks as plain models, read back by our own readers. That other programs read the same stands in
//! `cli/export.rs`, which runs tests/python/exports.py.

use crate::files::Folder;
use crate::golden::{self, Supernet, distance, push};
use crate::logits::{Cases, LLAMAS, SPARSE};
use crate::tiny::{self, Tiny};
use lonas::artifact::{
    AdapterConfig, AdapterTensors, ArtifactError, Base, BaseReference, BaseSource, ModelFolder, NumberFormat,
    TensorType, TokenizerSource, write_adapter,
};
use lonas::backend::Selection;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::export::{self, ExportError, Notes, Source, Target};
use lonas::model::llama::{self, LlamaExecutor};
use lonas::model::{self, Batch, Executor, GroupTemplate, Orders};
use lonas::supernet::{Catalog, Kind, SubNetwork};
use lonas::text::gguf_tokenizer;
use lonas::weights::{HostData, HostMatrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Clone, Copy, PartialEq)]
enum Kinds {
    Gguf,
    HuggingFace,
    Peft,
}

/// Exports a sub-network into `out`, without progress.
fn export(
    net: &Supernet,
    sub_network: &SubNetwork,
    kind: Kinds,
    dtype: NumberFormat,
    out: &Path,
) -> Result<Notes, ExportError> {
    let mut catalog = Catalog::new(&net.shape, &net.space);
    let entry = &*catalog.add(&net.shape, &net.space, "mine", sub_network.clone()).unwrap();
    let Supernet { base, folder, shape, space, orders } = net;
    let source = Source { base, folder, shape, space, entry, orders };
    let target = Target { path: out, overwrite: false };
    let (mut told, mut of) = (0, 0);
    let mut on_tensor = |done: usize, total: usize, _: &str| {
        assert!(done == told && total > done, "{done} of {total}");
        (told, of) = (done + 1, total);
    };
    let notes = match kind {
        Kinds::Gguf => export::gguf(source, dtype, target, &mut on_tensor),
        Kinds::HuggingFace => export::hugging_face(source, dtype, target, &mut on_tensor),
        Kinds::Peft => export::peft(source, Some(dtype), target, &mut on_tensor),
    };
    assert!(notes.is_err() || told == of, "{told} of {of} tensors were told of");
    notes
}

/// Logits `(tokens, V)` of a base alone.
fn plain_logits(base: &Base, tokens: &[u32]) -> Vec<f32> {
    let backend = Cpu::new(Dtype::F32, 1);
    let model = llama::load(&backend, base, Vec::new(), &Orders::default()).unwrap();
    let shape = Arc::new(model::model_shape(&base.config, None).full());
    logits(
        LlamaExecutor::new(model, backend, 4, 16).unwrap(),
        Selection { adapter: 0, subnetwork: 0, shape },
        tokens,
    )
}

/// The same of a sub-network, as it is served.
fn served_logits(net: &Supernet, sub_network: &SubNetwork, tokens: &[u32]) -> Vec<f32> {
    let backend = Cpu::new(Dtype::F32, 1);
    let executor = LlamaExecutor::new(net.load(&backend), backend, 4, 16).unwrap();
    logits(executor, net.selection(0, sub_network), tokens)
}

fn logits(mut executor: impl Executor, selection: Selection, tokens: &[u32]) -> Vec<f32> {
    let mut batch = Batch::default();
    push(&mut batch, selection, tokens, 0, &[0, 1]);
    executor.forward(&batch).unwrap().values
}

/// The largest difference, measured by the largest logit.
fn relative(a: &[f32], b: &[f32]) -> f32 {
    distance(a, b) / b.iter().fold(0f32, |m, x| m.max(x.abs()))
}

/// Ranks at random, one width for all layers: what a Hugging Face folder can hold.
fn even(net: &Supernet, random: &mut ChaCha8Rng) -> SubNetwork {
    let width = random.random_range(0..100);
    net.space.pick(|id, n| match net.space.groups()[id].kind {
        Kind::Width => width % n,
        _ => random.random_range(0..n),
    })
}

fn tokens(vocabulary: usize) -> Vec<u32> {
    (0..20).map(|i| ((i * 7 + 3) % vocabulary) as u32).collect()
}

#[test]
fn a_folder_computes_what_its_sub_network_computes() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for (base, name) in LLAMAS {
        let net = Supernet::open(base, name);
        let tokens = tokens(net.base.config.vocabulary);
        for _ in 0..5 {
            let folder = Folder::empty();
            let sub_network = even(&net, &mut random);
            export(&net, &sub_network, Kinds::HuggingFace, NumberFormat::F32, &folder.file("out")).unwrap();
            let plain = plain_logits(&Base::open(&folder.file("out")).unwrap(), &tokens);
            let off = relative(&plain, &served_logits(&net, &sub_network, &tokens));
            assert!(off <= 1e-5, "{name} {:?}: off by {off}", sub_network.choices());
        }
    }
}

/// What is a LLaMA but for positions, a window, biases or norms.
const KIN: [(&str, &str); 4] = [
    ("tiny-llama3/base", "tiny-llama3"),
    ("tiny-mistral/base", "tiny-mistral"),
    ("tiny-qwen2/base", "tiny-qwen2"),
    ("tiny-qwen3/base", "tiny-qwen3"),
];

#[test]
fn what_a_format_cannot_hold_is_refused_and_never_left_out() {
    let refused = |(base, name), kind, choices: fn(&Supernet) -> SubNetwork| {
        let (net, folder) = (Supernet::open(base, name), Folder::empty());
        let said = export(&net, &choices(&net), kind, NumberFormat::F32, &folder.file("out")).unwrap_err();
        assert!(!folder.file("out").exists(), "{name}");
        said.to_string()
    };
    let named = ["scaled positions", "a sliding window", "biases of queries", "norms of heads"];
    for (net, what) in KIN.into_iter().zip(named) {
        let said = refused(net, Kinds::Gguf, |net| net.space.maximal());
        // Qwen3's tiny model has both.
        assert!(said.contains(what) || net.1 == "tiny-qwen3" && said.contains("scaled positions"), "{said}");
    }
    let other_heads = |net: &Supernet| net.space.sub_network(vec![8, 8, 28, 28, 8, 8, 32, 16]).unwrap();
    let said = refused(("tiny-heads/base", "tiny-heads"), Kinds::HuggingFace, other_heads);
    assert!(said.contains("layer 0 has 4 query and 2 key-value heads and layer 1 has others"), "{said}");
}

#[test]
fn a_folder_computes_what_pytorch_computes() {
    // An adapter that counts only where the base is not zero is added so for every rank.
    let heads = ["tiny-heads", "tiny-heads-ordered"].map(|name| ("tiny-heads/base", name));
    for (base, name) in LLAMAS.into_iter().chain([SPARSE]).chain(KIN).chain(heads) {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let golden = crate::logits::golden_logits(name, &cases, tokens.len());
        let mut held = 0;
        for (case, golden) in cases.iter().zip(&golden) {
            let (folder, sub_network) =
                (Folder::empty(), net.space.sub_network(case.choices.clone()).unwrap());
            let out = folder.file("out");
            if export(&net, &sub_network, Kinds::HuggingFace, NumberFormat::F32, &out).is_err() {
                continue;
            }
            held += 1;
            let base = Base::open(&out).unwrap();
            for (tokens, golden) in tokens.iter().zip(golden) {
                let off = distance(&plain_logits(&base, tokens), golden);
                assert!(off <= 1e-4, "{name} {}: off by {off}", case.name);
            }
        }
        assert!(held >= 3, "{name}: only {held} cases have one width and number of heads");
    }
}

#[test]
fn a_layer_of_which_nothing_is_kept_is_not_exported_and_half_a_layer_is_refused() {
    let net = Supernet::open("tiny-depth/base", "tiny-depth");
    let tokens = tokens(net.base.config.vocabulary);
    let choices = |widths: [usize; 4], heads: [usize; 4]| {
        let choices = [[8, 5, 8, 5], widths, [5, 5, 8, 8], heads].concat();
        net.space.sub_network(choices).unwrap()
    };
    let written = |sub_network: &SubNetwork| {
        let (folder, kind) = (Folder::empty(), Kinds::HuggingFace);
        export(&net, sub_network, kind, NumberFormat::F32, &folder.file("out"))?;
        Ok::<_, ExportError>((Base::open(&folder.file("out")).unwrap(), folder))
    };
    for (widths, heads, layers) in [
        ([40, 0, 0, 40], [32, 0, 0, 32], 2),
        ([40, 40, 0, 40], [32, 32, 0, 32], 3),
        ([40, 40, 40, 40], [32, 32, 32, 32], 4),
    ] {
        let sub_network = choices(widths, heads);
        let (base, _folder) = written(&sub_network).unwrap();
        assert_eq!(base.config.layers, layers);
        let off = relative(&plain_logits(&base, &tokens), &served_logits(&net, &sub_network, &tokens));
        assert!(off <= 1e-5, "{layers} layers: off by {off}");
    }
    let refused = |widths, heads| written(&choices(widths, heads)).err().unwrap().to_string();
    assert!(refused([40, 0, 40, 40], [32, 32, 32, 32]).contains("layer 1 has an attention and no MLP"));
    assert!(refused([40, 40, 40, 40], [32, 32, 0, 32]).contains("layer 2 has an MLP and no attention"));
    let off = choices([40, 40, 40, 40], [16, 16, 32, 32]);
    assert!(written(&off).err().unwrap().to_string().contains("layer 2 has others"));
}

#[test]
fn a_quantised_base_becomes_a_folder_of_plain_numbers() {
    let net = Supernet::of(&golden::path("gptq/asym-64-act"), &golden::path("gptq/supernet"));
    let (folder, tokens) = (Folder::empty(), tokens(48));
    let sub_network = even(&net, &mut ChaCha8Rng::seed_from_u64(5));
    export(&net, &sub_network, Kinds::HuggingFace, NumberFormat::F32, &folder.file("out")).unwrap();
    let config = std::fs::read_to_string(folder.file("out").join("config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
    let plain = plain_logits(&Base::open(&folder.file("out")).unwrap(), &tokens);
    let off = relative(&plain, &served_logits(&net, &sub_network, &tokens));
    assert!(off <= 1e-5, "off by {off}");
}

#[test]
fn a_gguf_file_of_a_folder_computes_what_its_sub_network_computes_and_has_its_tokenizer() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    let net = Supernet::of(&tiny.base(), &tiny.model(tiny::NAME));
    let tokens = tokens(tiny::VOCABULARY);
    let sub_network = even(&net, &mut ChaCha8Rng::seed_from_u64(4));
    let file = folder.file("out.gguf");
    export(&net, &sub_network, Kinds::Gguf, NumberFormat::F32, &file).unwrap();
    let plain = Base::open(&file).unwrap();
    let off = relative(&plain_logits(&plain, &tokens), &served_logits(&net, &sub_network, &tokens));
    assert!(off <= 1e-5, "off by {off}");
    let TokenizerSource::Gguf(vocabulary) = &plain.tokenizer else { panic!("no vocabulary") };
    assert_eq!((vocabulary.model.as_str(), vocabulary.pre.as_str()), ("gpt2", "gpt-2"));
    assert_eq!(
        (vocabulary.bos, vocabulary.eos, vocabulary.add_bos),
        (Some(tiny::BOS), Some(tiny::EOS), true)
    );
    assert!(vocabulary.chat_template.as_ref().unwrap().contains("raise_exception"));
    assert_eq!(vocabulary.token_types[..4], [3, 3, 3, 1]);
    assert_eq!((vocabulary.tokens.len(), vocabulary.merges.len()), (tiny::VOCABULARY, 20));
}

/// A super-network on one of the golden GGUF files; the layers of `plain` have all the formats that a file may have.
fn on_gguf(folder: &Folder, name: &str) -> Supernet {
    let path = golden::path(&format!("gguf/{name}.gguf"));
    let base = Base::open(&path).unwrap();
    let targets = ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"].map(String::from).to_vec();
    let config = AdapterConfig { rank: 4, alpha: 6.0, target_modules: targets, ..AdapterConfig::default() };
    let shape = model::model_shape(&base.config, Some(&config));
    let template = |kind, modules: [&str; 2], choices: &[usize]| GroupTemplate {
        kind,
        modules: modules.map(String::from).to_vec(),
        choices: choices.to_vec(),
        layers: None,
    };
    let templates = [
        template(Kind::Rank, ["q_proj", "k_proj"], &[4, 3, 1]),
        template(Kind::Width, ["gate_proj", "up_proj"], &[base.config.intermediate, 20, 7]),
    ];
    let space = model::search_space(&base.config, &shape, &templates).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut matrix = |rows, columns| {
        let values = (0..rows * columns).map(|_| random.random_range(-0.3..0.3)).collect();
        HostMatrix { name: String::new(), rows, columns, data: HostData::F32(values) }
    };
    let adapted = shape.linears.iter().filter_map(|l| Some((l, l.rank?)));
    let tensors = adapted.map(|(l, rank)| (l.name.clone(), (matrix(rank, l.inp), matrix(l.out, rank))));
    let tensors = tensors.collect::<AdapterTensors>();
    write_adapter(folder.path(), &config, &tensors, TensorType::F32).unwrap();
    let width = base.config.intermediate;
    let order = |layer: usize| (0..width).map(|i| (i * 5 + layer) % width).collect::<Vec<_>>();
    let orders = space.groups().iter().enumerate().filter(|(_, g)| g.kind == Kind::Width);
    let orders = orders.zip(0..).map(|((id, _), layer)| (id, order(layer))).collect();
    let reference = BaseReference { source: BaseSource::Path(path.clone()), sha256: None };
    ModelFolder::write_supernet(folder.path(), "on-gguf", &reference, 1.5, &shape, &space, &orders).unwrap();
    Supernet::of(&path, folder.path())
}

#[test]
fn what_is_exported_from_a_gguf_base_computes_the_same_and_keeps_its_metadata() {
    let (model, folder) = (Folder::empty(), Folder::empty());
    let net = on_gguf(&model, "plain");
    let tokens = tokens(net.base.config.vocabulary);
    let mut random = ChaCha8Rng::seed_from_u64(6);
    for i in 0..3 {
        let sub_network = even(&net, &mut random);
        let served = served_logits(&net, &sub_network, &tokens);
        let (file, out) = (folder.file(&format!("{i}.gguf")), folder.file(&format!("{i}")));
        export(&net, &sub_network, Kinds::Gguf, NumberFormat::F32, &file).unwrap();
        export(&net, &sub_network, Kinds::HuggingFace, NumberFormat::F32, &out).unwrap();
        for path in [&file, &out] {
            let plain = Base::open(path).unwrap();
            let off = relative(&plain_logits(&plain, &tokens), &served);
            assert!(off <= 1e-5, "{}: off by {off}", path.display());
            let (ours, theirs) = (&plain.config, &net.base.config);
            assert_eq!(
                (ours.rope_theta, ours.norm_eps, ours.max_positions, &ours.eos_tokens),
                (theirs.rope_theta, theirs.norm_eps, theirs.max_positions, &theirs.eos_tokens)
            );
        }
        assert_eq!(Base::open(&file).unwrap().tokenizer, net.base.tokenizer);
    }
}

#[test]
fn scaled_positions_of_a_gguf_base_become_a_rule_or_are_refused() {
    let (model, folder) = (Folder::empty(), Folder::empty());
    let net = on_gguf(&model, "linear");
    let (tokens, out) = (tokens(net.base.config.vocabulary), folder.file("out"));
    export(&net, &net.space.maximal(), Kinds::HuggingFace, NumberFormat::F32, &out).unwrap();
    let plain = Base::open(&out).unwrap();
    assert_eq!(plain.config.rope_factors, [3.0; 8]);
    let served = served_logits(&net, &net.space.maximal(), &tokens);
    assert!(relative(&plain_logits(&plain, &tokens), &served) <= 1e-5);

    let model = Folder::empty();
    let net = on_gguf(&model, "llama3");
    for (kind, named) in
        [(Kinds::HuggingFace, "a factor for each frequency"), (Kinds::Gguf, "scaled positions")]
    {
        let said = export(&net, &net.space.maximal(), kind, NumberFormat::F32, &folder.file("refused"));
        let said = said.unwrap_err().to_string();
        assert!(said.contains(named), "{said}");
        assert!(!folder.file("refused").exists());
    }
}

#[test]
fn a_tokenizer_out_of_a_gguf_base_reads_texts_as_before() {
    let (model, folder) = (Folder::empty(), Folder::empty());
    let mut net = on_gguf(&model, "plain");
    // A file may name another end, of a turn.
    net.base.config.eos_tokens = vec![5, 1];
    let out = folder.file("out");
    export(&net, &net.space.maximal(), Kinds::HuggingFace, NumberFormat::F16, &out).unwrap();
    let TokenizerSource::Gguf(vocabulary) = &net.base.tokenizer else { panic!("no vocabulary") };
    let config: Value =
        serde_json::from_slice(&std::fs::read(out.join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&"<|start|>".into(), &"<|end|>".into()));
    assert_eq!(config["chat_template"], vocabulary.chat_template.as_deref().unwrap());
    for file in ["config.json", "generation_config.json"] {
        let fields: Value = serde_json::from_slice(&std::fs::read(out.join(file)).unwrap()).unwrap();
        assert_eq!(fields["eos_token_id"], serde_json::json!([1, 5]), "{file}");
    }
    let read = lonas::text::Tokenizer::from_hugging_face(&out.join("tokenizer.json"), None, None).unwrap();
    let id = |token: &str| vocabulary.tokens.iter().position(|t| t == token).unwrap() as u32;
    // As tests/gguf.rs has it of the file itself, the beginning of sequence in front.
    assert_eq!(read.encode(" the thm<|end|>", true).unwrap(), [0, id("Ġthe"), id("Ġ"), id("th"), id("m"), 1]);
    // And back into the words of a GGUF file.
    let again = gguf_tokenizer(
        &out.join("tokenizer.json"),
        Vec::new(),
        Some("<|start|>"),
        Some("<|end|>"),
        vocabulary.tokens.len(),
    );
    let parts = again.unwrap();
    assert_eq!(
        (&parts.tokens, &parts.merges, &parts.pre),
        (&vocabulary.tokens, &vocabulary.merges, &vocabulary.pre)
    );
    assert_eq!((&parts.token_types, parts.add_bos), (&vocabulary.token_types, true));
}

#[test]
fn fewer_bits_stay_near() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    let net = Supernet::of(&tiny.base(), &tiny.model(tiny::NAME));
    let tokens = tokens(tiny::VOCABULARY);
    let served = served_logits(&net, &net.space.heuristic(), &tokens);
    let mut last = 0.0;
    for (dtype, most) in [(NumberFormat::F32, 1e-5), (NumberFormat::F16, 5e-3), (NumberFormat::Bf16, 5e-2)] {
        let file = folder.file(&format!("{}.gguf", dtype.name()));
        export(&net, &net.space.heuristic(), Kinds::Gguf, dtype, &file).unwrap();
        let off = relative(&plain_logits(&Base::open(&file).unwrap(), &tokens), &served);
        assert!(off <= most && off > last, "{}: off by {off}", dtype.name());
        last = off;
    }
}

#[test]
fn what_a_format_cannot_hold_is_refused_by_name() {
    let folder = Folder::empty();
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let refused = |sub_network: &SubNetwork, kind, dtype| {
        let error = export(&net, sub_network, kind, dtype, &folder.file("out.gguf")).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
        error
    };
    let uneven = net
        .space
        .pick(|id, n| if net.space.groups()[id].kind == Kind::Width && id % 3 == 1 { n - 1 } else { 0 });
    let said = refused(&uneven, Kinds::HuggingFace, NumberFormat::F32);
    crate::files::assert_names(&said, &["`mine`", "80 in layers 0, 2; 40 in layers 1", "GGUF"]);
    let said = refused(&net.space.minimal(), Kinds::Peft, NumberFormat::F32);
    crate::files::assert_names(&said, &["group 3", "model.layers.0.mlp.gate_proj.weight", "40 of 80"]);
    for (kind, dtype) in [
        (Kinds::HuggingFace, NumberFormat::Q8_0),
        (Kinds::Peft, NumberFormat::Q8_0),
        (Kinds::Peft, NumberFormat::F16),
    ] {
        let said = refused(&net.space.maximal(), kind, dtype);
        crate::files::assert_names(&said, &[dtype.name(), "f32"]);
    }
    let said = refused(&net.space.maximal(), Kinds::Gguf, NumberFormat::F32);
    crate::files::assert_names(&said, &["tokenizer.json"]);
    let net = Supernet::open("sparse/base", "sparse");
    let error = export(&net, &net.space.maximal(), Kinds::Peft, NumberFormat::F32, &folder.file("out"));
    crate::files::assert_names(
        &error.unwrap_err().to_string(),
        &["sparse_adapter", "gguf and hf can hold it"],
    );
}

#[test]
fn an_adapter_of_a_classifier_brings_its_head_along() {
    let (net, folder) = (Supernet::open("tiny-bert/base", "tiny-bert"), Folder::empty());
    let out = folder.file("out");
    export(&net, &net.space.maximal(), Kinds::Peft, NumberFormat::F32, &out).unwrap();
    let whole = net.folder.head().unwrap();
    assert!(!whole.is_empty());
    assert_eq!(lonas::artifact::read_adapter_head(&out).unwrap(), whole);
    let said = |file: &str| std::fs::read_to_string(out.join(file)).unwrap();
    assert!(said("adapter_config.json").contains("modules_to_save"));
    assert!(said("README.md").contains("AutoModelForSequenceClassification.from_pretrained"));
}

#[test]
fn weights_that_a_format_cannot_hold_are_refused_by_tensor_and_leave_nothing() {
    for (value, dtype, named) in
        [(1e6f32, NumberFormat::F16, "too large for f16"), (f32::NAN, NumberFormat::F32, "NaN")]
    {
        let (base, model, folder) =
            (Folder::copy_of("tiny-tied/base"), Folder::copy_of("tiny-tied/supernet"), Folder::empty());
        let tensor = "model.layers.1.self_attn.o_proj.weight";
        base.edit_tensors("model.safetensors", |tensors| {
            tensors.get_mut(tensor).unwrap().2[..4].copy_from_slice(&value.to_le_bytes());
        });
        let net = Supernet::of(base.path(), model.path());
        let error = export(&net, &net.space.maximal(), Kinds::HuggingFace, dtype, &folder.file("out"));
        crate::files::assert_names(&error.unwrap_err().to_string(), &[tensor, named]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn an_adapter_that_does_not_fit_its_base_is_refused_by_module() {
    let (model, folder) = (Folder::copy_of("tiny-tied/supernet"), Folder::empty());
    let gone = "base_model.model.model.layers.2.mlp.up_proj";
    model.edit_tensors("adapter_model.safetensors", |tensors| {
        tensors.retain(|name, _| !name.starts_with(gone));
    });
    let net = Supernet::of(&golden::path("tiny-tied/base"), model.path());
    for kind in [Kinds::HuggingFace, Kinds::Peft] {
        let error =
            export(&net, &net.space.maximal(), kind, NumberFormat::F32, &folder.file("out")).unwrap_err();
        crate::files::assert_names(&error.to_string(), &["model.layers.2.mlp.up_proj"]);
    }
}

#[test]
fn a_folder_is_replaced_only_if_an_export_wrote_it() {
    let (parent, net) = (Folder::empty(), Supernet::open("tiny-tied/base", "tiny-tied"));
    let mut catalog = Catalog::new(&net.shape, &net.space);
    let entry = &*catalog.add(&net.shape, &net.space, "mine", net.space.minimal()).unwrap();
    let Supernet { base, folder, shape, space, orders } = &net;
    let source = Source { base, folder, shape, space, entry, orders };
    let out: PathBuf = parent.file("out");
    let write = |overwrite| {
        let target = Target { path: &out, overwrite };
        export::hugging_face(source, NumberFormat::F32, target, &mut |_, _, _| {})
    };
    write(false).unwrap();
    let first = std::fs::read(out.join("model.safetensors")).unwrap();
    let taken = write(false).unwrap_err();
    assert!(matches!(taken, ExportError::Artifact(ArtifactError::Exists { .. })), "{taken}");
    std::fs::write(out.join("model.safetensors"), "old").unwrap();
    write(true).unwrap();
    assert!(std::fs::read(out.join("model.safetensors")).unwrap() == first);
    std::fs::write(out.join("thesis.txt"), "years").unwrap();
    let kept = write(true).unwrap_err().to_string();
    crate::files::assert_names(&kept, &["out", "`thesis.txt`"]);
    assert_eq!(std::fs::read(out.join("thesis.txt")).unwrap(), b"years");
    assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1, "nothing is left beside it");
}
