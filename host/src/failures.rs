//! `failures/NAME-DIGEST/`: calls that failed during a run, each with all that it takes to make it again.
//!
//! `cases.jsonl` has the samples in the format of `plugin test`, with the failure as what is expected; `call.json` beside it
//! says which component failed, under which settings, limits and seed.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{
    config::PluginConfig,
    plugin::PluginError,
    run::{RunError, component_path},
    types::{PluginId, Role, Sample},
};

/// Cases kept of a component.
const MAX_CASES: usize = 20;
/// Components of which cases are kept.
const MAX_PLUGINS: usize = 16;
/// Bytes of a case; a longer one is not kept.
const MAX_CASE_BYTES: usize = 1 << 20;

/// A call that failed.
#[derive(Clone, Debug)]
pub struct FailedCall {
    plugin: String,
    digest: String,
    settings: PluginConfig,
    case: Value,
}

impl FailedCall {
    /// Of one sample at a step, from 1.
    pub fn new(
        step: u64,
        settings: &PluginConfig,
        sample: &Sample<'_>,
        error: &PluginError,
    ) -> Self {
        // The trainer made this text of an object.
        let row: Map<String, Value> = serde_json::from_str(sample.row_json).unwrap_or_default();
        let kind = error.fault.kind();
        Self {
            plugin: error.plugin.to_string(),
            digest: error.digest.to_string(),
            settings: settings.clone(),
            case: json!({
                "name": format!("step {step} row {}: {kind}", sample.row_id),
                "config": settings.config,
                "row": row,
                "prompt": sample.prompt,
                "completion": sample.completion,
                "reasoning": sample.parsed.reasoning,
                "answer": sample.parsed.answer,
                "finish": sample.finish,
                "telemetry": sample.telemetry,
                "expect": { "error": kind, "message": error.fault.to_string() },
            }),
        }
    }
}

/// Writes what has failed into the run directory, as far as there is room.
///
/// # Errors
/// A folder or file that cannot be written.
pub fn save(root: &Path, seed: u64, calls: &mut Vec<FailedCall>) -> Result<(), RunError> {
    let mut by_component: BTreeMap<(String, String), Vec<FailedCall>> = BTreeMap::new();
    for call in calls.drain(..) {
        let key = (call.plugin.clone(), call.digest.clone());
        by_component.entry(key).or_default().push(call);
    }
    for ((name, digest), calls) in by_component {
        let hex = digest.strip_prefix("sha256:").unwrap_or(&digest);
        let short = hex.get(..12).unwrap_or(hex);
        let folder = root.join("failures").join(format!("{name}-{short}"));
        save_of(root, &folder, seed, &calls).map_err(|source| RunError::Write {
            path: folder.clone(),
            source,
        })?;
    }
    Ok(())
}

fn save_of(root: &Path, folder: &Path, seed: u64, calls: &[FailedCall]) -> std::io::Result<()> {
    let Some(first) = calls.first() else {
        return Ok(());
    };
    let path = folder.join("cases.jsonl");
    let mut count = match fs::File::open(&path) {
        Ok(file) => BufReader::new(file).lines().count(),
        Err(_) if count_folders(root) >= MAX_PLUGINS => return Ok(()),
        Err(_) => {
            fs::create_dir_all(folder)?;
            let call = serde_json::to_vec_pretty(&call_file(root, seed, first))?;
            fs::write(folder.join("call.json"), call)?;
            0
        }
    };
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    for call in calls {
        let mut line = call.case.to_string();
        if count == MAX_CASES || line.len() > MAX_CASE_BYTES {
            continue;
        }
        line.push('\n');
        file.write_all(line.as_bytes())?;
        count += 1;
    }
    Ok(())
}

fn count_folders(root: &Path) -> usize {
    fs::read_dir(root.join("failures")).map_or(0, Iterator::count)
}

fn call_file(root: &Path, seed: u64, call: &FailedCall) -> Value {
    let id = PluginId {
        role: Role::Reward,
        name: call.plugin.clone(),
        digest: call.digest.clone(),
    };
    let kept = Some(component_path(root, &id)).filter(|path| path.exists());
    let within = |path: PathBuf| path.strip_prefix(root).map(Path::to_owned).unwrap_or(path);
    json!({
        "plugin": call.plugin,
        "digest": call.digest,
        "source": call.settings.source,
        "component": kept.map(within),
        "config": call.settings.config,
        "limits": call.settings.limits,
        "grants": call.settings.grants,
        "seed": seed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::{Call, Fault};
    use crate::types::{Finish, Parsed, Telemetry};

    fn call(row_id: u64, digest: &str) -> FailedCall {
        let parsed = Parsed::default();
        let sample = Sample {
            row_id,
            row_json: r#"{"answer":"4"}"#,
            prompt: "2 + 2",
            completion: "5\n",
            parsed: &parsed,
            finish: Finish::Length,
            telemetry: Telemetry::default(),
        };
        let error = PluginError {
            plugin: "own".into(),
            digest: format!("sha256:{digest}").into(),
            call: Call::Score,
            row: Some(row_id),
            fault: Fault::Deadline { limit_ms: 60 },
        };
        FailedCall::new(3, &PluginConfig::default(), &sample, &error)
    }

    #[test]
    fn cases_have_the_keys_of_plugin_test_and_an_end() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            let mut calls: Vec<FailedCall> =
                (0..9).map(|row| call(row, "0123456789abcdef")).collect();
            save(dir.path(), 7, &mut calls).unwrap();
            assert!(calls.is_empty());
        }
        let folder = dir.path().join("failures/own-0123456789ab");
        let text = fs::read_to_string(folder.join("cases.jsonl")).unwrap();
        assert_eq!(text.lines().count(), MAX_CASES);
        let case: Map<String, Value> = serde_json::from_str(text.lines().nth(10).unwrap()).unwrap();
        let keys: Vec<&str> = case.keys().map(String::as_str).collect();
        let expected = [
            "name",
            "config",
            "row",
            "prompt",
            "completion",
            "reasoning",
            "answer",
            "finish",
            "telemetry",
            "expect",
        ];
        assert_eq!(keys, expected);
        assert_eq!(case["name"], "step 3 row 1: deadline");
        assert_eq!(case["row"], json!({"answer": "4"}));
        assert_eq!(case["finish"], "length");
        let message = "ran past its deadline of 60 ms";
        assert_eq!(
            case["expect"],
            json!({"error": "deadline", "message": message})
        );
        let call: Value =
            serde_json::from_slice(&fs::read(folder.join("call.json")).unwrap()).unwrap();
        assert_eq!((&call["seed"], &call["plugin"]), (&7.into(), &"own".into()));
    }

    #[test]
    fn many_components_leave_a_bounded_number_of_folders() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..MAX_PLUGINS + 5 {
            save(dir.path(), 7, &mut vec![call(1, &format!("{i:012}"))]).unwrap();
        }
        assert_eq!(count_folders(dir.path()), MAX_PLUGINS);
    }
}
