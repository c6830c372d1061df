//! The head of a state blob: format, version, dataset size, seed and position, little endian.

use crate::shuffle;

/// Bytes of the head.
const HEAD: usize = 32;

/// Whose blob it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub magic: [u8; 4],
    pub version: u32,
}

/// Where a run stands in its endless walk over the dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Rows of the dataset, at least 1.
    pub rows: u64,
    pub seed: u64,
    /// Rows picked so far, over all epochs.
    pub position: u64,
}

impl Walk {
    /// Whether the next row is the first of an epoch.
    pub fn at_epoch_start(&self) -> bool {
        self.position.is_multiple_of(self.rows)
    }

    /// The next row: in an order of its own each epoch, or in that of the dataset.
    pub fn next_row(&mut self, shuffled: bool) -> u64 {
        let (epoch, index) = (self.position / self.rows, self.position % self.rows);
        self.position += 1;
        if !shuffled {
            return index;
        }
        let key = shuffle::mix(self.seed ^ shuffle::mix(epoch));
        shuffle::at(key, self.rows, index)
    }

    /// Passes over the dataset so far, fractions included.
    pub fn epochs(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a number for people")]
        let epochs = self.position as f64 / self.rows as f64;
        epochs
    }

    /// The head of a blob; what a curriculum keeps besides follows it.
    pub fn to_bytes(self, format: Format) -> Vec<u8> {
        let mut out = format.magic.to_vec();
        out.extend(format.version.to_le_bytes());
        for value in [self.rows, self.seed, self.position] {
            out.extend(value.to_le_bytes());
        }
        out
    }

    /// Reads a blob back for a run over `rows` rows with `seed`, and what follows the head; an empty
    /// blob is a beginning. A blob of another dataset or seed is refused: going on would repeat some
    /// rows of the epoch and leave out others without a word.
    pub fn from_bytes(
        blob: &[u8],
        format: Format,
        rows: u64,
        seed: u64,
    ) -> Result<(Self, &[u8]), String> {
        if blob.is_empty() {
            let position = 0;
            let walk = Self {
                rows,
                seed,
                position,
            };
            return Ok((walk, blob));
        }
        let (magic, rest) = blob.split_first_chunk().ok_or("state is cut off")?;
        let (version, rest) = rest.split_first_chunk().ok_or("state is cut off")?;
        if *magic != format.magic {
            return Err("state belongs to another curriculum".to_owned());
        }
        let (version, ours) = (u32::from_le_bytes(*version), format.version);
        if version != ours {
            return Err(format!(
                "state has version {version}, this plugin writes {ours}"
            ));
        }
        let mut rest = rest;
        let mut word = || {
            let (word, after) = rest.split_first_chunk().ok_or_else(|| {
                format!("state has {} bytes, expected at least {HEAD}", blob.len())
            })?;
            rest = after;
            Ok::<_, String>(u64::from_le_bytes(*word))
        };
        let (was, seeded, position) = (word()?, word()?, word()?);
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
        let walk = Self {
            rows,
            seed,
            position,
        };
        Ok((walk, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        magic: *b"unif",
        version: 1,
    };

    #[test]
    fn round_trip_and_refusals() {
        let walk = Walk {
            rows: 7473,
            seed: u64::MAX,
            position: 1 << 40,
        };
        let mut blob = walk.to_bytes(FORMAT);
        assert_eq!(blob.len(), HEAD);
        blob.extend(b"more");
        let read = Walk::from_bytes(&blob, FORMAT, 7473, u64::MAX).unwrap();
        assert_eq!(read, (walk, b"more".as_slice()));
        let refuse =
            |blob: &[u8], rows, seed| Walk::from_bytes(blob, FORMAT, rows, seed).unwrap_err();
        assert_eq!(
            refuse(&blob, 7472, u64::MAX),
            "state was made for 7473 rows, the dataset has 7472"
        );
        assert!(refuse(&blob, 7473, 0).contains("the run has 0"));
        assert_eq!(
            refuse(&blob[..31], 7473, 0),
            "state has 31 bytes, expected at least 32"
        );
        assert_eq!(refuse(b"abc", 1, 0), "state is cut off");
        assert_eq!(
            refuse(b"bandbandband", 1, 0),
            "state belongs to another curriculum"
        );
        blob[4] = 2;
        assert_eq!(
            refuse(&blob, 7473, 0),
            "state has version 2, this plugin writes 1"
        );
    }

    #[test]
    fn every_row_once_an_epoch() {
        let mut walk = Walk::from_bytes(&[], FORMAT, 12, 3).unwrap().0;
        let mut epoch = || (0..12).map(|_| walk.next_row(true)).collect::<Vec<_>>();
        let (first, second) = (epoch(), epoch());
        for mut order in [first.clone(), second.clone()] {
            order.sort_unstable();
            assert!(order.into_iter().eq(0..12));
        }
        assert_ne!(first, second);
        assert!(walk.at_epoch_start());
        assert_eq!((walk.next_row(false), walk.next_row(false)), (0, 1));
        assert!(!walk.at_epoch_start());
        assert!((walk.epochs() - 26.0 / 12.0).abs() < 1e-12);
    }
}
