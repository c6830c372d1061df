//! The per-token formulas of the loss: ratios, clipping, importance weights, KL.
//!
//! Works on one sequence at a time and knows no aggregation: it returns each token's loss and slope, the
//! caller multiplies them with the token's weight. Notation: r = exp(logp − old), A the advantage,
//! w the importance weight (constant).

use super::{
    config::{Correction, KlEstimator, LossConfig, Objective},
    loss::LossInput,
    stats::{Gap, LossStats},
};

/// A token's share of the loss, and the derivative of the *sequence's* loss by this token's log-prob
/// (they differ for a sequence ratio, where every token moves every term).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Term {
    pub(super) value: f64,
    pub(super) slope: f64,
}

/// Cap of the ratio for `cispo` when `epsilon_high` is unset (the value of ScaleRL, as TRL recommends).
const CISPO_CAP: f64 = 5.0;

/// Loss terms of the counted `tokens` of one sequence, in order.
pub(super) fn sequence(
    input: &LossInput<'_>,
    config: &LossConfig,
    sequence: usize,
    tokens: &[usize],
    stats: &mut LossStats,
) -> Vec<Term> {
    let advantage = input.advantages[sequence];
    let log_ratio: Vec<f64> = tokens
        .iter()
        .map(|&t| diff(input.logp, input.old, t))
        .collect();
    let weights = importance(input, config, tokens, stats);
    let clip = Clip::of(config, advantage);
    let mut terms = match config.loss_type.objective() {
        Objective::TokenRatio => token_ratio(&log_ratio, &weights, clip),
        Objective::SequenceRatio => sequence_ratio(&log_ratio, &weights, clip),
        Objective::CappedReinforce => {
            let logp = tokens.iter().map(|&t| f64::from(input.logp[t]));
            capped_reinforce(logp, &log_ratio, &weights, clip)
        }
    };
    clip.record(config, &log_ratio, stats);
    stats.record_policy(&log_ratio);
    if let Some(entropy) = input.entropy {
        stats.record_entropy(tokens.iter().map(|&t| f64::from(entropy[t])));
    }
    if let Some(reference) = input.reference {
        for ((term, &t), lr) in terms.iter_mut().zip(tokens).zip(&log_ratio) {
            let (k, dk) = kl(config.kl_estimator, diff(input.logp, reference, t));
            stats.record_kl(k);
            // d(r·k) = r·(k + dk), because dr/dlogp = r.
            let (r, via_r) = if config.kl_bias_correction {
                (lr.exp(), k)
            } else {
                (1.0, 0.0)
            };
            if config.beta != 0.0 {
                term.value += config.beta * r * k;
                term.slope += config.beta * r * (via_r + dk);
            }
        }
    }
    terms
}

/// Difference of two log-probs that `loss` found to be finite.
fn diff(a: &[f32], b: &[f32], t: usize) -> f64 {
    f64::from(a[t]) - f64::from(b[t])
}

/// The clip bounds of a sequence and its advantage.
#[derive(Clone, Copy)]
struct Clip {
    low: f64,
    high: f64,
    delta: f64,
    advantage: f64,
}

impl Clip {
    fn of(config: &LossConfig, advantage: f64) -> Self {
        let (low, high) = match config.loss_type.objective() {
            Objective::CappedReinforce => {
                (f64::NEG_INFINITY, config.epsilon_high.unwrap_or(CISPO_CAP))
            }
            _ => (
                1.0 - config.epsilon,
                1.0 + config.epsilon_high.unwrap_or(config.epsilon),
            ),
        };
        Self {
            low,
            high,
            delta: config.delta.unwrap_or(f64::INFINITY),
            advantage,
        }
    }

    /// −min(min(r, δ)·A, clip(r)·A) and its derivative by r. Where both arms are equal they also have
    /// equal slopes, except at the kinks, where the unclipped arm's is taken.
    fn surrogate(self, r: f64) -> Term {
        let a = self.advantage;
        let free = Term {
            value: r.min(self.delta) * a,
            slope: if r <= self.delta { a } else { 0.0 },
        };
        let inside = (self.low..=self.high).contains(&r);
        let clipped = Term {
            value: r.max(self.low).min(self.high) * a,
            slope: if inside { a } else { 0.0 },
        };
        let least = if free.value <= clipped.value {
            free
        } else {
            clipped
        };
        Term {
            value: -least.value,
            slope: -least.slope,
        }
    }

    /// Counts what was clipped: one ratio per sequence for `gspo`, else one per token.
    fn record(self, config: &LossConfig, log_ratio: &[f64], stats: &mut LossStats) {
        let per_token = || log_ratio.iter().map(|lr| lr.exp()).collect::<Vec<f64>>();
        let Self {
            low,
            high,
            advantage,
            ..
        } = self;
        match config.loss_type.objective() {
            Objective::TokenRatio => stats.record_clipping(&per_token(), low, high, advantage),
            Objective::SequenceRatio => {
                stats.record_clipping(&[mean(log_ratio).exp()], low, high, advantage);
            }
            Objective::CappedReinforce => stats.record_capping(&per_token(), high, advantage),
        }
    }
}

fn token_ratio(log_ratio: &[f64], weights: &[f64], clip: Clip) -> Vec<Term> {
    let one = |(lr, w): (&f64, &f64)| {
        let r = lr.exp();
        let s = clip.surrogate(r);
        Term {
            value: w * s.value,
            slope: w * s.slope * r,
        }
    };
    log_ratio.iter().zip(weights).map(one).collect()
}

/// s = exp(mean log-ratio), ds/dlogp_t = s / n for every token t; each term is w_t·f(s), so each slope is
/// (Σ w)·f'(s)·s / n.
fn sequence_ratio(log_ratio: &[f64], weights: &[f64], clip: Clip) -> Vec<Term> {
    let s = mean(log_ratio).exp();
    let f = clip.surrogate(s);
    let slope = mean(weights) * f.slope * s;
    weights
        .iter()
        .map(|w| Term {
            value: w * f.value,
            slope,
        })
        .collect()
}

/// −min(r, cap)·A·logp with the ratio held constant.
fn capped_reinforce(
    logp: impl Iterator<Item = f64>,
    log_ratio: &[f64],
    weights: &[f64],
    clip: Clip,
) -> Vec<Term> {
    logp.zip(log_ratio)
        .zip(weights)
        .map(|((logp, lr), w)| {
            let slope = -w * lr.exp().min(clip.high) * clip.advantage;
            Term {
                value: slope * logp,
                slope,
            }
        })
        .collect()
}

/// Importance weight of every counted token. 1 when the correction is off or there is nothing to correct
/// for. Recorded are the ratios before truncation or masking, or a masked run would look healthy.
fn importance(
    input: &LossInput<'_>,
    config: &LossConfig,
    tokens: &[usize],
    stats: &mut LossStats,
) -> Vec<f64> {
    let Some(behaviour) = input.behaviour else {
        return vec![1.0; tokens.len()];
    };
    let gap: Vec<f64> = tokens
        .iter()
        .map(|&t| diff(input.old, behaviour, t))
        .collect();
    let per_token = || gap.iter().map(|g| g.exp()).collect::<Vec<f64>>();
    // A sum, not a mean: the importance weight of a sequence is the product over its tokens.
    let per_sequence = || vec![gap.iter().sum::<f64>().exp(); gap.len()];
    let (raw, bound): (Vec<f64>, fn(f64, f64) -> f64) = match config.importance_correction {
        Correction::Off => (per_token(), |rho, _| rho),
        Correction::TokenTruncate => (per_token(), f64::min),
        Correction::TokenMask => (per_token(), zero_above),
        Correction::SequenceTruncate => (per_sequence(), f64::min),
        Correction::SequenceMask => (per_sequence(), zero_above),
    };
    let bounded: Vec<f64> = raw
        .iter()
        .map(|rho| bound(*rho, config.importance_c_max))
        .collect();
    stats.record_sampling(&Gap {
        log: &gap,
        ratio: &raw,
        bounded: &bounded,
    });
    // Off still measures: the gap is a number worth watching exactly when nothing corrects it.
    match config.importance_correction {
        Correction::Off => vec![1.0; tokens.len()],
        _ => bounded,
    }
}

fn zero_above(rho: f64, cap: f64) -> f64 {
    if rho > cap { 0.0 } else { rho }
}

/// The estimator and its derivative by logp, d = logp − ref.
fn kl(estimator: KlEstimator, d: f64) -> (f64, f64) {
    match estimator {
        KlEstimator::K1 => (d, 1.0),
        KlEstimator::K2 => (0.5 * d * d, d),
        // expm1: for d near 0, exp(−d) − 1 + d would be rounding noise.
        KlEstimator::K3 => ((-d).exp_m1() + d, -(-d).exp_m1()),
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}
