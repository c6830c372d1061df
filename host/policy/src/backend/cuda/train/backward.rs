//! The backward pass through the layers. A weight that does not train costs no product.

use super::{
    Mode, On, Training,
    arena::{COLUMN_PARTS, PARTS, Trace, qkv_width},
    clock::Kind,
    forward::{Run, projection},
    head::{Lesson, Scored},
    layout::{Adapted, LayerSlots},
    operands::{Norm, NormBackward},
    tables::Field,
};
use crate::{
    backend::cuda::{
        CudaError,
        gemm::{Factor, Out, Product, product},
        lora::{AdapterAt, LayerMatrix},
    },
    error::PolicyError,
};

/// Slot of a matrix.
fn slot(matrix: LayerMatrix, slots: &LayerSlots) -> usize {
    match matrix {
        LayerMatrix::Qkv => slots.qkv,
        LayerMatrix::O => slots.o,
        LayerMatrix::GateUp => slots.gate_up,
        LayerMatrix::Down => slots.down,
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
            let trace = match self.arena.kept(layer) {
                Some(trace) => trace,
                None => self.again(on, run, layer)?,
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
        let trace = self.arena.shared();
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
        let (t, f) = (run.tokens(), on.spec.intermediate_size);
        let at = run.model.layers[layer];
        let (act, dx16) = (self.arena.act, self.arena.dx16);
        let down = (layer, LayerMatrix::Down);
        self.low_gradient(on, down, (dx16, t))?;
        self.back(on, run, down, (dx16, act))?;
        // The gradients take the places of what they are made from.
        let gradients = [trace.gate_up, act, trace.gate_up, act];
        self.clock.enter(on.gpu, Kind::Swiglu)?;
        self.kernels.swiglu_backward(on.gpu, gradients, (t, f))?;
        self.weight_gradient(on, down, (dx16, act, t))?;
        let normed = self.arena.h;
        let norm = (at.mlp_norm, trace.middle, trace.middle_rstd);
        self.norm_again(on, norm, t)?;
        let gate_up = (layer, LayerMatrix::GateUp);
        self.low_gradient(on, gate_up, (trace.gate_up, t))?;
        self.weight_gradient(on, gate_up, (trace.gate_up, normed, t))?;
        self.back(on, run, gate_up, (trace.gate_up, self.arena.delta))?;
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
        let width = qkv_width(spec);
        let (dx16, dqkv, normed) = (self.arena.dx16, self.arena.dqkv, self.arena.h);
        let (o, qkv) = ((layer, LayerMatrix::O), (layer, LayerMatrix::Qkv));
        self.low_gradient(on, o, (dx16, t))?;
        self.back(on, run, o, (dx16, self.arena.dattended))?;
        self.weight_gradient(on, o, (dx16, trace.attended, t))?;
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
        self.low_gradient(on, qkv, (dqkv, t))?;
        self.weight_gradient(on, qkv, (dqkv, normed, t))?;
        if layer == 0 && !full {
            // Below are the embeddings, which do not train.
            return Ok(());
        }
        self.back(on, run, qkv, (dqkv, self.arena.delta))?;
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

    /// The gradient of what lies between the adapters of a matrix, in `arena.dlow`, from that of its outputs; there until it is
    /// asked for the next matrix.
    fn low_gradient(
        &mut self,
        on: On<'_>,
        (layer, matrix): (usize, LayerMatrix),
        (dy, rows): (u64, usize),
    ) -> Result<(), CudaError> {
        let Self {
            mode,
            gemm,
            arena,
            clock,
            ..
        } = self;
        match mode.adapter(layer, matrix) {
            Some(adapter) => {
                clock.enter(on.gpu, Kind::Adapters)?;
                adapter.low_gradient(gemm, rows, (dy, arena.dlow))
            }
            None => Ok(()),
        }
    }

    /// `dx = dy · W` of a layer's matrix, and what its adapters add where they are not merged, from [`Training::low_gradient`].
    fn back(
        &mut self,
        on: On<'_>,
        run: &Run,
        (layer, matrix): (usize, LayerMatrix),
        (dy, dx): (u64, u64),
    ) -> Result<(), CudaError> {
        let ((outputs, inputs), rows) = (matrix.sizes(on.spec), run.tokens());
        self.clock.enter(on.gpu, Kind::Products)?;
        let w = self.dense(on, matrix.of(&run.model.layers[layer]))?;
        let product = product(
            (rows, inputs, outputs),
            Factor::plain(outputs),
            Factor::plain(inputs),
        );
        self.gemm.multiply(product, 1.0, [dy, w, dx])?;
        let Self {
            mode,
            gemm,
            arena,
            clock,
            ..
        } = self;
        match mode.beside(layer, matrix) {
            Some(adapter) => {
                clock.enter(on.gpu, Kind::Adapters)?;
                adapter.add_back(gemm, rows, (arena.dlow, dx))
            }
            None => Ok(()),
        }
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
        (layer, matrix): (usize, LayerMatrix),
        (dy, x, rows): (u64, u64, usize),
    ) -> Result<(), CudaError> {
        if let Mode::Lora(lora) = &self.mode {
            let adapted = lora.layers[layer].of(matrix).clone();
            let at = self.mode.adapter(layer, matrix).cloned();
            return match adapted.zip(at) {
                Some(adapter) => self.adapter_gradient(on, &adapter, (dy, x, rows)),
                None => Ok(()),
            };
        }
        let (outputs, inputs) = matrix.sizes(on.spec);
        let factors = (Factor::transposed(outputs), Factor::plain(inputs));
        let product = product((outputs, inputs, rows), factors.0, factors.1);
        let slot = slot(matrix, &self.slots.layers[layer]);
        self.add_gradient(on, slot, product, [dy, x])
    }

    /// With `low = scale · x · Aᵀ` and `dlow` of [`Training::low_gradient`]: `dB = dyᵀ · low` of each part and
    /// `dA = dlowᵀ · x`.
    fn adapter_gradient(
        &mut self,
        on: On<'_>,
        (adapted, at): &(Adapted, AdapterAt),
        (dy, x, rows): (u64, u64, usize),
    ) -> Result<(), CudaError> {
        self.clock.enter(on.gpu, Kind::Adapters)?;
        let (rank, parts) = (at.rank, adapted.parts.len());
        let (inputs, outputs, wide) = (adapted.inputs, adapted.outputs, parts * rank);
        let (low, dlow) = (self.arena.low, self.arena.dlow);
        at.low(&mut self.gemm, rows, (x, low))?;
        for (index, part) in adapted.parts.iter().enumerate() {
            let (of_part, of_low) = (2 * part.rows.start as u64, (2 * index * rank) as u64);
            let up = product(
                (part.rows.len(), rank, rows),
                Factor::transposed(outputs),
                Factor::plain(wide),
            );
            self.add_gradient(on, part.b, up, [dy + of_part, low + of_low])?;
        }
        let across = product(
            (wide, inputs, rows),
            Factor::transposed(wide),
            Factor::plain(inputs),
        );
        self.add_gradient(on, adapted.a, across, [dlow, x])
    }
}
