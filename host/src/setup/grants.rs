//! What the grants of a config stand for: the judge of a name, the value of an environment variable.

use serde_json::{Map, Value};

use super::plugins::settings;
use crate::{
    cli::Environment,
    judge::Panel,
    plugin::{Access, Grants, SecretError, Secrets},
};

const GRANT_KEYS: &str = "its keys are `judge: NAME`, `http: {hosts: [HOST, …]}`, `secrets: {NAME: ENVIRONMENT_VARIABLE}` and `wasi: true`";

/// Grants that stand for nothing.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error("plugin `{plugin}` is granted the judge `{name}`, which `judges` does not have")]
    NoJudge {
        plugin: String,
        name: String,
        known: String,
    },
    #[error("secret `{name}` of plugin `{plugin}`: the environment variable {variable} is not set")]
    Unset {
        plugin: String,
        name: String,
        variable: String,
    },
    #[error("secret `{name}` of plugin `{plugin}`: the environment variable {variable} {source}")]
    Secret {
        plugin: String,
        name: String,
        variable: String,
        source: SecretError,
    },
}

impl GrantError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoJudge { known, name, .. } if known.is_empty() => {
                format!(
                    "define it in a config file: `judges: {{{name}: {{endpoint: URL, model: NAME}}}}`; without a run \
                     --judges takes such a file, or the judges as JSON"
                )
            }
            Self::NoJudge { known, .. } => format!("it has {known}"),
            Self::Unset { variable, .. } => format!("export {variable}"),
            Self::Secret { variable, .. } => {
                format!("export {variable} with the secret and nothing else, 8 bytes to 64 KiB")
            }
        })
    }
}

/// Everything that a plugin is granted.
///
/// # Errors
/// Keys and types that are wrong, judges that there are not, variables that are not set or hold no secret.
pub(super) fn access(
    plugin: &str,
    values: &Map<String, Value>,
    judges: &Panel,
) -> anyhow::Result<Access> {
    let grants: Grants = settings(("grants", GRANT_KEYS), plugin, values)?;
    let judge = match &grants.judge {
        None => None,
        Some(name) => {
            let judge = judges.get(name).ok_or_else(|| GrantError::NoJudge {
                plugin: plugin.to_owned(),
                name: name.clone(),
                known: judges.names().collect::<Vec<_>>().join(", "),
            })?;
            Some(judge.clone())
        }
    };
    let mut secrets = Secrets::default();
    for (name, variable) in &grants.secrets {
        let (plugin, owned, variable) = (plugin.to_owned(), name.clone(), variable.clone());
        match Environment::variable(&variable) {
            None => {
                return Err(GrantError::Unset {
                    plugin,
                    name: owned,
                    variable,
                }
                .into());
            }
            Some(value) => secrets
                .add(name, &value)
                .map_err(|source| GrantError::Secret {
                    plugin,
                    name: owned,
                    variable,
                    source,
                })?,
        }
    }
    Ok(Access {
        grants,
        judge,
        secrets,
    })
}
