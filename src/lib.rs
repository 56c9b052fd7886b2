//! `lonas` loads a LoNAS super-network once and serves every sub-network of it from the same weights.
//!
//! The modules stand here in reading order, floor by floor; a floor imports only lower floors, and rooms on one
//! floor never import each other (`tests/architecture.rs` holds both rules). ARCHITECTURE.md is the guide.

// Floor 0: what a super-network is; what a weight is between a file and a backend. No arithmetic, no I/O.
pub mod supernet;
pub mod weights;

// Floor 1: arithmetic, files, text, numbers from logits, training data, pictures, search.
pub mod artifact;
pub mod backend;
pub mod data;
pub mod generation;
pub mod plot;
pub mod search;
pub mod text;

// Floor 2: each model family's forward, written once over `backend::Backend`.
pub mod model;

// Floor 3: serving, training, scoring, plain models of single sub-networks.
pub mod engine;
pub mod evaluate;
pub mod export;
pub mod train;

// Floor 4: HTTP.
pub mod server;

// Floor 5: the only place that knows everybody.
pub mod cli;
