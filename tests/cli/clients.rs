//! Other people's programs against ours: the official OpenAI client and Prometheus's checker.

use super::process::Server;
use crate::tiny::{NAME, OTHER, Tiny};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

pub(super) fn python_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python")
}

/// Runs a command that must succeed; `needs` says what to install where it is missing.
pub(super) fn must(command: &mut Command, needs: &str) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; {needs}"));
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed; {needs}\n{said}\n{complained}");
    said.into_owned()
}

/// The Python of a virtual environment with tests/python/requirements.txt, made on first use and when that changes. Tests that
/// want it at the same time wait for the one that makes it.
pub(super) fn python() -> PathBuf {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(environment).clone()
}

fn environment() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let (python, made_of) = (folder.join("bin/python"), folder.join("made-of.txt"));
    let requirements = std::fs::read_to_string(python_folder().join("requirements.txt")).unwrap();
    if std::fs::read_to_string(&made_of).is_ok_and(|text| text == requirements) {
        return python;
    }
    let needs = "this test needs python3 with venv and pip (Debian: python3-venv) and a package index";
    must(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder), needs);
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"];
    must(Command::new(&python).args(install).arg(python_folder().join("requirements.txt")), needs);
    // Last, so that an interrupted installation is made anew.
    std::fs::write(made_of, requirements).unwrap();
    python
}

#[test]
fn the_official_openai_client_understands_every_answer() {
    let tiny = Tiny::write();
    let folders = [NAME, OTHER].map(|name| tiny.model(name));
    let server = Server::start(&[
        folders[0].to_str().unwrap(),
        folders[1].to_str().unwrap(),
        "--api-key",
        "test-key",
        "--max-running",
        "8",
        "--max-waiting",
        "8",
    ]);
    let mut command = Command::new(python());
    command.arg(python_folder().join("openai_client.py")).args([&server.url(), "test-key"]);
    let said = must(&mut command, "see tests/python/openai_client.py");
    assert!(said.trim_end().ends_with("all checks passed"), "{said}");
}

#[test]
fn prometheus_finds_nothing_wrong_with_the_metrics() {
    let tiny = Tiny::write();
    let server = Server::start(&[tiny.model(NAME).to_str().unwrap()]);
    server.get("/v1/models");
    let (head, metrics) = server.get("/metrics");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    assert!(metrics.contains("\nprocess_resident_memory_bytes "), "the process's own are there too");
    let checker = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut checker =
        checker.unwrap_or_else(|e| panic!("promtool: {e}; install Debian's package prometheus"));
    checker.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = checker.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{metrics}");
}
