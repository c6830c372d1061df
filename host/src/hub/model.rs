//! Which files of a model repository are needed to load the model.

use std::{collections::BTreeSet, path::PathBuf};

use super::{Hub, HubError, Progress, Repo, Snapshot};

/// Files beside the weights, fetched where they exist.
const SIDE_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

const INDEX: &str = "model.safetensors.index.json";

impl Hub {
    /// Downloads what a model needs and returns its folder, or the `.gguf` file of a repository that has
    /// exactly one and no safetensors.
    pub fn model(
        &self,
        repo: &Repo,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        let snapshot = self.resolve(repo)?;
        let has = |name: &str| snapshot.files.iter().any(|f| f == name);
        for name in SIDE_FILES.into_iter().filter(|name| has(name)) {
            self.file(&snapshot, name, progress)?;
        }
        if has(INDEX) {
            return self.sharded(&snapshot, progress);
        }
        let weights = whole_weights(&snapshot).ok_or_else(|| HubError::NoWeights {
            id: repo.id.clone(),
            found: snapshot.files.clone(),
        })?;
        let path = self.file(&snapshot, &weights, progress)?;
        let is_gguf = weights.ends_with(".gguf");
        Ok(if is_gguf {
            path
        } else {
            path.parent().map_or(path.clone(), ToOwned::to_owned)
        })
    }

    fn sharded(
        &self,
        snapshot: &Snapshot,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        let id = &snapshot.repo.id;
        let index = self.file(snapshot, INDEX, progress)?;
        let malformed = |reason: String| HubError::Malformed {
            url: format!("{id}/{INDEX}"),
            reason,
        };
        let bytes = std::fs::read(&index).map_err(|source| HubError::File {
            path: index.clone(),
            source,
        })?;
        let json: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
        let map = json.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| malformed("no `weight_map`".into()))?;
        let shards: BTreeSet<&str> = map.values().filter_map(|shard| shard.as_str()).collect();
        for shard in shards {
            // Offline, `files` are the cached ones, and `file` has the better message.
            if !snapshot.cached && !snapshot.files.iter().any(|f| f == shard) {
                return Err(HubError::MissingShard {
                    id: id.clone(),
                    shard: shard.to_owned(),
                });
            }
            self.file(snapshot, shard, progress)?;
        }
        Ok(index.parent().map_or(index.clone(), ToOwned::to_owned))
    }
}

/// `model.safetensors`, else the only safetensors file, else the only GGUF file. Several GGUF files are
/// quantisations of one model, and picking one is not ours to do.
fn whole_weights(snapshot: &Snapshot) -> Option<String> {
    let only = |extension: &str| {
        let mut found = snapshot.files.iter().filter(|f| f.ends_with(extension));
        found.next().filter(|_| found.next().is_none()).cloned()
    };
    let usual = snapshot
        .files
        .iter()
        .find(|f| *f == "model.safetensors")
        .cloned();
    usual
        .or_else(|| only(".safetensors"))
        .or_else(|| only(".gguf"))
}
