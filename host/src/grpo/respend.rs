//! A step's completions as a budget: groups that a probe finds flat are ended, and others get what they
//! leave.
//!
//! The criterion is DAPO's (Yu et al. 2025, arXiv 2503.14476, §3.2); drawing in waves, so that estimates
//! decide what the rest is spent on, is Reinforce-Ada's (Xiong et al. 2025, arXiv 2510.04996), which goes
//! on with the flat groups instead. DAPO pays for dropped groups with more completions, this does not.
//!
//! On bias: only completions whose advantage within the probe was 0 are left out of the update, and groups
//! that go on keep their probe. But a prompt of pass rate `p` gets past a probe of `k` with probability
//! `1 - p^k - (1-p)^k` rather than with that of its whole group, so prompts near 0 or 1 weigh less
//! than without dynamic sampling, and the rarer outcome of a kept group is drawn a little too often. Larger
//! probes lessen both.

/// Completions of a group's probe out of `planned`: `⌈fraction · planned⌉`, at least 2, since one has
/// nothing to differ from.
pub fn probe(planned: u32, fraction: f64) -> u32 {
    let share = (f64::from(planned) * fraction).ceil() as u32;
    share.max(2).min(planned)
}

/// Cuts a plan to `free` completions, in order: the group that does not fit gets what is left, and those
/// after it 0. So does one that would be cut to a single completion.
pub fn fit(planned: &[u32], mut free: u64) -> Vec<u32> {
    let cut = |&wanted: &u32| {
        let fits = u64::from(wanted).min(free) as u32;
        let taken = if fits < wanted.min(2) { 0 } else { fits };
        free -= u64::from(taken);
        taken
    };
    planned.iter().map(cut).collect()
}

/// Deals `free` completions to groups, one each in turn. A group gets at most as many as were `planned` for
/// it, so that none becomes most of a step; the rest stays unspent.
pub fn deal(planned: &[u32], mut free: u64) -> Vec<u32> {
    let mut extra = vec![0; planned.len()];
    let mut dealt = true;
    while free > 0 && dealt {
        dealt = false;
        for (extra, most) in extra.iter_mut().zip(planned) {
            if free > 0 && *extra < *most {
                *extra += 1;
                free -= 1;
                dealt = true;
            }
        }
    }
    extra
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_a_share_of_two_or_more() {
        let halves: Vec<u32> = (1..=9).map(|n| probe(n, 0.5)).collect();
        assert_eq!(halves, [1, 2, 2, 2, 3, 3, 4, 4, 5]);
        assert_eq!((probe(8, 0.01), probe(8, 0.99)), (2, 8));
    }

    #[test]
    fn a_plan_is_cut_to_the_budget() {
        assert_eq!(fit(&[4, 4, 4], 12), [4, 4, 4]);
        assert_eq!(fit(&[4, 4, 4], 10), [4, 4, 2]);
        // One completion has nothing to differ from, and a group planned as one is the plan's business.
        assert_eq!(fit(&[4, 4, 1], 5), [4, 0, 1]);
        assert_eq!(fit(&[u32::MAX, 3], 7), [7, 0]);
        assert_eq!(fit(&[2], 0), [0]);
    }

    #[test]
    fn what_is_left_is_dealt_in_turn() {
        assert_eq!(deal(&[4, 4, 4], 5), [2, 2, 1]);
        assert_eq!(deal(&[1, 8], 6), [1, 5]);
        // At most twice the plan: 7 of 20 stay.
        assert_eq!(deal(&[5, 8], 20), [5, 8]);
        assert_eq!(deal(&[], 20), [0_u32; 0]);
    }
}
