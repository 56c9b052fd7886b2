//! The Linear layers of a model and the sizes that a sub-network leaves of them.

use super::Kind;
use std::fmt;

/// One Linear of the base model, with the adapter beside it if it has one.
///
/// Weight `(out, inp)`, adapter `A (rank, inp)` and `B (out, rank)`, as Hugging Face and PEFT store them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearShape {
    /// Module path in the base, e.g. `model.layers.0.mlp.gate_proj`.
    pub name: String,
    pub out: usize,
    pub inp: usize,
    /// The adapter's full rank; `None` where the Linear has no adapter.
    pub rank: Option<usize>,
}

/// Linears whose outputs meet channel by channel, or head by head, and those that read them: to cut one is to cut all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channels {
    /// Of the groups that may cut them: [`Kind::Width`] or [`Kind::Heads`].
    pub kind: Kind,
    /// A choice counts rows of the first; the others keep the same share of theirs (keys and values of grouped queries).
    pub writers: Vec<usize>,
    pub readers: Vec<usize>,
    /// Rows of the first writer that stay together: 1, or those of all heads that share a key-value head.
    pub unit: usize,
}

impl Channels {
    /// Of an MLP.
    pub fn width(writers: Vec<usize>, readers: Vec<usize>) -> Self {
        Self { kind: Kind::Width, writers, readers, unit: 1 }
    }
}

/// All Linears of a model in execution order, the vocabulary product included, embeddings and norms left out.
///
/// The index into `linears` is the Linear's identity everywhere: in groups, in [`ActiveShape`], in the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    pub linears: Vec<LinearShape>,
    /// What a width or heads group may cut; every other axis keeps its size.
    pub channels: Vec<Channels>,
    /// Tokens of the sequence whose MACs are told: [`COST_TOKENS`](super::COST_TOKENS) of a language model.
    pub cost_tokens: u64,
    /// Linears from this one on are computed once for a sequence, not for each token: a classifier's.
    pub once_from: usize,
}

/// Which of a Linear's tensors is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    Weight,
    LoraA,
    LoraB,
}

impl Part {
    /// The tensor name's end after the module path.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Weight => ".weight",
            Self::LoraA => ".lora_A.weight",
            Self::LoraB => ".lora_B.weight",
        }
    }
}

/// One tensor of one Linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorRef {
    pub linear: usize,
    pub part: Part,
}

impl ModelShape {
    /// Of a language model: every Linear is computed for each token.
    pub fn language_model(linears: Vec<LinearShape>, channels: Vec<Channels>) -> Self {
        let once_from = linears.len();
        Self { linears, channels, cost_tokens: super::COST_TOKENS, once_from }
    }

    /// The index of the Linear with this module path.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.linears.iter().position(|l| l.name == name)
    }

    /// `model.layers.0.mlp.gate_proj.lora_B.weight` to a reference; `None` if the model has no such tensor.
    pub fn parse_tensor(&self, tensor: &str) -> Option<TensorRef> {
        // The longer suffixes end in the shorter one, so they are tried first.
        let (part, module) = [Part::LoraA, Part::LoraB, Part::Weight]
            .into_iter()
            .find_map(|part| tensor.strip_suffix(part.suffix()).map(|module| (part, module)))?;
        let linear = self.find(module)?;
        let has_adapter = self.linears[linear].rank.is_some();
        (part == Part::Weight || has_adapter).then_some(TensorRef { linear, part })
    }

    /// The tensor's name, e.g. `model.layers.0.mlp.gate_proj.lora_B.weight`.
    pub fn tensor_name(&self, tensor: TensorRef) -> String {
        format!("{}{}", self.linears[tensor.linear].name, tensor.part.suffix())
    }

    /// Full size `(rows, columns)` of a tensor.
    pub fn tensor_size(&self, tensor: TensorRef) -> (usize, usize) {
        let l = &self.linears[tensor.linear];
        let rank = l.rank.unwrap_or(0);
        match tensor.part {
            Part::Weight => (l.out, l.inp),
            Part::LoraA => (rank, l.inp),
            Part::LoraB => (l.out, rank),
        }
    }

    /// Whether a sub-network has every adapter at full rank: what it computes is then a prefix of `W + s B A`, so that the
    /// adapter can be merged into the base for it.
    pub fn keeps_ranks(&self, active: &ActiveShape) -> bool {
        let keeps = |(l, active): (&LinearShape, &ActiveLinear)| {
            active.is_nothing() || active.rank == l.rank.unwrap_or(0)
        };
        self.linears.iter().zip(&active.linears).all(keeps)
    }

    /// The sizes with nothing cut.
    pub fn full(&self) -> ActiveShape {
        let linears = self.linears.iter();
        ActiveShape {
            linears: linears
                .map(|l| ActiveLinear { out: l.out, inp: l.inp, rank: l.rank.unwrap_or(0) })
                .collect(),
        }
    }
}

/// What a sub-network keeps of one Linear: `W[:out, :inp]`, `A[:rank, :inp]`, `B[:out, :rank]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActiveLinear {
    pub out: usize,
    pub inp: usize,
    /// 0 where the Linear has no adapter, or nothing of it is kept.
    pub rank: usize,
}

impl ActiveLinear {
    /// Whether no weight of it is kept: its layer goes without it.
    pub fn is_nothing(&self) -> bool {
        self.out == 0 || self.inp == 0
    }
}

/// A sub-network resolved against its model: the sizes of every Linear, by its index in [`ModelShape`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveShape {
    pub linears: Vec<ActiveLinear>,
}

impl fmt::Display for ActiveLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{} rank {}", self.out, self.inp, self.rank)
    }
}
