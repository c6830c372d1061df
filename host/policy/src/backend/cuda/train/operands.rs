//! What the kernels of training work on: addresses and sizes.

/// `train_attention.cu`'s parameters, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Attention {
    pub(super) qkv: u64,
    pub(super) sequences: u64,
    pub(super) query_tiles: u64,
    pub(super) key_tiles: u64,
    pub(super) out: u64,
    pub(super) lse: u64,
    pub(super) dout: u64,
    pub(super) delta: u64,
    pub(super) dqkv: u64,
    pub(super) dkv: u64,
    pub(super) tokens: i32,
    pub(super) q_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) splits: i32,
    pub(super) scale: f32,
}

/// `train_rows.cu`'s `TrainProjection`, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Projection {
    pub(super) qkv: u64,
    pub(super) bias: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) rope: u64,
    pub(super) positions: u64,
    pub(super) tokens: i32,
    pub(super) q_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) dim: i32,
    pub(super) eps: f32,
}

/// Operands of a norm that keeps what its gradient needs; 0 for what there is not.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Norm {
    pub(super) x: u64,
    pub(super) delta: u64,
    pub(super) weight: u64,
    /// Rows of x to take.
    pub(super) rows: u64,
    pub(super) saved: u64,
    pub(super) out: u64,
    pub(super) rstd: u64,
}

/// Operands of its gradient.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NormBackward {
    pub(super) saved: u64,
    pub(super) rstd: u64,
    pub(super) weight: u64,
    pub(super) dout: u64,
    pub(super) dx: u64,
    pub(super) dx16: u64,
    pub(super) part: u64,
    /// Add to dx.
    pub(super) add: bool,
}

/// A chunk of logits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logits {
    pub(super) at: u64,
    pub(super) rows: usize,
    pub(super) vocab: usize,
    pub(super) stride: usize,
    pub(super) temperature: f32,
}

/// What is known of the scored tokens of a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scores {
    pub(super) targets: u64,
    pub(super) logp: u64,
    pub(super) entropy: u64,
    pub(super) lse: u64,
}

/// Soft targets of a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Soft {
    pub(super) ids: u64,
    pub(super) probabilities: u64,
    pub(super) weight: u64,
    pub(super) loss: u64,
    /// Targets of a row.
    pub(super) most: usize,
}

impl Logits {
    /// Vocabulary, stride and 1 over the temperature, as kernels take them.
    pub(super) fn sizes(&self) -> (i32, i32, f32) {
        (
            self.vocab as i32,
            self.stride as i32,
            1.0 / self.temperature,
        )
    }
}
