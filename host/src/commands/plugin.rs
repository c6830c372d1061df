//! `grpo-host plugin inspect|check`: what a component is, and whether this host can run it. The other
//! `plugin` commands are in `plugin_project.rs`.

use serde_json::json;

use crate::{
    cli::{Environment, PluginCheckArgs, PluginCommand, PluginFileArgs},
    config::PluginConfig,
    plugin::{Limits, Manifest, PluginHost, compile_stdin, digest},
    setup::{self, Component, Loaded, PluginSources},
};

use super::{accounts::settle, guest_log::guest_log, plugin_project, sharing, sources_on_trial};

pub(super) fn run(command: &PluginCommand, environment: &Environment) -> anyhow::Result<()> {
    match command {
        PluginCommand::New(args) => plugin_project::new(args),
        PluginCommand::Build(args) => plugin_project::build(args),
        PluginCommand::Test(args) => plugin_project::test(args, environment),
        PluginCommand::Inspect(args) => inspect(args, &PluginSources::new(environment, &[])?),
        PluginCommand::Check(args) => check(args, environment),
        PluginCommand::Swap(args) => super::plugin_swap::run(args),
        PluginCommand::Sharing(command) => sharing::run(command, environment),
        PluginCommand::CompileTrial { mib, ms } => {
            if let Some(reason) = compile_stdin(*mib, *ms)? {
                outln!("{reason}");
            }
            Ok(())
        }
    }
}

/// Prints role, digest, size, exports and imports; runs nothing of the component.
fn inspect(args: &PluginFileArgs, sources: &PluginSources) -> anyhow::Result<()> {
    let Component { name, bytes, .. } = sources.component(&args.plugin, &Limits::default())?;
    let found = PluginHost::new(guest_log())?.describe(&name, &bytes)?;
    let digest = digest(&bytes);
    if args.output.json {
        let object = json!({
            "name": name,
            "role": found.role,
            "digest": digest,
            "bytes": bytes.len(),
            "exports": found.exports,
            "imports": found.imports,
            "manifest": found.manifest,
        });
        outln!("{object}");
        return Ok(());
    }
    let role = found.role.map_or("none of ours".to_owned(), |role| {
        format!("{role:?}").to_lowercase()
    });
    outln!("   name  {name}");
    outln!("   role  {role}");
    outln!(" digest  {digest}");
    outln!("  bytes  {}", bytes.len());
    outln!("exports  {}", list(&found.exports));
    outln!("imports  {}", list(&found.imports));
    print_manifest(found.manifest.as_ref());
    Ok(())
}

/// What the component says of itself and asks for, a line each.
fn print_manifest(manifest: Option<&Manifest>) {
    let Some(manifest) = manifest else {
        outln!("   asks  nothing, having no manifest");
        return;
    };
    let Manifest { name, version, .. } = manifest;
    let license = manifest.license.as_ref();
    let license = license.map_or(String::new(), |license| format!(", {license}"));
    outln!(
        "     is  {name} {version}{license}: {}",
        manifest.description
    );
    let asks = manifest.asks.lines();
    outln!("   asks  {}", list(&asks));
}

fn list(names: &[String]) -> String {
    match names {
        [] => "nothing".to_owned(),
        names => names.join("\n         "),
    }
}

/// Loads the component as a run would before its first step, under the default limits or those given.
fn check(args: &PluginCheckArgs, environment: &Environment) -> anyhow::Result<()> {
    let sources = sources_on_trial(&args.access, args.output.quiet, environment)?;
    let config = PluginConfig {
        source: args.plugin.clone(),
        config: args.config.clone(),
        limits: args.limits(),
        grants: args.access.grants.clone(),
        ..PluginConfig::default()
    };
    let host = PluginHost::new(guest_log())?;
    let Loaded { plugin, bytes, .. } = setup::load_whole(&host, &config, &sources)?;
    // Its `configure` may have asked.
    settle(sources.judges());
    let manifest = Manifest::of(&bytes)?;
    let id = plugin.id();
    if args.output.json {
        let object = json!({ "ok": true, "role": id.role, "name": id.name, "digest": id.digest, "manifest": manifest });
        outln!("{object}");
    } else {
        let role = format!("{:?}", id.role).to_lowercase();
        outln!("ok: {role} `{}` {}", id.name, id.digest);
        if let Some(manifest) = &manifest {
            print_manifest(Some(manifest));
        }
    }
    Ok(())
}
