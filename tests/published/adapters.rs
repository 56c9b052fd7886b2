//! Torch's own files of tensors: what PEFT saved, and pickles that are not what they should be.

use crate::files::{Folder, assert_names};
use crate::golden;
use half::{bf16, f16};
use lonas::artifact::{
    AdapterConfig, AdapterTensors, ArtifactError, TensorType, read_adapter, read_adapter_head,
    read_published_adapter, write_adapter_and_head,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::io::{Cursor, Read, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

const FILE: &str = "adapter_model.bin";

fn values(tensors: &AdapterTensors) -> Vec<(String, Vec<f32>)> {
    let halves = tensors.values().flat_map(|(a, b)| [a, b]);
    halves.map(|m| (format!("{} {}x{}", m.name, m.rows, m.columns), m.to_f32())).collect()
}

#[test]
fn torch_files_hold_what_safetensors_hold() {
    type Round = fn(f32) -> f32;
    let (config, expected) = read_adapter(&golden::path("tiny-tied/supernet")).unwrap();
    let rounded = |round: Round| {
        let all = values(&expected).into_iter();
        all.map(|(name, values)| (name, values.into_iter().map(round).collect())).collect::<Vec<_>>()
    };
    let cases: [(&str, Round); 4] = [
        ("f32", |v| v),
        ("state-dict", |v| v),
        ("f16", |v| f16::from_f32(v).to_f32()),
        ("bf16", |v| bf16::from_f32(v).to_f32()),
    ];
    for (name, round) in cases {
        let (read_config, read) = read_adapter(&golden::path("adapters").join(name)).unwrap();
        assert!(values(&read) == rounded(round), "{name}");
        assert_eq!(read_config, config);
        let number_type = if name == "bf16" { TensorType::Bf16 } else { TensorType::F32 };
        assert_eq!(TensorType::of(&read), number_type, "{name}");
    }
}

#[test]
fn safetensors_are_read_where_both_are_there() {
    let folder = Folder::copy_of("tiny-tied/supernet");
    folder.write(FILE, "nothing");
    read_adapter(folder.path()).unwrap();
    folder.remove("adapter_model.safetensors");
    assert_names(&read_adapter(folder.path()).unwrap_err().to_string(), &[FILE, "zip"]);
}

#[test]
fn the_format_from_before_torch_1_6_is_refused_with_what_to_do() {
    let message = read_adapter(&golden::path("adapters/legacy")).unwrap_err().to_string();
    assert_names(&message, &[FILE, "before version 1.6", "save it again"]);
}

#[test]
fn a_classifiers_head_is_read_beside_its_adapters_and_written_back() {
    for name in ["bert", "bert-bin"] {
        let folder = golden::path("adapters").join(name);
        let published = read_published_adapter(&folder).unwrap();
        assert!(published.config.classifies);
        assert_eq!(published.tensors.len(), 4);
        assert!(published.tensors.contains_key("bert.encoder.layer.1.attention.self.value"));
        let head = read_adapter_head(&folder).unwrap();
        assert_eq!(head, published.head);
        let shapes = head.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice()));
        assert!(shapes.eq([("classifier.bias", &[3][..]), ("classifier.weight", &[3, 12])]));
        let expected = golden::tensors("adapters/bert/adapter_model.safetensors");
        for (name, tensor) in &head {
            assert_eq!(tensor.values, expected[&format!("base_model.model.{name}")]);
        }

        let ours = Folder::empty();
        let (config, tensors) = (&published.config, &published.tensors);
        write_adapter_and_head(ours.path(), config, tensors, &head, TensorType::F32).unwrap();
        assert_eq!(
            ours.tensors("adapter_model.safetensors"),
            crate::files::tensors(&golden::path("adapters/bert/adapter_model.safetensors"))
        );
        assert_eq!(read_adapter_head(ours.path()).unwrap(), head);
        assert_eq!(&read_adapter(ours.path()).unwrap().0, config);
        let json: serde_json::Value = serde_json::from_slice(&ours.read("adapter_config.json")).unwrap();
        assert_eq!(
            (&json["task_type"], &json["modules_to_save"]),
            (&"SEQ_CLS".into(), &serde_json::json!(["classifier"]))
        );
    }
    // Of a model that writes text, a head would be left out without a word.
    let folder = Folder::copy_of("adapters/bert");
    folder.edit_json("adapter_config.json", |j| j["task_type"] = "CAUSAL_LM".into());
    assert_names(&read_adapter(folder.path()).unwrap_err().to_string(), &["`modules_to_save`", "SEQ_CLS"]);
    folder.edit_json("adapter_config.json", |j| j["modules_to_save"] = serde_json::Value::Null);
    let message = read_adapter(folder.path()).unwrap_err().to_string();
    assert_names(&message, &["base_model.model.classifier.", "is not a LoRA tensor"]);
}

#[test]
fn a_sub_adapters_ranks_are_those_of_its_tensors_and_its_scale_stays() {
    let cut = golden::path("adapters/cut");
    let message = read_adapter(&cut).unwrap_err().to_string();
    assert_names(&message, &[FILE, "expected shape [8, "]);
    let published = read_published_adapter(&cut).unwrap();
    // Three layers: q, k, v of ranks 4, 6, 4; gate and up of 8, 4, 8; down whole.
    assert_eq!(published.cut, 9 + 2);
    let rank = |module: &str| published.config.rank_of(&format!("model.layers.{module}"));
    let ranks =
        ["0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.up_proj", "2.mlp.gate_proj", "1.mlp.down_proj"];
    assert_eq!(ranks.map(rank), [4, 6, 4, 8, 8]);
    assert_eq!((published.config.rank, published.config.scale()), (8, 2.0));

    // Written as a model folder has it, it says so itself.
    let ours = Folder::empty();
    lonas::artifact::write_adapter(ours.path(), &published.config, &published.tensors, TensorType::F32)
        .unwrap();
    let (config, tensors) = read_adapter(ours.path()).unwrap();
    assert_eq!(config, published.config);
    assert!(values(&tensors) == values(&published.tensors));

    // More ranks than the configuration has, or A and B that do not go together.
    let more = Folder::copy_of("tiny-tied/supernet");
    more.edit_json("adapter_config.json", |j| j["r"] = 4.into());
    let message = read_published_adapter(more.path()).unwrap_err().to_string();
    assert_names(&message, &["expected shape"]);
    // Which tensor comes first in the file is chance.
    assert!(message.contains("[4, ") || message.contains(", 4], got"), "{message}");
    let odd = Folder::copy_of("tiny-tied/supernet");
    let name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
    odd.edit_tensors("adapter_model.safetensors", |t| {
        let (_, shape, bytes) = t.get_mut(name).unwrap();
        *shape = vec![4, 80];
        bytes.truncate(4 * 80 * 4);
    });
    let message = read_published_adapter(odd.path()).unwrap_err().to_string();
    assert_names(&message, &["down_proj.lora_B.weight", "expected shape [48, 4], got [48, 8]"]);
}

#[test]
fn ranks_by_module_are_read_where_they_keep_the_scale() {
    fn config(edit: impl FnOnce(&mut serde_json::Value)) -> Result<AdapterConfig, ArtifactError> {
        let folder = Folder::copy_of("tiny-tied/supernet");
        folder.edit_json("adapter_config.json", edit);
        lonas::artifact::read_adapter_config(folder.path())
    }
    let read = config(|j| {
        j["rank_pattern"] = serde_json::json!({"layers.1.mlp.up_proj": 2, "up_proj": 4});
        j["alpha_pattern"] = serde_json::json!({"layers.1.mlp.up_proj": 4, "up_proj": 8});
    })
    .unwrap();
    let modules = ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "up_proj", "model.x_up_proj"];
    assert_eq!(modules.map(|m| read.rank_of(m)), [2, 4, 4, 8]);
    let refused = |edit: fn(&mut serde_json::Value)| config(edit).unwrap_err().to_string();
    let message = refused(|j| j["rank_pattern"] = serde_json::json!({"up_proj": 4}));
    assert_names(&message, &["`rank_pattern`", "`up_proj`", "expected 8 for it in `alpha_pattern`"]);
    let message = refused(|j| j["rank_pattern"] = serde_json::json!({"^up.*": 8}));
    assert_names(&message, &["`rank_pattern`", "a module's name or path"]);
    for wrong in [0, 1 << 20] {
        let message = config(|j| j["rank_pattern"] = serde_json::json!({"up_proj": wrong})).unwrap_err();
        assert_names(&message.to_string(), &["`rank_pattern`", "a rank from 1 to 4096"]);
    }
    assert_names(&refused(|j| j["rank_pattern"] = 4.into()), &["`rank_pattern`", "expected an object"]);
    assert_names(&refused(|j| j["quantization_aware"] = true.into()), &["`quantization_aware`", "expected"]);
}

/// A file as torch writes it, of this pickle and these storages.
fn archive(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(STORED);
    let storages = storages.iter().map(|(key, bytes)| (format!("archive/data/{key}"), *bytes));
    let pickle = std::iter::once(("archive/data.pkl".to_string(), pickle));
    for (name, bytes) in pickle.chain(storages) {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A pickle in opcodes: protocol 2, STOP.
fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02", body, b"."].concat()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn number(number: i32) -> Vec<u8> {
    [b"J", &number.to_le_bytes()[..]].concat()
}

/// `{NAME: tensor}` of a storage `0` in f32.
fn tensor(name: &str, offset: i32, shape: [i32; 2], strides: [i32; 2]) -> Vec<u8> {
    let pair = |[a, b]: [i32; 2]| [number(a), number(b), b"\x86".to_vec()].concat();
    [
        b"}".to_vec(),
        text(name),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        number(6),
        b"tQ".to_vec(),
        number(offset),
        pair(shape),
        pair(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs".to_vec(),
    ]
    .concat()
}

/// Why a file of these bytes is refused.
#[track_caller]
fn refused(file: &[u8]) -> String {
    let folder = Folder::copy_of("adapters/f32");
    folder.write(FILE, file);
    let message = read_published_adapter(folder.path()).map(|_| ()).unwrap_err().to_string();
    assert_names(&message, &[FILE]);
    message
}

const SIX: [u8; 24] = [0; 24];
const STORED: CompressionMethod = CompressionMethod::Stored;

#[test]
fn a_pickle_that_calls_anything_is_refused_by_name_and_nothing_is_called() {
    let folder = Folder::empty();
    let proof = folder.file("proof");
    let command = format!("touch {}", proof.display());
    // os.system(command), as protocol 2 and as the opcodes that other protocols have for it.
    let call =
        |function: &[u8], reduce: &[u8]| pickle(&[function, b"(", &text(&command), b"t", reduce].concat());
    let cases = [
        (call(b"cposix\nsystem\n", b"R"), "`posix.system`"),
        (call(b"cos\nsystem\n", b"R"), "`os.system`"),
        (call(b"cbuiltins\neval\n", b"R"), "`builtins.eval`"),
        (call(b"ctorch\nload\n", b"R"), "`torch.load`"),
        (call(b"ccollections\nOrderedDict\n", b"R"), "it calls what is not to be called"),
        (call(b"ctorch\nFloatStorage\n", b"R"), "it calls what is not to be called"),
        (pickle(&[b"(".to_vec(), text(&command), b"ios\nsystem\n".to_vec()].concat()), "opcode 0x69"),
        (call(b"ccollections\nOrderedDict\n", b"\x81"), "opcode 0x81"),
        (pickle(&[text("os"), text("system"), b"\x93".to_vec()].concat()), "opcode 0x93"),
        (pickle(b"\x82\x01"), "opcode 0x82"),
        ([b"\x80\x04\x95", &[0; 8][..], b"."].concat(), "pickle protocol 4, expected 2"),
    ];
    for (pickle, expected) in cases {
        assert_names(&refused(&archive(&pickle, &[("0", &SIX)])), &["data.pkl", expected]);
    }
    assert!(!proof.exists());
}

#[test]
fn tensors_that_leave_their_storage_or_are_larger_than_the_file_are_refused() {
    let a = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
    let of = |offset, shape, strides| {
        refused(&archive(&pickle(&tensor(a, offset, shape, strides)), &[("0", &SIX)]))
    };
    // A whole one is read, and only its partner is missing.
    assert_names(&of(0, [2, 3], [3, 1]), &["there is no tensor", "lora_B"]);
    assert_names(&of(1, [2, 3], [3, 1]), &[a, "reaches to number 7 of a storage that has 6"]);
    assert_names(&of(0, [2, 3], [4, 1]), &[a, "reaches to number 7"]);
    assert_names(&of(-1, [2, 3], [3, 1]), &["without its storage and sizes"]);
    assert_names(&of(0, [-2, 3], [3, 1]), &["without its storage and sizes"]);
    assert_names(&of(0, [i32::MAX; 2], [0, 0]), &["its tensors have", "bytes"]);
    assert_names(&of(0, [i32::MAX; 2], [i32::MAX; 2]), &[a, "reaches to number"]);
    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f".to_vec();
    let swapped = |from: Vec<u8>, to: Vec<u8>| {
        let whole = tensor(a, 5, [2, 3], [3, 1]);
        let at = whole.windows(from.len()).rposition(|w| w == from).unwrap();
        pickle(&[&whole[..at], &to, &whole[at + from.len()..]].concat())
    };
    let message = refused(&archive(&swapped(number(2), huge.clone()), &[("0", &SIX)]));
    assert_names(&message, &[a, "overflow"]);
    let message = refused(&archive(&swapped(number(5), huge), &[("0", &SIX)]));
    assert_names(&message, &[a, "reaches to number 9223372036854775813 of a storage that has 6"]);
    let message = refused(&archive(&pickle(&tensor(a, 0, [2, 3], [3, 1])), &[("1", &SIX)]));
    assert_names(&message, &[a, "its storage `0` is missing"]);
    let double = swapped(b"FloatStorage".to_vec(), b"DoubleStorage".to_vec());
    assert_names(&refused(&archive(&double, &[("0", &SIX)])), &[a, "number format f64"]);
}

#[test]
fn pickles_that_are_no_dictionary_of_tensors_are_refused() {
    let of = |body: &[u8]| refused(&archive(&pickle(body), &[]));
    assert_names(&of(b"]"), &["expected a dictionary of tensors"]);
    assert_names(&of(b""), &["empty stack"]);
    assert_names(&of(b"u"), &["mark that is not there"]);
    assert_names(&of(b"h\x05"), &["never remembered"]);
    assert_names(&of(&[b"}".to_vec(), text("step"), number(3), b"s".to_vec()].concat()), &["`step`"]);
    assert_names(&of(&[b"}".to_vec(), number(3), number(3), b"s".to_vec()].concat()), &["no name"]);
    assert_names(&refused(&archive(b"\x80\x02X\xff\xff\xff\xff", &[])), &["data.pkl ends"]);
    assert_names(&refused(&archive(b"\x80\x02", &[])), &["data.pkl ends"]);
    // Nested a million times, and one tuple inside itself: neither recursion nor copies.
    let nested = [b")".to_vec(), vec![0x85; 1_000_000]].concat();
    assert_names(&of(&nested), &["expected a dictionary of tensors"]);
    let doubled = [b")q\x00".to_vec(), b"h\x00\x86q\x00".repeat(100_000)].concat();
    assert_names(&of(&doubled), &["expected a dictionary of tensors"]);
}

#[test]
fn a_damaged_archive_is_refused() {
    let whole = std::fs::read(golden::path("adapters/f32").join(FILE)).unwrap();
    for keep in [0, 1, 100, whole.len() / 2, whole.len() - 30, whole.len() - 1] {
        assert_names(&refused(&whole[..keep]), &["zip"]);
    }
    // A number that changed on its way: the archive's checksum knows.
    let mut flipped = whole.clone();
    let data = whole.windows(7).position(|w| w == b"data/35").unwrap() + 100;
    flipped[data] ^= 1;
    assert_names(&refused(&flipped), &["data/35", "checksum"]);
    assert_names(&refused(&archive(b"", &[])), &["data.pkl ends"]);
    let other = {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.start_file("readme.txt", SimpleFileOptions::default().compression_method(STORED)).unwrap();
        zip.finish().unwrap().into_inner()
    };
    assert_names(&refused(&other), &["there is no data.pkl"]);
}

/// The pickle of a real adapter, and its storages.
fn taken_apart() -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let file = std::fs::File::open(golden::path("adapters/state-dict").join(FILE)).unwrap();
    let mut archive = zip::ZipArchive::new(file).unwrap();
    let (mut pickle, mut storages) = (Vec::new(), Vec::new());
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).unwrap();
        let name = entry.name().unwrap().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        match name.split_once("/data/") {
            Some((_, key)) => storages.push((key.to_string(), bytes)),
            None if name.ends_with("data.pkl") => pickle = bytes,
            None => {}
        }
    }
    (pickle, storages)
}

#[test]
fn any_pickle_is_read_or_refused() {
    let (whole, storages) = taken_apart();
    let storages = storages.iter().map(|(key, bytes)| (key.as_str(), bytes.as_slice())).collect::<Vec<_>>();
    let folder = Folder::copy_of("adapters/state-dict");
    let read = |pickle: &[u8]| {
        folder.write(FILE, archive(pickle, &storages));
        read_adapter(folder.path()).map(|_| ()).map_err(|e| e.to_string())
    };
    read(&whole).unwrap();
    // Everything that an opcode may follow, and opcodes put where they do not belong.
    let opcodes = b"\x80c(NKMJGX}])q r h j Q R b s u a e t\x85\x86\x87\x88\x8a.".to_vec();
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..9),
        proptest::collection::vec(proptest::sample::select(opcodes), 1..9),
    ];
    let damage = proptest::collection::vec((any::<u16>(), 0usize..6, piece), 1..4);
    let refusals = std::cell::Cell::new(0);
    let config = Config { failure_persistence: None, ..Config::default() };
    let check = |damage: Vec<(u16, usize, Vec<u8>)>| {
        let mut pickle = whole.clone();
        for (at, cut, piece) in damage {
            let start = pickle.len() * usize::from(at) / 65536;
            let end = (start + cut).min(pickle.len());
            pickle.splice(start..end, piece);
        }
        if let Err(message) = read(&pickle) {
            refusals.set(refusals.get() + 1);
            prop_assert!(message.contains(FILE) && message.len() < 1000, "{message:.1000}");
        }
        Ok(())
    };
    TestRunner::new(config).run(&damage, check).unwrap();
    assert!(refusals.get() > 64, "only {} were refused", refusals.get());
}
