//! What a plugin's source stands for (a built-in name, a file, a reference into a registry), and whose signature it needs;
//! and what its grants stand for.

use std::{
    io::{ErrorKind, Read},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::{Map, Value};

use super::grants;
use crate::{
    cli::{COMPILE_TRIAL, Environment},
    defaults,
    judge::Panel,
    plugin::{Access, Limits, MAX_COMPONENT_BYTES, try_compile},
    registry::{
        Fetch, Fetched, Reference, Registry, RegistryConfig, RegistryError, Subject, TrustList,
        is_reference,
    },
};

/// Of a signature beside a component's file, as minisign names it.
const SIDECAR: &str = "minisig";
/// The user's own keys, in the folder of settings.
const TRUSTED_KEYS: &str = "trusted_keys";
/// Bytes of a file of keys or of a signature.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Where components come from, and what they may be granted.
pub struct PluginSources {
    registry: Registry,
    trust: TrustList,
    /// Those that plugins may be granted.
    judges: Panel,
}

/// A component's bytes before they are compiled.
pub struct Component {
    /// Under which it stands in logs and metrics.
    pub name: String,
    pub bytes: Vec<u8>,
    /// As it was asked for; a reference pinned to the manifest that it stood for.
    pub source: String,
}

impl PluginSources {
    /// With the keys of a config and those of the user's `trusted_keys` file.
    ///
    /// # Errors
    /// A line of either that is no key; a file that cannot be read.
    pub fn new(environment: &Environment, trusted_keys: &[String]) -> anyhow::Result<Self> {
        let mut trust = TrustList::default();
        for key in trusted_keys {
            trust.add(key, "trusted_keys")?;
        }
        if let Some(folder) = &environment.settings {
            let path = folder.join(TRUSTED_KEYS);
            if let Some(text) = text_if_there(&path)? {
                trust.add_file(&text, &path.display().to_string())?;
            }
        }
        Ok(Self::with_trust(environment, trust))
    }

    /// With these keys alone.
    pub fn with_trust(environment: &Environment, trust: TrustList) -> Self {
        let registry = Registry::new(RegistryConfig {
            cache_dir: environment
                .cache
                .as_ref()
                .map(|cache| cache.join("plugins")),
            docker_config: environment.docker_config.clone(),
            offline: environment.hf_hub_offline,
            ..RegistryConfig::new(MAX_COMPONENT_BYTES as u64)
        });
        Self {
            registry,
            trust,
            judges: Panel::default(),
        }
    }

    /// With judges that plugins may be granted.
    pub fn with_judges(self, judges: Panel) -> Self {
        Self { judges, ..self }
    }

    pub fn judges(&self) -> &Panel {
        &self.judges
    }

    /// What the grants of a plugin stand for.
    ///
    /// # Errors
    /// Wrong keys and types; a judge, a variable or a secret that there is not.
    pub fn access(&self, plugin: &str, grants: &Map<String, Value>) -> anyhow::Result<Access> {
        grants::access(plugin, grants, &self.judges)
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    pub fn trust(&self) -> &TrustList {
        &self.trust
    }

    /// The component of a source. One from outside has the signature that the trusted keys demand, and has been compiled on
    /// trial in a child process, under `limits.compile_ms`.
    pub fn component(&self, source: &str, limits: &Limits) -> anyhow::Result<Component> {
        let path = Path::new(source);
        // A file goes before a reference, but for a pinned one, which nothing else may stand in for.
        if is_reference(source) && (source.contains("@sha256:") || !path.exists()) {
            return self.referenced(source, limits);
        }
        if !path.exists()
            && let Some(bytes) = defaults::shipped(source)?
        {
            return Ok(Component {
                name: source.to_owned(),
                bytes: bytes.into_owned(),
                source: source.to_owned(),
            });
        }
        let bytes = read_component(path)?;
        // A file without a signature is the user's own; one that is beside it must be good.
        if !self.trust.is_empty()
            && let Some(signatures) = sidecar(path)?
        {
            self.trust
                .check(Subject::File(source), &bytes, &signatures)?;
        }
        let name = path
            .file_stem()
            .map_or(source.into(), |stem| stem.to_string_lossy());
        compile_on_trial(&name, &bytes, limits)?;
        Ok(Component {
            name: name.into_owned(),
            bytes,
            source: source.to_owned(),
        })
    }

    fn referenced(&self, source: &str, limits: &Limits) -> anyhow::Result<Component> {
        let reference: Reference = source.parse()?;
        let signatures = self.trust.covers(Subject::Reference(&reference));
        let fetch = Fetch {
            signatures,
            fresh: false,
        };
        let found = self.registry.fetch(&reference, fetch)?;
        self.refuse_untrusted(&reference, &found)?;
        compile_on_trial(reference.name(), &found.bytes, limits)?;
        let pin = match reference.digest {
            Some(_) => String::new(),
            None => format!("@{}", found.manifest),
        };
        Ok(Component {
            name: reference.name().to_owned(),
            bytes: found.bytes,
            source: format!("{source}{pin}"),
        })
    }

    /// Holds what was fetched to the trusted keys that cover it, if any do.
    pub fn refuse_untrusted(&self, reference: &Reference, found: &Fetched) -> anyhow::Result<()> {
        let subject = Subject::Reference(reference);
        if self.trust.covers(subject) {
            self.trust.check(subject, &found.bytes, &found.signatures)?;
        }
        Ok(())
    }
}

fn compile_on_trial(name: &str, bytes: &[u8], limits: &Limits) -> anyhow::Result<()> {
    // Where there is /proc, the program that runs: its file may have been replaced since, as by a build.
    let itself = PathBuf::from("/proc/self/exe");
    let program = match itself.exists() {
        true => itself,
        false => std::env::current_exe().context("cannot find this program's own file")?,
    };
    Ok(try_compile(&program, &COMPILE_TRIAL, name, bytes, limits)?)
}

/// No more of a file than tells that it is too large: it may be a device that never ends. A pipe is refused: nobody may ever
/// write to it, and a run's thread would wait.
pub fn read_component(path: &Path) -> Result<Vec<u8>, MissingPlugin> {
    let mut bytes = Vec::new();
    let limit = MAX_COMPONENT_BYTES as u64 + 1;
    let read = std::fs::metadata(path).and_then(|found| {
        if found.file_type().is_fifo() {
            return Err(std::io::Error::other("it is a pipe, not a file"));
        }
        std::fs::File::open(path)?
            .take(limit)
            .read_to_end(&mut bytes)
    });
    read.map_err(|error| MissingPlugin {
        source_name: path.display().to_string(),
        error,
    })?;
    Ok(bytes)
}

/// The file of a component's signatures: `reward.wasm.minisig`.
pub fn sidecar_path(component: &Path) -> PathBuf {
    let mut path = component.as_os_str().to_owned();
    path.push(".");
    path.push(SIDECAR);
    PathBuf::from(path)
}

/// Signatures beside a file; `None` if there is no such file. Several of them follow one another.
pub fn sidecar(component: &Path) -> anyhow::Result<Option<Vec<String>>> {
    let text = text_if_there(&sidecar_path(component))?;
    Ok(text.map(|text| {
        let lines: Vec<&str> = text.lines().collect();
        lines.chunks(4).map(|four| four.join("\n")).collect()
    }))
}

/// A small text file; `None` if it is not there.
pub fn text_if_there(path: &Path) -> Result<Option<String>, RegistryError> {
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(MAX_TEXT_BYTES).read_to_string(&mut text));
    match read {
        Ok(_) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RegistryError::File {
            path: path.to_owned(),
            source,
        }),
    }
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
            "give the path of a .wasm component, a reference such as ghcr.io/me/reward:1.2, or one of {names}"
        ))
    }
}
