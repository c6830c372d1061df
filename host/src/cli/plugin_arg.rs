//! `--plugin FILE|REF[=WEIGHT]`.

use std::str::FromStr;

use crate::config::PluginConfig;

/// A plugin named on the command line.
///
/// What follows the last `=` is the weight if it is a number, else part of the name; a file whose own
/// name ends in `=3` is written `…=3=1`.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginArg {
    pub source: String,
    /// `None`: not given, which counts as 1.
    pub weight: Option<f64>,
}

impl PluginArg {
    /// The config entry it stands for.
    pub fn config(&self) -> PluginConfig {
        let default = PluginConfig::default();
        PluginConfig {
            source: self.source.clone(),
            weight: self.weight.unwrap_or(default.weight),
            ..default
        }
    }
}

impl FromStr for PluginArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = || Self {
            source: text.to_owned(),
            weight: None,
        };
        let plugin = match text.rsplit_once('=') {
            None => whole(),
            Some((source, number)) => match number.parse::<f64>() {
                Ok(weight) if weight.is_finite() => Self {
                    source: source.to_owned(),
                    weight: Some(weight),
                },
                Ok(_) => return Err(format!("weight `{number}` is not finite")),
                // `a.wasm=heavy` is a slip, `a=b.wasm` a name.
                Err(_) if source.ends_with(".wasm") && !number.ends_with(".wasm") => {
                    return Err(format!("weight `{number}` is not a number"));
                }
                Err(_) => whole(),
            },
        };
        if plugin.source.is_empty() {
            return Err("no file or name before the weight".to_owned());
        }
        Ok(plugin)
    }
}
