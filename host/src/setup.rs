//! From a validated config to the parts of a run: model, rows, plugins. The only place that decides
//! what a name on the command line stands for (embedded, file, hub, registry).

mod grants;
mod plugins;
mod sources;

use std::path::PathBuf;

use anyhow::Context;
use grpo_policy::weights::{self, LoadedModel};

use crate::{
    cli::Environment,
    config::{GenerationConfig, RunConfig},
    data::{Dataset, HubDataset, LoadOptions, Source, load, load_hub},
    defaults,
    hub::{Hub, HubConfig, Progress, Repo},
    placement::Capacity,
    plugin::{FormatterPlugin, RowText},
    policy::draft_head_file,
    types::Row,
};

pub use grants::GrantError;
pub(crate) use plugins::{Loaded, load_admitted, load_whole};
pub use plugins::{Plugins, WrongSettings, limits, load_plugin, pinned, plugins};
pub use sources::{
    Component, MissingPlugin, PluginSources, read_component, sidecar, sidecar_path, text_if_there,
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
