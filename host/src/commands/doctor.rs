//! `grpo-host doctor`: what this build and machine can do. Changes nothing and asks no network.

use grpo_policy::backend::cuda::{CudaError, Survey, survey};
use serde_json::{Value, json};

use crate::{cli::DoctorArgs, defaults, plugin::digest};

/// Prints the facts, one a line, or as one JSON object.
pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    let simd = simd();
    let memory = memory_mib();
    let cuda = survey();
    let mut plugins = Vec::new();
    for name in defaults::names() {
        if let Some(bytes) = defaults::shipped(name)? {
            plugins.push((name, digest(&bytes), bytes.len()));
        }
    }
    if args.output.json {
        let facts = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cores": cores,
            "simd": simd,
            "memory_total_mib": memory.map(|memory| memory.total),
            "memory_available_mib": memory.map(|memory| memory.available),
            "devices": devices(cuda.as_ref().ok()),
            "cuda": cuda_json(&cuda),
            "plugins": plugins.iter().map(|(name, digest, bytes)| json!({ "name": name, "digest": digest, "bytes": bytes })).collect::<Vec<_>>(),
        });
        outln!("{facts}");
        return Ok(());
    }
    outln!("grpo-host {}", env!("CARGO_PKG_VERSION"));
    outln!("cpu      {cores} cores, {}", simd.join(" "));
    match memory {
        Some(Memory { total, available }) => {
            outln!("memory   {available} MiB available of {total} MiB");
        }
        None => outln!("memory   unknown"),
    }
    outln!("devices  {}", devices(cuda.as_ref().ok()).join(", "));
    print_cuda(&cuda);
    for (name, digest, bytes) in plugins {
        outln!("plugin   {name}, {} KiB, {digest}", bytes.div_ceil(1024));
    }
    Ok(())
}

/// What `--device` takes here.
fn devices(cuda: Option<&Survey>) -> Vec<String> {
    let usable = cuda.map(Survey::usable).unwrap_or_default();
    let gpus = usable.iter().map(|ordinal| format!("cuda:{ordinal}"));
    ["cpu".to_owned()].into_iter().chain(gpus).collect()
}

fn cuda_json(cuda: &Result<Survey, CudaError>) -> Value {
    match cuda {
        Err(error) => json!({ "error": error.to_string() }),
        Ok(survey) => json!({
            "driver": survey.driver,
            "libraries": survey.libraries.iter().map(|(name, found, package)| {
                json!({ "name": name, "found": found, "package": package })
            }).collect::<Vec<_>>(),
            "gpus": survey.gpus.iter().map(|gpu| json!({
                "name": gpu.name,
                "capability": format!("{}.{}", gpu.capability.0, gpu.capability.1),
                "memory_free": gpu.memory.0,
                "memory_total": gpu.memory.1,
            })).collect::<Vec<_>>(),
        }),
    }
}

fn print_cuda(cuda: &Result<Survey, CudaError>) {
    let survey = match cuda {
        Ok(survey) => survey,
        Err(error) => return outln!("cuda     {error}"),
    };
    if let Some(version) = survey.driver {
        outln!(
            "driver   CUDA {}.{} (12.4 or later is needed)",
            version / 1000,
            version % 1000 / 10
        );
    }
    for (name, found, package) in &survey.libraries {
        let what = match (found, package) {
            (true, _) => "found".to_owned(),
            (false, Some(package)) => format!("missing; PyPI's {package} has it"),
            (false, None) => "missing; it comes with the NVIDIA driver".to_owned(),
        };
        outln!("library  {name}: {what}");
    }
    for (ordinal, gpu) in survey.gpus.iter().enumerate() {
        let (free, total) = gpu.memory;
        let (major, minor) = gpu.capability;
        outln!(
            "gpu      cuda:{ordinal} {}, sm_{major}{minor}, {} MiB free of {} MiB",
            gpu.name,
            free >> 20,
            total >> 20
        );
    }
}

/// The instruction sets the CPU kernels make use of, those found here.
fn simd() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let sets = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        (
            "avx512bf16",
            std::arch::is_x86_feature_detected!("avx512bf16"),
        ),
    ];
    // NEON is part of the base instruction set of every other target supported.
    #[cfg(not(target_arch = "x86_64"))]
    let sets = [("neon", true)];
    sets.iter()
        .filter(|(_, found)| *found)
        .map(|(name, _)| *name)
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    total: u64,
    available: u64,
}

/// Main memory in MiB; `None` where there is no `/proc/meminfo`.
fn memory_mib() -> Option<Memory> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kib / 1024)
    };
    Some(Memory {
        total: field("MemTotal:")?,
        available: field("MemAvailable:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_mib() {
        let text = "MemTotal:        8192000 kB\nMemFree:  1 kB\nMemAvailable:    2048 kB\n";
        let memory = Memory {
            total: 8000,
            available: 2,
        };
        assert_eq!(parse_meminfo(text), Some(memory));
        assert_eq!(parse_meminfo("MemTotal: 1 kB\n"), None);
    }
}
