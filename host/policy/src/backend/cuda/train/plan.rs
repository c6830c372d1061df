//! What training takes of a GPU's memory, from sizes alone.

use std::collections::BTreeMap;

use half::bf16;
use serde::Serialize;

use super::{
    adapters,
    arena::{Arena, Kept},
    layout,
    optimizer::{self, Moments},
    sizes,
};
use crate::{
    backend::{
        cpu::Trainable,
        cuda::{
            CudaWeights,
            weights::{WeightSizes, fused_with},
        },
    },
    spec::ModelSpec,
};

/// What trains, and how.
#[derive(Clone, Copy, Debug)]
pub struct Learns<'a> {
    pub trainable: &'a Trainable,
    /// Whether LoRA is merged into the weights after every update, or applied beside them; `None`: where no weight is quantised.
    pub merge: Option<bool>,
    pub moments: Moments,
}

impl<'a> Learns<'a> {
    /// This, in the usual way.
    pub fn of(trainable: &'a Trainable) -> Self {
        Self {
            trainable,
            merge: None,
            moments: Moments::F32,
        }
    }
}

/// Bytes of training beside the weights that the decoder reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TrainingPlan {
    /// Masters, f32, and moments; the frozen base or the reference beside the policy, and where passes make quantised matrices
    /// bf16.
    pub state: usize,
    /// f32.
    pub gradients: usize,
    /// What passes keep, scratch, logits of a chunk.
    pub activations: usize,
    /// Tokens of the passes that this is for.
    pub tokens: usize,
    /// Layers whose activations are made again in the backward pass, one at a time: the first so many.
    pub recomputed_layers: usize,
}

impl TrainingPlan {
    /// All of it.
    pub fn bytes(&self) -> usize {
        self.state + self.gradients + self.activations
    }
}

/// What passes of `tokens` tokens and the optimizer of `trainable` take on a GPU with so many multiprocessors, beside weights as
/// they are given.
pub fn training_bytes(
    (spec, given): (&ModelSpec, CudaWeights<'_>),
    learns: Learns<'_>,
    (tokens, kept): (usize, Kept),
    multiprocessors: usize,
) -> TrainingPlan {
    let Learns {
        trainable,
        merge,
        moments,
    } = learns;
    let unpacked = unpacked_bytes(spec, given);
    let ((state, gradients), beside) = match trainable {
        Trainable::Nothing => ((0, 0), 0),
        Trainable::Full { keep_reference } => {
            let (layout, _) = layout::of_model(spec);
            let none = BTreeMap::new();
            let frozen = WeightSizes::of(spec, CudaWeights::dense(&none), 0).weights;
            let beside = if *keep_reference { frozen } else { 0 };
            (optimizer::bytes(&layout, moments), beside)
        }
        Trainable::Lora { config, .. } => {
            let (layout, layers) = layout::of_adapters(spec, config);
            let merge = merge.unwrap_or(unpacked == 0);
            let beside = adapters::bytes(&layout, &layers, merge);
            (optimizer::bytes(&layout, moments), beside)
        }
    };
    let sizes = sizes(trainable, tokens, kept, multiprocessors);
    TrainingPlan {
        state: state + beside + unpacked,
        gradients,
        activations: Arena::new(spec, &sizes).bytes,
        tokens,
        recomputed_layers: sizes.kept.recomputed(spec.num_hidden_layers),
    }
}

/// Bytes of the largest matrix of the layers and the head that stays quantised, as bf16.
fn unpacked_bytes(spec: &ModelSpec, given: CudaWeights<'_>) -> usize {
    let shapes: BTreeMap<String, Vec<usize>> = spec.weight_shapes().into_iter().collect();
    let count = |name: &String| shapes.get(name).map_or(0, |s| s.iter().product::<usize>());
    let bytes = |(name, shape): (&String, &Vec<usize>)| {
        let unread = !spec.tie_word_embeddings && name == "model.embed_tokens.weight";
        let fused = fused_with(name);
        let names: Vec<&str> = fused.iter().map(String::as_str).collect();
        let kept = shape.len() > 1 && !unread && given.kept(&names).is_some();
        let numbers: usize = fused.iter().map(count).sum();
        if kept { numbers * size_of::<bf16>() } else { 0 }
    };
    shapes.iter().map(bytes).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor, quantized::GgmlDType};

    use super::*;
    use crate::{
        spec::Family,
        weights::{LoraConfig, Quantized, QuantizedMatrix},
    };

    fn spec() -> ModelSpec {
        ModelSpec {
            family: Family::Llama,
            vocab_size: 1024,
            hidden_size: 256,
            intermediate_size: 512,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 64,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_word_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            qk_norm: false,
        }
    }

    #[test]
    fn an_optimizer_is_four_numbers_a_weight() {
        let plan = |keep_reference| {
            let trainable = Trainable::Full { keep_reference };
            let none = BTreeMap::new();
            let given = (&spec(), CudaWeights::dense(&none));
            training_bytes(given, Learns::of(&trainable), (512, Kept::ACTIVATIONS), 132)
        };
        // Every size is a multiple of what buffers are rounded up to.
        let weights = spec().parameters();
        assert_eq!(plan(false).gradients, 4 * weights);
        assert_eq!(plan(false).state, 12 * weights);
        let vectors = 5 * 256;
        assert_eq!(plan(true).state, 12 * weights + 2 * weights + 2 * vectors);
        let halved = Learns {
            moments: Moments::Bf16,
            ..Learns::of(&Trainable::Full {
                keep_reference: false,
            })
        };
        let none = BTreeMap::new();
        let given = (&spec(), CudaWeights::dense(&none));
        let halved = training_bytes(given, halved, (512, Kept::ACTIVATIONS), 132);
        assert_eq!((halved.state, halved.gradients), (8 * weights, 4 * weights));
        let all = plan(true);
        assert_eq!(all.bytes(), all.state + all.gradients + all.activations);
    }

    #[test]
    fn recomputing_takes_less_and_lora_less_state() {
        let full = Trainable::Full {
            keep_reference: false,
        };
        let config = LoraConfig {
            r: 8,
            alpha: 16.0,
            targets: vec!["q_proj".to_owned()],
        };
        let none = BTreeMap::new();
        let merged = |trainable: &Trainable, kept, merge| {
            let given = (&spec(), CudaWeights::dense(&none));
            let learns = Learns {
                merge,
                ..Learns::of(trainable)
            };
            training_bytes(given, learns, (512, kept), 132)
        };
        let plan = |trainable: &Trainable, kept| merged(trainable, kept, None);
        let kept = plan(&full, Kept::ACTIVATIONS);
        let again = plan(&full, Kept::INPUTS);
        assert_eq!((again.recomputed_layers, kept.recomputed_layers), (2, 0));
        assert!(again.activations < kept.activations);
        let lora = Trainable::Lora { config, seed: 1 };
        let beside = merged(&lora, Kept::INPUTS, Some(false));
        let lora = plan(&lora, Kept::INPUTS);
        // 8 · (256 + 256) numbers a layer; the base of qkv, [512, 256], once more; a stripe.
        let numbers = 2 * 8 * 512;
        assert_eq!(lora.gradients, 4 * numbers);
        assert_eq!(
            lora.state,
            12 * numbers + 2 * numbers + 2 * 2 * 512 * 256 + (32 << 20)
        );
        assert_eq!(beside.state, 12 * numbers + 2 * numbers);
        assert_eq!(beside.activations, lora.activations);
        let nothing = plan(&Trainable::Nothing, Kept::ACTIVATIONS);
        assert_eq!((nothing.state, nothing.gradients), (0, 0));
    }

    /// Weights of any numbers in blocks of 32, those of which the name says `part`.
    fn quantized(part: &str) -> Quantized {
        let shapes = spec().weight_shapes().into_iter();
        let named = shapes.filter(|(name, shape)| shape.len() == 2 && name.contains(part));
        named
            .map(|(name, shape)| {
                let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
                let matrix = QuantizedMatrix::quantize(&zeros, GgmlDType::Q4_0).unwrap();
                (name, matrix)
            })
            .collect()
    }

    #[test]
    fn adapters_beside_a_quantised_base_have_no_copy_of_it_but_the_largest_matrix() {
        let config = LoraConfig {
            r: 8,
            alpha: 16.0,
            targets: vec!["q_proj".to_owned()],
        };
        let lora = Trainable::Lora { config, seed: 1 };
        let none = BTreeMap::new();
        let state = |part: &str| {
            let quantized = quantized(part);
            let given = CudaWeights {
                tensors: &none,
                quantized: &quantized,
                keep: true,
            };
            training_bytes(
                (&spec(), given),
                Learns::of(&lora),
                (512, Kept::INPUTS),
                132,
            )
            .state
        };
        let numbers = 2 * 8 * 512;
        // Gate and up, [1024, 256]; the embedding, which is the head, [1024, 256]; q, k and v, [512, 256].
        assert_eq!(state("proj"), 14 * numbers + 2 * 1024 * 256);
        assert_eq!(state("embed"), 14 * numbers + 2 * 1024 * 256);
        assert_eq!(state("self_attn"), 14 * numbers + 2 * 512 * 256);
        // One of three alone becomes bf16 with the others.
        assert!(state("q_proj") > 14 * numbers + (32 << 20));
    }
}
