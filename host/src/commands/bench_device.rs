//! The device that `bench rollout` measures: the policy's engine on the CPU, or on a GPU.

use std::path::Path;

use grpo_policy::{
    backend::cuda::{BLOCK_SIZE, CudaBackend, CudaSizes},
    engine::{Engine, EngineConfig},
    tokenizer::Tokenizer,
    types::{Completion, Request},
    weights::LoadedModel,
};

use crate::{
    config::Device,
    policy::{Capacity, Mode, Policy},
};

/// Prompt tokens of one step on a GPU; enough to fill it.
const STEP_TOKENS: usize = 8192;

/// See the file header.
pub(super) enum Runner {
    Cpu(Box<Policy>),
    Cuda(Box<OnGpu>),
}

/// An engine with a backend of its own.
pub(super) struct OnGpu {
    backend: CudaBackend,
    engine: Engine,
    tokenizer: Tokenizer,
}

impl Runner {
    /// A runner for `sequences` sequences of up to `total` tokens at once.
    pub(super) fn new(
        device: Device,
        model: LoadedModel,
        name: &str,
        (sequences, total): (usize, usize),
        cache: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let Device::Cuda(ordinal) = device else {
            let capacity = Capacity {
                max_batch: sequences,
                max_model_len: total,
                kv_tokens: None,
            };
            let policy = Policy::new(model, name, Mode::Inference, false, capacity)?;
            return Ok(Self::Cpu(Box::new(policy)));
        };
        let sizes = CudaSizes {
            max_step_tokens: STEP_TOKENS.max(sequences),
            max_batch: sequences,
            max_model_len: total,
        };
        let engine = Engine::new(EngineConfig {
            block_size: BLOCK_SIZE,
            kv_blocks: sequences * (total.div_ceil(BLOCK_SIZE) + 1),
            max_batch: sequences,
            max_step_tokens: sizes.max_step_tokens,
            enable_prefix_cache: true,
            max_model_len: total,
        })?;
        Ok(Self::Cuda(Box::new(OnGpu {
            backend: CudaBackend::new(ordinal, model.spec, &model.tensors, sizes, cache)?,
            engine,
            tokenizer: model.tokenizer,
        })))
    }

    /// Runs the requests with nothing cached.
    pub(super) fn generate(&mut self, requests: Vec<Request>) -> anyhow::Result<Vec<Completion>> {
        match self {
            Self::Cpu(policy) => {
                policy.forget_kv();
                policy.generate(requests, &mut |_| {})
            }
            Self::Cuda(gpu) => {
                let OnGpu {
                    backend,
                    engine,
                    tokenizer,
                } = gpu.as_mut();
                engine.invalidate_prefix_cache();
                Ok(engine.generate(backend, None, tokenizer, requests, &mut |_| {})?)
            }
        }
    }
}
