//! Files to bytes, safetensors to f32 tensors. Plain reads, one shard at a time: mapping the file would save
//! one copy of the largest shard and cost the only `unsafe` outside the GPU code.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Component, Path},
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::Weights;
use crate::error::{Feature, PolicyError};

pub(super) fn file(path: &Path) -> Result<Vec<u8>, PolicyError> {
    std::fs::read(path).map_err(|source| PolicyError::Read {
        path: path.to_owned(),
        source,
    })
}

pub(super) fn file_if_present(path: &Path) -> Result<Option<Vec<u8>>, PolicyError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PolicyError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Weight name → shard file name.
    weight_map: BTreeMap<String, String>,
}

/// All weights of a folder: `model.safetensors`, or the shards its index names.
pub(super) fn folder(folder: &Path) -> Result<Weights, PolicyError> {
    let index_path = folder.join("model.safetensors.index.json");
    let mut weights = Weights::new();
    let Some(index) = file_if_present(&index_path)? else {
        let path = folder.join("model.safetensors");
        safetensors(&file(&path)?, &path, &mut weights)?;
        return Ok(weights);
    };
    let malformed = |reason: String| PolicyError::Malformed {
        path: index_path.clone(),
        reason,
    };
    let index: Index =
        serde_json::from_slice(&index).map_err(|error| malformed(error.to_string()))?;
    let mut shards: Vec<&String> = index.weight_map.values().collect();
    shards.sort_unstable();
    shards.dedup();
    for shard in shards {
        // The index comes from wherever the model comes from; it must not name files outside the folder.
        let mut parts = Path::new(shard).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(malformed(format!("`{shard}` is not a file name")));
        }
        let path = folder.join(shard);
        safetensors(&file(&path)?, &path, &mut weights)?;
    }
    match index.weight_map.keys().find(|k| !weights.contains_key(*k)) {
        Some(name) => Err(PolicyError::MissingWeight { name: name.clone() }),
        None => Ok(weights),
    }
}

/// Adds the tensors of one safetensors file, converted to f32. `origin` names it in errors.
pub(super) fn safetensors(
    bytes: &[u8],
    origin: &Path,
    weights: &mut Weights,
) -> Result<(), PolicyError> {
    let malformed = |reason: String| PolicyError::Malformed {
        path: origin.to_owned(),
        reason,
    };
    let file = SafeTensors::deserialize(bytes).map_err(|error| malformed(error.to_string()))?;
    for (name, view) in file.iter() {
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => {
                return Err(PolicyError::Unsupported {
                    feature: Feature::WeightType,
                    found: format!("{other:?} of {name}"),
                });
            }
        };
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?
            .to_dtype(DType::F32)?;
        if weights.insert(name.to_owned(), tensor).is_some() {
            return Err(malformed(format!("weight `{name}` is in two files")));
        }
    }
    Ok(())
}
