//! One layer of the decoder as a list of kernels, in three forms: with products of our own for a few tokens (skinny.cu) and, on
//! Hopper, for up to some hundred (hopper.cu), with cublasLt's for many.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaBackend,
    forward::{Addresses, Matrix, PassArgs, Path, Work},
    gemm::{Out, Shape},
    launch::Projection,
    lora::LayerMatrix,
    parts::Part,
    product::{self, Form, ProductArgs},
    quantized::Stored,
    skinny::{Skinny, SkinnyArgs},
    weights::Layer,
};
use crate::error::PolicyError;

/// What the kernels of a layer work on.
struct Run<'a> {
    index: usize,
    at: &'a Addresses,
    pass: &'a PassArgs,
    layer: Pointers<Stored>,
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
            stride: outputs,
            out: Out::Bf16,
        }
    }

    fn args(&self, stride: usize, n: usize, k: usize) -> ProductArgs {
        ProductArgs {
            stride: stride as i32,
            tokens: self.tokens() as i32,
            n: n as i32,
            k: k as i32,
            eps: self.eps,
            ..ProductArgs::default()
        }
    }

    fn skinny(&self, (w, x, norm, y): (Stored, u64, u64, u64), n: usize, k: usize) -> SkinnyArgs {
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
        match self.path(pass.counts.tokens) {
            Path::Skinny => self.few_tokens(&run),
            Path::Products => self.some_tokens(&run),
            Path::Library => self.many_tokens(&run),
        }
    }

    /// The residual stream comes as [`super::product`] wants it, in `work.h` and `work.sums`, and is left so.
    fn some_tokens(&self, run: &Run<'_>) -> Result<(), PolicyError> {
        let (layer, work, maps) = (&run.layer, &run.work, self.maps()?);
        let (h, q, f) = (run.hidden, run.q_dim, run.ff);
        let of = &maps.layers[run.index];
        let tiles = product::row_tiles(h) as i32;
        // The embedding writes one sum of a token, the layers after it one for each of their tiles.
        let tiles_in = if run.index == 0 { 1 } else { tiles };
        let scaled = |y: u64, n: usize, tiles_in: i32| ProductArgs {
            y,
            sums_in: work.sums,
            tiles_in,
            ..run.args(self.work.max_tokens, n, h)
        };
        let added = |norm: u64, k: usize| ProductArgs {
            y: work.h,
            x: work.x,
            norm,
            sums_out: work.sums,
            ..run.args(self.work.max_tokens, h, k)
        };
        let args = scaled(work.qkv, run.qkv_width, tiles_in);
        self.gpu.filter.enter(Part::Qkv);
        self.as_bf16(layer.qkv)?;
        self.product(Form::Store, &of.qkv, &maps.h, &args)?;
        self.attend(run)?;
        let args = added(layer.mlp_norm, q);
        self.gpu.filter.enter(Part::O);
        self.as_bf16(layer.o)?;
        self.product(Form::Residual, &of.o, &maps.attended, &args)?;
        let args = scaled(work.act, 2 * f, tiles);
        self.gpu.filter.enter(Part::GateUp);
        self.as_bf16(layer.gate_up)?;
        self.product(Form::Swiglu, &of.gate_up, &maps.h, &args)?;
        let args = added(self.norm_before(run.index + 1), f);
        self.gpu.filter.enter(Part::Down);
        self.as_bf16(layer.down)?;
        Ok(self.product(Form::Residual, &of.down, &maps.act, &args)?)
    }

    fn few_tokens(&self, run: &Run<'_>) -> Result<(), PolicyError> {
        let (layer, work) = (&run.layer, &run.work);
        let (h, q, f) = (run.hidden, run.q_dim, run.ff);
        let from = (layer.qkv, work.x, layer.input_norm, work.qkv);
        let args = run.skinny(from, run.qkv_width, h);
        self.gpu.filter.enter(Part::Qkv);
        self.gpu.skinny(Skinny::Project, &args)?;
        self.attend(run)?;
        let args = run.skinny((layer.o, work.attended, 0, work.x), h, q);
        self.gpu.filter.enter(Part::O);
        self.gpu.skinny(Skinny::Add, &args)?;
        let from = (layer.gate_up, work.x, layer.mlp_norm, work.act);
        self.gpu.filter.enter(Part::GateUp);
        self.gpu
            .skinny(Skinny::Swiglu, &run.skinny(from, 2 * f, h))?;
        let args = run.skinny((layer.down, work.act, 0, work.x), h, f);
        self.gpu.filter.enter(Part::Down);
        Ok(self.gpu.skinny(Skinny::Add, &args)?)
    }

    fn many_tokens(&mut self, run: &Run<'_>) -> Result<(), PolicyError> {
        let (layer, work, at) = (&run.layer, &run.work, Some(run.index));
        let (h, q, f, tokens) = (run.hidden, run.q_dim, run.ff, run.tokens());
        let wide = run.shape(run.qkv_width, h);
        self.gpu.filter.enter(Part::Qkv);
        self.matmul(run.pass, Matrix::Qkv(at), wide, work.h, work.qkv)?;
        let of = (run.index, LayerMatrix::Qkv);
        self.adapt(of, tokens, (work.h, work.qkv))?;
        self.attend(run)?;
        let o = run.shape(h, q);
        self.gpu.filter.enter(Part::O);
        self.matmul(run.pass, Matrix::O(at), o, work.attended, work.delta)?;
        let of = (run.index, LayerMatrix::O);
        self.adapt(of, tokens, (work.attended, work.delta))?;
        let norm = (work.x, work.delta, layer.mlp_norm, work.h);
        self.gpu.filter.enter(Part::Norm);
        self.gpu.rms_norm(norm, 0, tokens, h, run.eps)?;
        let gate_up = run.shape(2 * f, h);
        self.gpu.filter.enter(Part::GateUp);
        self.matmul(run.pass, Matrix::GateUp(at), gate_up, work.h, work.gate_up)?;
        let of = (run.index, LayerMatrix::GateUp);
        self.adapt(of, tokens, (work.h, work.gate_up))?;
        self.gpu.filter.enter(Part::Swiglu);
        self.gpu.silu_mul(work.gate_up, work.act, tokens, f)?;
        let down = run.shape(h, f);
        self.gpu.filter.enter(Part::Down);
        self.matmul(run.pass, Matrix::Down(at), down, work.act, work.delta)?;
        let of = (run.index, LayerMatrix::Down);
        self.adapt(of, tokens, (work.act, work.delta))?;
        let norm = (work.x, work.delta, self.norm_before(run.index + 1), work.h);
        self.gpu.filter.enter(Part::Norm);
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
        let attention = run.at.attention(work, run.cache, spec, pass.splits);
        // One kernel for all passes makes the same sums in all of them.
        self.gpu.filter.enter(Part::Attention);
        if pass.decode && !self.deterministic {
            let (gpu, tokens) = (&self.gpu, run.tokens());
            let queued = match pass.siblings {
                Some(grid) => gpu.decode_group(&attention, &projection, grid),
                None => gpu.decode(&attention, &projection, tokens),
            };
            return Ok(queued?);
        }
        self.gpu.filter.enter(Part::Rope);
        let places = run.at.places();
        self.gpu
            .qkv_rope_cache(&projection, &places, work.q, run.tokens())?;
        self.gpu.filter.enter(Part::Attention);
        Ok(self.gpu.attention(&attention, pass.counts.tiles)?)
    }
}

/// Where a layer's weights lie, with addresses of matrices as `M`; 0 for one it does not have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointers<M> {
    pub(super) input_norm: u64,
    pub(super) qkv: M,
    pub(super) qkv_bias: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) o: M,
    pub(super) mlp_norm: u64,
    pub(super) gate_up: M,
    pub(super) down: M,
}

impl Pointers<Stored> {
    pub(super) fn of(layer: &Layer, stream: &Arc<CudaStream>) -> Self {
        let floats = |s: &CudaSlice<f32>| s.device_ptr(stream).0;
        let norms = layer.head_norms.as_ref();
        let k_norm = |norms: &CudaSlice<f32>| floats(norms) + 2 * norms.len() as u64;
        Self {
            input_norm: floats(&layer.input_norm),
            qkv: layer.qkv.at(stream),
            qkv_bias: layer.qkv_bias.as_ref().map_or(0, floats),
            q_norm: norms.map_or(0, floats),
            k_norm: norms.map_or(0, k_norm),
            o: layer.o.at(stream),
            mlp_norm: floats(&layer.mlp_norm),
            gate_up: layer.gate_up.at(stream),
            down: layer.down.at(stream),
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
    pub(super) sums: u64,
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
            sums: work.sums.device_ptr(stream).0,
            partial: work.partial.device_ptr(stream).0,
            tickets: work.tickets.device_ptr(stream).0,
        }
    }
}
