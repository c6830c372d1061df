//! Rewards rewriting a web source so that a generative engine cites it more: what a judge's answer, made from all sources of
//! the row, shows of the rewritten source, less what it shows of the original.

pub mod metrics;
pub mod score;

#[cfg(target_arch = "wasm32")]
mod guest;
