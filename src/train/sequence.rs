//! One sequence of tokens, and which of them are learnt.

/// Tokens of a sequence, each of which is to be predicted from those before it; the first ones may be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    /// So many tokens at the beginning are read and not learnt: a prompt, or none.
    pub given: usize,
}

impl Sequence {
    /// All of it is learnt, but for the first token, which nothing stands before.
    pub fn whole(tokens: Vec<u32>) -> Self {
        Self { tokens, given: 0 }
    }

    /// The tokens to predict; none where what is given fills the sequence.
    pub fn targets(&self) -> &[u32] {
        &self.tokens[self.first_target()..]
    }

    /// Where the targets begin.
    pub(super) fn first_target(&self) -> usize {
        self.given.max(1).min(self.tokens.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_what_stands_after_the_prompt_and_after_something() {
        for (given, targets) in [(0, vec![6, 7]), (1, vec![6, 7]), (2, vec![7]), (3, vec![]), (9, vec![])] {
            assert_eq!(Sequence { tokens: vec![5, 6, 7], given }.targets(), targets, "{given}");
        }
        assert!(Sequence::whole(vec![5]).targets().is_empty());
        assert!(Sequence::whole(vec![]).targets().is_empty());
    }
}
