//! Kernels from source text to machine code for the GPU at hand: NVRTC, and a cache on disk.

use std::path::Path;

use cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};

use super::{CudaError, device::driver_version};

/// Goes before each file.
const COMMON: &str = include_str!("kernels/common.cu");

/// The kernel files: name, and text without [`COMMON`].
pub const SOURCES: [(&str, &str); 5] = [
    ("norm.cu", include_str!("kernels/norm.cu")),
    (
        "attention.cu",
        concat!(
            include_str!("kernels/qkv.cu"),
            include_str!("kernels/attention.cu"),
            include_str!("kernels/group.cu")
        ),
    ),
    (
        "skinny.cu",
        concat!(
            include_str!("kernels/skinny.cu"),
            include_str!("kernels/quantized.cu")
        ),
    ),
    ("hopper.cu", include_str!("kernels/hopper.cu")),
    (
        "sample.cu",
        concat!(
            include_str!("kernels/sample.cu"),
            include_str!("kernels/select.cu"),
            include_str!("kernels/draw.cu")
        ),
    ),
];

/// Those that only training needs, in the same form.
pub const TRAINING_SOURCES: [(&str, &str); 5] = [
    (
        "train_attention.cu",
        concat!(
            include_str!("kernels/train_tiles.cu"),
            include_str!("kernels/train_attention.cu")
        ),
    ),
    ("train_rows.cu", include_str!("kernels/train_rows.cu")),
    ("train_head.cu", include_str!("kernels/train_head.cu")),
    ("train_optim.cu", include_str!("kernels/train_optim.cu")),
    ("lora.cu", include_str!("kernels/lora.cu")),
];

/// NVRTC's architecture of a compute capability. Hopper's own instructions need the `a`.
pub fn architecture(major: i32, minor: i32) -> &'static str {
    match (major, minor) {
        (8, 0) => "compute_80",
        (8, 6 | 7) => "compute_86",
        (8, _) => "compute_89",
        (9, _) => "compute_90a",
        (10, _) => "compute_100",
        (12, _) => "compute_120",
        // Text for an old one runs on whatever comes later.
        _ => "compute_80",
    }
}

/// Compiles one of [`SOURCES`] to PTX; needs NVRTC, not a GPU.
///
/// # Errors
/// [`CudaError::Library`] without NVRTC, [`CudaError::Compile`] with its log.
pub fn compile(name: &str, source: &str, architecture: &'static str) -> Result<String, CudaError> {
    // SAFETY: opens and closes a shared library that has no side effects of its own.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(CudaError::Library("nvrtc"));
    }
    let options = CompileOptions {
        arch: Some(architecture),
        name: Some(name.to_owned()),
        options: vec!["--std=c++17".to_owned(), "-diag-suppress=177".to_owned()],
        ..CompileOptions::default()
    };
    let text = format!("{COMMON}\n#line 1 \"{name}\"\n{source}");
    match compile_ptx_with_opts(&text, options) {
        Ok(ptx) => Ok(ptx.to_src()),
        Err(error) => Err(CudaError::Compile {
            name: name.to_owned(),
            log: error.to_string(),
        }),
    }
}

/// Major and minor version of NVRTC; zeros without it, where nothing is compiled either.
pub fn nvrtc_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: opens and closes a shared library that has no side effects of its own, then writes two integers.
    unsafe {
        if cudarc::nvrtc::sys::is_culib_present() {
            _ = cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor);
        }
    }
    (major, minor)
}

/// [`compile`], or what it gave the last time, kept in the folder `cache`.
pub(super) fn cached(
    name: &str,
    source: &str,
    architecture: &'static str,
    cache: Option<&Path>,
) -> Result<Ptx, CudaError> {
    // Of another NVRTC or driver it may be PTX that the driver does not know, or worse code than there could be.
    let versions = (nvrtc_version(), driver_version()?);
    let text = format!("{versions:?} {architecture}\n{COMMON}\n{source}");
    let file = cache.map(|folder| {
        let digest = content_hash(text.as_bytes());
        let file = format!("{name}-{architecture}-{digest:016x}.ptx");
        folder.join("kernels").join(file)
    });
    if let Some(text) = file.as_ref().and_then(|f| std::fs::read_to_string(f).ok()) {
        return Ok(Ptx::from_src(text));
    }
    let ptx = compile(name, source, architecture)?;
    if let Some(file) = file {
        // A cache that cannot be written costs a second at the next start, nothing else.
        let parent = file.parent().map(std::fs::create_dir_all);
        // Threads with a GPU each compile the same files at the same time.
        let (process, thread) = (std::process::id(), std::thread::current().id());
        let partial = file.with_extension(format!("{process}-{thread:?}.partial"));
        if parent.is_some_and(|made| made.is_ok()) && std::fs::write(&partial, &ptx).is_ok() {
            _ = std::fs::rename(&partial, &file);
        }
    }
    Ok(Ptx::from_src(ptx))
}

/// FNV-1a (Fowler, Noll, Vo 1991): names a cache file, guards nothing.
fn content_hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
