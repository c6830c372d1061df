//! Text and ids. Placeholder: what the engine calls, until the loader of tokenizer files is in.

use crate::error::PolicyError;

/// A tokenizer and its end-of-text ids.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos_ids: Vec<u32>,
}

impl Tokenizer {
    /// A tokenizer from `tokenizer.json`, with the end-of-text ids given.
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
            eos_ids: eos_ids.to_vec(),
        })
    }

    /// Text of `ids` without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, PolicyError> {
        self.inner
            .decode(ids, true)
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))
    }

    /// Tokens that end a completion.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }
}

/// Incremental decoder of one sequence; special tokens are skipped.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    window: Vec<u32>,
    emitted: usize,
}

impl Detokenizer {
    /// Takes one token and returns the text that is now certain, often empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, PolicyError> {
        self.window.push(id);
        let text = tokenizer.decode(&self.window)?;
        let certain = text.trim_end_matches('\u{fffd}');
        let new = certain.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted += new.len();
        Ok(new)
    }
}
