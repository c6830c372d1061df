//! The kernels as functions: grid and arguments of each launch, everything queued on the one stream.
//!
//! Addresses are plain numbers here, because a captured graph keeps them anyway. Who calls sees to it that they name
//! buffers of the shapes that the kernel's comment gives.

use cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg};

use super::{CudaError, device::Gpu};

/// `attention.cu`'s parameters, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) out: u64,
    pub(super) tile_sequence: u64,
    pub(super) tile_first: u64,
    pub(super) q_start: u64,
    pub(super) q_len: u64,
    pub(super) kv_len: u64,
    pub(super) tables: u64,
    pub(super) partial: u64,
    pub(super) tickets: u64,
    pub(super) table_width: i32,
    pub(super) q_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) splits: i32,
    pub(super) scale: f32,
}

// SAFETY: a C struct of plain numbers in the kernel's order.
unsafe impl DeviceRepr for Attention {}

/// Queues one kernel.
macro_rules! launch {
    ($gpu:expr, $kernel:expr, $grid:expr, $block:expr, $shared:expr, $($arg:expr),+ $(,)?) => {{
        let kernel: &CudaFunction = $kernel;
        let mut builder = $gpu.stream.launch_builder(kernel);
        $(builder.arg($arg);)+
        let config = LaunchConfig {
            grid_dim: $grid,
            block_dim: ($block, 1, 1),
            shared_mem_bytes: $shared,
        };
        // SAFETY: types and number of the arguments are those of the kernel; the addresses name live buffers of the
        // shapes it works on (file header).
        unsafe { builder.launch(config) }?;
        Ok(())
    }};
}

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

/// Operands of a product with few tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct SkinnyArgs {
    pub(super) w: u64,
    pub(super) x: u64,
    /// 0 where nothing is normalised.
    pub(super) norm: u64,
    pub(super) y: u64,
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) eps: f32,
}

/// Arguments of qkv.cu.
#[derive(Clone, Copy, Debug)]
pub(super) struct QkvArgs {
    pub(super) qkv: u64,
    pub(super) bias: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) rope: u64,
    pub(super) positions: u64,
    pub(super) sequences: u64,
    pub(super) tables: u64,
    pub(super) table_width: i32,
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) tokens: usize,
    pub(super) q_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) dim: i32,
    pub(super) eps: f32,
}

/// Arguments of sample.cu.
#[derive(Clone, Copy, Debug)]
pub(super) struct SampleArgs {
    pub(super) logits: u64,
    pub(super) temperature: u64,
    pub(super) uniform: u64,
    pub(super) token: u64,
    pub(super) logprob: u64,
    pub(super) step: u64,
    pub(super) stride: i32,
    pub(super) vocab: i32,
}

impl Gpu {
    pub(super) fn embed(
        &self,
        ids: u64,
        table: u64,
        x: u64,
        tokens: usize,
        hidden: usize,
    ) -> Result<(), CudaError> {
        let hidden = hidden as i32;
        launch!(
            self,
            &self.kernels.embed,
            (tokens as u32, 1, 1),
            256,
            0,
            &ids,
            &table,
            &x,
            &hidden
        )
    }

    /// `rows`: address of the rows to take, 0 for all in order.
    pub(super) fn rms_norm(
        &self,
        (x, weight, out): (u64, u64, u64),
        rows: u64,
        n: usize,
        hidden: usize,
        eps: f32,
    ) -> Result<(), CudaError> {
        let hidden = hidden as i32;
        let kernel = &self.kernels.rms_norm;
        launch!(
            self,
            kernel,
            (n as u32, 1, 1),
            256,
            0,
            &x,
            &weight,
            &out,
            &rows,
            &hidden,
            &eps
        )
    }

    pub(super) fn silu_mul(
        &self,
        gate_up: u64,
        out: u64,
        tokens: usize,
        width: usize,
    ) -> Result<(), CudaError> {
        let (half, total) = ((width / 2) as i32, (tokens * width / 2) as i32);
        let grid = (total as u32).div_ceil(256);
        launch!(
            self,
            &self.kernels.silu_mul,
            (grid, 1, 1),
            256,
            0,
            &gate_up,
            &out,
            &half,
            &total
        )
    }

    pub(super) fn qkv_rope_cache(&self, a: &QkvArgs) -> Result<(), CudaError> {
        let tokens = a.tokens as i32;
        let warps = tokens * (a.q_heads + 2 * a.kv_heads);
        let grid = (warps as u32).div_ceil(4);
        launch!(
            self,
            &self.kernels.qkv_rope_cache,
            (grid, 1, 1),
            128,
            0,
            &a.qkv,
            &a.bias,
            &a.q_norm,
            &a.k_norm,
            &a.rope,
            &a.positions,
            &a.sequences,
            &a.tables,
            &a.table_width,
            &a.q,
            &a.keys,
            &a.values,
            &tokens,
            &a.q_heads,
            &a.kv_heads,
            &a.dim,
            &a.eps,
        )
    }

    pub(super) fn attention(&self, args: &Attention, tiles: usize) -> Result<(), CudaError> {
        let grid = (tiles as u32, args.kv_heads as u32, args.splits as u32);
        launch!(self, &self.kernels.attention, grid, 128, 0, args)
    }

    pub(super) fn skinny(&self, kind: Skinny, a: &SkinnyArgs) -> Result<(), CudaError> {
        let kernels = &self.kernels;
        let (kernel, per_block) = match kind {
            Skinny::Project => (&kernels.skinny_qkv, 16),
            Skinny::Add => (&kernels.skinny_add, 16),
            Skinny::Swiglu => (&kernels.skinny_swiglu, 16),
            Skinny::Head => (&kernels.skinny_head, 128),
        };
        let shared = match kind {
            Skinny::Add => 0,
            _ => (8 * (a.inputs + 8) * 2) as u32,
        };
        let grid = (a.outputs as u32).div_ceil(per_block);
        let (tokens, n, k) = (a.tokens as i32, a.outputs as i32, a.inputs as i32);
        launch!(
            self,
            kernel,
            (grid, 1, 1),
            256,
            shared,
            &a.w,
            &a.x,
            &a.norm,
            &a.y,
            &tokens,
            &n,
            &k,
            &a.eps,
        )
    }

    pub(super) fn sample(&self, a: &SampleArgs, rows: usize) -> Result<(), CudaError> {
        let shared = (a.vocab as u32).div_ceil(512) * 12;
        launch!(
            self,
            &self.kernels.sample,
            (rows as u32, 1, 1),
            1024,
            shared,
            &a.logits,
            &a.temperature,
            &a.uniform,
            &a.token,
            &a.logprob,
            &a.step,
            &a.stride,
            &a.vocab,
        )
    }

    /// `fields`: addresses of ids, positions, kv_len, left, token, step.
    pub(super) fn advance(
        &self,
        fields: &[u64; 6],
        stride: i32,
        rows: usize,
    ) -> Result<(), CudaError> {
        let [ids, positions, kv_len, left, token, step] = fields;
        let count = rows as i32;
        let threads = (rows as u32).next_multiple_of(32);
        launch!(
            self,
            &self.kernels.advance,
            (1, 1, 1),
            threads,
            0,
            ids,
            positions,
            kv_len,
            left,
            token,
            step,
            &stride,
            &count,
        )
    }

    /// `pool`: all layers, keys and values, `layer_bytes` apart; `pairs`: address of `n` pairs.
    pub(super) fn copy_blocks(
        &self,
        pool: u64,
        pairs: u64,
        n: usize,
        (layers, layer_bytes, block_bytes): (usize, usize, usize),
    ) -> Result<(), CudaError> {
        let (layer_words, block_words) = ((layer_bytes / 16) as u64, (block_bytes / 16) as i32);
        let grid = (2 * layers as u32, n as u32, 1);
        launch!(
            self,
            &self.kernels.copy_blocks,
            grid,
            128,
            0,
            &pool,
            &pairs,
            &layer_words,
            &block_words
        )
    }
}
