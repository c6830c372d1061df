//! The language-model head: final norm, log-probs and entropies of scored tokens, and their gradient.
//!
//! Logits exist for one chunk of tokens at a time; `[T, vocab]` never does. The backward pass makes them
//! again from the hidden states (as Liger's fused linear losses do), trading one product for the memory.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    mat::{Mat, View},
    ops,
    params::{Grads, ParamId, Params},
    simd::{axpy_inline, dispatch, exp_inline, log_sum_exp},
};
use crate::types::{TokenScores, TopTokens};

/// Most logits alive at a time: 16 Mi numbers are 64 MiB.
const CHUNK_LOGITS: usize = 16 << 20;

/// Final norm and output matrix (`[vocab, hidden]`, the embedding when tied).
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) norm: ParamId,
    pub(crate) weight: ParamId,
    pub(crate) eps: f32,
    /// Most tokens whose logits are alive at a time.
    pub(crate) chunk_rows: usize,
}

/// Hidden states that predict a scored token, and that token.
#[derive(Debug)]
pub(crate) struct Scored {
    /// Before the final norm, `[S, hidden]`.
    pub(crate) hidden: Mat,
    pub(crate) targets: Vec<u32>,
    pub(crate) temperature: f32,
    /// Logits over the temperature of the last chunk, which [`Head::backward`] then need not make again:
    /// all of them when a micro-batch fits into one chunk.
    last: Option<Mat>,
}

impl Scored {
    pub(crate) fn new(hidden: Mat, targets: Vec<u32>, temperature: f32) -> Self {
        Self {
            hidden,
            targets,
            temperature,
            last: None,
        }
    }
}

impl Head {
    /// `vocab` is the number of rows of `weight`.
    pub(crate) fn new(norm: ParamId, weight: ParamId, eps: f32, vocab: usize) -> Self {
        let chunk_rows = (CHUNK_LOGITS / vocab).max(1);
        Self {
            norm,
            weight,
            eps,
            chunk_rows,
        }
    }

    /// Logits of every row, for sampling.
    pub(crate) fn logits(&self, params: &Params, hidden: &Mat) -> Mat {
        let normed = ops::rms_norm(hidden, params.data(self.norm), self.eps);
        self.unembed(params, &normed)
    }

    /// Logits of hidden states behind the norm.
    pub(crate) fn unembed(&self, params: &Params, normed: &Mat) -> Mat {
        normed.mul_t(params.mat(self.weight))
    }

    /// Logits of some rows of `normed` over the temperature, `[rows, vocab]`.
    fn chunk(&self, params: &Params, normed: &Mat, rows: Range<usize>, temperature: f32) -> Mat {
        let weight = View::whole(params.mat(self.weight)).t();
        let mut logits = View::window(normed, rows.start, rows.len(), 0, normed.cols).mul(weight);
        if temperature != 1.0 {
            let vocab = logits.cols;
            let rows = logits.data_mut().par_chunks_mut(vocab);
            rows.for_each(|row| row.iter_mut().for_each(|z| *z /= temperature));
        }
        logits
    }

    /// Log-prob of each target and entropy of its distribution at the temperature.
    pub(crate) fn score(&self, params: &Params, scored: &mut Scored) -> TokenScores {
        let normed = ops::rms_norm(&scored.hidden, params.data(self.norm), self.eps);
        let mut scores = TokenScores::default();
        for from in (0..normed.rows).step_by(self.chunk_rows) {
            let rows = from..normed.rows.min(from + self.chunk_rows);
            // Only one chunk lives at a time.
            scored.last = None;
            let logits = self.chunk(params, &normed, rows.clone(), scored.temperature);
            let chunk: Vec<(f32, f32)> = logits
                .data()
                .par_chunks(logits.cols)
                .zip(&scored.targets[rows])
                .map(|(row, target)| score_row(row, *target))
                .collect();
            for (logprob, entropy) in chunk {
                scores.logprobs.push(logprob);
                scores.entropy.push(entropy);
            }
            scored.last = Some(logits);
        }
        scores
    }

    /// Gradient of the hidden states, `[S, hidden]`, and the value of what is differentiated; weight
    /// gradients go to `grads`. `gradient(i, target, row)` replaces the logits over the temperature of
    /// scored token `i` by the gradient of its logits and returns its term of the value.
    pub(crate) fn backward(
        &self,
        params: &Params,
        scored: &mut Scored,
        grads: &mut Grads,
        gradient: &(dyn Fn(usize, u32, &mut [f32]) -> f64 + Sync),
    ) -> (Mat, f64) {
        let normed = ops::rms_norm(&scored.hidden, params.data(self.norm), self.eps);
        let (dnormed, value) =
            self.unembed_backward(params, &normed, scored, Some(&mut *grads), gradient);
        let (hidden, norm) = (&scored.hidden, params.data(self.norm));
        let dnorm = params
            .trainable(self.norm)
            .then(|| grads.slot(self.norm, params).data_mut());
        let dhidden = ops::rms_norm_backward(hidden, norm, self.eps, &dnormed, dnorm);
        (dhidden, value)
    }

    /// The part of [`Head::backward`] above the norm: the gradient of `normed`, `[S, hidden]`. Without `grads`
    /// the output matrix counts as a constant.
    pub(crate) fn unembed_backward(
        &self,
        params: &Params,
        normed: &Mat,
        scored: &mut Scored,
        mut grads: Option<&mut Grads>,
        gradient: &(dyn Fn(usize, u32, &mut [f32]) -> f64 + Sync),
    ) -> (Mat, f64) {
        let weight = View::whole(params.mat(self.weight));
        let mut dnormed = Mat::unspecified(normed.rows, normed.cols);
        let mut value = 0.0;
        let starts = (0..normed.rows).step_by(self.chunk_rows);
        // From the back, because the last chunk's logits are there.
        for from in starts.rev() {
            let rows = from..normed.rows.min(from + self.chunk_rows);
            let kept = scored.last.take();
            let mut logits = kept
                .unwrap_or_else(|| self.chunk(params, normed, rows.clone(), scored.temperature));
            let vocab = logits.cols;
            let jobs = logits.data_mut().par_chunks_mut(vocab).zip(rows.clone());
            let terms: Vec<f64> = jobs
                .map(|(row, i)| gradient(i, scored.targets[i], row))
                .collect();
            value += terms.iter().sum::<f64>();
            View::whole(&logits).write(weight, &mut dnormed, from);
            if let Some(grads) = grads.as_mut().filter(|_| params.trainable(self.weight)) {
                let hidden = View::window(normed, from, rows.len(), 0, normed.cols);
                grads.add_product(self.weight, View::whole(&logits).t(), hidden);
            }
        }
        (dnormed, value)
    }
}

/// `(log p(target), entropy)`; entropy is `lse − Σ p·z`.
fn score_row(row: &[f32], target: u32) -> (f32, f32) {
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

/// Replaces a row of logits by `d·(1[j = target] − p_j)`, the gradient of `d·logp(target)`.
pub(crate) fn logit_gradient(row: &mut [f32], target: u32, d: f32) {
    softmax_times(row, -d);
    row[target as usize] += d;
}

/// Replaces a row of logits by `d·(p_j − t_j)`, the gradient of `d` times the cross-entropy from the
/// renormalised targets `t`, and returns that cross-entropy.
pub(crate) fn distillation_gradient(row: &mut [f32], targets: &TopTokens, d: f32) -> f64 {
    let lse = f64::from(log_sum_exp(row));
    let total: f64 = targets.probabilities.iter().map(|p| f64::from(*p)).sum();
    let share = |p: &f32| f64::from(*p) / total;
    let pairs = || {
        targets
            .ids
            .iter()
            .zip(targets.probabilities.iter().map(share))
    };
    let entropy = pairs()
        .map(|(id, t)| t * (lse - f64::from(row[*id as usize])))
        .sum();
    softmax_times(row, d);
    for (id, t) in pairs() {
        row[*id as usize] -= d * t as f32;
    }
    entropy
}

/// Replaces a row of logits by its softmax times `factor`.
fn softmax_times(row: &mut [f32], factor: f32) {
    let lse = log_sum_exp(row);
    dispatch(
        #[inline(always)]
        || {
            for z in row.iter_mut() {
                *z = exp_inline(*z - lse) * factor;
            }
        },
    );
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
    let rows: Vec<usize> = rows.collect();
    let mut out = Mat::unspecified(rows.len(), from.cols);
    let copies = out.data_mut().chunks_mut(from.cols.max(1)).zip(rows);
    copies.for_each(|(to, row)| to.copy_from_slice(from.row(row)));
    out
}
