//! The environment variables the host knows, read once into a plain struct.

use std::path::PathBuf;

/// What the environment says. Names and meanings are Hugging Face's, the XDG base directories' and Docker's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `HF_ENDPOINT`: the hub, without a slash at the end. `None`: the public one.
    pub hf_endpoint: Option<String>,
    /// `HF_TOKEN`: sent to the hub as bearer token.
    pub hf_token: Option<String>,
    /// `HF_HOME`, else `huggingface` in `XDG_CACHE_HOME` or `~/.cache`. `None` if there is no home.
    pub hf_home: Option<PathBuf>,
    /// Where what can be made again is kept: `grpo-host` in `XDG_CACHE_HOME` or `~/.cache`. `None` if there is no home.
    pub cache: Option<PathBuf>,
    /// Where the user's own settings are: `grpo-host` in `XDG_CONFIG_HOME` or `~/.config`. `None` if there is no home.
    pub settings: Option<PathBuf>,
    /// Docker's `config.json`, in `DOCKER_CONFIG` or `~/.docker`: credentials of registries. `None` if there is no home.
    pub docker_config: Option<PathBuf>,
    /// `HF_HUB_OFFLINE` is `1`, `on`, `yes` or `true`: use the caches of hub and registries only.
    pub hf_hub_offline: bool,
}

impl Environment {
    /// Reads the process's environment.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one reader of the environment"
    )]
    pub fn read() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// A variable that a config names, such as one with a key; `None` if it is empty or no text.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one reader of the environment"
    )]
    pub fn variable(name: &str) -> Option<String> {
        std::env::var(name).ok().filter(|value| !value.is_empty())
    }

    /// Reads any environment. A variable that is empty counts as not set.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name| lookup(name).filter(|value| !value.is_empty());
        let folder = |name, in_home| {
            get(name)
                .map(PathBuf::from)
                .or_else(|| get("HOME").map(|home| PathBuf::from(home).join(in_home)))
        };
        let cache = || folder("XDG_CACHE_HOME", ".cache");
        Self {
            hf_endpoint: get("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
            hf_token: get("HF_TOKEN").map(|token| token.trim().to_owned()),
            hf_home: get("HF_HOME")
                .map(PathBuf::from)
                .or_else(|| cache().map(|cache| cache.join("huggingface"))),
            cache: cache().map(|cache| cache.join("grpo-host")),
            settings: folder("XDG_CONFIG_HOME", ".config").map(|folder| folder.join("grpo-host")),
            docker_config: folder("DOCKER_CONFIG", ".docker")
                .map(|folder| folder.join("config.json")),
            hf_hub_offline: get("HF_HUB_OFFLINE").is_some_and(|value| {
                ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
            }),
        }
    }
}
