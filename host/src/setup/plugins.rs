//! The plugins of a config, loaded, in their roles.

use std::sync::Arc;

use anyhow::Context;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{OnDownload, PluginSources};
use crate::{
    cli::Environment,
    config::{PluginConfig, RunConfig},
    judge::Panel,
    plugin::{
        CurriculumPlugin, FormatterPlugin, Limits, LogSink, Plugin, PluginHost, RewardPlugin,
        RewardSet, Warm, Weighted,
    },
    run::LockedPlugin,
    types::{PluginId, Role},
};

/// The plugins of a run in their roles.
pub struct Plugins {
    pub formatter: FormatterPlugin,
    pub rewards: RewardSet,
    pub curriculum: CurriculumPlugin,
    /// Judges the accuracy of evaluations, whatever the rewards are.
    pub math: RewardPlugin,
    /// Where they are from, and where swaps and replays get theirs.
    pub sources: Arc<PluginSources>,
    /// For `plugins.lock`; without `math`, which touches no training sample.
    pub locked: Vec<LockedPlugin>,
}

/// Loads the configured components. Roles that none of them plays go to the shipped plugins:
/// `reward-math`, `formatter-chat`, `curriculum-uniform`.
/// What they log goes to `sink`.
pub fn plugins(
    config: &RunConfig,
    environment: &Environment,
    on_download: OnDownload<'_>,
    sink: LogSink,
) -> anyhow::Result<Plugins> {
    let judges = Panel::of(config, environment, on_download)?;
    let host = PluginHost::new(sink)?;
    let sources =
        PluginSources::new(environment, &config.plugins.trusted_keys)?.with_judges(judges);
    let mut slots = Slots::default();
    for plugin in &config.plugins.plugins {
        slots.add(&host, plugin, &sources)?;
    }
    for (role, name) in [
        (Role::Formatter, "formatter-chat"),
        (Role::Reward, "reward-math"),
        (Role::Curriculum, "curriculum-uniform"),
    ] {
        if !slots.locked.iter().any(|l| l.id.role == role) {
            let source = name.to_owned();
            slots.add(
                &host,
                &PluginConfig {
                    source,
                    ..PluginConfig::default()
                },
                &sources,
            )?;
        }
    }
    let math = PluginConfig {
        source: "reward-math".to_owned(),
        ..PluginConfig::default()
    };
    let Plugin::Reward(math) = load_plugin(&host, &math, &sources)? else {
        anyhow::bail!("the shipped reward-math is not a reward");
    };
    Ok(Plugins {
        formatter: slots.formatter.context("no formatter was loaded")?,
        rewards: RewardSet::new(slots.rewards)?,
        curriculum: slots.curriculum.context("no curriculum was loaded")?,
        math,
        sources: Arc::new(sources),
        locked: slots.locked,
    })
}

#[derive(Default)]
struct Slots {
    formatter: Option<FormatterPlugin>,
    rewards: Vec<Weighted>,
    curriculum: Option<CurriculumPlugin>,
    locked: Vec<LockedPlugin>,
}

impl Slots {
    fn add(
        &mut self,
        host: &PluginHost,
        config: &PluginConfig,
        sources: &PluginSources,
    ) -> anyhow::Result<()> {
        let Loaded { plugin, source, .. } = load_whole(host, config, sources)?;
        let id = plugin.id().clone();
        let taken = match (&plugin, &self.formatter, &self.curriculum) {
            (Plugin::Formatter(_), Some(other), _) => Some(other.id().name.clone()),
            (Plugin::Curriculum(_), _, Some(other)) => Some(other.id().name.clone()),
            _ => None,
        };
        if let Some(other) = taken {
            anyhow::bail!(
                "`{}` and `{other}` are both a {:?}; a run has one",
                id.name,
                id.role
            );
        }
        let weight = matches!(plugin, Plugin::Reward(_)).then_some(config.weight);
        self.locked.push(LockedPlugin {
            id,
            source,
            weight,
            since_step: 1,
            grants: Some(config.grants.clone()),
        });
        match plugin {
            Plugin::Formatter(formatter) => self.formatter = Some(formatter),
            Plugin::Curriculum(curriculum) => self.curriculum = Some(curriculum),
            Plugin::Reward(reward) => {
                self.rewards.push(Weighted {
                    reward,
                    weight: config.weight,
                });
            }
        }
        Ok(())
    }
}

/// The config with its references pinned to what was loaded: the first of `locked` are its plugins, in order.
pub fn pinned(config: &RunConfig, locked: &[LockedPlugin]) -> RunConfig {
    let mut config = config.clone();
    for (plugin, locked) in config.plugins.plugins.iter_mut().zip(locked) {
        plugin.source.clone_from(&locked.source);
    }
    config
}

/// A component that was loaded.
pub(crate) struct Loaded {
    pub(crate) plugin: Plugin,
    pub(crate) bytes: Vec<u8>,
    /// As it was asked for; a reference pinned to the manifest that it stood for.
    pub(crate) source: String,
}

/// Loads one component: a shipped one by its name, a file, or one from a registry.
pub fn load_plugin(
    host: &PluginHost,
    config: &PluginConfig,
    sources: &PluginSources,
) -> anyhow::Result<Plugin> {
    Ok(load_whole(host, config, sources)?.plugin)
}

/// The same with the component's bytes and where they are from.
pub(crate) fn load_whole(
    host: &PluginHost,
    config: &PluginConfig,
    sources: &PluginSources,
) -> anyhow::Result<Loaded> {
    load_admitted(host, config, sources, |_| Ok(()))
}

/// The same for what `admit` takes, which sees who it is before any of it runs.
pub(crate) fn load_admitted(
    host: &PluginHost,
    config: &PluginConfig,
    sources: &PluginSources,
    admit: impl FnOnce(&PluginId) -> anyhow::Result<()>,
) -> anyhow::Result<Loaded> {
    let limits = limits(&config.source, &config.limits)?;
    let warm = config.warm.as_ref();
    let warm = warm.map(|warm| settings::<Warm>(("warm", WARM_KEYS), &config.source, warm));
    let warm = warm.transpose()?;
    let found = sources.component(&config.source, &limits)?;
    let settings = Value::Object(config.config.clone());
    let access = sources.access(&found.name, &config.grants)?;
    let prepared = host.prepare_with(&found.name, &found.bytes, &limits, access)?;
    admit(prepared.id())?;
    Ok(Loaded {
        plugin: prepared.configure(&settings, warm)?,
        bytes: found.bytes,
        source: found.source,
    })
}

const LIMIT_KEYS: &str = "docs/plugins.md lists limits and their ranges";
const WARM_KEYS: &str = "its keys are `size`, 1 to 8, and `max_calls`, 1 to 1000000";

/// Settings of a plugin that the host reads, with a wrong key or type.
#[derive(Debug, thiserror::Error)]
#[error("`{key}` of plugin `{plugin}`: {source}")]
pub struct WrongSettings {
    key: &'static str,
    plugin: String,
    source: serde_json::Error,
    keys: &'static str,
}

impl WrongSettings {
    /// Which keys there are.
    pub fn hint(&self) -> Option<String> {
        Some(self.keys.to_owned())
    }
}

/// The limits of a plugin.
///
/// # Errors
/// A key that is none, a value of another type.
pub fn limits(plugin: &str, values: &Map<String, Value>) -> Result<Limits, WrongSettings> {
    settings(("limits", LIMIT_KEYS), plugin, values)
}

pub(super) fn settings<T: DeserializeOwned>(
    (key, keys): (&'static str, &'static str),
    plugin: &str,
    values: &Map<String, Value>,
) -> Result<T, WrongSettings> {
    serde_json::from_value(Value::Object(values.clone())).map_err(|source| WrongSettings {
        key,
        plugin: plugin.to_owned(),
        source,
        keys,
    })
}
