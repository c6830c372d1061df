//! What a run and its candidates have at the beginning: places for requests, copies of components; and numbers for metrics.

use std::{path::Path, sync::mpsc::Sender};

use super::{
    candidate::Worker,
    channel,
    error::ONLY_REWARDS,
    protocol::{Event, Line},
    shadow::ShadowReport,
};
use crate::{
    config::PluginConfig,
    defaults,
    plugin::{RewardPlugin, digest},
    registry::is_reference,
    run::{LockedPlugin, RunError, component_path, keep_component},
    setup::read_component,
    trainer::Trainer,
};

/// The candidate of the moment.
pub(super) struct Active {
    pub(super) slot: usize,
    pub(super) settings: PluginConfig,
    pub(super) reply: Option<Sender<Event>>,
    pub(super) worker: Worker,
    pub(super) shadow: u32,
    /// Steps handed to it, and of these those it has scored.
    pub(super) sent: u32,
    pub(super) done: u32,
    pub(super) report: Option<ShadowReport>,
    pub(super) ready: Option<Box<RewardPlugin>>,
    /// First step that it scores, once it is promoted.
    pub(super) promoted: Option<u64>,
}

impl Active {
    pub(super) fn tell(&self, event: Event) {
        if let Some(reply) = &self.reply {
            // Whoever asked may be gone; the run says it too.
            drop(reply.send(event));
        }
    }
}

/// The place that a role names.
pub(super) fn slot_of(trainer: &Trainer<'_>, role: &str) -> Result<usize, Event> {
    let names: Vec<&str> = trainer.plugins.rewards.names().collect();
    let all = names.join(", ");
    match (role, names.len()) {
        ("formatter" | "curriculum", _) => {
            let reason = format!("a {role} cannot be swapped during a run");
            Err(channel::refused(&reason, ONLY_REWARDS))
        }
        ("reward", 1) => Ok(0),
        ("reward", n) => {
            let reason = format!("the run has {n} rewards");
            Err(channel::refused(
                &reason,
                &format!("name one of them instead of `reward`: {all}"),
            ))
        }
        _ => names.iter().position(|name| *name == role).ok_or_else(|| {
            let role = crate::plugin::printable(role, 100);
            let reason = format!("no reward of the run is called `{role}`");
            channel::refused(&reason, &format!("name `reward`, or one of {all}"))
        }),
    }
}

/// Keeps the components that came from files, as they were loaded.
pub(super) fn keep_files(
    root: &Path,
    locked: &[LockedPlugin],
    lines: &mut Vec<Line>,
) -> Result<(), RunError> {
    for LockedPlugin { id, source, .. } in locked {
        let path = Path::new(source);
        // What came from a registry is held to its keys again when it is loaded again.
        let elsewhere = defaults::names().any(|name| name == source) || is_reference(source);
        if elsewhere && !path.exists() {
            continue;
        }
        match read_component(path) {
            Ok(bytes) if digest(&bytes) == id.digest => {
                keep_component(root, id, &bytes)?;
            }
            // A resumed run has its copy already.
            _ if component_path(root, id).exists() => {}
            Ok(_) => lines.push(Line::Warning(format!(
                "`{source}` has changed since it was loaded: the run has no copy of it"
            ))),
            Err(error) => lines.push(Line::Warning(format!(
                "the run has no copy of `{source}`: {error}"
            ))),
        }
    }
    Ok(())
}

/// What shadowing found, under the names of metrics.
pub(super) fn metrics_of(report: &ShadowReport) -> Vec<(&'static str, f64)> {
    let numbers = [
        ("swap/shadow_agreement", report.agreement),
        ("swap/shadow_pearson", report.pearson),
        ("swap/shadow_spearman", report.spearman),
        ("swap/shadow_micros", report.micros),
        ("swap/live_micros", report.live_micros),
        ("swap/shadow_failed", Some(report.failed as f64)),
    ];
    let known = |(name, value): (_, Option<f64>)| value.map(|value| (name, value));
    numbers.into_iter().filter_map(known).collect()
}
