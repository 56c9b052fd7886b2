//! What a classifier's outputs are called, and how they become probabilities.

use crate::artifact::ClassifierConfig;

/// How outputs stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    /// One label is true of a text: softmax.
    Exclusive,
    /// Each label may be: a sigmoid each.
    Independent,
    /// The output is a number, as in regression: as it is.
    Number,
}

/// The outputs of one super-adapter's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    /// By output; at least one.
    pub names: Vec<String>,
    pub kind: OutputKind,
    /// Types of tokens that the model can tell apart; with one it reads no pairs.
    pub token_types: usize,
}

impl Classes {
    /// A single output is a number even where nothing says so, as in transformers: one label would be certain of every text.
    pub fn of(config: &ClassifierConfig) -> Self {
        let kind = match config {
            ClassifierConfig { multi_label: true, .. } => OutputKind::Independent,
            ClassifierConfig { regression: true, .. } => OutputKind::Number,
            ClassifierConfig { labels, .. } if labels.len() == 1 => OutputKind::Number,
            _ => OutputKind::Exclusive,
        };
        Self { names: config.labels.clone(), kind, token_types: config.token_types }
    }

    /// What `probs` are made of the outputs.
    pub(super) fn probabilities(&self, outputs: &[f32]) -> Vec<f32> {
        let wide = outputs.iter().map(|&x| f64::from(x));
        match self.kind {
            OutputKind::Number => outputs.to_vec(),
            OutputKind::Independent => wide.map(|x| (1.0 / (1.0 + (-x).exp())) as f32).collect(),
            OutputKind::Exclusive => {
                let largest = wide.clone().fold(f64::NEG_INFINITY, f64::max);
                let powers = wide.map(|x| (x - largest).exp()).collect::<Vec<_>>();
                let sum = powers.iter().sum::<f64>();
                powers.into_iter().map(|power| (power / sum) as f32).collect()
            }
        }
    }

    /// The name of the largest output, the first of equal ones.
    pub(super) fn likeliest(&self, outputs: &[f32]) -> Option<&str> {
        let largest = |best: usize, at: usize| if outputs[at] > outputs[best] { at } else { best };
        let at = (0..outputs.len()).reduce(largest)?;
        self.names.get(at).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(kind: OutputKind) -> Classes {
        Classes { names: ["no", "maybe", "yes"].map(String::from).to_vec(), kind, token_types: 2 }
    }

    /// `torch.softmax` and `torch.sigmoid` of the same numbers in f64.
    #[test]
    fn probabilities_are_pytorchs() {
        let outputs = [1.5, -0.25, 3.0];
        let close =
            |got: Vec<f32>, expected: [f32; 3]| got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-7);
        let softmax = classes(OutputKind::Exclusive).probabilities(&outputs);
        assert!(close(softmax, [0.176_820_18, 0.030_726_74, 0.792_453_08]));
        let sigmoid = classes(OutputKind::Independent).probabilities(&outputs);
        assert!(close(sigmoid, [0.817_574_5, 0.437_823_5, 0.952_574_1]));
        assert_eq!(classes(OutputKind::Number).probabilities(&outputs), outputs);
    }

    #[test]
    fn outputs_of_any_size_give_probabilities() {
        let extreme = classes(OutputKind::Exclusive).probabilities(&[f32::MAX, f32::MIN, f32::MAX]);
        assert_eq!(extreme, [0.5, 0.0, 0.5]);
        assert_eq!(
            classes(OutputKind::Independent).probabilities(&[f32::MAX, f32::MIN, 0.0]),
            [1.0, 0.0, 0.5]
        );
    }

    #[test]
    fn the_first_of_the_likeliest_is_named() {
        let classes = classes(OutputKind::Exclusive);
        assert_eq!(classes.likeliest(&[1.0, 2.0, 2.0]), Some("maybe"));
        assert_eq!(classes.likeliest(&[-3.0, -5.0, -4.0]), Some("no"));
    }
}
