//! Which Linears a layer of each family has, in which order, and which of them an elastic choice ties together.

use crate::artifact::{BaseConfig, Family};

/// The Linears of one layer of a family. A Linear's place in `modules` is its place in the layer.
#[derive(Debug)]
pub struct Layout {
    /// As people say it, for messages.
    pub name: &'static str,
    /// What stands before the layer's number in a module path, the last dot included.
    prefix: &'static str,
    /// In execution order, by module path within the layer.
    pub modules: &'static [&'static str],
    /// Places whose outputs meet channel by channel, and the place that reads them.
    pub mlp: (&'static [usize], usize),
    /// Places that read the same rows, where there are several.
    pub together: &'static [&'static [usize]],
    /// Places of queries, keys and values, and of who reads the heads; `None` where heads cannot be cut.
    pub heads: Option<([usize; 3], usize)>,
    /// Linears after the layers.
    after: &'static [&'static str],
}

static LLAMA: Layout = Layout {
    name: "LLaMA",
    prefix: "model.layers.",
    modules: &[
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ],
    mlp: (&[4, 5], 6),
    together: &[&[0, 1, 2], &[4, 5]],
    heads: Some(([0, 1, 2], 3)),
    after: &["lm_head"],
};

/// Queries, keys and values are rows of one Linear, head by head, so heads have no prefix of their own.
static BLOOM: Layout = Layout {
    name: "BLOOM",
    prefix: "transformer.h.",
    modules: &[
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
    mlp: (&[2], 3),
    together: &[],
    heads: None,
    after: &["lm_head"],
};

/// Queries, keys and values as Shears splits them, so that each has an adapter of its own.
static MPT: Layout = Layout {
    name: "MPT",
    prefix: "transformer.blocks.",
    modules: &["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"],
    mlp: (&[4], 5),
    together: &[&[0, 1, 2]],
    heads: None,
    after: &["lm_head"],
};

static BERT: Layout = Layout {
    name: "BERT",
    prefix: "bert.encoder.layer.",
    modules: &[
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    mlp: (&[4], 5),
    together: &[&[0, 1, 2]],
    heads: Some(([0, 1, 2], 3)),
    after: &["bert.pooler.dense", "classifier"],
};

impl Layout {
    pub fn of(family: Family) -> &'static Self {
        match family {
            Family::Llama => &LLAMA,
            Family::Bloom => &BLOOM,
            Family::Mpt => &MPT,
            Family::Bert => &BERT,
        }
    }

    /// The module path of a Linear of a layer.
    pub fn module(&self, layer: usize, place: usize) -> String {
        format!("{}{layer}.{}", self.prefix, self.modules[place])
    }

    /// What stands before a tensor's name within a layer, e.g. `model.layers.3.`.
    pub fn layer(&self, layer: usize) -> String {
        format!("{}{layer}.", self.prefix)
    }

    /// The Linear's index in the model's shape.
    pub fn index(&self, layer: usize, place: usize) -> usize {
        layer * self.modules.len() + place
    }

    /// Where the Linear with this index stands: its layer and its place there; of those after the layers, a layer that does not
    /// exist.
    pub fn place(&self, index: usize) -> (usize, usize) {
        (index / self.modules.len(), index % self.modules.len())
    }

    /// `(out, inp)` of a Linear by its place in the layer.
    pub fn size(&self, config: &BaseConfig, place: usize) -> (usize, usize) {
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        let (queries, keys) = (config.query_heads * config.head_size, config.kv_heads * config.head_size);
        let (writers, reader) = self.mlp;
        if writers.contains(&place) {
            return (intermediate, hidden);
        }
        if place == reader {
            return (hidden, intermediate);
        }
        match (config.family, place) {
            (Family::Llama | Family::Mpt | Family::Bert, 0) => (queries, hidden),
            (Family::Llama | Family::Mpt | Family::Bert, 1 | 2) => (keys, hidden),
            (Family::Bloom, 0) => (queries + 2 * keys, hidden),
            _ => (hidden, queries),
        }
    }

    /// Name and `(out, inp)` of the Linears after the layers.
    pub fn after(&self, config: &BaseConfig) -> Vec<(&'static str, usize, usize)> {
        let out = |name: &str| match name {
            "lm_head" => config.vocabulary,
            "classifier" => config.classifier.as_ref().map_or(0, |c| c.labels.len()),
            _ => config.hidden,
        };
        self.after.iter().map(|&name| (name, out(name), config.hidden)).collect()
    }

    /// Whether the Linear at this place adds a bias.
    pub fn has_bias(&self, config: &BaseConfig, place: usize) -> bool {
        let (writers, reader) = self.mlp;
        if place == reader || writers.contains(&place) {
            return config.mlp_bias;
        }
        let reads_heads = place + 1 == writers[0];
        if reads_heads { config.output_bias } else { config.attention_bias }
    }

    /// Which axis of the Linear at this place carries the layer's MLP channels.
    pub fn channels(&self, place: usize) -> ChannelAxis {
        let (writers, reader) = self.mlp;
        match place {
            place if writers.contains(&place) => ChannelAxis::Rows,
            place if place == reader => ChannelAxis::Columns,
            _ => ChannelAxis::None,
        }
    }

    /// The short names of the modules, by which PEFT and search-space files call them; the path itself where short names
    /// would not tell two apart.
    pub fn short_names(&self) -> Vec<&'static str> {
        (0..self.modules.len()).map(|place| self.short_name(place)).collect()
    }

    /// The last name of a module path, as far as it says which module it is.
    pub fn short_name(&self, place: usize) -> &'static str {
        let path = self.modules[place];
        let short = path.rsplit('.').next().unwrap_or(path);
        let same = self.modules.iter().filter(|m| m.rsplit('.').next() == Some(short)).count();
        if same == 1 { short } else { path }
    }

    /// Whether `target`, one of PEFT's `target_modules`, means the module at this place: PEFT compares the end of the path.
    pub fn is_target(&self, place: usize, target: &str) -> bool {
        let path = self.modules[place];
        path == target || path.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
    }
}

/// Which axis of a Linear carries a layer's MLP channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelAxis {
    None,
    Rows,
    Columns,
}
