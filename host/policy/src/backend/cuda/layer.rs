//! One layer of the decoder as a list of kernels, in two forms: with products of our own for few tokens, with cublasLt's for
//! many.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaBackend,
    forward::{Addresses, Matrix, PassArgs, Work},
    gemm::{Out, Shape},
    launch::{Projection, Skinny, SkinnyArgs},
    weights::Layer,
};
use crate::error::PolicyError;

/// What the kernels of a layer work on.
struct Run<'a> {
    index: usize,
    at: &'a Addresses,
    pass: &'a PassArgs,
    layer: Pointers,
    work: WorkPointers,
    /// Cache of the layer: keys and values.
    cache: (u64, u64),
    hidden: usize,
    q_dim: usize,
    qkv_width: usize,
    ff: usize,
    eps: f32,
}

impl Run<'_> {
    fn tokens(&self) -> usize {
        self.pass.counts.tokens
    }

    fn shape(&self, outputs: usize, inputs: usize) -> Shape {
        Shape {
            tokens: self.tokens(),
            outputs,
            inputs,
            out: Out::Bf16,
        }
    }

    fn product(&self, (w, x, norm, y): (u64, u64, u64, u64), n: usize, k: usize) -> SkinnyArgs {
        SkinnyArgs {
            w,
            x,
            norm,
            y,
            tokens: self.tokens(),
            outputs: n,
            inputs: k,
            eps: self.eps,
        }
    }
}

impl CudaBackend {
    /// Runs layer `index` on the residual stream. For many tokens it finds them normalised in `work.h` and leaves them there
    /// normalised for the next layer, or for the head.
    pub(super) fn run_layer(
        &mut self,
        index: usize,
        at: &Addresses,
        pass: &PassArgs,
        cache: (u64, u64),
    ) -> Result<(), PolicyError> {
        let spec = &self.spec;
        let run = Run {
            index,
            at,
            pass,
            layer: Pointers::of(&self.weights.layers[index], &self.gpu.stream),
            work: WorkPointers::of(&self.work, &self.gpu.stream),
            cache,
            hidden: spec.hidden_size,
            q_dim: spec.q_dim(),
            qkv_width: spec.q_dim() + 2 * spec.kv_dim(),
            ff: spec.intermediate_size,
            eps: spec.rms_norm_eps as f32,
        };
        match self.is_few(pass.counts.tokens) {
            true => self.few_tokens(&run),
            false => self.many_tokens(&run),
        }
    }

    fn few_tokens(&self, run: &Run<'_>) -> Result<(), PolicyError> {
        let (layer, work) = (&run.layer, &run.work);
        let (h, q, f) = (run.hidden, run.q_dim, run.ff);
        let from = (layer.qkv, work.x, layer.input_norm, work.qkv);
        let args = run.product(from, run.qkv_width, h);
        self.gpu.skinny(Skinny::Project, &args)?;
        self.attend(run)?;
        let args = run.product((layer.o, work.attended, 0, work.x), h, q);
        self.gpu.skinny(Skinny::Add, &args)?;
        let from = (layer.gate_up, work.x, layer.mlp_norm, work.act);
        self.gpu
            .skinny(Skinny::Swiglu, &run.product(from, 2 * f, h))?;
        let args = run.product((layer.down, work.act, 0, work.x), h, f);
        Ok(self.gpu.skinny(Skinny::Add, &args)?)
    }

    fn many_tokens(&mut self, run: &Run<'_>) -> Result<(), PolicyError> {
        let (layer, work, at) = (&run.layer, &run.work, Some(run.index));
        let (h, q, f, tokens) = (run.hidden, run.q_dim, run.ff, run.tokens());
        let wide = run.shape(run.qkv_width, h);
        self.matmul(run.pass, Matrix::Qkv(at), wide, work.h, work.qkv)?;
        self.attend(run)?;
        let o = run.shape(h, q);
        self.matmul(run.pass, Matrix::O(at), o, work.attended, work.delta)?;
        let norm = (work.x, work.delta, layer.mlp_norm, work.h);
        self.gpu.rms_norm(norm, 0, tokens, h, run.eps)?;
        let gate_up = run.shape(2 * f, h);
        self.matmul(run.pass, Matrix::GateUp(at), gate_up, work.h, work.gate_up)?;
        self.gpu.silu_mul(work.gate_up, work.act, tokens, f)?;
        let down = run.shape(h, f);
        self.matmul(run.pass, Matrix::Down(at), down, work.act, work.delta)?;
        let norm = (work.x, work.delta, self.norm_before(run.index + 1), work.h);
        Ok(self.gpu.rms_norm(norm, 0, tokens, h, run.eps)?)
    }

    /// From the projection to what attention makes of it.
    fn attend(&self, run: &Run<'_>) -> Result<(), PolicyError> {
        let (spec, work, pass) = (&self.spec, &run.work, run.pass);
        let projection = Projection {
            qkv: work.qkv,
            bias: run.layer.qkv_bias,
            q_norm: run.layer.q_norm,
            k_norm: run.layer.k_norm,
            rope: self.weights.rope.device_ptr(&self.gpu.stream).0,
            keys: run.cache.0,
            values: run.cache.1,
            q_heads: spec.num_attention_heads as i32,
            kv_heads: spec.num_key_value_heads as i32,
            dim: spec.head_dim as i32,
            eps: run.eps,
        };
        if !pass.decode {
            let places = run.at.places();
            self.gpu
                .qkv_rope_cache(&projection, &places, work.q, run.tokens())?;
        }
        let attention = run.at.attention(work, run.cache, spec, pass.splits);
        Ok(self
            .gpu
            .attention(&attention, &projection, pass.counts.tiles, pass.decode)?)
    }
}

/// Device addresses of a layer's weights; 0 for one it does not have.
struct Pointers {
    input_norm: u64,
    qkv: u64,
    qkv_bias: u64,
    q_norm: u64,
    k_norm: u64,
    o: u64,
    mlp_norm: u64,
    gate_up: u64,
    down: u64,
}

impl Pointers {
    fn of(layer: &Layer, stream: &Arc<CudaStream>) -> Self {
        let floats = |s: &CudaSlice<f32>| s.device_ptr(stream).0;
        let matrix = |s: &CudaSlice<bf16>| s.device_ptr(stream).0;
        let norms = layer.head_norms.as_ref();
        Self {
            input_norm: floats(&layer.input_norm),
            qkv: matrix(&layer.qkv),
            qkv_bias: layer.qkv_bias.as_ref().map_or(0, floats),
            q_norm: norms.map_or(0, |(q, _)| floats(q)),
            k_norm: norms.map_or(0, |(_, k)| floats(k)),
            o: matrix(&layer.o),
            mlp_norm: floats(&layer.mlp_norm),
            gate_up: matrix(&layer.gate_up),
            down: matrix(&layer.down),
        }
    }
}

/// Device addresses of the activations.
pub(super) struct WorkPointers {
    pub(super) x: u64,
    pub(super) h: u64,
    pub(super) qkv: u64,
    pub(super) q: u64,
    pub(super) attended: u64,
    pub(super) gate_up: u64,
    pub(super) act: u64,
    pub(super) delta: u64,
    pub(super) partial: u64,
    pub(super) tickets: u64,
}

impl WorkPointers {
    fn of(work: &Work, stream: &Arc<CudaStream>) -> Self {
        let matrix = |s: &CudaSlice<bf16>| s.device_ptr(stream).0;
        Self {
            x: work.x.device_ptr(stream).0,
            h: matrix(&work.h),
            qkv: matrix(&work.qkv),
            q: matrix(&work.q),
            attended: matrix(&work.attended),
            gate_up: matrix(&work.gate_up),
            act: matrix(&work.act),
            delta: matrix(&work.delta),
            partial: work.partial.device_ptr(stream).0,
            tickets: work.tickets.device_ptr(stream).0,
        }
    }
}
