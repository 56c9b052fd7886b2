//! Configurations by templates (Shears), by lists of ranks (SQFT), and damaged ones.

use super::write::{A, B, BASE, Groups, LONAS, Writing, llama, llama_node, mpt, nncf};
use crate::files::{Folder, assert_names};
use lonas::artifact::ElasticFile;
use lonas::supernet::{Kind, ModelShape};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Three layers of width 48, adapters of rank 32 everywhere but beside the attention's output.
fn tiny() -> ModelShape {
    llama(3, 16, 48, &["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
}

fn opened(text: &str) -> Result<ElasticFile, String> {
    let folder = Folder::empty();
    folder.write("space.json", text);
    ElasticFile::read(&folder.file("space.json")).map_err(|e| e.to_string())
}

/// Why a configuration, or its search space in a tiny LLaMA, is refused.
#[track_caller]
fn refused(text: &str) -> String {
    let space = opened(text).and_then(|file| file.search_space(&tiny(), 32).map_err(|e| e.to_string()));
    let message = space.map(|_| ()).unwrap_err();
    assert_names(&message, &["space.json: "]);
    message
}

/// A rank group, a width group, a rank group, in the first layer.
fn one_layer() -> Groups {
    let node = |(module, end): (&str, &str)| llama_node(0, module, end);
    let mlp = [("gate_proj", BASE), ("gate_proj", B), ("up_proj", BASE), ("up_proj", B)];
    vec![
        ([("q_proj", A), ("k_proj", A), ("v_proj", A)].map(node).to_vec(), vec![32, 28]),
        (mlp.map(node).to_vec(), vec![24, 48, 36]),
        ([("gate_proj", A), ("up_proj", A)].map(node).to_vec(), vec![32, 28]),
    ]
}

fn edited(edit: impl FnOnce(&mut Value)) -> String {
    let mut json = serde_json::from_str(&nncf(&one_layer(), LONAS)).unwrap();
    edit(&mut json);
    json.to_string()
}

const TRAINING: &str = "/bootstrapNAS/training";
const WIDTH: &str = "/bootstrapNAS/training/elasticity/width";

fn at<'a>(json: &'a mut Value, pointer: &str) -> &'a mut Value {
    json.pointer_mut(pointer).unwrap()
}

#[test]
fn shears_templates_stand_for_a_group_in_each_layer_template_by_template() {
    let template = |modules: &[&str]| {
        let nodes = modules.iter().map(|m| format!("{{re}}{}", llama_node("{*}", m, A)));
        (nodes.collect::<Vec<_>>(), vec![32, 24, 16])
    };
    let templates =
        vec![template(&["q_proj", "k_proj", "v_proj"]), template(&["up_proj"]), template(&["down_proj"])];
    let text = nncf(&templates, Writing { epochs: -1, init_lr: -1.0, ..LONAS });
    let shape = tiny();
    let space = opened(&text).unwrap().search_space(&shape, 32).unwrap();
    let members =
        space.groups().iter().map(|g| g.members.iter().map(|&t| shape.tensor_name(t)).collect::<Vec<_>>());
    let qkv = |l: usize| {
        ["q", "k", "v"].map(|m| format!("model.layers.{l}.self_attn.{m}_proj.lora_A.weight")).to_vec()
    };
    let mlp = |l: usize, m: &str| vec![format!("model.layers.{l}.mlp.{m}_proj.lora_A.weight")];
    let expected = [
        qkv(0),
        qkv(1),
        qkv(2),
        mlp(0, "up"),
        mlp(1, "up"),
        mlp(2, "up"),
        mlp(0, "down"),
        mlp(1, "down"),
        mlp(2, "down"),
    ];
    assert_eq!(members.collect::<Vec<_>>(), expected);
    // The gate's adapter, which no group names, keeps its rank.
    let active = space.resolve(&shape, &space.minimal());
    let rank = |name: &str| active.linears[shape.find(&format!("model.layers.1.mlp.{name}")).unwrap()].rank;
    assert_eq!([rank("gate_proj"), rank("up_proj"), rank("down_proj")], [32, 16, 16]);
}

#[test]
fn shears_mpt_has_queries_keys_values_and_output_in_one_group_and_both_of_the_mlp_in_another() {
    let template = |part: &str, modules: &[&str]| {
        let block = "MPTForCausalLM[model]/MPTModel[transformer]/ModuleList[blocks]/MPTBlock[{*}]";
        let node = |module: &&str| {
            format!("{{re}}PeftModelForCausalLM/LoraModel[base_model]/{block}/{part}/Linear[{module}]{A}")
        };
        (modules.iter().map(node).collect::<Vec<_>>(), vec![32, 24, 16])
    };
    let templates = vec![
        template("MultiheadAttention[attn]", &["q_proj", "k_proj", "v_proj", "out_proj"]),
        template("MPTMLP[ffn]", &["up_proj", "down_proj"]),
    ];
    let shape = mpt();
    let text = nncf(&templates, Writing { epochs: -1, init_lr: -1.0, ..LONAS });
    let space = opened(&text).unwrap().search_space(&shape, 32).unwrap();
    assert_eq!(space.groups().len(), 64);
    let members = |group: usize| space.groups()[group].members.iter().map(|&t| shape.tensor_name(t));
    let last = |modules: &[&str]| {
        modules.iter().map(|m| format!("transformer.blocks.31.{m}.lora_A.weight")).collect::<Vec<_>>()
    };
    let attention = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"];
    assert_eq!(members(31).collect::<Vec<_>>(), last(&attention));
    assert_eq!(members(63).collect::<Vec<_>>(), last(&["ffn.up_proj", "ffn.down_proj"]));
    let ranks = space.resolve(&shape, &space.heuristic()).linears;
    assert!(ranks[..shape.linears.len() - 1].iter().all(|linear| linear.rank == 24));
}

#[test]
fn a_template_that_is_half_one_or_fits_no_layer_is_refused() {
    let text = |nodes: [String; 2]| nncf(&vec![(nodes.to_vec(), vec![32, 28])], LONAS);
    let template = |module: &str| format!("{{re}}{}", llama_node("{*}", module, A));
    let message = refused(&text([template("q_proj"), llama_node(0, "k_proj", A)]));
    assert_names(&message, &["overwrite_groups[0][1]", "one is a template, the other not"]);
    let message = refused(&text([format!("{{re}}{}", llama_node(0, "q_proj", A)), template("k_proj")]));
    assert_names(&message, &["overwrite_groups[0][0]", "without `{*}`"]);
    let message = refused(&text([template("q_proj"), template("o_proj")]));
    assert_names(
        &message,
        &["overwrite_groups[0][1]", "model.layers.0.mlp.o_proj", "which the model does not have"],
    );
    let message = refused(&text([template("qkv"), template("k_proj")]));
    assert_names(&message, &["overwrite_groups[0][0]", "model.layers.0.self_attn.qkv"]);
}

#[test]
fn sqft_lists_targets_and_ranks() {
    let target = |l: usize, m: &str| format!("base_model.model.model.layers.{l}.self_attn.{m}_proj.lora_A");
    let item = |l: usize| json!({"target": [target(l, "q"), target(l, "k"), target(l, "v")], "search_space": [32, 24, 16]});
    let file = opened(&json!([item(0), item(1), item(2)]).to_string()).unwrap();
    let space = file.search_space(&tiny(), 32).unwrap();
    let kinds = space.groups().iter().map(|g| (g.kind, g.members.len(), g.choices.as_slice()));
    assert!(kinds.eq([(Kind::Rank, 3, &[32, 24, 16][..]); 3]));
    assert_eq!(file.notes(), &[] as &[String]);

    // SQFT's maximal is the first entry of its list, ours is the largest.
    let rising = json!([{"target": [target(0, "q")], "search_space": [16, 24, 32]}]).to_string();
    let file = opened(&rising).unwrap();
    assert_eq!(file.search_space(&tiny(), 32).unwrap().maximal().choices(), [32]);
    assert_names(&file.notes().join(" "), &["group 0", "[16, 24, 32]", "[32, 24, 16]", "`maximal`"]);

    let message = refused(&json!([{"target": [target(0, "q")], "active_rank_value": 24}]).to_string());
    assert_names(&message, &["[0].search_space", "chooses one sub-network", "elastic_adapter_config.json"]);
    let message = refused(&json!([{"target": [target(7, "q")], "search_space": [32]}]).to_string());
    assert_names(
        &message,
        &["[0].target[0]", "layers.7.self_attn.q_proj.lora_A", "which the model does not have"],
    );
    let message = refused(&json!([{"target": [], "search_space": [32]}]).to_string());
    assert_names(&message, &["[0].search_space", "no members"]);
    let message = refused(&json!([{"target": "q_proj", "search_space": [32]}]).to_string());
    assert_names(&message, &["[0].target", "expected a sequence"]);
}

#[test]
fn sqfts_first_version_is_an_nncf_configuration_with_a_root_of_its_own() {
    // Written before the schedule is filled in, as SQFT's own template is.
    let text = edited(|j| {
        let mut algorithm = j.as_object_mut().unwrap().remove("bootstrapNAS").unwrap();
        algorithm["training"]["algorithm"] = json!("nls");
        algorithm["training"].as_object_mut().unwrap().remove("schedule");
        j["SQFT"] = algorithm;
    });
    let space = opened(&text).unwrap().search_space(&tiny(), 32).unwrap();
    assert_eq!(space.maximal().choices(), [32, 48, 32]);
    // Another transformers calls its attention otherwise.
    let renamed = text.replace("LlamaAttention[", "LlamaSdpaAttention[");
    assert_ne!(renamed, text);
    assert_eq!(opened(&renamed).unwrap().search_space(&tiny(), 32).unwrap(), space);
}

#[test]
fn comments_and_trailing_commas_are_taken_and_change_nothing() {
    let plain = nncf(&one_layer(), LONAS);
    let space = |text: &str| opened(text).unwrap().search_space(&tiny(), 32).unwrap();
    let commented = plain
        .replacen('{', "{ // a comment, with \"quotes\" and ]\n", 1)
        .replace("\"epochs\"", "/* of /* training, } */ \"epochs\"")
        .replace("[32, 28]", "[32, 28,]");
    assert_ne!(commented, plain);
    assert_eq!(space(&commented), space(&plain));
    // Widths fall, whatever order the file has them in.
    assert_eq!(space(&plain).groups()[1].choices, [48, 36, 24]);
}

#[test]
fn broken_json_is_refused_with_line_and_column() {
    let message = refused("{\n  \"bootstrapNAS\": {\"training\" 1}\n}");
    assert_names(&message, &["not JSON", "line 2 column 31"]);
    assert_names(&refused("{\"a\": [1, 2"), &["not JSON", "line 1"]);
    assert_names(&refused("[1 2]"), &["not JSON", "comma"]);
    assert_names(&refused("{} {}"), &["not JSON", "more than one"]);
    assert_names(&refused("{\"a\": NaN}"), &["not JSON"]);
    assert_names(&refused("/* no end"), &["not JSON", "Unterminated comment"]);
    let deep = "[".repeat(100_000);
    assert_names(&refused(&deep), &["not JSON", "nesting depth"]);
    for empty in ["", "{}", "3", "null", "\"text\""] {
        let message = refused(empty);
        assert!(message.contains("bootstrapNAS") || message.contains("expected"), "{message}");
    }
}

#[test]
fn widths_that_do_not_fit_are_refused_with_group_and_tensor() {
    let widths = |widths: Value| edited(|j| at(j, WIDTH)["overwrite_groups_widths"] = widths);
    let message = refused(&widths(json!([[32, 28], [40, 24], [32, 28]])));
    assert_names(
        &message,
        &["group 1", "first choice is 40", "model.layers.0.mlp.gate_proj.weight` has size 48"],
    );
    let message = refused(&widths(json!([[16, 8], [48], [32]])));
    assert_names(&message, &["group 0", "first choice is 16", "q_proj.lora_A.weight` has size 32"]);
    let message = refused(&widths(json!([[32, 28], [48, 48], [32]])));
    assert_names(&message, &["group 1", "strictly descending", "[48, 48]"]);
    assert_names(&refused(&widths(json!([[32, 0], [48], [32]]))), &["group 0", "positive"]);
    assert_names(&refused(&widths(json!([[], [48], [32]]))), &["group 0", "[]"]);
    let message = refused(&widths(json!([[32, 28], [48]])));
    assert_names(&message, &["overwrite_groups_widths", "expected 3 lists", "got 2"]);
    for wrong in
        [json!([[32, -1], [48], [32]]), json!([[32, 2.5], [48], [32]]), json!([[32, "28"], [48], [32]])]
    {
        assert_names(&refused(&widths(wrong)), &["overwrite_groups_widths[0][1]", "expected usize"]);
    }
}

#[test]
fn groups_that_are_not_whole_or_contradict_themselves_are_refused() {
    let groups = |edit: fn(&mut Groups)| {
        let mut groups = one_layer();
        edit(&mut groups);
        refused(&nncf(&groups, LONAS))
    };
    // The gate without its adapter's B; the two without each other.
    assert_names(&groups(|g| drop(g[1].0.remove(1))), &["group 1", "gate_proj.lora_B.weight"]);
    assert_names(&groups(|g| g[1].0.truncate(2)), &["group 1", "members", "up_proj.weight"]);
    let message = groups(|g| g[0].0.push(llama_node(0, "gate_proj", BASE)));
    assert_names(&message, &["overwrite_groups[0][3]", "one is a rank, the other a width"]);
    assert_names(&groups(|g| g.push(g[0].clone())), &["groups 0 and 3 both cut", "q_proj.lora_A"]);
    let message = groups(|g| g[1].0 = vec![llama_node(0, "down_proj", BASE)]);
    assert_names(&message, &["overwrite_groups[1][0]", "has no elastic width"]);
    let message = groups(|g| g[0].0[0] = llama_node(3, "q_proj", A));
    assert_names(&message, &["overwrite_groups[0][0]", "layers.3.self_attn.q_proj.lora_A", "does not have"]);
    let message = groups(|g| g[0].0[0] = llama_node(0, "q_proj", A).replace("q_proj", "o_proj"));
    assert_names(&message, &["o_proj.lora_A", "the adapter has none there"]);
    let message = groups(|g| g[0].0[0] = "x".repeat(100_000));
    assert_names(&message, &["overwrite_groups[0][0]"]);
    assert_names(&groups(|g| g[0].0.clear()), &["overwrite_groups_widths[0]", "no members"]);
    // More groups than a model has tensors are not expanded to fill the memory.
    let message = groups(|g| *g = vec![g[0].clone(); 1000]);
    assert_names(&message, &["more groups than the 66 tensors"]);
}

#[test]
fn what_would_mean_another_model_is_refused_by_field() {
    let set = |pointer: &str, field: &str, value: Value| refused(&edited(|j| at(j, pointer)[field] = value));
    let stage = format!("{TRAINING}/schedule/list_stage_descriptions/0");
    let elasticity = format!("{TRAINING}/elasticity");
    let message = set(&stage, "reorg_weights", json!(true));
    assert_names(&message, &["list_stage_descriptions[0].reorg_weights", "reordered"]);
    let message = set(&stage, "train_dims", json!(["width", "depth"]));
    assert_names(&message, &["list_stage_descriptions[0].train_dims", "depth"]);
    let message = set(&elasticity, "available_elasticity_dims", json!(["depth", "width"]));
    assert_names(&message, &["available_elasticity_dims", "elastic depth and kernels are not supported"]);
    let message = set(TRAINING, "algorithm", json!("magnitude_pruning"));
    assert_names(&message, &["training.algorithm", "magnitude_pruning"]);
    for wrong in [0, -2] {
        let message = set(&stage, "width_indicator", json!(wrong));
        assert_names(&message, &["width_indicator", &format!("got {wrong}")]);
    }
    for (pointer, path) in
        [(TRAINING, "training"), (WIDTH, "training.elasticity.width"), (&stage, "descriptions[0]")]
    {
        let message = set(pointer, "no_such_field", json!(1));
        assert_names(&message, &[path, "no_such_field"]);
    }
    let message = refused(&edited(|j| j["SQFT"] = j["bootstrapNAS"].clone()));
    assert_names(&message, &["`SQFT`", "beside `bootstrapNAS`"]);
    for field in ["overwrite_groups", "overwrite_groups_widths"] {
        let message = refused(&edited(|j| drop(at(j, WIDTH).as_object_mut().unwrap().remove(field))));
        assert_names(&message, &[field, "missing"]);
    }
    // Known, and of no consequence.
    let harmless = edited(|j| {
        at(j, WIDTH)["filter_importance"] = json!("L2");
        at(j, WIDTH)["min_width"] = json!(32);
        at(j, TRAINING)["sandwich_rule"] = json!(false);
        j["log_dir"] = json!("/tmp");
    });
    assert!(opened(&harmless).unwrap().search_space(&tiny(), 32).is_ok());
}

#[test]
fn of_choices_that_no_training_has_touched_none_are_imported() {
    let indicated = |width_indicator| {
        let file = opened(&nncf(&one_layer(), Writing { width_indicator, ..LONAS })).unwrap();
        let space = file.search_space(&tiny(), 32).unwrap();
        (space.groups().iter().map(|g| g.choices.len()).collect::<Vec<_>>(), file.notes().to_vec())
    };
    for all in [None, Some(-1), Some(3), Some(5)] {
        assert_eq!(indicated(all), (vec![2, 3, 2], Vec::new()), "{all:?}");
    }
    let (counts, notes) = indicated(Some(2));
    assert_eq!(counts, [2, 2, 2]);
    assert_names(&notes.join(" "), &["width_indicator is 2", "of 1 lists"]);
    assert_eq!(indicated(Some(1)).0, [1, 1, 1]);
    // Several stages: what the widest one trained.
    let stages = edited(|j| {
        let stages = at(j, &format!("{TRAINING}/schedule/list_stage_descriptions"));
        let mut first = stages[0].clone();
        first["width_indicator"] = json!(1);
        stages[0]["width_indicator"] = json!(2);
        stages.as_array_mut().unwrap().insert(0, first);
    });
    let space = opened(&stages).unwrap().search_space(&tiny(), 32).unwrap();
    assert_eq!(space.groups()[1].choices, [48, 36]);
}

#[test]
fn an_adapter_that_was_cut_keeps_the_choices_that_are_left() {
    let mut shape = tiny();
    for name in ["q_proj", "k_proj", "v_proj"] {
        let linear = shape.find(&format!("model.layers.0.self_attn.{name}")).unwrap();
        shape.linears[linear].rank = Some(28);
    }
    let file = opened(&nncf(&one_layer(), LONAS)).unwrap();
    let space = file.search_space(&shape, 32).unwrap();
    assert_eq!(space.groups()[0].choices, [28]);
    assert_eq!(space.groups()[2].choices, [32, 28]);
    // Cut to a rank that is none of the choices, or not all alike.
    let mut odd = shape.clone();
    odd.linears[0].rank = Some(30);
    let message = file.search_space(&odd, 32).unwrap_err().to_string();
    assert_names(&message, &["group 0", "first choice is 28", "q_proj.lora_A.weight` has size 30"]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_a_search_space_or_refused(at in 0usize..2000, cut in 0usize..40, insert in "[\\[\\]{},:\"0-9a-z/*]{0,6}") {
        let mut text = nncf(&one_layer(), LONAS);
        let start = at.min(text.len());
        let end = (start + cut).min(text.len());
        text.replace_range(start..end, &insert);
        if let Ok(file) = opened(&text) {
            let _ = file.search_space(&tiny(), 32);
        }
    }
}
