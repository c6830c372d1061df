//! How far weights and scores of two backends are apart.

use std::collections::BTreeMap;

use candle_core::Tensor;
use grpo_policy::types::TokenScores;

type Tensors = BTreeMap<String, Tensor>;

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat.into_iter().map(f64::from).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// Relative distance of all weights together, and of the one that is furthest, with its name.
pub fn apart(expected: &Tensors, found: &Tensors) -> (f64, f64, String) {
    let names: Vec<&String> = expected.keys().collect();
    assert_eq!(names, found.keys().collect::<Vec<_>>());
    let (mut away, mut long, mut worst) = (0.0, 0.0, (0.0, String::new()));
    for (name, tensor) in expected {
        assert_eq!(tensor.dims(), found[name].dims(), "{name}");
        let (e, f) = (numbers(tensor), numbers(&found[name]));
        let d = norm(e.iter().zip(&f).map(|(e, f)| e - f));
        let n = norm(e.iter().copied());
        (away, long) = (away + d * d, long + n * n);
        let relative = d / n.max(1e-12);
        if relative > worst.0 {
            worst = (relative, name.clone());
        }
    }
    ((away / long).sqrt(), worst.0, worst.1)
}

pub fn bits(tensors: &Tensors) -> Vec<(String, Vec<u32>)> {
    let bits = |t: &Tensor| {
        let flat = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        flat.iter().map(|x| x.to_bits()).collect()
    };
    tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect()
}

pub fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Root mean square of the distances of two models' log-probs.
pub fn spread(a: &TokenScores, b: &TokenScores) -> f64 {
    let pairs = a.logprobs.iter().zip(&b.logprobs);
    let squares: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (squares / a.logprobs.len() as f64).sqrt()
}
