//! What a plugin gets beyond its arguments: nothing, unless its manifest asks for it, the operator's config grants it, and
//! the component really imports it. The three are held against each other before anything runs.

mod http;
mod manifest;
mod rules;
mod secrets;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::printable;
use crate::judge::Judge;
use crate::types::Role;
use http::Http;
pub(super) use http::{HttpError, Request as HttpRequest, Response as HttpResponse};
pub use manifest::{Asks, HttpAsk, Manifest, ManifestError};
use rules::HostRule;
pub use secrets::{SecretError, Secrets};

/// How hints say where grants are where there is no config.
const WITHOUT_A_RUN: &str = "`plugin check`, `plugin test` and `bench plugin` take";

/// What the operator gives one plugin, as the run's config says it. Every key has a default, which is nothing; an unknown
/// key is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grants {
    /// One of the config's `judges`, by its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpGrant>,
    /// The plugin's name of a secret, and the environment variable that has it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, String>,
    /// WASI 0.2 with virtual clocks and constant randomness, and without files and sockets.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub wasi: bool,
}

/// Hosts that a plugin may speak with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpGrant {
    /// `HOST`, `HOST:PORT`, each with `http://` in front for plain HTTP.
    pub hosts: Vec<String>,
}

/// Grants with what they stand for.
#[derive(Clone, Default)]
pub struct Access {
    pub grants: Grants,
    /// The judge that `grants.judge` names.
    pub judge: Option<Judge>,
    /// The values of `grants.secrets`.
    pub secrets: Secrets,
}

/// What a running plugin reaches the world through. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Reach {
    pub(super) judge: Option<Judge>,
    http: Option<Http>,
    pub(super) secrets: Arc<Secrets>,
}

/// A capability that can be granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    Judge,
    Http,
    Secrets,
    Wasi,
}

impl Capability {
    const ALL: [Self; 4] = [Self::Judge, Self::Http, Self::Secrets, Self::Wasi];

    /// As manifests and configs call it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Judge => "judge",
            Self::Http => "http",
            Self::Secrets => "secrets",
            Self::Wasi => "wasi",
        }
    }

    /// The beginning of the names of its imports.
    fn import(self) -> &'static str {
        match self {
            Self::Judge => "grpo:plugin/judge@",
            Self::Http => "grpo:plugin/http@",
            Self::Secrets => "grpo:plugin/secrets@",
            Self::Wasi => "wasi:",
        }
    }
}

/// Where manifest, config and component disagree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    #[error("asks for `{key}` (\"{reason}\"), which the config does not grant")]
    NotGranted { key: String, reason: String },
    #[error("is granted `{key}` by the config, which its manifest does not ask for")]
    NotAsked { key: String },
    #[error("imports `{import}`, which its manifest does not ask for")]
    Hidden { import: String },
    #[error("asks for `{key}` in its manifest and imports nothing of it")]
    Unused { key: &'static str },
    #[error(
        "asks for `{key}`, which no curriculum gets: a plan is a function of state and outcomes"
    )]
    Curriculum { key: &'static str },
    #[error("is granted the host {reason}")]
    Host { reason: String },
}

impl Mismatch {
    /// What the reader can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NotGranted { key, .. } if key == "judge" => {
                format!(
                    "if you trust it with that, write `grants: {{judge: NAME}}` beside its source, with a name of `judges`; \
                     {WITHOUT_A_RUN} --grants and --judges"
                )
            }
            Self::NotGranted { key, .. } => match key.split_once(": ") {
                None if key == "wasi" => {
                    "if you trust it with that, write `grants: {wasi: true}` beside its source".to_owned()
                }
                Some(("http", host)) => format!(
                    "if you trust it with that, write `grants: {{http: {{hosts: [\"{host}\"]}}}}` beside its source; \
                     {WITHOUT_A_RUN} --grants"
                ),
                Some((_, name)) => format!(
                    "if you trust it with that, write `grants: {{secrets: {{{name}: ENVIRONMENT_VARIABLE}}}}` beside its \
                     source; {WITHOUT_A_RUN} --grants"
                ),
                None => "if you trust it with that, write it under `grants` beside its source".to_owned(),
            },
            Self::NotAsked { .. } => {
                "take it out of `grants`: a plugin gets what it asks for, and nothing else".to_owned()
            }
            Self::Hidden { .. } => {
                "its author has to ask for it in plugin.json and build it again; do not run it as it is".to_owned()
            }
            Self::Unused { .. } => "its author has to take it out of plugin.json".to_owned(),
            Self::Curriculum { .. } => "make a reward or formatter of it".to_owned(),
            Self::Host { .. } => "name each as HOST, HOST:PORT or http://HOST:PORT".to_owned(),
        }
    }
}

/// Holds what a component asks for, gets and imports against each other.
///
/// # Errors
/// The first disagreement.
pub(super) fn agree(
    asks: &Asks,
    grants: &Grants,
    imports: &[String],
    role: Role,
) -> Result<(), Mismatch> {
    for capability in Capability::ALL {
        let key = capability.key();
        let asked = reason(asks, capability);
        let import = imports.iter().find(|i| i.starts_with(capability.import()));
        match (asked, import) {
            (None, Some(import)) => {
                let import = printable(import, 200);
                return Err(Mismatch::Hidden { import });
            }
            // What WASI is here, is the same in every run, so that a plan may rest on it.
            (Some(_), _) if role == Role::Curriculum && capability != Capability::Wasi => {
                return Err(Mismatch::Curriculum { key });
            }
            (Some(_), None) => return Err(Mismatch::Unused { key }),
            _ => {}
        }
    }
    granted(asks, grants)
}

/// Why a plugin asks for something; `None` if it does not.
fn reason(asks: &Asks, capability: Capability) -> Option<String> {
    match capability {
        Capability::Judge => asks.judge.clone(),
        Capability::Http => asks.http.as_ref().map(|http| http.reason.clone()),
        Capability::Secrets if asks.secrets.is_empty() => None,
        Capability::Secrets => Some(asks.secrets.join(", ")),
        Capability::Wasi => asks.wasi.clone(),
    }
}

fn granted(asks: &Asks, grants: &Grants) -> Result<(), Mismatch> {
    let not_asked = |key: &str| {
        Err(Mismatch::NotAsked {
            key: key.to_owned(),
        })
    };
    match (&asks.judge, &grants.judge) {
        (Some(reason), None) => {
            return Err(Mismatch::NotGranted {
                key: "judge".to_owned(),
                reason: reason.clone(),
            });
        }
        (None, Some(_)) => return not_asked("judge"),
        _ => {}
    }
    match (&asks.wasi, grants.wasi) {
        (Some(reason), false) => {
            return Err(Mismatch::NotGranted {
                key: "wasi".to_owned(),
                reason: reason.clone(),
            });
        }
        (None, true) => return not_asked("wasi"),
        _ => {}
    }
    let given: &[String] = grants.http.as_ref().map_or(&[], |http| &http.hosts);
    match &asks.http {
        // Granted without hosts, it would be a grant of nothing.
        None if grants.http.is_some() => return not_asked("http"),
        None => {}
        Some(ask) if ask.any() && !given.is_empty() => {}
        Some(ask) => {
            if let Some(host) = ask.hosts.iter().find(|host| !given.contains(host)) {
                // The operator's choice stands for itself.
                let host = if ask.any() { "HOST" } else { host };
                return Err(Mismatch::NotGranted {
                    key: format!("http: {host}"),
                    reason: ask.reason.clone(),
                });
            }
            if let Some(host) = given.iter().find(|host| !ask.hosts.contains(host)) {
                return not_asked(&format!("http: {}", printable(host, 200)));
            }
        }
    }
    let missing = |name: &&String| !grants.secrets.contains_key(*name);
    if let Some(name) = asks.secrets.iter().find(missing) {
        return Err(Mismatch::NotGranted {
            key: format!("secrets: {name}"),
            reason: "it reads this secret".to_owned(),
        });
    }
    match grants
        .secrets
        .keys()
        .find(|name| !asks.secrets.contains(name))
    {
        Some(name) => not_asked(&format!("secrets: {}", printable(name, 64))),
        None => Ok(()),
    }
}

impl Access {
    /// Everything that is granted, ready for use.
    ///
    /// # Errors
    /// A host that is none; TLS that does not start.
    pub(super) fn reach(self) -> Result<Reach, Mismatch> {
        let host = |reason: String| Mismatch::Host { reason };
        let http = match &self.grants.http {
            None => None,
            Some(grant) => {
                let rules = grant.hosts.iter().map(|h| HostRule::parse(h));
                let rules = rules.collect::<Result<_, _>>().map_err(host)?;
                let http = Http::new(rules, &http::system_lookup());
                Some(http.map_err(|e| host(printable(&e.to_string(), 200)))?)
            }
        };
        Ok(Reach {
            judge: self.judge,
            http,
            secrets: Arc::new(self.secrets),
        })
    }
}

impl Reach {
    /// Sends requests of a guest; see [`Http::send`].
    pub(super) fn http(
        &self,
        requests: &[HttpRequest],
        end: Instant,
    ) -> Vec<Result<HttpResponse, HttpError>> {
        match &self.http {
            Some(http) => http.send(requests, end),
            // Nothing links it without the grant.
            None => vec![Err(HttpError::Denied("nothing was granted".to_owned())); requests.len()],
        }
    }
}

#[cfg(test)]
mod tests;
