//! A model as a Hugging Face folder, and the safetensors container. Every file is synced before the call
//! returns; writing to a temporary folder and renaming it is the caller's, who knows what else is in it.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Weights;
use crate::{error::PolicyError, spec::ModelSpec, tokenizer::Tokenizer};

/// Number format of saved weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveType {
    /// Exactly what was trained; what a checkpoint needs.
    #[default]
    F32,
    /// Half the size, rounded to nearest; what inference engines load.
    Bf16,
}

impl SaveType {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Name in safetensors headers.
    fn container_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    /// Name in `config.json`.
    fn config_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// Writes `config.json`, `generation_config.json`, `model.safetensors`, `tokenizer.json`,
/// `tokenizer_config.json` and, if there is one, `chat_template.jinja` into `folder`, which exists.
///
/// Errors: [`PolicyError::Write`] naming the file; files written before it stay.
pub fn save_model(
    folder: &Path,
    spec: &ModelSpec,
    weights: &Weights,
    tokenizer: &Tokenizer,
    save_type: SaveType,
) -> Result<(), PolicyError> {
    let mut ids = Map::new();
    match tokenizer.eos_ids() {
        [] => {}
        [one] => {
            ids.insert("eos_token_id".to_owned(), json!(one));
        }
        many => {
            ids.insert("eos_token_id".to_owned(), json!(many));
        }
    }
    if let Some(id) = tokenizer.bos_id() {
        ids.insert("bos_token_id".to_owned(), json!(id));
    }
    if let Some(id) = tokenizer.pad_id() {
        ids.insert("pad_token_id".to_owned(), json!(id));
    }
    let mut config = spec.to_config_json();
    config.extend(ids.clone());
    // transformers 4 reads `torch_dtype`, 5 reads it as well as `dtype`.
    config.insert("torch_dtype".to_owned(), json!(save_type.config_name()));
    write_json(&folder.join("config.json"), &config)?;
    write_json(&folder.join("generation_config.json"), &ids)?;
    write_file(
        &folder.join("tokenizer.json"),
        tokenizer.to_json()?.as_bytes(),
    )?;
    write_json(
        &folder.join("tokenizer_config.json"),
        &tokenizer.to_config_json(),
    )?;
    if let Some(template) = tokenizer.chat_template_source() {
        write_file(&folder.join("chat_template.jinja"), template.as_bytes())?;
    }
    write_safetensors(&folder.join("model.safetensors"), weights, save_type)
}

/// Writes tensors to one safetensors file, in name order.
///
/// Streams one tensor at a time. The `safetensors` crate's writer wants either all bytes at once, a second
/// copy of the model, or a callback that cannot fail.
pub fn write_safetensors(
    path: &Path,
    weights: &Weights,
    save_type: SaveType,
) -> Result<(), PolicyError> {
    let dtype = save_type.dtype();
    let mut header = Map::new();
    // transformers refuses files that do not say which framework's layout they have.
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for (name, tensor) in weights {
        let end = offset + tensor.elem_count() * dtype.size_in_bytes();
        header.insert(
            name.clone(),
            json!({
                "dtype": save_type.container_name(),
                "shape": tensor.dims(),
                "data_offsets": [offset, end],
            }),
        );
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data starts at a multiple of 8, as the format asks; the padding is spaces.
    header.resize(header.len().next_multiple_of(8), b' ');

    let file = File::create(path).map_err(|source| write_error(path, source))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut put = |bytes: &[u8]| {
        out.write_all(bytes)
            .map_err(|source| write_error(path, source))
    };
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    for tensor in weights.values() {
        put(&little_endian(tensor, save_type)?)?;
    }
    let file = out
        .into_inner()
        .map_err(|error| write_error(path, error.into_error()))?;
    file.sync_all().map_err(|source| write_error(path, source))
}

/// The numbers of a tensor as they lie in a safetensors file.
///
/// # Errors
/// [`PolicyError::Tensor`] for a number format that does not convert.
pub fn little_endian(tensor: &Tensor, save_type: SaveType) -> Result<Vec<u8>, PolicyError> {
    let flat = tensor.flatten_all()?;
    Ok(match save_type {
        SaveType::F32 => flat
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        SaveType::Bf16 => flat
            .to_dtype(DType::BF16)?
            .to_vec1::<half::bf16>()?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
    })
}

pub(super) fn write_json(path: &Path, object: &Map<String, Value>) -> Result<(), PolicyError> {
    let text = serde_json::to_string_pretty(object).map_err(|error| PolicyError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    write_file(path, text.as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), PolicyError> {
    let mut file = File::create(path).map_err(|source| write_error(path, source))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|source| write_error(path, source))
}

fn write_error(path: &Path, source: std::io::Error) -> PolicyError {
    PolicyError::Write {
        path: path.to_owned(),
        source,
    }
}
