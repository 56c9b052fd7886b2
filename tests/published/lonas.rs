//! The twelve configurations of LoNAS, written out by their rules, and what its README and its own counter say of them.

use super::write::{A, B, BASE, Groups, LONAS, Writing, bert, bloomz, llama, llama_node, nncf};
use crate::files::Folder;
use lonas::artifact::ElasticFile;
use lonas::supernet::{Cost, Group, Kind, ModelShape, SearchSpace, TensorRef};

/// The groups that the written configuration has in this model.
fn read(text: &str, shape: &ModelShape, rank: usize) -> Vec<Group> {
    let folder = Folder::empty();
    folder.write("nncf.json", text);
    let file = ElasticFile::read(&folder.file("nncf.json")).unwrap();
    assert_eq!(file.notes(), &[] as &[String], "nothing is restricted in any of them");
    file.groups(shape, rank).unwrap()
}

/// Billions of weights and tera-MACs of the maximal, the heuristic and the minimal sub-network.
#[track_caller]
fn assert_costs(shape: &ModelShape, groups: Vec<Group>, count: usize, log10: f64, costs: [(f64, f64); 3]) {
    assert_eq!(groups.len(), count);
    let space = SearchSpace::new(shape, groups).unwrap();
    assert!((space.log10_size() - log10).abs() < 0.05, "10^{}", space.log10_size());
    for (sub_network, (billions, tera)) in
        [space.maximal(), space.heuristic(), space.minimal()].into_iter().zip(costs)
    {
        let cost = Cost::of(shape, &space.resolve(shape, &sub_network));
        // As precise as the reference has them.
        let digits = if count == 120 { 5e-4 } else { 5e-5 };
        let (parameters, macs) = (cost.parameters as f64 / 1e9, cost.macs as f64 / 1e12);
        assert!((parameters - billions).abs() <= digits, "{parameters} billion weights, expected {billions}");
        assert!((macs - tera).abs() <= 5.1e-5, "{macs} TMACs, expected {tera}");
    }
}

fn names(shape: &ModelShape, tensors: &[TensorRef]) -> Vec<String> {
    tensors.iter().map(|&t| shape.tensor_name(t)).collect()
}

const LLAMA_7B: [&str; 6] = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"];

fn llama_7b() -> Groups {
    let nodes = |l: usize, nodes: &[(&str, &str)]| {
        nodes.iter().map(|(m, end)| llama_node(l, m, end)).collect::<Vec<_>>()
    };
    let qkv = (0..32).map(|l| (nodes(l, &[("q_proj", A), ("k_proj", A), ("v_proj", A)]), vec![32, 28]));
    let mlp = [("gate_proj", BASE), ("gate_proj", B), ("up_proj", BASE), ("up_proj", B)];
    let width = (0..32).map(|l| (nodes(l, &mlp), vec![11008, 9632, 8256, 6880, 5504]));
    let rank = (0..32).map(|l| (nodes(l, &[("gate_proj", A), ("up_proj", A)]), vec![32, 28]));
    qkv.chain(width).chain(rank).collect()
}

#[test]
fn llama_7b_for_commonsense_and_for_math() {
    let shape = llama(32, 4096, 11008, &LLAMA_7B);
    for epochs in [6, 7] {
        let groups = read(&nncf(&llama_7b(), Writing { epochs, ..LONAS }), &shape, 32);
        assert_eq!(groups[33].kind, Kind::Width);
        assert_eq!(
            names(&shape, &groups[33].members),
            ["gate_proj.weight", "gate_proj.lora_B.weight", "up_proj.weight", "up_proj.lora_B.weight"]
                .map(|name| format!("model.layers.1.mlp.{name}"))
        );
        assert_eq!(
            names(&shape, &groups[33].followers),
            ["down_proj.weight", "down_proj.lora_A.weight"].map(|name| format!("model.layers.1.mlp.{name}"))
        );
        assert_eq!(groups[31].kind, Kind::Rank);
        assert_eq!(
            names(&shape, &groups[31].followers),
            ["q_proj", "k_proj", "v_proj"].map(|m| format!("model.layers.31.self_attn.{m}.lora_B.weight"))
        );
        let costs = [(6.6786, 1.7097), (5.5881, 1.4305), (4.4919, 1.1499)];
        assert_costs(&shape, groups, 96, 41.6, costs);
    }
}

#[test]
fn llama_13b_for_math_whose_gate_has_no_adapter() {
    let shape = llama(40, 5120, 13824, &["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]);
    let qkv =
        (0..40).map(|l| (["q_proj", "k_proj", "v_proj"].map(|m| llama_node(l, m, A)).to_vec(), vec![32, 28]));
    let mlp = [("gate_proj", "/linear_0"), ("up_proj", BASE), ("up_proj", B)];
    let width = (0..40)
        .map(|l| (mlp.map(|(m, end)| llama_node(l, m, end)).to_vec(), vec![13824, 12096, 10368, 8640, 6912]));
    let rank = (0..40).map(|l| (vec![llama_node(l, "up_proj", A)], vec![32, 28]));
    let groups = read(&nncf(&qkv.chain(width).chain(rank).collect(), LONAS), &shape, 32);
    let costs = [(12.939, 3.3125), (10.807, 2.7666), (8.668, 2.2190)];
    assert_costs(&shape, groups, 120, 52.0, costs);
}

#[test]
fn bloomz_7b_for_math_whose_file_has_trailing_commas() {
    let shape = bloomz();
    let node = |l: usize, module: &str, end: &str| {
        format!(
            "PeftModelForCausalLM/LoraModel[base_model]/BloomForCausalLM[model]/BloomModel[transformer]/ModuleList[h]/\
             BloomBlock[{l}]/{module}{end}"
        )
    };
    let (qkv, up) =
        ("BloomAttention[self_attention]/Linear[query_key_value]", "BloomMLP[mlp]/Linear[dense_h_to_4h]");
    let attention = (0..30).map(|l| (vec![node(l, qkv, A)], vec![32, 28]));
    let width =
        (0..30).map(|l| (vec![node(l, up, BASE), node(l, up, B)], vec![16384, 14336, 12288, 10240, 8192]));
    let rank = (0..30).map(|l| (vec![node(l, up, A)], vec![32, 28]));
    let groups = attention.chain(width).chain(rank).collect();
    let text = nncf(&groups, Writing { epochs: 8, trailing_commas: true, ..LONAS });
    assert!(serde_json::from_str::<serde_json::Value>(&text).is_err(), "it is not strict JSON");
    let groups = read(&text, &shape, 32);
    assert_eq!(
        names(&shape, &groups[30].followers),
        ["transformer.h.0.mlp.dense_4h_to_h.weight", "transformer.h.0.mlp.dense_4h_to_h.lora_A.weight"]
    );
    let costs = [(7.1225, 1.8233), (6.1080, 1.5636), (5.0900, 1.3030)];
    assert_costs(&shape, groups, 90, 39.0, costs);
}

fn bert_node(layer: usize, module: &str, end: &str) -> String {
    format!(
        "PeftModelForSequenceClassification/LoraModel[base_model]/BertForSequenceClassification[model]/BertModel[bert]/\
         BertEncoder[encoder]/ModuleList[layer]/BertLayer[{layer}]/{module}{end}"
    )
}

/// What LoNAS's authors found by an analysis of their own: not a rule but numbers.
const HEADS: [&[usize]; 12] = [
    &[768, 384],
    &[768, 320],
    &[768, 256],
    &[768, 512],
    &[768, 512],
    &[768, 704],
    &[768, 576],
    &[768, 576],
    &[768, 640],
    &[768, 192],
    &[768, 704, 192],
    &[768, 320],
];
const WIDTHS: [[usize; 2]; 12] = [
    [2634, 216],
    [2634, 181],
    [2627, 208],
    [2676, 226],
    [2628, 179],
    [2662, 175],
    [2706, 182],
    [2687, 169],
    [2616, 165],
    [2400, 160],
    [2198, 163],
    [1940, 150],
];

fn bert_base() -> (ModelShape, Groups, Vec<String>) {
    let shape = bert();
    let attention = |module: &str| format!("BertAttention[attention]/BertSelfAttention[self]/{module}");
    let members = [
        (attention("Linear[query]"), BASE),
        (attention("Linear[query]"), B),
        (attention("NNCFLinear[key]"), "/linear_0"),
        (attention("Linear[value]"), BASE),
        (attention("Linear[value]"), B),
    ];
    let heads = HEADS.iter().enumerate().map(|(l, widths)| {
        (members.iter().map(|(module, end)| bert_node(l, module, end)).collect(), widths.to_vec())
    });
    let ranks = (0..12).map(|l| {
        let ranks = ["Linear[query]", "Linear[value]"].map(|m| bert_node(l, &attention(m), A));
        (ranks.to_vec(), vec![8, 4, 2])
    });
    let widths = WIDTHS.iter().enumerate().map(|(l, [middle, least])| {
        (
            vec![bert_node(l, "BertIntermediate[intermediate]/NNCFLinear[dense]", "/linear_0")],
            vec![3072, *middle, *least],
        )
    });
    let output = "BertAttention[attention]/BertSelfOutput[output]/NNCFLinear[dense]";
    let dynamic = (0..12).map(|l| bert_node(l, output, "/linear_0")).collect();
    (shape, heads.chain(ranks).chain(widths).collect(), dynamic)
}

/// RTE, MRPC, STS-B, CoLA, SST-2, QNLI, QQP, MNLI: epochs and rate.
const GLUE: [(i64, f64); 8] =
    [(80, 3e-4), (35, 5e-4), (60, 5e-4), (80, 3e-4), (60, 3e-4), (80, 4e-4), (60, 3e-4), (40, 4e-4)];

#[test]
fn bert_for_the_eight_tasks_of_glue() {
    let (shape, groups, dynamic) = bert_base();
    for (epochs, init_lr) in GLUE {
        let writing =
            Writing { epochs, init_lr, width_indicator: Some(4), tokens: 128, sandwich_rule: true, ..LONAS };
        let text = nncf(&groups, Writing { dynamic_inputs: &dynamic, ..writing });
        let groups = read(&text, &shape, 8);
        let kinds = groups.iter().map(|g| g.kind).collect::<Vec<_>>();
        let expected = [[Kind::Heads; 12], [Kind::Rank; 12], [Kind::Width; 12]].concat();
        assert_eq!(kinds, expected);
        let of = |tensors: &[TensorRef]| names(&shape, tensors);
        let layer = |name: &str| format!("bert.encoder.layer.10.{name}");
        assert_eq!(
            of(&groups[10].members),
            ["query.weight", "query.lora_B.weight", "key.weight", "value.weight", "value.lora_B.weight"]
                .map(|name| layer(&format!("attention.self.{name}")))
        );
        assert_eq!(of(&groups[10].followers), [layer("attention.output.dense.weight")]);
        assert_eq!(groups[10].choices, [768, 704, 192]);
        assert_eq!(of(&groups[34].members), [layer("intermediate.dense.weight")]);
        assert_eq!(of(&groups[34].followers), [layer("output.dense.weight")]);

        let space = SearchSpace::new(&shape, groups).unwrap();
        assert_eq!(space.groups().len(), 36);
        assert!((space.log10_size() - 15.2).abs() < 0.05, "10^{}", space.log10_size());
        let costs = [(space.maximal(), 10.91), (space.heuristic(), 9.60), (space.minimal(), 2.47)];
        for (sub_network, giga) in costs {
            // Of 128 tokens; pooler and classifier, which see one, show in none of these digits.
            let macs = Cost::of(&shape, &space.resolve(&shape, &sub_network)).macs as f64 / 1e9;
            assert!((macs - giga).abs() <= 0.0051, "{macs} GMACs, expected {giga}");
        }
        assert_eq!(
            space.heuristic().choices()[..12],
            [768, 768, 768, 768, 768, 768, 768, 768, 768, 768, 704, 768]
        );
    }
}

#[test]
fn an_input_that_nncf_could_not_see_must_follow_a_group() {
    let (shape, groups, _) = bert_base();
    let other = bert_node(3, "BertOutput[output]/NNCFLinear[dense]", "/linear_0");
    let folder = Folder::empty();
    let refused = |groups: &Groups, dynamic: String| {
        folder.write("nncf.json", nncf(groups, Writing { dynamic_inputs: &[dynamic], ..LONAS }));
        ElasticFile::read(&folder.file("nncf.json")).unwrap().groups(&shape, 8).unwrap_err().to_string()
    };
    // It follows the width of layer 3's intermediate, which is not elastic here.
    let heads_and_ranks = groups[..24].to_vec();
    let message = refused(&heads_and_ranks, other.clone());
    assert!(message.contains("add_dynamic_inputs[0]") && message.contains("follows no group"), "{message}");
    let message = refused(&groups, other.replace("BertLayer[3]", "BertLayer[12]"));
    assert!(message.contains("base_model.model.bert.encoder.layer.12.output.dense"), "{message}");
}
