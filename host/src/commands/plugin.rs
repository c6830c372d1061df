//! `grpo-host plugin inspect|check`: what a component is, and whether this host can run it. The other
//! `plugin` commands are in `plugin_project.rs`.

use serde_json::json;

use crate::{
    cli::{Environment, PluginCheckArgs, PluginCommand, PluginFileArgs},
    config::PluginConfig,
    plugin::{Limits, PluginHost, compile_stdin, digest},
    setup::{self, Component, PluginSources},
};

use super::{guest_log::guest_log, plugin_project, sharing};

pub(super) fn run(command: &PluginCommand, environment: &Environment) -> anyhow::Result<()> {
    let sources = || PluginSources::new(environment, &[]);
    match command {
        PluginCommand::New(args) => plugin_project::new(args),
        PluginCommand::Build(args) => plugin_project::build(args),
        PluginCommand::Test(args) => plugin_project::test(args, &sources()?),
        PluginCommand::Inspect(args) => inspect(args, &sources()?),
        PluginCommand::Check(args) => check(args, &sources()?),
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
    Ok(())
}

fn list(names: &[String]) -> String {
    match names {
        [] => "nothing".to_owned(),
        names => names.join("\n         "),
    }
}

/// Loads the component as a run would before its first step, under the default limits or those given.
fn check(args: &PluginCheckArgs, sources: &PluginSources) -> anyhow::Result<()> {
    let config = PluginConfig {
        source: args.plugin.clone(),
        config: args.config.clone(),
        limits: args.limits.clone(),
        ..PluginConfig::default()
    };
    let plugin = setup::load_plugin(&PluginHost::new(guest_log())?, &config, sources)?;
    let id = plugin.id();
    if args.output.json {
        let object = json!({ "ok": true, "role": id.role, "name": id.name, "digest": id.digest });
        outln!("{object}");
    } else {
        let role = format!("{:?}", id.role).to_lowercase();
        outln!("ok: {role} `{}` {}", id.name, id.digest);
    }
    Ok(())
}
