//! LoRA on the device: adapters with masters and moments and, where they are merged, the base that they are merged into, and
//! merging.

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
    optimizer::{self, Moments, Optimizer},
};
use crate::{
    backend::cuda::{
        CudaError, CudaWeights,
        device::Gpu,
        gemm::{Factor, Gemm, Numbers, Out, Product},
        layer::Pointers,
        lora::{AdapterAt, LayerAdapters, LayerMatrix},
        quantized::{Linear, Stored},
        weights::Layer,
    },
    error::PolicyError,
    weights::{LoraConfig, QuantizedMatrix, random_a},
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

/// What merging needs.
struct Merging {
    base: Vec<Base>,
    stripe: CudaSlice<f32>,
}

/// A matrix of the base as it was loaded.
enum Loaded {
    Dense(Tensor),
    Quantized(QuantizedMatrix),
}

/// See the file header.
pub(super) struct Lora {
    /// `alpha / r`.
    scale: f32,
    pub(super) layers: Vec<AdaptedLayer>,
    /// The same as addresses, in bf16.
    pub(super) at: Vec<LayerAdapters>,
    rank: usize,
    /// Nothing where adapters are applied beside the weights, which then are the base.
    merging: Option<Merging>,
    /// Matrices of the base that bf16 does not hold.
    exact: BTreeMap<String, Loaded>,
    /// The adapters in bf16, for products with activations.
    _rounded: CudaSlice<bf16>,
}

/// Bytes that LoRA needs beside what its optimizer does: adapters in bf16 and, to `merge` them, the base of the adapted
/// matrices and a stripe.
pub(super) fn bytes(layout: &Layout, layers: &[AdaptedLayer], merge: bool) -> usize {
    let of_layer = |layer: &AdaptedLayer| {
        let matrices = LayerMatrix::ALL.map(|matrix| layer.of(matrix).as_ref());
        let numbers = matrices.into_iter().flatten().map(|m| m.inputs * m.outputs);
        numbers.sum::<usize>()
    };
    let base: usize = layers.iter().map(of_layer).sum();
    let merging = if merge { 2 * base + 4 * STRIPE } else { 0 };
    2 * layout.total() + merging
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
    fn pointers(&self, stream: &Arc<CudaStream>, with: Pointers<Stored>) -> Pointers<Stored> {
        let or = |base: &Option<CudaSlice<bf16>>, merged: Stored| {
            let own = base.as_ref().map(|b| Stored::Bf16(b.device_ptr(stream).0));
            own.unwrap_or(merged)
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
    /// layout of the base, whose weights are `given`.
    pub(super) fn new(
        on: On<'_>,
        given: CudaWeights<'_>,
        model: &Layout,
        (config, seed): (&LoraConfig, u64),
        (merge, moments): (bool, Moments),
    ) -> Result<(Self, Optimizer), PolicyError> {
        let (gpu, stream) = (on.gpu, &on.gpu.stream);
        let (layout, layers) = layout::of_adapters(on.spec, config);
        let rounded = stream
            .alloc_zeros::<bf16>(layout.total())
            .map_err(CudaError::from)?;
        let start = rounded.device_ptr(stream).0;
        let slots = layout.slots.iter();
        let weights = slots.map(|slot| start + 2 * slot.offset as u64).collect();
        let optimizer = Optimizer::new(gpu, layout, weights, moments)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let params = optimizer.layout.params.iter();
        for param in params.filter(|p| p.name.ends_with(".lora_A.weight")) {
            let inputs = param.count() / config.r;
            optimizer.set(gpu, param, &random_a(&mut rng, config.r, inputs))?;
        }
        let (scale, rank) = (config.scale() as f32, layout::stored_rank(config.r));
        let at = layers.iter().map(|layer| {
            let of = |adapted: &Adapted| address(&optimizer, adapted, rank, scale);
            LayerMatrix::ALL.map(|matrix| layer.of(matrix).as_ref().map(of))
        });
        let lora = Self {
            scale,
            rank,
            at: at.collect(),
            merging: match merge {
                true => Some(Merging::new(on, &layers)?),
                false => None,
            },
            exact: beyond_bf16(given, model)?,
            _rounded: rounded,
            layers,
        };
        Ok((lora, optimizer))
    }

    /// Whether the decoder's weights have the adapters in them.
    pub(super) fn is_merged(&self) -> bool {
        self.merging.is_some()
    }

    /// The base as it was loaded, where bf16 does not hold it.
    pub(super) fn exact(&self, name: &str) -> Result<Option<Tensor>, PolicyError> {
        match self.exact.get(name) {
            Some(Loaded::Dense(tensor)) => Ok(Some(tensor.clone())),
            Some(Loaded::Quantized(matrix)) => matrix.dequantize().map(Some),
            None => Ok(None),
        }
    }

    /// A model's weights without adapters.
    pub(super) fn without(&self, gpu: &Gpu, with: ModelAt) -> ModelAt {
        let Some(merging) = &self.merging else {
            return with;
        };
        let layers = merging.base.iter().zip(&with.layers);
        let layers = layers.map(|(base, at)| base.pointers(&gpu.stream, *at));
        ModelAt {
            layers: layers.collect(),
            ..with
        }
    }

    /// Makes the decoder's weights anew from the base and the adapters as they are, where these are merged.
    pub(super) fn merge(
        &self,
        on: On<'_>,
        kernels: &Kernels,
        gemm: &mut Gemm,
        optimizer: &Optimizer,
    ) -> Result<(), CudaError> {
        let Some(Merging { stripe, .. }) = &self.merging else {
            return Ok(());
        };
        let update = stripe.device_ptr(&on.gpu.stream).0;
        let with = ModelAt::of(on.weights, on.gpu);
        let without = self.without(on.gpu, ModelAt::of(on.weights, on.gpu));
        for (index, layer) in self.layers.iter().enumerate() {
            for matrix in LayerMatrix::ALL {
                if let Some(adapted) = layer.of(matrix) {
                    let base = matrix.of(&without.layers[index]).dense()?;
                    let merged = matrix.of(&with.layers[index]).dense()?;
                    let at = [base, update, merged];
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
        (adapted, [base, update, merged]): (&Adapted, [u64; 3]),
    ) -> Result<(), CudaError> {
        let (inputs, rank) = (adapted.inputs, self.rank);
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

impl Merging {
    fn new(on: On<'_>, layers: &[AdaptedLayer]) -> Result<Self, CudaError> {
        let stream = &on.gpu.stream;
        let pairs = layers.iter().zip(&on.weights.layers);
        let base = pairs.map(|(adapted, layer)| Base::of(stream, adapted, layer));
        Ok(Self {
            base: base.collect::<Result<_, _>>()?,
            stripe: stream.alloc_zeros(STRIPE)?,
        })
    }
}

fn address(optimizer: &Optimizer, adapted: &Adapted, rank: usize, scale: f32) -> AdapterAt {
    let parts = adapted.parts.iter();
    AdapterAt {
        a: optimizer.weight(adapted.a),
        parts: parts
            .map(|part| (optimizer.weight(part.b), part.rows.clone()))
            .collect(),
        inputs: adapted.inputs,
        outputs: adapted.outputs,
        rank,
        scale,
    }
}

/// The matrices that are quantised, or have numbers that bf16 rounds. Those of a checkpoint in bf16 have none.
fn beyond_bf16(
    given: CudaWeights<'_>,
    model: &Layout,
) -> Result<BTreeMap<String, Loaded>, PolicyError> {
    let mut beyond = BTreeMap::new();
    for param in model.params.iter().filter(|p| model.slots[p.slot].matrix) {
        let name = &param.name;
        let Some(tensor) = given.tensors.get(name) else {
            let matrix = given.quantized.get(name).ok_or_else(|| missing(name))?;
            beyond.insert(name.clone(), Loaded::Quantized(matrix.clone()));
            continue;
        };
        let values = optimizer::numbers(name, tensor, param.count())?;
        if values.iter().any(|x| bf16::from_f32(*x).to_f32() != *x) {
            beyond.insert(name.clone(), Loaded::Dense(tensor.clone()));
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
        let kept = beyond_bf16(CudaWeights::dense(&tensors), &layout).unwrap();
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["b"]);
        let none = BTreeMap::new();
        assert!(matches!(
            beyond_bf16(CudaWeights::dense(&none), &layout),
            Err(PolicyError::MissingWeight { name }) if name == "a"
        ));
    }
}
