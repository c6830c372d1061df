//! What the fuzz targets do with a text of bytes; `tests/tests/fuzz_corpus.rs` does the same with the committed corpus.
//!
//! The oracle is the host's promise to its user: no panic, one clear line for whatever is refused, and nothing in a result
//! that was not checked. Both targets end every call within small limits.

pub mod components;
pub mod exercise;
pub mod verdicts;
