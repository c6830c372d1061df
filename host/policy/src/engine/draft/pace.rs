//! How many tokens to draft: fixed, or from what drafting and verifying cost and how much is accepted.

use std::time::Duration;

use super::StepCost;

/// Tokens to draft at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Always so many, whatever it costs: the same seed gives the same completions.
    Fixed(usize),
    /// As many as pay at the moment, at most so many. Measured times decide, and with them which random
    /// numbers are used, so two runs sample different completions from the same distribution.
    Adaptive(usize),
}

/// Weight of the newest measurement.
const NEWEST: f64 = 0.1;
/// A length is changed only for a gain above this.
const HYSTERESIS: f64 = 1.05;
/// Steps without drafting after which it is tried again.
const PROBE_EVERY: u32 = 64;
/// Steps that a trial lasts.
const PROBE_STEPS: u32 = 4;
/// Tokens drafted in a trial, and before anything is known.
const PROBE_TOKENS: usize = 3;

/// See the file header. Times in seconds.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    length: Length,
    /// Share of drafted tokens that were accepted; optimistic at first, so that a trial takes place.
    acceptance: f64,
    /// Running means that fit `step = base + slope·tokens`.
    fit: Fit,
    /// One round of drafting for one sequence of the batch.
    round: f64,
    /// What was chosen last, and steps since it was 0.
    chosen: usize,
    idle: u32,
}

impl Pace {
    pub(super) fn new(length: Length) -> Self {
        Self {
            length,
            acceptance: 0.7,
            fit: Fit::default(),
            round: 0.0,
            chosen: PROBE_TOKENS,
            idle: 0,
        }
    }

    pub(super) fn length(&mut self, acceptance: Option<f64>, rows: usize) -> usize {
        let most = match self.length {
            Length::Fixed(tokens) => return tokens,
            Length::Adaptive(most) => most,
        };
        let Some((base, slope)) = self.fit.line() else {
            return PROBE_TOKENS.min(most);
        };
        if self.chosen == 0 && self.idle >= PROBE_EVERY {
            return PROBE_TOKENS.min(most);
        }
        // A sequence that has drafted little is judged by the average.
        let acceptance = acceptance.map_or(self.acceptance, |own| 0.5 * (own + self.acceptance));
        let rate = |k: usize| {
            let seconds = base / rows as f64 + slope * (1 + k) as f64 + self.round * k as f64;
            expected_tokens(acceptance, k) / seconds
        };
        let best = (0..=most).max_by(|a, b| rate(*a).total_cmp(&rate(*b)));
        let best = best.unwrap_or(0);
        if rate(best) > HYSTERESIS * rate(self.chosen.min(most)) {
            self.chosen = best;
        }
        self.chosen.min(most)
    }

    pub(super) fn drafted(&mut self, rounds: usize, rows: usize, took: Duration) {
        if rounds > 0 {
            let each = took.as_secs_f64() / (rounds * rows) as f64;
            self.round += NEWEST * (each - self.round);
        }
    }

    pub(super) fn verified(&mut self, step: &StepCost) {
        self.fit.add(step.tokens as f64, step.seconds);
        if step.proposed > 0 {
            let accepted = step.accepted as f64 / step.proposed as f64;
            self.acceptance += NEWEST * (accepted - self.acceptance);
        }
        self.idle = match step.proposed {
            0 => self.idle + 1,
            _ if self.idle >= PROBE_EVERY + PROBE_STEPS => 0,
            _ if self.idle >= PROBE_EVERY => self.idle + 1,
            _ => 0,
        };
    }
}

/// Tokens a step yields with `k` drafted ones, each accepted with probability `a` (Leviathan et al. 2023,
/// eq. 1): `(1 − aᵏ⁺¹) / (1 − a)`.
fn expected_tokens(a: f64, k: usize) -> f64 {
    (0..=k).map(|i| a.powi(i as i32)).sum()
}

/// Line through (tokens, seconds) with exponentially fading weights.
#[derive(Clone, Debug, Default)]
struct Fit {
    points: u32,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Fit {
    fn add(&mut self, x: f64, y: f64) {
        // The first points count in full, so that the start value of 0 does not linger.
        let weight = NEWEST.max(1.0 / f64::from(self.points + 1));
        self.points = self.points.saturating_add(1);
        self.x += weight * (x - self.x);
        self.y += weight * (y - self.y);
        self.xx += weight * (x * x - self.xx);
        self.xy += weight * (x * y - self.xy);
    }

    /// `(base, slope)`, neither negative. Before there are points of two sizes all cost is taken to be
    /// fixed, which makes drafting look cheap and so brings the second size about.
    fn line(&self) -> Option<(f64, f64)> {
        if self.points < 3 {
            return None;
        }
        let variance = self.xx - self.x * self.x;
        let slope = if variance > 1e-9 * self.xx {
            ((self.xy - self.x * self.y) / variance).clamp(0.0, self.y / self.x)
        } else {
            0.0
        };
        Some((self.y - slope * self.x, slope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which a step of `t` tokens takes `base + slope·t`, and a draft that is right with
    /// probability `accept`: the length it settles at.
    fn settles(base: f64, slope: f64, round: f64, accept: f64) -> usize {
        let mut pace = Pace::new(Length::Adaptive(8));
        let mut last = 0;
        for i in 0..400 {
            let k = pace.length(None, 1);
            pace.drafted(k, 1, Duration::from_secs_f64(round * k as f64));
            // Deterministic stand-in for chance: the mean over eight steps is right.
            let accepted = (k as f64 * accept + f64::from(i % 8) / 8.0) as usize;
            pace.verified(&StepCost {
                tokens: 1 + k,
                proposed: k,
                accepted: accepted.min(k),
                seconds: base + slope * (1 + k) as f64,
            });
            last = if pace.chosen == 0 { 0 } else { k };
        }
        last
    }

    #[test]
    fn drafts_much_where_verifying_is_free_and_nothing_where_it_is_not() {
        assert!(settles(10e-3, 0.1e-3, 0.1e-3, 0.9) >= 6);
        assert_eq!(settles(0.1e-3, 10e-3, 1e-3, 0.3), 0);
        assert_eq!(settles(10e-3, 0.1e-3, 9e-3, 0.3), 0, "a slow draft");
    }

    #[test]
    fn tries_again_after_a_pause() {
        let mut pace = Pace::new(Length::Adaptive(4));
        let mut drafted = Vec::new();
        for _ in 0..300 {
            let k = pace.length(None, 1);
            drafted.push(k);
            pace.drafted(k, 1, Duration::from_secs_f64(1e-3 * k as f64));
            pace.verified(&StepCost {
                tokens: 1 + k,
                proposed: k,
                accepted: 0,
                seconds: 1e-3 * (1 + k) as f64,
            });
        }
        let off = drafted.iter().filter(|k| **k == 0).count();
        assert!((200..300).contains(&off), "{drafted:?}");
        let last_try = drafted.iter().rposition(|k| *k > 0).unwrap();
        assert!(last_try > 200, "{drafted:?}");
    }

    #[test]
    fn fixed_is_fixed() {
        let mut pace = Pace::new(Length::Fixed(5));
        assert_eq!(pace.length(Some(0.0), 100), 5);
    }

    #[test]
    fn expected_tokens_by_hand() {
        assert!((expected_tokens(0.5, 2) - 1.75).abs() < 1e-12);
        assert_eq!(expected_tokens(1.0, 4), 5.0);
        assert_eq!(expected_tokens(0.3, 0), 1.0);
    }
}
