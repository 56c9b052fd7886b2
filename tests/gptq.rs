//! Quantised Hugging Face folders (GPTQ, AWQ) against PyTorch on the values that they stand for; broken ones.

use crate::dtypes::INT8_ERROR;
use crate::files::{Folder, Tensors, assert_names};
use crate::golden::{self, Supernet, distance};
use crate::logits::{Cases, golden_logits, run};
use lonas::artifact::Base;
use lonas::backend::Backend;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::model::{Orders, llama};
use lonas::weights::HostData;
use safetensors::tensor::Dtype as FileType;
use serde_json::{Value, json};
use std::path::Path;

const BASES: [&str; 6] = ["sym-128", "sym-32-act", "asym-64-act", "asym-all", "sym-8-bits", "awq"];
const TENSORS: &str = "model.safetensors";
const Q: &str = "model.layers.0.self_attn.q_proj";
/// `(out, inp)` of the Linears of the only layer.
const SIZES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 128, 128),
    ("self_attn.k_proj", 64, 128),
    ("self_attn.v_proj", 64, 128),
    ("self_attn.o_proj", 128, 128),
    ("mlp.gate_proj", 256, 128),
    ("mlp.up_proj", 256, 128),
    ("mlp.down_proj", 128, 256),
];

/// All sub-networks and sequences in mixed batches: ours and PyTorch's logits, one after the other.
fn both<B: Backend>(name: &str, base: &Path, backend: B) -> [Vec<f32>; 2] {
    let Cases { tokens, cases } = golden::json("gptq/cases.json");
    let golden = golden_logits(&format!("gptq/{name}"), &cases, tokens.len());
    let net = Supernet::of(base, &golden::path("gptq/supernet"));
    let ours = run(&net, backend, &tokens, &cases, 6);
    [ours.concat().concat(), golden.concat().concat()]
}

/// The Euclidean distance over the golden norm.
fn off([ours, golden]: [Vec<f32>; 2]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut ours.iter().zip(&golden).map(|(a, b)| a - b)) / norm(&mut golden.iter().copied())
}

fn base(name: &str) -> std::path::PathBuf {
    golden::path(&format!("gptq/{name}"))
}

#[test]
fn a_quantised_folder_computes_what_its_numbers_stand_for() {
    for name in BASES {
        for [ours, golden] in
            [both(name, &base(name), Cpu::new(Dtype::F32, 2)), both(name, &base(name), Reference::new())]
        {
            let off = distance(&ours, &golden);
            assert!(off <= 1e-4, "{name}: off by {off}");
        }
    }
}

#[test]
fn quantised_kernels_round_only_the_inputs() {
    for name in BASES {
        // The weights are exact, the inputs have 7 or 8 bits: what int8 of a base in f32 costs is more.
        for dtype in [Dtype::Auto, Dtype::Q4, Dtype::Int8] {
            // Half a byte cannot hold a byte's quants.
            let exact = dtype != Dtype::Q4 || name != "sym-8-bits";
            let most = if exact { 8.0 * 7f32.sqrt() * INT8_ERROR } else { 0.5 };
            let off = off(both(name, &base(name), Cpu::new(dtype, 2)));
            assert!(off <= most && off > 1e-6, "{name} {dtype:?}: off by {off} of the norm, {most} expected");
        }
        let off = off(both(name, &base(name), Cpu::new(Dtype::Bf16, 2)));
        assert!(
            off <= 8.0 * 7f32.sqrt() * crate::dtypes::BF16_ERROR,
            "{name} bf16: off by {off} of the norm"
        );
    }
}

#[test]
fn four_bits_take_half_a_byte_whatever_their_zero_points_and_order() {
    for name in BASES {
        let base = Base::open(&base(name)).unwrap();
        for (linear, rows, columns) in SIZES {
            let matrix = base.matrix(&format!("model.layers.0.{linear}.weight"), rows, columns).unwrap();
            let HostData::Blocks(blocks) = &matrix.data else { panic!("{name} {linear}: not in blocks") };
            assert_eq!(
                blocks.places.is_some(),
                name.ends_with("act") || name == "sym-8-bits" && columns == 256
            );
            let bytes = Cpu::new(Dtype::Auto, 1).matrix(matrix).unwrap().bytes() * 8;
            // Scale and zero point of a block: 16 bits each.
            let most = if name == "sym-8-bits" { 8.5 } else { 5.0 };
            assert!(bytes as f64 <= most * (rows * columns) as f64, "{name} {linear}: {bytes} bits");
        }
    }
}

/// A damaged copy, and what opening and loading it says.
fn damaged(name: &str, damage: impl FnOnce(&Folder)) -> Result<(), String> {
    let folder = Folder::copy_of(&format!("gptq/{name}"));
    damage(&folder);
    let base = Base::open(folder.path()).map_err(|e| e.to_string())?;
    let loaded = llama::load(&Cpu::new(Dtype::Auto, 1), &base, Vec::new(), &Orders::default());
    loaded.map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn a_method_that_is_not_read_is_refused_by_field() {
    let gptq = [
        ("quant_method", json!("bitsandbytes"), "gptq, awq"),
        ("quant_method", json!(4), "a string"),
        ("bits", json!(3), "4, 8"),
        ("bits", json!(-4), "a whole number"),
        ("bits", Value::Null, "missing"),
        ("group_size", json!(0), "-1"),
        ("group_size", json!(-2), "a whole number"),
        ("group_size", Value::Null, "missing"),
        ("desc_act", json!("yes"), "true or false"),
        ("checkpoint_format", json!("marlin"), "gptq_v2"),
        ("is_marlin_format", json!(true), "false"),
    ];
    let awq =
        [("bits", json!(8), "4"), ("version", json!("gemv"), "gemm"), ("zero_point", json!(false), "true")];
    let gptq = gptq.into_iter().map(|case| ("sym-128", case));
    for (name, (field, value, expected)) in gptq.chain(awq.into_iter().map(|case| ("awq", case))) {
        let said = damaged(name, |f| {
            f.edit_json("config.json", |j| j["quantization_config"][field] = value.clone());
        });
        assert_names(&said.unwrap_err(), &["config.json", &format!("`{field}`"), expected]);
    }
}

/// What is said of a folder one of whose q_proj's tensors has been edited.
fn edited(name: &str, part: &str, edit: impl FnOnce(&mut FileType, &mut Vec<usize>, &mut Vec<u8>)) -> String {
    let damage = |tensors: &mut Tensors| {
        let (dtype, shape, bytes) = tensors.get_mut(&format!("{Q}.{part}")).unwrap();
        edit(dtype, shape, bytes);
    };
    damaged(name, |folder| folder.edit_tensors(TENSORS, damage)).unwrap_err()
}

#[test]
fn a_tensor_that_does_not_fit_is_refused_by_name() {
    let gptq = ["qweight", "qzeros", "scales", "g_idx"].map(|part| ("asym-64-act", part));
    let awq = ["qweight", "qzeros", "scales"].map(|part| ("awq", part));
    for (name, part) in gptq.into_iter().chain(awq) {
        let tensor = format!("{Q}.{part}");
        let remove = |tensors: &mut Tensors| drop(tensors.remove(&tensor).unwrap());
        let message = damaged(name, |folder| folder.edit_tensors(TENSORS, remove)).unwrap_err();
        assert_names(&message, &["there is no tensor", &tensor]);
        let message = edited(name, part, |_, shape, _| shape.insert(0, 1));
        assert_names(&message, &[TENSORS, &tensor, "expected shape", "got [1, "]);
        // As many bytes a number.
        let message = edited(name, part, |dtype, _, _| {
            *dtype = if part == "scales" { FileType::I16 } else { FileType::F32 };
        });
        assert_names(
            &message,
            &[TENSORS, &tensor, "number format", if part == "scales" { "I16" } else { "F32" }],
        );
        // A row or a number more than there should be.
        let message = edited(name, part, |_, shape, bytes| {
            let of_row = bytes.len() / shape[0];
            bytes.extend(vec![0; of_row]);
            shape[0] += 1;
        });
        assert_names(&message, &[TENSORS, &tensor, "expected shape"]);
    }
    for group in [2i32, -1, i32::MAX, i32::MIN] {
        let message =
            edited("asym-64-act", "g_idx", |_, _, b| b[4 * 77..][..4].copy_from_slice(&group.to_le_bytes()));
        assert_names(&message, &[TENSORS, &format!("{Q}.g_idx"), "input 77", "below 2", &group.to_string()]);
    }
    // More groups than the scales have, by another group size; and fewer bits.
    let config = |field: &str, value: Value| {
        let edit = |j: &mut Value| j["quantization_config"][field] = value;
        damaged("sym-128", |folder| folder.edit_json("config.json", edit)).unwrap_err()
    };
    assert_names(
        &config("group_size", json!(32)),
        &[TENSORS, "qzeros", "expected shape [4, 16], got [1, 16]"],
    );
    assert_names(&config("bits", json!(8)), &[TENSORS, "qweight", "expected shape [32, 128], got [16, 128]"]);
}

#[test]
fn sizes_that_words_do_not_hold_are_refused() {
    for (name, field, size, said) in [
        ("sym-128", "hidden_size", 124, "124 inputs do not divide into words of 8"),
        ("awq", "intermediate_size", 252, "252 outputs do not divide into words of 8"),
        ("sym-8-bits", "intermediate_size", 254, "254 outputs do not divide into words of 4"),
    ] {
        let folder = Folder::copy_of(&format!("gptq/{name}"));
        folder.edit_json("config.json", |j| j[field] = size.into());
        let base = Base::open(folder.path()).unwrap();
        let [rows, columns] = if field == "hidden_size" { [128, size] } else { [size, 128] };
        let linear = if field == "hidden_size" { Q } else { "model.layers.0.mlp.up_proj" };
        let message = base.matrix(&format!("{linear}.weight"), rows, columns).unwrap_err().to_string();
        assert_names(&message, &[TENSORS, linear, said]);
    }
}

#[test]
fn inputs_sorted_otherwise_for_each_linear_are_computed_all_the_same() {
    // q's inputs in groups of their own: no tool writes such, but what reads one row then cuts it in two orders.
    let folder = Folder::copy_of("gptq/sym-32-act");
    folder.edit_tensors(TENSORS, |tensors| {
        let (_, _, bytes) = tensors.get_mut(&format!("{Q}.g_idx")).unwrap();
        bytes.as_chunks_mut::<4>().0.reverse();
    });
    let [exact, _] = both("sym-32-act", folder.path(), Cpu::new(Dtype::F32, 1));
    let [whole, golden] = both("sym-32-act", &base("sym-32-act"), Cpu::new(Dtype::F32, 1));
    assert!(off([exact.clone(), whole]) > 0.01, "it is another model");
    for dtype in [Dtype::Auto, Dtype::Q4, Dtype::Int8] {
        let [ours, _] = both("sym-32-act", folder.path(), Cpu::new(dtype, 1));
        let off = off([ours, exact.clone()]);
        // q, k and v are cut anew where that takes fewer bits.
        assert!(off <= if dtype == Dtype::Q4 { 0.5 } else { 0.1 }, "{dtype:?}: off by {off}");
    }
    assert_eq!(exact.len(), golden.len());
}

#[test]
fn groups_that_fill_no_blocks_are_computed_in_f32() {
    // One input of group 0 and one of group 1 change places with each other's group, another joins group 0: 65 and 63.
    let folder = Folder::copy_of("gptq/asym-64-act");
    folder.edit_tensors(TENSORS, |tensors| {
        let (_, _, bytes) = tensors.get_mut(&format!("{Q}.g_idx")).unwrap();
        let first = bytes.chunks_exact(4).position(|group| group[0] == 1).unwrap();
        bytes[4 * first] = 0;
    });
    let open = |path: &Path| Base::open(path).unwrap().matrix(&format!("{Q}.weight"), 128, 128).unwrap();
    let (changed, whole) = (open(folder.path()), open(&base("asym-64-act")));
    assert!(matches!(changed.data, HostData::F32(_)) && matches!(whole.data, HostData::Blocks(_)));
    let differ = |column: usize| {
        let of = |m: &lonas::weights::HostMatrix| {
            m.to_f32().into_iter().skip(column).step_by(128).collect::<Vec<_>>()
        };
        of(&changed) != of(&whole)
    };
    assert_eq!((0..128).filter(|&column| differ(column)).count(), 1);
    let base = Base::open(folder.path()).unwrap();
    llama::load(&Cpu::new(Dtype::Auto, 1), &base, Vec::new(), &Orders::default()).unwrap();
}

#[test]
fn older_folders_say_it_in_a_file_of_its_own() {
    let folder = Folder::copy_of("gptq/sym-128");
    let mut quantisation = Value::Null;
    folder.edit_json("config.json", |j| quantisation = j["quantization_config"].take());
    let fields = quantisation.as_object_mut().unwrap();
    fields.remove("quant_method");
    fields.insert("model_file_base_name".into(), "gptq_model-4bit-128g".into());
    folder.write("quantize_config.json", quantisation.to_string());
    std::fs::rename(folder.file(TENSORS), folder.file("gptq_model-4bit-128g.safetensors")).unwrap();
    let distance = |[ours, golden]: [Vec<f32>; 2]| distance(&ours, &golden);
    assert!(distance(both("sym-128", folder.path(), Cpu::new(Dtype::F32, 1))) <= 1e-4);

    folder.edit_json("quantize_config.json", |j| j["model_file_base_name"] = "../model".into());
    let message = Base::open(folder.path()).unwrap_err().to_string();
    assert_names(&message, &["quantize_config.json", "model_file_base_name", "is not a file name"]);
    // In order, the groups need not be there.
    let folder = Folder::copy_of("gptq/asym-all");
    folder.edit_tensors(TENSORS, |tensors| tensors.retain(|name, _| !name.ends_with("g_idx")));
    assert!(distance(both("asym-all", folder.path(), Cpu::new(Dtype::F32, 1))) <= 1e-4);
}
