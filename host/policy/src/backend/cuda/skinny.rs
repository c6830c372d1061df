//! Products with few tokens: skinny.cu on bf16 weights, quantized.cu on quantised ones.

use half::bf16;

use super::{
    CudaError,
    device::{Gpu, SHARED_BYTES},
    launch::{Launch, pointer},
    quantized::Stored,
};

/// Which of the products with few tokens (skinny.cu).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skinny {
    /// Norm, then a product to bf16.
    Project,
    /// Added to the residual stream.
    Add,
    /// Norm, product, SwiGLU.
    Swiglu,
    /// Norm, product to f32.
    Head,
}

impl Skinny {
    /// Outputs of a block are those of a warp, 16, or of each of its warps.
    fn launch(self, a: &SkinnyArgs) -> Launch {
        let (per_block, warps, shared) = match self {
            Self::Project => (16, 8, staged(a.inputs)),
            Self::Add => (16, 16, 0),
            Self::Swiglu => (16, 4, staged(a.inputs)),
            Self::Head => (128, 8, staged(a.inputs)),
        };
        Launch {
            shared,
            ..Launch::of(a.outputs.div_ceil(per_block), 32 * warps)
        }
    }
}

/// Operands of a product with few tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct SkinnyArgs {
    pub(super) w: Stored,
    pub(super) x: u64,
    /// 0 where nothing is normalised.
    pub(super) norm: u64,
    pub(super) y: u64,
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) eps: f32,
}

/// Bytes of shared memory for `inputs` inputs of 8 tokens, each with what keeps it out of the others' banks.
fn staged(inputs: usize) -> usize {
    8 * (inputs + 8) * size_of::<bf16>()
}

/// Whether a block can normalise inputs of this size.
pub(super) fn has_room_for(inputs: usize) -> bool {
    staged(inputs) <= SHARED_BYTES
}

impl Gpu {
    /// Queues a product of up to 8 tokens.
    pub(super) fn skinny(&self, kind: Skinny, a: &SkinnyArgs) -> Result<(), CudaError> {
        let (tokens, n, k) = (a.tokens as i32, a.outputs as i32, a.inputs as i32);
        let (address, scales, quantized) = match &a.w {
            Stored::Bf16(address) => (address, None, None),
            Stored::Quantized(w) => (&w.quants, Some(&w.scales), Some(w.bits)),
        };
        let (plain, width) = (&self.kernels, quantized.map(|bits| self.quantized.of(bits)));
        let kernel = match kind {
            Skinny::Project => width.map_or(&plain.skinny_qkv, |width| &width.project),
            Skinny::Add => width.map_or(&plain.skinny_add, |width| &width.add),
            Skinny::Swiglu => width.map_or(&plain.skinny_swiglu, |width| &width.swiglu),
            Skinny::Head => width.map_or(&plain.skinny_head, |width| &width.head),
        };
        let weights = [Some(address), scales].into_iter().flatten().map(pointer);
        let rest = [
            pointer(&a.x),
            pointer(&a.norm),
            pointer(&a.y),
            pointer(&tokens),
            pointer(&n),
            pointer(&k),
            pointer(&a.eps),
        ];
        let arguments: Vec<_> = weights.chain(rest).collect();
        self.queue(kernel, kind.launch(a), &arguments)
    }
}
