//! Scoring passes over packed batches and the backward pass through all layers.

use super::{
    CpuBackend, NO_EARLY_EXIT,
    decoder::{Pass as LayerPass, Trace},
    head::{self, Scored},
    mat::Mat,
};
use crate::{
    backend::{Exit, Pass, check_batch, check_targets},
    error::PolicyError,
    types::{PackedBatch, Span, TokenScores, TopTokens},
};

/// What a [`Pass::Train`] leaves for `backward`.
pub(super) struct Saved {
    ids: Vec<u32>,
    spans: Vec<Span>,
    positions: Vec<usize>,
    /// Tokens whose hidden state predicts a scored token.
    predictors: Vec<usize>,
    scored: Scored,
    /// Input of each layer, and its trace unless it is to be made again.
    layers: Vec<(Mat, Option<Trace>)>,
}

impl CpuBackend {
    /// Logits after every token of one sequence, `[T, vocab]` row after row; for checks against other
    /// implementations, because neither training nor sampling ever holds this matrix.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] for fewer than two tokens, too many, or one outside the vocabulary.
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>, PolicyError> {
        let mut batch = PackedBatch::default();
        batch.push(ids, 1);
        check_batch(
            &batch,
            self.spec.vocab_size,
            self.spec.max_position_embeddings,
        )?;
        let x = self.trunk(&batch, self.decoder.layers.len());
        let logits = self.decoder.head.logits(&self.params, &x);
        Ok(logits.data().to_vec())
    }

    /// Residual stream of the current policy behind its first `layers` layers, `[T, hidden]`; nothing is kept.
    fn trunk(&self, batch: &PackedBatch, layers: usize) -> Mat {
        let pass = LayerPass {
            decoder: &self.decoder,
            params: &self.params,
            positions: &batch.positions(),
            adapters: true,
        };
        let spans = batch.spans();
        let mut x = self.decoder.embed(&self.params, &batch.ids);
        for layer in &self.decoder.layers[..layers] {
            x = layer.forward(&pass, &spans, &x).0;
        }
        x
    }

    pub(super) fn score_packed(
        &mut self,
        batch: &PackedBatch,
        temperature: f32,
        pass: Pass,
    ) -> Result<TokenScores, PolicyError> {
        check_batch(
            batch,
            self.spec.vocab_size,
            self.spec.max_position_embeddings,
        )?;
        let (positions, spans) = (batch.positions(), batch.spans());
        let frozen = self.reference.as_ref().filter(|_| pass == Pass::Reference);
        let params = frozen.unwrap_or(&self.params);
        let layer_pass = LayerPass {
            decoder: &self.decoder,
            params,
            positions: &positions,
            adapters: pass != Pass::Reference,
        };
        let mut layers = Vec::new();
        let mut x = self.decoder.embed(params, &batch.ids);
        for layer in &self.decoder.layers {
            let (out, trace) = layer.forward(&layer_pass, &spans, &x);
            if pass == Pass::Train {
                layers.push((x, (!self.gradient_checkpointing).then_some(trace)));
            }
            x = out;
        }
        let mut scored = scored(batch, &x, temperature);
        let scores = self.decoder.head.score(params, &mut scored);
        if pass == Pass::Train {
            self.saved = Some(Saved {
                ids: batch.ids.clone(),
                spans,
                positions,
                predictors: batch.predictors(),
                scored,
                layers,
            });
        }
        Ok(scores)
    }

    pub(super) fn backward_packed(&mut self, dlogp: &[f32]) -> Result<(), PolicyError> {
        let saved = self.saved.as_ref();
        let saved = saved.ok_or(PolicyError::Misuse("backward without a training pass"))?;
        if dlogp.len() != saved.predictors.len() {
            return Err(PolicyError::Misuse(
                "backward needs one coefficient per scored token",
            ));
        }
        let temperature = saved.scored.temperature;
        self.backward_with(&|i, target, row| {
            head::logit_gradient(row, target, dlogp[i] / temperature);
            0.0
        })?;
        Ok(())
    }

    pub(super) fn distill_packed(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
        exit: Exit,
    ) -> Result<f64, PolicyError> {
        let vocab = self.spec.vocab_size;
        check_targets(batch, targets, vocab)?;
        let d = weight as f32 / temperature;
        let gradient = |i: usize, _, row: &mut [f32]| {
            weight * head::distillation_gradient(row, &targets[i], d)
        };
        if exit == Exit::Final {
            self.score_packed(batch, temperature, Pass::Train)?;
            return self.backward_with(&gradient);
        }
        check_batch(batch, vocab, self.spec.max_position_embeddings)?;
        let x = self.trunk(batch, self.early_exit()?.layers());
        let scored = scored(batch, &x, temperature);
        let (params, head) = (&self.params, &self.decoder.head);
        let early = self.early_exit.as_mut().ok_or(NO_EARLY_EXIT)?;
        Ok(early.backward((head, params), scored, &gradient))
    }

    /// From gradients of logits (see [`head::Head::backward`]) through all layers; returns the value.
    fn backward_with(
        &mut self,
        gradient: &(dyn Fn(usize, u32, &mut [f32]) -> f64 + Sync),
    ) -> Result<f64, PolicyError> {
        let saved = self.saved.take();
        let mut saved = saved.ok_or(PolicyError::Misuse("backward without a training pass"))?;
        let Self {
            decoder,
            params,
            grads,
            ..
        } = self;
        let pass = LayerPass {
            decoder,
            params,
            positions: &saved.positions,
            adapters: true,
        };
        let head = &decoder.head;
        let (dhidden, value) = head.backward(params, &mut saved.scored, grads, gradient);
        let mut dx = Mat::zeros(saved.ids.len(), dhidden.cols);
        head::scatter_add(&mut dx, saved.predictors.iter().copied(), &dhidden);
        // By value and from the back, so that each trace is freed as soon as it has been used.
        let layers = decoder.layers.iter().zip(saved.layers).rev();
        for (layer, (x, trace)) in layers {
            let trace = match trace {
                Some(trace) => trace,
                None => layer.forward(&pass, &saved.spans, &x).1,
            };
            dx = layer.backward(&pass, (&x, &trace), &saved.spans, dx, grads);
        }
        if params.trainable(decoder.embed_tokens) {
            let slot = grads.slot(decoder.embed_tokens, params);
            head::scatter_add(slot, saved.ids.iter().map(|id| *id as usize), &dx);
        }
        grads.check_complete(params)?;
        Ok(value)
    }
}

/// The scored tokens and, of the residual stream `x`, what predicts them.
fn scored(batch: &PackedBatch, x: &Mat, temperature: f32) -> Scored {
    let hidden = head::gather(x, batch.predictors().into_iter());
    let targets = batch.targets().map(|t| batch.ids[t]).collect();
    Scored::new(hidden, targets, temperature)
}
