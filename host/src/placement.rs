//! Where a policy runs: the device that was asked for or, with `auto`, the first GPU that can be used, else the CPU; and
//! the engine's sizes there. Nothing else in the host asks which device it is.

use std::{panic::resume_unwind, path::PathBuf, thread};

use grpo_policy::{
    backend::{
        AnyBackend, Backend,
        cpu::{CpuBackend, Trainable},
        cuda::{
            self, Budget, CudaBackend, CudaError, CudaSizes, CudaWeights, Kept, Learns, MemoryPlan,
            Moments, PoolNeeds, Recompute, Tenant, TrainingPlan,
        },
    },
    engine::EngineConfig,
    error::PolicyError,
    spec::ModelSpec,
    weights::LoadedModel,
};

use crate::{
    cli::Environment,
    config::{Device, MomentType, QuantizedWeights, RunConfig},
};

/// Tokens per KV block on a CPU (vLLM's default).
const BLOCK_SIZE: usize = 16;

/// Most memory the KV pool takes on a CPU when its size is not configured.
const KV_BYTES: usize = 2 << 30;

/// Prompt tokens run beside the decoding rows of one step on a CPU.
const PREFILL_TOKENS: usize = 512;

/// Tokens of one step on a GPU; enough to fill it.
const STEP_TOKENS: usize = 8192;

/// Sequences decoded at once when nothing is configured.
const CPU_BATCH: usize = 128;
const GPU_BATCH: usize = 256;

/// Sizes of the rollout engine that a caller decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Most sequences decoded at once; `None`: 128 on a CPU, 256 on a GPU.
    pub max_batch: Option<usize>,
    /// Most tokens of prompt and completion together.
    pub max_model_len: usize,
    /// Tokens the KV pool holds; `None` fits all of `max_batch`, on a CPU up to 2 GiB, on a GPU up to its share of the
    /// memory.
    pub kv_tokens: Option<usize>,
}

/// What the user says about the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub device: Device,
    /// Copies of the policy that share the work, ≥ 1. Each has a GPU of its own, from the device on; on the CPU, where they
    /// share the cores and only tests want them, there may be several too.
    pub replicas: usize,
    /// Of a GPU's memory, what this process may use: above 0, up to 1.
    pub gpu_memory_utilization: f64,
    /// Folder in which compiled kernels are kept.
    pub cache: Option<PathBuf>,
    /// [`CudaBackend::set_deterministic`].
    pub deterministic: bool,
    /// What becomes of a GGUF file's quantised matrices on a GPU.
    pub quantized_weights: QuantizedWeights,
}

/// How training passes are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    /// Most tokens of one but for a longer sequence alone.
    pub micro_batch_tokens: usize,
    /// Make activations again in the backward pass: always on a CPU, on a GPU where they would not fit.
    pub gradient_checkpointing: bool,
    /// On a GPU, of so many layers.
    pub recompute_layers: Option<usize>,
    /// On a GPU, whether LoRA is merged into the weights ([`CudaBackend::train`]).
    pub merge_adapters: Option<bool>,
    /// On a GPU, the numbers of AdamW's moments; on a CPU they are f32.
    pub moments: Moments,
}

impl Passes {
    /// As the config says.
    pub fn of(config: &RunConfig) -> Self {
        Self {
            micro_batch_tokens: config.training.micro_batch_tokens as usize,
            gradient_checkpointing: config.training.gradient_checkpointing,
            recompute_layers: config.training.recompute_layers.map(|n| n as usize),
            merge_adapters: config.training.lora.as_ref().and_then(|lora| lora.merge),
            moments: match config.optimizer.moments {
                MomentType::F32 => Moments::F32,
                MomentType::Bf16 => Moments::Bf16,
            },
        }
    }

    fn recompute(&self) -> Recompute {
        match (self.gradient_checkpointing, self.recompute_layers) {
            (false, _) => Recompute::Layers(0),
            (true, Some(layers)) => Recompute::Layers(layers),
            (true, None) => Recompute::AsNeeded,
        }
    }
}

/// What of a model trains, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Learning {
    pub trainable: Trainable,
    pub passes: Passes,
}

impl Learning {
    /// For a GPU.
    fn learns(&self) -> Learns<'_> {
        Learns {
            trainable: &self.trainable,
            merge: self.passes.merge_adapters,
            moments: self.passes.moments,
        }
    }
}

/// A model on its device.
pub(crate) struct Placed {
    pub(crate) backend: AnyBackend,
    pub(crate) engine: EngineConfig,
    pub(crate) gpu: Option<Share>,
    /// Why it is not on the GPU that is there.
    pub(crate) passed_over: Option<PolicyError>,
}

/// What a policy has of its GPU.
pub(crate) struct Share {
    pub(crate) plan: MemoryPlan,
    budget: Budget,
    ordinal: usize,
    sizes: CudaSizes,
    cache: Option<PathBuf>,
    /// Whether quantised matrices stay so.
    keep: bool,
    /// Bytes of the policy's weights and of what it trains with, and what was free with nothing but the policy there.
    weights: usize,
    training: Option<TrainingPlan>,
    free_without_draft: usize,
    needs: PoolNeeds,
}

impl Place {
    /// As the config says.
    pub fn of(config: &RunConfig, environment: &Environment) -> Self {
        Self {
            device: config.hardware.device,
            replicas: config.hardware.gpus as usize,
            gpu_memory_utilization: config.hardware.gpu_memory_utilization,
            cache: environment.cache.clone(),
            deterministic: config.hardware.deterministic,
            quantized_weights: config.hardware.quantized_weights,
        }
    }

    /// Puts a model onto its devices, a copy on each. On a CPU everything is f32, and what trains is dense everywhere, unless
    /// weights are to stay quantised on a GPU beside adapters: else matrices that are quantised in `model` are not any more.
    ///
    /// # Errors
    /// Those of the backends; with [`Device::Auto`] what is wrong with a GPU is none.
    pub(crate) fn put(
        &self,
        model: &mut LoadedModel,
        learning: &Learning,
        capacity: Capacity,
    ) -> Result<Vec<Placed>, PolicyError> {
        let context = model.spec.max_position_embeddings;
        let max_model_len = capacity.max_model_len.min(context);
        let capacity = Capacity {
            max_model_len,
            ..capacity
        };
        if learning.trainable != Trainable::Nothing && self.device != Device::Cpu {
            let keep = self.quantized_weights == QuantizedWeights::Keep;
            let lora = matches!(learning.trainable, Trainable::Lora { .. });
            if keep && !lora && !model.quantized.is_empty() {
                return Err(CudaError::StaysQuantized.into());
            }
            if !keep {
                model.dequantize()?;
            }
        }
        if self.replicas > 1 {
            return self.put_several(model, learning, capacity);
        }
        let on_gpu = |ordinal| self.on_gpu(ordinal, model, learning, capacity);
        let chosen = match self.device {
            Device::Cpu => Chosen::Cpu(None),
            Device::Cuda(ordinal) => Chosen::Gpu(on_gpu(ordinal)?),
            Device::Auto => first_usable(cuda::count(), on_gpu)?,
        };
        match chosen {
            Chosen::Gpu(placed) => Ok(vec![placed]),
            Chosen::Cpu(passed_over) => Ok(vec![Placed {
                passed_over,
                ..on_cpu(model, learning, capacity)?
            }]),
        }
    }

    /// Several copies, on GPUs all at once.
    fn put_several(
        &self,
        model: &mut LoadedModel,
        learning: &Learning,
        capacity: Capacity,
    ) -> Result<Vec<Placed>, PolicyError> {
        let asked = self.replicas;
        let first = match self.device {
            Device::Cpu => {
                let copies = (0..asked).map(|_| on_cpu(model, learning, capacity));
                return copies.collect();
            }
            Device::Auto => 0,
            Device::Cuda(first) => first,
        };
        let found = cuda::count()?.saturating_sub(first);
        if found < asked {
            return Err(CudaError::TooFewGpus {
                asked,
                first,
                found,
            }
            .into());
        }
        if learning.trainable != Trainable::Nothing && !cuda::has_nccl() {
            return Err(CudaError::Library("nccl").into());
        }
        let model = &*model;
        let on_gpu = |rank: usize| self.on_gpu(first + rank, model, learning, capacity);
        thread::scope(|scope| {
            let start = |rank| scope.spawn(move || on_gpu(rank));
            let others: Vec<_> = (1..asked).map(start).collect();
            let mut placed = vec![on_gpu(0)];
            let ended = others.into_iter().map(thread::ScopedJoinHandle::join);
            placed.extend(ended.map(|placed| placed.unwrap_or_else(|panic| resume_unwind(panic))));
            placed.into_iter().collect()
        })
    }

    fn on_gpu(
        &self,
        ordinal: usize,
        model: &LoadedModel,
        learning: &Learning,
        capacity: Capacity,
    ) -> Result<Placed, PolicyError> {
        let spec = &model.spec;
        let max_batch = capacity.max_batch.unwrap_or(GPU_BATCH);
        let sizes = CudaSizes {
            max_step_tokens: STEP_TOKENS.max(max_batch),
            max_batch,
            max_model_len: capacity.max_model_len,
        };
        let budget = Budget::open(ordinal, self.gpu_memory_utilization)?;
        let keep = match self.quantized_weights {
            QuantizedWeights::Auto => budget.is_tight(spec, &sizes)?,
            QuantizedWeights::Keep => true,
            QuantizedWeights::Dequantize => false,
        };
        let weights = cuda_weights(model, keep);
        budget.admit(spec, weights, &sizes)?;
        let admitted = admit_training(&budget, (spec, weights, &sizes), learning)?;
        let cache = self.cache.clone();
        let folder = cache.as_deref();
        let mut backend = CudaBackend::with_weights(ordinal, spec.clone(), weights, sizes, folder)?;
        if let Some((kept, plan)) = admitted {
            backend.train(weights, learning.learns(), (plan.tokens, kept))?;
        }
        if self.deterministic {
            backend.set_deterministic()?;
        }
        let weights = backend.weight_bytes();
        let free_without_draft = budget.free()?;
        let needs = PoolNeeds {
            policy: Tenant::new(&backend),
            draft: Tenant::default(),
            blocks: gpu_blocks(&sizes, capacity.kv_tokens),
            longest: sizes.max_model_len,
        };
        let training = admitted.map(|(_, plan)| plan);
        let share = Share {
            plan: budget.plan((weights, training), free_without_draft, &needs)?,
            training,
            budget,
            ordinal,
            sizes,
            cache,
            keep,
            weights,
            free_without_draft,
            needs,
        };
        Ok(Placed {
            backend: AnyBackend::Cuda(Box::new(backend)),
            engine: share.engine(),
            gpu: Some(share),
            passed_over: None,
        })
    }
}

fn cuda_weights(model: &LoadedModel, keep: bool) -> CudaWeights<'_> {
    CudaWeights {
        tensors: &model.tensors,
        quantized: &model.quantized,
        keep,
    }
}

/// How a model trains beside what it needs anyway; `None` for one that only generates.
fn admit_training(
    budget: &Budget,
    (spec, weights, sizes): (&ModelSpec, CudaWeights<'_>, &CudaSizes),
    learning: &Learning,
) -> Result<Option<(Kept, TrainingPlan)>, CudaError> {
    if learning.trainable == Trainable::Nothing {
        return Ok(None);
    }
    let passes = (
        learning.passes.micro_batch_tokens.max(sizes.max_model_len),
        learning.passes.recompute(),
    );
    let admitted = budget.admit_training((spec, weights, sizes), learning.learns(), passes);
    admitted.map(Some)
}

/// Blocks that sequences of all lengths can use, each with one to copy on its first write; or those configured.
fn gpu_blocks(sizes: &CudaSizes, kv_tokens: Option<usize>) -> usize {
    let usable = sizes.max_batch * (sizes.max_model_len.div_ceil(cuda::BLOCK_SIZE) + 1);
    kv_tokens.map_or(usable, |tokens| {
        tokens.div_ceil(cuda::BLOCK_SIZE).min(usable)
    })
}

/// What `auto` comes to.
#[derive(Debug)]
enum Chosen<T> {
    Gpu(T),
    /// With what is wrong with the first GPU, where there is one.
    Cpu(Option<PolicyError>),
}

/// The first of `count` GPUs that `open` opens. What is wrong with the model itself is an error on every device.
fn first_usable<T>(
    count: Result<usize, CudaError>,
    open: impl Fn(usize) -> Result<T, PolicyError>,
) -> Result<Chosen<T>, PolicyError> {
    let count = match count {
        Ok(count) => count,
        Err(error) => return Ok(Chosen::Cpu(Some(error.into()))),
    };
    let mut passed_over = None;
    for ordinal in 0..count {
        match open(ordinal) {
            Ok(gpu) => return Ok(Chosen::Gpu(gpu)),
            Err(PolicyError::Cuda(error)) if error.is_of_the_device() => {
                passed_over.get_or_insert(error.into());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Chosen::Cpu(passed_over))
}

fn on_cpu(
    model: &mut LoadedModel,
    learning: &Learning,
    capacity: Capacity,
) -> Result<Placed, PolicyError> {
    let max_model_len = capacity.max_model_len;
    let max_batch = capacity.max_batch.unwrap_or(CPU_BATCH);
    model.dequantize()?;
    let (spec, tensors) = (model.spec.clone(), &model.tensors);
    let checkpointing = learning.passes.gradient_checkpointing;
    let backend = CpuBackend::new(spec, tensors, &learning.trainable, checkpointing)?;
    let wanted = max_batch * max_model_len.next_multiple_of(BLOCK_SIZE);
    let affordable = (KV_BYTES / backend.kv_bytes_per_token()).max(max_model_len + BLOCK_SIZE);
    let kv_tokens = capacity.kv_tokens.unwrap_or(wanted.min(affordable));
    backend.check_kv(kv_tokens)?;
    Ok(Placed {
        backend: AnyBackend::Cpu(Box::new(backend)),
        engine: EngineConfig {
            block_size: BLOCK_SIZE,
            kv_blocks: kv_tokens.div_ceil(BLOCK_SIZE),
            max_batch,
            max_step_tokens: max_batch + PREFILL_TOKENS,
            enable_prefix_cache: true,
            max_model_len,
        },
        gpu: None,
        passed_over: None,
    })
}

impl Share {
    /// Puts a draft model beside the policy; one that learns has no quantised matrices.
    ///
    /// # Errors
    /// As for the policy itself.
    pub(crate) fn draft(
        &self,
        model: &LoadedModel,
        learning: &Learning,
    ) -> Result<AnyBackend, PolicyError> {
        let (spec, weights) = (&model.spec, cuda_weights(model, self.keep));
        // Its context may be shorter, but it is given the policy's block tables.
        self.budget.admit(spec, weights, &self.sizes)?;
        let admitted = admit_training(&self.budget, (spec, weights, &self.sizes), learning)?;
        let (ordinal, cache) = (self.ordinal, self.cache.as_deref());
        let mut draft =
            CudaBackend::with_weights(ordinal, spec.clone(), weights, self.sizes, cache)?;
        if let Some((kept, plan)) = admitted {
            draft.train(weights, learning.learns(), (plan.tokens, kept))?;
        }
        Ok(AnyBackend::Cuda(Box::new(draft)))
    }

    /// Makes room for a draft that needs this.
    ///
    /// # Errors
    /// [`CudaError::OneSequence`].
    pub(crate) fn divide_with_draft(&mut self, draft: Tenant) -> Result<EngineConfig, CudaError> {
        let needs = PoolNeeds {
            draft,
            ..self.needs
        };
        let budget = &self.budget;
        let of_policy = (self.weights, self.training);
        self.plan = budget.plan(of_policy, self.free_without_draft, &needs)?;
        Ok(self.engine())
    }

    fn engine(&self) -> EngineConfig {
        EngineConfig {
            block_size: cuda::BLOCK_SIZE,
            kv_blocks: self.plan.kv_blocks,
            max_batch: self.sizes.max_batch,
            max_step_tokens: self.sizes.max_step_tokens,
            enable_prefix_cache: true,
            max_model_len: self.sizes.max_model_len,
        }
    }
}

#[cfg(test)]
mod tests;
