//! Adaptive lengths on simulated machines and drafts, against fixed lengths and none.

use super::*;

const MOST: usize = 8;

/// A machine on which a step of `t` tokens takes `base + slope·t` and a round of drafting `round` for each
/// sequence, give or take a tenth, with a draft that is right with probability `accept`.
#[derive(Clone, Copy, Debug)]
struct Machine {
    base: f64,
    slope: f64,
    round: f64,
    accept: f64,
    rows: usize,
}

/// Uniform in [0, 1): a linear congruential generator.
fn chance(state: &mut u64) -> f64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 11) as f64 / (1u64 << 53) as f64
}

impl Machine {
    /// Steps at this pace; returns seconds and tokens.
    fn run(&self, pace: &mut Pace, steps: usize, seed: u64) -> (f64, f64) {
        let (mut state, mut total, mut tokens) = (seed, 0.0, 0);
        for _ in 0..steps {
            let lengths: Vec<usize> = (0..self.rows)
                .map(|_| pace.length(None, self.rows))
                .collect();
            let asks = lengths.iter().filter(|k| **k > 0).count();
            let rounds = lengths.iter().copied().max().unwrap_or(0);
            let drafting = self.round * lengths.iter().sum::<usize>() as f64;
            let (mut accepted, mut rejected) = (0, 0);
            for k in &lengths {
                let right = (0..*k)
                    .take_while(|_| chance(&mut state) < self.accept)
                    .count();
                accepted += right;
                rejected += usize::from(right < *k);
            }
            let proposed = lengths.iter().sum::<usize>();
            let noise = 0.9 + 0.2 * chance(&mut state);
            let seconds = noise * (self.base + self.slope * (self.rows + proposed) as f64);
            if asks > 0 {
                pace.drafted(rounds, asks, Duration::from_secs_f64(drafting));
            }
            pace.verified(&StepCost {
                rows: self.rows,
                tokens: self.rows + proposed,
                proposals: asks,
                proposed,
                accepted,
                rejected,
                seconds,
            });
            total += seconds + drafting;
            tokens += self.rows + accepted;
        }
        (total, tokens as f64)
    }

    fn plain_seconds(&self) -> f64 {
        self.base + self.slope * self.rows as f64
    }

    /// Tokens a second, over those without a draft.
    fn gain(&self, pace: &mut Pace, steps: usize, seed: u64) -> f64 {
        let (seconds, tokens) = self.run(pace, steps, seed);
        tokens / seconds / (self.rows as f64 / self.plain_seconds())
    }

    /// The same of a new pace: its mean over three runs, and the worst of them.
    fn adaptive(&self) -> (f64, f64) {
        let gain = |seed| self.gain(&mut Pace::new(Length::Adaptive(MOST)), 2000, seed);
        let gains = [gain(1), gain(2), gain(3)];
        let worst = gains.into_iter().fold(f64::INFINITY, f64::min);
        (gains.iter().sum::<f64>() / 3.0, worst)
    }

    /// What the best fixed length brings, in the mean.
    fn best_fixed(&self) -> f64 {
        let gain = |k: usize| {
            let drafted = (self.rows * k) as f64;
            let seconds = self.plain_seconds() + (self.slope + self.round) * drafted;
            expected_tokens(self.accept, k) * self.plain_seconds() / seconds
        };
        (1..=MOST).map(gain).fold(0.0, f64::max)
    }
}

/// Machines from one that waits for memory to one that computes, drafts from lookups to a slow model.
fn machines() -> Vec<Machine> {
    let mut machines = Vec::new();
    for (base, slope) in [(10e-3, 0.05e-3), (30e-3, 7e-3), (2e-3, 2e-3), (0.0, 5e-3)] {
        for share in [0.0, 0.1, 0.5] {
            for accept in [0.05, 0.4, 0.7, 0.95] {
                for rows in [1, 4, 16] {
                    let round = share * (base + slope * rows as f64) / rows as f64;
                    machines.push(Machine {
                        base,
                        slope,
                        round,
                        accept,
                        rows,
                    });
                }
            }
        }
    }
    machines
}

#[test]
fn little_is_lost_where_drafting_cannot_pay() {
    let mut tested = 0;
    for machine in machines() {
        if machine.best_fixed() > 1.0 {
            continue;
        }
        tested += 1;
        let (_, gain) = machine.adaptive();
        assert!(gain > 0.97, "{machine:?}: {gain}");
    }
    assert!(tested > 30, "{tested} machines");
}

#[test]
fn most_is_gained_where_drafting_pays() {
    let mut tested = 0;
    for machine in machines() {
        let best = machine.best_fixed();
        if best < 1.1 {
            continue;
        }
        tested += 1;
        let (gain, _) = machine.adaptive();
        let least = 1.0 + 0.9 * (best - 1.0);
        assert!(gain > least, "{machine:?}: {gain}, the best length {best}");
    }
    assert!(tested > 30, "{tested} machines");
}

/// Two machines or drafts one after the other: the tokens a second of the second part, over those without.
fn after_a_change(first: Machine, second: Machine) -> f64 {
    let mut pace = Pace::new(Length::Adaptive(MOST));
    first.run(&mut pace, 2000, 1);
    second.gain(&mut pace, 4000, 2)
}

#[test]
fn a_draft_that_becomes_better_or_worse_is_noticed() {
    for rows in [1, 4, 16] {
        let good = Machine {
            base: 30e-3,
            slope: 0.5e-3,
            round: 0.0,
            accept: 0.9,
            rows,
        };
        let bad = Machine {
            accept: 0.02,
            ..good
        };
        let gain = after_a_change(bad, good);
        assert!(gain > 1.0 + 0.7 * (good.best_fixed() - 1.0), "{gain}");
        let gain = after_a_change(good, bad);
        assert!(gain > 0.97, "{gain}");
    }
}

#[test]
fn the_first_steps_are_plain_and_a_trial_is_one_sequence() {
    let mut pace = Pace::new(Length::Adaptive(MOST));
    let machine = Machine {
        base: 1e-3,
        slope: 1e-3,
        round: 0.0,
        accept: 0.0,
        rows: 4,
    };
    let mut plain_then = Vec::new();
    for seed in 0..200 {
        let mut look = pace.clone();
        let lengths: Vec<usize> = (0..4).map(|_| look.length(None, 4)).collect();
        assert!(
            lengths.iter().filter(|k| **k > 0).count() <= 1,
            "{lengths:?}"
        );
        plain_then.push(lengths.iter().sum::<usize>());
        machine.run(&mut pace, 1, seed);
    }
    assert_eq!(plain_then[..2], [0, 0]);
    assert!(plain_then.contains(&TRIAL_TOKENS));
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
