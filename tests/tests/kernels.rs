//! Every CUDA kernel compiles for every GPU it is written for. Needs NVRTC and no GPU; `cargo xtask kernels` brings NVRTC
//! and runs it, so plain `cargo test` leaves it out.

use grpo_policy::backend::cuda::{SOURCES, TRAINING_SOURCES, architecture, compile, nvrtc_version};

/// Compute capabilities of the GPUs that kernels are written for. CUDA before 12.8 knows none after Hopper; of that it is the
/// language that is tried.
fn capabilities() -> &'static [(i32, i32)] {
    let version = nvrtc_version();
    println!("NVRTC {}.{}", version.0, version.1);
    match version < (12, 8) {
        true => &[(8, 0), (9, 0)],
        false => &[(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)],
    }
}

#[test]
#[ignore = "needs NVRTC: cargo xtask kernels"]
fn kernels_compile_for_every_gpu() {
    for capability in capabilities() {
        let architecture = architecture(capability.0, capability.1);
        for (name, source) in SOURCES.into_iter().chain(TRAINING_SOURCES) {
            let ptx = compile(name, source, architecture)
                .unwrap_or_else(|e| panic!("{name} for {architecture}: {e}"));
            let target = architecture.replace("compute_", "sm_");
            assert!(
                ptx.contains(&format!(".target {target}")),
                "{name} is not for {target}"
            );
        }
    }
}

#[test]
#[ignore = "needs NVRTC: cargo xtask kernels"]
fn a_kernel_that_is_wrong_says_where() {
    let error = compile("norm.cu", "__global__ void f() { nonsense; }", "compute_80").unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("norm.cu(1)") && text.contains("nonsense"),
        "{text}"
    );
}
