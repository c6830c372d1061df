//! Row-major `f32` matrices over candle's CPU storage, and the three products a linear layer needs.
//!
//! candle's `Tensor` is not used on the hot path: its autograd differentiates frozen weights too and
//! writes every gradient twice (zeros, then add), and reading a tensor back copies it. Its storage and
//! its `gemm` are what we keep.

use candle_core::{CpuStorage, Layout, Shape, backend::BackendStorage};
use rayon::prelude::*;

use super::simd;
use crate::error::PolicyError;

/// Up to this many rows a product reads the weights once with [`simd::SkinnyProduct`]; above it `gemm`
/// packs panels, which costs a second pass over the weights but uses registers better.
/// Measured with `cargo test --release -p grpo-policy skinny_threshold -- --ignored --nocapture`.
const SKINNY_ROWS: usize = 24;

/// Below this many multiply-adds a product stays on the calling thread.
const PARALLEL_MACS: usize = 1 << 18;

/// A dense `[rows, cols]` matrix.
#[derive(Clone, Debug)]
pub(crate) struct Mat {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    storage: CpuStorage,
}

impl Mat {
    pub(crate) fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        debug_assert_eq!(rows * cols, data.len());
        Self {
            rows,
            cols,
            storage: CpuStorage::F32(data),
        }
    }

    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        Self::from_vec(rows, cols, vec![0.0; rows * cols])
    }

    pub(crate) fn data(&self) -> &[f32] {
        match &self.storage {
            CpuStorage::F32(data) => data,
            // `from_vec` is the only constructor and `gemm` keeps the element type.
            _ => unreachable!("a Mat holds f32"),
        }
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            CpuStorage::F32(data) => data,
            _ => unreachable!("a Mat holds f32"),
        }
    }

    pub(crate) fn into_vec(self) -> Vec<f32> {
        match self.storage {
            CpuStorage::F32(data) => data,
            _ => unreachable!("a Mat holds f32"),
        }
    }

    pub(crate) fn row(&self, index: usize) -> &[f32] {
        &self.data()[index * self.cols..(index + 1) * self.cols]
    }

    /// `self += other`, element by element.
    pub(crate) fn add_assign(&mut self, other: &Self) {
        simd::add_assign(self.data_mut(), other.data());
    }

    /// `x · wᵀ`: `[M, K] × [N, K] → [M, N]`.
    pub(crate) fn mul_t(&self, w: &Self) -> Result<Self, PolicyError> {
        debug_assert_eq!(self.cols, w.cols);
        if self.rows <= SKINNY_ROWS {
            return Ok(self.mul_t_skinny(w));
        }
        View::whole(self).gemm(View::whole(w).t())
    }

    /// `g · w`: `[M, N] × [N, K] → [M, K]`.
    pub(crate) fn mul(&self, w: &Self) -> Result<Self, PolicyError> {
        View::whole(self).gemm(View::whole(w))
    }

    /// `gᵀ · x`: `[M, N]ᵀ × [M, K] → [N, K]`.
    pub(crate) fn t_mul(&self, x: &Self) -> Result<Self, PolicyError> {
        View::whole(self).t().gemm(View::whole(x))
    }

    fn mul_t_skinny(&self, w: &Self) -> Self {
        let (m, k, n) = (self.rows, self.cols, w.rows);
        let product = |weights: &[f32]| simd::skinny_product(self.data(), weights, m, k);
        let mut out = vec![0.0; m * n];
        let scatter = |out: &mut [f32], first: usize, columns: &[f32]| {
            for (j, column) in columns.chunks_exact(m).enumerate() {
                for (i, value) in column.iter().enumerate() {
                    out[i * n + first + j] = *value;
                }
            }
        };
        if m * n * k < PARALLEL_MACS {
            scatter(&mut out, 0, &product(w.data()));
        } else {
            let per_task = n.div_ceil(rayon::current_num_threads() * 2).max(8);
            let parts: Vec<Vec<f32>> = w.data().par_chunks(per_task * k).map(product).collect();
            for (task, columns) in parts.iter().enumerate() {
                scatter(&mut out, task * per_task, columns);
            }
        }
        Self::from_vec(m, n, out)
    }
}

/// A strided window into a matrix's storage, the operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    storage: &'a CpuStorage,
    offset: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    pub(crate) fn whole(mat: &'a Mat) -> Self {
        Self::window(mat, 0, mat.rows, 0, mat.cols)
    }

    /// `rows` rows from `row`, `cols` columns from `col`.
    pub(crate) fn window(mat: &'a Mat, row: usize, rows: usize, col: usize, cols: usize) -> Self {
        Self {
            storage: &mat.storage,
            offset: row * mat.cols + col,
            rows,
            cols,
            row_stride: mat.cols,
            col_stride: 1,
        }
    }

    /// The transpose; no data moves.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// `self · rhs`.
    pub(crate) fn gemm(self, rhs: Self) -> Result<Mat, PolicyError> {
        let layout = |v: &Self| {
            let shape = Shape::from((v.rows, v.cols));
            Layout::new(shape, vec![v.row_stride, v.col_stride], v.offset)
        };
        debug_assert_eq!(self.cols, rhs.rows);
        let size = (1, self.rows, rhs.cols, self.cols);
        let storage = self
            .storage
            .matmul(rhs.storage, size, &layout(&self), &layout(&rhs))?;
        Ok(Mat {
            rows: self.rows,
            cols: rhs.cols,
            storage,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arbitrary(rows: usize, cols: usize, seed: u32) -> Mat {
        let mut state = seed;
        let data = (0..rows * cols).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        });
        Mat::from_vec(rows, cols, data.collect())
    }

    fn naive(a: &Mat, b_t: &Mat) -> Vec<f32> {
        let dot = |i, j| -> f32 {
            let pairs = a.row(i).iter().zip(b_t.row(j));
            pairs
                .map(|(x, y)| f64::from(*x) * f64::from(*y))
                .sum::<f64>() as f32
        };
        (0..a.rows)
            .flat_map(|i| (0..b_t.rows).map(move |j| (i, j)))
            .map(|(i, j)| dot(i, j))
            .collect()
    }

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-4, "{f} is not {e}");
        }
    }

    #[test]
    fn every_row_count_multiplies_like_the_textbook() {
        for m in (1..=SKINNY_ROWS + 2).chain([40]) {
            for (n, k) in [(1, 1), (7, 3), (33, 70), (130, 64)] {
                let (x, w) = (arbitrary(m, k, 1), arbitrary(n, k, 2));
                assert_close(x.mul_t(&w).unwrap().data(), &naive(&x, &w));
            }
        }
    }

    #[test]
    fn the_three_products_agree_with_each_other() {
        let (x, w) = (arbitrary(30, 17, 3), arbitrary(11, 17, 4));
        let y = x.mul_t(&w).unwrap();
        let dx = y.mul(&w).unwrap();
        let w_t = Mat::from_vec(
            17,
            11,
            (0..17 * 11).map(|i| w.row(i % 11)[i / 11]).collect(),
        );
        assert_close(dx.data(), &naive(&y, &w_t));
        let dw = y.t_mul(&x).unwrap();
        assert_eq!((dw.rows, dw.cols), (11, 17));
        let expected: f32 = (0..30).map(|m| y.row(m)[5] * x.row(m)[9]).sum();
        assert!((dw.row(5)[9] - expected).abs() < 1e-4);
    }

    /// Prints the time of both paths; the constant above is read off it.
    #[test]
    #[ignore = "a measurement, not a check"]
    fn skinny_threshold() {
        let w = arbitrary(1536, 576, 5);
        for m in [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256] {
            let x = arbitrary(m, 576, 6);
            let time = |f: &dyn Fn() -> Mat| {
                f();
                let start = std::time::Instant::now();
                for _ in 0..200 {
                    std::hint::black_box(f());
                }
                start.elapsed().as_secs_f64() / 200.0
            };
            let skinny = time(&|| x.mul_t_skinny(&w));
            let gemm = time(&|| View::whole(&x).gemm(View::whole(&w).t()).unwrap());
            let gflop = 2e-9 * (m * 1536 * 576) as f64;
            println!(
                "{m:4} rows: skinny {:6.1} us {:6.1} GFLOP/s, gemm {:6.1} us {:6.1} GFLOP/s",
                skinny * 1e6,
                gflop / skinny,
                gemm * 1e6,
                gflop / gemm
            );
        }
    }
}
