//! The buffers of a model's weights, for what goes through all of them: the optimizer, and a frozen copy.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use crate::backend::cuda::{
    CudaError,
    quantized::Linear,
    weights::{Layer, Weights},
};

impl Weights {
    /// Addresses of all buffers but the rotation table, in the order of the fields of [`Layer`] and, around the layers,
    /// embedding, norm, head.
    ///
    /// # Errors
    /// [`CudaError::StaysQuantized`] for quantised matrices.
    pub(super) fn buffers(&self, stream: &Arc<CudaStream>) -> Result<Vec<u64>, CudaError> {
        let floats = |s: &CudaSlice<f32>| s.device_ptr(stream).0;
        let matrix = |m: &Linear| m.at(stream).dense();
        let mut all = vec![matrix(&self.embed)?];
        for layer in &self.layers {
            all.extend([floats(&layer.input_norm), matrix(&layer.qkv)?]);
            all.extend(layer.qkv_bias.as_ref().map(floats));
            all.extend(layer.head_norms.as_ref().map(floats));
            all.extend([matrix(&layer.o)?, floats(&layer.mlp_norm)]);
            all.extend([matrix(&layer.gate_up)?, matrix(&layer.down)?]);
        }
        all.push(floats(&self.norm));
        all.extend(self.head.as_ref().map(matrix).transpose()?);
        Ok(all)
    }

    /// The same numbers in buffers of their own.
    ///
    /// # Errors
    /// As [`Weights::buffers`].
    pub(super) fn copy(&self, stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        let floats = |s: &CudaSlice<f32>| stream.clone_dtod(s);
        let matrix = |m: &Linear| m.copy(stream).map(Linear::Bf16);
        let layer = |layer: &Layer| -> Result<Layer, CudaError> {
            Ok(Layer {
                input_norm: floats(&layer.input_norm)?,
                qkv: matrix(&layer.qkv)?,
                qkv_bias: layer.qkv_bias.as_ref().map(floats).transpose()?,
                head_norms: layer.head_norms.as_ref().map(floats).transpose()?,
                o: matrix(&layer.o)?,
                mlp_norm: floats(&layer.mlp_norm)?,
                gate_up: matrix(&layer.gate_up)?,
                down: matrix(&layer.down)?,
            })
        };
        let layers = self.layers.iter().map(layer);
        Ok(Self {
            embed: matrix(&self.embed)?,
            layers: layers.collect::<Result<_, CudaError>>()?,
            norm: floats(&self.norm)?,
            head: self.head.as_ref().map(matrix).transpose()?,
            rope: floats(&self.rope)?,
            scratch: None,
        })
    }
}
