//! Sequences packed for a training or scoring pass, and what follows from how they lie: positions, and which token predicts
//! which.

use std::ops::Range;

/// Sequences laid end to end without padding, for a training or scoring pass.
///
/// A sequence may continue an earlier one, its prefix: its positions go on from there, and its tokens see the prefix's and
/// their own. So the prompt of a group is there, and encoded, once, and its gradients are the sums over the group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// Token ids of all sequences, `[T]`.
    pub ids: Vec<u32>,
    /// Start of each sequence and the total at the end, `[B + 1]`, rising from 0 to `T`.
    pub cu_seqlens: Vec<usize>,
    /// `scored[t]`: token `t` is a target, predicted from the token before it, which for the first one of a sequence is the
    /// last of its prefix. Never true for a first token without a prefix. `[T]`.
    pub scored: Vec<bool>,
    /// Of each sequence, the number of the one that it continues, `[B]`. That one continues none, and the sequences that
    /// continue it follow it without another between them.
    pub prefixes: Vec<Option<usize>>,
}

/// Where a sequence lies in a packed batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub tokens: Range<usize>,
    /// Tokens of the sequence that it continues; empty if there is none.
    pub prefix: Range<usize>,
}

impl PackedBatch {
    /// Appends one sequence of which the tokens from `first_scored` on are targets.
    pub fn push(&mut self, ids: &[u32], first_scored: usize) {
        self.append(ids, first_scored.max(1), None);
    }

    /// Appends a prompt, of which nothing is a target, and the completions that continue it, all of whose tokens are.
    pub fn push_group<'a>(
        &mut self,
        prompt: &[u32],
        completions: impl IntoIterator<Item = &'a [u32]>,
    ) {
        let prefix = self.prefixes.len();
        self.append(prompt, prompt.len(), None);
        for completion in completions {
            self.append(completion, 0, Some(prefix));
        }
    }

    fn append(&mut self, ids: &[u32], first_scored: usize, prefix: Option<usize>) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        self.ids.extend_from_slice(ids);
        self.scored
            .extend((0..ids.len()).map(|t| t >= first_scored));
        self.cu_seqlens.push(self.ids.len());
        self.prefixes.push(prefix);
    }

    /// Number of scored tokens.
    pub fn n_scored(&self) -> usize {
        self.scored.iter().filter(|s| **s).count()
    }

    /// The scored tokens, rising.
    pub fn targets(&self) -> impl Iterator<Item = usize> {
        (0..self.ids.len()).filter(|t| self.scored[*t])
    }

    /// All sequences, in order, of a batch that is [consistent](PackedBatch::is_consistent).
    pub fn spans(&self) -> Vec<Span> {
        let tokens = |s: usize| self.cu_seqlens[s]..self.cu_seqlens[s + 1];
        let sequences = self.prefixes.iter().enumerate();
        sequences
            .map(|(s, prefix)| Span {
                tokens: tokens(s),
                prefix: prefix.map_or(0..0, tokens),
            })
            .collect()
    }

    /// Position of each token in its sequence, prefix included, `[T]`.
    pub fn positions(&self) -> Vec<usize> {
        let spans = self.spans().into_iter();
        spans
            .flat_map(|span| (0..span.tokens.len()).map(move |t| span.prefix.len() + t))
            .collect()
    }

    /// For each scored token the one whose hidden state predicts it, `[n_scored]`. The last token of a prefix may be there
    /// several times.
    pub fn predictors(&self) -> Vec<usize> {
        let before = |span: &Span, t: usize| match t == span.tokens.start {
            true => span.prefix.end - 1,
            false => t - 1,
        };
        let spans = self.spans().into_iter();
        spans
            .flat_map(|span| {
                let scored = span.tokens.clone().filter(|t| self.scored[*t]);
                scored.map(|t| before(&span, t)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Whether lengths match, and prefixes are as their field says.
    pub fn is_consistent(&self) -> bool {
        let total = self.cu_seqlens.last().copied().unwrap_or(0);
        let rising = self.cu_seqlens.is_sorted() && self.cu_seqlens.first().is_none_or(|s| *s == 0);
        total == self.ids.len()
            && self.scored.len() == total
            && self.cu_seqlens.len() == self.prefixes.len() + usize::from(!self.prefixes.is_empty())
            && rising
            && self.prefixes_are_near()
    }

    fn prefixes_are_near(&self) -> bool {
        let near = |(s, prefix): (usize, &Option<usize>)| {
            prefix.is_none_or(|p| {
                p < s
                    && self.prefixes[p].is_none()
                    && self.prefixes[p + 1..s].iter().all(|q| *q == Some(p))
            })
        };
        self.prefixes.iter().enumerate().all(near)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_its_prompt_once_and_goes_on_from_it() {
        let mut batch = PackedBatch::default();
        batch.push(&[1, 2], 0);
        batch.push_group(&[7, 8, 9], [&[4, 5][..], &[6]]);
        assert_eq!(batch.ids, [1, 2, 7, 8, 9, 4, 5, 6]);
        assert_eq!(batch.cu_seqlens, [0, 2, 5, 7, 8]);
        assert_eq!(batch.prefixes, [None, None, Some(1), Some(1)]);
        assert_eq!(batch.positions(), [0, 1, 0, 1, 2, 3, 4, 3]);
        assert_eq!(batch.targets().collect::<Vec<_>>(), [1, 5, 6, 7]);
        assert_eq!(batch.predictors(), [0, 4, 5, 4]);
        assert_eq!(batch.n_scored(), 4);
        let spans = batch.spans();
        assert_eq!((&spans[3].tokens, &spans[3].prefix), (&(7..8), &(2..5)));
        assert_eq!(spans[0].prefix.len(), 0);
        assert!(batch.is_consistent());
    }

    #[test]
    fn prefixes_that_no_kernel_can_read_are_found() {
        let mut batch = PackedBatch::default();
        batch.push_group(&[7, 8, 9], [&[4, 5][..], &[6]]);
        let with = |prefixes: [Option<usize>; 3]| PackedBatch {
            prefixes: prefixes.to_vec(),
            ..batch.clone()
        };
        assert!(with([None, Some(0), Some(0)]).is_consistent());
        assert!(with([None, None, Some(1)]).is_consistent());
        for wrong in [
            // Itself, a later one, a chain, and one with another between.
            [Some(0), None, None],
            [Some(1), None, None],
            [None, Some(0), Some(1)],
            [None, None, Some(0)],
        ] {
            assert!(!with(wrong).is_consistent(), "{wrong:?}");
        }
        let short = PackedBatch {
            prefixes: vec![None],
            ..batch
        };
        assert!(!short.is_consistent());
    }
}
