//! What a process may take of a GPU's memory, and how that is divided: weights, workspace, and the KV pool, which gets
//! what is left of it as far as the run can use it.

use std::{collections::BTreeMap, fmt, sync::Arc};

use cudarc::driver::{CudaContext, sys::CUdevice_attribute as Attribute};
use serde::Serialize;

use super::{
    BLOCK_SIZE, CudaBackend, CudaError, CudaSizes, CudaWeights, check, device, draws,
    forward::{MAX_SPLITS, MIN_LOGITS},
    graph::MAX_BURST,
    launch::{CHUNK, CHUNK_WORDS},
    product,
    train::{Kept, Learns, TrainingPlan, training_bytes},
    weights::WeightSizes,
};
use crate::{backend::AnyBackend, spec::ModelSpec};

/// Kept for what the driver takes later on: captured graphs, cublasLt's own buffers, kernels that spill.
const RESERVE: usize = 256 << 20;

/// Memory of the GPU in bytes, as the driver says.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Memory {
    total: usize,
    /// Free before this process put anything there, and now.
    free_at_start: usize,
    free: usize,
    /// Of the total, what this process may use: above 0, up to 1.
    utilization: f64,
}

impl Memory {
    /// Most this process may use: others may have taken their part already.
    fn allowed(&self) -> usize {
        ((self.total as f64 * self.utilization) as usize).min(self.free_at_start)
    }

    fn used(&self) -> usize {
        self.free_at_start.saturating_sub(self.free)
    }

    /// What may still be used.
    fn left(&self) -> usize {
        self.allowed().saturating_sub(self.used() + RESERVE)
    }
}

/// What one model keeps in its arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tenant {
    /// Bytes of keys and values of one token.
    pub token_bytes: usize,
    /// Bytes of training passes, which have the same memory in turns.
    pub activations: usize,
}

impl Tenant {
    /// What a model on this GPU keeps there.
    pub fn new(backend: &CudaBackend) -> Self {
        Self {
            token_bytes: super::kv_bytes_per_token(&backend.spec),
            activations: backend.activation_bytes(),
        }
    }

    /// The same of any model; a CPU's plans nothing.
    pub fn of(backend: &AnyBackend) -> Self {
        match backend {
            AnyBackend::Cpu(_) => Self::default(),
            AnyBackend::Cuda(cuda) => Self::new(cuda),
        }
    }
}

/// What the KV pool is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolNeeds {
    pub policy: Tenant,
    /// All zeros for a draft without keys and values of its own.
    pub draft: Tenant,
    /// Blocks that the run can use.
    pub blocks: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

impl PoolNeeds {
    /// Bytes of keys and values of one token, of both models.
    fn token_bytes(&self) -> usize {
        self.policy.token_bytes + self.draft.token_bytes
    }

    /// Bytes of both arenas with so many blocks.
    fn bytes(&self, blocks: usize) -> usize {
        let of =
            |tenant: &Tenant| (blocks * BLOCK_SIZE * tenant.token_bytes).max(tenant.activations);
        of(&self.policy) + of(&self.draft)
    }

    /// Most blocks, of those that can be used, whose arenas take `left` bytes; `None` where activations alone take more.
    fn fitting(&self, left: usize) -> Option<usize> {
        if self.bytes(0) > left {
            return None;
        }
        let (mut fits, mut too_many) = (0, self.blocks + 1);
        while too_many - fits > 1 {
            let middle = fits.midpoint(too_many);
            match self.bytes(middle) <= left {
                true => fits = middle,
                false => too_many = middle,
            }
        }
        Some(fits)
    }
}

/// A part of a GPU's memory, opened before anything is put there.
pub struct Budget {
    context: Arc<CudaContext>,
    ordinal: usize,
    name: String,
    multiprocessors: usize,
    total: usize,
    free_at_start: usize,
    utilization: f64,
}

impl Budget {
    /// The share `utilization` (above 0, up to 1) of the memory of GPU `ordinal`.
    ///
    /// # Errors
    /// [`CudaError`] for a GPU that is not there or not to be used.
    pub fn open(ordinal: usize, utilization: f64) -> Result<Self, CudaError> {
        let context = device::context(ordinal)?;
        let (free_at_start, total) = context.mem_get_info()?;
        let multiprocessors =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            ordinal,
            name: context.name()?,
            multiprocessors: multiprocessors as usize,
            total,
            free_at_start,
            utilization,
            context,
        })
    }

    /// `cuda:0 NVIDIA H200`.
    pub fn device(&self) -> String {
        format!("cuda:{} {}", self.ordinal, self.name)
    }

    /// Bytes that are free now, those of buffers that were dropped among them.
    ///
    /// # Errors
    /// What the driver says.
    pub fn free(&self) -> Result<usize, CudaError> {
        // What was freed in a stream's order goes back to the driver when somebody waits for it.
        self.context.synchronize()?;
        Ok(self.context.mem_get_info()?.0)
    }

    fn memory(&self) -> Result<Memory, CudaError> {
        Ok(Memory {
            total: self.total,
            free_at_start: self.free_at_start,
            free: self.free()?,
            utilization: self.utilization,
        })
    }

    /// Whether a model and its longest sequence fit beside what is there, from their sizes alone.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::TooBig`] and [`CudaError::OneSequence`].
    pub fn admit(
        &self,
        spec: &ModelSpec,
        weights: CudaWeights<'_>,
        sizes: &CudaSizes,
    ) -> Result<(), CudaError> {
        check(spec)?;
        let needed = WeightSizes::of(spec, weights, sizes.max_model_len);
        let workspace = self.workspace(spec, sizes) + needed.scratch;
        admit(&self.memory()?, needed.weights, workspace)?
            .hold(sizes.max_model_len, super::kv_bytes_per_token(spec))
    }

    /// Whether the weights in bf16 would take more than half of what may still be used.
    ///
    /// # Errors
    /// What the driver says.
    pub fn is_tight(&self, spec: &ModelSpec, sizes: &CudaSizes) -> Result<bool, CudaError> {
        let none = BTreeMap::new();
        let bf16 = WeightSizes::of(spec, CudaWeights::dense(&none), sizes.max_model_len);
        Ok(bf16.weights > self.memory()?.left() / 2)
    }

    /// How passes of `tokens` tokens train beside what there is to be of a model: their activations are kept where they take
    /// no more than three quarters of what is left, so that there is room for a draft, and else, with [`Recompute::AsNeeded`], those
    /// of the first layers made again in the backward pass. Keys and values have the same memory in turns.
    ///
    /// # Errors
    /// [`CudaError::TrainingTooBig`].
    pub fn admit_training(
        &self,
        (spec, given, sizes): (&ModelSpec, CudaWeights<'_>, &CudaSizes),
        learns: Learns<'_>,
        (tokens, recompute): (usize, Recompute),
    ) -> Result<(Kept, TrainingPlan), CudaError> {
        let needed = WeightSizes::of(spec, given, sizes.max_model_len);
        let workspace = self.workspace(spec, sizes) + needed.scratch;
        let Left(left) = admit(&self.memory()?, needed.weights, workspace)?;
        let (of, processors) = ((spec, given), self.multiprocessors);
        let plan = |kept| training_bytes(of, learns, (tokens, kept), processors);
        choose(left, plan, (spec.num_hidden_layers, recompute))
    }

    /// Bytes that a model needs beside weights, keys and values, estimated from sizes; what is fixed is not among them, nor is
    /// where quantised matrices are made bf16.
    pub fn workspace(&self, spec: &ModelSpec, sizes: &CudaSizes) -> usize {
        workspace_bytes(spec, sizes, self.multiprocessors)
    }

    /// Divides what is left when a policy of `weights` bytes is there with what it needs to train, and its draft if it has one.
    /// `free_without_draft` were free before the draft came.
    ///
    /// # Errors
    /// [`CudaError::OneSequence`] where the pool would not hold the longest one.
    pub fn plan(
        &self,
        (weights, training): (usize, Option<TrainingPlan>),
        free_without_draft: usize,
        needs: &PoolNeeds,
    ) -> Result<MemoryPlan, CudaError> {
        let of_policy = (weights, training, free_without_draft);
        divide(&self.memory()?, of_policy, needs).map(|plan| MemoryPlan {
            device: self.device(),
            ..plan
        })
    }
}

/// Bytes that may still be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Left(usize);

impl Left {
    /// Refuses a sequence of `tokens` tokens that has no room.
    fn hold(self, tokens: usize, token_bytes: usize) -> Result<(), CudaError> {
        let needed = tokens.next_multiple_of(BLOCK_SIZE) * token_bytes;
        let left = self.0;
        if needed > left {
            return Err(CudaError::OneSequence {
                tokens,
                needed,
                left,
            });
        }
        Ok(())
    }
}

fn admit(memory: &Memory, weights: usize, workspace: usize) -> Result<Left, CudaError> {
    let left = memory.left();
    match left.checked_sub(weights + workspace) {
        Some(left) => Ok(Left(left)),
        None => Err(CudaError::TooBig {
            weights,
            workspace,
            left,
        }),
    }
}

/// Layers whose activations are made again in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// As many as memory asks for.
    AsNeeded,
    /// The first so many.
    Layers(usize),
}

fn choose(
    left: usize,
    plan: impl Fn(Kept) -> TrainingPlan,
    (layers, recompute): (usize, Recompute),
) -> Result<(Kept, TrainingPlan), CudaError> {
    let chosen = match recompute {
        Recompute::Layers(recomputed) => recomputed,
        Recompute::AsNeeded => {
            let roomy = |recomputed| {
                let plan = plan(Kept::AllBut(recomputed));
                plan.activations <= left.saturating_sub(plan.state + plan.gradients) / 4 * 3
            };
            (0..layers).find(|n| roomy(*n)).unwrap_or(layers)
        }
    };
    let chosen = Kept::AllBut(chosen);
    let plan = plan(chosen);
    if plan.bytes() > left {
        return Err(CudaError::TrainingTooBig {
            state: plan.state + plan.gradients,
            activations: plan.activations,
            tokens: plan.tokens,
            left,
        });
    }
    Ok((chosen, plan))
}

fn divide(
    memory: &Memory,
    (weights, training, free_without_draft): (usize, Option<TrainingPlan>, usize),
    needs: &PoolNeeds,
) -> Result<MemoryPlan, CudaError> {
    let left = memory.left();
    let kv_blocks = needs.fitting(left).ok_or(CudaError::TrainingTooBig {
        state: 0,
        activations: needs.bytes(0),
        tokens: training.map_or(0, |t| t.tokens),
        left,
    })?;
    // A pool that was configured smaller than its longest sequence refuses those that do not fit, one by one.
    if kv_blocks < needs.blocks {
        let sequence = needs.longest.div_ceil(BLOCK_SIZE);
        if sequence > kv_blocks {
            Left(left).hold(needs.longest, needs.token_bytes())?;
        }
    }
    let of_policy = memory.free_at_start.saturating_sub(free_without_draft);
    let resident = training.map_or(0, |t| t.state + t.gradients);
    let arena = needs.bytes(kv_blocks);
    Ok(MemoryPlan {
        device: String::new(),
        total: memory.total,
        allowed: memory.allowed(),
        weights,
        workspace: of_policy.saturating_sub(weights + resident),
        training,
        draft: memory.used().saturating_sub(of_policy),
        arena,
        kv: kv_blocks * BLOCK_SIZE * needs.token_bytes(),
        kv_blocks,
        kv_tokens: kv_blocks * BLOCK_SIZE,
        free: memory.free.saturating_sub(arena),
    })
}

/// How a GPU's memory is used; sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// `cuda:0 NVIDIA H200`.
    pub device: String,
    pub total: usize,
    /// What this process may use.
    pub allowed: usize,
    pub weights: usize,
    /// Activations, logits, inputs.
    pub workspace: usize,
    /// What training takes of it, where the policy trains.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainingPlan>,
    /// Weights and workspace of a draft model.
    pub draft: usize,
    /// What keys and values have in turns with activations: the larger of the two, of a draft model too.
    pub arena: usize,
    /// Keys and values, of a draft model too.
    pub kv: usize,
    pub kv_blocks: usize,
    pub kv_tokens: usize,
    /// What is free beside all that.
    pub free: usize,
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes >> 20;
        write!(
            f,
            "{}: weights {} MiB, workspace {} MiB, ",
            self.device,
            mib(self.weights),
            mib(self.workspace)
        )?;
        if let Some(training) = &self.training {
            let (state, gradients) = (mib(training.state), mib(training.gradients));
            write!(f, "optimizer {state} MiB, gradients {gradients} MiB, ")?;
        }
        if self.draft > 0 {
            write!(f, "draft {} MiB, ", mib(self.draft))?;
        }
        if let Some(training) = &self.training {
            let recomputed = match training.recomputed_layers {
                0 => String::new(),
                n => format!(", {n} layers recomputed"),
            };
            write!(
                f,
                "{} MiB by turns for activations ({} MiB, {} tokens{recomputed}) and ",
                mib(self.arena),
                mib(training.activations),
                training.tokens,
            )?;
        }
        write!(
            f,
            "KV {} MiB ({} blocks, {} tokens), {} MiB free of {} MiB",
            mib(self.kv),
            self.kv_blocks,
            self.kv_tokens,
            mib(self.free),
            mib(self.total)
        )
    }
}

/// Bytes of the buffers of forward.rs, graph.rs, draws.rs and inputs.rs, those of a fixed size left to [`RESERVE`].
fn workspace_bytes(spec: &ModelSpec, sizes: &CudaSizes, multiprocessors: usize) -> usize {
    let (h, q, f) = (spec.hidden_size, spec.q_dim(), spec.intermediate_size);
    let (batch, rows) = (sizes.max_batch, sizes.max_batch.max(MIN_LOGITS));
    let activations = 4 * h + 2 * (2 * h + 3 * q + 2 * spec.kv_dim() + 3 * f);
    let sums = 4 * product::row_tiles(h);
    let token = activations + sums + draws::BYTES_A_TOKEN;
    let chunks = spec.vocab_size.div_ceil(CHUNK);
    let row = 2 * h + 4 * spec.vocab_size + chunks * draws::BYTES_A_CHUNK;
    // Drawn, and for the plain draws of graph.rs beside it.
    let sequence = MAX_BURST * (draws::BYTES_A_CELL + 16) + 4 * chunks * CHUNK_WORDS;
    // Block tables of passes of any shape and of bursts.
    let table = 2 * 4 * sizes.max_model_len.div_ceil(BLOCK_SIZE);
    let cells = multiprocessors * spec.num_key_value_heads;
    let split = 4 * cells * MAX_SPLITS * 16 * (spec.head_dim + 2);
    sizes.max_step_tokens * token + rows * row + batch * (sequence + table) + split
}

#[cfg(test)]
mod tests;
