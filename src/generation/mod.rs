//! From logits to the next token: penalties, temperature, truncation, a seeded draw.

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
    /// Subtracted once from the logit of each token generated so far, for each time it was.
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
