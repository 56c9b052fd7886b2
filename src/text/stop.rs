//! Stop strings in a text that comes in pieces.

/// Finds the first stop string to be completed and holds back whatever could still become one.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text not yet given out: a suffix of it may be the start of a stop string.
    pending: String,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Text that is certainly before any stop string.
    pub text: String,
    /// The stop string that was completed; nothing may be pushed after it.
    pub matched: Option<String>,
}

impl StopMatcher {
    /// Empty stop strings match nothing.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        Self { stops, pending: String::new() }
    }

    /// The next piece. Where `too_early`, a stop string that ends in it is text as any other; one that only begins in it
    /// counts if it ends later.
    pub fn push(&mut self, piece: &str, too_early: bool) -> Pushed {
        let known = self.pending.len();
        self.pending += piece;
        if let Some((start, stop)) = self.first_completed(known).filter(|_| !too_early) {
            let matched = Some(self.stops[stop].clone());
            let mut text = std::mem::take(&mut self.pending);
            text.truncate(start);
            return Pushed { text, matched };
        }
        let held = self.pending.split_off(self.pending.len() - self.longest_start());
        Pushed { text: std::mem::replace(&mut self.pending, held), matched: None }
    }

    /// What was held back: no stop string came of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.pending)
    }

    /// The stop string that ends first, the longest of several that end together, as `(start, index)`. Stops that end
    /// within the first `known` bytes would have been found before.
    fn first_completed(&self, known: usize) -> Option<(usize, usize)> {
        let text = self.pending.as_bytes();
        (known + 1..=text.len()).find_map(|end| {
            let ending = self.stops.iter().enumerate().filter(|(_, s)| text[..end].ends_with(s.as_bytes()));
            let longest = ending.max_by_key(|(_, s)| s.len());
            longest.map(|(index, s)| (end - s.len(), index))
        })
    }

    /// The length of the longest suffix of the pending text that a stop string starts with.
    fn longest_start(&self) -> usize {
        let text = self.pending.as_bytes();
        let of = |stop: &String| {
            let most = (stop.len() - 1).min(text.len());
            (1..=most).rev().find(|&n| text.ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        self.stops.iter().map(of).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[String], pieces: &[String]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut all = String::new();
        for piece in pieces {
            let Pushed { text, matched } = matcher.push(piece, false);
            all += &text;
            if matched.is_some() {
                return (all, matched);
            }
        }
        (all + &matcher.finish(), None)
    }

    /// By definition: the shortest prefix of the text that ends with a stop string.
    fn by_definition(stops: &[String], text: &str) -> (String, Option<String>) {
        for (end, _) in text.char_indices().skip(1).chain([(text.len(), ' ')]) {
            let ending = stops.iter().filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some(stop) = ending.max_by_key(|s| s.len()) {
                return (text[..end - stop.len()].into(), Some(stop.clone()));
            }
        }
        (text.into(), None)
    }

    proptest! {
        #[test]
        fn how_the_text_is_cut_does_not_matter(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
        ) {
            prop_assert_eq!(run(&stops, &pieces), by_definition(&stops, &pieces.concat()));
        }
    }

    #[test]
    fn text_is_given_out_as_soon_as_it_cannot_be_part_of_a_stop() {
        let mut matcher = StopMatcher::new(vec!["\n\nQ".into()]);
        assert_eq!(matcher.push("one\n", false).text, "one");
        assert_eq!(matcher.push("two", false).text, "\ntwo");
        assert_eq!(matcher.push("\n\n", false).text, "");
        assert_eq!(matcher.push("Q: no", false).matched.as_deref(), Some("\n\nQ"));
    }

    #[test]
    fn a_stop_that_ends_too_early_is_text_and_one_that_ends_later_is_not() {
        let mut matcher = StopMatcher::new(vec!["ab".into()]);
        assert_eq!(matcher.push("xaby", true), Pushed { text: "xaby".into(), matched: None });
        assert_eq!(matcher.push("za", true), Pushed { text: "z".into(), matched: None });
        assert_eq!(matcher.push("bz", false), Pushed { text: String::new(), matched: Some("ab".into()) });
    }
}
