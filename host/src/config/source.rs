//! Whether a model or dataset is the embedded one, on disk, or on a hub. Opens nothing.

use std::path::{Path, PathBuf};

/// Where a model or dataset comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the binary.
    Embedded,
    Path(PathBuf),
    /// `owner/name`.
    Hub(String),
}

impl Source {
    /// Reads a config value. What exists on disk is a path; else `owner/name` is a hub id and anything
    /// else a path, so that a mistyped path is reported as a missing file and not asked of a hub.
    pub fn of(value: Option<&str>) -> Self {
        let Some(text) = value else {
            return Self::Embedded;
        };
        if !Path::new(text).exists() && is_hub_id(text) {
            return Self::Hub(text.to_owned());
        }
        Self::Path(PathBuf::from(text))
    }
}

fn is_hub_id(text: &str) -> bool {
    let file_like = [".gguf", ".safetensors", ".json", ".jsonl", ".parquet"]
        .iter()
        .any(|end| text.ends_with(end));
    let word = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    !file_like
        && text
            .split_once('/')
            .is_some_and(|(owner, name)| word(owner) && word(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_hub_or_embedded() {
        assert_eq!(Source::of(None), Source::Embedded);
        assert_eq!(
            Source::of(Some("Qwen/Qwen2.5-0.5B")),
            Source::Hub("Qwen/Qwen2.5-0.5B".into())
        );
        for path in [
            "rows.jsonl",
            "data/rows.jsonl",
            "./a/b",
            "/a/b",
            "a/b/c",
            "a/",
            "src/config",
        ] {
            assert_eq!(Source::of(Some(path)), Source::Path(path.into()), "{path}");
        }
    }
}
