//! Rewards what a judge says of a completion by a rubric: a number within a range.

pub mod rubric;

#[cfg(target_arch = "wasm32")]
mod guest;
