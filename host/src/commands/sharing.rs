//! `grpo-host plugin push|pull|sign|verify|search`: plugins in registries and in folders, and who signed them.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::{
    cli::{
        Environment, PluginPullArgs, PluginPushArgs, PluginSearchArgs, PluginSignArgs,
        PluginVerifyArgs, SharingCommand,
    },
    plugin::{Limits, PluginHost, digest},
    registry::{
        Artifact, Fetch, Fetched, Place, Reference, RegistryError, Signed, Subject, Taken,
        TrustError, TrustList, is_reference, sign,
    },
    setup::{PluginSources, read_component, sidecar, sidecar_path, text_if_there},
};

use super::guest_log::guest_log;

/// From the registry itself, with whatever signatures it has.
const ALL: Fetch = Fetch {
    signatures: true,
    fresh: true,
};

pub(super) fn run(command: &SharingCommand, environment: &Environment) -> anyhow::Result<()> {
    let sources = PluginSources::new(environment, &[])?;
    match command {
        SharingCommand::Push(args) => push(args, &sources),
        SharingCommand::Pull(args) => pull(args, &sources),
        SharingCommand::Sign(args) => sign_one(args, &sources),
        SharingCommand::Verify(args) => verify(args, environment, &sources),
        SharingCommand::Search(args) => search(args, &sources),
    }
}

/// Pushes what would run here: a component that compiles within the default limits and plays one of the roles.
fn push(args: &PluginPushArgs, sources: &PluginSources) -> anyhow::Result<()> {
    let reference: Reference = args.reference.parse()?;
    let path = args.file.to_string_lossy();
    // A path is meant, even where a reference could be.
    let found = sources.component(&file_source(&path), &Limits::default())?;
    let host = PluginHost::new(guest_log())?;
    let what = host.describe(reference.name(), &found.bytes)?;
    if what.role.is_none() {
        host.load(
            reference.name(),
            &found.bytes,
            &json!({}),
            &Limits::default(),
        )?;
    }
    let artifact = Artifact {
        bytes: &found.bytes,
        exports: &what.exports,
        imports: &what.imports,
    };
    let taken = match args.force {
        true => Taken::Moves,
        false => Taken::Stays,
    };
    let pushed = sources.registry().push(&reference, artifact, taken)?;
    let pinned = reference.pinned(&pushed.manifest);
    let there = pushed.before.as_ref();
    if args.output.json {
        let object = json!({
            "reference": reference.to_string(), "pinned": pinned.to_string(), "role": what.role,
            "manifest": pushed.manifest, "digest": pushed.layer, "bytes": found.bytes.len(),
            "before": there,
        });
        outln!("{object}");
    } else {
        match there {
            None => outln!("pushed  {reference}"),
            Some(before) if *before == pushed.manifest => {
                outln!("  same  {reference} is this already");
            }
            Some(before) => outln!(" moved  {reference} from {before}"),
        }
        outln!("pinned  {pinned}");
        outln!("digest  {}", pushed.layer);
    }
    Ok(())
}

fn pull(args: &PluginPullArgs, sources: &PluginSources) -> anyhow::Result<()> {
    let reference: Reference = args.reference.parse()?;
    let found = sources.registry().fetch(&reference, ALL)?;
    sources.refuse_untrusted(&reference, &found)?;
    let usual = || PathBuf::from(format!("{}.wasm", reference.name()));
    let out = args.out.clone().unwrap_or_else(usual);
    write_new(&out, &found.bytes, args.force)?;
    if !found.signatures.is_empty() {
        write_sidecar(&out, &found.signatures)?;
    }
    let pinned = reference.pinned(&found.manifest);
    if args.output.json {
        let object = json!({
            "file": out, "pinned": pinned.to_string(), "manifest": found.manifest,
            "digest": found.layer, "bytes": found.bytes.len(), "signatures": found.signatures.len(),
        });
        outln!("{object}");
    } else {
        outln!("  file  {}", out.display());
        outln!("pinned  {pinned}");
        outln!("digest  {}", found.layer);
    }
    Ok(())
}

fn sign_one(args: &PluginSignArgs, sources: &PluginSources) -> anyhow::Result<()> {
    let key = text_of(&args.key)?;
    let password = match &args.password_file {
        Some(path) => Some(text_of(path)?.lines().next().unwrap_or_default().to_owned()),
        None => None,
    };
    let key_name = args.key.display().to_string();
    let to = if is_reference(&args.plugin) {
        let reference: Reference = args.plugin.parse()?;
        let found = sources.registry().fetch(
            &reference,
            Fetch {
                fresh: true,
                ..Fetch::default()
            },
        )?;
        let signature = sign(&key, &key_name, password, &found.bytes, Some(&reference))?;
        sources
            .registry()
            .attach(&reference, &found.manifest, &signature)?;
        reference.pinned(&found.manifest).to_string()
    } else {
        let path = Path::new(&args.plugin);
        let bytes = read_component(path)?;
        let signature = sign(&key, &key_name, password, &bytes, None)?;
        write_sidecar(path, &[signature])?;
        sidecar_path(path).display().to_string()
    };
    if args.output.json {
        outln!("{}", json!({ "signed": args.plugin, "signature": to }));
    } else {
        outln!("signed  {to}");
    }
    Ok(())
}

fn verify(
    args: &PluginVerifyArgs,
    environment: &Environment,
    sources: &PluginSources,
) -> anyhow::Result<()> {
    let given = PluginSources::with_trust(environment, keys(&args.keys)?);
    let trust = if args.keys.is_empty() {
        sources.trust()
    } else {
        given.trust()
    };
    let (signed, digest): (Signed, String) = if is_reference(&args.plugin) {
        let reference: Reference = args.plugin.parse()?;
        let Fetched {
            bytes,
            signatures,
            layer,
            ..
        } = sources.registry().fetch(&reference, ALL)?;
        let signed = trust.check(Subject::Reference(&reference), &bytes, &signatures)?;
        (signed, layer.to_string())
    } else {
        let path = Path::new(&args.plugin);
        let bytes = read_component(path)?;
        let signatures = sidecar(path)?.unwrap_or_default();
        let signed = trust.check(Subject::File(&args.plugin), &bytes, &signatures)?;
        (signed, digest(&bytes))
    };
    if args.output.json {
        let object =
            json!({ "ok": true, "key": signed.key, "comment": signed.comment, "digest": digest });
        outln!("{object}");
    } else {
        outln!("ok: signed by {} ({}) {digest}", signed.key, signed.comment);
    }
    Ok(())
}

/// Keys as they are, or files with them.
fn keys(given: &[String]) -> anyhow::Result<TrustList> {
    let mut trust = TrustList::default();
    for key in given {
        match text_if_there(Path::new(key))? {
            Some(text) => trust.add_file(&text, key)?,
            None => trust.add(key, "--key")?,
        }
    }
    Ok(trust)
}

/// Registries cannot be searched by words: the protocol has tags of a repository whose name is known.
fn search(args: &PluginSearchArgs, sources: &PluginSources) -> anyhow::Result<()> {
    if !args.place.contains(['/', ':']) {
        return Err(RegistryError::Reference {
            text: args.place.clone(),
            reason: "a registry lists the tags of a repository, and cannot be searched for names",
        }
        .into());
    }
    let names = match args.place.strip_prefix("dir:") {
        Some(folder) if !Path::new(folder).join("oci-layout").exists() => {
            sources.registry().names(Path::new(folder))?
        }
        _ => {
            let reference: Reference = args.place.parse()?;
            let name = match &reference.place {
                Place::Host(_) => reference.path(),
                Place::Folder(_) => reference.name().to_owned(),
            };
            vec![(name, sources.registry().tags(&reference)?)]
        }
    };
    if args.output.json {
        let found = names
            .iter()
            .map(|(name, tags)| json!({ "name": name, "tags": tags }));
        let found: Vec<_> = found.collect();
        outln!("{}", json!({ "place": args.place, "found": found }));
        return Ok(());
    }
    for (name, tags) in names {
        for tag in tags {
            outln!(
                "{}",
                crate::plugin::printable(&format!("{name}:{tag}"), 400)
            );
        }
    }
    Ok(())
}

/// The same path in a form that no reference has.
fn file_source(path: &str) -> String {
    match Path::new(path).is_absolute() || path.ends_with(".wasm") && !path.starts_with("dir:") {
        true => path.to_owned(),
        false => format!("./{path}"),
    }
}

/// A key or a password.
fn text_of(path: &Path) -> anyhow::Result<String> {
    let text = text_if_there(path)?.ok_or_else(|| TrustError::SecretKey {
        path: path.display().to_string(),
        reason: "there is no such file".to_owned(),
    });
    Ok(text?)
}

/// A file that appears whole, and replaces another only by `force`.
fn write_new(path: &Path, bytes: &[u8], force: bool) -> anyhow::Result<()> {
    if !force && path.symlink_metadata().is_ok() {
        return Err(FileExists {
            path: path.to_owned(),
        }
        .into());
    }
    write(path, bytes)
}

fn write_sidecar(component: &Path, signatures: &[String]) -> anyhow::Result<()> {
    let text: String = signatures
        .iter()
        .map(|s| format!("{}\n", s.trim_end()))
        .collect();
    write(&sidecar_path(component), text.as_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".incomplete");
    let part = PathBuf::from(part);
    let written = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    Ok(written().map_err(|source| RegistryError::File {
        path: path.to_owned(),
        source,
    })?)
}

/// `plugin pull` would replace a file.
#[derive(Debug, thiserror::Error)]
#[error("{} is there already", path.display())]
pub struct FileExists {
    path: PathBuf,
}

impl FileExists {
    /// How to have it nevertheless.
    pub fn hint(&self) -> Option<String> {
        Some("give another file with --out, or replace it with --force".to_owned())
    }
}
