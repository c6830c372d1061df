//! What a run and its candidates have at the beginning: places for requests, copies of components; and numbers for metrics.

use std::{path::Path, sync::mpsc::Sender};

use super::{
    candidate::Worker,
    channel,
    protocol::{Event, Line},
    shadow::ShadowReport,
    shadow_plans::TappedPlan,
};
use crate::{
    config::PluginConfig,
    defaults,
    plugin::{Plugin, digest},
    registry::is_reference,
    run::{LockedPlugin, RunError, SwapEvent, SwapRecord, component_path, keep_component},
    setup::read_component,
    trainer::Trainer,
    types::{PluginId, Role, Seat},
};

/// The candidate of the moment.
pub(super) struct Active {
    pub(super) seat: Seat,
    pub(super) settings: PluginConfig,
    pub(super) reply: Option<Sender<Event>>,
    pub(super) worker: Worker,
    pub(super) shadow: u32,
    /// Steps handed to it, and of these those it is through with.
    pub(super) sent: u32,
    pub(super) done: u32,
    pub(super) report: Option<ShadowReport>,
    pub(super) ready: Option<Box<Plugin>>,
    /// First step that it takes part in, once it is promoted.
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

/// A line of the journal without what a rollback or a shadow has to add: `plugin` takes the place of `replaced` under these
/// settings from this step and wave on.
pub(super) fn record_of(
    event: SwapEvent,
    (step, wave): (u64, u32),
    (seat, plugin, replaced): (Seat, PluginId, PluginId),
    settings: &PluginConfig,
) -> SwapRecord {
    SwapRecord {
        step,
        wave,
        event,
        slot: seat.slot,
        plugin,
        replaced,
        source: settings.source.clone(),
        config: settings.config.clone(),
        limits: settings.limits.clone(),
        grants: settings.grants.clone(),
        warm: settings.warm.clone(),
        reason: None,
        shadow: None,
    }
}

/// What the curriculum will be asked next.
pub(super) fn next_plan(trainer: &Trainer<'_>) -> TappedPlan {
    let prompts = trainer.config.generation.prompts_per_step;
    TappedPlan {
        state: trainer.state.curriculum.clone(),
        outcomes: trainer.state.outcomes.clone(),
        budget: trainer.budget(prompts),
        picks: Vec::new(),
    }
}

/// The plugin of a seat.
pub(super) fn id_of(trainer: &Trainer<'_>, seat: Seat) -> Option<PluginId> {
    let plugins = &trainer.plugins;
    match seat.role {
        Role::Reward => plugins.rewards.ids().nth(seat.slot).cloned(),
        Role::Formatter => Some(plugins.formatter.id().clone()),
        Role::Curriculum => Some(plugins.curriculum.id().clone()),
    }
}

/// The seat that a role or the name of a plugin stands for.
pub(super) fn seat_of(trainer: &Trainer<'_>, role: &str) -> Result<Seat, Event> {
    let plugins = &trainer.plugins;
    let reward = |slot| Seat {
        role: Role::Reward,
        slot,
    };
    let only = |role| Seat { role, slot: 0 };
    let names: Vec<&str> = plugins.rewards.names().collect();
    let all = names.join(", ");
    match (role, names.len()) {
        ("formatter", _) => return Ok(only(Role::Formatter)),
        ("curriculum", _) => return Ok(only(Role::Curriculum)),
        ("reward", 1) => return Ok(reward(0)),
        ("reward", n) => {
            let reason = format!("the run has {n} rewards");
            let hint = format!("name one of them instead of `reward`: {all}");
            return Err(channel::refused(&reason, &hint));
        }
        _ => {}
    }
    if let Some(slot) = names.iter().position(|name| *name == role) {
        return Ok(reward(slot));
    }
    for id in [plugins.formatter.id(), plugins.curriculum.id()] {
        if id.name == role {
            return Ok(only(id.role));
        }
    }
    let role = crate::plugin::printable(role, 100);
    let (formatter, curriculum) = (&plugins.formatter.id().name, &plugins.curriculum.id().name);
    Err(channel::refused(
        &format!("no plugin of the run is called `{role}`"),
        &format!(
            "name a role (`reward`, `formatter`, `curriculum`), or one of {all}, {formatter}, {curriculum}"
        ),
    ))
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
    let share = |part: u64, all: u64| (all > 0).then(|| part as f64 / all as f64);
    let numbers = match report {
        ShadowReport::Reward(report) => vec![
            ("swap/shadow_agreement", report.agreement),
            ("swap/shadow_pearson", report.pearson),
            ("swap/shadow_spearman", report.spearman),
            ("swap/shadow_micros", report.micros),
            ("swap/live_micros", report.live_micros),
            ("swap/shadow_failed", Some(report.failed as f64)),
        ],
        ShadowReport::Formatter(report) => {
            let (prompts, completions) = (report.prompts, report.completions);
            vec![
                (
                    "swap/shadow_prompts_differ",
                    share(report.prompts_differ, prompts),
                ),
                (
                    "swap/shadow_answers_differ",
                    share(report.answers_differ, completions),
                ),
                ("swap/shadow_micros", report.micros),
            ]
        }
        ShadowReport::Curriculum(report) => vec![
            ("swap/shadow_overlap", report.overlap()),
            ("swap/shadow_micros", report.micros),
        ],
    };
    let known = |(name, value): (_, Option<f64>)| value.map(|value| (name, value));
    numbers.into_iter().filter_map(known).collect()
}
