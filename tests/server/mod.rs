//! The HTTP server over a tiny super-network.
//!
//! Almost everything calls the router in this process; only `lifecycle` opens a socket, where a client's going away is
//! what is tested. [`held`] lets a test stop the engine between two steps, so that nothing depends on who is faster.

mod chat;
mod choice;
mod classify;
mod completions;
mod errors;
mod hostile;
mod lifecycle;
mod logprobs;
mod metrics;
mod prefix;
mod slo;
mod streaming;
mod subnetworks;
mod system;

mod alone;
mod app;
mod held;
mod scrape;
