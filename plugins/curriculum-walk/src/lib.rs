//! A shuffled walk over the rows of a dataset, once per epoch, and how it is kept in a state blob.
//!
//! Shared by the curricula; which rows get how many completions is theirs.

mod shuffle;
mod walk;

pub use walk::{Format, Walk};
