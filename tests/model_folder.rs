//! supernet.json and catalog.json: written, read back, and damaged.

use crate::files::{Folder, assert_names};
use crate::golden::Supernet;
use lonas::artifact::{BaseReference, BaseSource, ModelFolder, TensorType, write_adapter};
use lonas::model;
use lonas::supernet::{Catalog, Evaluation, Latency};
use serde_json::{Value, json};

const SUPERNET: &str = "supernet.json";
const CATALOG: &str = "catalog.json";
const CONFIG: &str = "adapter_config.json";

/// Opens a model folder over the tiny base, down to the catalog.
fn open(folder: &Folder) -> Result<Catalog, String> {
    let base = Supernet::open("tiny-tied/base", "tiny-tied").base;
    let opened = ModelFolder::open(folder.path()).map_err(|e| e.to_string())?;
    let shape = model::model_shape(&base.config, Some(&opened.adapter_config));
    let space = opened.search_space(&shape).map_err(|e| e.to_string())?;
    opened.catalog(&shape, &space).map_err(|e| e.to_string())
}

/// The reordered golden model folder: it has everything that a supernet.json can have.
fn model() -> Folder {
    Folder::copy_of("tiny-tied-ordered/supernet")
}

/// Why supernet.json edited like this is refused.
#[track_caller]
fn refused(edit: impl FnOnce(&mut Value)) -> String {
    let folder = model();
    open(&folder).unwrap();
    folder.edit_json(SUPERNET, edit);
    let message = open(&folder).unwrap_err();
    assert_names(&message, &[SUPERNET]);
    message
}

#[test]
fn what_is_written_is_read_back_equal() {
    for name in ["tiny-tied", "tiny-tied-ordered"] {
        let net = Supernet::open("tiny-tied/base", name);
        let folder = Folder::empty();
        let source =
            BaseSource::Pypi { package: "p".into(), version: "1".into(), file: "a/\"b\" ü.gguf".into() };
        let base = BaseReference { source, sha256: Some("ab".repeat(32)) };
        let (config, orders) = (&net.folder.adapter_config, net.folder.orders());
        let adapter = net.folder.adapter().unwrap();
        write_adapter(folder.path(), config, &adapter, TensorType::F32).unwrap();
        let (shape, space) = (&net.shape, &net.space);
        let path = folder.path();
        ModelFolder::write_supernet(path, "näme-\"q\"", &base, config.scale(), shape, space, orders).unwrap();

        let read = ModelFolder::open(path).unwrap();
        assert_eq!((read.name.as_str(), &read.base), ("näme-\"q\"", &base));
        assert_eq!(&read.adapter_config, config);
        assert_eq!(&read.search_space(shape).unwrap(), space);
        assert_eq!(read.orders(), orders);

        let mut catalog = read.catalog(shape, space).unwrap();
        assert_eq!(catalog, Catalog::new(shape, space));
        let third = space.pick(|group, choices| group % choices);
        let entry = catalog.add(shape, space, "third.one_2-x", third).unwrap();
        entry.scores.insert("täsk \"q\"".into(), 0.1 + 0.2);
        let latency = Latency { prefill_seconds_per_token: 1e-300, decode_seconds_per_token: 1.0 / 3.0 };
        entry.latency.insert("a machine, 2 threads".into(), latency);
        let evaluation = |method: &str, value| Evaluation {
            task: "arc".into(),
            method: method.into(),
            form: "short".into(),
            metric: "accuracy".into(),
            value,
            interval95: (0.1, 1.0 / 3.0),
            count: 7,
            details: [("answer_loss".to_string(), 1e-9)].into(),
            file_sha256: "ab".repeat(32),
            items_sha256: "cd".repeat(32),
            numbers: "cpu, \"f32\"".into(),
        };
        entry.record(evaluation("likelihood", 0.5));
        entry.record(evaluation("generation", 0.25));
        entry.record(evaluation("likelihood", 0.125));
        let values = entry.evaluations.iter().map(|e| e.value).collect::<Vec<_>>();
        assert_eq!(values, [0.25, 0.125], "in the place of the earlier one of its method");
        catalog.get_mut("heuristic").unwrap().scores.insert("arc".into(), 5e-324);
        read.write_catalog(&catalog).unwrap();
        assert_eq!(read.catalog(shape, space).unwrap(), catalog);
    }
}

#[test]
fn a_score_that_json_cannot_say_is_refused_before_it_is_written() {
    let folder = model();
    let mut catalog = open(&folder).unwrap();
    let opened = ModelFolder::open(folder.path()).unwrap();
    catalog.get_mut("minimal").unwrap().scores.insert("arc".into(), f64::NAN);
    let message = opened.write_catalog(&catalog).unwrap_err().to_string();
    assert_names(&message, &[CATALOG, "`minimal`", "NaN"]);
    assert!(!folder.file(CATALOG).exists());
}

#[test]
fn choices_that_no_tensor_has_are_refused_by_group() {
    for (choices, reason) in [
        (json!([80, 80, 40]), "strictly descending"),
        (json!([80, 40, 61]), "strictly descending"),
        (json!([40, 61, 80]), "strictly descending"),
        (json!([0]), "strictly descending"),
        (json!([]), "strictly descending"),
        (json!([81, 40]), "the first choice is 81 but"),
        (json!([64, 40]), "the first choice is 64 but"),
        (json!([80, -1]), "groups[4].choices[1]"),
        (json!([80, 1.5]), "groups[4].choices[1]"),
        (json!("80"), "groups[4].choices"),
    ] {
        let message = refused(|j| j["groups"][4]["choices"] = choices);
        assert!(message.contains("group 4") || message.contains("groups[4]"), "{message}");
        assert_names(&message, &[reason]);
    }
    // An MLP can be left out; an adapter is always there.
    assert_names(&refused(|j| j["groups"][0]["choices"] = json!([8, 0])), &["group 0", "ranks positive"]);
}

#[test]
fn a_tensor_that_does_not_exist_or_is_cut_twice_is_refused_by_group() {
    // Groups 0, 1, 2 are the ranks of q, k, v by layer; 3, 4, 5 the widths; 6, 7, 8 the ranks of gate, up.
    let message =
        refused(|j| j["groups"][0]["members"][0] = json!("model.layers.3.self_attn.q_proj.lora_A.weight"));
    assert_names(&message, &["group 0", "no tensor `model.layers.3.self_attn.q_proj.lora_A.weight`"]);
    let message =
        refused(|j| j["groups"][0]["members"][0] = json!("model.layers.0.self_attn.o_proj.lora_A.weight"));
    assert_names(&message, &["group 0", "no tensor `model.layers.0.self_attn.o_proj.lora_A.weight`"]);
    let message = refused(|j| j["groups"][0]["members"][0] = json!("q_proj"));
    assert_names(&message, &["group 0", "no tensor `q_proj`"]);

    let message = refused(|j| {
        let again = j["groups"][0]["members"][0].clone();
        j["groups"][0]["members"].as_array_mut().unwrap().push(again);
    });
    assert_names(&message, &["groups 0 and 0 both cut the rows", "layers.0.self_attn.q_proj.lora_A"]);
    let message = refused(|j| {
        let again = j["groups"][0].clone();
        j["groups"].as_array_mut().unwrap().push(again);
    });
    assert_names(&message, &["groups 0 and 9 both cut the rows", "q_proj.lora_A"]);
}

#[test]
fn a_group_that_cuts_too_little_or_too_much_is_refused_by_group() {
    let wrong_tensors = |message: String, group: &str, tensor: &str| {
        assert_names(&message, &[group, "such a group has members", tensor]);
    };
    let removed = |group: usize, list: &'static str| {
        refused(|j| {
            j["groups"][group][list].as_array_mut().unwrap().pop();
        })
    };
    wrong_tensors(removed(0, "followers"), "group 0", "layers.0.self_attn.v_proj.lora_B");
    wrong_tensors(removed(3, "members"), "group 3", "layers.0.mlp.up_proj.lora_B");
    wrong_tensors(removed(3, "followers"), "group 3", "layers.0.mlp.down_proj.lora_A");
    // Another layer's down_proj has the right size but reads other channels; so has a rank's `A` the right size.
    let message = refused(|j| {
        j["groups"][3]["followers"] =
            json!(["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.lora_A.weight"]);
    });
    wrong_tensors(message, "group 3", "layers.0.mlp.down_proj.weight");
    let message =
        refused(|j| j["groups"][0]["followers"][0] = json!("model.layers.0.mlp.down_proj.lora_B.weight"));
    wrong_tensors(message, "group 0", "layers.0.self_attn.q_proj.lora_B");
    // What is no input of the group's own outputs: o_proj reads the heads.
    let message =
        refused(|j| j["groups"][3]["followers"][0] = json!("model.layers.0.self_attn.o_proj.weight"));
    assert_names(&message, &["group 3", "o_proj.weight", "has size 48"]);

    // The residual stream has one width.
    let residual = json!({"kind": "width", "choices": [48, 24], "followers": [],
        "members": ["model.layers.0.self_attn.o_proj.weight"]});
    let message = refused(|j| j["groups"].as_array_mut().unwrap().push(residual));
    assert_names(&message, &["group 9", "o_proj.weight` has no elastic width"]);
    assert_names(&refused(|j| j["groups"][3]["kind"] = json!("heads")), &["group 3", "has no elastic heads"]);
    assert_names(
        &refused(|j| j["groups"][3]["kind"] = json!("rank")),
        &["group 3", "such a group has members"],
    );
    assert_names(&refused(|j| j["groups"][3]["kind"] = json!("depth")), &["groups[3].kind", "depth"]);
    let message = refused(|j| {
        j["groups"][0]["members"] = json!([]);
        j["groups"][0]["followers"] = json!([]);
    });
    assert_names(&message, &["group 0", "no members"]);
}

#[test]
fn a_channel_order_that_is_no_permutation_is_refused_by_group() {
    let bad = "group 3: its order is not a permutation of 0..80";
    assert_names(&refused(|j| j["orders"]["3"][0] = j["orders"]["3"][1].clone()), &[bad]);
    assert_names(&refused(|j| j["orders"]["3"][0] = json!(80)), &[bad]);
    let message = refused(|j| {
        j["orders"]["3"].as_array_mut().unwrap().pop();
    });
    assert_names(&message, &[bad]);
    let message = refused(|j| j["orders"]["3"].as_array_mut().unwrap().push(json!(80)));
    assert_names(&message, &[bad]);
    assert_names(&refused(|j| j["orders"]["3"] = json!([])), &[bad]);
    // Only widths have channels, and only groups that exist.
    assert_names(&refused(|j| j["orders"]["0"] = json!([0, 1, 2, 3, 4, 5, 6, 7])), &["group 0", "its order"]);
    assert_names(&refused(|j| j["orders"]["99"] = json!([0])), &["group 99", "its order"]);
    assert_names(&refused(|j| j["orders"]["x"] = json!([0])), &["orders"]);
    let heads = |order: serde_json::Value| {
        let net = Supernet::open("tiny-heads/base", "tiny-heads-ordered");
        let edited = Folder::copy_of("tiny-heads-ordered/supernet");
        edited.edit_json(SUPERNET, |j| j["orders"]["6"] = order);
        ModelFolder::open(edited.path()).unwrap().search_space(&net.shape).unwrap_err().to_string()
    };
    // Two queries each: there are three to be ordered, not six or 48 rows.
    for wrong in [json!([0, 1]), json!([0, 1, 1]), json!([0, 1, 3]), json!([0, 1, 2, 3, 4, 5])] {
        assert!(heads(wrong).contains("group 6: its order is not a permutation of 0..3"));
    }
    assert_names(&refused(|j| j["orders"]["3"][0] = json!(-1)), &["orders.3[0]"]);
}

#[test]
fn a_header_that_does_not_fit_is_refused_by_field() {
    assert_names(&refused(|j| j["version"] = json!(2)), &["`version`", "2 is not supported; supported: 1"]);
    assert_names(&refused(|j| j["version"] = json!("1")), &["`version`"]);
    assert_names(&refused(|j| j["scale"] = json!(2.5)), &["`scale`", "2.5, but lora_alpha / r is 2"]);
    assert_names(&refused(|j| j["scale"] = Value::Null), &["`scale`"]);
    assert_names(&refused(|j| j["groups"] = Value::Null), &["`groups`"]);
    assert_names(&refused(|j| j["colour"] = json!("red")), &["unknown field `colour`"]);
    assert_names(&refused(|j| j["groups"][1]["colour"] = json!("red")), &["groups[1]", "`colour`"]);
    assert_names(&refused(|j| j["base"]["source"] = json!({"url": "x"})), &["base.source", "url"]);
    let message = refused(|j| {
        j.as_object_mut().unwrap().remove("name");
    });
    assert_names(&message, &["missing field `name`"]);

    let folder = model();
    folder.edit_json(CONFIG, |j| j["lora_alpha"] = json!(8));
    assert_names(&open(&folder).unwrap_err(), &[SUPERNET, "`scale`", "lora_alpha / r is 1"]);
    folder.remove(SUPERNET);
    assert_names(&open(&folder).unwrap_err(), &[SUPERNET, "No such file"]);
}

/// Why a catalog edited like this is refused; entries are maximal, heuristic, minimal and `other`.
#[track_caller]
fn catalog_refused(edit: impl FnOnce(&mut Value)) -> String {
    let folder = model();
    let mut catalog = open(&folder).unwrap();
    let net = Supernet::open("tiny-tied/base", "tiny-tied-ordered");
    let other = net.space.pick(|group, choices| (group + 1) % choices);
    catalog.add(&net.shape, &net.space, "other", other).unwrap();
    ModelFolder::open(folder.path()).unwrap().write_catalog(&catalog).unwrap();
    open(&folder).unwrap();
    folder.edit_json(CATALOG, edit);
    let message = open(&folder).unwrap_err();
    assert_names(&message, &[CATALOG]);
    message
}

#[test]
fn a_sub_network_written_by_hand_needs_a_name_and_choices_only() {
    let folder = model();
    let maximal = open(&folder).unwrap().get("maximal").unwrap().clone();
    let choices = maximal.sub_network.choices().to_vec();
    let written = json!([{"name": "largest", "choices": choices}]).to_string();
    std::fs::write(folder.path().join(CATALOG), written).unwrap();
    let catalog = open(&folder).unwrap();
    assert_eq!(catalog.get("largest").unwrap().cost, maximal.cost);
    assert_eq!(catalog.entries().len(), 4, "the three that always exist are there too");
}

#[test]
fn a_catalog_that_does_not_fit_its_search_space_is_refused_by_name() {
    let message = catalog_refused(|j| j[3]["choices"][3] = json!(79));
    assert_names(&message, &["group 3", "79 is not one of the choices [80, 61, 40]"]);
    let message = catalog_refused(|j| {
        j[3]["choices"].as_array_mut().unwrap().pop();
    });
    assert_names(&message, &["needs 9 choices", "got 8"]);
    assert_names(&catalog_refused(|j| j[3]["choices"] = json!([])), &["needs 9 choices", "got 0"]);

    let message = catalog_refused(|j| j[3]["parameters"] = json!(1));
    assert_names(&message, &["`other`", "parameters: expected", "got 1"]);
    assert_names(&catalog_refused(|j| j[0]["macs"] = json!(1)), &["`maximal`", "macs: expected", "got 1"]);
    assert_names(&catalog_refused(|j| j[0]["macs"] = json!(-1)), &["[0]"]);

    // The three names mean what LoNAS means: neither may another sub-network take one, nor is one given twice.
    assert_names(
        &catalog_refused(|j| j[0]["choices"] = j[2]["choices"].clone()),
        &["`maximal`", "fixed meaning"],
    );
    assert_names(
        &catalog_refused(|j| j[3]["name"] = json!("maximal")),
        &["two sub-networks are named `maximal`"],
    );
    let message = catalog_refused(|j| {
        let again = j[3].clone();
        j.as_array_mut().unwrap().push(again);
    });
    assert_names(&message, &["two sub-networks are named `other`"]);
    for name in ["", "a b", "a:b", "a/b", "ü", &"x".repeat(65)] {
        assert_names(&catalog_refused(|j| j[3]["name"] = json!(name)), &[&format!("{name:?}")]);
    }
    assert_names(&catalog_refused(|j| j[3]["colour"] = json!(1)), &["[3]", "colour"]);
    assert_names(&catalog_refused(|j| j[3]["scores"] = json!({"arc": "good"})), &["[3]"]);
    assert_names(&catalog_refused(|j| *j = json!({})), &["expected a sequence"]);
}

#[test]
fn catalogs_that_change_at_the_same_time_lose_nothing() {
    let folder = model();
    let net = Supernet::open("tiny-tied/base", "tiny-tied-ordered");
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let (folder, net) = (folder.path(), &net);
            scope.spawn(move || {
                for task in 0..5 {
                    let opened = ModelFolder::open(folder).unwrap();
                    let mut held = opened.hold_catalog(&net.shape, &net.space).unwrap();
                    let entry = held.catalog.get_mut("minimal").unwrap();
                    entry.scores.insert(format!("{writer} {task}"), 0.5);
                    held.write().unwrap();
                }
            });
        }
    });
    assert_eq!(open(&folder).unwrap().get("minimal").unwrap().scores.len(), 40);
}
