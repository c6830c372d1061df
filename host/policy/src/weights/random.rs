//! Fresh weights for a model that is trained from nothing, and for benchmarks of a shape.

use candle_core::{Device, Tensor};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::Weights;
use crate::{error::PolicyError, spec::ModelSpec};

/// Standard deviation of matrices, transformers' `initializer_range`.
const STD: f64 = 0.02;

/// Normal matrices (σ = 0.02, those that write to the residual stream divided by `√(2·layers)` as in
/// GPT-2), norms of ones, biases of zeros. The same seed gives the same weights on every machine.
pub fn random_weights(spec: &ModelSpec, seed: u64) -> Result<Weights, PolicyError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let residual = STD / (2.0 * spec.num_hidden_layers as f64).sqrt();
    let mut weights = Weights::new();
    for (name, shape) in spec.weight_shapes() {
        let n: usize = shape.iter().product();
        let data: Vec<f32> = if name.ends_with("norm.weight") {
            vec![1.0; n]
        } else if name.ends_with(".bias") {
            vec![0.0; n]
        } else {
            let writes = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let std = if writes { residual } else { STD };
            (0..n).map(|_| (normal(&mut rng) * std) as f32).collect()
        };
        weights.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
    }
    Ok(weights)
}

/// Box–Muller; one of the pair is enough here.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let mut unit = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    (-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos()
}
