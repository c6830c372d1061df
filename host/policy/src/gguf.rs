//! An open GGUF file and typed access to its metadata. What the keys mean is known by those who ask:
//! `spec` (shape), `weights` (tensors), `tokenizer` (vocabulary).

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Tensor,
    quantized::{
        QTensor,
        gguf_file::{Content, Value},
    },
};

use crate::error::{PolicyError, plainly};

/// A GGUF file whose header has been read.
pub(crate) struct Gguf {
    pub(crate) path: PathBuf,
    pub(crate) content: Content,
    file: BufReader<File>,
}

impl Gguf {
    pub(crate) fn open(path: &Path) -> Result<Self, PolicyError> {
        let file = File::open(path).map_err(|source| PolicyError::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let content = Content::read(&mut file).map_err(|error| PolicyError::Malformed {
            path: path.to_owned(),
            reason: plainly(&error),
        })?;
        Ok(Self {
            path: path.to_owned(),
            content,
            file,
        })
    }

    /// A tensor, dequantized to f32, dimensions in row-major order.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor, PolicyError> {
        self.stored(name)?
            .dequantize(&Device::Cpu)
            .map_err(|error| self.malformed(format!("tensor `{name}`: {}", plainly(&error))))
    }

    /// The same as the file has it.
    pub(crate) fn stored(&mut self, name: &str) -> Result<QTensor, PolicyError> {
        // candle panics at a tensor of no bytes, which is what too many come to as well.
        if let Some(info) = self.content.tensor_infos.get(name) {
            let mut dims = info.shape.dims().iter();
            let elements = dims.try_fold(1usize, |all, dim| all.checked_mul(*dim));
            let bytes = elements.and_then(|n| n.checked_mul(info.ggml_dtype.type_size()));
            if bytes.is_none_or(|bytes| bytes == 0) {
                let dims = info.shape.dims();
                return Err(self.malformed(format!("tensor `{name}` has dimensions {dims:?}")));
            }
        }
        self.content
            .tensor(&mut self.file, name, &Device::Cpu)
            .map_err(|error| self.malformed(format!("tensor `{name}`: {}", plainly(&error))))
    }

    pub(crate) fn malformed(&self, reason: String) -> PolicyError {
        PolicyError::Malformed {
            path: self.path.clone(),
            reason,
        }
    }

    /// An integer of any width; `None` when the key is absent.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<usize>, PolicyError> {
        self.content
            .metadata
            .get(key)
            .map(|value| {
                unsigned(value).ok_or_else(|| self.malformed(format!("`{key}` is not a count")))
            })
            .transpose()
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, PolicyError> {
        self.content
            .metadata
            .get(key)
            .map(|value| match value {
                // Shortest decimal that is this f32: 9.999999747378752e-6 in the file means 1e-5.
                Value::F32(x) => x
                    .to_string()
                    .parse()
                    .map_err(|error| self.malformed(format!("`{key}`: {error}"))),
                Value::F64(x) => Ok(*x),
                _ => Err(self.malformed(format!("`{key}` is not a float"))),
            })
            .transpose()
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, PolicyError> {
        self.content
            .metadata
            .get(key)
            .map(|value| match value {
                Value::Bool(b) => Ok(*b),
                _ => Err(self.malformed(format!("`{key}` is not a boolean"))),
            })
            .transpose()
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, PolicyError> {
        self.content
            .metadata
            .get(key)
            .map(|value| match value {
                Value::String(s) => Ok(s.as_str()),
                _ => Err(self.malformed(format!("`{key}` is not a string"))),
            })
            .transpose()
    }

    /// An array of strings; an error when the key is absent.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&str>, PolicyError> {
        let Some(Value::Array(values)) = self.content.metadata.get(key) else {
            return Err(self.malformed(format!("`{key}` is missing or not an array")));
        };
        values
            .iter()
            .map(|value| match value {
                Value::String(s) => Ok(s.as_str()),
                _ => Err(self.malformed(format!("`{key}` holds something else than strings"))),
            })
            .collect()
    }

    /// An array of integers; `None` when the key is absent.
    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<usize>>, PolicyError> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => values
                .iter()
                .map(unsigned)
                .collect::<Option<Vec<_>>>()
                .map(Some)
                .ok_or_else(|| self.malformed(format!("`{key}` holds something else than counts"))),
            Some(_) => Err(self.malformed(format!("`{key}` is not an array"))),
        }
    }
}

fn unsigned(value: &Value) -> Option<usize> {
    match value {
        Value::U8(n) => Some((*n).into()),
        Value::U16(n) => Some((*n).into()),
        Value::U32(n) => usize::try_from(*n).ok(),
        Value::U64(n) => usize::try_from(*n).ok(),
        Value::I8(n) => usize::try_from(*n).ok(),
        Value::I16(n) => usize::try_from(*n).ok(),
        Value::I32(n) => usize::try_from(*n).ok(),
        Value::I64(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}
