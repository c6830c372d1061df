//! `plugins.lock`: which component, by digest, played which part from which step on.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use super::{RunError, atomic};
use crate::types::PluginId;

const NAME: &str = "plugins.lock";

/// One component of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockedPlugin {
    #[serde(flatten)]
    pub id: PluginId,
    /// The path or reference it was loaded from, or `embedded`.
    pub source: String,
    /// Of a reward among several.
    pub weight: Option<f64>,
    /// First step it took part in; later than 1 for one that was swapped in.
    pub since_step: u64,
}

pub(super) fn write(root: &Path, plugins: &[LockedPlugin]) -> Result<(), RunError> {
    let path = root.join(NAME);
    let text = serde_norway::to_string(plugins).map_err(|e| RunError::Malformed {
        path: path.clone(),
        reason: e.to_string(),
    })?;
    atomic::write(&path, text.as_bytes())
}

/// The components of a run; none when it has not got to writing them.
pub fn read_plugins_lock(root: &Path) -> Result<Vec<LockedPlugin>, RunError> {
    let path = root.join(NAME);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RunError::Read { path, source }),
    };
    serde_norway::from_str(&text).map_err(|e| RunError::Malformed {
        path: path.clone(),
        reason: e.to_string(),
    })
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
