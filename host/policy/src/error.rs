//! The errors of this crate. Each variant carries its operands; the hint says what to do next.

use std::path::PathBuf;

/// A property of a model that the decoder here does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    Adapter,
    Activation,
    GgufTokenizer,
    MixtureOfExperts,
    MlpBias,
    PartialRotary,
    PreTokenizer,
    QuantizedWeights,
    RopeScaling,
    SlidingWindow,
    WeightType,
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Activation => "activation",
            Self::Adapter => "adapter kind",
            Self::GgufTokenizer => "GGUF tokenizer model",
            Self::MixtureOfExperts => "mixture of experts",
            Self::MlpBias => "MLP bias",
            Self::PartialRotary => "partial rotary factor",
            Self::PreTokenizer => "GGUF pre-tokenizer",
            Self::QuantizedWeights => "quantized weights",
            Self::RopeScaling => "RoPE scaling",
            Self::SlidingWindow => "sliding-window attention",
            Self::WeightType => "weight type",
        })
    }
}

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
    #[error("the model needs {feature} `{found}`, which is not supported")]
    Unsupported { feature: Feature, found: String },
    #[error("{path} is a LoRA adapter of `{base}`, not a model")]
    AdapterFolder { path: PathBuf, base: String },
    #[error("weight `{name}` is missing")]
    MissingWeight { name: String },
    #[error("weight `{name}` has shape {found:?}, expected {expected:?}")]
    WeightShape {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("weight `{name}` is not part of this architecture")]
    UnexpectedWeight { name: String },
    #[error("no gradient reached `{name}`")]
    MissingGradient { name: String },
    #[error("gradient of `{name}` is not finite")]
    NonFiniteGradient { name: String },
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    ChatTemplate(String),
    #[error("logits of the token at position {position} are not finite")]
    NonFiniteLogits { position: usize },
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
    #[error("LoRA target `{target}` names no linear layer")]
    LoraTarget { target: String, known: String },
    #[error(
        "{what} needs {:.1} GiB of memory and {:.1} GiB are free",
        gib(*needed),
        gib(*free)
    )]
    Memory {
        what: &'static str,
        needed: u64,
        free: u64,
    },
    #[error("the draft's vocabulary has {draft} tokens and the policy's {policy}")]
    DraftVocabulary { draft: usize, policy: usize },
    /// This rank of a group is whole, and cannot go on without the one that is not.
    #[error("another rank of the run has failed")]
    RankFailed,
    #[error("{0}")]
    Misuse(&'static str),
    #[error(transparent)]
    Cuda(#[from] crate::backend::cuda::CudaError),
    #[error("{}", plainly(.0))]
    Tensor(#[from] candle_core::Error),
}

/// The message without the backtrace that candle appends where RUST_BACKTRACE is set.
pub(crate) fn plainly(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1u32 << 30)
}

impl PolicyError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Architecture { .. } => "Qwen2, Qwen3 and Llama decoders are supported".to_owned(),
            // Everything this crate reads is part of a model.
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "a model is a Hugging Face folder (config.json, tokenizer.json, model.safetensors) \
                 or a .gguf file"
                    .to_owned()
            }
            Self::Write { source, .. } if is_full(source.kind()) => {
                "no room left: free some space and go on with `--resume`; the last checkpoint is \
                 intact"
                    .to_owned()
            }
            Self::Malformed { .. } => {
                "the file is damaged or not what its name says; download it again".to_owned()
            }
            Self::Unsupported { feature, .. } => match feature {
                Feature::QuantizedWeights | Feature::WeightType => {
                    "use the f32, bf16 or f16 weights, or a GGUF file".to_owned()
                }
                Feature::GgufTokenizer | Feature::PreTokenizer => {
                    "use the model's Hugging Face folder, which has a tokenizer.json".to_owned()
                }
                Feature::Adapter => "merge the adapter into its base model with PEFT".to_owned(),
                _ => "Qwen2, Qwen3 and Llama decoders with full attention are supported".to_owned(),
            },
            Self::AdapterFolder { base, .. } => {
                format!("pass the base model `{base}`, or merge the adapter into it first")
            }
            Self::MissingWeight { .. }
            | Self::WeightShape { .. }
            | Self::UnexpectedWeight { .. } => {
                "the weights do not belong to this config.json; download the model again".to_owned()
            }
            Self::ChatTemplate(_) => "let the formatter return text instead of messages, or use `rollout --raw`".to_owned(),
            Self::LoraTarget { known, .. } => format!("use {known} or all-linear"),
            Self::Memory { .. } => {
                "lower kv_cache_tokens, max_batch_size or max_completion_length".to_owned()
            }
            Self::DraftVocabulary { .. } => {
                "take a draft whose config.json has the policy's vocab_size (models of one family may be padded differently), or --draft ngram".to_owned()
            }
            Self::KvExhausted { .. } => {
                "lower max_completion_length or raise kv_cache_tokens".to_owned()
            }
            Self::NonFiniteLogits { .. } => {
                "in a run the weights have diverged: go back to an earlier checkpoint with a lower \
                 learning_rate; a model that never trained here is damaged: fetch it again"
                    .to_owned()
            }
            Self::Cuda(error) => return error.hint(),
            Self::NonFiniteGradient { .. } => {
                "lower learning_rate, or set max_grad_norm".to_owned()
            }
            _ => return None,
        })
    }
}

fn is_full(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(kind, StorageFull | QuotaExceeded | FileTooLarge)
}
