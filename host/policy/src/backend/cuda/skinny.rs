//! Products with few tokens: skinny.cu on bf16 weights, quantized.cu on quantised ones.

use half::bf16;

use super::{
    CudaError,
    device::Gpu,
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
        let (per_block, warps, normed) = match self {
            Self::Project => (16, 8, 8),
            Self::Add => (16, 16, 0),
            Self::Swiglu => (16, 4, 8),
            Self::Head => (128, 8, 8),
        };
        Launch {
            shared: normed * (a.inputs + 8) * 2,
            ..Launch::of(a.outputs.div_ceil(per_block), 32 * warps)
        }
    }

    /// Bytes of a token in x and in y.
    fn token_bytes(self, a: &SkinnyArgs) -> (usize, usize) {
        let (wide, narrow) = (size_of::<f32>(), size_of::<bf16>());
        match self {
            Self::Project => (wide * a.inputs, narrow * a.outputs),
            Self::Add => (narrow * a.inputs, wide * a.outputs),
            Self::Swiglu => (wide * a.inputs, narrow * a.outputs / 2),
            Self::Head => (wide * a.inputs, wide * a.outputs),
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

/// Tokens that the kernels take at once.
const TOGETHER: usize = 8;

impl Gpu {
    /// Queues a product. More than 8 tokens read the weights several times.
    pub(super) fn skinny(&self, kind: Skinny, a: &SkinnyArgs) -> Result<(), CudaError> {
        let (of_x, of_y) = kind.token_bytes(a);
        for first in (0..a.tokens).step_by(TOGETHER) {
            let part = SkinnyArgs {
                x: a.x + (first * of_x) as u64,
                y: a.y + (first * of_y) as u64,
                tokens: TOGETHER.min(a.tokens - first),
                ..*a
            };
            self.skinny_part(kind, &part)?;
        }
        Ok(())
    }

    fn skinny_part(&self, kind: Skinny, a: &SkinnyArgs) -> Result<(), CudaError> {
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
