//! The weights on the device: matrices, in bf16 or quantised, with q, k, v and gate, up fused; f32 norms and biases.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use candle_core::{DType, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaError, CudaWeights,
    blocks::{BLOCK, Packed},
    device::Gpu,
    quantized::{Linear, QuantizedLinear},
};
use crate::{error::PolicyError, spec::ModelSpec};

/// Weights of the head that are made bf16 at a time, at least: so many that the launches do not count, so few that they stay
/// in the cache of a large GPU.
const HEAD_PART: usize = 16 << 20;

/// One block of the decoder.
pub(super) struct Layer {
    pub(super) input_norm: CudaSlice<f32>,
    /// `[(Q + 2K)·D, H]`.
    pub(super) qkv: Linear,
    pub(super) qkv_bias: Option<CudaSlice<f32>>,
    /// Of each head of q, and of k, `[2, D]`; Qwen3.
    pub(super) head_norms: Option<CudaSlice<f32>>,
    /// `[H, Q·D]`.
    pub(super) o: Linear,
    pub(super) mlp_norm: CudaSlice<f32>,
    /// `[2F, H]`, the gate first.
    pub(super) gate_up: Linear,
    /// `[H, F]`.
    pub(super) down: Linear,
}

/// All of them.
pub(super) struct Weights {
    /// `[V, H]`.
    pub(super) embed: Linear,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: CudaSlice<f32>,
    /// `[V, H]`; `None` where the embedding is used.
    pub(super) head: Option<Linear>,
    /// `[positions, D]`: cosines, then sines.
    pub(super) rope: CudaSlice<f32>,
    /// Where quantised matrices are made bf16, one at a time; the head in parts.
    pub(super) scratch: Option<CudaSlice<bf16>>,
}

/// Takes weights by name and puts them onto the device.
struct Upload<'a> {
    stream: &'a Arc<CudaStream>,
    weights: CudaWeights<'a>,
}

impl Upload<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, Tensor>, PolicyError> {
        let tensor = match self.weights.tensors.get(name) {
            Some(tensor) => Cow::Borrowed(tensor),
            None => {
                let quantized = self.weights.quantized.get(name);
                let quantized = quantized.ok_or_else(|| PolicyError::MissingWeight {
                    name: name.to_owned(),
                })?;
                Cow::Owned(quantized.dequantize()?)
            }
        };
        if tensor.dims() != shape {
            return Err(PolicyError::WeightShape {
                name: name.to_owned(),
                found: tensor.dims().to_vec(),
                expected: shape.to_vec(),
            });
        }
        Ok(tensor)
    }

    fn floats(&self, names: &[&str], each: &[usize]) -> Result<CudaSlice<f32>, PolicyError> {
        let mut all = Vec::new();
        for (name, n) in names.iter().zip(each) {
            let tensor = self.get(name, &[*n])?.to_dtype(DType::F32)?;
            all.extend(tensor.to_vec1::<f32>()?);
        }
        Ok(self.stream.clone_htod(&all).map_err(CudaError::from)?)
    }

    /// Matrices with the same columns, one below the other.
    fn matrix(
        &self,
        names: &[&str],
        rows: &[usize],
        columns: usize,
    ) -> Result<Linear, PolicyError> {
        let Some(bits) = self.weights.kept(names) else {
            return Ok(Linear::Bf16(self.bf16_matrix(names, rows, columns)?));
        };
        let mut packed = Packed::default();
        for (name, n) in names.iter().zip(rows) {
            let matrix = &self.weights.quantized[*name];
            if matrix.dims() != [*n, columns] {
                return Err(PolicyError::WeightShape {
                    name: (*name).to_owned(),
                    found: matrix.dims().to_vec(),
                    expected: vec![*n, columns],
                });
            }
            packed.push(matrix, bits)?;
        }
        let matrix = QuantizedLinear::new(self.stream, bits, &packed)?;
        Ok(Linear::Quantized(matrix))
    }

    fn bf16_matrix(
        &self,
        names: &[&str],
        rows: &[usize],
        columns: usize,
    ) -> Result<CudaSlice<bf16>, PolicyError> {
        let mut all = Vec::new();
        for (name, n) in names.iter().zip(rows) {
            let tensor = self.get(name, &[*n, columns])?.to_dtype(DType::BF16)?;
            all.extend(tensor.flatten_all()?.to_vec1::<bf16>()?);
        }
        Ok(self.stream.clone_htod(&all).map_err(CudaError::from)?)
    }

    fn layer(&self, spec: &ModelSpec, index: usize) -> Result<Layer, PolicyError> {
        let (h, q, kv, f, d) = (
            spec.hidden_size,
            spec.q_dim(),
            spec.kv_dim(),
            spec.intermediate_size,
            spec.head_dim,
        );
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let attention = |part: &str, kind: &str| name(&format!("self_attn.{part}_proj.{kind}"));
        let [q_w, k_w, v_w] = ["q", "k", "v"].map(|part| attention(part, "weight"));
        let [q_b, k_b, v_b] = ["q", "k", "v"].map(|part| attention(part, "bias"));
        let head_norms = match spec.qk_norm {
            true => {
                let [q, k] = ["q", "k"].map(|part| name(&format!("self_attn.{part}_norm.weight")));
                Some(self.floats(&[&q, &k], &[d, d])?)
            }
            false => None,
        };
        let qkv_bias = match spec.qkv_bias {
            true => Some(self.floats(&[&q_b, &k_b, &v_b], &[q, kv, kv])?),
            false => None,
        };
        Ok(Layer {
            input_norm: self.floats(&[&name("input_layernorm.weight")], &[h])?,
            qkv: self.matrix(&[&q_w, &k_w, &v_w], &[q, kv, kv], h)?,
            qkv_bias,
            head_norms,
            o: self.matrix(&[&attention("o", "weight")], &[h], q)?,
            mlp_norm: self.floats(&[&name("post_attention_layernorm.weight")], &[h])?,
            gate_up: self.matrix(
                &[&name("mlp.gate_proj.weight"), &name("mlp.up_proj.weight")],
                &[f, f],
                h,
            )?,
            down: self.matrix(&[&name("mlp.down_proj.weight")], &[h], f)?,
        })
    }
}

impl Weights {
    /// Uploads a model; `positions` rows of the rotation table are made.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        spec: &ModelSpec,
        weights: CudaWeights<'_>,
        positions: usize,
    ) -> Result<Self, PolicyError> {
        let upload = Upload { stream, weights };
        let (v, h) = (spec.vocab_size, spec.hidden_size);
        let layers = (0..spec.num_hidden_layers)
            .map(|index| upload.layer(spec, index))
            .collect::<Result<Vec<_>, _>>()?;
        let head = match spec.tie_word_embeddings {
            true => None,
            false => Some(upload.matrix(&["lm_head.weight"], &[v], h)?),
        };
        let rope = stream
            .clone_htod(&rope(spec, positions))
            .map_err(CudaError::from)?;
        let embed = upload.matrix(&["model.embed_tokens.weight"], &[v], h)?;
        let scratch = match scratch_weights(&layers, head.as_ref().unwrap_or(&embed)) {
            0 => None,
            n => Some(stream.alloc_zeros(n).map_err(CudaError::from)?),
        };
        Ok(Self {
            embed,
            layers,
            norm: upload.floats(&["model.norm.weight"], &[h])?,
            head,
            rope,
            scratch,
        })
    }

    /// `[V, H]`.
    pub(super) fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Makes a quantised head bf16 for good.
    pub(super) fn dequantize_head(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        self.head
            .as_mut()
            .unwrap_or(&mut self.embed)
            .dequantize(gpu)
    }

    /// Address of the scratch buffer; 0 where nothing is quantised.
    pub(super) fn scratch_at(&self, stream: &Arc<CudaStream>) -> u64 {
        self.scratch.as_ref().map_or(0, |s| s.device_ptr(stream).0)
    }

    /// Of the head's `[vocab, hidden]`, the rows that are made bf16 at a time: all, or a multiple of 64, so that their logits
    /// begin at addresses that cublasLt likes.
    pub(super) fn head_part(&self, vocab: usize, hidden: usize) -> usize {
        let rows = self.scratch.as_ref().map_or(0, CudaSlice::len) / hidden;
        match rows < vocab {
            true => rows / 64 * 64,
            false => vocab,
        }
    }

    /// Numbers of the largest quantised matrix of layers and head; 0 where none is quantised.
    pub(super) fn largest_quantized(&self) -> usize {
        let of_layer = |l: &Layer| largest_quantized([&l.qkv, &l.o, &l.gate_up, &l.down]);
        let layers = self.layers.iter().map(of_layer).max().unwrap_or(0);
        layers.max(self.head().quantized_weights())
    }

    /// Whether more than half of the layers' weights are.
    pub(super) fn is_mostly_quantized(&self) -> bool {
        let matrices = |l: &Layer| {
            [&l.qkv, &l.o, &l.gate_up, &l.down].map(|m| (m.quantized_weights(), m.weights()))
        };
        let all = self.layers.iter().flat_map(matrices);
        let (kept, all) = all.fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        2 * kept > all
    }

    /// Bytes of all of them on the device, without the scratch buffer.
    pub(super) fn bytes(&self) -> usize {
        let optional = |s: Option<&CudaSlice<f32>>| s.map_or(0, CudaSlice::num_bytes);
        let of_layer = |l: &Layer| {
            let matrices = [&l.qkv, &l.o, &l.gate_up, &l.down].map(Linear::bytes);
            let vectors = [
                Some(&l.input_norm),
                Some(&l.mlp_norm),
                l.qkv_bias.as_ref(),
                l.head_norms.as_ref(),
            ];
            matrices.iter().sum::<usize>() + vectors.map(optional).iter().sum::<usize>()
        };
        self.layers.iter().map(of_layer).sum::<usize>()
            + self.embed.bytes()
            + self.head.as_ref().map_or(0, Linear::bytes)
            + self.norm.num_bytes()
            + self.rope.num_bytes()
    }
}

/// Most that is made bf16 at a time, in weights.
fn scratch_weights(layers: &[Layer], head: &Linear) -> usize {
    let of_layer = |l: &Layer| largest_quantized([&l.qkv, &l.o, &l.gate_up, &l.down]);
    let largest = layers.iter().map(of_layer).max().unwrap_or(0);
    largest.max(head.quantized_weights().min(HEAD_PART))
}

fn largest_quantized(matrices: [&Linear; 4]) -> usize {
    let sizes = matrices.map(Linear::quantized_weights);
    sizes.into_iter().max().unwrap_or(0)
}

/// What a model needs before anything of it is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WeightSizes {
    /// Bytes of all weights and of the rotation table.
    pub(super) weights: usize,
    /// Of these, bytes that a decoding step reads: of embeddings that are not the head, too few rows to count.
    pub(super) read: usize,
    /// Bytes of the scratch buffer.
    pub(super) scratch: usize,
}

impl WeightSizes {
    /// Of a model with `positions` positions.
    pub(super) fn of(spec: &ModelSpec, given: CudaWeights<'_>, positions: usize) -> Self {
        let head = match spec.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        let shapes: BTreeMap<String, Vec<usize>> = spec.weight_shapes().into_iter().collect();
        let count = |name: &str| shapes.get(name).map_or(0, |s| s.iter().product::<usize>());
        let mut sizes = Self {
            weights: positions * spec.head_dim * size_of::<f32>(),
            read: 0,
            scratch: 0,
        };
        for (name, shape) in &shapes {
            let fused = fused_with(name);
            let fused: Vec<&str> = fused.iter().map(String::as_str).collect();
            let kept = match shape.len() {
                1 => None,
                _ => given.kept(&fused),
            };
            let bytes = match kept {
                Some(bits) => count(name) / BLOCK * (bits.block_bytes() + size_of::<u32>()),
                None if shape.len() == 1 => count(name) * size_of::<f32>(),
                None => count(name) * size_of::<bf16>(),
            };
            sizes.weights += bytes;
            let (read, made) = match name.as_str() {
                "model.embed_tokens.weight" if name != head => (0, 0),
                _ if name == head => (bytes, count(name).min(HEAD_PART)),
                _ => (bytes, fused.iter().map(|name| count(name)).sum()),
            };
            sizes.read += read;
            if kept.is_some() {
                sizes.scratch = sizes.scratch.max(made * size_of::<bf16>());
            }
        }
        sizes
    }
}

/// The matrices that lie in one with `name`, itself among them.
pub(super) fn fused_with(name: &str) -> Vec<String> {
    let groups: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];
    for group in groups {
        if let Some(own) = group.iter().find(|part| name.contains(*part)) {
            return group.iter().map(|part| name.replace(own, part)).collect();
        }
    }
    vec![name.to_owned()]
}

/// Norm `[hidden]` and adapter `[hidden, hidden]` of an early exit, by the names the CPU exports them under.
pub(super) fn draft_head(
    stream: &Arc<CudaStream>,
    tensors: &BTreeMap<String, Tensor>,
    hidden: usize,
) -> Result<(CudaSlice<f32>, CudaSlice<bf16>), PolicyError> {
    let upload = Upload {
        stream,
        weights: CudaWeights::dense(tensors),
    };
    let norm = upload.floats(&["draft_head.norm.weight"], &[hidden])?;
    let adapter = upload.bf16_matrix(&["draft_head.adapter.weight"], &[hidden], hidden)?;
    Ok((norm, adapter))
}

/// Cosines and sines of every position (Su et al. 2021), in f64 and then rounded.
fn rope(spec: &ModelSpec, positions: usize) -> Vec<f32> {
    let d = spec.head_dim;
    let divisors = spec
        .rope_scaling
        .map_or_else(|| vec![1.0; d / 2], |s| s.divisors(d, spec.rope_theta));
    let frequency = |i: usize| spec.rope_theta.powf(-2.0 * i as f64 / d as f64) / divisors[i];
    let angle = |p: usize, i: usize| p as f64 * frequency(i);
    let row = |p: usize| {
        let cosines = (0..d / 2).map(move |i| angle(p, i).cos() as f32);
        let sines = (0..d / 2).map(move |i| angle(p, i).sin() as f32);
        cosines.chain(sines).collect::<Vec<_>>()
    };
    (0..positions).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::*;
    use crate::{
        spec::Family,
        weights::{Quantized, QuantizedMatrix, random_weights},
    };

    const SPEC: ModelSpec = ModelSpec {
        family: Family::Llama,
        vocab_size: 100,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 32,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
    };

    fn sizes(format: impl Fn(&str) -> Option<GgmlDType>) -> WeightSizes {
        let mut tensors = random_weights(&SPEC, 1).unwrap();
        let mut quantized = Quantized::new();
        for (name, shape) in SPEC.weight_shapes() {
            let Some(format) = format(&name).filter(|_| shape.len() == 2) else {
                continue;
            };
            let tensor = tensors.remove(&name).unwrap();
            quantized.insert(name, QuantizedMatrix::quantize(&tensor, format).unwrap());
        }
        let given = CudaWeights {
            tensors: &tensors,
            quantized: &quantized,
            keep: true,
        };
        let kept = WeightSizes::of(&SPEC, given, 10);
        // What is not kept takes as much as what never was quantised.
        let made = CudaWeights {
            keep: false,
            ..given
        };
        assert_eq!(
            WeightSizes::of(&SPEC, made, 10),
            expected(2 * LAYERS, 2 * ENDS, 0),
        );
        kept
    }

    /// q, k, v; o; gate, up; down of both layers.
    const LAYERS: usize = 2 * 64 * (128 + 64 + 192 + 96);
    /// Embedding and head.
    const ENDS: usize = 2 * 100 * 64;
    /// Norms and the rotation table, in f32.
    const VECTORS: usize = 4 * 5 * 64;
    const TABLE: usize = 4 * 10 * 32;

    /// From bytes of the layers' matrices and of the ends, of which the second half is the head.
    fn expected(layers: usize, ends: usize, scratch: usize) -> WeightSizes {
        WeightSizes {
            weights: layers + ends + VECTORS + TABLE,
            read: layers + ends / 2 + VECTORS,
            scratch,
        }
    }

    #[test]
    fn bytes_of_kept_weights_and_of_the_largest_made_bf16() {
        let four = sizes(|name| name.contains("layers").then_some(GgmlDType::Q4_0));
        // Gate and up.
        let scratch = 2 * 192 * 64;
        assert_eq!(four, expected(LAYERS * 20 / 32, 2 * ENDS, scratch));
        let all = sizes(|_| Some(GgmlDType::Q8_0));
        let eight = expected(LAYERS * 36 / 32, ENDS * 36 / 32, scratch);
        assert_eq!(all, eight);
        // An embedding that is not the head is only read row by row.
        let embedding = sizes(|name| name.contains("embed").then_some(GgmlDType::Q4_1));
        let dense = expected(2 * LAYERS, 2 * ENDS, 0);
        let weights = dense.weights - ENDS + ENDS / 2 * 20 / 32;
        assert_eq!(embedding, WeightSizes { weights, ..dense });
    }

    #[test]
    fn one_that_needs_more_bits_decides_for_all_that_lie_in_one() {
        let one = sizes(|name| {
            let formats = [("v_proj", GgmlDType::Q8_0), ("up_proj", GgmlDType::F16)];
            let other = formats.iter().find(|(part, _)| name.contains(part));
            let format = other.map_or(GgmlDType::Q4_0, |(_, format)| *format);
            (name.contains("layers") && format != GgmlDType::F16).then_some(format)
        });
        let layer = 64 * (128 * 36 / 32 + (64 + 96) * 20 / 32 + 192 * 2);
        // q, k, v.
        let scratch = 2 * 128 * 64;
        assert_eq!(one, expected(2 * layer, 2 * ENDS, scratch));
    }
}
