//! Writing a new project: the language's files, the WIT, a README and cases for `plugin test`.

use super::{AuthoringError, Language};
use std::fs;
use std::path::Path;

/// Path in the project, and contents. `{{name}}` stands for the plugin's name.
type File = (&'static str, &'static str);

/// A file of `host/templates`.
macro_rules! file {
    ($folder:literal, $path:literal) => {
        (
            $path,
            include_str!(concat!("../../templates/", $folder, "/", $path)),
        )
    };
}

/// A file of the WIT.
macro_rules! wit {
    ($name:literal) => {
        (
            concat!("wit/", $name),
            include_str!(concat!("../../../wit/v0.1/", $name)),
        )
    };
}

/// What every project has, unless its language has another file of this path.
const SHARED: [File; 10] = [
    wit!("types.wit"),
    wit!("host.wit"),
    wit!("reward.wit"),
    wit!("formatter.wit"),
    wit!("curriculum.wit"),
    wit!("judge.wit"),
    wit!("http.wit"),
    wit!("secrets.wit"),
    ("plugin.json", include_str!("../../templates/plugin.json")),
    ("cases.jsonl", include_str!("../../templates/cases.jsonl")),
];

fn files(language: Language) -> &'static [File] {
    match language {
        Language::Rust => &[
            file!("rust", "Cargo.toml"),
            file!("rust", "README.md"),
            file!("rust", "src/lib.rs"),
        ],
        Language::C => &[
            file!("c", "README.md"),
            file!("c", "json.h"),
            file!("c", "plugin.c"),
            file!("c", "plugin.h"),
        ],
        Language::Zig => &[
            file!("zig", "README.md"),
            file!("zig", "abi.zig"),
            file!("zig", "plugin.zig"),
        ],
        Language::Python => &[file!("python", "README.md"), file!("python", "plugin.py")],
        Language::Go => &[
            file!("go", "README.md"),
            file!("go", "abi.go"),
            file!("go", "abi.s"),
            file!("go", "go.mod"),
            file!("go", "plugin.go"),
            file!("go", "plugin.json"),
        ],
        Language::Js => &[
            file!("js", "README.md"),
            file!("js", "package.json"),
            file!("js", "plugin.js"),
        ],
    }
}

/// Writes a project into the new folder `dir`, whose last part is the plugin's name.
///
/// # Errors
/// A name that no package could have, a folder that is there, and what the file system refuses.
pub fn create(language: Language, dir: &Path) -> Result<(), AuthoringError> {
    let name = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy();
    if !is_name(&name) {
        return Err(AuthoringError::Name {
            name: name.into_owned(),
        });
    }
    if dir.symlink_metadata().is_ok() {
        return Err(AuthoringError::Exists {
            dir: dir.to_owned(),
        });
    }
    for (path, text) in SHARED.iter().chain(files(language)) {
        let path = dir.join(path);
        let folder = path.parent().unwrap_or(dir);
        fs::create_dir_all(folder).map_err(AuthoringError::file(folder))?;
        let text = text.replace("{{name}}", &name);
        fs::write(&path, text).map_err(AuthoringError::file(&path))?;
    }
    Ok(())
}

/// What Cargo, npm and the plugin host all take for a name.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(plain)
}
