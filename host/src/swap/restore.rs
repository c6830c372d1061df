//! The plugins of a run that has swapped some, for going on with it and for scoring its log again.

use std::{collections::HashMap, path::Path};

use anyhow::Context;

use crate::{
    config::{PluginConfig, RunConfig},
    plugin::{Plugin, PluginHost, RewardPlugin, RewardSet, SetScoring},
    run::{
        LockedPlugin, SwapEvent, SwapRecord, component_path, holder, read_plugins_lock, read_swaps,
    },
    setup::{self, PluginSources},
    trainer::Trainer,
    types::{Role, Sample, Seat},
};

/// A config whose components are read from the run's own copies, where the files that it names may have changed since on
/// purpose: in a run that watches its plugins or has swapped one.
pub fn with_kept_components(config: &RunConfig, root: &Path) -> anyhow::Result<RunConfig> {
    let mut kept = config.clone();
    if !config.plugins.watch_plugins && read_swaps(root)?.is_empty() {
        return Ok(kept);
    }
    let locked = read_plugins_lock(root)?;
    for plugin in &mut kept.plugins.plugins {
        let first = |l: &&LockedPlugin| l.since_step == 1 && l.source == plugin.source;
        let path = locked
            .iter()
            .find(first)
            .map(|l| component_path(root, &l.id));
        if let Some(path) = path.filter(|path| path.exists()) {
            plugin.source = path.to_string_lossy().into_owned();
        }
    }
    Ok(kept)
}

/// Puts the sources of `config` back where [`with_kept_components`] has put others.
pub fn with_own_sources(locked: &mut [LockedPlugin], config: &RunConfig) {
    for (locked, plugin) in locked.iter_mut().zip(&config.plugins.plugins) {
        if !locked.is_from(&plugin.source) {
            locked.source.clone_from(&plugin.source);
        }
    }
}

/// Loads what a promotion brought in; what the journal says of it must be so.
pub(super) fn load(
    host: &PluginHost,
    sources: &PluginSources,
    root: &Path,
    record: &SwapRecord,
) -> anyhow::Result<Plugin> {
    let kept = component_path(root, &record.plugin);
    let source = match kept.exists() {
        true => kept.to_string_lossy().into_owned(),
        false => record.source.clone(),
    };
    let settings = PluginConfig {
        source,
        ..settings(record)
    };
    let step = record.step;
    let loaded = setup::load_plugin(host, &settings, sources).with_context(|| {
        format!(
            "the {} that was promoted at step {step}",
            record.plugin.role
        )
    })?;
    let (found, wanted) = (loaded.id(), &record.plugin);
    if (found.role, &found.digest) != (wanted.role, &wanted.digest) {
        return Err(super::SwapError::Changed {
            name: wanted.name.clone(),
            found: found.digest.clone(),
            expected: wanted.digest.clone(),
        }
        .into());
    }
    Ok(loaded)
}

pub(super) fn settings(record: &SwapRecord) -> PluginConfig {
    PluginConfig {
        source: record.source.clone(),
        config: record.config.clone(),
        limits: record.limits.clone(),
        grants: record.grants.clone(),
        warm: record.warm.clone(),
        ..PluginConfig::default()
    }
}

/// Puts the promoted plugins of a resumed run in their places, with those before them to go back to, as they were after its
/// last step.
pub(super) fn restore(
    trainer: &mut Trainer<'_>,
    (host, sources): (&PluginHost, &PluginSources),
    root: &Path,
    records: &[SwapRecord],
) -> anyhow::Result<()> {
    let step = trainer.state.step;
    for seat in trainer.swaps.seats() {
        let held = holder(records, seat, step, u32::MAX);
        let before = held.before.flatten();
        for place in before.into_iter().chain(held.now) {
            let record = &records[place];
            let plugin = load(host, sources, root, record)?;
            trainer.promote(seat.slot, plugin, settings(record), record.step);
        }
        if held.before.is_none() {
            trainer.forget_predecessor(seat);
        }
    }
    Ok(())
}

/// The rewards of a run at each of its steps.
pub struct Timeline {
    rewards: RewardSet,
    records: Vec<SwapRecord>,
    /// Rewards that hold no slot now, by slot and promotion.
    shelf: HashMap<(usize, Option<usize>), RewardPlugin>,
    /// Who holds each slot now.
    now: Vec<Option<usize>>,
}

impl Timeline {
    /// Loads every plugin that the run at `root` has promoted beside those it began with.
    ///
    /// # Errors
    /// A component that is gone or has changed.
    pub fn of(
        rewards: RewardSet,
        host: &PluginHost,
        root: &Path,
        sources: &PluginSources,
    ) -> anyhow::Result<Self> {
        let records = read_swaps(root)?;
        let mut shelf = HashMap::new();
        for (place, record) in records.iter().enumerate() {
            if record.event == SwapEvent::Promoted
                && let Plugin::Reward(reward) = load(host, sources, root, record)?
            {
                shelf.insert((record.slot, Some(place)), reward);
            }
        }
        let now = vec![None; rewards.names().count()];
        Ok(Self {
            rewards,
            records,
            shelf,
            now,
        })
    }

    /// Scores a batch as the run did in that wave of that step.
    ///
    /// # Errors
    /// As [`RewardSet::score`].
    pub fn score(
        &mut self,
        step: u64,
        wave: u32,
        samples: &[Sample<'_>],
    ) -> anyhow::Result<SetScoring> {
        for slot in 0..self.now.len() {
            let role = Role::Reward;
            let wanted = holder(&self.records, Seat { role, slot }, step, wave).now;
            if wanted == self.now[slot] {
                continue;
            }
            let next = self
                .shelf
                .remove(&(slot, wanted))
                .context("a reward is in no place")?;
            if let Some(before) = self.rewards.exchange(slot, next) {
                self.shelf.insert((slot, self.now[slot]), before);
            }
            self.now[slot] = wanted;
        }
        Ok(self.rewards.score(samples)?)
    }

    /// The plugins that were promoted, as `plugins.lock` has them.
    pub fn promoted(&self) -> Vec<LockedPlugin> {
        let promoted = self
            .records
            .iter()
            .filter(|r| r.event == SwapEvent::Promoted);
        let locked = promoted.map(|r| LockedPlugin {
            id: r.plugin.clone(),
            source: r.source.clone(),
            weight: match r.plugin.role {
                Role::Reward => self.rewards.weight(r.slot),
                _ => None,
            },
            since_step: r.step,
            grants: Some(r.grants.clone()),
        });
        locked.collect()
    }

    /// Names of the rewards that hold the slots now.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.rewards.names()
    }
}
