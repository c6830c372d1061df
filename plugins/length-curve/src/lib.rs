//! Rewards as functions of a completion's length in tokens.

use serde::Deserialize;

/// A half-cosine from one value to another: flat at both ends, steepest in the middle. With a pair for right and one for wrong
/// completions it is the cosine reward of Yeo et al. 2025 ("Demystifying Long Chain-of-Thought Reasoning in LLMs").
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cosine {
    /// Reward of a completion without tokens.
    pub short: f64,
    /// Reward at the limit and beyond it.
    pub long: f64,
}

impl Cosine {
    /// `long + (short − long)·(1 + cos(π·tokens / max_tokens)) / 2`.
    pub fn at(&self, tokens: u32, max_tokens: u32) -> f64 {
        if tokens >= max_tokens {
            return self.long;
        }
        let share = f64::from(tokens) / f64::from(max_tokens);
        let height = (1.0 + cos_pi(share)) / 2.0;
        self.long + (self.short - self.long) * height
    }

    /// # Errors
    /// Names the number that is too large; `name` is whose it is.
    pub fn check(&self, name: &str) -> Result<(), String> {
        for (end, value) in [("short", self.short), ("long", self.long)] {
            if value.abs() > LARGEST {
                return Err(format!("{name}.{end} {value} is beyond ±{LARGEST}"));
            }
        }
        Ok(())
    }
}

/// Largest reward, so that weights on it stay within what the host takes.
const LARGEST: f64 = 1e6;

/// `cos(π·x)` for `x` in [0, 1] by arithmetic alone: what the platform's `cos` rounds to differs from target to target, and a
/// reward should be the same number everywhere. Taylor's series up to x¹⁸, around the nearer end; the error is below 1e-15.
fn cos_pi(x: f64) -> f64 {
    let (folded, sign) = match x > 0.5 {
        true => (1.0 - x, -1.0),
        false => (x, 1.0),
    };
    let square = (folded * std::f64::consts::PI).powi(2);
    let (mut term, mut sum) = (1.0, 1.0);
    for n in 1..=11 {
        let n = f64::from(2 * n);
        term *= -square / (n * (n - 1.0));
        sum += term;
    }
    sign * sum
}

/// The soft punishment of DAPO (Yu et al. 2025, equation 13): 0 up to `max_tokens − cache`, from there linearly down to
/// −1 at `max_tokens`, and −1 beyond.
pub fn overlong(tokens: u32, max_tokens: u32, cache: u32) -> f64 {
    let free = max_tokens - cache;
    match tokens {
        t if t <= free => 0.0,
        t if t < max_tokens => -f64::from(t - free) / f64::from(cache),
        _ => -1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cosine_is_that_of_the_library() {
        for i in 0..=1000 {
            let x = f64::from(i) / 1000.0;
            let library = (std::f64::consts::PI * x).cos();
            assert!((cos_pi(x) - library).abs() < 1e-15, "{x}");
        }
        let curve = Cosine {
            short: 1.0,
            long: 0.5,
        };
        let at = |tokens| curve.at(tokens, 100);
        assert_eq!((at(0), at(100), at(5000)), (1.0, 0.5, 0.5));
        assert!((at(50) - 0.75).abs() < 1e-15);
        // By hand: (1 + cos 45°) / 2 = 0.8535533905932737.
        assert!((at(25) - (0.5 + 0.5 * 0.853_553_390_593_273_7)).abs() < 1e-15);
        let rising = Cosine {
            short: -1.0,
            long: -0.5,
        };
        assert!(rising.at(10, 100) < rising.at(90, 100));
    }

    #[test]
    fn overlong_is_that_of_dapo() {
        let at = |tokens| overlong(tokens, 100, 20);
        assert_eq!(
            [at(0), at(80), at(85), at(90), at(100), at(101)],
            [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
        );
        assert_eq!(
            [
                overlong(99, 100, 0),
                overlong(100, 100, 0),
                overlong(101, 100, 0)
            ],
            [0.0, 0.0, -1.0]
        );
    }
}
