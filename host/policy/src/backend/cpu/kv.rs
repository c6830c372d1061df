//! The paged KV pool and attention over it, for rollouts (PagedAttention, Kwon et al. 2023).

use rayon::prelude::*;

use super::{
    attention::Heads,
    mat::Mat,
    simd::{axpy_inline, dispatch, dot_inline, exp_inline},
};
use crate::backend::{BlockId, StepRow};

/// Below this many multiply-adds attention stays on the calling thread.
const PARALLEL_MACS: usize = 1 << 17;

/// Keys and values of all layers. A block of one layer is `[kv_heads, block_size, dim]`, so that the
/// keys of one head in one block are contiguous.
#[derive(Debug)]
pub(crate) struct KvPool {
    heads: Heads,
    block_size: usize,
    layers: Vec<LayerPool>,
}

#[derive(Debug)]
struct LayerPool {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// One query token: which blocks hold its past, and its own position.
#[derive(Clone, Copy)]
pub(crate) struct Token<'a> {
    pub(crate) blocks: &'a [BlockId],
    pub(crate) position: usize,
}

/// All new tokens of a step in row order.
pub(crate) fn tokens<'a>(rows: &[StepRow<'a>]) -> Vec<Token<'a>> {
    let of_row = |row: &StepRow<'a>| {
        let (blocks, first) = (row.blocks, row.position);
        (0..row.tokens.len()).map(move |i| Token {
            blocks,
            position: first + i,
        })
    };
    rows.iter().flat_map(of_row).collect()
}

impl KvPool {
    pub(crate) fn new(heads: Heads, layers: usize, blocks: usize, block_size: usize) -> Self {
        let numbers = blocks * block_size * heads.kv_heads * heads.dim;
        let layer = || LayerPool {
            keys: vec![0.0; numbers],
            values: vec![0.0; numbers],
        };
        Self {
            heads,
            block_size,
            layers: (0..layers).map(|_| layer()).collect(),
        }
    }

    /// Where the run of `dim` numbers of one head and position starts.
    fn slot(&self, token: &Token<'_>, position: usize, kv_head: usize) -> usize {
        let block = token.blocks[position / self.block_size] as usize;
        let row = (block * self.heads.kv_heads + kv_head) * self.block_size;
        (row + position % self.block_size) * self.heads.dim
    }

    /// Stores each token's keys and values (`[T, kv_heads·dim]`).
    pub(crate) fn write(&mut self, layer: usize, tokens: &[Token<'_>], k: &Mat, v: &Mat) {
        let d = self.heads.dim;
        for (t, token) in tokens.iter().enumerate() {
            for head in 0..self.heads.kv_heads {
                let (to, from) = (
                    self.slot(token, token.position, head),
                    head * d..(head + 1) * d,
                );
                let pool = &mut self.layers[layer];
                pool.keys[to..to + d].copy_from_slice(&k.row(t)[from.clone()]);
                pool.values[to..to + d].copy_from_slice(&v.row(t)[from]);
            }
        }
    }

    /// Copies whole blocks in every layer.
    pub(crate) fn copy(&mut self, copies: &[(BlockId, BlockId)]) {
        let numbers = self.heads.kv_heads * self.block_size * self.heads.dim;
        for pool in &mut self.layers {
            for (from, to) in copies.iter().map(|(f, t)| (*f as usize, *t as usize)) {
                for side in [&mut pool.keys, &mut pool.values] {
                    side.copy_within(from * numbers..(from + 1) * numbers, to * numbers);
                }
            }
        }
    }

    /// Attention of each token (`q` is `[T, heads·dim]`) over positions `0..=position`.
    pub(crate) fn attend(&self, layer: usize, tokens: &[Token<'_>], q: &Mat) -> Mat {
        let (d, group) = (self.heads.dim, self.heads.group());
        let mut out = Mat::zeros(q.rows, q.cols);
        let job = |(i, out): (usize, &mut [f32])| {
            let (t, kv_head) = (i / self.heads.kv_heads, i % self.heads.kv_heads);
            let q = &q.row(t)[kv_head * group * d..(kv_head + 1) * group * d];
            self.attend_one(layer, &tokens[t], kv_head, q, out);
        };
        let keys: usize = tokens.iter().map(|t| t.position + 1).sum();
        if keys * q.cols < PARALLEL_MACS {
            out.data_mut()
                .chunks_mut(group * d)
                .enumerate()
                .for_each(job);
        } else {
            out.data_mut()
                .par_chunks_mut(group * d)
                .enumerate()
                .for_each(job);
        }
        out
    }

    /// One kv head of one token: the whole query group while a block of keys is in cache.
    fn attend_one(
        &self,
        layer: usize,
        token: &Token<'_>,
        kv_head: usize,
        q: &[f32],
        out: &mut [f32],
    ) {
        let (d, scale, pool) = (self.heads.dim, self.heads.scale(), &self.layers[layer]);
        let len = token.position + 1;
        let mut scores = vec![0.0f32; len * (q.len() / d)];
        let runs = || {
            (0..len).step_by(self.block_size).map(|first| {
                let from = self.slot(token, first, kv_head);
                (first, from..from + self.block_size.min(len - first) * d)
            })
        };
        dispatch(
            #[inline(always)]
            || {
                for (first, run) in runs() {
                    for (i, key) in pool.keys[run].chunks_exact(d).enumerate() {
                        for (q, scores) in q.chunks_exact(d).zip(scores.chunks_exact_mut(len)) {
                            scores[first + i] = dot_inline(q, key) * scale;
                        }
                    }
                }
                for scores in scores.chunks_exact_mut(len) {
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let mut total = 0.0;
                    for s in scores.iter_mut() {
                        *s = exp_inline(*s - max);
                        total += *s;
                    }
                    for s in scores.iter_mut() {
                        *s /= total;
                    }
                }
                for (first, run) in runs() {
                    for (i, value) in pool.values[run].chunks_exact(d).enumerate() {
                        for (out, scores) in out.chunks_exact_mut(d).zip(scores.chunks_exact(len)) {
                            axpy_inline(out, scores[first + i], value);
                        }
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::attention::Packed;

    fn wave(rows: usize, cols: usize, phase: f32) -> Mat {
        let value = |i: usize| (i as f32 * 0.37 + phase).sin();
        Mat::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    #[test]
    fn paged_attention_equals_packed_attention() {
        let heads = Heads {
            heads: 4,
            kv_heads: 2,
            dim: 8,
        };
        let (q, k, v) = (wave(21, 32, 0.0), wave(21, 16, 1.0), wave(21, 16, 2.0));
        let whole = crate::types::Span {
            tokens: 0..21,
            prefix: 0..0,
        };
        let packed = Packed {
            q: &q,
            k: &k,
            v: &v,
            spans: &[whole],
            heads,
        };
        let expected = packed.forward().out;
        let mut pool = KvPool::new(heads, 2, 7, 4);
        let blocks = [5, 0, 3, 6, 2, 4];
        let tokens: Vec<_> = (0..21)
            .map(|position| Token {
                blocks: &blocks,
                position,
            })
            .collect();
        pool.write(1, &tokens, &k, &v);
        let found = pool.attend(1, &tokens, &q);
        for (f, e) in found.data().iter().zip(expected.data()) {
            assert!((f - e).abs() < 1e-5);
        }
        // A copied block serves as well as the original.
        pool.copy(&[(3, 1)]);
        let moved = [5, 0, 1, 6, 2, 4];
        let tokens: Vec<_> = (0..21)
            .map(|position| Token {
                blocks: &moved,
                position,
            })
            .collect();
        assert_eq!(pool.attend(1, &tokens, &q).data(), found.data());
    }
}
