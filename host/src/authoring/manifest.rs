//! `plugin.json`, a project's manifest: put into its component, and the WIT that goes with it.

use super::AuthoringError;
use crate::plugin::{Asks, Manifest};
use std::fs;
use std::path::{Path, PathBuf};

/// The manifest of a project.
pub(super) const FILE: &str = "plugin.json";
/// The WIT of a project without what it does not ask for.
const ASKED: &str = "target/wit";

/// Reads a project's manifest; `None` if it has none, and so asks for nothing.
///
/// # Errors
/// A file that cannot be read or is no manifest.
pub(super) fn read(dir: &Path) -> Result<Option<Manifest>, AuthoringError> {
    let path = dir.join(FILE);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(AuthoringError::file(&path))?,
    };
    let parsed = Manifest::parse(&text);
    parsed
        .map(Some)
        .map_err(|error| AuthoringError::Manifest { path, error })
}

/// Puts a manifest into the component at `path` of the project in `dir`.
///
/// # Errors
/// A file that cannot be read or written; one that is no component, which is removed.
pub(super) fn embed(manifest: &Manifest, dir: &Path, path: &Path) -> Result<(), AuthoringError> {
    let component = fs::read(path).map_err(AuthoringError::file(path))?;
    let whole = manifest.embed(&component).map_err(|error| {
        let reason = format!("its manifest {error}");
        let dir = dir.to_owned();
        AuthoringError::NotAPlugin { dir, reason }
    });
    let Ok(whole) = whole else {
        fs::remove_file(path).map_err(AuthoringError::file(path))?;
        return whole.map(drop);
    };
    fs::write(path, whole).map_err(AuthoringError::file(path))
}

/// Copies the project's WIT without the imports that it does not ask for, and says where to; relative to the project. Tools for
/// Python and JavaScript import all that a world has, whether it is used or not.
///
/// # Errors
/// Files that cannot be read or written.
pub(super) fn asked_wit(dir: &Path, asks: &Asks) -> Result<PathBuf, AuthoringError> {
    let (from, to) = (dir.join("wit"), dir.join(ASKED));
    fs::create_dir_all(&to).map_err(AuthoringError::file(&to))?;
    let mut left_out = Vec::new();
    for (asked, import) in [
        (asks.judge.is_some(), "import judge;"),
        (asks.http.is_some(), "import http;"),
        (!asks.secrets.is_empty(), "import secrets;"),
    ] {
        left_out.extend((!asked).then_some(import));
    }
    for entry in fs::read_dir(&from).map_err(AuthoringError::file(&from))? {
        let path = entry.map_err(AuthoringError::file(&from))?.path();
        let (Some(name), true) = (
            path.file_name(),
            path.extension().is_some_and(|e| e == "wit"),
        ) else {
            continue;
        };
        let text = fs::read_to_string(&path).map_err(AuthoringError::file(&path))?;
        let kept = text.lines().filter(|line| !left_out.contains(&line.trim()));
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        let copy = to.join(name);
        fs::write(&copy, kept).map_err(AuthoringError::file(&copy))?;
    }
    Ok(PathBuf::from(ASKED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authoring::{Language, create};

    #[test]
    fn a_template_has_a_manifest_and_a_world_of_what_it_asks() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("brevity");
        create(Language::Python, crate::types::Role::Reward, &dir).unwrap();
        let mut manifest = read(&dir).unwrap().unwrap();
        assert_eq!(manifest.name, "brevity");
        assert_eq!(manifest.asks, Asks::default());
        let reward = |asks: &Asks| {
            let to = asked_wit(&dir, asks).unwrap();
            fs::read_to_string(dir.join(to).join("reward.wit")).unwrap()
        };
        let text = reward(&manifest.asks);
        assert!(text.contains("import host;") && !text.contains("import judge;"));
        manifest.asks.judge = Some("it asks".to_owned());
        let text = reward(&manifest.asks);
        assert!(text.contains("import judge;") && !text.contains("import http;"));
        fs::write(dir.join(FILE), "{}").unwrap();
        let error = read(&dir).unwrap_err();
        assert!(
            error.to_string().contains("missing field `name`"),
            "{error}"
        );
        assert!(error.hint().is_some());
        fs::remove_file(dir.join(FILE)).unwrap();
        assert_eq!(read(&dir).unwrap(), None);
    }
}
