//! The errors of this crate. Each variant carries its operands; the hint says what to do next.

use std::path::PathBuf;

/// What can go wrong between a model folder and a sampled token.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write {path}: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {reason}")]
    Malformed { path: PathBuf, reason: String },
    #[error("unsupported model architecture `{found}`")]
    Architecture { found: String },
    #[error("weight `{name}` is missing")]
    MissingWeight { name: String },
    #[error("weight `{name}` has shape {found:?}, expected {expected:?}")]
    WeightShape {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("no gradient reached `{name}`")]
    MissingGradient { name: String },
    #[error("gradient of `{name}` is not finite")]
    NonFiniteGradient { name: String },
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    ChatTemplate(String),
    #[error("request {request}: {reason}")]
    Request { request: u64, reason: String },
    #[error(
        "one sequence of {tokens} tokens needs {needed} KV blocks and the pool has {available}"
    )]
    KvExhausted {
        tokens: usize,
        needed: usize,
        available: usize,
    },
    #[error("{0}")]
    Misuse(&'static str),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl PolicyError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Architecture { .. } => "Qwen2, Qwen3 and Llama decoders are supported".to_owned(),
            Self::MissingWeight { .. } | Self::WeightShape { .. } => {
                "the weights do not belong to this config.json; download the model again".to_owned()
            }
            Self::KvExhausted { .. } => {
                "lower max_completion_length or raise kv_cache_tokens".to_owned()
            }
            Self::NonFiniteGradient { .. } => {
                "lower learning_rate, or set max_grad_norm".to_owned()
            }
            _ => return None,
        })
    }
}
