//! Hand-worked groups.

use super::*;

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} is not {b}");
}

#[test]
fn a_group_worked_by_hand() {
    // 1, 0, 0, 1: mean 1/2, squares 4 · 1/4 = 1, sample variance 1/3.
    let std = (1.0_f64 / 3.0).sqrt();
    let out = advantages(
        &[vec![Some(1.0), Some(0.0), Some(0.0), Some(1.0)]],
        ScaleRewards::Group,
    );
    close(out.values[0][0], 0.5 / (std + 1e-4));
    close(out.values[0][1], -0.5 / (std + 1e-4));
    // The number TRL prints for this group.
    assert!(
        (out.values[0][0] - 0.865_875_4).abs() < 1e-6,
        "{}",
        out.values[0][0]
    );
    close(out.stats.reward.unwrap(), 0.5);
    close(out.stats.reward_std.unwrap(), std);
}

#[test]
fn batch_scale_divides_by_the_deviation_of_all_samples() {
    // 0, 2 | 4, 6: group means 1 and 5, all: mean 3, squares 9 + 1 + 1 + 9 = 20, variance 20/3.
    let groups = [vec![Some(0.0), Some(2.0)], vec![Some(4.0), Some(6.0)]];
    let out = advantages(&groups, ScaleRewards::Batch);
    let d = (20.0_f64 / 3.0).sqrt() + 1e-4;
    close(out.values[0][0], -1.0 / d);
    close(out.values[1][1], 1.0 / d);
    // The logged deviation stays the group's: √2 for both.
    close(out.stats.reward_std.unwrap(), 2.0_f64.sqrt());
}

#[test]
fn no_scale_only_centres() {
    let out = advantages(&[vec![Some(3.0), Some(0.0), Some(0.0)]], ScaleRewards::None);
    assert_eq!(out.values, [[2.0, -1.0, -1.0]]);
}

#[test]
fn skipped_samples_do_not_count() {
    let with = [vec![Some(1.0), None, Some(0.0)], vec![None, None]];
    let without = [vec![Some(1.0), Some(0.0)]];
    let a = advantages(&with, ScaleRewards::Group);
    let b = advantages(&without, ScaleRewards::Group);
    close(a.values[0][0], b.values[0][0]);
    close(a.values[0][2], b.values[0][1]);
    assert_eq!(a.values[0][1], 0.0);
    assert_eq!(a.values[1], [0.0, 0.0]);
    let s = a.stats;
    assert_eq!(
        (s.groups, s.empty_groups, s.scored, s.skipped),
        (1, 1, 2, 3)
    );
    close(s.reward.unwrap(), 0.5);
    close(s.frac_reward_zero_std.unwrap(), 0.0);
}

#[test]
fn groups_of_different_sizes() {
    let out = advantages(
        &[
            vec![Some(1.0), Some(-1.0)],
            vec![Some(0.0), Some(3.0), Some(6.0)],
        ],
        ScaleRewards::Group,
    );
    close(out.values[0][0], 1.0 / (2.0_f64.sqrt() + 1e-4));
    close(out.values[1][2], 3.0 / (3.0 + 1e-4));
    assert_eq!(out.values[1][1], 0.0);
    // Mean over groups of the means 0 and 3, not over the five samples.
    close(out.stats.reward.unwrap(), 1.5);
}

#[test]
fn equal_rewards_give_exactly_zero_and_are_counted() {
    // Three times 0.1 has a mean that is not 0.1 in floating point.
    let groups = [
        vec![Some(0.1); 3],
        vec![Some(0.0), Some(1.0)],
        vec![Some(7.0)],
    ];
    for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
        let out = advantages(&groups, scale);
        assert_eq!(out.values[0], [0.0; 3]);
        assert_eq!(out.values[2], [0.0]);
        close(out.stats.frac_reward_zero_std.unwrap(), 2.0 / 3.0);
    }
    assert!(is_flat(&groups[0]) && !is_flat(&groups[1]) && is_flat(&groups[2]));
    assert!(!is_flat(&[None, None]));
}

#[test]
fn large_rewards_keep_their_differences() {
    let out = advantages(&[vec![Some(1e8), Some(1e8 + 1.0)]], ScaleRewards::Group);
    close(out.values[0][1], 0.5 / (0.5_f64.sqrt() + 1e-4));
}

#[test]
fn without_a_scored_sample_there_are_no_statistics() {
    for groups in [vec![], vec![vec![None, None]]] {
        let stats = advantages(&groups, ScaleRewards::Group).stats;
        let found = (stats.reward, stats.reward_std, stats.frac_reward_zero_std);
        assert_eq!(found, (None, None, None), "{groups:?}");
    }
}
