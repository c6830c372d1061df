//! What can go wrong between a hub and the cache.

use std::path::PathBuf;

/// Variants carry operands; no message carries the token.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("not found on the hub: {url}")]
    NotFound { url: String },
    #[error("the hub refused access to {url} (HTTP {status})")]
    Denied {
        url: String,
        status: u16,
        with_token: bool,
    },
    #[error("the hub answered HTTP {status} for {url}")]
    Status { url: String, status: u16 },
    #[error("cannot reach {url}: {source}")]
    Network { url: String, source: reqwest::Error },
    #[error("{url} broke off after {got} of {expected} bytes")]
    CutOff {
        url: String,
        got: u64,
        expected: u64,
    },
    #[error("unexpected answer from {url}: {reason}")]
    Malformed { url: String, reason: String },
    #[error("{url} has SHA-256 {found}, the hub announced {expected}")]
    Checksum {
        url: String,
        expected: String,
        found: String,
    },
    #[error("offline, and {} is not in the cache", target(id, file))]
    Offline { id: String, file: Option<String> },
    #[error("{id}: the hub names a file `{name}` that would leave the cache folder")]
    UnsafeName { id: String, name: String },
    #[error("{id} has no weights this host reads; files found: {}", found.join(", "))]
    NoWeights { id: String, found: Vec<String> },
    #[error("{id}: the weight index names `{shard}`, which the repository does not have")]
    MissingShard { id: String, shard: String },
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl HubError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::NotFound { .. } => "check the id, the revision and the file name",
                Self::Denied { with_token: false, .. } => {
                    "set HF_TOKEN; the repository is private, gated or does not exist"
                }
                Self::Denied { .. } => {
                    "the token has no access: accept the repository's terms on its page, or use another"
                }
                Self::Status { status: 429, .. } => "too many requests: wait, or set HF_TOKEN",
                Self::Status { .. } | Self::Network { .. } | Self::CutOff { .. } => {
                    "run the command again: the download continues where it stopped. For another hub \
                     set HF_ENDPOINT"
                }
                Self::Checksum { .. } => "the damaged download was removed; run the command again",
                Self::Offline { .. } => "unset HF_HUB_OFFLINE once to download it, or pass a local path",
                Self::NoWeights { .. } => {
                    "the repository must have model.safetensors, its shards with an index, or one .gguf"
                }
                Self::File { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                    "the disk of the cache is full: make room, or point HF_HOME elsewhere"
                }
                Self::Malformed { .. } => "is HF_ENDPOINT really a Hugging Face hub?",
                Self::UnsafeName { .. } | Self::MissingShard { .. } | Self::File { .. } => {
                    return None;
                }
            }
            .to_owned(),
        )
    }

    /// Worth another attempt, or the cached copy instead.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Network { .. } | Self::CutOff { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429 || *status == 408,
            _ => false,
        }
    }
}

fn target(id: &str, file: &Option<String>) -> String {
    file.as_ref()
        .map_or_else(|| id.to_owned(), |file| format!("{file} of {id}"))
}
