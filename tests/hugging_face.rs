//! Hugging Face folders: sharded and single, whole and damaged.

use crate::files::{Folder, assert_names};
use crate::golden;
use lonas::artifact::Base;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::model::{self, Orders, llama};
use safetensors::Dtype as FileType;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const SHARDED: &str = "tiny-untied-bf16/base";
const SINGLE: &str = "tiny-tied/base";
const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const UP: &str = "model.layers.1.mlp.up_proj.weight";

/// Opens the folder and reads every tensor of it.
fn load(folder: &Folder) -> Result<(), String> {
    let base = Base::open(folder.path()).map_err(|e| e.to_string())?;
    let loaded = llama::load(&Cpu::new(Dtype::F32, 1), &base, Vec::new(), &Orders::default());
    loaded.map(|_| ()).map_err(|e| e.to_string())
}

/// The message of the error that a copy of `base`, damaged by `damage`, is refused with.
#[track_caller]
fn refused(base: &str, damage: impl FnOnce(&Folder)) -> String {
    let folder = Folder::copy_of(base);
    load(&folder).unwrap();
    damage(&folder);
    load(&folder).unwrap_err()
}

#[test]
fn one_file_and_several_shards_have_the_same_tensors() {
    let (sharded, single) = (Folder::copy_of(SHARDED), Folder::copy_of(SHARDED));
    let mut all = BTreeMap::new();
    for shard in ["model-00001-of-00003", "model-00002-of-00003", "model-00003-of-00003"] {
        all.extend(single.tensors(&format!("{shard}.safetensors")));
        single.remove(&format!("{shard}.safetensors"));
    }
    single.remove(INDEX);
    single.write_tensors(MODEL, &all);
    let (sharded, single) = (Base::open(sharded.path()).unwrap(), Base::open(single.path()).unwrap());
    assert_eq!(sharded.config, single.config);
    for (name, (_, shape, bytes)) in &all {
        let widen = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        let expected = bytes.chunks_exact(2).map(widen).collect::<Vec<_>>();
        for base in [&sharded, &single] {
            let values = match shape.as_slice() {
                &[rows, columns] => base.matrix(name, rows, columns).unwrap().to_f32(),
                shape => base.vector(name, shape[0]).unwrap().data,
            };
            assert!(values == expected, "{name}");
        }
    }
}

/// Bytes can only be used where they lie if bf16 numbers may begin there.
#[test]
fn tensors_at_odd_addresses_are_read_as_well() {
    let (plain, odd) = (Folder::copy_of(SHARDED), Folder::copy_of(SHARDED));
    let shard = "model-00002-of-00003.safetensors";
    let bytes = odd.read(shard);
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let (text, values) = bytes[8..].split_at(header as usize);
    // One more space behind the header's JSON.
    let moved = [&(header + 1).to_le_bytes()[..], text, b" ", values].concat();
    odd.write(shard, moved);
    let names = plain.tensors(shard).into_iter().filter(|(_, (_, shape, _))| shape.len() == 2);
    let [plain, odd] = [plain, odd].map(|folder| Base::open(folder.path()).unwrap());
    let mut count = 0;
    for (name, (_, shape, _)) in names {
        let [expected, got] =
            [&plain, &odd].map(|base| base.matrix(&name, shape[0], shape[1]).unwrap().to_f32());
        assert!(got == expected, "{name}");
        count += 1;
    }
    assert!(count > 0);
}

#[test]
fn a_bases_tensors_are_known_from_its_sizes() {
    for name in [SINGLE, SHARDED, "tiny-bias-headdim/base", "tiny-mpt-split/base"] {
        let (folder, mut expected) = (Folder::copy_of(name), BTreeMap::new());
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            if file.ends_with(".safetensors") {
                expected.extend(folder.tensors(&file).into_iter().map(|(name, (_, shape, _))| (name, shape)));
            }
        }
        let config = Base::open(folder.path()).unwrap().config;
        let tensors = model::base_tensors(&config).into_iter().map(|t| (t.name, t.shape));
        assert_eq!(tensors.collect::<BTreeMap<_, _>>(), expected, "{name}");
    }
}

#[test]
fn a_missing_or_foreign_shard_is_refused_by_name() {
    let message = refused(SHARDED, |f| f.remove("model-00002-of-00003.safetensors"));
    assert_names(&message, &["model-00002-of-00003.safetensors", "No such file"]);

    for outside in ["../x", "/etc/hostname", "..", "a/b", "model.safetensors/", ""] {
        let message =
            refused(SHARDED, |f| f.edit_json(INDEX, |j| j["weight_map"]["lm_head.weight"] = json!(outside)));
        assert_names(&message, &[INDEX, "weight_map", &format!("{outside:?}")]);
    }
    let message = refused(SHARDED, |f| {
        f.write_tensors("again.safetensors", &f.tensors("model-00001-of-00003.safetensors"));
        f.edit_json(INDEX, |j| j["weight_map"]["x"] = json!("again.safetensors"));
    });
    assert_names(&message, &["tensor `", "stands in another file too", ".safetensors"]);
    assert_names(&refused(SHARDED, |f| f.write(INDEX, "{\"weight_map\": 3}")), &[INDEX, "weight_map"]);
    assert_names(&refused(SHARDED, |f| f.write(INDEX, "{")), &[INDEX]);
    assert_names(&refused(SINGLE, |f| f.remove(MODEL)), &[MODEL, "No such file"]);
    assert_names(&refused(SINGLE, |f| f.remove("config.json")), &["config.json", "No such file"]);
}

#[test]
fn a_missing_misshaped_or_foreign_tensor_is_refused_by_name() {
    let edit = |edit: fn(&mut crate::files::Tensors)| refused(SINGLE, |f| f.edit_tensors(MODEL, edit));
    let message = edit(|t| {
        t.remove(UP);
    });
    assert_names(&message, &["there is no tensor", UP]);
    let message = edit(|t| t.get_mut(UP).unwrap().1.reverse());
    assert_names(&message, &[MODEL, UP, "expected shape [80, 48], got [48, 80]"]);
    let message = edit(|t| t.get_mut(UP).unwrap().1 = vec![80, 48, 1]);
    assert_names(&message, &[MODEL, UP, "[80, 48, 1]"]);
    let message = edit(|t| t.get_mut(UP).unwrap().0 = FileType::I32);
    assert_names(&message, &[MODEL, UP, "I32"]);
    let message = edit(|t| t.get_mut("model.norm.weight").unwrap().1 = vec![48, 1]);
    assert_names(&message, &[MODEL, "model.norm.weight", "[48, 1]"]);
}

#[test]
fn a_damaged_safetensors_file_is_refused_by_name() {
    let whole = std::fs::read(golden::path(SINGLE).join(MODEL)).unwrap();
    let with = |bytes: &[u8]| refused(SINGLE, |f| f.write(MODEL, bytes));
    for length in [0, 7, 8, 9, 100, 5000, whole.len() / 2, whole.len() - 1] {
        assert_names(&with(&whole[..length]), &[MODEL, "not a safetensors file"]);
    }
    assert_names(&with(&[whole.as_slice(), &[0]].concat()), &[MODEL, "not a safetensors file"]);
    for header in [u64::MAX, u64::MAX - 7, i64::MAX as u64, 100_000_001, 99_999_999, whole.len() as u64, 0] {
        let bytes = [&header.to_le_bytes(), &whole[8..]].concat();
        assert_names(&with(&bytes), &[MODEL, "not a safetensors file"]);
    }
    // A header by hand, since no writer writes these.
    let file = |header: &Value, data: usize| {
        let header = header.to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
    };
    let tensor = |begin: u64, end: u64, shape: Value| json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
    for header in [
        // Overlapping, a gap, backwards, a size that is not the shape's, a shape that overflows.
        json!({"a": tensor(0, 16, json!([4])), "b": tensor(0, 16, json!([4]))}),
        json!({"a": tensor(0, 8, json!([2])), "b": tensor(12, 16, json!([1]))}),
        json!({"a": tensor(16, 0, json!([4]))}),
        json!({"a": tensor(0, 16, json!([5]))}),
        json!({"a": tensor(0, 16, json!([1u64 << 33, 1u64 << 33]))}),
        json!({"a": tensor(0, 1 << 40, json!([1u64 << 38]))}),
        json!({"a": tensor(0, 16, json!([-4]))}),
    ] {
        assert_names(&with(&file(&header, 16)), &[MODEL, "not a safetensors file"]);
    }
}

#[test]
fn a_config_that_no_llama_has_is_refused_by_field() {
    let cases = [
        ("hidden_size", json!(0), "0 is out of range"),
        ("hidden_size", json!(1_000_000_000_000_000_000u64), "out of range"),
        ("hidden_size", json!(-48), "a whole number"),
        ("hidden_size", json!("48"), "a whole number"),
        ("hidden_size", Value::Null, "missing"),
        ("intermediate_size", json!(0), "0 is out of range"),
        ("num_hidden_layers", json!(0), "0 is out of range"),
        ("num_hidden_layers", json!(1_000_000_000), "out of range"),
        // Small enough to be a dimension, large enough to allocate gigabytes of names.
        ("num_hidden_layers", json!(16_000_000), "out of range"),
        ("num_hidden_layers", json!(1.5), "a whole number"),
        ("num_key_value_heads", json!(4), "4 does not divide 6"),
        ("num_key_value_heads", json!(0), "0 is out of range"),
        ("head_dim", json!(7), "7 is odd"),
        ("head_dim", json!(0), "0 is out of range"),
        ("vocab_size", json!(0), "0 is out of range"),
        ("vocab_size", json!(1u64 << 40), "out of range"),
        ("max_position_embeddings", json!(0), "0 is out of range"),
        ("rms_norm_eps", json!(0.0), "out of range"),
        ("rms_norm_eps", json!(1e300), "out of range"),
        ("rope_parameters", json!("yarn"), "an object"),
        ("rope_scaling", json!([1.0]), "an object"),
        ("model_type", json!("gemma"), "supported: llama"),
        ("model_type", Value::Null, "supported: llama"),
        ("hidden_act", json!("gelu"), "`gelu` is not supported"),
        ("sliding_window", json!(4096), "not supported for llama"),
        ("tie_word_embeddings", json!("yes"), "true or false"),
        ("eos_token_id", json!([2, "x"]), "a token id"),
        ("bos_token_id", json!(-1), "a token id"),
    ];
    for (field, value, reason) in cases {
        let message = refused(SINGLE, |f| f.edit_json("config.json", |j| j[field] = value));
        assert_names(&message, &["config.json", &format!("`{field}`"), reason]);
    }
    let message = refused(SINGLE, |f| {
        f.edit_json("config.json", |j| {
            j.as_object_mut().unwrap().remove("head_dim");
            j["num_attention_heads"] = json!(7);
            j["num_key_value_heads"] = json!(7);
        });
    });
    assert_names(&message, &["config.json", "`num_attention_heads`", "7 attention heads do not divide"]);
    let scaled = |factor: Value| json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192});
    for (field, value, of_rope, reason) in [
        ("rope_parameters", json!({"rope_theta": "x"}), "rope_theta", "a number"),
        (
            "rope_scaling",
            json!({"rope_type": "default", "rope_theta": 777.0}),
            "rope_theta",
            "is 777 in one place and 10000 in another",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "rope_type",
            "`yarn` is not supported",
        ),
        ("rope_parameters", json!({"rope_theta": -1.0}), "rope_theta", "out of range"),
        ("rope_scaling", json!({"type": "linear"}), "factor", "a positive number"),
        ("rope_scaling", json!({"type": "linear", "factor": -2.0}), "factor", "a positive number"),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8.0}),
            "low_freq_factor",
            "a positive number",
        ),
        ("rope_parameters", scaled(json!(8.0)), "high_freq_factor", "more than low_freq_factor"),
        ("rope_parameters", scaled(json!("8")), "factor", "a number"),
    ] {
        let message = refused(SINGLE, |f| f.edit_json("config.json", |j| j[field] = value));
        assert_names(&message, &["config.json", &format!("`{of_rope}`"), reason]);
    }
    for (family, field, value, reason) in [
        ("mistral", "sliding_window", json!(0), "see nothing"),
        ("mistral", "sliding_window", json!("all"), "a whole number"),
        ("qwen2", "use_sliding_window", json!(true), "not supported"),
        ("bloom", "n_head", json!(7), "7 attention heads do not divide"),
        ("bloom", "layer_norm_epsilon", json!(-1.0), "out of range"),
        ("mpt", "no_bias", json!(false), "no biases are supported"),
        ("mpt", "logit_scale", json!(0.5), "are supported"),
        ("mpt", "norm_type", json!("rmsnorm"), "`rmsnorm` is not supported"),
        ("bert", "position_embedding_type", json!("relative_key"), "`relative_key` is not supported"),
        ("bert", "is_decoder", json!(true), "only encoders"),
        (
            "bert",
            "architectures",
            json!(["BertForTokenClassification"]),
            "`BertForTokenClassification` is not",
        ),
        ("bert", "hidden_act", json!("swish"), "`swish` is not supported"),
        ("bert", "id2label", json!({"0": "no", "2": "yes"}), "a name for each number"),
        ("bert", "num_labels", json!(0), "a number from 1 to"),
    ] {
        let message = refused(SINGLE, |f| {
            f.edit_json("config.json", |j| {
                (j["model_type"], j["hidden_act"]) =
                    (json!(family), json!(if family == "bert" { "gelu" } else { "silu" }));
                j[field] = value;
            });
        });
        let named = if reason.contains("do not divide") { "num_attention_heads" } else { field };
        assert_names(&message, &["config.json", &format!("`{named}`"), reason]);
    }
}

#[test]
fn a_config_that_contradicts_the_tensors_is_refused_by_tensor() {
    for (field, value, tensor) in [
        ("num_hidden_layers", 4, "model.layers.3."),
        ("vocab_size", 98, "model.embed_tokens.weight"),
        ("intermediate_size", 79, "gate_proj"),
        ("num_key_value_heads", 3, "k_proj"),
        ("head_dim", 16, "q_proj"),
    ] {
        let message = refused(SINGLE, |f| f.edit_json("config.json", |j| j[field] = json!(value)));
        assert_names(&message, &["tensor `", tensor]);
    }
    let message = refused(SINGLE, |f| f.edit_json("config.json", |j| j["attention_bias"] = json!(true)));
    assert_names(&message, &["there is no tensor", "q_proj.bias"]);
    let message =
        refused(SINGLE, |f| f.edit_json("config.json", |j| j["tie_word_embeddings"] = json!(false)));
    assert_names(&message, &["there is no tensor", "lm_head.weight"]);
}

#[test]
fn a_head_beside_the_embedding_that_it_is_tied_to_must_be_the_same() {
    let folder = Folder::copy_of(SINGLE);
    let mut tensors = folder.tensors(MODEL);
    let mut head = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), head.clone());
    folder.write_tensors(MODEL, &tensors);
    load(&folder).unwrap();
    head.2[7] ^= 1;
    tensors.insert("lm_head.weight".into(), head);
    folder.write_tensors(MODEL, &tensors);
    assert_names(&load(&folder).unwrap_err(), &["tie_word_embeddings", "lm_head.weight is not"]);
}

#[test]
fn positions_that_lie_closer_are_more() {
    let folder = Folder::copy_of(SINGLE);
    let positions = || Base::open(folder.path()).unwrap().config.max_positions;
    let before = positions();
    folder.edit_json("config.json", |j| j["rope_scaling"] = json!({"type": "linear", "factor": 2.5}));
    assert_eq!(positions(), before * 5 / 2);
}

/// Why a tiny MPT with another config.json is refused.
#[track_caller]
fn refused_mpt(edit: impl FnOnce(&mut Value)) -> String {
    let folder = Folder::copy_of("tiny-mpt/base");
    folder.edit_json("config.json", edit);
    Base::open(folder.path()).unwrap_err().to_string()
}

#[test]
fn an_mpt_that_would_be_computed_otherwise_is_refused_by_field() {
    for (field, value) in [
        ("alibi", json!(false)),
        ("alibi_bias_max", json!(4)),
        ("clip_qkv", json!(6.0)),
        ("qk_ln", json!(true)),
        ("prefix_lm", json!(true)),
        ("softmax_scale", json!(0.125)),
        ("attn_logit_softcapping", json!(30.0)),
        ("sliding_window_size", json!(128)),
        ("attn_type", json!("multiquery_attention")),
    ] {
        let message = refused_mpt(|config| config["attn_config"][field] = value);
        assert_names(&message, &["config.json", &format!("`{field}`"), "supported"]);
    }
    let message = refused_mpt(|config| config["ffn_config"] = json!({"ffn_type": "mptglu"}));
    assert_names(&message, &["config.json", "`ffn_type`", "`mptglu` is not supported"]);
}

#[test]
fn the_heads_of_an_mpt_divide_its_width() {
    let message = refused_mpt(|config| config["n_heads"] = json!(7));
    assert_names(&message, &["config.json", "`num_attention_heads`", "7 attention heads do not divide"]);
}

#[test]
fn queries_keys_and_values_of_an_mpt_may_lie_in_one_tensor_of_the_right_size() {
    let folder = Folder::copy_of("tiny-mpt/base");
    let base = Base::open(folder.path()).unwrap();
    let whole = base.matrix("transformer.blocks.1.attn.Wqkv.weight", 108, 36).unwrap().to_f32();
    for (i, part) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
        let rows = base.matrix(&format!("transformer.blocks.1.attn.{part}.weight"), 36, 36).unwrap();
        assert_eq!(rows.to_f32(), whole[i * 36 * 36..(i + 1) * 36 * 36]);
    }
    let error = base.matrix("transformer.blocks.1.attn.k_proj.weight", 40, 36).unwrap_err().to_string();
    assert_names(&error, &["model.safetensors", "transformer.blocks.1.attn.Wqkv.weight", "[120, 36]"]);
    let error = base.matrix("transformer.blocks.9.attn.k_proj.weight", 36, 36).unwrap_err().to_string();
    assert_names(&error, &["transformer.blocks.9.attn.k_proj.weight"]);
}
