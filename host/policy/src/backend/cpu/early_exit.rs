//! The early exit: a small head of its own over the policy's first layers, which drafts for the whole policy.
//!
//! `logits = E · RMSNorm(h + W·ĥ)`, where `h` is the residual stream, `ĥ` is `h` over its root mean square
//! and `E` the policy's unembedding: a tuned lens (Belrose et al. 2023, arXiv:2303.08112) without its bias.
//! `W = 0` and the policy's final norm are the start, which is the policy's own head on an unfinished stream
//! (the logit lens). Only `W` and the norm train: `E` and the layers below are constants here, so that the
//! policy is the same whether a draft learns or not.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{
    head::{Head, Scored},
    mat::{Mat, View},
    ops,
    params::{AdamW, Grads, ParamId, Params},
};
use crate::{
    backend::{OptimStep, group::Seat},
    error::PolicyError,
};

/// See the file header.
#[derive(Debug)]
pub struct EarlyExit {
    layers: usize,
    eps: f32,
    params: Params,
    grads: Grads,
    optimizer: AdamW,
    norm: ParamId,
    adapter: ParamId,
    trained: bool,
    /// The weight of a norm that has none.
    ones: Vec<f32>,
}

impl EarlyExit {
    /// Untrained: `norm` is the policy's final one, `[hidden]`.
    pub(super) fn new(layers: usize, norm: &[f32], eps: f32) -> Self {
        let hidden = norm.len();
        let mut params = Params::default();
        let copy = Mat::from_vec(1, hidden, norm.to_vec());
        let norm = params.add("draft_head.norm.weight", copy, 1, true);
        let zeros = Mat::zeros(hidden, hidden);
        let adapter = params.add("draft_head.adapter.weight", zeros, 2, true);
        Self {
            layers,
            eps,
            grads: Grads::new(&params),
            optimizer: AdamW::default(),
            params,
            norm,
            adapter,
            trained: false,
            ones: vec![1.0; hidden],
        }
    }

    /// Layers of the policy below it, at least 1.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Whether its head is more than the policy's own: read from a file, or stepped.
    pub fn is_trained(&self) -> bool {
        self.trained
    }

    /// Its weights by name.
    ///
    /// # Errors
    /// Those of making tensors.
    pub(super) fn export(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.params.export(|_| true)
    }

    /// The inverse of [`EarlyExit::export`]; every weight must be there.
    pub(super) fn import(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<(), PolicyError> {
        let missing = self.params.iter().find(|p| !tensors.contains_key(&p.name));
        match missing.map(|p| p.name.clone()) {
            Some(name) => Err(PolicyError::MissingWeight { name }),
            None => self.params.import(tensors),
        }?;
        self.trained = true;
        Ok(())
    }

    pub(super) fn export_optimizer(&self) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        self.optimizer.export(&self.params)
    }

    pub(super) fn import_optimizer(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), PolicyError> {
        self.optimizer.import(&self.params, tensors)
    }

    pub(super) fn optimizer_step(
        &mut self,
        step: &OptimStep,
        seat: Option<&Seat>,
    ) -> Result<f64, PolicyError> {
        if let Some(seat) = seat {
            self.grads.sum_over(seat, &self.params)?;
        }
        let norm = self
            .optimizer
            .step(&mut self.params, &mut self.grads, step)?;
        self.trained = true;
        Ok(norm)
    }

    /// What the unembedding reads, `[T, hidden]`, of the residual stream `hidden`.
    pub(super) fn forward(&self, hidden: &Mat) -> Mat {
        let residual = self.residual(hidden, &self.scaled(hidden));
        ops::rms_norm(&residual, self.params.data(self.norm), self.eps)
    }

    /// Accumulates gradients, and returns the value of what is differentiated, of the scored tokens; `gradient`
    /// as in [`Head::backward`]. `head` is the policy's, with its weights.
    pub(super) fn backward(
        &mut self,
        (head, policy): (&Head, &Params),
        mut scored: Scored,
        gradient: &(dyn Fn(usize, u32, &mut [f32]) -> f64 + Sync),
    ) -> f64 {
        let scaled = self.scaled(&scored.hidden);
        let residual = self.residual(&scored.hidden, &scaled);
        let norm = self.params.data(self.norm);
        let normed = ops::rms_norm(&residual, norm, self.eps);
        let (dnormed, value) = head.unembed_backward(policy, &normed, &mut scored, None, gradient);
        let dnorm = self.grads.slot(self.norm, &self.params).data_mut();
        let dresidual = ops::rms_norm_backward(&residual, norm, self.eps, &dnormed, Some(dnorm));
        let (dy, x) = (View::whole(&dresidual).t(), View::whole(&scaled));
        self.grads.add_product(self.adapter, dy, x);
        value
    }

    /// Adds `by(weight, index)` to every number.
    #[cfg(test)]
    pub(super) fn nudge(&mut self, by: impl Fn(ParamId, usize) -> f32) {
        (0..self.params.len()).for_each(|id| self.params.nudge(id, |_, i| by(id, i)));
    }

    /// Gradients of its weights, which must be there.
    #[cfg(test)]
    pub(super) fn gradients(&self) -> Vec<Vec<f32>> {
        let ids = 0..self.params.len();
        ids.map(|id| self.grads.get(id).unwrap().data().to_vec())
            .collect()
    }

    /// Each row over its root mean square.
    fn scaled(&self, hidden: &Mat) -> Mat {
        ops::rms_norm(hidden, &self.ones, self.eps)
    }

    fn residual(&self, hidden: &Mat, scaled: &Mat) -> Mat {
        let mut residual = scaled.mul_t(self.params.mat(self.adapter));
        residual.add_assign(hidden);
        residual
    }
}
