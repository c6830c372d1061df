//! The early exit on the device: the head that drafts behind the first layers (its formula: cpu/early_exit.rs). How it
//! learns is in `train/exit.rs`.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaBackend, CudaError,
    forward::{Addresses, PassArgs},
    gemm::{Operands, Out, Shape},
    train::ExitOptimizer,
    weights,
};
use crate::error::PolicyError;

/// See the file header.
pub(crate) struct EarlyExit {
    layers: usize,
    /// `[H]`.
    norm: CudaSlice<f32>,
    /// `[H, H]`; nothing for an exit that never learns and is not trained, where it is 0.
    adapter: Option<CudaSlice<bf16>>,
    trained: bool,
    /// Of a policy that trains.
    pub(super) optimizer: Option<ExitOptimizer>,
    /// The weight of a norm that has none, `[H]`.
    ones: CudaSlice<f32>,
}

impl EarlyExit {
    /// Layers below it.
    pub(crate) fn layers(&self) -> usize {
        self.layers
    }

    /// Whether its head is more than the policy's own.
    pub(crate) fn is_trained(&self) -> bool {
        self.trained
    }

    /// Where its weights are, if it has an adapter.
    pub(super) fn addresses(&self, stream: &Arc<CudaStream>) -> Option<HeadAt> {
        Some(HeadAt {
            norm: self.norm.device_ptr(stream).0,
            adapter: self.adapter.as_ref()?.device_ptr(stream).0,
            ones: self.ones.device_ptr(stream).0,
        })
    }
}

/// Addresses of the head's weights, and of the ones that stand in for a norm's.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadAt {
    pub(super) norm: u64,
    pub(super) adapter: u64,
    pub(super) ones: u64,
}

impl CudaBackend {
    /// # Errors
    /// [`PolicyError::Misuse`] where there is none.
    pub(crate) fn early_exit(&self) -> Result<&EarlyExit, PolicyError> {
        let none = PolicyError::Misuse("the model has no early exit");
        self.early_exit.as_ref().ok_or(none)
    }

    /// Makes the early exit behind the first `layers` layers: with weights as the CPU exports them, else untrained, which
    /// is the policy's own head.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] for no layer or all of them; [`PolicyError::MissingWeight`] and
    /// [`PolicyError::WeightShape`] for weights of another exit or model.
    pub fn add_early_exit(
        &mut self,
        layers: usize,
        trained: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<(), PolicyError> {
        if layers == 0 || layers >= self.spec.num_hidden_layers {
            return Err(PolicyError::Misuse(
                "an early exit is behind the first layer or later and before the last",
            ));
        }
        let (stream, hidden) = (&self.gpu.stream, self.spec.hidden_size);
        let learns = self.trainable_parameters() > 0;
        let untrained = match trained {
            None => self.untrained_head()?,
            Some(_) => BTreeMap::new(),
        };
        let weights = trained.unwrap_or(&untrained);
        let (norm, adapter) = weights::draft_head(stream, weights, hidden)?;
        let optimizer = match learns {
            true => Some(ExitOptimizer::new(
                &self.gpu,
                hidden,
                (&norm, &adapter),
                weights,
            )?),
            false => None,
        };
        let ones = stream
            .clone_htod(&vec![1f32; hidden])
            .map_err(CudaError::from)?;
        self.early_exit = Some(EarlyExit {
            layers,
            norm,
            adapter: (learns || trained.is_some()).then_some(adapter),
            trained: trained.is_some(),
            optimizer,
            ones,
        });
        // What was captured has another exit's addresses in it.
        self.ahead.forget();
        self.graphs.clear();
        Ok(())
    }

    /// The policy's own norm, and an adapter that adds nothing.
    fn untrained_head(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let h = self.spec.hidden_size;
        let at = self.weights.norm.device_ptr(&self.gpu.stream).0;
        let norm = Tensor::from_vec(self.gpu.read::<f32>(at, h)?, h, &Device::Cpu)?;
        let adapter = Tensor::zeros((h, h), DType::F32, &Device::Cpu)?;
        Ok(BTreeMap::from([
            ("draft_head.norm.weight".to_owned(), norm),
            ("draft_head.adapter.weight".to_owned(), adapter),
        ]))
    }

    /// The exit's weights have changed. The first time, what was captured goes without its adapter.
    pub(super) fn exit_has_learnt(&mut self) {
        if let Some(exit) = &mut self.early_exit
            && !std::mem::replace(&mut exit.trained, true)
        {
            self.graphs.clear();
        }
        self.ahead.forget();
    }

    /// Runs the first layers and the exit's head, leaving the logits of the sampled tokens.
    pub(super) fn run_early_exit(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
    ) -> Result<(), PolicyError> {
        let stream = self.gpu.stream.clone();
        let exit = self.early_exit()?;
        let (layers, norm, ones) = (
            exit.layers,
            exit.norm.device_ptr(&stream).0,
            exit.ones.device_ptr(&stream).0,
        );
        let adapter = exit.adapter.as_ref().filter(|_| exit.trained);
        let adapter = adapter.map(|a| a.device_ptr(&stream).0);
        self.run_first_layers(layers, at, pass)?;
        let (n, tokens) = (pass.counts.sampled, pass.counts.tokens);
        let (h, eps) = (self.spec.hidden_size, self.spec.rms_norm_eps as f32);
        let x = self.work.x.device_ptr(&stream).0;
        let mut delta = 0;
        if let Some(w) = adapter {
            let scaled = self.work.h.device_ptr(&stream).0;
            delta = self.work.delta.device_ptr(&stream).0;
            self.gpu.rms_norm((x, 0, ones, scaled), 0, tokens, h, eps)?;
            let shape = Shape {
                tokens,
                outputs: h,
                inputs: h,
                stride: h,
                out: Out::Bf16,
            };
            let operands = Operands {
                w,
                x: scaled,
                y: delta,
            };
            if pass.tune {
                self.gemm.tune(shape, &[operands])?;
            }
            self.gemm.run(shape, operands)?;
        }
        self.exit_head(at, pass, (delta, norm), n)
    }
}
