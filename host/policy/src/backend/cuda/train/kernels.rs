//! The kernels of training as functions: grid and arguments of each launch. Addresses are plain numbers, as in
//! [`super::super::launch`].

use std::path::Path;

use cudarc::driver::{CudaFunction, sys::CUfunction_attribute};

use super::{
    arena::{COLUMN_PARTS, PARTS},
    operands::{Attention, Logits, Norm, NormBackward, Projection, Scores, Soft},
    optimizer::{Moments, Update},
};
use crate::backend::cuda::{
    CudaError, compile,
    device::{self, Gpu},
    launch::{Launch, launch},
};

/// A kernel with its threads and bytes of shared memory.
struct Tiled {
    function: CudaFunction,
    threads: u32,
    shared: usize,
}

/// Every kernel by its name in the source, of the model's sizes.
pub(super) struct Kernels {
    attend: Tiled,
    attend_dq: Tiled,
    attend_dkv: Tiled,
    rms_norm: CudaFunction,
    rms_norm_again: CudaFunction,
    rms_norm_backward: CudaFunction,
    sum_parts: CudaFunction,
    column_sums: CudaFunction,
    swiglu_backward: CudaFunction,
    qkv_rope: CudaFunction,
    qkv_rope_backward: CudaFunction,
    qkv_rope_backward_normed: CudaFunction,
    scatter_rows: CudaFunction,
    score_logits: CudaFunction,
    logits_gradient: CudaFunction,
    distill_gradient: CudaFunction,
    sum_squares: CudaFunction,
    global_norm: CudaFunction,
    /// With moments of f32 and of bf16.
    adamw: [CudaFunction; 2],
    merge_adapter: CudaFunction,
    scale_rows: CudaFunction,
}

/// Bytes of shared memory of attention's three kernels (the end of train_attention.cu has the table).
fn shared_bytes(head_dim: usize, hopper: bool) -> [usize; 3] {
    match head_dim {
        32 => [24_576, 32_768, 33_792],
        64 => [49_152, 65_536, 66_560],
        96 => [73_728, 98_304, 99_328],
        _ if hopper => [98_304, 131_072, 132_096],
        _ => [98_304, 98_304, 98_816],
    }
}

fn blocks(grid: (usize, usize, usize), threads: u32) -> Launch {
    Launch {
        grid,
        ..Launch::of(1, threads)
    }
}

impl Kernels {
    /// Compiles what is not in the folder `cache`, for heads of `head_dim` and rows of `hidden`.
    pub(super) fn load(
        gpu: &Gpu,
        head_dim: usize,
        hidden: usize,
        cache: Option<&Path>,
    ) -> Result<Self, CudaError> {
        let context = gpu.stream.context();
        let modules = device::load(context, &compile::TRAINING_SOURCES, cache)?;
        let get = |name: &str| device::function(&modules, name);
        let tiled = |kind: &str, shared: usize| -> Result<Tiled, CudaError> {
            let function = device::roomy(&modules, &format!("{kind}_{head_dim}"), shared)?;
            let threads = function
                .get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?
                as u32;
            Ok(Tiled {
                function,
                threads,
                shared,
            })
        };
        let hopper = context.compute_capability()?.0 == 9;
        let [attend, dq, dkv] = shared_bytes(head_dim, hopper);
        let width = hidden.div_ceil(1024).next_power_of_two();
        Ok(Self {
            attend: tiled("attend", attend)?,
            attend_dq: tiled("attend_dq", dq)?,
            attend_dkv: tiled("attend_dkv", dkv)?,
            rms_norm: get(&format!("rms_norm_save_{width}"))?,
            rms_norm_again: get("rms_norm_again")?,
            rms_norm_backward: get(&format!("rms_norm_backward_{width}"))?,
            sum_parts: get("sum_parts")?,
            column_sums: get("column_sums")?,
            swiglu_backward: get("swiglu_backward")?,
            qkv_rope: get("qkv_rope")?,
            qkv_rope_backward: get("qkv_rope_backward")?,
            qkv_rope_backward_normed: get("qkv_rope_backward_normed")?,
            scatter_rows: get("scatter_rows")?,
            score_logits: get("score_logits")?,
            logits_gradient: get("logits_gradient")?,
            distill_gradient: get("distill_gradient")?,
            sum_squares: get("sum_squares")?,
            global_norm: get("global_norm")?,
            adamw: [get("adamw_f32_f32")?, get("adamw_bf16_f32")?],
            merge_adapter: get("merge_adapter")?,
            scale_rows: get("scale_rows")?,
        })
    }

    /// `out` and `lse`.
    pub(super) fn attend(&self, gpu: &Gpu, a: &Attention, tiles: usize) -> Result<(), CudaError> {
        self.attend.queue(gpu, a, a.q_heads as usize, tiles)
    }

    /// `delta`, the queries' part of `dqkv`, and `dkv`.
    pub(super) fn attend_backward(
        &self,
        gpu: &Gpu,
        a: &Attention,
        (query_tiles, key_tiles): (usize, usize),
    ) -> Result<(), CudaError> {
        let (q_heads, kv_heads) = (a.q_heads as usize, (a.kv_heads * a.splits) as usize);
        self.attend_dq.queue(gpu, a, q_heads, query_tiles)?;
        self.attend_dkv.queue(gpu, a, kv_heads, key_tiles)
    }

    pub(super) fn rms_norm(
        &self,
        gpu: &Gpu,
        n: &Norm,
        (rows, hidden): (usize, usize),
        eps: f32,
    ) -> Result<(), CudaError> {
        let launch = blocks((rows, 1, 1), 256);
        let hidden = hidden as i32;
        let kernel = &self.rms_norm;
        launch!(
            gpu, kernel, launch, &n.x, &n.delta, &n.weight, &n.rows, &n.saved, &n.out, &n.rstd,
            &hidden, &eps
        )
    }

    pub(super) fn rms_norm_again(
        &self,
        gpu: &Gpu,
        n: &Norm,
        (rows, hidden): (usize, usize),
    ) -> Result<(), CudaError> {
        let launch = blocks((rows, 1, 1), 256);
        let hidden = hidden as i32;
        let kernel = &self.rms_norm_again;
        launch!(
            gpu, kernel, launch, &n.saved, &n.rstd, &n.weight, &n.out, &hidden
        )
    }

    /// Leaves [`PARTS`] parts of the weight's gradient where there is a place for them.
    pub(super) fn rms_norm_backward(
        &self,
        gpu: &Gpu,
        n: &NormBackward,
        (rows, hidden): (usize, usize),
    ) -> Result<(), CudaError> {
        let launch = blocks((PARTS, 1, 1), 256);
        let (rows, hidden, add) = (rows as i32, hidden as i32, i32::from(n.add));
        let kernel = &self.rms_norm_backward;
        launch!(
            gpu, kernel, launch, &n.saved, &n.rstd, &n.weight, &n.dout, &n.dx, &n.dx16, &n.part,
            &rows, &hidden, &add
        )
    }

    /// `n` parts of `columns` numbers each, to or, with `add`, onto `to`.
    pub(super) fn sum_parts(
        &self,
        gpu: &Gpu,
        (parts, to): (u64, u64),
        (n, columns): (usize, usize),
        add: bool,
    ) -> Result<(), CudaError> {
        let launch = blocks((columns.div_ceil(32), 1, 1), 256);
        let (n, columns, add) = (n as i32, columns as i32, i32::from(add));
        let kernel = &self.sum_parts;
        launch!(gpu, kernel, launch, &parts, &to, &n, &columns, &add)
    }

    /// Leaves [`COLUMN_PARTS`] parts.
    pub(super) fn column_sums(
        &self,
        gpu: &Gpu,
        (x, parts): (u64, u64),
        (rows, columns): (usize, usize),
    ) -> Result<(), CudaError> {
        let launch = blocks((columns.div_ceil(256), COLUMN_PARTS, 1), 256);
        let (rows, columns) = (rows as i32, columns as i32);
        let kernel = &self.column_sums;
        launch!(gpu, kernel, launch, &x, &parts, &rows, &columns, &columns)
    }

    /// `[gate_up, dact, dgate_up, act]`.
    pub(super) fn swiglu_backward(
        &self,
        gpu: &Gpu,
        [gate_up, dact, dgate_up, act]: [u64; 4],
        (tokens, width): (usize, usize),
    ) -> Result<(), CudaError> {
        let launch = blocks(((tokens * width / 8).div_ceil(256), 1, 1), 256);
        let (eighth, tokens) = ((width / 8) as i32, tokens as i32);
        let kernel = &self.swiglu_backward;
        launch!(
            gpu, kernel, launch, &gate_up, &dact, &dgate_up, &act, &eighth, &tokens
        )
    }

    pub(super) fn qkv_rope(&self, gpu: &Gpu, p: &Projection, to: u64) -> Result<(), CudaError> {
        let launch = blocks((8 * gpu.multiprocessors, 1, 1), 256);
        launch!(gpu, &self.qkv_rope, launch, p, &to)
    }

    /// Leaves [`PARTS`] parts of the gradients of the norms at `part`, where the heads have norms.
    pub(super) fn qkv_rope_backward(
        &self,
        gpu: &Gpu,
        p: &Projection,
        (dqkv, dkv, part): (u64, u64, u64),
        splits: usize,
    ) -> Result<(), CudaError> {
        let splits = splits as i32;
        if p.q_norm == 0 {
            let launch = blocks((8 * gpu.multiprocessors, 1, 1), 256);
            let kernel = &self.qkv_rope_backward;
            return launch!(gpu, kernel, launch, p, &dqkv, &dkv, &splits);
        }
        let kernel = &self.qkv_rope_backward_normed;
        let launch = blocks((PARTS, 1, 1), 256);
        launch!(gpu, kernel, launch, p, &dqkv, &dkv, &splits, &part)
    }

    /// `[ids, starts, rows]` of `lists` lists, some of which may be `long`.
    pub(super) fn scatter_rows(
        &self,
        gpu: &Gpu,
        [ids, starts, rows]: [u64; 3],
        (from, to): (u64, u64),
        (lists, hidden): (usize, usize),
        long: bool,
    ) -> Result<(), CudaError> {
        let columns = if long { hidden.div_ceil(128) } else { 1 };
        let launch = blocks((lists, columns, 1), 256);
        let hidden = hidden as i32;
        let kernel = &self.scatter_rows;
        launch!(
            gpu, kernel, launch, &ids, &starts, &rows, &from, &to, &hidden
        )
    }

    pub(super) fn score_logits(&self, gpu: &Gpu, l: &Logits, s: &Scores) -> Result<(), CudaError> {
        let (vocab, stride, inverse) = l.sizes();
        let kernel = &self.score_logits;
        launch!(
            gpu,
            kernel,
            blocks((l.rows, 1, 1), 512),
            &l.at,
            &s.targets,
            &s.logp,
            &s.entropy,
            &s.lse,
            &vocab,
            &stride,
            &inverse
        )
    }

    pub(super) fn logits_gradient(
        &self,
        gpu: &Gpu,
        l: &Logits,
        s: &Scores,
        (coefficients, dlogits): (u64, u64),
    ) -> Result<(), CudaError> {
        let (vocab, stride, inverse) = l.sizes();
        let of_entropy = 0u64;
        let kernel = &self.logits_gradient;
        launch!(
            gpu,
            kernel,
            blocks((l.rows, 1, 1), 512),
            &l.at,
            &s.targets,
            &s.lse,
            &s.entropy,
            &coefficients,
            &of_entropy,
            &dlogits,
            &vocab,
            &stride,
            &inverse
        )
    }

    pub(super) fn distill_gradient(
        &self,
        gpu: &Gpu,
        l: &Logits,
        s: &Soft,
        dlogits: u64,
    ) -> Result<(), CudaError> {
        let (vocab, stride, inverse) = l.sizes();
        let most = s.most as i32;
        let kernel = &self.distill_gradient;
        launch!(
            gpu,
            kernel,
            blocks((l.rows, 1, 1), 512),
            &l.at,
            &s.ids,
            &s.probabilities,
            &s.weight,
            &s.loss,
            &dlogits,
            &most,
            &vocab,
            &stride,
            &inverse
        )
    }

    /// Sums of squares of the gradients' chunks, and from them `norm`: the norm, and what to multiply gradients by.
    pub(super) fn global_norm(
        &self,
        gpu: &Gpu,
        u: &Update,
        max_norm: f32,
    ) -> Result<(), CudaError> {
        let launch = blocks((u.chunks, 1, 1), 256);
        let kernel = &self.sum_squares;
        launch!(gpu, kernel, launch, &u.tensors, &u.table, &u.parts)?;
        let (n, scale) = (u.chunks as i32, 1f32);
        let launch = blocks((1, 1, 1), 1024);
        let kernel = &self.global_norm;
        launch!(
            gpu, kernel, launch, &u.parts, &u.norm, &n, &scale, &max_norm
        )
    }

    pub(super) fn adamw(&self, gpu: &Gpu, u: &Update, moments: Moments) -> Result<(), CudaError> {
        let launch = blocks((u.chunks, 1, 1), 256);
        let kernel = &self.adamw[moments as usize];
        launch!(
            gpu,
            kernel,
            launch,
            &u.tensors,
            &u.table,
            &u.norm,
            &u.constants
        )
    }

    /// `to[r] = scale[r] · from[r]`.
    pub(super) fn scale_rows(
        &self,
        gpu: &Gpu,
        [from, scale, to]: [u64; 3],
        (rows, hidden): (usize, usize),
    ) -> Result<(), CudaError> {
        let launch = blocks((rows, 1, 1), 256);
        let hidden = hidden as i32;
        launch!(gpu, &self.scale_rows, launch, &from, &scale, &to, &hidden)
    }

    /// `n` numbers, the first being number `first` of its matrix.
    pub(super) fn merge_adapter(
        &self,
        gpu: &Gpu,
        [base, update, merged]: [u64; 3],
        (first, n): (usize, usize),
    ) -> Result<(), CudaError> {
        let launch = blocks((8 * gpu.multiprocessors, 1, 1), 256);
        let (first, n) = (first as u64, n as u64);
        let kernel = &self.merge_adapter;
        launch!(gpu, kernel, launch, &base, &update, &merged, &first, &n)
    }
}

impl Tiled {
    fn queue(&self, gpu: &Gpu, a: &Attention, heads: usize, tiles: usize) -> Result<(), CudaError> {
        let launch = Launch {
            shared: self.shared,
            ..blocks((heads, tiles, 1), self.threads)
        };
        launch!(gpu, &self.function, launch, a)
    }
}
