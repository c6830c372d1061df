//! Models and datasets from a Hugging Face hub, through the cache layout that its own tools use
//! (`models--org--name/{blobs,refs,snapshots}`), so that one download serves both.
//!
//! Owns names, the cache and downloads. `hf-hub` 1.0 was looked at first: it starts a cut download from
//! zero again and brings the Xet stack along. Blocking calls: never use a [`Hub`] on an async thread.

mod cache;
mod error;
mod http;
mod model;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use cache::Cache;
pub use error::HubError;
use http::Http;

/// Where the hub is and how it may be used. Read from `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and
/// `HF_HUB_OFFLINE` by `cli`; nothing here reads the environment.
#[derive(Clone)]
pub struct HubConfig {
    /// Such as `https://huggingface.co`.
    pub endpoint: String,
    pub token: Option<String>,
    /// The folder that holds `models--org--name`; usually `~/.cache/huggingface/hub`.
    pub cache_dir: PathBuf,
    /// Use what is cached and never the network.
    pub offline: bool,
    /// Attempts for one request or one file before giving up, at least 1.
    pub attempts: u32,
    /// Wait before the second attempt; doubles with each further one.
    pub backoff: Duration,
}

impl HubConfig {
    /// The public hub, five attempts from half a second on.
    pub fn new(cache_dir: PathBuf) -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            cache_dir,
            offline: false,
            attempts: 5,
            backoff: Duration::from_millis(500),
        }
    }
}

/// Not derived: a token must never reach a log.
impl std::fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RepoKind {
    Model,
    Dataset,
}

/// A repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repo {
    pub kind: RepoKind,
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl Repo {
    /// A model at `main`.
    pub fn model(id: &str) -> Self {
        Self {
            kind: RepoKind::Model,
            id: id.to_owned(),
            revision: "main".to_owned(),
        }
    }

    /// A dataset at `main`.
    pub fn dataset(id: &str) -> Self {
        Self {
            kind: RepoKind::Dataset,
            ..Self::model(id)
        }
    }

    /// The same at another branch, tag or commit.
    pub fn at(self, revision: &str) -> Self {
        Self {
            revision: revision.to_owned(),
            ..self
        }
    }
}

/// A repository at one commit. Files of a commit never change, so a cached one is never asked for again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub repo: Repo,
    pub commit: String,
    /// Paths in the repository; when `cached`, only those downloaded before.
    pub files: Vec<String>,
    /// Taken from the cache, because of offline mode or because the hub did not answer.
    pub cached: bool,
}

/// Bytes of a file that have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    pub file: &'a str,
    pub done: u64,
    pub total: Option<u64>,
}

/// Access to one hub.
pub struct Hub {
    http: Http,
    cache: Cache,
    offline: bool,
}

impl Hub {
    /// Connects to nothing yet.
    pub fn new(config: &HubConfig) -> Result<Self, HubError> {
        Ok(Self {
            http: Http::new(config)?,
            cache: Cache::new(&config.cache_dir),
            offline: config.offline,
        })
    }

    /// Asks which commit the revision names and which files it has. A hub that cannot be reached counts
    /// as offline mode when the revision was cached before.
    pub fn resolve(&self, repo: &Repo) -> Result<Snapshot, HubError> {
        cache::check_name(repo, &repo.id)?;
        cache::check_name(repo, &repo.revision)?;
        if self.offline {
            return self.cache.snapshot(repo)?.ok_or_else(|| HubError::Offline {
                id: repo.id.clone(),
                file: None,
            });
        }
        let info = match self.http.repo_info(repo) {
            Ok(info) => info,
            Err(error) if error.is_transient() => {
                return self.cache.snapshot(repo)?.ok_or(error);
            }
            Err(error) => return Err(error),
        };
        for name in info.files.iter().chain([&info.commit]) {
            cache::check_name(repo, name)?;
        }
        self.cache.write_ref(repo, &info.commit)?;
        Ok(Snapshot {
            repo: repo.clone(),
            commit: info.commit,
            files: info.files,
            cached: false,
        })
    }

    /// Path of one file of the snapshot, downloaded if it is not cached. A download cut off earlier is
    /// continued where it stopped.
    pub fn file(
        &self,
        snapshot: &Snapshot,
        name: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        cache::check_name(&snapshot.repo, name)?;
        let pointer = self.cache.pointer(&snapshot.repo, &snapshot.commit, name);
        // `exists` follows the link: a pointer whose blob was deleted is downloaded again.
        if pointer.exists() {
            return Ok(pointer);
        }
        if self.offline {
            let id = snapshot.repo.id.clone();
            return Err(HubError::Offline {
                id,
                file: Some(name.to_owned()),
            });
        }
        let remote = self.http.metadata(&snapshot.repo, &snapshot.commit, name)?;
        let blob = self.cache.blob(&snapshot.repo, &remote.etag);
        if !blob.exists() {
            self.http.download(&remote, &blob, name, progress)?;
        }
        cache::link(&blob, &pointer)?;
        Ok(pointer)
    }
}
