//! Files and folders of rows on disk.

use std::path::{Path, PathBuf};

use super::{DataError, Dataset, LoadOptions, Object, assemble, jsonl, parquet};

/// What a file's extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Format {
    Parquet,
    Jsonl,
    Json,
}

impl Format {
    pub(super) fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// Loads a file, or every data file directly in a folder in the order of their names.
///
/// # Errors
/// A missing file, a format we do not read, a damaged or empty one, a missing column.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Dataset, DataError> {
    let files = if path.is_dir() {
        folder(path)?
    } else {
        vec![path.to_owned()]
    };
    load_files(&files, path.display().to_string(), options)
}

/// Rows of JSONL text that is already in memory (the embedded dataset). `name` stands in messages.
pub fn parse_jsonl(text: &str, name: &str, options: &LoadOptions) -> Result<Dataset, DataError> {
    let objects = jsonl::lines(text.as_bytes(), Path::new(name), options.limit)?;
    assemble(objects, name.to_owned(), options)
}

pub(super) fn load_files(
    files: &[PathBuf],
    source: String,
    options: &LoadOptions,
) -> Result<Dataset, DataError> {
    let mut objects: Vec<Object> = Vec::new();
    for path in files {
        let left = options
            .limit
            .map(|limit| limit.saturating_sub(objects.len()));
        if left == Some(0) {
            break;
        }
        objects.extend(read(path, left)?);
    }
    assemble(objects, source, options)
}

fn read(path: &Path, limit: Option<usize>) -> Result<Vec<Object>, DataError> {
    if !path.exists() {
        return Err(DataError::NotFound {
            path: path.to_owned(),
        });
    }
    match Format::of(path) {
        Some(Format::Parquet) => parquet::read(path, limit),
        Some(Format::Jsonl) => jsonl::read_lines(path, limit),
        Some(Format::Json) => jsonl::read_document(path, limit),
        None => Err(DataError::UnknownFormat {
            path: path.to_owned(),
        }),
    }
}

fn folder(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let fail = |source| DataError::Read {
        path: path.to_owned(),
        source,
    };
    let entries = std::fs::read_dir(path).map_err(fail)?;
    let mut files = entries
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<Vec<PathBuf>, _>>()
        .map_err(fail)?;
    files.retain(|file| file.is_file() && Format::of(file).is_some());
    files.sort();
    Ok(files)
}
