//! Text from tokens as they come.

use super::Tokenizer;

/// Decodes one token after the other and holds back what is not yet a whole character.
#[derive(Debug, Default)]
pub struct StreamDecoder {
    /// The start of a UTF-8 character whose end has not come yet; at most 3 bytes.
    pending: Vec<u8>,
}

impl StreamDecoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// The text that `token` completes; special tokens have none.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        if tokenizer.is_special(token) {
            return String::new();
        }
        self.push_bytes(tokenizer.token_bytes(token))
    }

    /// The text that these bytes complete. Joined, all texts are what `String::from_utf8_lossy` makes of all bytes.
    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text += valid;
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text += &String::from_utf8_lossy(valid);
                    rest = after;
                    // No length: the bytes end within a character that may still be completed.
                    let Some(length) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// What is left at the end: nothing, or U+FFFD for half a character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_stream_joined_is_the_whole(
            bytes in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                "\\PC{0,20}".prop_map(String::into_bytes),
            ],
            cuts in prop::collection::vec(0usize..61, 0..8),
        ) {
            let mut cuts = cuts.into_iter().map(|c| c.min(bytes.len())).collect::<Vec<_>>();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut decoder = StreamDecoder::new();
            let mut joined = String::new();
            for cut in cuts.windows(2) {
                joined += &decoder.push_bytes(&bytes[cut[0]..cut[1]]);
            }
            joined += &decoder.finish();
            prop_assert_eq!(joined, String::from_utf8_lossy(&bytes).into_owned());
        }
    }

    #[test]
    fn half_a_character_is_held_back() {
        let mut decoder = StreamDecoder::new();
        let bytes = "é€".as_bytes();
        assert_eq!(decoder.push_bytes(&bytes[..1]), "");
        assert_eq!(decoder.push_bytes(&bytes[1..3]), "é");
        assert_eq!(decoder.push_bytes(&bytes[3..4]), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }
}
