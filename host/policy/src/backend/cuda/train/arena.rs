//! The memory of training passes, carved out of one buffer: what each layer keeps for its backward pass, and the scratch
//! that all of them share. The same arithmetic makes the plan before anything is allocated.

use crate::spec::ModelSpec;

/// Bytes that a region starts at a multiple of: what cublasLt likes best.
const STEP: usize = 256;

/// Blocks of the kernels that sum over rows in parts (train_rows.cu), and those of column sums.
pub(super) const PARTS: usize = 528;
pub(super) const COLUMN_PARTS: usize = 132;

/// Bytes of the logits of a chunk and their gradients. The gradient of the rows has few tiles of much work, and that of the
/// output matrix is read and written for every chunk: both want long chunks. A quarter of a pass is enough, so that short
/// passes take little memory.
const CHUNK: usize = 1 << 30;

/// What of a pass is kept for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nothing: it has none.
    Nothing,
    /// What each layer's backward pass reads, but of so many of the first layers only the residual stream before them; the rest of
    /// theirs is made again, one layer at a time (Chen et al. 2016, chosen per layer).
    AllBut(usize),
}

impl Kept {
    /// What each layer's backward pass reads.
    pub const ACTIVATIONS: Self = Self::AllBut(0);
    /// The residual stream before each layer.
    pub const INPUTS: Self = Self::AllBut(usize::MAX);

    /// Of a model of `layers` layers, those that are made again: the first so many.
    pub fn recomputed(self, layers: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::AllBut(recomputed) => recomputed.min(layers),
        }
    }
}

/// What decides how much memory there must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Tokens of a pass.
    pub(super) tokens: usize,
    pub(super) kept: Kept,
    /// Rank that adapters are stored with; 0 without.
    pub(super) rank: usize,
    pub(super) multiprocessors: usize,
}

/// What a layer leaves. Bytes from the start of its trace, or addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Trace {
    /// Residual stream before attention, bf16 `[T, H]`, and 1 over its root mean square, f32 `[T]`.
    pub(super) before: u64,
    pub(super) before_rstd: u64,
    /// `[T, (Q + 2K)·D]`: rotated, or as the product left it where heads are normalised.
    pub(super) qkv: u64,
    pub(super) attended: u64,
    /// f32 `[Q, T]`.
    pub(super) lse: u64,
    /// The same two before the MLP.
    pub(super) middle: u64,
    pub(super) middle_rstd: u64,
    /// `[T, 2F]`.
    pub(super) gate_up: u64,
}

/// What the head reads of a pass; offsets or addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HeadRows {
    /// Residual stream of the predictors, bf16 `[R, H]`, 1 over its root mean square, f32 `[R]`, and normalised, bf16.
    pub(super) saved: u64,
    pub(super) rstd: u64,
    pub(super) normed: u64,
    /// f32 `[R]` each.
    pub(super) logp: u64,
    pub(super) entropy: u64,
    pub(super) lse: u64,
}

/// Regions; offsets in what [`Arena::new`] returns, addresses after [`Arena::at`]. bf16 unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Arena {
    /// Of each layer that keeps its own; the last is for passes that keep nothing, and for what is made again.
    pub(super) traces: Vec<Trace>,
    /// Residual stream before each of the first layers, f32 `[T, H]`: those that are made again.
    pub(super) inputs: Vec<u64>,
    /// Of the last training pass, and of any other.
    pub(super) heads: [HeadRows; 2],
    /// f32 `[T, H]`.
    pub(super) x: u64,
    pub(super) h: u64,
    /// What is added to the residual stream; in the backward pass, the gradient of a norm's output. `[T, H]`.
    pub(super) delta: u64,
    /// `[T, F]`; in the backward pass its gradient first.
    pub(super) act: u64,
    /// `[T, (Q + 2K)·D]` where heads are normalised.
    pub(super) rotated: u64,
    /// Gradient of the residual stream, f32 `[T, H]`, and in bf16.
    pub(super) dx: u64,
    pub(super) dx16: u64,
    pub(super) dqkv: u64,
    /// f32 `[splits, T, 2K·D]`.
    pub(super) dkv: u64,
    pub(super) dattended: u64,
    /// f32 `[Q, T]`.
    pub(super) row_dots: u64,
    /// Parts of sums over rows, f32.
    pub(super) parts: u64,
    /// Gradient of each scored row's log-prob by its normalised hidden state, `[R, H]`, where the output matrix is frozen.
    pub(super) rows: u64,
    /// As many ones as a chunk has rows, f32.
    pub(super) ones: u64,
    /// `[T, 3·rank]`, and its gradient.
    pub(super) low: u64,
    pub(super) dlow: u64,
    /// f32 `[rows, stride]` of a chunk, and their gradients.
    pub(super) logits: u64,
    pub(super) dlogits: u64,
    /// Rows of a chunk, and numbers from one to the next.
    pub(super) chunk_rows: usize,
    pub(super) stride: usize,
    /// Of a whole trace, and of all of this.
    trace_bytes: usize,
    pub(super) bytes: usize,
    pub(super) tokens: usize,
}

/// Parts that the query heads of a key head are divided into, so that few tokens fill the GPU (train_attention.cu).
pub(super) fn splits(spec: &ModelSpec, tokens: usize, multiprocessors: usize) -> usize {
    let group = spec.num_attention_heads / spec.num_key_value_heads;
    let tiles = spec.num_key_value_heads * tokens.div_ceil(super::tables::TILE);
    (3 * multiprocessors / 2 / tiles).clamp(1, group)
}

/// Hands out regions one after the other.
struct Carver(usize);

impl Carver {
    fn take(&mut self, numbers: usize, width: usize) -> u64 {
        let start = self.0;
        self.0 = (start + numbers * width).next_multiple_of(STEP);
        start as u64
    }
}

impl Arena {
    /// The regions for passes of at most `sizes.tokens` tokens.
    pub(super) fn new(spec: &ModelSpec, sizes: &Sizes) -> Self {
        let mut carver = Carver(0);
        let mut arena = Self {
            tokens: sizes.tokens,
            stride: spec.vocab_size.next_multiple_of(8),
            ..Self::default()
        };
        arena.keep(spec, sizes, &mut carver);
        arena.work(spec, sizes, &mut carver);
        if sizes.kept != Kept::Nothing {
            arena.backward(spec, sizes, &mut carver);
        }
        let row = arena.stride * (size_of::<f32>() + 2);
        let rows = (CHUNK / row).min(sizes.tokens / 4).max(128) / 128 * 128;
        arena.chunk_rows = rows.min(sizes.tokens.next_multiple_of(8));
        arena.logits = carver.take(arena.chunk_rows * arena.stride, 4);
        arena.dlogits = carver.take(arena.chunk_rows * arena.stride, 2);
        arena.ones = carver.take(arena.chunk_rows, 4);
        arena.bytes = carver.0;
        arena
    }

    fn keep(&mut self, spec: &ModelSpec, sizes: &Sizes, carver: &mut Carver) {
        let (t, layers) = (sizes.tokens, spec.num_hidden_layers);
        let (trace, bytes) = trace(spec, t);
        self.trace_bytes = bytes;
        let recomputed = sizes.kept.recomputed(layers);
        let kept = match sizes.kept {
            Kept::Nothing => 0,
            Kept::AllBut(_) => layers - recomputed,
        };
        self.traces = (0..=kept)
            .map(|_| trace.moved(carver.take(bytes, 1)))
            .collect();
        let size = t * spec.hidden_size;
        self.inputs = (0..recomputed).map(|_| carver.take(size, 4)).collect();
        let h = t * spec.hidden_size;
        self.heads = std::array::from_fn(|_| HeadRows {
            saved: carver.take(h, 2),
            rstd: carver.take(t, 4),
            normed: carver.take(h, 2),
            logp: carver.take(t, 4),
            entropy: carver.take(t, 4),
            lse: carver.take(t, 4),
        });
    }

    fn work(&mut self, spec: &ModelSpec, sizes: &Sizes, carver: &mut Carver) {
        let (t, h) = (sizes.tokens, spec.hidden_size);
        self.x = carver.take(t * h, 4);
        self.h = carver.take(t * h, 2);
        self.delta = carver.take(t * h, 2);
        self.act = carver.take(t * spec.intermediate_size, 2);
        let rotated = if spec.qk_norm { qkv_width(spec) } else { 0 };
        self.rotated = carver.take(t * rotated, 2);
    }

    fn backward(&mut self, spec: &ModelSpec, sizes: &Sizes, carver: &mut Carver) {
        let (t, h, m) = (sizes.tokens, spec.hidden_size, sizes.multiprocessors);
        self.dx = carver.take(t * h, 4);
        self.dx16 = carver.take(t * h, 2);
        self.dqkv = carver.take(t * qkv_width(spec), 2);
        // A pass of few tokens is divided into more parts than one of many.
        let group = spec.num_attention_heads / spec.num_key_value_heads;
        let divided = 3 * m * super::tables::TILE / (2 * spec.num_key_value_heads);
        let rows = (t * group).min(t.max(divided));
        self.dkv = carver.take(rows * 2 * spec.kv_dim(), 4);
        self.dattended = carver.take(t * spec.q_dim(), 2);
        self.row_dots = carver.take(t * spec.num_attention_heads, 4);
        let widest = h.max(2 * spec.head_dim);
        let parts = (PARTS * widest).max(COLUMN_PARTS * qkv_width(spec));
        self.parts = carver.take(parts, 4);
        self.rows = carver.take(if sizes.rank > 0 { t * h } else { 0 }, 2);
        self.low = carver.take(t * 3 * sizes.rank, 2);
        self.dlow = carver.take(t * 3 * sizes.rank, 2);
    }

    /// The trace that a training pass keeps of a layer; `None` for one that is made again.
    pub(super) fn kept(&self, layer: usize) -> Option<Trace> {
        let place = layer.checked_sub(self.inputs.len())?;
        self.traces[..self.traces.len() - 1].get(place).copied()
    }

    /// The trace of any other.
    pub(super) fn shared(&self) -> Trace {
        self.traces[self.traces.len() - 1]
    }

    /// The same regions as addresses of a buffer at `base`.
    pub(super) fn at(self, base: u64) -> Self {
        let to = |offset: u64| offset + base;
        Self {
            traces: self.traces.iter().map(|t| t.moved(base)).collect(),
            inputs: self.inputs.iter().map(|offset| to(*offset)).collect(),
            heads: self.heads.map(|rows| HeadRows {
                saved: to(rows.saved),
                rstd: to(rows.rstd),
                normed: to(rows.normed),
                logp: to(rows.logp),
                entropy: to(rows.entropy),
                lse: to(rows.lse),
            }),
            x: to(self.x),
            h: to(self.h),
            delta: to(self.delta),
            act: to(self.act),
            rotated: to(self.rotated),
            dx: to(self.dx),
            dx16: to(self.dx16),
            dqkv: to(self.dqkv),
            dkv: to(self.dkv),
            dattended: to(self.dattended),
            row_dots: to(self.row_dots),
            parts: to(self.parts),
            rows: to(self.rows),
            ones: to(self.ones),
            low: to(self.low),
            dlow: to(self.dlow),
            logits: to(self.logits),
            dlogits: to(self.dlogits),
            ..self
        }
    }
}

/// Width of the fused projection.
pub(super) fn qkv_width(spec: &ModelSpec) -> usize {
    spec.q_dim() + 2 * spec.kv_dim()
}

/// Offsets in a trace, and its bytes.
fn trace(spec: &ModelSpec, t: usize) -> (Trace, usize) {
    let mut carver = Carver(0);
    let h = spec.hidden_size;
    let trace = Trace {
        before: carver.take(t * h, 2),
        before_rstd: carver.take(t, 4),
        qkv: carver.take(t * qkv_width(spec), 2),
        attended: carver.take(t * spec.q_dim(), 2),
        lse: carver.take(t * spec.num_attention_heads, 4),
        middle: carver.take(t * h, 2),
        middle_rstd: carver.take(t, 4),
        gate_up: carver.take(t * 2 * spec.intermediate_size, 2),
    };
    (trace, carver.0)
}

impl Trace {
    fn moved(&self, by: u64) -> Self {
        Self {
            before: self.before + by,
            before_rstd: self.before_rstd + by,
            qkv: self.qkv + by,
            attended: self.attended + by,
            lse: self.lse + by,
            middle: self.middle + by,
            middle_rstd: self.middle_rstd + by,
            gate_up: self.gate_up + by,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen2.5-0.5B.
    fn spec() -> ModelSpec {
        ModelSpec {
            family: crate::spec::Family::Qwen2,
            vocab_size: 151_936,
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            num_key_value_heads: 2,
            head_dim: 64,
            max_position_embeddings: 1024,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            rope_scaling: None,
            tie_word_embeddings: true,
            qkv_bias: true,
            o_bias: false,
            qk_norm: false,
        }
    }

    fn sizes(tokens: usize, kept: Kept) -> Sizes {
        Sizes {
            tokens,
            kept,
            rank: 0,
            multiprocessors: 132,
        }
    }

    #[test]
    fn a_token_costs_what_its_regions_take() {
        let bytes = |tokens, kept| Arena::new(&spec(), &sizes(tokens, kept)).bytes;
        let each = |kept| (bytes(8192, kept) - bytes(6144, kept)) / 2048;
        // before, rstd, qkv, attended, lse, middle, rstd, gate_up.
        let trace = 1792 + 4 + 2304 + 1792 + 56 + 1792 + 4 + 19_456;
        let heads = 2 * (2 * 1792 + 16);
        let work = 3584 + 2 * 1792 + 9728;
        // dx, dx16, dqkv, dkv, dattended, row_dots; dkv: one part from 12,672 tokens on, and below no less.
        let backward = 3584 + 1792 + 2304 + 1792 + 56;
        assert_eq!(each(Kept::Nothing), trace + heads + work);
        for recomputed in [24, 7, 0] {
            assert_eq!(
                each(Kept::AllBut(recomputed)),
                (25 - recomputed) * trace + recomputed * 3584 + heads + work + backward
            );
        }
        assert_eq!(each(Kept::INPUTS), each(Kept::AllBut(24)));
    }

    #[test]
    fn the_first_layers_are_made_again_and_the_others_have_traces_of_their_own() {
        let arena = Arena::new(&spec(), &sizes(300, Kept::AllBut(7)));
        assert_eq!(arena.inputs.len(), 7);
        assert!((0..7).all(|layer| arena.kept(layer).is_none()));
        let mut starts: Vec<u64> = (7..24).map(|l| arena.kept(l).unwrap().before).collect();
        starts.push(arena.shared().before);
        assert_eq!(starts.len(), 18);
        assert!(starts.is_sorted_by(|a, b| a < b));
        let nothing = Arena::new(&spec(), &sizes(300, Kept::Nothing));
        assert!((0..24).all(|layer| nothing.kept(layer).is_none()));
    }

    #[test]
    fn regions_do_not_overlap_and_keep_their_alignment() {
        for kept in [
            Kept::Nothing,
            Kept::INPUTS,
            Kept::AllBut(5),
            Kept::ACTIVATIONS,
        ] {
            let arena = Arena::new(&spec(), &sizes(300, kept)).at(4096);
            let mut starts: Vec<u64> = arena.traces.iter().map(|t| t.before).collect();
            starts.extend(arena.traces.iter().map(|t| t.gate_up));
            starts.extend(&arena.inputs);
            starts.extend(arena.heads.iter().flat_map(|h| [h.saved, h.normed, h.lse]));
            starts.extend([
                arena.x,
                arena.h,
                arena.delta,
                arena.act,
                arena.logits,
                arena.dlogits,
            ]);
            let distinct: std::collections::BTreeSet<u64> = starts.iter().copied().collect();
            assert_eq!(distinct.len(), starts.len(), "{kept:?}");
            assert!(
                starts
                    .iter()
                    .all(|start| start % 256 == 0 && *start >= 4096)
            );
            let end = arena.ones as usize + arena.chunk_rows * 4;
            assert_eq!(end.next_multiple_of(256), arena.bytes + 4096);
        }
    }

    #[test]
    fn a_chunk_of_logits_is_bounded_and_never_longer_than_the_pass() {
        let rows = |tokens| Arena::new(&spec(), &sizes(tokens, Kept::ACTIVATIONS)).chunk_rows;
        assert_eq!(rows(8192), 1152);
        assert_eq!(rows(2048), 512);
        assert_eq!(rows(100), 104);
    }

    #[test]
    fn few_tokens_are_divided_into_the_heads_of_a_group() {
        let spec = spec();
        assert_eq!(splits(&spec, 128, 132), 7);
        assert_eq!(splits(&spec, 3072, 132), 4);
        assert_eq!(splits(&spec, 8192, 132), 1);
        assert_eq!(splits(&spec, 24_576, 132), 1);
        // What the arena has room for.
        for tokens in [1, 100, 128, 129, 1000, 4096, 8192] {
            let rows = splits(&spec, tokens, 132) * tokens;
            let group = 7 * tokens;
            assert!(rows <= group.min(tokens.max(3 * 132 * 128 / 4)));
        }
    }
}
