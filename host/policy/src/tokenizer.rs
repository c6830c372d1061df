//! Text to ids and back, with what belongs to it: end-of-text ids, special tokens, the chat template's source.
//! A `tokenizer.json` runs as it stands; one from GGUF metadata is rebuilt in [`gguf`]. Rendering
//! templates is `chat`'s business.

mod detokenizer;
mod gguf;

use serde_json::{Map, Value, json};

pub use detokenizer::Detokenizer;

use crate::{
    chat::{ChatTemplate, SpecialTokens},
    error::PolicyError,
};

/// The contents of the files beside a model that say how text becomes ids. Only `tokenizer.json` is needed.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`: names of special tokens, chat template.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `generation_config.json`: end-of-text ids.
    pub generation_config: Option<&'a [u8]>,
    /// `config.json`: end-of-text ids.
    pub config: Option<&'a [u8]>,
    /// `chat_template.jinja`; wins over the one in `tokenizer_config.json`.
    pub chat_template: Option<&'a str>,
}

/// A tokenizer and what the model's files say about its tokens.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    eos_ids: Vec<u32>,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// A tokenizer from `tokenizer.json` alone, with the end-of-text ids given: no special-token names, no
    /// chat template.
    pub fn from_json_bytes(tokenizer_json: &[u8], eos_ids: &[u32]) -> Result<Self, PolicyError> {
        let mut tokenizer = Self::from_files(&TokenizerFiles {
            tokenizer: tokenizer_json,
            ..TokenizerFiles::default()
        })?;
        tokenizer.eos_ids = eos_ids.to_vec();
        Ok(tokenizer)
    }

    /// A tokenizer from the files of a Hugging Face folder.
    ///
    /// Errors: [`PolicyError::Tokenizer`] when a file is not what its name says, or a special token it names
    /// is not in the vocabulary.
    pub fn from_files(files: &TokenizerFiles<'_>) -> Result<Self, PolicyError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(files.tokenizer)
            .map_err(|e| PolicyError::Tokenizer(format!("tokenizer.json: {e}")))?;
        // Limits saved with a tokenizer are those of somebody's data pipeline.
        inner
            .with_truncation(None)
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))?
            .with_padding(None);
        let config = object("tokenizer_config.json", files.tokenizer_config)?;
        let special = SpecialTokens {
            bos: token_text(&config, "bos_token"),
            eos: token_text(&config, "eos_token"),
            pad: token_text(&config, "pad_token"),
            unk: token_text(&config, "unk_token"),
        };
        // As transformers' generate: the model's config speaks only where generation_config.json does not.
        let generation = object("generation_config.json", files.generation_config)?;
        let mut eos_ids = ids("generation_config.json", &generation, "eos_token_id")?;
        if eos_ids.is_empty() {
            let model = object("config.json", files.config)?;
            eos_ids = ids("config.json", &model, "eos_token_id")?;
        }
        if let Some(text) = &special.eos {
            eos_ids.push(inner.token_to_id(text).ok_or_else(|| {
                PolicyError::Tokenizer(format!("eos_token `{text}` is not in the vocabulary"))
            })?);
        }
        let mut seen = std::collections::HashSet::new();
        eos_ids.retain(|id| seen.insert(*id));
        let chat_template = files
            .chat_template
            .map(str::to_owned)
            .or_else(|| template_text(&config));
        Ok(Self {
            inner,
            special,
            eos_ids,
            chat_template,
        })
    }

    /// Ids of `text`; special tokens written out in it are recognised. `add_special` adds what the
    /// tokenizer's post-processor adds (Llama 3: beginning of text).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, PolicyError> {
        self.inner
            .encode_fast(text, add_special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))
    }

    /// Ids of a prompt: with the beginning-of-text token if this tokenizer uses one and `text`, say from a
    /// chat template, does not start with it already.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, PolicyError> {
        let has_bos = self
            .special
            .bos
            .as_ref()
            .is_some_and(|bos| !bos.is_empty() && text.starts_with(bos.as_str()));
        self.encode(text, !has_bos)
    }

    /// Text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, PolicyError> {
        self.inner
            .decode(ids, true)
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))
    }

    /// Text of `ids` with special tokens written out.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, PolicyError> {
        self.inner
            .decode(ids, false)
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))
    }

    /// Tokens that end a completion; the model's own first. Empty when no file names one.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Beginning-of-text token, if the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.special.bos.as_deref()?)
    }

    /// Padding token, else the first end-of-text token.
    pub fn pad_id(&self) -> Option<u32> {
        self.special
            .pad
            .as_deref()
            .and_then(|pad| self.inner.token_to_id(pad))
            .or_else(|| self.eos_ids.first().copied())
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Text of a token, as the vocabulary writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Id of a token by its exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The model's chat template, compiled.
    ///
    /// Errors: [`PolicyError::ChatTemplate`] when the model has none or it is not valid.
    pub fn chat_template(&self) -> Result<ChatTemplate, PolicyError> {
        let source = self
            .chat_template
            .as_deref()
            .ok_or_else(|| PolicyError::ChatTemplate("the model has none".to_owned()))?;
        ChatTemplate::new(source, self.special.clone())
    }

    /// Source of the chat template, for export.
    pub fn chat_template_source(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// `tokenizer.json`, for export.
    pub fn to_json(&self) -> Result<String, PolicyError> {
        self.inner
            .to_string(true)
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))
    }

    /// `tokenizer_config.json` without the chat template, for export.
    pub fn to_config_json(&self) -> Map<String, Value> {
        let mut config = Map::new();
        config.insert(
            "tokenizer_class".to_owned(),
            json!("PreTrainedTokenizerFast"),
        );
        config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        for (key, token) in self.special.named() {
            if let Some(token) = token {
                config.insert(key.to_owned(), json!(token));
            }
        }
        config
    }
}

/// A JSON object, empty when there is no file.
fn object(name: &str, bytes: Option<&[u8]>) -> Result<Map<String, Value>, PolicyError> {
    bytes.map_or_else(
        || Ok(Map::new()),
        |bytes| {
            serde_json::from_slice(bytes)
                .map_err(|e| PolicyError::Tokenizer(format!("{name}: {e}")))
        },
    )
}

/// A token given as text or, in older files, as a serialised `AddedToken`.
fn token_text(config: &Map<String, Value>, key: &str) -> Option<String> {
    let value = config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    Some(text.to_owned())
}

/// One id, a list of ids, or nothing.
fn ids(file: &str, config: &Map<String, Value>, key: &str) -> Result<Vec<u32>, PolicyError> {
    let id = |value: &Value| {
        value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| PolicyError::Tokenizer(format!("{file}: `{key}` has `{value}`")))
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

/// The template in `tokenizer_config.json`: text, or a list of named ones of which `default` counts.
fn template_text(config: &Map<String, Value>) -> Option<String> {
    let template = match config.get("chat_template")? {
        Value::Array(named) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))?
            .get("template")?,
        one => one,
    };
    template.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests;
