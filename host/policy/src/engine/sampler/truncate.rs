//! Top-k, top-p and min-p: which tokens survive, and a draw among them. Sorts only what it must.

use std::cmp::Ordering;

use super::softmax::Softmax;
use crate::types::SamplingParams;

/// A token and `(logit - max) / temperature`, its unnormalised log-prob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) token: u32,
    pub(super) scaled: f64,
}

/// Tokens `e^-12` times as likely as the best one are looked at only if those above do not suffice. A
/// language model's nucleus lies far inside, so the sort sees hundreds of tokens and not the vocabulary.
const NEAR: f64 = -12.0;

pub(super) fn is_on(params: &SamplingParams) -> bool {
    params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0
}

/// Fills `out` with the tokens that may be drawn, most likely first; never empty.
pub(super) fn survivors(
    logits: &[f32],
    full: &Softmax,
    params: &SamplingParams,
    out: &mut Vec<Candidate>,
) {
    collect(logits, full, NEAR, out);
    let top_k = match params.top_k {
        0 => logits.len(),
        k => k as usize,
    };
    let goal = f64::from(params.top_p) * full.total;
    let enough = if params.top_k > 0 {
        out.len() >= top_k
    } else if params.top_p < 1.0 {
        mass(out) >= goal
    } else {
        f64::from(params.min_p).ln() >= NEAR
    };
    if !enough {
        collect(logits, full, f64::NEG_INFINITY, out);
    }
    if top_k < out.len() {
        out.select_nth_unstable_by(top_k - 1, rank);
        out.truncate(top_k);
    }
    if params.top_p < 1.0 {
        // The nucleus is measured within the top-k.
        let base = if params.top_k > 0 {
            mass(out)
        } else {
            full.total
        };
        keep_nucleus(out, f64::from(params.top_p) * base);
    } else if params.min_p <= 0.0 {
        out.sort_unstable_by(rank);
    }
    if params.min_p > 0.0 {
        let floor = f64::from(params.min_p).ln();
        out.retain(|candidate| candidate.scaled >= floor);
        out.sort_unstable_by(rank);
    }
}

/// Sum of the unnormalised probabilities.
pub(super) fn mass(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| c.scaled.exp()).sum()
}

/// The token where the cumulated unnormalised probability passes `target`.
pub(super) fn draw(candidates: &[Candidate], mut target: f64) -> usize {
    let mut chosen = candidates[0];
    for candidate in candidates {
        target -= candidate.scaled.exp();
        if target < 0.0 {
            chosen = *candidate;
            break;
        }
    }
    chosen.token as usize
}

fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.scaled
        .total_cmp(&a.scaled)
        .then_with(|| a.token.cmp(&b.token))
}

fn collect(logits: &[f32], full: &Softmax, floor: f64, out: &mut Vec<Candidate>) {
    let lowest = (f64::from(full.max) + floor * f64::from(full.temperature)) as f32;
    out.clear();
    for (token, logit) in logits.iter().enumerate() {
        if *logit >= lowest {
            out.push(Candidate {
                token: token as u32,
                scaled: full.scaled(*logit),
            });
        }
    }
}

/// Keeps the smallest likeliest-first prefix whose mass reaches `goal`, sorted. Selects and sorts in growing
/// pieces: a flat distribution over a large vocabulary is the only case that sorts everything.
fn keep_nucleus(candidates: &mut Vec<Candidate>, goal: f64) {
    let mut sum = 0.0;
    let mut done = 0;
    let mut piece = 256;
    while done < candidates.len() {
        let rest = &mut candidates[done..];
        let take = piece.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, rank);
        }
        rest[..take].sort_unstable_by(rank);
        for (i, candidate) in rest[..take].iter().enumerate() {
            sum += candidate.scaled.exp();
            if sum >= goal {
                candidates.truncate(done + i + 1);
                return;
            }
        }
        done += take;
        piece *= 4;
    }
}
