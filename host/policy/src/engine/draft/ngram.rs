//! Prompt lookup: the longest run of last tokens that stood in the text before, and what followed it there.

/// Longest and shortest run that is looked for, as in vLLM's n-gram speculator.
const LONGEST: usize = 4;
const SHORTEST: usize = 2;

/// What followed the latest earlier occurrence of the last tokens, at most `most` tokens.
pub(super) fn lookup(tokens: &[u32], most: usize) -> Vec<u32> {
    for run in (SHORTEST..=LONGEST).rev() {
        let Some(start) = tokens.len().checked_sub(run) else {
            continue;
        };
        let last = &tokens[start..];
        // An occurrence may overlap the last tokens: that is how a repetition is continued.
        let earlier = (0..start).rev().find(|at| tokens[*at..*at + run] == *last);
        if let Some(at) = earlier {
            let follows = &tokens[at + run..];
            return follows[..most.min(follows.len())].to_vec();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_of_the_longest_matches_is_continued() {
        assert_eq!(lookup(&[1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3], 2), [8, 7]);
        // Three tokens match further back than two do.
        assert_eq!(lookup(&[5, 1, 2, 6, 4, 1, 2, 7, 5, 1, 2], 3), [6, 4, 1]);
        assert_eq!(lookup(&[1, 2, 1, 2, 1, 2], 4), [1, 2]);
        assert_eq!(lookup(&[1, 2, 3, 4], 4), [0u32; 0]);
        assert_eq!(lookup(&[1], 4), [0u32; 0]);
    }
}
