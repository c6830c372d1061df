//! `xtask plugins`: builds the shipped guests into `plugins/dist`, and checks that the components
//! committed there were built from the sources committed beside them.
//!
//! The check needs no wasm toolchain: `dist/SOURCES` holds one line per guest with the hash of all
//! that goes into it and the hash of the component that came out.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use wasm_encoder::ComponentSection;

/// A component in `dist` and the crates it is built from besides the one of its name.
struct Guest {
    name: &'static str,
    libraries: &'static [&'static str],
}

const GUESTS: [Guest; 12] = [
    guest("reward-math", &[]),
    guest("reward-format", &[]),
    guest("reward-inference", &["inference-cost"]),
    guest("inference-wrapper", &["inference-cost"]),
    guest("reward-length", &["length-curve"]),
    guest("length-wrapper", &["length-curve"]),
    guest("reward-repetition", &[]),
    guest("reward-judge", &["judge-text"]),
    guest("reward-geo", &["judge-text"]),
    guest("formatter-chat", &[]),
    guest("curriculum-uniform", &["curriculum-walk"]),
    guest("curriculum-kde", &["curriculum-walk"]),
];

/// Guests with a workspace and a lock file of their own, whose components are kept compressed: they bring an interpreter.
const APART: [&str; 1] = ["reward-code"];

/// A component in `dist` made of two others there: `inner` is what `wrapper` imports.
struct Composed {
    name: &'static str,
    wrapper: &'static str,
    inner: &'static str,
}

const COMPOSED: [Composed; 2] = [
    Composed {
        name: "reward-math-inference",
        wrapper: "inference-wrapper",
        inner: "reward-math",
    },
    Composed {
        name: "reward-math-length",
        wrapper: "length-wrapper",
        inner: "reward-math",
    },
];

const fn guest(name: &'static str, libraries: &'static [&'static str]) -> Guest {
    Guest { name, libraries }
}

const TARGET: &str = "wasm32-unknown-unknown";

/// Builds every guest (or only compares hashes, with `check_only`).
pub(crate) fn run(check_only: bool) -> Result<()> {
    let root = root()?;
    if check_only {
        return check(&root);
    }
    build_modules(&root, &root.join("plugins"))?;
    let dist = root.join("plugins/dist");
    fs::create_dir_all(&dist)?;
    for Guest { name, .. } in GUESTS {
        component(&module_path(&root, name), &dist_file(&root, name))?;
        embed_manifest(&root, name)?;
    }
    for name in APART {
        build_modules(&root, &root.join("plugins").join(name))?;
        let bytes = componentize(&module_path(&root, name))?;
        let path = packed_file(&root, name);
        fs::write(&path, zstd::encode_all(bytes.as_slice(), 19)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    for made in COMPOSED {
        let [wrapper, inner, out] =
            [made.wrapper, made.inner, made.name].map(|name| dist_file(&root, name));
        compose(&wrapper, &inner, &out)?;
    }
    write_sources(&root)?;
    check(&root)
}

/// Writes down what the components in `dist` were made of.
pub(crate) fn write_sources(root: &Path) -> Result<()> {
    Ok(fs::write(
        root.join("plugins/dist/SOURCES"),
        sources(root)?,
    )?)
}

/// Makes the component `out` of a core module built with wit-bindgen.
pub(crate) fn component(module: &Path, out: &Path) -> Result<()> {
    fs::write(out, componentize(module)?).with_context(|| format!("cannot write {}", out.display()))
}

/// Writes the component `out`: `wrapper` with its import answered by `inner`.
pub(crate) fn compose(wrapper: &Path, inner: &Path, out: &Path) -> Result<()> {
    let composed = xtask::compose::compose(&read(wrapper)?, &read(inner)?)?;
    fs::write(out, composed).with_context(|| format!("cannot write {}", out.display()))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The core module of a guest, once it is built.
fn module_path(root: &Path, name: &str) -> PathBuf {
    let module = format!("{}.wasm", name.replace('-', "_"));
    let built = root.join("plugins/target").join(TARGET).join("release");
    built.join(module)
}

fn dist_file(root: &Path, name: &str) -> PathBuf {
    root.join("plugins/dist").join(format!("{name}.wasm"))
}

fn packed_file(root: &Path, name: &str) -> PathBuf {
    root.join("plugins/dist").join(format!("{name}.wasm.zst"))
}

fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.parent().context("xtask has no parent folder")?;
    Ok(root.to_owned())
}

/// A core module whose type section was left by wit-bindgen becomes a component. It imports what the
/// module imports, so a guest that dragged in anything but our `host` would show it here.
fn componentize(module: &Path) -> Result<Vec<u8>> {
    let bytes = read(module)?;
    wit_component::ComponentEncoder::default()
        .validate(true)
        .module(&bytes)
        .and_then(|mut encoder| encoder.encode())
        .with_context(|| format!("cannot make a component of {}", module.display()))
}

/// A guest that asks the host for something says so in its `plugin.json`, which its component carries as a custom section. The
/// host reads it strictly, and a test there reads all shipped ones.
fn embed_manifest(root: &Path, name: &str) -> Result<()> {
    let manifest = manifest_file(root, name);
    if manifest.exists() {
        let out = dist_file(root, name);
        let mut component = read(&out)?;
        wasm_encoder::CustomSection {
            name: "grpo:manifest".into(),
            data: read(&manifest)?.into(),
        }
        .append_to_component(&mut component);
        fs::write(&out, component).with_context(|| format!("cannot write {}", out.display()))?;
    }
    Ok(())
}

fn manifest_file(root: &Path, name: &str) -> PathBuf {
    root.join("plugins").join(name).join("plugin.json")
}

/// Compiles with an installed rustup target if there is one, else with a distribution's compiler and
/// its `rust-src`, which can build the standard library for wasm32 itself.
fn build_modules(root: &Path, workspace: &Path) -> Result<()> {
    let mut command = if rustup_target_installed() {
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--release", "--target", TARGET]);
        cargo
    } else if Path::new("/usr/lib/rustlib/src/rust/library/std").exists() {
        // `-Z` flags are for nightly compilers; the bootstrap variable lifts that.
        let mut cargo = Command::new("/usr/bin/cargo");
        cargo
            .args(["build", "--release", "--target", TARGET])
            .arg("-Zbuild-std=std,panic_abort")
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTC", "/usr/bin/rustc");
        if let Some(lld) = rust_lld() {
            cargo.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", lld);
        }
        cargo
    } else {
        bail!(
            "no compiler for {TARGET}; install one with `rustup target add {TARGET}`, or on Debian \
             with `apt-get install rustc-web cargo-web rust-web-src lld`"
        );
    };
    let status = command
        .env("RUSTFLAGS", path_flags())
        .env_remove("RUSTUP_TOOLCHAIN")
        .arg("--target-dir")
        .arg(root.join("plugins/target"))
        .current_dir(workspace)
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the guests do not build");
    Ok(())
}

/// In place of flags meant for the host, such as target-cpu. Panic messages hold the paths of
/// sources; those of this machine have no place in a committed file.
fn path_flags() -> String {
    let registries = std::env::home_dir()
        .unwrap_or_default()
        .join(".cargo/registry/src");
    let folders = fs::read_dir(registries).into_iter().flatten().flatten();
    let flags = folders.map(|f| format!("--remap-path-prefix={}=crates", f.path().display()));
    flags.collect::<Vec<_>>().join(" ")
}

pub(crate) fn rustup_target_installed() -> bool {
    sysroot("rustc").is_some_and(|root| root.join("lib/rustlib").join(TARGET).exists())
}

/// Where Debian has no `rust-lld`, that of a rustup toolchain links just as well.
fn rust_lld() -> Option<PathBuf> {
    let host = sysroot("rustc")?.join("lib/rustlib");
    let tools = fs::read_dir(host).ok()?.flatten();
    tools
        .map(|entry| entry.path().join("bin/rust-lld"))
        .find(|lld| lld.exists())
}

fn sysroot(rustc: &str) -> Option<PathBuf> {
    let output = Command::new(rustc)
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(PathBuf::from(text.trim()))
}

fn check(root: &Path) -> Result<()> {
    let path = root.join("plugins/dist/SOURCES");
    let committed =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let current = sources(root)?;
    for (old, new) in committed.lines().zip(current.lines()) {
        let name = new.split(' ').next().unwrap_or_default();
        ensure!(
            old == new,
            "plugins/dist/{name} is not what its sources give; run `cargo xtask plugins` (for last-number-*: \
             `cargo xtask languages --write`)\n\
             committed: {old}\n  current: {new}"
        );
    }
    ensure!(
        committed == current,
        "plugins/dist/SOURCES lists other guests than xtask does"
    );
    Ok(())
}

/// The text of `SOURCES`: component, hash of its inputs, hash of its bytes. The inputs of a composed
/// component are the two that it is made of.
fn sources(root: &Path) -> Result<String> {
    let mut text = String::new();
    for Guest { name, libraries } in GUESTS {
        let inputs = hash_inputs(root, name, libraries)?;
        line(&mut text, &dist_file(root, name), name, &inputs)?;
    }
    for name in APART {
        let inputs = hash_files(root, apart_inputs(root, name)?)?;
        line(&mut text, &packed_file(root, name), name, &inputs)?;
    }
    for made in COMPOSED {
        let mut hash = Sha256::new();
        for part in [made.wrapper, made.inner] {
            hash.update(Sha256::digest(read(&dist_file(root, part))?));
        }
        let file = dist_file(root, made.name);
        line(&mut text, &file, made.name, &hex(&hash.finalize()))?;
    }
    text.push_str(&crate::languages::sources(root)?);
    Ok(text)
}

fn line(text: &mut String, file: &Path, name: &str, inputs: &str) -> Result<()> {
    let component = hex(&Sha256::digest(read(file)?));
    writeln!(text, "{name} sources:{inputs} component:{component}")?;
    Ok(())
}

/// Hash over names and contents of a guest's crates, the WIT, the workspace manifest and its lock.
fn hash_inputs(root: &Path, guest: &str, libraries: &[&str]) -> Result<String> {
    let mut files = vec![
        root.join("plugins/Cargo.toml"),
        root.join("plugins/Cargo.lock"),
    ];
    for name in [guest].iter().chain(libraries) {
        let crate_dir = root.join("plugins").join(name);
        files.push(crate_dir.join("Cargo.toml"));
        files.extend(files_in(&crate_dir.join("src"), "rs")?);
    }
    files.extend(files_in(&root.join("wit/v0.1"), "wit")?);
    let manifest = manifest_file(root, guest);
    if manifest.exists() {
        files.push(manifest);
    }
    hash_files(root, files)
}

/// All that goes into a guest with a workspace of its own.
fn apart_inputs(root: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let folder = root.join("plugins").join(name);
    let mut files = files_in(&root.join("wit/v0.1"), "wit")?;
    files.push(folder.join("Cargo.lock"));
    let mut crates = vec![folder.clone()];
    let stubs = folder.join("stubs");
    for entry in fs::read_dir(&stubs).with_context(|| format!("cannot read {}", stubs.display()))? {
        crates.push(entry?.path());
    }
    for folder in crates.iter().filter(|folder| folder.is_dir()) {
        files.push(folder.join("Cargo.toml"));
        files.extend(files_in(&folder.join("src"), "rs")?);
    }
    Ok(files)
}

/// Hash over names and contents of files.
pub(crate) fn hash_files(root: &Path, mut files: Vec<PathBuf>) -> Result<String> {
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let bytes = read(&file)?;
        let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
        hash.update(format!("{name}\n{}\n", bytes.len()));
        hash.update(&bytes);
    }
    Ok(hex(&hash.finalize()))
}

pub(crate) fn files_in(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new(extension)) {
            files.push(path);
        }
    }
    Ok(files)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn committed_components_come_from_the_committed_sources() {
        super::run(true).unwrap();
    }

    /// A hash that ignored a file would let sources and component drift apart unseen.
    #[test]
    fn every_input_changes_the_hash() {
        let dir = std::env::temp_dir().join(format!("grpo-xtask-{}", std::process::id()));
        let inputs = [
            "plugins/Cargo.toml",
            "plugins/Cargo.lock",
            "plugins/g/Cargo.toml",
            "plugins/g/src/lib.rs",
            "plugins/g/plugin.json",
            "plugins/l/Cargo.toml",
            "plugins/l/src/lib.rs",
            "wit/v0.1/types.wit",
        ];
        for input in inputs {
            let path = dir.join(input);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "a").unwrap();
        }
        let before = super::hash_inputs(&dir, "g", &["l"]).unwrap();
        for input in inputs {
            std::fs::write(dir.join(input), "b").unwrap();
            assert_ne!(
                super::hash_inputs(&dir, "g", &["l"]).unwrap(),
                before,
                "{input}"
            );
            std::fs::write(dir.join(input), "a").unwrap();
        }
        assert_eq!(super::hash_inputs(&dir, "g", &["l"]).unwrap(), before);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
