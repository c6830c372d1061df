//! From a validated config to the parts of a run: model, rows, plugins. The only place that decides
//! what a name on the command line stands for (embedded, file, hub).

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::Context;
use grpo_policy::weights::{self, LoadedModel};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    cli::{COMPILE_TRIAL, Environment},
    config::{GenerationConfig, PluginConfig, RunConfig},
    data::{Dataset, HubDataset, LoadOptions, Source, load, load_hub},
    defaults,
    hub::{Hub, HubConfig, Progress, Repo},
    placement::Capacity,
    plugin::{
        CurriculumPlugin, FormatterPlugin, Limits, LogSink, MAX_COMPONENT_BYTES, Plugin,
        PluginHost, RewardPlugin, RewardSet, RowText, Warm, Weighted, try_compile,
    },
    policy::draft_head_file,
    run::LockedPlugin,
    types::{Role, Row},
};

/// Name under which the tiny arithmetic model stands in configs and adapters.
pub const EMBEDDED: &str = "embedded";

/// Called while something is downloaded.
pub type OnDownload<'a> = &'a mut dyn FnMut(Progress<'_>);

/// Loads the model a config names: a folder, a GGUF file, a hub id, or the embedded one.
pub fn model(
    config: &RunConfig,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<LoadedModel> {
    let Some(name) = config.input.model.as_deref().filter(|m| *m != EMBEDDED) else {
        return Ok(defaults::model()?);
    };
    named_model(name, &config.input.revision, environment, on_download)
}

/// Loads a model by its name; `revision` holds for a hub id that does not bring its own.
pub fn named_model(
    name: &str,
    revision: &str,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<LoadedModel> {
    let path = match Source::parse(name) {
        Source::Path(path) => path,
        Source::Hub { id, revision: own } => {
            let revision = own.unwrap_or_else(|| revision.to_owned());
            hub(environment)?.model(&Repo::model(&id).at(&revision), on_download)?
        }
    };
    weights::load_as_stored(&path).with_context(|| format!("model `{name}`"))
}

/// The file with the head that an earlier run has trained for drafting with the model's first `layers`
/// layers, where the model is a folder that has one.
pub fn draft_head(config: &RunConfig, layers: usize) -> Option<PathBuf> {
    let Source::Path(model) = Source::parse(config.input.model.as_deref()?) else {
        return None;
    };
    Some(draft_head_file(&model, layers)).filter(|file| file.exists())
}

/// The layers behind which a model of `layers` layers brings a trained head for drafting, rising.
pub fn draft_heads(config: &RunConfig, layers: usize) -> Vec<usize> {
    (1..layers)
        .filter(|layers| draft_head(config, *layers).is_some())
        .collect()
}

/// The model's name for messages and adapters.
pub fn model_name(config: &RunConfig) -> &str {
    config.input.model.as_deref().unwrap_or(EMBEDDED)
}

/// Engine sizes for a model with a context of `context` tokens.
pub fn capacity(config: &GenerationConfig, context: usize) -> Capacity {
    let completion = config.max_completion_length as usize;
    // Without a limit a prompt may be as long as what is left of the context, within reason: the KV pool
    // is sized for the longest sequence.
    let prompt = config.max_prompt_length.map_or(4096, |n| n as usize);
    Capacity {
        max_batch: config.max_batch_size.map(|n| n as usize),
        max_model_len: (prompt + completion).min(context),
        kv_tokens: config.kv_cache_tokens.map(|n| n as usize),
    }
}

/// Training rows and held-out rows.
pub struct Rows {
    pub train: Dataset,
    /// At most `eval_rows`; empty when evaluation is off.
    pub eval: Vec<Row>,
}

/// Loads the rows a config names. Without `eval_data`, held-out rows are split off the training rows.
pub fn rows(
    config: &RunConfig,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<Rows> {
    let wanted = config.eval.eval_rows as usize;
    let train = match config.input.data.as_deref() {
        None => defaults::train_rows()?,
        Some(name) => dataset(
            name,
            Part {
                split: &config.input.data_split,
                subset: config.input.data_subset.as_deref(),
            },
            config,
            environment,
            on_download,
        )?,
    };
    if let Some(eval) = eval_rows(config, environment, on_download)? {
        return Ok(Rows { train, eval });
    }
    let (train, eval) = train.split(wanted, config.training.seed)?;
    Ok(Rows {
        train,
        eval: eval.rows,
    })
}

/// Formats the first rows, so that a column the formatter misses is found before anything is written.
pub fn try_formatter(formatter: &FormatterPlugin, rows: &Rows) -> anyhow::Result<()> {
    for row in rows
        .train
        .rows
        .iter()
        .take(1)
        .chain(rows.eval.iter().take(1))
    {
        let json = serde_json::to_string(&row.json)?;
        formatter.format(&[RowText {
            id: row.id,
            json: &json,
        }])?;
    }
    Ok(())
}

/// The held-out rows a config names itself, or `None` when they must come off the training rows.
pub fn eval_rows(
    config: &RunConfig,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<Option<Vec<Row>>> {
    let mut eval = match (
        config.input.eval_data.as_deref(),
        config.input.data.as_deref(),
    ) {
        (Some(name), _) => dataset(
            name,
            Part {
                split: &config.input.eval_data_split,
                subset: config.input.eval_data_subset.as_deref(),
            },
            config,
            environment,
            on_download,
        )?,
        (None, None) => defaults::heldout_rows()?,
        (None, Some(_)) => return Ok(None),
    };
    eval.rows.truncate(config.eval.eval_rows as usize);
    Ok(Some(eval.rows))
}

/// Which rows of a hub dataset.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub split: &'a str,
    pub subset: Option<&'a str>,
}

/// Loads one dataset: file, folder or hub id.
pub fn dataset(
    name: &str,
    part: Part<'_>,
    config: &RunConfig,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<Dataset> {
    let options = LoadOptions {
        rename: config.input.columns.clone(),
        ..LoadOptions::default()
    };
    Ok(match Source::parse(name) {
        Source::Path(path) => load(&path, &options)?,
        Source::Hub { id, revision } => {
            let repo = Repo::dataset(&id).at(revision.as_deref().unwrap_or("main"));
            let wanted = HubDataset {
                repo,
                subset: part.subset.map(str::to_owned),
                split: part.split.to_owned(),
            };
            load_hub(&hub(environment)?, &wanted, &options, on_download)?
        }
    })
}

fn hub(environment: &Environment) -> anyhow::Result<Hub> {
    let home = environment
        .hf_home
        .as_ref()
        .context("no folder for downloads: neither HF_HOME nor XDG_CACHE_HOME nor HOME is set")?;
    let mut config = HubConfig::new(home.join("hub"));
    if let Some(endpoint) = &environment.hf_endpoint {
        config.endpoint.clone_from(endpoint);
    }
    config.token.clone_from(&environment.hf_token);
    config.offline = environment.hf_hub_offline;
    Ok(Hub::new(&config)?)
}

/// The plugins of a run in their roles.
pub struct Plugins {
    pub formatter: FormatterPlugin,
    pub rewards: RewardSet,
    pub curriculum: CurriculumPlugin,
    /// Judges the accuracy of evaluations, whatever the rewards are.
    pub math: RewardPlugin,
    /// For `plugins.lock`; without `math`, which touches no training sample.
    pub locked: Vec<LockedPlugin>,
}

/// Loads the configured components. Roles that none of them plays go to the shipped plugins:
/// `reward-math`, `formatter-chat`, `curriculum-uniform`.
/// What they log goes to `sink`.
pub fn plugins(config: &RunConfig, sink: LogSink) -> anyhow::Result<Plugins> {
    let host = PluginHost::new(sink)?;
    let mut slots = Slots::default();
    for plugin in &config.plugins.plugins {
        slots.add(&host, plugin)?;
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
            )?;
        }
    }
    let math = PluginConfig {
        source: "reward-math".to_owned(),
        ..PluginConfig::default()
    };
    let Plugin::Reward(math) = load_plugin(&host, &math)? else {
        anyhow::bail!("the shipped reward-math is not a reward");
    };
    Ok(Plugins {
        formatter: slots.formatter.context("no formatter was loaded")?,
        rewards: RewardSet::new(slots.rewards)?,
        curriculum: slots.curriculum.context("no curriculum was loaded")?,
        math,
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
    fn add(&mut self, host: &PluginHost, config: &PluginConfig) -> anyhow::Result<()> {
        let plugin = load_plugin(host, config)?;
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
        let source = config.source.clone();
        self.locked.push(LockedPlugin {
            id,
            source,
            weight,
            since_step: 1,
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

/// Loads one component: a shipped one by its name, or a file.
pub fn load_plugin(host: &PluginHost, config: &PluginConfig) -> anyhow::Result<Plugin> {
    Ok(load_with_bytes(host, config)?.0)
}

/// The same with the component's bytes.
pub(crate) fn load_with_bytes(
    host: &PluginHost,
    config: &PluginConfig,
) -> anyhow::Result<(Plugin, Vec<u8>)> {
    let limits = limits(&config.source, &config.limits)?;
    let warm = config.warm.as_ref();
    let warm = warm.map(|warm| settings::<Warm>(("warm", WARM_KEYS), &config.source, warm));
    let warm = warm.transpose()?;
    let (name, bytes) = component(&config.source, &limits)?;
    let settings = Value::Object(config.config.clone());
    let prepared = host.prepare(&name, &bytes, &limits)?;
    Ok((prepared.configure(&settings, warm)?, bytes))
}

/// Name and bytes of a component. A file, unlike a shipped one, has been compiled on trial in a child
/// process, under `limits.compile_ms`.
pub fn component(source: &str, limits: &Limits) -> anyhow::Result<(String, Vec<u8>)> {
    let path = Path::new(source);
    if !path.exists()
        && let Some(bytes) = defaults::shipped(source)?
    {
        return Ok((source.to_owned(), bytes.into_owned()));
    }
    let bytes = read_component(path).map_err(|error| MissingPlugin {
        source_name: source.to_owned(),
        error,
    })?;
    let name = path
        .file_stem()
        .map_or(source.into(), |stem| stem.to_string_lossy());
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    try_compile(&program, &COMPILE_TRIAL, &name, &bytes, limits)?;
    Ok((name.into_owned(), bytes))
}

/// No more of a file than tells that it is too large: it may be a device that never ends.
pub fn read_component(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = MAX_COMPONENT_BYTES as u64 + 1;
    let mut file = std::fs::File::open(path)?.take(limit);
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
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

fn settings<T: DeserializeOwned>(
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

/// A plugin file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read plugin `{source_name}`: {error}")]
pub struct MissingPlugin {
    source_name: String,
    error: std::io::Error,
}

impl MissingPlugin {
    /// The shipped plugins by name.
    pub fn hint(&self) -> Option<String> {
        let names = defaults::names().collect::<Vec<_>>().join(", ");
        Some(format!(
            "give the path of a .wasm component, or one of {names}"
        ))
    }
}
