//! The early exit on the device: the head that drafts behind the first layers (its formula: cpu/early_exit.rs). It only
//! drafts here; it is trained on the CPU.

use std::collections::BTreeMap;

use candle_core::Tensor;
use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::{
    CudaBackend, CudaError,
    forward::{Addresses, PassArgs},
    gemm::{Operands, Out, Shape},
    weights,
};
use crate::error::PolicyError;

/// See the file header.
pub(crate) struct EarlyExit {
    layers: usize,
    /// `[H]`.
    norm: CudaSlice<f32>,
    /// `[H, H]`; nothing for an exit that is not trained, where it is 0.
    adapter: Option<CudaSlice<bf16>>,
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
        self.adapter.is_some()
    }
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
        let (norm, adapter) = match trained {
            Some(trained) => {
                let (norm, adapter) = weights::draft_head(stream, trained, hidden)?;
                (norm, Some(adapter))
            }
            None => (
                self.weights.norm.try_clone().map_err(CudaError::from)?,
                None,
            ),
        };
        let ones = stream
            .clone_htod(&vec![1f32; hidden])
            .map_err(CudaError::from)?;
        self.early_exit = Some(EarlyExit {
            layers,
            norm,
            adapter,
            ones,
        });
        // What was captured has another exit's addresses in it.
        self.ahead.forget();
        self.graphs.clear();
        Ok(())
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
        let adapter = exit.adapter.as_ref().map(|a| a.device_ptr(&stream).0);
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
