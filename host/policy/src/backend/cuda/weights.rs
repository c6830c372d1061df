//! The weights on the device: bf16 matrices with q, k, v and gate, up fused; f32 norms and biases.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::CudaError;
use crate::{error::PolicyError, spec::ModelSpec};

/// One block of the decoder.
pub(super) struct Layer {
    pub(super) input_norm: CudaSlice<f32>,
    /// `[(Q + 2K)·D, H]`.
    pub(super) qkv: CudaSlice<bf16>,
    pub(super) qkv_bias: Option<CudaSlice<f32>>,
    /// Of each head of q, and of k, `[2, D]`; Qwen3.
    pub(super) head_norms: Option<CudaSlice<f32>>,
    /// `[H, Q·D]`.
    pub(super) o: CudaSlice<bf16>,
    pub(super) mlp_norm: CudaSlice<f32>,
    /// `[2F, H]`, the gate first.
    pub(super) gate_up: CudaSlice<bf16>,
    /// `[H, F]`.
    pub(super) down: CudaSlice<bf16>,
}

/// All of them.
pub(super) struct Weights {
    /// `[V, H]`.
    pub(super) embed: CudaSlice<bf16>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: CudaSlice<f32>,
    /// `[V, H]`; `None` where the embedding is used.
    pub(super) head: Option<CudaSlice<bf16>>,
    /// `[positions, D]`: cosines, then sines.
    pub(super) rope: CudaSlice<f32>,
}

/// Takes weights by name and puts them onto the device.
struct Upload<'a> {
    stream: &'a Arc<CudaStream>,
    tensors: &'a BTreeMap<String, Tensor>,
}

impl Upload<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<&Tensor, PolicyError> {
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| PolicyError::MissingWeight {
                name: name.to_owned(),
            })?;
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
        tensors: &BTreeMap<String, Tensor>,
        positions: usize,
    ) -> Result<Self, PolicyError> {
        let upload = Upload { stream, tensors };
        let (v, h) = (spec.vocab_size, spec.hidden_size);
        let layers = (0..spec.num_hidden_layers)
            .map(|index| upload.layer(spec, index))
            .collect::<Result<_, _>>()?;
        let head = match spec.tie_word_embeddings {
            true => None,
            false => Some(upload.matrix(&["lm_head.weight"], &[v], h)?),
        };
        let rope = stream
            .clone_htod(&rope(spec, positions))
            .map_err(CudaError::from)?;
        Ok(Self {
            embed: upload.matrix(&["model.embed_tokens.weight"], &[v], h)?,
            layers,
            norm: upload.floats(&["model.norm.weight"], &[h])?,
            head,
            rope,
        })
    }
}

impl Weights {
    /// Addresses of all buffers but the rotation table, in the order of the fields of [`Layer`] and, around the layers,
    /// embedding, norm, head.
    pub(super) fn buffers(&self, stream: &Arc<CudaStream>) -> Vec<u64> {
        let floats = |s: &CudaSlice<f32>| s.device_ptr(stream).0;
        let matrix = |s: &CudaSlice<bf16>| s.device_ptr(stream).0;
        let mut all = vec![matrix(&self.embed)];
        for layer in &self.layers {
            all.extend([floats(&layer.input_norm), matrix(&layer.qkv)]);
            all.extend(layer.qkv_bias.as_ref().map(floats));
            all.extend(layer.head_norms.as_ref().map(floats));
            all.extend([matrix(&layer.o), floats(&layer.mlp_norm)]);
            all.extend([matrix(&layer.gate_up), matrix(&layer.down)]);
        }
        all.push(floats(&self.norm));
        all.extend(self.head.as_ref().map(matrix));
        all
    }

    /// The same numbers in buffers of their own.
    pub(super) fn copy(&self, stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        let floats = |s: &CudaSlice<f32>| stream.clone_dtod(s);
        let matrix = |s: &CudaSlice<bf16>| stream.clone_dtod(s);
        let layer = |layer: &Layer| {
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
        })
    }
}

/// Norm `[hidden]` and adapter `[hidden, hidden]` of an early exit, by the names the CPU exports them under.
pub(super) fn draft_head(
    stream: &Arc<CudaStream>,
    tensors: &BTreeMap<String, Tensor>,
    hidden: usize,
) -> Result<(CudaSlice<f32>, CudaSlice<bf16>), PolicyError> {
    let upload = Upload { stream, tensors };
    let norm = upload.floats(&["draft_head.norm.weight"], &[hidden])?;
    let adapter = upload.matrix(&["draft_head.adapter.weight"], &[hidden], hidden)?;
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
