//! The CUDA backend: bf16 weights and keys, f32 sums and residual stream, plain cudarc with dynamic loading, so that
//! building needs no CUDA and one binary serves machines with and without a GPU.
//!
//! candle's CUDA was rejected: it needs nvcc to build, allocates at every operation and cannot be captured in a
//! graph. All buffers here are made once; a decoding step is a graph that the device replays without the host.

#![expect(unsafe_code, reason = "the one place that talks to a device")]

mod ahead;
mod blocks;
mod compile;
mod device;
mod draws;
mod error;
mod exit;
mod forward;
mod gemm;
mod graph;
mod head;
mod inputs;
mod launch;
mod layer;
mod lora;
mod maps;
mod memory;
mod nccl;
mod parts;
mod product;
mod propose;
mod quantized;
mod siblings;
mod skinny;
mod step;
mod survey;
mod train;
mod verify;
mod weights;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_core::Tensor;
use cudarc::driver::{CudaGraph, CudaSlice, DevicePtr};
use half::bf16;

pub use compile::{SOURCES, TRAINING_SOURCES, architecture, compile, nvrtc_version};
pub use device::count;
pub use error::CudaError;
pub use graph::{DecodeShape, KernelTime, Profile};
pub use memory::{Budget, MemoryPlan, PoolNeeds, Recompute, Tenant};
pub(crate) use nccl::Communicators;
pub use nccl::has_nccl;
pub use propose::DeviceRow;
pub use survey::{GpuFacts, Survey, survey};
pub use train::{Kept, Learns, Moments, TrainingPlan, WorkTime, training_bytes};

use crate::{
    backend::{Backend, BlockId, Drafted, Exit, OptimStep, Pass, Sampled, StepRow},
    engine::sampler,
    error::PolicyError,
    spec::ModelSpec,
    types::{PackedBatch, TokenScores, TopTokens},
    weights::Quantized,
};
use ahead::Ahead;
use blocks::Bits;
use device::Gpu;
use draws::Draws;
use exit::EarlyExit;
use forward::Work;
use gemm::Gemm;
use graph::{Captured, Decode, MAX_BURST};
use inputs::{Inputs, Layout};
use lora::Adapters;
use maps::Maps;
use propose::Shelf;
use train::Training;
use weights::{WeightSizes, Weights};

/// Tokens of a KV block: what one warp reads at a time (attention.cu).
pub const BLOCK_SIZE: usize = 32;

/// Sequences of one step, at most: a thread of one block each (`advance` in sample.cu).
const MAX_BATCH: usize = 1024;

/// Most the buffers are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaSizes {
    /// Tokens of one step, prompts and decoding together.
    pub max_step_tokens: usize,
    /// Sequences of one step.
    pub max_batch: usize,
    /// Tokens of one sequence.
    pub max_model_len: usize,
}

/// The weights of a model by their checkpoint names (see [`crate::weights`]); matrices are in either.
#[derive(Clone, Copy, Debug)]
pub struct CudaWeights<'a> {
    pub tensors: &'a BTreeMap<String, Tensor>,
    pub quantized: &'a Quantized,
    /// Whether the second stay quantised where their format allows it; otherwise all become bf16.
    pub keep: bool,
}

impl<'a> CudaWeights<'a> {
    /// Nothing is quantised.
    pub fn dense(tensors: &'a BTreeMap<String, Tensor>) -> Self {
        static NONE: Quantized = Quantized::new();
        Self {
            tensors,
            quantized: &NONE,
            keep: false,
        }
    }

    /// How the matrices `names`, which lie in one, are kept.
    fn kept(&self, names: &[&str]) -> Option<Bits> {
        match self.keep {
            true => Bits::of(self.quantized, names),
            false => None,
        }
    }
}

/// Keys and values of all layers, in memory that training passes use in turns with them.
struct KvPool {
    /// Owns what `base` names.
    buffer: CudaSlice<u8>,
    base: u64,
    blocks: usize,
    /// Bytes of keys and values.
    used: usize,
}

impl KvPool {
    fn room(&self) -> train::Room {
        train::Room {
            base: self.base,
            bytes: self.buffer.len(),
        }
    }
}

/// The policy on one GPU. Generates and, after [`CudaBackend::train`], trains.
pub struct CudaBackend {
    spec: ModelSpec,
    gpu: Gpu,
    gemm: Gemm,
    weights: Weights,
    /// [`WeightSizes::read`].
    read_bytes: usize,
    work: Work,
    /// On Hopper.
    maps: Option<Maps>,
    deterministic: bool,
    kv: Option<KvPool>,
    /// For passes of any shape, run kernel by kernel.
    inputs: Inputs,
    decode: Decode,
    ahead: Ahead,
    draws: Draws,
    /// What drafts of this model left their probabilities in.
    shelf: Shelf,
    early_exit: Option<EarlyExit>,
    graphs: HashMap<Captured, CudaGraph>,
    scratch: sampler::Scratch,
    /// From the first training or scoring pass on.
    training: Option<Box<Training>>,
    /// Of a policy that trains adapters without merging them.
    adapters: Option<Adapters>,
    /// Folder of compiled kernels.
    cache: Option<PathBuf>,
}

// SAFETY: graphs and the handles of cublasLt belong to a context and to no thread; whoever has the backend is the only one who
// calls with them, since every call that does takes it by `&mut`.
unsafe impl Send for CudaBackend {}

/// What decides whether a model runs here, as [`CudaError::Shape`].
fn check(spec: &ModelSpec) -> Result<(), CudaError> {
    let refuse = |what: String| Err(CudaError::Shape(what));
    let group = spec.num_attention_heads / spec.num_key_value_heads;
    if ![32, 64, 96, 128].contains(&spec.head_dim) {
        return refuse(format!(
            "head_dim {} is not 32, 64, 96 or 128",
            spec.head_dim
        ));
    }
    if group > 16 {
        return refuse(format!("{group} query heads share a key head; 16 can"));
    }
    if !spec.hidden_size.is_multiple_of(32) || !spec.intermediate_size.is_multiple_of(32) {
        return refuse(format!(
            "hidden_size {} and intermediate_size {} are not multiples of 32",
            spec.hidden_size, spec.intermediate_size
        ));
    }
    if spec.hidden_size > 8192 || spec.vocab_size > 320 * 1024 {
        return refuse(format!(
            "hidden_size {} is above 8192 or vocab_size {} above {}",
            spec.hidden_size,
            spec.vocab_size,
            320 * 1024
        ));
    }
    if spec.o_bias {
        return refuse("o_proj has a bias".to_owned());
    }
    Ok(())
}

/// Bytes of keys and values of one token over all layers.
fn kv_bytes_per_token(spec: &ModelSpec) -> usize {
    2 * spec.num_hidden_layers * spec.kv_dim() * size_of::<bf16>()
}

impl CudaBackend {
    /// Uploads the weights by their checkpoint names (see [`crate::weights`]) to GPU `ordinal`, rounded to bf16. Compiled
    /// kernels are kept in the folder `cache`.
    ///
    /// # Errors
    /// As [`Self::with_weights`].
    pub fn new(
        ordinal: usize,
        spec: ModelSpec,
        tensors: &BTreeMap<String, Tensor>,
        sizes: CudaSizes,
        cache: Option<&Path>,
    ) -> Result<Self, PolicyError> {
        Self::with_weights(ordinal, spec, CudaWeights::dense(tensors), sizes, cache)
    }

    /// The same with weights that may be and stay quantised.
    ///
    /// # Errors
    /// A weight that is missing or of another shape; [`CudaError`] for everything about the GPU.
    pub fn with_weights(
        ordinal: usize,
        spec: ModelSpec,
        given: CudaWeights<'_>,
        sizes: CudaSizes,
        cache: Option<&Path>,
    ) -> Result<Self, PolicyError> {
        check(&spec)?;
        if sizes.max_batch > MAX_BATCH {
            return Err(CudaError::Capacity {
                what: "sequences",
                asked: sizes.max_batch,
                most: MAX_BATCH,
            }
            .into());
        }
        let gpu = Gpu::open(ordinal, spec.head_dim, cache)?;
        // Before the weights, because it finds out whether cublasLt is there.
        let gemm = Gemm::new(&gpu.stream)?;
        let weights = Weights::new(&gpu.stream, &spec, given, sizes.max_model_len)?;
        let read_bytes = WeightSizes::of(&spec, given, sizes.max_model_len).read;
        let layout = Layout {
            tokens: sizes.max_step_tokens,
            sequences: sizes.max_batch,
            width: sizes.max_model_len.div_ceil(BLOCK_SIZE),
        };
        let work = Work::new(&gpu, &spec, &sizes)?;
        let maps = match gpu.products {
            Some(_) => Some(Maps::new(&gpu.stream, &spec, &weights, &work)?),
            None => None,
        };
        let decode = Decode::new(&gpu, layout, spec.vocab_size)?;
        let draws = Draws::new(
            &gpu,
            spec.vocab_size,
            work.max_rows,
            sizes.max_step_tokens,
            MAX_BURST * sizes.max_batch,
        )?;
        Ok(Self {
            gemm,
            work,
            maps,
            deterministic: false,
            draws,
            shelf: Shelf::default(),
            early_exit: None,
            inputs: Inputs::new(&gpu.stream, layout)?,
            ahead: Ahead::new(&gpu.stream, &decode)?,
            decode,
            graphs: HashMap::new(),
            scratch: sampler::Scratch::default(),
            training: None,
            adapters: None,
            cache: cache.map(Path::to_owned),
            kv: None,
            weights,
            read_bytes,
            gpu,
            spec,
        })
    }

    /// From now on the logits of a token depend on nothing but the tokens before it: neither on what else is in the pass,
    /// nor on how prompts are divided, nor on drafts (batch invariance, He et al. 2025). Every sum is made in one order.
    /// Drafts' own passes stay as they are.
    ///
    /// # Errors
    /// [`CudaError::NotYet`] where there are no products of our own for all sizes; those of memory for a quantised head,
    /// which becomes bf16: that product takes it whole; [`CudaError::UnmergedDeterministic`].
    pub fn set_deterministic(&mut self) -> Result<(), CudaError> {
        if self.adapters.is_some() {
            return Err(CudaError::UnmergedDeterministic);
        }
        self.maps()?;
        self.weights.dequantize_head(&self.gpu)?;
        let (stream, spec) = (&self.gpu.stream, &self.spec);
        self.maps = Some(Maps::new(stream, spec, &self.weights, &self.work)?);
        self.deterministic = true;
        self.ahead.forget();
        self.graphs.clear();
        Ok(())
    }

    /// Whether some decoding step since [`Backend::init_kv`] has read the prompts that sequences share once for several of them
    /// (group.cu).
    pub fn reads_prompts_together(&self) -> bool {
        let together = |key: &Captured| {
            matches!(
                key,
                Captured::Decode {
                    siblings: Some(_),
                    ..
                }
            )
        };
        self.graphs.keys().any(together)
    }

    /// Bytes per second that the GPU's memory moves, measured; to be asked before [`Backend::init_kv`] takes what is free.
    /// `None` where too little is free to measure it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory_bandwidth(&self) -> Result<Option<f64>, CudaError> {
        self.gpu.memory_bandwidth()
    }

    /// [`super::AnyBackend::bind`].
    ///
    /// # Errors
    /// As there.
    pub fn bind(&self) -> Result<(), PolicyError> {
        let bound = self.gpu.stream.context().bind_to_thread();
        Ok(bound.map_err(CudaError::from)?)
    }

    /// Bytes of the weights on the device.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes that a decoding step reads: every weight that takes part once, as it is stored, and the keys and values of
    /// `kv_tokens` tokens. A prompt that several sequences share counts for each of them, as decoding engines read it.
    pub fn step_bytes(&self, kv_tokens: usize) -> usize {
        self.read_bytes + kv_tokens * kv_bytes_per_token(&self.spec)
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.spec.num_attention_heads / self.spec.num_key_value_heads
    }
}

impl Backend for CudaBackend {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_bytes_per_token(&self) -> usize {
        kv_bytes_per_token(&self.spec)
    }

    fn max_ahead(&self) -> usize {
        // One burst to read, one that runs meanwhile, and a token more: a row whose last token is drawn cannot go on.
        2 * MAX_BURST
    }

    fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError> {
        if block_size != BLOCK_SIZE {
            return Err(PolicyError::Misuse("KV blocks on a GPU have 32 tokens"));
        }
        let used = self.kv_bytes_per_token() * blocks * block_size;
        self.kv = None;
        let needed = used.max(self.free_arena());
        // What was freed in the stream's order goes back to the driver when somebody waits for it.
        self.gpu.stream.synchronize().map_err(CudaError::from)?;
        let free = self.gpu.memory()?.0;
        if needed > free {
            let (needed, free) = (needed as u64, free as u64);
            let what = "the KV pool";
            return Err(PolicyError::Memory { what, needed, free });
        }
        // Zeros, because a key that is masked is still multiplied, and a NaN would survive that.
        let buffer = self.gpu.stream.alloc_zeros::<u8>(needed);
        let buffer = buffer.map_err(CudaError::from)?;
        let base = buffer.device_ptr(&self.gpu.stream).0;
        self.kv = Some(KvPool {
            buffer,
            base,
            blocks,
            used,
        });
        self.ahead.forget();
        self.graphs.clear();
        Ok(())
    }

    fn copy_kv(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError> {
        self.begin_rollouts()?;
        self.copy_blocks(copies)
    }

    fn step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        self.begin_rollouts()?;
        self.next_step(rows)
    }

    fn propose(&mut self, rows: &[StepRow<'_>], exit: Exit) -> Result<Vec<Drafted>, PolicyError> {
        self.begin_rollouts()?;
        self.propose_rows(rows, exit)
    }

    fn score(
        &mut self,
        batch: &PackedBatch,
        temperature: f32,
        pass: Pass,
    ) -> Result<TokenScores, PolicyError> {
        self.score_packed(batch, temperature, pass)
    }

    fn backward(&mut self, dlogp: &[f32]) -> Result<(), PolicyError> {
        self.backward_packed(dlogp)
    }

    fn distill(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
        exit: Exit,
    ) -> Result<f64, PolicyError> {
        match exit {
            Exit::Final => self.distill_packed(batch, targets, temperature, weight),
            Exit::Early => self.distill_exit(batch, targets, temperature, weight),
        }
    }

    fn expect_update(&mut self) {
        self.reduce_with_next_backward();
    }

    fn optimizer_step(&mut self, step: &OptimStep, exit: Exit) -> Result<f64, PolicyError> {
        match exit {
            Exit::Final => self.update(step),
            Exit::Early => self.update_exit(step),
        }
    }
}
