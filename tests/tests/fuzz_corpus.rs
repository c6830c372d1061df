//! Inputs of the fuzz targets, on stable Rust: those they begin with, and those that once found something.
//!
//! `cargo xtask fuzz` looks for more; CONTRIBUTING.md says how to keep what it finds.

#[path = "../fuzz/harness/mod.rs"]
mod fuzz;

use std::fs;
use std::path::Path;

fn replay(target: &str, at_least: usize, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(
        files.len() >= at_least,
        "{} inputs of {target}",
        files.len()
    );
    for file in files {
        println!("{}", file.display());
        run(&fs::read(&file).unwrap());
    }
}

#[test]
fn components_of_the_corpus() {
    replay("component", 30, fuzz::components::run);
}

#[test]
fn verdicts_of_the_corpus() {
    replay("verdicts", 26, fuzz::verdicts::run);
}
