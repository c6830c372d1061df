//! What a process may take of a GPU's memory, and how that is divided: weights, workspace, and the KV pool, which gets
//! what is left of it as far as the run can use it.

use std::{fmt, sync::Arc};

use cudarc::driver::{CudaContext, sys::CUdevice_attribute as Attribute};
use half::bf16;
use serde::Serialize;

use super::{
    BLOCK_SIZE, CudaError, CudaSizes, check, device, draws,
    forward::{MAX_SPLITS, MIN_LOGITS},
    graph::MAX_BURST,
    launch::{CHUNK, CHUNK_WORDS},
    product,
    train::{Kept, TrainingPlan, training_bytes},
};
use crate::{backend::cpu::Trainable, spec::ModelSpec};

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

/// What the KV pool is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolNeeds {
    /// Bytes of keys and values of one token, of the policy and its draft together.
    pub token_bytes: usize,
    /// Blocks that the run can use.
    pub blocks: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
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
    pub fn admit(&self, spec: &ModelSpec, sizes: &CudaSizes) -> Result<(), CudaError> {
        check(spec)?;
        let (weights, workspace) = (
            weight_bytes(spec, sizes.max_model_len),
            self.workspace(spec, sizes),
        );
        admit(&self.memory()?, weights, workspace)?
            .hold(sizes.max_model_len, super::kv_bytes_per_token(spec))
    }

    /// How passes of `tokens` tokens train beside what there is to be of a model: their activations are kept where they take
    /// no more than half of what is left, so that the other half is for keys and values, and else, with `may_recompute`, made
    /// again in the backward pass.
    ///
    /// # Errors
    /// [`CudaError::TrainingTooBig`].
    pub fn admit_training(
        &self,
        (spec, sizes): (&ModelSpec, &CudaSizes),
        trainable: &Trainable,
        (tokens, may_recompute): (usize, bool),
    ) -> Result<(Kept, TrainingPlan), CudaError> {
        let weights = weight_bytes(spec, sizes.max_model_len);
        let workspace = self.workspace(spec, sizes);
        let Left(left) = admit(&self.memory()?, weights, workspace)?;
        let plan = |kept| training_bytes(spec, trainable, (tokens, kept), self.multiprocessors);
        choose(left, plan, may_recompute)
    }

    /// Bytes that a model needs beside weights, keys and values, estimated from sizes; what is fixed is not among them.
    pub fn workspace(&self, spec: &ModelSpec, sizes: &CudaSizes) -> usize {
        workspace_bytes(spec, sizes, self.multiprocessors)
    }

    /// Divides what is left when a policy of `weights` bytes (see [`weight_bytes`]) is there with what it needs to train, and
    /// its draft if it has one. `free_without_draft` were free before the draft came.
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

fn choose(
    left: usize,
    plan: impl Fn(Kept) -> TrainingPlan,
    may_recompute: bool,
) -> Result<(Kept, TrainingPlan), CudaError> {
    let kept = plan(Kept::Activations);
    let roomy = 2 * kept.activations <= left.saturating_sub(kept.state + kept.gradients);
    let (chosen, plan) = match roomy || !may_recompute {
        true => (Kept::Activations, kept),
        false => (Kept::Inputs, plan(Kept::Inputs)),
    };
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
    let block_bytes = BLOCK_SIZE * needs.token_bytes;
    let left = memory.left();
    let kv_blocks = needs.blocks.min(left / block_bytes);
    // A pool that was configured smaller than its longest sequence refuses those that do not fit, one by one.
    if kv_blocks < needs.blocks {
        Left(left).hold(needs.longest, needs.token_bytes)?;
    }
    let of_policy = memory.free_at_start.saturating_sub(free_without_draft);
    let kv = kv_blocks * block_bytes;
    Ok(MemoryPlan {
        device: String::new(),
        total: memory.total,
        allowed: memory.allowed(),
        weights,
        workspace: of_policy.saturating_sub(weights + training.map_or(0, |t| t.bytes())),
        training,
        draft: memory.used().saturating_sub(of_policy),
        kv,
        kv_blocks,
        kv_tokens: kv_blocks * BLOCK_SIZE,
        free: memory.free.saturating_sub(kv),
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
            write!(
                f,
                "optimizer {} MiB, gradients {} MiB, activations {} MiB ({} tokens{}), ",
                mib(training.state),
                mib(training.gradients),
                mib(training.activations),
                training.tokens,
                if training.recompute {
                    ", recomputed"
                } else {
                    ""
                }
            )?;
        }
        if self.draft > 0 {
            write!(f, "draft {} MiB, ", mib(self.draft))?;
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

/// Bytes of a model's weights: matrices in bf16, vectors and the rotation table of `positions` positions in f32.
pub fn weight_bytes(spec: &ModelSpec, positions: usize) -> usize {
    let bytes = |shape: &[usize]| {
        let width = if shape.len() == 1 { 4 } else { 2 };
        shape.iter().product::<usize>() * width
    };
    let shapes = spec.weight_shapes();
    let weights: usize = shapes.iter().map(|(_, shape)| bytes(shape)).sum();
    weights + positions * spec.head_dim * 4
}

/// Bytes that a decoding step reads: every weight that takes part once, and the keys and values of `kv_tokens` tokens. A
/// prompt that several sequences share counts for each of them, as decoding engines read it.
pub fn step_bytes(spec: &ModelSpec, kv_tokens: usize) -> usize {
    // Of embeddings that are not the head too, a few rows.
    let looked_up = match spec.tie_word_embeddings {
        true => 0,
        false => size_of::<bf16>() * spec.vocab_size * spec.hidden_size,
    };
    weight_bytes(spec, 0) - looked_up + kv_tokens * super::kv_bytes_per_token(spec)
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
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A GPU of 10000 MiB, on which others use 1000 and this process 2000.
    const MEMORY: Memory = Memory {
        total: 10_000 * MIB,
        free_at_start: 9_000 * MIB,
        free: 7_000 * MIB,
        utilization: 0.8,
    };

    /// Blocks of 1 MiB.
    const NEEDS: PoolNeeds = PoolNeeds {
        token_bytes: MIB / BLOCK_SIZE,
        blocks: 5_000,
        longest: 100 * BLOCK_SIZE,
    };

    #[test]
    fn the_pool_gets_what_is_left_of_the_share() {
        let plan = divide(&MEMORY, (1_500 * MIB, None, 7_300 * MIB), &NEEDS).unwrap();
        let mib = |mib: usize| mib * MIB;
        assert_eq!((plan.allowed, plan.weights), (mib(8_000), mib(1_500)));
        assert_eq!((plan.workspace, plan.draft), (mib(200), mib(300)));
        // No more than the run can use.
        assert_eq!((plan.kv_blocks, plan.kv), (5_000, mib(5_000)));
        assert_eq!((plan.kv_tokens, plan.free), (160_000, mib(2_000)));
        // 8000 − 2000 − the reserve of 256.
        let needs = PoolNeeds {
            blocks: 50_000,
            ..NEEDS
        };
        let plan = divide(&MEMORY, (mib(1_500), None, mib(7_000)), &needs).unwrap();
        assert_eq!((plan.kv_blocks, plan.free), (5_744, mib(7_000 - 5_744)));
        assert_eq!(
            plan.to_string(),
            ": weights 1500 MiB, workspace 500 MiB, KV 5744 MiB (5744 blocks, 183808 tokens), 1256 MiB \
             free of 10000 MiB"
        );
    }

    /// Qwen2.5-0.5B.
    fn half_billion(tied: bool) -> ModelSpec {
        ModelSpec {
            family: crate::spec::Family::Qwen2,
            vocab_size: 151_936,
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            num_key_value_heads: 2,
            head_dim: 64,
            max_position_embeddings: 1024,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            rope_scaling: None,
            tie_word_embeddings: tied,
            qkv_bias: true,
            o_bias: false,
            qk_norm: false,
        }
    }

    #[test]
    fn a_step_reads_the_weights_once_and_the_keys_of_every_sequence() {
        // 494,032,768 weights of two bytes, of which 71,552 in vectors take four.
        let weights = 2 * (494_032_768 + 71_552);
        assert_eq!(step_bytes(&half_billion(true), 0), weights);
        // The head is read whole whether it is the embeddings or not, the embeddings are not.
        assert_eq!(step_bytes(&half_billion(false), 0), weights);
        let with_cache = step_bytes(&half_billion(true), 64 * 256);
        assert_eq!(with_cache, weights + 64 * 256 * 12_288);
    }

    #[test]
    fn the_workspace_grows_by_what_a_token_a_sequence_and_a_row_take() {
        let bytes = |max_step_tokens, max_batch, max_model_len| {
            let sizes = CudaSizes {
                max_step_tokens,
                max_batch,
                max_model_len,
            };
            workspace_bytes(&half_billion(true), &sizes, 132)
        };
        // x, h, qkv, q, attended, gate_up, act, delta, sums; temperature, ask and verdict.
        let activations = 3584 + 1792 + 2304 + 1792 + 1792 + 19_456 + 9728 + 1792 + 56;
        let token = bytes(8193, 256, 384) - bytes(8192, 256, 384);
        assert_eq!(token, activations + 4 + 40 + 12);
        // 16 steps of two kinds of draws, the plain ones' 297 chunks of 12 bytes, two tables of 12 blocks.
        let sequence = 16 * (20 + 16) + 297 * 12 + 2 * 4 * 12;
        assert_eq!(bytes(8192, 200, 384) - bytes(8192, 199, 384), sequence);
        // Beyond 256 a sequence has logits of its own, with a hidden state and chunks of 12 + 48 bytes.
        let row = 1792 + 4 * 151_936 + 297 * 60;
        assert_eq!(
            bytes(8192, 301, 384) - bytes(8192, 300, 384),
            sequence + row
        );
    }

    #[test]
    fn activations_are_kept_while_they_leave_half_for_keys_and_values() {
        let plan = |kept| TrainingPlan {
            state: 3_000,
            gradients: 1_000,
            activations: if kept == Kept::Inputs { 500 } else { 2_000 },
            tokens: 64,
            recompute: kept == Kept::Inputs,
        };
        let chosen = |left, may_recompute| choose(left, plan, may_recompute).map(|(kept, _)| kept);
        assert_eq!(chosen(8_000, true).unwrap(), Kept::Activations);
        assert_eq!(chosen(7_999, true).unwrap(), Kept::Inputs);
        assert_eq!(chosen(6_000, false).unwrap(), Kept::Activations);
        assert_eq!(chosen(4_500, true).unwrap(), Kept::Inputs);
        for (left, may_recompute) in [(5_999, false), (4_499, true)] {
            let error = chosen(left, may_recompute).unwrap_err();
            assert!(
                error.hint().unwrap().contains("micro_batch_tokens"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_training_takes_is_not_workspace() {
        let training = TrainingPlan {
            state: 60 * MIB,
            gradients: 20 * MIB,
            activations: 40 * MIB,
            tokens: 4096,
            recompute: true,
        };
        let of_policy = (1_500 * MIB, Some(training), 7_300 * MIB);
        let plan = divide(&MEMORY, of_policy, &NEEDS).unwrap();
        assert_eq!((plan.weights, plan.workspace), (1_500 * MIB, 80 * MIB));
        let text = plan.to_string();
        let expected = "optimizer 60 MiB, gradients 20 MiB, activations 40 MiB (4096 tokens, recomputed), draft 300 MiB";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn others_on_the_gpu_and_the_share_bound_each_other() {
        let crowded = Memory {
            free_at_start: 3_000 * MIB,
            free: 1_000 * MIB,
            ..MEMORY
        };
        assert_eq!(crowded.allowed(), 3_000 * MIB);
        assert_eq!(crowded.left(), 744 * MIB);
        let modest = Memory {
            utilization: 0.21,
            ..MEMORY
        };
        assert_eq!(modest.left(), 0);
    }

    #[test]
    fn a_sequence_without_room_is_refused_with_numbers() {
        let longest = 5_745 * BLOCK_SIZE;
        let needs = PoolNeeds {
            blocks: 50_000,
            longest,
            ..NEEDS
        };
        let error = divide(&MEMORY, (0, None, 0), &needs).unwrap_err();
        assert_eq!(
            error.to_string(),
            "one sequence of 183840 tokens needs 5745 MiB of KV cache and 5744 MiB are left on the GPU"
        );
        assert!(error.hint().unwrap().contains("max_completion_length"));
        let needs = PoolNeeds {
            longest: longest - BLOCK_SIZE,
            ..needs
        };
        assert!(divide(&MEMORY, (0, None, 0), &needs).is_ok());
        // Asked for with `kv_cache_tokens`: requests that do not fit are refused when they come.
        let few = PoolNeeds { blocks: 3, ..NEEDS };
        assert_eq!(divide(&MEMORY, (0, None, 0), &few).unwrap().kv_blocks, 3);
    }

    #[test]
    fn a_model_without_room_is_refused_before_it_is_there() {
        assert_eq!(
            admit(&MEMORY, 5_000 * MIB, 700 * MIB).unwrap(),
            Left(44 * MIB)
        );
        let error = admit(&MEMORY, 5_000 * MIB, 745 * MIB).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the model needs 5745 MiB on the GPU (weights 5000 MiB, workspace 745 MiB) and 5744 MiB are left there"
        );
        assert!(error.hint().unwrap().contains("gpu_memory_utilization"));
    }
}
