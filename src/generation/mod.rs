//! From logits to the next token: penalties, temperature, truncation, a seeded draw; and log probabilities.
//!
//! The order of operations is vLLM's: repetition, frequency and presence penalties and the logit bias change the
//! logits; temperature divides them; top-k, top-p and min-p then drop the unlikely; what is left is drawn from. Here it is
//! decided how; a backend does it ([`Draw`](crate::backend::Draw)), where the logits are.

mod logprobs;
mod sampler;

pub use logprobs::token_logprob;
pub use sampler::Sampler;

/// How to choose the next token. The server has checked every range.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep the smallest set of tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep the `k` likeliest; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from the logit of each token generated so far, as often as it was.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of each token generated so far.
    pub presence_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed, prompt and sub-network give the same tokens.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token each time.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
}

impl Default for Sampling {
    /// OpenAI's defaults: the model's own distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}
