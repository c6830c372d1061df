//! A suffix automaton per prompt over its completions so far: siblings of this step, and earlier epochs.
//!
//! RL visits a prompt again and again while the policy moves slowly, so that its old completions say a lot
//! about the new ones; so do siblings of one group about each other.

use std::collections::HashMap;

use super::ngram;

/// Tokens kept over all prompts; beyond it the prompts not seen for longest are dropped.
const MOST_TOKENS: usize = 1 << 22;
/// Shortest match that is trusted.
const SHORTEST: usize = 2;
/// Stands between two completions; no tokenizer has it.
const SEPARATOR: u32 = u32::MAX;

/// See the file header.
#[derive(Debug, Default)]
pub struct Suffix {
    by_prompt: HashMap<Vec<u32>, Entry>,
    tokens: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    automaton: Automaton,
    last_use: u64,
}

impl Suffix {
    /// What followed the longest run of last tokens that an earlier completion has, at most `most` tokens;
    /// the latest completion that has it counts. Without one: what the text itself suggests.
    pub(super) fn propose(&self, tokens: &[u32], prompt: usize, most: usize) -> Vec<u32> {
        let entry = self.by_prompt.get(&tokens[..prompt]);
        let found = entry.map(|entry| entry.automaton.follow(&tokens[prompt..], most));
        found
            .filter(|tokens| !tokens.is_empty())
            .unwrap_or_else(|| ngram::lookup(tokens, most))
    }

    /// Takes in a finished completion.
    pub(super) fn learn(&mut self, prompt: &[u32], completion: &[u32]) {
        self.clock += 1;
        let entry = self
            .by_prompt
            .entry(prompt.to_vec())
            .or_insert_with(|| Entry {
                automaton: Automaton::new(),
                last_use: 0,
            });
        entry.last_use = self.clock;
        entry.automaton.extend(SEPARATOR);
        for token in completion {
            entry.automaton.extend(*token);
        }
        self.tokens += completion.len() + 1;
        while self.tokens > MOST_TOKENS && self.by_prompt.len() > 1 {
            self.drop_oldest();
        }
    }

    /// Everything learnt, as numbers for a checkpoint: per prompt, the one not seen for longest first, its
    /// length, the length of its text, and both.
    pub fn export(&self) -> Vec<u32> {
        let mut entries: Vec<_> = self.by_prompt.iter().collect();
        entries.sort_by_key(|(_, entry)| entry.last_use);
        let mut out = Vec::new();
        for (prompt, entry) in entries {
            let text = &entry.automaton.text;
            out.extend([prompt.len() as u32, text.len() as u32]);
            out.extend(prompt);
            out.extend(text);
        }
        out
    }

    /// The inverse of [`Suffix::export`]; `None` for numbers that are not one.
    pub fn import(mut numbers: &[u32]) -> Option<Self> {
        let mut suffix = Self::default();
        while let [prompt, text, rest @ ..] = numbers {
            let (prompt, rest) = rest.split_at_checked(*prompt as usize)?;
            let (text, rest) = rest.split_at_checked(*text as usize)?;
            let (separator, text) = text.split_first()?;
            if *separator != SEPARATOR {
                return None;
            }
            suffix.learn(prompt, text);
            numbers = rest;
        }
        numbers.is_empty().then_some(suffix)
    }

    fn drop_oldest(&mut self) {
        let oldest = self.by_prompt.iter().min_by_key(|(_, e)| e.last_use);
        if let Some(prompt) = oldest.map(|(prompt, _)| prompt.clone())
            && let Some(entry) = self.by_prompt.remove(&prompt)
        {
            self.tokens -= entry.automaton.text.len();
        }
    }
}

/// Blumer et al. 1985, built online in amortised constant time a token.
#[derive(Debug)]
struct Automaton {
    text: Vec<u32>,
    states: Vec<State>,
    last: usize,
}

#[derive(Clone, Debug)]
struct State {
    next: HashMap<u32, usize>,
    link: Option<usize>,
    /// Longest run that leads here.
    len: usize,
    /// Where in the text the latest known occurrence ends.
    end: usize,
}

impl Automaton {
    fn new() -> Self {
        let root = State {
            next: HashMap::new(),
            link: None,
            len: 0,
            end: 0,
        };
        Self {
            text: Vec::new(),
            states: vec![root],
            last: 0,
        }
    }

    fn extend(&mut self, token: u32) {
        self.text.push(token);
        let end = self.text.len();
        let state = self.states.len();
        self.states.push(State {
            next: HashMap::new(),
            link: Some(0),
            len: self.states[self.last].len + 1,
            end,
        });
        let mut at = Some(self.last);
        while let Some(p) = at {
            if let Some(&q) = self.states[p].next.get(&token) {
                let link = self.split(p, q, token);
                self.states[state].link = Some(link);
                break;
            }
            self.states[p].next.insert(token, state);
            at = self.states[p].link;
        }
        self.last = state;
        self.mark(end);
    }

    /// The state of the run that reaches `q` from `p`, split off if `q` has longer ones.
    fn split(&mut self, p: usize, q: usize, token: u32) -> usize {
        if self.states[q].len == self.states[p].len + 1 {
            return q;
        }
        let copy = self.states.len();
        let mut state = self.states[q].clone();
        state.len = self.states[p].len + 1;
        self.states.push(state);
        self.states[q].link = Some(copy);
        let mut at = Some(p);
        while let Some(p) = at {
            match self.states[p].next.get_mut(&token) {
                Some(next) if *next == q => *next = copy,
                _ => break,
            }
            at = self.states[p].link;
        }
        copy
    }

    /// The longest suffixes of the text now end here too. A few levels are enough: those above hold runs
    /// too short to be trusted, and going all the way up would cost the square of a repetitive text.
    fn mark(&mut self, end: usize) {
        let mut at = self.states[self.last].link;
        for _ in 0..8 {
            let Some(state) = at.filter(|s| self.states[*s].len >= SHORTEST) else {
                break;
            };
            self.states[state].end = end;
            at = self.states[state].link;
        }
    }

    /// Tokens that followed the latest occurrence of the longest suffix of `recent`.
    fn follow(&self, recent: &[u32], most: usize) -> Vec<u32> {
        // A match longer than this says no more than one of this length.
        const LONGEST: usize = 32;
        let recent = &recent[recent.len().saturating_sub(LONGEST)..];
        let (mut at, mut len) = (0, 0);
        for token in recent {
            loop {
                if let Some(&next) = self.states[at].next.get(token) {
                    (at, len) = (next, len + 1);
                    break;
                }
                match self.states[at].link {
                    Some(link) => (at, len) = (link, self.states[link].len),
                    None => {
                        len = 0;
                        break;
                    }
                }
            }
        }
        if len < SHORTEST {
            return Vec::new();
        }
        let follows = self.text[self.states[at].end..].iter().take(most);
        follows.take_while(|t| **t != SEPARATOR).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learnt(completions: &[&[u32]]) -> Suffix {
        let mut suffix = Suffix::default();
        for completion in completions {
            suffix.learn(&[100, 101], completion);
        }
        suffix
    }

    fn propose(suffix: &Suffix, recent: &[u32]) -> Vec<u32> {
        let tokens = [&[100, 101], recent].concat();
        suffix.propose(&tokens, 2, 3)
    }

    #[test]
    fn the_longest_match_wins_and_of_equal_ones_the_latest() {
        let suffix = learnt(&[&[1, 2, 3, 4, 5, 6], &[9, 2, 3, 7, 8], &[2, 3, 5, 5]]);
        assert_eq!(propose(&suffix, &[1, 2, 3]), [4, 5, 6]);
        assert_eq!(propose(&suffix, &[0, 2, 3]), [5, 5]);
        assert_eq!(propose(&suffix, &[8, 9, 2, 3]), [7, 8]);
    }

    #[test]
    fn nothing_crosses_completions_or_prompts() {
        let suffix = learnt(&[&[1, 2, 3], &[4, 5]]);
        assert_eq!(propose(&suffix, &[2, 3]), [0u32; 0]);
        assert_eq!(suffix.propose(&[7, 1, 2], 1, 3), [0u32; 0]);
        assert_eq!(
            suffix.propose(&[1, 2, 8, 1, 2], 1, 3),
            [8, 1, 2],
            "its own text"
        );
    }

    #[test]
    fn matches_are_those_of_a_naive_search() {
        // A deterministic text over few symbols, so that runs repeat.
        let text: Vec<u32> = (0..300u32).map(|i| (i * i / 7 + i / 3) % 4).collect();
        let suffix = learnt(&[&text]);
        for end in 5..200 {
            let recent = &text[end - 5..end];
            let found = propose(&suffix, recent);
            let occurs = |at: &usize| text[*at..].starts_with(recent);
            let follows = (0..=text.len() - 5).filter(occurs);
            let expected: Vec<&[u32]> = follows
                .map(|at| &text[at + 5..(at + 8).min(text.len())])
                .collect();
            assert!(expected.contains(&&found[..]), "{recent:?} → {found:?}");
        }
    }

    #[test]
    fn a_checkpoint_proposes_the_same() {
        let mut suffix = learnt(&[&[1, 2, 3, 4, 5, 6], &[9, 2, 3, 7, 8], &[2, 3, 5, 5]]);
        suffix.learn(&[7], &[1, 2, 9]);
        let numbers = suffix.export();
        let again = Suffix::import(&numbers).unwrap();
        for recent in [&[1, 2, 3][..], &[0, 2, 3], &[8, 9, 2, 3]] {
            assert_eq!(propose(&again, recent), propose(&suffix, recent));
        }
        assert_eq!(
            (again.export(), again.tokens),
            (numbers.clone(), suffix.tokens)
        );
        assert!(Suffix::import(&numbers[..numbers.len() - 1]).is_none());
        assert!(Suffix::import(&[1, 1, 5, 6]).is_none());
    }

    #[test]
    fn old_prompts_make_room() {
        let mut suffix = Suffix::default();
        suffix.learn(&[1], &[5, 6, 7]);
        suffix.learn(&[2], &[5, 6, 7]);
        suffix.drop_oldest();
        assert_eq!(suffix.tokens, 4);
        assert_eq!(suffix.propose(&[2, 5, 6], 1, 2), [7]);
        assert_eq!(suffix.propose(&[1, 5, 6], 1, 2), [0u32; 0]);
    }
}
