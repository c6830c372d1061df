//! Models from disk and back: Hugging Face folders (safetensors, sharded too), GGUF files, PEFT adapters.
//! Weights become f32 tensors on the CPU under their Hugging Face names, checked against the spec, or stay in the blocks of
//! their file; what is computed with them is the backend's business, where the files come from the caller's.

mod gguf;
mod lora;
mod quantized;
mod random;
mod read;
mod save;

use std::{collections::BTreeMap, path::Path};

use candle_core::Tensor;

pub(crate) use lora::random_a;
pub use lora::{ALL_LINEAR, Adapter, LoraConfig, load_adapter, merge, save_adapter};
pub use quantized::{Quantized, QuantizedMatrix};
pub use random::random_weights;
pub use save::{SaveType, little_endian, save_model, write_safetensors};

use crate::{
    error::PolicyError,
    gguf::Gguf,
    spec::ModelSpec,
    tokenizer::{Tokenizer, TokenizerFiles},
};

/// Weights by Hugging Face name, f32, contiguous, on the CPU.
pub type Weights = BTreeMap<String, Tensor>;

/// A model ready for a backend.
#[derive(Debug)]
pub struct LoadedModel {
    pub spec: ModelSpec,
    /// With `quantized` exactly the names and shapes of [`ModelSpec::weight_shapes`].
    pub tensors: Weights,
    /// Matrices that are still as a GGUF file has them.
    pub quantized: Quantized,
    pub tokenizer: Tokenizer,
}

impl LoadedModel {
    /// Moves every matrix to `tensors`, as f32.
    ///
    /// # Errors
    /// candle's.
    pub fn dequantize(&mut self) -> Result<(), PolicyError> {
        // One by one, so that a matrix is in memory twice but not the model.
        while let Some((name, matrix)) = self.quantized.pop_first() {
            self.tensors.insert(name, matrix.dequantize()?);
        }
        Ok(())
    }
}

/// Loads a Hugging Face folder or a GGUF file, all of it in f32.
///
/// Errors: as [`load_as_stored`].
pub fn load(path: &Path) -> Result<LoadedModel, PolicyError> {
    let mut model = load_as_stored(path)?;
    model.dequantize()?;
    Ok(model)
}

/// Loads a Hugging Face folder or a GGUF file, whose quantised matrices stay so.
///
/// Errors: [`PolicyError::Read`] for missing files, [`PolicyError::AdapterFolder`] for a LoRA adapter without
/// its base, [`PolicyError::Architecture`] and [`PolicyError::Unsupported`] for models that cannot run here,
/// [`PolicyError::MissingWeight`], [`PolicyError::WeightShape`] and [`PolicyError::UnexpectedWeight`] when
/// weights and config do not belong together.
pub fn load_as_stored(path: &Path) -> Result<LoadedModel, PolicyError> {
    if path.extension().is_some_and(|e| e == "gguf") {
        return load_gguf(path);
    }
    let config_path = path.join("config.json");
    let adapter_config = path.join("adapter_config.json");
    if adapter_config.exists() && !config_path.exists() {
        let base = lora::base_model(&read::file(&adapter_config)?, &adapter_config)?;
        return Err(PolicyError::AdapterFolder {
            path: path.to_owned(),
            base,
        });
    }
    let config = read::file(&config_path)?;
    let spec = ModelSpec::from_config_json(&config, &config_path)?;
    let template_path = path.join("chat_template.jinja");
    let template = read::file_if_present(&template_path)?
        .map(|bytes| {
            String::from_utf8(bytes).map_err(|error| PolicyError::Malformed {
                path: template_path,
                reason: error.to_string(),
            })
        })
        .transpose()?;
    let tokenizer = Tokenizer::from_files(&TokenizerFiles {
        tokenizer: &read::file(&path.join("tokenizer.json"))?,
        tokenizer_config: read::file_if_present(&path.join("tokenizer_config.json"))?.as_deref(),
        generation_config: read::file_if_present(&path.join("generation_config.json"))?.as_deref(),
        config: Some(&config),
        chat_template: template.as_deref(),
    })?;
    let found = (read::folder(path)?, Quantized::new());
    let (tensors, quantized) = checked(&spec, found, &config_path)?;
    Ok(LoadedModel {
        spec,
        tensors,
        quantized,
        tokenizer,
    })
}

/// Loads a model whose files are in memory (the one embedded in the binary). Errors as [`load`].
pub fn from_bytes(
    config: &[u8],
    safetensors: &[u8],
    tokenizer: &[u8],
    tokenizer_config: &[u8],
) -> Result<LoadedModel, PolicyError> {
    let origin = Path::new("config.json");
    let spec = ModelSpec::from_config_json(config, origin)?;
    let tokenizer = Tokenizer::from_files(&TokenizerFiles {
        tokenizer,
        tokenizer_config: Some(tokenizer_config),
        config: Some(config),
        ..TokenizerFiles::default()
    })?;
    let mut tensors = Weights::new();
    read::safetensors(safetensors, Path::new("model.safetensors"), &mut tensors)?;
    let (tensors, quantized) = checked(&spec, (tensors, Quantized::new()), origin)?;
    Ok(LoadedModel {
        spec,
        tensors,
        quantized,
        tokenizer,
    })
}

/// Reads one safetensors file, whatever its names mean.
pub fn read_safetensors(path: &Path) -> Result<Weights, PolicyError> {
    let mut tensors = Weights::new();
    read::safetensors(&read::file(path)?, path, &mut tensors)?;
    Ok(tensors)
}

fn load_gguf(path: &Path) -> Result<LoadedModel, PolicyError> {
    let mut file = Gguf::open(path)?;
    let spec = ModelSpec::from_gguf(&mut file)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let (tensors, quantized) = checked(&spec, gguf::tensors(&mut file, &spec)?, path)?;
    Ok(LoadedModel {
        spec,
        tensors,
        quantized,
        tokenizer,
    })
}

/// Holds weights to the spec: every weight there in its shape, and none left over but buffers that can be
/// computed and a copy of tied embeddings.
fn checked(
    spec: &ModelSpec,
    found: (Weights, Quantized),
    origin: &Path,
) -> Result<(Weights, Quantized), PolicyError> {
    let (mut found, mut found_blocks) = found;
    let (mut weights, mut blocks) = (Weights::new(), Quantized::new());
    for (name, expected) in spec.weight_shapes() {
        let dims = match (found.remove(&name), found_blocks.remove(&name)) {
            (Some(tensor), _) => {
                let dims = tensor.dims().to_vec();
                weights.insert(name.clone(), tensor);
                dims
            }
            (None, Some(matrix)) => {
                let dims = matrix.dims().to_vec();
                blocks.insert(name.clone(), matrix);
                dims
            }
            (None, None) => return Err(PolicyError::MissingWeight { name }),
        };
        if dims != expected {
            return Err(PolicyError::WeightShape {
                name,
                found: dims,
                expected,
            });
        }
    }
    found.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    if spec.tie_word_embeddings {
        let (head, embedding) = ("lm_head.weight", "model.embed_tokens.weight");
        let head = dense(found.remove(head), found_blocks.remove(head))?;
        let embedding = || {
            dense(
                weights.get(embedding).cloned(),
                blocks.get(embedding).cloned(),
            )
        };
        if let Some(head) = head
            && let Some(embedding) = embedding()?
        {
            refuse_other_head(&head, &embedding, origin)?;
        }
    }
    match found.into_keys().chain(found_blocks.into_keys()).next() {
        Some(name) => Err(PolicyError::UnexpectedWeight { name }),
        None => Ok((weights, blocks)),
    }
}

/// A weight in whichever form it is there.
fn dense(
    tensor: Option<Tensor>,
    blocks: Option<QuantizedMatrix>,
) -> Result<Option<Tensor>, PolicyError> {
    match (tensor, blocks) {
        (None, Some(blocks)) => Ok(Some(blocks.dequantize()?)),
        (tensor, _) => Ok(tensor),
    }
}

/// Some exporters write tied embeddings twice. Two different matrices mean that the config is wrong, and
/// dropping one of them would silently be another model.
fn refuse_other_head(head: &Tensor, embedding: &Tensor, origin: &Path) -> Result<(), PolicyError> {
    let same = head.dims() == embedding.dims()
        && head.flatten_all()?.to_vec1::<f32>()? == embedding.flatten_all()?.to_vec1::<f32>()?;
    if same {
        return Ok(());
    }
    Err(PolicyError::Malformed {
        path: origin.to_owned(),
        reason: "tie_word_embeddings is true but lm_head.weight differs from the embedding"
            .to_owned(),
    })
}

#[cfg(test)]
mod tests;
