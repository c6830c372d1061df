//! A little Parquet: named columns of a few types in one row group, and typed access to rows read back.
//!
//! The crate's Arrow front end would do this too, at the price of the whole of Arrow in the build.

use std::{fs::File, io::Write, path::Path, sync::Arc};

use parquet::{
    basic::{Compression, ZstdLevel},
    data_type::{ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type},
    errors::{ParquetError, Result},
    file::{
        properties::WriterProperties,
        reader::FileReader,
        serialized_reader::SerializedFileReader,
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    record::Field,
    schema::parser::parse_message_type,
};

use super::RunError;

/// One column, a value per row.
pub(super) enum Column<'a> {
    Int(Vec<i64>),
    Float(Vec<f64>),
    OptionalFloat(Vec<Option<f64>>),
    Text(Vec<&'a str>),
    OptionalText(Vec<Option<&'a str>>),
    Ids(Vec<&'a [u32]>),
    Floats(Vec<&'a [f32]>),
}

impl Column<'_> {
    fn schema(&self, name: &str) -> String {
        let list = |element: &str| {
            format!(
                "REQUIRED GROUP {name} (LIST) {{ REPEATED GROUP list {{ REQUIRED {element}; }} }}"
            )
        };
        match self {
            Self::Int(_) => format!("REQUIRED INT64 {name};"),
            Self::Float(_) => format!("REQUIRED DOUBLE {name};"),
            Self::OptionalFloat(_) => format!("OPTIONAL DOUBLE {name};"),
            Self::Text(_) => format!("REQUIRED BYTE_ARRAY {name} (STRING);"),
            Self::OptionalText(_) => format!("OPTIONAL BYTE_ARRAY {name} (STRING);"),
            Self::Ids(_) => list("INT32 element (INTEGER(32,false))"),
            Self::Floats(_) => list("FLOAT element"),
        }
    }

    fn write<W: Write + Send>(&self, group: &mut SerializedRowGroupWriter<'_, W>) -> Result<()> {
        match self {
            Self::Int(values) => put::<Int64Type, _>(group, values, None),
            Self::Float(values) => put::<DoubleType, _>(group, values, None),
            Self::OptionalFloat(values) => {
                let present: Vec<f64> = values.iter().flatten().copied().collect();
                let levels: Vec<i16> = values.iter().map(|v| i16::from(v.is_some())).collect();
                put::<DoubleType, _>(group, &present, Some((&levels, None)))
            }
            Self::Text(values) => {
                let bytes: Vec<ByteArray> = values.iter().map(|s| ByteArray::from(*s)).collect();
                put::<ByteArrayType, _>(group, &bytes, None)
            }
            Self::OptionalText(values) => {
                let present: Vec<ByteArray> = values
                    .iter()
                    .flatten()
                    .map(|s| ByteArray::from(*s))
                    .collect();
                let levels: Vec<i16> = values.iter().map(|v| i16::from(v.is_some())).collect();
                put::<ByteArrayType, _>(group, &present, Some((&levels, None)))
            }
            Self::Ids(lists) => {
                // INT32 annotated as unsigned: the bits are kept.
                let flat: Vec<i32> = lists
                    .iter()
                    .flat_map(|l| l.iter().map(|id| id.cast_signed()))
                    .collect();
                let (definition, repetition) = list_levels(lists.iter().map(|l| l.len()));
                put::<Int32Type, _>(group, &flat, Some((&definition, Some(&repetition))))
            }
            Self::Floats(lists) => {
                let flat: Vec<f32> = lists.concat();
                let (definition, repetition) = list_levels(lists.iter().map(|l| l.len()));
                put::<FloatType, _>(group, &flat, Some((&definition, Some(&repetition))))
            }
        }
    }
}

/// Definition and repetition levels of lists of these lengths: an element is 1, an empty list 0; the
/// first entry of a row repeats at level 0, the others at 1.
fn list_levels(lengths: impl Iterator<Item = usize>) -> (Vec<i16>, Vec<i16>) {
    let (mut definition, mut repetition) = (Vec::new(), Vec::new());
    for length in lengths {
        definition.extend(std::iter::repeat_n(i16::from(length > 0), length.max(1)));
        repetition.push(0);
        repetition.extend(std::iter::repeat_n(1, length.saturating_sub(1)));
    }
    (definition, repetition)
}

/// Definition levels, and repetition levels for lists.
type Levels<'a> = Option<(&'a [i16], Option<&'a [i16]>)>;

fn put<T: DataType, W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[T::T],
    levels: Levels<'_>,
) -> Result<()> {
    let missing = || ParquetError::General("the schema has fewer columns than the data".into());
    let mut column = group.next_column()?.ok_or_else(missing)?;
    let (definition, repetition) = levels.map_or((None, None), |(d, r)| (Some(d), r));
    column
        .typed::<T>()
        .write_batch(values, definition, repetition)?;
    column.close()
}

/// Writes the columns, all of the same length, as one row group.
pub(super) fn write(out: impl Write + Send, columns: &[(&str, Column<'_>)]) -> Result<()> {
    let fields: String = columns
        .iter()
        .map(|(name, column)| column.schema(name))
        .collect();
    let schema = Arc::new(parse_message_type(&format!(
        "message rollouts {{ {fields} }}"
    ))?);
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let properties = Arc::new(WriterProperties::builder().set_compression(zstd).build());
    let mut writer = SerializedFileWriter::new(out, schema, properties)?;
    let mut group = writer.next_row_group()?;
    for (_, column) in columns {
        column.write(&mut group)?;
    }
    group.close()?;
    writer.close()?;
    Ok(())
}

/// One row read back, and where it is, for messages.
pub(super) struct Record<'a> {
    path: &'a Path,
    row: usize,
    fields: Vec<(String, Field)>,
}

/// Reads all rows of a file.
pub(super) fn read(path: &Path) -> std::result::Result<Vec<Record<'_>>, RunError> {
    let file = File::open(path).map_err(|source| RunError::Read {
        path: path.to_owned(),
        source,
    })?;
    let rows = || -> Result<Vec<Record<'_>>> {
        let reader = SerializedFileReader::new(file)?;
        let rows = reader.get_row_iter(None)?.enumerate();
        rows.map(|(row, r)| {
            Ok(Record {
                path,
                row,
                fields: r?.into_columns(),
            })
        })
        .collect()
    };
    rows().map_err(|source| RunError::Parquet {
        path: path.to_owned(),
        source,
    })
}

impl Record<'_> {
    /// Whether the file has this column.
    pub(super) fn has(&self, column: &str) -> bool {
        self.fields.iter().any(|(name, _)| name == column)
    }

    fn field<T>(
        &self,
        column: &'static str,
        convert: impl Fn(&Field) -> Option<T>,
    ) -> std::result::Result<T, RunError> {
        let field = self.fields.iter().find(|(name, _)| name == column);
        field
            .and_then(|(_, f)| convert(f))
            .ok_or_else(|| RunError::Column {
                path: self.path.to_owned(),
                column,
                row: self.row,
            })
    }

    pub(super) fn int<T: TryFrom<i64>>(
        &self,
        column: &'static str,
    ) -> std::result::Result<T, RunError> {
        self.field(column, |f| match f {
            Field::Long(n) => T::try_from(*n).ok(),
            _ => None,
        })
    }

    pub(super) fn float(&self, column: &'static str) -> std::result::Result<f64, RunError> {
        self.field(column, float)
    }

    pub(super) fn optional_float(
        &self,
        column: &'static str,
    ) -> std::result::Result<Option<f64>, RunError> {
        self.field(column, |f| {
            if matches!(f, Field::Null) {
                Some(None)
            } else {
                float(f).map(Some)
            }
        })
    }

    pub(super) fn text(&self, column: &'static str) -> std::result::Result<String, RunError> {
        self.field(column, text)
    }

    pub(super) fn optional_text(
        &self,
        column: &'static str,
    ) -> std::result::Result<Option<String>, RunError> {
        self.field(column, |f| {
            if matches!(f, Field::Null) {
                Some(None)
            } else {
                text(f).map(Some)
            }
        })
    }

    pub(super) fn ids(&self, column: &'static str) -> std::result::Result<Vec<u32>, RunError> {
        self.list(column, |f| match f {
            Field::UInt(n) => Some(*n),
            _ => None,
        })
    }

    pub(super) fn floats(&self, column: &'static str) -> std::result::Result<Vec<f32>, RunError> {
        self.list(column, |f| match f {
            Field::Float(x) => Some(*x),
            _ => None,
        })
    }

    fn list<T>(
        &self,
        column: &'static str,
        element: impl Fn(&Field) -> Option<T>,
    ) -> std::result::Result<Vec<T>, RunError> {
        self.field(column, |f| match f {
            Field::ListInternal(list) => list.elements().iter().map(&element).collect(),
            _ => None,
        })
    }
}

fn float(field: &Field) -> Option<f64> {
    match field {
        Field::Double(x) => Some(*x),
        _ => None,
    }
}

fn text(field: &Field) -> Option<String> {
    match field {
        Field::Str(s) => Some(s.clone()),
        _ => None,
    }
}
