//! Settings from a TOML file, as defaults of the command line's options.

use clap::Command;
use clap::error::ErrorKind;
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

/// `command` with the file's values as defaults.
///
/// # Errors
/// A file that cannot be read or parsed, a table that is no command, a key that is no option of it.
pub(super) fn with_defaults(command: Command, path: &Path) -> Result<Command, clap::Error> {
    let mut command = command;
    let wrong = |command: &mut Command, message: String| {
        command.error(ErrorKind::InvalidValue, format!("settings file {}: {message}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(&mut command, e.to_string()))?;
    let table = text.parse::<toml::Table>().map_err(|e| wrong(&mut command, e.to_string()))?;
    for (name, value) in table {
        let Some(options) = value.as_table() else {
            return Err(wrong(&mut command, format!("`{name}` must be a table like [serve]")));
        };
        for (key, value) in options {
            let known = command.find_subcommand(&name).map(|c| c.get_arguments().any(|a| is(a, key)));
            match known {
                None => return Err(wrong(&mut command, format!("there is no command `{name}`"))),
                Some(false) => return Err(wrong(&mut command, format!("[{name}] has no option `{key}`"))),
                Some(true) => {}
            }
            let Some(values) = texts(value) else {
                return Err(wrong(
                    &mut command,
                    format!("[{name}] {key}: expected a value or a list of values"),
                ));
            };
            let id = key.replace('-', "_");
            command = command
                .mut_subcommand(&name, |c| c.mut_arg(id, |a| a.default_values(values).required(false)));
        }
    }
    Ok(command)
}

fn is(argument: &clap::Arg, key: &str) -> bool {
    argument.get_id().as_str() == key.replace('-', "_")
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
