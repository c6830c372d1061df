//! Statistics of the loss under TRL's metric names, as sums that add up over micro-batches.
//!
//! Owns counting and naming. Means are over counted tokens, `clip_ratio` minima and maxima over sequences,
//! as TRL's; so no number depends on how a step was cut into micro-batches.

/// Sum, extremes and number of what was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Series {
    pub sum: f64,
    pub n: u64,
    pub min: f64,
    pub max: f64,
}

impl Default for Series {
    fn default() -> Self {
        Self {
            sum: 0.0,
            n: 0,
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
        }
    }
}

impl Series {
    fn push(&mut self, x: f64) {
        self.sum += x;
        self.n += 1;
        self.min = self.min.min(x);
        self.max = self.max.max(x);
    }

    fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.n += other.n;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    fn mean(&self) -> f64 {
        self.sum / self.n as f64
    }
}

/// How far sampling and old log-probs of one sequence are apart, per token.
pub(super) struct Gap<'a> {
    /// old − behaviour.
    pub(super) log: &'a [f64],
    /// ρ before truncation or masking.
    pub(super) ratio: &'a [f64],
    /// ρ after it.
    pub(super) bounded: &'a [f64],
}

/// Counters of the loss; add those of micro-batches up with [`LossStats::merge`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossStats {
    /// 1 for a ratio below the clip range that would have lowered the loss further, else 0.
    pub low: Series,
    /// The same above the range.
    pub high: Series,
    /// Either of them.
    pub region: Series,
    /// Per sequence: share of `low` and of `high` among its ratios.
    pub low_by_sequence: Series,
    pub high_by_sequence: Series,
    /// `cispo` instead of the five above: 1 for a ratio above the cap with a positive advantage, else 0.
    pub capped: Series,
    /// Estimate of KL(policy ‖ reference), uncorrected, nats.
    pub kl: Series,
    pub entropy: Series,
    /// exp(logp − old).
    pub ratio: Series,
    /// k3 estimate of KL(old ‖ policy), nats. On the first pass over a rollout the weights are the same,
    /// so this is the numerical gap between the sampling and the training forward pass.
    pub old_kl: Series,
    /// |old − behaviour|, nats.
    pub sampling_gap: Series,
    /// ρ before truncation or masking.
    pub sampling_ratio: Series,
    /// k3 estimate of KL(behaviour ‖ old), nats.
    pub sampling_kl: Series,
    /// 1 for tokens whose weight was truncated or masked, else 0.
    pub sampling_bounded: Series,
}

impl LossStats {
    /// Adds the counters of another micro-batch of the same step.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.all_mut().into_iter().zip(other.clone().all_mut()) {
            mine.merge(theirs);
        }
    }

    /// `(name, value)` of everything that was measured, ready for the metrics file. What was not measured
    /// (no reference, no behaviour log-probs, no token at all) is missing rather than 0 or NaN.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let named = [
            ("kl", &self.kl, Series::mean as fn(&Series) -> f64),
            ("entropy", &self.entropy, Series::mean),
            ("clip_ratio/low_mean", &self.low, Series::mean),
            ("clip_ratio/low_min", &self.low_by_sequence, |s| s.min),
            ("clip_ratio/high_mean", &self.high, Series::mean),
            ("clip_ratio/high_max", &self.high_by_sequence, |s| s.max),
            ("clip_ratio/region_mean", &self.region, Series::mean),
            ("cispo_clip_ratio", &self.capped, Series::mean),
            ("policy/ratio_mean", &self.ratio, Series::mean),
            ("policy/ratio_max", &self.ratio, |s| s.max),
            ("policy/old_kl", &self.old_kl, Series::mean),
            (
                "sampling/sampling_logp_difference/mean",
                &self.sampling_gap,
                Series::mean,
            ),
            (
                "sampling/sampling_logp_difference/max",
                &self.sampling_gap,
                |s| s.max,
            ),
            (
                "sampling/importance_sampling_ratio/min",
                &self.sampling_ratio,
                |s| s.min,
            ),
            (
                "sampling/importance_sampling_ratio/mean",
                &self.sampling_ratio,
                Series::mean,
            ),
            (
                "sampling/importance_sampling_ratio/max",
                &self.sampling_ratio,
                |s| s.max,
            ),
            ("sampling/kl", &self.sampling_kl, Series::mean),
            (
                "sampling/bounded_fraction",
                &self.sampling_bounded,
                Series::mean,
            ),
        ];
        named
            .into_iter()
            .filter(|(_, s, _)| s.n > 0)
            .map(|(name, s, f)| (name, f(s)))
            .collect()
    }

    fn all_mut(&mut self) -> [&mut Series; 14] {
        [
            &mut self.low,
            &mut self.high,
            &mut self.region,
            &mut self.low_by_sequence,
            &mut self.high_by_sequence,
            &mut self.capped,
            &mut self.kl,
            &mut self.entropy,
            &mut self.ratio,
            &mut self.old_kl,
            &mut self.sampling_gap,
            &mut self.sampling_ratio,
            &mut self.sampling_kl,
            &mut self.sampling_bounded,
        ]
    }

    /// Ratios of one sequence (a single one for a sequence ratio) against the clip range.
    pub(super) fn record_clipping(&mut self, ratios: &[f64], low: f64, high: f64, advantage: f64) {
        let (mut below, mut above) = (Series::default(), Series::default());
        for r in ratios {
            let is_low = *r < low && advantage < 0.0;
            let is_high = *r > high && advantage > 0.0;
            below.push(f64::from(u8::from(is_low)));
            above.push(f64::from(u8::from(is_high)));
            self.region.push(f64::from(u8::from(is_low || is_high)));
        }
        self.low_by_sequence.push(below.mean());
        self.high_by_sequence.push(above.mean());
        self.low.merge(&below);
        self.high.merge(&above);
    }

    pub(super) fn record_capping(&mut self, ratios: &[f64], cap: f64, advantage: f64) {
        for r in ratios {
            self.capped
                .push(f64::from(u8::from(*r > cap && advantage > 0.0)));
        }
    }

    pub(super) fn record_policy(&mut self, log_ratio: &[f64]) {
        for lr in log_ratio {
            self.ratio.push(lr.exp());
            self.old_kl.push(lr.exp_m1() - lr);
        }
    }

    pub(super) fn record_entropy(&mut self, entropy: impl Iterator<Item = f64>) {
        entropy.for_each(|e| self.entropy.push(e));
    }

    pub(super) fn record_kl(&mut self, kl: f64) {
        self.kl.push(kl);
    }

    pub(super) fn record_sampling(&mut self, gap: &Gap<'_>) {
        for ((g, ratio), bounded) in gap.log.iter().zip(gap.ratio).zip(gap.bounded) {
            self.sampling_gap.push(g.abs());
            self.sampling_ratio.push(*ratio);
            self.sampling_kl.push(g.exp_m1() - g);
            self.sampling_bounded
                .push(f64::from(u8::from(bounded != ratio)));
        }
    }
}
