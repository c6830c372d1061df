//! LoRA beside the weights (Hu et al. 2021): `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` as products of their own, for weights that adapters are
//! not merged into, in rollouts and in both directions of training.

use std::ops::Range;

use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::{
    CudaBackend, CudaError,
    gemm::{Factor, Gemm, Out, Product, product},
    layer::Pointers,
    quantized::Stored,
};
use crate::spec::ModelSpec;

/// The matrices of a layer as they lie on the device, q, k, v and gate, up being one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerMatrix {
    Qkv,
    O,
    GateUp,
    Down,
}

impl LayerMatrix {
    /// In the order of the variants.
    pub(super) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// Outputs and inputs.
    pub(super) fn sizes(self, spec: &ModelSpec) -> (usize, usize) {
        let (h, q, f) = (spec.hidden_size, spec.q_dim(), spec.intermediate_size);
        match self {
            Self::Qkv => (q + 2 * spec.kv_dim(), h),
            Self::O => (h, q),
            Self::GateUp => (2 * f, h),
            Self::Down => (h, f),
        }
    }

    /// Where a layer has it.
    pub(super) fn of(self, layer: &Pointers<Stored>) -> Stored {
        match self {
            Self::Qkv => layer.qkv,
            Self::O => layer.o,
            Self::GateUp => layer.gate_up,
            Self::Down => layer.down,
        }
    }
}

/// Where the adapters of a matrix `[outputs, inputs]` lie, in bf16.
#[derive(Clone, Debug)]
pub(super) struct AdapterAt {
    /// The As of all parts, `[parts · rank, inputs]`.
    pub(super) a: u64,
    /// Of each part its B, `[rows, rank]`, and the rows of the matrix that it adds to.
    pub(super) parts: Vec<(u64, Range<usize>)>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) rank: usize,
    /// `alpha / r`.
    pub(super) scale: f32,
}

/// The adapters of a layer, by [`LayerMatrix`].
pub(super) type LayerAdapters = [Option<AdapterAt>; 4];

impl AdapterAt {
    /// Columns of what lies between A and B.
    fn wide(&self) -> usize {
        self.parts.len() * self.rank
    }

    /// `low[rows, parts · rank] = s · x[rows, inputs] · Aᵀ`.
    pub(super) fn low(
        &self,
        gemm: &mut Gemm,
        rows: usize,
        (x, low): (u64, u64),
    ) -> Result<(), CudaError> {
        let down = product(
            (rows, self.wide(), self.inputs),
            Factor::plain(self.inputs),
            Factor::transposed(self.inputs),
        );
        gemm.multiply(down, self.scale, [x, self.a, low])
    }

    /// Adds the adapters' part to `y[rows, outputs]`, by way of `low[rows, parts · rank]`.
    pub(super) fn add(
        &self,
        gemm: &mut Gemm,
        rows: usize,
        (x, low, y): (u64, u64, u64),
    ) -> Result<(), CudaError> {
        self.low(gemm, rows, (x, low))?;
        for (index, (b, of)) in self.parts.iter().enumerate() {
            let up = Product {
                stride: self.outputs,
                out: Out::AddBf16,
                ..product(
                    (rows, of.len(), self.rank),
                    Factor::plain(self.wide()),
                    Factor::transposed(self.rank),
                )
            };
            let low = low + (2 * index * self.rank) as u64;
            gemm.multiply(up, 1.0, [low, *b, y + 2 * of.start as u64])?;
        }
        Ok(())
    }

    /// `dlow[rows, parts · rank] = s · dy[rows, outputs] · B` of each part.
    pub(super) fn low_gradient(
        &self,
        gemm: &mut Gemm,
        rows: usize,
        (dy, dlow): (u64, u64),
    ) -> Result<(), CudaError> {
        for (index, (b, of)) in self.parts.iter().enumerate() {
            let back = Product {
                stride: self.wide(),
                ..product(
                    (rows, self.rank, of.len()),
                    Factor::plain(self.outputs),
                    Factor::plain(self.rank),
                )
            };
            let dlow = dlow + (2 * index * self.rank) as u64;
            gemm.multiply(back, self.scale, [dy + 2 * of.start as u64, *b, dlow])?;
        }
        Ok(())
    }

    /// `dx[rows, inputs] += dlow · A`.
    pub(super) fn add_back(
        &self,
        gemm: &mut Gemm,
        rows: usize,
        (dlow, dx): (u64, u64),
    ) -> Result<(), CudaError> {
        let back = Product {
            out: Out::AddBf16,
            ..product(
                (rows, self.inputs, self.wide()),
                Factor::plain(self.wide()),
                Factor::plain(self.inputs),
            )
        };
        gemm.multiply(back, 1.0, [dlow, self.a, dx])
    }
}

/// What rollouts need of adapters that are not merged.
pub(super) struct Adapters {
    pub(super) layers: Vec<LayerAdapters>,
    /// `[T, 3 · rank]`.
    pub(super) low: CudaSlice<bf16>,
}

impl CudaBackend {
    /// Adds to `y` what the adapters of a matrix make of `x`, for a pass of `tokens` tokens; nothing where there are none, or
    /// where they are merged.
    pub(super) fn adapt(
        &mut self,
        (layer, matrix): (usize, LayerMatrix),
        tokens: usize,
        (x, y): (u64, u64),
    ) -> Result<(), CudaError> {
        let Some(adapters) = &self.adapters else {
            return Ok(());
        };
        let Some(adapter) = &adapters.layers[layer][matrix as usize] else {
            return Ok(());
        };
        if !self.gpu.filter.admits() {
            return Ok(());
        }
        let low = adapters.low.device_ptr(&self.gpu.stream).0;
        adapter.add(&mut self.gemm, tokens, (x, low, y))
    }
}
