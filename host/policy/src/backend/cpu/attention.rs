//! Causal attention over packed sequences and their prefixes, forward and backward, for training and scoring passes.
//!
//! Scores are made for a tile of queries at a time and dropped; the backward pass makes them again from
//! the saved log-sum-exp (FlashAttention, Dao et al. 2022), so memory is linear in the sequence length.

use rayon::prelude::*;

use super::{
    mat::{Mat, View},
    simd::{dispatch, dot_inline, exp_inline, log_sum_exp},
};
use crate::{spec::ModelSpec, types::Span};

/// Queries whose scores are alive at a time.
const TILE: usize = 64;

/// Heads of one attention layer; `heads / kv_heads` queries share a key (GQA, Ainslie et al. 2023).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
}

impl Heads {
    pub(crate) fn of(spec: &ModelSpec) -> Self {
        Self {
            heads: spec.num_attention_heads,
            kv_heads: spec.num_key_value_heads,
            dim: spec.head_dim,
        }
    }

    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// `1/√d`.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Queries `[T, heads·d]`, keys and values `[T, kv_heads·d]` of all sequences, and where each lies.
pub(crate) struct Packed<'a> {
    pub(crate) q: &'a Mat,
    pub(crate) k: &'a Mat,
    pub(crate) v: &'a Mat,
    pub(crate) spans: &'a [Span],
    pub(crate) heads: Heads,
}

/// Result `[T, heads·d]` and the log-sum-exp of each query's scores, `[T, heads]`.
pub(crate) struct Attended {
    pub(crate) out: Mat,
    pub(crate) lse: Mat,
}

/// Gradients of queries, keys and values.
pub(crate) struct Gradients {
    pub(crate) dq: Mat,
    pub(crate) dk: Mat,
    pub(crate) dv: Mat,
}

/// Keys and values of one head that a sequence sees, those of its prefix first, `[P + N, d]`: in one piece, so that a tile of
/// scores is one product.
struct Seen {
    k: Mat,
    v: Mat,
}

/// A tile of queries of one head.
struct Tile {
    head: usize,
    /// Its first token.
    first: usize,
    len: usize,
    /// Keys before its own, which all of its queries see.
    before: usize,
}

impl Tile {
    fn keys(&self) -> usize {
        self.before + self.len
    }
}

/// The tiles of a sequence.
fn tiles(span: &Span, head: usize) -> impl Iterator<Item = Tile> {
    let Span { tokens, prefix } = span.clone();
    (0..tokens.len()).step_by(TILE).map(move |from| Tile {
        head,
        first: tokens.start + from,
        len: TILE.min(tokens.len() - from),
        before: prefix.len() + from,
    })
}

impl Packed<'_> {
    fn work(&self, heads: usize) -> Vec<(&Span, usize)> {
        let spans = self.spans.iter();
        spans
            .flat_map(|span| (0..heads).map(move |head| (span, head)))
            .collect()
    }

    fn seen(&self, span: &Span, kv_head: usize) -> Seen {
        let d = self.heads.dim;
        let pick = |from: &Mat| {
            let rows = span.prefix.clone().chain(span.tokens.clone());
            let mut out = Mat::unspecified(span.prefix.len() + span.tokens.len(), d);
            for (to, row) in out.data_mut().chunks_mut(d).zip(rows) {
                to.copy_from_slice(&from.row(row)[kv_head * d..(kv_head + 1) * d]);
            }
            out
        };
        Seen {
            k: pick(self.k),
            v: pick(self.v),
        }
    }

    /// Masked scores times `1/√d`, `[tile.len, tile.keys()]`; masked entries are −∞.
    fn scores(&self, seen: &Seen, tile: &Tile) -> Mat {
        let mut scores = self
            .queries(self.q, tile)
            .mul(first_rows(&seen.k, tile).t());
        let scale = self.heads.scale();
        for (i, row) in scores.data_mut().chunks_mut(tile.keys()).enumerate() {
            let visible = tile.before + i + 1;
            row[..visible].iter_mut().for_each(|s| *s *= scale);
            row[visible..].fill(f32::NEG_INFINITY);
        }
        scores
    }

    fn queries<'m>(&self, mat: &'m Mat, tile: &Tile) -> View<'m> {
        let d = self.heads.dim;
        View::window(mat, tile.first, tile.len, tile.head * d, d)
    }

    /// Softmax attention of every token over its prefix and its own sequence up to itself.
    pub(crate) fn forward(&self) -> Attended {
        let d = self.heads.dim;
        let parts = self
            .work(self.heads.heads)
            .into_par_iter()
            .map(|(span, head)| {
                let seen = self.seen(span, head / self.heads.group());
                let mut out = Vec::with_capacity(span.tokens.len() * d);
                let mut lse = Vec::with_capacity(span.tokens.len());
                for tile in tiles(span, head) {
                    let mut scores = self.scores(&seen, &tile);
                    for (i, row) in scores.data_mut().chunks_mut(tile.keys()).enumerate() {
                        lse.push(softmax(row, tile.before + i + 1));
                    }
                    let values = first_rows(&seen.v, &tile);
                    out.extend_from_slice(View::whole(&scores).mul(values).data());
                }
                (span.tokens.start, head, out, lse)
            })
            .collect::<Vec<_>>();
        let mut out = Mat::zeros(self.q.rows, self.q.cols);
        let mut lse = Mat::zeros(self.q.rows, self.heads.heads);
        for (start, head, part, part_lse) in parts {
            add_columns(&mut out, start, head * d, &part, d);
            add_columns(&mut lse, start, head, &part_lse, 1);
        }
        Attended { out, lse }
    }

    /// Gradients given that of the result.
    pub(crate) fn backward(&self, saved: &Attended, dout: &Mat) -> Gradients {
        let d = self.heads.dim;
        let parts = self
            .work(self.heads.kv_heads)
            .into_par_iter()
            .map(|(span, kv_head)| {
                let seen = self.seen(span, kv_head);
                let mut part = KvHeadGradients::new(span, kv_head, d);
                for head in kv_head * self.heads.group()..(kv_head + 1) * self.heads.group() {
                    for tile in tiles(span, head) {
                        part.add_tile(self, &seen, (saved, dout), &tile);
                    }
                }
                part
            })
            .collect::<Vec<_>>();
        let mut sum = Gradients {
            dq: Mat::zeros(self.q.rows, self.q.cols),
            dk: Mat::zeros(self.k.rows, self.k.cols),
            dv: Mat::zeros(self.v.rows, self.v.cols),
        };
        for part in &parts {
            for (row, head, dq) in &part.dq {
                add_columns(&mut sum.dq, *row, head * d, dq.data(), d);
            }
            let Span { tokens, prefix } = part.span;
            for (to, from) in [(&mut sum.dk, &part.dk), (&mut sum.dv, &part.dv)] {
                let (shared, own) = from.split_at(prefix.len() * d);
                add_columns(to, prefix.start, part.kv_head * d, shared, d);
                add_columns(to, tokens.start, part.kv_head * d, own, d);
            }
        }
        sum
    }
}

/// The keys or values that a tile sees.
fn first_rows<'m>(mat: &'m Mat, tile: &Tile) -> View<'m> {
    View::window(mat, 0, tile.keys(), 0, mat.cols)
}

/// What one kv head of one sequence contributes: `dq` by tile (`row, head, values`), `dk`, `dv` of all keys that it sees,
/// summed over the heads of the group.
struct KvHeadGradients<'a> {
    span: &'a Span,
    kv_head: usize,
    dq: Vec<(usize, usize, Mat)>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl<'a> KvHeadGradients<'a> {
    fn new(span: &'a Span, kv_head: usize, dim: usize) -> Self {
        let keys = span.prefix.len() + span.tokens.len();
        Self {
            span,
            kv_head,
            dq: Vec::new(),
            dk: vec![0.0; keys * dim],
            dv: vec![0.0; keys * dim],
        }
    }

    /// With `P` the probabilities and `D = Σ_d dO·O` of a query: `dV = PᵀdO`, `dP = dO·Vᵀ`,
    /// `dS = P·(dP − D)/√d`, `dQ = dS·K`, `dK = dSᵀ·Q`.
    fn add_tile(
        &mut self,
        packed: &Packed<'_>,
        seen: &Seen,
        (saved, dout): (&Attended, &Mat),
        tile: &Tile,
    ) {
        let (keys, d) = (tile.keys(), packed.heads.dim);
        let mut p = packed.scores(seen, tile);
        let dout_tile = packed.queries(dout, tile);
        let mut ds = dout_tile.mul(first_rows(&seen.v, tile).t());
        let rows = p
            .data_mut()
            .chunks_mut(keys)
            .zip(ds.data_mut().chunks_mut(keys));
        for (i, (p, ds)) in rows.enumerate() {
            let token = tile.first + i;
            let columns = tile.head * d..(tile.head + 1) * d;
            let (g, o) = (
                &dout.row(token)[columns.clone()],
                &saved.out.row(token)[columns],
            );
            let (lse, scale) = (saved.lse.row(token)[tile.head], packed.heads.scale());
            dispatch(
                #[inline(always)]
                || {
                    let delta = dot_inline(g, o);
                    for (p, ds) in p.iter_mut().zip(ds.iter_mut()) {
                        // exp_inline clamps, so the mask's −∞ needs its own zero.
                        let value = exp_inline(*p - lse);
                        *p = if *p == f32::NEG_INFINITY { 0.0 } else { value };
                        *ds = *p * (*ds - delta) * scale;
                    }
                },
            );
        }
        let dv = View::whole(&p).t().mul(dout_tile);
        super::simd::add_assign(&mut self.dv[..keys * d], dv.data());
        let dk = View::whole(&ds).t().mul(packed.queries(packed.q, tile));
        super::simd::add_assign(&mut self.dk[..keys * d], dk.data());
        let dq = View::whole(&ds).mul(first_rows(&seen.k, tile));
        self.dq.push((tile.first, tile.head, dq));
    }
}

/// Turns the first `visible` scores into probabilities and the rest into zeros; returns log-sum-exp.
fn softmax(row: &mut [f32], visible: usize) -> f32 {
    let lse = log_sum_exp(&row[..visible]);
    dispatch(
        #[inline(always)]
        || {
            for value in &mut row[..visible] {
                *value = exp_inline(*value - lse);
            }
        },
    );
    row[visible..].fill(0.0);
    lse
}

/// Adds `part` (`[_, width]`) into `out` at the given row and column.
fn add_columns(out: &mut Mat, row: usize, column: usize, part: &[f32], width: usize) {
    let cols = out.cols;
    let rows = out.data_mut()[row * cols..].chunks_mut(cols);
    for (to, from) in rows.zip(part.chunks(width)) {
        for (to, from) in to[column..column + width].iter_mut().zip(from) {
            *to += from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PackedBatch;

    fn wave(rows: usize, cols: usize, phase: f32) -> Mat {
        let value = |i: usize| (i as f32 * 0.37 + phase).sin();
        Mat::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    /// Sequences of so many tokens, each with the number of the one that it continues.
    fn spans(sequences: &[(usize, Option<usize>)]) -> Vec<Span> {
        let mut batch = PackedBatch {
            cu_seqlens: vec![0],
            ..PackedBatch::default()
        };
        for (n, prefix) in sequences {
            batch
                .cu_seqlens
                .push(batch.cu_seqlens[batch.prefixes.len()] + n);
            batch.prefixes.push(*prefix);
        }
        batch.spans()
    }

    /// Attention by its definition, in f64.
    fn textbook(p: &Packed<'_>) -> Vec<f64> {
        let Heads { heads, dim: d, .. } = p.heads;
        let mut out = vec![0.0; p.q.rows * p.q.cols];
        for span in p.spans {
            for t in span.tokens.clone() {
                for h in 0..heads {
                    let kv = h / p.heads.group();
                    let dot = |s: usize| -> f64 {
                        (0..d)
                            .map(|i| {
                                f64::from(p.q.row(t)[h * d + i]) * f64::from(p.k.row(s)[kv * d + i])
                            })
                            .sum::<f64>()
                            / (d as f64).sqrt()
                    };
                    let keys = || span.prefix.clone().chain(span.tokens.start..=t);
                    let weights: Vec<f64> = keys().map(|s| dot(s).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for (s, w) in keys().zip(&weights) {
                        for i in 0..d {
                            out[t * heads * d + h * d + i] +=
                                w / total * f64::from(p.v.row(s)[kv * d + i]);
                        }
                    }
                }
            }
        }
        out
    }

    #[test]
    fn forward_matches_the_definition_across_tiles() {
        let heads = Heads {
            heads: 4,
            kv_heads: 2,
            dim: 6,
        };
        let (q, k, v) = (wave(150, 24, 0.0), wave(150, 12, 1.0), wave(150, 12, 2.0));
        let p = Packed {
            q: &q,
            k: &k,
            v: &v,
            spans: &spans(&[
                (1, None),
                (70, None),
                (66, Some(1)),
                (1, Some(1)),
                (12, None),
            ]),
            heads,
        };
        let found = p.forward().out;
        for (f, e) in found.data().iter().zip(textbook(&p)) {
            assert!((f64::from(*f) - e).abs() < 1e-5);
        }
    }

    #[test]
    fn backward_matches_central_differences() {
        let heads = Heads {
            heads: 2,
            kv_heads: 1,
            dim: 4,
        };
        let (q, k, v) = (wave(70, 8, 0.0), wave(70, 4, 1.0), wave(70, 4, 2.0));
        let c = wave(70, 8, 3.0);
        let spans = spans(&[(3, None), (20, None), (30, Some(1)), (17, Some(1))]);
        let loss = |q: &Mat, k: &Mat, v: &Mat| -> f64 {
            let p = Packed {
                q,
                k,
                v,
                spans: &spans,
                heads,
            };
            textbook(&p)
                .iter()
                .zip(c.data())
                .map(|(o, c)| o * f64::from(*c))
                .sum()
        };
        let p = Packed {
            q: &q,
            k: &k,
            v: &v,
            spans: &spans,
            heads,
        };
        let grads = p.backward(&p.forward(), &c);
        let h = 1e-2f32;
        let bump = |m: &Mat, i: usize, by: f32| {
            let mut m = m.clone();
            m.data_mut()[i] += by;
            m
        };
        for i in (0..70 * 4).step_by(7) {
            let numeric = |f: &dyn Fn(f32) -> f64| (f(h) - f(-h)) / (2.0 * f64::from(h));
            let cases = [
                (
                    grads.dq.data()[i],
                    numeric(&|b| loss(&bump(&q, i, b), &k, &v)),
                ),
                (
                    grads.dk.data()[i],
                    numeric(&|b| loss(&q, &bump(&k, i, b), &v)),
                ),
                (
                    grads.dv.data()[i],
                    numeric(&|b| loss(&q, &k, &bump(&v, i, b))),
                ),
            ];
            for (found, expected) in cases {
                assert!(
                    (f64::from(found) - expected).abs() < 1e-3,
                    "{i}: {found} is not {expected}"
                );
            }
        }
    }
}
