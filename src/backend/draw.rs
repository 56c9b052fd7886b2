//! One token chosen from a row of logits: what a backend is told, and the readable way to do it.

use std::borrow::Cow;

/// How to choose a token from logits `(V)`: edit them, then draw from what temperature, top-k, top-p and min-p leave.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// At most one for each token; those of tokens that are not in the vocabulary do nothing.
    pub edits: Vec<Edit>,
    /// 0 takes the largest logit, of equal ones the first.
    pub temperature: f32,
    /// Keep the `k` largest, and what equals the last of them; 0 keeps all.
    pub top_k: usize,
    /// Of what top-k leaves, keep the largest that have this share of its probability, and what equals the last of them.
    pub top_p: f32,
    /// Keep what is at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// In `[0, 1)`: which of what is kept, by probability, in the order of token ids.
    pub uniform: f64,
}

/// A change of one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    pub token: u32,
    /// Divides a positive logit, multiplies a negative one; 1 changes nothing.
    pub penalty: f32,
    /// Added after that; minus infinity forbids the token.
    pub add: f32,
}

/// Logits from which nothing can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no token is possible: every logit is excluded or not a number")]
pub struct SamplingError;

impl Draw {
    /// The chosen token. Logits that are not finite are never chosen.
    ///
    /// # Errors
    /// There is no other.
    pub fn choose(&self, logits: &[f32]) -> Result<u32, SamplingError> {
        let mut logits = Cow::Borrowed(logits);
        if !self.edits.is_empty() {
            self.edit(logits.to_mut());
        }
        let best = likeliest(&logits)?;
        if self.temperature == 0.0 {
            return Ok(best);
        }
        let kept = self.kept(&logits, logits[best as usize]);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut left = self.uniform * total;
        for &(token, weight) in &kept {
            left -= weight;
            if left < 0.0 {
                return Ok(token);
            }
        }
        // Rounding can leave a crumb beyond the last token.
        Ok(kept.last().map_or(best, |&(token, _)| token))
    }

    /// Edits logits.
    pub(super) fn edit(&self, logits: &mut [f32]) {
        for edit in &self.edits {
            if let Some(logit) = logits.get_mut(edit.token as usize) {
                *logit = if *logit > 0.0 { *logit / edit.penalty } else { *logit * edit.penalty } + edit.add;
            }
        }
    }

    /// Tokens and weights (probabilities up to a common factor) that may be drawn, by token.
    fn kept(&self, logits: &[f32], largest: f32) -> Vec<(u32, f64)> {
        let weight =
            |logit: f32| ((f64::from(logit) - f64::from(largest)) / f64::from(self.temperature)).exp();
        let all = logits.iter().enumerate().map(|(id, &logit)| (id as u32, weight(logit)));
        // The likeliest has weight 1, so min-p is a bound on the weight itself. Weights that are not numbers fail too.
        let mut kept =
            all.filter(|&(_, w)| w > 0.0 && w <= 1.0 && w >= f64::from(self.min_p)).collect::<Vec<_>>();
        if self.top_k > 0 && self.top_k < kept.len() {
            let mut falling = kept.iter().map(|&(_, w)| w).collect::<Vec<_>>();
            let (_, last, _) = falling.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a));
            let last = *last;
            kept.retain(|&(_, w)| w >= last);
        }
        if self.top_p < 1.0 {
            let mut falling = kept.iter().map(|&(_, w)| w).collect::<Vec<_>>();
            falling.sort_unstable_by(|a, b| b.total_cmp(a));
            let enough = f64::from(self.top_p) * falling.iter().sum::<f64>();
            let mut before = 0.0;
            let last = falling.into_iter().find(|w| {
                before += w;
                before >= enough
            });
            kept.retain(|&(_, w)| last.is_none_or(|last| w >= last));
        }
        kept
    }
}

/// The largest logit's id, the smallest of equal ones.
fn likeliest(logits: &[f32]) -> Result<u32, SamplingError> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as u32).ok_or(SamplingError)
}
