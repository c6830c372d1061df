//! The head of a training pass: log-probs and entropies of the scored tokens and their gradient, with logits for one chunk
//! of them at a time. The backward pass makes logits again but for the chunk that is still there.

use cudarc::driver::{CudaSlice, DevicePtr};

use super::{
    On, Training,
    arena::{HeadRows, PARTS},
    clock::Kind,
    forward::Run,
    operands::{Logits, Norm, NormBackward, Scores, Soft},
    tables::Field,
};
use crate::{
    backend::cuda::{
        CudaError,
        device::Gpu,
        gemm::{Factor, Out, Product, product},
        quantized::Stored,
    },
    error::PolicyError,
    types::{TokenScores, TopTokens},
};

/// The scored tokens of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scored {
    pub(super) rows: usize,
    pub(super) temperature: f32,
    pub(super) at: HeadRows,
    /// Number of the pass.
    pub(super) pass: u64,
    /// Scoring also leaves the gradients of the log-probs, so that the backward pass has only to multiply them by their
    /// coefficients and makes no logits again. Only for a frozen output matrix, whose own gradient would need them.
    pub(super) differentiated: bool,
}

/// Where logits come from and go to.
#[derive(Clone, Copy)]
pub(super) struct Unembedding {
    /// `[V, H]`.
    pub(super) head: Stored,
    /// `[R, H]`.
    pub(super) normed: u64,
    /// Its gradient.
    pub(super) dnormed: u64,
    /// Slot of the output matrix, where it trains.
    pub(super) trains: Option<usize>,
}

/// What is differentiated.
pub(super) enum Lesson {
    /// `Σ coefficient · logp`, `[R]`.
    LogProbs(CudaSlice<f32>),
    /// `weight · Σ` of the cross-entropies from likely tokens, `[R, most]`, ids ending with -1.
    Soft {
        ids: CudaSlice<i32>,
        probabilities: CudaSlice<f32>,
        weight: CudaSlice<f32>,
        loss: CudaSlice<f32>,
        most: usize,
    },
}

impl Lesson {
    /// Of targets that have passed their checks.
    pub(super) fn soft(gpu: &Gpu, targets: &[TopTokens], weight: f64) -> Result<Self, CudaError> {
        let most = targets.iter().map(|t| t.ids.len()).max().unwrap_or(0);
        let (ids, probabilities) = soft_rows(targets, most);
        let stream = &gpu.stream;
        Ok(Self::Soft {
            ids: stream.clone_htod(&ids)?,
            probabilities: stream.clone_htod(&probabilities)?,
            weight: stream.clone_htod(&vec![weight as f32; targets.len()])?,
            loss: stream.alloc_zeros(targets.len())?,
            most,
        })
    }

    /// Sum of the cross-entropies, once the backward pass has made them.
    pub(super) fn loss(&self, gpu: &Gpu) -> Result<f64, CudaError> {
        match self {
            Self::LogProbs(_) => Ok(0.0),
            Self::Soft { loss, .. } => {
                let at = loss.device_ptr(&gpu.stream).0;
                let terms = gpu.read::<f32>(at, loss.len())?;
                Ok(terms.iter().map(|x| f64::from(*x)).sum())
            }
        }
    }
}

/// Lists of the same length, filled up with -1 and 0.
fn soft_rows(targets: &[TopTokens], most: usize) -> (Vec<i32>, Vec<f32>) {
    let (mut ids, mut probabilities) = (Vec::new(), Vec::new());
    for row in targets {
        ids.extend(row.ids.iter().map(|id| *id as i32));
        probabilities.extend_from_slice(&row.probabilities);
        let filled = most - row.ids.len();
        ids.extend(std::iter::repeat_n(-1, filled));
        probabilities.extend(std::iter::repeat_n(0.0, filled));
    }
    (ids, probabilities)
}

impl Training {
    /// The final norm of the rows that predict scored tokens.
    pub(super) fn normalise(
        &self,
        on: On<'_>,
        run: &Run,
        scored: &Scored,
    ) -> Result<(), CudaError> {
        let norm = Norm {
            x: self.arena.x,
            weight: run.model.norm,
            rows: run.at(Field::Predictors),
            saved: scored.at.saved,
            out: scored.at.normed,
            rstd: scored.at.rstd,
            ..Norm::default()
        };
        self.norm(on, &norm, scored.rows)
    }

    /// Log-prob and entropy of every scored token.
    pub(super) fn score_rows(
        &mut self,
        on: On<'_>,
        run: &Run,
        scored: &Scored,
    ) -> Result<TokenScores, CudaError> {
        let from = (run.model.head, scored.at.normed);
        for chunk in 0..scored.rows.div_ceil(self.arena.chunk_rows) {
            let logits = self.logits_of(on, from, scored, chunk)?;
            let scores = self.scores(run, scored, chunk);
            self.clock.enter(on.gpu, Kind::Softmax)?;
            self.kernels.score_logits(on.gpu, &logits, &scores)?;
            if scored.differentiated {
                let coefficients = (self.arena.ones, self.arena.dlogits);
                self.kernels
                    .logits_gradient(on.gpu, &logits, &scores, coefficients)?;
                let first = chunk * self.arena.chunk_rows;
                let to = self.arena.rows;
                self.rows_backward(on, (run.model.head, to), (first, logits.rows))?;
            }
        }
        self.clock.pause(on.gpu)?;
        Ok(TokenScores {
            logprobs: on.gpu.read(scored.at.logp, scored.rows)?,
            entropy: on.gpu.read(scored.at.entropy, scored.rows)?,
        })
    }

    fn scores(&self, run: &Run, scored: &Scored, chunk: usize) -> Scores {
        let skipped = (chunk * self.arena.chunk_rows * size_of::<f32>()) as u64;
        Scores {
            targets: run.at(Field::Targets) + skipped,
            logp: scored.at.logp + skipped,
            entropy: scored.at.entropy + skipped,
            lse: scored.at.lse + skipped,
        }
    }

    /// Logits of a chunk of rows of `normed`, unless they are the ones that are there.
    fn logits_of(
        &mut self,
        on: On<'_>,
        (head, normed): (Stored, u64),
        scored: &Scored,
        chunk: usize,
    ) -> Result<Logits, CudaError> {
        let (h, vocab) = (on.spec.hidden_size, on.spec.vocab_size);
        let (at, stride, first) = (
            self.arena.logits,
            self.arena.stride,
            chunk * self.arena.chunk_rows,
        );
        let rows = self.arena.chunk_rows.min(scored.rows - first);
        if self.logits != Some((scored.pass, chunk)) {
            let product = Product {
                stride,
                out: Out::F32,
                ..product((rows, vocab, h), Factor::plain(h), Factor::transposed(h))
            };
            let from = normed + (first * h * 2) as u64;
            self.logits = None;
            self.clock.enter(on.gpu, Kind::Logits)?;
            let head = self.dense(on, head)?;
            self.gemm.multiply(product, 1.0, [from, head, at])?;
            self.logits = Some((scored.pass, chunk));
        }
        Ok(Logits {
            at,
            rows,
            vocab,
            stride,
            temperature: scored.temperature,
        })
    }

    /// Gradient of the normalised rows to `from.dnormed`, and that of the output matrix where it trains.
    pub(super) fn unembed_backward(
        &mut self,
        on: On<'_>,
        run: &Run,
        scored: &Scored,
        (from, lesson): (&Unembedding, &Lesson),
    ) -> Result<(), CudaError> {
        let (h, vocab) = (on.spec.hidden_size, on.spec.vocab_size);
        let (stride, dlogits) = (self.arena.stride, self.arena.dlogits);
        // From the back, because the last chunk's logits are there.
        for chunk in (0..scored.rows.div_ceil(self.arena.chunk_rows)).rev() {
            let logits = self.logits_of(on, (from.head, from.normed), scored, chunk)?;
            let first = chunk * self.arena.chunk_rows;
            let scores = self.scores(run, scored, chunk);
            self.clock.enter(on.gpu, Kind::Softmax)?;
            self.teach(on, (&logits, first), &scores, lesson)?;
            let skipped = (first * h * 2) as u64;
            self.rows_backward(on, (from.head, from.dnormed), (first, logits.rows))?;
            if let Some(slot) = from.trains {
                let sizes = (vocab, h, logits.rows);
                let factors = (Factor::transposed(stride), Factor::plain(h));
                let operands = [dlogits, from.normed + skipped];
                self.add_gradient(on, slot, product(sizes, factors.0, factors.1), operands)?;
            }
        }
        self.logits = None;
        Ok(())
    }

    /// From the gradient of a chunk of logits to that of the rows from `first` on.
    fn rows_backward(
        &mut self,
        on: On<'_>,
        (head, to): (Stored, u64),
        (first, rows): (usize, usize),
    ) -> Result<(), CudaError> {
        self.clock.enter(on.gpu, Kind::Logits)?;
        let (h, vocab) = (on.spec.hidden_size, on.spec.vocab_size);
        let factors = (Factor::plain(self.arena.stride), Factor::plain(h));
        let product = product((rows, h, vocab), factors.0, factors.1);
        let to = to + (first * h * 2) as u64;
        let head = self.dense(on, head)?;
        self.gemm
            .multiply(product, 1.0, [self.arena.dlogits, head, to])
    }

    /// Gradient of the logits of the rows from `first` on.
    fn teach(
        &self,
        on: On<'_>,
        (logits, first): (&Logits, usize),
        scores: &Scores,
        lesson: &Lesson,
    ) -> Result<(), CudaError> {
        let (stream, dlogits) = (&on.gpu.stream, self.arena.dlogits);
        let skipped = 4 * first as u64;
        match lesson {
            Lesson::LogProbs(coefficients) => {
                let coefficients = coefficients.device_ptr(stream).0 + skipped;
                self.kernels
                    .logits_gradient(on.gpu, logits, scores, (coefficients, dlogits))
            }
            Lesson::Soft {
                ids,
                probabilities,
                weight,
                loss,
                most,
            } => {
                let lists = skipped * *most as u64;
                let soft = Soft {
                    ids: ids.device_ptr(stream).0 + lists,
                    probabilities: probabilities.device_ptr(stream).0 + lists,
                    weight: weight.device_ptr(stream).0 + skipped,
                    loss: loss.device_ptr(stream).0 + skipped,
                    most: *most,
                };
                self.kernels
                    .distill_gradient(on.gpu, logits, &soft, dlogits)
            }
        }
    }

    /// From the loss to the gradient of the last residual stream, in `arena.dx` and, as bf16, `arena.dx16`.
    pub(super) fn head_backward(
        &mut self,
        on: On<'_>,
        run: &Run,
        scored: &Scored,
        lesson: &Lesson,
    ) -> Result<(), PolicyError> {
        let full = matches!(self.mode, super::Mode::Full { .. });
        let from = Unembedding {
            head: run.model.head,
            normed: scored.at.normed,
            // In place of the normalised rows of a layer.
            dnormed: self.arena.h,
            trains: full.then_some(self.slots.head),
        };
        let (t, h) = (run.tokens(), on.spec.hidden_size);
        match lesson {
            Lesson::LogProbs(coefficients) if scored.differentiated => {
                self.clock.enter(on.gpu, Kind::Softmax)?;
                let coefficients = coefficients.device_ptr(&on.gpu.stream).0;
                let operands = [self.arena.rows, coefficients, from.dnormed];
                self.kernels
                    .scale_rows(on.gpu, operands, (scored.rows, h))?;
            }
            _ => self.unembed_backward(on, run, scored, (&from, lesson))?,
        }
        let (dx, rows) = (self.arena.dx, self.arena.x);
        let norm = NormBackward {
            saved: scored.at.saved,
            rstd: scored.at.rstd,
            weight: run.model.norm,
            dout: from.dnormed,
            dx: rows,
            part: if full { self.arena.parts } else { 0 },
            ..NormBackward::default()
        };
        self.clock.enter(on.gpu, Kind::Norms)?;
        self.kernels
            .rms_norm_backward(on.gpu, &norm, (scored.rows, h))?;
        if full {
            self.add_parts(on, self.slots.norm, PARTS, h)?;
        }
        on.gpu.zero(dx, t * h * size_of::<f32>())?;
        // The last token of a shared prompt predicts the first one of every completion.
        let lists = [
            run.at(Field::Predicting),
            run.at(Field::PredictingStarts),
            run.at(Field::PredictingRows),
        ];
        let sizes = (run.tables.predicting, h);
        self.kernels
            .scatter_rows(on.gpu, lists, (rows, dx), sizes, false)?;
        // For its copy in bf16; what it normalises is not used.
        let copy = Norm {
            x: dx,
            weight: run.model.norm,
            saved: self.arena.dx16,
            out: self.arena.h,
            rstd: self.arena.row_dots,
            ..Norm::default()
        };
        Ok(self.norm(on, &copy, t)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_likely_tokens_are_filled_up() {
        let row = |ids: &[u32], probabilities: &[f32]| TopTokens {
            ids: ids.to_vec(),
            probabilities: probabilities.to_vec(),
        };
        let rows = [row(&[4, 2], &[0.5, 0.25]), row(&[9], &[1.0])];
        let (ids, probabilities) = soft_rows(&rows, 2);
        assert_eq!(ids, [4, 2, 9, -1]);
        assert_eq!(probabilities, [0.5, 0.25, 1.0, 0.0]);
    }
}
