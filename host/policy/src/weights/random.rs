//! Fresh weights for a model that is trained from nothing, and for benchmarks of a shape.

use candle_core::{Device, Tensor};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use rayon::prelude::*;

use super::Weights;
use crate::{error::PolicyError, spec::ModelSpec};

/// Standard deviation of matrices, transformers' `initializer_range`.
const STD: f64 = 0.02;

/// Normal matrices (σ = 0.02, those that write to the residual stream divided by `√(2·layers)` as in
/// GPT-2), norms of ones, biases of zeros. The same seed gives the same weights on every machine.
pub fn random_weights(spec: &ModelSpec, seed: u64) -> Result<Weights, PolicyError> {
    let residual = STD / (2.0 * spec.num_hidden_layers as f64).sqrt();
    let mut weights = Weights::new();
    let mut drawn = 0;
    for (name, shape) in spec.weight_shapes() {
        let n: usize = shape.iter().product();
        let data: Vec<f32> = if name.ends_with("norm.weight") {
            vec![1.0; n]
        } else if name.ends_with(".bias") {
            vec![0.0; n]
        } else {
            let writes = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let std = if writes { residual } else { STD };
            drawn += n;
            normals(seed, drawn - n, n, std)
        };
        weights.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
    }
    Ok(weights)
}

/// Numbers `first..first + n` of the seed's normal sequence. Made by many threads, which find their place in the
/// generator instead of going through what comes before.
fn normals(seed: u64, first: usize, n: usize, std: f64) -> Vec<f32> {
    const PART: usize = 1 << 16;
    let mut out = vec![0f32; n];
    out.par_chunks_mut(PART)
        .enumerate()
        .for_each(|(part, out)| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_word_pos((first + part * PART) as u128 * WORDS);
            for x in out {
                *x = (normal(&mut rng) * std) as f32;
            }
        });
    out
}

/// Words of the generator that a normal number takes.
const WORDS: u128 = 4;

/// Box–Muller; one of the pair is enough here.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let mut unit = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    (-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos()
}
