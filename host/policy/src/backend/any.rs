//! Either backend behind one type, so that a policy and its draft are the same code on every device. Beside what
//! [`Backend`] asks of a device stand the operations on a model's state.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{
    Backend, BlockId, Drafted, Exit, OptimStep, Pass, Sampled, StepRow,
    cpu::{CpuBackend, Trainable},
    cuda::CudaBackend,
};
use crate::{
    error::PolicyError,
    spec::ModelSpec,
    types::{PackedBatch, TokenScores, TopTokens},
};

/// A model on the device that was chosen for it.
pub enum AnyBackend {
    Cpu(Box<CpuBackend>),
    Cuda(Box<CudaBackend>),
}

/// The same call on whichever backend it is.
macro_rules! on_device {
    ($any:expr, $backend:ident => $call:expr) => {
        match $any {
            AnyBackend::Cpu($backend) => $call,
            AnyBackend::Cuda($backend) => $call,
        }
    };
}

impl AnyBackend {
    /// [`CpuBackend::new`].
    ///
    /// # Errors
    /// A weight that is missing or has another shape than the spec says.
    pub fn cpu(
        spec: ModelSpec,
        tensors: &BTreeMap<String, Tensor>,
        trainable: &Trainable,
        gradient_checkpointing: bool,
    ) -> Result<Self, PolicyError> {
        let cpu = CpuBackend::new(spec, tensors, trainable, gradient_checkpointing)?;
        Ok(Self::Cpu(Box::new(cpu)))
    }

    /// Makes its GPU the one that the calling thread talks to. A thread calls this before anything else when others have GPUs too.
    ///
    /// # Errors
    /// What the driver says.
    pub fn bind(&self) -> Result<(), PolicyError> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(gpu) => gpu.bind(),
        }
    }

    /// Number of all weights, adapters included.
    pub fn parameters(&self) -> usize {
        on_device!(self, backend => backend.parameters())
    }

    /// Number of weights that train.
    pub fn trainable_parameters(&self) -> usize {
        on_device!(self, backend => backend.trainable_parameters())
    }

    /// [`CpuBackend::add_early_exit`].
    ///
    /// # Errors
    /// As there.
    pub fn add_early_exit(
        &mut self,
        layers: usize,
        trained: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<(), PolicyError> {
        on_device!(self, backend => backend.add_early_exit(layers, trained))
    }

    /// Layers below the early exit.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where there is none.
    pub fn early_exit_layers(&self) -> Result<usize, PolicyError> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.early_exit()?.layers()),
            Self::Cuda(cuda) => Ok(cuda.early_exit()?.layers()),
        }
    }

    /// Whether there is an early exit whose head is more than the policy's own.
    pub fn has_trained_exit(&self) -> bool {
        match self {
            Self::Cpu(cpu) => cpu.early_exit().is_ok_and(|exit| exit.is_trained()),
            Self::Cuda(cuda) => cuda.early_exit().is_ok_and(|exit| exit.is_trained()),
        }
    }

    /// [`CpuBackend::export_weights`].
    ///
    /// # Errors
    /// As there, and what the driver says.
    pub fn export_weights(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        on_device!(self, backend => backend.export_weights())
    }

    /// [`CpuBackend::export_adapter`].
    ///
    /// # Errors
    /// As there, and what the driver says.
    pub fn export_adapter(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        on_device!(self, backend => backend.export_adapter())
    }

    /// [`CpuBackend::export_trainable`].
    ///
    /// # Errors
    /// As there, and what the driver says.
    pub fn export_trainable(&self, exit: Exit) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        match (self, exit) {
            (Self::Cpu(cpu), _) => cpu.export_trainable(exit),
            (Self::Cuda(cuda), Exit::Final) => cuda.export_trainable(),
            (Self::Cuda(cuda), Exit::Early) => cuda.export_exit(),
        }
    }

    /// [`CpuBackend::import`].
    ///
    /// # Errors
    /// As there, and what the driver says.
    pub fn import(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
        exit: Exit,
    ) -> Result<(), PolicyError> {
        match (self, exit) {
            (Self::Cpu(cpu), _) => cpu.import(tensors, exit),
            (Self::Cuda(cuda), Exit::Final) => cuda.import(tensors),
            (Self::Cuda(cuda), Exit::Early) => cuda.import_exit(tensors),
        }
    }

    /// [`CpuBackend::export_optimizer`].
    ///
    /// # Errors
    /// As there, and what the driver says.
    pub fn export_optimizer(&self, exit: Exit) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        match (self, exit) {
            (Self::Cpu(cpu), _) => cpu.export_optimizer(exit),
            (Self::Cuda(cuda), Exit::Final) => cuda.export_optimizer(),
            (Self::Cuda(cuda), Exit::Early) => cuda.export_exit_optimizer(),
        }
    }

    /// [`CpuBackend::import_optimizer`].
    ///
    /// # Errors
    /// As there, and what the driver says.
    pub fn import_optimizer(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
        exit: Exit,
    ) -> Result<(), PolicyError> {
        match (self, exit) {
            (Self::Cpu(cpu), _) => cpu.import_optimizer(tensors, exit),
            (Self::Cuda(cuda), Exit::Final) => cuda.import_optimizer(tensors),
            (Self::Cuda(cuda), Exit::Early) => cuda.import_exit_optimizer(tensors),
        }
    }
}

impl Backend for AnyBackend {
    fn spec(&self) -> &ModelSpec {
        on_device!(self, backend => backend.spec())
    }

    fn kv_bytes_per_token(&self) -> usize {
        on_device!(self, backend => backend.kv_bytes_per_token())
    }

    fn max_ahead(&self) -> usize {
        on_device!(self, backend => backend.max_ahead())
    }

    fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError> {
        on_device!(self, backend => backend.init_kv(blocks, block_size))
    }

    fn copy_kv(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError> {
        on_device!(self, backend => backend.copy_kv(copies))
    }

    fn step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        on_device!(self, backend => backend.step(rows))
    }

    fn propose(&mut self, rows: &[StepRow<'_>], exit: Exit) -> Result<Vec<Drafted>, PolicyError> {
        on_device!(self, backend => backend.propose(rows, exit))
    }

    fn score(
        &mut self,
        batch: &PackedBatch,
        temperature: f32,
        pass: Pass,
    ) -> Result<TokenScores, PolicyError> {
        on_device!(self, backend => backend.score(batch, temperature, pass))
    }

    fn backward(&mut self, dlogp: &[f32]) -> Result<(), PolicyError> {
        on_device!(self, backend => backend.backward(dlogp))
    }

    fn distill(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
        exit: Exit,
    ) -> Result<f64, PolicyError> {
        on_device!(self, backend => backend.distill(batch, targets, temperature, weight, exit))
    }

    fn expect_update(&mut self) {
        on_device!(self, backend => backend.expect_update());
    }

    fn optimizer_step(&mut self, step: &OptimStep, exit: Exit) -> Result<f64, PolicyError> {
        on_device!(self, backend => backend.optimizer_step(step, exit))
    }
}
