//! The state blob: version, dataset size, seed and position, little endian.

/// Where a run stands in its endless shuffled walk over the dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub rows: u64,
    pub seed: u64,
    /// Rows picked so far, over all epochs.
    pub position: u64,
}

const MAGIC: &[u8; 4] = b"unif";
const VERSION: u32 = 1;

impl State {
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        for value in [self.rows, self.seed, self.position] {
            out.extend(value.to_le_bytes());
        }
        out
    }

    /// Reads a blob back for a run over `rows` rows with `seed`; an empty one is a beginning. A
    /// blob of another dataset or seed is refused: going on would repeat some rows of the epoch
    /// and leave out others without a word.
    pub fn from_bytes(blob: &[u8], rows: u64, seed: u64) -> Result<Self, String> {
        if blob.is_empty() {
            return Ok(Self {
                rows,
                seed,
                position: 0,
            });
        }
        let (head, body) = blob.split_at_checked(8).ok_or("state is cut off")?;
        if head[..4] != *MAGIC {
            return Err("state belongs to another curriculum".to_owned());
        }
        let mut words = body
            .chunks_exact(8)
            .map(|w| w.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
        let version = head[4..]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u32::from(*b));
        if version != VERSION {
            return Err(format!(
                "state has version {version}, this plugin writes {VERSION}"
            ));
        }
        let (Some(was), Some(seeded), Some(position), 24) =
            (words.next(), words.next(), words.next(), body.len())
        else {
            return Err(format!("state has {} bytes, expected 32", blob.len()));
        };
        if was != rows {
            return Err(format!(
                "state was made for {was} rows, the dataset has {rows}"
            ));
        }
        if seeded != seed {
            return Err(format!(
                "state was made with seed {seeded}, the run has {seed}"
            ));
        }
        Ok(Self {
            rows,
            seed,
            position,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let state = State {
            rows: 7473,
            seed: u64::MAX,
            position: 1 << 40,
        };
        let blob = state.to_bytes();
        assert_eq!(State::from_bytes(&blob, 7473, u64::MAX), Ok(state));
        let refuse = |blob: &[u8], rows, seed| State::from_bytes(blob, rows, seed).unwrap_err();
        assert_eq!(
            refuse(&blob, 7472, u64::MAX),
            "state was made for 7473 rows, the dataset has 7472"
        );
        assert!(refuse(&blob, 7473, 0).contains("the run has 0"));
        assert_eq!(
            refuse(&blob[..31], 7473, 0),
            "state has 31 bytes, expected 32"
        );
        assert_eq!(refuse(b"abc", 1, 0), "state is cut off");
        assert_eq!(
            refuse(b"bandbandband", 1, 0),
            "state belongs to another curriculum"
        );
        let mut newer = blob.clone();
        newer[4] = 2;
        assert_eq!(
            refuse(&newer, 7473, 0),
            "state has version 2, this plugin writes 1"
        );
    }
}
