//! A shuffled order that can be read at any position without being stored.
//!
//! A four-round Feistel network over the next even number of bits is a permutation of that range
//! (Luby and Rackoff 1988); walking its cycles until a value falls below `rows` makes it one of
//! `0..rows`. Shuffling a list instead would cost the whole dataset at every step.

/// Position `index` of the order of `rows` rows keyed by `key`. `index` must be below `rows`.
pub fn at(key: u64, rows: u64, index: u64) -> u64 {
    // The range is less than four times `rows`, so fewer than four rounds are walked on average.
    let bits = (u64::BITS - (rows - 1).leading_zeros()).max(2);
    let half = bits.div_ceil(2);
    let mut value = index;
    loop {
        value = feistel(key, half, value);
        if value < rows {
            return value;
        }
    }
}

fn feistel(key: u64, half: u32, value: u64) -> u64 {
    let mask = (1_u64 << half) - 1;
    let (mut left, mut right) = (value >> half, value & mask);
    for round in 0..4_u64 {
        let f = mix(key ^ mix(right.wrapping_add(round << 56))) & mask;
        (left, right) = (right, left ^ f);
    }
    left << half | right
}

/// The finaliser of SplitMix64: every bit of the input reaches every bit of the output.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_once() {
        for rows in [1, 2, 3, 7, 64, 65, 1000, 7473] {
            for key in [0, 1, u64::MAX] {
                let mut order: Vec<u64> = (0..rows).map(|i| at(key, rows, i)).collect();
                order.sort_unstable();
                assert!(order.into_iter().eq(0..rows), "rows {rows}, key {key}");
            }
        }
        assert!(at(3, u64::MAX, 5) < u64::MAX);
    }

    /// Chi-square over which of 16 rows comes first: 15 degrees of freedom, 37.7 is p = 0.001.
    #[test]
    fn the_first_row_is_uniform() {
        let mut counts = [0_u32; 16];
        for key in 0..16_000 {
            counts[usize::try_from(at(mix(key), 16, 0)).unwrap()] += 1;
        }
        let chi2: f64 = counts
            .iter()
            .map(|c| (f64::from(*c) - 1000.0).powi(2) / 1000.0)
            .sum();
        assert!(chi2 < 37.7, "{chi2} {counts:?}");
    }
}
