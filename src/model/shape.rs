//! A model's Linears with their adapters, its tensors, and search spaces by templates, for every family.

use super::Layout;
use crate::artifact::{AdapterConfig, BaseConfig, BaseTensor, Family};
use crate::supernet::{
    Channels, Group, Kind, LinearShape, ModelShape, Part, SearchSpace, SpaceError, TensorRef,
};

/// Tokens of the sequence at which LoNAS tells the MACs of a classifier.
const CLASSIFIER_TOKENS: u64 = 128;

/// All Linears of a model with the adapters that `adapter` puts beside them.
pub fn model_shape(config: &BaseConfig, adapter: Option<&AdapterConfig>) -> ModelShape {
    let layout = Layout::of(config.family);
    let places = layout.modules.len();
    let mut linears = Vec::with_capacity(config.layers * places + 2);
    for layer in 0..config.layers {
        for place in 0..places {
            let adapted = adapter.filter(|a| a.target_modules.iter().any(|t| layout.is_target(place, t)));
            let (out, inp) = layout.size(config, place);
            let name = layout.module(layer, place);
            let rank = adapted.map(|a| a.rank_of(&name));
            linears.push(LinearShape { name, out, inp, rank });
        }
    }
    let after = layout.after(config).into_iter();
    linears.extend(after.map(|(name, out, inp)| LinearShape { name: name.into(), out, inp, rank: None }));
    let channels = (0..config.layers).flat_map(|layer| channels(layout, config, layer)).collect();
    match config.family {
        Family::Llama | Family::Bloom | Family::Mpt => ModelShape::language_model(linears, channels),
        Family::Bert => {
            let once_from = config.layers * places;
            ModelShape { linears, channels, cost_tokens: CLASSIFIER_TOKENS, once_from }
        }
    }
}

/// What may be cut of a layer: its MLP's channels, and its heads where the family has Linears of their own for them. The other
/// widths are the residual stream's.
fn channels(layout: &Layout, config: &BaseConfig, layer: usize) -> impl Iterator<Item = Channels> {
    let index = move |place: usize| layout.index(layer, place);
    let (writers, reader) = layout.mlp;
    let mlp = Channels::width(writers.iter().map(|&w| index(w)).collect(), vec![index(reader)]);
    let heads = layout.heads.map(|(writers, reader)| Channels {
        kind: Kind::Heads,
        writers: writers.map(index).to_vec(),
        readers: vec![index(reader)],
        unit: config.head_size * (config.query_heads / config.kv_heads.max(1)),
    });
    std::iter::once(mlp).chain(heads)
}

/// One group of a search space, repeated in every layer or in some.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupTemplate {
    pub kind: Kind,
    /// Short module names that share the choice, e.g. `["gate_proj", "up_proj"]`.
    pub modules: Vec<String>,
    /// Strictly descending; the first is the modules' own size.
    pub choices: Vec<usize>,
    /// Numbers of layers, rising from 0; without it, all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
}

/// A group template that no model of the family can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    #[error("search space: a {family} layer has no module `{module}`; it has {}", known.join(", "))]
    UnknownModule { family: &'static str, module: String, known: Vec<&'static str> },
    #[error("search space: a {kind} group must be exactly {} (what they compute meets), got {modules:?}", expected.join(" and "))]
    WrongModules { kind: &'static str, expected: Vec<&'static str>, modules: Vec<String> },
    #[error("search space: `{module}` has no adapter, so it has no rank to choose")]
    NoAdapter { module: String },
    #[error("search space: layers {layers:?} of a group: expected rising numbers below {count}")]
    Layers { layers: Vec<usize>, count: usize },
    #[error("search space: {family} has no elastic heads")]
    Heads { family: &'static str },
    #[error(transparent)]
    Space(#[from] SpaceError),
}

/// Expands templates to a search space: template by template, within each layer by layer, which is the order in
/// which LoNAS numbers its groups.
///
/// # Errors
/// A module that does not exist or cannot be elastic in this way, or choices that do not fit the sizes.
pub fn search_space(
    config: &BaseConfig,
    shape: &ModelShape,
    templates: &[GroupTemplate],
) -> Result<SearchSpace, TemplateError> {
    let layout = Layout::of(config.family);
    let mut groups = Vec::with_capacity(templates.len() * config.layers);
    for template in templates {
        for layer in layers_of(config, template)? {
            groups.push(expand(layout, shape, template, layer)?);
        }
    }
    Ok(SearchSpace::new(shape, groups)?)
}

fn layers_of(config: &BaseConfig, template: &GroupTemplate) -> Result<Vec<usize>, TemplateError> {
    let count = config.layers;
    let Some(layers) = &template.layers else { return Ok((0..count).collect()) };
    let rising = layers.windows(2).all(|pair| pair[0] < pair[1]);
    match rising && layers.last().is_some_and(|&last| last < count) {
        true => Ok(layers.clone()),
        false => Err(TemplateError::Layers { layers: layers.clone(), count }),
    }
}

fn expand(
    layout: &'static Layout,
    shape: &ModelShape,
    template: &GroupTemplate,
    layer: usize,
) -> Result<Group, TemplateError> {
    let place = |module: &String| {
        let found = (0..layout.modules.len())
            .find(|&p| layout.short_name(p) == module || layout.modules[p] == module);
        let (family, known) = (layout.name, layout.short_names());
        found.ok_or_else(|| TemplateError::UnknownModule { family, module: module.clone(), known })
    };
    let places = template.modules.iter().map(place).collect::<Result<Vec<_>, _>>()?;
    let has_adapter = |place: usize| shape.linears[layout.index(layer, place)].rank.is_some();
    let tensor = |place: usize, part: Part| TensorRef { linear: layout.index(layer, place), part };
    let exists = |t: &TensorRef| t.part == Part::Weight || shape.linears[t.linear].rank.is_some();

    let (writers, reader) = match template.kind {
        Kind::Rank => {
            if let Some(i) = places.iter().position(|&p| !has_adapter(p)) {
                return Err(TemplateError::NoAdapter { module: template.modules[i].clone() });
            }
            let all = |part| places.iter().map(|&p| tensor(p, part)).collect::<Vec<_>>();
            let (kind, choices) = (template.kind, template.choices.clone());
            return Ok(Group { kind, members: all(Part::LoraA), followers: all(Part::LoraB), choices });
        }
        Kind::Width => (layout.mlp.0.to_vec(), layout.mlp.1),
        Kind::Heads => {
            let (writers, reader) = layout.heads.ok_or(TemplateError::Heads { family: layout.name })?;
            (writers.to_vec(), reader)
        }
    };
    let mut sorted = places;
    sorted.sort_unstable();
    if sorted != writers {
        return Err(TemplateError::WrongModules {
            kind: if template.kind == Kind::Heads { "heads" } else { "width" },
            expected: writers.iter().map(|&w| layout.short_name(w)).collect(),
            modules: template.modules.clone(),
        });
    }
    let rows = |&p: &usize| [Part::Weight, Part::LoraB].map(|part| tensor(p, part));
    let columns = [Part::Weight, Part::LoraA].map(|part| tensor(reader, part));
    Ok(Group {
        kind: template.kind,
        members: writers.iter().flat_map(rows).filter(exists).collect(),
        followers: columns.into_iter().filter(exists).collect(),
        choices: template.choices.clone(),
    })
}

/// Every tensor of a base, as the family's loader will ask for them, in the order in which the model uses them.
pub fn base_tensors(config: &BaseConfig) -> Vec<BaseTensor> {
    match config.family {
        Family::Llama => super::llama::base_tensors(config),
        Family::Bloom => super::bloom::base_tensors(config),
        Family::Mpt => super::mpt::base_tensors(config),
        Family::Bert => super::bert::base_tensors(config),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{Activation, ClassifierConfig};
    use crate::supernet::Cost;

    /// LLaMA-7B with LoNAS's adapters and search space (`unified_commonsense/nncf_lonas_llama_7b.json`).
    fn llama_7b() -> (BaseConfig, ModelShape, SearchSpace) {
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
            layers: None,
        };
        let templates = [
            template(Kind::Rank, &["q_proj", "k_proj", "v_proj"], &[32, 28]),
            template(Kind::Width, &["gate_proj", "up_proj"], &[11008, 9632, 8256, 6880, 5504]),
            template(Kind::Rank, &["gate_proj", "up_proj"], &[32, 28]),
        ];
        let space = search_space(&config, &shape, &templates).unwrap();
        (config, shape, space)
    }

    #[test]
    fn llama_7b_costs_what_lonas_publishes() {
        let (_, shape, space) = llama_7b();
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
        let (_, shape, space) = llama_7b();
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
        let (config, shape, _) = llama_7b();
        let error = |kind, modules: &[&str], choices: &[usize]| {
            let modules = modules.iter().map(|m| (*m).to_string()).collect();
            let template = GroupTemplate { kind, modules, choices: choices.to_vec(), layers: None };
            search_space(&config, &shape, &[template]).unwrap_err().to_string()
        };
        assert!(error(Kind::Rank, &["qkv"], &[32, 28]).contains("`qkv`"));
        assert!(error(Kind::Rank, &["o_proj"], &[32, 28]).contains("`o_proj` has no adapter"));
        assert!(error(Kind::Width, &["gate_proj"], &[11008]).contains("exactly gate_proj and up_proj"));
        assert!(error(Kind::Rank, &["q_proj"], &[28, 32]).contains("strictly descending"));
        assert!(error(Kind::Rank, &["q_proj"], &[64, 28]).contains("first choice is 64"));
    }

    #[test]
    fn a_group_may_be_of_some_layers_only() {
        let (config, shape, _) = llama_7b();
        let space = |layers: &[usize]| {
            let modules = ["gate_proj", "up_proj"].map(String::from).to_vec();
            let (kind, choices, layers) = (Kind::Width, vec![11008, 0], Some(layers.to_vec()));
            search_space(&config, &shape, &[GroupTemplate { kind, modules, choices, layers }])
        };
        let some = space(&[3, 17]).unwrap();
        let minimal = some.resolve(&shape, &some.minimal());
        let without = |layer: usize| minimal.linears[layer * 7 + 4].is_nothing();
        assert_eq!((0..32).filter(|&layer| without(layer)).collect::<Vec<_>>(), [3, 17]);
        for wrong in [&[][..], &[32], &[4, 4], &[5, 4]] {
            let said = space(wrong).unwrap_err().to_string();
            assert!(said.contains(&format!("{wrong:?}")) && said.contains("below 32"), "{said}");
        }
    }

    /// BERT-base with LoNAS's adapters and search space for GLUE, whose choices differ by layer (`nncf_lonas_bert_base_*.json`).
    fn bert_base() -> (ModelShape, SearchSpace) {
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
        const WIDTHS: [[usize; 3]; 12] = [
            [3072, 2634, 216],
            [3072, 2634, 181],
            [3072, 2627, 208],
            [3072, 2676, 226],
            [3072, 2628, 179],
            [3072, 2662, 175],
            [3072, 2706, 182],
            [3072, 2687, 169],
            [3072, 2616, 165],
            [3072, 2400, 160],
            [3072, 2198, 163],
            [3072, 1940, 150],
        ];
        let config = BaseConfig {
            family: Family::Bert,
            hidden: 768,
            intermediate: 3072,
            layers: 12,
            query_heads: 12,
            kv_heads: 12,
            head_size: 64,
            vocabulary: 30522,
            classifier: Some(ClassifierConfig {
                labels: ["not_entailment", "entailment"].map(String::from).to_vec(),
                stated: true,
                regression: false,
                multi_label: false,
                token_types: 2,
                activation: Activation::Gelu,
            }),
            ..BaseConfig::default()
        };
        let target_modules = ["query", "value"].map(String::from).to_vec();
        let adapter = AdapterConfig { rank: 8, target_modules, ..AdapterConfig::default() };
        let shape = model_shape(&config, Some(&adapter));
        let group = |kind, modules: &[&str], choices: &[usize], layer| {
            let modules = modules.iter().map(|m| (*m).to_string()).collect();
            let template = GroupTemplate { kind, modules, choices: choices.to_vec(), layers: None };
            expand(Layout::of(Family::Bert), &shape, &template, layer).unwrap()
        };
        let heads = |layer| group(Kind::Heads, &["query", "key", "value"], HEADS[layer], layer);
        let ranks = |layer| group(Kind::Rank, &["query", "value"], &[8, 4, 2], layer);
        let widths = |layer: usize| group(Kind::Width, &["intermediate.dense"], &WIDTHS[layer], layer);
        let groups = (0..12).map(heads).chain((0..12).map(ranks)).chain((0..12).map(widths)).collect();
        let space = SearchSpace::new(&shape, groups).unwrap();
        (shape, space)
    }

    #[test]
    fn bert_base_costs_what_lonas_publishes() {
        let (shape, space) = bert_base();
        assert_eq!(space.groups().len(), 36);
        assert!((space.log10_size() - 15.2).abs() < 0.05);
        // Pooler and classifier: once for a text, not for each of its 128 tokens.
        let head = 768 * 768 + 768 * 2;
        for (sub_network, giga_macs) in
            [(space.maximal(), 10.91), (space.heuristic(), 9.60), (space.minimal(), 2.47)]
        {
            let cost = Cost::of(&shape, &space.resolve(&shape, &sub_network));
            let encoder = (cost.macs - head) as f64 / 1e9;
            assert!((encoder - giga_macs).abs() < 5e-3, "{encoder} GMACs, expected {giga_macs}");
            assert_eq!(cost.macs, 128 * (cost.parameters - head) + head);
        }
    }

    #[test]
    fn bert_base_has_lonas_groups_in_lonas_order() {
        let (shape, space) = bert_base();
        let names = |tensors: &[TensorRef]| tensors.iter().map(|&t| shape.tensor_name(t)).collect::<Vec<_>>();
        let of_layer =
            |names: &[&str]| names.iter().map(|n| format!("bert.encoder.layer.1.{n}")).collect::<Vec<_>>();
        let heads = &space.groups()[1];
        let cut =
            ["query.weight", "query.lora_B.weight", "key.weight", "value.weight", "value.lora_B.weight"];
        let cut = cut.map(|n| format!("attention.self.{n}"));
        assert_eq!(names(&heads.members), of_layer(&cut.each_ref().map(String::as_str)));
        assert_eq!(names(&heads.followers), of_layer(&["attention.output.dense.weight"]));
        let ranks = names(&space.groups()[13].members);
        assert_eq!(
            ranks,
            of_layer(&["attention.self.query.lora_A.weight", "attention.self.value.lora_A.weight"])
        );
        let width = &space.groups()[25];
        assert_eq!(names(&width.members), of_layer(&["intermediate.dense.weight"]));
        assert_eq!(names(&width.followers), of_layer(&["output.dense.weight"]));
        // Six of twelve heads are left.
        let active = space.resolve(&shape, &space.pick(|_, choices| choices - 1));
        assert_eq!((active.linears[0].out, active.linears[3].inp, active.linears[3].out), (384, 384, 768));
    }
}
