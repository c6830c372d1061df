//! The config of a run: YAML text and command-line flags in, one validated [`RunConfig`] out.
//!
//! [`RawConfig`] holds keys and where they came from; [`RawConfig::validate`] turns them into typed
//! sections once, and nothing is checked again later. Keys and defaults are in `sections`, ranges in
//! `validate`. Plugin limits pass through unread: the plugin host owns their names.

mod choices;
mod draft;
mod error;
mod judges;
mod nested;
mod sections;
#[cfg(test)]
mod tests;
mod validate;

use std::{collections::BTreeMap, path::Path};

use serde::{Serialize, de::DeserializeOwned};
use serde_norway::{Mapping, Value};

pub use choices::{
    Device, DynamicSampling, ImportanceMode, KlEstimator, LossType, LrSchedule, MomentType,
    QuantizedWeights, ScaleRewards,
};
pub use draft::{DraftKind, DraftTokens};
pub use error::{ConfigError, Origin};
pub use judges::{JudgeConfig, JudgesConfig, MaxTokensField, SELF};
pub use sections::{
    EvalConfig, GenerationConfig, HardwareConfig, ImportanceCorrection, InputConfig, LoraConfig,
    LossConfig, OptimizerConfig, OutputConfig, PluginConfig, PluginsConfig, TrainingConfig,
};

/// A validated run. Serialises to the flat YAML it was read from, defaults filled in.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RunConfig {
    #[serde(flatten)]
    pub input: InputConfig,
    #[serde(flatten)]
    pub plugins: PluginsConfig,
    #[serde(flatten)]
    pub judges: JudgesConfig,
    #[serde(flatten)]
    pub generation: GenerationConfig,
    #[serde(flatten)]
    pub loss: LossConfig,
    #[serde(flatten)]
    pub optimizer: OptimizerConfig,
    #[serde(flatten)]
    pub training: TrainingConfig,
    #[serde(flatten)]
    pub eval: EvalConfig,
    #[serde(flatten)]
    pub output: OutputConfig,
    #[serde(flatten)]
    pub hardware: HardwareConfig,
}

impl RunConfig {
    /// The run's `config.yaml`; [`RawConfig::from_yaml`] reads it back to an equal config.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_norway::to_string(self).map_err(|source| ConfigError::Write { source })
    }

    /// What is wrong with a patience that cannot end the run; `None` if it can, or if there is none.
    ///
    /// The first evaluation is the best so far, and only those before the last step can end anything.
    pub fn idle_patience(&self) -> Option<String> {
        let patience = u64::from(self.eval.early_stopping_patience?);
        let (every, steps) = (self.eval.eval_steps, self.training.max_steps);
        let during = steps.saturating_sub(1).checked_div(every).unwrap_or(0);
        let without_gain = match self.eval.eval_on_start {
            true => during,
            false => during.saturating_sub(1),
        };
        (without_gain < patience).then(|| {
            format!(
                "early_stopping_patience {patience} cannot end this run: with eval_steps {every} it has \
                 {during} evaluations before its last step"
            )
        })
    }
}

/// Keys as given, each with its origin. A key given again replaces the earlier value as a whole.
#[derive(Clone, Debug, Default)]
pub struct RawConfig {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    origin: Origin,
}

impl RawConfig {
    /// Reads a YAML file. Unknown keys are refused here, with the nearest known one.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_yaml(&text, &path.display().to_string())
    }

    /// Reads YAML text; `name` stands for the file in messages. Empty text is an empty config.
    pub fn from_yaml(text: &str, name: &str) -> Result<Self, ConfigError> {
        let syntax = |source| ConfigError::Syntax {
            name: name.to_owned(),
            source,
        };
        let mapping = match serde_norway::from_str::<Option<Value>>(text).map_err(syntax)? {
            None => Mapping::new(),
            Some(Value::Mapping(mapping)) => mapping,
            Some(_) => {
                return Err(ConfigError::NotKeys {
                    name: name.to_owned(),
                });
            }
        };
        Self::from_mapping(mapping, &validate::Document { text, name })
    }

    /// One whole key and its value as YAML, given by `flag`.
    pub fn from_pair(key: &str, yaml: &str, flag: &'static str) -> Result<Self, ConfigError> {
        Self::of_flag(key, Self::value(key, yaml, flag)?, flag)
    }

    fn value(key: &str, yaml: &str, flag: &'static str) -> Result<Value, ConfigError> {
        serde_norway::from_str(yaml).map_err(|source| ConfigError::Syntax {
            name: format!("the value of {flag} {key}"),
            source,
        })
    }

    fn of_flag(key: &str, value: Value, flag: &'static str) -> Result<Self, ConfigError> {
        let mapping = Mapping::from_iter([(Value::from(key), value)]);
        let document = validate::Document {
            text: "",
            name: flag,
        };
        Self::from_mapping(mapping, &document)
    }

    /// Sets a key from a command-line flag, its value as YAML; `a.b.c` sets one key inside of the map `a`, and leaves the
    /// others of it as they are.
    ///
    /// # Errors
    /// Text that is no YAML; keys that no section reads; a path into something that is no map.
    pub fn set_pair(
        &mut self,
        key: &str,
        yaml: &str,
        flag: &'static str,
    ) -> Result<(), ConfigError> {
        let Some((top, rest)) = key.split_once('.') else {
            self.overlay(Self::from_pair(key, yaml, flag)?);
            return Ok(());
        };
        let known = self.entries.get(top).map(|entry| &entry.value);
        let path = nested::path(known, rest);
        let value = Self::value(key, yaml, flag)?;
        let whole = nested::with(known, &path, value).map_err(|keys| {
            let parents = [top].into_iter().chain(path.iter().map(String::as_str));
            ConfigError::NoMap {
                key: key.to_owned(),
                parent: parents.take(keys + 1).collect::<Vec<_>>().join("."),
                flag,
            }
        })?;
        self.overlay(Self::of_flag(top, whole, flag)?);
        Ok(())
    }

    fn from_mapping(
        mapping: Mapping,
        document: &validate::Document<'_>,
    ) -> Result<Self, ConfigError> {
        document.refuse_unknown_keys(&mapping)?;
        let mut raw = Self::default();
        for (key, value) in mapping {
            // The check above let no other kind of key through.
            let Value::String(key) = key else { continue };
            let origin = document.origin(&[&key]);
            raw.entries.insert(key, Entry { value, origin });
        }
        Ok(raw)
    }

    /// Takes every key of `later`, which wins.
    pub fn overlay(&mut self, later: Self) {
        self.entries.extend(later.entries);
    }

    /// Sets a key from a command-line flag, named in messages as `flag`.
    pub fn set(
        &mut self,
        key: &'static str,
        flag: &'static str,
        value: impl Serialize,
    ) -> Result<(), ConfigError> {
        let origin = Origin::Flag(flag);
        let value = serde_norway::to_value(value).map_err(|source| ConfigError::WrongType {
            key: key.to_owned(),
            origin: origin.clone(),
            source,
        })?;
        self.entries.insert(key.to_owned(), Entry { value, origin });
        Ok(())
    }

    /// Whether the key was given.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Fills in defaults and checks every range.
    pub fn validate(&self) -> Result<RunConfig, ConfigError> {
        for (key, entry) in &self.entries {
            // A plugin gets its config as JSON, which has no such numbers and would say `null`.
            validate::refuse_non_finite(&entry.value, key, &|key| self.origin(key))?;
        }
        let config = RunConfig {
            input: self.section()?,
            plugins: self.section()?,
            judges: self.section()?,
            generation: self.section()?,
            loss: self.section()?,
            optimizer: self.section()?,
            training: self.section()?,
            eval: self.section()?,
            output: self.section()?,
            hardware: self.section()?,
        };
        validate::ranges(&config, self)?;
        Ok(config)
    }

    fn origin(&self, key: &str) -> Origin {
        // `plugins[0].weight` came from where `plugins` came from.
        let top = key.split(['.', '[']).next().unwrap_or(key);
        self.entries
            .get(top)
            .map_or(Origin::Default, |entry| entry.origin.clone())
    }

    /// The keys of one section, typed. `null` means the default.
    ///
    /// serde reports a wrong value without its key, so after a failure each key is tried alone.
    fn section<T: DeserializeOwned + Serialize + Default>(&self) -> Result<T, ConfigError> {
        let keys = validate::known_keys::<T>();
        let given: Vec<_> = self
            .entries
            .iter()
            .filter(|(key, entry)| keys.contains(key) && !entry.value.is_null())
            .collect();
        let mapping: Mapping = given
            .iter()
            .map(|(key, entry)| (Value::from(key.as_str()), entry.value.clone()))
            .collect();
        serde_norway::from_value(Value::Mapping(mapping)).or_else(|whole| {
            for (key, entry) in given {
                let alone = Mapping::from_iter([(Value::from(key.as_str()), entry.value.clone())]);
                serde_norway::from_value::<T>(Value::Mapping(alone)).map_err(|source| {
                    ConfigError::WrongType {
                        key: key.clone(),
                        origin: entry.origin.clone(),
                        source,
                    }
                })?;
            }
            Err(ConfigError::Syntax {
                name: "config".to_owned(),
                source: whole,
            })
        })
    }
}
