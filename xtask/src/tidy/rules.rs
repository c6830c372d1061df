//! The rules themselves. ARCHITECTURE.md says why each exists.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    File, Finding,
    code::{crate_rooms, first_word, has_word, starts_of},
};

/// Longest header and longest file, in lines.
const MAX_HEADER: usize = 12;
const MAX_LINES: usize = 500;
/// Files kept shorter than the rest, because they are the map of the program.
const SHORT_FILES: [(&str, usize); 2] = [("host/src/main.rs", 60), ("host/src/trainer.rs", 300)];
/// Rooms that never see each other nor those who put them together.
const ROOMS: [&str; 5] = ["plugin", "grpo", "data", "run", "registry"];
const ABOVE_ROOMS: [&str; 3] = ["trainer", "commands", "cli"];
/// Crate (by prefix of its name) → the one folder of `host/` that may name it.
const ONLY_IN: [(&str, &str); 3] = [
    ("wasmtime", "host/src/plugin"),
    ("candle_", "host/policy/"),
    ("cudarc", "host/policy/src/backend/cuda"),
];
/// Crates that `grpo-policy` never names.
const NOT_IN_POLICY: [&str; 3] = ["wasmtime", "tokio", "reqwest"];
/// The one folder with `unsafe`.
const UNSAFE_IN: &str = "host/policy/src/backend/cuda";
/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 7] = [
    "utils", "util", "helpers", "helper", "common", "misc", "manager",
];
/// Where the host may print.
const PRINTERS: [&str; 4] = [
    "host/src/commands",
    "host/src/main.rs",
    "host/src/cli",
    "host/src/error.rs",
];

/// Rules that need one file only.
pub(super) fn of_file(file: &File, findings: &mut Vec<Finding>) {
    let mut report = |rule, message: String| {
        findings.push(Finding {
            rule,
            path: file.path.clone(),
            message,
        });
    };
    layering(file, &mut report);
    size(file, &mut report);
    names(file, &mut report);
    words(file, &mut report);
}

fn layering(file: &File, report: &mut impl FnMut(&'static str, String)) {
    if let Some(room) = room_of(&file.path) {
        for seen in crate_rooms(&file.code) {
            let other = ROOMS.contains(&seen) && seen != room;
            if other || ABOVE_ROOMS.contains(&seen) {
                report("layering", format!("`{room}` must not see `crate::{seen}`"));
            }
        }
    }
    if file.path.starts_with("host/policy/") {
        for name in NOT_IN_POLICY
            .iter()
            .filter(|name| has_word(&file.code, name))
        {
            report("layering", format!("grpo-policy must not know `{name}`"));
        }
    }
    if !file.path.starts_with("host/") {
        return;
    }
    for (name, home) in ONLY_IN {
        if !file.path.starts_with(home) && has_crate(&file.code, name) {
            report("layering", format!("`{name}` is for {home} only"));
        }
    }
}

/// `host/src/plugin/x.rs` and `host/src/plugin.rs` are in room `plugin`.
fn room_of(path: &str) -> Option<&'static str> {
    let inside = path.strip_prefix("host/src/")?;
    let top = inside.split(['/', '.']).next()?;
    ROOMS.into_iter().find(|room| *room == top)
}

/// Whether a path starts at the crate `name`, or at one whose name starts so if `name` ends in `_`.
fn has_crate(code: &str, name: &str) -> bool {
    if !name.ends_with('_') {
        return has_word(code, name);
    }
    code.match_indices(name)
        .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

fn size(file: &File, report: &mut impl FnMut(&'static str, String)) {
    let header = file
        .text
        .lines()
        .take_while(|line| line.starts_with("//!"))
        .count();
    if header == 0 {
        report("header", "does not open with a `//!` header".to_owned());
    }
    if header > MAX_HEADER {
        report(
            "header",
            format!("header of {header} lines, at most {MAX_HEADER}"),
        );
    }
    let lines = file.text.lines().count();
    let most = SHORT_FILES
        .iter()
        .find(|(path, _)| *path == file.path)
        .map_or(MAX_LINES, |(_, most)| *most);
    if lines > most {
        report("size", format!("{lines} lines, at most {most}"));
    }
}

fn names(file: &File, report: &mut impl FnMut(&'static str, String)) {
    // Folders and files are modules; `mod x { … }` inside a file is another.
    let parts = file.path.trim_end_matches(".rs").split('/');
    let inline = starts_of(&file.code, "mod").filter_map(|end| first_word(&file.code[end..]));
    let modules: BTreeSet<&str> = parts.chain(inline).collect();
    for name in EMPTY_NAMES.iter().filter(|name| modules.contains(*name)) {
        report("names", format!("`{name}` says nothing; name what it does"));
    }
}

fn words(file: &File, report: &mut impl FnMut(&'static str, String)) {
    if !file.path.starts_with(UNSAFE_IN) && has_word(&file.code, "unsafe") {
        report("unsafe", format!("`unsafe` is for {UNSAFE_IN} only"));
    }
    let quiet = file.path.starts_with("host/")
        && !PRINTERS
            .iter()
            .any(|printer| file.path.starts_with(printer));
    for name in ["println", "print", "eprintln", "eprint"] {
        let printed = starts_of(&file.code, name).any(|end| file.code[end..].starts_with('!'));
        if quiet && printed {
            report(
                "print",
                format!("`{name}!` is for commands, main, cli and error"),
            );
        }
    }
    for name in ["todo", "unimplemented"] {
        if starts_of(&file.code, name).any(|end| file.code[end..].starts_with('!')) {
            report("todo", format!("`{name}!` is left"));
        }
    }
}

/// Traits of ours need two implementors, tests' included; else the type itself would do.
pub(super) fn traits(files: &[File], findings: &mut Vec<Finding>) {
    let mut implemented: BTreeMap<String, usize> = BTreeMap::new();
    for file in files {
        for end in starts_of(&file.code, "impl") {
            if let Some(name) = implemented_trait(&file.code[end..]) {
                *implemented.entry(name).or_default() += 1;
            }
        }
    }
    for file in files {
        for name in starts_of(&file.code, "trait").filter_map(|end| first_word(&file.code[end..])) {
            let count = implemented.get(name).copied().unwrap_or(0);
            if count < 2 {
                findings.push(Finding {
                    rule: "traits",
                    path: file.path.clone(),
                    message: format!("trait `{name}` has {count} implementor(s), at least 2"),
                });
            }
        }
    }
}

/// Name of the trait in what follows `impl`: `<T> a::Name<T> for X {` gives `Name`.
fn implemented_trait(after: &str) -> Option<String> {
    // rustfmt breaks long heads over lines.
    let head: Vec<&str> = after[..after.find(['{', ';'])?]
        .split_whitespace()
        .collect();
    let head = head.join(" ");
    let path = &head[..head.find(" for ")?];
    // Generics of the impl itself come first, those of the trait last.
    let path = match path.strip_prefix('<') {
        Some(generics) => &generics[closing(generics)?..],
        None => path,
    };
    let path = path.split('<').next()?.trim();
    path.rsplit("::")
        .next()
        .and_then(first_word)
        .map(str::to_owned)
}

/// Offset behind the `>` that closes a just opened `<`.
fn closing(generics: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, c) in generics.char_indices() {
        match c {
            '<' => depth += 1,
            '>' if !generics[..at].ends_with('-') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// ARCHITECTURE.md names every room: the folders of sources and the modules of both crates.
pub(super) fn map(files: &[File], map: &str, findings: &mut Vec<Finding>) {
    let mut rooms = BTreeSet::new();
    for path in files.iter().map(|file| file.path.as_str()) {
        rooms.extend(path.split('/').next());
        for source in ["host/src/", "host/policy/src/"] {
            let top = path
                .strip_prefix(source)
                .and_then(|inside| inside.split(['/', '.']).next());
            rooms.extend(top.filter(|top| !["lib", "main"].contains(top)));
        }
    }
    for room in rooms.into_iter().filter(|room| !has_word(map, room)) {
        findings.push(Finding {
            rule: "map",
            path: "ARCHITECTURE.md".to_owned(),
            message: format!("does not mention `{room}`"),
        });
    }
}
