//! Distillation of the early exit's head (its formula: cpu/early_exit.rs) on the policy's own residual stream, which is a
//! constant to it. What a training pass has kept stays as it is.

use std::collections::BTreeMap;

use candle_core::Tensor;
use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::{
    NOTHING_TRAINS, On, Training,
    arena::PARTS,
    head::{Lesson, Scored, Unembedding},
    layout, missing,
    operands::{Norm, NormBackward},
    optimizer::{Moments, Optimizer, numbers},
    tables::Field,
};
use crate::{
    backend::{
        OptimStep, Pass, check_batch, check_targets,
        cuda::{
            CudaBackend,
            exit::EarlyExit,
            gemm::{Factor, Out, Product, product},
        },
    },
    error::PolicyError,
    types::{PackedBatch, TopTokens},
};

/// Masters, moments and gradients of the exit's head.
pub(in super::super) struct ExitOptimizer {
    optimizer: Optimizer,
    slots: layout::ExitSlots,
}

impl ExitOptimizer {
    /// For the head whose norm `[H]` and adapter `[H, H]` lie at these addresses; `weights` by the names of its export.
    pub(in super::super) fn new(
        gpu: &super::Gpu,
        hidden: usize,
        (norm, adapter): (&CudaSlice<f32>, &CudaSlice<bf16>),
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<Self, PolicyError> {
        let (layout, slots) = layout::of_exit(hidden);
        let stream = &gpu.stream;
        let at = vec![norm.device_ptr(stream).0, adapter.device_ptr(stream).0];
        let mut exit = Self {
            optimizer: Optimizer::new(gpu, layout, at, Moments::F32)?,
            slots,
        };
        exit.import(gpu, weights)?;
        Ok(exit)
    }

    /// Overwrites the weights; every one must be there.
    fn import(
        &mut self,
        gpu: &super::Gpu,
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<(), PolicyError> {
        for param in &self.optimizer.layout.params {
            let tensor = weights
                .get(&param.name)
                .ok_or_else(|| missing(&param.name))?;
            let values = numbers(&param.name, tensor, param.count())?;
            self.optimizer.set(gpu, param, &values)?;
        }
        Ok(())
    }
}

impl Training {
    /// Adds the gradients of the exit's head; returns the sum of the cross-entropies.
    fn distill_exit(
        &mut self,
        on: On<'_>,
        batch: &PackedBatch,
        temperature: f32,
        exit: &mut EarlyExit,
        lesson: &Lesson,
    ) -> Result<f64, PolicyError> {
        let run = self.begin(on, batch, Pass::Score)?;
        self.clock.turn(false);
        self.forward(on, &run, exit.layers())?;
        let scored = Scored {
            rows: run.tables.scored,
            temperature,
            at: self.arena.heads[1],
            pass: self.passes,
            differentiated: false,
        };
        let (rows, h) = (scored.rows, on.spec.hidden_size);
        let arena = &self.arena;
        let (hidden, scaled, delta) = (arena.dx, arena.h, arena.delta);
        on.gpu.zero(hidden, rows * h * size_of::<f32>())?;
        let lists = [
            run.at(Field::Counting),
            run.at(Field::Counting),
            run.at(Field::Predictors),
        ];
        self.kernels
            .scatter_rows(on.gpu, lists, (arena.x, hidden), (rows, h), false)?;
        let at = exit.addresses(&on.gpu.stream).ok_or(NOTHING_TRAINS)?;
        let scale = Norm {
            x: hidden,
            weight: at.ones,
            out: scaled,
            rstd: scored.at.rstd,
            ..Norm::default()
        };
        self.norm(on, &scale, rows)?;
        self.project(on, (scaled, at.adapter, delta), (rows, h, h))?;
        let last = Norm {
            x: hidden,
            delta,
            weight: at.norm,
            saved: scored.at.saved,
            out: scored.at.normed,
            rstd: scored.at.rstd,
            ..Norm::default()
        };
        self.norm(on, &last, rows)?;
        let from = Unembedding {
            head: run.model.head,
            normed: scored.at.normed,
            dnormed: delta,
            trains: None,
        };
        self.unembed_backward(on, &run, &scored, (&from, lesson))?;
        let back = NormBackward {
            saved: scored.at.saved,
            rstd: scored.at.rstd,
            weight: at.norm,
            dout: delta,
            dx: self.arena.x,
            dx16: self.arena.dx16,
            part: self.arena.parts,
            add: false,
        };
        self.kernels.rms_norm_backward(on.gpu, &back, (rows, h))?;
        self.exit_gradients(on, exit, scaled, rows)?;
        Ok(lesson.loss(on.gpu)?)
    }

    /// Of the norm from its parts, of the adapter from what it adds and reads.
    fn exit_gradients(
        &mut self,
        on: On<'_>,
        exit: &mut EarlyExit,
        scaled: u64,
        rows: usize,
    ) -> Result<(), PolicyError> {
        let ExitOptimizer { optimizer, slots } = exit.optimizer.as_mut().ok_or(NOTHING_TRAINS)?;
        let h = on.spec.hidden_size;
        let (to, add) = optimizer.gradient(on.gpu, slots.norm);
        let parts = (self.arena.parts, to);
        self.kernels.sum_parts(on.gpu, parts, (PARTS, h), add)?;
        let (to, add) = optimizer.gradient(on.gpu, slots.adapter);
        let product = Product {
            out: if add { Out::AddF32 } else { Out::F32 },
            ..product((h, h, rows), Factor::transposed(h), Factor::plain(h))
        };
        let operands = [self.arena.dx16, scaled, to];
        Ok(self.gemm.multiply(product, 1.0, operands)?)
    }
}

impl CudaBackend {
    /// Runs `with` on the exit, which is not there meanwhile.
    fn with_exit<T>(
        &mut self,
        with: impl FnOnce(&mut Self, &mut EarlyExit) -> Result<T, PolicyError>,
    ) -> Result<T, PolicyError> {
        self.early_exit()?;
        let mut exit = self.early_exit.take().ok_or(NOTHING_TRAINS)?;
        let done = with(self, &mut exit);
        self.early_exit = Some(exit);
        done
    }

    pub(in super::super) fn distill_exit(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
    ) -> Result<f64, PolicyError> {
        check_batch(batch, self.spec.vocab_size, self.longest())?;
        check_targets(batch, targets, self.spec.vocab_size)?;
        self.with_exit(|backend, exit| {
            let (training, on) = backend.begin_passes()?;
            let lesson = Lesson::soft(on.gpu, targets, weight)?;
            Ok(weight * training.distill_exit(on, batch, temperature, exit, &lesson)?)
        })
    }

    pub(in super::super) fn update_exit(&mut self, step: &OptimStep) -> Result<f64, PolicyError> {
        let norm = self.with_exit(|backend, exit| {
            let (training, on) = backend.with_training()?;
            let optimizer = exit.optimizer.as_mut().ok_or(NOTHING_TRAINS)?;
            if let Some(reducer) = &mut training.reducer {
                reducer.finish_beside(on.gpu, &mut optimizer.optimizer)?;
            }
            optimizer.optimizer.step(on.gpu, &training.kernels, step)
        })?;
        self.exit_has_learnt();
        Ok(norm)
    }

    fn exit_optimizer(&self) -> Result<&Optimizer, PolicyError> {
        let exit = self.early_exit()?;
        let optimizer = exit.optimizer.as_ref().ok_or(NOTHING_TRAINS)?;
        Ok(&optimizer.optimizer)
    }

    /// The weights of the exit's head.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where there is none that trains; what the driver says.
    pub fn export_exit(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.exit_optimizer()?.export(&self.gpu)
    }

    /// The inverse of [`CudaBackend::export_exit`]; every weight must be there.
    ///
    /// # Errors
    /// [`PolicyError::MissingWeight`] and [`PolicyError::WeightShape`]; what the driver says.
    pub fn import_exit(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<(), PolicyError> {
        self.with_exit(|backend, exit| {
            let optimizer = exit.optimizer.as_mut().ok_or(NOTHING_TRAINS)?;
            optimizer.import(&backend.gpu, tensors)
        })?;
        self.exit_has_learnt();
        Ok(())
    }

    /// Step count and moments of the exit's optimizer.
    ///
    /// # Errors
    /// As for [`CudaBackend::export_exit`].
    pub fn export_exit_optimizer(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.exit_optimizer()?.export_state(&self.gpu)
    }

    /// The inverse of [`CudaBackend::export_exit_optimizer`].
    ///
    /// # Errors
    /// As for [`CudaBackend::import_exit`].
    pub fn import_exit_optimizer(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), PolicyError> {
        self.with_exit(|backend, exit| {
            let optimizer = exit.optimizer.as_mut().ok_or(NOTHING_TRAINS)?;
            optimizer.optimizer.import_state(&backend.gpu, tensors)
        })
    }
}
