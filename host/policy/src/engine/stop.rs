//! Finds stop strings in a growing completion. Decodes each token once, in the detokenizer's small window;
//! does not keep the text and does not decide what ends a sequence.

use crate::{
    error::PolicyError,
    tokenizer::{Detokenizer, Tokenizer},
};

/// Watches one completion for its stop strings.
#[derive(Clone, Debug)]
pub(super) struct StopWatch {
    detokenizer: Detokenizer,
    /// The last text, just too short to hold the longest stop string.
    tail: String,
    longest: usize,
}

impl StopWatch {
    /// `None` when there is nothing to look for, so that nothing is decoded.
    pub(super) fn new(stop: &[String]) -> Option<Self> {
        let longest = stop.iter().map(String::len).max()?;
        Some(Self {
            detokenizer: Detokenizer::default(),
            tail: String::new(),
            longest,
        })
    }

    /// Takes the next token; true once a stop string is complete.
    pub(super) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        stop: &[String],
        token: u32,
    ) -> Result<bool, PolicyError> {
        let new = self.detokenizer.push(tokenizer, token)?;
        if new.is_empty() {
            return Ok(false);
        }
        self.tail.push_str(&new);
        let found = stop.iter().any(|s| self.tail.contains(s.as_str()));
        let surplus = self.tail.len().saturating_sub(self.longest - 1);
        let cut = self.tail.ceil_char_boundary(surplus);
        self.tail.drain(..cut);
        Ok(found)
    }
}

/// `text` up to the first stop string in it.
pub(super) fn cut<'a>(text: &'a str, stop: &[String]) -> &'a str {
    let end = stop.iter().filter_map(|s| text.find(s.as_str())).min();
    end.map_or(text, |end| &text[..end])
}
