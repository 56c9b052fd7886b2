//! Answers, plain or as a stream of server-sent events, from the same pieces.

use super::choice::Delta;
use super::generate::Head;
use super::run::Run;
use super::validate::StreamMode;
use super::wire::{ApiError, Usage};
use axum::http::{HeaderValue, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Often enough that no proxy takes a slow answer for a dead one.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an endpoint writes its answers.
pub(super) trait Format: Send + Unpin + 'static {
    /// What a stream says about an answer before its first token.
    fn opening(
        &self,
        head: &Head,
        index: usize,
        usage: Option<Option<Usage>>,
    ) -> Option<Result<String, WireError>>;

    /// The chunks of one piece; `first` for an answer's first piece.
    fn chunks(
        &self,
        head: &Head,
        piece: Piece,
        usage: Option<Option<Usage>>,
    ) -> Result<Vec<String>, WireError>;

    /// The chunk after all others that tells the usage.
    fn usage(&self, head: &Head, usage: Usage) -> Result<String, WireError>;

    /// The whole answer, one [`Delta`] for each index.
    fn whole(&self, head: &Head, answers: Vec<Delta>, usage: Usage) -> Result<String, WireError>;
}

/// A piece of a streamed answer.
pub(super) struct Piece {
    pub(super) index: usize,
    pub(super) delta: Delta,
    /// Whether it is its answer's first.
    pub(super) first: bool,
}

/// An answer that could not be written as JSON.
pub(super) type WireError = serde_json::Error;

/// JSON of one message.
pub(super) fn to_json(message: &impl Serialize) -> Result<String, WireError> {
    serde_json::to_string(message)
}

/// Answers a request whose sequences run.
pub(super) async fn answer<F: Format>(run: Run, head: Head, format: F, mode: Option<StreamMode>) -> Response {
    let served = HeaderValue::try_from(&head.chosen.sub_network.entry.name);
    let mut response = match mode {
        Some(mode) => stream(run, head, format, mode),
        None => whole(run, &head, &format).await.unwrap_or_else(IntoResponse::into_response),
    };
    if let Ok(served) = served {
        response.headers_mut().insert("x-subnetwork", served);
    }
    response
}

async fn whole<F: Format>(mut run: Run, head: &Head, format: &F) -> Result<Response, ApiError> {
    let mut answers = vec![Delta::default(); run.len()];
    while let Some(next) = run.next().await {
        let (index, delta) = next?;
        let answer = &mut answers[index];
        answer.text += &delta.text;
        answer.tokens.extend(delta.tokens);
        answer.finish = delta.finish.or(answer.finish.take());
    }
    let body = format.whole(head, answers, run.usage()).map_err(|error| unwritable(&error))?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response())
}

fn unwritable(error: &WireError) -> ApiError {
    tracing::error!(%error, "an answer could not be written");
    ApiError::internal()
}

fn stream<F: Format>(run: Run, head: Head, format: F, mode: StreamMode) -> Response {
    let started = vec![false; run.len()];
    let mut chunks = Chunks { run, head, format, mode, started, ready: VecDeque::new(), ended: false };
    for index in 0..chunks.run.len() {
        let usage = chunks.usage_key();
        if let Some(opening) = chunks.format.opening(&chunks.head, index, usage) {
            chunks.started[index] = true;
            chunks.push(opening);
        }
    }
    let mut response = Sse::new(chunks).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks proxies not to collect the stream before they pass it on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The events of a streamed answer; the last is always `[DONE]`.
struct Chunks<F> {
    run: Run,
    head: Head,
    format: F,
    mode: StreamMode,
    /// By index: whether anything has been said about this answer.
    started: Vec<bool>,
    ready: VecDeque<String>,
    ended: bool,
}

impl<F: Format> Chunks<F> {
    /// `usage` of a chunk that is not the last one.
    fn usage_key(&self) -> Option<Option<Usage>> {
        match (self.mode.continuous, self.mode.usage) {
            (true, _) => Some(Some(self.run.usage())),
            (false, true) => Some(None),
            (false, false) => None,
        }
    }

    fn push(&mut self, chunk: Result<String, WireError>) {
        match chunk {
            Ok(chunk) => self.ready.push_back(chunk),
            Err(error) => self.fail(&unwritable(&error)),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(error.to_json().to_string());
        self.end();
    }

    fn end(&mut self) {
        self.ready.push_back("[DONE]".into());
        self.ended = true;
    }

    fn take(&mut self, next: Option<Result<(usize, Delta), ApiError>>) {
        match next {
            Some(Ok((index, delta))) => {
                let first = !std::mem::replace(&mut self.started[index], true);
                let chunks = self.format.chunks(&self.head, Piece { index, delta, first }, self.usage_key());
                match chunks {
                    Ok(chunks) => self.ready.extend(chunks),
                    Err(error) => self.fail(&unwritable(&error)),
                }
            }
            Some(Err(error)) => self.fail(&error),
            None => {
                if self.mode.usage {
                    let usage = self.format.usage(&self.head, self.run.usage());
                    self.push(usage);
                }
                if !self.ended {
                    self.end();
                }
            }
        }
    }
}

impl<F: Format> Stream for Chunks<F> {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(sse::Event::default().data(chunk))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let next = ready!(self.run.poll_next(context));
            self.take(next);
        }
    }
}
