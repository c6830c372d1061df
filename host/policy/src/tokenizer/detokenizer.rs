//! Text of a growing token sequence, piece by piece, never half a character. Knows nothing of stop strings;
//! it only makes sure that what it has handed out will not change.

use super::Tokenizer;
use crate::error::PolicyError;

const REPLACEMENT: char = '\u{fffd}';

/// Incremental decoder of one sequence; special tokens are skipped.
///
/// Decoding each token alone is wrong for characters that span tokens and for decoders that look at the
/// token before (leading space); decoding everything at every token is quadratic. So a window of the last
/// two finished pieces is decoded, and what is new in it is handed out.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// Tokens of the window: `context` tokens already handed out, then the rest.
    window: Vec<u32>,
    context: usize,
    /// Bytes of the window's text that were handed out.
    emitted: usize,
}

impl Detokenizer {
    /// Takes one token and returns the text that is now certain, often empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, PolicyError> {
        self.window.push(id);
        let text = tokenizer.decode(&self.window)?;
        // An unfinished character decodes to U+FFFD for now; one that was really sampled waits with it.
        let certain = text.trim_end_matches(REPLACEMENT);
        let complete = certain.len() == text.len();
        // `None` needs a decoder that takes back text, which no byte-level one does; then nothing is new.
        let new = certain.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted += new.len();
        if complete && !new.is_empty() {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.emitted = tokenizer.decode(&self.window)?.len();
        }
        Ok(new)
    }

    /// The rest, when no token follows: an unfinished character comes out as U+FFFD.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String, PolicyError> {
        let text = tokenizer.decode(&self.window)?;
        Ok(text.get(self.emitted..).unwrap_or_default().to_owned())
    }
}
