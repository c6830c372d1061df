//! Row-major `f32` matrices and the products a linear layer needs, on `faer`'s matrix product.
//!
//! Not candle's tensors: their autograd differentiates frozen weights too and writes every gradient twice
//! (zeros, then add), reading one back copies it, and every product reads `/proc/cpuinfo` to count
//! threads, which for a small model costs more than the product.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{buffer, simd};

/// Up to this many rows a product reads the weights once with [`simd::skinny_product`]; above it a blocked
/// product packs panels, a second pass over the weights, but uses registers better. On two cores with
/// AVX-512 and weights of 1536 × 576 the two met between 24 and 32 rows; at 8 the first took 0.17 ms
/// where a blocked one took 0.47.
const SKINNY_ROWS: usize = 24;

/// Below this many multiply-adds a product stays on the calling thread.
const PARALLEL_MACS: usize = 1 << 18;

/// A wider product is made in blocks of so many columns: written row-major as a whole, a column of the
/// kernel's tiles touches a page per row. Over 49,152 columns 200 GFLOP/s became of 140.
const BLOCK_COLUMNS: usize = 2048;

/// Elements one task of an element-wise loop works on.
const RUN: usize = 1 << 15;

/// A dense `[rows, cols]` matrix.
#[derive(Debug)]
pub(crate) struct Mat {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    data: Vec<f32>,
}

impl Mat {
    pub(crate) fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        debug_assert_eq!(rows * cols, data.len());
        Self { rows, cols, data }
    }

    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        let mut zeros = Self::unspecified(rows, cols);
        zeros.data.fill(0.0);
        zeros
    }

    /// With any numbers in it, to be overwritten.
    pub(crate) fn unspecified(rows: usize, cols: usize) -> Self {
        Self::from_vec(rows, cols, buffer::take(rows * cols))
    }

    pub(crate) fn data(&self) -> &[f32] {
        &self.data
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    pub(crate) fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.cols..(index + 1) * self.cols]
    }

    /// `self += other`, element by element.
    pub(crate) fn add_assign(&mut self, other: &Self) {
        if self.data.len() <= RUN {
            return simd::add_assign(&mut self.data, &other.data);
        }
        let runs = self.data.par_chunks_mut(RUN);
        runs.zip(other.data.par_chunks(RUN))
            .for_each(|(to, from)| simd::add_assign(to, from));
    }

    /// `x · wᵀ`: `[M, K] × [N, K] → [M, N]`.
    pub(crate) fn mul_t(&self, w: &Self) -> Self {
        debug_assert_eq!(self.cols, w.cols);
        if self.rows <= SKINNY_ROWS {
            return self.mul_t_skinny(w);
        }
        View::whole(self).mul(View::whole(w).t())
    }

    /// `g · w`: `[M, N] × [N, K] → [M, K]`.
    pub(crate) fn mul(&self, w: &Self) -> Self {
        View::whole(self).mul(View::whole(w))
    }

    /// `self += a · b`.
    pub(crate) fn add_product(&mut self, a: View<'_>, b: View<'_>) {
        let out = MatMut::from_row_major_slice_mut(&mut self.data, self.rows, self.cols);
        a.product_into(b, out, Accum::Add);
    }

    fn mul_t_skinny(&self, w: &Self) -> Self {
        let (m, k, n) = (self.rows, self.cols, w.rows);
        let product = |weights: &[f32]| simd::skinny_product(self.data(), weights, m, k);
        let mut product_t = Self::unspecified(m, n);
        let out = product_t.data_mut();
        let scatter = |out: &mut [f32], first: usize, columns: &[f32]| {
            for (j, column) in columns.chunks_exact(m).enumerate() {
                for (i, value) in column.iter().enumerate() {
                    out[i * n + first + j] = *value;
                }
            }
        };
        if m * n * k < PARALLEL_MACS {
            scatter(out, 0, &product(w.data()));
        } else {
            let per_task = n.div_ceil(rayon::current_num_threads() * 2).max(8);
            let parts: Vec<Vec<f32>> = w.data().par_chunks(per_task * k).map(product).collect();
            for (task, columns) in parts.iter().enumerate() {
                scatter(out, task * per_task, columns);
            }
        }
        product_t
    }
}

impl Clone for Mat {
    fn clone(&self) -> Self {
        let mut copy = Self::unspecified(self.rows, self.cols);
        copy.data.copy_from_slice(&self.data);
        copy
    }
}

impl Drop for Mat {
    fn drop(&mut self) {
        buffer::give(std::mem::take(&mut self.data));
    }
}

/// A strided window into a matrix, the operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct View<'a>(MatRef<'a, f32>);

impl<'a> View<'a> {
    pub(crate) fn whole(mat: &'a Mat) -> Self {
        Self(MatRef::from_row_major_slice(&mat.data, mat.rows, mat.cols))
    }

    /// `rows` rows from `row`, `cols` columns from `col`.
    pub(crate) fn window(mat: &'a Mat, row: usize, rows: usize, col: usize, cols: usize) -> Self {
        Self(Self::whole(mat).0.submatrix(row, col, rows, cols))
    }

    /// The transpose; no data moves.
    pub(crate) fn t(self) -> Self {
        Self(self.0.transpose())
    }

    /// `self · rhs`.
    pub(crate) fn mul(self, rhs: Self) -> Mat {
        let mut out = Mat::unspecified(self.0.nrows(), rhs.0.ncols());
        self.write(rhs, &mut out, 0);
        out
    }

    /// `self · rhs` into the rows of `out` from `row`.
    pub(crate) fn write(self, rhs: Self, out: &mut Mat, row: usize) {
        let out = MatMut::from_row_major_slice_mut(&mut out.data, out.rows, out.cols);
        let rows = out.subrows_mut(row, self.0.nrows());
        self.product_into(rhs, rows, Accum::Replace);
    }

    fn product_into(self, rhs: Self, mut out: MatMut<'_, f32>, accum: Accum) {
        let (m, k, n) = (self.0.nrows(), self.0.ncols(), rhs.0.ncols());
        let par = match m * n * k < PARALLEL_MACS {
            true => Par::Seq,
            false => Par::rayon(0),
        };
        for from in (0..n).step_by(BLOCK_COLUMNS) {
            let columns = BLOCK_COLUMNS.min(n - from);
            let out = out.as_mut().subcols_mut(from, columns);
            matmul(out, accum, self.0, rhs.0.subcols(from, columns), 1.0, par);
        }
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
                assert_close(x.mul_t(&w).data(), &naive(&x, &w));
            }
        }
    }

    #[test]
    fn the_three_products_agree_with_each_other() {
        let (x, w) = (arbitrary(30, 17, 3), arbitrary(11, 17, 4));
        let y = x.mul_t(&w);
        let dx = y.mul(&w);
        let w_t = Mat::from_vec(
            17,
            11,
            (0..17 * 11).map(|i| w.row(i % 11)[i / 11]).collect(),
        );
        assert_close(dx.data(), &naive(&y, &w_t));
        let mut dw = Mat::zeros(11, 17);
        dw.add_product(View::whole(&y).t(), View::whole(&x));
        assert_eq!((dw.rows, dw.cols), (11, 17));
        let expected: f32 = (0..30).map(|m| y.row(m)[5] * x.row(m)[9]).sum();
        assert!((dw.row(5)[9] - expected).abs() < 1e-4);
    }
}
