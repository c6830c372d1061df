//! Softmax over the whole vocabulary in two passes, without storing a probability. Knows nothing of
//! truncation.
//!
//! The loops are plain lane arrays that the compiler turns into vector code; `pulp` picks the widest
//! instruction set of the machine at run time. Lanes and summation order are fixed, so the result does not
//! depend on which one it is.

/// Tokens per partial sum: f32 inside a chunk, f64 across chunks.
pub(super) const CHUNK: usize = 512;

/// Independent accumulators; two AVX-512 registers.
const LANES: usize = 32;

/// Softmax of one row of logits: `p[i] = exp((logits[i] - max) / temperature) / total`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Softmax {
    pub(super) max: f32,
    pub(super) temperature: f32,
    pub(super) total: f64,
}

impl Softmax {
    /// `None` when `logits` is empty or holds a NaN or an infinity. Leaves the mass of each [`CHUNK`] in
    /// `sums`.
    pub(super) fn of(logits: &[f32], temperature: f32, sums: &mut Vec<f64>) -> Option<Self> {
        let arch = pulp::Arch::new();
        let max = arch.dispatch(FiniteMax { values: logits })?;
        sums.clear();
        arch.dispatch(ExpSums {
            logits,
            max,
            inverse_temperature: temperature.recip(),
            sums,
        });
        let total = sums.iter().sum();
        Some(Self {
            max,
            temperature,
            total,
        })
    }

    /// `(logit - max) / temperature`, the unnormalised log-prob.
    pub(super) fn scaled(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) / f64::from(self.temperature)
    }

    pub(super) fn logprob(&self, logit: f32) -> f64 {
        self.scaled(logit) - self.total.ln()
    }

    /// Lowest id among the most likely tokens.
    pub(super) fn first_max(&self, logits: &[f32]) -> usize {
        logits.iter().position(|l| *l == self.max).unwrap_or(0)
    }

    /// Inverse CDF at `u` in `[0, 1)`: finds the chunk by `sums`, then the token in it.
    pub(super) fn draw(&self, logits: &[f32], sums: &[f64], u: f64) -> usize {
        let mut target = u * self.total;
        let mut chunk = 0;
        while chunk + 1 < sums.len() && target >= sums[chunk] {
            target -= sums[chunk];
            chunk += 1;
        }
        let start = chunk * CHUNK;
        let inside = &logits[start..logits.len().min(start + CHUNK)];
        let mut likeliest = 0;
        for (i, logit) in inside.iter().enumerate() {
            target -= self.scaled(*logit).exp();
            if target < 0.0 {
                return start + i;
            }
            if *logit > inside[likeliest] {
                likeliest = i;
            }
        }
        // `sums` is rounded to f32, so about one draw in 10^7 ends here. Not the last token of the chunk,
        // which may be one that should never be drawn.
        start + likeliest
    }
}

/// The greatest value; `None` if any is NaN or infinite, or there is none.
///
/// A struct with a `call` and not a closure: the call of a closure goes through a shim that is not inlined
/// into the function compiled for the wider instruction set, which then stays SSE2 and takes 1.7 times as long.
struct FiniteMax<'a> {
    values: &'a [f32],
}

impl pulp::NullaryFnOnce for FiniteMax<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn call(self) -> Option<f32> {
        let values = self.values;
        const EXPONENT: u32 = 0x7f80_0000;
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut magnitude = [0u32; LANES];
        let (rows, rest) = values.as_chunks::<LANES>();
        for row in rows {
            for lane in 0..LANES {
                let value = row[lane];
                max[lane] = if value > max[lane] { value } else { max[lane] };
                let bits = value.to_bits() & (u32::MAX >> 1);
                magnitude[lane] = magnitude[lane].max(bits);
            }
        }
        let finite = magnitude.iter().all(|bits| *bits < EXPONENT);
        let finite = finite && rest.iter().all(|value| value.is_finite());
        let max = max
            .iter()
            .chain(rest)
            .fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        (finite && !values.is_empty()).then_some(max)
    }
}

/// Pushes the mass of each [`CHUNK`] to `sums`.
struct ExpSums<'a> {
    logits: &'a [f32],
    max: f32,
    inverse_temperature: f32,
    sums: &'a mut Vec<f64>,
}

impl pulp::NullaryFnOnce for ExpSums<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            logits,
            max,
            inverse_temperature,
            sums,
        } = self;
        let mut exps = [0f32; CHUNK];
        for chunk in logits.chunks(CHUNK) {
            // Two loops: the elementwise one is what the vectoriser does best.
            let exps = &mut exps[..chunk.len()];
            for (exp, logit) in exps.iter_mut().zip(chunk) {
                *exp = exp_nonpositive((logit - max) * inverse_temperature);
            }
            let mut lanes = [0f32; LANES];
            let (rows, rest) = exps.as_chunks::<LANES>();
            for row in rows {
                for (sum, exp) in lanes.iter_mut().zip(row) {
                    *sum += exp;
                }
            }
            for (sum, exp) in lanes.iter_mut().zip(rest) {
                *sum += exp;
            }
            sums.push(lanes.iter().map(|sum| f64::from(*sum)).sum());
        }
    }
}

/// `exp(x)` for `x ≤ 0`, relative error below 2e-7; `exp(-87)` for anything smaller. Cody-Waite reduction
/// and polynomial as in Cephes `expf` (Moshier). `f32::exp` is a call per element and never vectorised.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    // Adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let power = f32::from_bits(exponent.wrapping_add(127) << 23);
    (p * r * r + r + 1.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_2e7_of_the_library() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "exp({x}): relative error {error:e}");
        }
        assert!(exp_nonpositive(-1e30) < 2e-38);
    }

    #[test]
    fn total_is_exact_to_f32_and_bad_values_are_found_in_every_lane() {
        let logits: Vec<f32> = (0..1337)
            .map(|i| ((i * 7919) % 1000) as f32 / 50.0)
            .collect();
        let mut sums = Vec::new();
        let softmax = Softmax::of(&logits, 0.7, &mut sums).unwrap();
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let exact: f64 = logits
            .iter()
            .map(|l| (f64::from(l - max) / f64::from(0.7f32)).exp())
            .sum();
        assert!((softmax.total / exact - 1.0).abs() < 1e-6);
        assert_eq!(softmax.max, max);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 31, 32, 700, 1335, 1336] {
                let mut logits = logits.clone();
                logits[at] = bad;
                assert!(
                    Softmax::of(&logits, 1.0, &mut sums).is_none(),
                    "{bad} at {at}"
                );
            }
        }
        assert!(Softmax::of(&[], 1.0, &mut sums).is_none());
    }
}
