//! Vector loops, dispatched at run time to what the CPU has (`pulp`: AVX-512, AVX2, NEON, scalar).
//!
//! Reductions carry 16 partial sums, because the compiler may not reorder floating-point additions.

use pulp::{Arch, NullaryFnOnce, Simd, WithSimd};

const LANES: usize = 16;

/// `Σ a[i]·b[i]`.
#[inline(always)]
pub(crate) fn dot_inline(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; LANES];
    let (a_main, a_tail) = a.as_chunks::<LANES>();
    let (b_main, b_tail) = b.as_chunks::<LANES>();
    for (x, y) in a_main.iter().zip(b_main) {
        for lane in 0..LANES {
            acc[lane] = x[lane].mul_add(y[lane], acc[lane]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
    acc.iter().sum::<f32>() + tail
}

/// `y += s·x`.
#[inline(always)]
pub(crate) fn axpy_inline(y: &mut [f32], s: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(s, *y);
    }
}

/// `eˣ` to about 2 ulp for finite `x`; 0 below −87.3, saturating above 88. Cephes' polynomial in a form
/// that vectorises, which the library function does not.
#[inline(always)]
pub(crate) fn exp_inline(x: f32) -> f32 {
    let x = x.clamp(-87.336, 88.376);
    // Adding 1.5·2²³ rounds to the nearest integer in the low mantissa bits.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4f32;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r + 1.0);
    let scale = f32::from_bits(((n as i32 + 127) as u32) << 23);
    p * scale
}

/// Runs `f` compiled for the CPU's vector units; `f` must be a closure marked `#[inline(always)]` over
/// code that is, too.
///
/// `FnMut`, because a closure is called through a shim where only `FnOnce` is asked for, and that shim is
/// not inlined: the loop then stays compiled for the oldest CPU.
#[inline(always)]
pub(crate) fn dispatch<R>(f: impl FnMut() -> R) -> R {
    struct Inlined<F>(F);
    impl<R, F: FnMut() -> R> NullaryFnOnce for Inlined<F> {
        type Output = R;
        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    Arch::new().dispatch(Inlined(f))
}

/// `y += x`.
pub(crate) fn add_assign(y: &mut [f32], x: &[f32]) {
    dispatch(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}

/// `Σ x²` in f64.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    dispatch(
        #[inline(always)]
        || {
            // f32 partial sums over short runs, f64 across them: as exact as f64 for our lengths.
            x.chunks(4096)
                .map(
                    #[inline(always)]
                    |run| f64::from(dot_inline(run, run)),
                )
                .sum()
        },
    )
}

/// Largest element, and `ln Σ eˣ`.
pub(crate) fn log_sum_exp(x: &[f32]) -> f32 {
    dispatch(
        #[inline(always)]
        || {
            let max = max_inline(x);
            let mut acc = [0.0f32; LANES];
            let (main, tail) = x.as_chunks::<LANES>();
            for chunk in main {
                for lane in 0..LANES {
                    acc[lane] += exp_inline(chunk[lane] - max);
                }
            }
            let mut total: f32 = acc.iter().sum();
            for value in tail {
                total += exp_inline(value - max);
            }
            max + total.ln()
        },
    )
}

#[inline(always)]
fn max_inline(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let (main, tail) = x.as_chunks::<LANES>();
    for chunk in main {
        for lane in 0..LANES {
            acc[lane] = acc[lane].max(chunk[lane]);
        }
    }
    acc.iter()
        .chain(tail)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

/// `x[M, K] · w[N, K]ᵀ` for few rows, transposed: returns `[N, M]`. Reads every weight once.
pub(crate) fn skinny_product(x: &[f32], w: &[f32], m: usize, k: usize) -> Vec<f32> {
    Arch::new().dispatch(SkinnyProduct { x, w, m, k })
}

struct SkinnyProduct<'a> {
    x: &'a [f32],
    w: &'a [f32],
    m: usize,
    k: usize,
}

impl WithSimd for SkinnyProduct<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Self { x, w, m, k } = self;
        let n = w.len() / k;
        let mut out = vec![0.0; n * m];
        for (j, rows) in w.chunks(2 * k).enumerate() {
            let out = &mut out[2 * j * m..];
            let (first, second) = rows.split_at(k);
            for i in (0..m).step_by(8) {
                let x = &x[i * k..];
                let tile = Tile {
                    simd,
                    k,
                    m,
                    first,
                    second,
                };
                let out = &mut out[i..];
                match m - i {
                    1 => tile.run::<1>(x, out),
                    2 => tile.run::<2>(x, out),
                    3 => tile.run::<3>(x, out),
                    4 => tile.run::<4>(x, out),
                    5 => tile.run::<5>(x, out),
                    6 => tile.run::<6>(x, out),
                    7 => tile.run::<7>(x, out),
                    _ => tile.run::<8>(x, out),
                }
            }
        }
        out
    }
}

/// Two weight rows (`second` is empty after an odd last one) against up to eight input rows: 16
/// accumulators, two loads of weights and eight of inputs a step.
#[derive(Clone, Copy)]
struct Tile<'a, S: Simd> {
    simd: S,
    k: usize,
    m: usize,
    first: &'a [f32],
    second: &'a [f32],
}

impl<S: Simd> Tile<'_, S> {
    #[inline(always)]
    fn run<const ROWS: usize>(self, x: &[f32], out: &mut [f32]) {
        let Self {
            simd,
            k,
            m,
            first,
            second,
        } = self;
        if second.is_empty() {
            for row in 0..ROWS {
                out[row] = dot_inline(&x[row * k..(row + 1) * k], first);
            }
            return;
        }
        let (a_main, a_tail) = S::as_simd_f32s(first);
        let (b_main, b_tail) = S::as_simd_f32s(second);
        let lanes: [_; ROWS] = std::array::from_fn(
            #[inline(always)]
            |row| S::as_simd_f32s(&x[row * k..(row + 1) * k]).0,
        );
        let steps = a_main.len().min(b_main.len());
        let lanes = lanes.map(
            #[inline(always)]
            |l| &l[..steps],
        );
        let mut acc = [[simd.splat_f32s(0.0); 2]; ROWS];
        for step in 0..steps {
            for row in 0..ROWS {
                let value = lanes[row][step];
                acc[row][0] = simd.mul_add_e_f32s(value, a_main[step], acc[row][0]);
                acc[row][1] = simd.mul_add_e_f32s(value, b_main[step], acc[row][1]);
            }
        }
        for row in 0..ROWS {
            let tail = &x[(row + 1) * k - a_tail.len()..(row + 1) * k];
            let rest = |w: &[f32]| w.iter().zip(tail).map(|(w, x)| w * x).sum::<f32>();
            out[row] = simd.reduce_sum_f32s(acc[row][0]) + rest(a_tail);
            out[m + row] = simd.reduce_sum_f32s(acc[row][1]) + rest(b_tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (found, exact) = (exp_inline(x), f64::from(x).exp());
            let error = (f64::from(found) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}) = {found}, relative error {error}");
        }
        assert!(exp_inline(-1e30) < 1.2e-38);
    }

    #[test]
    fn log_sum_exp_of_odd_lengths() {
        for n in [1usize, 15, 16, 17, 1000] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
            let exact: f64 = x.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
            assert!((f64::from(log_sum_exp(&x)) - exact).abs() < 1e-5);
        }
    }
}
