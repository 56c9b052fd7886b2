//! The sequences of one accepted request, read side by side.
//!
//! Dropping a sequence's receiver is how the engine learns that nobody wants it any more; so a run that is dropped,
//! because the client has gone, frees everything at once.

use super::choice::{Choice, Delta, Finished};
use super::generate::draining;
use super::ticket::{Outcome, Ticket};
use super::wire::{ApiError, Usage};
use crate::engine::{Event, Finish};
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::mpsc;

/// One answer in the making and where its events come from.
pub(super) struct Sequence {
    /// `None` once it has ended.
    events: Option<mpsc::Receiver<Event>>,
    choice: Choice,
    /// To be counted once the prompt is computed; 0 where another answer to the same prompt counts it.
    prompt_tokens: usize,
    prompt_counted: bool,
    /// When its first and its last token came.
    tokens_at: Option<(Instant, Instant)>,
}

impl Sequence {
    pub(super) fn new(events: mpsc::Receiver<Event>, choice: Choice, prompt_tokens: usize) -> Self {
        Self { events: Some(events), choice, prompt_tokens, prompt_counted: false, tokens_at: None }
    }
}

/// All answers of one request.
pub(super) struct Run {
    sequences: Vec<Sequence>,
    ticket: Ticket,
    /// What is known before the first event, by index.
    opening: VecDeque<(usize, Delta)>,
    /// Where to look first, so that no sequence starves the others.
    cursor: usize,
    /// Prompt tokens that were in the cache.
    cached: usize,
    longest: bool,
    cut_off: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Run {
    /// The run ends early with an error when `cut_off` is ready.
    pub(super) fn new(
        sequences: Vec<Sequence>,
        ticket: Ticket,
        cut_off: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let opening =
            sequences.iter().enumerate().filter_map(|(at, s)| Some((at, s.choice.opening()?))).collect();
        Self { sequences, ticket, opening, cursor: 0, cached: 0, longest: false, cut_off: Box::pin(cut_off) }
    }

    /// How many answers there are; their indices are `0..len`.
    pub(super) fn len(&self) -> usize {
        self.sequences.len()
    }

    pub(super) fn usage(&self) -> Usage {
        Usage::new(self.ticket.prompt_tokens(), self.ticket.generated_tokens()).with_cached(self.cached)
    }

    /// The next piece of any answer, with its index; `None` after the last.
    ///
    /// # Errors
    /// The engine gave up; the run is over and all its sequences are cancelled.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// See [`Self::next`].
    pub(super) fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, Delta), ApiError>>> {
        if let Some(opening) = self.opening.pop_front() {
            return Poll::Ready(Some(Ok(opening)));
        }
        let count = self.sequences.len();
        for turn in 0..count {
            let at = (self.cursor + turn) % count;
            while let Some(events) = &mut self.sequences[at].events {
                let Poll::Ready(event) = events.poll_recv(context) else { break };
                match self.take(at, event) {
                    Ok(None) => {}
                    Ok(Some(delta)) => {
                        self.cursor = at + 1;
                        return Poll::Ready(Some(Ok((at, delta))));
                    }
                    Err(reason) => return Poll::Ready(Some(Err(self.fail(&reason)))),
                }
            }
        }
        if self.sequences.iter().any(|s| s.events.is_some()) {
            return match self.cut_off.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(Some(Err(self.end_with(draining())))),
                Poll::Pending => Poll::Pending,
            };
        }
        self.ticket.end(if self.longest { Outcome::Length } else { Outcome::Stop });
        Poll::Ready(None)
    }

    fn take(&mut self, at: usize, event: Option<Event>) -> Result<Option<Delta>, String> {
        let sequence = &mut self.sequences[at];
        let event = event.ok_or("the engine has stopped")?;
        if let Event::Started { cached } = event {
            // As the prompt itself, for one of its answers only.
            self.cached += if sequence.prompt_tokens > 0 { cached } else { 0 };
            return Ok(None);
        }
        if !sequence.prompt_counted && !matches!(event, Event::Failed(_) | Event::Finished(Finish::Failed)) {
            sequence.prompt_counted = true;
            self.ticket.prompt_done(sequence.prompt_tokens);
        }
        if let Event::Token { at, .. } = event {
            self.ticket.token(at, sequence.tokens_at.map(|(_, last)| last));
            sequence.tokens_at = Some((sequence.tokens_at.map_or(at, |(first, _)| first), at));
        }
        let delta = sequence.choice.take(event)?;
        if let Some(Finished { reason, .. }) = delta.as_ref().and_then(|d| d.finish.as_ref()) {
            self.longest |= *reason == "length";
            // A matched stop string ends it here while the engine would go on.
            sequence.events = None;
            let span = sequence.tokens_at.map(|(first, last)| last.saturating_duration_since(first));
            self.ticket.sequence_done(sequence.choice.generated(), span.unwrap_or_default());
        }
        Ok(delta)
    }

    fn fail(&mut self, reason: &str) -> ApiError {
        tracing::error!(reason, "a sequence could not be computed");
        self.end_with(ApiError::internal())
    }

    /// Cancels all sequences.
    fn end_with(&mut self, error: ApiError) -> ApiError {
        for sequence in &mut self.sequences {
            sequence.events = None;
        }
        self.ticket.fail(&error);
        error
    }
}
