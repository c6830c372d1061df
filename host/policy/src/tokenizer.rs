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
        let inner = tokenizers::Tokenizer::from_bytes(tokenizer_json)
            .map_err(|e| PolicyError::Tokenizer(e.to_string()))?;
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
