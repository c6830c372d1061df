//! JSON text: one object per line, or one array of objects per file.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde_json::Value;

use super::{DataError, Object};

const BOM: &[u8] = b"\xef\xbb\xbf";

pub(super) fn read_lines(path: &Path, limit: Option<usize>) -> Result<Vec<Object>, DataError> {
    let file = File::open(path).map_err(|source| fail(path, source))?;
    lines(BufReader::new(file), path, limit)
}

/// One object per line; blank lines are skipped, a byte-order mark is ignored.
pub(super) fn lines(
    mut text: impl BufRead,
    path: &Path,
    limit: Option<usize>,
) -> Result<Vec<Object>, DataError> {
    let mut objects = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        // Bytes, not `lines()`: invalid UTF-8 becomes a JSON error that has its line number.
        let n = text
            .read_until(b'\n', &mut line)
            .map_err(|source| fail(path, source))?;
        if n == 0 || limit.is_some_and(|limit| objects.len() >= limit) {
            break;
        }
        let body = if number == 1 {
            line.strip_prefix(BOM).unwrap_or(&line)
        } else {
            &line
        };
        if !body.trim_ascii().is_empty() {
            // Without the line feed, which would be the error in place of a text that is not closed.
            let value = serde_json::from_slice(body.trim_ascii_end())
                .map_err(|e| malformed(path, number, &e))?;
            objects.push(object(value, path, number)?);
        }
    }
    Ok(objects)
}

/// A `.json` file: an array of objects, or lines after all (many datasets name JSONL so).
pub(super) fn read_document(path: &Path, limit: Option<usize>) -> Result<Vec<Object>, DataError> {
    let bytes = std::fs::read(path).map_err(|source| fail(path, source))?;
    let body = bytes.strip_prefix(BOM).unwrap_or(&bytes);
    if body.trim_ascii_start().first() != Some(&b'[') {
        return lines(body, path, limit);
    }
    let values: Vec<Value> =
        serde_json::from_slice(body).map_err(|e| malformed(path, e.line(), &e))?;
    let limit = limit.unwrap_or(usize::MAX);
    // Lines of array elements are not kept by the parser; the element's number is the next best.
    let numbered = values.into_iter().take(limit).enumerate();
    numbered
        .map(|(i, value)| object(value, path, i + 1))
        .collect()
}

fn object(value: Value, path: &Path, line: usize) -> Result<Object, DataError> {
    let found = match value {
        Value::Object(object) => return Ok(object),
        Value::Array(_) => "an array",
        Value::String(_) => "a string",
        Value::Number(_) => "a number",
        Value::Bool(_) => "a boolean",
        Value::Null => "null",
    };
    Err(DataError::NotAnObject {
        path: path.to_owned(),
        line,
        found,
    })
}

fn malformed(path: &Path, line: usize, error: &serde_json::Error) -> DataError {
    // serde_json appends " at line 1 column 7" of the slice it saw; only the column is true here.
    let text = error.to_string();
    let what = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(what, _)| what);
    let reason = format!("{what} at column {}", error.column());
    DataError::Json {
        path: path.to_owned(),
        line,
        reason,
    }
}

fn fail(path: &Path, source: std::io::Error) -> DataError {
    DataError::Read {
        path: path.to_owned(),
        source,
    }
}
