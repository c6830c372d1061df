//! The profile of an epoch as a table for people: its buckets, all rows together, and its health in words.

use crate::buckets::{Bucket, Profile};

/// Below this spread the rewards are `narrow`: nearly all rows look alike, and the buckets part noise.
/// Even rewards have 0.29, half zeros and half ones 0.5.
pub const NARROW: f64 = 0.1;

/// Below this balance the buckets are `lopsided`: the smallest has not a quarter of an equal share.
pub const LOPSIDED: f64 = 0.25;

/// Heads of the table.
pub const COLUMNS: [&str; 10] = [
    "bucket", "from", "to", "rows", "share", "rollouts", "mean", "std", "min", "max",
];

/// What stands where nothing is defined.
const NONE: &str = "–";

/// The table of an epoch. Fields mean what they mean in the WIT.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub title: String,
    pub rows: Vec<Vec<String>>,
    pub notes: Vec<String>,
}

/// The report of `epoch`, which begins over `rows` rows; `group_size` is what rows without a reward get.
pub fn report(profile: &Profile, epoch: u64, rows: u64, group_size: u32) -> Report {
    let (seen, count) = (profile.seen(), profile.buckets.len());
    let named = profile.buckets.iter().enumerate();
    let mut lines: Vec<_> = named
        .map(|(i, bucket)| line(name(i, count), bucket, profile.share(bucket)))
        .collect();
    match whole(profile) {
        Some(all) if count > 1 => {
            let mut cells = line("all", &all, 1.0);
            // Each bucket has its own.
            NONE.clone_into(&mut cells[5]);
            lines.push(cells);
        }
        Some(_) => {}
        None => lines.push(unseen(group_size)),
    }
    let mut notes = Vec::new();
    if seen > 0 {
        notes.extend(boundaries(profile));
        notes.push(spread(profile));
        notes.extend(balance(profile));
    }
    if seen < rows {
        let left = rows - seen;
        notes.push(format!(
            "rows without a reward yet: {left}, with {group_size} rollouts each"
        ));
    }
    Report {
        title: format!("Epoch {epoch}: average rewards of {seen} of {rows} rows"),
        rows: lines,
        notes,
    }
}

/// Name of bucket `i` of `count`, counted from the hardest.
fn name(i: usize, count: usize) -> &'static str {
    match i {
        _ if count == 1 => "all",
        0 => "hard",
        i if i + 1 == count => "easy",
        _ => "medium",
    }
}

fn line(name: &str, bucket: &Bucket, share: f64) -> Vec<String> {
    let Bucket {
        lo,
        hi,
        n,
        rollouts,
        mean,
        std,
        min,
        max,
    } = *bucket;
    let mut cells = vec![name.to_owned(), number(lo), number(hi), n.to_string()];
    cells.push(format!("{:.1} %", 100.0 * share));
    cells.push(rollouts.to_string());
    cells.extend([mean, std, min, max].map(number));
    cells
}

fn unseen(group_size: u32) -> Vec<String> {
    let mut cells = vec![NONE.to_owned(); COLUMNS.len()];
    "all".clone_into(&mut cells[0]);
    "0".clone_into(&mut cells[3]);
    cells[5] = group_size.to_string();
    cells
}

/// All seen rows as one bucket, with no rollouts of its own; `None` if there are none.
fn whole(profile: &Profile) -> Option<Bucket> {
    let (first, last) = (profile.buckets.first()?, profile.buckets.last()?);
    let shares = profile.buckets.iter().map(|b| profile.share(b) * b.mean);
    // The spread is the deviation over the range; halves, since a range can overflow.
    let half_range = last.max / 2.0 - first.min / 2.0;
    Some(Bucket {
        lo: first.lo,
        hi: last.hi,
        n: profile.seen(),
        rollouts: 0,
        mean: shares.sum(),
        std: 2.0 * (profile.spread.unwrap_or(0.0) * half_range),
        min: first.min,
        max: last.max,
    })
}

fn boundaries(profile: &Profile) -> Option<String> {
    let inner: Vec<_> = profile
        .buckets
        .iter()
        .skip(1)
        .map(|b| number(b.lo))
        .collect();
    (!inner.is_empty()).then(|| format!("boundaries {}", inner.join(", ")))
}

fn spread(profile: &Profile) -> String {
    match profile.spread {
        Some(value) if value < NARROW => format!("spread {value:.2}: narrow"),
        Some(value) => format!("spread {value:.2}: ok"),
        None => "spread undefined: all averages are equal".to_owned(),
    }
}

/// Says nothing of a single bucket, which is as large as itself.
fn balance(profile: &Profile) -> Option<String> {
    let value = profile.balance().filter(|_| profile.buckets.len() > 1)?;
    let word = if value < LOPSIDED { "lopsided" } else { "ok" };
    Some(format!("balance {value:.2}: {word}"))
}

/// Three decimals where they say something, else three digits.
fn number(value: f64) -> String {
    if value == 0.0 || (1e-3..1e6).contains(&value.abs()) {
        format!("{value:.3}")
    } else {
        format!("{value:.2e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buckets::{Config, profile};

    fn of(rewards: &[f64], rows: u64) -> Report {
        let profile = profile(rewards.to_vec(), &Config::default(), 8);
        report(&profile, 2, rows, 8)
    }

    #[test]
    fn all_rows_stand_below_the_buckets() {
        let found = of(&[1.0, 0.0, 0.1, 0.9, 0.2], 6);
        assert_eq!(found.title, "Epoch 2: average rewards of 5 of 6 rows");
        let [hard, easy, all] = found.rows.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!([&hard[0], &easy[0], &all[0]], ["hard", "easy", "all"]);
        assert_eq!(hard[3..6], ["3", "60.0 %", "9"]);
        // Deviations of a population: sqrt(0.02 / 3) and 0.05.
        assert_eq!(hard[6..], ["0.100", "0.082", "0.000", "0.200"]);
        assert_eq!(
            easy[3..],
            ["2", "40.0 %", "4", "0.950", "0.050", "0.900", "1.000"]
        );
        assert_eq!(hard[2], easy[1]);
        // Mean 0.44, squares of the distances to it 0.892: sqrt(0.892 / 5) = 0.4224.
        let whole = [
            "0.000", "1.000", "5", "100.0 %", "–", "0.440", "0.422", "0.000", "1.000",
        ];
        assert_eq!(all[1..], whole);
        let notes = [
            format!("boundaries {}", hard[2]),
            "spread 0.42: ok".to_owned(),
            "balance 0.80: ok".to_owned(),
            "rows without a reward yet: 1, with 8 rollouts each".to_owned(),
        ];
        assert_eq!(found.notes, notes);
        assert!(found.rows.iter().all(|row| row.len() == COLUMNS.len()));
    }

    #[test]
    fn health_is_a_word() {
        // One row of 200 is hard: balance 2/200, spread sqrt(199)/200 = 0.07.
        let mut rewards = vec![1.0; 199];
        rewards.push(0.0);
        let found = of(&rewards, 200);
        let notes = ["spread 0.07: narrow", "balance 0.01: lopsided"];
        assert_eq!(found.notes[1..], notes);
        let equal = of(&[0.5; 4], 4);
        assert_eq!(equal.notes, ["spread undefined: all averages are equal"]);
        assert_eq!(equal.rows.len(), 1);
        assert_eq!(
            equal.rows[0][..6],
            ["all", "0.500", "0.500", "4", "100.0 %", "8"]
        );
    }

    #[test]
    fn nothing_seen_is_no_zero() {
        let found = of(&[], 12);
        let cells = ["all", "–", "–", "0", "–", "8", "–", "–", "–", "–"];
        assert_eq!(found.rows, [cells.map(str::to_owned)]);
        assert_eq!(
            found.notes,
            ["rows without a reward yet: 12, with 8 rollouts each"]
        );
    }

    #[test]
    fn numbers_stay_short() {
        let shown = [0.0, 0.25, -3.0, 1e300, 1e-9].map(number);
        assert_eq!(shown, ["0.000", "0.250", "-3.000", "1.00e300", "1.00e-9"]);
    }
}
