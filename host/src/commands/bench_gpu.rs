//! What `bench rollout` says of a GPU beside tokens per second: how near a decoding step comes to the limit that the
//! memory's bandwidth sets, and with `--profile` where its time goes.

use grpo_policy::backend::{
    AnyBackend,
    cuda::{self, DecodeShape, Profile, WorkTime},
};
use serde_json::{Value, json};

use super::table;
use crate::{policy::Policy, replicas::Replicas, types::Table};

/// `--profile` where nothing can be profiled.
#[derive(Debug, thiserror::Error)]
#[error("--profile shows the kernels of a GPU, and this runs on `cpu`")]
pub struct NothingToProfile;

impl NothingToProfile {
    /// What to do instead.
    pub fn hint(&self) -> Option<String> {
        Some("use --device cuda:0 on a machine with a GPU, or leave --profile out".to_owned())
    }
}

/// The limit of a decoding step: what it reads cannot come faster than the memory moves it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limit {
    /// Bytes a step reads ([`cuda::CudaBackend::step_bytes`]).
    pub(super) step_bytes: usize,
    /// Bytes per second of a copy within the memory, read and written ones counted.
    pub(super) bandwidth: f64,
}

impl Limit {
    /// Of the bandwidth, what steps of `seconds` use. Above 1 for what is read from caches.
    pub(super) fn share(&self, seconds: f64) -> f64 {
        self.step_bytes as f64 / self.bandwidth / seconds
    }

    /// As it is printed.
    pub(super) fn line(&self, seconds: f64) -> String {
        format!(
            "{:.0} % of the memory's bandwidth: {:.3} GB a step of {:.3} ms, {:.2} TB/s measured",
            100.0 * self.share(seconds),
            self.step_bytes as f64 / 1e9,
            1e3 * seconds,
            self.bandwidth / 1e12
        )
    }

    /// The fields of the JSON object; null without a GPU, where there was no room to measure, or for steps of no known length.
    pub(super) fn fields(limit: Option<Self>, seconds: Option<f64>) -> [(&'static str, Value); 3] {
        [
            ("step_bytes", json!(limit.map(|limit| limit.step_bytes))),
            (
                "memory_bandwidth",
                json!(limit.map(|limit| limit.bandwidth)),
            ),
            (
                "bandwidth_share",
                json!(
                    limit
                        .zip(seconds)
                        .map(|(limit, seconds)| limit.share(seconds))
                ),
            ),
        ]
    }
}

/// What `shape` reads a step, against what the policy's GPU can read. Before the first rollout, which takes the memory.
///
/// # Errors
/// What the driver says.
pub(super) fn limit(policy: &Policy, shape: &DecodeShape) -> anyhow::Result<Option<Limit>> {
    let AnyBackend::Cuda(gpu) = policy.backend() else {
        return Ok(None);
    };
    let bytes = gpu.step_bytes(shape.prompts * shape.n * shape.context);
    Ok(gpu.memory_bandwidth()?.map(|bandwidth| Limit {
        step_bytes: bytes,
        bandwidth,
    }))
}

/// Times the kernels of a decoding step.
///
/// # Errors
/// [`NothingToProfile`] on a CPU; what the driver says.
pub(super) fn profile(policy: &mut Policy, shape: &DecodeShape) -> anyhow::Result<Profile> {
    policy.forget_kv();
    match &mut policy.replicas.first_mut().backend {
        AnyBackend::Cuda(gpu) => Ok(gpu.profile(shape)?),
        AnyBackend::Cpu(_) => Err(NothingToProfile.into()),
    }
}

/// Times the parts of a training step, of several GPUs on the first.
///
/// # Errors
/// [`NothingToProfile`] on a CPU; those of the step.
pub(super) fn profile_training(
    policy: &mut Policy,
    step: impl FnOnce(&mut Replicas) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<WorkTime>> {
    let replicas = &mut policy.replicas;
    let AnyBackend::Cuda(gpu) = &mut replicas.first_mut().backend else {
        return Err(NothingToProfile.into());
    };
    gpu.start_profile();
    step(replicas)?;
    match &mut replicas.first_mut().backend {
        AnyBackend::Cuda(gpu) => Ok(gpu.stop_profile()),
        AnyBackend::Cpu(_) => Err(NothingToProfile.into()),
    }
}

/// The lines of the times of a training step's parts.
pub(super) fn training_lines(times: &[WorkTime]) -> Vec<String> {
    let all: f64 = times.iter().map(|time| time.seconds).sum();
    let row = |time: &WorkTime| {
        vec![
            time.phase.to_owned(),
            time.work.to_owned(),
            format!("{:.2}", 1e3 * time.seconds),
            format!("{:.1} %", 100.0 * time.seconds / all),
        ]
    };
    table::lines(&Table {
        title: format!("  profile  a training step of {:.1} ms", 1e3 * all),
        columns: ["pass", "work", "ms", "share"].map(str::to_owned).to_vec(),
        rows: times.iter().map(row).collect(),
        notes: Vec::new(),
    })
}

/// The lines of a profile.
pub(super) fn profile_lines(profile: &Profile) -> Vec<String> {
    let blank = || "–".to_owned();
    let row = |of: &cuda::KernelTime| {
        vec![
            of.kernel.to_owned(),
            of.launches.map_or_else(blank, |n| n.to_string()),
            of.us_each.map_or_else(blank, |us| format!("{us:.2}")),
            format!("{:.1}", of.us_step),
            format!("{:.1} %", 100.0 * of.share),
        ]
    };
    let columns = ["kernel", "launches", "µs each", "µs a step", "share"];
    table::lines(&Table {
        title: format!("  profile  a decoding step of {:.1} µs", profile.step_us),
        columns: columns.map(str::to_owned).to_vec(),
        rows: profile.kernels.iter().map(row).collect(),
        notes: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use grpo_policy::backend::cuda::KernelTime;

    const LIMIT: Limit = Limit {
        step_bytes: 1_200_000_000,
        bandwidth: 4e12,
    };

    #[test]
    fn the_share_of_the_limit_by_hand() {
        // 1.2 GB at 4 TB/s take 0.3 ms.
        assert!((LIMIT.share(1.2e-3) - 0.25).abs() < 1e-12);
        assert_eq!(
            LIMIT.line(1.2e-3),
            "25 % of the memory's bandwidth: 1.200 GB a step of 1.200 ms, 4.00 TB/s measured"
        );
    }

    #[test]
    fn fields_are_null_without_a_gpu() {
        let fields = Limit::fields(None, Some(1.0));
        assert!(fields.iter().all(|(_, value)| value.is_null()));
        let fields = Limit::fields(Some(LIMIT), Some(3e-4));
        assert_eq!(fields[0], ("step_bytes", json!(1_200_000_000)));
        assert_eq!(fields[1].1.as_f64(), Some(4e12));
        assert!((fields[2].1.as_f64().unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_parts_of_a_training_step_and_their_shares() {
        let time = |work, seconds| WorkTime {
            phase: "forward",
            work,
            seconds,
        };
        let expected = [
            "  profile  a training step of 40.0 ms",
            "  pass     work       ms   share",
            "  forward  norms   10.00  25.0 %",
            "  forward  logits  30.00  75.0 %",
        ];
        let lines = training_lines(&[time("norms", 0.01), time("logits", 0.03)]);
        assert_eq!(lines, expected);
    }

    #[test]
    fn the_rest_of_a_step_has_no_launches() {
        let row = |kernel, launches: Option<usize>, us_step| KernelTime {
            kernel,
            launches,
            us_each: launches.map(|n| us_step / n as f64),
            us_step,
            share: us_step / 1000.0,
        };
        let profile = Profile {
            step_us: 1000.0,
            kernels: vec![row("qkv", Some(24), 960.0), row("rest", None, 40.0)],
        };
        let expected = [
            "  profile  a decoding step of 1000.0 µs",
            "  kernel  launches  µs each  µs a step   share",
            "  qkv           24    40.00      960.0  96.0 %",
            "  rest           –        –       40.0   4.0 %",
        ];
        assert_eq!(profile_lines(&profile), expected);
    }
}
