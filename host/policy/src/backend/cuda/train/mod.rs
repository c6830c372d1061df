//! Training on the device: packed forward passes that keep their activations, a backward pass written by hand, AdamW. The
//! decoder's weights are the rollout's own buffers, so that there is nothing to synchronise; f32 masters stand beside them.
//!
//! With LoRA those buffers hold the base with the adapters merged in, made anew at every update, and both directions of
//! training read them: the policy that is scored is the one that draws, to the bit. Gradients are taken at the merged
//! weights; the base is kept beside them for the reference, in bf16 and, where that loses something, on the host in f32.
//! Or adapters are not merged but products of their own ([`super::lora`]); the weights then are the base, and may be quantised
//! (QLoRA, Dettmers et al. 2023, with the blocks of a GGUF file): passes make them bf16 one matrix at a time.

mod adapters;
mod arena;
mod backward;
mod buffers;
mod clock;
mod exit;
mod forward;
mod head;
mod kernels;
mod layout;
mod operands;
mod optimizer;
mod plan;
mod reduce;
mod room;
mod state;
mod tables;
mod unpacked;

use std::{collections::BTreeMap, path::Path};

use cudarc::driver::{CudaSlice, DevicePtr};

pub use arena::Kept;
pub use clock::WorkTime;
pub(super) use exit::ExitOptimizer;
pub use optimizer::Moments;
pub use plan::{Learns, TrainingPlan, training_bytes};

use super::{
    CudaBackend, CudaError, CudaWeights,
    device::Gpu,
    gemm::Gemm,
    layer::Pointers,
    lora::{AdapterAt, Adapters, LayerMatrix},
    quantized::Stored,
    weights::Weights,
};
use crate::{
    backend::{OptimStep, Pass, check_batch, check_targets, cpu::Trainable},
    error::PolicyError,
    spec::ModelSpec,
    types::{PackedBatch, TokenScores, TopTokens},
};
use adapters::Lora;
use arena::{Arena, Sizes};
use clock::{Clock, Work};
use forward::Run;
use head::{Lesson, Scored};
use kernels::Kernels;
use layout::{Layout, ModelSlots};
use optimizer::Optimizer;
use reduce::Reducer;
pub(super) use room::Room;
use unpacked::Unpacked;

/// Most tokens of one pass: blocks of a grid's second dimension.
pub(super) const MAX_TOKENS: usize = 65_535;

/// Backward passes before a [`Pass::Train`], or a second one after it.
const NO_PASS: PolicyError = PolicyError::Misuse("backward without a training pass");

/// What training passes work with beside their own state.
#[derive(Clone, Copy)]
struct On<'a> {
    gpu: &'a Gpu,
    weights: &'a Weights,
    spec: &'a ModelSpec,
    /// Where keys and values are kept during rollouts, and what they need not survive passes.
    room: Option<Room>,
}

/// What trains.
enum Mode {
    Nothing,
    Full { reference: Option<Box<Weights>> },
    Lora(Box<Lora>),
}

impl Mode {
    /// The adapters of a matrix, if it has some that train.
    fn adapter(&self, layer: usize, matrix: LayerMatrix) -> Option<&AdapterAt> {
        match self {
            Self::Lora(lora) => lora.at[layer][matrix as usize].as_ref(),
            Self::Nothing | Self::Full { .. } => None,
        }
    }

    /// The same where they are not merged into it.
    fn beside(&self, layer: usize, matrix: LayerMatrix) -> Option<&AdapterAt> {
        match self {
            Self::Lora(lora) if lora.is_merged() => None,
            _ => self.adapter(layer, matrix),
        }
    }
}

/// Where a model's weights lie.
struct ModelAt {
    embed: Stored,
    layers: Vec<Pointers<Stored>>,
    norm: u64,
    head: Stored,
}

/// See the file header.
pub(super) struct Training {
    kernels: Kernels,
    gemm: Gemm,
    layout: Layout,
    slots: ModelSlots,
    mode: Mode,
    optimizer: Option<Optimizer>,
    sizes: Sizes,
    /// Without room for a single token until the first pass, and after each rollout.
    arena: Arena,
    /// Where the arena is, unless it is in the [`Room`] of keys and values.
    buffer: Option<CudaSlice<u8>>,
    unpacked: Unpacked,
    /// What the last [`Pass::Train`] left for `backward`.
    saved: Option<(Run, Scored)>,
    /// Pass and chunk whose logits are there.
    logits: Option<(u64, usize)>,
    passes: u64,
    clock: Clock,
    /// With the GPUs that train the same model.
    reducer: Option<Reducer>,
}

impl ModelAt {
    fn of(weights: &Weights, gpu: &Gpu) -> Self {
        let stream = &gpu.stream;
        let layers = weights.layers.iter();
        Self {
            embed: weights.embed.at(stream),
            layers: layers.map(|layer| Pointers::of(layer, stream)).collect(),
            norm: weights.norm.device_ptr(stream).0,
            head: weights.head().at(stream),
        }
    }
}

impl Training {
    /// For passes of up to `tokens` tokens. `given` are the weights that the model was made of.
    fn new(
        on: On<'_>,
        given: CudaWeights<'_>,
        learns: Learns<'_>,
        (tokens, kept): (usize, Kept),
        cache: Option<&Path>,
    ) -> Result<Self, PolicyError> {
        let On { gpu, spec, .. } = on;
        let Learns {
            trainable, moments, ..
        } = learns;
        let (layout, slots) = layout::of_model(spec);
        let kernels = Kernels::load(gpu, spec.head_dim, spec.hidden_size, cache)?;
        let mut gemm = Gemm::new(&gpu.stream)?;
        let (mode, optimizer) = match trainable {
            Trainable::Nothing => (Mode::Nothing, None),
            Trainable::Full { keep_reference } => {
                let copy = || on.weights.copy(&gpu.stream).map(Box::new);
                let reference = keep_reference.then(copy).transpose()?;
                let weights = on.weights.buffers(&gpu.stream)?;
                let optimizer = Optimizer::new(gpu, layout.clone(), weights, moments)?;
                for param in layout.params.iter().filter(|p| layout.slots[p.slot].matrix) {
                    let tensor = given
                        .tensors
                        .get(&param.name)
                        .ok_or_else(|| missing(&param.name))?;
                    let values = optimizer::numbers(&param.name, tensor, param.count())?;
                    optimizer.set(gpu, param, &values)?;
                }
                (Mode::Full { reference }, Some(optimizer))
            }
            Trainable::Lora { config, seed } => {
                config.check_targets()?;
                let merge = merges(learns.merge, on.weights.largest_quantized() > 0)?;
                let how = (merge, moments);
                let (lora, optimizer) = Lora::new(on, given, &layout, (config, *seed), how)?;
                lora.merge(on, &kernels, &mut gemm, &optimizer)?;
                (Mode::Lora(Box::new(lora)), Some(optimizer))
            }
        };
        let sizes = sizes(trainable, tokens, kept, gpu.multiprocessors);
        Ok(Self {
            kernels,
            gemm,
            layout,
            slots,
            mode,
            optimizer,
            sizes,
            arena: Arena::default(),
            buffer: None,
            unpacked: Unpacked::new(on)?,
            saved: None,
            logits: None,
            passes: 0,
            clock: Clock::default(),
            reducer: None,
        })
    }

    /// The weights that a pass reads.
    fn model(&self, on: On<'_>, pass: Pass) -> ModelAt {
        let current = ModelAt::of(on.weights, on.gpu);
        match &self.mode {
            Mode::Full {
                reference: Some(frozen),
            } if pass == Pass::Reference => ModelAt::of(frozen, on.gpu),
            Mode::Lora(lora) if pass == Pass::Reference => lora.without(on.gpu, current),
            _ => current,
        }
    }

    /// What rollouts in steps of up to `tokens` tokens need of adapters that are not merged.
    fn adapters(&self, on: On<'_>, tokens: usize) -> Result<Option<Adapters>, CudaError> {
        match &self.mode {
            Mode::Lora(lora) if !lora.is_merged() => Ok(Some(Adapters {
                layers: lora.at.clone(),
                low: on.gpu.stream.alloc_zeros(3 * self.sizes.rank * tokens)?,
            })),
            _ => Ok(None),
        }
    }

    fn trains(&self) -> Result<&Optimizer, PolicyError> {
        self.optimizer.as_ref().ok_or(NOTHING_TRAINS)
    }
}

/// What is asked of a model that only generates.
const NOTHING_TRAINS: PolicyError = PolicyError::Misuse("nothing of this model trains");

/// Whether adapters are merged: as asked, else unless something of the model is `quantized`.
///
/// # Errors
/// [`CudaError::MergeQuantized`] where that cannot be.
fn merges(asked: Option<bool>, quantized: bool) -> Result<bool, CudaError> {
    match asked {
        Some(true) if quantized => Err(CudaError::MergeQuantized),
        _ => Ok(asked.unwrap_or(!quantized)),
    }
}

fn missing(name: &str) -> PolicyError {
    PolicyError::MissingWeight {
        name: name.to_owned(),
    }
}

fn sizes(trainable: &Trainable, tokens: usize, kept: Kept, multiprocessors: usize) -> Sizes {
    let rank = match trainable {
        Trainable::Lora { config, .. } => layout::stored_rank(config.r),
        _ => 0,
    };
    let kept = match trainable {
        Trainable::Nothing => Kept::Nothing,
        _ => kept,
    };
    Sizes {
        tokens: tokens.min(MAX_TOKENS),
        kept,
        rank,
        multiprocessors,
    }
}

impl CudaBackend {
    /// Makes room for training: masters, gradients and moments of what trains, and what passes of `tokens` tokens keep.
    /// `given` are the weights that the model was made of. A longer pass is let in where the GPU has room for it.
    ///
    /// # Errors
    /// [`PolicyError::LoraTarget`]; [`CudaError::StaysQuantized`] and [`CudaError::MergeQuantized`] for weights that are;
    /// [`CudaError::UnmergedDeterministic`]; [`CudaError`] for everything about the GPU.
    pub fn train(
        &mut self,
        given: CudaWeights<'_>,
        learns: Learns<'_>,
        (tokens, kept): (usize, Kept),
    ) -> Result<(), PolicyError> {
        let on = On {
            gpu: &self.gpu,
            weights: &self.weights,
            spec: &self.spec,
            room: None,
        };
        let cache = self.cache.as_deref();
        let training = Training::new(on, given, learns, (tokens, kept), cache)?;
        let adapters = training.adapters(on, self.work.max_tokens)?;
        if adapters.is_some() && self.deterministic {
            return Err(CudaError::UnmergedDeterministic.into());
        }
        self.adapters = adapters;
        self.training = Some(Box::new(training));
        self.forget_steps();
        self.graphs.clear();
        Ok(())
    }

    /// Bursts that were drawn ahead with other weights.
    fn forget_steps(&mut self) {
        self.ahead.forget();
    }

    /// The state of training, which a model that only generates gets when it first scores, and what it works with.
    fn with_training(&mut self) -> Result<(&mut Training, On<'_>), PolicyError> {
        if self.training.is_none() {
            let none = BTreeMap::new();
            let (given, nothing) = (CudaWeights::dense(&none), &Trainable::Nothing);
            self.train(given, Learns::of(nothing), (0, Kept::Nothing))?;
        }
        let on = On {
            gpu: &self.gpu,
            weights: &self.weights,
            spec: &self.spec,
            room: self.kv.as_ref().map(super::KvPool::room),
        };
        let training = self.training.as_deref_mut().ok_or(NOTHING_TRAINS)?;
        Ok((training, on))
    }

    fn longest(&self) -> usize {
        let positions = self.weights.rope.len() / self.spec.head_dim;
        positions.min(self.spec.max_position_embeddings)
    }

    pub(super) fn score_packed(
        &mut self,
        batch: &PackedBatch,
        temperature: f32,
        pass: Pass,
    ) -> Result<TokenScores, PolicyError> {
        check_batch(batch, self.spec.vocab_size, self.longest())?;
        let (training, on) = self.begin_passes()?;
        let (run, scored) = training.forward_batch(on, batch, temperature, pass)?;
        let scores = training.score_rows(on, &run, &scored)?;
        if pass == Pass::Train {
            training.saved = Some((run, scored));
        }
        Ok(scores)
    }

    pub(super) fn backward_packed(&mut self, dlogp: &[f32]) -> Result<(), PolicyError> {
        let (training, on) = self.with_training()?;
        training.trains()?;
        let (_, scored) = training.saved.as_ref().ok_or(NO_PASS)?;
        if dlogp.len() != scored.rows {
            return Err(PolicyError::Misuse(
                "backward needs one coefficient per scored token",
            ));
        }
        let (run, scored) = training.saved.take().ok_or(NO_PASS)?;
        let coefficients = on.gpu.stream.clone_htod(dlogp).map_err(CudaError::from)?;
        training.backward(on, &run, &scored, &Lesson::LogProbs(coefficients))
    }

    pub(super) fn distill_packed(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
    ) -> Result<f64, PolicyError> {
        check_batch(batch, self.spec.vocab_size, self.longest())?;
        check_targets(batch, targets, self.spec.vocab_size)?;
        let (training, on) = self.begin_passes()?;
        training.trains()?;
        let (run, scored) = training.forward_batch(on, batch, temperature, Pass::Train)?;
        let lesson = Lesson::soft(on.gpu, targets, weight)?;
        training.backward(on, &run, &scored, &lesson)?;
        Ok(weight * lesson.loss(on.gpu)?)
    }

    pub(super) fn update(&mut self, step: &OptimStep) -> Result<f64, PolicyError> {
        let (training, on) = self.with_training()?;
        let Training {
            kernels,
            gemm,
            mode,
            optimizer,
            logits,
            clock,
            reducer,
            ..
        } = training;
        let optimizer = optimizer.as_mut().ok_or(NOTHING_TRAINS)?;
        clock.change(on.gpu, Work::Optimizer)?;
        if let Some(reducer) = reducer {
            reducer.finish(on.gpu, optimizer)?;
        }
        let norm = optimizer.step(on.gpu, kernels, step)?;
        if let Mode::Lora(lora) = mode {
            clock.change(on.gpu, Work::Merging)?;
            lora.merge(on, kernels, gemm, optimizer)?;
        }
        clock.pause(on.gpu)?;
        *logits = None;
        training.saved = None;
        self.forget_steps();
        Ok(norm)
    }

    /// Measures where the time of the following training passes and updates goes.
    pub fn start_profile(&mut self) {
        if let Some(training) = &mut self.training {
            training.clock.start();
        }
    }

    /// What [`CudaBackend::start_profile`] has measured; nothing for a model that does not train.
    pub fn stop_profile(&mut self) -> Vec<WorkTime> {
        let training = self.training.as_mut();
        training.map_or_else(Vec::new, |training| training.clock.stop())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_merged_where_that_can_be_unless_asked_otherwise() {
        for (asked, quantized, expected) in [
            (None, false, true),
            (None, true, false),
            (Some(false), false, false),
            (Some(false), true, false),
            (Some(true), false, true),
        ] {
            assert_eq!(merges(asked, quantized).unwrap(), expected);
        }
        let refused = merges(Some(true), true).unwrap_err();
        assert!(matches!(refused, CudaError::MergeQuantized));
        assert!(refused.hint().is_some() && !refused.is_of_the_device());
    }
}
