//! What came of one item under one sub-network, and what many of them come to.

use super::accuracy::{Accuracy, Tally};
use super::agreement::{correlation_interval, f1, matthews, pearson, spearman};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One item's result, with everything that a summary needs: what was computed once can be counted again in other ways.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Of each option the natural-log probability of its tokens and their number.
    Likelihood { logprobs: Vec<f64>, tokens: Vec<usize>, correct: usize },
    /// What was generated, and which option that was found to name.
    Generation { text: String, chosen: Option<usize>, correct: usize },
    /// Negative log probability of all tokens but the first, and of the response's among them; nats.
    Loss { nll: f64, tokens: usize, response_nll: f64, response_tokens: usize },
    /// What a classifier gave each label, before any softmax, and which is right.
    Class { logits: Vec<f32>, correct: usize },
    /// The number that a classifier of one output gave, and the right one.
    Number { said: f32, right: f64 },
}

/// What one sub-network reached on one task.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// What `value` is: `accuracy`, a share; `loss`, nats per token; or `pearson`, a correlation.
    pub metric: &'static str,
    pub value: f64,
    /// The value's 95 % interval.
    pub interval: (f64, f64),
    /// Items.
    pub count: usize,
    /// What else is known, by name.
    pub details: BTreeMap<&'static str, f64>,
}

/// The standard normal's 97.5 % point.
pub(super) const Z: f64 = 1.959_963_984_540_054;

impl Outcome {
    /// Whether every number in it is one, and there is an option of the number that is said to be correct.
    pub fn is_sound(&self) -> bool {
        match self {
            Self::Likelihood { logprobs, tokens, correct } => {
                logprobs.iter().all(|p| p.is_finite())
                    && logprobs.len() == tokens.len()
                    && *correct < tokens.len()
            }
            Self::Generation { .. } => true,
            Self::Loss { nll, response_nll, .. } => nll.is_finite() && response_nll.is_finite(),
            Self::Class { logits, correct } => {
                logits.iter().all(|l| l.is_finite()) && *correct < logits.len()
            }
            Self::Number { said, right } => said.is_finite() && right.is_finite(),
        }
    }
}

impl Summary {
    /// Of outcomes of one kind; `None` where there are none. Those of other kinds than the first are left out.
    pub fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome> + Clone) -> Option<Self> {
        match outcomes.clone().next()? {
            Outcome::Likelihood { .. } => Some(likelihood(outcomes)),
            Outcome::Generation { .. } => Some(generation(outcomes)),
            Outcome::Loss { .. } => Some(loss(outcomes)),
            Outcome::Class { .. } => Some(classes(outcomes)),
            Outcome::Number { .. } => Some(numbers(outcomes)),
        }
    }
}

fn likelihood<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Summary {
    let mut tally = Tally::default();
    for outcome in outcomes.filter(|o| o.is_sound()) {
        if let Outcome::Likelihood { logprobs, tokens, correct } = outcome {
            tally.add(logprobs, tokens, *correct);
        }
    }
    let score = tally.score();
    let normalised = score.accuracy_normalised.share();
    accuracy(score.accuracy, [("normalised_accuracy", normalised), ("answer_loss", score.answer_loss)])
}

fn generation<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Summary {
    let (mut right, mut count, mut unanswered) = (0, 0, 0_u32);
    for outcome in outcomes {
        if let Outcome::Generation { chosen, correct, .. } = outcome {
            count += 1;
            right += usize::from(*chosen == Some(*correct));
            unanswered += u32::from(chosen.is_none());
        }
    }
    accuracy(Accuracy { right, count }, [("unanswered", f64::from(unanswered))])
}

/// Accuracy, with Matthews' correlation (GLUE's score of CoLA) and the F1 of label 1 (of MRPC and QQP, beside accuracy).
fn classes<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Summary {
    let pairs = outcomes.filter(|o| o.is_sound()).filter_map(|outcome| match outcome {
        Outcome::Class { logits, correct } => {
            let logits = logits.iter().copied().map(f64::from);
            Some((super::accuracy::largest(logits).unwrap_or(0), *correct))
        }
        _ => None,
    });
    let pairs = pairs.collect::<Vec<_>>();
    let right = pairs.iter().filter(|(chosen, correct)| chosen == correct).count();
    let details = [("matthews", matthews(&pairs)), ("f1", f1(&pairs))];
    accuracy(Accuracy { right, count: pairs.len() }, details)
}

/// Pearson's correlation, with Spearman's and the mean squared error. A correlation that there is not is 0.
fn numbers<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Summary {
    let pairs = outcomes.filter_map(|outcome| match outcome {
        Outcome::Number { said, right } => Some((f64::from(*said), *right)),
        _ => None,
    });
    let pairs = pairs.collect::<Vec<_>>();
    let value = pearson(&pairs).unwrap_or(0.0);
    let squares = pairs.iter().map(|(said, right)| (said - right).powi(2)).sum::<f64>();
    let details = [
        ("spearman", spearman(&pairs).unwrap_or(0.0)),
        ("squared_error", squares / pairs.len().max(1) as f64),
    ];
    Summary {
        metric: "pearson",
        value,
        interval: correlation_interval(value, pairs.len()),
        count: pairs.len(),
        details: details.into(),
    }
}

fn accuracy<const N: usize>(accuracy: Accuracy, details: [(&'static str, f64); N]) -> Summary {
    Summary {
        metric: "accuracy",
        value: accuracy.share(),
        interval: accuracy.interval(),
        count: accuracy.count,
        details: details.into(),
    }
}

/// Items are the sample, not tokens, which depend on each other within one: the interval is that of a ratio estimate,
/// `loss +- z sqrt(n / (n - 1) sum (nll - loss tokens)^2) / sum tokens` (Cochran 1977, chapter 6).
fn loss<'a>(outcomes: impl Iterator<Item = &'a Outcome> + Clone) -> Summary {
    let items = outcomes.filter_map(|outcome| match outcome {
        Outcome::Loss { nll, tokens, response_nll, response_tokens } => {
            Some([*nll, *tokens as f64, *response_nll, *response_tokens as f64])
        }
        _ => None,
    });
    let [nll, tokens, response_nll, response_tokens] =
        items.clone().fold([0.0; 4], |sum, item| [0, 1, 2, 3].map(|i| sum[i] + item[i]));
    let (count, value) = (items.clone().count(), nll / tokens.max(1.0));
    let squares = items.map(|[nll, tokens, ..]| (nll - value * tokens).powi(2)).sum::<f64>();
    let n = count as f64;
    // One item says nothing of how items differ.
    let half = if count > 1 { Z * (n / (n - 1.0) * squares).sqrt() / tokens.max(1.0) } else { value };
    let response = response_nll / response_tokens.max(1.0);
    Summary {
        metric: "loss",
        value,
        interval: ((value - half).max(0.0), value + half),
        count,
        details: BTreeMap::from([
            ("perplexity", value.exp()),
            ("response_loss", response),
            ("response_perplexity", response.exp()),
            ("tokens", tokens),
            ("response_tokens", response_tokens),
        ]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_without_an_answer_is_wrong_and_counted() {
        let said = |chosen, correct| Outcome::Generation { text: String::new(), chosen, correct };
        let all = [said(Some(1), 1), said(Some(0), 1), said(None, 0), said(Some(2), 2)];
        let summary = Summary::of(all.iter()).unwrap();
        assert_eq!((summary.metric, summary.value, summary.count), ("accuracy", 0.5, 4));
        assert_eq!(summary.details["unanswered"], 1.0);
        assert_eq!(summary.interval, Accuracy { right: 2, count: 4 }.interval());
        assert_eq!(Summary::of([].iter()), None);
    }

    #[test]
    fn a_loss_weighs_tokens_and_its_interval_items() {
        let item = |nll: f64, tokens, response_nll, response_tokens| Outcome::Loss {
            nll,
            tokens,
            response_nll,
            response_tokens,
        };
        let all = [item(6.0, 2, 1.0, 1), item(4.0, 4, 3.0, 1), item(2.0, 2, 0.5, 1)];
        let summary = Summary::of(all.iter()).unwrap();
        assert_eq!((summary.metric, summary.value, summary.count), ("loss", 1.5, 3));
        assert_eq!(summary.details["response_loss"], 1.5);
        assert!((summary.details["perplexity"] - 1.5f64.exp()).abs() < 1e-12);
        // By hand: residuals 3, -2, -1; sqrt(3 / 2 * 14) / 8 = 0.572_822.
        let half = 1.959_964 * 0.572_822;
        assert!((summary.interval.0 - (1.5 - half)).abs() < 1e-4, "{summary:?}");
        assert!((summary.interval.1 - (1.5 + half)).abs() < 1e-4, "{summary:?}");
        let one = Summary::of(all[..1].iter()).unwrap();
        assert_eq!(one.interval, (0.0, 6.0), "one item says nothing of how far it is off");
    }
}
