//! Parquet files through the crate's record API: small data sets, so rows beat column batches here.

use std::{fs::File, path::Path};

use super::{DataError, Object};
use parquet::{
    errors::ParquetError,
    file::{reader::FileReader, serialized_reader::SerializedFileReader},
};

pub(super) fn read(path: &Path, limit: Option<usize>) -> Result<Vec<Object>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Read {
        path: path.to_owned(),
        source,
    })?;
    rows(file, limit).map_err(|source| DataError::Parquet {
        path: path.to_owned(),
        source,
    })
}

fn rows(file: File, limit: Option<usize>) -> Result<Vec<Object>, ParquetError> {
    let reader = SerializedFileReader::new(file)?;
    let rows = reader.get_row_iter(None)?.take(limit.unwrap_or(usize::MAX));
    rows.map(|row| {
        let columns = row?.into_columns();
        Ok(columns
            .into_iter()
            .map(|(name, field)| (name, field.to_json_value()))
            .collect())
    })
    .collect()
}
