//! Plugins: untrusted WebAssembly components that score, format and plan.
//!
//! wasmtime lives here and nowhere else. A plugin is compiled once and instantiated afresh for every
//! request (or every sample); it can neither outlive its deadline, outgrow its memory, nor reach
//! anything but its arguments and what `grants` has for it. This room knows nothing of files, models or the training loop.

mod breaker;
mod check;
mod curriculum;
mod engine;
mod error;
mod formatter;
mod grants;
mod inspect;
mod limits;
mod log;
mod reward;
mod reward_set;
mod sandbox;
mod trial;
mod v0_1;
mod warm;
mod wasi;

pub use curriculum::CurriculumPlugin;
pub use error::{Call, Fault, GuestErrorKind, PluginError};
pub use formatter::{FormatterPlugin, RowText};
pub use grants::{
    Access, Asks, Capability, Grants, HttpAsk, HttpGrant, Manifest, ManifestError, Mismatch,
    SecretError, Secrets,
};
pub use inspect::Description;
pub use limits::{Isolation, Limits, MAX_COMPONENT_BYTES, OnFailure};
pub use log::{LogLevel, LogLine, LogSink, printable};
pub use reward::{RewardPlugin, Scoring, WarmReward};
pub use reward_set::{MemberScoring, NoteFailure, RewardSet, SetScoring, WeightError, Weighted};
pub use trial::{compile_stdin, try_compile};
pub use warm::Warm;

use crate::types::{PluginId, Role};
use engine::{SLOTS, Slots};
use sandbox::{CallState, Loaded};
use sha2::{Digest, Sha256};
use std::sync::{Arc, OnceLock};
use v0_1::EveryRole;
use warm::{Share, Taken, WARM_SLOTS};
use wasmtime::Engine;
use wasmtime::component::{HasSelf, InstancePre, Linker};

/// The engines that plugins run on. One per process is enough; it is cheap until the first load.
pub struct PluginHost {
    plain: Running,
    /// Counts fuel; made when the first plugin asks for it.
    fueled: OnceLock<Running>,
    sink: LogSink,
    /// Whether compiling uses all cores.
    parallel: bool,
}

/// An engine and the instances it may hold.
#[derive(Clone)]
struct Running {
    engine: Engine,
    slots: Arc<Slots>,
    warm_slots: Arc<Slots>,
    /// What the warm pools of loaded plugins have of `warm_slots`.
    taken: Taken,
}

impl Running {
    fn start(fuel: bool, parallel: bool) -> Result<Self, Fault> {
        Ok(Self {
            engine: engine::start(fuel, parallel)?,
            slots: Arc::new(Slots::new(SLOTS)),
            warm_slots: Arc::new(Slots::new(WARM_SLOTS)),
            taken: Taken::default(),
        })
    }
}

/// A loaded plugin in its role.
pub enum Plugin {
    Reward(RewardPlugin),
    Formatter(FormatterPlugin),
    Curriculum(CurriculumPlugin),
}

impl Plugin {
    /// Role, name and digest.
    pub fn id(&self) -> &PluginId {
        match self {
            Self::Reward(plugin) => plugin.id(),
            Self::Formatter(plugin) => plugin.id(),
            Self::Curriculum(plugin) => plugin.id(),
        }
    }
}

impl PluginHost {
    /// Starts an engine. Lines that guests log go to `sink`.
    ///
    /// # Errors
    /// [`Fault::Engine`] if the address space for the instance pool is refused.
    pub fn new(sink: LogSink) -> Result<Self, PluginError> {
        Self::start(sink, true)
    }

    /// A host that compiles on the calling thread alone, for components that are loaded while others are at work.
    ///
    /// # Errors
    /// As [`PluginHost::new`].
    pub fn beside_others(sink: LogSink) -> Result<Self, PluginError> {
        Self::start(sink, false)
    }

    fn start(sink: LogSink, parallel: bool) -> Result<Self, PluginError> {
        let plain = Running::start(false, parallel).map_err(|fault| PluginError {
            plugin: "host".into(),
            digest: "".into(),
            call: Call::Load,
            row: None,
            fault,
        })?;
        Ok(Self {
            plain,
            fueled: OnceLock::new(),
            sink,
            parallel,
        })
    }

    /// Compiles a component, reads its role from its exports, and makes a first instance of it with
    /// `config` (a JSON object for its `configure`), so that a plugin that loads is one that works.
    /// Compiling has no limit here: see [`try_compile`].
    ///
    /// # Errors
    /// Everything in [`Fault`] that can be known before the first batch, with plugin and digest.
    pub fn load(
        &self,
        name: &str,
        bytes: &[u8],
        config: &serde_json::Value,
        limits: &Limits,
    ) -> Result<Plugin, PluginError> {
        self.prepare(name, bytes, limits)?.configure(config, None)
    }

    /// Compiles a component and reads its role, without running any of it.
    ///
    /// # Errors
    /// A name or limits that cannot be, and bytes that are no component of one role, or import what there is not.
    pub fn prepare(
        &self,
        name: &str,
        bytes: &[u8],
        limits: &Limits,
    ) -> Result<Prepared, PluginError> {
        self.prepare_with(name, bytes, limits, Access::default())
    }

    /// The same for a plugin that is granted something. What its manifest asks for, what it is granted and what it
    /// imports must be the same.
    ///
    /// # Errors
    /// As [`PluginHost::prepare`]; a manifest that is malformed; a [`Mismatch`].
    pub fn prepare_with(
        &self,
        name: &str,
        bytes: &[u8],
        limits: &Limits,
        access: Access,
    ) -> Result<Prepared, PluginError> {
        let attribute = |fault| attributed(name, bytes, Call::Load, fault);
        limits.check().map_err(attribute)?;
        inspect::check_name(name).map_err(attribute)?;
        let (name, digest): (Arc<str>, Arc<str>) = (name.into(), digest(bytes).into());
        let running = self.running(limits).map_err(attribute)?;
        let (role, pre) = link(&running.engine, bytes, &access.grants).map_err(attribute)?;
        let reach = access.reach().map_err(|m| attribute(Fault::Grants(m)))?;
        let loaded = Loaded {
            id: PluginId {
                role,
                name: name.to_string(),
                digest: digest.to_string(),
            },
            config: String::new(),
            limits: limits.clone(),
            pre,
            slots: running.slots,
            warm_slots: running.warm_slots,
            sink: Arc::clone(&self.sink),
            reach,
            flood: Arc::default(),
            name: Arc::clone(&name),
            digest: Arc::clone(&digest),
        };
        let taken = running.taken;
        Ok(Prepared { loaded, taken })
    }

    /// Compiles a component and reads its types, without running any of it.
    ///
    /// # Errors
    /// A name that cannot be one, and bytes that are no component or one too large to compile.
    pub fn describe(&self, name: &str, bytes: &[u8]) -> Result<Description, PluginError> {
        let component = inspect::check_name(name)
            .and_then(|()| inspect::compile(&self.plain.engine, bytes))
            .map_err(|fault| attributed(name, bytes, Call::Load, fault))?;
        let manifest = Manifest::of(bytes)
            .map_err(|error| attributed(name, bytes, Call::Load, Fault::Manifest(error)))?;
        Ok(inspect::describe(&component, manifest))
    }

    fn running(&self, limits: &Limits) -> Result<Running, Fault> {
        if limits.fuel.is_none() {
            return Ok(self.plain.clone());
        }
        if let Some(running) = self.fueled.get() {
            return Ok(running.clone());
        }
        // Two threads may both start one; the loser's is dropped unused.
        let running = Running::start(true, self.parallel)?;
        Ok(self.fueled.get_or_init(|| running).clone())
    }
}

/// A component that is compiled and known to have one role; [`Prepared::configure`] makes plugins of it.
pub struct Prepared {
    loaded: Loaded,
    taken: Taken,
}

impl Prepared {
    /// Role, name and digest.
    pub fn id(&self) -> &PluginId {
        &self.loaded.id
    }

    /// Makes a first instance with `config` (a JSON object for its `configure`), so that a plugin that loads is one
    /// that works. With `warm`, instances stay for further requests.
    ///
    /// # Errors
    /// A config that is too large or that the guest refuses; whatever else a call may meet; a warm pool that is out
    /// of range, not to be had for this role, or too large beside those of other plugins.
    pub fn configure(
        &self,
        config: &serde_json::Value,
        warm: Option<Warm>,
    ) -> Result<Plugin, PluginError> {
        let attribute = |fault| self.loaded.error(Call::Load, fault);
        let loaded = Loaded {
            config: inspect::check_config(config).map_err(attribute)?,
            ..self.loaded.clone()
        };
        let share = warm.map(|warm| Share::take(warm, &self.taken));
        let share = share.transpose().map_err(attribute)?;
        Ok(match loaded.id.role {
            Role::Reward => Plugin::Reward(RewardPlugin::new(loaded, share)?),
            Role::Formatter => Plugin::Formatter(FormatterPlugin::new(loaded, share)?),
            Role::Curriculum if share.is_some() => {
                let why = "a curriculum is called once a step";
                return Err(attribute(Fault::NotWarm { why }));
            }
            Role::Curriculum => Plugin::Curriculum(CurriculumPlugin::new(loaded)?),
        })
    }
}

/// A fault of a component that is not loaded. The name may be the fault, so it is escaped.
fn attributed(name: &str, bytes: &[u8], call: Call, fault: Fault) -> PluginError {
    PluginError {
        plugin: printable(name, 200).into(),
        digest: digest(bytes).into(),
        call,
        row: None,
        fault,
    }
}

/// `sha256:` and the hex digest of a component's bytes, as in `plugins.lock`.
pub fn digest(bytes: &[u8]) -> String {
    let hex = |byte: u8| format!("{byte:02x}");
    let hex: String = Sha256::digest(bytes).into_iter().map(hex).collect();
    format!("sha256:{hex}")
}

fn link(
    engine: &Engine,
    bytes: &[u8],
    grants: &Grants,
) -> Result<(Role, InstancePre<CallState>), Fault> {
    let component = inspect::compile(engine, bytes)?;
    let manifest = Manifest::of(bytes).map_err(Fault::Manifest)?;
    let role = inspect::role(&component)?;
    let asks = manifest.map(|manifest| manifest.asks).unwrap_or_default();
    let imports = inspect::unknown_imports(&component, asks.wasi.is_some());
    if !imports.is_empty() {
        return Err(Fault::UnknownImports { imports });
    }
    let imported = inspect::imported(&component);
    grants::agree(&asks, grants, &imported, role).map_err(Fault::Grants)?;
    let signature = |error: wasmtime::Error| Fault::Signature {
        reason: printable(&format!("{error:#}"), 1024),
    };
    let mut linker = Linker::new(engine);
    EveryRole::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state).map_err(signature)?;
    if grants.wasi {
        wasi::link(&mut linker, &component).map_err(signature)?;
    }
    let pre = linker.instantiate_pre(&component).map_err(signature)?;
    Ok((role, pre))
}
