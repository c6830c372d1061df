//! Stub.
pub mod sampler {
    use crate::{
        backend::{SampleArgs, Sampled},
        error::PolicyError,
    };
    pub fn sample(logits: &[f32], args: &SampleArgs<'_>) -> Result<Sampled, PolicyError> {
        let t = args.params.temperature;
        let lse = logits
            .iter()
            .map(|l| f64::from(l / t).exp())
            .sum::<f64>()
            .ln();
        let token = (args.position as usize * 7 + 3) % logits.len();
        let lp = (f64::from(logits[token] / t) - lse) as f32;
        Ok(Sampled {
            token: token as u32,
            logprob: lp,
            policy_logprob: lp,
        })
    }
}
