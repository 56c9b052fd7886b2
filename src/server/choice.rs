//! One sequence on its way back: engine events become text, whole characters only and nothing of a stop string.
//!
//! Plain and streamed answers are both made of these [`Delta`]s, so a stream joined is the plain answer.

use super::wire::StopReason;
use crate::engine::{Event, Finish, TokenLogprob};
use crate::text::{StopMatcher, StreamDecoder, Tokenizer};
use std::collections::VecDeque;
use std::sync::Arc;

/// What one event added to an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Delta {
    pub(super) text: String,
    /// Tokens whose text has begun to be given out; only if log probabilities were asked for.
    pub(super) tokens: Vec<ScoredToken>,
    pub(super) finish: Option<Finished>,
}

impl Delta {
    fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty() && self.finish.is_none()
    }
}

/// A token with its log probability.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ScoredToken {
    pub(super) token: u32,
    /// `None` for a first prompt token.
    pub(super) score: Option<(f32, Vec<(u32, f32)>)>,
    /// Where its text begins, in characters of the answer's text.
    pub(super) offset: usize,
    /// Whether it ended the sequence; it has no text then.
    pub(super) end: bool,
}

/// How a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finished {
    pub(super) reason: &'static str,
    pub(super) stop: Option<StopReason>,
}

/// How to make text of a sequence.
#[derive(Debug, Clone)]
pub(super) struct ChoiceSettings {
    pub(super) stop: Vec<String>,
    /// Stop strings count that end after so many tokens.
    pub(super) min_tokens: usize,
    /// Tokens that the request itself named as stops; they are reported as the reason.
    pub(super) named_stop_tokens: Arc<[u32]>,
    /// Every token that ends the sequence.
    pub(super) stop_tokens: Arc<[u32]>,
    pub(super) logprobs: bool,
    /// The prompt to give back in front of the answer.
    pub(super) echo: Option<Echo>,
}

/// A prompt that is given back.
#[derive(Debug, Clone)]
pub(super) struct Echo {
    pub(super) text: Arc<str>,
    pub(super) tokens: Arc<[u32]>,
}

/// One answer in the making.
pub(super) struct Choice {
    tokenizer: Arc<Tokenizer>,
    settings: ChoiceSettings,
    decoder: StreamDecoder,
    matcher: StopMatcher,
    generated: usize,
    /// Of the answer's text: what has been decoded, in bytes and characters, and what has been given out, in bytes.
    decoded: usize,
    decoded_chars: usize,
    given: usize,
    /// Tokens not yet given out, each with the byte at which its text begins.
    pending: VecDeque<(usize, ScoredToken)>,
}

impl Choice {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, settings: ChoiceSettings) -> Self {
        let echoed = settings.echo.as_ref().map_or("", |e| &e.text);
        let (decoded, decoded_chars) = (echoed.len(), echoed.chars().count());
        Self {
            tokenizer,
            matcher: StopMatcher::new(settings.stop.clone()),
            settings,
            decoder: StreamDecoder::new(),
            generated: 0,
            decoded,
            decoded_chars,
            given: decoded,
            pending: VecDeque::new(),
        }
    }

    /// Tokens generated so far.
    pub(super) fn generated(&self) -> usize {
        self.generated
    }

    /// What can be given out before the engine has said anything: an echo without log probabilities.
    pub(super) fn opening(&self) -> Option<Delta> {
        let echo = self.settings.echo.as_ref().filter(|_| !self.settings.logprobs)?;
        Some(Delta { text: echo.text.to_string(), ..Delta::default() })
    }

    /// Takes the next event; `None` if there is nothing to give out yet.
    ///
    /// # Errors
    /// The engine's reason for giving up this sequence.
    pub(super) fn take(&mut self, event: Event) -> Result<Option<Delta>, String> {
        let delta = match event {
            Event::Started { .. } => Delta::default(),
            Event::Prompt(scores) => self.prompt(scores),
            Event::Token { token, logprob, .. } => self.token(token, logprob),
            Event::Finished(Finish::Stop(token)) => {
                let named = self.settings.named_stop_tokens.contains(&token);
                self.finish("stop", named.then_some(StopReason::Token(token)))
            }
            Event::Finished(Finish::Length) => self.finish("length", None),
            Event::Finished(Finish::Failed) => return Err("the engine gave the sequence up".into()),
            Event::Failed(reason) => return Err(reason),
        };
        Ok(Some(delta).filter(|d| !d.is_empty()))
    }

    /// The echoed prompt, each token with its score.
    fn prompt(&self, scores: Vec<TokenLogprob>) -> Delta {
        let Some(echo) = &self.settings.echo else { return Delta::default() };
        let offsets = offsets(&self.tokenizer, echo);
        let scores = std::iter::once(None).chain(scores.into_iter().map(|s| Some((s.logprob, s.top))));
        let tokens = echo.tokens.iter().zip(offsets).zip(scores);
        let tokens = tokens.map(|((&token, offset), score)| ScoredToken { token, score, offset, end: false });
        Delta { text: echo.text.to_string(), tokens: tokens.collect(), finish: None }
    }

    fn token(&mut self, token: u32, logprob: Option<TokenLogprob>) -> Delta {
        self.generated += 1;
        // Before `min_tokens` no such token is sampled, so here it always ends the sequence; its text is not shown.
        let end = self.settings.stop_tokens.contains(&token);
        if let Some(scored) = logprob.filter(|_| self.settings.logprobs) {
            let score = Some((scored.logprob, scored.top));
            self.pending
                .push_back((self.decoded, ScoredToken { token, score, offset: self.decoded_chars, end }));
        }
        let piece = if end { String::new() } else { self.decoder.push(&self.tokenizer, token) };
        self.text(&piece)
    }

    /// Newly decoded text.
    fn text(&mut self, piece: &str) -> Delta {
        self.decoded += piece.len();
        self.decoded_chars += piece.chars().count();
        let too_early = self.generated < self.settings.min_tokens;
        let pushed = self.matcher.push(piece, too_early);
        let finish = pushed.matched.map(|s| Finished { reason: "stop", stop: Some(StopReason::Text(s)) });
        self.give(pushed.text, finish)
    }

    fn finish(&mut self, reason: &'static str, stop: Option<StopReason>) -> Delta {
        let rest = self.decoder.finish();
        let mut delta = self.text(&rest);
        if delta.finish.is_none() {
            delta.text += &self.matcher.finish();
            delta.tokens.extend(self.pending.drain(..).map(|(_, token)| token));
            delta.finish = Some(Finished { reason, stop });
        }
        delta
    }

    /// Gives out text and the tokens that begin in it.
    fn give(&mut self, text: String, finish: Option<Finished>) -> Delta {
        self.given += text.len();
        let begun = self.pending.iter().take_while(|(start, _)| *start < self.given).count();
        let tokens = self.pending.drain(..begun).map(|(_, token)| token).collect();
        Delta { text, tokens, finish }
    }
}

/// Where each token's text begins, in characters of the echoed text. A token that begins within a character counts from
/// that character. A special token that is not written there, such as a beginning of sequence that the tokenizer has
/// put in front of the client's text, takes no place.
fn offsets(tokenizer: &Tokenizer, echo: &Echo) -> Vec<usize> {
    let (mut bytes, mut starts) = (Vec::new(), Vec::with_capacity(echo.tokens.len()));
    for &token in echo.tokens.iter() {
        starts.push(bytes.len());
        let own = tokenizer.token_bytes(token);
        let written = || echo.text.as_bytes().get(bytes.len()..).is_some_and(|rest| rest.starts_with(own));
        if !tokenizer.is_special(token) || written() {
            bytes.extend_from_slice(own);
        }
    }
    // By byte, and one more for the end: which character of the text it belongs to.
    let mut characters = Vec::with_capacity(bytes.len() + 1);
    let mut next = 0;
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            characters.extend(std::iter::repeat_n(next, character.len_utf8()));
            next += 1;
        }
        // What is no character has become one U+FFFD.
        characters.extend(std::iter::repeat_n(next, chunk.invalid().len()));
        next += usize::from(!chunk.invalid().is_empty());
    }
    characters.push(next);
    starts.into_iter().map(|start| characters[start]).collect()
}
