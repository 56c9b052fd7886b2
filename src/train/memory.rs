//! What a training needs of its device's memory, before it begins.
//!
//! Counted from what the forward and the way back of `backend/reference` keep: every tensor that a graph holds on to is
//! in `layer_floats`. What a library keeps for itself is not, nor is the time while a base is being read. Measured on
//! SmolLM2-135M, two threads on a processor: 1.94 GiB said and 1.85 used at most, 1.01 and 1.10 with layers computed again.

use crate::artifact::BaseConfig;
use crate::supernet::ModelShape;
use std::fmt;

/// What the need depends on beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Bytes of one frozen weight: 4, or 2 where they are bf16.
    pub weight_bytes: usize,
    /// Tokens of the largest micro-batch.
    pub tokens: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Graphs that exist side by side: one a thread on a processor, one on a GPU.
    pub graphs: usize,
    /// Rows whose logits exist at the same time in each.
    pub logits_rows: usize,
    /// Whether activations are computed again rather than remembered.
    pub recompute: bool,
    /// Whether students learn from the maximal network's distributions.
    pub distill: bool,
    /// Whether AdamW's numbers lie in the same memory. They are always the host's.
    pub with_optimizer: bool,
}

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Frozen weights.
    pub base: u64,
    /// The adapters as variables, and a gradient of each in every graph.
    pub adapters: u64,
    /// The adapters once more, their summed gradient and AdamW's two moments.
    pub optimizer: u64,
    /// What the forward leaves for the way back: whole graphs, or each layer's input.
    pub remembered: u64,
    /// One layer's graph while it is computed again.
    pub recomputed: u64,
    /// Gradients on the way back through one layer.
    pub way_back: u64,
    /// Logits and their gradients.
    pub logits: u64,
}

/// Tensors of the logits' size at once: they, their gradient, and the zeros and the sum that candle adds it to.
const LOGITS_COPIES: usize = 4;
/// As many more where a student learns from a teacher: its logits and its shares.
const TEACHER_COPIES: usize = 2;
/// Tensors of the MLP's width at once on the way back: the gradients of gate, up and their product, each with zeros and
/// a sum. Composed of candle's operations, about as many again.
const WAY_BACK_WIDTHS: usize = 8;

impl MemoryNeed {
    /// Of a LLaMA whose Linears, with their adapters' ranks, are `shape`.
    pub fn of(config: &BaseConfig, shape: &ModelShape, plan: &MemoryPlan) -> Self {
        let MemoryPlan { tokens, graphs, .. } = *plan;
        let linears = shape.linears.iter();
        // The Linears include the vocabulary product, which a tied embedding is as well.
        let embedding = if config.tied_embeddings { 0 } else { config.vocabulary * config.hidden };
        let frozen = linears.clone().map(|l| l.out * l.inp).sum::<usize>() + embedding;
        let adapters = linears.map(|l| l.rank.unwrap_or(0) * (l.out + l.inp)).sum::<usize>();
        let layer = tokens * 4 * layer_floats(config, plan.longest);
        let input = tokens * config.hidden * 4;
        let (remembered, recomputed) =
            if plan.recompute { (config.layers * input, layer) } else { (config.layers * layer, 0) };
        let widths = WAY_BACK_WIDTHS * config.intermediate.max(config.hidden);
        // Scores of one sequence at a time: gradients of them and of their shares, each with the zeros that candle adds it to.
        let scores = 4 * config.query_heads * plan.longest;
        // The teacher's last layer is remembered until its student is through.
        let (remembered, copies) = match plan.distill {
            true => (remembered + input, LOGITS_COPIES + TEACHER_COPIES),
            false => (remembered, LOGITS_COPIES),
        };
        let logits = copies * graphs * plan.logits_rows.min(tokens) * config.vocabulary;
        let bytes = |count: usize, size: usize| count as u64 * size as u64;
        Self {
            base: bytes(frozen, plan.weight_bytes),
            adapters: bytes(adapters, 4 * (1 + graphs)),
            optimizer: bytes(adapters, if plan.with_optimizer { 4 * 4 } else { 0 }),
            remembered: remembered as u64,
            recomputed: recomputed as u64,
            way_back: bytes(tokens, 4 * widths.max(scores)),
            logits: bytes(logits, 4),
        }
    }

    pub fn total(&self) -> u64 {
        let Self { base, adapters, optimizer, remembered, recomputed, way_back, logits } = self;
        base + adapters + optimizer + remembered + recomputed + way_back + logits
    }
}

/// Floats that the graph of one layer holds for each token, in a sequence of `positions`.
fn layer_floats(config: &BaseConfig, positions: usize) -> usize {
    let heads = config.query_heads;
    let (q, kv) = (heads * config.head_size, config.kv_heads * config.head_size);
    // Input, its norm, o, the first sum, its norm, down; the second sum is the next layer's input.
    let residual = 6 * config.hidden;
    // q, k and v, and the first two turned.
    let projected = q + 2 * kv + q + kv;
    // By head: q, k and v, what is attended, and that by token; of several sequences, put together.
    let by_head = 6 * q;
    // Scores and their shares.
    let scores = 2 * heads * positions;
    // gate, up, and their product.
    residual + projected + by_head + scores + 3 * config.intermediate
}

impl fmt::Display for MemoryNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
        write!(f, "{:.2} GiB (base {:.2}", gib(self.total()), gib(self.base))?;
        for (what, bytes) in [
            ("adapters and gradients", self.adapters),
            ("AdamW", self.optimizer),
            ("remembered", self.remembered),
            ("one layer again", self.recomputed),
            ("its way back", self.way_back),
            ("logits", self.logits),
        ] {
            if bytes > 0 {
                write!(f, ", {what} {:.2}", gib(bytes))?;
            }
        }
        write!(f, ")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{AdapterConfig, Family};
    use crate::model::model_shape;

    fn llama_7b() -> (BaseConfig, ModelShape) {
        let config = BaseConfig {
            family: Family::Llama,
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
            alpha: 64.0,
            dropout: 0.1,
            target_modules: targets.map(String::from).to_vec(),
            ..AdapterConfig::default()
        };
        let shape = model_shape(&config, Some(&adapter));
        (config, shape)
    }

    #[test]
    fn llama_7b_with_four_sequences_of_256_tokens_fits_in_80_gb() {
        let (config, shape) = llama_7b();
        let plan = MemoryPlan {
            weight_bytes: 2,
            tokens: 4 * 256,
            longest: 256,
            graphs: 1,
            logits_rows: 128,
            recompute: true,
            distill: false,
            with_optimizer: false,
        };
        let need = MemoryNeed::of(&config, &shape, &plan);
        // By hand: 32 x (4 x 4096^2 + 3 x 4096 x 11008) + 2 x 32000 x 4096 weights of two bytes.
        assert_eq!(need.base, 2 * 6_738_149_376);
        // A layer's six adapters: 3 x 32 x (4096 + 4096) + 3 x 32 x (4096 + 11008); twice four bytes.
        assert_eq!(need.adapters, 32 * (786_432 + 1_449_984) * 8);
        assert_eq!(need.remembered, 32 * 1024 * 4096 * 4);
        assert_eq!(need.logits, 4 * 128 * 32000 * 4);
        // Each token: 6 x 4096, 5 x 4096, 6 x 4096, 2 x 32 x 256 and 3 x 11008 floats.
        assert_eq!(need.recomputed, 1024 * 4 * (17 * 4096 + 16_384 + 33_024));
        let whole = MemoryNeed::of(&config, &shape, &MemoryPlan { recompute: false, ..plan });
        assert_eq!((whole.remembered, whole.recomputed), (32 * need.recomputed, 0));
        let taught = MemoryNeed::of(&config, &shape, &MemoryPlan { distill: true, ..plan });
        assert_eq!(taught.total() - need.total(), 1024 * 4096 * 4 + 2 * 128 * 32000 * 4);
        let gib = |need: &MemoryNeed| need.total() as f64 / f64::from(1 << 30);
        assert!((14.4..14.5).contains(&gib(&need)), "{need}");
        assert!((27.9..28.1).contains(&gib(&whole)), "{whole}");
    }

    #[test]
    fn a_need_is_said_in_parts_and_grows_with_what_it_depends_on() {
        let (config, shape) = llama_7b();
        let plan = MemoryPlan {
            weight_bytes: 4,
            tokens: 100,
            longest: 50,
            graphs: 2,
            logits_rows: 128,
            recompute: false,
            distill: false,
            with_optimizer: true,
        };
        let need = |plan: MemoryPlan| MemoryNeed::of(&config, &shape, &plan);
        let total = need(plan).total();
        for more in [
            MemoryPlan { tokens: 200, ..plan },
            MemoryPlan { longest: 100, ..plan },
            MemoryPlan { graphs: 3, ..plan },
        ] {
            assert!(need(more).total() > total, "{more:?}");
        }
        assert!(need(MemoryPlan { weight_bytes: 2, ..plan }).total() < total);
        let text = need(plan).to_string();
        assert!(
            text.contains("base 25.10") && text.contains("AdamW 1.07") && !text.contains("again"),
            "{text}"
        );
    }
}
