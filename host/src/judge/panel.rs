//! The judges of a run: opened from its config, found by name, accounted for step by step.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::Context;
use grpo_policy::weights::LoadedModel;
use serde_json::{Map, Value};
use tokio::runtime;

use super::{
    Judge, JudgeSetupError, Notes, Shared, Source, Usage, Workers, cache::Cache,
    endpoint::Endpoint, ledger::Ledger, local::Local, lock,
};
use crate::{
    cli::Environment,
    config::{JudgeConfig, JudgesConfig, RunConfig, SELF},
    setup::{self, OnDownload},
};

/// Threads that wait for endpoints.
const THREADS: usize = 2;

/// All judges of a run.
#[derive(Clone, Default)]
pub struct Panel {
    judges: BTreeMap<String, Judge>,
    /// Usage that was accounted for.
    told: Arc<Mutex<BTreeMap<String, Usage>>>,
}

/// What opening judges takes from outside.
pub struct Surroundings<'a> {
    /// The value of an environment variable, if it is set.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// Folder under which answers are kept, if there is one.
    pub cache: Option<&'a Path>,
    /// Loads a model by its name, or the policy's under [`SELF`].
    pub load: &'a mut dyn FnMut(&str) -> anyhow::Result<LoadedModel>,
}

impl Panel {
    /// Opens the judges of a run. Models in this process are loaded; endpoints are not asked anything.
    ///
    /// # Errors
    /// [`JudgeSetupError`], and those of loading a model.
    pub fn of(
        config: &RunConfig,
        environment: &Environment,
        on_download: OnDownload<'_>,
    ) -> anyhow::Result<Self> {
        let mut load = |name: &str| match name {
            SELF => setup::model(config, environment, on_download),
            name => setup::named_model(name, "main", environment, on_download),
        };
        let surroundings = Surroundings {
            variable: &Environment::variable,
            cache: environment.cache.as_deref(),
            load: &mut load,
        };
        Self::open(&config.judges, surroundings)
    }

    /// Opens judges by their config.
    ///
    /// # Errors
    /// As [`Panel::of`].
    pub fn open(config: &JudgesConfig, surroundings: Surroundings<'_>) -> anyhow::Result<Self> {
        let Surroundings {
            variable,
            cache,
            load,
        } = surroundings;
        let mut workers: Option<Arc<Workers>> = None;
        let mut panel = Self::default();
        for (name, judge) in &config.judges {
            let ledger = Arc::new(Ledger::new(judge));
            let notes = Notes::default();
            let source = match &judge.endpoint {
                Some(base) => {
                    let key = key(name, judge, variable)?;
                    let endpoint = Endpoint::new(name, base, judge, key, Arc::clone(&ledger))?;
                    let workers = match &workers {
                        Some(workers) => Arc::clone(workers),
                        None => Arc::clone(workers.insert(start_workers(name)?)),
                    };
                    let endpoint = Arc::new(endpoint);
                    Source::Remote { endpoint, workers }
                }
                None => {
                    let model = load(&judge.model).with_context(|| format!("judge `{name}`"))?;
                    let local = Local::new(name, model, judge)?;
                    Source::Local {
                        memory: local.memory(),
                        model: Box::new(Mutex::new(local)),
                    }
                }
            };
            let cache = match (judge.cache, cache) {
                (false, _) => None,
                (true, Some(folder)) => Some(Cache::new(&folder.join("judge"))),
                (true, None) => {
                    let judge = name.clone();
                    return Err(JudgeSetupError::NoCache { judge }.into());
                }
            };
            let judge = Judge(Arc::new(Shared {
                name: name.clone(),
                config: judge.clone(),
                source,
                cache,
                ledger,
                notes,
            }));
            panel.judges.insert(name.clone(), judge);
        }
        Ok(panel)
    }

    /// The judge of that name.
    pub fn get(&self, name: &str) -> Option<&Judge> {
        self.judges.get(name)
    }

    /// Names of all judges, rising.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.judges.keys().map(String::as_str)
    }

    /// What models in this process take, a line for each, for the user to read.
    pub fn in_this_process(&self) -> impl Iterator<Item = &str> {
        self.judges
            .values()
            .filter_map(|judge| match &judge.0.source {
                Source::Local { memory, .. } => Some(memory.as_str()),
                Source::Remote { .. } => None,
            })
    }

    /// What each judge was asked since this was last called.
    pub fn take_usage(&self) -> Vec<(String, Usage)> {
        let mut told = lock(&self.told);
        let take = |(name, judge): (&String, &Judge)| {
            let now = judge.usage();
            let before = told.insert(name.clone(), now).unwrap_or_default();
            (name.clone(), now.since(&before))
        };
        self.judges.iter().map(take).collect()
    }

    /// Questions that had no answer, of all judges since they were opened.
    pub fn failures(&self) -> u64 {
        self.judges.values().map(|j| j.usage().failures).sum()
    }

    /// Lines for the user that have come up since this was last called.
    pub fn take_notes(&self) -> Vec<String> {
        let judges = self.judges.values();
        judges.flat_map(|judge| judge.0.notes.take()).collect()
    }

    /// Counts what the metrics of a run say was spent before it was taken up again.
    pub fn count_earlier(&self, lines: &[Map<String, Value>]) {
        for (name, judge) in &self.judges {
            let sum = |what: &str| {
                let metric = format!("judge/{name}/{what}");
                let values = lines.iter().filter_map(|line| line.get(&metric)?.as_f64());
                values.sum::<f64>() as u64
            };
            let tokens = sum("prompt_tokens") + sum("completion_tokens");
            judge.0.ledger.spent_earlier(sum("requests"), tokens);
        }
    }
}

/// The key of an endpoint and the variable that has it.
fn key<'c>(
    name: &str,
    judge: &'c JudgeConfig,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<(&'c str, String)>, JudgeSetupError> {
    // Nobody is asked, so nobody wants a key.
    let Some(from) = judge.api_key_env.as_deref().filter(|_| !judge.offline) else {
        return Ok(None);
    };
    let key = variable(from).ok_or_else(|| JudgeSetupError::NoKey {
        judge: name.to_owned(),
        variable: from.to_owned(),
    })?;
    Ok(Some((from, key.trim().to_owned())))
}

fn start_workers(judge: &str) -> Result<Arc<Workers>, JudgeSetupError> {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("judge")
        .enable_all()
        .build();
    let runtime = runtime.map_err(|reason| JudgeSetupError::Threads {
        judge: judge.to_owned(),
        reason,
    })?;
    Ok(Arc::new(Workers(Some(runtime))))
}
