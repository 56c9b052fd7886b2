//! HTTP: from JSON to sequences and from tokens back to JSON, in the words of OpenAI's API.
//!
//! wire -> validate -> select -> generate (admission, tokens, submission) ... run -> choice -> answer; or, where models classify,
//! classify in the place of what follows select.
//! Only this room knows status codes; it never sees a tensor and does not know how a sequence is computed. Invariant:
//! an accepted request is counted exactly once, and when its client goes its sequences go too.

mod access;
mod admin;
mod admission;
mod answer;
mod app;
mod chat;
mod choice;
mod classes;
mod classify;
mod client;
mod completions;
mod connections;
mod generate;
mod http;
mod inputs;
mod metrics;
mod observer;
mod registry;
mod run;
mod select;
mod served;
mod shutdown;
mod socket;
mod system;
mod task;
mod text_work;
mod ticket;
mod validate;
mod wire;

pub use app::{ServerParts, ServerState, app};
pub use classes::{Classes, OutputKind};
pub use client::{ClientError, RunningServer};
pub use metrics::{Metrics, RunInfo};
pub use served::{ServedError, ServedModel, ServedModels, ServedSubNetwork, SuperAdapter};
pub use shutdown::{Drained, serve};
pub use task::{Generation, Task};
pub use validate::Limits;
