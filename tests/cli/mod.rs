//! The program as people run it: a process with arguments, a log, signals and an exit code.

mod bench;
mod classifier;
pub(crate) mod classify;
mod clients;
mod eval;
mod export;
pub(crate) mod process;
mod random;
mod search;
mod serve;
mod train;
