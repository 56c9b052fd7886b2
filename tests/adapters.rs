//! Super-adapters as PEFT writes them: read, written back, and damaged.

use crate::files::{Folder, Tensors, assert_names, tensors};
use crate::golden::{self, Supernet};
use half::bf16;
use lonas::artifact::{HeadTensors, TensorType, read_adapter, write_adapter};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::model::llama;
use lonas::model::{self, SuperAdapter};
use safetensors::Dtype as FileType;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const NAMES: [&str; 4] = ["tiny-tied", "tiny-untied-bf16", "tiny-bias-headdim", "sparse"];
const TENSORS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const DOWN_A: &str = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
const DOWN_B: &str = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight";

fn values(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn an_adapter_is_read_as_peft_wrote_it() {
    for name in NAMES {
        let folder = golden::path(name).join("supernet");
        let (config, read) = read_adapter(&folder).unwrap();
        assert_eq!((config.rank, config.alpha, config.dropout), (8, 16.0, 0.1));
        assert_eq!(config.scale(), 2.0);
        assert_eq!(config.sparse, name == "sparse");
        let targets = config.target_modules.iter().map(String::as_str).collect::<BTreeSet<_>>();
        let expected = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"];
        assert_eq!(targets, expected.into());
        let peft = tensors(&folder.join(TENSORS));
        assert_eq!(2 * read.len(), peft.len());
        for (module, (a, b)) in &read {
            for (half, matrix) in [("lora_A", a), ("lora_B", b)] {
                let (_, shape, bytes) = &peft[&format!("base_model.model.{module}.{half}.weight")];
                assert_eq!(&[matrix.rows, matrix.columns], shape.as_slice());
                assert_eq!(matrix.to_f32(), values(bytes));
            }
        }
    }
}

#[test]
fn names_as_peft_has_them_in_memory_are_read_too() {
    let folder = Folder::copy_of("tiny-tied/supernet");
    let (_, before) = read_adapter(folder.path()).unwrap();
    folder.edit_tensors(TENSORS, |t| {
        let renamed = |(name, tensor): (String, _)| (name.replace(".weight", ".default.weight"), tensor);
        *t = std::mem::take(t).into_iter().map(renamed).collect();
    });
    let (_, after) = read_adapter(folder.path()).unwrap();
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    assert!(before.values().zip(after.values()).all(|(x, y)| x.0.to_f32() == y.0.to_f32()));
}

#[test]
fn a_written_adapter_is_what_peft_writes() {
    for name in NAMES {
        let peft = golden::path(name).join("supernet");
        let (config, read) = read_adapter(&peft).unwrap();
        let ours = Folder::empty();
        write_adapter(ours.path(), &config, &read, TensorType::F32).unwrap();
        // Names, number formats, shapes and every byte.
        assert!(ours.tensors(TENSORS) == tensors(&peft.join(TENSORS)), "{name}");
        assert_eq!(read_adapter(ours.path()).unwrap().0, config);

        write_adapter(ours.path(), &config, &read, TensorType::Bf16).unwrap();
        for (tensor, (dtype, shape, bytes)) in ours.tensors(TENSORS) {
            let (_, peft_shape, peft_bytes) = &tensors(&peft.join(TENSORS))[&tensor];
            assert_eq!((dtype, &shape), (FileType::BF16, peft_shape), "{tensor}");
            let rounded = values(peft_bytes).into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes());
            assert!(rounded.eq(bytes.iter().copied()), "{tensor}");
        }
    }
}

#[test]
fn a_written_adapter_config_says_what_pefts_says() {
    let peft = golden::path("tiny-tied/supernet");
    let (config, read) = read_adapter(&peft).unwrap();
    let ours = Folder::empty();
    write_adapter(ours.path(), &config, &read, TensorType::F32).unwrap();
    let ours: BTreeMap<String, Value> = serde_json::from_slice(&ours.read(CONFIG)).unwrap();
    let peft: BTreeMap<String, Value> = golden::json("tiny-tied/supernet/adapter_config.json");
    for (field, value) in &ours {
        // A field that PEFT does not know would be an error there.
        let expected = peft.get(field).unwrap_or_else(|| panic!("PEFT has no field `{field}`"));
        match field.as_str() {
            // The golden adapter was saved without a task; with one, PEFT gives the model its generate().
            "task_type" => assert_eq!(value, "CAUSAL_LM"),
            _ if value.is_number() => assert_eq!(value.as_f64(), expected.as_f64(), "{field}"),
            _ => assert_eq!(value, expected, "{field}"),
        }
    }
    for field in ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out"]
    {
        assert!(ours.contains_key(field), "`{field}` was not written");
    }
}

/// Why the super-network with an adapter damaged like this is refused.
#[track_caller]
fn refused(damage: impl FnOnce(&Folder)) -> String {
    let folder = Folder::copy_of("tiny-tied/supernet");
    damage(&folder);
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let (config, tensors) = match read_adapter(folder.path()) {
        Ok(read) => read,
        Err(e) => return e.to_string(),
    };
    let shape = model::model_shape(&net.base.config, Some(&config));
    let (head, sparse) = (HeadTensors::new(), config.sparse);
    let adapter = SuperAdapter { shape, tensors, head, scale: config.scale() as f32, sparse };
    let loaded = llama::load(&Cpu::new(Dtype::F32, 1), &net.base, vec![adapter], &net.orders);
    loaded.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_stray_missing_or_misshaped_tensor_is_refused_by_name() {
    let edit = |edit: fn(&mut Tensors)| refused(|f| f.edit_tensors(TENSORS, edit));
    fn rename(t: &mut Tensors, from: &str, to: &str) {
        let tensor = t.remove(from).unwrap();
        t.insert(to.into(), tensor);
    }
    for stray in ["lm_head.weight", "base_model.model.x.weight", "base_model.model.x.lora_embedding_A.weight"]
    {
        let message = refused(|f| f.edit_tensors(TENSORS, |t| rename(t, DOWN_A, stray)));
        assert_names(&message, &[TENSORS, stray, "is not a LoRA tensor"]);
    }
    let message = edit(|t| {
        t.remove(DOWN_A);
    });
    assert_names(&message, &[TENSORS, "there is no tensor", DOWN_A]);
    let message = edit(|t| {
        t.remove(DOWN_B);
    });
    assert_names(&message, &[TENSORS, "there is no tensor", DOWN_B]);
    let message = edit(|t| {
        t.remove(DOWN_A);
        t.remove(DOWN_B);
    });
    assert_names(&message, &["has no tensors for", "model.layers.0.mlp.down_proj"]);
    let message = edit(|t| {
        rename(t, DOWN_A, &DOWN_A.replace("layers.0", "layers.9"));
        rename(t, DOWN_B, &DOWN_B.replace("layers.0", "layers.9"));
    });
    assert_names(&message, &["model.layers.9.mlp.down_proj", "no place in this model"]);
    let message = edit(|t| t.get_mut(DOWN_A).unwrap().1.reverse());
    assert_names(&message, &[TENSORS, DOWN_A, "expected shape [8, 8], got [80, 8]"]);
    let message = edit(|t| t.get_mut(DOWN_B).unwrap().1 = vec![96, 4]);
    assert_names(&message, &[TENSORS, DOWN_B, "expected shape [96, 8], got [96, 4]"]);
    let message = edit(|t| {
        let (_, shape, bytes) = t.get_mut(DOWN_A).unwrap();
        *shape = vec![8, 79];
        bytes.truncate(8 * 79 * 4);
    });
    assert_names(&message, &["model.layers.0.mlp.down_proj.lora_A.weight", "(8, 80)", "(8, 79)"]);
    let message = edit(|t| t.get_mut(DOWN_A).unwrap().1 = vec![8, 80, 1]);
    assert_names(&message, &[TENSORS, DOWN_A, "expected a matrix", "[8, 80, 1]"]);
    let message = edit(|t| t.get_mut(DOWN_A).unwrap().0 = FileType::I32);
    assert_names(&message, &[TENSORS, DOWN_A, "I32"]);
    let twice = DOWN_A.replace(".weight", ".default.weight");
    let message = refused(|f| {
        f.edit_tensors(TENSORS, |t| {
            let tensor = t[DOWN_A].clone();
            t.insert(twice.clone(), tensor);
        });
    });
    assert_names(&message, &[TENSORS, "down_proj.lora_A", "stands there twice"]);
    assert_names(&refused(|f| f.remove(TENSORS)), &[TENSORS, "No such file"]);
    assert_names(&refused(|f| f.remove(CONFIG)), &[CONFIG, "No such file"]);
}

#[test]
fn an_adapter_that_is_not_plain_lora_is_refused_by_field() {
    let cases = [
        ("r", json!(0)),
        ("r", json!(1u64 << 40)),
        ("r", json!(-8)),
        ("r", json!("8")),
        ("r", Value::Null),
        ("lora_alpha", Value::Null),
        ("lora_alpha", json!("16")),
        ("lora_alpha", json!(1e300)),
        ("lora_dropout", json!("0.1")),
        ("lora_dropout", json!(1.5)),
        ("peft_type", json!("IA3")),
        ("peft_type", Value::Null),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("target_modules", json!("all-linear")),
        ("target_modules", json!([1])),
        ("target_modules", Value::Null),
        ("use_rslora", json!(true)),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("sparse_adapter", json!("yes")),
        ("quantization_aware", json!(true)),
        ("rank_pattern", json!({"q_proj": 4})),
        ("alpha_pattern", json!({"q_proj": 4})),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!([0])),
        ("layers_to_transform", json!(0)),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("target_parameters", json!(["x"])),
        ("trainable_token_indices", json!([1])),
        ("alora_invocation_tokens", json!([1, 2])),
        ("arrow_config", json!({"top_k": 1})),
        ("monteclora_config", json!({"samples": 1})),
        ("kasa_config", json!({"beta": 1})),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("olora")),
    ];
    for (field, value) in cases {
        let message = refused(|f| f.edit_json(CONFIG, |j| j[field] = value.clone()));
        assert_names(&message, &[CONFIG, &format!("`{field}`"), "expected"]);
    }
    // A rank that the tensors do not have.
    let message = refused(|f| f.edit_json(CONFIG, |j| j["r"] = json!(4)));
    assert_names(&message, &[TENSORS, "expected shape"]);
    assert!(message.contains("[4, ") || message.contains(", 4]"), "{message}");
    let message = refused(|f| f.edit_json(CONFIG, |j| j["target_modules"] = json!(["q_proj"])));
    assert_names(&message, &["no place in this model", "model.layers.0.mlp.down_proj"]);
}
