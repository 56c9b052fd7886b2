//! Classifying texts: many of them in one step, whichever requests and sub-networks they belong to.
//!
//! `turns` is a pure state machine that says whose text is computed next; `worker` is the thread that computes steps and sends
//! what came of them; [`ClassifierEngine`] is what everybody else holds. A text is computed whole or not at all, so nothing
//! is kept from one step to the next but what waits.
//!
//! Cancelling: whoever drops a request's receiver cancels what is left of it before the next step.

#[cfg(test)]
mod tests;
mod turns;
mod worker;

use super::entrance::Entrance;
use super::{EngineOptions, Observer, SubmitError};
use crate::backend::Selection;
use crate::model::Classifier;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use worker::{Submission, Worker};

/// A text or a pair of texts as token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextTokens {
    /// At least one.
    pub tokens: Vec<u32>,
    /// As many: 0 in the first text, 1 in the second.
    pub token_types: Vec<u32>,
}

/// Texts to classify with one sub-network.
#[derive(Debug, Clone)]
pub struct ClassifyRequest {
    pub texts: Vec<TextTokens>,
    pub selection: Selection,
}

/// What came of one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Classified {
    /// Which of its request's texts.
    pub text: usize,
    /// One number for each label of the super-adapter, before any softmax.
    pub outputs: Vec<f32>,
}

/// A running engine around a classifier. Dropping it stops the thread after its current step; texts that are not done fail.
pub struct ClassifierEngine {
    entrance: Entrance<Submission>,
    longest: usize,
}

impl ClassifierEngine {
    /// Starts the engine's thread. Of the options, running and waiting texts count together, and a text that is longer than a
    /// step is a step of its own.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        classifier: Box<dyn Classifier>,
        options: EngineOptions,
        observer: Arc<dyn Observer>,
    ) -> std::io::Result<Self> {
        let longest = classifier.max_positions();
        let run = move |inside| Worker::new(classifier, options.step_tokens, observer, inside).run();
        Ok(Self { entrance: Entrance::open("lonas-classifier", options.places(), run)?, longest })
    }

    /// Accepts all texts of a request or none. Each text's outputs come as soon as they are computed, in any order; an error is
    /// the engine's reason for giving the whole request up, and the last thing that comes. Dropping the receiver cancels the
    /// request.
    ///
    /// # Errors
    /// No place for all texts, one that is empty or longer than the model takes, an engine that drains or has stopped.
    pub fn submit(
        &self,
        request: ClassifyRequest,
    ) -> Result<mpsc::Receiver<Result<Classified, String>>, SubmitError> {
        for text in &request.texts {
            let tokens = text.tokens.len();
            if tokens == 0 || tokens > self.longest {
                return Err(SubmitError::TooLong { tokens, limit: self.longest });
            }
        }
        let count = request.texts.len();
        let sender = self.entrance.reserve(count)?;
        // Room for everything that a request can ever send, so that the engine never waits for a reader.
        let (results, receiver) = mpsc::channel(count + 1);
        let submission = Submission { request, results, submitted: Instant::now() };
        if count > 0 && sender.try_send(submission).is_err() {
            self.entrance.release(count);
            return Err(SubmitError::Stopped);
        }
        Ok(receiver)
    }

    /// The longest text, in tokens.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Texts accepted and not yet classified.
    pub fn active(&self) -> usize {
        self.entrance.active()
    }

    /// Whether the engine's thread is alive and takes texts.
    pub fn is_accepting(&self) -> bool {
        self.entrance.is_accepting()
    }

    /// Accepts nothing more and waits until every text is done, `timeout` at most. Returns whether all are.
    pub async fn drain(&self, timeout: Duration) -> bool {
        self.entrance.drain(timeout).await
    }
}
