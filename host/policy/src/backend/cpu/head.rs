//! The language-model head: final norm, log-probs and entropies of scored tokens, and their gradient.
//!
//! Logits exist for one chunk of tokens at a time; `[T, vocab]` never does. The backward pass makes them
//! again from the hidden states (as Liger's fused linear losses do), trading one product for the memory.

use rayon::prelude::*;

use super::{
    mat::{Mat, View},
    ops,
    params::{Grads, ParamId, Params},
    simd::{axpy_inline, dispatch, exp_inline, log_sum_exp},
};
use crate::types::TokenScores;

/// Most logits alive at a time: 16 Mi numbers are 64 MiB.
const CHUNK_LOGITS: usize = 16 << 20;

/// Final norm and output matrix (`[vocab, hidden]`, the embedding when tied).
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) norm: ParamId,
    pub(crate) weight: ParamId,
    pub(crate) eps: f32,
}

/// Hidden states that predict a scored token, and that token.
#[derive(Debug)]
pub(crate) struct Scored {
    /// Before the final norm, `[S, hidden]`.
    pub(crate) hidden: Mat,
    pub(crate) targets: Vec<u32>,
    pub(crate) temperature: f32,
}

impl Head {
    /// Logits of every row, for sampling.
    pub(crate) fn logits(&self, params: &Params, hidden: &Mat) -> Mat {
        let normed = ops::rms_norm(hidden, params.data(self.norm), self.eps);
        normed.mul_t(params.mat(self.weight))
    }

    fn chunk_rows(&self, params: &Params) -> usize {
        (CHUNK_LOGITS / params.mat(self.weight).rows).max(1)
    }

    /// Log-prob of each target and entropy of its distribution at the temperature.
    pub(crate) fn score(&self, params: &Params, scored: &Scored) -> TokenScores {
        let normed = ops::rms_norm(&scored.hidden, params.data(self.norm), self.eps);
        let weight = View::whole(params.mat(self.weight)).t();
        let mut scores = TokenScores::default();
        for from in (0..normed.rows).step_by(self.chunk_rows(params)) {
            let rows = self.chunk_rows(params).min(normed.rows - from);
            let mut logits = View::window(&normed, from, rows, 0, normed.cols).mul(weight);
            let vocab = logits.cols;
            let targets = &scored.targets[from..from + rows];
            let chunk: Vec<(f32, f32)> = logits
                .data_mut()
                .par_chunks_mut(vocab)
                .zip(targets)
                .map(|(row, target)| score_row(row, *target, scored.temperature))
                .collect();
            for (logprob, entropy) in chunk {
                scores.logprobs.push(logprob);
                scores.entropy.push(entropy);
            }
        }
        scores
    }

    /// Gradient of the hidden states for `Σ dlogp·logp`, `[S, hidden]`; weight gradients go to `grads`.
    ///
    /// `d logp(target)/d logit_j = (1[j = target] − p_j) / temperature`.
    pub(crate) fn backward(
        &self,
        params: &Params,
        scored: &Scored,
        dlogp: &[f32],
        grads: &mut Grads,
    ) -> Mat {
        let normed = ops::rms_norm(&scored.hidden, params.data(self.norm), self.eps);
        let weight = View::whole(params.mat(self.weight));
        let mut dnormed = Vec::with_capacity(normed.data().len());
        for from in (0..normed.rows).step_by(self.chunk_rows(params)) {
            let rows = self.chunk_rows(params).min(normed.rows - from);
            let hidden = View::window(&normed, from, rows, 0, normed.cols);
            let mut logits = hidden.mul(weight.t());
            let vocab = logits.cols;
            let targets = scored.targets[from..].iter().zip(&dlogp[from..]);
            let jobs: Vec<_> = logits.data_mut().chunks_mut(vocab).zip(targets).collect();
            jobs.into_par_iter().for_each(|(row, (target, d))| {
                logit_gradient(row, *target, *d, scored.temperature);
            });
            dnormed.extend(View::whole(&logits).mul(weight).into_vec());
            if params.trainable(self.weight) {
                grads
                    .slot(self.weight, params)
                    .add_product(View::whole(&logits).t(), hidden);
            }
        }
        let dnormed = Mat::from_vec(normed.rows, normed.cols, dnormed);
        let (hidden, norm) = (&scored.hidden, params.data(self.norm));
        let dnorm = params
            .trainable(self.norm)
            .then(|| grads.slot(self.norm, params).data_mut());
        ops::rms_norm_backward(hidden, norm, self.eps, &dnormed, dnorm)
    }
}

/// `(log p(target), entropy)`; entropy is `lse − Σ p·z`.
fn score_row(row: &mut [f32], target: u32, temperature: f32) -> (f32, f32) {
    scale(row, 1.0 / temperature);
    let lse = log_sum_exp(row);
    let mean = dispatch(
        #[inline(always)]
        || {
            let mut acc = [0.0f32; 16];
            let (main, tail) = row.as_chunks::<16>();
            for chunk in main {
                for lane in 0..16 {
                    acc[lane] += exp_inline(chunk[lane] - lse) * chunk[lane];
                }
            }
            let tail: f32 = tail.iter().map(|z| exp_inline(z - lse) * z).sum();
            acc.iter().sum::<f32>() + tail
        },
    );
    (row[target as usize] - lse, (lse - mean).max(0.0))
}

/// Replaces a row of logits by its gradient.
fn logit_gradient(row: &mut [f32], target: u32, dlogp: f32, temperature: f32) {
    scale(row, 1.0 / temperature);
    let lse = log_sum_exp(row);
    let factor = -dlogp / temperature;
    dispatch(
        #[inline(always)]
        || {
            for z in row.iter_mut() {
                *z = exp_inline(*z - lse) * factor;
            }
        },
    );
    row[target as usize] -= factor;
}

fn scale(row: &mut [f32], by: f32) {
    if by != 1.0 {
        row.iter_mut().for_each(|z| *z *= by);
    }
}

/// Adds row `i` of `from` to row `rows[i]` of `to`.
pub(crate) fn scatter_add(to: &mut Mat, rows: impl Iterator<Item = usize>, from: &Mat) {
    let cols = to.cols;
    for (i, row) in rows.enumerate() {
        axpy_inline(
            &mut to.data_mut()[row * cols..(row + 1) * cols],
            1.0,
            from.row(i),
        );
    }
}

/// The named rows of `from`.
pub(crate) fn gather(from: &Mat, rows: impl Iterator<Item = usize>) -> Mat {
    let data: Vec<f32> = rows.flat_map(|r| from.row(r).iter().copied()).collect();
    Mat::from_vec(data.len() / from.cols, from.cols, data)
}
