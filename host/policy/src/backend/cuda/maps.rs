//! Where hopper.cu's products find weights and activations.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaError,
    forward::Work,
    product::{Map, TokenMaps},
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
        let at = |matrix: &CudaSlice<bf16>| matrix.device_ptr(stream).0;
        let of_layer = |layer: &Layer| {
            Ok(LayerMaps {
                qkv: Map::weights(at(&layer.qkv), q + 2 * spec.kv_dim(), h)?,
                o: Map::weights(at(&layer.o), h, q)?,
                gate_up: Map::pairs(at(&layer.gate_up), f, h)?,
                down: Map::weights(at(&layer.down), h, f)?,
            })
        };
        let layers: Result<_, CudaError> = weights.layers.iter().map(of_layer).collect();
        let head = weights.head.as_ref().unwrap_or(&weights.embed);
        let tokens = |buffer: &CudaSlice<bf16>, columns: usize| {
            TokenMaps::new(at(buffer), buffer.len() / columns, columns)
        };
        Ok(Self {
            layers: layers?,
            head: Map::weights(at(head), spec.vocab_size, h)?,
            h: tokens(&work.h, h)?,
            attended: tokens(&work.attended, q)?,
            act: tokens(&work.act, f)?,
            picked: tokens(&work.picked, h)?,
        })
    }
}
