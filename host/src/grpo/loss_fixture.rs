//! The batches that the loss tests share.

use super::*;
use crate::grpo::config::{Correction, LossType};

pub(super) const ALL: [LossType; 6] = [
    LossType::Grpo,
    LossType::DrGrpo,
    LossType::Dapo,
    LossType::Bnpo,
    LossType::Gspo,
    LossType::Cispo,
];

/// Owned arrays of a batch, so that tests can bend one of them.
#[derive(Clone)]
pub(super) struct Batch {
    pub(super) offsets: Vec<usize>,
    pub(super) logp: Vec<f32>,
    pub(super) old: Vec<f32>,
    pub(super) reference: Vec<f32>,
    pub(super) behaviour: Vec<f32>,
    pub(super) entropy: Vec<f32>,
    pub(super) advantages: Vec<f64>,
    pub(super) mask: Vec<bool>,
}

impl Batch {
    /// Four sequences of 3, 1, 0 and 5 tokens. All log-probs are multiples of 2⁻⁸, so that steps of 2⁻⁸
    /// are exact in f32. Log-ratios spread over ±0.5: both sides of the clip range, none on an edge.
    pub(super) fn fixture() -> Self {
        let q = |x: &[i32]| x.iter().map(|v| *v as f32 / 256.0).collect::<Vec<f32>>();
        Self {
            offsets: vec![0, 3, 4, 4, 9],
            logp: q(&[-300, -150, -512, -40, -77, -260, -333, -90, -610]),
            old: q(&[-310, -270, -420, -30, -70, -250, -431, -203, -500]),
            reference: q(&[-280, -200, -530, -60, -50, -300, -320, -120, -580]),
            behaviour: q(&[-300, -280, -440, -31, -95, -258, -471, -190, -533]),
            entropy: q(&[10, 20, 30, 40, 50, 60, 70, 80, 90]),
            advantages: vec![1.25, -0.5, 2.0, -0.75],
            mask: vec![true, true, true, true, true, true, false, true, true],
        }
    }

    pub(super) fn input(&self) -> LossInput<'_> {
        LossInput {
            offsets: &self.offsets,
            logp: &self.logp,
            old: &self.old,
            reference: Some(&self.reference),
            behaviour: Some(&self.behaviour),
            entropy: Some(&self.entropy),
            advantages: &self.advantages,
            mask: &self.mask,
        }
    }

    pub(super) fn normalisers(&self) -> Normalisers {
        Normalisers::single_rank(self.advantages.len(), &self.mask, 16)
    }

    pub(super) fn run(&self, config: &LossConfig) -> LossOutput {
        loss(&self.input(), config, &self.normalisers()).unwrap()
    }
}

pub(super) fn close(a: f64, b: f64, tolerance: f64) {
    assert!(
        (a - b).abs() <= tolerance * b.abs().max(1.0),
        "{a} is not {b}"
    );
}

pub(super) fn plain(loss_type: LossType) -> LossConfig {
    LossConfig {
        loss_type,
        importance_correction: Correction::Off,
        ..LossConfig::default()
    }
}

/// Two sequences with A = 2 and −1 and ratios e^0.5, e^−0.5, 1 | e^0.5: at ε = 0.2 the surrogate is
/// 2·1.2 (clipped), 2·e^−0.5, 2 | −e^0.5.
pub(super) fn by_hand() -> Batch {
    Batch {
        offsets: vec![0, 3, 4],
        logp: vec![-0.5, -1.5, -1.0, -0.5],
        old: vec![-1.0, -1.0, -1.0, -1.0],
        reference: vec![-1.0, -1.0, -1.0, -1.5],
        behaviour: vec![-1.0, -1.25, -1.0, -3.0],
        entropy: vec![0.0; 4],
        advantages: vec![2.0, -1.0],
        mask: vec![true; 4],
    }
}
