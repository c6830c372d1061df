//! Models from disk and back: Hugging Face folders (safetensors, sharded too), GGUF files, PEFT adapters.
//! Weights become f32 tensors on the CPU under their Hugging Face names, checked against the spec; what is
//! computed with them is the backend's business, where the files come from the caller's.

mod gguf;
mod lora;
mod random;
mod read;
mod save;

use std::{collections::BTreeMap, path::Path};

use candle_core::Tensor;

pub(crate) use lora::random_a;
pub use lora::{ALL_LINEAR, Adapter, LoraConfig, load_adapter, merge, save_adapter};
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
    /// Exactly the names and shapes of [`ModelSpec::weight_shapes`].
    pub tensors: Weights,
    pub tokenizer: Tokenizer,
}

/// Loads a Hugging Face folder or a GGUF file.
///
/// Errors: [`PolicyError::Read`] for missing files, [`PolicyError::AdapterFolder`] for a LoRA adapter without
/// its base, [`PolicyError::Architecture`] and [`PolicyError::Unsupported`] for models that cannot run here,
/// [`PolicyError::MissingWeight`], [`PolicyError::WeightShape`] and [`PolicyError::UnexpectedWeight`] when
/// weights and config do not belong together.
pub fn load(path: &Path) -> Result<LoadedModel, PolicyError> {
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
    let tensors = checked(&spec, read::folder(path)?, &config_path)?;
    Ok(LoadedModel {
        spec,
        tensors,
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
    let tensors = checked(&spec, tensors, origin)?;
    Ok(LoadedModel {
        spec,
        tensors,
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
    let tensors = checked(&spec, gguf::tensors(&mut file, &spec)?, path)?;
    Ok(LoadedModel {
        spec,
        tensors,
        tokenizer,
    })
}

/// Holds weights to the spec: every weight there in its shape, and none left over but buffers that can be
/// computed and a copy of tied embeddings.
fn checked(spec: &ModelSpec, mut found: Weights, origin: &Path) -> Result<Weights, PolicyError> {
    let mut weights = Weights::new();
    for (name, expected) in spec.weight_shapes() {
        let Some(tensor) = found.remove(&name) else {
            return Err(PolicyError::MissingWeight { name });
        };
        if tensor.dims() != expected {
            return Err(PolicyError::WeightShape {
                name,
                found: tensor.dims().to_vec(),
                expected,
            });
        }
        weights.insert(name, tensor);
    }
    found.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    if spec.tie_word_embeddings
        && let (Some(head), Some(embedding)) = (
            found.remove("lm_head.weight"),
            weights.get("model.embed_tokens.weight"),
        )
    {
        refuse_other_head(&head, embedding, origin)?;
    }
    match found.into_keys().next() {
        Some(name) => Err(PolicyError::UnexpectedWeight { name }),
        None => Ok(weights),
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
