//! The rules of this repository that neither rustc nor clippy knows: who may see whom, how long a file
//! may be, which names are refused. A test of the workspace runs them.
//!
//! Rules look at words of the code with comments and strings blanked, not at syntax trees: simple, and
//! exact enough for code that rustfmt has formatted.

mod code;
mod rules;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// Folders with Rust of ours.
const SOURCES: [&str; 5] = ["host", "plugins", "tests", "xtask", "examples"];

/// One breach of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Name of the rule.
    pub rule: &'static str,
    /// Path relative to the root, with `/`.
    pub path: String,
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} [{}]", self.path, self.message, self.rule)
    }
}

/// A Rust file as the rules see it.
struct File {
    /// Relative to the root, with `/`.
    path: String,
    text: String,
    /// `text` with comments and strings blanked.
    code: String,
}

/// The root of the workspace this was built from.
pub fn workspace_root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// Holds every rule against the tree at `root`. Fails only if the tree cannot be read.
pub fn check(root: &Path) -> io::Result<Vec<Finding>> {
    let mut files = Vec::new();
    for folder in SOURCES {
        let folder = root.join(folder);
        if folder.is_dir() {
            collect(root, &folder, &mut files)?;
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let mut findings = Vec::new();
    for file in &files {
        rules::of_file(file, &mut findings);
    }
    rules::traits(&files, &mut findings);
    let map = root.join("ARCHITECTURE.md");
    let map = match fs::read_to_string(&map) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    rules::map(&files, &map, &mut findings);
    Ok(findings)
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<File>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                collect(root, &path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)?;
            let relative = path.strip_prefix(root).unwrap_or(&path);
            files.push(File {
                path: relative.to_string_lossy().replace('\\', "/"),
                code: code::without_comments_and_strings(&text),
                text,
            });
        }
    }
    Ok(())
}
