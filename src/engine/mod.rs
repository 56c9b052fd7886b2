//! Continuous batching: which sequences compute what in the next step, and the thread that computes it.

mod request;

pub use request::{Event, Finish, Request, SubmitError, TokenLogprob};
