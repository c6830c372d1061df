//! The state blob: the walk's head, the profile the epoch began with, and each row's average reward.

use crate::buckets::{Bucket, MAX_BUCKETS, Profile};
use curriculum_walk::{Format, Walk};

const FORMAT: Format = Format {
    magic: *b"kde ",
    version: 1,
};

/// Most rows whose averages fit in the 8 MiB of a state.
pub const MAX_ROWS: u64 = 1_048_000;

/// 64-bit words of a bucket.
const BUCKET_WORDS: usize = 8;

/// All that is remembered from step to step.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub walk: Walk,
    pub profile: Profile,
    /// Moving average of a row's mean reward; `None` until it has one.
    pub averages: Vec<Option<f64>>,
}

impl State {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.walk.to_bytes(FORMAT);
        let mut word = |bits: u64| out.extend(bits.to_le_bytes());
        word(self.profile.buckets.len() as u64);
        // NaN, which no average is, stands for one that is missing.
        word(self.profile.spread.unwrap_or(f64::NAN).to_bits());
        for b in &self.profile.buckets {
            word(b.n);
            word(u64::from(b.rollouts));
            for value in [b.lo, b.hi, b.mean, b.std, b.min, b.max] {
                word(value.to_bits());
            }
        }
        for average in &self.averages {
            word(average.unwrap_or(f64::NAN).to_bits());
        }
        out
    }

    /// Reads a blob back for a run over `rows` rows with `seed`; an empty one is a beginning. The error
    /// says what does not fit.
    pub fn from_bytes(blob: &[u8], rows: u64, seed: u64) -> Result<Self, String> {
        let count = usize::try_from(rows)
            .ok()
            .filter(|_| (1..=MAX_ROWS).contains(&rows));
        let Some(count) = count else {
            return Err(format!(
                "the dataset has {rows} rows; 1 to {MAX_ROWS} averages fit in a state"
            ));
        };
        let (walk, body) = Walk::from_bytes(blob, FORMAT, rows, seed)?;
        if blob.is_empty() {
            return Ok(Self {
                walk,
                profile: Profile::default(),
                averages: vec![None; count],
            });
        }
        let (words, odd) = body.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let buckets = words.first().copied().unwrap_or_default();
        if buckets > u64::from(MAX_BUCKETS) {
            return Err(format!(
                "state has {buckets} buckets, at most {MAX_BUCKETS}"
            ));
        }
        let of_buckets = buckets as usize * BUCKET_WORDS;
        let expected = 2 + of_buckets + count;
        if words.len() != expected || !odd.is_empty() {
            let (found, head) = (blob.len(), blob.len() - body.len());
            let expected = head + 8 * expected;
            return Err(format!("state has {found} bytes, expected {expected}"));
        }
        let (of_buckets, averages) = words[2..].split_at(of_buckets);
        let buckets = of_buckets.chunks_exact(BUCKET_WORDS).map(bucket);
        Ok(Self {
            walk,
            profile: Profile {
                buckets: buckets.collect::<Result<_, _>>()?,
                spread: number(words[1]),
            },
            averages: averages.iter().map(|w| number(*w)).collect(),
        })
    }
}

fn number(word: u64) -> Option<f64> {
    Some(f64::from_bits(word)).filter(|value| value.is_finite())
}

fn bucket(words: &[u64]) -> Result<Bucket, String> {
    let value = |index: usize| number(words[index]).ok_or("state has a bucket without numbers");
    Ok(Bucket {
        n: words[0],
        rollouts: u32::try_from(words[1])
            .map_err(|_| format!("state has {} rollouts in a bucket", words[1]))?,
        lo: value(2)?,
        hi: value(3)?,
        mean: value(4)?,
        std: value(5)?,
        min: value(6)?,
        max: value(7)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buckets::{Config, profile};

    #[test]
    fn round_trip_and_refusals() {
        let rewards = vec![0.1, 0.0, 1.0, 0.9];
        let state = State {
            walk: Walk {
                rows: 5,
                seed: 7,
                position: 12,
            },
            profile: profile(rewards.clone(), &Config::default(), 8),
            averages: [None]
                .into_iter()
                .chain(rewards.into_iter().map(Some))
                .collect(),
        };
        assert_eq!(state.profile.buckets.len(), 2);
        let blob = state.to_bytes();
        assert_eq!(State::from_bytes(&blob, 5, 7), Ok(state));
        let refuse = |blob: &[u8], rows| State::from_bytes(blob, rows, 7).unwrap_err();
        assert_eq!(
            refuse(&blob, 6),
            "state was made for 5 rows, the dataset has 6"
        );
        assert_eq!(refuse(&blob[..200], 5), "state has 200 bytes, expected 216");
        assert_eq!(
            refuse(&[&blob[..], &[0]].concat(), 5),
            "state has 217 bytes, expected 216"
        );
        let mut damaged = blob.clone();
        damaged[32] = 7;
        assert_eq!(refuse(&damaged, 5), "state has 7 buckets, at most 6");
        damaged.clone_from(&blob);
        damaged[4] = 9;
        assert_eq!(
            refuse(&damaged, 5),
            "state has version 9, this plugin writes 1"
        );
        damaged.clone_from(&blob);
        damaged[64..72].copy_from_slice(&f64::NAN.to_le_bytes());
        assert_eq!(refuse(&damaged, 5), "state has a bucket without numbers");
        assert!(refuse(&[], MAX_ROWS + 1).contains("1048001 rows"));
        assert!(refuse(&[], 0).contains("0 rows"));
    }

    #[test]
    fn the_largest_state_fits_in_the_wit_limit() {
        let most = 32 + 16 + 8 * (BUCKET_WORDS as u64 * u64::from(MAX_BUCKETS) + MAX_ROWS);
        assert!(most <= 8 << 20, "{most}");
    }
}
