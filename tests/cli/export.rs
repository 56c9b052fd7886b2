//! `lonas export` as a process: what other people's libraries read, what is refused, what is left behind.

use super::clients::{must, python, python_folder};
use super::process::lonas;
use crate::files::{Folder, assert_names};
use crate::golden;
use crate::tiny::{NAME, Tiny};
use std::path::Path;
use std::process::{Command, Output};

fn export(tiny: &Tiny, out: &Path, more: &[&str]) -> Output {
    lonas(&["export"]).arg(tiny.model(NAME)).arg("--out").arg(out).args(more).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    names.sort();
    names
}

#[test]
fn gguf_py_and_safetensors_read_every_format_and_numpy_computes_pytorchs_logits() {
    let folder = Folder::empty();
    let mut command = Command::new(python());
    command.arg(python_folder().join("exports.py")).arg(env!("CARGO_BIN_EXE_lonas"));
    command.arg(golden::path("")).arg(folder.path());
    let said = must(&mut command, "see tests/python/exports.py");
    assert!(said.trim_end().ends_with("all checks passed"), "{said}");
}

#[test]
fn a_folder_gets_a_model_card_that_says_what_it_is() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    std::fs::write(tiny.base().join("README.md"), "---\nlicense: cc-by-4.0\n---\nTiny.\n").unwrap();
    for (format, subnetwork, files) in [
        ("gguf", "heuristic", &["README.md", "tiny-tied-heuristic.gguf"][..]),
        (
            "hf",
            "minimal",
            &[
                "README.md",
                "chat_template.jinja",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
            ],
        ),
        ("peft", "maximal", &["README.md", "adapter_config.json", "adapter_model.safetensors"]),
    ] {
        let out = folder.file(format);
        let output = export(&tiny, &out, &["--subnetwork", subnetwork, "--format", format]);
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(names(&out), files);
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        for expected in [
            &format!("# tiny-tied:{subnetwork}\n"),
            "license: cc-by-4.0\n",
            "| MLP width | ",
            "| query heads | ",
            "## Load it",
            "## Choices",
        ] {
            assert!(card.contains(expected), "{expected}: {card}");
        }
        #[cfg(unix)]
        for name in names(&out) {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(out.join(&name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o444, 0o444, "{name} can be read by everybody");
        }
    }
    assert_eq!(names(folder.path()), ["gguf", "hf", "peft"], "nothing is left beside them");
}

#[test]
fn what_cannot_be_exported_ends_with_1_or_2_and_leaves_nothing() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    folder.write("file", "x");
    let cases: [(i32, &[&str], &str, &str); 9] = [
        (2, &["--format", "gguf"], "a.gguf", "--subnetwork"),
        (2, &["--format", "onnx", "--subnetwork", "minimal"], "a", "onnx"),
        (2, &["--format", "gguf", "--subnetwork", "minimal", "--dtype", "q4"], "a.gguf", "q4"),
        (
            1,
            &["--format", "gguf", "--subnetwork", "huge"],
            "a.gguf",
            "huge: the catalog has maximal, heuristic, minimal",
        ),
        (1, &["--format", "hf", "--subnetwork", "minimal", "--dtype", "q8_0"], "a", "q8_0"),
        (1, &["--format", "peft", "--subnetwork", "minimal"], "a", "mlp.gate_proj"),
        (
            1,
            &["--format", "hf", "--subnetwork", "minimal"],
            "file",
            "file: there is something already; give another --out",
        ),
        (1, &["--format", "hf", "--subnetwork", "minimal"], "no/such/folder", "no/such/folder"),
        (1, &["--format", "gguf", "--subnetwork", "minimal"], "file/a.gguf", "file/a.gguf"),
    ];
    for (code, more, out, named) in cases {
        let output = export(&tiny, &folder.file(out), more);
        assert_eq!(output.status.code(), Some(code), "{more:?}: {}", said(&output));
        assert_names(&said(&output), &[named]);
        assert_eq!(names(folder.path()), ["file"], "{more:?}");
    }
    assert_eq!(folder.read("file"), b"x");
}

#[test]
fn a_file_is_replaced_only_when_asked_to() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    let to = |out: &Path, subnetwork: &str, more: &[&str]| {
        let output = export(&tiny, out, &[&["--format", "gguf", "--subnetwork", subnetwork], more].concat());
        (output.status.success(), said(&output))
    };
    let file = folder.file("a.gguf");
    assert!(to(&file, "maximal", &[]).0);
    let first = folder.read("a.gguf");
    let (_, refused) = to(&file, "minimal", &[]);
    assert_names(&refused, &["a.gguf", "--overwrite"]);
    assert!(folder.read("a.gguf") == first);
    assert!(to(&file, "minimal", &["--overwrite"]).0);
    assert!(folder.read("a.gguf").starts_with(b"GGUF") && folder.read("a.gguf") != first);
    assert_eq!(names(folder.path()), ["a.gguf"]);
}

/// A GGUF file that is none of ours.
fn foreign() -> Vec<u8> {
    std::fs::read(golden::path("gguf/plain.gguf")).unwrap()
}

#[test]
fn what_no_export_wrote_is_never_replaced() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    let refused = |out: &Path, format: &str, subnetwork: &str, named: &str| {
        let more = ["--format", format, "--subnetwork", subnetwork, "--overwrite"];
        let output = export(&tiny, out, &more);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert_names(&said(&output), &[named]);
    };
    for (name, contents) in [("text.gguf", b"x".to_vec()), ("own.gguf", foreign())] {
        folder.write(name, &contents);
        refused(&folder.file(name), "gguf", "minimal", "no export wrote it");
        assert!(folder.read(name) == contents);
    }
    // Names that an export has, but not its files; then its files, and one more.
    let own = folder.file("own");
    std::fs::create_dir(&own).unwrap();
    for name in ["own-finetune.gguf", "another.gguf", "README.md"] {
        std::fs::write(own.join(name), foreign()).unwrap();
    }
    refused(&own, "gguf", "minimal", ".gguf`, which nothing of this kind wrote");
    assert_eq!(names(&own), ["README.md", "another.gguf", "own-finetune.gguf"]);
    let ours = folder.file("ours");
    let first = export(&tiny, &ours, &["--format", "gguf", "--subnetwork", "maximal"]);
    assert!(first.status.success(), "{}", said(&first));
    std::fs::write(ours.join("own-finetune.gguf"), foreign()).unwrap();
    refused(&ours, "gguf", "minimal", "`own-finetune.gguf`");
    std::fs::remove_file(ours.join("own-finetune.gguf")).unwrap();
    let again = export(&tiny, &ours, &["--format", "gguf", "--subnetwork", "minimal", "--overwrite"]);
    assert!(again.status.success(), "{}", said(&again));
    assert_eq!(names(&ours), ["README.md", "tiny-tied-minimal.gguf"]);
    // A base beside the super-network and an adapter of somebody else have the same names as exports.
    for (format, name) in [("hf", "base"), ("peft", "adapter")] {
        let copy = folder.file(name);
        std::fs::create_dir(&copy).unwrap();
        let from = if format == "hf" { tiny.base() } else { golden::path("adapters/f32") };
        for file in ["config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"] {
            if from.join(file).exists() {
                std::fs::copy(from.join(file), copy.join(file)).unwrap();
            }
        }
        std::fs::write(copy.join("README.md"), "Mine.\n").unwrap();
        let before = names(&copy);
        refused(&copy, format, "maximal", "no model card");
        assert_eq!(names(&copy), before);
    }
}

#[test]
fn an_export_lies_apart_from_what_it_is_made_of() {
    let tiny = Tiny::write();
    for (out, format, named) in [
        (tiny.base(), "hf", "it is the base"),
        (tiny.base().join("new"), "hf", "it lies in the base"),
        (tiny.model(NAME), "peft", "it is the super-adapter's model folder"),
        (tiny.model(NAME).join("a.gguf"), "gguf", "it lies in the super-adapter's model folder"),
        (tiny.base().join(".."), "gguf", "it holds the base"),
    ] {
        for more in [&[][..], &["--overwrite"]] {
            let before = (names(&tiny.base()), names(&tiny.model(NAME)));
            let with = [&["--format", format, "--subnetwork", "maximal"], more].concat();
            let output = export(&tiny, &out, &with);
            assert_eq!(output.status.code(), Some(1), "{}", said(&output));
            assert_names(&said(&output), &[named]);
            assert_eq!((names(&tiny.base()), names(&tiny.model(NAME))), before);
        }
    }
}

/// A file may grow to a limit here; a full disk ends a write in the same way.
#[cfg(unix)]
#[test]
fn a_write_that_fails_is_named_and_leaves_nothing_half_written() {
    let (tiny, folder) = (Tiny::write(), Folder::empty());
    for (format, name) in [("gguf", "a.gguf"), ("hf", "a"), ("peft", "a")] {
        let program = env!("CARGO_BIN_EXE_lonas");
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"", program, "export"]);
        command.arg(tiny.model(NAME)).arg("--out").arg(folder.file(name));
        let output = command.args(["--format", format, "--subnetwork", "maximal"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{format}: {}", said(&output));
        assert_names(&said(&output), &["large"]);
        assert_eq!(names(folder.path()), [""; 0], "{format}");
    }
}
