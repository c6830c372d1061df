//! How many tokens to draft: fixed, or from what drafting and verifying cost and how much is accepted.
//!
//! Adaptive lengths start from measured costs: nothing is drafted before the first plain steps were timed. Then,
//! and whenever drafting does not pay, single sequences are tried in rare steps. Trials that fail become
//! rarer, and all of them together may cost a small share of the time.

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
/// What a step keeps of the sums that the slope is made of.
const SLOPE_KEPT: f64 = 0.98;
/// Speed-up above which drafting begins and below which it ends. A gap, or noise would end what pays a little.
const MARGIN: (f64, f64) = (1.02, 0.98);
/// Plain steps that are timed before the first trial.
const PLAIN_STEPS: u32 = 2;
/// Steps of drafting after which a plain one says what plain ones cost now.
const REFERENCE: u32 = 64;
/// Trials before their result is trusted.
const TRIALS: u32 = 3;
/// Tokens drafted in a trial, for one sequence.
const TRIAL_TOKENS: usize = 3;
/// Steps between trials: at first, and after many that failed.
const PAUSE: (u32, u32) = (16, 64);
/// Share of the time that trials may lose.
const TRIAL_SHARE: f64 = 0.01;
/// Decided tokens that the acceptance remembers: of drafting, and less where only trials tell of a change.
const MEMORY: (f64, f64) = (400.0, 16.0);

/// See the file header. Times in seconds.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    length: Length,
    acceptance: Acceptance,
    line: Line,
    /// One round of drafting over a plain step of the policy with as many sequences (`c` of Leviathan et al.
    /// 2023): a draft model gains from a larger batch as the policy does.
    round: f64,
    /// Time the draft took in this step.
    drafting: f64,
    /// Sequences asked about in this step, and the one on trial, counted over steps.
    asked: usize,
    turn: usize,
    trials: u32,
    /// Steps in a row with a proposal, steps without, and how many there are to be before the next trial.
    busy: u32,
    idle: u32,
    pause: u32,
    /// What trials have lost beyond their share of the time.
    debt: f64,
}

impl Pace {
    pub(super) fn new(length: Length) -> Self {
        Self {
            length,
            acceptance: Acceptance::default(),
            line: Line::default(),
            round: 0.0,
            drafting: 0.0,
            asked: 0,
            turn: 0,
            trials: 0,
            busy: 0,
            idle: 0,
            pause: PAUSE.0,
            debt: 0.0,
        }
    }

    pub(super) fn length(&mut self, acceptance: Option<f64>, rows: usize) -> usize {
        let most = match self.length {
            Length::Fixed(tokens) => return tokens,
            Length::Adaptive(most) => most,
        };
        if self.line.plain < PLAIN_STEPS || self.busy >= REFERENCE {
            return 0;
        }
        let asked = self.asked;
        self.asked += 1;
        let all = self.acceptance.rate();
        // A sequence that has drafted little is judged by the average.
        let pays = self.best(acceptance.map_or(all, |own| 0.5 * (own + all)), rows, most);
        if self.trials >= TRIALS && pays > 0 {
            return pays;
        }
        // The first trials follow each other, unless costs alone say that the best of drafts does not pay.
        let hopeful = self.trials < TRIALS && pays > 0;
        let due = hopeful || (self.idle >= self.pause && self.debt <= 0.0);
        match due && asked == self.turn % rows {
            true => TRIAL_TOKENS.min(most),
            false => 0,
        }
    }

    /// Tokens at which a step of `rows` sequences brings most tokens a second; 0 when that is hardly more than
    /// without.
    fn best(&self, acceptance: f64, rows: usize, most: usize) -> usize {
        let plain = self.line.seconds(rows);
        let rate = |k: usize| {
            let seconds = self.line.seconds(rows * (1 + k)) + plain * self.round * k as f64;
            expected_tokens(acceptance, k) / seconds
        };
        let best = (1..=most).max_by(|a, b| rate(*a).total_cmp(&rate(*b)));
        let least = if self.busy > 0 { MARGIN.1 } else { MARGIN.0 };
        best.filter(|k| rate(*k) > least * rate(0)).unwrap_or(0)
    }

    pub(super) fn drafted(&mut self, rounds: usize, rows: usize, took: Duration) {
        self.drafting = took.as_secs_f64();
        let plain = self.line.seconds(rows);
        if rounds > 0 && plain > 0.0 {
            let each = self.drafting / rounds as f64 / plain;
            let weight = NEWEST.max(1.0 / f64::from(self.trials + 1));
            self.round += weight * (each - self.round);
        }
    }

    pub(super) fn verified(&mut self, step: &StepCost) {
        let plain = self.line.seconds(step.rows);
        let trial = step.proposals == 1 && (self.idle > 0 || self.trials < TRIALS);
        self.line.add(step);
        self.debt -= TRIAL_SHARE * step.seconds;
        if step.proposals == 0 {
            self.busy = 0;
            self.idle = self.idle.saturating_add(1);
            // Time saved up must not end in many trials at once.
            self.debt = self.debt.max(0.0);
        } else {
            self.busy += 1;
            self.idle = 0;
            let memory = if trial { MEMORY.1 } else { MEMORY.0 };
            self.acceptance.add(step, memory);
        }
        if trial {
            self.trials = self.trials.saturating_add(1);
            let worth = plain * step.accepted as f64 / step.rows as f64;
            self.debt += step.seconds + self.drafting - plain - worth;
            self.pause = match 2 * step.accepted > step.proposed {
                true => 1,
                false => (2 * self.pause).clamp(PAUSE.0, PAUSE.1),
            };
        }
        self.drafting = 0.0;
        self.asked = 0;
        self.turn = self.turn.wrapping_add(1);
    }
}

/// Tokens a step yields with `k` drafted ones, each accepted with probability `a` (Leviathan et al. 2023,
/// eq. 1): `(1 − aᵏ⁺¹) / (1 − a)`.
fn expected_tokens(a: f64, k: usize) -> f64 {
    (0..=k).map(|i| a.powi(i as i32)).sum()
}

/// How likely a drafted token is accepted when those before it were: accepted over decided ones. What follows a
/// rejected token is not decided.
#[derive(Clone, Debug)]
struct Acceptance {
    accepted: f64,
    rejected: f64,
}

impl Default for Acceptance {
    /// Optimistic, and soon overruled.
    fn default() -> Self {
        Self {
            accepted: 1.4,
            rejected: 0.6,
        }
    }
}

impl Acceptance {
    fn rate(&self) -> f64 {
        self.accepted / (self.accepted + self.rejected)
    }

    fn add(&mut self, step: &StepCost, memory: f64) {
        let keep = (memory / (self.accepted + self.rejected)).min(1.0);
        self.accepted = keep * self.accepted + step.accepted as f64;
        self.rejected = keep * self.rejected + step.rejected as f64;
    }
}

/// What a step costs by its tokens: a line through the mean of recent steps, its slope from steps that were
/// larger or smaller.
#[derive(Clone, Debug, Default)]
struct Line {
    /// Steps of decoding alone that were timed.
    plain: u32,
    tokens: f64,
    seconds: f64,
    /// Fading sums of squares and products of deviations from the mean.
    xx: f64,
    xy: f64,
    /// The last step that ran prompts. Its tokens are cheaper than decoded ones, which makes the first slope
    /// optimistic and so brings a trial about.
    prompt: Option<(f64, f64)>,
}

impl Line {
    fn add(&mut self, step: &StepCost) {
        let (x, y) = (step.tokens as f64, step.seconds);
        if step.tokens > step.rows + step.proposed {
            self.prompt = Some((x, y));
            return;
        }
        let (dx, dy) = (x - self.tokens, y - self.seconds);
        if self.plain > 0 && dx.abs() >= 0.5 {
            self.xx = SLOPE_KEPT * self.xx + dx * dx;
            self.xy = SLOPE_KEPT * self.xy + dx * dy;
        }
        if step.proposed == 0 {
            self.plain = self.plain.saturating_add(1);
            let weight = NEWEST.max(1.0 / f64::from(self.plain));
            self.tokens += weight * dx;
            self.seconds += weight * dy;
        }
    }

    fn slope(&self) -> f64 {
        let slope = match self.prompt {
            _ if self.xx > 0.0 => self.xy / self.xx,
            Some((x, y)) if x > self.tokens => (y - self.seconds) / (x - self.tokens),
            _ => 0.0,
        };
        slope.clamp(0.0, self.seconds.max(0.0) / self.tokens.max(1.0))
    }

    /// Seconds of a step that decodes so many tokens.
    fn seconds(&self, tokens: usize) -> f64 {
        self.seconds + self.slope() * (tokens as f64 - self.tokens)
    }
}

#[cfg(test)]
mod tests;
