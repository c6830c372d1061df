//! The CPU backend: f32, matrix products by `faer`. The clear reference of every other device.
//!
//! Gradients are written by hand, layer by layer, instead of through candle's autograd: that one skips
//! operations silently (`rms_norm`, `rope`, `softmax_last_dim`), differentiates frozen weights, and keeps
//! every intermediate. Here a layer keeps its trace, or only its input when checkpointing.

mod attention;
mod buffer;
mod build;
mod decoder;
mod early_exit;
mod head;
mod kv;
mod linear;
mod mat;
mod ops;
mod params;
mod simd;
mod training;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use candle_core::Tensor;

use self::{
    decoder::{Decoder, Pass as LayerPass},
    early_exit::EarlyExit,
    kv::KvPool,
    params::{AdamW, Grads, Params},
    training::Saved,
};
use crate::{
    backend::{Backend, BlockId, Drafted, Exit, OptimStep, Pass, Sampled, StepRow, group::Seat},
    engine::sampler,
    error::PolicyError,
    spec::ModelSpec,
    types::{PackedBatch, TokenScores, TopTokens},
    weights::LoraConfig,
};

/// Which weights train, and what the reference policy is.
#[derive(Clone, Debug, PartialEq)]
pub enum Trainable {
    /// Inference only.
    Nothing,
    /// Every weight. `keep_reference` copies the starting weights for [`Pass::Reference`].
    Full { keep_reference: bool },
    /// Adapters on a frozen base; the reference is the base.
    Lora { config: LoraConfig, seed: u64 },
}

/// Sizes the pool of worker threads; once per process, before the first backend. Without it there is a
/// thread per core.
pub fn set_threads(threads: usize) -> Result<(), PolicyError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|_already_sized| PolicyError::Misuse("the worker threads are running already"))
}

/// [`Exit::Early`] was named before [`CpuBackend::add_early_exit`].
const NO_EARLY_EXIT: PolicyError = PolicyError::Misuse("the model has no early exit");

/// The policy in main memory.
pub struct CpuBackend {
    spec: ModelSpec,
    decoder: Decoder,
    params: Params,
    reference: Option<Params>,
    grads: Grads,
    optimizer: AdamW,
    early_exit: Option<EarlyExit>,
    kv: Option<KvPool>,
    saved: Option<Saved>,
    scratch: sampler::Scratch,
    gradient_checkpointing: bool,
    /// With others that train the same model.
    pub(super) seat: Option<Seat>,
}

impl CpuBackend {
    /// Takes the weights by their checkpoint names (see [`crate::weights`]).
    ///
    /// # Errors
    /// A weight that is missing or has another shape than the spec says.
    pub fn new(
        spec: ModelSpec,
        tensors: &BTreeMap<String, Tensor>,
        trainable: &Trainable,
        gradient_checkpointing: bool,
    ) -> Result<Self, PolicyError> {
        let (decoder, params) = build::build(&spec, tensors, trainable)?;
        let full_copy = matches!(
            trainable,
            Trainable::Full {
                keep_reference: true
            }
        );
        Ok(Self {
            reference: full_copy.then(|| params.clone()),
            grads: Grads::new(&params),
            optimizer: AdamW::default(),
            early_exit: None,
            kv: None,
            saved: None,
            scratch: sampler::Scratch::default(),
            spec,
            decoder,
            params,
            gradient_checkpointing,
            seat: None,
        })
    }

    /// Makes the early exit behind the first `layers` layers: as it was exported, else untrained, which is the
    /// policy's own head.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] for no layer or all of them; [`PolicyError::MissingWeight`] and
    /// [`PolicyError::WeightShape`] for weights of another exit or model.
    pub fn add_early_exit(
        &mut self,
        layers: usize,
        trained: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<(), PolicyError> {
        if layers == 0 || layers >= self.decoder.layers.len() {
            return Err(PolicyError::Misuse(
                "an early exit is behind the first layer or later and before the last",
            ));
        }
        let norm = self.params.data(self.decoder.head.norm);
        let mut exit = EarlyExit::new(layers, norm, self.decoder.eps);
        if let Some(trained) = trained {
            exit.import(trained)?;
        }
        self.early_exit = Some(exit);
        Ok(())
    }

    /// The early exit's weights; its optimizer is a part of a checkpoint.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where there is none.
    pub fn early_exit(&self) -> Result<&EarlyExit, PolicyError> {
        self.early_exit.as_ref().ok_or(NO_EARLY_EXIT)
    }

    /// Number of weights that train.
    pub fn trainable_parameters(&self) -> usize {
        self.params.trainable_count()
    }

    /// Number of all weights, adapters included.
    pub fn parameters(&self) -> usize {
        self.params.iter().map(|p| p.value.data().len()).sum()
    }

    /// Refuses a KV pool for `tokens` tokens that memory does not hold. Linux would hand it out and end some
    /// process later.
    ///
    /// # Errors
    /// [`PolicyError::Memory`].
    pub fn check_kv(&self, tokens: usize) -> Result<(), PolicyError> {
        let needed = tokens.saturating_mul(self.kv_bytes_per_token()) as u64;
        let what = "the KV pool";
        match free_memory().filter(|free| *free < needed) {
            Some(free) => Err(PolicyError::Memory { what, needed, free }),
            None => Ok(()),
        }
    }

    /// The base weights, as they are now; adapters are not merged in.
    pub fn export_weights(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.params.export(|p| !is_adapter(&p.name))
    }

    /// The LoRA matrices (`….lora_A.weight`, `….lora_B.weight`); empty without LoRA.
    pub fn export_adapter(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.params.export(|p| is_adapter(&p.name))
    }

    /// What trains: all weights, or the adapter; or the head of the early exit. The content of a checkpoint.
    pub fn export_trainable(&self, exit: Exit) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        match exit {
            Exit::Final => self.params.export(|p| p.trainable),
            Exit::Early => self.early_exit()?.export(),
        }
    }

    /// Gradients summed up since the last optimizer step, by weight; for checks against other
    /// implementations.
    pub fn export_gradients(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.grads.export(&self.params)
    }

    /// Overwrites weights by name; the KV cache of the old ones is the caller's to drop.
    pub fn import(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
        exit: Exit,
    ) -> Result<(), PolicyError> {
        match exit {
            Exit::Final => self.params.import(tensors),
            Exit::Early => self.early_exit_mut()?.import(tensors),
        }
    }

    /// Optimizer step count and moments.
    pub fn export_optimizer(&self, exit: Exit) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        match exit {
            Exit::Final => self.optimizer.export(&self.params),
            Exit::Early => self.early_exit()?.export_optimizer(),
        }
    }

    /// The inverse of [`CpuBackend::export_optimizer`].
    pub fn import_optimizer(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
        exit: Exit,
    ) -> Result<(), PolicyError> {
        match exit {
            Exit::Final => self.optimizer.import(&self.params, tensors),
            Exit::Early => self.early_exit_mut()?.import_optimizer(tensors),
        }
    }

    fn early_exit_mut(&mut self) -> Result<&mut EarlyExit, PolicyError> {
        self.early_exit.as_mut().ok_or(NO_EARLY_EXIT)
    }

    /// The reference weights of full fine-tuning where one is kept; `None` for LoRA, whose base is frozen.
    pub fn export_reference(&self) -> Result<Option<BTreeMap<String, Tensor>>, PolicyError> {
        let copy = self.reference.as_ref();
        copy.map(|params| params.export(|_| true)).transpose()
    }

    /// Hidden states that rows are sampled from, after filling the cache of the first `layers` layers.
    fn run_rows(
        &mut self,
        rows: &[StepRow<'_>],
        layers: usize,
    ) -> Result<decoder_rows::Sampling, PolicyError> {
        let kv = self
            .kv
            .as_mut()
            .ok_or(PolicyError::Misuse("step before init_kv"))?;
        let tokens = kv::tokens(rows);
        let ids: Vec<u32> = rows.iter().flat_map(|r| r.tokens.iter().copied()).collect();
        let positions: Vec<usize> = tokens.iter().map(|t| t.position).collect();
        let pass = LayerPass {
            decoder: &self.decoder,
            params: &self.params,
            positions: &positions,
            adapters: true,
        };
        let mut x = self.decoder.embed(&self.params, &ids);
        for (index, layer) in self.decoder.layers.iter().enumerate().take(layers) {
            let projected = layer.project(&pass, &x);
            kv.write(index, &tokens, &projected.k, &projected.v);
            let attended = kv.attend(index, &tokens, &projected.q);
            let middle = layer.join(&pass, &x, &attended);
            (_, _, x) = layer.mlp(&pass, &middle);
        }
        Ok(decoder_rows::sampling(rows, &x))
    }
}

/// Bytes that can be had without swapping, where the system says.
fn free_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// Picking the hidden states that are sampled from.
mod decoder_rows {
    use super::{StepRow, head, mat::Mat};

    /// Rows that sample, and their hidden states.
    pub(super) struct Sampling {
        /// Index of the row, and of its first hidden state.
        pub(super) rows: Vec<(usize, usize)>,
        /// Of the last token before each proposed one, and of the last proposed one.
        pub(super) hidden: Mat,
    }

    pub(super) fn sampling(rows: &[StepRow<'_>], x: &Mat) -> Sampling {
        let mut end = 0;
        let mut positions = Vec::new();
        let mut picked = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            end += row.tokens.len();
            if let Some(args) = &row.sample {
                picked.push((index, positions.len()));
                let proposed = args.proposal.map_or(0, |p| p.tokens.len());
                positions.extend(end - 1 - proposed..end);
            }
        }
        Sampling {
            rows: picked,
            hidden: head::gather(x, positions.into_iter()),
        }
    }
}

fn is_adapter(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

impl Backend for CpuBackend {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_bytes_per_token(&self) -> usize {
        let per_layer = 2 * self.spec.num_key_value_heads * self.spec.head_dim;
        self.spec.num_hidden_layers * per_layer * size_of::<f32>()
    }

    fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError> {
        let layers = self.spec.num_hidden_layers;
        self.check_kv(blocks.saturating_mul(block_size))?;
        self.kv = Some(KvPool::new(self.decoder.heads, layers, blocks, block_size));
        Ok(())
    }

    fn copy_kv(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError> {
        let kv = self
            .kv
            .as_mut()
            .ok_or(PolicyError::Misuse("copy_kv before init_kv"))?;
        kv.copy(copies);
        Ok(())
    }

    fn step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let picked = self.run_rows(rows, self.decoder.layers.len())?;
        let mut out = vec![Vec::new(); rows.len()];
        if picked.rows.is_empty() {
            return Ok(out);
        }
        let logits = self.decoder.head.logits(&self.params, &picked.hidden);
        for (row, first) in picked.rows {
            if let Some(args) = &rows[row].sample {
                out[row] = sampler::verify(|i| logits.row(first + i), args, &mut self.scratch)?;
            }
        }
        Ok(out)
    }

    fn propose(&mut self, rows: &[StepRow<'_>], exit: Exit) -> Result<Vec<Drafted>, PolicyError> {
        let layers = match exit {
            Exit::Final => self.decoder.layers.len(),
            Exit::Early => self.early_exit()?.layers(),
        };
        let hidden = self.run_rows(rows, layers)?.hidden;
        let logits = match exit {
            Exit::Final => self.decoder.head.logits(&self.params, &hidden),
            Exit::Early => {
                let normed = self.early_exit()?.forward(&hidden);
                self.decoder.head.unembed(&self.params, &normed)
            }
        };
        let args = rows.iter().map(|row| row.sample.as_ref());
        args.enumerate()
            .map(|(i, args)| {
                let args = args.ok_or(PolicyError::Misuse("every row of a draft samples"))?;
                sampler::draft(logits.row(i), args)
            })
            .collect()
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
        self.distill_packed(batch, targets, temperature, weight, exit)
    }

    fn optimizer_step(&mut self, step: &OptimStep, exit: Exit) -> Result<f64, PolicyError> {
        match exit {
            Exit::Final => {
                if let Some(seat) = &self.seat {
                    self.grads.sum_over(seat, &self.params)?;
                }
                self.optimizer.step(&mut self.params, &mut self.grads, step)
            }
            Exit::Early => {
                let exit = self.early_exit.as_mut().ok_or(NO_EARLY_EXIT)?;
                exit.optimizer_step(step, self.seat.as_ref())
            }
        }
    }
}
