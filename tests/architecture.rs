//! ARCHITECTURE.md's laws, executed: floors, who may name which crate, sizes, words.

use std::path::{Path, PathBuf};

/// Each room with its floor. A room may use rooms of lower floors only.
const FLOORS: [(&str, u32); 17] = [
    ("supernet", 0),
    ("weights", 0),
    ("artifact", 1),
    ("backend", 1),
    ("data", 1),
    ("plot", 1),
    ("search", 1),
    ("text", 1),
    ("generation", 2),
    ("model", 2),
    ("engine", 3),
    ("evaluate", 3),
    ("export", 3),
    ("train", 3),
    ("server", 4),
    ("cli", 5),
    ("main", 6),
];

/// A crate and the only places that may name it.
const CRATES: [(&str, &[&str]); 13] = [
    ("axum", &["server"]),
    ("tower_http", &["server"]),
    ("hyper", &["server"]),
    ("hyper_util", &["server"]),
    ("tokio", &["server", "engine", "cli"]),
    ("candle_core", &["backend/reference", "artifact"]),
    ("cudarc", &["backend/cuda", "backend/reference"]),
    ("clap", &["cli"]),
    ("prometheus", &["server"]),
    ("indicatif", &["cli"]),
    ("gemm", &["backend/reference"]),
    ("libc", &["cli"]),
    ("jiff", &["text"]),
];

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 80;

struct Source {
    /// Relative to `src`.
    path: PathBuf,
    room: String,
    /// Without what follows `#[cfg(test)]`.
    code: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut sources) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(&root).unwrap().to_path_buf();
                let room = path.components().next().unwrap().as_os_str().to_string_lossy();
                let room = room.trim_end_matches(".rs").to_string();
                let is_test = path.file_name().is_some_and(|n| n == "tests.rs");
                let code = text
                    .split("#[cfg(test)]\nmod tests")
                    .next()
                    .filter(|_| !is_test)
                    .unwrap_or("")
                    .to_string();
                sources.push(Source { path, room, code, text });
            }
        }
    }
    assert!(sources.len() > 40, "only {} files were found", sources.len());
    sources
}

fn floor(room: &str) -> Option<u32> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

/// The rooms that a file names after `crate::`, one by one or in braces.
fn used_rooms(code: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + 7..];
        for name in rest.strip_prefix('{').map_or(vec![rest], listed) {
            let name = name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_');
            rooms.push(name.collect());
        }
    }
    rooms
}

/// The items of a list in braces, whose opening brace is gone; an item may have braces of its own.
fn listed(text: &str) -> Vec<&str> {
    let (mut items, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            '}' => {
                items.push(&text[start..at]);
                break;
            }
            ',' if depth == 0 => {
                items.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items
}

#[test]
fn a_list_of_rooms_is_taken_apart() {
    assert_eq!(
        used_rooms("use crate::{a::B, c::{D, E}, f};\nuse crate::g::H; crate::i"),
        ["a", "c", "f", "g", "i"]
    );
}

#[test]
fn a_room_uses_lower_floors_only() {
    for source in sources().iter().filter(|s| s.room != "lib") {
        let own =
            floor(&source.room).unwrap_or_else(|| panic!("{} stands on no floor", source.path.display()));
        for used in used_rooms(&source.code) {
            let Some(theirs) = floor(&used) else { continue };
            let allowed = used == source.room || theirs < own;
            assert!(allowed, "{} (floor {own}) uses {used} (floor {theirs})", source.path.display());
        }
    }
}

#[test]
fn a_crate_is_named_only_where_it_belongs() {
    for source in sources() {
        for (name, places) in CRATES {
            let named = source.code.contains(&format!("{name}::"));
            let allowed = places.iter().any(|p| source.path.starts_with(p));
            assert!(!named || allowed, "{} names {name}", source.path.display());
        }
    }
}

#[test]
fn files_and_functions_can_be_read_in_one_go() {
    for source in sources() {
        let lines = source.code.lines().count();
        assert!(lines <= FILE_LINES, "{} has {lines} lines", source.path.display());
        let mut start: Option<(usize, usize, &str)> = None;
        for (number, line) in source.code.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let is_function = line.contains("fn ") && !line.trim_start().starts_with("//");
            if start.is_none() && is_function && !line.trim_end().ends_with([';', '}']) {
                start = Some((number, indent, line));
            }
            if let Some((first, _, head)) = start.filter(|&(_, of, _)| indent == of && line.trim() == "}") {
                let lines = number - first + 1;
                assert!(
                    lines <= FUNCTION_LINES,
                    "{}: {} has {lines} lines",
                    source.path.display(),
                    head.trim()
                );
                start = None;
            }
        }
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for source in sources() {
        assert!(source.text.starts_with("//!"), "{} does not begin with //!", source.path.display());
    }
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    for source in sources() {
        for (number, line) in source.text.lines().enumerate().filter(|(_, l)| l.contains("unsafe {")) {
            let before =
                source.text.lines().skip(number.saturating_sub(4)).take(5).collect::<Vec<_>>().join("\n");
            assert!(before.contains("SAFETY:"), "{}:{}: {line}", source.path.display(), number + 1);
        }
    }
}

#[test]
fn one_word_for_one_idea() {
    // ARCHITECTURE's vocabulary; a synonym is a bug. Words that Rust or HTTP use otherwise (slice, variant, tier, page)
    // cannot be found by a machine.
    let banned = [
        "subnet",
        "subnets",
        "sub-net",
        "submodel",
        "submodels",
        "sub-model",
        "sub-models",
        "supermodel",
        "genotype",
        "individual",
        "todo!",
        "dbg!",
    ];
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-' || c == '!';
    for source in sources() {
        let text = source.text.to_lowercase();
        for word in text.split(|c| !part_of_word(c)) {
            assert!(!banned.contains(&word), "{} says `{word}`", source.path.display());
        }
    }
}
