//! Which Linears a LLaMA has, in which order, and which of them an elastic choice ties together.

use crate::artifact::{AdapterConfig, BaseConfig, BaseTensor};
use crate::supernet::{
    Channels, Group, Kind, LinearShape, ModelShape, Part, SearchSpace, SpaceError, TensorRef,
};

/// The Linears of one layer, in execution order; the position in this list is the Linear's place in the layer.
pub const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The places of gate, up and down in [`MODULES`].
const MLP: [usize; 3] = [4, 5, 6];

/// The last name of a module path, by which PEFT and search-space files call it.
fn short_name(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// All Linears of a LLaMA with the adapters that `adapter` puts beside them.
pub fn model_shape(config: &BaseConfig, adapter: Option<&AdapterConfig>) -> ModelShape {
    let (queries, keys) = (config.query_heads * config.head_size, config.kv_heads * config.head_size);
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let sizes = [
        (queries, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, queries),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ];
    let mut linears = Vec::with_capacity(config.layers * MODULES.len() + 1);
    for layer in 0..config.layers {
        for (module, (out, inp)) in MODULES.into_iter().zip(sizes) {
            let adapted = adapter.filter(|a| a.target_modules.iter().any(|t| t == short_name(module)));
            let name = format!("model.layers.{layer}.{module}");
            linears.push(LinearShape { name, out, inp, rank: adapted.map(|a| a.rank) });
        }
    }
    linears.push(LinearShape { name: "lm_head".into(), out: config.vocabulary, inp: hidden, rank: None });
    // Gate's and up's outputs are multiplied with each other and read by down; the other widths are the residual stream's
    // and the attention heads'.
    let [gate, up, down] = MLP;
    let first = |layer| layer * MODULES.len();
    let mlp = |layer| Channels {
        writers: vec![first(layer) + gate, first(layer) + up],
        readers: vec![first(layer) + down],
    };
    ModelShape { linears, channels: (0..config.layers).map(mlp).collect() }
}

/// Every tensor of a base, as [`super::load`] will ask for them, in the order in which the model uses them.
pub fn base_tensors(config: &BaseConfig) -> Vec<BaseTensor> {
    let tensor = |name: String, shape: &[usize]| BaseTensor { name, shape: shape.to_vec() };
    let norm = |name: String| tensor(name, &[config.hidden]);
    let table = |name: &str| tensor(name.into(), &[config.vocabulary, config.hidden]);
    let mut tensors = vec![table("model.embed_tokens.weight")];
    let linears = model_shape(config, None).linears;
    for (index, linear) in linears[..config.layers * MODULES.len()].iter().enumerate() {
        let LinearShape { name, out, inp, .. } = linear;
        let (layer, place) = (index / MODULES.len(), index % MODULES.len());
        if place == 0 {
            tensors.push(norm(format!("model.layers.{layer}.input_layernorm.weight")));
        } else if place == MLP[0] {
            tensors.push(norm(format!("model.layers.{layer}.post_attention_layernorm.weight")));
        }
        tensors.push(tensor(format!("{name}.weight"), &[*out, *inp]));
        let has_bias = if MLP.contains(&place) { config.mlp_bias } else { config.attention_bias };
        tensors.extend(has_bias.then(|| tensor(format!("{name}.bias"), &[*out])));
    }
    tensors.push(norm("model.norm.weight".into()));
    tensors.extend((!config.tied_embeddings).then(|| table("lm_head.weight")));
    tensors
}

/// One group of a search space, repeated in every layer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupTemplate {
    pub kind: Kind,
    /// Short module names that share the choice, e.g. `["gate_proj", "up_proj"]`.
    pub modules: Vec<String>,
    /// Strictly descending; the first is the modules' own size.
    pub choices: Vec<usize>,
}

/// A group template that no LLaMA can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    #[error("search space: a LLaMA layer has no module `{module}`; it has {}", short_names().join(", "))]
    UnknownModule { module: String },
    #[error(
        "search space: a width group must be exactly gate_proj and up_proj (their products meet), got {modules:?}"
    )]
    WidthModules { modules: Vec<String> },
    #[error("search space: `{module}` has no adapter, so it has no rank to choose")]
    NoAdapter { module: String },
    #[error("search space: elastic heads are not supported for LLaMA")]
    Heads,
    #[error(transparent)]
    Space(#[from] SpaceError),
}

fn short_names() -> Vec<&'static str> {
    MODULES.into_iter().map(short_name).collect()
}

/// Expands templates to a search space: template by template, within each layer by layer, which is the order in
/// which LoNAS numbers its groups.
///
/// # Errors
/// A module that does not exist or cannot be elastic in this way, or choices that do not fit the sizes.
pub fn search_space(shape: &ModelShape, templates: &[GroupTemplate]) -> Result<SearchSpace, TemplateError> {
    let layers = shape.linears.len() / MODULES.len();
    let mut groups = Vec::with_capacity(templates.len() * layers);
    for template in templates {
        for layer in 0..layers {
            groups.push(expand(shape, template, layer)?);
        }
    }
    Ok(SearchSpace::new(shape, groups)?)
}

fn expand(shape: &ModelShape, template: &GroupTemplate, layer: usize) -> Result<Group, TemplateError> {
    let place = |module: &String| {
        let found = MODULES.iter().position(|m| short_name(m) == module);
        found.ok_or_else(|| TemplateError::UnknownModule { module: module.clone() })
    };
    let places = template.modules.iter().map(place).collect::<Result<Vec<_>, _>>()?;
    let linear = |place: usize| layer * MODULES.len() + place;
    let has_adapter = |place: usize| shape.linears[linear(place)].rank.is_some();
    let tensor = |place: usize, part: Part| TensorRef { linear: linear(place), part };
    let [gate, up, down] = MLP;

    let (members, followers) = match template.kind {
        Kind::Rank => {
            if let Some(i) = places.iter().position(|&p| !has_adapter(p)) {
                return Err(TemplateError::NoAdapter { module: template.modules[i].clone() });
            }
            let all = |part| places.iter().map(|&p| tensor(p, part)).collect::<Vec<_>>();
            (all(Part::LoraA), all(Part::LoraB))
        }
        Kind::Width => {
            let mut sorted = places.clone();
            sorted.sort_unstable();
            if sorted != [gate, up] {
                return Err(TemplateError::WidthModules { modules: template.modules.clone() });
            }
            let rows = |p| [Part::Weight, Part::LoraB].map(|part| tensor(p, part));
            let members = [gate, up].into_iter().flat_map(rows);
            let columns = [Part::Weight, Part::LoraA].map(|part| tensor(down, part));
            let exists = |t: &TensorRef| t.part == Part::Weight || shape.linears[t.linear].rank.is_some();
            (members.filter(exists).collect(), columns.into_iter().filter(exists).collect())
        }
        Kind::Heads => return Err(TemplateError::Heads),
    };
    Ok(Group { kind: template.kind, members, followers, choices: template.choices.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supernet::Cost;

    /// LLaMA-7B with LoNAS's adapters and search space (`unified_commonsense/nncf_lonas_llama_7b.json`).
    fn llama_7b() -> (ModelShape, SearchSpace) {
        let config = BaseConfig {
            hidden: 4096,
            intermediate: 11008,
            layers: 32,
            query_heads: 32,
            kv_heads: 32,
            head_size: 128,
            vocabulary: 32000,
            ..BaseConfig::default()
        };
        let targets = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"];
        let adapter = AdapterConfig {
            rank: 32,
            target_modules: targets.map(String::from).to_vec(),
            ..AdapterConfig::default()
        };
        let shape = model_shape(&config, Some(&adapter));
        let template = |kind, modules: &[&str], choices: &[usize]| GroupTemplate {
            kind,
            modules: modules.iter().map(|m| (*m).to_string()).collect(),
            choices: choices.to_vec(),
        };
        let templates = [
            template(Kind::Rank, &["q_proj", "k_proj", "v_proj"], &[32, 28]),
            template(Kind::Width, &["gate_proj", "up_proj"], &[11008, 9632, 8256, 6880, 5504]),
            template(Kind::Rank, &["gate_proj", "up_proj"], &[32, 28]),
        ];
        let space = search_space(&shape, &templates).unwrap();
        (shape, space)
    }

    #[test]
    fn llama_7b_costs_what_lonas_publishes() {
        let (shape, space) = llama_7b();
        let cost = |s| Cost::of(&shape, &space.resolve(&shape, &s));
        let rounded = |c: Cost| (c.parameters as f64 / 1e9, c.macs as f64 / 1e12);
        for (sub_network, billions, tera_macs) in [
            (space.maximal(), 6.6786, 1.7097),
            (space.heuristic(), 5.5881, 1.4305),
            (space.minimal(), 4.4919, 1.1499),
        ] {
            let (parameters, macs) = rounded(cost(sub_network));
            assert!(
                (parameters - billions).abs() < 5e-5,
                "{parameters} billion weights, expected {billions}"
            );
            assert!((macs - tera_macs).abs() < 5.1e-5, "{macs} TMACs, expected {tera_macs}");
        }
    }

    #[test]
    fn llama_7b_has_lonas_groups_in_lonas_order() {
        let (shape, space) = llama_7b();
        assert_eq!(space.groups().len(), 96);
        assert!((space.log10_size() - 41.6).abs() < 0.05);
        let group = &space.groups()[33];
        let names = |tensors: &[TensorRef]| tensors.iter().map(|&t| shape.tensor_name(t)).collect::<Vec<_>>();
        assert_eq!(
            names(&group.members),
            [
                "model.layers.1.mlp.gate_proj.weight",
                "model.layers.1.mlp.gate_proj.lora_B.weight",
                "model.layers.1.mlp.up_proj.weight",
                "model.layers.1.mlp.up_proj.lora_B.weight"
            ]
        );
        assert_eq!(
            names(&group.followers),
            ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.lora_A.weight"]
        );
    }

    #[test]
    fn a_template_that_fits_no_llama_is_refused_by_name() {
        let (shape, _) = llama_7b();
        let error = |kind, modules: &[&str], choices: &[usize]| {
            let modules = modules.iter().map(|m| (*m).to_string()).collect();
            search_space(&shape, &[GroupTemplate { kind, modules, choices: choices.to_vec() }])
                .unwrap_err()
                .to_string()
        };
        assert!(error(Kind::Rank, &["qkv"], &[32, 28]).contains("`qkv`"));
        assert!(error(Kind::Rank, &["o_proj"], &[32, 28]).contains("`o_proj` has no adapter"));
        assert!(error(Kind::Width, &["gate_proj"], &[11008]).contains("exactly gate_proj and up_proj"));
        assert!(error(Kind::Rank, &["q_proj"], &[28, 32]).contains("strictly descending"));
        assert!(error(Kind::Rank, &["q_proj"], &[64, 28]).contains("first choice is 64"));
    }
}
