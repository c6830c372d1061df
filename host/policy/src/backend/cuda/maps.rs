//! Where hopper.cu's products find weights and activations.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaError,
    forward::Work,
    product::{Map, TokenMaps},
    quantized::{Linear, Stored},
    weights::{Layer, Weights},
};
use crate::spec::ModelSpec;

/// The matrices of a layer.
pub(super) struct LayerMaps {
    pub(super) qkv: Map,
    pub(super) o: Map,
    pub(super) gate_up: Map,
    pub(super) down: Map,
}

/// See the file header.
pub(super) struct Maps {
    pub(super) layers: Vec<LayerMaps>,
    /// Without meaning for a quantised head, which is read in parts.
    pub(super) head: Map,
    pub(super) h: TokenMaps,
    pub(super) attended: TokenMaps,
    pub(super) act: TokenMaps,
    pub(super) picked: TokenMaps,
}

impl Maps {
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        spec: &ModelSpec,
        weights: &Weights,
        work: &Work,
    ) -> Result<Self, CudaError> {
        let (h, q, f) = (spec.hidden_size, spec.q_dim(), spec.intermediate_size);
        // A quantised matrix is read from the scratch buffer, as soon as it is made bf16 there.
        let of = |matrix: &Linear| match matrix.at(stream) {
            Stored::Bf16(address) => address,
            Stored::Quantized(_) => weights.scratch_at(stream),
        };
        let at = |buffer: &CudaSlice<bf16>| buffer.device_ptr(stream).0;
        let of_layer = |layer: &Layer| {
            Ok(LayerMaps {
                qkv: Map::weights(of(&layer.qkv), q + 2 * spec.kv_dim(), h)?,
                o: Map::weights(of(&layer.o), h, q)?,
                gate_up: Map::pairs(of(&layer.gate_up), f, h)?,
                down: Map::weights(of(&layer.down), h, f)?,
            })
        };
        let layers: Result<_, CudaError> = weights.layers.iter().map(of_layer).collect();
        let tokens = |buffer: &CudaSlice<bf16>, columns: usize| {
            TokenMaps::new(at(buffer), buffer.len() / columns, columns)
        };
        Ok(Self {
            layers: layers?,
            head: Map::weights(of(weights.head()), spec.vocab_size, h)?,
            h: tokens(&work.h, h)?,
            attended: tokens(&work.attended, q)?,
            act: tokens(&work.act, f)?,
            picked: tokens(&work.picked, h)?,
        })
    }
}
