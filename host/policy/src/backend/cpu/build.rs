//! From named tensors to [`Decoder`] and [`Params`]: every weight is looked up once, by the checkpoint's
//! name, and its shape is held to the spec.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use super::{
    Trainable,
    attention::Heads,
    decoder::{Decoder, Layer},
    head::Head,
    linear::{Linear, Lora},
    mat::Mat,
    ops::Rope,
    params::{ParamId, Params},
};
use crate::{
    error::PolicyError,
    spec::ModelSpec,
    weights::{LoraConfig, random_a},
};

/// Looks weights up and registers them.
struct Builder<'a> {
    spec: &'a ModelSpec,
    tensors: &'a BTreeMap<String, Tensor>,
    trainable: &'a Trainable,
    params: Params,
    rng: ChaCha8Rng,
}

/// Builds the network; LoRA adapters are made here, `A` random (uniform in ±1/√in, PEFT's default) and
/// `B` zero, so that the policy starts as the reference.
pub(crate) fn build(
    spec: &ModelSpec,
    tensors: &BTreeMap<String, Tensor>,
    trainable: &Trainable,
) -> Result<(Decoder, Params), PolicyError> {
    if let Trainable::Lora { config, .. } = trainable {
        config.check_targets()?;
    }
    let seed = match trainable {
        Trainable::Lora { seed, .. } => *seed,
        _ => 0,
    };
    let mut b = Builder {
        spec,
        tensors,
        trainable,
        params: Params::default(),
        rng: ChaCha8Rng::seed_from_u64(seed),
    };
    let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
    let embed_tokens = b.matrix("model.embed_tokens.weight", vocab, hidden)?;
    let layers = (0..spec.num_hidden_layers)
        .map(|i| b.layer(&format!("model.layers.{i}")))
        .collect::<Result<_, _>>()?;
    let norm = b.vector("model.norm.weight", hidden)?;
    let weight = match spec.tie_word_embeddings {
        true => embed_tokens,
        false => b.matrix("lm_head.weight", vocab, hidden)?,
    };
    let eps = spec.rms_norm_eps as f32;
    let decoder = Decoder {
        embed_tokens,
        layers,
        head: Head::new(norm, weight, eps, spec.vocab_size),
        rope: Rope::new(spec),
        heads: Heads::of(spec),
        eps,
    };
    Ok((decoder, b.params))
}

impl Builder<'_> {
    fn take(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        rank: usize,
    ) -> Result<ParamId, PolicyError> {
        let missing = || PolicyError::MissingWeight {
            name: name.to_owned(),
        };
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let expected = if rank == 1 {
            vec![cols]
        } else {
            vec![rows, cols]
        };
        if tensor.dims() != expected {
            let (name, found) = (name.to_owned(), tensor.dims().to_vec());
            return Err(PolicyError::WeightShape {
                name,
                found,
                expected,
            });
        }
        let data = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let trainable = matches!(self.trainable, Trainable::Full { .. });
        Ok(self
            .params
            .add(name, Mat::from_vec(rows, cols, data), rank, trainable))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<ParamId, PolicyError> {
        self.take(name, rows, cols, 2)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<ParamId, PolicyError> {
        self.take(name, 1, len, 1)
    }

    fn linear(
        &mut self,
        name: &str,
        out: usize,
        input: usize,
        bias: bool,
    ) -> Result<Linear, PolicyError> {
        let weight = self.matrix(&format!("{name}.weight"), out, input)?;
        let bias = match bias {
            true => Some(self.vector(&format!("{name}.bias"), out)?),
            false => None,
        };
        let lora = match self.trainable {
            Trainable::Lora { config, .. } if config.targets_module(name) => {
                Some(self.adapter(name, out, input, config))
            }
            _ => None,
        };
        Ok(Linear { weight, bias, lora })
    }

    fn adapter(&mut self, name: &str, out: usize, input: usize, config: &LoraConfig) -> Lora {
        let a = random_a(&mut self.rng, config.r, input);
        let a = Mat::from_vec(config.r, input, a);
        let b = Mat::zeros(out, config.r);
        Lora {
            a: self
                .params
                .add(&format!("{name}.lora_A.weight"), a, 2, true),
            b: self
                .params
                .add(&format!("{name}.lora_B.weight"), b, 2, true),
            scale: config.scale() as f32,
        }
    }

    fn layer(&mut self, at: &str) -> Result<Layer, PolicyError> {
        let spec = self.spec;
        let (hidden, inner, dim) = (spec.hidden_size, spec.intermediate_size, spec.head_dim);
        let (q_out, kv_out) = (
            spec.num_attention_heads * dim,
            spec.num_key_value_heads * dim,
        );
        let qk_norm = match spec.qk_norm {
            true => Some((
                self.vector(&format!("{at}.self_attn.q_norm.weight"), dim)?,
                self.vector(&format!("{at}.self_attn.k_norm.weight"), dim)?,
            )),
            false => None,
        };
        let proj = |kind: &str| format!("{at}.self_attn.{kind}_proj");
        let mlp = |kind: &str| format!("{at}.mlp.{kind}_proj");
        Ok(Layer {
            input_layernorm: self.vector(&format!("{at}.input_layernorm.weight"), hidden)?,
            q_proj: self.linear(&proj("q"), q_out, hidden, spec.qkv_bias)?,
            k_proj: self.linear(&proj("k"), kv_out, hidden, spec.qkv_bias)?,
            v_proj: self.linear(&proj("v"), kv_out, hidden, spec.qkv_bias)?,
            o_proj: self.linear(&proj("o"), hidden, q_out, spec.o_bias)?,
            qk_norm,
            post_attention_layernorm: self
                .vector(&format!("{at}.post_attention_layernorm.weight"), hidden)?,
            gate_proj: self.linear(&mlp("gate"), inner, hidden, false)?,
            up_proj: self.linear(&mlp("up"), inner, hidden, false)?,
            down_proj: self.linear(&mlp("down"), hidden, inner, false)?,
        })
    }
}
