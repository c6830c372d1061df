//! What a resumed run, or a replay, is held to: components, their grants and the draft of `plugins.lock` and `draft.lock`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    draft::DraftError,
    run::{LockedDraft, LockedPlugin, RunDir, read_draft_lock, read_plugins_lock},
};

/// A component that is another than the one the run began with.
#[derive(Debug, thiserror::Error)]
#[error("plugin `{name}` has changed since the run began: it is {found} and was {expected}")]
pub struct PluginChanged {
    name: String,
    found: String,
    expected: String,
}

impl PluginChanged {
    /// Bring it back, or begin anew.
    pub fn hint(&self) -> Option<String> {
        Some("put the component back that plugins.lock names, or start a new run".to_owned())
    }
}

/// A run whose `plugins.lock` is gone, so that nobody knows what it began with.
#[derive(Debug, thiserror::Error)]
#[error("{} has no plugins.lock, which says what it ran with", root.display())]
pub struct LockMissing {
    root: PathBuf,
}

impl LockMissing {
    /// Bring it back, or begin anew.
    pub fn hint(&self) -> Option<String> {
        Some(
            "put it back, or start a new run; the run's `plugins` folder has its components"
                .to_owned(),
        )
    }
}

/// A component that is granted something else than when the run began.
#[derive(Debug, thiserror::Error)]
#[error("plugin `{name}` is granted {found}, and was granted {expected} when the run began")]
pub struct GrantsChanged {
    name: String,
    found: String,
    expected: String,
}

impl GrantsChanged {
    fn of(name: &str, found: &Map<String, Value>, expected: &Map<String, Value>) -> Self {
        let said = |grants: &Map<String, Value>| match grants.is_empty() {
            true => "nothing".to_owned(),
            false => json!(grants).to_string(),
        };
        Self {
            name: name.to_owned(),
            found: said(found),
            expected: said(expected),
        }
    }

    /// Take it back, or begin anew.
    pub fn hint(&self) -> Option<String> {
        Some("put `grants` in the run's config.yaml back to what plugins.lock has, or start a new run".to_owned())
    }
}

/// A resumed run must go on with the components it started with and with their rights, and so must a replay.
pub(in crate::commands) fn check_lock(root: &Path, loaded: &[LockedPlugin]) -> anyhow::Result<()> {
    let locked = read_plugins_lock(root)?;
    if locked.is_empty() {
        let root = root.to_owned();
        return Err(LockMissing { root }.into());
    }
    for LockedPlugin { id, grants, .. } in loaded {
        let same = |l: &&LockedPlugin| l.id.name == id.name && l.id.role == id.role;
        // Two of one name may be two components.
        let mut before = locked.iter().filter(same).map(|l| &l.id.digest);
        let expected = before.clone().next();
        if let Some(expected) = expected.filter(|_| !before.any(|digest| *digest == id.digest)) {
            return Err(PluginChanged {
                name: id.name.clone(),
                found: id.digest.clone(),
                expected: expected.clone(),
            }
            .into());
        }
        let itself = |l: &&LockedPlugin| same(l) && l.id.digest == id.digest;
        let mut granted = locked.iter().filter(itself).map(|l| &l.grants);
        if let (Some(Some(expected)), Some(found)) = (granted.clone().next(), grants)
            && !granted.any(|before| before.as_ref().is_none_or(|before| before == found))
        {
            return Err(GrantsChanged::of(&id.name, found, expected).into());
        }
    }
    Ok(())
}

/// The same for its draft. It is asked of a draft that learns too, although a checkpoint has its weights: one
/// rule, and a digest costs less than the loading that was done already.
pub(super) fn check_draft_lock(dir: &RunDir, loaded: Option<&LockedDraft>) -> anyhow::Result<()> {
    let before = read_draft_lock(dir.root())?;
    match (before, loaded) {
        (Some(before), Some(now)) if before.digest != now.digest => Err(DraftError::Changed {
            draft: now.draft.clone(),
            found: now.digest.clone(),
            expected: before.digest,
        }
        .into()),
        _ => Ok(()),
    }
}
