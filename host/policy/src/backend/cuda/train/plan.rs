//! What training takes of a GPU's memory, from sizes alone.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    adapters,
    arena::{Arena, Kept},
    layout, optimizer, sizes,
};
use crate::{
    backend::{
        cpu::Trainable,
        cuda::{CudaWeights, weights::WeightSizes},
    },
    spec::ModelSpec,
    weights::LoraConfig,
};

/// Bytes of training beside the weights that the decoder reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TrainingPlan {
    /// Masters and moments, f32; the frozen base or the reference beside the policy.
    pub state: usize,
    /// f32.
    pub gradients: usize,
    /// What passes keep, scratch, logits of a chunk.
    pub activations: usize,
    /// Tokens of the passes that this is for.
    pub tokens: usize,
    /// Activations are made again in the backward pass, layer by layer.
    pub recompute: bool,
}

impl TrainingPlan {
    /// All of it.
    pub fn bytes(&self) -> usize {
        self.state + self.gradients + self.activations
    }
}

/// What passes of `tokens` tokens and the optimizer of `trainable` take on a GPU with so many multiprocessors.
pub fn training_bytes(
    spec: &ModelSpec,
    trainable: &Trainable,
    (tokens, kept): (usize, Kept),
    multiprocessors: usize,
) -> TrainingPlan {
    let (numbers, beside) = match trainable {
        Trainable::Nothing => (0, 0),
        Trainable::Full { keep_reference } => {
            let (layout, _) = layout::of_model(spec);
            let none = BTreeMap::new();
            let frozen = WeightSizes::of(spec, CudaWeights::dense(&none), 0).weights;
            let beside = if *keep_reference { frozen } else { 0 };
            (optimizer::bytes(&layout), beside)
        }
        Trainable::Lora { config, .. } => lora_bytes(spec, config),
    };
    let sizes = sizes(trainable, tokens, kept, multiprocessors);
    TrainingPlan {
        state: numbers / 4 * 3 + beside,
        gradients: numbers / 4,
        activations: Arena::new(spec, &sizes).bytes,
        tokens,
        recompute: sizes.kept == Kept::Inputs,
    }
}

fn lora_bytes(spec: &ModelSpec, config: &LoraConfig) -> (usize, usize) {
    let (layout, layers) = layout::of_adapters(spec, config);
    (optimizer::bytes(&layout), adapters::bytes(&layout, &layers))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Family;

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
            training_bytes(&spec(), &trainable, (512, Kept::Activations), 132)
        };
        // Every size is a multiple of what buffers are rounded up to.
        let weights = spec().parameters();
        assert_eq!(plan(false).gradients, 4 * weights);
        assert_eq!(plan(false).state, 12 * weights);
        let vectors = 5 * 256;
        assert_eq!(plan(true).state, 12 * weights + 2 * weights + 2 * vectors);
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
        let plan =
            |trainable: &Trainable, kept| training_bytes(&spec(), trainable, (512, kept), 132);
        let kept = plan(&full, Kept::Activations);
        let again = plan(&full, Kept::Inputs);
        assert!(again.recompute && !kept.recompute);
        assert!(again.activations < kept.activations);
        let lora = plan(&Trainable::Lora { config, seed: 1 }, Kept::Inputs);
        // 8 · (256 + 256) numbers a layer; the base of qkv, [512, 256], once more; a stripe.
        let numbers = 2 * 8 * 512;
        assert_eq!(lora.gradients, 4 * numbers);
        assert_eq!(
            lora.state,
            12 * numbers + 2 * numbers + 2 * 2 * 512 * 256 + (32 << 20)
        );
        let nothing = plan(&Trainable::Nothing, Kept::Activations);
        assert_eq!((nothing.state, nothing.gradients), (0, 0));
    }
}
