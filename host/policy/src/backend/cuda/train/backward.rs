//! The backward pass through the layers. A weight that does not train costs no product.

use super::{
    Mode, On, Training,
    arena::{COLUMN_PARTS, Kept, PARTS, Trace, qkv_width},
    clock::Kind,
    forward::{Run, product, projection},
    head::{Lesson, Scored},
    layout::{Adapted, LayerSlots},
    operands::{Norm, NormBackward},
    tables::Field,
};
use crate::{
    backend::cuda::{
        CudaError,
        gemm::{Factor, Out, Product},
    },
    error::PolicyError,
};

/// The matrices of a layer.
#[derive(Clone, Copy, Debug)]
enum Matrix {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Matrix {
    fn slot(self, slots: &LayerSlots) -> usize {
        match self {
            Self::Qkv => slots.qkv,
            Self::O => slots.o,
            Self::GateUp => slots.gate_up,
            Self::Down => slots.down,
        }
    }
}

impl Training {
    /// Adds the gradients of a pass to those that are there.
    pub(super) fn backward(
        &mut self,
        on: On<'_>,
        run: &Run,
        scored: &Scored,
        lesson: &Lesson,
    ) -> Result<(), PolicyError> {
        self.check_not_reducing()?;
        self.clock.turn(true);
        self.head_backward(on, run, scored, lesson)?;
        self.reduce(on.gpu, 1)?;
        for layer in (0..on.spec.num_hidden_layers).rev() {
            let trace = match self.sizes.kept {
                Kept::Activations => self.arena.trace(Some(layer)),
                Kept::Inputs | Kept::Nothing => self.again(on, run, layer)?,
            };
            self.mlp_backward(on, run, layer, &trace)?;
            self.attention_backward(on, run, layer, &trace)?;
            self.reduce(on.gpu, 1 + on.spec.num_hidden_layers - layer)?;
        }
        if matches!(self.mode, Mode::Full { .. }) {
            self.embedding_backward(on, run)?;
            self.reduce(on.gpu, 2 + on.spec.num_hidden_layers)?;
        }
        self.clock.pause(on.gpu)?;
        self.trains()?.check_complete()
    }

    /// Runs a layer again from its input.
    fn again(&mut self, on: On<'_>, run: &Run, layer: usize) -> Result<Trace, CudaError> {
        let bytes = run.tokens() * on.spec.hidden_size * size_of::<f32>();
        on.gpu.copy(self.arena.inputs[layer], self.arena.x, bytes)?;
        let trace = self.arena.trace(None);
        self.layer(on, run, layer, (trace, 0, false))?;
        Ok(trace)
    }

    fn mlp_backward(
        &mut self,
        on: On<'_>,
        run: &Run,
        layer: usize,
        trace: &Trace,
    ) -> Result<(), CudaError> {
        let (t, h, f) = (run.tokens(), on.spec.hidden_size, on.spec.intermediate_size);
        let at = run.model.layers[layer];
        let (act, dx16) = (self.arena.act, self.arena.dx16);
        self.back(on, (dx16, at.down, act), (t, h, f))?;
        // The gradients take the places of what they are made from.
        let gradients = [trace.gate_up, act, trace.gate_up, act];
        self.clock.enter(on.gpu, Kind::Swiglu)?;
        self.kernels.swiglu_backward(on.gpu, gradients, (t, f))?;
        self.weight_gradient(on, layer, Matrix::Down, (dx16, act, t))?;
        let normed = self.arena.h;
        let norm = (at.mlp_norm, trace.middle, trace.middle_rstd);
        self.norm_again(on, norm, t)?;
        self.weight_gradient(on, layer, Matrix::GateUp, (trace.gate_up, normed, t))?;
        self.back(
            on,
            (trace.gate_up, at.gate_up, self.arena.delta),
            (t, 2 * f, h),
        )?;
        self.norm_backward(on, norm, self.slots.layers[layer].mlp_norm, t)
    }

    fn attention_backward(
        &mut self,
        on: On<'_>,
        run: &Run,
        layer: usize,
        trace: &Trace,
    ) -> Result<(), CudaError> {
        let (spec, t, at) = (on.spec, run.tokens(), run.model.layers[layer]);
        let (h, width) = (spec.hidden_size, qkv_width(spec));
        let (dx16, dqkv, normed) = (self.arena.dx16, self.arena.dqkv, self.arena.h);
        self.back(on, (dx16, at.o, self.arena.dattended), (t, h, spec.q_dim()))?;
        self.weight_gradient(on, layer, Matrix::O, (dx16, trace.attended, t))?;
        let rotated = match spec.qk_norm {
            true => self.rotate(on, run, layer, trace)?,
            false => trace.qkv,
        };
        let attention = self.attention(on, run, trace, rotated);
        let tiles = (run.tables.query_tiles, run.tables.key_tiles);
        self.clock.enter(on.gpu, Kind::Attention)?;
        self.kernels.attend_backward(on.gpu, &attention, tiles)?;
        self.clock.enter(on.gpu, Kind::Rotation)?;
        self.kernels.qkv_rope_backward(
            on.gpu,
            &projection(on, run, layer, trace),
            (dqkv, self.arena.dkv, self.arena.parts),
            attention.splits as usize,
        )?;
        let slots = self.slots.layers[layer];
        let full = matches!(self.mode, Mode::Full { .. });
        if let Some(slot) = slots.head_norms.filter(|_| full) {
            self.add_parts(on, slot, PARTS, 2 * spec.head_dim)?;
        }
        if let Some(slot) = slots.qkv_bias.filter(|_| full) {
            let to = (dqkv, self.arena.parts);
            self.kernels.column_sums(on.gpu, to, (t, width))?;
            self.add_parts(on, slot, COLUMN_PARTS, width)?;
        }
        let norm = (at.input_norm, trace.before, trace.before_rstd);
        self.norm_again(on, norm, t)?;
        self.weight_gradient(on, layer, Matrix::Qkv, (dqkv, normed, t))?;
        if layer == 0 && !full {
            // Below are the embeddings, which do not train.
            return Ok(());
        }
        self.back(on, (dqkv, at.qkv, self.arena.delta), (t, width, h))?;
        self.norm_backward(on, norm, slots.input_norm, t)
    }

    fn embedding_backward(&mut self, on: On<'_>, run: &Run) -> Result<(), PolicyError> {
        self.clock.enter(on.gpu, Kind::Embedding)?;
        let (slot, h) = (self.slots.embed, on.spec.hidden_size);
        let optimizer = self.optimizer.as_mut().ok_or(super::NOTHING_TRAINS)?;
        let (to, add) = optimizer.gradient(on.gpu, slot);
        if !add {
            let bytes = optimizer.layout.slots[slot].len * size_of::<f32>();
            on.gpu.zero(to, bytes)?;
        }
        let lists = [
            run.at(Field::Distinct),
            run.at(Field::DistinctStarts),
            run.at(Field::DistinctPlaces),
        ];
        let sizes = (run.tables.distinct, h);
        Ok(self
            .kernels
            .scatter_rows(on.gpu, lists, (self.arena.dx, to), sizes, true)?)
    }

    /// A norm's output once more, in `arena.h`, from its weight, what was saved and 1 over the root mean square.
    fn norm_again(
        &self,
        on: On<'_>,
        (weight, saved, rstd): (u64, u64, u64),
        rows: usize,
    ) -> Result<(), CudaError> {
        let norm = Norm {
            weight,
            saved,
            rstd,
            out: self.arena.h,
            ..Norm::default()
        };
        self.clock.enter(on.gpu, Kind::Norms)?;
        let sizes = (rows, on.spec.hidden_size);
        self.kernels.rms_norm_again(on.gpu, &norm, sizes)
    }

    /// From the gradient of a norm's output in `arena.delta` to that of the residual stream, which it is added to.
    fn norm_backward(
        &mut self,
        on: On<'_>,
        (weight, saved, rstd): (u64, u64, u64),
        slot: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (h, full) = (on.spec.hidden_size, matches!(self.mode, Mode::Full { .. }));
        let norm = NormBackward {
            saved,
            rstd,
            weight,
            dout: self.arena.delta,
            dx: self.arena.dx,
            dx16: self.arena.dx16,
            part: if full { self.arena.parts } else { 0 },
            add: true,
        };
        self.clock.enter(on.gpu, Kind::Norms)?;
        self.kernels.rms_norm_backward(on.gpu, &norm, (rows, h))?;
        match full {
            true => self.add_parts(on, slot, PARTS, h),
            false => Ok(()),
        }
    }

    /// `dx[rows, inputs] = dy[rows, outputs] · w[outputs, inputs]`.
    fn back(
        &mut self,
        on: On<'_>,
        (dy, w, dx): (u64, u64, u64),
        (rows, outputs, inputs): (usize, usize, usize),
    ) -> Result<(), CudaError> {
        self.clock.enter(on.gpu, Kind::Products)?;
        let product = product(
            (rows, inputs, outputs),
            Factor::plain(outputs),
            Factor::plain(inputs),
        );
        self.gemm.multiply(product, 1.0, [dy, w, dx])
    }

    /// Adds parts of sums over rows to the gradient of a vector.
    pub(super) fn add_parts(
        &mut self,
        on: On<'_>,
        slot: usize,
        n: usize,
        columns: usize,
    ) -> Result<(), CudaError> {
        let Some(optimizer) = &mut self.optimizer else {
            return Ok(());
        };
        let (to, add) = optimizer.gradient(on.gpu, slot);
        let parts = (self.arena.parts, to);
        self.kernels.sum_parts(on.gpu, parts, (n, columns), add)
    }

    /// Adds a product to the gradient of a slot; the first one is written.
    pub(super) fn add_gradient(
        &mut self,
        on: On<'_>,
        slot: usize,
        product: Product,
        [a, b]: [u64; 2],
    ) -> Result<(), CudaError> {
        let Some(optimizer) = &mut self.optimizer else {
            return Ok(());
        };
        let kind = match &self.mode {
            Mode::Lora(_) => Kind::Adapters,
            _ => Kind::WeightGradients,
        };
        self.clock.enter(on.gpu, kind)?;
        let (to, add) = optimizer.gradient(on.gpu, slot);
        let out = if add { Out::AddF32 } else { Out::F32 };
        let product = Product { out, ..product };
        self.gemm.multiply(product, 1.0, [a, b, to])
    }

    /// Gradient of a matrix, or of its adapters, from those of its outputs `dy` and from its inputs `x`, of so many rows.
    fn weight_gradient(
        &mut self,
        on: On<'_>,
        layer: usize,
        matrix: Matrix,
        (dy, x, rows): (u64, u64, usize),
    ) -> Result<(), CudaError> {
        if let Mode::Lora(lora) = &self.mode {
            let layer = &lora.layers[layer];
            let adapted = match matrix {
                Matrix::Qkv => &layer.qkv,
                Matrix::O => &layer.o,
                Matrix::GateUp => &layer.gate_up,
                Matrix::Down => &layer.down,
            };
            let (adapted, scale) = (adapted.clone(), lora.scale);
            return match adapted {
                Some(adapted) => self.adapter_gradient(on, &adapted, scale, (dy, x, rows)),
                None => Ok(()),
            };
        }
        let spec = on.spec;
        let (outputs, inputs) = match matrix {
            Matrix::Qkv => (qkv_width(spec), spec.hidden_size),
            Matrix::O => (spec.hidden_size, spec.q_dim()),
            Matrix::GateUp => (2 * spec.intermediate_size, spec.hidden_size),
            Matrix::Down => (spec.hidden_size, spec.intermediate_size),
        };
        let factors = (Factor::transposed(outputs), Factor::plain(inputs));
        let product = product((outputs, inputs, rows), factors.0, factors.1);
        let slot = matrix.slot(&self.slots.layers[layer]);
        self.add_gradient(on, slot, product, [dy, x])
    }

    /// With `low = scale · x · Aᵀ` and `dlow = scale · dy · B` of each part: `dB = dyᵀ · low` and `dA = dlowᵀ · x`.
    fn adapter_gradient(
        &mut self,
        on: On<'_>,
        adapted: &Adapted,
        scale: f32,
        (dy, x, rows): (u64, u64, usize),
    ) -> Result<(), CudaError> {
        let Some(optimizer) = &self.optimizer else {
            return Ok(());
        };
        self.clock.enter(on.gpu, Kind::Adapters)?;
        let (rank, parts) = (self.sizes.rank, adapted.parts.len());
        let (inputs, outputs, wide) = (adapted.inputs, adapted.outputs, parts * rank);
        let (low, dlow) = (self.arena.low, self.arena.dlow);
        let a = optimizer.weight(adapted.a);
        let down = product(
            (rows, wide, inputs),
            Factor::plain(inputs),
            Factor::transposed(inputs),
        );
        self.gemm.multiply(down, scale, [x, a, low])?;
        for (index, part) in adapted.parts.iter().enumerate() {
            let (of_part, of_low) = (2 * part.rows.start as u64, (2 * index * rank) as u64);
            let (dy, width) = (dy + of_part, part.rows.len());
            let up = product(
                (width, rank, rows),
                Factor::transposed(outputs),
                Factor::plain(wide),
            );
            self.add_gradient(on, part.b, up, [dy, low + of_low])?;
            let back = Product {
                stride: wide,
                ..product(
                    (rows, rank, width),
                    Factor::plain(outputs),
                    Factor::plain(rank),
                )
            };
            let b = self.optimizer.as_ref().map_or(0, |o| o.weight(part.b));
            self.gemm.multiply(back, scale, [dy, b, dlow + of_low])?;
        }
        let across = product(
            (wide, inputs, rows),
            Factor::transposed(wide),
            Factor::plain(inputs),
        );
        self.add_gradient(on, adapted.a, across, [dlow, x])
    }
}
