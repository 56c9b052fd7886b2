//! The program as people run it: a process with arguments, a log, signals and an exit code.

mod bench;
mod clients;
pub(crate) mod process;
mod search;
mod serve;
mod train;
