//! Truncated draws, verification and drafting on the GPU beside the CPU's, on the same logits and from end to end. Needs a
//! GPU, so CI leaves it out; run it with `cargo test --release --test cuda_sampling -- --ignored --nocapture
//! --test-threads 1`.

#[path = "../cuda_models/mod.rs"]
mod cuda_models;
mod drafts;
mod draws;
mod exits;
mod steps;
mod verification;

use std::collections::BTreeMap;

use candle_core::Tensor;
use cuda_models::{SIZES, cache};
use grpo_policy::{
    backend::{
        Backend, SampleArgs, Sampled,
        cuda::{BLOCK_SIZE, CudaBackend},
    },
    engine::sampler::Proposal,
    spec::ModelSpec,
    types::SamplingParams,
};

/// Parameters that differ from row to row of one batch.
fn params() -> Vec<SamplingParams> {
    let of = |temperature: f32, top_k: u32, top_p: f32, min_p: f32| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingParams::default()
    };
    vec![
        of(1.0, 0, 0.9, 0.0),
        of(0.7, 1, 1.0, 0.0),
        of(1.3, 20, 1.0, 0.0),
        of(1.0, 0, 1e-4, 0.0),
        of(1.0, 0, 1.0, 0.05),
        of(2.5, 1_000_000, 1.0, 0.0),
        of(1.0, 0, 1.0, 0.0),
        of(0.8, 50, 0.95, 0.02),
        of(0.0, 5, 0.5, 0.1),
        of(3.0, 0, 0.999, 0.0),
        of(1.0, 7000, 0.6, 0.0),
        of(0.2, 0, 0.5, 1.0),
        of(10.0, 12, 0.3, 1e-7),
    ]
}

fn backend(spec: &ModelSpec, tensors: &BTreeMap<String, Tensor>) -> CudaBackend {
    let mut gpu = CudaBackend::new(0, spec.clone(), tensors, SIZES, cache()).unwrap();
    gpu.init_kv(256, BLOCK_SIZE).unwrap();
    gpu
}

fn args<'a>(
    params: &'a SamplingParams,
    stream: u64,
    position: usize,
    proposal: Option<&'a Proposal>,
    top: usize,
) -> SampleArgs<'a> {
    SampleArgs {
        params,
        stream,
        position: position as u64,
        history: &[],
        proposal,
        top,
        ahead: 0,
    }
}

/// How two lists of draws compare.
#[derive(Default)]
struct Agreement {
    all: usize,
    other: usize,
    apart: f32,
}

impl Agreement {
    fn add(&mut self, device: &[Sampled], host: &[Sampled]) {
        self.all += 1;
        if device.len() != host.len() || device.iter().zip(host).any(|(d, h)| d.token != h.token) {
            self.other += 1;
            return;
        }
        for (d, h) in device.iter().zip(host) {
            let apart = (d.logprob - h.logprob).abs();
            let policy = (d.policy_logprob - h.policy_logprob).abs();
            assert!(apart.is_finite() && policy.is_finite());
            self.apart = self.apart.max(apart).max(policy);
        }
    }

    /// A number within rounding of a border may fall on either side: one draw in so many.
    fn check(&self, name: &str, one_in: usize) {
        println!(
            "{name}: {} of {} differ, log-probs within {:.1e}",
            self.other, self.all, self.apart
        );
        assert!(
            self.other <= 2 + self.all / one_in,
            "{name}: {} of {}",
            self.other,
            self.all
        );
        assert!(self.apart < 2e-4, "{name}: {}", self.apart);
    }
}
