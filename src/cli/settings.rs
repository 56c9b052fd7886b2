//! Settings from a TOML file, as defaults of the command line's options.

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The file named by `--settings` or `LONAS_SETTINGS`.
pub(super) fn file_of(arguments: &[OsString]) -> Option<PathBuf> {
    let texts = arguments.iter().map(|a| a.to_string_lossy());
    let mut texts = texts.take_while(|a| a != "--").peekable();
    while let Some(argument) = texts.next() {
        if let Some(path) = argument.strip_prefix("--settings=") {
            return Some(path.into());
        }
        if argument == "--settings" {
            return texts.peek().map(|path| path.to_string().into());
        }
    }
    std::env::var_os("LONAS_SETTINGS").map(PathBuf::from)
}

/// A key of the file.
#[derive(Clone)]
struct Setting {
    /// The subcommand.
    of: String,
    key: String,
    values: Vec<String>,
}

/// Parses the command line with the file's values as defaults. One of an option that excludes another does not count where the
/// command line or the environment gives that one: what was said last wins, though the parser sees no conflict with a default.
///
/// # Errors
/// A file that cannot be read or parsed, a table that is no command, a key that is no option of it, keys that exclude each other;
/// and what is wrong with the command line.
pub(super) fn parse(
    command: Command,
    path: &Path,
    arguments: &[OsString],
) -> Result<ArgMatches, clap::Error> {
    let mut command = command;
    let mut settings = read(&mut command, path)?;
    let matches = with_defaults(command.clone(), &settings).try_get_matches_from(arguments)?;
    let Some((name, given)) = matches.subcommand() else { return Ok(matches) };
    let counts = |s: &&Setting| s.of == name && counts(&command, given, s);
    let mut own = settings.iter().filter(counts).cloned().collect::<Vec<_>>();
    let mut dropped = Vec::new();
    for setting in &own {
        let excluded = excluded(&command, setting);
        let is_given = |id: &String| {
            matches!(given.value_source(id), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
        };
        if excluded.iter().any(is_given) {
            dropped.push(setting.key.clone());
        }
    }
    own.retain(|setting| !dropped.contains(&setting.key));
    for (at, setting) in own.iter().enumerate() {
        let excluded = excluded(&command, setting);
        if let Some(other) = own[..at].iter().find(|other| excluded.contains(&id(&other.key))) {
            let message = format!("[{name}] `{}` and `{}` exclude each other", other.key, setting.key);
            return Err(wrong(&mut command, path, &message));
        }
    }
    if dropped.is_empty() {
        return Ok(matches);
    }
    let name = name.to_string();
    settings.retain(|setting| setting.of != name || !dropped.contains(&setting.key));
    with_defaults(command, &settings).try_get_matches_from(arguments)
}

/// Whether a setting is what an option is, and does something: `false` for a flag is what it is anyway.
fn counts(command: &Command, given: &ArgMatches, setting: &Setting) -> bool {
    let argument = command.find_subcommand(&setting.of).and_then(|c| find(c, &setting.key));
    let is_flag = argument.is_some_and(|a| matches!(a.get_action(), ArgAction::SetTrue));
    given.value_source(&id(&setting.key)) == Some(ValueSource::DefaultValue)
        && !(is_flag && setting.values == ["false"])
}

/// The options that do not go with a setting's, whichever of the two says so.
fn excluded(command: &Command, setting: &Setting) -> Vec<String> {
    let Some(command) = command.find_subcommand(&setting.of) else { return Vec::new() };
    let Some(own) = find(command, &setting.key) else { return Vec::new() };
    let says = |a: &Arg, b: &Arg| command.get_arg_conflicts_with(a).iter().any(|c| c.get_id() == b.get_id());
    let others = command.get_arguments().filter(|other| says(own, other) || says(other, own));
    others.map(|other| other.get_id().to_string()).collect()
}

fn wrong(command: &mut Command, path: &Path, message: &str) -> clap::Error {
    command.error(ErrorKind::InvalidValue, format!("settings file {}: {message}", path.display()))
}

fn with_defaults(command: Command, settings: &[Setting]) -> Command {
    settings.iter().fold(command, |command, Setting { of, key, values }| {
        let values = values.clone();
        command.mut_subcommand(of, |c| c.mut_arg(id(key), |a| a.default_values(values).required(false)))
    })
}

fn read(command: &mut Command, path: &Path) -> Result<Vec<Setting>, clap::Error> {
    let mut settings = Vec::new();
    let wrong = |command: &mut Command, message: String| wrong(command, path, &message);
    let text = std::fs::read_to_string(path).map_err(|e| wrong(command, e.to_string()))?;
    let table = text.parse::<toml::Table>().map_err(|e| wrong(command, e.to_string()))?;
    for (name, value) in table {
        let Some(options) = value.as_table() else {
            return Err(wrong(command, format!("`{name}` must be a table like [serve]")));
        };
        for (key, value) in options {
            let known = command.find_subcommand(&name).map(|c| find(c, key).is_some());
            match known {
                None => return Err(wrong(command, format!("there is no command `{name}`"))),
                Some(false) => return Err(wrong(command, format!("[{name}] has no option `{key}`"))),
                Some(true) => {}
            }
            let Some(values) = texts(value) else {
                return Err(wrong(command, format!("[{name}] {key}: expected a value or a list of values")));
            };
            settings.push(Setting { of: name.clone(), key: key.clone(), values });
        }
    }
    Ok(settings)
}

fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|a| a.get_id().as_str() == id(key))
}

/// What the parser calls an option.
fn id(key: &str) -> String {
    key.replace('-', "_")
}

/// A scalar or a list of scalars, as the command line would spell them.
fn texts(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Array(values) => {
            values.iter().map(|v| texts(v).filter(|t| t.len() == 1)?.pop()).collect()
        }
        toml::Value::Table(_) => None,
        scalar => Some(vec![scalar.to_string()]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, parse};

    fn parse_with(file: &str, arguments: &[&str]) -> Result<Cli, clap::Error> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lonas.toml");
        std::fs::write(&path, file).unwrap();
        let mut all = vec!["lonas".into(), "--settings".into(), path.into_os_string()];
        all.extend(arguments.iter().map(std::ffi::OsString::from));
        parse(all.into_iter())
    }

    #[test]
    fn the_file_gives_defaults_and_the_command_line_wins() {
        let from_file = format!("{:?}", parse_with("[serve]\nport = 9000", &["serve"]).unwrap());
        assert!(from_file.contains("port: 9000"), "{from_file}");
        let both = format!("{:?}", parse_with("[serve]\nport = 9000", &["serve", "--port", "7"]).unwrap());
        assert!(both.contains("port: 7,"), "{both}");
    }

    #[test]
    fn what_the_command_line_excludes_is_not_taken_from_the_file() {
        let train = ["train", "--data", "d", "--space", "s", "--out", "o"];
        let eval = ["eval", "--task", "a=b"];
        let all = |command: &[&'static str], more: &[&'static str]| [command, more].concat();
        for (file, arguments, expected) in [
            ("[train]\nmax-tokens = 100", all(&train, &[]), "max_tokens: Some(100)"),
            ("[train]\nmax-tokens = 100", all(&train, &["--epochs", "3"]), "max_tokens: None"),
            ("[train]\nepochs = 3", all(&train, &["--max-tokens", "9"]), "epochs: None"),
            ("[train]\norder = 'x'", all(&train, &["--reorder"]), "order: None"),
            ("[train]\nreorder = true", all(&train, &["--order", "x"]), "reorder: None"),
            ("[eval]\nprotocol = 'lonas'", all(&eval, &["--method", "loss"]), "protocol: None"),
            ("[eval]\nmethod = 'loss'", all(&eval, &["--protocol", "lonas"]), "method: None"),
            ("[eval]\nprotocol = 'lonas'", all(&eval, &["--limit", "1"]), "protocol: Some(Lonas)"),
            ("[eval]\nmerge-adapter = true", all(&eval, &["--without-adapter"]), "merge_adapter: false"),
            // The one that is given twice counts once, and what it excludes not at all.
            ("[train]\nmax-tokens = 100\nepochs = 2", all(&train, &["--epochs", "3"]), "max_tokens: None"),
        ] {
            let parsed = format!("{:?}", parse_with(file, &arguments).unwrap());
            assert!(parsed.contains(expected), "{file} {arguments:?}: {parsed}");
        }
        assert!(parse_with("[train]\nseed = 1", &all(&train, &["--reorder", "--order", "x"])).is_err());
        let both = "[train]\nepochs = 1\nmax-tokens = 2";
        let error = parse_with(both, &train).unwrap_err().to_string();
        assert!(error.contains("`epochs` and `max-tokens` exclude each other"), "{error}");
        parse_with(both, &["serve"]).unwrap();
        parse_with("[eval]\nmerge-adapter = false\nwithout-adapter = true", &eval).unwrap();
    }

    #[test]
    fn what_is_unknown_in_the_file_is_named() {
        for (file, named) in [
            ("[serve]\nprot = 1", "no option `prot`"),
            ("[surf]\nport = 1", "no command `surf`"),
            ("port = 1", "`port` must be a table"),
            ("[serve]\nport = {a = 1}", "port: expected a value"),
            ("[serve", "settings file"),
        ] {
            let error = parse_with(file, &["serve"]).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
