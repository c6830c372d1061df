//! What can go wrong between a reference and a component's bytes.

use std::path::PathBuf;

use super::Digest;

/// Variants carry operands; no message carries a credential.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("`{text}` names no plugin: {reason}")]
    Reference { text: String, reason: &'static str },
    #[error("not found: {what}")]
    NotFound { what: String },
    #[error("the registry refused access to {url} (HTTP {status})")]
    Denied {
        url: String,
        status: u16,
        with_credentials: bool,
    },
    #[error("the registry answered HTTP {status} for {url}")]
    Status { url: String, status: u16 },
    #[error("{url} redirects to {to}, which is not followed")]
    Redirect { url: String, to: String },
    #[error("cannot reach {url}: {source}")]
    Network { url: String, source: reqwest::Error },
    #[error("{url} did not answer in {seconds} s")]
    TooSlow { url: String, seconds: u64 },
    #[error("{url} broke off after {got} of {expected} bytes")]
    CutOff {
        url: String,
        got: u64,
        expected: u64,
    },
    #[error("{what} has more than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("{what} has {found} bytes, its manifest says {expected}")]
    Size {
        what: String,
        expected: u64,
        found: String,
    },
    #[error("{what} is not what its digest says: it is {found} and should be {expected}")]
    Tampered {
        what: String,
        expected: Digest,
        found: Digest,
    },
    #[error("{what} cannot be read: {reason}")]
    Malformed { what: String, reason: String },
    #[error("{reference} is no plugin: {reason}")]
    NotAPlugin { reference: String, reason: String },
    #[error("{reference} has a layer `{name}`, a name that would leave its folder")]
    UnsafeName { reference: String, name: String },
    #[error("{reference} is there already, and is something else: {found}; this is {pushed}")]
    Taken {
        reference: String,
        found: Digest,
        pushed: Digest,
    },
    #[error("offline, and {reference} is not in the cache")]
    Offline { reference: String },
    #[error("no credentials for {host}: {reason}")]
    Credentials { host: String, reason: String },
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl RegistryError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::Reference { .. } => "write HOST/REPOSITORY[:TAG][@sha256:…] or dir:FOLDER/NAME[:TAG][@sha256:…]",
                Self::NotFound { .. } => "check name, tag and digest: `grpo-host plugin search` lists tags",
                Self::Denied { with_credentials: false, .. } => {
                    "log in with `docker login`; the repository is private or does not exist"
                }
                Self::Denied { .. } => "the account in docker's config.json may not do this: use another, or ask its owner",
                Self::Status { status: 429, .. } => "too many requests: wait, or log in with `docker login`",
                Self::Status { .. } | Self::Network { .. } | Self::TooSlow { .. } | Self::CutOff { .. } => {
                    "try again later; HF_HUB_OFFLINE=1 uses what is in the cache"
                }
                Self::Redirect { .. } => "a registry may redirect to https only, five times at most",
                Self::TooLarge { .. } => "a plugin's component is smaller; is it something else?",
                Self::Size { .. } | Self::Tampered { .. } => {
                    "do not use it: registry, cache or line has changed it. Pull it again, or ask whoever pushed it"
                }
                Self::Malformed { .. } => "is it really an OCI registry, and a plugin?",
                Self::NotAPlugin { .. } => "push components with `grpo-host plugin push` or `wkg oci push`",
                Self::UnsafeName { .. } => "do not use it: the name is made to overwrite files",
                Self::Taken { .. } => {
                    "push it under another tag, or move this one with --force: runs that name the tag get the new one, those \
                     that have its digest keep theirs"
                }
                Self::Offline { .. } => "unset HF_HUB_OFFLINE once to pull it, or give a file",
                Self::Credentials { .. } => "log in again with `docker login`, or mend docker's config.json",
                Self::File { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                    "the disk is full: make room, or point XDG_CACHE_HOME elsewhere"
                }
                Self::File { .. } => "check the folder and its permissions",
            }
            .to_owned(),
        )
    }

    /// Worth another attempt.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Network { .. } | Self::CutOff { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429 || *status == 408,
            _ => false,
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// About what was sent, and not about the sending.
    pub(super) fn is_of_content(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. }
                | Self::TooLarge { .. }
                | Self::Size { .. }
                | Self::Tampered { .. }
                | Self::Malformed { .. }
                | Self::NotAPlugin { .. }
        )
    }
}
