//! The command line: parse, settle the settings, build, run. The only place that knows every other room.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

mod bench;
mod compute;
mod device;
mod eval;
mod export;
mod import;
mod inspect;
mod open;
mod progress;
mod random;
mod search;
mod serve;
mod settings;
mod space;
mod tasks;
mod train;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;

/// Train and serve every size of a fine-tuned language model from one set of weights.
///
/// A super-network is a frozen base model with one elastic low-rank super-adapter. Each of its sub-networks is a
/// smaller, faster model; all of them are served at the same time from the same weights, and each request picks one.
#[derive(Debug, Parser)]
#[command(name = "lonas", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Start with: lonas serve\nThen: curl -s http://127.0.0.1:8080/v1/models")]
struct Cli {
    /// A TOML file with settings: a table for each command, a key for each of its options, e.g. `[serve] port = 9000`.
    /// Environment variables (LONAS_PORT, ...) win over the file, the command line over both.
    #[arg(long, global = true, env = "LONAS_SETTINGS", value_name = "FILE")]
    settings: Option<std::path::PathBuf>,

    /// What to log, e.g. `info`, `debug`, `lonas=debug`.
    #[arg(long, global = true, env = "LONAS_LOG", default_value = "info", value_name = "FILTER")]
    log: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve every sub-network over an OpenAI-style HTTP API.
    Serve(serve::ServeArgs),
    /// Train a super-adapter with LoNAS's recipe.
    Train(train::TrainArgs),
    /// Make a model folder of a published super-adapter.
    Import(import::ImportArgs),
    /// Score sub-networks on tasks: accuracy by likelihood or by generation, or loss and perplexity.
    Eval(eval::EvalArgs),
    /// Search for sub-networks that no other is both cheaper and better than.
    Search(search::SearchArgs),
    /// Write one sub-network as a plain model: for llama.cpp, transformers or PEFT.
    Export(export::ExportArgs),
    /// Measure latency and throughput of each sub-network on this machine.
    Bench(bench::BenchArgs),
    /// Show a super-network's groups, sub-networks, parameters and MACs.
    Inspect(inspect::InspectArgs),
    /// Write a super-network of random weights, to measure a shape before there is a model of it.
    Random(random::RandomArgs),
}

/// What `serve`, `eval`, `search`, `export`, `bench` and `inspect` take without an argument; relative to the working
/// directory.
const DEFAULT_MODEL: &str = "models/smollm2-135m-commonsense";

/// Any failure on its way to the terminal.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&cli.log).unwrap_or_default();
    let to_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_target(false).with_ansi(to_terminal).init();
    let done = match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Search(args) => search::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Random(args) => random::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report(&*failure);
            ExitCode::from(1)
        }
    }
}

/// Parses the command line, with the values of the settings file that it names as defaults.
fn parse(arguments: impl Iterator<Item = std::ffi::OsString>) -> Result<Cli, clap::Error> {
    let arguments = arguments.collect::<Vec<_>>();
    let matches = match settings::file_of(&arguments) {
        Some(path) => settings::parse(Cli::command(), &path, &arguments)?,
        None => Cli::command().try_get_matches_from(&arguments)?,
    };
    if let Some(("eval", given)) = matches.subcommand() {
        let wrong = |message| Cli::command().error(ErrorKind::ArgumentConflict, message);
        eval::check_usage(given).map_err(wrong)?;
    }
    Cli::from_arg_matches(&matches)
}

/// One line for the error and each of its causes; no cause is said twice.
#[expect(clippy::print_stderr, reason = "this is where a failure meets the person at the terminal")]
fn report(failure: &(dyn std::error::Error + 'static)) {
    let mut said = failure.to_string();
    eprintln!("lonas: {said}");
    let mut cause = failure.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !said.contains(&text) {
            eprintln!("  because: {text}");
        }
        said = text;
        cause = error.source();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_only_a_generation_has_is_refused_elsewhere() {
        let eval = |more: &[&str]| {
            let all = ["lonas", "eval", "--task", "a=b"].iter().chain(more);
            parse(all.map(Into::into)).map(|_| ()).map_err(|error| error.to_string())
        };
        for method in
            [&[][..], &["--method", "likelihood"], &["--method", "loss"], &["--method", "classification"]]
        {
            for (option, value) in [("--beams", "4"), ("--max-new-tokens", "9")] {
                let error = eval(&[method, &[option, value]].concat()).unwrap_err();
                assert!(error.contains(&format!("{option}: goes with --method generation")), "{error}");
            }
            eval(method).unwrap();
        }
        eval(&["--method", "generation", "--beams", "4", "--max-new-tokens", "9"]).unwrap();
    }
}
