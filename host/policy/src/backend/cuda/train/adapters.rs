//! LoRA on the device: adapters with masters and moments, the base that they are merged into, and merging.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::Tensor;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use super::{
    ModelAt, On,
    kernels::Kernels,
    layout::{self, Adapted, AdaptedLayer, Layout},
    missing,
    optimizer::{self, Optimizer},
};
use crate::{
    backend::cuda::{
        CudaError,
        device::Gpu,
        gemm::{Factor, Gemm, Numbers, Out, Product},
        layer::Pointers,
        quantized::Linear,
        weights::Layer,
    },
    error::PolicyError,
    weights::{LoraConfig, random_a},
};

/// Numbers of an update that are made at a time.
const STRIPE: usize = 8 << 20;

/// The adapted matrices of a layer as they were loaded.
struct Base {
    qkv: Option<CudaSlice<bf16>>,
    o: Option<CudaSlice<bf16>>,
    gate_up: Option<CudaSlice<bf16>>,
    down: Option<CudaSlice<bf16>>,
}

/// See the file header.
pub(super) struct Lora {
    /// `alpha / r`.
    pub(super) scale: f32,
    pub(super) layers: Vec<AdaptedLayer>,
    rank: usize,
    base: Vec<Base>,
    /// Matrices of the base that bf16 does not hold, as they were loaded.
    exact: BTreeMap<String, Tensor>,
    /// The adapters in bf16, for products with activations.
    _rounded: CudaSlice<bf16>,
    stripe: CudaSlice<f32>,
}

/// Bytes that LoRA needs beside what its optimizer does: adapters in bf16, the base of the adapted matrices, a stripe.
pub(super) fn bytes(layout: &Layout, layers: &[AdaptedLayer]) -> usize {
    let of_layer = |layer: &AdaptedLayer| {
        let matrices = [&layer.qkv, &layer.o, &layer.gate_up, &layer.down];
        let numbers = matrices.into_iter().flatten().map(|m| m.inputs * m.outputs);
        numbers.sum::<usize>()
    };
    let base: usize = layers.iter().map(of_layer).sum();
    2 * layout.total() + 2 * base + 4 * STRIPE
}

impl Base {
    fn of(
        stream: &Arc<CudaStream>,
        adapted: &AdaptedLayer,
        layer: &Layer,
    ) -> Result<Self, CudaError> {
        let copy = |wanted: &Option<Adapted>, matrix: &Linear| {
            let copied = wanted.as_ref().map(|_| matrix.copy(stream));
            copied.transpose()
        };
        Ok(Self {
            qkv: copy(&adapted.qkv, &layer.qkv)?,
            o: copy(&adapted.o, &layer.o)?,
            gate_up: copy(&adapted.gate_up, &layer.gate_up)?,
            down: copy(&adapted.down, &layer.down)?,
        })
    }

    /// The layer without adapters.
    fn pointers(&self, stream: &Arc<CudaStream>, with: Pointers<u64>) -> Pointers<u64> {
        let or = |base: &Option<CudaSlice<bf16>>, merged: u64| {
            base.as_ref().map_or(merged, |b| b.device_ptr(stream).0)
        };
        Pointers {
            qkv: or(&self.qkv, with.qkv),
            o: or(&self.o, with.o),
            gate_up: or(&self.gate_up, with.gate_up),
            down: or(&self.down, with.down),
            ..with
        }
    }
}

impl Lora {
    /// New adapters, `A` random and `B` zero, so that the policy starts as the reference; with their optimizer. `model` is the
    /// layout of the base, whose weights are `tensors`.
    pub(super) fn new(
        on: On<'_>,
        tensors: &BTreeMap<String, Tensor>,
        model: &Layout,
        config: &LoraConfig,
        seed: u64,
    ) -> Result<(Self, Optimizer), PolicyError> {
        let (gpu, stream) = (on.gpu, &on.gpu.stream);
        let (layout, layers) = layout::of_adapters(on.spec, config);
        let rounded = stream
            .alloc_zeros::<bf16>(layout.total())
            .map_err(CudaError::from)?;
        let start = rounded.device_ptr(stream).0;
        let slots = layout.slots.iter();
        let weights = slots.map(|slot| start + 2 * slot.offset as u64).collect();
        let optimizer = Optimizer::new(gpu, layout, weights)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let params = optimizer.layout.params.iter();
        for param in params.filter(|p| p.name.ends_with(".lora_A.weight")) {
            let inputs = param.count() / config.r;
            optimizer.set(gpu, param, &random_a(&mut rng, config.r, inputs))?;
        }
        let pairs = layers.iter().zip(&on.weights.layers);
        let base = pairs.map(|(adapted, layer)| Base::of(stream, adapted, layer));
        let lora = Self {
            scale: config.scale() as f32,
            rank: layout::stored_rank(config.r),
            base: base.collect::<Result<_, _>>()?,
            exact: beyond_bf16(tensors, model)?,
            _rounded: rounded,
            stripe: stream.alloc_zeros(STRIPE).map_err(CudaError::from)?,
            layers,
        };
        Ok((lora, optimizer))
    }

    /// The base as it was loaded, where bf16 does not hold it.
    pub(super) fn exact(&self, name: &str) -> Option<&Tensor> {
        self.exact.get(name)
    }

    /// A model's weights without adapters.
    pub(super) fn without(&self, gpu: &Gpu, with: ModelAt) -> ModelAt {
        let layers = self.base.iter().zip(&with.layers);
        let layers = layers.map(|(base, at)| base.pointers(&gpu.stream, *at));
        ModelAt {
            layers: layers.collect(),
            ..with
        }
    }

    /// Makes the decoder's weights anew from the base and the adapters as they are.
    pub(super) fn merge(
        &self,
        on: On<'_>,
        kernels: &Kernels,
        gemm: &mut Gemm,
        optimizer: &Optimizer,
    ) -> Result<(), CudaError> {
        let with = ModelAt::of(on.weights, on.gpu)?;
        let without = self.without(on.gpu, ModelAt::of(on.weights, on.gpu)?);
        for (index, layer) in self.layers.iter().enumerate() {
            let (from, to) = (&without.layers[index], &with.layers[index]);
            let matrices = [
                (&layer.qkv, from.qkv, to.qkv),
                (&layer.o, from.o, to.o),
                (&layer.gate_up, from.gate_up, to.gate_up),
                (&layer.down, from.down, to.down),
            ];
            for (adapted, base, merged) in matrices {
                if let Some(adapted) = adapted {
                    let at = (base, merged);
                    self.merge_matrix(on.gpu, (kernels, gemm), optimizer, (adapted, at))?;
                }
            }
        }
        Ok(())
    }

    /// In stripes of whole rows. The update is a product of f32 masters.
    fn merge_matrix(
        &self,
        gpu: &Gpu,
        (kernels, gemm): (&Kernels, &mut Gemm),
        optimizer: &Optimizer,
        (adapted, (base, merged)): (&Adapted, (u64, u64)),
    ) -> Result<(), CudaError> {
        let (inputs, rank) = (adapted.inputs, self.rank);
        let update = self.stripe.device_ptr(&gpu.stream).0;
        for (index, part) in adapted.parts.iter().enumerate() {
            let a = optimizer.master(gpu, adapted.a) + (4 * index * rank * inputs) as u64;
            let b = optimizer.master(gpu, part.b);
            let stripe = (STRIPE / inputs).max(1);
            for first in part.rows.clone().step_by(stripe) {
                let rows = stripe.min(part.rows.end - first);
                let of_b = b + (4 * (first - part.rows.start) * rank) as u64;
                let product = Product {
                    rows,
                    columns: inputs,
                    inner: rank,
                    a: Factor::plain(rank),
                    b: Factor::plain(inputs),
                    stride: inputs,
                    numbers: Numbers::F32,
                    out: Out::F32,
                    alignment: 0,
                };
                gemm.multiply(product, self.scale, [of_b, a, update])?;
                let skipped = (2 * first * inputs) as u64;
                let at = [base + skipped, update, merged + skipped];
                kernels.merge_adapter(gpu, at, (first * inputs, rows * inputs))?;
            }
        }
        Ok(())
    }
}

/// The matrices with numbers that bf16 rounds. Those of a checkpoint in bf16 have none.
fn beyond_bf16(
    tensors: &BTreeMap<String, Tensor>,
    model: &Layout,
) -> Result<BTreeMap<String, Tensor>, PolicyError> {
    let mut beyond = BTreeMap::new();
    for param in model.params.iter().filter(|p| model.slots[p.slot].matrix) {
        let tensor = tensors
            .get(&param.name)
            .ok_or_else(|| missing(&param.name))?;
        let values = optimizer::numbers(&param.name, tensor, param.count())?;
        if values.iter().any(|x| bf16::from_f32(*x).to_f32() != *x) {
            beyond.insert(param.name.clone(), tensor.clone());
        }
    }
    Ok(beyond)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn only_what_bf16_rounds_is_kept_on_the_host() {
        let layout = Layout::of_matrices(&[("a", 1, 2), ("b", 1, 2)]);
        let tensor = |values: [f32; 2]| Tensor::new(&[values], &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([
            ("a".to_owned(), tensor([1.0, 0.007_812_5])),
            ("b".to_owned(), tensor([1.0, 1.001])),
        ]);
        let kept = beyond_bf16(&tensors, &layout).unwrap();
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["b"]);
        let none = BTreeMap::new();
        assert!(matches!(
            beyond_bf16(&none, &layout),
            Err(PolicyError::MissingWeight { name }) if name == "a"
        ));
    }
}
