//! Tensors of a GGUF file under their Hugging Face names: vectors and plain matrices in f32, the others as they are.

use candle_core::Tensor;

use super::{Quantized, QuantizedMatrix, Weights};
use crate::{
    error::PolicyError,
    gguf::Gguf,
    spec::{Family, ModelSpec},
};

/// Errors: [`PolicyError::UnexpectedWeight`] for a tensor without a Hugging Face name.
pub(super) fn tensors(
    file: &mut Gguf,
    spec: &ModelSpec,
) -> Result<(Weights, Quantized), PolicyError> {
    let names: Vec<String> = file.content.tensor_infos.keys().cloned().collect();
    let (mut weights, mut quantized) = (Weights::new(), Quantized::new());
    for name in names {
        // Already in the spec.
        if name == "rope_freqs.weight" {
            continue;
        }
        let Some(target) = hugging_face_name(&name) else {
            return Err(PolicyError::UnexpectedWeight { name });
        };
        let heads = match spec.family {
            Family::Llama if target.contains(".q_proj.") => Some(spec.num_attention_heads),
            Family::Llama if target.contains(".k_proj.") => Some(spec.num_key_value_heads),
            _ => None,
        };
        let info = &file.content.tensor_infos[&name];
        if info.ggml_dtype.block_size() > 1
            && info.shape.rank() == 2
            && let Some(matrix) = QuantizedMatrix::new(file.stored(&name)?)
        {
            let matrix = match heads {
                Some(heads) => split_rows(&matrix, heads)?,
                None => matrix,
            };
            quantized.insert(target, matrix);
            continue;
        }
        let tensor = file.tensor(&name)?;
        let tensor = match heads {
            Some(heads) => split_halves(&tensor, heads)?,
            None => tensor,
        };
        weights.insert(target, tensor);
    }
    Ok((weights, quantized))
}

fn hugging_face_name(name: &str) -> Option<String> {
    let fixed = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(fixed) = fixed {
        return Some(fixed.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Undoes the row order of Llama GGUF files. They store the two halves of a rotary pair next to each other
/// (row `2 j + i` of a head); Hugging Face stores all first halves, then all second ones (row
/// `i · head_dim / 2 + j`). Qwen files keep the Hugging Face order. Takes `[heads · head_dim, in]` or a bias.
fn split_halves(tensor: &Tensor, heads: usize) -> Result<Tensor, PolicyError> {
    let dims = tensor.dims().to_vec();
    let (rows, columns) = match dims[..] {
        [rows] => (rows, 1),
        [rows, columns] => (rows, columns),
        _ => return Ok(tensor.clone()),
    };
    if !rows.is_multiple_of(2 * heads) {
        // The shape check that follows names the weight.
        return Ok(tensor.clone());
    }
    Ok(tensor
        .reshape((heads, rows / heads / 2, 2, columns))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape(dims)?)
}

/// The same of rows of blocks.
fn split_rows(matrix: &QuantizedMatrix, heads: usize) -> Result<QuantizedMatrix, PolicyError> {
    let [rows, _] = matrix.dims();
    if !rows.is_multiple_of(2 * heads) {
        return Ok(matrix.clone());
    }
    let dim = rows / heads;
    matrix.reordered(|row| {
        let (head, within) = (row / dim, row % dim);
        let (half, pair) = (within / (dim / 2), within % (dim / 2));
        head * dim + 2 * pair + half
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, quantized::GgmlDType};

    use super::*;

    #[test]
    fn rows_of_blocks_move_like_rows_of_floats() {
        let values: Vec<f32> = (0..24 * 64)
            .map(|i| ((i * 37) % 101) as f32 - 50.0)
            .collect();
        let tensor = Tensor::from_vec(values, (24, 64), &Device::Cpu).unwrap();
        let matrix = QuantizedMatrix::quantize(&tensor, GgmlDType::Q4_1).unwrap();
        let all = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let expected = split_halves(&matrix.dequantize().unwrap(), 3).unwrap();
        let found = split_rows(&matrix, 3).unwrap().dequantize().unwrap();
        assert_eq!(all(&found), all(&expected));
        assert_ne!(all(&found), all(&matrix.dequantize().unwrap()));
    }

    #[test]
    fn interleaved_rows_become_halves() {
        // Two heads of four rows; the value is the row's Hugging Face index.
        let stored = [0f32, 2., 1., 3., 4., 6., 5., 7.];
        let tensor = Tensor::from_slice(&stored, (8, 1), &Device::Cpu).unwrap();
        let rows: Vec<f32> = split_halves(&tensor, 2)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(rows, [0., 1., 2., 3., 4., 5., 6., 7.]);
    }

    #[test]
    fn names_of_every_kind() {
        assert_eq!(
            hugging_face_name("blk.12.attn_q.bias").as_deref(),
            Some("model.layers.12.self_attn.q_proj.bias")
        );
        assert_eq!(
            hugging_face_name("blk.0.ffn_norm.weight").as_deref(),
            Some("model.layers.0.post_attention_layernorm.weight")
        );
        assert_eq!(hugging_face_name("blk.0.ffn_gate_exps.weight"), None);
    }
}
