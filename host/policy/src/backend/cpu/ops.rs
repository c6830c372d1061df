//! Row-wise operations of a decoder layer, forward and backward: RMSNorm, RoPE, SwiGLU's activation.
//!
//! Each backward is checked against central differences in `f64` below.

use rayon::prelude::*;

use super::{
    mat::Mat,
    simd::{self, dispatch, dot_inline, exp_inline},
};
use crate::spec::ModelSpec;

/// Runs `f(row index, row of a)` over all rows, in parallel when there is enough work.
fn for_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    if out.len() < 1 << 14 {
        out.chunks_mut(width)
            .enumerate()
            .for_each(|(i, row)| f(i, row));
    } else {
        let rows = (4096 / width).max(1);
        out.par_chunks_mut(rows * width)
            .enumerate()
            .for_each(|(c, chunk)| {
                for (i, row) in chunk.chunks_mut(width).enumerate() {
                    f(c * rows + i, row);
                }
            });
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot_inline(x, x) / x.len() as f32 + eps).sqrt()
}

/// RMSNorm (Zhang & Sennrich 2019) over runs of `weight.len()` elements: `y = x / rms(x) · w`.
pub(crate) fn rms_norm(x: &Mat, weight: &[f32], eps: f32) -> Mat {
    let width = weight.len();
    let mut out = Mat::unspecified(x.rows, x.cols);
    for_rows(out.data_mut(), width, |i, row| {
        let x = &x.data()[i * width..(i + 1) * width];
        dispatch(
            #[inline(always)]
            || {
                let scale = inverse_rms(x, eps);
                for ((out, x), w) in row.iter_mut().zip(x).zip(weight) {
                    *out = x * (scale * w);
                }
            },
        );
    });
    out
}

/// Gradients of [`rms_norm`]: `dx`, and `dw` added to `dweight` when it is wanted.
///
/// With `s = 1/rms`, `x̂ = s·x`, `g = dy·w`: `dx = s·(g − x̂·mean(g·x̂))`, `dw = Σ dy·x̂`.
pub(crate) fn rms_norm_backward(
    x: &Mat,
    weight: &[f32],
    eps: f32,
    dy: &Mat,
    dweight: Option<&mut [f32]>,
) -> Mat {
    let width = weight.len();
    if let Some(dweight) = dweight {
        sum_over_rows(dweight, x.data().len() / width, |i, dweight| {
            let run = i * width..(i + 1) * width;
            let (x, dy) = (&x.data()[run.clone()], &dy.data()[run]);
            dispatch(
                #[inline(always)]
                || {
                    let scale = inverse_rms(x, eps);
                    for ((dw, x), dy) in dweight.iter_mut().zip(x).zip(dy) {
                        *dw += dy * x * scale;
                    }
                },
            );
        });
    }
    let mut dx = Mat::unspecified(dy.rows, dy.cols);
    for_rows(dx.data_mut(), width, |i, row| {
        let run = i * width..(i + 1) * width;
        let (x, dy) = (&x.data()[run.clone()], &dy.data()[run]);
        dispatch(
            #[inline(always)]
            || {
                let scale = inverse_rms(x, eps);
                for ((g, dy), w) in row.iter_mut().zip(dy).zip(weight) {
                    *g = dy * w;
                }
                let mean = dot_inline(row, x) * scale / width as f32;
                for (g, x) in row.iter_mut().zip(x) {
                    *g = scale * (*g - x * scale * mean);
                }
            },
        );
    });
    dx
}

/// `sum += Σ` of what `add(row, part)` adds. The parts are those of fixed runs of rows and are summed in
/// order, so that the number of threads does not change the result.
fn sum_over_rows(sum: &mut [f32], rows: usize, add: impl Fn(usize, &mut [f32]) + Sync + Send) {
    const RUN: usize = 128;
    let part = |run: usize| {
        let mut part = vec![0.0; sum.len()];
        (run * RUN..rows.min((run + 1) * RUN)).for_each(|row| add(row, &mut part));
        part
    };
    let runs = (0..rows.div_ceil(RUN)).into_par_iter();
    let parts: Vec<Vec<f32>> = runs.map(part).collect();
    parts.iter().for_each(|part| simd::add_assign(sum, part));
}

/// Adds `bias` to each row.
pub(crate) fn add_bias(x: &mut Mat, bias: &[f32]) {
    for row in x.data_mut().chunks_mut(bias.len()) {
        simd::add_assign(row, bias);
    }
}

/// Column sums, the gradient of a bias.
pub(crate) fn add_column_sums(dy: &Mat, dbias: &mut [f32]) {
    sum_over_rows(dbias, dy.rows, |i, dbias| {
        simd::add_assign(dbias, dy.row(i));
    });
}

/// `silu(gate)·up`, with `silu(x) = x·σ(x)` (Shazeer 2020).
pub(crate) fn silu_mul(gate: &Mat, up: &Mat) -> Mat {
    let mut out = Mat::unspecified(up.rows, up.cols);
    for_rows(out.data_mut(), gate.cols, |i, row| {
        let (gate, up) = (gate.row(i), up.row(i));
        dispatch(
            #[inline(always)]
            || {
                for ((y, g), u) in row.iter_mut().zip(gate).zip(up) {
                    *y = u * g / (1.0 + exp_inline(-g));
                }
            },
        );
    });
    out
}

/// Gradients of [`silu_mul`]: `(dgate, dup)`. `d silu(x)/dx = σ(x)·(1 + x·(1 − σ(x)))`.
pub(crate) fn silu_mul_backward(gate: &Mat, up: &Mat, dy: &Mat) -> (Mat, Mat) {
    let [mut dgate, mut dup] = [(); 2].map(|()| Mat::unspecified(dy.rows, dy.cols));
    let width = dy.cols;
    let outputs = dgate.data_mut().par_chunks_mut(width);
    let outputs = outputs.zip(dup.data_mut().par_chunks_mut(width));
    outputs.enumerate().for_each(|(i, (dgate, dup))| {
        let inputs = gate.row(i).iter().zip(up.row(i)).zip(dy.row(i));
        dispatch(
            #[inline(always)]
            || {
                let outputs = dgate.iter_mut().zip(dup.iter_mut());
                for ((dg, du), ((g, u), d)) in outputs.zip(inputs.clone()) {
                    let sigma = 1.0 / (1.0 + exp_inline(-g));
                    *dg = d * u * sigma * (1.0 + g * (1.0 - sigma));
                    *du = d * g * sigma;
                }
            },
        );
    });
    (dgate, dup)
}

/// Cosines and sines of every position, `[max_position, head_dim / 2]`.
#[derive(Debug)]
pub(crate) struct Rope {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// Su et al. 2021; the pairing is the half-split one of Hugging Face (`rotate_half`).
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let half = spec.head_dim / 2;
        let divisors = spec
            .rope_scaling
            .map(|s| s.divisors(spec.head_dim, spec.rope_theta));
        let frequencies: Vec<f64> = (0..half)
            .map(|i| spec.rope_theta.powf(-2.0 * i as f64 / spec.head_dim as f64))
            .enumerate()
            .map(|(i, f)| f / divisors.as_ref().map_or(1.0, |d| d[i]))
            .collect();
        let angles = (0..spec.max_position_embeddings)
            .flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Self { half, cos, sin }
    }

    /// Rotates each head of `x` (`[T, heads · head_dim]`) by its token's position.
    pub(crate) fn apply(&self, x: &mut Mat, positions: &[usize]) {
        self.rotate(x, positions, 1.0);
    }

    /// The gradient of a rotation is the rotation back.
    pub(crate) fn apply_backward(&self, dy: &mut Mat, positions: &[usize]) {
        self.rotate(dy, positions, -1.0);
    }

    fn rotate(&self, x: &mut Mat, positions: &[usize], direction: f32) {
        let (half, cols) = (self.half, x.cols);
        for_rows(x.data_mut(), cols, |t, row| {
            let table = positions[t] * half..(positions[t] + 1) * half;
            let (cos, sin) = (&self.cos[table.clone()], &self.sin[table]);
            dispatch(
                #[inline(always)]
                || {
                    for head in row.chunks_exact_mut(2 * half) {
                        let (low, high) = head.split_at_mut(half);
                        for i in 0..half {
                            let (a, b, s) = (low[i], high[i], sin[i] * direction);
                            low[i] = a * cos[i] - b * s;
                            high[i] = b * cos[i] + a * s;
                        }
                    }
                },
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, cols: usize, phase: f32) -> Mat {
        let value = |i: usize| (i as f32 * 0.7 + phase).sin() * 1.3;
        Mat::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    /// Compares an analytic gradient with central differences of `Σ c·f(x)`.
    fn check(x: &Mat, analytic: &Mat, f: impl Fn(&Mat) -> Mat, c: &Mat) {
        let loss = |x: &Mat| -> f64 {
            let y = f(x);
            let pairs = y.data().iter().zip(c.data());
            pairs.map(|(y, c)| f64::from(*y) * f64::from(*c)).sum()
        };
        let h = 1e-2f32;
        for i in 0..x.data().len() {
            let (mut plus, mut minus) = (x.clone(), x.clone());
            plus.data_mut()[i] += h;
            minus.data_mut()[i] -= h;
            let numeric = (loss(&plus) - loss(&minus)) / (2.0 * f64::from(h));
            let found = f64::from(analytic.data()[i]);
            assert!(
                (numeric - found).abs() < 2e-3 * (1.0 + numeric.abs()),
                "{i}: {found} is not {numeric}"
            );
        }
    }

    #[test]
    fn rms_norm_gradients() {
        let (x, c) = (wave(3, 20, 0.1), wave(3, 20, 2.0));
        let w = wave(1, 20, 1.0);
        let mut dw = vec![0.0; 20];
        let dx = rms_norm_backward(&x, w.data(), 1e-5, &c, Some(&mut dw));
        check(&x, &dx, |x| rms_norm(x, w.data(), 1e-5), &c);
        let dw = Mat::from_vec(1, 20, dw);
        check(&w, &dw, |w| rms_norm(&x, w.data(), 1e-5), &c);
    }

    #[test]
    fn silu_mul_gradients() {
        let (gate, up, c) = (wave(2, 19, 0.0), wave(2, 19, 0.4), wave(2, 19, 3.0));
        let (dgate, dup) = silu_mul_backward(&gate, &up, &c);
        check(&gate, &dgate, |g| silu_mul(g, &up), &c);
        check(&up, &dup, |u| silu_mul(&gate, u), &c);
    }

    #[test]
    fn rope_turns_back() {
        let spec = ModelSpec {
            rope_theta: 10_000.0,
            head_dim: 8,
            max_position_embeddings: 64,
            ..crate::backend::cpu::tests::tiny_spec(crate::spec::Family::Qwen2)
        };
        let rope = Rope::new(&spec);
        let (x, positions) = (wave(3, 16, 0.3), [0, 7, 63]);
        let mut y = x.clone();
        rope.apply(&mut y, &positions);
        assert_eq!(x.row(0), y.row(0), "position 0 stays");
        let (a, b, angle) = (x.row(1)[1], x.row(1)[5], 7.0 * 10_000f32.powf(-0.25));
        assert!((y.row(1)[1] - (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
        rope.apply_backward(&mut y, &positions);
        for (x, y) in x.data().iter().zip(y.data()) {
            assert!((x - y).abs() < 1e-6);
        }
    }
}
