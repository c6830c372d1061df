//! The packed forward pass, layer by layer, leaving in each layer's trace what its backward pass reads.

use cudarc::driver::{CudaSlice, DevicePtr};

use super::{
    ModelAt, On, Training,
    arena::{Kept, Trace, splits},
    clock::Kind,
    head::Scored,
    operands::{Attention, Norm, Projection},
    tables::{Field, Tables},
};
use crate::{
    backend::{
        Pass,
        cuda::{
            CudaError,
            gemm::{Factor, product},
            lora::LayerMatrix,
            quantized::Stored,
        },
    },
    error::PolicyError,
    types::PackedBatch,
};

/// One pass over a batch.
pub(super) struct Run {
    pub(super) tables: Tables,
    /// Owns what `base` names.
    _words: CudaSlice<i32>,
    base: u64,
    pub(super) model: ModelAt,
    /// Whether a backward pass follows.
    pub(super) trains: bool,
    /// Whether adapters that are not merged take part.
    pub(super) adapters: bool,
}

impl Run {
    /// Address of a table.
    pub(super) fn at(&self, field: Field) -> u64 {
        self.base + self.tables.offset(field)
    }

    pub(super) fn tokens(&self) -> usize {
        self.tables.tokens
    }
}

impl Training {
    /// Uploads the tables of a batch that has passed its checks.
    pub(super) fn begin(
        &mut self,
        on: On<'_>,
        batch: &PackedBatch,
        pass: Pass,
    ) -> Result<Run, CudaError> {
        self.reserve(on, batch.ids.len())?;
        let tables = Tables::new(batch);
        let words = on.gpu.stream.clone_htod(&tables.words)?;
        self.passes += 1;
        let base = words.device_ptr(&on.gpu.stream).0;
        Ok(Run {
            base,
            _words: words,
            tables,
            model: self.model(on, pass),
            trains: pass == Pass::Train && self.sizes.kept != Kept::Nothing,
            adapters: pass != Pass::Reference,
        })
    }

    /// All layers, and the normalised hidden states of the tokens that predict scored ones.
    pub(super) fn forward_batch(
        &mut self,
        on: On<'_>,
        batch: &PackedBatch,
        temperature: f32,
        pass: Pass,
    ) -> Result<(Run, Scored), PolicyError> {
        if pass == Pass::Train {
            self.saved = None;
        }
        let run = self.begin(on, batch, pass)?;
        self.clock.turn(false);
        self.forward(on, &run, on.spec.num_hidden_layers)?;
        let scored = Scored {
            rows: run.tables.scored,
            temperature,
            at: self.arena.heads[usize::from(pass != Pass::Train)],
            pass: self.passes,
            differentiated: run.trains && matches!(self.mode, super::Mode::Lora(_)),
        };
        self.normalise(on, &run, &scored)?;
        Ok((run, scored))
    }

    /// The first `layers` layers; the residual stream behind them is left in `arena.x`.
    pub(super) fn forward(
        &mut self,
        on: On<'_>,
        run: &Run,
        layers: usize,
    ) -> Result<(), CudaError> {
        let (t, h) = (run.tokens(), on.spec.hidden_size);
        let x = self.arena.x;
        self.clock.enter(on.gpu, Kind::Embedding)?;
        let (ids, table) = match run.model.embed {
            Stored::Bf16(table) => (run.at(Field::Ids), table),
            Stored::Quantized(blocks) => {
                // Nothing is to be added to the stream yet.
                let rows = self.arena.delta;
                let from = run.at(Field::Ids);
                on.gpu.unpack_rows(blocks, (from, rows), t, h)?;
                (0, rows)
            }
        };
        on.gpu.embed(ids, table, x, t, h)?;
        for layer in 0..layers {
            let kept = self.arena.kept(layer).filter(|_| run.trains);
            let trace = kept.unwrap_or(self.arena.shared());
            let delta = if layer == 0 { 0 } else { self.arena.delta };
            let again = run.trains && kept.is_none();
            self.layer(on, run, layer, (trace, delta, again))?;
        }
        let last = Norm {
            x,
            delta: self.arena.delta,
            weight: run.model.norm,
            out: self.arena.h,
            rstd: self.arena.heads[1].lse,
            ..Norm::default()
        };
        self.norm(on, &last, t)
    }

    /// One layer, from the residual stream and what is still to be added to it; what it adds is left in `arena.delta`.
    /// `keep`: its input is wanted again.
    pub(super) fn layer(
        &mut self,
        on: On<'_>,
        run: &Run,
        layer: usize,
        (trace, delta, keep): (Trace, u64, bool),
    ) -> Result<(), CudaError> {
        let (spec, at, t) = (on.spec, run.model.layers[layer], run.tokens());
        let (h, f) = (spec.hidden_size, spec.intermediate_size);
        let arena = &self.arena;
        let (x, normed, out, act) = (arena.x, arena.h, arena.delta, arena.act);
        let before = Norm {
            x,
            delta,
            weight: at.input_norm,
            saved: trace.before,
            out: normed,
            rstd: trace.before_rstd,
            ..Norm::default()
        };
        self.norm(on, &before, t)?;
        if keep {
            let bytes = t * h * size_of::<f32>();
            on.gpu.copy(x, self.arena.inputs[layer], bytes)?;
        }
        self.apply(on, run, (layer, LayerMatrix::Qkv), (normed, trace.qkv))?;
        let rotated = self.rotate(on, run, layer, &trace)?;
        let attention = self.attention(on, run, &trace, rotated);
        self.clock.enter(on.gpu, Kind::Attention)?;
        self.kernels
            .attend(on.gpu, &attention, run.tables.query_tiles)?;
        self.apply(on, run, (layer, LayerMatrix::O), (trace.attended, out))?;
        let middle = Norm {
            x,
            delta: out,
            weight: at.mlp_norm,
            saved: trace.middle,
            out: normed,
            rstd: trace.middle_rstd,
            ..Norm::default()
        };
        self.norm(on, &middle, t)?;
        let to = (normed, trace.gate_up);
        self.apply(on, run, (layer, LayerMatrix::GateUp), to)?;
        self.clock.enter(on.gpu, Kind::Swiglu)?;
        on.gpu.silu_mul(trace.gate_up, act, t, f)?;
        self.apply(on, run, (layer, LayerMatrix::Down), (act, out))
    }

    /// `y = x · Wᵀ` of a layer's matrix, and what its adapters add where they are not merged.
    fn apply(
        &mut self,
        on: On<'_>,
        run: &Run,
        (layer, matrix): (usize, LayerMatrix),
        (x, y): (u64, u64),
    ) -> Result<(), CudaError> {
        let (outputs, inputs) = matrix.sizes(on.spec);
        self.clock.enter(on.gpu, Kind::Products)?;
        let w = self.dense(on, matrix.of(&run.model.layers[layer]))?;
        self.project(on, (x, w, y), (run.tokens(), outputs, inputs))?;
        let Self {
            mode,
            gemm,
            arena,
            clock,
            ..
        } = self;
        match mode.beside(layer, matrix).filter(|_| run.adapters) {
            Some(adapter) => {
                clock.enter(on.gpu, Kind::Adapters)?;
                adapter.add(gemm, run.tokens(), (x, arena.low, y))
            }
            None => Ok(()),
        }
    }

    pub(super) fn norm(&self, on: On<'_>, norm: &Norm, rows: usize) -> Result<(), CudaError> {
        self.clock.enter(on.gpu, Kind::Norms)?;
        let (hidden, eps) = (on.spec.hidden_size, on.spec.rms_norm_eps as f32);
        self.kernels.rms_norm(on.gpu, norm, (rows, hidden), eps)
    }

    /// `y[rows, outputs] = x[rows, inputs] · w[outputs, inputs]ᵀ`, all bf16.
    pub(super) fn project(
        &mut self,
        on: On<'_>,
        (x, w, y): (u64, u64, u64),
        (rows, outputs, inputs): (usize, usize, usize),
    ) -> Result<(), CudaError> {
        self.clock.enter(on.gpu, Kind::Products)?;
        let product = product(
            (rows, outputs, inputs),
            Factor::plain(inputs),
            Factor::transposed(inputs),
        );
        self.gemm.multiply(product, 1.0, [x, w, y])
    }

    /// Bias, norm and rotation of the fused projection; returns where the result is. Where heads are normalised, that is not
    /// in place, because their gradient needs the projection.
    pub(super) fn rotate(
        &self,
        on: On<'_>,
        run: &Run,
        layer: usize,
        trace: &Trace,
    ) -> Result<u64, CudaError> {
        let to = match on.spec.qk_norm {
            true => self.arena.rotated,
            false => trace.qkv,
        };
        self.clock.enter(on.gpu, Kind::Rotation)?;
        let projection = projection(on, run, layer, trace);
        self.kernels.qkv_rope(on.gpu, &projection, to)?;
        Ok(to)
    }

    pub(super) fn attention(
        &self,
        on: On<'_>,
        run: &Run,
        trace: &Trace,
        rotated: u64,
    ) -> Attention {
        let spec = on.spec;
        Attention {
            qkv: rotated,
            sequences: run.at(Field::Sequences),
            query_tiles: run.at(Field::QueryTiles),
            key_tiles: run.at(Field::KeyTiles),
            out: trace.attended,
            lse: trace.lse,
            dout: self.arena.dattended,
            delta: self.arena.row_dots,
            dqkv: self.arena.dqkv,
            dkv: self.arena.dkv,
            tokens: run.tokens() as i32,
            q_heads: spec.num_attention_heads as i32,
            kv_heads: spec.num_key_value_heads as i32,
            splits: splits(spec, run.tokens(), on.gpu.multiprocessors) as i32,
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
        }
    }
}

/// What the kernels of bias, norm and rotation read.
pub(super) fn projection(on: On<'_>, run: &Run, layer: usize, trace: &Trace) -> Projection {
    let (spec, at) = (on.spec, run.model.layers[layer]);
    Projection {
        qkv: trace.qkv,
        bias: at.qkv_bias,
        q_norm: at.q_norm,
        k_norm: at.k_norm,
        rope: on.weights.rope.device_ptr(&on.gpu.stream).0,
        positions: run.at(Field::Positions),
        tokens: run.tokens() as i32,
        q_heads: spec.num_attention_heads as i32,
        kv_heads: spec.num_key_value_heads as i32,
        dim: spec.head_dim as i32,
        eps: spec.rms_norm_eps as f32,
    }
}
