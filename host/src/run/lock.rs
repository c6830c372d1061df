//! `plugins.lock`: which component, by digest, played which part from which step on, and with which rights. `draft.lock`:
//! with which weights the draft began.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{RunError, atomic};
use crate::types::PluginId;

const NAME: &str = "plugins.lock";
const DRAFT_NAME: &str = "draft.lock";

/// One component of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockedPlugin {
    #[serde(flatten)]
    pub id: PluginId,
    /// The path or name it was loaded from, or the reference, pinned to its manifest's digest.
    pub source: String,
    /// Of a reward among several.
    pub weight: Option<f64>,
    /// First step it took part in; later than 1 for one that was swapped in.
    pub since_step: u64,
    /// What it was granted, as the config says it: of a secret the name of its variable. `None`: written before locks had
    /// grants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grants: Option<Map<String, Value>>,
}

impl LockedPlugin {
    /// Whether this is what a config's source names: `source` itself, or pinned.
    pub fn is_from(&self, source: &str) -> bool {
        let rest = self.source.strip_prefix(source);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("@sha256:"))
    }
}

/// The draft of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockedDraft {
    /// As the config names it.
    pub draft: String,
    /// `sha256:` and 64 hex digits of the weights it began with, whether it learns or not.
    pub digest: String,
}

pub(super) fn write_draft(root: &Path, draft: &LockedDraft) -> Result<(), RunError> {
    save(&root.join(DRAFT_NAME), draft)
}

/// The draft of a run; `None` for one without weights.
pub fn read_draft_lock(root: &Path) -> Result<Option<LockedDraft>, RunError> {
    load(&root.join(DRAFT_NAME))
}

fn save<T: Serialize + ?Sized>(path: &Path, locked: &T) -> Result<(), RunError> {
    let text = serde_norway::to_string(locked).map_err(|e| RunError::Malformed {
        path: path.to_owned(),
        reason: e.to_string(),
    })?;
    atomic::write(path, text.as_bytes())
}

/// `None` where there is no such file.
fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RunError> {
    let path = path.to_owned();
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RunError::Read { path, source }),
    };
    serde_norway::from_str(&text).map_err(|e| RunError::Malformed {
        path,
        reason: e.to_string(),
    })
}

pub(super) fn write(root: &Path, plugins: &[LockedPlugin]) -> Result<(), RunError> {
    save(&root.join(NAME), plugins)
}

/// The components of a run; none when it has not got to writing them.
pub fn read_plugins_lock(root: &Path) -> Result<Vec<LockedPlugin>, RunError> {
    Ok(load(&root.join(NAME))?.unwrap_or_default())
}

/// Forgets swaps that a resumed run has yet to make.
pub(super) fn cut_after(root: &Path, step: u64) -> Result<(), RunError> {
    let all = read_plugins_lock(root)?;
    let kept: Vec<LockedPlugin> = all
        .iter()
        .filter(|p| p.since_step <= step.max(1))
        .cloned()
        .collect();
    if kept.len() < all.len() {
        write(root, &kept)
    } else {
        Ok(())
    }
}
