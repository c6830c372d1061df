//! `swaps.jsonl`: which component took whose place from which step and wave on. `plugins/DIGEST/NAME.wasm`: the components
//! of a run that came from files, as they were when they were loaded.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{RunError, StepLog, atomic, step_log};
use crate::types::{PluginId, Seat};

pub(super) const SWAPS: &str = "swaps.jsonl";

/// Why another component is at work from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwapEvent {
    Promoted,
    /// The one before is back.
    RolledBack,
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwapRecord {
    /// First step that it holds for, from 1.
    pub step: u64,
    /// First wave of that step that it holds for.
    pub wave: u32,
    pub event: SwapEvent,
    /// Place among the run's rewards; 0 for a formatter or curriculum.
    pub slot: usize,
    /// The component that is at work from here on; its role is that of the one before.
    pub plugin: PluginId,
    /// The one that was until here.
    pub replaced: PluginId,
    /// What it was loaded from, with which settings and limits.
    pub source: String,
    pub config: Map<String, Value>,
    pub limits: Map<String, Value>,
    /// What it was granted, as the config says it.
    #[serde(default)]
    pub grants: Map<String, Value>,
    /// Its warm pool.
    pub warm: Option<Map<String, Value>>,
    /// Of a rollback.
    pub reason: Option<String>,
    /// What shadowing found, of a promotion after it.
    pub shadow: Option<Value>,
}

impl SwapRecord {
    /// What it is about.
    pub fn seat(&self) -> Seat {
        Seat {
            role: self.plugin.role,
            slot: self.slot,
        }
    }
}

/// Who holds a seat, as places in the journal; `None` is what the run began with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    pub now: Option<usize>,
    /// Whom a rollback would bring back, if there is anybody.
    pub before: Option<Option<usize>>,
}

/// Who had `seat` at a wave of a step.
pub fn holder(records: &[SwapRecord], seat: Seat, step: u64, wave: u32) -> Holder {
    let by_then = |r: &SwapRecord| r.seat() == seat && (r.step, r.wave) <= (step, wave);
    let mut order: Vec<usize> = (0..records.len())
        .filter(|i| by_then(&records[*i]))
        .collect();
    order.sort_by_key(|i| (records[*i].step, records[*i].wave));
    let mut holder = Holder::default();
    for i in order {
        holder = match records[i].event {
            SwapEvent::Promoted => Holder {
                now: Some(i),
                before: Some(holder.now),
            },
            SwapEvent::RolledBack => Holder {
                now: holder.before.unwrap_or(holder.now),
                before: None,
            },
        };
    }
    holder
}

impl StepLog {
    /// Appends a line of the journal.
    pub fn append_swap(&mut self, record: &SwapRecord) -> Result<(), RunError> {
        let fail = |e: serde_json::Error| RunError::Malformed {
            path: PathBuf::from(SWAPS),
            reason: e.to_string(),
        };
        let mut values = match serde_json::to_value(record).map_err(fail)? {
            Value::Object(values) => values,
            _ => Map::new(),
        };
        values.remove("step");
        self.append(record.step, &values)
    }
}

/// Whether the journal's last line is incomplete: its process was killed while it wrote, or somebody cut the file.
fn is_torn(root: &Path) -> Result<bool, RunError> {
    let path = root.join(SWAPS);
    match fs::read(&path) {
        Ok(bytes) => Ok(bytes.last().is_some_and(|last| *last != b'\n')),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(RunError::Read { path, source }),
    }
}

/// The journal of a run, in the order in which it was written; empty for a run without swaps.
///
/// # Errors
/// A malformed line, but for a torn last one.
pub fn read_swaps(root: &Path) -> Result<Vec<SwapRecord>, RunError> {
    let lines = step_log::parse(root, SWAPS)?;
    let record = |(number, line): (usize, step_log::Line)| {
        serde_json::from_value(line.object.into()).map_err(|e| RunError::StepLog {
            path: root.join(SWAPS),
            line: number + 1,
            reason: e.to_string(),
        })
    };
    lines.into_iter().enumerate().map(record).collect()
}

/// Forgets rollbacks of later steps than `step`. Promotions of later steps stay: a resumed run makes them again at their
/// step, as it does everything else. Says whether an incomplete last line went too.
pub(super) fn cut_after(root: &Path, step: u64) -> Result<bool, RunError> {
    let torn = is_torn(root)?;
    let all = read_swaps(root)?;
    if !root.join(SWAPS).exists() {
        return Ok(false);
    }
    let stays = |r: &&SwapRecord| r.step <= step || r.event == SwapEvent::Promoted;
    let mut text = String::new();
    for record in all.iter().filter(stays) {
        let line = serde_json::to_string(record).map_err(|e| RunError::Malformed {
            path: root.join(SWAPS),
            reason: e.to_string(),
        })?;
        text.push_str(&line);
        text.push('\n');
    }
    atomic::write(&root.join(SWAPS), text.as_bytes())?;
    Ok(torn)
}

/// Where the run keeps a component that came from a file.
pub fn component_path(root: &Path, id: &PluginId) -> PathBuf {
    let hex = id.digest.strip_prefix("sha256:").unwrap_or(&id.digest);
    root.join("plugins")
        .join(hex)
        .join(format!("{}.wasm", id.name))
}

/// Keeps a component; its name has been checked by the plugin host. One that is there already stays.
pub fn keep_component(root: &Path, id: &PluginId, bytes: &[u8]) -> Result<PathBuf, RunError> {
    let path = component_path(root, id);
    if path.exists() {
        return Ok(path);
    }
    let folder = path.parent().unwrap_or(root);
    fs::create_dir_all(folder).map_err(|source| RunError::Write {
        path: folder.to_owned(),
        source,
    })?;
    atomic::write(&path, bytes)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Role;

    fn record(step: u64, wave: u32, event: SwapEvent, slot: usize) -> SwapRecord {
        let id = |name: &str| PluginId {
            role: Role::Reward,
            name: name.to_owned(),
            digest: format!("sha256:{name}"),
        };
        SwapRecord {
            step,
            wave,
            event,
            slot,
            plugin: id("new"),
            replaced: id("old"),
            source: "new.wasm".to_owned(),
            config: Map::new(),
            grants: Map::new(),
            limits: Map::new(),
            warm: None,
            reason: None,
            shadow: None,
        }
    }

    #[test]
    fn a_slot_is_held_by_the_last_promotion_that_was_not_rolled_back() {
        use SwapEvent::{Promoted, RolledBack};
        let records = [
            record(3, 0, Promoted, 0),
            record(5, 0, Promoted, 1),
            record(5, 0, Promoted, 0),
            record(6, 1, RolledBack, 0),
            record(9, 0, Promoted, 0),
        ];
        let at = |slot| Seat {
            role: Role::Reward,
            slot,
        };
        let now = |slot, step, wave| holder(&records, at(slot), step, wave).now;
        assert_eq!(now(0, 2, 9), None);
        assert_eq!((now(0, 3, 0), now(0, 4, 7)), (Some(0), Some(0)));
        assert_eq!((now(0, 5, 0), now(0, 6, 0)), (Some(2), Some(2)));
        assert_eq!((now(0, 6, 1), now(0, 8, 0)), (Some(0), Some(0)));
        assert_eq!((now(1, 4, 0), now(1, 9, 0)), (None, Some(1)));
        assert_eq!(holder(&records, at(0), 6, 0).before, Some(Some(0)));
        assert_eq!(holder(&records, at(0), 7, 0).before, None);
        assert_eq!(holder(&records, at(1), 7, 0).before, Some(None));
        let role = Role::Curriculum;
        let other = Seat { role, slot: 0 };
        assert_eq!(holder(&records, other, 9, 0), Holder::default());
    }

    #[test]
    fn a_resumed_journal_keeps_promotions_and_forgets_later_rollbacks() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = StepLog::open(dir.path(), SWAPS).unwrap();
        let records = [
            record(2, 0, SwapEvent::Promoted, 0),
            record(4, 0, SwapEvent::RolledBack, 0),
            record(5, 0, SwapEvent::Promoted, 0),
        ];
        for record in &records {
            log.append_swap(record).unwrap();
        }
        assert_eq!(read_swaps(dir.path()).unwrap(), records);
        cut_after(dir.path(), 4).unwrap();
        assert_eq!(read_swaps(dir.path()).unwrap(), records);
        cut_after(dir.path(), 3).unwrap();
        let kept = [records[0].clone(), records[2].clone()];
        assert_eq!(read_swaps(dir.path()).unwrap(), kept);
    }
}
