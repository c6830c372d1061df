//! Punishes completions that say the same things again.

pub mod ngrams;

#[cfg(target_arch = "wasm32")]
mod guest;
